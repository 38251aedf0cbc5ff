//! Devices that come and go while jobs run: the kernel tells of changes in the host's `/dev` (`inotify(7)`), and
//! every worker's own is brought up to date. What is remembered here are watches only; all else is looked up.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::sys::inotify::{AddWatchFlags, Inotify};
use protocol::config::DevicePattern;

use crate::host::Host;
use crate::log::warn;
use crate::sandbox::devices;

/// More directories than any `/dev` has.
const MAX_WATCHES: usize = 1024;

/// Something may have changed: in `/dev`, or in the configuration.
pub fn refresh(inotify: &Inotify, host: &Host) {
    while inotify.read_events().is_ok() {}
    if let Err(error) = follow(inotify, host) {
        warn!("devices that are plugged in may be missing from jobs: {error:#}");
    }
}

fn follow(inotify: &Inotify, host: &Host) -> Result<()> {
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
    watch(inotify, host, &all)?;
    devices::refresh(host, &config)
}

/// Watch each directory in which something of the patterns may appear. One that appears meanwhile has had its
/// content made unseen, so it is looked for again until there is none.
fn watch(inotify: &Inotify, host: &Host, patterns: &BTreeSet<DevicePattern>) -> Result<()> {
    let mut watched: BTreeSet<PathBuf> = BTreeSet::new();
    loop {
        let (_, mut directories) = devices::find(host, patterns)?;
        directories.retain(|directory| !watched.contains(directory));
        if directories.is_empty() || watched.len() > MAX_WATCHES {
            return Ok(());
        }
        for directory in directories {
            watch_one(inotify, host, &directory)
                .with_context(|| format!("cannot watch /dev/{}", directory.display()))?;
            watched.insert(directory);
        }
    }
}

/// The call takes a path only, and the host's `/dev` has none in this mount namespace: so from within.
fn watch_one(inotify: &Inotify, host: &Host, directory: &Path) -> Result<()> {
    let changes = AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_ONLYDIR
        | AddWatchFlags::IN_DONT_FOLLOW;
    nix::unistd::fchdir(&host.dev)?;
    let added = inotify.add_watch(devices::or_dot(directory), changes);
    nix::unistd::chdir("/")?;
    match added {
        // Gone again.
        Err(nix::errno::Errno::ENOENT) => Ok(()),
        added => Ok(added.map(drop)?),
    }
}
