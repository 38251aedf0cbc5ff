//! USB devices of the host, from `sysfs` by descriptor. A job may have flashed a board whose texts, interfaces and nodes are
//! what it likes: all is bounded.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{OFlag, readlinkat};
use nix::sys::stat::{SFlag, dev_t, makedev};
use protocol::usb::{MAX_USB_DEVICES, USB_DEVICES, UsbDevice, UsbPort};

use super::Host;
use super::directory::{directories, names, open_dir, open_file, read_small, stat};

/// Deeper than the node of any driver: a partition of a disk has seven.
const MAX_DEPTH: usize = 10;
/// The most directories of one device.
const MAX_DIRECTORIES: usize = 4096;

/// What tells one node from all others: `S_IFCHR` or `S_IFBLK`, and its number.
pub type NodeNumber = (u32, dev_t);

/// Where the kernel has what is plugged into a port, or a root hub: a path below the root of `sysfs`, by the link that it has made.
fn link(host: &Host, port: &str) -> nix::Result<String> {
    let link = readlinkat(&host.sys, &Path::new(USB_DEVICES).join(port))?;
    link.into_string().map_err(|_| Errno::EILSEQ)
}

/// The directory to which such a link leads. The path is opened from the root of `sysfs`, without following the link: `..` may
/// fail where mounts change (`EAGAIN` in `openat2(2)`).
fn open(host: &Host, link: &str) -> nix::Result<OwnedFd> {
    open_dir(&host.sys, link.strip_prefix("../../../").ok_or(Errno::EXDEV)?)
}

/// What is plugged in, but for what `is_taken`: of that nothing is read, since a job may hold its device's lock. Serial numbers, for
/// which the kernel waits for that lock, are read where they are asked for.
pub fn list(host: &Host, serials: bool, is_taken: impl Fn(&UsbPort) -> bool) -> Result<Vec<UsbDevice>> {
    let all = match open_dir(&host.sys, USB_DEVICES) {
        // No driver of USB is there.
        Err(Errno::ENOENT) => return Ok(Vec::new()),
        all => all?,
    };
    let names = names(all.as_fd())?;
    ensure!(
        names.len() <= 32 * MAX_USB_DEVICES,
        "the host has too many USB devices and interfaces: {}",
        names.len()
    );
    let ports = names
        .iter()
        .filter_map(|name| name.to_str()?.parse::<UsbPort>().ok());
    let found = ports.filter(|port| !is_taken(port)).filter_map(|port| {
        let link = link(host, port.as_str()).ok()?;
        let dir = open(host, &link).ok()?;
        UsbDevice::of(port, &link, |name| match name {
            "serial" if !serials => None,
            name => read_small(&dir, name).ok().flatten(),
        })
    });
    Ok(found.collect())
}

/// The number of the device's own node, which is another each time that a device comes. None where nothing is plugged in.
pub fn number(host: &Host, port: &UsbPort) -> Option<dev_t> {
    let dir = link(host, port.as_str())
        .and_then(|link| open(host, &link))
        .ok()?;
    parse_number(&read_small(dir, "dev").ok()??)
}

/// All nodes of the device at this port, and of its interfaces, by their directories relative to its own. None where nothing
/// is plugged in, where it is a hub, and where there are more than any device has. Nothing is read here that waits for the
/// device.
pub fn nodes(host: &Host, port: &UsbPort) -> BTreeMap<String, NodeNumber> {
    let mut nodes = BTreeMap::new();
    let Ok(device) = link(host, port.as_str()).and_then(|link| open(host, &link)) else {
        return nodes;
    };
    let class = read_small(&device, "bDeviceClass").ok().flatten();
    if class.is_none_or(|class| class.trim_end() == "09") {
        return nodes;
    }
    // By their paths, which take no descriptors.
    let mut waiting = vec![String::new()];
    let mut seen = 0;
    while let Some(path) = waiting.pop() {
        // Of what is unplugged at this moment nothing is left.
        let Ok(dir) = open_dir(&device, if path.is_empty() { "." } else { &path }) else {
            continue;
        };
        let number = read_small(&dir, "dev").ok().flatten();
        if let Some(number) = number.and_then(|text| parse_number(&text)) {
            let kind = match path.split('/').any(|part| part == "block") {
                true => SFlag::S_IFBLK,
                false => SFlag::S_IFCHR,
            };
            nodes.insert(path.clone(), (kind.bits(), number));
        }
        for name in directories(dir.as_fd()).unwrap_or_default() {
            let Some(name) = name.to_str() else { continue };
            // Of the device its interfaces, `1-2:1.0`; and not what is plugged into it, `1-2.1`.
            let is_interface = || {
                name.strip_prefix(port.as_str())
                    .is_some_and(|rest| rest.starts_with(':'))
            };
            let below = match &path[..] {
                "" if is_interface() => name.to_owned(),
                "" => continue,
                above => format!("{above}/{name}"),
            };
            seen += 1;
            if seen > MAX_DIRECTORIES {
                return BTreeMap::new();
            }
            if below.split('/').count() <= MAX_DEPTH {
                waiting.push(below);
            }
        }
    }
    nodes
}

