//! Group D where the host has the controllers of cgroup v2, as hosts have that run systemd: memory, swap, processors
//! and processes are held to the slot's limits, and nobody else notices. What is attempted is in `hostile-job`'s
//! `memory` and `exhaustion`. `tests/machine/run limits` boots a machine that has all that these tests need.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::Instant;

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use protocol::{Exit, State, WorkerId};
use testbed::harness::{Client, has_controller, until};
use testbed::test_factory::{ONE, TestFactory};
use testbed::test_helper::{
    TestHelper, attack, attack_program, create_worker, read, start_attack, state, wait_until,
};

use crate::attacks::exhaustion::slots;
use crate::attacks::leftovers::ongoing;

pub const LIMIT: u64 = 48 << 20;
/// What the kernel charges in any case, for pages that must be had.
pub const SLACK: u64 = 1 << 20;

/// A file of the worker's cgroup.
fn file(test: &TestHelper, worker: WorkerId, name: &str) -> PathBuf {
    let cgroup = test.host.cgroup_dir().join("workers").join(worker.to_string());
    cgroup.join(name)
}

pub fn number(test: &TestHelper, worker: WorkerId, name: &str) -> u64 {
    let path = file(test, worker, name);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
    text.trim()
        .parse()
        .unwrap_or_else(|_| panic!("{path:?} is {text:?}"))
}

/// The lines `key number` of a file.
fn numbers(test: &TestHelper, worker: WorkerId, name: &str) -> BTreeMap<String, u64> {
    let text = fs::read_to_string(file(test, worker, name)).expect("the worker has a cgroup");
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.parse().ok()?))
        })
        .collect()
}

fn killed_for_memory(test: &TestHelper, worker: WorkerId) -> u64 {
    numbers(test, worker, "memory.events")["oom_kill"]
}

/// Let the job set off a bomb, and return what it could still say.
fn bomb(client: &Client, worker: WorkerId, kind: &str) -> String {
    let console = start_attack(client, worker, "memory-bomb", &[kind, &LIMIT.to_string()]);
    wait_until(client, worker, |state| state != State::Running);
    let text = read(&console);
    assert!(!text.contains("BROKEN"), "{kind}: {text}");
    text
}

#[test]
#[ignore = "needs the memory controller: tests/machine/run limits"]
fn row_51_a_memory_bomb_of_any_kind_ends_in_its_own_cgroup_and_its_neighbour_goes_on() {
    assert!(has_controller("memory"), "no memory controller here");
    let own = format!("memory = {LIMIT}");
    let test = TestHelper::with(&slots(&[("a", &own), ("c", &own), ("d", "")]));
    let client = test.client();
    let neighbour = create_worker(&client, "c");
    ongoing(&client, neighbour, "never-end", &["idle"], "ready");
    for kind in ["anonymous", "shared-memory", "memfd", "pipes", "sockets"] {
        let worker = create_worker(&client, "a");
        let begin = Instant::now();
        let console = bomb(&client, worker, kind);
        // Ended by the kernel, and only what is the job's own.
        assert!(
            killed_for_memory(&test, worker) > 0,
            "{kind}: {console}\n{:?}",
            numbers(&test, worker, "memory.events")
        );
        assert_eq!(number(&test, worker, "memory.max"), LIMIT);
        let peak = number(&test, worker, "memory.peak");
        assert!((LIMIT / 2..=LIMIT + SLACK).contains(&peak), "{kind}: {peak}");
        assert_eq!(killed_for_memory(&test, neighbour), 0, "{kind}");
        assert_eq!(state(&client, neighbour), State::Running, "{kind}");
        let third = create_worker(&client, "d");
        attack(&client, third, "take-a-little", &[]);
        println!(
            "{kind}: {:?} after {:.1?}, at most {peak} bytes; {console}",
            state(&client, worker),
            begin.elapsed()
        );
        test.delete(&[worker, third]);
    }
    test.finish(&[neighbour]);
}

