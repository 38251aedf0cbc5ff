#!/bin/bash
# Ordinary software in a job: cargo run -p testbed --bin demo -- tests/software.sh
#
# Parts that need a network are cargo, npm, pip and apt. SOFTWARE names the parts that are run, if not all. It needs these
# packages of Debian, and for the part cargo a toolchain of Rust:
# Packages: build-essential cmake git gdb strace python3-venv npm man-db openssh-client openssh-server e2fsprogs libudev1
# Packages: chromium cpio automake autoconf buildah podman crun runc slirp4netns passt busybox-static postgresql
# Packages: default-jdk-headless gnupg screen minicom socat xvfb xauth x11-utils bzip2 libarchive-tools
# Packages: tmux picocom python3-serial udev
cd "$(mktemp -d)" || exit 1
failed=0

try() {
    local name=$1
    shift
    # In a directory of its own: parts give the same names to what they make.
    if (mkdir "$name" && cd "$name" && "$@") >"$name.log" 2>&1; then
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
    mkdir -p a && cd a && apt-get download hostname && dpkg-deb -x hostname_*.deb root &&
        "$(find root -path '*bin/hostname')"
}

the_git() {
    git init -q g && cd g && git -c user.name=n -c user.email=n@example.com commit -q --allow-empty -m one && git clone -q . ../g2 && git -C ../g2 fsck
}

the_gdb() {
    gdb -batch -ex 'break main' -ex run -ex 'info registers pc' -ex continue ../make/made | tee out && grep -q 'Breakpoint 1, main' out && grep -q 'exited normally' out
}

the_strace() {
    strace -f -o trace ../make/made && grep -q execve trace
}

# Archives keep a user's number in six or seven octal digits; automake asks whether the number fits.
the_cpio() {
    mkdir archives && echo text >archives/file || return
    local format
    for format in odc newc ustar crc; do
        (cd archives && echo file | cpio --quiet -o -H "$format") >"$format.cpio" || return
        mkdir "x-$format" && (cd "x-$format" && cpio --quiet -i <"../$format.cpio") && cmp archives/file "x-$format/file" || return
    done
}

