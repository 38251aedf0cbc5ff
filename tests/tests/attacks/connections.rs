//! Group E: many connections, half ones, and several about the same worker.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, getsockopt, send, shutdown, sockopt};
use protocol::{ErrorKind, Reply, Request, wire};
use testbed::harness::{Client, TEST_TIMEOUT, sealed_memfd, until, worker_id};
use testbed::test_helper::{TestHelper, create, create_worker, install, kind, list, token};
use testbed::tracer::descriptor_of;
use testbed::tracer::helper::{children, listener};

use super::HELLO;

/// Tells the other threads of a test that it is over, also when it fails.
pub struct StopOnDrop<'a>(pub &'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn row_61_ten_thousand_connections_leave_the_helper_as_it_was() {
    let test = TestHelper::new();
    let witness = test.client();
    for wave in 0..40 {
        let clients: Vec<Client> = (0..250).map(|_| Client::connect(&test.host)).collect();
        match wave % 4 {
            // Nothing is said at all.
            0 => {}
            // Half of a conversation: nothing more will come, or nothing will be read.
            1 => clients
                .iter()
                .for_each(|client| half_close(client, Shutdown::Write)),
            2 => clients
                .iter()
                .for_each(|client| half_close(client, Shutdown::Read)),
            _ => clients
                .iter()
                .for_each(|client| half_close(client, Shutdown::Both)),
        }
        drop(clients);
        assert_eq!(list(&witness), [], "the witness is not served any more");
    }
    test.finish(&[]);
}

fn half_close(client: &Client, how: Shutdown) {
    // The helper may have closed the connection already.
    let _ = client.socket.send(&wire::encode(&HELLO).unwrap(), None);
    let _ = shutdown(client.socket.as_raw_fd(), how);
}

#[test]
fn row_61_a_half_closed_connection_is_answered_and_ended() {
    let test = TestHelper::new();
    let client = Client::connect(&test.host);
    half_close(&client, Shutdown::Write);
    assert!(matches!(client.reply(), Some((Reply::Welcome, _))));
    assert!(client.reply().is_none(), "who says no more is kept");
    test.finish(&[]);
}

#[test]
fn row_61_a_peer_that_reads_nothing_has_its_connection_closed() {
    let test = TestHelper::new();
    let client_that_reads_nothing = test.client();
    let request = wire::encode(&Request::List { after: None }).unwrap();
    // Until there is room neither for an answer nor for a request: then the helper gives up.
    let end = loop {
        match send(
            client_that_reads_nothing.socket.as_raw_fd(),
            &request,
            MsgFlags::MSG_NOSIGNAL,
        ) {
            Ok(_) => {}
            Err(errno) => break errno,
        }
    };
    assert!(matches!(end, Errno::EPIPE | Errno::ECONNRESET), "{end}");
    test.helper.log.wait(&["closed the connection", "cannot answer"]);
    test.finish(&[]);
}

/// How many seconds each session of the helper waits for its peer: for a packet, and for room for an answer.
fn waits_of_sessions(test: &TestHelper) -> Vec<(i64, i64)> {
    let mut all = Vec::new();
    for session in children(listener(test.helper.pid())) {
        let open = fs::read_dir(format!("/proc/{session}/fd"))
            .into_iter()
            .flatten()
            .flatten();
        let numbers = open.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        for number in numbers.filter(|number| *number > 2) {
            // What is no socket has neither, and so has the way to the monitor.
            let copy = descriptor_of(session, number).ok();
            let wait = |fd: &OwnedFd| -> nix::Result<_> {
                let receive = getsockopt(fd, sockopt::ReceiveTimeout)?.tv_sec();
                Ok((receive, getsockopt(fd, sockopt::SendTimeout)?.tv_sec()))
            };
            let waits = copy.and_then(|fd| wait(&fd).ok());
            all.extend(waits.filter(|waits| *waits != (0, 0)));
        }
    }
    all.sort();
    all
}

#[test]
fn row_61_a_peer_that_says_nothing_has_ten_seconds_to_greet_and_then_an_hour() {
    let test = TestHelper::new();
    let begin = Instant::now();
    let silent = Client::connect(&test.host);
    let greeted = test.client();
    until(|| match waits_of_sessions(&test) {
        waits if waits == [(10, 10), (3600, 10)] => Ok(()),
        waits => Err(format!("{waits:?}")),
    });
    assert!(silent.reply().is_none(), "it was answered");
    assert!(begin.elapsed().as_secs() >= 9, "{:?}", begin.elapsed());
    test.helper
        .log
        .wait(&["closed the connection", "cannot receive", "EAGAIN"]);
    assert_eq!(waits_of_sessions(&test), [(3600, 10)]);
    assert_eq!(list(&greeted), []);
    drop(greeted);
    test.finish(&[]);
}

