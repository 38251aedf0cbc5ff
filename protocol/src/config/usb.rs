//! Which USB devices of the host a slot's jobs have.

use std::fmt;
use std::num::NonZeroU32;

use serde::{Deserialize, Deserializer, de};

use super::value::text;
use crate::name::UsbPort;

/// The most entries of one slot.
pub const MAX_USB_ENTRIES: usize = 16;

/// An entry's name, of which a directory of the job's `/dev` and its variables are made: it begins with a lower-case letter
/// and has at most 32 lower-case letters, digits and underscores.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct UsbName(String);

impl UsbName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// None where it is no such name.
    pub fn parse(text: &str) -> Option<UsbName> {
        let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
        let begins = text.bytes().next().is_some_and(|b| b.is_ascii_lowercase());
        (begins && text.len() <= 32 && text.bytes().all(good)).then(|| UsbName(text.to_owned()))
    }
}

impl fmt::Display for UsbName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for UsbName {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        text(from, |text| {
            UsbName::parse(text).ok_or_else(|| {
                format!("{text:?} is no name of a USB device: a lower-case letter first, then at most 31 of a-z, 0-9 and _")
            })
        })
    }
}

/// A port, as an operator names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortName {
    /// udev's `ID_PATH`: `pci-0000:00:14.0-usb-0:2.3`.
    IdPath(String),
    /// The kernel's name, whose first number may be another after a reboot: `1-2.3`.
    Kernel(UsbPort),
}

impl fmt::Display for PortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PortName::IdPath(path) => f.write_str(path),
            PortName::Kernel(port) => port.fmt(f),
        }
    }
}

impl<'de> Deserialize<'de> for PortName {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        text(from, |text| {
            if let Ok(port) = text.parse() {
                return Ok(PortName::Kernel(port));
            }
            let bad = |why| Err(format!("{text:?} is no USB port: {why}"));
            let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.:,@+".contains(&b);
            match text.split_once("-usb-0:") {
                Some((_, ports)) if ports.contains(':') => {
                    bad("it names an interface of a device: remove what follows the second colon after usb")
                }
                Some((controller, ports))
                    if format!("1-{ports}").parse::<UsbPort>().is_ok()
                        && !controller.is_empty()
                        && text.bytes().all(is_plain) =>
                {
                    Ok(PortName::IdPath(text.to_owned()))
                }
                _ => bad(
                    "write it as pci-0000:00:14.0-usb-0:2.3 (`user-factory devices` shows it), or as 1-2.3",
                ),
            }
        })
    }
}

/// `usb.NAME`: how to tell a device. All that is written must be so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsbEntry {
    /// The device's serial number, in upper or lower case.
    pub serial: Option<String>,
    /// Whatever is plugged in there.
    pub port: Option<PortName>,
    /// `idVendor`.
    pub vendor: Option<u16>,
    /// `idProduct`.
    pub product: Option<u16>,
    /// Must it be there when a job starts? Otherwise the job has it from when it appears.
    pub required: bool,
    /// Is the power of its port turned off and on after a job? Otherwise the device is reset.
    pub power_cycle: bool,
    /// A device that is unplugged for longer than this while its job runs is named in the job's log: seconds, 1 to 86400.
    pub grace_seconds: Option<NonZeroU32>,
}

impl UsbEntry {
    /// Do these two tell a device by the same, so that they mean the same one? What one of them does not name is not compared:
    /// whether the device with a serial number is the one at a port is not known from the text.
    pub fn means_same(&self, other: &UsbEntry) -> bool {
        let serials = self.serial.as_ref().zip(other.serial.as_ref());
        // The path and the kernel's name of one port cannot be compared.
        let ports = self.port.as_ref().zip(other.port.as_ref());
        let ports = ports.filter(|(a, b)| std::mem::discriminant(*a) == std::mem::discriminant(*b));
        let ids = [self.vendor.zip(other.vendor), self.product.zip(other.product)];
        if serials.is_some_and(|(a, b)| !a.eq_ignore_ascii_case(b))
            || ports.is_some_and(|(a, b)| a != b)
            || ids.iter().flatten().any(|(a, b)| a != b)
        {
            return false;
        }
        serials.is_some() || ports.is_some() || ids.iter().any(Option::is_some)
    }
}

impl fmt::Display for UsbEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let serial = self.serial.as_ref().map(|serial| format!("serial {serial}"));
        let port = self.port.as_ref().map(|port| format!("port {port}"));
        let vendor = self.vendor.map(|vendor| format!("vendor {vendor:04x}"));
        let product = self.product.map(|product| format!("product {product:04x}"));
        let all: Vec<String> = [serial, port, vendor, product].into_iter().flatten().collect();
        f.write_str(&all.join(", "))
    }
}

/// As it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    serial: Option<Serial>,
    port: Option<PortName>,
    vendor: Option<HexId>,
    product: Option<HexId>,
    #[serde(default = "super::default_true")]
    required: bool,
    #[serde(default)]
    power_cycle: bool,
    #[serde(default, deserialize_with = "super::limits::maybe_between::<_, 1, 86_400>")]
    grace_seconds: Option<u64>,
}

impl<'de> Deserialize<'de> for UsbEntry {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let raw = RawEntry::deserialize(from)?;
        if raw.product.is_some() && raw.vendor.is_none() {
            return Err(de::Error::custom(
                "a product's number is its vendor's: name the vendor",
            ));
        }
        if raw.serial.is_none() && raw.port.is_none() && raw.vendor.is_none() {
            return Err(de::Error::custom(
                "it tells no device: name its serial, its port, or its vendor and product",
            ));
        }
        Ok(UsbEntry {
            serial: raw.serial.map(|serial| serial.0),
            port: raw.port,
            vendor: raw.vendor.map(|id| id.0),
            product: raw.product.map(|id| id.0),
            required: raw.required,
            power_cycle: raw.power_cycle,
            grace_seconds: raw
                .grace_seconds
                .and_then(|seconds| NonZeroU32::new(u32::try_from(seconds).ok()?)),
        })
    }
}

struct Serial(String);

impl<'de> Deserialize<'de> for Serial {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        text(from, |text| {
            // A string descriptor has at most 126 characters (USB 2.0, 9.6.7).
            let good = (1..=126).contains(&text.chars().count()) && !text.chars().any(char::is_control);
            match good {
                true => Ok(Serial(text.to_owned())),
                false => Err("a serial number has 1 to 126 characters and no control characters".into()),
            }
        })
    }
}

struct HexId(u16);

impl<'de> Deserialize<'de> for HexId {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        text(from, |text| {
            let digits = text.strip_prefix("0x").unwrap_or(text);
            let is_hex = digits.len() == 4 && digits.bytes().all(|b| b.is_ascii_hexdigit());
            match u16::from_str_radix(digits, 16) {
                Ok(id) if is_hex => Ok(HexId(id)),
                _ => Err(format!(
                    "{text:?} is no number of a vendor or product: four hexadecimal digits, in quotes"
                )),
            }
        })
    }
}
