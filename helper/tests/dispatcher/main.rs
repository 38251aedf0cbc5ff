//! Connections at the real dispatcher, with a model of a host beneath it: it needs neither root nor processes, so
//! many can be tried.

mod conversation;

use std::process::Command;
use std::sync::{Mutex, MutexGuard};

use conversation::{Conversation, Packet, SentDescriptor, check_conversation};
use proptest::prelude::*;
use protocol::{Request, VERSION, WorkerId, wire};

/// Descriptors are counted by the process.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn check_serially(conversation: &Conversation) {
    let _turn = turn();
    check_conversation(conversation);
}

fn packet(request: &Request, descriptors: &[SentDescriptor]) -> Packet {
    Packet {
        bytes: wire::encode(request).unwrap(),
        descriptors: descriptors.to_vec(),
    }
}

fn hello(version: u16) -> Packet {
    packet(&Request::Hello { version }, &[])
}

fn create(worker: WorkerId, slot: &str) -> Packet {
    packet(
        &Request::CreateUser {
            worker,
            slot: slot.parse().unwrap(),
        },
        &[],
    )
}

fn install(worker: WorkerId, descriptors: &[SentDescriptor]) -> Packet {
    packet(
        &Request::InstallAgent {
            worker,
            bootstrap: "abcdefgh01234567".parse().unwrap(),
        },
        descriptors,
    )
}

/// A life, with everything said that can be said, and to a helper that is busy.
#[test]
fn each_request_is_answered_as_the_contract_says() {
    let [worker, other] = [1, 2].map(WorkerId::from_bits);
    for version in [0, VERSION - 1, VERSION, VERSION + 1, u16::MAX] {
        for is_busy in [false, true] {
            let list = |after| packet(&Request::List { after }, &[]);
            let packets = vec![
                hello(version),
                create(worker, "a"),
                create(worker, "a"),
                create(worker, "c"),
                create(other, "zz"),
                create(other, "b"),
                create(other, "c"),
                list(None),
                install(worker, &[SentDescriptor::Unsealed]),
                install(worker, &[SentDescriptor::Socket]),
                install(worker, &[SentDescriptor::Program]),
                install(other, &[SentDescriptor::Program]),
                packet(&Request::Attach { worker }, &[]),
                packet(&Request::Attach { worker: other }, &[]),
                packet(&Request::Kill { worker }, &[]),
                packet(&Request::Kill { worker: other }, &[]),
                list(None),
                list(Some(worker)),
                hello(version),
                packet(&Request::Delete { worker }, &[]),
                packet(&Request::Delete { worker: other }, &[]),
                create(other, "b"),
                install(other, &[SentDescriptor::NoProgram]),
                list(None),
            ];
            check_serially(&Conversation { is_busy, packets });
        }
    }
}

#[test]
fn nothing_is_answered_before_the_greeting() {
    let worker = WorkerId::from_bits(1);
    for first in [
        create(worker, "a"),
        install(worker, &[SentDescriptor::Program]),
        packet(&Request::Attach { worker }, &[]),
        packet(&Request::Delete { worker }, &[]),
        packet(&Request::List { after: None }, &[]),
    ] {
        let packets = vec![first, hello(VERSION), create(worker, "a")];
        check_serially(&Conversation {
            is_busy: false,
            packets,
        });
    }
}

#[test]
fn descriptors_that_no_message_calls_for_are_closed_and_no_agent_is_installed_without_one() {
    let worker = WorkerId::from_bits(1);
    let many = [SentDescriptor::Program; 4];
    for number in 0..=many.len() {
        for wrong in [
            install(worker, &many[..number]),
            packet(&Request::Attach { worker }, &many[..number]),
            Packet {
                bytes: Vec::new(),
                descriptors: many[..number].to_vec(),
            },
        ] {
            let mut greeting = hello(VERSION);
            let packets = vec![greeting.clone(), create(worker, "a"), wrong, create(worker, "a")];
            check_serially(&Conversation {
                is_busy: false,
                packets,
            });
            greeting.descriptors = many[..number].to_vec();
            let packets = vec![greeting, create(worker, "a")];
            check_serially(&Conversation {
                is_busy: false,
                packets,
            });
        }
    }
}

