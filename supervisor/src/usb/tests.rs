//! What is read from a directory that looks like that of `sysfs`, and what follows from it.

use std::os::unix::fs::symlink;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use protocol::config::Config;
use tempfile::TempDir;

use super::list::{ListedDevice, list, nodes};
use super::*;

/// `/sys` with the devices of one bus.
struct FakeSysfs(TempDir);

impl FakeSysfs {
    fn new() -> FakeSysfs {
        let sysfs = FakeSysfs(tempfile::tempdir().unwrap());
        fs::create_dir_all(sysfs.directory()).unwrap();
        sysfs
    }

    fn directory(&self) -> PathBuf {
        self.0.path().join(USB_DEVICES)
    }

    fn place(&self, port: &str) -> PathBuf {
        self.0
            .path()
            .join("devices/pci0000:00/0000:00:14.0/usb1")
            .join(port)
    }

    /// A device with these ids, this number and this serial number.
    fn plug(&self, port: &str, ids: &str, number: u16, serial: Option<&str>) {
        let place = self.place(port);
        fs::create_dir_all(&place).unwrap();
        let (vendor, product) = ids.split_once(':').unwrap();
        let number = number.to_string();
        for (name, text) in [
            ("idVendor", vendor),
            ("idProduct", product),
            ("bDeviceClass", "00"),
            ("busnum", "1"),
            ("devnum", number.as_str()),
        ] {
            self.write(port, name, text);
        }
        if let Some(serial) = serial {
            self.write(port, "serial", serial);
        }
        let link = format!("../../../devices/pci0000:00/0000:00:14.0/usb1/{port}");
        let _ = fs::remove_file(self.directory().join(port));
        symlink(link, self.directory().join(port)).unwrap();
    }

    fn write(&self, port: &str, name: &str, text: &str) {
        fs::write(self.place(port).join(name), format!("{text}\n")).unwrap();
    }

    fn unplug(&self, port: &str) {
        fs::remove_file(self.directory().join(port)).unwrap();
        fs::remove_dir_all(self.place(port)).unwrap();
    }

    /// The kernel does not tell the serial number before [`FakeSysfs::release`].
    fn hold(&self, port: &str) {
        let serial = self.place(port).join("serial");
        let _ = fs::remove_file(&serial);
        mkfifo(&serial, Mode::S_IRWXU).unwrap();
    }

    fn release(&self, port: &str, serial: &str) {
        self.write(port, "serial", serial);
    }

    fn listed(&self, config: &Config) -> Vec<ListedDevice> {
        let devices = UsbMonitor::new(self.directory()).wait();
        list(&devices, &config.slots, |device| nodes(&self.directory(), device))
    }
}

/// Slots, each with its entries.
pub(super) fn config(slots: &[(&str, &str)]) -> Config {
    Config::parse(&text(slots)).unwrap()
}

fn text(slots: &[(&str, &str)]) -> String {
    let mut text = String::from("[general]\nbaseurl = \"https://b\"\n[factory]\ntoken_file = \"/t\"\n");
    for (slot, usb) in slots {
        text += &format!("[slots.{slot}]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n{usb}\n");
    }
    text
}

