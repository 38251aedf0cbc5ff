# shellcheck shell=bash
# What the machine is made of: QEMU in a directory of its own, and an image from Debian's packages.
# shellcheck disable=SC2154 # $target, $run, $here: of tests/machine/run

# The suite of Debian that the machine's kernel comes from.
kernel=${MACHINE_KERNEL:-bookworm-backports}

# What the tests and stories use in the machine.
packages=(
    systemd-sysv udev dbus libnss-systemd kmod procps iproute2 util-linux e2fsprogs xfsprogs btrfs-progs nftables
    python3 ca-certificates sudo cron at
    initramfs-tools zstd "linux-image-amd64/$kernel"
)

# A lock that ends with this process, so that two runs do not build the same thing.
lock() {
    exec {lock}>"$target/lock"
    flock --timeout 3600 "$lock" || fail "another run builds for more than an hour"
}

unlock() {
    exec {lock}>&-
}

# Debian's packages of this machine's own choice of mirror: `URI SUITE` lines.
debian() {
    # shellcheck disable=SC2016 # apt expands these
    apt-get indextargets --format '$(REPO_URI) $(CODENAME)' 'Created-By: Packages' 'Component: main' |
        grep -E ' bookworm(-updates|-security)?$' | sort -u
}

# A tool of the host's own that is needed here.
host_tool() {
    command -v "$1" >/dev/null || apt-get install --quiet --yes --no-install-recommends "$2" >&2
}

# Unpacked, not installed: its packages would replace newer ones of this host. apt is shown a host that has no package,
# so that all that QEMU needs is there whatever this host has, down to the loader and the C library.
get_qemu() {
    if [ ! -e "$target/qemu/complete" ]; then
        lock
        note "getting QEMU"
        rm -rf "$target/qemu"
        mkdir -p "$target/qemu/archives/partial"
        : >"$run/status"
        apt-get update --quiet >&2
        timeout 900 apt-get install --quiet --yes --no-install-recommends --download-only \
            --option Dir::State::status="$run/status" \
            --option Dir::Cache::archives="$target/qemu/archives" qemu-system-x86 qemu-utils >&2
        local package
        for package in "$target"/qemu/archives/*.deb; do
            dpkg-deb --extract "$package" "$target/qemu"
        done
        rm -r "$target/qemu/archives"
        touch "$target/qemu/complete"
        unlock
    fi
    local lib=lib/x86_64-linux-gnu name
    for name in qemu-system-x86_64 qemu-img; do
        cat >"$run/$name" <<END
#!/bin/sh
export QEMU_MODULE_DIR="$target/qemu/usr/$lib/qemu"
exec "$target/qemu/$lib/ld-linux-x86-64.so.2" --library-path "$target/qemu/$lib:$target/qemu/usr/$lib" \
    "$target/qemu/usr/bin/$name" "\$@"
END
        chmod +x "$run/$name"
    done
    qemu=$run/qemu-system-x86_64
    qemu_img=$run/qemu-img
    firmware=(-L "$target/qemu/usr/share/qemu" -L "$target/qemu/usr/share/seabios")
}

# The image, its kernel and its initrd in $image, made anew where what it is made of has changed; and $booted, for
# the machine that is saved once it has booted.
get_image() {
    local made_of
    made_of=$(cat "$here/image.sh" "$here"/guest/* | sha256sum)
    image=$target/image-$kernel-${made_of:0:12}
    # A saved machine wakes only on the same virtual hardware.
    made_of=$(sha256sum "$here/lib.sh")
    booted=$image/booted-${made_of:0:12}.qcow2
    [ ! -e "$image/complete" ] || return 0
    lock
    if [ ! -e "$image/complete" ]; then
        note "building the machine's image, with the kernel of $kernel"
        # Images of earlier versions of these files, and what was cut off.
        rm -rf --one-file-system "$target/image-$kernel"-????????????
        host_tool mmdebstrap mmdebstrap
        host_tool mke2fs e2fsprogs
        build_root "$image/root"
        cp "$image"/root/boot/vmlinuz-* "$image/vmlinuz"
        cp "$image"/root/boot/initrd.img-* "$image/initrd.img"
        rm -r "$image"/root/boot/*
        # The features are what an operator must choose, too: see the README.
        mke2fs -q -t ext4 -O quota,project -E quotatype=usrquota:prjquota -d "$image/root" "$image/root.ext4" 6G >/dev/null
        rm -rf --one-file-system "$image/root"
        touch "$image/complete"
    fi
    unlock
}

build_root() {
    local root=$1 uri suite sources=()
    while read -r uri suite; do
        sources+=("deb $uri $suite main")
        # The mirror that has bookworm has the kernel's suite.
        [ "$suite" != bookworm ] || [ "$kernel" = bookworm ] || sources+=("deb $uri $kernel main")
    done < <(debian)
    [ ${#sources[@]} -gt 0 ] || fail "apt knows no bookworm: run apt-get update"
    mkdir -p "$image"
    # Nothing but the kernel, and what it cannot be installed without, comes from its suite.
    [ "$kernel" = bookworm ] ||
        printf 'Package: *\nPin: release n=%s\nPin-Priority: 100\n' "$kernel" >"$run/preferences"
    local include
    include=$(IFS=,; echo "${packages[*]}")
    # The hooks of a newer linux-base want a newer run-parts than bookworm's: see guest/initrd for what they do.
    timeout 1800 mmdebstrap --quiet --mode=root --variant=minbase --include="$include" \
        --aptopt='Acquire::Check-Valid-Until "false"' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/kernel/*' \
        --setup-hook="[ ! -e $run/preferences ] || cp $run/preferences \"\$1/etc/apt/preferences.d/kernel\"" \
        --essential-hook="$here/guest/initrd" --customize-hook="$here/guest/install" \
        bookworm "$root" "${sources[@]}" >&2
}
