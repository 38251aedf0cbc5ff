//! A record that the disk, or a root process, has damaged.

use std::ffi::OsStr;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;

use protocol::{ErrorKind, Reply, Request};
use testbed::harness::{Client, sealed_memfd, worker_id};
use testbed::host_snapshot::processes_of;
use testbed::test_helper::{create, install, kind, list, wait_for_line};

use crate::crashes::power_loss::helper::{PowerLossTest, worker_file};

fn agent() -> OwnedFd {
    sealed_memfd(b"#!/bin/bash\nmkdir -p /work/dark; touch /work/dark/x; chmod 0 /work/dark; echo ready\nsleep 1000 & exit 0\n")
}

/// What a record may have become: what it leads to, or a file.
const DAMAGE: [Option<&[u8]>; 4] = [None, Some(b"a 18790"), Some(b"\xff\xfe"), Some(b"../x 0 1.")];

/// A running worker in slot `a`, with its record spoiled.
fn damaged(test: &PowerLossTest, damage: Option<&[u8]>) -> protocol::WorkerId {
    let client = Client::new(&test.host);
    let worker = worker_id();
    assert!(matches!(create(&client, worker, "a"), Reply::UserCreated { .. }));
    let (reply, console) = install(&client, worker, agent());
    assert_eq!(reply, Reply::AgentStarted);
    wait_for_line(&console.expect("it came with the reply"), "ready");
    let record = worker_file(test, worker, "record");
    fs::remove_file(&record).unwrap();
    match damage {
        Some(damage) => symlink(OsStr::from_bytes(damage), record).unwrap(),
        None => fs::write(record, "").unwrap(),
    }
    worker
}

#[test]
fn a_worker_with_a_damaged_record_is_listed_as_damaged_and_can_be_deleted() {
    let test = PowerLossTest::new();
    for damage in DAMAGE {
        let worker = damaged(&test, damage);
        let client = Client::new(&test.host);
        let from = test.helper.log.len();
        assert_eq!(list(&client), [], "nothing is known of it");
        test.helper
            .log
            .wait_from(from, &["the record is damaged", &worker.to_string()]);
        for request in [Request::Kill { worker }, Request::Attach { worker }] {
            assert_eq!(kind(client.ask(&request).0), ErrorKind::Failed);
        }
        assert_eq!(kind(create(&client, worker, "a")), ErrorKind::Failed);
        assert!(
            !processes_of(&test.host.uids).is_empty(),
            "nobody has asked for its end"
        );
        test.end(worker, "its record was damaged");
    }
}

#[test]
fn no_slot_is_reused_until_a_worker_with_a_damaged_record_is_gone() {
    let test = PowerLossTest::new();
    for (damage, slot) in DAMAGE.into_iter().zip(["a", "b", "a", "b"]) {
        damaged(&test, damage);
        let client = Client::new(&test.host);
        let next = worker_id();
        assert!(matches!(create(&client, next, slot), Reply::UserCreated { .. }));
        assert!(processes_of(&test.host.uids).is_empty(), "two workers existed");
        test.end(next, "it took the place of a damaged one");
    }
}

#[test]
fn a_worker_with_a_damaged_record_that_cannot_be_deleted_keeps_every_slot_with_the_reason() {
    let test = PowerLossTest::new();
    let worker = damaged(&test, None);
    // Something that no helper made, and none removes.
    let odd = worker_file(&test, worker, "odd");
    fs::create_dir(&odd).unwrap();
    let client = Client::new(&test.host);
    let Reply::Error(error) = create(&client, worker_id(), "b") else {
        panic!("a slot was given")
    };
    let printed = error.message();
    assert!(
        printed.contains("damaged") && printed.contains(&worker.to_string()),
        "{printed}"
    );
    assert_eq!(list(&client), []);
    fs::remove_dir(odd).unwrap();
    test.assert_other_slot_works("it can be deleted now");
    test.end(worker, "it is deleted already");
}
