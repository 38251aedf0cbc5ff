//! A job's `/dev`: a directory of root's on the host, below `/run`, that the job sees read-only. Its nodes are
//! its own, made like the host's but owned by the job's user, so the host's keep their owner and mode; and the
//! helper can add and remove some while the job runs, when devices come and go.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, readlinkat};
use nix::sys::stat::{Mode, SFlag, dev_t, fchmod, fstat, makedev, mknodat};
use nix::unistd::{fchownat, symlinkat};
use protocol::config::{Config, DevicePattern, Slot};
use protocol::{Uid, WorkerId};

use crate::host::Host;
use crate::host::directory::{kind, make_dir, names, open_dir, remove_dir, remove_file, stat};
use crate::host::record::read_record_of;
use crate::host::usb::NodeNumber;
use crate::monitor_ipc::Failure;
use crate::sandbox::usb;

/// What every program may count on. Numbers: the kernel's admin-guide/devices.rst.
const NODES: [(&str, u64, u64); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];
const LINKS: [(&str, &str); 5] = [
    ("ptmx", "pts/ptmx"),
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];
/// Where the job's own instances are mounted.
pub const MOUNT_POINTS: [&str; 3] = ["pts", "shm", "mqueue"];

/// More than any slot has: a pattern that means more is a mistake.
const MAX_NODES: usize = 4096;
/// So often a job's `/dev` is made to agree with the host's before it starts.
const ROUNDS: usize = 8;
/// Deeper than anything in `/dev`.
const MAX_DEPTH: usize = 8;

/// Device nodes by their path below `/dev`.
type Nodes = BTreeMap<PathBuf, (SFlag, dev_t)>;

/// What is looked for in the host's `/dev`.
#[derive(Default)]
pub struct Wanted {
    patterns: BTreeSet<DevicePattern>,
    /// Nodes of USB devices, with the names that they have besides the host's.
    usb: BTreeMap<NodeNumber, Vec<PathBuf>>,
    /// In whichever directory. A node of a USB device may be in any.
    everywhere: bool,
    /// What is to stay where the host has the same.
    present: Nodes,
}

impl Wanted {
    /// All that these slots' jobs may ever have.
    pub fn of_all<'a>(slots: impl Iterator<Item = &'a Slot> + Clone) -> Wanted {
        Wanted {
            patterns: slots.clone().flat_map(|slot| &slot.devices).cloned().collect(),
            everywhere: slots.clone().any(|slot| !slot.usb.is_empty()),
            ..Wanted::default()
        }
    }

    /// What the job whose `/dev` this is has now. What it has of a slot that has left the configuration stays, as long as the
    /// host has it; unless the job has USB devices, whose numbers are soon another's.
    fn of_job(host: &Host, dev: BorrowedFd<'_>, slot: Option<&Slot>) -> Result<Wanted> {
        let mut wanted = Wanted::of_all(slot.into_iter());
        wanted.usb = usb::nodes(host, dev)?;
        wanted.everywhere |= !wanted.usb.is_empty();
        if slot.is_none() && wanted.usb.is_empty() && !usb::is_known(dev) {
            collect(dev, Path::new(""), &mut wanted.present)?;
        }
        Ok(wanted)
    }

    pub fn is_empty(&self) -> bool {
        self.patterns.is_empty() && !self.everywhere
    }
}

/// System calls take no empty path.
pub fn or_dot(path: &Path) -> &Path {
    match path.as_os_str().is_empty() {
        true => Path::new("."),
        false => path,
    }
}