/// The files by which the power of a port is turned off (`1`) and on (`0`): `disable` of the hub's port (the kernel's
/// `Documentation/ABI/testing/sysfs-bus-usb`, since Linux 6.0), and of the port that the same connector has for another speed
/// (`peer`). None where the hub is unplugged.
pub fn power_switches(host: &Host, port: &UsbPort) -> Result<Vec<File>> {
    let Some(place) = place_of_port(host, port) else {
        return Ok(Vec::new());
    };
    let open = |place: &str| {
        let switch = open_file(&host.writable_sys, Path::new(place).join(SWITCH), OFlag::O_RDWR);
        switch.with_context(|| no_power_switch(port))
    };
    let mut switches = vec![open(&place)?];
    if let Ok(peer) = readlinkat(&host.sys, &Path::new(&place).join("peer")) {
        switches.push(open(&follow(&place, &peer.to_string_lossy()))?);
    }
    Ok(switches)
}

/// Can the power of this port be switched?
pub fn has_power_switch(host: &Host, port: &UsbPort) -> bool {
    place_of_port(host, port).is_some_and(|place| stat(&host.sys, Path::new(&place).join(SWITCH)).is_ok())
}

/// Why a job cannot have the power of this port turned off.
pub fn no_power_switch(port: &UsbPort) -> String {
    format!(
        "the power of USB port {port} cannot be switched by its hub, or by this kernel: remove power_cycle"
    )
}

const SWITCH: &str = "disable";

/// Where `sysfs` has a port of a hub; none where the hub is unplugged.
fn place_of_port(host: &Host, port: &UsbPort) -> Option<String> {
    let (hub, directory) = hub_and_port(port)?;
    let hub = link(host, &hub).ok()?;
    Some(format!("{}/{directory}", hub.strip_prefix("../../../")?))
}