#[test]
#[ignore = "needs the memory controller: tests/machine/run limits"]
fn row_51_page_cache_gives_way_within_the_limit() {
    assert!(has_controller("memory"), "no memory controller here");
    let test = TestHelper::with(&slots(&[("a", &format!("memory = {LIMIT}"))]));
    // What is written to files in memory cannot give way, and the kernel is right to end the job.
    let kind = statfs(&test.host.root).unwrap().filesystem_type();
    assert_ne!(
        kind, TMPFS_MAGIC,
        "set TMPDIR to a directory on a disk: this test writes to files"
    );
    let client = test.client();
    let worker = create_worker(&client, "a");
    let console = start_attack(&client, worker, "page-cache", &["", &LIMIT.to_string()]);
    let ended = wait_until(&client, worker, |state| state != State::Running);
    let events = numbers(&test, worker, "memory.events");
    assert_eq!(
        ended,
        State::Exited(Exit::Status(0)),
        "{events:?}: {}",
        read(&console)
    );
    assert_eq!(events["oom_kill"], 0);
    let peak = number(&test, worker, "memory.peak");
    assert!((LIMIT / 2..=LIMIT + SLACK).contains(&peak), "{peak}");
    test.finish(&[worker]);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the memory controller: tests/machine/run limits"]
async fn row_51_a_program_that_the_job_has_written_is_ended_or_its_job_is_failed() {
    assert!(has_controller("memory"), "no memory controller here");
    let factory = TestFactory::new(&format!("{ONE}limits.memory = {LIMIT}\n")).await;
    let program = factory.shared().join("hostile-job");
    let attempt = attack_program("memory-bomb", &["anonymous", &LIMIT.to_string()]);
    fs::copy(format!("/proc/self/fd/{}", attempt.as_raw_fd()), &program).unwrap();
    // The kernel frees the program's pages, too, so that the job may stall.
    let job = factory.submit(&format!("cp {} own && chmod 700 own && ./own", program.display()));
    factory.wait_held_or_ended(job).await;
    let worker = factory.server.job(job).worker.expect("it had a worker");
    match factory.server.worker(worker).hold {
        Some(hold) => {
            println!("{}", hold.reason);
            assert!(hold.reason.contains("stalled for 60 s"), "{}", hold.reason);
            assert_eq!(factory.wait_for_end(job).await.state(), "failed");
            factory.server.release(worker).unwrap();
        }
        None => {
            factory
                .wait_for_line(job, "blocked: anonymous: ended by SIGKILL")
                .await
        }
    }
    // The slot works.
    factory.wait_completed(factory.submit("echo next")).await;
    factory.finish().await;
}

#[test]
#[ignore = "needs the memory controller and some swap: tests/machine/run limits"]
fn row_51_swap_is_not_there_unless_the_slot_says_how_much() {
    assert!(has_controller("memory"), "no memory controller here");
    let swaps = fs::read_to_string("/proc/swaps").unwrap();
    assert!(swaps.lines().count() > 1, "no swap here: {swaps}");
    let test = TestHelper::with(&slots(&[
        ("a", &format!("memory = {LIMIT}")),
        ("c", &format!("memory = {LIMIT}\nswap = {LIMIT}")),
    ]));
    let client = test.client();

    let without = create_worker(&client, "a");
    bomb(&client, without, "anonymous");
    assert!(killed_for_memory(&test, without) > 0);
    assert_eq!(number(&test, without, "memory.swap.max"), 0);
    assert_eq!(number(&test, without, "memory.swap.peak"), 0);

    let with = create_worker(&client, "c");
    let more = (LIMIT / 2 * 3).to_string();
    attack(&client, with, "memory-hold", &["anonymous", &more]);
    assert_eq!(state(&client, with), State::Exited(Exit::Status(0)));
    assert_eq!(killed_for_memory(&test, with), 0);
    let swapped = number(&test, with, "memory.swap.peak");
    assert!((1..=LIMIT).contains(&swapped), "{swapped}");
    test.delete(&[with]);

    let with = create_worker(&client, "c");
    bomb(&client, with, "anonymous");
    assert!(killed_for_memory(&test, with) > 0);
    let swapped = number(&test, with, "memory.swap.peak");
    assert!((LIMIT / 2..=LIMIT).contains(&swapped), "{swapped}");
    test.finish(&[without, with]);
}

#[test]
#[ignore = "needs the cpu controller: tests/machine/run limits"]
fn row_52_processors_are_taken_away_in_every_period_from_a_job_that_wants_more() {
    assert!(has_controller("cpu"), "no cpu controller here");
    let test = TestHelper::with(&slots(&[("a", "cpus = 0.5"), ("c", "cpus = 0.1"), ("d", "")]));
    let client = test.client();
    let [half, tenth] = ["a", "c"].map(|slot| create_worker(&client, slot));
    for worker in [half, tenth] {
        // The agent itself is slowed down, so this takes what it takes.
        ongoing(&client, worker, "spin", &["4"], "ready");
    }
    // The neighbour gets its work done.
    let neighbour = create_worker(&client, "d");
    attack(&client, neighbour, "take-a-little", &[]);
    for (worker, of_each_period) in [(half, 50_000), (tenth, 10_000)] {
        // The kernel's own count of periods of 100 ms is the clock.
        let stat = until(|| {
            let stat = numbers(&test, worker, "cpu.stat");
            match stat["nr_periods"] >= 50 {
                true => Ok(stat),
                false => Err(format!("{stat:?}")),
            }
        });
        let periods = stat["nr_periods"];
        assert!(stat["nr_throttled"] > periods / 2, "{stat:?}");
        // What is overdrawn in a period, by a tick on each processor, is paid back in the next ones.
        let most = (periods + 2) * of_each_period * 11 / 10 + 50_000;
        assert!(stat["usage_usec"] <= most, "at most {most}: {stat:?}");
        println!("{of_each_period} of each 100000 µs: {stat:?}");
    }
    test.finish(&[half, tenth, neighbour]);
}

#[test]
#[ignore = "needs the pids controller: tests/machine/run limits"]
fn row_53_processes_and_threads_are_counted_by_the_cgroup_too() {
    assert!(has_controller("pids"), "no pids controller here");
    let test = TestHelper::with(&slots(&[("a", "processes = 64\nopen_files = 256"), ("c", "")]));
    let client = test.client();
    let (greedy, modest) = (create_worker(&client, "a"), create_worker(&client, "c"));
    let watches = fs::read_to_string("/proc/sys/fs/inotify/max_user_instances").unwrap();
    ongoing(
        &client,
        greedy,
        "exhaust-limits",
        &["64", "256", watches.trim()],
        "ready",
    );
    attack(&client, modest, "take-a-little", &[]);
    assert_eq!(number(&test, greedy, "pids.max"), 64);
    let peak = number(&test, greedy, "pids.peak");
    assert!((60..=64).contains(&peak), "{peak}");
    test.finish(&[greedy, modest]);
}
