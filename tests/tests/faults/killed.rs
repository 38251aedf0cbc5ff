//! Row 77: the kernel's killer takes one of the factory's processes. It does so with SIGKILL, as these tests do: where
//! the memory controller is cgroup v1's, no job can be brought over a limit.

use protocol::{ErrorKind, Exit, Reply, Request, State};
use testbed::harness::sealed;
use testbed::stage::{Stage, created, install, run};
use testbed::tracer::service::listener;

use super::*;

/// The job's worker is failed on the server with this reason, once; its console is in the log; it is held, and goes
/// when it is released. Another job then runs in the slot.
async fn is_failed_and_held(house: House, job: Ulid, reason: &str) {
    let done = house.ended(job).await;
    assert_eq!(done.state(), "failed");
    let held = house.held(job).await;
    let why = &held.hold.as_ref().unwrap().reason;
    assert!(why.contains(reason), "{why}");
    let console = lines(&done, "console").join("\n");
    assert!(console.contains("bootstrapped as worker"), "{console}");
    house.polls(3).await;
    once(
        &house.supervisor.log,
        0,
        &["WARN", &held.id.to_string(), "the worker is broken", reason],
    );
    assert!(
        !house.server.worker(held.id).deleted,
        "what a person should see is gone"
    );
    house.server.release(held.id).unwrap();
    let next = house.submit("echo next");
    house.completed(next).await;
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_77_an_agent_that_is_killed_fails_its_job_with_the_reason() {
    let house = House::new(ONE).await;
    let job = house.running().await;
    let all = processes(&house, job);
    let agent = all.iter().find(|(_, line)| line.contains("agent/agent run"));
    let (agent, _) = agent.unwrap_or_else(|| panic!("no agent in {all:?}"));
    kill(*agent, Signal::SIGKILL).unwrap();
    is_failed_and_held(house, job, "the agent was ended by signal 9").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_77_a_workers_pid_1_that_is_killed_fails_its_job_with_the_reason() {
    let house = House::new(ONE).await;
    let job = house.running().await;
    kill(pid_1(&house, job), Signal::SIGKILL).unwrap();
    is_failed_and_held(house, job, "the agent was killed, or lost in a reboot").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_77_a_killed_helper_is_away_for_the_supervisor_and_the_job_goes_on() {
    let mut house = House::new(TWO).await;
    let job = house.running().await;
    house.end_helper(Signal::SIGKILL);
    let parts = ["ERROR helper away", "helper.sock", "start the helper"];
    house.told(&parts);
    // Nothing is leased that could not be begun.
    let next = house.submit("echo next");
    house.polls(3).await;
    assert!(house.server.job(next).queued());
    once(&house.supervisor.log, 0, &parts);
    house.helper = house.host.helper();
    house.told(&["helper back"]);
    house.completed(next).await;
    house.let_end();
    house.completed(job).await;
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_77_a_connections_process_that_is_killed_costs_its_request_and_no_job() {
    let mut house = House::new(ONE).await;
    let job = house.running().await;
    // Every process of the helper's cgroup serves a connection, but the daemon and its listener.
    let cgroup = house.host.cgroup_dir().join("daemon/cgroup.procs");
    let daemon = house.helper.pid();
    let service = [daemon, listener(daemon)].map(|pid| pid.to_string());
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
    }
    house.let_end();
    house.completed(job).await;
    house.end_supervisor(Signal::SIGTERM);
    house.supervisor = house.host.supervisor();
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_75_a_reboot_fails_the_jobs_that_ran_and_blocks_no_slot() {
    let mut house = House::new(TWO).await;
    let job = house.running().await;
    let worker = worker_of(&house, job);
    // All processes end, and what is in memory is gone: /run, and the cgroups.
    house.end_supervisor(Signal::SIGKILL);
    house.end_helper(Signal::SIGKILL);
    let cgroup = house.host.cgroup_dir().join("workers").join(worker.to_string());
    fs::write(cgroup.join("cgroup.kill"), "1").unwrap();
    while fs::remove_dir(&cgroup).is_err() {
        std::thread::yield_now();
    }
    fs::remove_dir_all(house.host.root.join("run")).unwrap();
    house.helper = house.host.helper();
    house.supervisor = house.host.supervisor();
    let done = house.ended(job).await;
    assert_eq!(done.state(), "failed");
    let held = house.held(job).await;
    let reason = held.hold.as_ref().unwrap().reason.clone();
    assert!(
        reason.contains("while the server still counted on it"),
        "{reason}"
    );
    // The other slot goes on, and this one after the release.
    let next = house.submit("echo next");
    house.completed(next).await;
    house.server.release(held.id).unwrap();
    house.finish().await;
}

#[test]
fn a_connection_that_outlived_its_helper_says_so_and_the_worker_is_made_on_a_new_one() {
    let mut stage = Stage::new();
    let client = stage.client();
    let worker = created(&client, "a");
    stage.helper.signal(Signal::SIGKILL);
    stage.helper.wait();
    stage.helper = stage.host.helper();
    let agent = || sealed(b"#!/bin/bash\nsleep 1000 & exit 0\n");
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
    let (reply, _) = install(&stage.client(), worker, agent());
    assert_eq!(reply, Reply::AgentStarted);
    stage.finish(&[worker]);
}

#[test]
fn a_helper_that_hangs_gives_the_worker_up_in_time_and_takes_it_up_again() {
    let stage = Stage::new();
    let client = stage.client();
    let worker = created(&client, "a");
    // As one that waits in a mount: it takes orders, and carries none out.
    stage.helper.signal(Signal::SIGSTOP);
    let (reply, _) = install(&client, worker, sealed(b"#!/bin/bash\nsleep 1000 & exit 0\n"));
    let Reply::Error(error) = reply else {
        panic!("{reply:?}")
    };
    assert_eq!(error.kind, ErrorKind::Busy);
    assert!(error.message().contains("state D in ps, and repeat"), "{error}");
    // The lock is free: the worker can be deleted, and another made.
    assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    let next = created(&client, "a");
    stage.helper.signal(Signal::SIGCONT);
    let (state, console) = run(&client, next, "echo runs; exit 3");
    assert_eq!((state, console.trim()), (State::Exited(Exit::Status(3)), "runs"));
    // Nothing was done for the one that is gone.
    assert!(
        !stage
            .host
            .cgroup_dir()
            .join("workers")
            .join(worker.to_string())
            .exists()
    );
    stage.finish(&[next]);
}