/// The path that a relative link in this directory leads to.
fn follow(directory: &str, link: &str) -> String {
    let mut parts: Vec<&str> = directory.split('/').collect();
    for part in link.split('/') {
        match part {
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// The hub that a port is of, and where `sysfs` has the port below the hub: `1-2` and `1-2:1.0/1-2-port3` for 1-2.3, `usb1` and
/// `1-0:1.0/usb1-port2` for 1-2.
fn hub_and_port(port: &UsbPort) -> Option<(String, String)> {
    let port = port.as_str();
    Some(match port.rsplit_once('.') {
        Some((hub, number)) => (hub.to_owned(), format!("{hub}:1.0/{hub}-port{number}")),
        None => {
            let (bus, number) = port.split_once('-')?;
            (format!("usb{bus}"), format!("{bus}-0:1.0/usb{bus}-port{number}"))
        }
    })
}

/// `189:5`.
fn parse_number(text: &str) -> Option<dev_t> {
    let (major, minor) = text.trim_end().split_once(':')?;
    Some(makedev(major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::host::tests::host;

    /// A device below `sys` as the kernel lays it out, with nodes by their directories.
    fn plug(sys: &Path, port: &str, serial: &str, nodes: &[(&str, &str)]) {
        let place = sys.join("devices/pci0000:00/0000:00:14.0/usb1").join(port);
        fs::create_dir_all(sys.join(USB_DEVICES)).unwrap();
        for (below, number) in nodes {
            fs::create_dir_all(place.join(below)).unwrap();
            fs::write(place.join(below).join("dev"), format!("{number}\n")).unwrap();
        }
        for (name, text) in [
            ("idVendor", "0403"),
            ("idProduct", "6001"),
            ("bDeviceClass", "00"),
            ("busnum", "1"),
            ("devnum", "5"),
            ("serial", serial),
        ] {
            fs::write(place.join(name), format!("{text}\n")).unwrap();
        }
        let link = format!("../../../devices/pci0000:00/0000:00:14.0/usb1/{port}");
        symlink(link, sys.join(USB_DEVICES).join(port)).unwrap();
    }

    #[test]
    fn a_device_has_its_nodes_and_not_those_of_what_is_plugged_into_it() {
        let root = tempfile::tempdir().unwrap();
        let host = host(root.path());
        assert_eq!(list(&host, true, |_| false).unwrap(), []);
        let sys = root.path().join("sys");
        let deep = "1-2:1.0".to_owned() + &"/d".repeat(MAX_DEPTH);
        plug(
            &sys,
            "1-2",
            "S1",
            &[
                ("", "189:4"),
                ("1-2:1.0/ttyUSB0/tty/ttyUSB0", "188:0"),
                ("1-2:1.1/host0/block/sda", "8:0"),
                // A hub's port, another device's interface, and a directory deeper than any.
                ("1-2.1", "189:5"),
                ("1-20:1.0/tty/ttyUSB1", "188:1"),
                (&deep, "1:3"),
            ],
        );
        plug(&sys, "1-3", "S2", &[("", "189:6")]);
        // What is no port: a root hub, an interface.
        for other in ["usb1", "1-2:1.0"] {
            fs::create_dir(sys.join(USB_DEVICES).join(other)).unwrap();
        }
        let port = |text: &str| text.parse::<UsbPort>().unwrap();
        let found = nodes(&host, &port("1-2"));
        let character = |minor| (SFlag::S_IFCHR.bits(), minor);
        let expected = [
            ("", character(makedev(189, 4))),
            ("1-2:1.0/ttyUSB0/tty/ttyUSB0", character(makedev(188, 0))),
            ("1-2:1.1/host0/block/sda", (SFlag::S_IFBLK.bits(), makedev(8, 0))),
        ];
        assert_eq!(
            found,
            expected.map(|(path, number)| (path.to_owned(), number)).into()
        );
        assert!(nodes(&host, &port("1-9")).is_empty());
        assert_eq!(number(&host, &port("1-2")), Some(makedev(189, 4)));
        assert_eq!(number(&host, &port("1-9")), None);
        fs::write(sys.join(USB_DEVICES).join("1-3/bDeviceClass"), "09\n").unwrap();
        assert!(nodes(&host, &port("1-3")).is_empty());

        let listed = |taken: &str| {
            let mut listed = list(&host, true, |port| port.as_str() == taken).unwrap();
            listed.sort_by(|a, b| a.port.cmp(&b.port));
            listed
        };
        let all = listed("");
        assert_eq!(
            all.iter().map(|device| device.port.as_str()).collect::<Vec<_>>(),
            ["1-2", "1-3"]
        );
        assert_eq!(all[0].id_path.as_deref(), Some("pci-0000:00:14.0-usb-0:2"));
        assert_eq!(all[0].serial.as_deref(), Some("S1"));
        assert_eq!(listed("1-2").len(), 1);
    }

    #[test]
    fn of_a_device_with_more_than_any_has_a_job_gets_nothing() {
        let root = tempfile::tempdir().unwrap();
        let host = host(root.path());
        let sys = root.path().join("sys");
        plug(&sys, "1-2", "", &[("", "189:4")]);
        let interface = sys.join("devices/pci0000:00/0000:00:14.0/usb1/1-2/1-2:1.0");
        let port = "1-2".parse().unwrap();
        for number in 1..MAX_DIRECTORIES {
            fs::create_dir_all(interface.join(number.to_string())).unwrap();
        }
        assert_eq!(nodes(&host, &port).len(), 1);
        fs::create_dir(interface.join("more")).unwrap();
        assert!(nodes(&host, &port).is_empty());
        assert!(number(&host, &port).is_some());
    }

    #[test]
    fn a_port_is_a_directory_of_its_hubs_interface() {
        for (port, hub, directory) in [
            ("1-2.3", "1-2", "1-2:1.0/1-2-port3"),
            ("1-2.3.4", "1-2.3", "1-2.3:1.0/1-2.3-port4"),
            ("15-2", "usb15", "15-0:1.0/usb15-port2"),
        ] {
            let found = hub_and_port(&port.parse().unwrap()).unwrap();
            assert_eq!(found, (hub.to_owned(), directory.to_owned()));
        }
        assert_eq!(
            follow(
                "devices/a/usb1/1-0:1.0/usb1-port2",
                "../../../usb2/2-0:1.0/usb2-port2"
            ),
            "devices/a/usb2/2-0:1.0/usb2-port2"
        );
    }

    #[test]
    fn a_link_out_of_sysfs_is_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let host = host(root.path());
        let devices = root.path().join("sys").join(USB_DEVICES);
        fs::create_dir_all(&devices).unwrap();
        symlink(root.path(), devices.join("1-2")).unwrap();
        symlink("../../../..", devices.join("1-3")).unwrap();
        symlink("../../../devices/link", devices.join("1-4")).unwrap();
        fs::create_dir(root.path().join("sys/devices")).unwrap();
        symlink(root.path(), root.path().join("sys/devices/link")).unwrap();
        for port in ["1-2", "1-3", "1-4"] {
            assert!(nodes(&host, &port.parse().unwrap()).is_empty());
        }
        assert_eq!(list(&host, true, |_| false).unwrap(), []);
    }
}
