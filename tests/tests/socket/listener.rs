//! The process that accepts connections: it runs as long as the monitor, and no longer; and while it does not accept,
//! clients are told why.

use std::time::Duration;

use nix::sys::signal::kill;
use nix::unistd::Pid;
use testbed::service_manager::Service;
use testbed::tracer::helper::{
    Connections, KillPlan, KillPoint, TracedKind, WatchPeriod, children, listener, watch,
};
use testbed::tracer::wait_until_stopped;

use super::*;

fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid as i32), signal).expect("it is running");
}

/// Is there no such process, or only what is left of it until it is waited for?
fn is_gone(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ")
        .next()
        .is_none_or(|rest| rest.is_empty() || rest.starts_with('Z'))
}

fn wait_until_gone(pid: u32) {
    until_is(&format!("the end of process {pid}"), || is_gone(pid));
}

#[test]
fn a_listener_that_is_killed_is_replaced_at_most_once_a_second_and_its_sessions_go_on() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    let monitor = test.helper.pid();
    let killed = |pid: u32| {
        signal(pid, Signal::SIGKILL);
        wait_until_gone(pid);
        let next = listener(monitor);
        assert_ne!(next, pid);
        (next, Instant::now())
    };
    let (second, seen) = killed(listener(monitor));
    // This one has hardly begun.
    let (_, seen_again) = killed(second);
    let passed = seen_again - seen;
    assert!(
        passed > Duration::from_millis(500),
        "the next came after {passed:?}"
    );
    assert_eq!(list(&test.client()).len(), 1);
    let logged = [
        "WARN",
        "the process that accepts connections has ended (signal: 9 (SIGKILL))",
    ];
    test.helper.log.wait_for_exactly(2, 0, &logged);
    // The session of the first asks the monitor all the same.
    let (reply, _) = install(&client, worker, sealed_memfd(b"#!/bin/bash\nexec sleep 1000\n"));
    assert_eq!(reply, Reply::AgentStarted);
    test.finish(&[worker]);
}

#[test]
fn a_listener_ends_with_its_monitor_and_sessions_go_on() {
    for how in [Signal::SIGTERM, Signal::SIGKILL] {
        let mut test = TestHelper::new();
        let client = test.client();
        let worker = create_worker(&client, "a");
        let old = listener(test.helper.pid());
        let [session] = children(old)[..] else {
            panic!("one session serves {client:?}")
        };
        test.helper.signal(how);
        assert_eq!(test.helper.wait().success(), how == Signal::SIGTERM);
        wait_until_gone(old);
        assert_eq!(list(&client).len(), 1, "after {how}");
        assert!(!is_gone(session), "after {how}");
        // What takes the monitor is to be asked on a new connection.
        let (reply, _) = install(&client, worker, sealed_memfd(b"#!/bin/bash\nexec sleep 1000\n"));
        assert_eq!(kind(reply), ErrorKind::Busy, "after {how}");
        test.helper = test.host.start_helper();
        assert_eq!(list(&test.client()).len(), 1);
        drop(client);
        test.finish(&[worker]);
    }
}

/// A helper whose listener stops where it would install its filter, as one does that the kernel keeps there. Returns
/// the listener.
fn stopped_before_its_filter(helper: &mut Service) -> u32 {
    let monitor = helper.start_stopped();
    wait_until_stopped(monitor);
    let plan = KillPlan {
        kind: TracedKind::Listener,
        when: KillPoint::First(libc::SYS_seccomp),
        all: false,
        hangs: Some(Connections::GoOn),
    };
    let seen = watch(monitor, WatchPeriod::Start, Some(plan))
        .join()
        .expect("the tracer does not fail");
    assert!(seen.killed.is_some(), "no listener installs a filter");
    // What has built the first root file system may still be a child, too.
    listener(monitor)
}

#[test]
fn a_listener_that_cannot_install_its_filter_is_logged_until_it_can() {
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", 0, SLOTS);
    let mut helper = Service::new(&mut host.helper_command());
    let listener = stopped_before_its_filter(&mut helper);
    let early = Client::connect(&host);
    let sentence = [
        "has accepted no connection for 1",
        "seccomp",
        "bpf_prog_free_deferred",
        "reboot",
    ];
    helper.log.wait(&[
        "ERROR",
        &format!("process {listener} "),
        sentence[0],
        sentence[1],
        sentence[2],
        sentence[3],
    ]);
    // One that has waited, one that has greeted, and one after the other: nothing is read of any.
    let greeting = Client::connect(&host);
    let hello = Request::Hello {
        version: protocol::VERSION,
    };
    let _ = greeting.socket.send(&wire::encode(&hello).unwrap(), None);
    for client in [early, greeting, Client::connect(&host)] {
        // The kernel tells first that the connection was reset, where there was something to read.
        let (reply, _) = client.reply().or_else(|| client.reply()).expect("an answer");
        let Reply::Error(error) = reply else {
            panic!("{reply:?}")
        };
        assert_eq!(error.kind, ErrorKind::Busy);
        for part in sentence {
            assert!(
                error.message().contains(part),
                "{part} is not in {}",
                error.message()
            );
        }
        assert!(client.reply().is_none(), "it is answered once");
    }
    helper.log.wait_for_exactly(1, 0, &["ERROR"]);
    assert_eq!(helper.log.count(&["serving"]), 0);
    signal(listener, Signal::SIGCONT);
    helper.log.wait(&["serving"]);
    assert_eq!(list(&Client::new(&host)), []);
}

#[test]
fn a_listener_that_outlives_its_monitor_accepts_no_connection() {
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", 0, SLOTS);
    let mut helper = Service::new(&mut host.helper_command());
    let listener = stopped_before_its_filter(&mut helper);
    let waiting = Client::connect(&host);
    helper.signal(Signal::SIGKILL);
    helper.wait_for_end();
    signal(listener, Signal::SIGCONT);
    wait_until_gone(listener);
    assert!(waiting.reply().is_none(), "it was answered");
}

#[test]
fn a_changed_configuration_is_read_by_one_session_and_known_to_the_next() {
    let test = TestHelper::new();
    let mut workers = Vec::new();
    let mut reads = |name: &str| {
        let watcher = watch(test.helper.pid(), WatchPeriod::OneConnection, None);
        let client = test.client();
        workers.push(create_worker(&client, name));
        drop(client);
        let seen = watcher.join().expect("the tracer does not fail");
        let calls = seen.calls[&TracedKind::Session].iter();
        calls.filter(|call| **call == libc::SYS_read).count()
    };
    let known = reads("a");
    let more = "[slots.d]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n";
    test.host
        .configure("http://127.0.0.1:9", 0, &(SLOTS.to_owned() + more));
    let (first, second) = (reads("d"), reads("c"));
    assert!(first > known, "{first} reads, and {known} before it changed");
    assert_eq!(second, known, "{first} by the one before");
    test.finish(&workers);
}
