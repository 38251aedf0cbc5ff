//! Group D: a hostile job; what it attempts is in `hostile-job`'s module of the same name.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::inotify::AddWatchFlags;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protocol::{Exit, Reply, Request, State, WorkerId};
use testbed::harness::{Running, TEST_TIMEOUT, TestHost, binaries, has_controller, until_is};
use testbed::host_snapshot::processes_of;
use testbed::small_disk::{SmallDisk, small};
use testbed::test_helper::{
    TestHelper, attack, create_worker, read, start_attack, state, wait_for_line, wait_until, watch,
};

use crate::attacks::leftovers::ongoing;

/// What a timer may have of its own: its stack, and what it changed of the memory that it was forked with.
const TIMER_KIB: u64 = 256;

/// Slots with these limits: a slot's name and the lines of its table `limits`.
pub fn slots(all: &[(&str, &str)]) -> String {
    let one = |(name, limits): &(&str, &str)| {
        format!("[slots.{name}]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n[slots.{name}.limits]\n{limits}\n")
    };
    all.iter().map(one).collect()
}

/// Start a helper that refuses its configuration, and return its last words.
pub fn refused(host: &TestHost) -> String {
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

/// The helper refuses a limit that this machine cannot enforce, and where the operator settles for less it
/// warns and serves.
fn refused_or_warned(controller: &str, key: &str, line: &str) -> TestHelper {
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
    let test = TestHelper::with(&slots(&[
        ("a", &format!("{line}\nbest_effort = true")),
        ("c", ""),
    ]));
    if !has_controller(controller) {
        let warned = test.helper.log.wait(&["NOT ENFORCED", key, "slot a"]);
        assert!(warned.contains("WARN"), "{warned}");
    }
    test
}

#[test]
fn row_51_memory_is_limited_or_the_helper_does_not_start_and_shared_memory_ends_at_the_limit() {
    // A job takes a hundred processes, and their kernel's memory counts.
    for (key, line) in [("memory", "memory = \"64M\""), ("swap", "swap = \"1G\"")] {
        let test = refused_or_warned("memory", key, line);
        let client = test.client();
        let worker = create_worker(&client, "a");
        // Where there is a controller, the page cache of this much shared memory would be over the limit first.
        if key == "memory" && !has_controller("memory") {
            attack(&client, worker, "shared-memory", &[&(64 << 20).to_string()]);
        } else {
            attack(&client, worker, "take-a-little", &[]);
        }
        test.finish(&[worker]);
    }
}

#[test]
fn row_52_processors_are_limited_or_the_helper_does_not_start() {
    let test = refused_or_warned("cpu", "cpus", "cpus = 1");
    let client = test.client();
    let worker = create_worker(&client, "a");
    attack(&client, worker, "take-a-little", &[]);
    test.finish(&[worker]);
}

#[test]
fn row_53_a_job_that_takes_all_it_gets_finds_its_limits_and_its_neighbour_finds_enough() {
    let test = TestHelper::with(&slots(&[("a", "processes = 64\nopen_files = 256"), ("c", "")]));
    let client = test.client();
    let (greedy, modest) = (create_worker(&client, "a"), create_worker(&client, "c"));
    let watches = fs::read_to_string("/proc/sys/fs/inotify/max_user_instances").unwrap();
    let args = ["64", "256", watches.trim()];
    let console = ongoing(&client, greedy, "exhaust-limits", &args, "ready");
    for what in [
        "threads",
        "open files",
        "inotify",
        "queues",
        "signals",
        "terminals",
        "processes",
    ] {
        assert!(
            console.contains(&format!("blocked: {what}: ")),
            "{what}\n{console}"
        );
    }
    attack(&client, modest, "take-a-little", &[]);
    assert_eq!(state(&client, greedy), State::Running);
    test.finish(&[greedy, modest]);
}

#[test]
fn row_55_endless_output_is_cut_and_the_job_goes_on_to_its_own_end() {
    const KEPT: u64 = 64 << 10;
    let test = TestHelper::with(&slots(&[("a", "console = \"64K\"")]));
    let client = test.client();
    for output in ["no-newline", "escapes", "nuls"] {
        let worker = create_worker(&client, "a");
        let console = start_attack(&client, worker, "print-much", &[output]);
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
    test.finish(&[]);
}

#[test]
fn row_56_a_job_that_does_not_end_is_ended_with_all_its_processes_however_much_it_prints() {
    let test = TestHelper::with(&slots(&[
        ("a", "run_time_seconds = 10"),
        ("c", "run_time_seconds = 10"),
    ]));
    let client = test.client();
    let (idle, noisy) = (create_worker(&client, "a"), create_worker(&client, "c"));
    let console = start_attack(&client, idle, "never-end", &["idle"]);
    // It begins shortly before its limit, so that the tests beside this one get their share of the processors.
    start_attack(&client, noisy, "never-end", &["noisy", "7"]);
    wait_for_line(&console, "ready");
    for worker in [idle, noisy] {
        let ended = wait_until(&client, worker, |state| state != State::Running);
        assert_eq!(ended, State::Exited(Exit::TimedOut));
    }
    until_is("the end of all", || processes_of(&test.host.uids).is_empty());
    assert_started(&test, noisy);
    let text = read(&console);
    assert!(
        text.contains("[the agent has run as long as the slot lets it]"),
        "{text}"
    );
    test.finish(&[idle, noisy]);
}

#[test]
fn row_56_a_job_that_ends_before_its_time_is_not_ended_by_it() {
    let test = TestHelper::with(&slots(&[("a", "run_time_seconds = 60")]));
    let client = test.client();
    let worker = create_worker(&client, "a");
    let console = attack(&client, worker, "write-much", &["1", "1"]);
    assert_eq!(state(&client, worker), State::Exited(Exit::Status(0)));
    assert!(!console.contains("as long as the slot lets it"), "{console}");
    test.finish(&[worker]);
}

/// The sandbox's pid 1: the first process in the worker's cgroup.
fn first_process(host: &TestHost, worker: WorkerId) -> Pid {
    let procs = fs::read_to_string(
        host.cgroup_dir()
            .join("workers")
            .join(worker.to_string())
            .join("cgroup.procs"),
    )
    .unwrap();
    let is_first = |pid: &&str| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let namespaces = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
        namespaces.is_some_and(|pids| pids.split_whitespace().last() == Some("1"))
    };
    let first = procs.lines().find(is_first).expect("a job has a pid 1");
    Pid::from_raw(first.parse().unwrap())
}

/// Wait until no process of the worker is left, without asking the helper.
fn wait_until_empty(host: &TestHost, worker: WorkerId) {
    let cgroup = host.cgroup_dir().join("workers").join(worker.to_string());
    let events = cgroup.join("cgroup.events");
    let is_empty = || fs::read_to_string(&events).unwrap().contains("populated 0");
    assert!(
        watch(&events, AddWatchFlags::IN_MODIFY, is_empty),
        "the job goes on"
    );
}

#[test]
fn row_91_the_run_time_limit_holds_for_a_job_whose_pid_1_does_nothing() {
    let mut test = TestHelper::with(&slots(&[
        ("a", "run_time_seconds = 10"),
        ("c", "run_time_seconds = 10"),
    ]));
    let client = test.client();
    let (one, other) = (create_worker(&client, "a"), create_worker(&client, "c"));
    let console = start_attack(&client, one, "never-end", &["idle"]);
    wait_for_line(&console, "ready");
    wait_for_line(&start_attack(&client, other, "never-end", &["idle"]), "ready");
    // A job that starves its pid 1 gets no further than this.
    for worker in [one, other] {
        kill(first_process(&test.host, worker), Signal::SIGSTOP).unwrap();
    }
    drop(client);
    // The helper is not running when the time is over.
    test.helper.signal(Signal::SIGKILL);
    test.helper.wait();
    for worker in [one, other] {
        wait_until_empty(&test.host, worker);
    }
    test.helper = test.host.start_helper();
    let client = test.client();
    for worker in [one, other] {
        assert_eq!(state(&client, worker), State::Exited(Exit::TimedOut));
    }
    assert!(read(&console).ends_with("[the agent has run as long as the slot lets it]\n"));
    drop(client);
    test.finish(&[one, other]);
}

#[test]
fn row_91_the_run_time_limit_holds_beside_thousands_of_threads_and_endless_output() {
    // All of the load must begin before: an emulated machine takes longer for that.
    let limit = TEST_TIMEOUT / 30;
    let limits = format!("run_time_seconds = {}\nconsole = \"64K\"", limit.as_secs());
    let test = TestHelper::with(&slots(&[("a", &limits)]));
    let client = test.client();
    let worker = create_worker(&client, "a");
    let begin = Instant::now();
    let console = start_attack(&client, worker, "never-end", &["threads", "7"]);
    wait_for_line(&console, "ready");
    // Both its pid 1 and the supervisor do nothing from now on.
    kill(first_process(&test.host, worker), Signal::SIGSTOP).unwrap();
    drop((client, console));
    wait_until_empty(&test.host, worker);
    let took = begin.elapsed();
    // The limit, the five seconds that the timer leaves to pid 1, and what two thousand threads hold the test up.
    assert!(took < limit + Duration::from_secs(5 + 30), "{took:?}");
    assert_eq!(state(&test.client(), worker), State::Exited(Exit::TimedOut));
    assert_started(&test, worker);
    test.finish(&[worker]);
}

/// All four processes of `never-end` were at it before the worker was ended.
fn assert_started(test: &TestHelper, worker: WorkerId) {
    let work = test.host.worker_dir(worker).join("fs/work");
    let started = (0..4).filter(|process| work.join(format!("started-{process}")).exists());
    assert_eq!(started.count(), 4, "the limit came before the load");
}

/// The timers of all workers: who has a `cgroup.kill` open among the helper's processes.
fn timers(host: &TestHost) -> Vec<String> {
    let processes = fs::read_to_string(host.cgroup_dir().join("daemon/cgroup.procs")).unwrap();
    let is_timer = |pid: &&str| {
        let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            return false;
        };
        let mut paths = descriptors
            .flatten()
            .filter_map(|entry| fs::read_link(entry.path()).ok());
        paths.any(|path| path.ends_with("cgroup.kill"))
    };
    processes.lines().filter(is_timer).map(str::to_owned).collect()
}

