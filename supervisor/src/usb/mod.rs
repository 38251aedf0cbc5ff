//! USB devices that are plugged in, and the slots that take no job since theirs are not. [`absences`] decides;
//! [`UsbMonitor`] reads `sysfs`.
//!
//! The kernel tells a device's numbers at once. For its strings (`serial`, `product`, `manufacturer`) it takes the device's
//! lock (`usb_lock_device_interruptible` in `drivers/usb/core/sysfs.c`), which a job may hold for as long as it wants. So
//! strings are read once for each time that a device is plugged in, in a thread of their own. Until they are known, the
//! device is not told by its serial number.

pub mod check;
pub mod job_devices;
pub mod list;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use protocol::SlotName;
use protocol::config::{Slot, UsbEntry};
use protocol::usb::{MAX_USB_DEVICES, USB_DEVICES, UsbDevice, UsbPort, UsbProblem, resolve};
use tokio::sync::mpsc;
use tokio::time::Instant;

/// How often devices are looked for.
const INTERVAL: Duration = Duration::from_millis(500);
/// The same while strings are being read.
const READING_INTERVAL: Duration = Duration::from_millis(50);
/// Strings that are not known after this are held up by whoever has the device's lock.
const READ_TIME: Duration = Duration::from_secs(1);
/// The most devices whose strings are being read.
const MAX_READERS: usize = 8;
/// The most bytes of one file: `sysfs` has no longer ones.
const MAX_BYTES: u64 = 4096;

/// Where the kernel lists USB devices.
pub fn devices_directory() -> PathBuf {
    Path::new("/sys").join(USB_DEVICES)
}

/// What a device says of itself. It may be anything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceStrings {
    /// Who made it.
    pub manufacturer: Option<String>,
    /// What it is.
    pub product: Option<String>,
    /// Its serial number.
    pub serial: Option<String>,
}

/// Why a slot with USB devices takes no job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UsbAbsence {
    /// It is not known yet which devices are plugged in.
    NotRead,
    /// A device is absent, or it is not clear which one is meant. The ports are those of devices whose serial numbers are
    /// not known, where that may be why.
    Problem(UsbProblem, Vec<UsbPort>),
}

impl UsbAbsence {
    /// For the status, behind the word `absent`.
    pub fn because(&self) -> String {
        match self {
            UsbAbsence::NotRead => "its USB devices are being read".into(),
            UsbAbsence::Problem(UsbProblem::Absent(name, entry), unread) => {
                format!("usb.{name} ({entry}){}", unread_text(unread))
            }
            UsbAbsence::Problem(problem, _) => problem.to_string(),
        }
    }

    /// With what to do, for the log and `check`.
    pub fn sentence(&self) -> String {
        match self {
            UsbAbsence::NotRead => self.because(),
            UsbAbsence::Problem(problem, unread) => format!("{problem}{}", unread_text(unread)),
        }
    }
}

fn unread_text(ports: &[UsbPort]) -> String {
    if ports.is_empty() {
        return String::new();
    }
    let ports: Vec<&str> = ports.iter().map(UsbPort::as_str).collect();
    format!(
        "; the kernel does not tell the serial number of what is at {}, which a process keeps busy: end that process",
        ports.join(" and ")
    )
}

/// The slots that take no job, and why.
pub type UsbAbsences = BTreeMap<SlotName, UsbAbsence>;

/// Which strings are not known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unread {
    /// Some will be in a moment.
    pub is_reading: bool,
    /// The devices that keep others waiting.
    pub late: Vec<UsbPort>,
}

/// The slots whose devices are absent, or not clear. A slot is as it was `before` while strings are being read that may
/// change it.
pub fn absences(
    slots: &BTreeMap<SlotName, Slot>,
    devices: &[UsbDevice],
    unread: &Unread,
    before: &UsbAbsences,
) -> UsbAbsences {
    let absence = |(name, slot): (&SlotName, &Slot)| {
        let mut entries = slot.usb.iter();
        let problem = entries.find_map(|(name, entry)| resolve(name, entry, devices).err())?;
        let by_serial = has_serial(&problem);
        let absence = match before.get(name) {
            before if by_serial && unread.is_reading => before.cloned().unwrap_or(UsbAbsence::NotRead),
            _ => UsbAbsence::Problem(
                problem,
                if by_serial {
                    unread.late.clone()
                } else {
                    Vec::new()
                },
            ),
        };
        Some((name.clone(), absence))
    };
    slots.iter().filter_map(absence).collect()
}

