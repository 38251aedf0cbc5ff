//! USB devices of an emulated machine that are plugged in and unplugged while jobs run. They need the machine's controller
//! and hub, and QEMU's monitor: `tests/machine/run hardware`.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

use testbed::fake_server::{State, Ulid};
use testbed::harness::{binaries, is_booted_machine, until, until_is};
use testbed::test_factory::{TestFactory, lines};

/// Tell QEMU's monitor this, and wait until it was told.
fn qemu(command: &str) {
    assert!(
        is_booted_machine(),
        "this needs a booted machine: tests/machine/run hardware"
    );
    println!("qemu: {command}");
    let mut monitor = File::options().write(true).open("/run/qemu-monitor").unwrap();
    writeln!(monitor, "{command}").unwrap();
    let mut told = String::new();
    BufReader::new(File::open("/run/qemu-monitor.done").unwrap())
        .read_line(&mut told)
        .unwrap();
}

fn exists(port: &str) -> bool {
    std::fs::exists(format!("/sys/bus/usb/devices/{port}/serial")).unwrap()
}

/// A device of the emulated machine. It is unplugged when dropped.
struct Device {
    id: String,
    port: String,
}

impl Device {
    /// Plug a device of QEMU's, with these properties, into a port of its controller's: `1.2` is port 2 of the hub.
    fn plug(port: &str, driver: &str) -> Device {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let id = format!("d{}", COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
        let mut driver = driver.to_owned();
        if driver.starts_with("usb-serial") {
            qemu(&format!("chardev-add null,id=c{id}"));
            driver += &format!(",always-plugged=on,chardev=c{id}");
        }
        qemu(&format!("device_add {driver},id={id},bus=usb.0,port={port}"));
        let device = Device {
            id,
            port: format!("1-{port}"),
        };
        until(|| {
            exists(&device.port)
                .then_some(())
                .ok_or(format!("nothing is at {port}"))
        });
        device
    }

    /// What udev says of it.
    fn property(&self, name: &str) -> String {
        output(Command::new("udevadm").args([
            "info",
            "--query=property",
            &format!("--property={name}"),
            "--value",
            &format!("--path=/sys/bus/usb/devices/{}", self.port),
        ]))
        .trim()
        .to_owned()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        qemu(&format!("device_del {}", self.id));
        until(|| {
            (!exists(&self.port))
                .then_some(())
                .ok_or(format!("{} stays", self.port))
        });
    }
}

fn output(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Prints what the job has, each time that it changes, until it is let go: `NAME=SERIAL(NODES)` of each entry, and how many
/// nodes of usbfs there are.
const WATCH: &str = r#"
last=
while ! [ -e RELEASE ]; do
    now=$(cd /dev/slot 2>&- && for name in *; do
        echo -n "$name=$(cat $name/sysfs/serial 2>&-)($(ls $name | grep -E -v 'sysfs|serial|power' | tr '\n' ' ' | sed 's/ $//')) "
    done)$(find /dev/bus/usb -type c 2>&- | wc -l)
    [ "$now" = "$last" ] || echo "sees: $now"
    last=$now
    sleep 0.05
done
"#;

fn watching(factory: &TestFactory, before: &str) -> Ulid {
    factory.submit(&format!(
        "{before}\n{}",
        WATCH.replace("RELEASE", &factory.shared().join("release").display().to_string())
    ))
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs USB devices: tests/machine/run hardware"]
async fn two_equal_adapters_and_a_board_that_changes() {
    let left = Device::plug("1.1", "usb-serial,serial=LEFT");
    let right = Device::plug("1.2", "usb-serial,serial=RIGHT");
    let board = Device::plug("2", "usb-serial,serial=BOARD");
    let port = right.property("ID_PATH");
    assert!(port.ends_with("-usb-0:1.2"), "{port}");
    let mut factory = TestFactory::new(&format!(
        "[slots.a]\ntarget = \"TARGET\"\nusb.uart.serial = \"left\"\nusb.board.port = \"1-2\"\n\
         [slots.b]\ntarget = \"TARGET\"\nusb.uart.port = \"{port}\"\n"
    ))
    .await;

    // Both have their own, by what udev calls it as well, and can use it.
    let uses = "\
        echo \"udev: $(udevadm info --query=property --property=ID_SERIAL_SHORT --value --name=$SLOT_USB_UART_TTY)\"\n\
        echo \"variables: $SLOT_USB_UART_SERIAL $SLOT_USB_UART_PORT $SLOT_USB_UART_USB\"\n\
        stty -F $SLOT_USB_UART_TTY 9600 raw && echo x >$SLOT_USB_UART_TTY && echo written\n\
        python3 -c 'import fcntl, os; fd = os.open(\"/dev/slot/uart/usb\", os.O_RDWR); print(\"descriptor\", len(os.read(fd, 18)))'\n";
    let one = watching(&factory, uses);
    factory
        .wait_for_line(one, "sees: board=BOARD(tty0 usb) uart=LEFT(tty0 usb) 2")
        .await;
    let other = watching(&factory, uses);
    factory.wait_for_line(other, "sees: uart=RIGHT(tty0 usb) 1").await;
    for (job, serial, port) in [(one, "LEFT", "1-1.1"), (other, "RIGHT", "1-1.2")] {
        factory.wait_for_line(job, &format!("udev: {serial}")).await;
        let variables = format!("variables: {serial} {port} /dev/slot/uart/usb");
        factory.wait_for_line(job, &variables).await;
        factory.wait_for_line(job, "written").await;
        factory.wait_for_line(job, "descriptor 18").await;
    }

    // Unplugged, and plugged in again after a device that is nobody's, which gets the number of the tty.
    drop(left);
    factory
        .wait_for_line(one, "sees: board=BOARD(tty0 usb) uart=() 1")
        .await;
    let nobodys = Device::plug("1.3", "usb-serial,serial=NOBODY");
    let left = Device::plug("1.1", "usb-serial,serial=LEFT");
    factory
        .wait_for_line(one, "sees: board=BOARD(tty0 usb) uart=LEFT(tty0 usb) 2")
        .await;
    // A board turns into another kind of device, and back.
    drop(board);
    let boot = Device::plug("2", "usb-kbd,serial=BOOT");
    factory
        .wait_for_line(one, "sees: board=BOOT(hidraw0 usb) uart=LEFT(tty0 usb) 2")
        .await;
    drop(boot);
    let board = Device::plug("2", "usb-serial,serial=BOARD");
    factory
        .wait_for_line(one, "sees: board=BOARD(tty0 usb) uart=LEFT(tty0 usb) 2")
        .await;

    let resets = || {
        output(&mut Command::new("dmesg"))
            .matches("usb 1-1.1: reset full-speed USB device")
            .count()
    };
    let before = resets();
    factory.release();
    for job in [one, other] {
        factory.wait_completed(job).await;
        let job = factory.server.job(job);
        let log = format!("{:?}", job.events);
        assert!(!log.contains("NOBODY"), "{log}");
    }
    factory
        .wait_for_state(|state| state.workers.values().all(|w| w.deleted).then_some(()))
        .await;
    assert_eq!(resets(), before + 1, "{}", output(&mut Command::new("dmesg")));

    // A slot whose board is absent takes no job, and takes one once it is back.
    drop(board);
    drop(right);
    let status = || {
        let status = Command::new(binaries().join("user-factory"))
            .args(["status", "--root"])
            .arg(&factory.host.root)
            .output()
            .unwrap();
        String::from_utf8(status.stdout).unwrap()
    };
    until(|| {
        let status = status();
        let slots = status
            .lines()
            .filter(|line| line.split_whitespace().nth(1) == Some("absent"));
        match slots.count() {
            2 => Ok(()),
            _ => Err(status),
        }
    });
    assert!(status().contains("usb.board (port 1-2)"), "{}", status());
    let waits = factory.submit("echo \"$SLOT_USB_UART_SERIAL\"");
    factory.wait_polls(3).await;
    assert!(factory.server.job(waits).worker.is_none());
    let right = Device::plug("1.2", "usb-serial,serial=RIGHT2");
    factory.wait_completed(waits).await;
    factory.wait_for_line(waits, "RIGHT2").await;
    factory.end_supervisor(nix::sys::signal::Signal::SIGTERM);
    factory.supervisor = factory.host.start_supervisor();
    drop((left, right, nobodys));
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs USB devices: tests/machine/run hardware"]
async fn row_138_a_descriptor_that_is_kept_leads_to_no_later_device() {
    let first = Device::plug("1.1", "usb-serial,serial=FIRST");
    let factory = TestFactory::new(
        "[slots.a]\ntarget = \"TARGET\"\nusb.uart.port = \"1-1.1\"\nusb.all = { vendor = \"0403\", required = false }\n",
    )
    .await;
    let tried = factory.shared().join("tried");
    let keep = KEEP.replace("TRY", &tried.display().to_string());
    let job = watching(&factory, &keep);
    factory.wait_for_line(job, "kept").await;
    drop(first);
    let other = Device::plug("1.4", "usb-serial,serial=OTHER");
    let again = Device::plug("1.1", "usb-serial,serial=$(reboot)../");
    std::fs::write(tried, "").unwrap();
    factory.wait_for_line(job, "usb: No such device").await;
    factory.wait_for_line(job, "tty: Input/output error").await;
    // By its new number, as the same entry.
    let sees = "sees: all=$(reboot)../(tty0 usb) uart=$(reboot)../(tty0 usb) 1";
    factory.wait_for_line(job, sees).await;
    factory.release();
    factory.wait_completed(job).await;
    assert!(!format!("{:?}", factory.server.job(job).events).contains("OTHER"));
    drop((other, again));
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs USB devices: tests/machine/run hardware"]
async fn a_port_is_without_power_for_a_moment_after_a_job_if_the_slot_says_so() {
    let device = Device::plug("1.1", "usb-serial,serial=POWER");
    let number = || std::fs::read_to_string("/sys/bus/usb/devices/1-1.1/devnum").unwrap_or_default();
    let before = number();
    let factory = TestFactory::new(
        "[slots.a]\ntarget = \"TARGET\"\nusb.uart = { serial = \"POWER\", power_cycle = true }\n",
    )
    .await;
    for _ in 0..2 {
        let job = factory.submit("cat $SLOT_USB_UART_TTY >/dev/null 2>&1 & stty -F $SLOT_USB_UART_TTY >/dev/null && echo \"has $SLOT_USB_UART_SERIAL\"");
        factory.wait_completed(job).await;
        factory.wait_for_line(job, "has POWER").await;
    }
    factory
        .wait_for_state(|state| state.workers.values().all(|w| w.deleted).then_some(()))
        .await;
    assert_ne!(number(), before, "{}", output(&mut Command::new("dmesg")));
    drop(device);
    factory.finish().await;
}

/// Prints the number of its device and the time, in seconds, each time that the number changes.
const TIMES: &str = r#"
python3 - <<'END'
import os, time
last = None
while not os.path.exists("RELEASE"):
    try:
        now = os.stat("/dev/slot/board/usb").st_rdev
    except OSError:
        now = None
    if now and now != last:
        print("device", now, time.time(), flush=True)
    last = now
    time.sleep(0.002)
END
"#;

/// How long after the kernel has made a node the job has it is printed, for docs/hardware.md: nothing depends on it here.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs USB devices: tests/machine/run hardware"]
async fn a_device_that_comes_back_is_the_jobs_again_each_time() {
    let mut device = Device::plug("2", "usb-serial,serial=FIRST");
    let factory = TestFactory::new("[slots.a]\ntarget = \"TARGET\"\nusb.board.port = \"1-2\"\n").await;
    let release = factory.shared().join("release");
    let job = factory.submit(&TIMES.replace("RELEASE", release.to_str().expect("the place is text")));
    let mut late = Vec::new();
    factory
        .wait_for_state(|state| {
            let mut events = state.jobs[&job].events.iter();
            events
                .any(|event| event.payload.starts_with("device "))
                .then_some(())
        })
        .await;
    for round in 0..10 {
        drop(device);
        device = Device::plug(
            "2",
            &format!("usb-{},serial=ROUND{round}", ["kbd", "serial"][round % 2]),
        );
        let number = |name: &str| -> u32 {
            let text = std::fs::read_to_string(format!("/sys/bus/usb/devices/1-2/{name}"))
                .expect("it is plugged in");
            text.trim().parse().expect("it is a number")
        };
        let node = format!("/dev/bus/usb/{:03}/{:03}", number("busnum"), number("devnum"));
        let node = until(|| std::fs::metadata(&node).map_err(|error| error.to_string()));
        let prefix = format!("device {} ", node.rdev());
        let sees = |state: &State| {
            let mut events = state.jobs[&job].events.iter();
            let time = events.find_map(|event| event.payload.strip_prefix(&prefix))?;
            Some(time.parse::<f64>().expect("it is a time"))
        };
        let seen = Duration::from_secs_f64(factory.wait_for_state(sees).await);
        let made = node.created().expect("the file system knows it");
        let made = made.duration_since(UNIX_EPOCH).expect("the clock is right");
        late.push(seen.saturating_sub(made).as_millis());
    }
    late.sort();
    println!("the job had the node so many milliseconds after the kernel: {late:?}");
    factory.release();
    factory.wait_completed(job).await;
    drop(device);
    factory.finish().await;
}

/// What programs print of the device at a place in sysfs.
const PROGRAMS: &str = r#"
bus=$(cat PLACE/busnum) device=$(cat PLACE/devnum)
node=$(printf '/dev/bus/usb/%03d/%03d' $bus $device)
lsusb -v -s $bus:$device
udevadm info --query=property --name=$node
python3 - $bus $device <<'END'
import sys, usb.core
bus, device = map(int, sys.argv[1:])
found = usb.core.find(custom_match=lambda d: (d.bus, d.address) == (bus, device))
print(found.serial_number, found)
END
python3 -m serial.tools.list_ports -v | grep -A2 ttyUSB
PRINT-USB $bus $device
"#;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs USB devices: tests/machine/run hardware"]
async fn programs_print_of_a_slots_device_what_they_print_on_the_host() {
    let device = Device::plug("1.1", "usb-serial,serial=PROGRAMS");
    let factory = TestFactory::new("[slots.a]\ntarget = \"TARGET\"\nusb.uart.serial = \"PROGRAMS\"\n").await;
    let print_usb = factory.shared().join("print-usb");
    std::fs::copy(binaries().join("print-usb"), &print_usb).expect("it was built");
    let at = |place: &str| {
        let programs = PROGRAMS.replace("PLACE", place);
        programs.replace("PRINT-USB", print_usb.to_str().expect("the place is text"))
    };
    let job = factory.submit(&at("/dev/slot/uart/sysfs"));
    factory.wait_completed(job).await;
    let on_host = at(&format!("/sys/bus/usb/devices/{}", device.port));
    let on_host = output(Command::new("bash").args(["-c", &on_host]));
    assert!(
        on_host.contains("LOCATION=1-1.1") && on_host.contains("ID_SERIAL_SHORT=PROGRAMS"),
        "{on_host}"
    );
    let in_job = lines(&factory.server.job(job), "stdout");
    // The agent sends no spaces at the end of a line.
    let on_host: Vec<&str> = on_host.trim_end().lines().map(str::trim_end).collect();
    assert_eq!(in_job, on_host);
    drop(device);
    factory.finish().await;
}

/// Asks an I2C adapter what it can do.
const I2C: &str = r#"
adapter = os.open("NODE", os.O_RDWR)
fcntl.ioctl(adapter, 0x0703, 0x50)  # the slave address
functions = bytearray(8)
fcntl.ioctl(adapter, 0x0705, functions)  # its functions
print("i2c", struct.unpack("L", functions)[0] != 0)
"#;

/// Asks a GPIO chip how many lines it has.
const GPIO: &str = r#"
chip = bytearray(68)
fcntl.ioctl(os.open("NODE", os.O_RDWR), 0x8044b401, chip)  # its name, label and lines
print("gpio", struct.unpack_from("I", chip, 64)[0])
"#;

/// Sends a frame from one CAN socket to another.
const CAN: &str = r#"
one, other = (socket.socket(socket.AF_CAN, socket.SOCK_RAW, socket.CAN_RAW) for _ in range(2))
one.bind(("vcan0",))
other.bind(("vcan0",))
one.send(struct.pack("=IB3x8s", 0x123, 2, b"hi"))
print("can", other.recv(16)[8:10].decode())
"#;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs drivers that a booted machine has: tests/machine/run hardware"]
async fn other_buses_work_by_a_node_and_a_socket_family() {
    assert!(
        is_booted_machine(),
        "this needs a booted machine: tests/machine/run hardware"
    );
    let bash = |lines: &str| output(Command::new("bash").args(["-ec", lines]));
    bash("modprobe vcan; ip link add vcan0 type vcan; ip link set vcan0 up");
    // What is there: QEMU's board for aarch64 has a chip of 8 lines, and Debian's kernel for x86-64 a simulated adapter.
    let (node, program, answer) = if cfg!(target_arch = "aarch64") {
        ("/dev/gpiochip0".to_owned(), GPIO, "gpio 8")
    } else {
        let name = bash(
            "modprobe i2c-dev; modprobe i2c-stub chip_addr=0x50
            basename $(dirname $(grep -l 'SMBus stub' /sys/class/i2c-dev/*/name))",
        );
        (format!("/dev/{}", name.trim()), I2C, "i2c True")
    };
    until_is(&node, || std::fs::exists(&node).unwrap());
    let factory = TestFactory::new(&format!(
        "[slots.a]\ntarget = \"TARGET\"\ndevices = [{node:?}]\nsocket_families = [\"AF_CAN\"]\n"
    ))
    .await;
    let program = program.replace("NODE", &node);
    let job = factory.submit(&format!(
        "python3 - <<'END'\nimport fcntl, os, socket, struct\n{program}{CAN}END\n"
    ));
    factory.wait_completed(job).await;
    assert_eq!(lines(&factory.server.job(job), "stdout"), [answer, "can hi"]);
    factory.finish().await;
}

const KEEP: &str = r#"
python3 - <<'END'
import os, time
usb = os.open("/dev/slot/uart/usb", os.O_RDWR)
tty = os.open("/dev/slot/uart/tty0", os.O_RDWR | os.O_NOCTTY)
print("kept", flush=True)
while not os.path.exists("TRY"):
    time.sleep(0.1)
for name, try_it in ("usb", lambda: os.read(usb, 1)), ("tty", lambda: os.write(tty, b"x")):
    try:
        print(f"{name}: {try_it()}", flush=True)
    except OSError as error:
        print(f"{name}: {error.strerror}", flush=True)
END
"#;
