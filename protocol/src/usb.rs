//! USB devices that are plugged into the host, and which of them a slot's entries mean. Pure: whoever reads `sysfs` gives the
//! texts of its files. Supervisor and helper decide by the same functions.
//!
//! `/sys/bus/usb/devices` has a link for each device, by the name of its *port*: `1-2.3` is what is plugged into port 3 of
//! the hub in port 2 of bus 1 (the kernel's `Documentation/ABI/stable/sysfs-bus-usb`, and `usb_set_device_initial_state`
//! and `usb_alloc_dev` in its `drivers/usb/core`).

use std::collections::BTreeMap;
use std::fmt;

use crate::config::{PortName, UsbEntry, UsbName};
pub use crate::name::UsbPort;

/// The directory of USB devices, below the root of `sysfs`.
pub const USB_DEVICES: &str = "bus/usb/devices";
/// No host has more: a bus has at most 127 devices.
pub const MAX_USB_DEVICES: usize = 4096;

/// One device that is plugged in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsbDevice {
    /// Where it is.
    pub port: UsbPort,
    /// The same as udev's `ID_PATH`, which is stable over reboots. None on a bus of a kind that is not known here.
    pub id_path: Option<String>,
    /// `idVendor`.
    pub vendor: u16,
    /// `idProduct`.
    pub product: u16,
    /// `bDeviceClass` is 9.
    pub is_hub: bool,
    /// Its bus, and its number there, which is another each time that it is plugged in or comes back.
    pub number: (u16, u16),
    /// The device's own text, which may be anything.
    pub serial: Option<String>,
}

impl UsbDevice {
    /// Does the entry mean this device? No entry means a hub, with all that is plugged into it.
    pub fn is(&self, entry: &UsbEntry) -> bool {
        let is_serial = |serial: &String| {
            let own = self.serial.as_deref().unwrap_or_default();
            own.eq_ignore_ascii_case(serial)
        };
        let is_port = |port: &PortName| match port {
            PortName::IdPath(path) => self.id_path.as_ref() == Some(path),
            PortName::Kernel(port) => self.port == *port,
        };
        !self.is_hub
            && entry.serial.as_ref().is_none_or(is_serial)
            && entry.port.as_ref().is_none_or(is_port)
            && entry.vendor.is_none_or(|vendor| self.vendor == vendor)
            && entry.product.is_none_or(|product| self.product == product)
    }

    /// The device at this port, by where its link in [`USB_DEVICES`] leads, and `read`, which returns the text of a file of
    /// its directory. The serial number is read last: the kernel may be slow with it (`usb_lock_device_interruptible` in
    /// `drivers/usb/core/sysfs.c`), while it answers for all others at once. None where it is gone meanwhile.
    pub fn of(port: UsbPort, link: &str, read: impl Fn(&str) -> Option<String>) -> Option<UsbDevice> {
        let hex = |name| u16::from_str_radix(read(name)?.trim_end(), 16).ok();
        let decimal = |name| read(name)?.trim_end().parse::<u16>().ok();
        Some(UsbDevice {
            id_path: id_path(link),
            vendor: hex("idVendor")?,
            product: hex("idProduct")?,
            is_hub: hex("bDeviceClass")? == 9,
            number: (decimal("busnum")?, decimal("devnum")?),
            serial: read("serial").map(|text| text.strip_suffix('\n').unwrap_or(&text).to_owned()),
            port,
        })
    }
}

/// udev's `ID_PATH` of the device to which a link like `../../../devices/pci0000:00/0000:00:14.0/usb1/1-2/1-2.3` leads:
/// `pci-0000:00:14.0-usb-0:2.3`. By the rules of systemd's `udev-builtin-path_id.c` for USB below PCI and platform devices.
fn id_path(link: &str) -> Option<String> {
    let mut parts = link.split('/').peekable();
    let mut controller = Vec::new();
    let mut kind = "";
    let (mut last, mut below) = ("", "");
    for part in parts.by_ref().skip_while(|part| *part != "devices").skip(1) {
        if part
            .strip_prefix("usb")
            .is_some_and(|bus| bus.parse::<u16>().is_ok())
        {
            below = part;
            break;
        }
        let next = match part.as_bytes() {
            [b'p', b'c', b'i', domain @ ..] if domain.contains(&b':') => "pci",
            _ if part == "platform" => "platform",
            _ => {
                last = part;
                continue;
            }
        };
        if !last.is_empty() {
            controller.push(format!("{kind}-{last}"));
        }
        (kind, last) = (next, "");
    }
    let port = parts.last()?.split_once('-')?.1;
    // 0000:00:14.0, and not a platform device that a PCI device has.
    let is_of_kind = kind != "pci" || last.matches(':').count() == 2;
    if below.is_empty() || kind.is_empty() || last.is_empty() || !is_of_kind {
        return None;
    }
    controller.push(format!("{kind}-{last}"));
    Some(format!("{}-usb-0:{port}", controller.join("-")))
}

