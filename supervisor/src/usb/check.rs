//! What `check` says of the USB devices of a configuration: nothing that keeps it from being used.

use protocol::config::{Config, Mistake, PortName, UsbEntry, UsbName, usb_conflicts};
use protocol::usb::{UsbDevice, UsbPort, resolve};

use super::{Unread, UsbAbsence, has_serial};
use crate::config_check::line_of;

/// A warning for each port by the kernel's name, each device that is absent or not clear now, and each two slots that
/// exclude each other by a device; in the order of lines. `text` is the text of `config`.
pub fn warnings(text: &str, config: &Config, devices: &[UsbDevice], unread: &Unread) -> Vec<Mistake> {
    let mut warnings = Vec::new();
    let mut warn = |slot: &str, name: &UsbName, message: String| {
        let line = line_of(text, &["slots", slot, "usb", name.as_str()]);
        let message = format!("warning: slot {slot}: {message}");
        warnings.push(Mistake { line, message });
    };
    for (slot, of) in &config.slots {
        for (name, entry) in &of.usb {
            if let Some(PortName::Kernel(port)) = &entry.port {
                warn(slot.as_str(), name, kernel_name(name, port, devices));
            }
            if let Some(why) = problem(name, entry, devices, unread) {
                warn(slot.as_str(), name, why);
            }
        }
    }
    for [(slot, name), (other, other_name)] in usb_conflicts(&config.slots) {
        let message = format!(
            "usb.{name} means the same device as usb.{other_name} of slot {other}: while one of these slots has a job, the other has none"
        );
        warn(slot.as_str(), name, message);
    }
    warnings.sort_by_key(|warning| warning.line);
    warnings
}

fn kernel_name(name: &UsbName, port: &UsbPort, devices: &[UsbDevice]) -> String {
    let occupied = devices.iter().find(|device| device.port == *port);
    let remedy = match occupied.and_then(|device| device.id_path.as_ref()) {
        Some(path) => format!("write port = {path:?}"),
        None => "plug a device in there, and write the port that `user-factory devices` shows for it".into(),
    };
    format!(
        "usb.{name} has its port by the kernel's name {port}, whose first number may be another after a reboot: {remedy}"
    )
}

fn problem(name: &UsbName, entry: &UsbEntry, devices: &[UsbDevice], unread: &Unread) -> Option<String> {
    let problem = resolve(name, entry, devices).err()?;
    let late = if has_serial(&problem) {
        unread.late.clone()
    } else {
        Vec::new()
    };
    let sentence = UsbAbsence::Problem(problem, late).sentence();
    Some(format!("{sentence}; the slot takes no jobs before"))
}
