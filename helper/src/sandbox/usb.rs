//! A job's USB devices: which ports are the job's, and what is plugged in there.
//!
//! Where a job's `/dev` has its USB devices there is a directory for each entry of the slot, with the nodes by names that stay the
//! same, and with links that only root makes: one names the port, and is all that is remembered of which device the entry means.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, Flock, FlockArg, readlinkat};
use nix::sys::stat::{Mode, SFlag, dev_t, mknodat};
use nix::unistd::{fchownat, symlinkat};
use protocol::config::{Slot, UsbEntry, UsbName};
use protocol::usb::{USB_DEVICES, UsbDevice, UsbPort, resolve, stable_names};
use protocol::{Uid, WorkerId};

use crate::host::Host;
use crate::host::directory::{make_dir, names, open_dir, remove_file, stat};
use crate::host::usb::{self, NodeNumber};
use crate::monitor_ipc::Failure;
use crate::unprivileged::{run_as_user, usb_reset};

/// The directory in a job's `/dev`.
const DIRECTORY: &str = "slot";
/// The link to where `sysfs` has what is at the port.
const PORT_LINK: &str = "sysfs";
/// The link whose text is the serial number that the device had when it was found.
const SERIAL_LINK: &str = "serial";
/// The link that is there where the power of the port is turned off after the job.
const POWER_LINK: &str = "power_cycle";

/// The node by which a device is reset: a job's own may be of one that has gone, and of whatever has got its number since.
pub const RESET_NODE: &str = "reset";

/// How long a port is without power: what a board has stored is gone by then.
const POWER_OFF: Duration = Duration::from_secs(1);
/// How long the kernel may take to notice that devices without power have gone.
const GONE_LIMIT: Duration = Duration::from_secs(5);
/// How long devices may take to be there again.
const BACK_LIMIT: Duration = Duration::from_secs(15);
/// How long a device that has gone may take to appear: its job may have restarted it a moment ago.
const APPEAR_LIMIT: Duration = Duration::from_secs(3);
/// How often it is asked for.
const PAUSE: Duration = Duration::from_millis(20);

/// The nodes that the job whose `/dev` this is has now, with the names that they have besides the host's.
pub fn nodes(host: &Host, dev: BorrowedFd<'_>) -> Result<BTreeMap<NodeNumber, Vec<PathBuf>>> {
    let mut all: BTreeMap<NodeNumber, Vec<PathBuf>> = BTreeMap::new();
    for (name, port) in &ports(dev)? {
        let nodes = usb::nodes(host, port);
        let stable = stable_names(nodes.keys().map(String::as_str));
        for (directory, number) in &nodes {
            let names = all.entry(*number).or_default();
            let own = stable.get(&**directory);
            names.extend(own.map(|own| Path::new(DIRECTORY).join(name.as_str()).join(own)));
        }
    }
    Ok(all)
}

/// The ports that are a job's, by its entries.
fn ports(dev: BorrowedFd<'_>) -> Result<BTreeMap<UsbName, UsbPort>> {
    let mut ports = BTreeMap::new();
    let slot = match open_dir(dev, DIRECTORY) {
        Err(Errno::ENOENT) => return Ok(ports),
        slot => slot?,
    };
    for name in names(slot.as_fd())? {
        let link = readlinkat(&slot, &Path::new(&name).join(PORT_LINK)).ok();
        let port = link.and_then(|link| Path::new(&link).file_name()?.to_str()?.parse().ok());
        ports.extend(name.to_str().and_then(UsbName::parse).zip(port));
    }
    Ok(ports)
}

/// The ports of all workers but this one: whatever is plugged in there is theirs until they are deleted.
fn ports_of_others(host: &Host, worker: WorkerId) -> Result<BTreeSet<UsbPort>> {
    let mut all = BTreeSet::new();
    for name in names(host.devices.as_fd())? {
        let is_other = name.to_str().is_some_and(|name| name.parse() != Ok(worker));
        match open_dir(&host.devices, &name) {
            Ok(dev) if is_other => all.extend(ports(dev.as_fd())?.into_values()),
            _ => {}
        }
    }
    Ok(all)
}

/// Is it known which USB devices the job whose `/dev` this is has, if any?
pub fn is_known(dev: BorrowedFd<'_>) -> bool {
    stat(dev, DIRECTORY).is_ok()
}

