//! Devices that come and go while jobs run: the kernel tells of changes in the host's `/dev` (`inotify(7)`), and
//! every worker's own is brought up to date. What is remembered here are watches only; all else is looked up.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use protocol::config::DevicePattern;

use crate::host::Host;
use crate::host::record::read_record_of;
use crate::log::warn;
use crate::sandbox::devices;

/// More directories than any `/dev` has.
const MAX_WATCHES: usize = 1024;

#[derive(Debug)]
pub struct Hotplug(Inotify);

impl Hotplug {
    pub fn new() -> Result<Hotplug> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK);
        Ok(Hotplug(inotify.context("cannot watch /dev")?))
    }

    /// Something may have changed: in `/dev`, or in the configuration.
    pub fn refresh(&mut self, host: &Host) {
        while self.0.read_events().is_ok() {}
        if let Err(error) = self.follow(host) {
            warn!("devices that are plugged in may be missing from jobs: {error:#}");
        }
    }

    fn follow(&self, host: &Host) -> Result<()> {
        let (config, _) = host.configuration()?;
        let all: BTreeSet<DevicePattern> = config
            .slots
            .values()
            .flat_map(|slot| &slot.devices)
            .cloned()
            .collect();
        if all.is_empty() {
            return Ok(());
        }
        self.watch(host, &all)?;
        devices::refresh(host, |worker| {
            let record = read_record_of(host, worker).ok()?;
            Some((config.slots.get(&record.slot)?.clone(), record.uid))
        })
    }

    /// Watch each directory in which something of the patterns may appear. One that appears meanwhile has had its
    /// content made unseen, so it is looked for again until there is none.
    fn watch(&self, host: &Host, patterns: &BTreeSet<DevicePattern>) -> Result<()> {
        let mut watched: BTreeSet<PathBuf> = BTreeSet::new();
        loop {
            let (_, mut directories) = devices::find(host, patterns)?;
            directories.retain(|directory| !watched.contains(directory));
            if directories.is_empty() || watched.len() > MAX_WATCHES {
                return Ok(());
            }
            for directory in directories {
                self.watch_one(host, &directory)
                    .with_context(|| format!("cannot watch /dev/{}", directory.display()))?;
                watched.insert(directory);
            }
        }
    }

    /// The call takes a path only, and the host's `/dev` has none in this mount namespace: so from within.
    fn watch_one(&self, host: &Host, directory: &Path) -> Result<()> {
        let changes = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_ONLYDIR
            | AddWatchFlags::IN_DONT_FOLLOW;
        nix::unistd::fchdir(&host.dev)?;
        let added = self.0.add_watch(devices::or_dot(directory), changes);
        nix::unistd::chdir("/")?;
        match added {
            // Gone again.
            Err(nix::errno::Errno::ENOENT) => Ok(()),
            added => Ok(added.map(drop)?),
        }
    }
}

impl AsFd for Hotplug {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