/// The slots whose devices are absent now, or not clear, as a command sees them.
pub fn absences_now(slots: &BTreeMap<SlotName, Slot>) -> UsbAbsences {
    if slots.values().all(|slot| slot.usb.is_empty()) {
        return UsbAbsences::new();
    }
    let mut monitor = UsbMonitor::new(devices_directory());
    let devices: Vec<UsbDevice> = monitor.wait().into_iter().map(|(device, _)| device).collect();
    absences(slots, &devices, &monitor.unread(), &UsbAbsences::new())
}

/// Is the device absent that is told by its serial number?
fn has_serial(problem: &UsbProblem) -> bool {
    matches!(problem, UsbProblem::Absent(_, UsbEntry { serial: Some(_), .. }))
}

/// One time that a device was plugged in, or came back.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Enumeration {
    port: UsbPort,
    number: (u16, u16),
    ids: (u16, u16),
}

impl From<&UsbDevice> for Enumeration {
    fn from(device: &UsbDevice) -> Enumeration {
        Enumeration {
            port: device.port.clone(),
            number: device.number,
            ids: (device.vendor, device.product),
        }
    }
}

type Answer = (Enumeration, Option<DeviceStrings>);

/// What is plugged into this host, read no more often than is of use. [`UsbMonitor::absences`] never
/// waits for a device.
#[derive(Debug)]
pub struct UsbMonitor {
    directory: PathBuf,
    /// When they were looked for.
    at: Option<Instant>,
    devices: Vec<UsbDevice>,
    strings: BTreeMap<Enumeration, DeviceStrings>,
    /// The ports of devices whose strings are being read, and since when.
    readers: BTreeMap<UsbPort, Instant>,
    answers: mpsc::UnboundedReceiver<Answer>,
    sender: mpsc::UnboundedSender<Answer>,
}

impl UsbMonitor {
    /// `directory` is that of [`devices_directory`]. Where it is not there, no device is.
    pub fn new(directory: PathBuf) -> UsbMonitor {
        let (sender, answers) = mpsc::unbounded_channel();
        UsbMonitor {
            directory,
            at: None,
            devices: Vec::new(),
            strings: BTreeMap::new(),
            readers: BTreeMap::new(),
            answers,
            sender,
        }
    }

    /// The slots whose devices are absent, or not clear; None where nothing has been read since the last time. `before` is
    /// what was known.
    pub fn absences(
        &mut self,
        slots: &BTreeMap<SlotName, Slot>,
        before: &UsbAbsences,
    ) -> Option<UsbAbsences> {
        if slots.values().all(|slot| slot.usb.is_empty()) {
            self.at = None;
            return Some(UsbAbsences::new());
        }
        let is_due = self.due_in().is_none_or(|due| due.is_zero());
        (self.take_answers() | is_due).then(|| {
            self.refresh();
            absences(slots, &self.devices, &self.unread(), before)
        })
    }

    /// When [`UsbMonitor::absences`] is to be asked again; None where no slot has USB devices.
    pub fn due_in(&self) -> Option<Duration> {
        let interval = if self.is_reading() {
            READING_INTERVAL
        } else {
            INTERVAL
        };
        self.at.map(|at| interval.saturating_sub(at.elapsed()))
    }

    /// What was plugged in when [`UsbMonitor::absences`] last had an answer, hubs as well.
    pub fn devices(&self) -> &[UsbDevice] {
        &self.devices
    }