/// The slot's entries of which the job has no port: all of them at its start, later those that need not be there then. A job
/// that waits for its start has none.
fn missing<'a>(
    dev: BorrowedFd<'_>,
    slot: &'a Slot,
    starts: bool,
) -> Result<Vec<(&'a UsbName, &'a UsbEntry)>> {
    if !starts && !is_known(dev) {
        return Ok(Vec::new());
    }
    let known = ports(dev)?;
    let is_missing =
        |(name, entry): &(&UsbName, &UsbEntry)| !known.contains_key(name) && (starts || !entry.required);
    Ok(slot.usb.iter().filter(is_missing).collect())
}

/// Find the device that each of the slot's entries means, and remember the port: from then on, the job has whatever is
/// there. At the start of a job all that are required must be there, or nothing is the job's; later, one that has appeared is
/// found. Returns whether one was.
pub fn find(
    host: &Host,
    worker: WorkerId,
    dev: BorrowedFd<'_>,
    slot: &Slot,
    starts: bool,
) -> Result<bool, Failure> {
    let wanted = missing(dev, slot, starts)?;
    if wanted.is_empty() {
        return Ok(false);
    }
    // Of a hub's ports and of the hub's own port, only one worker's can be there at a time.
    let is_one_of = |port: &UsbPort, taken: &BTreeSet<UsbPort>| {
        let mut taken = taken.iter();
        taken.any(|other| port.is_within(other) || other.is_within(port))
    };
    let taken = ports_of_others(host, worker)?;
    let serials = starts || wanted.iter().any(|(_, entry)| entry.serial.is_some());
    let mut devices = usb::list(host, serials, |port| is_one_of(port, &taken))?;
    // Two that are starting must not get the same. Nothing below waits for a device.
    let lock =
        Flock::lock(open_dir(&host.devices, ".")?, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    let taken = ports_of_others(host, worker)?;
    devices.retain(|device| !is_one_of(&device.port, &taken));
    // The monitor's child may have found some meanwhile.
    let mut found = Vec::new();
    for (name, entry) in missing(dev, slot, starts)? {
        match resolve(name, entry, &devices) {
            Err(problem) if starts => return Err(problem.into()),
            Ok(Some(device)) if entry.power_cycle && !usb::has_power_switch(host, &device.port) => {
                return Err(Failure::Busy(format!(
                    "usb.{name}: {}",
                    usb::no_power_switch(&device.port)
                )));
            }
            device => found.extend(device.ok().flatten().map(|device| (name, entry, device))),
        }
    }
    make_dir(dev, DIRECTORY, 0o755)?;
    for (name, entry, device) in &found {
        remember(dev, name, entry, device)?;
    }
    drop(lock);
    Ok(!found.is_empty())
}

fn remember(dev: BorrowedFd<'_>, name: &UsbName, entry: &UsbEntry, device: &UsbDevice) -> nix::Result<()> {
    let directory = Path::new(DIRECTORY).join(name.as_str());
    make_dir(dev, &directory, 0o755)?;
    // Left by a process that was ended in between.
    for link in [POWER_LINK, SERIAL_LINK] {
        remove_file(dev, directory.join(link))?;
    }
    if entry.power_cycle {
        symlinkat("yes", dev, &directory.join(POWER_LINK))?;
    }
    if let Some(serial) = device.serial.as_deref().filter(|serial| !serial.is_empty()) {
        symlinkat(serial, dev, &directory.join(SERIAL_LINK))?;
    }
    let place = Path::new("/sys").join(USB_DEVICES).join(device.port.as_str());
    symlinkat(&place, dev, &directory.join(PORT_LINK))
}

/// Has this worker a USB device, now or before it was unplugged?
pub fn has_some(host: &Host, worker: WorkerId) -> nix::Result<bool> {
    match open_dir(&host.devices, Path::new(&worker.to_string()).join(DIRECTORY)) {
        Err(Errno::ENOENT) => Ok(false),
        slot => slot.map(|_| true),
    }
}

/// Have the worker's USB devices begin anew, and wait until each is there again: the next job must not find them as this one has
/// left them. Each is reset with the rights of the worker's user, or its port is without power for a moment. One that is
/// unplugged is left alone.
pub fn reset(host: &Host, worker: WorkerId, uid: Uid) -> Result<()> {
    let dev = match open_dir(&host.devices, worker.to_string()) {
        Err(Errno::ENOENT) => return Ok(()),
        dev => dev?,
    };
    let ports = ports(dev.as_fd())?;
    let has_power_link =
        |name: &UsbName| stat(&dev, Path::new(DIRECTORY).join(name.as_str()).join(POWER_LINK)).is_ok();
    let cycled = ports.iter().filter(|(name, _)| has_power_link(name));
    let cycled: BTreeSet<&UsbPort> = cycled.map(|(_, port)| port).collect();
    // What must be there again, and the number that it must not have.
    let mut awaited = cycle_power(host, &cycled)?;
    for port in ports.values().collect::<BTreeSet<_>>().difference(&cycled) {
        if reset_one(host, worker, dev.as_fd(), uid, port)? {
            awaited.insert(*port, None);
        }
    }
    let end = Instant::now() + BACK_LIMIT;
    for (port, old) in awaited {
        while usb::number(host, port).is_none_or(|number| Some(number) == old) {
            ensure!(
                Instant::now() < end,
                "the USB device at port {port} has not come back after its reset: unplug it, and plug it in again"
            );
            std::thread::sleep(PAUSE);
        }
    }
    Ok(())
}

/// Turn the power of these ports off, and on again, whether or not something is plugged in: it may be about to come back. Returns
/// those that have or had a device, each with the number that the device had.
fn cycle_power<'a>(
    host: &Host,
    ports: &BTreeSet<&'a UsbPort>,
) -> Result<BTreeMap<&'a UsbPort, Option<dev_t>>> {
    let (mut switches, mut awaited, mut result) = (Vec::new(), BTreeMap::new(), Ok(()));
    for port in ports {
        let number = usb::number(host, port);
        if number.is_some() {
            awaited.insert(*port, number);
        }
        match usb::power_switches(host, port) {
            Ok(of_port) => switches.extend(of_port.into_iter().map(|switch| (switch, *port))),
            // What is unplugged needs none.
            Err(error) if number.is_some() => result = Err(error),
            Err(_) => {}
        }
    }
    for (switch, port) in &mut switches {
        let mut state = [0];
        if switch.read_exact(&mut state).is_ok() && state == *b"1" {
            // Left without power by a process that was ended.
            awaited.entry(*port).or_default();
        }
        result = result.and(write(switch, port, b"1"));
    }
    let end = Instant::now() + GONE_LIMIT;
    while awaited.keys().any(|port| usb::number(host, port).is_some()) && Instant::now() < end {
        std::thread::sleep(PAUSE);
    }
    if !switches.is_empty() {
        std::thread::sleep(POWER_OFF);
    }
    for (switch, port) in &mut switches {
        result = result.and(write(switch, port, b"0"));
    }
    result.map(|()| awaited)
}

