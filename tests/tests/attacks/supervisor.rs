//! Group E, a compromised supervisor: its uid, its requests, their order and number.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use protocol::{ErrorKind, Received, Reply, Request, Seqpacket, State, VERSION, WorkerId, wire};
use testbed::harness::{Client, SUPERVISOR_UID, TestHost, sealed_memfd, worker_id};
use testbed::test_helper::{SLOTS, TestHelper, create, create_worker, install, kind, list, run, state};
use testbed::worker_snapshot::WorkerSnapshot;

use super::HELLO;

fn greet(socket: &Seqpacket) -> bool {
    let sent = socket.send(&wire::encode(&HELLO).unwrap(), None);
    let is_welcome = |bytes: &[u8]| matches!(wire::decode(bytes), Ok(Reply::Welcome));
    sent.is_ok()
        && matches!(socket.recv(wire::MAX_REPLY), Ok(Received::Packet { bytes, .. }) if is_welcome(&bytes))
}

/// What `other_uid` does, in its environment: the socket, its uid when it connects, and its uid afterwards.
const ACTION: &str = "USER_FACTORY_ATTACK_ACTION";

fn become_uid(uid: u32) {
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
    setgroups(&[]).unwrap();
    setresgid(group, group, Gid::from_raw(0)).unwrap();
    // The saved uid stays root's, for the next change.
    setresuid(user, user, Uid::from_raw(0)).unwrap();
}

#[test]
#[ignore = "a part of row 57, which starts it"]
fn other_uid() {
    let action = std::env::var(ACTION).expect("row 57 gives an action");
    let [path, first, second] = action.split(' ').collect::<Vec<_>>()[..] else {
        panic!("{action:?}")
    };
    become_uid(first.parse().unwrap());
    let Ok(socket) = Seqpacket::connect(path.as_ref(), false) else {
        return println!("\nOUTCOME not connected");
    };
    setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)).unwrap();
    become_uid(second.parse().unwrap());
    println!("\nOUTCOME {}", if greet(&socket) { "served" } else { "closed" });
}

fn outcome(host: &TestHost, connects_as: u32, goes_on_as: u32) -> String {
    let action = format!("{} {connects_as} {goes_on_as}", host.socket().display());
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([
            "--exact",
            "attacks::supervisor::other_uid",
            "--ignored",
            "--nocapture",
        ])
        .env(ACTION, action);
    let output = command.output().expect("this program can be started");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let outcome = text.lines().find_map(|line| line.strip_prefix("OUTCOME "));
    outcome.unwrap_or_else(|| panic!("{text}")).to_owned()
}

/// The kernel notes a peer's uid when it connects. What it becomes later, and whose number its pid was or will
/// be, has no part in it.
#[test]
fn row_57_a_peer_with_another_uid_than_the_supervisors_is_not_served() {
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", SUPERVISOR_UID, SLOTS);
    let helper = host.start_helper();
    let job = *host.uids.start();
    for uid in [job, 1, 65534, SUPERVISOR_UID + 1] {
        assert_eq!(outcome(&host, uid, uid), "not connected", "uid {uid}");
    }
    assert_eq!(outcome(&host, 0, 0), "closed");
    // Suppose the socket is open to all: the mode is not the only protection.
    std::fs::set_permissions(host.socket(), std::fs::Permissions::from_mode(0o666)).unwrap();
    for uid in [job, 0, 1, 65534, SUPERVISOR_UID + 1] {
        assert_eq!(outcome(&host, uid, uid), "closed", "uid {uid}");
        assert_eq!(
            outcome(&host, uid, SUPERVISOR_UID),
            "closed",
            "uid {uid} turned supervisor"
        );
        helper
            .log
            .wait(&["closed the connection", &format!("uid={uid} ")]);
    }
    assert_eq!(outcome(&host, SUPERVISOR_UID, SUPERVISOR_UID), "served");
    assert_eq!(
        outcome(&host, SUPERVISOR_UID, job),
        "served",
        "what counts is who it was"
    );
}

#[test]
fn row_57_a_job_whose_slot_shows_the_sockets_directory_does_not_reach_the_socket() {
    // An operator's mistake. The directory stays as hidden there as it is in its own place.
    let host = TestHost::new();
    let sockets = host.root.join(protocol::config::RUN_DIR);
    let shown = format!("read_only = {{ \"/opt/run\" = \"{}\" }}\n", sockets.display());
    let slots = format!("[slots.x]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n{shown}");
    host.configure("http://127.0.0.1:9", 0, &slots);
    let before = testbed::host_snapshot::HostSnapshot::take(&host);
    let helper = host.start_helper();
    std::fs::set_permissions(host.socket(), std::fs::Permissions::from_mode(0o666)).unwrap();
    let client = Client::new(&host);
    let worker = create_worker(&client, "x");
    let script = format!(
        "ls -A /opt/run {}; find / -path '/srv/user-factory-test-*' -prune -o -name helper.sock -print 2>&-; \
         echo looked; exit 1",
        sockets.display()
    );
    let (_, console) = run(&client, worker, &script);
    // Nothing is in it.
    assert!(console.contains("/opt/run:\nlooked\n"), "{console}");
    assert!(!console.contains("helper.sock"), "{console}");
    assert!(
        !helper.log.text().contains("closed the connection"),
        "{}",
        helper.log.text()
    );
    assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    before.assert_unchanged(&host);
}

#[test]
fn row_58_every_sequence_of_three_requests_keeps_the_rules() {
    let test = TestHelper::new();
    let client = test.client();
    let before = WorkerSnapshot::take(&test.host);
    let agent = || sealed_memfd(b"#!/bin/bash\nexec sleep 1000\n");
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
        assert_eq!(WorkerSnapshot::take(&test.host), before, "{steps:?}");
    }
    test.finish(&[]);
}

#[test]
fn row_58_a_worker_of_another_slot_is_refused() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    for _ in 0..2 {
        assert_eq!(kind(create(&client, worker, "c")), ErrorKind::Refused);
    }
    assert_eq!(list(&client).len(), 1);
    assert_eq!(list(&client)[0].slot.as_str(), "a");
    test.finish(&[worker]);
}

#[test]
fn row_66_other_versions_of_the_protocol_are_refused() {
    let test = TestHelper::new();
    let witness = test.client();
    for version in [0, VERSION - 1, VERSION + 1, 250, 251, u16::MAX] {
        let client = Client::connect(&test.host);
        let (reply, _) = client.ask(&Request::Hello { version });
        let Reply::Error(error) = reply else {
            panic!("{version}: {reply:?}")
        };
        assert_eq!(error.kind, ErrorKind::Version);
        for named in [version, VERSION] {
            assert!(error.message().contains(&named.to_string()), "{error}");
        }
        assert!(client.reply().is_none(), "version {version} is served");
    }
    assert_eq!(list(&witness), []);
    test.finish(&[]);
}

#[test]
fn row_64_no_more_workers_than_slots_are_made() {
    let mut test = TestHelper::new();
    let client = test.client();
    let workers = [create_worker(&client, "a"), create_worker(&client, "c")];
    for name in ["a", "b", "c"] {
        assert_eq!(
            kind(create(&client, worker_id(), name)),
            ErrorKind::SlotTaken,
            "slot {name}"
        );
    }
    // A helper that knows nothing but the disk decides the same.
    test.helper.signal(Signal::SIGKILL);
    test.helper.wait();
    test.helper = test.host.start_helper();
    let client = test.client();
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
    test.finish(&workers);
}
