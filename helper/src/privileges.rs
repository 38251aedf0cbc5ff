//! The helper's own privileges: a few of root's capabilities, and none of the others ever again.

use std::collections::HashSet;

use anyhow::{Result, anyhow, ensure};
use caps::{CapSet, Capability};

/// What is kept, and for what.
const NEEDED: [Capability; 8] = [
    // Mounts, namespaces, and returning to the host's mount namespace to build the view again.
    Capability::CAP_SYS_ADMIN,
    // setns(2) to a mount namespace and pivot_root(2) need it beside CAP_SYS_ADMIN.
    Capability::CAP_SYS_CHROOT,
    // Becoming the job's user.
    Capability::CAP_SETUID,
    Capability::CAP_SETGID,
    // Emptying the bounding set of a job.
    Capability::CAP_SETPCAP,
    // Giving the trees to the job's user, and setting their modes afterwards.
    Capability::CAP_CHOWN,
    Capability::CAP_FOWNER,
    // The nodes of a job's /dev.
    Capability::CAP_MKNOD,
];
/// Opening a tree that its owner has closed, to remove what root has beside it.
const ALSO_NEEDED: Capability = Capability::CAP_DAC_OVERRIDE;

/// Drop the rest, from all sets, and check that they are gone.
pub fn keep_only_what_is_needed() -> Result<()> {
    let keep: HashSet<Capability> = NEEDED.into_iter().chain([ALSO_NEEDED]).collect();
    let describe = |error: caps::errors::CapsError| anyhow!("cannot drop capabilities: {error}");
    for capability in caps::read(None, CapSet::Bounding)
        .map_err(describe)?
        .difference(&keep)
    {
        caps::drop(None, CapSet::Bounding, *capability).map_err(describe)?;
    }
    let permitted = caps::read(None, CapSet::Permitted).map_err(describe)?;
    let missing: Vec<_> = keep.difference(&permitted).collect();
    ensure!(
        missing.is_empty(),
        "the helper lacks {missing:?}: start it with them"
    );
    caps::clear(None, CapSet::Ambient).map_err(describe)?;
    caps::clear(None, CapSet::Inheritable).map_err(describe)?;
    caps::set(None, CapSet::Effective, &keep).map_err(describe)?;
    caps::set(None, CapSet::Permitted, &keep).map_err(describe)?;
    for set in [CapSet::Bounding, CapSet::Permitted, CapSet::Effective] {
        let now = caps::read(None, set).map_err(describe)?;
        ensure!(
            now.is_subset(&keep),
            "capabilities are left that should not be: {:?}",
            now.difference(&keep)
        );
    }
    Ok(())
}
