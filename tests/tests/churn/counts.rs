//! What the helper and the kernel keep, counted when no worker exists.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use testbed::harness::{PAUSE, TEST_TIMEOUT, until};
use testbed::test_helper::TestHelper;
use testbed::tracer::helper::listener;

/// How far a count may be from what it was.
#[derive(Clone, Copy, Debug)]
enum Tolerance {
    /// It is this test's own.
    Exact,
    /// KiB of the monitor's memory: what its allocator and its stack may take more by chance. A leak of a few bytes
    /// for each of 2,000 workers is more.
    Memory,
    /// It is the whole machine's, on which others run, so it may be off by this and one for every two workers: less
    /// than any leak of one for each.
    Machine(u64),
}

/// The slab caches of what a worker has, and of nothing that the kernel keeps as long as there is room: those of
/// files, directories and their contents grow with all that is ever looked at.
const CACHES: [&str; 17] = [
    "mnt_cache",
    "pid_namespace",
    "uts_namespace",
    "user_namespace",
    "net_namespace",
    "nsproxy",
    "mqueue_inode_cache",
    "kernfs_node_cache",
    "task_struct",
    "mm_struct",
    "signal_cache",
    "files_cache",
    "pid",
    "uid_cache",
    "key_jar",
    "sock_inode_cache",
    "filp",
];

#[derive(Debug)]
pub struct Counts(BTreeMap<String, (u64, Tolerance)>);

fn text(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path.as_ref()).unwrap_or_else(|e| panic!("{}: {e}", path.as_ref().display()))
}

fn entries(path: impl AsRef<Path>) -> u64 {
    let found = fs::read_dir(path.as_ref()).map(|entries| entries.count() as u64);
    found.unwrap_or_else(|e| panic!("{}: {e}", path.as_ref().display()))
}

/// The number after `name` in a file of such lines.
fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    number.unwrap_or_else(|| panic!("no {name} in {text}"))
}

impl Counts {
    pub fn take(test: &TestHelper) -> Counts {
        use Tolerance::{Exact, Machine, Memory};
        let mut counts = BTreeMap::new();
        let mut count = |name: &str, number: u64, tolerance| {
            counts.insert(name.to_owned(), (number, tolerance));
        };
        let own = format!("/proc/{}", test.helper.pid());
        let host = &test.host;
        // A session, with its share of the monitor's memory, ends a moment after its peer.
        let processes = || {
            text(host.cgroup_dir().join("daemon/cgroup.procs"))
                .lines()
                .count()
        };
        // The monitor and its listener.
        until(|| match processes() {
            0..=2 => Ok(()),
            left => Err(format!("{left} processes of the monitor are left")),
        });
        count("monitor: descriptors", entries(format!("{own}/fd")), Exact);
        let listener = format!("/proc/{}", listener(test.helper.pid()));
        count("listener: descriptors", entries(format!("{listener}/fd")), Exact);
        let memory = text(format!("{listener}/smaps_rollup"));
        count("listener: KiB of its own", field(&memory, "Anonymous:"), Memory);
        count(
            "monitor: mounts",
            text(format!("{own}/mountinfo")).lines().count() as u64,
            Exact,
        );
        let memory = text(format!("{own}/smaps_rollup"));
        count("monitor: KiB resident", field(&memory, "Rss:"), Memory);
        // Not Pss: that grows when a process that shares a page ends.
        count("monitor: KiB of its own", field(&memory, "Anonymous:"), Memory);
        let cgroup = host.cgroup_dir();
        let stat = text(cgroup.join("cgroup.stat"));
        count("cgroups", field(&stat, "nr_descendants "), Exact);
        count("cgroups: dying", field(&stat, "nr_dying_descendants "), Exact);
        count("users: records", entries(host.userdb()), Exact);
        let state = host.root.join(protocol::config::STATE_DIR);
        count("workers: directories", entries(state.join("workers")), Exact);
        let devices = host.root.join(protocol::config::RUN_DIR).join("devices");
        count("workers: /dev", entries(devices), Exact);

        count(
            "host: mounts",
            text("/proc/self/mountinfo").lines().count() as u64,
            Machine(8),
        );
        count("host: highest id of a mount", highest_mount_id(), Machine(200));
        let tasks = text("/proc/loadavg");
        let tasks = tasks.split(['/', ' ']).nth(4).expect("loadavg has its fields");
        count("host: tasks", tasks.parse().expect("a number"), Machine(64));
        let files = text("/proc/sys/fs/file-nr");
        let files = files.split_whitespace().next().expect("file-nr has its fields");
        count("host: open files", files.parse().expect("a number"), Machine(500));
        for kind in ["shm", "sem", "msg"] {
            let table = text(format!("/proc/sysvipc/{kind}"));
            count(
                &format!("host: System V {kind}"),
                table.lines().count() as u64,
                Machine(8),
            );
        }
        count(
            "host: users with keys",
            text("/proc/key-users").lines().count() as u64,
            Machine(8),
        );
        let terminals = text("/proc/sys/kernel/pty/nr");
        count(
            "host: terminals",
            terminals.trim().parse().expect("a number"),
            Machine(8),
        );
        count(
            "host: Unix sockets",
            text("/proc/net/unix").lines().count() as u64,
            Machine(100),
        );
        // Root's alone to read; this test is root's.
        let slabs = text("/proc/slabinfo");
        for cache in CACHES {
            // A kernel may keep several kinds in one.
            let line = slabs.lines().find(|line| line.split(' ').next() == Some(cache));
            if let Some(line) = line {
                // Of a cache, whole pages are in use, or not, by each processor.
                let slack = match cache {
                    "filp" | "kernfs_node_cache" => 1500,
                    _ => 300,
                };
                count(&format!("slab: {cache}"), field(line, cache), Machine(slack));
            }
        }
        Counts(counts)
    }

