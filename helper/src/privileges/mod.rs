//! What each kind of process keeps of root's privileges: one table, from which the dropping and `docs/review.md` come.

pub mod seccomp;

use std::collections::HashSet;

use anyhow::{Context, Result, anyhow, bail, ensure};
use caps::{CapSet, Capability};

use crate::sys;

/// The kinds of processes, from the most privileged on. No process ever becomes a more privileged one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ProcessKind {
    /// The monitor; and what it forks until that is of another kind: builders, listeners, workers' first processes.
    Monitor,
    /// The listener, and its sessions. Sessions alone read what the supervisor sends.
    Session,
    /// What a session forks and gives nothing: timers, and the processes that become a job's user to delete and to kill.
    Child,
    /// Pid 1 of a worker, and all that it starts. It becomes this by the steps of [`sandbox`](crate::sandbox).
    Job,
}

/// A filter of system calls: a program of [`seccomp`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// Refuses what no process of the helper needs, and other entry points.
    Monitor,
    /// Refuses all but the listed calls.
    Session,
    /// Refuses what a job must not do; it depends on the slot.
    Job,
}

/// Every capability that any process has: the least privileged kind that keeps it, and what it is needed for.
#[rustfmt::skip]
pub const CAPABILITIES: [(Capability, ProcessKind, &str); 11] = [
    (Capability::CAP_SETUID, ProcessKind::Session, "becoming the job's user"),
    (Capability::CAP_SETGID, ProcessKind::Session, "its group, and the slot's"),
    (Capability::CAP_CHOWN, ProcessKind::Session, "giving writable directories and device nodes to the job's user"),
    (Capability::CAP_FOWNER, ProcessKind::Session, "setting the mode of a directory that has been given away, when a start is repeated"),
    (Capability::CAP_DAC_OVERRIDE, ProcessKind::Session, "removing what root has in a directory whose owner has closed it"),
    (Capability::CAP_SYS_ADMIN, ProcessKind::Monitor, "mounts, namespaces, quotas; in a builder, entering the host's mounts"),
    (Capability::CAP_SYS_CHROOT, ProcessKind::Monitor, "`setns(2)` to a mount namespace, and `pivot_root(2)`"),
    (Capability::CAP_SETPCAP, ProcessKind::Monitor, "emptying the bounding set of the listener and of jobs"),
    (Capability::CAP_MKNOD, ProcessKind::Monitor, "the nodes of a job's `/dev`"),
    (Capability::CAP_NET_ADMIN, ProcessKind::Monitor, "bringing up `lo` in a job's own network namespace, and giving it addresses"),
    (Capability::CAP_NET_BIND_SERVICE, ProcessKind::Monitor, "the server's port, 80 or 443, in it"),
];

impl ProcessKind {
    /// All kinds, the most privileged first.
    pub const ALL: [ProcessKind; 4] = [Self::Monitor, Self::Session, Self::Child, Self::Job];

    /// The capabilities in the permitted and effective sets of such a process; its other sets are empty.
    pub fn capabilities(self) -> HashSet<Capability> {
        let kept = CAPABILITIES.iter().filter(|(_, last, _)| self <= *last);
        kept.map(|(capability, ..)| *capability).collect()
    }

    /// The filter that such a process installs, and the kind that has forked it, whose filters still apply.
    const fn filter_and_parent(self) -> (Option<Filter>, Option<ProcessKind>) {
        match self {
            ProcessKind::Monitor => (Some(Filter::Monitor), None),
            ProcessKind::Session => (Some(Filter::Session), Some(ProcessKind::Monitor)),
            ProcessKind::Child => (None, Some(ProcessKind::Session)),
            ProcessKind::Job => (Some(Filter::Job), Some(ProcessKind::Monitor)),
        }
    }

    /// The filters that apply to such a process, in the order in which they were installed.
    pub fn filters(self) -> Vec<Filter> {
        let (own, parent) = self.filter_and_parent();
        let inherited = parent.map_or_else(Vec::new, ProcessKind::filters);
        inherited.into_iter().chain(own).collect()
    }

    /// Give up all that this kind does not keep, for good, and check that it is gone.
    pub fn drop_others(self) -> Result<()> {
        let keep = self.capabilities();
        let permitted = caps::read(None, CapSet::Permitted).map_err(describe)?;
        let missing: Vec<_> = keep.difference(&permitted).collect();
        ensure!(
            missing.is_empty(),
            "the helper lacks {missing:?}: start it with them"
        );
        // Who has not this one has the bounding set of who has forked it, and no means to use it.
        if permitted.contains(&Capability::CAP_SETPCAP) {
            self.limit_bounding_set()?;
        }
        caps::clear(None, CapSet::Ambient).map_err(describe)?;
        for (set, keep) in [
            (CapSet::Effective, &keep),
            (CapSet::Permitted, &keep),
            (CapSet::Inheritable, &HashSet::new()),
        ] {
            caps::set(None, set, keep).map_err(describe)?;
            let now = caps::read(None, set).map_err(describe)?;
            ensure!(now == *keep, "capabilities are left that should not be: {now:?}");
        }
        sys::set_no_new_privs_and_undumpable().context("cannot set no_new_privs")?;
        let filter = match self.filter_and_parent().0 {
            Some(Filter::Monitor) => seccomp::monitor(),
            Some(Filter::Session) => seccomp::session(),
            // That of a job depends on its slot, and is the last step of the sandbox.
            Some(Filter::Job) | None => return Ok(()),
        };
        sys::filter_system_calls(&filter).context("cannot filter system calls")
    }

    /// Remove the capabilities that this kind does not keep from the bounding set: nothing can add them afterwards.
    pub fn limit_bounding_set(self) -> Result<()> {
        for capability in caps::all().difference(&self.capabilities()) {
            // EINVAL: newer than this kernel.
            if let Err(error) = caps::drop(None, CapSet::Bounding, *capability)
                && caps::has_cap(None, CapSet::Bounding, *capability).unwrap_or(false)
            {
                bail!("cannot drop {capability}: {error}");
            }
        }
        Ok(())
    }
}

fn describe(error: caps::errors::CapsError) -> anyhow::Error {
    anyhow!("cannot drop capabilities: {error}")
}
