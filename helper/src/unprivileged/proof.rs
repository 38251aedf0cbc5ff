//! Becoming a job's user. This module has none below it, so that nothing else can make the proof.

use anyhow::{Context, Result, ensure};
use nix::unistd::{Gid, setgroups, setresgid, setresuid};
use protocol::Uid;

use crate::sys;

/// The proof that this process has become a job's user and has no capability. It cannot be copied to a process that has
/// some: nothing gives a process a uid or a capability again.
#[derive(Debug)]
pub struct Unprivileged(());

/// Become the user, for good: no group but its own and `groups`, and with the uid go all capabilities
/// (`capabilities(7)`). Only for a process that has been forked for this.
pub fn become_user(uid: Uid, groups: &[Gid]) -> Result<Unprivileged> {
    let (user, group) = (nix::unistd::Uid::from_raw(uid.get()), Gid::from_raw(uid.get()));
    setgroups(groups).context("cannot set the groups")?;
    setresgid(group, group, group).context("cannot set the gid")?;
    setresuid(user, user, user).context("cannot set the uid")?;
    // With the permitted set the ambient one is empty, too (capabilities(7)).
    for set in [
        caps::CapSet::Effective,
        caps::CapSet::Permitted,
        caps::CapSet::Inheritable,
    ] {
        let left = caps::read(None, set).map_err(|e| anyhow::anyhow!("cannot read the capabilities: {e}"))?;
        ensure!(
            left.is_empty(),
            "capabilities are left after becoming uid {uid}: {left:?}"
        );
    }
    sys::set_no_new_privs_and_undumpable().context("cannot set no_new_privs")?;
    Ok(Unprivileged(()))
}