    /// Those that are more than this, `more` workers later, may be.
    fn grown(&self, now: &Counts, more: usize) -> Vec<String> {
        let mut grown = Vec::new();
        for (name, (before, tolerance)) in &self.0 {
            let after = now.0.get(name).map_or(0, |(number, _)| *number);
            let most = match tolerance {
                Tolerance::Exact => *before,
                Tolerance::Memory => before + 128,
                Tolerance::Machine(slack) => before + slack + more as u64 / 2,
            };
            if after > most {
                grown.push(format!("{name}: {before} before, {after} now, at most {most}"));
            }
        }
        grown
    }

    /// Wait until nothing is more than it was, as far as it may be: the kernel forgets some things a little later, and
    /// others come and go on the machine. What has leaked stays.
    pub fn wait_until_flat(&self, test: &TestHelper, more: usize) -> Counts {
        let end = Instant::now() + TEST_TIMEOUT;
        loop {
            let now = Counts::take(test);
            let grown = self.grown(&now, more);
            if grown.is_empty() {
                return now;
            }
            // Unused inodes keep what they are of, removed cgroups above all, as long as there is room. The kernel lets
            // go of them when it is asked (the kernel's documentation, sysctl/vm), and of nothing that is in use.
            fs::write("/proc/sys/vm/drop_caches", "2").expect("root may write it");
            assert!(
                Instant::now() < end,
                "after {more} workers more:\n{}",
                grown.join("\n")
            );
            std::thread::sleep(PAUSE);
        }
    }
}

/// The kernel gives the lowest free number to a mount, so in a new namespace the highest says how many there are.
fn highest_mount_id() -> u64 {
    let output = Command::new("unshare")
        .args(["--mount", "cat", "/proc/self/mountinfo"])
        .output();
    let output = output.expect("unshare is there");
    let table = String::from_utf8_lossy(&output.stdout);
    let ids = table
        .lines()
        .filter_map(|line| line.split(' ').next()?.parse().ok());
    ids.max().expect("there are mounts")
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<String> = self
            .0
            .iter()
            .map(|(name, (number, _))| format!("{name} {number}"))
            .collect();
        f.write_str(&all.join(", "))
    }
}
