# shellcheck shell=bash
# The machine while it runs. It is spoken to through two virtio-serial ports: `control`, a line each way, and `output`.
# shellcheck disable=SC2154 # $run, $target, $here: of tests/machine/run; $image, $booted, $qemu, $qemu_img, $firmware,
# $filesystem, $append, $architecture, $board, $console: of image.sh and hosts/

note() {
    echo "machine: $*" >&2
}

fail() {
    note "$*"
    exit 1
}

# Start QEMU on $run/disk.qcow2, with more of its options.
start_machine() {
    mkfifo "$run"/{control,monitor}.{in,out}
    : >"$run/output"
    # Open for both, so that no open waits for the other end.
    exec {to_machine}<>"$run/control.in" {from_machine}<>"$run/control.out" {to_monitor}<>"$run/monitor.in"
    local rootflags=
    case $filesystem in
        ext4) rootflags=rootflags=usrquota ;;
        xfs) rootflags=rootflags=uquota ;;
    esac
    # All that a saved machine was saved with must be here again: nothing of this depends on the scenario. One thread
    # for both processors: with two, QEMU 7.2 may run an instruction that the kernel has patched away (a static key
    # that the first cpu.max turns), and the kernel stops with "Oops: int3". A service has as long to start as it takes
    # (0: no time-out). The 90 s that systemd gives it may be too short while this machine has other work.
    "$qemu" -nodefaults -no-user-config -display none "${firmware[@]}" \
        "${board[@]}" -accel tcg,thread=single -smp 2 -m 2048 -rtc base=utc \
        -kernel "$image/vmlinuz" -initrd "$image/initrd.img" \
        -append "root=/dev/vda rw rootfstype=$filesystem $rootflags console=$console quiet panic=-1 systemd.default_timeout_start_sec=0 $append" \
        -drive if=none,id=root,format=qcow2,cache=unsafe,file="$run/disk.qcow2" \
        -device virtio-blk-pci,drive=root \
        -drive if=none,id=bundle,format=raw,readonly=on,file="$run/bundle.ext4" \
        -device virtio-blk-pci,drive=bundle \
        -device virtio-rng-pci -device virtio-serial-pci \
        -device qemu-xhci,id=usb -device usb-hub,bus=usb.0,port=1,port-power=on \
        -netdev user,id=net -device virtio-net-pci,netdev=net,romfile= \
        -chardev pipe,id=control,path="$run/control" -device virtserialport,chardev=control,name=control \
        -chardev file,id=output,path="$run/output",append=on -device virtserialport,chardev=output,name=output \
        -chardev pipe,id=monitor,path="$run/monitor" -mon chardev=monitor \
        -serial "file:$run/console" \
        "$@" </dev/null >"$run/qemu.log" 2>&1 &
    qemu_pid=$!
}

# Wait for a line of the machine's that is this pattern, so many seconds; it is then in $answer.
await() {
    local end=$((SECONDS + $2)) partial='' piece
    while [ $SECONDS -lt $end ]; do
        if read -r -t 1 piece <&"$from_machine"; then
            answer=$partial$piece
            partial=
            # shellcheck disable=SC2053 # it is a pattern
            [[ $answer == $1 ]] && return
            note "unexpected: $answer"
        elif ! kill -0 "$qemu_pid" 2>/dev/null; then
            cat "$run/qemu.log" >&2
            fail "the machine stopped by itself: see $target/last/console"
        else
            # The second was over in the middle of a line.
            partial+=$piece
        fi
    done
    note "time-out: no '$1' after $2 s; see $target/last/console"
    exit 124
}

# End the machine at once, whatever it does. What it leaves is in $target/last.
stop_machine() {
    if [ -n "$qemu_pid" ]; then
        kill -KILL "$qemu_pid" 2>/dev/null || true
        wait "$qemu_pid" 2>/dev/null || true
        qemu_pid=
        mkdir -p "$target/last"
        cp "$run"/{console,output,qemu.log} "$target/last/" 2>/dev/null || true
    fi
}

# Boot the image once and save the machine as it is when it waits for a scenario.
boot_once() {
    note "booting for the first time (some minutes, under emulation)"
    "$qemu_img" create -q -f qcow2 -b "$image/root.img" -F raw "$run/disk.qcow2"
    start_machine
    await ready 900
    printf 'savevm booted\nquit\n' >&"$to_monitor"
    local end=$((SECONDS + 300))
    while kill -0 "$qemu_pid" 2>/dev/null; do
        [ $SECONDS -lt $end ] || fail "the machine cannot be saved"
        read -r -t 0.2 _ <&"$from_machine" || true
    done
    wait "$qemu_pid" || fail "the machine cannot be saved: $(cat "$run/qemu.log")"
    qemu_pid=
    "$qemu_img" snapshot -l "$run/disk.qcow2" | grep -q booted || fail "the machine was not saved"
    rm -f "$image"/booted-*
    mv "$run/disk.qcow2" "$booted"
    rm -f "$run"/{control,monitor}.{in,out}
}