#[test]
fn what_is_no_request_ends_the_connection() {
    let worker = WorkerId::from_bits(1);
    let good = create(worker, "a");
    let lengths = [0, 1, good.bytes.len() - 1, good.bytes.len() + 1];
    for length in lengths
        .into_iter()
        .chain([wire::MAX_REQUEST, wire::MAX_REQUEST + 1, 9000])
    {
        let mut broken = good.clone();
        broken.bytes.resize(length, 0);
        let packets = vec![hello(VERSION), good.clone(), broken, good.clone()];
        check_serially(&Conversation {
            is_busy: false,
            packets,
        });
    }
}

/// What the log says while these are held. They are held in a process of its own, which runs the calling test: the log is
/// the process's standard error. In that process it is none.
fn logged(test: &str, conversations: &[Conversation]) -> Option<Vec<String>> {
    const IS_CHILD: &str = "DISPATCHER_LOG";
    if std::env::var_os(IS_CHILD).is_some() {
        helper::start_log();
        conversations.iter().for_each(check_serially);
        return None;
    }
    let _turn = turn();
    let mut child = Command::new(std::env::current_exe().unwrap());
    let output = child
        .args([test, "--exact", "--nocapture"])
        .env(IS_CHILD, "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    Some(
        String::from_utf8(output.stderr)
            .unwrap()
            .lines()
            .map(String::from)
            .collect(),
    )
}

#[test]
fn the_log_says_who_asked_for_what_and_how_it_ended_but_not_of_each_poll() {
    let worker = WorkerId::from_bits(1);
    let life = Conversation {
        is_busy: false,
        packets: vec![
            hello(VERSION),
            packet(&Request::List { after: None }, &[]),
            create(worker, "a"),
            install(worker, &[SentDescriptor::Program]),
            packet(&Request::Attach { worker }, &[]),
            packet(&Request::Kill { worker }, &[]),
            packet(&Request::Delete { worker }, &[]),
            packet(&Request::Kill { worker }, &[]),
            install(worker, &[]),
        ],
    };
    let no_greeting = Conversation {
        is_busy: false,
        packets: vec![packet(&Request::List { after: None }, &[])],
    };
    let test = "the_log_says_who_asked_for_what_and_how_it_ended_but_not_of_each_poll";
    let Some(log) = logged(test, &[life, no_greeting]) else {
        return;
    };
    let expected = [
        ["INFO", "\"CreateUser\"", "slot=\"a\"", "outcome=\"done\""],
        ["INFO", "\"InstallAgent\"", "slot=\"\"", "outcome=\"done\""],
        ["INFO", "\"Attach\"", "slot=\"\"", "outcome=\"done\""],
        ["INFO", "\"Kill\"", "slot=\"\"", "outcome=\"done\""],
        ["INFO", "\"Delete\"", "slot=\"\"", "outcome=\"done\""],
        ["WARN", "\"Kill\"", "slot=\"\"", "outcome=NoSuchWorker"],
        ["WARN", "\"InstallAgent\"", "slot=\"\"", "outcome=NoSuchWorker"],
    ];
    assert_eq!(log.len(), expected.len() + 1, "{log:#?}");
    for (line, parts) in log.iter().zip(expected) {
        let who = format!("worker=\"{worker}\"");
        let all = parts.into_iter().chain(["uid=0", "pid=1", &who]);
        for part in all {
            assert!(line.contains(part), "{line} has no {part}");
        }
    }
    assert!(log[7].contains("outcome=Refused"), "{log:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_connection_keeps_to_the_contract(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        check_serially(&Conversation::from(&bytes[..]));
        // The same behind a greeting: few random bytes are one.
        let greeted = [&[0, 0, VERSION as u8, 0], &bytes[..]].concat();
        check_serially(&Conversation::from(&greeted[..]));
    }
}
