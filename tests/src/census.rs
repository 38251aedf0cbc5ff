//! What is on the host that could have been left there: taken before and after, and compared.

use std::collections::BTreeSet;
use std::fs;
use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::harness::TestHost;

/// A census of the host, as far as a factory's jobs could change it.
#[derive(Debug, PartialEq, Eq)]
pub struct Census {
    /// Mounts of this namespace, the host's, that have to do with this test's factory or with a worker.
    mounts: BTreeSet<String>,
    /// SysV shared memory, semaphores and queues.
    ipc: [String; 3],
    passwd: String,
    group: String,
    /// Files and processes of the test's uids.
    files: BTreeSet<PathBuf>,
    processes: BTreeSet<String>,
    /// The worker's cgroups, directories and user records of this test's factory.
    cgroups: BTreeSet<PathBuf>,
    workers: BTreeSet<PathBuf>,
    users: BTreeSet<PathBuf>,
}

impl Census {
    pub fn take(host: &TestHost) -> Census {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let mountinfo = read("/proc/self/mountinfo");
        let entries = |dir: PathBuf| -> BTreeSet<PathBuf> {
            let all = fs::read_dir(dir).into_iter().flatten().flatten();
            all.filter(|entry| entry.file_name() != ".lock")
                .map(|entry| entry.path())
                .collect()
        };
        let mut files = BTreeSet::new();
        for place in [
            "/tmp",
            "/var/tmp",
            "/dev/shm",
            "/dev/mqueue",
            "/run",
            "/var/lock",
            "/var/spool",
            "/var/mail",
            "/home",
        ] {
            owned_by(Path::new(place), &host.uids, &mut files);
        }
        Census {
            mounts: mountinfo
                .lines()
                .map(|line| line.split(' ').skip(3).take(2).collect::<Vec<_>>().join(" on "))
                .filter(|mount| mount.contains("bmat-") || mount.contains(&*host.root.to_string_lossy()))
                .collect(),
            ipc: ["shm", "sem", "msg"].map(|kind| read(&format!("/proc/sysvipc/{kind}"))),
            passwd: read("/etc/passwd"),
            group: read("/etc/group"),
            files,
            processes: processes_of(&host.uids),
            cgroups: entries(host.cgroup_dir().join("workers"))
                .into_iter()
                .filter(|path| path.is_dir())
                .collect(),
            workers: entries(host.root.join(protocol::config::STATE_DIR).join("workers")),
            users: entries(host.userdb()),
        }
    }

    /// Fail unless the host is as it was.
    pub fn assert_unchanged(&self, host: &TestHost) {
        let now = Census::take(host);
        assert_eq!(*self, now, "the host is not as it was");
    }
}

/// Processes, also dead ones that nobody has reaped, with a real uid of the range.
pub fn processes_of(uids: &RangeInclusive<u32>) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc").expect("/proc is mounted").flatten() {
        let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let uid = status
            .lines()
            .find_map(|line| line.strip_prefix("Uid:")?.split_whitespace().next()?.parse().ok());
        if uid.is_some_and(|uid: u32| uids.contains(&uid)) {
            let name = status.lines().next().unwrap_or_default();
            found.insert(format!("{} {name}", entry.file_name().display()));
        }
    }
    found
}

fn owned_by(dir: &Path, uids: &RangeInclusive<u32>, found: &mut BTreeSet<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(meta) = entry.path().symlink_metadata() else {
            continue;
        };
        if uids.contains(&meta.uid()) || uids.contains(&meta.gid()) {
            found.insert(entry.path());
        }
        if meta.is_dir() {
            owned_by(&entry.path(), uids, found);
        }
    }
}
