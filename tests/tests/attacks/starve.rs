//! Group D: a hostile job; what it attempts is in `hostile-job`'s module of the same name.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::Instant;

use protocol::{Exit, Reply, Request, State};
use testbed::census::processes_of;
use testbed::disk::SmallDisk;
use testbed::harness::{PATIENCE, Running, TestHost, binaries, cgroup2_mount, worker_id};
use testbed::stage::{Stage, attack, create, created, read, start_attack, state, wait_for_line, wait_until};

use crate::leave::ongoing;

/// Slots with these limits: a slot's name and the lines of its table `limits`.
fn slots(all: &[(&str, &str)]) -> String {
    let one = |(name, limits): &(&str, &str)| {
        format!("[slots.{name}]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n[slots.{name}.limits]\n{limits}\n")
    };
    all.iter().map(one).collect()
}

/// Start a helper that refuses its configuration, and return its last words.
fn refused(host: &TestHost) -> String {
    let mut command = Command::new(binaries().join("user-factory-helper"));
    command
        .arg("--root")
        .arg(&host.root)
        .args(["--cgroup", &host.cgroup]);
    let mut helper = Running::start(&mut command);
    let line = helper.log.wait(&["cannot be enforced on this host"]);
    assert!(!helper.wait().success());
    assert!(!helper.log.text().contains("serving"), "{}", helper.log.text());
    line
}

/// Can this machine limit what the cgroup v2 controller of that name counts?
fn has_controller(name: &str) -> bool {
    let all = fs::read_to_string(cgroup2_mount().join("cgroup.controllers")).unwrap();
    all.split_whitespace().any(|other| other == name)
}

/// The helper refuses a limit that this machine cannot enforce, and where the operator settles for less it
/// says so loudly and serves.
fn refused_or_loud(controller: &str, key: &str, line: &str) -> Stage {
    if !has_controller(controller) {
        let host = TestHost::new();
        host.configure("http://127.0.0.1:9", 0, &slots(&[("a", line)]));
        let words = refused(&host);
        for part in [
            "slot a",
            &format!("limits.{key}"),
            "delegate",
            "best_effort = true",
        ] {
            assert!(words.contains(part), "{words}");
        }
    }
    let stage = Stage::with(&slots(&[
        ("a", &format!("{line}\nbest_effort = true")),
        ("c", ""),
    ]));
    if !has_controller(controller) {
        let warned = stage.helper.log.wait(&["NOT ENFORCED", key, "slot a"]);
        assert!(warned.contains("WARN"), "{warned}");
    }
    stage
}

#[test]
fn row_51_memory_is_limited_or_the_helper_does_not_start_and_shared_memory_ends_at_the_limit() {
    for (key, line) in [("memory", "memory = \"32M\""), ("swap", "swap = \"1G\"")] {
        let stage = refused_or_loud("memory", key, line);
        let client = stage.client();
        let worker = created(&client, "a");
        // Where there is a controller, the page cache of this much shared memory would be over the limit first.
        if key == "memory" && !has_controller("memory") {
            attack(&client, worker, "shared-memory", &[&(32 << 20).to_string()]);
        } else {
            attack(&client, worker, "take-a-little", &[]);
        }
        stage.finish(&[worker]);
    }
}

#[test]
fn row_52_processors_are_limited_or_the_helper_does_not_start() {
    let stage = refused_or_loud("cpu", "cpus", "cpus = 1");
    let client = stage.client();
    let worker = created(&client, "a");
    attack(&client, worker, "take-a-little", &[]);
    stage.finish(&[worker]);
}

#[test]
fn row_53_a_job_that_takes_all_it_gets_finds_its_limits_and_its_neighbour_finds_enough() {
    let stage = Stage::with(&slots(&[("a", "processes = 64\nopen_files = 256"), ("c", "")]));
    let client = stage.client();
    let (greedy, modest) = (created(&client, "a"), created(&client, "c"));
    let watches = fs::read_to_string("/proc/sys/fs/inotify/max_user_instances").unwrap();
    let words = ["64", "256", watches.trim()];
    let console = ongoing(&client, greedy, "take-everything", &words, "ready");
    for what in [
        "threads",
        "open files",
        "inotify",
        "queues",
        "signals",
        "terminals",
        "processes",
    ] {
        assert!(console.contains(&format!("held: {what}: ")), "{what}\n{console}");
    }
    attack(&client, modest, "take-a-little", &[]);
    assert_eq!(state(&client, greedy), State::Running);
    stage.finish(&[greedy, modest]);
}

/// A stage whose state directory is on a file system that enforces user quotas.
fn with_quotas(slots: &str, uids: u32) -> Stage {
    let mut host = TestHost::new();
    host.uids = *host.uids.start()..=*host.uids.start() + uids - 1;
    host.configure("http://127.0.0.1:9", 0, slots);
    let disk = SmallDisk::with_quotas(&host, true).expect("this kernel has quotas: see CONFIG_QFMT_V2");
    Stage::on(host, Some(disk))
}