/// What is wanted of what the host has at this moment: nodes, and the directories in which more may appear.
pub fn find(host: &Host, wanted: &Wanted) -> Result<(Nodes, Vec<PathBuf>)> {
    let mut nodes = wanted.present.clone();
    nodes.retain(|path, node| stat(&host.dev, path).is_ok_and(|stat| (kind(&stat), stat.st_rdev) == *node));
    let mut directories = Vec::new();
    if wanted.is_empty() {
        return Ok((nodes, directories));
    }
    // What is mounted below /dev (shm, pts) has no devices of the host.
    let device_of_dev = fstat(&host.dev)?.st_dev;
    let mut waiting = vec![PathBuf::new()];
    while let Some(directory) = waiting.pop() {
        let dir = match open_dir(&host.dev, or_dot(&directory)) {
            // Unplugged before it was opened.
            Err(Errno::ENOENT) => continue,
            dir => dir?,
        };
        for name in names(dir.as_fd())? {
            let path = directory.join(&name);
            let Ok(stat) = stat(&dir, Path::new(&name)) else {
                continue;
            };
            let meant = wanted.patterns.iter().any(|pattern| pattern.matches(&path));
            match kind(&stat) {
                node @ (SFlag::S_IFCHR | SFlag::S_IFBLK) => {
                    let names = wanted.usb.get(&(node.bits(), stat.st_rdev));
                    for name in names.into_iter().flatten() {
                        nodes.insert(name.clone(), (node, stat.st_rdev));
                    }
                    if meant || names.is_some() {
                        nodes.insert(path, (node, stat.st_rdev));
                    }
                }
                SFlag::S_IFLNK if meant || wanted.everywhere => {
                    // A name that udev gives: the node goes by that name too.
                    if let Some((target, node)) = follow(host, &dir, Path::new(&name), &directory)
                        && (meant || wanted.usb.contains_key(&(node.0.bits(), node.1)))
                    {
                        nodes.insert(target, node);
                        nodes.insert(path, node);
                    }
                }
                SFlag::S_IFDIR
                    if stat.st_dev == device_of_dev
                        && path.iter().count() < MAX_DEPTH
                        && (wanted.everywhere
                            || wanted.patterns.iter().any(|pattern| pattern.leads_through(&path))) =>
                {
                    waiting.push(path);
                }
                _ => {}
            }
            if nodes.len() > MAX_NODES {
                bail!("the slot's devices are more than {MAX_NODES}: name fewer");
            }
        }
        directories.push(directory);
    }
    Ok((nodes, directories))
}

/// The device that a link in `/dev` leads to, if it is one below `/dev`.
fn follow(host: &Host, dir: &OwnedFd, name: &Path, directory: &Path) -> Option<(PathBuf, (SFlag, dev_t))> {
    let target = PathBuf::from(readlinkat(dir, name).ok()?);
    let mut path = directory.to_owned();
    for part in target.strip_prefix("/dev").unwrap_or(&target).components() {
        match part {
            Component::Normal(part) => path.push(part),
            Component::ParentDir => drop(path.pop()),
            _ => return None,
        }
    }
    // Below /dev itself: `stat` does not follow another link.
    let stat = stat(&host.dev, &path).ok()?;
    match kind(&stat) {
        node @ (SFlag::S_IFCHR | SFlag::S_IFBLK) => Some((path, (node, stat.st_rdev))),
        _ => None,
    }
}

/// Has the slot a disk of its own, or may it get one? Then what is written to it outlives the job. A board may turn into a
/// disk, to which its program is copied.
pub fn has_block_device(host: &Host, slot: &Slot) -> Result<bool> {
    if !slot.usb.is_empty() {
        return Ok(true);
    }
    let (nodes, _) = find(host, &Wanted::of_all(std::iter::once(slot)))?;
    Ok(nodes.values().any(|(node, _)| *node == SFlag::S_IFBLK))
}

