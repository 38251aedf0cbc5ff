//! Group E, the supervisor that turned: who it says it is, when it says what, how often and to whom.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::socket::{MsgFlags, Shutdown, send, shutdown};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use protocol::{ErrorKind, Reply, Request, Seqpacket, State, VERSION, WorkerId, wire};
use testbed::harness::{Client, SUPERVISOR_UID, TestHost, sealed, worker_id};
use testbed::stage::{SLOTS, Stage, create, created, install, kind, list, run, state, token};

const HELLO: Request = Request::Hello { version: VERSION };

fn greet(socket: &Seqpacket) -> bool {
    let copy = socket
        .as_fd()
        .try_clone_to_owned()
        .expect("a descriptor can be copied");
    let client = Client(copy.into());
    let sent = client.0.send(&wire::encode(&HELLO).unwrap(), None);
    sent.is_ok()
        && client
            .reply()
            .is_some_and(|(reply, _)| matches!(reply, Reply::Welcome { .. }))
}

/// What `somebody` does, in its environment: the socket, its uid when it connects, and its uid afterwards.
const ORDER: &str = "USER_FACTORY_ATTACK_ORDER";

fn become_uid(uid: u32) {
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    setgroups(&[]).unwrap();
    setresgid(group, group, Gid::from_raw(0)).unwrap();
    // The saved uid stays root's, for the next change.
    setresuid(user, user, Uid::from_raw(0)).unwrap();
}

#[test]
#[ignore = "a part of row 57, which starts it"]
fn somebody() {
    let order = std::env::var(ORDER).expect("row 57 gives an order");
    let [path, first, second] = order.split(' ').collect::<Vec<_>>()[..] else {
        panic!("{order:?}")
    };
    become_uid(first.parse().unwrap());
    let Ok(socket) = Seqpacket::connect(path.as_ref(), false) else {
        return println!("\nOUTCOME not connected");
    };
    setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)).unwrap();
    become_uid(second.parse().unwrap());
    println!("\nOUTCOME {}", if greet(&socket) { "served" } else { "hung up" });
}

fn outcome(host: &TestHost, connects_as: u32, goes_on_as: u32) -> String {
    let order = format!("{} {connects_as} {goes_on_as}", host.socket().display());
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "supervisor::somebody", "--ignored", "--nocapture"])
        .env(ORDER, order);
    let output = command.output().expect("this program can be started");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let outcome = text.lines().find_map(|line| line.strip_prefix("OUTCOME "));
    outcome.unwrap_or_else(|| panic!("{text}")).to_owned()
}

/// The kernel notes a peer's uid when it connects. What it becomes later, and whose number its pid was or will
/// be, has no part in it.
#[test]
fn row_57_whoever_is_not_the_supervisor_when_it_connects() {
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", SUPERVISOR_UID, SLOTS);
    let helper = host.helper();
    let job = *host.uids.start();
    for uid in [job, 1, 65534, SUPERVISOR_UID + 1] {
        assert_eq!(outcome(&host, uid, uid), "not connected", "uid {uid}");
    }
    assert_eq!(outcome(&host, 0, 0), "hung up");
    // Suppose somebody has opened the socket to all: the mode is not the only wall.
    std::fs::set_permissions(host.socket(), std::fs::Permissions::from_mode(0o666)).unwrap();
    for uid in [job, 0, 1, 65534, SUPERVISOR_UID + 1] {
        assert_eq!(outcome(&host, uid, uid), "hung up", "uid {uid}");
        assert_eq!(
            outcome(&host, uid, SUPERVISOR_UID),
            "hung up",
            "uid {uid} turned supervisor"
        );
        helper.log.wait(&["hung up", &format!("uid={uid} ")]);
    }
    assert_eq!(outcome(&host, SUPERVISOR_UID, SUPERVISOR_UID), "served");
    assert_eq!(
        outcome(&host, SUPERVISOR_UID, job),
        "served",
        "what counts is who it was"
    );
}

