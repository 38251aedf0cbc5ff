//! What a hostile or broken client sends.

use super::*;

#[test]
fn agents_that_could_still_change_are_refused() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let open = |path: &std::path::Path| -> OwnedFd {
        fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap()
            .into()
    };
    let sparse = File::from(memfd(b"x"));
    sparse.set_len(protocol::MAX_AGENT_BYTES + 1).unwrap();
    let seals = nix::fcntl::SealFlag::F_SEAL_WRITE
        | nix::fcntl::SealFlag::F_SEAL_GROW
        | nix::fcntl::SealFlag::F_SEAL_SHRINK;
    nix::fcntl::fcntl(&sparse, nix::fcntl::FcntlArg::F_ADD_SEALS(seals)).unwrap();
    let bad: Vec<OwnedFd> = vec![
        memfd(b"#!/bin/true\n"),
        sealed_memfd(b""),
        sparse.into(),
        File::open("/bin/true").unwrap().into(),
        File::open("/").unwrap().into(),
        open(&fifo),
        open("/dev/null".as_ref()),
        Client::connect(&test.host)
            .socket
            .as_fd()
            .try_clone_to_owned()
            .unwrap(),
    ];
    for descriptor in bad {
        assert_eq!(kind(install(&client, worker, descriptor).0), ErrorKind::Refused);
        assert_eq!(state(&client, worker), State::Created);
    }
    test.finish(&[worker]);
}

#[test]
fn descriptors_travel_only_where_a_message_calls_for_one() {
    use std::os::fd::AsRawFd;
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    let requests = [Request::Kill { worker }, Request::List { after: None }];
    for request in requests {
        let (mut reader, writer) = std::io::pipe().unwrap();
        client
            .socket
            .send(&wire::encode(&request).unwrap(), Some(writer.as_fd()))
            .unwrap();
        drop(writer);
        assert!(client.reply().is_some());
        // The end: nobody has the other one.
        assert_eq!(reader.read_to_end(&mut Vec::new()).unwrap(), 0, "{request:?}");
    }
    let agent = sealed_memfd(b"#!/bin/true\n");
    for count in [0, 2, 3, 200] {
        let bytes = wire::encode(&Request::InstallAgent {
            worker,
            bootstrap: token(),
        })
        .unwrap();
        let descriptors = vec![agent.as_raw_fd(); count];
        let rights = [nix::sys::socket::ControlMessage::ScmRights(&descriptors)];
        let rights = if count == 0 { &rights[..0] } else { &rights[..] };
        let packet = [std::io::IoSlice::new(&bytes)];
        let flags = nix::sys::socket::MsgFlags::empty();
        nix::sys::socket::sendmsg::<()>(client.socket.as_raw_fd(), &packet, rights, flags, None).unwrap();
        let (reply, _) = client.reply().expect("an answer");
        assert_eq!(
            kind(reply),
            ErrorKind::Refused,
            "InstallAgent with {count} descriptors"
        );
        assert_eq!(state(&client, worker), State::Created);
    }
    test.finish(&[worker]);
}

#[test]
fn garbage_ends_its_connection_and_no_other() {
    let test = TestHelper::new();
    let witness = test.client();
    let good = wire::encode(&Request::Kill { worker: worker_id() }).unwrap();
    let mut packets: Vec<Vec<u8>> = vec![
        vec![0xff],
        vec![0x7f],
        vec![0; 300],
        vec![1; 513],
        vec![0xfd; 4000],
    ];
    packets.extend((1..good.len()).map(|len| good[..len].to_vec()));
    packets.push([&good[..], &good[..]].concat());
    packets.push([&good[..], &[0]].concat());
    for packet in &packets {
        let client = test.client();
        client.socket.send(packet, None).unwrap();
        assert!(client.reply().is_none(), "{packet:?} was answered");
    }
    assert_eq!(list(&witness), []);
    test.finish(&[]);
}

#[test]
fn the_greeting_comes_first_and_once() {
    let test = TestHelper::new();
    let client = Client::connect(&test.host);
    assert_eq!(
        kind(client.ask(&Request::List { after: None }).0),
        ErrorKind::Refused
    );
    assert!(
        client.reply().is_none(),
        "the connection goes on without a greeting"
    );
    assert_eq!(
        kind(
            test.client()
                .ask(&Request::Hello {
                    version: protocol::VERSION
                })
                .0
        ),
        ErrorKind::Refused
    );
    test.finish(&[]);
}

#[test]
fn only_the_supervisors_uid_is_served() {
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", testbed::harness::SUPERVISOR_UID, SLOTS);
    let helper = host.start_helper();
    // Root passes every mode, so the socket lets it in; the helper does not.
    let client = Client::connect(&host);
    let _ = client.socket.send(
        &wire::encode(&Request::Hello {
            version: protocol::VERSION,
        })
        .unwrap(),
        None,
    );
    assert!(client.reply().is_none(), "another uid was served");
    helper.log.wait(&["closed the connection", "uid=0"]);
    assert_eq!(
        fs::metadata(host.socket()).unwrap().permissions().mode() & 0o777,
        0o600
    );
}

#[test]
fn an_endless_console_is_bounded_and_harms_nobody() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    let (reply, console) = install(
        &client,
        worker,
        sealed_memfd(b"#!/bin/bash\nyes & exec sleep 1000\n"),
    );
    assert_eq!(reply, Reply::AgentStarted);
    let console = console.unwrap();
    wait_for_console(&console, |text| text.ends_with("was dropped]\n"));
    assert!(console.metadata().unwrap().len() < protocol::config::Limits::default().console + 100);
    assert!(console.write_at(b"x", 0).is_err(), "the console can be written");
    let mut byte = [0];
    assert_eq!((&console).read(&mut byte).unwrap(), 1);
    test.finish(&[worker]);
}

#[test]
fn too_many_connections_are_told_to_come_back() {
    let test = TestHelper::new();
    let mut clients = Vec::new();
    loop {
        let client = Client::connect(&test.host);
        let _ = client.socket.send(
            &wire::encode(&Request::Hello {
                version: protocol::VERSION,
            })
            .unwrap(),
            None,
        );
        match client.reply().expect("an answer").0 {
            Reply::Welcome => clients.push(client),
            error => {
                assert_eq!(kind(error), ErrorKind::Busy);
                break;
            }
        }
        assert!(clients.len() <= 300, "there is no end to connections");
    }
    clients.clear();
    // As soon as their processes have ended there is room again.
    let hello = Request::Hello {
        version: protocol::VERSION,
    };
    until_is("room for a connection", || {
        Client::connect(&test.host).ask(&hello).0 == Reply::Welcome
    });
    test.finish(&[]);
}