# Have the scenario run, with these words, until it has ended: its exit status is then in $status. It may say `rebooting`,
# and do so: it is then run again, with the word `rebooted`. What it says after `monitor`, QEMU's monitor is told.
run_scenario() {
    local rebooting=
    status=
    # The machine's clock stood still while it was asleep.
    printf '%s %s\n' "$(date +%s)" "$*" >&"$to_machine"
    while [ -z "$status" ]; do
        await '@(exit [0-9]*|rebooting|ready|monitor *)' "${MACHINE_TIMEOUT:-7200}"
        case $answer in
            monitor\ *)
                printf '%s\n' "${answer#monitor }" >&"$to_monitor"
                echo told >&"$to_machine"
                ;;
            rebooting) rebooting=1 ;;
            ready)
                [ -n "$rebooting" ] || fail "the machine has rebooted by itself: see $target/last/console"
                rebooting=
                printf '%s %s rebooted\n' "$(date +%s)" "$1" >&"$to_machine"
                ;;
            *) status=${answer#exit } ;;
        esac
    done
}

# The package, and a newer one, for the scenario of the deployment.
pack_packages() {
    note "building the packages"
    local revision
    mkdir -p "$run/bundle/packages"
    for revision in 1 2; do
        make --silent deb "REVISION=$revision" "ARCH=$architecture" >&2
        cp "$target/../debian/buildomat-user-factory_"*"-${revision}_$architecture.deb" "$run/bundle/packages/$revision.deb"
    done
}

# Cargo, for the architecture of the host.
cargo_for_host() {
    if [ "$architecture" = amd64 ]; then
        cargo "$@"
    else
        packaging/cross "$architecture" cargo "$@"
    fi
}

# What the scenario needs from outside, on a disk of its own: always of the same size, as the saved machine knows it.
# A scenario says which of the tests it runs, or none; the scenario `tests` by its first word. That of the deployment has packages.
pack_bundle() {
    local bundle=$run/bundle executable name names wanted=()
    names=$(sed -n 's/^# Tests: //p' "$here/scenarios/$1")
    [ "$1" != tests ] || names=${2:-}
    for name in $names; do wanted+=(--test "$name"); done
    mkdir -p "$bundle"/{bin,tests}
    [ "$1" != deployment ] || pack_packages
    note "building the factory's programs and tests"
    cargo_for_host build --quiet --workspace --bins --message-format=json >"$run/bins.json"
    : >"$run/tests.json"
    [ "$names" = none ] ||
        TESTBED_EMULATED=1 cargo_for_host test --quiet --package testbed "${wanted[@]:---tests}" --no-run --message-format=json >"$run/tests.json"
    # Hard links where they can be, for they are large.
    while read -r executable; do
        cp --link "$executable" "$bundle/bin/" 2>/dev/null || cp "$executable" "$bundle/bin/"
    done < <(sed -nE 's/.*"kind":\["bin"\].*"executable":"([^"]*)".*/\1/p' "$run/bins.json")
    while read -r executable; do
        name=${executable##*/}
        cp --link "$executable" "$bundle/tests/${name%-*}" 2>/dev/null || cp "$executable" "$bundle/tests/${name%-*}"
    done < <(sed -nE 's/.*"kind":\["test"\].*"executable":"([^"]*)".*/\1/p' "$run/tests.json")
    [ -x "$bundle/bin/user-factory-helper" ] || fail "cargo made no helper"
    [ "$names" = none ] || [ -n "$(ls "$bundle/tests")" ] || fail "cargo made no tests"
    cp -r "$here/scenarios" "$bundle/scenarios"
    # With the certificates that this machine trusts: its mirrors may have one of their own.
    cp "$here/guest/delegated" "$here/../software.sh" /etc/ssl/certs/ca-certificates.crt "$bundle/"
    # Tests read pages and sources.
    mkdir "$bundle/sources"
    tar --create --directory "$here/../.." --exclude=./target --exclude=./fuzz/target --exclude=./.git . |
        tar --extract --directory "$bundle/sources"
    mke2fs -q -t ext4 -d "$bundle" "$run/bundle.ext4" 4G >/dev/null
    rm -rf "$bundle"
}

# Every host, or those named, with every scenario of docs/hosts.md: a table, and 0 if all have passed.
run_all() {
    local name scenario begin status failed=0 table='host scenario result minutes'
    if [ $# -eq 0 ]; then
        # shellcheck disable=SC2046 # words
        set -- $(cd "$here/hosts" && echo *)
    fi
    for name; do
        [ -e "$here/hosts/$name" ] || fail "there is no host $name; the hosts: $(cd "$here/hosts" && echo *)"
    done
    mkdir -p "$target"
    for name; do
        for scenario in deployment attacks cases software hardware; do
            begin=$SECONDS
            status=0
            "$here/run" "$name" "$scenario" >"$target/$name-$scenario.log" 2>&1 </dev/null || status=$?
            case $status in
                0) table+=$'\n'"$name $scenario passed" ;;
                124) table+=$'\n'"$name $scenario time-out" ;;
                *) table+=$'\n'"$name $scenario failed" ;;
            esac
            table+=" $(((SECONDS - begin + 59) / 60))"
            note "$scenario on $name ended with $status; its output: $target/$name-$scenario.log"
            [ "$status" = 0 ] || failed=1
        done
        # Another host's name may begin with this one's.
        (load_host "$name" deployment && rm -rf --one-file-system "$image"-*)
    done
    column -t <<<"$table"
    return $failed
}
