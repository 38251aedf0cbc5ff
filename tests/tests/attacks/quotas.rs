//! Row 54: a job fills the disk as far as it may. What is attempted is in `hostile-job`'s `exhaustion`.
//! `tests/machine/run limits` boots a machine whose kernel has the quotas that these tests need.

use protocol::{Reply, Request, State};
use testbed::harness::{TestHost, worker_id};
use testbed::small_disk::SmallDisk;
use testbed::test_helper::{TestHelper, attack, create, create_worker, list, state};

use crate::attacks::exhaustion::{refused, slots};
use crate::attacks::leftovers::ongoing;

const QUOTA: &str = "disk = \"8M\"\ninodes = 300";
const QUOTA_WORDS: [&str; 2] = ["8388608", "300"];

fn ext4(host: &TestHost) -> SmallDisk {
    SmallDisk::with_quotas(host, true).expect("this kernel has quotas: see CONFIG_QFMT_V2")
}

/// A test whose state directory is on a file system that enforces user quotas.
fn with_quotas(disk: fn(&TestHost) -> SmallDisk, slots: &str, uids: u32) -> TestHelper {
    let mut host = TestHost::new();
    host.uids = *host.uids.start()..=*host.uids.start() + uids - 1;
    host.configure("http://127.0.0.1:9", 0, slots);
    let disk = disk(&host);
    TestHelper::on(host, Some(disk))
}

#[test]
fn row_54_quotas_that_are_not_enforced_are_refused_at_the_start() {
    for (key, line) in [("disk", "disk = \"8M\""), ("inodes", "inodes = 300")] {
        let host = TestHost::new();
        host.configure("http://127.0.0.1:9", 0, &slots(&[("a", line)]));
        // Where the kernel has quotas: counted, but with no limits, as ext4 does it unless it is told more.
        let _disk = SmallDisk::with_quotas(&host, false).unwrap_or_else(|| SmallDisk::ext4(&host, 1000));
        let words = refused(&host);
        for part in ["slot a", &format!("limits.{key}"), "quotas", "best_effort = true"] {
            assert!(words.contains(part), "{words}");
        }
    }
}

/// A job takes all that its quota lets it, tries to change the project of its files on the way, and goes on printing; others
/// write what they like, up to their own quotas; then all of it is deleted.
fn fills_its_own(disk: fn(&TestHost) -> SmallDisk) {
    let test = with_quotas(disk, &slots(&[("a", QUOTA), ("c", ""), ("d", QUOTA)]), 64);
    let client = test.client();
    let (full, other) = (create_worker(&client, "a"), create_worker(&client, "c"));
    let console = ongoing(&client, full, "fill-quota", &QUOTA_WORDS, "ready");
    // The console is root's file: not the job's quota, but `limits.console` is its bound.
    assert!(console.contains("line 999 with a full quota"), "{console}");
    assert!(console.contains("blocked: a project of its own"), "{console}");
    let used = |worker| {
        list(&client)
            .into_iter()
            .find(|info| info.worker == worker)
            .unwrap()
            .disk
    };
    let used = (used(full).unwrap(), used(other).unwrap());
    assert!(
        (7 << 20..=8 << 20).contains(&used.0) && used.1 < 1 << 20,
        "{used:?}"
    );
    attack(&client, other, "write-much", &["32", "1000"]);
    // Its limit is its own, too. Not much more: XFS counts what it reserves for an open file to grow, as much again.
    let third = create_worker(&client, "d");
    attack(&client, third, "write-much", &["2", "100"]);
    assert_eq!(state(&client, full), State::Running);
    test.finish(&[full, other, third]);
}

#[test]
#[ignore = "needs a kernel with CONFIG_QFMT_V2: tests/machine/run limits"]
fn row_54_a_job_that_fills_its_quota_fills_nobody_elses() {
    fills_its_own(ext4);
}

#[test]
#[ignore = "needs a kernel with CONFIG_XFS_QUOTA: tests/machine/run limits"]
fn row_54_a_job_that_fills_its_quota_on_xfs_fills_nobody_elses() {
    fills_its_own(SmallDisk::xfs);
}

/// A uid that is used again has the limits of its new worker, and none of the old one's.
fn is_forgotten(disk: fn(&TestHost) -> SmallDisk) {
    let test = with_quotas(disk, &slots(&[("a", QUOTA), ("c", "")]), 1);
    let client = test.client();
    let disk = test.disk.as_ref().unwrap();
    let uid = *test.host.uids.start();
    let first = create_worker(&client, "a");
    ongoing(&client, first, "fill-quota", &QUOTA_WORDS, "ready");
    let limits = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.contains(&"8192") && words.contains(&"300")
    };
    assert!(limits(&disk.quota(uid)), "{}", disk.quota(uid));
    assert_eq!(client.ask(&Request::Delete { worker: first }).0, Reply::Deleted);
    let none = |line: &str| !["8192", "300"].iter().any(|limit| line.contains(limit));
    assert!(none(&disk.quota(uid)), "{}", disk.quota(uid));
    let second = worker_id();
    let Reply::UserCreated { uid: again, .. } = create(&client, second, "c") else {
        panic!("no second worker")
    };
    assert_eq!(again.get(), uid);
    attack(&client, second, "write-much", &["32", "1000"]);
    test.finish(&[second]);
}

#[test]
#[ignore = "needs a kernel with CONFIG_QFMT_V2: tests/machine/run limits"]
fn row_54_a_quota_is_forgotten_with_its_worker() {
    is_forgotten(ext4);
}

#[test]
#[ignore = "needs a kernel with CONFIG_XFS_QUOTA: tests/machine/run limits"]
fn row_54_a_quota_on_xfs_is_forgotten_with_its_worker() {
    is_forgotten(SmallDisk::xfs);
}
