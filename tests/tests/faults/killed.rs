//! Row 77: the kernel's killer takes one of the factory's processes. It does so with SIGKILL, as these tests do: where
//! the memory controller is cgroup v1's, no job can be brought over a limit.

use protocol::{ErrorKind, Exit, Reply, Request, State};
use testbed::harness::sealed_memfd;
use testbed::test_helper::{TestHelper, create_worker, install, run};
use testbed::tracer::helper::listener;

use super::*;

/// The job's worker is failed on the server with this reason, once; its console is in the log; it is held, and goes
/// when it is released. Another job then runs in the slot.
async fn is_failed_and_held(factory: TestFactory, job: Ulid, reason: &str) {
    let done = factory.wait_for_end(job).await;
    assert_eq!(done.state(), "failed");
    let held = factory.wait_held(job).await;
    let why = &held.hold.as_ref().unwrap().reason;
    assert!(why.contains(reason), "{why}");
    let console = lines(&done, "console").join("\n");
    assert!(console.contains("bootstrapped as worker"), "{console}");
    factory.wait_polls(3).await;
    once(
        &factory.supervisor.log,
        0,
        &["WARN", &held.id.to_string(), "the worker is broken", reason],
    );
    assert!(
        !factory.server.worker(held.id).deleted,
        "what an operator should see is gone"
    );
    factory.server.release(held.id).unwrap();
    let next = factory.submit("echo next");
    factory.wait_completed(next).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_77_an_agent_that_is_killed_fails_its_job_with_the_reason() {
    let factory = TestFactory::new(ONE).await;
    let job = factory.start_blocking_job().await;
    let all = processes(&factory, job);
    let agent = all.iter().find(|(_, line)| line.contains("agent/agent run"));
    let (agent, _) = agent.unwrap_or_else(|| panic!("no agent in {all:?}"));
    kill(*agent, Signal::SIGKILL).unwrap();
    is_failed_and_held(factory, job, "the agent was ended by signal 9").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_77_a_workers_pid_1_that_is_killed_fails_its_job_with_the_reason() {
    let factory = TestFactory::new(ONE).await;
    let job = factory.start_blocking_job().await;
    // Pid 1 copies the console: what it has not copied yet is lost with it.
    let worker = worker_of(&factory, job).to_string();
    until_is("a line on the console", || {
        let (_, console) = command(&factory.host, &["logs", &worker]);
        console.contains("bootstrapped as worker")
    });
    kill(pid_1(&factory, job), Signal::SIGKILL).unwrap();
    is_failed_and_held(factory, job, "the agent was killed, or lost in a reboot").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_77_a_killed_helper_is_away_for_the_supervisor_and_the_job_goes_on() {
    let mut factory = TestFactory::new(TWO).await;
    let job = factory.start_blocking_job().await;
    factory.end_helper(Signal::SIGKILL);
    let unreachable = ["ERROR helper unreachable"];
    let line = factory.wait_for_log(&unreachable);
    // A call that it was about to answer has ended otherwise.
    let is_explained = [
        "start the helper",
        "closed the connection without an answer: see its log",
    ];
    assert!(is_explained.iter().any(|part| line.contains(part)), "{line}");
    // Nothing is leased that could not be begun.
    let next = factory.submit("echo next");
    factory.wait_polls(3).await;
    assert!(factory.server.job(next).is_queued());
    once(&factory.supervisor.log, 0, &unreachable);
    factory.helper = factory.host.start_helper();
    factory.wait_for_log(&["helper back"]);
    factory.wait_completed(next).await;
    factory.release();
    factory.wait_completed(job).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_77_a_session_that_is_killed_fails_its_request_and_no_job() {
    let mut factory = TestFactory::new(ONE).await;
    let job = factory.start_blocking_job().await;
    // Every process of the helper's cgroup serves a connection, but the monitor and its listener.
    let cgroup = factory.host.cgroup_dir().join("daemon/cgroup.procs");
    let monitor = factory.helper.pid();
    let service = [monitor, listener(monitor)].map(|pid| pid.to_string());
    let mut killed = 0;
    while killed < 3 {
        for pid in fs::read_to_string(&cgroup)
            .unwrap()
            .lines()
            .filter(|pid| !service.iter().any(|other| other == pid))
        {
            // It may have ended by itself.
            killed += usize::from(kill(Pid::from_raw(pid.parse().unwrap()), Signal::SIGKILL).is_ok());
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    factory.release();
    factory.wait_completed(job).await;
    factory.end_supervisor(Signal::SIGTERM);
    factory.supervisor = factory.host.start_supervisor();
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_75_a_reboot_fails_the_jobs_that_ran_and_blocks_no_slot() {
    let mut factory = TestFactory::new(TWO).await;
    let job = factory.start_blocking_job().await;
    let worker = worker_of(&factory, job);
    // All processes end, and what is in memory is gone: /run, and the cgroups.
    factory.end_supervisor(Signal::SIGKILL);
    factory.end_helper(Signal::SIGKILL);
    let cgroup = factory.host.cgroup_dir().join("workers").join(worker.to_string());
    fs::write(cgroup.join("cgroup.kill"), "1").unwrap();
    until_is("that the cgroup can be removed", || {
        fs::remove_dir(&cgroup).is_ok()
    });
    fs::remove_dir_all(factory.host.root.join("run")).unwrap();
    factory.helper = factory.host.start_helper();
    factory.supervisor = factory.host.start_supervisor();
    let done = factory.wait_for_end(job).await;
    assert_eq!(done.state(), "failed");
    let held = factory.wait_held(job).await;
    let reason = held.hold.as_ref().unwrap().reason.clone();
    assert!(reason.contains("before its job was done"), "{reason}");
    // The other slot goes on, and this one after the release.
    let next = factory.submit("echo next");
    factory.wait_completed(next).await;
    factory.server.release(held.id).unwrap();
    factory.finish().await;
}

#[test]
fn a_connection_that_outlived_its_helper_says_so_and_the_worker_is_made_on_a_new_one() {
    let mut test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    test.helper.signal(Signal::SIGKILL);
    test.helper.wait();
    test.helper = test.host.start_helper();
    let agent = || sealed_memfd(b"#!/bin/bash\nsleep 1000 & exit 0\n");
    let (reply, _) = install(&client, worker, agent());
    let Reply::Error(error) = reply else {
        panic!("{reply:?}")
    };
    // Not Failed: no job is failed for that.
    assert_eq!(error.kind, ErrorKind::Busy);
    assert!(
        error.message().contains("the helper was restarted: repeat"),
        "{error}"
    );
    let (reply, _) = install(&test.client(), worker, agent());
    assert_eq!(reply, Reply::AgentStarted);
    test.finish(&[worker]);
}

#[test]
fn a_worker_whose_helper_call_hangs_is_given_up_in_time_and_taken_up_again() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    // As one that waits in a mount: it accepts requests, and carries none out.
    test.helper.signal(Signal::SIGSTOP);
    let (reply, _) = install(
        &client,
        worker,
        sealed_memfd(b"#!/bin/bash\nsleep 1000 & exit 0\n"),
    );
    let Reply::Error(error) = reply else {
        panic!("{reply:?}")
    };
    assert_eq!(error.kind, ErrorKind::Busy);
    assert!(error.message().contains("state D in ps, and repeat"), "{error}");
    // The lock is free: the worker can be deleted, and another made.
    assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    let next = create_worker(&client, "a");
    test.helper.signal(Signal::SIGCONT);
    let (state, console) = run(&client, next, "echo runs; exit 3");
    assert_eq!((state, console.trim()), (State::Exited(Exit::Status(3)), "runs"));
    // Nothing was done for the one that is gone.
    assert!(
        !test
            .host
            .cgroup_dir()
            .join("workers")
            .join(worker.to_string())
            .exists()
    );
    test.finish(&[next]);
}