#[test]
fn row_57_a_job_whose_slot_shows_it_the_sockets_directory() {
    // An operator's mistake. The directory stays as hidden there as it is in its own place.
    let host = TestHost::new();
    let sockets = host.root.join(protocol::config::RUN_DIR);
    let shown = format!("read_only = {{ \"/opt/run\" = \"{}\" }}\n", sockets.display());
    let slots = format!("[slots.x]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n{shown}");
    host.configure("http://127.0.0.1:9", 0, &slots);
    let before = testbed::census::Census::take(&host);
    let helper = host.helper();
    std::fs::set_permissions(host.socket(), std::fs::Permissions::from_mode(0o666)).unwrap();
    let client = Client::new(&host);
    let worker = created(&client, "x");
    let script = format!(
        "ls -A /opt/run {}; find / -name helper.sock 2>&-; echo looked; exit 1",
        sockets.display()
    );
    let (_, console) = run(&client, worker, &script);
    assert!(
        console.contains("looked") && !console.contains("helper.sock"),
        "{console}"
    );
    assert!(!helper.log.text().contains("hung up"), "{}", helper.log.text());
    assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    before.assert_unchanged(&host);
}

#[test]
fn row_58_every_order_of_three_requests() {
    let stage = Stage::new();
    let client = stage.client();
    let agent = || sealed(b"#!/bin/bash\nexec sleep 1000\n");
    let ask = |client: &Client, worker: WorkerId, what: usize| match what {
        0 => create(client, worker, "a"),
        1 => install(client, worker, agent()).0,
        2 => client.ask(&Request::Attach { worker }).0,
        3 => client.ask(&Request::Kill { worker }).0,
        _ => client.ask(&Request::Delete { worker }).0,
    };
    for sequence in 0..125 {
        let worker = worker_id();
        let steps = [sequence / 25, sequence / 5 % 5, sequence % 5];
        let mut exists = false;
        for step in steps {
            let reply = ask(&client, worker, step);
            let good = match (step, exists) {
                (0, _) => matches!(reply, Reply::UserCreated { .. }),
                (1, true) => reply == Reply::AgentStarted,
                (2, true) => matches!(reply, Reply::Attached { .. }),
                (3, true) => reply == Reply::Killed,
                (4, _) => reply == Reply::Deleted,
                (_, false) => kind(reply.clone()) == ErrorKind::NoSuchWorker,
                _ => false,
            };
            assert!(good, "{steps:?}: {reply:?}");
            exists = step == 0 || (exists && step != 4);
        }
        assert_eq!(
            client.ask(&Request::Delete { worker }).0,
            Reply::Deleted,
            "{steps:?}"
        );
        stage.before.assert_unchanged(&stage.host);
    }
    stage.finish(&[]);
}

#[test]
fn row_58_a_worker_of_another_slot() {
    let stage = Stage::new();
    let client = stage.client();
    let worker = created(&client, "a");
    for _ in 0..2 {
        assert_eq!(kind(create(&client, worker, "c")), ErrorKind::Refused);
    }
    assert_eq!(list(&client).len(), 1);
    assert_eq!(list(&client)[0].slot.as_str(), "a");
    stage.finish(&[worker]);
}

#[test]
fn row_61_ten_thousand_connections() {
    let stage = Stage::new();
    let witness = stage.client();
    for wave in 0..40 {
        let clients: Vec<Client> = (0..250).map(|_| Client::silent(&stage.host)).collect();
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
    stage.finish(&[]);
}

fn half_close(client: &Client, how: Shutdown) {
    // The helper may have hung up already.
    let _ = client.0.send(&wire::encode(&HELLO).unwrap(), None);
    let _ = shutdown(client.0.as_raw_fd(), how);
}

#[test]
fn row_61_a_half_closed_connection_is_answered_and_ended() {
    let stage = Stage::new();
    let client = Client::silent(&stage.host);
    half_close(&client, Shutdown::Write);
    assert!(matches!(client.reply(), Some((Reply::Welcome { .. }, _))));
    assert!(client.reply().is_none(), "who says no more is kept");
    stage.finish(&[]);
}

#[test]
fn row_61_a_peer_that_reads_nothing() {
    let stage = Stage::new();
    let deaf = stage.client();
    let question = wire::encode(&Request::List { after: None }).unwrap();
    // Until there is room neither for an answer nor for a question: then the helper gives up.
    let end = loop {
        match send(deaf.0.as_raw_fd(), &question, MsgFlags::MSG_NOSIGNAL) {
            Ok(_) => {}
            Err(errno) => break errno,
        }
    };
    assert!(matches!(end, Errno::EPIPE | Errno::ECONNRESET), "{end}");
    stage.helper.log.wait(&["hung up", "cannot answer"]);
    stage.finish(&[]);
}

#[test]
fn row_61_closed_before_the_answer() {
    let stage = Stage::new();
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
            let agent = sealed(b"#!/bin/bash\nexec sleep 1000\n");
            let agent = request.carries_descriptor().then_some(&agent);
            let client = stage.client();
            let bytes = wire::encode(request).unwrap();
            client.0.send(&bytes, agent.map(AsFd::as_fd)).unwrap();
        }
        assert_eq!(
            stage.client().ask(&Request::Delete { worker }).0,
            Reply::Deleted,
            "round {round}"
        );
    }
    // A request that nobody waits for is still being done when Delete comes, and may be done after it.
    stage.finish(&[worker]);
}