#[test]
fn row_61_a_connection_closed_before_the_answer_harms_no_other() {
    let test = TestHelper::new();
    let worker = worker_id();
    let slot = "a".parse().unwrap();
    let requests = [
        Request::CreateUser { worker, slot },
        Request::InstallAgent {
            worker,
            bootstrap: token(),
        },
        Request::Attach { worker },
        Request::Kill { worker },
        Request::Delete { worker },
        Request::List { after: None },
    ];
    for round in 0..5 {
        for request in &requests {
            let agent = sealed_memfd(b"#!/bin/bash\nexec sleep 1000\n");
            let agent = request.carries_descriptor().then_some(&agent);
            let client = test.client();
            let bytes = wire::encode(request).unwrap();
            client.socket.send(&bytes, agent.map(AsFd::as_fd)).unwrap();
        }
        assert_eq!(
            test.client().ask(&Request::Delete { worker }).0,
            Reply::Deleted,
            "round {round}"
        );
    }
    // A request that nobody waits for is still being done when Delete comes, and may be done after it.
    test.helper.log.wait_for_exactly(5, 0, &["request", "CreateUser"]);
    test.finish(&[worker]);
}

#[test]
fn row_64_the_same_worker_on_many_connections_is_made_once() {
    let test = TestHelper::new();
    let worker = worker_id();
    let replies: Vec<Reply> = std::thread::scope(|scope| {
        let asked: Vec<_> = (0..16)
            .map(|i| {
                let test = &test;
                scope.spawn(move || create(&test.client(), worker, if i % 2 == 0 { "a" } else { "c" }))
            })
            .collect();
        asked.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let users: Vec<&Reply> = replies
        .iter()
        .filter(|reply| matches!(reply, Reply::UserCreated { .. }))
        .collect();
    assert_eq!(
        users.len(),
        8,
        "one of the slots, and all who asked for that one: {replies:?}"
    );
    assert!(users.iter().all(|reply| *reply == users[0]), "{users:?}");
    assert_eq!(list(&test.client()).len(), 1);
    test.finish(&[worker]);
}

#[test]
fn row_65_an_agent_installed_twice_at_the_same_time_is_started_once() {
    let test = TestHelper::new();
    for _ in 0..10 {
        let worker = create_worker(&test.client(), "a");
        let script = b"#!/bin/bash\necho started; (exec sleep 1000) & exit 0\n";
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    assert_eq!(
                        install(&test.client(), worker, sealed_memfd(script)).0,
                        Reply::AgentStarted
                    );
                });
            }
        });
        let client = test.client();
        let console = client
            .ask(&Request::Attach { worker })
            .1
            .pop()
            .map(fs::File::from)
            .unwrap();
        testbed::test_helper::wait_for_line(&console, "started");
        assert_eq!(client.ask(&Request::Kill { worker }).0, Reply::Killed);
        assert_eq!(testbed::test_helper::read(&console).matches("started").count(), 1);
        assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    }
    test.finish(&[]);
}

#[test]
fn row_65_a_worker_killed_and_deleted_while_it_is_made_leaves_nothing() {
    let test = TestHelper::new();
    let over = AtomicBool::new(false);
    let worker = worker_id();
    std::thread::scope(|scope| {
        for request in [
            Request::Kill { worker },
            Request::Delete { worker },
            Request::Delete { worker },
        ] {
            let (test, over) = (&test, &over);
            scope.spawn(move || {
                let client = test.client();
                // Each time a little later than before, so as to meet every step of the making.
                for polls in (0..40).cycle() {
                    if over.load(Ordering::Relaxed) {
                        break;
                    }
                    (0..polls).for_each(|_| drop(list(&client)));
                    let reply = client.ask(&request).0;
                    let good = matches!(reply, Reply::Killed | Reply::Deleted);
                    assert!(good || kind(reply) == ErrorKind::NoSuchWorker);
                }
            });
        }
        let client = test.client();
        let _over = StopOnDrop(&over);
        let (mut started, begin) = (0, Instant::now());
        for round in 0.. {
            if round >= 60 && (started > 0 || begin.elapsed() > TEST_TIMEOUT) {
                break;
            }
            assert!(matches!(create(&client, worker, "a"), Reply::UserCreated { .. }));
            match install(&client, worker, sealed_memfd(b"#!/bin/bash\nexec sleep 1000\n")).0 {
                Reply::AgentStarted => started += 1,
                error => {
                    let kind = kind(error);
                    assert!(
                        matches!(kind, ErrorKind::NoSuchWorker | ErrorKind::Failed),
                        "{kind:?}"
                    );
                }
            }
        }
        assert!(started > 0, "Delete was always first, so this shows nothing");
    });
    test.finish(&[worker]);
}
