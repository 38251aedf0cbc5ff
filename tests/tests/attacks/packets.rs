//! Group E: what the bytes of a request can be made to say.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use protocol::{ErrorKind, Reply, Request, State, VERSION, WorkerId, wire};
use testbed::harness::{Client, sealed_memfd, worker_id};
use testbed::test_helper::{TestHelper, create, create_worker, kind, list, state, token};
use testbed::tracer::Event;
use testbed::tracer::helper::{WatchPeriod, listener, watch_with};

/// `CreateUser` with a slot's name that no honest client could write down.
fn create_packet(worker: WorkerId, name: &[u8]) -> Vec<u8> {
    let request = Request::CreateUser {
        worker,
        slot: "x".parse().unwrap(),
    };
    // A kind, an id, a length, a name: the last two are of one byte each here.
    let mut bytes = wire::encode(&request).unwrap();
    bytes.truncate(bytes.len() - 2);
    bytes.push(u8::try_from(name.len()).unwrap());
    bytes.extend(name);
    bytes
}

/// `InstallAgent` with any token.
fn install_packet(worker: WorkerId, bootstrap: &[u8]) -> Vec<u8> {
    let mut bytes = create_packet(worker, bootstrap);
    bytes[0] = 2;
    bytes
}

/// Is a connection ended by this packet?
fn ends(client: &Client, packet: &[u8], descriptor: Option<&OwnedFd>) -> bool {
    let sent = client.socket.send(packet, descriptor.map(AsFd::as_fd));
    sent.is_err() || client.reply().is_none()
}

#[test]
fn row_59_invalid_slot_names_are_refused() {
    let test = TestHelper::new();
    let long = [b'a'; 33];
    let names: [&[u8]; 19] = [
        b"",
        b".",
        b"..",
        b"/",
        b"../a",
        b"a/b",
        b"a\0",
        b"\0",
        b"a\n",
        b"\na",
        b" a",
        b"a ",
        b"-a",
        b"_a",
        b"a.b",
        &long,
        b"\xff\xfe",
        "а".as_bytes(),
        "ａ".as_bytes(),
    ];
    for name in names {
        assert!(
            ends(&test.client(), &create_packet(worker_id(), name), None),
            "{name:?} is a slot's name"
        );
    }
    let client = test.client();
    for name in ["A", "zz", &"a".repeat(32), "a-", "00"] {
        assert_eq!(
            kind(create(&client, worker_id(), name)),
            ErrorKind::NoSuchSlot,
            "{name}"
        );
    }
    let worker = create_worker(&client, "a");
    assert_eq!(kind(create(&client, worker_id(), "a")), ErrorKind::SlotTaken);
    test.finish(&[worker]);
}

/// An id is 128 bits here, never a text, so that there is nothing to misspell. The first and the last do no harm.
#[test]
fn row_59_all_128_bits_of_a_worker_id_are_valid() {
    let test = TestHelper::new();
    let client = test.client();
    for bits in [0, u128::MAX, 1 << 127, 0x2e2e_2f2e_2e2f_2e2e_2f65_7463_0000_0000] {
        let worker = WorkerId::from_bits(bits);
        assert!(
            matches!(create(&client, worker, "a"), Reply::UserCreated { .. }),
            "{worker}"
        );
        assert!(test.host.worker_dir(worker).join("record").is_symlink());
        assert_eq!(
            client
                .ask(&Request::List {
                    after: Some(WorkerId::from_bits(u128::MAX))
                })
                .0,
            no_workers()
        );
        assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    }
    // Directories whose names are almost ids are nobody's, and stay.
    let worker = create_worker(&client, "a");
    let dir = test.host.worker_dir(worker);
    let mistakes = [
        worker.to_string().to_lowercase(),
        format!("8{}", &worker.to_string()[1..]),
        format!("{}O", &worker.to_string()[..25]),
        "..".repeat(13),
    ];
    for name in &mistakes {
        std::fs::create_dir(dir.with_file_name(name)).unwrap();
        let record = std::fs::read_link(dir.join("record")).unwrap();
        std::os::unix::fs::symlink(record, dir.with_file_name(name).join("record")).unwrap();
    }
    assert_eq!(list(&client).len(), 1);
    assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    for name in &mistakes {
        assert!(
            dir.with_file_name(name).join("record").is_symlink(),
            "{name} is gone"
        );
        std::fs::remove_dir_all(dir.with_file_name(name)).unwrap();
    }
    test.finish(&[]);
}

