//! A session that dies between its request to the monitor and the answer.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protocol::{ErrorKind, Reply, Request, WorkerId, wire};
use testbed::harness::{Client, sealed_memfd, until};
use testbed::test_helper::{read, wait_for_line};
use testbed::tracer::helper::{Connections, KillPlan, KillPoint, TracedKind, children, listener};

use crate::crashes::kill_points::restartable_helper::{Operation, RestartableHelper, ask, prepare, request};

/// Wait for what another process does.
fn wait_for<T>(what: &str, find: impl Fn() -> Option<T>) -> T {
    until(|| find().ok_or_else(|| format!("{what}: it does not come")))
}

fn is(pid: u32, state: char) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ")
        .next()
        .is_some_and(|rest| rest.starts_with(state))
}

/// The worker's cgroup, by its inode: another than `but`.
fn cgroup(test: &RestartableHelper, worker: WorkerId, but: Option<u64>) -> Option<u64> {
    let path = test.host.cgroup_dir().join("workers").join(worker.to_string());
    let inode = fs::metadata(path).ok()?.ino();
    (Some(inode) != but).then_some(inode)
}

const AGENT: &[u8] = b"#!/bin/bash\necho ready\nsleep 1000 & exit 0\n";

#[test]
fn a_request_of_a_killed_session_is_not_carried_out() {
    let test = RestartableHelper::new();
    let worker = prepare(&test, Operation::Install, "rich");
    let listener = listener(test.helper.pid());
    // The session that made the worker is about to end.
    wait_for("its end", || children(listener).is_empty().then_some(()));
    let connected = |others: &[u32]| {
        let client = Client::new(&test.host);
        let new = |pid: &u32| !others.contains(pid);
        let pid = wait_for("the connection", || children(listener).into_iter().find(new));
        (client, pid)
    };
    let (first, first_pid) = connected(&[]);
    let (second, second_pid) = connected(&[first_pid]);
    test.helper.signal(Signal::SIGSTOP);
    let install = wire::encode(&request(Operation::Install, worker, "rich")).unwrap();
    let agent = sealed_memfd(AGENT);
    // Each has made a cgroup, and waits for the monitor, when its request is in the monitor's queue.
    first.socket.send(&install, Some(agent.as_fd())).unwrap();
    let one = wait_for("the first cgroup", || cgroup(&test, worker, None));
    wait_for("the first request", || is(first_pid, 'S').then_some(()));
    kill(Pid::from_raw(first_pid as i32), Signal::SIGKILL).unwrap();
    wait_for("its end", || {
        (!children(listener).contains(&first_pid) || is(first_pid, 'Z')).then_some(())
    });
    second.socket.send(&install, Some(agent.as_fd())).unwrap();
    wait_for("the second cgroup", || cgroup(&test, worker, Some(one)));
    wait_for("the second request", || is(second_pid, 'S').then_some(()));
    test.helper.signal(Signal::SIGCONT);
    let (reply, mut descriptors) = second.reply().expect("the helper answers");
    assert_eq!(reply, Reply::AgentStarted);
    let console = descriptors.pop().expect("a console comes").into();
    test.helper.log.wait(&[
        "a request was not carried out",
        "the session that sent it has exited",
    ]);
    wait_for_line(&console, "ready");
    assert_eq!(read(&console).matches("ready").count(), 1);
    assert_eq!(ask(&test.host, &Request::Delete { worker }), Some(Reply::Deleted));
    test.assert_clean(true, "the second request");
}

#[test]
fn a_first_process_that_hangs_is_ended_by_a_repetition_of_the_start() {
    let test = RestartableHelper::new();
    for call in [libc::SYS_setsid, libc::SYS_umount2] {
        let worker = prepare(&test, Operation::Install, "rich");
        let plan = KillPlan {
            kind: TracedKind::FirstProcess,
            when: KillPoint::First(call),
            all: false,
            hangs: Some(Connections::Die),
        };
        let install = request(Operation::Install, worker, "rich");
        let (reply, seen) = test.under_the_tracer(&install, Some(plan));
        assert!(reply.is_none() && seen.killed.is_some(), "{reply:?}");
        assert_eq!(ask(&test.host, &install), Some(Reply::AgentStarted));
        assert_eq!(ask(&test.host, &Request::Delete { worker }), Some(Reply::Deleted));
        test.assert_clean(true, "a first process that hung");
    }
}

#[test]
fn a_job_whose_filter_cannot_be_installed_says_so_in_time_and_a_repetition_ends_it() {
    let test = RestartableHelper::new();
    let worker = prepare(&test, Operation::Install, "rich");
    let plan = KillPlan {
        kind: TracedKind::FirstProcess,
        when: KillPoint::First(libc::SYS_seccomp),
        all: false,
        hangs: Some(Connections::GoOn),
    };
    let install = request(Operation::Install, worker, "rich");
    let begin = Instant::now();
    let (reply, seen) = test.under_the_tracer(&install, Some(plan));
    assert!(seen.killed.is_some(), "{reply:?}");
    let Some(Reply::Error(error)) = reply else {
        panic!("{reply:?}")
    };
    assert_eq!(error.kind, ErrorKind::Busy);
    for part in ["seccomp", "bpf_prog_free_deferred", "reboot the host"] {
        assert!(error.message().contains(part), "{}", error.message());
    }
    // Before the supervisor gives up.
    assert!(begin.elapsed().as_secs() < 55, "{:?}", begin.elapsed());
    assert_eq!(ask(&test.host, &install), Some(Reply::AgentStarted));
    assert_eq!(ask(&test.host, &Request::Delete { worker }), Some(Reply::Deleted));
    test.assert_clean(true, "a filter that was not installed");
}
