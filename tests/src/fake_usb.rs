//! USB devices of a host in a mount namespace: a `/sys` with devices as the kernel shows them, and nodes of the host's
//! `/dev`. No driver answers for the nodes: they can be seen, and not opened.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::stat::{Mode, SFlag, makedev, mknod};

/// The kernel's major number of USB devices (admin-guide/devices.rst).
const MAJOR: u64 = 189;

/// A directory that is to be `/sys`, and the nodes that are plugged in.
#[derive(Debug)]
pub struct FakeUsb {
    sys: PathBuf,
    /// Below `/dev`, with a name that nothing else has.
    dev: PathBuf,
}

/// What is plugged in at a port.
#[derive(Clone, Copy, Debug)]
pub struct Plugged<'a> {
    /// `VENDOR:PRODUCT`.
    pub ids: &'a str,
    /// Empty for a device that has none.
    pub serial: &'a str,
    /// Directories of `sysfs` below the device's own, each with a node.
    pub nodes: &'a [&'a str],
}

impl FakeUsb {
    /// With nothing plugged in. `place` must be seen by the helper and by jobs.
    pub fn new(place: &Path) -> FakeUsb {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let usb = FakeUsb {
            sys: place.join("sys"),
            dev: PathBuf::from(format!("/dev/user-factory-test-{}-{number}", std::process::id())),
        };
        fs::create_dir_all(usb.sys.join("bus/usb/devices")).unwrap();
        fs::create_dir_all(usb.sys.join("fs/cgroup")).unwrap();
        fs::create_dir(&usb.dev).unwrap();
        usb
    }

    /// Commands of a shell that make it the `/sys` of their mount namespace.
    pub fn mounts(&self) -> String {
        let sys = self.sys.display();
        format!("mount --rbind /sys/fs/cgroup {sys}/fs/cgroup; mount --rbind {sys} /sys")
    }

    /// Where its nodes are.
    pub fn dev(&self) -> &Path {
        &self.dev
    }

    fn place(&self, port: &str) -> PathBuf {
        self.sys.join("devices/pci0000:00/0000:00:14.0/usb1").join(port)
    }

    /// Plug this in. As the kernel does, the node comes after all else. Every node has a number that none had before.
    pub fn plug(&self, port: &str, device: Plugged<'_>) {
        static NUMBER: AtomicU64 = AtomicU64::new(1);
        let (vendor, product) = device.ids.split_once(':').unwrap();
        let place = self.place(port);
        fs::create_dir_all(&place).unwrap();
        let mut nodes = Vec::new();
        for node in [""].iter().chain(device.nodes) {
            let number = 1000 * u64::from(std::process::id() % 1000) + NUMBER.fetch_add(1, Ordering::Relaxed);
            fs::create_dir_all(place.join(node)).unwrap();
            fs::write(place.join(node).join("dev"), format!("{MAJOR}:{number}\n")).unwrap();
            let name = Path::new(node).file_name().and_then(|name| name.to_str());
            nodes.push((
                name.map_or_else(|| format!("usb-{number}"), str::to_owned),
                number,
                node.contains("/block/"),
            ));
        }
        for (name, text) in [
            ("idVendor", vendor),
            ("idProduct", product),
            ("bDeviceClass", "00"),
            ("busnum", "1"),
            ("devnum", &(nodes[0].1 % 127).to_string()),
            ("serial", device.serial),
        ] {
            if !text.is_empty() {
                fs::write(place.join(name), format!("{text}\n")).unwrap();
            }
        }
        let link = format!("../../../devices/pci0000:00/0000:00:14.0/usb1/{port}");
        symlink(link, self.sys.join("bus/usb/devices").join(port)).unwrap();
        for (name, number, is_block) in nodes {
            let kind = if is_block { SFlag::S_IFBLK } else { SFlag::S_IFCHR };
            let mode = Mode::from_bits_truncate(0o600);
            mknod(&self.dev.join(&name), kind, mode, makedev(MAJOR, number)).unwrap();
        }
    }

    /// What is plugged in there says that it is a hub.
    pub fn make_hub(&self, port: &str) {
        fs::write(self.place(port).join("bDeviceClass"), "09\n").unwrap();
        // The kernel tells of it by a node.
        let node = self.dev.join("hub");
        mknod(&node, SFlag::S_IFCHR, Mode::empty(), makedev(MAJOR, 0)).unwrap();
        fs::remove_file(node).unwrap();
    }

    /// Unplug all that is plugged in. A worker with a device is deleted after this: what cannot be opened cannot be reset.
    pub fn unplug_all(&self) {
        for entry in fs::read_dir(self.sys.join("bus/usb/devices")).unwrap() {
            self.unplug(entry.unwrap().file_name().to_str().unwrap());
        }
    }

    /// Unplug what is there: its nodes go first.
    pub fn unplug(&self, port: &str) {
        let place = self.place(port);
        let mut numbers = Vec::new();
        let mut waiting = vec![place.clone()];
        while let Some(dir) = waiting.pop() {
            numbers.extend(
                fs::read_to_string(dir.join("dev"))
                    .ok()
                    .map(|text| text.trim().to_owned()),
            );
            let below = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
            waiting.extend(below.filter(|path| path.is_dir()));
        }
        for entry in fs::read_dir(&self.dev).unwrap() {
            use std::os::unix::fs::MetadataExt;
            let path = entry.unwrap().path();
            let number = fs::symlink_metadata(&path).unwrap().rdev();
            let number = format!(
                "{}:{}",
                nix::sys::stat::major(number),
                nix::sys::stat::minor(number)
            );
            if numbers.contains(&number) {
                fs::remove_file(path).unwrap();
            }
        }
        fs::remove_file(self.sys.join("bus/usb/devices").join(port)).unwrap();
        fs::remove_dir_all(place).unwrap();
    }
}

impl Drop for FakeUsb {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dev);
    }
}
