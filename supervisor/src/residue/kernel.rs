//! What the kernel's tables and the host's services keep of users. Each function returns a line for each thing that is
//! of one of the uids; what a table has not, or the kernel does not offer, has nothing.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::quota::{QuotaType, quotactl_get};

use super::Uids;
use super::files::{Mount, mount_table};

/// What stands before the parent's pid in the line of a dead process.
pub const NOT_REAPED: &str = ", dead, not yet waited for by its parent ";

fn table(path: &str) -> String {
    // A name in it may be any bytes.
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// Processes of which any uid, gid or supplementary group is one of these (`proc_pid_status(5)`). A dead one is there
/// until its parent waits for it; its line ends with [`NOT_REAPED`] and the parent's pid.
pub fn processes(uids: &Uids) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().filter(|name| name.parse::<u32>().is_ok()) else {
            continue;
        };
        let status = table(&format!("/proc/{pid}/status"));
        let field = |key| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(key))
                .unwrap_or_default()
                .trim()
        };
        let ids = status.lines().filter_map(|line| {
            line.strip_prefix("Uid:")
                .or(line.strip_prefix("Gid:"))
                .or(line.strip_prefix("Groups:"))
        });
        if ids
            .flat_map(str::split_whitespace)
            .any(|id| uids.contains_text(id))
        {
            let mut line = format!("{pid} {}", field("Name:"));
            if field("State:").starts_with('Z') {
                line += &format!("{NOT_REAPED}{}", field("PPid:"));
            }
            found.insert(line);
        }
    }
    found
}

/// Lines of the tables of `/proc/sysvipc` in which an owner or maker is one of these (`sysvipc(7)`).
pub fn ipc(uids: &Uids) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for kind in ["shm", "sem", "msg"] {
        let table = table(&format!("/proc/sysvipc/{kind}"));
        let mut lines = table.lines();
        let heads: Vec<&str> = lines.next().unwrap_or_default().split_whitespace().collect();
        for line in lines {
            let mut fields = line.split_whitespace().zip(&heads);
            if fields
                .any(|(id, head)| ["uid", "gid", "cuid", "cgid"].contains(head) && uids.contains_text(id))
            {
                found.insert(format!("{kind} {line}"));
            }
        }
    }
    found
}

/// What the kernel keeps of the users' keys (`keyrings(7)`): `/proc/key-users` has all users, `/proc/keys` what root may
/// see.
pub fn keys(uids: &Uids) -> BTreeSet<String> {
    let (users, keys) = (table("/proc/key-users"), table("/proc/keys"));
    let of_users = users.lines().filter(|line| {
        line.trim()
            .split(':')
            .next()
            .is_some_and(|id| uids.contains_text(id))
    });
    let of_keys = keys.lines().filter(|line| {
        let mut ids = line.split_whitespace().skip(5).take(2);
        ids.any(|id| uids.contains_text(id))
    });
    of_users.chain(of_keys).map(str::to_owned).collect()
}

/// Internet and packet sockets of this network namespace (`proc_net(5)`). Of TCP only those that listen: the others fade
/// away, and hold nothing.
pub fn sockets(uids: &Uids) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for kind in ["tcp", "tcp6", "udp", "udp6", "raw", "raw6", "packet"] {
        for line in table(&format!("/proc/net/{kind}")).lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let waits = !kind.starts_with("tcp") || fields.get(3) == Some(&"0A");
            if waits && fields.get(7).is_some_and(|id| uids.contains_text(id)) {
                found.insert(format!("{kind} {}", line.trim()));
            }
        }
    }
    found
}

/// Where services of the host look for what users want of them.
const SERVICE_REQUESTS: [&str; 14] = [
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
];

/// Files there whose names have one of the uids in them, or the name of a user of which `is_left` is true.
pub fn service_requests(uids: &Uids, is_left: impl Fn(&str) -> bool) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for place in SERVICE_REQUESTS {
        for entry in fs::read_dir(place).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let mut numbers = name.split(|c: char| !c.is_ascii_digit());
            if numbers.any(|number| uids.contains_text(number)) || is_left(&name) {
                found.insert(entry.path().display().to_string());
            }
        }
    }
    found
}

/// Accounts of the host with one of the ids.
pub fn accounts(etc: &Path, uids: &Uids) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (name, fields) in [
        ("passwd", 2..4),
        ("group", 2..3),
        ("subuid", 1..2),
        ("subgid", 1..2),
    ] {
        let path = etc.join(name);
        let text = fs::read(&path).unwrap_or_default();
        for line in String::from_utf8_lossy(&text).lines() {
            let all: Vec<&str> = line.split(':').collect();
            let ids = all.get(fields.clone()).unwrap_or_default();
            if ids.iter().any(|id| uids.contains_text(id)) {
                found.insert(format!("{}: {line}", path.display()));
            }
        }
    }
    found
}

/// Mounts of this namespace whose place, or what is mounted there, has a name of which `is_left` is true.
pub fn mounts(is_left: impl Fn(&str) -> bool) -> BTreeSet<String> {
    let of_mount = |mount: Mount| {
        let line = format!("{} on {}", mount.root.display(), mount.place.display());
        is_left(&line).then_some(line)
    };
    mount_table().into_iter().flatten().filter_map(of_mount).collect()
}

/// What the user quotas of local file systems say of these uids: a limit, or usage.
pub fn quotas(uids: &Uids) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mounts = mount_table().unwrap_or_default();
    let devices: BTreeSet<PathBuf> = mounts
        .into_iter()
        .map(|mount| mount.source)
        .filter(|source| source.starts_with("/dev/"))
        .collect();
    for device in devices {
        for uid in uids.range.clone().filter(|uid| uids.contains(*uid)) {
            let quota = match quotactl_get(QuotaType::USRQUOTA, &device, uid as i32) {
                Ok(quota) => quota,
                // XFS says so of a user that has none.
                Err(Errno::ENOENT) => continue,
                // Quotas are not kept there.
                Err(_) => break,
            };
            let limits = [quota.blocks_hard_limit(), quota.inodes_hard_limit()];
            let used = [quota.occupied_space(), quota.allocated_inodes()];
            if limits.into_iter().chain(used).flatten().any(|value| value > 0) {
                found.insert(format!(
                    "{}: uid {uid}: limits {limits:?}, used {used:?}",
                    device.display()
                ));
            }
        }
    }
    found
}
