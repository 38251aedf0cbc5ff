//! The helper's own privileges: a few of root's capabilities and system calls, and none of the others ever again.

pub mod seccomp;

use std::collections::HashSet;

use anyhow::{Context, Result, anyhow, ensure};
use caps::{CapSet, Capability};

use crate::sys;

/// What the listener and its sessions keep, and for what. Sessions alone read what the supervisor sends.
const SESSION: [Capability; 5] = [
    // Becoming the job's user, to delete its trees and to end and count its processes.
    Capability::CAP_SETUID,
    Capability::CAP_SETGID,
    // Giving the trees to the job's user, and setting their modes afterwards.
    Capability::CAP_CHOWN,
    Capability::CAP_FOWNER,
    // Opening a tree that its owner has closed, to remove what root has beside it.
    Capability::CAP_DAC_OVERRIDE,
];

/// What the monitor keeps beside these: for itself, and until they are a job's user, for workers' first processes.
const MONITOR: [Capability; 6] = [
    // Mounts, namespaces, quotas, and returning to the host's mount namespace to build the root file system of jobs again.
    Capability::CAP_SYS_ADMIN,
    // setns(2) to a mount namespace and pivot_root(2) need it beside CAP_SYS_ADMIN.
    Capability::CAP_SYS_CHROOT,
    // Emptying the bounding set of a job, and of the listener.
    Capability::CAP_SETPCAP,
    // The nodes of a job's /dev.
    Capability::CAP_MKNOD,
    // The loopback of a network namespace of the job's own, and a port below 1024 in it.
    Capability::CAP_NET_ADMIN,
    Capability::CAP_NET_BIND_SERVICE,
];

/// For the monitor: what it and its children need.
pub fn keep_for_monitor() -> Result<()> {
    let keep: HashSet<_> = SESSION.into_iter().chain(MONITOR).collect();
    for capability in caps::read(None, CapSet::Bounding)
        .map_err(describe)?
        .difference(&keep)
    {
        caps::drop(None, CapSet::Bounding, *capability).map_err(describe)?;
    }
    caps::clear(None, CapSet::Ambient).map_err(describe)?;
    caps::clear(None, CapSet::Inheritable).map_err(describe)?;
    keep_only(&keep)?;
    let now = caps::read(None, CapSet::Bounding).map_err(describe)?;
    ensure!(
        now == keep,
        "the bounding set is {now:?}, and should be {keep:?}: start the helper with all of root's capabilities"
    );
    sys::no_new_privs_and_undumpable().context("cannot set no_new_privs")?;
    sys::filter_system_calls(&seccomp::monitor()).context("cannot filter system calls")
}

/// For the listener, and by inheritance for its sessions: what is left takes no mounts, no namespaces, no devices and
/// no network.
pub fn keep_for_session() -> Result<()> {
    // The monitor has dropped the others.
    for capability in MONITOR {
        caps::drop(None, CapSet::Bounding, capability).map_err(describe)?;
    }
    keep_only(&SESSION.into())?;
    sys::filter_system_calls(&seccomp::session()).context("cannot filter system calls")
}

/// For a timer, which has its files open: nothing.
pub fn keep_for_timer() -> Result<()> {
    keep_only(&HashSet::new())
}

/// Drop the rest, and check that they are gone.
fn keep_only(keep: &HashSet<Capability>) -> Result<()> {
    let permitted = caps::read(None, CapSet::Permitted).map_err(describe)?;
    let missing: Vec<_> = keep.difference(&permitted).collect();
    ensure!(
        missing.is_empty(),
        "the helper lacks {missing:?}: start it with them"
    );
    for set in [CapSet::Effective, CapSet::Permitted] {
        caps::set(None, set, keep).map_err(describe)?;
    }
    for set in [CapSet::Effective, CapSet::Permitted] {
        let now = caps::read(None, set).map_err(describe)?;
        ensure!(now == *keep, "capabilities are left that should not be: {now:?}");
    }
    Ok(())
}

fn describe(error: caps::errors::CapsError) -> anyhow::Error {
    anyhow!("cannot drop capabilities: {error}")
}