const QUOTA: &str = "disk = \"8M\"\ninodes = 300";
const QUOTA_WORDS: [&str; 2] = ["8388608", "300"];

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

#[test]
#[ignore = "needs a kernel with CONFIG_QFMT_V2"]
fn row_54_a_job_that_fills_its_quota_fills_nobody_elses() {
    let stage = with_quotas(&slots(&[("a", QUOTA), ("c", ""), ("d", QUOTA)]), 64);
    let client = stage.client();
    let (full, other) = (created(&client, "a"), created(&client, "c"));
    let console = ongoing(&client, full, "fill-quota", &QUOTA_WORDS, "ready");
    assert!(console.contains("line 999 with a full quota"), "{console}");
    attack(&client, other, "write-much", &["32", "1000"]);
    // Its limit is its own, too.
    let third = created(&client, "d");
    attack(&client, third, "write-much", &["4", "100"]);
    assert_eq!(state(&client, full), State::Running);
    stage.finish(&[full, other, third]);
}

#[test]
#[ignore = "needs a kernel with CONFIG_QFMT_V2"]
fn row_54_a_quota_is_forgotten_with_its_worker() {
    let stage = with_quotas(&slots(&[("a", QUOTA), ("c", "")]), 1);
    let client = stage.client();
    let disk = stage.disk.as_ref().unwrap();
    let uid = *stage.host.uids.start();
    let before = disk.quota(uid);
    let first = created(&client, "a");
    ongoing(&client, first, "fill-quota", &QUOTA_WORDS, "ready");
    assert_ne!(disk.quota(uid), before);
    assert_eq!(client.ask(&Request::Delete { worker: first }).0, Reply::Deleted);
    let limits = |line: &str| {
        line.split_whitespace()
            .any(|word| word == "8192" || word == "300")
    };
    assert!(!limits(&disk.quota(uid)), "{}", disk.quota(uid));
    let second = worker_id();
    let Reply::UserCreated { uid: again, .. } = create(&client, second, "c") else {
        panic!("no second worker")
    };
    assert_eq!(again.get(), uid);
    attack(&client, second, "write-much", &["32", "1000"]);
    stage.finish(&[second]);
}

#[test]
fn row_55_endless_output_is_cut_and_the_job_goes_on_to_its_own_end() {
    const KEPT: u64 = 64 << 10;
    let stage = Stage::with(&slots(&[("a", "console = \"64K\"")]));
    let client = stage.client();
    for output in ["no-newline", "escapes", "nuls"] {
        let worker = created(&client, "a");
        let console = start_attack(&client, worker, "chatter", &[output]);
        let ended = wait_until(&client, worker, |state| state != State::Running);
        assert_eq!(ended, State::Exited(Exit::Status(7)), "{output}");
        let length = console.metadata().unwrap().len();
        assert!((KEPT..KEPT + 100).contains(&length), "{output}: {length}");
        let mut notice = vec![0; (length - KEPT) as usize];
        console.read_exact_at(&mut notice, KEPT).unwrap();
        assert!(
            String::from_utf8_lossy(&notice).contains("the console is full"),
            "{notice:?}"
        );
        assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    }
    stage.finish(&[]);
}

#[test]
fn row_56_a_job_that_does_not_end_is_ended_with_all_its_processes_however_much_it_prints() {
    let stage = Stage::with(&slots(&[
        ("a", "run_time_seconds = 10"),
        ("c", "run_time_seconds = 10"),
    ]));
    let client = stage.client();
    let (quiet, noisy) = (created(&client, "a"), created(&client, "c"));
    let console = start_attack(&client, quiet, "never-end", &["quiet"]);
    start_attack(&client, noisy, "never-end", &["noisy"]);
    wait_for_line(&console, "ready");
    for worker in [quiet, noisy] {
        let ended = wait_until(&client, worker, |state| state != State::Running);
        assert_eq!(ended, State::Exited(Exit::TimedOut));
    }
    let begin = Instant::now();
    while !processes_of(&stage.host.uids).is_empty() {
        assert!(begin.elapsed() < PATIENCE, "{:?}", processes_of(&stage.host.uids));
        std::thread::yield_now();
    }
    let text = read(&console);
    assert!(
        text.contains("[the agent has run as long as the slot lets it]"),
        "{text}"
    );
    stage.finish(&[quiet, noisy]);
}

#[test]
fn row_56_a_job_that_ends_before_its_time_is_not_ended_by_it() {
    let stage = Stage::with(&slots(&[("a", "run_time_seconds = 60")]));
    let client = stage.client();
    let worker = created(&client, "a");
    let console = attack(&client, worker, "write-much", &["1", "1"]);
    assert_eq!(state(&client, worker), State::Exited(Exit::Status(0)));
    assert!(!console.contains("as long as the slot lets it"), "{console}");
    stage.finish(&[worker]);
}
