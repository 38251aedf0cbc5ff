# shellcheck shell=bash
# What a host is made of: QEMU, and an image from Debian's packages.
# shellcheck disable=SC2154 # $target, $run, $here: of tests/machine/run; $suite, $kernel, $filesystem: of hosts/
# shellcheck disable=SC2034 # $append, $board, $console: lib.sh uses them

# What the tests and scenarios use on every host.
packages=(
    systemd-sysv udev dbus libnss-systemd kmod procps iproute2 util-linux e2fsprogs xfsprogs btrfs-progs nftables
    python3 ca-certificates sudo cron at git npm python3-pip
    initramfs-tools zstd
)

# The host of that name, for this scenario: its architecture, the suites of its system and of its kernel, which of that
# suite's kernels, its file system, more of the kernel's command line, and what scenarios must know of it.
load_host() {
    local more
    architecture=amd64
    flavour=
    append=
    facts=()
    customize() { :; }
    # shellcheck source=/dev/null
    . "$here/hosts/$1"
    kernel=${MACHINE_KERNEL:-$kernel}
    packages+=("linux-image-${flavour:-$architecture}/$kernel")
    # QEMU's program and Debian's package of it; and what it emulates.
    case $architecture in
        amd64)
            system_emulator=(qemu-system-x86_64 qemu-system-x86)
            board=(-M q35 -cpu "max,-la57")
            console=ttyS0
            ;;
        arm64)
            system_emulator=(qemu-system-aarch64 qemu-system-arm)
            # Of the processors that it emulates, one of servers, and without pointer authentication, which is slow.
            board=(-M virt -cpu neoverse-n1)
            console=ttyAMA0
            ;;
    esac
    image=$target/image-$1-$kernel
    # A scenario that needs more packages than the others has an image of its own.
    more=$(sed -n 's/^# Packages: //p' "$here/../$2.sh" "$here/scenarios/$2" 2>/dev/null || true)
    if [ -n "$more" ]; then
        # shellcheck disable=SC2206 # words
        packages+=($more)
        image+=-$2
    fi
}

# A lock that ends with this process, so that two runs do not build the same thing.
lock() {
    exec {lock}>"$target/lock"
    flock --timeout 3600 "$lock" || fail "another run builds for more than an hour"
}

unlock() {
    exec {lock}>&-
}

# A tool of this machine's own that is needed here.
local_tool() {
    command -v "$1" >/dev/null || apt-get install --quiet --yes --no-install-recommends "$2" >&2
}

# Does the QEMU that $qemu and $qemu_img name start? The emulation is a module, which may be missing or of another version.
qemu_works() {
    command -v "$qemu" >/dev/null && "$qemu_img" --version >/dev/null 2>&1 &&
        echo quit | timeout 60 "$qemu" -nodefaults -no-user-config -display none -monitor stdio "${firmware[@]}" \
            "${board[@]}" -accel tcg,thread=single -S -netdev user,id=net -device virtio-net-pci,netdev=net,romfile= \
            >"$run/qemu.log" 2>&1
}

# The QEMU that is installed, if it works; or one that is unpacked below cargo's target directory.
get_qemu() {
    qemu=${system_emulator[0]}
    qemu_img=qemu-img
    firmware=()
    qemu_works || get_unpacked_qemu
}