/// Why a slot's entries do not mean devices of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UsbProblem {
    /// No device is the one that this entry means.
    Absent(UsbName, UsbEntry),
    /// More than one may be.
    Ambiguous(UsbName, UsbEntry, Vec<UsbPort>),
}

impl std::error::Error for UsbProblem {}

impl fmt::Display for UsbProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UsbProblem::Absent(name, entry) => write!(f, "usb.{name} ({entry}) is absent: plug it in"),
            UsbProblem::Ambiguous(name, entry, ports) => {
                let ports: Vec<&str> = ports.iter().map(UsbPort::as_str).collect();
                let ports = ports.join(" and ");
                write!(
                    f,
                    "usb.{name} ({entry}) may be any of the devices at ports {ports}: name its serial or its port"
                )
            }
        }
    }
}

/// Which device this entry means: none if it is absent, and not required. Several entries may mean one device.
///
/// # Errors
/// The entry's device is absent, or it is not clear which it is.
pub fn resolve<'a>(
    name: &UsbName,
    entry: &UsbEntry,
    devices: &'a [UsbDevice],
) -> Result<Option<&'a UsbDevice>, UsbProblem> {
    let meant: Vec<&UsbDevice> = devices.iter().filter(|device| device.is(entry)).collect();
    match &meant[..] {
        [device] => Ok(Some(device)),
        [] if entry.required => Err(UsbProblem::Absent(name.clone(), entry.clone())),
        [] => Ok(None),
        several => {
            let mut ports: Vec<UsbPort> = several.iter().map(|device| device.port.clone()).collect();
            ports.sort();
            Err(UsbProblem::Ambiguous(name.clone(), entry.clone(), ports))
        }
    }
}

/// The nodes of one device, by their directories in `sysfs`, relative to the device's own, and the name that each has below
/// `/dev/slot/NAME`: none where a directory is of a kind that has none. Such a name has the interface's number, and not the
/// order in which nodes appeared: `tty2` is the tty of interface 2, and `tty2.1` is the next port of the same interface.
pub fn stable_names<'a>(directories: impl Iterator<Item = &'a str>) -> BTreeMap<&'a str, String> {
    let mut sorted: Vec<&str> = directories.collect();
    // ttyUSB9 comes before ttyUSB10.
    sorted.sort_by_key(|path| (path.matches('/').count(), path.len(), *path));
    let mut names: BTreeMap<&str, String> = BTreeMap::new();
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for path in sorted {
        let parts: Vec<&str> = path.split('/').collect();
        let name = match parts[..] {
            [""] => "usb".to_owned(),
            // A partition, below its disk, which came before it.
            [.., "block", disk, partition] => {
                let above = names.get(path.rsplit_once('/').map_or("", |(disk, _)| disk));
                match (above, partition.strip_prefix(disk)) {
                    (Some(above), Some(number)) => format!("{above}-part{}", number.trim_start_matches('p')),
                    _ => continue,
                }
            }
            [first, .., class, _] => {
                let kind = match class {
                    "tty" | "hidraw" | "block" => class,
                    "video4linux" => "video",
                    _ => continue,
                };
                // `1-2.3:1.0`: configuration 1, interface 0.
                let interface = first
                    .rsplit_once(':')
                    .and_then(|(_, numbers)| numbers.split_once('.'));
                let Some(Ok(interface)) = interface.map(|(_, interface)| interface.parse::<u8>()) else {
                    continue;
                };
                let name = format!("{kind}{interface}");
                let earlier = seen.entry(name.clone()).or_default();
                *earlier += 1;
                match *earlier {
                    1 => name,
                    more => format!("{name}.{}", more - 1),
                }
            }
            _ => continue,
        };
        names.insert(path, name);
    }
    names
}