    /// What is plugged in now, hubs as well, with the strings that are known within a second.
    pub fn wait(&mut self) -> Vec<(UsbDevice, Option<DeviceStrings>)> {
        self.refresh();
        while self.is_reading() {
            thread::sleep(Duration::from_millis(5));
            if self.take_answers() {
                self.refresh();
            }
        }
        let strings = |device: &UsbDevice| self.strings.get(&device.into()).cloned();
        self.devices
            .iter()
            .map(|device| (device.clone(), strings(device)))
            .collect()
    }

    /// Which strings are not known.
    pub fn unread(&self) -> Unread {
        let is_unread = |device: &&UsbDevice| !device.is_hub && !self.strings.contains_key(&(*device).into());
        let is_late = |port: &UsbPort| {
            let since = self.readers.get(port);
            since.is_some_and(|since| since.elapsed() >= READ_TIME)
        };
        let late = self.devices.iter().filter(is_unread).map(|device| &device.port);
        Unread {
            is_reading: self.is_reading(),
            late: late.filter(|port| is_late(port)).cloned().collect(),
        }
    }

    /// Will strings be known in a moment?
    fn is_reading(&self) -> bool {
        self.readers.values().any(|since| since.elapsed() < READ_TIME)
    }

    /// Returns whether a reader has come to its end.
    fn take_answers(&mut self) -> bool {
        let mut has_answer = false;
        while let Ok((enumeration, strings)) = self.answers.try_recv() {
            has_answer = true;
            self.readers.remove(&enumeration.port);
            self.strings.extend(strings.map(|strings| (enumeration, strings)));
        }
        has_answer
    }

    /// Look for devices, and have the strings of new ones read.
    fn refresh(&mut self) {
        self.at = Some(Instant::now());
        self.devices = plugged_in(&self.directory);
        let present: BTreeSet<Enumeration> = self.devices.iter().map(Enumeration::from).collect();
        self.strings
            .retain(|enumeration, _| present.contains(enumeration));
        for device in &mut self.devices {
            let enumeration = Enumeration::from(&*device);
            if let Some(strings) = self.strings.get(&enumeration) {
                device.serial.clone_from(&strings.serial);
            } else if !device.is_hub
                && self.readers.len() < MAX_READERS
                && !self.readers.contains_key(&device.port)
            {
                let (directory, sender) = (self.directory.clone(), self.sender.clone());
                let read = move || {
                    let strings = read_strings(&directory, &enumeration);
                    // The monitor may have gone.
                    let _ = sender.send((enumeration, strings));
                };
                // A thread that cannot be made is tried again.
                if thread::Builder::new()
                    .name("usb-strings".into())
                    .spawn(read)
                    .is_ok()
                {
                    self.readers.insert(device.port.clone(), Instant::now());
                }
            }
        }
    }
}

/// All devices, without their strings.
fn plugged_in(directory: &Path) -> Vec<UsbDevice> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let ports = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let ports: BTreeSet<UsbPort> = ports.take(MAX_USB_DEVICES).collect();
    ports
        .into_iter()
        .filter_map(|port| device_at(directory, port))
        .collect()
}

fn device_at(directory: &Path, port: UsbPort) -> Option<UsbDevice> {
    let place = directory.join(port.as_str());
    let link = fs::read_link(&place).ok()?;
    let is_string = |name: &str| name == "serial";
    UsbDevice::of(port, link.to_str()?, |name| match is_string(name) {
        true => None,
        false => read_text(&place.join(name)),
    })
}

/// The strings of a device, which may take as long as somebody has its lock. None where another is in its place meanwhile.
fn read_strings(directory: &Path, enumeration: &Enumeration) -> Option<DeviceStrings> {
    let place = directory.join(enumeration.port.as_str());
    let read = |name: &str| {
        let text = read_text(&place.join(name))?;
        Some(text.strip_suffix('\n').unwrap_or(&text).to_owned())
    };
    let strings = DeviceStrings {
        manufacturer: read("manufacturer"),
        product: read("product"),
        serial: read("serial"),
    };
    let now = device_at(directory, enumeration.port.clone())?;
    (Enumeration::from(&now) == *enumeration).then_some(strings)
}

fn read_text(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    let file = fs::File::open(path).ok()?;
    file.take(MAX_BYTES).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}