#[test]
fn row_91_a_timer_takes_little_memory_and_ends_with_its_worker() {
    let test = TestHelper::with(&slots(&[("a", "run_time_seconds = 3600"), ("c", "")]));
    let client = test.client();
    let [timed, other] = ["a", "c"].map(|slot| create_worker(&client, slot));
    for worker in [timed, other] {
        let console = start_attack(&client, worker, "never-end", &["idle"]);
        wait_for_line(&console, "ready");
    }
    let [timer] = &timers(&test.host)[..] else {
        panic!("one worker has a timer: {:?}", timers(&test.host));
    };
    let memory = fs::read_to_string(format!("/proc/{timer}/smaps_rollup")).unwrap();
    let private: u64 = memory
        .lines()
        .filter(|line| line.starts_with("Private_"))
        .map(|line| line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap())
        .sum();
    println!("a timer has {private} KiB of its own");
    assert!(private < TIMER_KIB, "{memory}");
    let own = fs::read_to_string(format!("/proc/{timer}/status")).unwrap();
    assert!(own.contains("CapPrm:\t0000000000000000"), "{own}");
    test.delete(&[timed]);
    until_is("the timers' end", || timers(&test.host).is_empty());
    test.finish(&[other]);
}

#[test]
fn row_91_the_run_time_limit_holds_for_a_job_that_has_filled_the_disk() {
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", 0, &slots(&[("a", "run_time_seconds = 10")]));
    let disk = SmallDisk::in_memory(&host);
    let test = TestHelper::on(host, Some(disk));
    let client = test.client();
    let worker = create_worker(&client, "a");
    wait_for_line(&start_attack(&client, worker, "never-end", &["idle"]), "ready");
    kill(first_process(&test.host, worker), Signal::SIGSTOP).unwrap();
    let disk = test.disk.as_ref().unwrap();
    disk.fill();
    // How it ended finds no room.
    let ended = wait_until(&client, worker, |state| state != State::Running);
    assert_eq!(ended, State::Exited(Exit::Unknown));
    disk.limit(&format!("size={},nr_inodes=1000", small()));
    test.finish(&[worker]);
}