the_ustar() {
    mkdir ustar && echo text >ustar/file || return
    local format
    for format in ustar v7 gnu pax; do
        tar "--format=$format" -cf "$format.tar" ustar && tar tf "$format.tar" ustar/file || return
    done
    bsdtar --format ustar -cf bsd.tar ustar && ar rcU archive.a ustar/file && ar tv archive.a || return
    /usr/bin/python3 -c 'import tarfile
with tarfile.open("python.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
    archive.add("ustar")
assert tarfile.open("python.tar").getmember("ustar/file").uid == __import__("os").getuid()'
}

the_distcheck() {
    mkdir dist && cd dist || return
    printf 'AC_INIT([one], [1])\nAM_INIT_AUTOMAKE([foreign tar-ustar])\nAC_PROG_CC\nAC_CONFIG_FILES([Makefile])\nAC_OUTPUT\n' >configure.ac
    printf 'bin_PROGRAMS = one\none_SOURCES = one.c\nTESTS = one\n' >Makefile.am
    echo 'int main(void) { return 0; }' >one.c
    autoreconf -i && ./configure && make -j2 distcheck && tar tf one-1.tar.gz | grep one-1/one.c
}

# Containers that have the job's user alone, as their root: see docs/hosts.md for what needs more. buildah's own way of
# running a command in an image (`RUN`) without a runtime drops groups, which one user alone must not.
the_image() {
    mkdir image && cp "$(command -v busybox)" image/ || return
    printf 'FROM scratch\nCOPY busybox /bin/busybox\nCMD ["/bin/busybox", "echo", "in the container"]\n' >image/Containerfile
}

the_buildah() {
    the_image && buildah bud --isolation chroot --tag one image && buildah images | grep one &&
        buildah from --name two localhost/one && buildah copy two image/Containerfile /file && buildah commit two three
}

# crun refuses hosts that use cgroup v1 and have cgroup v2 besides; runc does not.
the_podman() {
    local podman=(podman)
    [ ! -d /sys/fs/cgroup/unified ] || podman+=(--runtime runc)
    the_image && mkdir two && printf 'FROM localhost/one\nRUN ["/bin/busybox", "touch", "/made"]\n' >two/Containerfile || return
    "${podman[@]}" build --tag one image && "${podman[@]}" run --rm localhost/one | grep 'in the container' &&
        "${podman[@]}" run --rm --network host localhost/one /bin/busybox id -u | grep '^0$' &&
        "${podman[@]}" build --tag two two && "${podman[@]}" run --rm localhost/two /bin/busybox ls /made | grep /made
}

the_postgresql() {
    local bin
    bin=$(echo /usr/lib/postgresql/*/bin) && "$bin/initdb" --auth trust --locale C.UTF-8 -D data &&
        "$bin/pg_ctl" -D data -w -t 300 -o "-k $PWD -c listen_addresses=127.0.0.1 -p 54321" start || return
    local status=0
    psql -h "$PWD" -p 54321 -d postgres -c 'create table t as select generate_series(1, 1000) n' &&
        psql -h 127.0.0.1 -p 54321 -d postgres -Atc 'select sum(n) from t' | grep 500500 || status=1
    "$bin/pg_ctl" -D data -w -m fast stop && return $status
}

# The JVM asks the host for its name, its memory and its processors, and makes its files in /tmp/hsperfdata_USER.
the_jvm() {
    cat >One.java <<'JAVA'
import java.nio.file.*;
import java.util.stream.*;

public class One {
    public static void main(String[] arguments) throws Exception {
        System.out.println(java.net.InetAddress.getLocalHost());
        Path directory = Files.createTempDirectory("one");
        IntStream.range(0, 100).parallel().forEach(number -> {
            try {
                Files.writeString(directory.resolve("" + number), "text");
            } catch (Exception error) {
                throw new RuntimeException(error);
            }
        });
        if (Files.list(directory).count() != 100) throw new Exception("files are missing");
        Process process = new ProcessBuilder("sh", "-c", "exit 7").start();
        if (process.waitFor() != 7) throw new Exception("a process has ended otherwise");
        try (java.net.ServerSocket server = new java.net.ServerSocket(0)) {
            new java.net.Socket("localhost", server.getLocalPort()).close();
        }
    }
}
JAVA
    javac One.java && java -Xmx64m One && java -XX:+UseZGC -Xmx64m One
}

# An agent with its sockets in /run/user, and keys without a passphrase.
the_gpg() {
    export GNUPGHOME=$PWD/gpg
    mkdir -m 700 gpg && gpg --batch --passphrase '' --quick-generate-key one@example.com && echo text >text &&
        gpg --batch --sign text && gpg --verify text.gpg && gpg --batch --trust-model always -r one@example.com -e -o secret text &&
        gpg --batch -d secret | grep text && gpgconf --kill all
}

# A server of the job's own, and a client of it, with a terminal and without.
the_ssh() {
    mkdir -m 700 ssh && ssh-keygen -q -t ed25519 -N '' -f ssh/host && ssh-keygen -q -t ed25519 -N '' -f ssh/user || return
    printf 'Port 54322\nListenAddress 127.0.0.1\nHostKey %s\nAuthorizedKeysFile %s\nPidFile none\nUsePAM no\nStrictModes no\n' \
        "$PWD/ssh/host" "$PWD/ssh/user.pub" >ssh/config
    /usr/sbin/sshd -D -e -f ssh/config &
    local sshd=$! status=0
    local client=(ssh -F none -p 54322 -i ssh/user -o StrictHostKeyChecking=no -o UserKnownHostsFile=ssh/known -o ConnectionAttempts=60
        -o BatchMode=yes)
    "${client[@]}" 127.0.0.1 'id -un' | grep "^$(id -un)$" && "${client[@]}" -tt 127.0.0.1 tty | grep /dev/pts/ || status=1
    kill $sshd
    return $status
}

# On a terminal of their own, as an operator has them.
on_a_terminal() {
    TERM=vt100 timeout 120 script --quiet --return --command "$1" /dev/null
}

the_screen() {
    TERM=vt100 screen -dmS one sh -c 'echo in the screen >screen.out; sleep 60' || return
    for _ in $(seq 100); do grep -s 'in the screen' screen.out && break; sleep 0.1; done
    TERM=vt100 screen -ls | grep '\.one' && grep 'in the screen' screen.out && screen -S one -X quit &&
        on_a_terminal 'screen sh -c "tty >tty.out"' </dev/null && grep /dev/pts/ tty.out
}

# A port that is the other end of socat's, on which somebody says hello; minicom waits for that and is then left, by keys.
the_minicom() {
    printf 'hello from the port\r\n' >greeting
    printf 'expect {\n  "hello from the port" break\n  timeout 600 exit 1\n}\n! touch met\n' >script.minicom
    socat "PTY,link=$PWD/port,raw,echo=0" "SYSTEM:sleep 2; cat greeting; sleep 3600" &
    local socat=$!
    until [ -e port ]; do kill -0 $socat || return; sleep 0.1; done
    {
        for _ in $(seq 6000); do ! [ -e met ] || break; sleep 0.1; done
        printf '\001x'
        sleep 1
        printf '\r'
        sleep 1
    } | on_a_terminal "minicom -o -D $(readlink -f port) -S $PWD/script.minicom"
    kill $socat
    [ -e met ] && ! ls /var/lock/LCK..* 2>/dev/null
}

the_tmux() {
    TERM=vt100 tmux -L one new-session -d 'tty >tmux.out; sleep 60' || return
    for _ in $(seq 100); do [ -s tmux.out ] && break; sleep 0.1; done
    tmux -L one kill-server && grep /dev/pts/ tmux.out
}

# The two ends of a line: pyserial has both, then picocom has one.
the_serial() {
    socat "PTY,link=$PWD/one,raw,echo=0" "PTY,link=$PWD/two,raw,echo=0" &
    local socat=$!
    until [ -e one ] && [ -e two ]; do kill -0 $socat || return; sleep 0.1; done
    /usr/bin/python3 - <<'PYTHON' || return
import serial, serial.tools.list_ports
one, two = (serial.Serial(name, 115200, timeout=60, exclusive=True) for name in ("one", "two"))
one.write(b"to the board\n")
assert two.readline() == b"to the board\n"
print([port.device for port in serial.tools.list_ports.comports()])
PYTHON
    (for _ in $(seq 60); do printf 'from the board\r\n' >one; sleep 1; done) &
    local board=$!
    on_a_terminal "picocom --exit-after 3000 $(readlink -f two)" >picocom.out
    kill $board $socat
    grep 'from the board' picocom.out
}

the_xvfb() {
    xvfb-run -a sh -c 'xdpyinfo | grep "number of screens" && xwininfo -root | grep Width' &&
        xvfb-run -a -s '-nolisten unix -screen 0 640x480x24' sh -c 'xwininfo -root | grep "Width: 640"'
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
    udevadm info --query=all --name=/dev/null | grep DEVNAME=/dev/null || return
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

parts="cargo make cmake npm pip apt git gdb strace files agents udev network cpio ustar distcheck buildah podman postgresql
    jvm gpg ssh screen tmux minicom serial xvfb chromium"
for name in ${SOFTWARE:-$parts}; do
    try "$name" "the_$name"
done
exit $failed
