//! What a factory's worker can have left in its own places: the part of a [`HostSnapshot`](crate::host_snapshot::HostSnapshot) that
//! is cheap enough to be taken thousands of times, and more of the helper's own.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use protocol::config::{RUN_DIR, STATE_DIR};

use crate::harness::TestHost;
use crate::host_snapshot::{ipc_of, processes_of};

/// What there is below the test's root and in the kernel, but for what the helper keeps without any worker.
#[derive(Debug, PartialEq, Eq)]
pub struct WorkerSnapshot {
    /// Every path below these directories, each with its owner.
    paths: BTreeSet<(PathBuf, u32)>,
    cgroups: BTreeSet<PathBuf>,
    processes: BTreeSet<String>,
    ipc: BTreeSet<String>,
    mounts: BTreeSet<String>,
}

impl WorkerSnapshot {
    /// Of all workers of this host.
    pub fn take(host: &TestHost) -> WorkerSnapshot {
        let mut paths = BTreeSet::new();
        for place in [
            &*format!("{STATE_DIR}/workers"),
            &*format!("{RUN_DIR}/devices"),
            "run/userdb",
        ] {
            let place = host.root.join(place.trim_start_matches('/'));
            all_below(&place, &mut paths);
        }
        paths.retain(|(path, _)| !path.ends_with("workers/.lock"));
        let root = host.root.to_string_lossy();
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
        let cgroups = fs::read_dir(host.cgroup_dir().join("workers"))
            .into_iter()
            .flatten()
            .flatten();
        WorkerSnapshot {
            paths,
            cgroups: cgroups
                .map(|entry| entry.path())
                .filter(|path| path.is_dir())
                .collect(),
            processes: processes_of(&host.uids),
            ipc: ipc_of(&host.uids),
            mounts: mountinfo
                .lines()
                .filter(|line| line.contains("bmat-") || line.contains(&*root))
                .map(str::to_owned)
                .collect(),
        }
    }
}

fn all_below(dir: &Path, found: &mut BTreeSet<(PathBuf, u32)>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(meta) = entry.path().symlink_metadata() else {
            continue;
        };
        found.insert((entry.path(), meta.uid()));
        if meta.is_dir() {
            all_below(&entry.path(), found);
        }
    }
}