/// The variables that tell a job of the device of an entry: its port, its nodes below `/dev/slot`, and its serial number.
/// `nodes` are the names of the nodes that it has now. Texts of the device's own are without control characters.
pub fn variables(
    name: &UsbName,
    port: Option<&UsbPort>,
    serial: Option<&str>,
    nodes: &[String],
) -> Vec<(String, String)> {
    let prefix = format!("SLOT_USB_{}", name.as_str().to_ascii_uppercase());
    let place = |node: &str| format!("/dev/slot/{name}/{node}");
    let printable = |text: &str| -> String {
        text.chars()
            .map(|c| if c.is_control() { '_' } else { c })
            .collect()
    };
    let mut ttys: Vec<&str> = nodes
        .iter()
        .map(String::as_str)
        .filter(|node| node.starts_with("tty"))
        .collect();
    // tty2 comes before tty10.
    ttys.sort_by_key(|tty| (tty.len(), *tty));
    let tty = ttys.first().unwrap_or(&"tty0");
    let mut variables = vec![
        (format!("{prefix}_USB"), place("usb")),
        (format!("{prefix}_TTY"), place(tty)),
    ];
    variables.extend(port.map(|port| (format!("{prefix}_PORT"), port.to_string())));
    variables.extend(serial.map(|serial| (format!("{prefix}_SERIAL"), printable(serial))));
    variables
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A device as the kernel shows it.
    fn device(port: &str, ids: &str, class: &str, serial: &str) -> UsbDevice {
        let (vendor, product) = ids.split_once(':').unwrap();
        let link = format!("../../../devices/pci0000:00/0000:00:14.0/usb1/{port}");
        let read = |name: &str| {
            let text = match name {
                "idVendor" => vendor,
                "idProduct" => product,
                "bDeviceClass" => class,
                "busnum" => "1",
                "devnum" => "12",
                "serial" if !serial.is_empty() => serial,
                _ => return None,
            };
            Some(format!("{text}\n"))
        };
        UsbDevice::of(port.parse().unwrap(), &link, read).unwrap()
    }

    /// What boards are plugged into a bench, as they show themselves to the host.
    fn bench() -> Vec<UsbDevice> {
        vec![
            device("1-1", "1d6b:0002", "09", "0000:00:14.0"),
            device("1-2", "05e3:0610", "09", ""),
            // ST-Link V2-1, J-Link, CMSIS-DAP.
            device("1-2.1", "0483:374b", "ef", "0669FF313430"),
            device("1-2.2", "1366:0101", "00", "000069661234"),
            device("1-2.3", "0d28:0204", "ef", "0240000028884e45"),
            // FTDI, twice with the same serial number, and once without one.
            device("1-3", "0403:6001", "00", "A50285BI"),
            device("1-4", "0403:6001", "00", "A50285BI"),
            device("1-5", "0403:6011", "00", ""),
            // RP2040 and ESP32-C3.
            device("1-6", "2e8a:000a", "ef", "E6614103E7452D2F"),
            device("1-7", "303a:1001", "ef", "F4:12:FA:00:11:22"),
            // Android, in adb.
            device("1-8", "18d1:4ee7", "00", "ZY22"),
        ]
    }

    fn entries(text: &str) -> BTreeMap<UsbName, UsbEntry> {
        #[derive(serde::Deserialize)]
        struct Slot {
            usb: BTreeMap<UsbName, UsbEntry>,
        }
        toml::from_str::<Slot>(text).unwrap().usb
    }

    fn found(text: &str, devices: &[UsbDevice]) -> String {
        let mut found = Vec::new();
        for (name, entry) in entries(text) {
            match resolve(&name, &entry, devices) {
                Ok(device) => found.extend(device.map(|device| format!("{name}={}", device.port))),
                Err(problem) => return problem.to_string(),
            }
        }
        found.join(" ")
    }

    #[test]
    fn an_entry_means_the_one_device_of_which_all_is_so() {
        let bench = bench();
        for (text, expected) in [
            ("usb.probe.serial = \"0669ff313430\"", "probe=1-2.1"),
            ("usb.probe.serial = \"000069661234\"", "probe=1-2.2"),
            (
                "usb.probe = { vendor = \"0D28\", product = \"0204\" }",
                "probe=1-2.3",
            ),
            ("usb.board.port = \"pci-0000:00:14.0-usb-0:2.3\"", "board=1-2.3"),
            ("usb.board.port = \"1-6\"", "board=1-6"),
            ("usb.a.serial = \"ZY22\"\nusb.b.vendor = \"303a\"", "a=1-8 b=1-7"),
            ("usb.a.serial = \"ZY22\"\nusb.b.port = \"1-8\"", "a=1-8 b=1-8"),
            (
                "usb.a.serial = \"A50285BI\"",
                "usb.a (serial A50285BI) may be any of the devices at ports 1-3 and 1-4: name its serial or its port",
            ),
            ("usb.a = { serial = \"A50285BI\", port = \"1-4\" }", "a=1-4"),
            (
                "usb.a.serial = \"none\"",
                "usb.a (serial none) is absent: plug it in",
            ),
            ("usb.a = { serial = \"none\", required = false }", ""),
            // It is there, and is another.
            (
                "usb.a = { port = \"1-3\", vendor = \"1366\" }",
                "usb.a (port 1-3, vendor 1366) is absent: plug it in",
            ),
            // No hub, whatever names it: all that is plugged into it would come with it.
            ("usb.a.port = \"1-2\"", "usb.a (port 1-2) is absent: plug it in"),
            (
                "usb.a.vendor = \"05e3\"",
                "usb.a (vendor 05e3) is absent: plug it in",
            ),
        ] {
            assert_eq!(found(text, &bench), expected, "{text}");
        }
    }

    #[test]
    fn what_is_plugged_into_a_hub_is_within_the_hubs_port() {
        let port = |text: &str| text.parse::<UsbPort>().unwrap();
        for (one, other, is_within) in [
            ("1-2.3", "1-2", true),
            ("1-2.3.4", "1-2", true),
            ("1-2", "1-2", true),
            ("1-2", "1-2.3", false),
            ("1-20", "1-2", false),
            ("1-2.30", "1-2.3", false),
            ("11-2", "1-2", false),
        ] {
            assert_eq!(port(one).is_within(&port(other)), is_within, "{one} {other}");
        }
    }

    #[test]
    fn a_port_means_a_board_whatever_it_turns_into() {
        for (port, before, after) in [
            ("1-6", "2e8a:000a", "2e8a:0003"),
            ("1-8", "18d1:4ee7", "18d1:4ee0"),
            ("1-2.1", "0483:374b", "0483:df11"),
        ] {
            let text = format!("usb.board.port = \"pci-0000:00:14.0-usb-0:{}\"", &port[2..]);
            for ids in [before, after] {
                assert_eq!(
                    found(&text, &[device(port, ids, "00", "")]),
                    format!("board={port}")
                );
            }
        }
    }

    #[test]
    fn a_path_is_the_one_that_udev_has() {
        for (link, path) in [
            (
                "../../../devices/pci0000:00/0000:00:14.0/usb1/1-2/1-2.3",
                Some("pci-0000:00:14.0-usb-0:2.3"),
            ),
            // Behind a bridge: the controller's own address alone.
            (
                "../../../devices/pci0000:00/0000:00:01.2/0000:02:00.0/usb3/3-6",
                Some("pci-0000:02:00.0-usb-0:6"),
            ),
            // A Raspberry Pi 4: PCI below a platform device.
            (
                "../../../devices/platform/scb/fd500000.pcie/pci0000:00/0000:00:00.0/0000:01:00.0/usb1/1-1/1-1.4",
                Some("platform-fd500000.pcie-pci-0000:01:00.0-usb-0:1.4"),
            ),
            (
                "../../../devices/platform/soc/3f980000.usb/usb1/1-1",
                Some("platform-3f980000.usb-usb-0:1"),
            ),
            (
                "../../../devices/platform/vhci_hcd.0/usb5/5-1",
                Some("platform-vhci_hcd.0-usb-0:1"),
            ),
            ("../../../devices/pci0000:00/0000:00:14.0/usb1", None),
            ("../../../devices/other/thing/usb1/1-1", None),
            (
                "../../../devices/pci0000:00/0000:00:14.1/dwc3.1.auto/xhci-hcd.2.auto/usb1/1-1",
                None,
            ),
            ("1-1", None),
            ("", None),
        ] {
            assert_eq!(id_path(link).as_deref(), path, "{link}");
        }
    }

    #[test]
    fn names_have_the_interfaces_number_whatever_came_first() {
        let names = |paths: &[&str]| -> Vec<String> {
            let names = stable_names(paths.iter().copied());
            names
                .iter()
                .map(|(path, name)| format!("{path} {name}"))
                .collect()
        };
        // An ST-Link: a disk, and a tty on its third interface.
        assert_eq!(
            names(&[
                "",
                "1-2:1.1/host0/target0:0:0/0:0:0:0/block/sda",
                "1-2:1.1/host0/target0:0:0/0:0:0:0/block/sda/sda1",
                "1-2:1.1/host0/target0:0:0/0:0:0:0/scsi_generic/sg0",
                "1-2:1.2/tty/ttyACM0",
            ]),
            [
                " usb",
                "1-2:1.1/host0/target0:0:0/0:0:0:0/block/sda block1",
                "1-2:1.1/host0/target0:0:0/0:0:0:0/block/sda/sda1 block1-part1",
                "1-2:1.2/tty/ttyACM0 tty2",
            ]
        );
        // Four ports on one interface, numbered over a ten.
        assert_eq!(
            names(&[
                "1-2:1.0/ttyUSB10/tty/ttyUSB10",
                "1-2:1.0/ttyUSB8/tty/ttyUSB8",
                "1-2:1.0/ttyUSB9/tty/ttyUSB9",
                "1-2:1.1/0003:0D28:0204.0001/hidraw/hidraw3",
            ]),
            [
                "1-2:1.0/ttyUSB10/tty/ttyUSB10 tty0.2",
                "1-2:1.0/ttyUSB8/tty/ttyUSB8 tty0",
                "1-2:1.0/ttyUSB9/tty/ttyUSB9 tty0.1",
                "1-2:1.1/0003:0D28:0204.0001/hidraw/hidraw3 hidraw1",
            ]
        );
        // Nothing that a kernel could show makes it panic, and no two nodes have one name.
        assert_eq!(
            names(&["x", "a/b", "1-2:1.999/tty/t", "block/a/b", "/tty/"]),
            [""; 0]
        );
    }

    #[test]
    fn a_job_is_told_no_control_character() {
        let name = UsbName::parse("probe_2").unwrap();
        let port = "1-2".parse().unwrap();
        let nodes = ["usb", "tty10", "tty2"].map(str::to_owned);
        let variables = variables(&name, Some(&port), Some("a\n\u{1b}[31m"), &nodes);
        let variables: Vec<String> = variables
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        assert_eq!(
            variables,
            [
                "SLOT_USB_PROBE_2_USB=/dev/slot/probe_2/usb",
                "SLOT_USB_PROBE_2_TTY=/dev/slot/probe_2/tty2",
                "SLOT_USB_PROBE_2_PORT=1-2",
                "SLOT_USB_PROBE_2_SERIAL=a__[31m",
            ]
        );
    }

    proptest! {
        #[test]
        fn whatever_a_port_is_called_it_is_two_numbers_or_more(text in "[0-9a-z.:/-]{0,12}") {
            if let Ok(port) = text.parse::<UsbPort>() {
                prop_assert!(!port.as_str().contains(['/', ':']));
                prop_assert!(port.as_str().split(['-', '.']).all(|part| part.parse::<u16>().is_ok_and(|n| n > 0)));
                prop_assert!(port.is_within(&port));
            }
        }

        #[test]
        fn whatever_is_plugged_in_an_entry_means_one_device_of_its_kind_or_is_refused(
            ports in proptest::collection::btree_set(1u8..9, 0..8),
            vendor in 0u16..3,
            wanted in 0u16..3,
        ) {
            let devices: Vec<UsbDevice> = ports
                .iter()
                .map(|port| device(&format!("1-{port}"), &format!("{:04x}:0001", (u16::from(*port) + vendor) % 3), "00", ""))
                .collect();
            let (name, entry) = entries(&format!("usb.a.vendor = \"{wanted:04x}\"")).pop_first().expect("it has one");
            let of_kind = devices.iter().filter(|device| device.vendor == wanted).count();
            match resolve(&name, &entry, &devices) {
                Ok(found) => {
                    prop_assert_eq!(of_kind, 1);
                    prop_assert!(found.is_some_and(|device| device.vendor == wanted));
                }
                Err(UsbProblem::Absent(..)) => prop_assert_eq!(of_kind, 0),
                Err(UsbProblem::Ambiguous(_, _, ports)) => prop_assert_eq!(ports.len(), of_kind),
            }
        }
    }
}