fn no_workers() -> Reply {
    Reply::Listed {
        workers: Vec::new(),
        more: false,
    }
}

#[test]
fn row_60_every_request_with_one_bit_flipped_is_answered_or_its_connection_is_closed() {
    let test = TestHelper::new();
    let witness = test.client();
    let worker = create_worker(&witness, "a");
    let requests = [
        Request::Hello { version: VERSION },
        Request::CreateUser {
            worker,
            slot: "a".parse().unwrap(),
        },
        Request::InstallAgent {
            worker,
            bootstrap: token(),
        },
        Request::Attach { worker },
        Request::Kill { worker },
        Request::List { after: None },
        Request::List { after: Some(worker) },
        Request::Delete { worker },
    ];
    let agent = sealed_memfd(b"#!/bin/bash\nexec sleep 1000\n");
    let mut client = test.client();
    for request in &requests {
        let good = wire::encode(request).unwrap();
        for bit in 0..good.len() * 8 {
            let mut packet = good.clone();
            packet[bit / 8] ^= 1 << (bit % 8);
            // The descriptor, too, goes astray when the kind changes.
            let descriptor = request.carries_descriptor().then_some(&agent);
            if matches!(request, Request::Hello { .. }) {
                client = Client::connect(&test.host);
            }
            if ends(&client, &packet, descriptor) || matches!(request, Request::Hello { .. }) {
                client = test.client();
            }
        }
        let workers = list(&witness);
        assert!(workers.len() <= 2, "{request:?} made {workers:?}");
    }
    let workers: Vec<WorkerId> = list(&witness).into_iter().map(|info| info.worker).collect();
    test.finish(&workers);
}

/// Integers of two, four, eight and sixteen bytes where the length of a name is.
fn of_absurd_lengths() -> Vec<Vec<u8>> {
    let mut packets = Vec::new();
    let worker = worker_id();
    for (mark, bytes) in [(0xfb, 2), (0xfc, 4), (0xfd, 8), (0xfe, 16)] {
        for fill in [0xff, 0x7f, 0x01] {
            let mut packet = create_packet(worker, b"");
            packet.pop();
            packet.push(mark);
            packet.extend(std::iter::repeat_n(fill, bytes));
            packet.extend(b"aaaa");
            packets.push(packet);
        }
    }
    packets
}

/// The most KiB that the next session has had resident when it ended, and what its listener has.
fn memory_of_next_session(test: &TestHelper, packet: &[u8]) -> (u64, u64) {
    let peak = |pid: u32| -> Option<u64> {
        let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        line.trim().trim_end_matches(" kB").parse().ok()
    };
    let (monitor, listener) = (test.helper.pid(), listener(test.helper.pid()));
    let most = Arc::new(AtomicU64::new(0));
    let seen = most.clone();
    let watcher = watch_with(monitor, WatchPeriod::OneConnection, None, move |pid, event| {
        let pid = pid.as_raw() as u32;
        if let Event::Enter(call) = event
            && call.is_any_of(&[libc::SYS_exit_group])
            && ![monitor, listener].contains(&pid)
        {
            seen.fetch_max(peak(pid).expect("it is stopped"), Ordering::Relaxed);
        }
    });
    let _ = ends(&test.client(), packet, None);
    watcher.join().expect("the tracer does not fail");
    let most = most.load(Ordering::Relaxed);
    assert!(most > 0, "no session has ended");
    (most, peak(listener).expect("it is running"))
}

#[test]
fn row_60_the_session_that_decodes_needs_no_memory_for_what_a_length_claims() {
    let test = TestHelper::new();
    let mut packets = of_absurd_lengths();
    packets.extend([vec![], vec![0xff; 512], vec![0xfd; 4000]]);
    for packet in packets {
        let (session, listener) = memory_of_next_session(&test, &packet);
        assert!(
            session < listener + 1024,
            "{session} KiB, and {listener} of who forked it, for {packet:?}"
        );
    }
    test.finish(&[]);
}

