//! What `user-factory devices` shows: what is plugged in, its nodes, and the slots that it belongs to.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use protocol::SlotName;
use protocol::config::{Slot, UsbEntry};
use protocol::usb::{UsbDevice, UsbPort};
use serde::Serialize;

use super::{DeviceStrings, read_text};

/// Nodes are looked for so many directories below a device's.
const MAX_DEPTH: usize = 10;
/// The most directories of one device that are looked at.
const MAX_DIRECTORIES: usize = 2000;

/// One device, as JSON has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ListedDevice {
    /// The kernel's name of its port: `1-2.3`.
    pub port: String,
    /// The port's name that is stable over reboots, as udev's `ID_PATH`.
    pub id_path: Option<String>,
    /// `idVendor`, four hexadecimal digits.
    pub vendor: String,
    /// `idProduct`, four hexadecimal digits.
    pub product: String,
    /// The device's own text, which may be anything.
    pub manufacturer: Option<String>,
    /// What it is, by its own text.
    pub description: Option<String>,
    /// Its serial number, by its own text.
    pub serial: Option<String>,
    /// False where a process keeps the device busy, so that the kernel does not tell its texts.
    pub is_read: bool,
    /// Its nodes, as paths.
    pub nodes: Vec<String>,
    /// The entries of the configuration that mean it.
    pub entries: Vec<ListedEntry>,
    /// A line for the configuration that means this device and no other that is plugged in now.
    pub line: String,
}

/// An entry of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ListedEntry {
    /// The slot's name.
    pub slot: SlotName,
    /// The entry's name: the key is `usb.NAME`.
    pub usb: String,
}

/// All devices but hubs. `nodes` returns the nodes of a device.
pub fn list(
    devices: &[(UsbDevice, Option<DeviceStrings>)],
    slots: &BTreeMap<SlotName, Slot>,
    nodes: impl Fn(&UsbDevice) -> Vec<String>,
) -> Vec<ListedDevice> {
    let all: Vec<&UsbDevice> = devices
        .iter()
        .map(|(device, _)| device)
        .filter(|device| !device.is_hub)
        .collect();
    let listed = devices.iter().filter(|(device, _)| !device.is_hub);
    let listed = listed.map(|(device, strings)| {
        let texts = strings.clone().unwrap_or_default();
        ListedDevice {
            port: device.port.to_string(),
            id_path: device.id_path.clone(),
            vendor: format!("{:04x}", device.vendor),
            product: format!("{:04x}", device.product),
            manufacturer: texts.manufacturer,
            description: texts.product,
            serial: texts.serial,
            is_read: strings.is_some(),
            nodes: nodes(device),
            entries: entries(device, slots),
            line: line(device, &all),
        }
    });
    listed.collect()
}

fn entries(device: &UsbDevice, slots: &BTreeMap<SlotName, Slot>) -> Vec<ListedEntry> {
    let all = slots
        .iter()
        .flat_map(|(slot, of)| of.usb.iter().map(move |(name, entry)| (slot, name, entry)));
    all.filter(|(_, _, entry)| device.is(entry))
        .map(|(slot, name, _)| ListedEntry {
            slot: slot.clone(),
            usb: name.to_string(),
        })
        .collect()
}

/// By the serial number, where the configuration may have it and no other device does; otherwise by the port.
fn line(device: &UsbDevice, all: &[&UsbDevice]) -> String {
    let is_alone = |of: &dyn Fn(&UsbDevice) -> bool| all.iter().filter(|device| of(device)).count() == 1;
    let written = |key: &str, value: &str| {
        let value = value.replace('\\', "\\\\").replace('"', "\\\"");
        format!("usb.NAME = {{ {key} = \"{value}\" }}")
    };
    let by_serial = device.serial.as_deref().and_then(|serial| {
        let line = written("serial", serial);
        // What the configuration's own parser takes.
        let (_, value) = line.split_once(" = ")?;
        let entry: BTreeMap<String, UsbEntry> = toml::from_str(&format!("entry = {value}")).ok()?;
        let entry = entry.get("entry")?;
        is_alone(&|other| other.is(entry)).then_some(line)
    });
    let path = device.id_path.as_ref();
    let path = path.filter(|path| is_alone(&|other| other.id_path.as_ref() == Some(path)));
    let port = path.map_or(device.port.as_str(), String::as_str);
    by_serial.unwrap_or_else(|| written("port", port))
}

/// The nodes of this device and of its interfaces, as paths. `directory` is that of [`super::devices_directory`].
pub fn nodes(directory: &Path, device: &UsbDevice) -> Vec<String> {
    let (bus, number) = device.number;
    // Its own is told by its numbers: `uevent` of the device itself may be as slow as its strings.
    let own = format!("/dev/bus/usb/{bus:03}/{number:03}");
    let mut found = Vec::new();
    let mut left = MAX_DIRECTORIES;
    add_nodes(
        &directory.join(device.port.as_str()),
        MAX_DEPTH,
        &mut left,
        &mut found,
    );
    found.sort_by_key(|node| (node.len(), node.clone()));
    [vec![own], found].concat()
}

fn add_nodes(place: &Path, depth: usize, left: &mut usize, found: &mut Vec<String>) {
    for entry in fs::read_dir(place).into_iter().flatten().flatten() {
        // Links lead to other devices.
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let is_device = |name: &str| name.parse::<UsbPort>().is_ok();
        if !is_directory || entry.file_name().to_str().is_none_or(is_device) {
            continue;
        }
        if *left == 0 || depth == 0 {
            return;
        }
        *left -= 1;
        let uevent = read_text(&entry.path().join("uevent")).unwrap_or_default();
        let node = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="));
        found.extend(node.map(|node| format!("/dev/{node}")));
        add_nodes(&entry.path(), depth - 1, left, found);
    }
}
