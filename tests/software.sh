#!/bin/bash
# Ordinary software in a job, behind the whole wall: cargo run -p testbed --bin demo -- tests/software.sh
#
# It needs the network, and of Debian: build-essential cmake git gdb strace python3-venv npm man-db openssh-client e2fsprogs
# libudev1 chromium.
cd "$(mktemp -d)" || exit 1
failed=0

try() {
    local name=$1
    shift
    if ("$@") >"$name.log" 2>&1; then
        echo "works: $name"
    else
        echo "FAILS: $name"
        tail -15 "$name.log"
        failed=1
    fi
}

the_cargo() {
    cargo init --name one one && cd one && cargo add itoa && cargo build && cargo test
}

the_make() {
    printf '#include <stdio.h>\nint main(void) { puts("made"); return 0; }\n' >made.c
    printf 'made: made.c\n\tcc -g -o $@ $<\n' >Makefile
    make -j4 && ./made
}

the_cmake() {
    mkdir c && cd c
    printf 'cmake_minimum_required(VERSION 3.13)\nproject(one C)\nfind_package(Threads REQUIRED)\nadd_executable(one one.c)\nenable_testing()\nadd_test(NAME one COMMAND one)\n' >CMakeLists.txt
    printf 'int main(void) { return 0; }\n' >one.c
    cmake -B build . && cmake --build build && ctest --test-dir build
}

the_npm() {
    mkdir n && cd n && npm init --yes && npm install is-number@7.0.0 && node -e 'process.exit(require("is-number")(5) ? 0 : 1)'
}

the_pip() {
    /usr/bin/python3 -m venv v && v/bin/pip install six==1.16.0 && v/bin/python -c 'import six, multiprocessing; multiprocessing.Pool(2).map(abs, [1, 2])'
}

the_apt() {
    mkdir -p a && cd a && apt-get download hostname && dpkg-deb -x hostname_*.deb root && root/bin/hostname
}

the_git() {
    git init -q g && cd g && git -c user.name=n -c user.email=n@example.com commit -q --allow-empty -m one && git clone -q . ../g2 && git -C ../g2 fsck
}

the_gdb() {
    gdb -batch -ex 'break main' -ex run -ex 'info registers rip' -ex continue ./made | tee out && grep -q 'Breakpoint 1, main' out && grep -q 'exited normally' out
}

the_strace() {
    strace -f -o trace ./made && grep -q execve trace
}

the_chromium() {
    echo '<p id=p></p><script>p.textContent = 6 * 7</script>' >page.html
    chromium --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking \
        --disable-component-update --disable-sync --user-data-dir="$PWD/profile" --dump-dom "file://$PWD/page.html" | tee dom
    grep -q '42' dom
}

the_files() {
    mkdir f && echo one >f/one && cp -a --reflink=auto f f2 && cp --sparse=always f/one f/two && tar cf f.tar --xattrs --acls f &&
        mkdir x && tar xf f.tar -C x && diff -r f x/f && dd if=/dev/zero of=disk bs=1M count=8 && /usr/sbin/mkfs.ext4 -q -F disk &&
        /usr/sbin/filefrag disk && lsattr f
}

# A key agent, which sets the limit of cores; and a pager with a sandbox of its own.
the_agents() {
    eval "$(ssh-agent)" && ssh-keygen -q -t ed25519 -N '' -f key && ssh-add key && ssh-add -l && ssh-agent -k && man ls | grep -q LS
}

# What libusb does when it starts: it cannot without a filter on its socket.
the_udev() {
    /usr/bin/python3 - <<'PYTHON'
from ctypes import CDLL, c_void_p
udev = CDLL("libudev.so.1")
udev.udev_new.restype = udev.udev_monitor_new_from_netlink.restype = c_void_p
monitor = c_void_p(udev.udev_monitor_new_from_netlink(c_void_p(udev.udev_new()), b"udev"))
assert udev.udev_monitor_filter_add_match_subsystem_devtype(monitor, b"usb", b"usb_device") == 0
assert udev.udev_monitor_enable_receiving(monitor) == 0
assert udev.udev_monitor_filter_remove(monitor) == 0
PYTHON
}

# Sockets of the usual kinds, addresses and names; and what a program that would like Multipath TCP is told.
the_network() {
    /usr/bin/python3 - <<'PYTHON'
import socket
for family, protocol in (socket.AF_INET, 0), (socket.AF_INET, socket.IPPROTO_TCP), (socket.AF_INET6, 0):
    socket.socket(family, socket.SOCK_STREAM, protocol)
try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
except PermissionError:
    pass  # net.ipv4.ping_group_range leaves the job's group out
print(socket.if_nameindex(), socket.getaddrinfo("localhost", 80))
try:
    socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
    raise SystemExit("Multipath TCP")
except OSError as error:
    print(error)
PYTHON
}

for name in cargo make cmake npm pip apt git gdb strace files agents udev network chromium; do
    try "$name" "the_$name"
done
exit $failed