#[test]
fn row_60_random_bytes_and_lengths_of_gigabytes_close_their_connection() {
    let test = TestHelper::new();
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut packets: Vec<Vec<u8>> = vec![Vec::new(), vec![0]];
    for _ in 0..1000 {
        let len = 1 + random() % 520;
        let mut packet: Vec<u8> = (0..len).map(|_| random() as u8).collect();
        // Half of them begin as a request does.
        if random() % 2 == 0 {
            packet[0] %= 7;
        }
        packets.push(packet);
    }
    packets.extend(of_absurd_lengths());
    let witness = test.client();
    for packet in &packets {
        // Whether it is answered or not: the next connection is as good as ever.
        let _ = ends(&test.client(), packet, None);
    }
    let workers: Vec<WorkerId> = list(&witness).into_iter().map(|info| info.worker).collect();
    test.finish(&workers);
}

#[test]
fn row_63_tokens_that_would_be_more_than_an_argument_are_refused() {
    let test = TestHelper::new();
    let worker = create_worker(&test.client(), "a");
    let (long, short) = ([b'a'; 129], [b'a'; 15]);
    let tokens: [&[u8]; 18] = [
        b"",
        &short,
        &long,
        b"abcdefgh 01234567",
        b"-bcdefgh01234567",
        b"--no-such-option",
        b"abcdefgh-01234567",
        b"abcdefgh01234567\0",
        b"abcdefgh\x0001234567",
        b"abcdefgh01234567\n",
        b"$(touch$IFS/tmp/x)",
        b"`touch /tmp/xxxx`",
        b"abcdefgh;01234567",
        b"abcdefgh'01234567",
        b"abcdefgh\"01234567",
        b"abcdefgh\\01234567",
        "abcdéfgh01234567".as_bytes(),
        b"abcdefgh\xff01234567",
    ];
    let agent = sealed_memfd(b"#!/bin/bash\necho started\n");
    for bad in tokens {
        assert!(
            ends(&test.client(), &install_packet(worker, bad), Some(&agent)),
            "{bad:?} is a token"
        );
        assert_eq!(state(&test.client(), worker), State::Created);
    }
    assert!(
        !test.helper.log.text().contains("01234567"),
        "a token is in the log"
    );
    // A packet made in the same way with a good one is none the worse for it.
    assert!(!ends(
        &test.client(),
        &install_packet(worker, &[b'a'; 128]),
        Some(&agent)
    ));
    test.finish(&[worker]);
}

#[test]
fn row_67_nothing_that_is_sent_makes_a_line_of_the_log() {
    let test = TestHelper::new();
    let from = test.helper.log.len();
    let forged = "\n2030-01-01T00:00:00.000000Z  INFO forged";
    let strings: [&[u8]; 9] = [
        b"\x1b[2J\x1b[31mred",
        b"a\rb",
        b"a\x08\x08b",
        b"\x00\x07\x7f",
        "\u{9b}2J".as_bytes(),
        "\u{202e}evil\u{2066}".as_bytes(),
        "\u{2028}line\u{85}".as_bytes(),
        b"\xff\xfe\x1b",
        forged.as_bytes(),
    ];
    let worker = worker_id();
    let agent = sealed_memfd(b"#!/bin/true\n");
    for string in strings {
        assert!(ends(&test.client(), &create_packet(worker, string), None));
        assert!(ends(
            &test.client(),
            &install_packet(worker, string),
            Some(&agent)
        ));
        assert!(ends(&test.client(), string, None));
    }
    // Also in what a job does: its program is no program, and says so in its own way.
    let client = test.client();
    let worker = create_worker(&client, "a");
    let program = b"#!/no/such/\x1b[31m\rinterpreter\n";
    kind(testbed::test_helper::install(&client, worker, sealed_memfd(program)).0);
    kind(create(&client, worker_id(), "zz"));
    test.helper.log.wait_from(from, &["slot zz"]);
    let log = test.helper.log.text();
    for line in log.lines() {
        let odd = |c: char| c.is_control() || matches!(c, '\u{2028}'..='\u{202f}' | '\u{2066}'..='\u{2069}');
        assert!(!line.contains(odd), "{line:?}");
        assert!(
            line.starts_with("20") && !line.starts_with("2030"),
            "a line of another process: {line:?}"
        );
    }
    assert!(
        log.matches("closed the connection").count() >= 3 * strings.len(),
        "the attempts are not in the log:\n{log}"
    );
    test.finish(&[worker]);
}
