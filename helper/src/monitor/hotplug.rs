//! Devices that come and go while jobs run: the kernel tells of changes in the host's `/dev` (`inotify(7)`), and
//! children of the monitor bring every worker's own up to date. They have a time limit, and the one that asks what a new USB device
//! is, for which the kernel may take its time, is another than the one that takes from jobs what has gone. What is remembered
//! here are watches, and the last configuration without a mistake; all else is looked up.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, Inotify};
use nix::sys::signal::SigSet;
use nix::unistd::{Pid, alarm};
use protocol::config::{Config, Slot};

use super::rootfs;
use crate::host::Host;
use crate::log::warn;
use crate::sandbox::devices::{self, Refresh, Wanted};
use crate::sys;

/// More directories than any `/dev` has.
const MAX_WATCHES: usize = 1024;
/// How long one child may take, in seconds.
const LIMIT: u32 = 10;
/// After one that failed, the next begins.
const RETRY: Duration = Duration::from_secs(5);

/// The watches, and the children that are at work.
pub struct Hotplug {
    inotify: Inotify,
    tasks: [Task; 2],
    retry_at: Option<Instant>,
    /// Without a mistake: what has gone is taken from jobs in any case.
    config: Option<Rc<Config>>,
    /// A slot has, or had, devices.
    has_devices: bool,
}

/// One kind of child, of which there is one at a time.
struct Task {
    what: Refresh,
    child: Option<Pid>,
    /// Something has changed since that child began.
    is_stale: bool,
}

impl Hotplug {
    pub fn new() -> nix::Result<Hotplug> {
        Ok(Hotplug {
            inotify: rootfs::new_inotify()?,
            tasks: [Refresh::Nodes, Refresh::NewUsb].map(|what| Task {
                what,
                child: None,
                is_stale: false,
            }),
            retry_at: None,
            config: None,
            has_devices: false,
        })
    }

    /// Readable when something has changed in `/dev`.
    pub fn events(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }

    /// When [`Hotplug::tick`] has something to do.
    pub fn due(&self) -> Option<Instant> {
        self.retry_at
    }

    /// Time has passed.
    pub fn tick(&mut self, host: &Host) {
        if self.retry_at.take_if(|at| *at <= Instant::now()).is_some() {
            self.refresh(host);
        }
    }

    /// Something may have changed: in `/dev`, or in the configuration.
    pub fn refresh(&mut self, host: &Host) {
        while self.inotify.read_events().is_ok() {}
        match host.configuration() {
            Ok((config, _)) => {
                self.has_devices |= config.slots.values().any(Slot::has_devices);
                self.config = Some(config);
            }
            Err(error) => warn_of(&error),
        }
        for task in 0..self.tasks.len() {
            self.start(host, task);
        }
    }

    /// Start a child of this kind, or have the one that is at work followed by another.
    fn start(&mut self, host: &Host, task: usize) {
        let Some(config) = self.config.clone().filter(|_| self.has_devices) else {
            return;
        };
        let what = self.tasks[task].what;
        let finds_usb = |slot: &Slot| slot.usb.values().any(|entry| !entry.required);
        if what == Refresh::NewUsb && !config.slots.values().any(finds_usb) {
            return;
        }
        self.tasks[task].is_stale = self.tasks[task].child.is_some();
        if self.tasks[task].is_stale {
            return;
        }
        let child = sys::fork(|| {
            let keep = [&host.descriptors()[..], &[self.inotify.as_fd().as_raw_fd()]].concat();
            let done = sys::close_all_but(&keep)
                .map_err(anyhow::Error::from)
                .and_then(|()| follow(&self.inotify, host, &config, what));
            match done {
                Ok(()) => 0,
                Err(error) => {
                    warn_of(&error);
                    1
                }
            }
        });
        match child {
            Ok(child) => self.tasks[task].child = Some(child),
            Err(error) => {
                warn_of(&error.into());
                self.retry_at = Some(Instant::now() + RETRY);
            }
        }
    }

    /// A child of the monitor has ended.
    pub fn handle_exit(&mut self, ended: Pid, status: ExitStatus, host: &Host) {
        use std::os::unix::process::ExitStatusExt;
        let Some(task) = self.tasks.iter().position(|task| task.child == Some(ended)) else {
            return;
        };
        self.tasks[task].child = None;
        if status.signal().is_some() {
            warn_of(&anyhow::anyhow!(
                "the process that looks for them has ended ({status}); it has {LIMIT} s"
            ));
        }
        if self.tasks[task].is_stale {
            self.start(host, task);
        } else if !status.success() {
            self.retry_at = Some(Instant::now() + RETRY);
        }
    }
}

fn warn_of(error: &anyhow::Error) {
    warn!("devices that are plugged in may be missing from jobs: {error:#}");
}

/// In the child.
fn follow(inotify: &Inotify, host: &Host, config: &Config, what: Refresh) -> Result<()> {
    SigSet::all().thread_unblock()?;
    // Nobody catches the signal: like SIGKILL it ends what waits for a device.
    alarm::set(LIMIT);
    // What cannot be watched does not keep what has gone in a job.
    let watched = match what {
        Refresh::Nodes => watch(inotify, host, &Wanted::of_all(config.slots.values())),
        // A USB device is another worker's to have once the one that has it is deleted.
        Refresh::NewUsb => add_watch(inotify, &host.devices, Path::new(""), AddWatchFlags::IN_DELETE),
    };
    devices::refresh(host, config, what).and(watched)
}

/// Watch each directory in which something that is wanted may appear. One that appears meanwhile has had its
/// content made unseen, so it is looked for again until there is none.
fn watch(inotify: &Inotify, host: &Host, wanted: &Wanted) -> Result<()> {
    let changes = AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_MOVED_TO;
    let mut watched: BTreeSet<PathBuf> = BTreeSet::new();
    loop {
        let (_, mut directories) = devices::find(host, wanted)?;
        directories.retain(|directory| !watched.contains(directory));
        if directories.is_empty() || watched.len() > MAX_WATCHES {
            return Ok(());
        }
        for directory in directories {
            add_watch(inotify, &host.dev, &directory, changes)
                .with_context(|| format!("cannot watch /dev/{}", directory.display()))?;
            watched.insert(directory);
        }
    }
}

/// The call takes a path only, and the host's directories have none in this mount namespace: so from within.
fn add_watch(inotify: &Inotify, at: &OwnedFd, directory: &Path, changes: AddWatchFlags) -> Result<()> {
    nix::unistd::fchdir(at)?;
    let flags = changes | AddWatchFlags::IN_ONLYDIR | AddWatchFlags::IN_DONT_FOLLOW;
    match inotify.add_watch(devices::or_dot(directory), flags) {
        // Gone again, or replaced.
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(()),
        added => Ok(added.map(drop)?),
    }
}
