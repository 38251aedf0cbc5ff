//! Quotas of workers' users on the file system of the state directory (`quotactl(2)`).

use std::os::fd::AsFd;

use anyhow::{Context, Result};
use nix::unistd::{ROOT, seteuid};
use protocol::Uid;

use crate::host::Host;
use crate::sys;

/// What the worker's user may have on disk, where the host counts it: also nothing more than what is said
/// here of an earlier worker with the same uid.
pub fn set(host: &Host, uid: Uid, disk: Option<u64>, inodes: Option<u64>) -> Result<()> {
    if host.abilities.has_user_quotas {
        let kib = disk.unwrap_or(0).div_ceil(1024);
        sys::set_user_quota(host.workers.as_fd(), uid.get(), kib, inodes.unwrap_or(0))
            .with_context(|| format!("cannot set the disk quota of uid {uid}"))?;
    }
    Ok(())
}

/// How many bytes on disk are the user's, where the host counts them. A process that is root in name alone may
/// ask that as the user itself (`quotactl(2)`): no process of a job can touch it for its effective uid, which
/// is all that changes.
pub fn used(host: &Host, uid: Uid) -> Result<Option<u64>> {
    if !host.abilities.has_user_quotas {
        return Ok(None);
    }
    seteuid(uid.get().into())?;
    let used = sys::bytes_of_user(host.workers.as_fd(), uid.get());
    seteuid(ROOT).context("cannot become root again")?;
    Ok(match used {
        // XFS keeps nothing of a user who has nothing.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Some(0),
        used => used.ok(),
    })
}