# Unpacked, not installed: its packages would replace newer ones of this machine. apt is shown a machine that has no package,
# and keeps no cache that it shares with the true one, so that all that QEMU needs is there whatever this machine has, down
# to the loader and the C library.
get_unpacked_qemu() {
    local lib=lib/x86_64-linux-gnu unpacked=$target/qemu-$architecture name package
    for name in "${system_emulator[0]}" qemu-img; do
        cat >"$run/$name" <<END
#!/bin/sh
export QEMU_MODULE_DIR="$unpacked/usr/$lib/qemu"
exec "$unpacked/$lib/ld-linux-x86-64.so.2" --library-path "$unpacked/$lib:$unpacked/usr/$lib" \
    "$unpacked/usr/bin/$name" "\$@"
END
        chmod +x "$run/$name"
    done
    qemu=$run/${system_emulator[0]}
    qemu_img=$run/qemu-img
    firmware=(-L "$unpacked/usr/share/qemu" -L "$unpacked/usr/share/seabios")
    lock
    # What an earlier run has unpacked may be incomplete.
    if ! qemu_works; then
        note "getting QEMU"
        rm -rf "$unpacked"
        mkdir -p "$unpacked/archives/partial"
        : >"$run/status"
        apt-get update --quiet=2 >&2
        timeout 900 apt-get install --quiet=2 --yes --no-install-recommends --download-only \
            --option Dir::State::status="$run/status" \
            --option Dir::Cache::pkgcache= --option Dir::Cache::srcpkgcache= \
            --option Dir::Cache::archives="$unpacked/archives" "${system_emulator[1]}" qemu-utils >&2
        for package in "$unpacked"/archives/*.deb; do
            dpkg-deb --extract "$package" "$unpacked"
        done
        rm -r "$unpacked/archives"
        qemu_works || fail "the QEMU below $unpacked does not start: $(cat "$run/qemu.log")"
    fi
    unlock
}

# The image, its kernel and its initrd in $image, made anew where what it is made of has changed; and $booted, for
# the host that is saved once it has booted.
get_image() {
    local made_of earlier=$image
    made_of=$(cat "$here/image.sh" "$here/hosts/$host" "$here"/guest/* - <<<"${packages[*]}" | sha256sum)
    image+=-${made_of:0:12}
    # A saved host wakes only on the same virtual hardware.
    made_of=$({ cat "$here/lib.sh"; "$qemu" --version; } | sha256sum)
    booted=$image/booted-${made_of:0:12}.qcow2
    [ ! -e "$image/complete" ] || return 0
    lock
    if [ ! -e "$image/complete" ]; then
        note "building the image of $host, with the kernel of $kernel"
        # Images of earlier versions of these files, and what was cut off.
        rm -rf --one-file-system "$earlier"-????????????
        local_tool mmdebstrap mmdebstrap
        build_root "$image/root"
        cp "$image"/root/boot/vmlinuz-* "$image/vmlinuz"
        cp "$image"/root/boot/initrd.img-* "$image/initrd.img"
        rm -r "$image"/root/boot/*
        "make_$filesystem" "$image/root" "$image/root.img"
        rm -rf --one-file-system "$image/root"
        touch "$image/complete"
    fi
    unlock
}

# File systems with the content of a directory. Their features are what an operator must choose, too: see the README.
make_ext4() {
    local_tool mke2fs e2fsprogs
    mke2fs -q -t ext4 -O quota,project -E quotatype=usrquota:prjquota -d "$1" "$2" 8G >/dev/null
}

make_xfs() {
    local_tool mkfs.xfs xfsprogs
    truncate -s 8G "$2"
    mkfs.xfs -q "$2"
    copy_root "$1" "$2"
}

make_btrfs() {
    local_tool mkfs.btrfs btrfs-progs
    truncate -s 8G "$2"
    mkfs.btrfs -q "$2"
    copy_root "$1" "$2"
}

copy_root() {
    mkdir "$run/root"
    mounted=$run/root
    mount -o loop "$2" "$mounted" || fail "cannot mount the $filesystem of $2: this machine's kernel may lack $filesystem"
    cp -a "$1/." "$mounted"
    unmount_root
}

unmount_root() {
    if [ -n "$mounted" ]; then
        ! mountpoint -q "$mounted" || umount "$mounted"
        mounted=
    fi
}

build_root() {
    local root=$1 uri security sources include enter=()
    uri=$(packaging/mirror)
    security=$(packaging/mirror -security)
    sources=("deb $uri $suite main")
    case $suite in
        bookworm | trixie)
            sources+=("deb $uri $suite-updates main")
            [ -z "$security" ] || sources+=("deb $security $suite-security main")
            ;;
    esac
    mkdir -p "$image"
    # Nothing but the kernel, and what it cannot be installed without, comes from its suite.
    if [ "$kernel" != "$suite" ]; then
        sources+=("deb $uri $kernel main")
        printf 'Package: *\nPin: release n=%s\nPin-Priority: 100\n' "$kernel" >"$run/preferences"
    fi
    include=$(IFS=,; echo "${packages[*]}")
    export MACHINE_FILESYSTEM=$filesystem MACHINE_FACTS="host=$host ${facts[*]}"
    # The hooks of a newer linux-base want a newer run-parts than bookworm's: see guest/initrd for what they do.
    # Some packages, as Java's, make links among the pages of the manual, which are left out.
    # Each program of the packages is emulated where it is another architecture's. mmdebstrap does not see that it can be.
    [ "$architecture" = amd64 ] || enter=("$here/run-emulated" "$(packaging/cross "$architecture" --emulator)")
    timeout 3600 "${enter[@]}" \
        mmdebstrap --mode=root --variant=minbase --include="$include" \
        --architectures="$architecture" --skip=check/qemu \
        --aptopt='Acquire::Check-Valid-Until "false"' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/kernel/*' \
        --setup-hook='mkdir -p "$1/usr/share/man/man1" "$1/usr/share/man/man7"' \
        --setup-hook="[ ! -e $run/preferences ] || cp $run/preferences \"\$1/etc/apt/preferences.d/kernel\"" \
        --essential-hook="$here/guest/initrd" --customize-hook="$here/guest/install" \
        "$suite" "$root" "${sources[@]}" >&2
    customize "$root"
}