#[test]
fn row_64_the_same_worker_on_many_connections() {
    let stage = Stage::new();
    let worker = worker_id();
    let replies: Vec<Reply> = std::thread::scope(|scope| {
        let asked: Vec<_> = (0..16)
            .map(|i| {
                let stage = &stage;
                scope.spawn(move || create(&stage.client(), worker, if i % 2 == 0 { "a" } else { "c" }))
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
    assert_eq!(list(&stage.client()).len(), 1);
    stage.finish(&[worker]);
}

#[test]
fn row_65_an_agent_installed_twice_at_the_same_time() {
    let stage = Stage::new();
    for _ in 0..10 {
        let worker = created(&stage.client(), "a");
        let script = b"#!/bin/bash\necho started; (exec sleep 1000) & exit 0\n";
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    assert_eq!(
                        install(&stage.client(), worker, sealed(script)).0,
                        Reply::AgentStarted
                    );
                });
            }
        });
        let client = stage.client();
        let console = client
            .ask(&Request::Attach { worker })
            .1
            .pop()
            .map(std::fs::File::from)
            .unwrap();
        testbed::stage::wait_for_line(&console, "started");
        assert_eq!(client.ask(&Request::Kill { worker }).0, Reply::Killed);
        assert_eq!(testbed::stage::read(&console).matches("started").count(), 1);
        assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    }
    stage.finish(&[]);
}

#[test]
fn row_65_killed_and_deleted_while_it_is_made() {
    let stage = Stage::new();
    let over = std::sync::atomic::AtomicBool::new(false);
    let worker = worker_id();
    std::thread::scope(|scope| {
        for request in [
            Request::Kill { worker },
            Request::Delete { worker },
            Request::Delete { worker },
        ] {
            let (stage, over) = (&stage, &over);
            scope.spawn(move || {
                let client = stage.client();
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    let reply = client.ask(&request).0;
                    let good = matches!(reply, Reply::Killed | Reply::Deleted);
                    assert!(good || kind(reply) == ErrorKind::NoSuchWorker);
                }
            });
        }
        let client = stage.client();
        let mut started = 0;
        for _ in 0..200 {
            assert!(matches!(create(&client, worker, "a"), Reply::UserCreated { .. }));
            match install(&client, worker, sealed(b"#!/bin/bash\nexec sleep 1000\n")).0 {
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
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(started > 0, "Delete was always first: this run shows nothing");
    });
    stage.finish(&[worker]);
}

#[test]
fn row_66_other_versions_of_the_protocol() {
    let stage = Stage::new();
    let witness = stage.client();
    for version in [0, 1, VERSION - 1, VERSION + 1, 250, 251, u16::MAX] {
        if version == VERSION {
            continue;
        }
        let client = Client::silent(&stage.host);
        let (reply, _) = client.ask(&Request::Hello { version });
        let Reply::Error(error) = reply else {
            panic!("{version}: {reply:?}")
        };
        assert_eq!(error.kind, ErrorKind::Version);
        assert!(error.message().contains(&version.to_string()), "{error}");
        assert!(client.reply().is_none(), "version {version} is served");
    }
    assert_eq!(list(&witness), []);
    stage.finish(&[]);
}

#[test]
fn row_64_more_workers_than_slots() {
    let mut stage = Stage::new();
    let client = stage.client();
    let workers = [created(&client, "a"), created(&client, "c")];
    for name in ["a", "b", "c"] {
        assert_eq!(
            kind(create(&client, worker_id(), name)),
            ErrorKind::SlotTaken,
            "slot {name}"
        );
    }
    // A helper that knows nothing but the disk decides the same.
    stage.helper.signal(Signal::SIGKILL);
    stage.helper.wait();
    stage.helper = stage.host.helper();
    let client = stage.client();
    for name in ["a", "b", "c"] {
        assert_eq!(
            kind(create(&client, worker_id(), name)),
            ErrorKind::SlotTaken,
            "slot {name}"
        );
    }
    assert!(
        workers
            .iter()
            .all(|worker| state(&client, *worker) == State::Created)
    );
    stage.finish(&workers);
}