fn write(switch: &mut File, port: &UsbPort, value: &[u8]) -> Result<()> {
    let written = switch.write_all(value);
    written.with_context(|| format!("cannot switch the power of USB port {port}"))
}

/// Reset what is at this port. Returns whether there was something.
fn reset_one(host: &Host, worker: WorkerId, dev: BorrowedFd<'_>, uid: Uid, port: &UsbPort) -> Result<bool> {
    let nodes = open_dir(&host.device_nodes, worker.to_string())?;
    let owner = Some(nix::unistd::Uid::from_raw(uid.get()));
    let end = Instant::now() + BACK_LIMIT;
    let appears_by = Instant::now() + APPEAR_LIMIT;
    while usb::number(host, port).is_none() && Instant::now() < appears_by {
        std::thread::sleep(PAUSE);
    }
    let mut is_there = false;
    while let Some(number) = usb::number(host, port) {
        ensure!(
            Instant::now() < end,
            "the USB device at port {port} does not stay there for a reset: unplug it"
        );
        is_there = true;
        remove_file(dev, RESET_NODE)?;
        mknodat(
            dev,
            RESET_NODE,
            SFlag::S_IFCHR,
            Mode::S_IRUSR | Mode::S_IWUSR,
            number,
        )?;
        fchownat(dev, RESET_NODE, owner, None, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        let keep = [nodes.as_raw_fd(), host.sys.as_raw_fd()];
        let is_reset = run_as_user(uid, &keep, |proof| {
            let is_same = || usb::number(host, port) == Some(number);
            usb_reset::reset(proof, nodes.as_fd(), Path::new(RESET_NODE), is_same)
        })?;
        if is_reset {
            break;
        }
        // It has become another in the meantime, or comes back as another.
        std::thread::sleep(PAUSE);
    }
    Ok(is_there)
}
