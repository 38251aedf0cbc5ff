//! What is on the host that could have been left there: taken before and after, and compared.

use std::collections::BTreeSet;
use std::fs;
use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use supervisor::residue::files::Pace;
use supervisor::residue::{Uids, files, kernel};

use crate::harness::{LOCKS, TestHost, install_tools, until};

/// A snapshot of the host, as far as a factory's jobs could change it.
#[derive(Debug, PartialEq, Eq)]
pub struct HostSnapshot {
    /// Mounts of this namespace, the host's, that have to do with this test's factory or with a worker.
    mounts: BTreeSet<String>,
    /// SysV shared memory, semaphores and queues of the test's uids, which are counted for the whole host.
    ipc: BTreeSet<String>,
    /// The same for keys and keyrings: `keyrings(7)`.
    keys: BTreeSet<String>,
    /// Sockets of the test's uids that others could reach.
    sockets: BTreeSet<String>,
    /// What services were told to do for a worker, by name or uid: crontabs, units, mail.
    service_requests: BTreeSet<String>,
    /// The files that say who may log in and what is started when, word for word.
    host: Vec<String>,
    /// How long the records of logins are. `lastlog` has its place for a uid at a distance of uid × size.
    logins: Vec<Option<u64>>,
    /// Files and processes of the test's uids.
    files: BTreeSet<PathBuf>,
    processes: BTreeSet<String>,
    /// The worker's cgroups, directories and user records of this test's factory.
    cgroups: BTreeSet<PathBuf>,
    workers: BTreeSet<PathBuf>,
    users: BTreeSet<PathBuf>,
}

impl HostSnapshot {
    /// Panics where `/proc` cannot be read.
    pub fn take(host: &TestHost) -> HostSnapshot {
        let unused = HostSnapshot::of_unused(host);
        let uids = Uids::from(host.uids.clone());
        HostSnapshot {
            ipc: kernel::ipc(&uids),
            keys: kernel::keys(&uids),
            sockets: sockets_of(&uids),
            files: files_of(host, &uids),
            processes: processes_of(&host.uids),
            ..unused
        }
    }

    /// The same for a host on which nothing of its factory has run. Its uids are locked for this test and have done
    /// nothing: their processes, files, sockets and keys need not be looked for.
    pub fn of_unused(host: &TestHost) -> HostSnapshot {
        install_tools();
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let uids = Uids::from(host.uids.clone());
        let entries = |dir: PathBuf| -> BTreeSet<PathBuf> {
            let all = fs::read_dir(dir).into_iter().flatten().flatten();
            all.filter(|entry| entry.file_name() != ".lock")
                .map(|entry| entry.path())
                .collect()
        };
        HostSnapshot {
            mounts: kernel::mounts(|mount| {
                mount.contains("bmat-") || mount.contains(&*host.root.to_string_lossy())
            }),
            ipc: BTreeSet::new(),
            keys: BTreeSet::new(),
            sockets: BTreeSet::new(),
            // The workers of every test are called so, but no test's may have left anything here.
            service_requests: kernel::service_requests(&uids, |name| name.contains("bmat-")),
            host: HOST_FILES.map(read).to_vec(),
            logins: LOGIN_FILES
                .map(|path| fs::metadata(path).ok().map(|meta| meta.len()))
                .to_vec(),
            files: BTreeSet::new(),
            processes: BTreeSet::new(),
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
        let now = HostSnapshot::take(host);
        assert_eq!(*self, now, "the host is not as it was");
    }
}

/// Files of the uids in the places for everybody; [`files_anywhere`] looks further.
fn files_of(host: &TestHost, uids: &Uids) -> BTreeSet<PathBuf> {
    let is_skipped = |path: &Path| {
        if path.starts_with(&host.root) || host.root.starts_with(path) {
            return false;
        }
        // Hosts of tests at the same time have trees of a hundred thousand files, and uids of their own.
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let is_a_tests = name.starts_with(TestHost::PREFIX) || path == Path::new(LOCKS);
        // Nobody but root gets inside.
        let is_closed = |meta: fs::Metadata| meta.uid() == 0 && meta.gid() == 0 && meta.mode() & 0o001 == 0;
        is_a_tests || path.symlink_metadata().is_ok_and(is_closed)
    };
    let places = [
        "/tmp",
        "/var/tmp",
        "/dev/shm",
        "/dev/mqueue",
        "/run",
        "/var/lock",
        "/var/spool",
        "/var/mail",
        "/var/crash",
        "/var/lib/systemd",
        "/home",
    ];
    let below = |place| files::below(Path::new(place), uids, is_skipped);
    places.into_iter().flat_map(below).collect()
}

const HOST_FILES: [&str; 8] = [
    "/etc/passwd",
    "/etc/group",
    "/etc/shadow",
    "/etc/subuid",
    "/etc/crontab",
    "/etc/ld.so.preload",
    "/etc/environment",
    "/proc/sys/kernel/core_pattern",
];

const LOGIN_FILES: [&str; 5] = [
    "/run/utmp",
    "/var/log/wtmp",
    "/var/log/btmp",
    "/var/log/lastlog",
    "/var/log/faillog",
];

/// Lines of the tables of `/proc/sysvipc` in which an owner or maker is of the range.
pub fn ipc_of(uids: &RangeInclusive<u32>) -> BTreeSet<String> {
    kernel::ipc(&uids.clone().into())
}

/// Processes of the range, dead ones included whose parent runs and has not waited for them. Whose parent has ended
/// is the host's first process' to reap, which takes a moment: until then this waits.
pub fn processes_of(uids: &RangeInclusive<u32>) -> BTreeSet<String> {
    let of_first_process = format!("{}1", kernel::NOT_REAPED);
    until(|| {
        let found = kernel::processes(&uids.clone().into());
        match found.iter().any(|line| line.ends_with(&of_first_process)) {
            true => Err(format!("the host's first process reaps nobody: {found:?}")),
            false => Ok(found),
        }
    })
}

/// Files of the uids on any file system that is mounted: a walk over all of the host, of seconds.
pub fn files_anywhere(uids: &RangeInclusive<u32>) -> BTreeSet<PathBuf> {
    let searched = files::search(&uids.clone().into(), Pace(u32::MAX), &mut |_| ());
    searched.expect("/proc is mounted").found
}

/// Sockets of the uids that others could reach. The kernel lists no owner of Unix sockets: tests put the uid into their
/// names.
fn sockets_of(uids: &Uids) -> BTreeSet<String> {
    let mut found = kernel::sockets(uids);
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    for name in table.lines().filter_map(|line| line.split_whitespace().nth(7)) {
        let number = name.strip_prefix("@uid-").and_then(|rest| rest.split('-').next());
        if number.is_some_and(|uid| uids.contains_text(uid)) {
            found.insert(format!("unix {name}"));
        }
    }
    found
}
