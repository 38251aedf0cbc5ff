# shellcheck shell=bash
# What the machine is made of: QEMU in a directory of its own, and an image from Debian's packages.
# shellcheck disable=SC2154 # $target, $run, $here: of tests/machine/run

# What the tests and stories use in the machine.
packages=(
    systemd-sysv udev dbus libnss-systemd kmod procps iproute2 util-linux e2fsprogs xfsprogs btrfs-progs nftables
    python3 ca-certificates sudo cron at
    initramfs-tools zstd linux-image-amd64/bookworm-backports
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

# Unpacked, not installed: its packages would replace newer ones of the machine's own.
get_qemu() {
    if [ ! -e "$target/qemu/complete" ]; then
        lock
        note "getting QEMU"
        rm -rf "$target/qemu"
        mkdir -p "$target/qemu/archives/partial"
        apt-get update --quiet >&2
        timeout 900 apt-get install --quiet --yes --no-install-recommends --download-only --reinstall \
            --option Dir::Cache::archives="$target/qemu/archives" qemu-system-x86 >&2
        local package
        for package in "$target"/qemu/archives/*.deb; do
            dpkg-deb --extract "$package" "$target/qemu"
        done
        rm -r "$target/qemu/archives"
        touch "$target/qemu/complete"
        unlock
    fi
    host_tool qemu-img qemu-utils
    local libraries=$target/qemu/lib/x86_64-linux-gnu:$target/qemu/usr/lib/x86_64-linux-gnu
    cat >"$run/qemu" <<END
#!/bin/sh
LD_LIBRARY_PATH=$libraries exec "$target/qemu/usr/bin/qemu-system-x86_64" "\$@"
END
    chmod +x "$run/qemu"
    qemu=$run/qemu
    firmware=(-L "$target/qemu/usr/share/qemu" -L "$target/qemu/usr/share/seabios")
}

# The image, its kernel and its initrd in $image, made anew where what it is made of has changed; and $booted, for
# the machine that is saved once it has booted.
get_image() {
    local made_of
    made_of=$(cat "$here/image.sh" "$here"/guest/* | sha256sum)
    image=$target/image-${made_of:0:12}
    # A saved machine wakes only on the same virtual hardware.
    made_of=$(sha256sum "$here/lib.sh")
    booted=$image/booted-${made_of:0:12}.qcow2
    [ ! -e "$image/complete" ] || return 0
    lock
    if [ ! -e "$image/complete" ]; then
        note "building the machine's image"
        # Images of earlier versions of these files, and what was cut off.
        rm -rf --one-file-system "$target"/image-*
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
        # The mirror that has bookworm has the kernel from backports.
        [ "$suite" != bookworm ] || sources+=("deb $uri bookworm-backports main")
    done < <(debian)
    [ ${#sources[@]} -gt 0 ] || fail "apt knows no bookworm: run apt-get update"
    mkdir -p "$image"
    local include
    include=$(IFS=,; echo "${packages[*]}")
    timeout 1800 mmdebstrap --quiet --mode=root --variant=minbase --include="$include" \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' \
        --essential-hook="$here/guest/initrd" --customize-hook="$here/guest/install" \
        bookworm "$root" "${sources[@]}" >&2
}