/// What the monitor says once nothing is being read that it will know in a moment.
fn settled(monitor: &mut UsbMonitor, config: &Config) -> Vec<String> {
    let began = std::time::Instant::now();
    let mut before = UsbAbsences::new();
    loop {
        if let Some(now) = monitor.absences(&config.slots, &before) {
            before = now;
        }
        let is_read = before.values().all(|absence| *absence != UsbAbsence::NotRead);
        if is_read && !monitor.is_reading() {
            let is_fresh = monitor.due_in().is_none_or(|due| due > INTERVAL / 2);
            if is_fresh && began.elapsed() > INTERVAL {
                let shown = before.iter();
                return shown
                    .map(|(slot, absence)| format!("{slot}: {}", absence.because()))
                    .collect();
            }
        }
        assert!(began.elapsed() < Duration::from_secs(20), "{before:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_slot_is_absent_while_its_device_is_and_no_longer_than_that() {
    let sysfs = FakeSysfs::new();
    let config = config(&[
        ("a", "usb.probe = { serial = \"0669FF\" }"),
        (
            "b",
            "usb.board.port = \"1-2\"\nusb.other = { vendor = \"1366\", required = false }",
        ),
        ("c", ""),
    ]);
    let mut monitor = UsbMonitor::new(sysfs.directory().join("not-there"));
    let absent = ["a: usb.probe (serial 0669FF)", "b: usb.board (port 1-2)"];
    assert_eq!(settled(&mut monitor, &config), absent);
    let mut monitor = UsbMonitor::new(sysfs.directory());
    assert_eq!(settled(&mut monitor, &config), absent);
    sysfs.plug("1-2", "0483:374b", 3, Some("0669ff"));
    let began = std::time::Instant::now();
    assert_eq!(settled(&mut monitor, &config), [""; 0]);
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    // Another one, at the same port.
    sysfs.unplug("1-2");
    sysfs.plug("1-2", "0483:374b", 4, Some("1234"));
    assert_eq!(settled(&mut monitor, &config), absent[..1]);
    sysfs.plug("1-3", "0483:374b", 5, Some("0669FF"));
    sysfs.plug("1-4", "0483:374b", 6, Some("0669FF"));
    assert_eq!(
        settled(&mut monitor, &config),
        [
            "a: usb.probe (serial 0669FF) may be any of the devices at ports 1-3 and 1-4: name its serial or its port"
        ]
    );
    // Where no slot has one, nothing is looked for.
    let none = self::config(&[("c", "")]);
    assert!(monitor.due_in().is_some());
    assert_eq!(
        monitor.absences(&none.slots, &UsbAbsences::new()),
        Some(UsbAbsences::new())
    );
    assert_eq!(monitor.due_in(), None);
}

fn readers_of_this_process() -> usize {
    let threads = fs::read_dir("/proc/self/task").unwrap().flatten();
    let names = threads.filter_map(|thread| fs::read_to_string(thread.path().join("comm")).ok());
    names.filter(|name| name == "usb-strings\n").count()
}

#[test]
fn a_device_that_does_not_tell_its_serial_number_holds_up_no_other() {
    let sysfs = FakeSysfs::new();
    let config = config(&[
        ("a", "usb.probe.serial = \"A\""),
        ("b", "usb.probe.serial = \"B\""),
        ("c", "usb.probe.port = \"1-1\""),
    ]);
    sysfs.plug("1-1", "0403:6001", 1, Some("A"));
    sysfs.hold("1-1");
    sysfs.plug("1-2", "0403:6001", 2, Some("B"));
    let mut monitor = UsbMonitor::new(sysfs.directory());
    let began = std::time::Instant::now();
    // What is being read is neither there nor absent.
    let first = monitor
        .absences(&config.slots, &UsbAbsences::new())
        .expect("it has not looked yet");
    assert!(began.elapsed() < READ_TIME / 2, "it has waited for a device");
    assert_eq!(first.get(&"a".parse().unwrap()), Some(&UsbAbsence::NotRead));
    let told = "a: usb.probe (serial A); the kernel does not tell the serial number of what is at 1-1, which a process keeps busy: end that process";
    assert_eq!(settled(&mut monitor, &config), [told]);
    assert_eq!(settled(&mut monitor, &config), [told]);
    // It is not read twice at once. Readers of other tests end soon.
    let began = std::time::Instant::now();
    while readers_of_this_process() != 1 {
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "{} readers",
            readers_of_this_process()
        );
        thread::sleep(Duration::from_millis(5));
    }
    sysfs.release("1-1", "A");
    assert_eq!(settled(&mut monitor, &config), [""; 0]);
}

#[test]
fn a_slot_stays_as_it_was_while_strings_are_read() {
    let config = config(&[("a", "usb.x.serial = \"A\""), ("b", "usb.x.port = \"1-1\"")]);
    let reading = Unread {
        is_reading: true,
        late: Vec::new(),
    };
    let found = |unread: &Unread, before: &UsbAbsences| absences(&config.slots, &[], unread, before);
    let absent = found(&Unread::default(), &UsbAbsences::new());
    let (a, b) = ("a".parse().unwrap(), "b".parse().unwrap());
    assert!(matches!(absent[&a], UsbAbsence::Problem(..)));
    assert_eq!(found(&reading, &absent), absent);
    let first = found(&reading, &UsbAbsences::new());
    assert_eq!((&first[&a], &first[&b]), (&UsbAbsence::NotRead, &absent[&b]));
}

#[test]
fn strings_of_a_device_that_another_has_replaced_are_not_the_others() {
    let sysfs = FakeSysfs::new();
    sysfs.plug("1-1", "0403:6001", 1, Some("A"));
    let device = device_at(&sysfs.directory(), "1-1".parse().unwrap()).unwrap();
    assert_eq!(device.serial, None, "the loop does not read it");
    let read = |device| read_strings(&sysfs.directory(), &Enumeration::from(device));
    assert_eq!(read(&device).unwrap().serial.as_deref(), Some("A"));
    sysfs.plug("1-1", "0403:6001", 2, Some("A"));
    assert_eq!(read(&device), None);
}

#[test]
fn a_list_has_nodes_slots_and_lines_to_paste() {
    let sysfs = FakeSysfs::new();
    sysfs.plug("1-1", "0403:6001", 1, Some("A50285BI"));
    sysfs.plug("1-2", "0483:374b", 12, Some("same"));
    sysfs.plug("1-3", "0483:374b", 13, Some("SAME"));
    sysfs.plug("1-4", "0000:0001", 14, Some("\u{1b}[2Ja"));
    sysfs.plug("1-5", "0000:0002", 15, Some("a\" }\\"));
    sysfs.plug("1-6", "05e3:0610", 16, Some("hub"));
    sysfs.write("1-6", "bDeviceClass", "09");
    sysfs.plug("1-7", "0000:0003", 17, None);
    sysfs.write("1-2", "product", "STM32 STLink");
    for (place, name) in [
        ("1-2:1.2/tty/ttyACM0", "ttyACM0"),
        ("1-2:1.1/host0/target0:0:0/0:0:0:0/block/sda/sda1", "sda1"),
        // Another device, behind it, and more than anybody has.
        ("1-2.1/1-2.1:1.0/tty/ttyACM1", "ttyACM1"),
        ("1-2:1.0/1/2/3/4/5/6/7/8/9/10/11", "deep"),
    ] {
        let place = sysfs.place("1-2").join(place);
        fs::create_dir_all(&place).unwrap();
        fs::write(
            place.join("uevent"),
            format!("MAJOR=1\nMINOR=2\nDEVNAME={name}\n"),
        )
        .unwrap();
    }
    symlink(sysfs.place("1-1"), sysfs.place("1-2").join("1-2:1.0/link")).unwrap();
    let config = config(&[
        ("a", "usb.link = { vendor = \"0483\", product = \"374B\" }"),
        (
            "b",
            "usb.x.port = \"pci-0000:00:14.0-usb-0:3\"\nusb.y.serial = \"none\"",
        ),
    ]);
    let found = sysfs.listed(&config);
    let shown: Vec<String> = found
        .iter()
        .map(|device| {
            let entries = device.entries.iter();
            let entries: Vec<String> = entries.map(|e| format!("{}.{}", e.slot, e.usb)).collect();
            format!("{} {} {}", device.port, entries.join(","), device.line)
        })
        .collect();
    assert_eq!(
        shown,
        [
            "1-1  usb.NAME = { serial = \"A50285BI\" }",
            "1-2 a.link usb.NAME = { port = \"pci-0000:00:14.0-usb-0:2\" }",
            "1-3 a.link,b.x usb.NAME = { port = \"pci-0000:00:14.0-usb-0:3\" }",
            "1-4  usb.NAME = { port = \"pci-0000:00:14.0-usb-0:4\" }",
            "1-5  usb.NAME = { serial = \"a\\\" }\\\\\" }",
            "1-7  usb.NAME = { port = \"pci-0000:00:14.0-usb-0:7\" }",
        ]
    );
    assert_eq!(
        found[1].nodes,
        ["/dev/bus/usb/001/012", "/dev/sda1", "/dev/ttyACM0"]
    );
    assert_eq!(found[1].description.as_deref(), Some("STM32 STLink"));
    assert_eq!((found[1].vendor.as_str(), found[1].is_read), ("0483", true));
    // Each line means that device and no other.
    let devices = UsbMonitor::new(sysfs.directory()).wait();
    for device in &found {
        let line = device.line.replace("NAME", "name");
        let entries = &self::config(&[("x", &line)]).slots[&"x".parse().unwrap()].usb;
        let meant = devices
            .iter()
            .filter(|(other, _)| entries.values().all(|entry: &UsbEntry| other.is(entry)));
        let meant: Vec<&str> = meant.map(|(other, _)| other.port.as_str()).collect();
        assert_eq!(meant, [device.port.as_str()], "{line}");
    }
}

#[test]
fn a_check_warns_of_ports_devices_and_conflicts_with_their_lines() {
    let sysfs = FakeSysfs::new();
    sysfs.plug("1-1", "0403:6001", 1, Some("A"));
    sysfs.plug("1-2", "0403:6001", 2, Some("B"));
    let text = text(&[
        ("a", "usb.one.port = \"1-1\"\nusb.two = { serial = \"C\" }"),
        (
            "b",
            "[slots.b.usb]\nany.vendor = \"0403\"\none.port = \"1-1\"\ngone = { port = \"3-4\", required = false }",
        ),
        ("c", "usb.fine.serial = \"a\""),
    ]);
    let mut monitor = UsbMonitor::new(sysfs.directory());
    let devices: Vec<UsbDevice> = monitor.wait().into_iter().map(|(device, _)| device).collect();
    let config = Config::parse(&text).unwrap();
    let found = check::warnings(&text, &config, &devices, &monitor.unread());
    let found: Vec<String> = found
        .iter()
        .map(|warning| format!("{} {}", warning.line, warning.message))
        .collect();
    let kernel = "by the kernel's name";
    let number = "whose first number may be another after a reboot";
    assert_eq!(
        found,
        [
            format!(
                "7 warning: slot a: usb.one has its port {kernel} 1-1, {number}: write port = \"pci-0000:00:14.0-usb-0:1\""
            ),
            "7 warning: slot a: usb.one means the same device as usb.one of slot b: while one of these slots has a job, the other has none".into(),
            "8 warning: slot a: usb.two (serial C) is absent: plug it in; the slot takes no jobs before".into(),
            "12 warning: slot b: usb.any (vendor 0403) may be any of the devices at ports 1-1 and 1-2: name its serial or its port; the slot takes no jobs before".into(),
            format!(
                "13 warning: slot b: usb.one has its port {kernel} 1-1, {number}: write port = \"pci-0000:00:14.0-usb-0:1\""
            ),
            format!(
                "14 warning: slot b: usb.gone has its port {kernel} 3-4, {number}: plug a device in there, and write the port that `user-factory devices` shows for it"
            ),
        ]
    );
}
