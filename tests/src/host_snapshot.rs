//! What is on the host that could have been left there: taken before and after, and compared.

use std::collections::BTreeSet;
use std::fs;
use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::harness::TestHost;

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
    service_requests: BTreeSet<PathBuf>,
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
    pub fn take(host: &TestHost) -> HostSnapshot {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let mountinfo = read("/proc/self/mountinfo");
        let entries = |dir: PathBuf| -> BTreeSet<PathBuf> {
            let all = fs::read_dir(dir).into_iter().flatten().flatten();
            all.filter(|entry| entry.file_name() != ".lock")
                .map(|entry| entry.path())
                .collect()
        };
        let mut files = BTreeSet::new();
        // The places for everybody; `files_anywhere` looks further.
        for place in [
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
        ] {
            owned_by(Path::new(place), &host.uids, &host.root, &mut files);
        }
        HostSnapshot {
            mounts: mountinfo
                .lines()
                .map(|line| line.split(' ').skip(3).take(2).collect::<Vec<_>>().join(" on "))
                .filter(|mount| mount.contains("bmat-") || mount.contains(&*host.root.to_string_lossy()))
                .collect(),
            ipc: ipc_of(&host.uids),
            keys: keys_of(&host.uids),
            sockets: sockets_of(&host.uids),
            service_requests: requests_for(&host.uids),
            host: HOST_FILES.map(read).to_vec(),
            logins: LOGIN_FILES
                .map(|path| fs::metadata(path).ok().map(|meta| meta.len()))
                .to_vec(),
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
        let now = HostSnapshot::take(host);
        assert_eq!(*self, now, "the host is not as it was");
    }
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
    let mut found = BTreeSet::new();
    for kind in ["shm", "sem", "msg"] {
        let table = fs::read_to_string(format!("/proc/sysvipc/{kind}")).unwrap_or_default();
        let mut lines = table.lines();
        let heads: Vec<&str> = lines.next().unwrap_or_default().split_whitespace().collect();
        for line in lines {
            let ours = line.split_whitespace().zip(&heads).any(|(field, head)| {
                ["uid", "gid", "cuid", "cgid"].contains(head)
                    && field.parse().is_ok_and(|id: u32| uids.contains(&id))
            });
            if ours {
                found.insert(format!("{kind} {line}"));
            }
        }
    }
    found
}

/// What the kernel keeps of the users' keys: `/proc/key-users` has all users, `/proc/keys` what root may see.
fn keys_of(uids: &RangeInclusive<u32>) -> BTreeSet<String> {
    let number = |text: &str| text.parse().is_ok_and(|id: u32| uids.contains(&id));
    let users = fs::read_to_string("/proc/key-users").unwrap_or_default();
    let users = users
        .lines()
        .filter(|line| line.trim().split(':').next().is_some_and(number));
    let keys = fs::read_to_string("/proc/keys").unwrap_or_default();
    let keys = keys
        .lines()
        .filter(|line| line.split_whitespace().nth(5).is_some_and(number));
    users.chain(keys).map(str::to_owned).collect()
}

/// Internet sockets that wait for others, and named Unix sockets, of uids of the range. The kernel lists no
/// owner of the latter: tests put the uid into the names.
fn sockets_of(uids: &RangeInclusive<u32>) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for kind in ["tcp", "tcp6", "udp", "udp6", "raw", "raw6", "packet"] {
        let table = fs::read_to_string(format!("/proc/net/{kind}")).unwrap_or_default();
        let mut lines = table.lines();
        let head = lines.next().unwrap_or_default();
        for line in lines {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (state, uid) = if kind == "packet" {
                ("", fields.get(7))
            } else {
                (fields.get(3).copied().unwrap_or_default(), fields.get(7))
            };
            // Only a listening TCP socket waits; the others fade away, and hold nothing.
            let waits = !kind.starts_with("tcp") || state == "0A";
            if waits && uid.is_some_and(|uid| uid.parse().is_ok_and(|uid: u32| uids.contains(&uid))) {
                found.insert(format!("{kind} {line} of {head}"));
            }
        }
    }
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    for name in table.lines().filter_map(|line| line.split_whitespace().nth(7)) {
        let number = name.strip_prefix("@uid-").and_then(|rest| rest.split('-').next());
        if number.is_some_and(|uid| uid.parse().is_ok_and(|uid: u32| uids.contains(&uid))) {
            found.insert(format!("unix {name}"));
        }
    }
    found
}