/// Make a worker's `/dev`. A device that the slot names without a pattern must be there.
pub fn make(host: &Host, worker: WorkerId, uid: Uid, slot: &Slot) -> Result<(), Failure> {
    let name = worker.to_string();
    // Left by a first attempt that was cut off.
    remove(host, worker)?;
    make_dir(&host.devices, &name, 0o755).context("cannot make the job's /dev")?;
    let dev = open_dir(&host.devices, &name)?;
    // The umask does not count here.
    fchmod(&dev, Mode::from_bits_truncate(0o755))?;
    for name in MOUNT_POINTS {
        make_dir(&dev, name, 0o755)?;
    }
    for (name, major, minor) in NODES {
        let everybody = Mode::from_bits_truncate(0o666);
        mknodat(&dev, name, SFlag::S_IFCHR, everybody, makedev(major, minor))
            .with_context(|| format!("cannot make the job's /dev/{name}"))?;
    }
    for (link, target) in LINKS {
        symlinkat(target, &dev, link)?;
    }
    if !slot.has_devices() {
        return Ok(());
    }
    check_named(host, slot)?;
    usb::find(host, worker, dev.as_fd(), slot, true)?;
    Ok(settle(host, dev.as_fd(), uid, Some(slot))?)
}

/// Have a job's `/dev` agree with the host's. A device that goes between the listing and the making of its node would stay: whoever
/// else works here, the monitor's children or a first process, may have been here before. Where devices come and go without
/// end, the monitor is told again. What cannot be told, the job does not have.
fn settle(host: &Host, dev: BorrowedFd<'_>, uid: Uid, slot: Option<&Slot>) -> Result<()> {
    let now = || Ok::<_, anyhow::Error>(find(host, &Wanted::of_job(host, dev, slot)?)?.0);
    for _ in 0..ROUNDS {
        let wanted = now();
        bring_up_to_date(dev, uid, wanted.as_ref().unwrap_or(&Nodes::new()))?;
        if now()? == wanted? {
            break;
        }
    }
    Ok(())
}

/// Is there all that the slot names without a pattern?
fn check_named(host: &Host, slot: &Slot) -> Result<()> {
    for pattern in slot.devices.iter().filter(|pattern| pattern.is_plain()) {
        let stat = stat(&host.dev, pattern.below_dev()).with_context(|| {
            format!("device {pattern} is not there: plug it in, or remove it from devices")
        })?;
        let good = [SFlag::S_IFCHR, SFlag::S_IFBLK, SFlag::S_IFDIR, SFlag::S_IFLNK];
        ensure!(
            good.contains(&kind(&stat)),
            "{pattern} is no device node: name one in devices"
        );
    }
    Ok(())
}

/// Is it the job's in any case?
fn is_common(path: &Path) -> bool {
    let first = path.iter().next().unwrap_or_default().as_bytes();
    let mut all = NODES
        .iter()
        .map(|n| n.0)
        .chain(LINKS.iter().map(|l| l.0))
        .chain(MOUNT_POINTS);
    all.any(|name| name.as_bytes() == first)
}