/// Files that have the name or the uid of a worker of this range in their names, where services look for requests.
fn requests_for(uids: &RangeInclusive<u32>) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for place in [
        "/var/spool/cron",
        "/var/spool/cron/crontabs",
        "/var/spool/cron/atjobs",
        "/var/spool/at",
        "/var/spool/mail",
        "/var/mail",
        "/var/lib/systemd/linger",
        "/var/lib/systemd/timers",
        "/run/systemd/users",
        "/run/systemd/transient",
        "/run/user",
        "/etc/cron.d",
        "/etc/cron.daily",
        "/etc/systemd/system",
    ] {
        for entry in fs::read_dir(place).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let mut numbers = name.split(|c: char| !c.is_ascii_digit());
            let ours = numbers.any(|number| number.parse().is_ok_and(|uid: u32| uids.contains(&uid)));
            // The workers of every test are called so, but no test's may have left anything here.
            if ours || name.contains("bmat-") {
                found.insert(entry.path());
            }
        }
    }
    found
}

/// Files of the uids on any file system that is mounted: a walk over all of the host, of seconds. What others
/// make and remove meanwhile does not disturb it.
pub fn files_anywhere(uids: &RangeInclusive<u32>) -> BTreeSet<PathBuf> {
    // The kernel's own tables, which are not places to leave a file, and change while they are read.
    const TABLES: [&str; 12] = [
        "proc",
        "sysfs",
        "cgroup",
        "cgroup2",
        "securityfs",
        "debugfs",
        "tracefs",
        "configfs",
        "bpf",
        "efivarfs",
        "binfmt_misc",
        "autofs",
    ];
    let mountinfo = fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
    let mut found = BTreeSet::new();
    let mut seen = BTreeSet::new();
    for line in mountinfo.lines() {
        let (mount, source) = line.split_once(" - ").expect("mountinfo has its separator");
        let place = mount.split(' ').nth(4).expect("mountinfo has a fifth field");
        // The kernel writes a space, and little else, in octal.
        let place = PathBuf::from(place.replace("\\040", " "));
        let kind = source.split(' ').next().unwrap_or_default();
        let Ok(meta) = place.symlink_metadata() else {
            continue;
        };
        if TABLES.contains(&kind) || !meta.is_dir() || !seen.insert((meta.dev(), meta.ino())) {
            continue;
        }
        let mut directories = vec![place];
        while let Some(dir) = directories.pop() {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                let path = entry.path();
                let Ok(below) = path.symlink_metadata() else {
                    continue;
                };
                if uids.contains(&below.uid()) || uids.contains(&below.gid()) {
                    found.insert(path.clone());
                }
                if below.is_dir() && below.dev() == meta.dev() {
                    directories.push(path);
                }
            }
        }
    }
    found
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

fn owned_by(dir: &Path, uids: &RangeInclusive<u32>, own: &Path, found: &mut BTreeSet<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let Ok(meta) = entry.path().symlink_metadata() else {
            continue;
        };
        if uids.contains(&meta.uid()) || uids.contains(&meta.gid()) {
            found.insert(entry.path());
        }
        let name = entry.file_name();
        // Hosts of tests at the same time have trees of a hundred thousand files, and uids of their own.
        let is_another =
            name.to_string_lossy().starts_with(TestHost::PREFIX) && !own.starts_with(entry.path());
        if meta.is_dir() && !is_another {
            owned_by(&entry.path(), uids, own, found);
        }
    }
}