/// Give the job what is wanted and not there, and take what is there and not wanted.
fn bring_up_to_date(dev: BorrowedFd<'_>, uid: Uid, wanted: &Nodes) -> Result<()> {
    let mut present = Nodes::new();
    collect(dev, Path::new(""), &mut present)?;
    for (path, node) in &present {
        if wanted.get(path) != Some(node) {
            remove_file(dev, path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    let owner = Some(nix::unistd::Uid::from_raw(uid.get()));
    let group = Some(nix::unistd::Gid::from_raw(uid.get()));
    for (path, node) in wanted
        .iter()
        .filter(|(path, node)| present.get(*path) != Some(node))
    {
        if is_common(path) {
            continue;
        }
        let describe = || format!("cannot make the job's /dev/{}", path.display());
        let above: Vec<&Path> = path
            .ancestors()
            .skip(1)
            .filter(|p| !p.as_os_str().is_empty())
            .collect();
        for directory in above.into_iter().rev() {
            make_dir(dev, directory, 0o755).with_context(describe)?;
        }
        match mknodat(dev, path.as_path(), node.0, Mode::S_IRUSR | Mode::S_IWUSR, node.1) {
            Err(Errno::EEXIST) => {}
            result => result.with_context(describe)?,
        }
        match fchownat(dev, path.as_path(), owner, group, AtFlags::AT_SYMLINK_NOFOLLOW) {
            // It has gone, and whoever else works here (the monitor, or a job's first process) has seen it before us.
            Err(Errno::ENOENT) => {}
            result => result.with_context(describe)?,
        }
    }
    Ok(())
}

/// The nodes that are the slot's, from a directory that only root ever wrote.
fn collect(dev: BorrowedFd<'_>, below: &Path, found: &mut Nodes) -> Result<()> {
    let dir = open_dir(dev, or_dot(below))?;
    for name in names(dir.as_fd())? {
        let path = below.join(&name);
        let Ok(stat) = stat(&dir, Path::new(&name)) else {
            continue;
        };
        match kind(&stat) {
            _ if is_common(&path) || path == Path::new(usb::RESET_NODE) => {}
            // To a USB device's place in sysfs.
            SFlag::S_IFLNK => {}
            SFlag::S_IFDIR => collect(dev, &path, found)?,
            node => drop(found.insert(path, (node, stat.st_rdev))),
        }
    }
    Ok(())
}

/// What a child of the monitor does for every worker when a device has come or gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refresh {
    /// Bring its `/dev` up to date. No device is asked what it is.
    Nodes,
    /// Find devices that need not be there when a job starts. The kernel may take its time to say what a device is.
    NewUsb,
}

/// One worker that fails does not stop the others.
pub fn refresh(host: &Host, config: &Config, what: Refresh) -> Result<()> {
    let mut result = Ok(());
    for name in names(host.devices.as_fd())? {
        let Some(worker) = name.to_str().and_then(|name| name.parse::<WorkerId>().ok()) else {
            continue;
        };
        let Ok(record) = read_record_of(host, worker) else {
            continue;
        };
        let slot = config.slots.get(&record.slot);
        let one = || -> Result<(), Failure> {
            let dev = open_dir(&host.devices, &name)?;
            let is_due = match (what, slot) {
                (Refresh::Nodes, _) => true,
                (Refresh::NewUsb, Some(slot)) => usb::find(host, worker, dev.as_fd(), slot, false)?,
                (Refresh::NewUsb, None) => false,
            };
            match is_due {
                true => Ok(settle(host, dev.as_fd(), record.uid, slot)?),
                false => Ok(()),
            }
        };
        // One that is being deleted has no /dev any more.
        if let Err(failure) = one()
            && open_dir(&host.devices, &name).is_ok()
        {
            let error = anyhow::Error::from(protocol::Error::from(failure));
            result = Err(error.context(format!("the devices of worker {worker} are not up to date")));
        }
    }
    result
}

/// Remove a worker's `/dev`, if there is one. Where a device comes or goes at this moment, the monitor puts nodes
/// back while they are removed: then again.
pub fn remove(host: &Host, worker: WorkerId) -> Result<()> {
    let name = worker.to_string();
    let end = Instant::now() + Duration::from_secs(60);
    let removed = loop {
        let content = match open_dir(&host.devices, &name) {
            Err(Errno::ENOENT) => return Ok(()),
            dir => dir.and_then(|dir| remove_content(dir.as_fd())),
        };
        match content.and_then(|()| remove_dir(&host.devices, &name)) {
            Err(Errno::ENOTEMPTY) if Instant::now() < end => {}
            removed => break removed,
        }
    };
    removed.context("cannot remove the job's /dev")
}

fn remove_content(dir: BorrowedFd<'_>) -> nix::Result<()> {
    for name in names(dir)? {
        let path = Path::new(&name);
        match stat(dir, path) {
            Err(Errno::ENOENT) => {}
            Err(errno) => return Err(errno),
            Ok(stat) if kind(&stat) == SFlag::S_IFDIR => {
                remove_content(open_dir(dir, path)?.as_fd())?;
                remove_dir(dir, path)?;
            }
            Ok(_) => remove_file(dir, path)?,
        }
    }
    Ok(())
}
