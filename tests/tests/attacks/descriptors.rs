//! Group E: row 62, what can be sent in place of the agent.
//!
//! The helper reads no descriptor without the three seals, and only memfds and files of tmpfs and hugetlbfs can
//! have them (`fcntl(2)`). That is why no file of a FUSE file system, FIFO or device is ever waited for.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{setsockopt, sockopt};
use nix::unistd::Pid;
use protocol::{ErrorKind, MAX_AGENT_BYTES, Received, Reply, Request, Seqpacket, State, VERSION, wire};
use testbed::harness::{SUPERVISOR_UID, TestHost, memfd, sealed_memfd, until, until_is};
use testbed::test_helper::{SLOTS, TestHelper, create_worker, install, kind, read, state, token, wait_until};
use testbed::tracer::helper::{children, listener};
use testbed::tracer::wait_until_stopped;

use crate::attacks::connections::StopOnDrop;

fn seal(fd: impl AsFd, seals: SealFlag) -> nix::Result<i32> {
    fcntl(fd, FcntlArg::F_ADD_SEALS(seals))
}

fn all_but_write() -> SealFlag {
    SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK
}

/// A writable shared mapping of the first page, which exists as long as this process.
fn map(fd: impl AsFd) -> nix::Result<*mut u8> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at a place of the kernel's choice touches no memory of Rust's.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            protection,
            libc::MAP_SHARED,
            fd.as_fd().as_raw_fd(),
            0,
        )
    };
    if at == libc::MAP_FAILED {
        Err(Errno::last())
    } else {
        Ok(at.cast())
    }
}

#[test]
fn row_62_every_other_kind_of_descriptor_is_refused() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let (pipe, _writer) = std::io::pipe().unwrap();
    let (stream, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut bad: Vec<(String, OwnedFd)> = vec![
        ("a pipe".into(), pipe.into()),
        ("a stream".into(), stream.into()),
        (
            "a listener".into(),
            TcpListener::bind("127.0.0.1:0").unwrap().into(),
        ),
        (
            "an unlinked file of tmpfs".into(),
            tempfile::tempfile_in("/dev/shm").unwrap().into(),
        ),
    ];
    let socket = test.host.socket();
    let helper = format!("/proc/{}", test.helper.pid());
    for path in [
        "/proc/self/mem",
        "/proc/self/ns/net",
        "/proc/self/exe",
        &format!("{helper}/status"),
        "/dev/zero",
        "/dev/full",
        "/dev/ptmx",
        "/proc/kmsg",
        "/etc",
    ] {
        // Not every machine has each of them to give.
        let options = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .clone();
        bad.extend(options.open(path).ok().map(|file| (path.to_owned(), file.into())));
    }
    // Without O_NONBLOCK: a read of it would wait for ever.
    let waits = OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
    bad.push(("a FIFO".into(), waits.into()));
    for path in [fifo.as_path(), socket.as_path(), "/bin/true".as_ref()] {
        let path_only = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(path)
            .unwrap();
        bad.push((format!("the place {}", path.display()), path_only.into()));
    }
    assert!(bad.len() >= 12, "this machine gave hardly anything to try");
    for (what, descriptor) in bad {
        assert_eq!(
            kind(install(&client, worker, descriptor).0),
            ErrorKind::Refused,
            "{what}"
        );
        assert_eq!(state(&client, worker), State::Created, "{what}");
    }
    test.finish(&[worker]);
}

#[test]
fn row_62_a_program_that_could_still_be_changed_is_refused() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    // A writable mapping from before: the kernel does not seal it.
    let mapped = memfd(b"#!/bin/true\n");
    let at = map(&mapped).expect("a memfd can be mapped");
    assert_eq!(
        seal(&mapped, SealFlag::F_SEAL_WRITE | all_but_write()),
        Err(Errno::EBUSY)
    );
    // It does seal it against new ones, which looks alike and is not enough.
    let future = SealFlag::from_bits_retain(libc::F_SEAL_FUTURE_WRITE);
    seal(&mapped, future | all_but_write()).expect("the kernel has this seal since 5.1");
    // SAFETY: the page is mapped, writable, and nobody else's.
    unsafe { at.write_volatile(b'X') };
    assert_eq!(kind(install(&client, worker, mapped).0), ErrorKind::Refused);
    for some in [
        SealFlag::empty(),
        SealFlag::F_SEAL_WRITE,
        all_but_write(),
        SealFlag::F_SEAL_SEAL,
    ] {
        let half = memfd(b"#!/bin/true\n");
        seal(&half, some).unwrap();
        assert_eq!(
            kind(install(&client, worker, half).0),
            ErrorKind::Refused,
            "sealed by {some:?}"
        );
    }
    assert_eq!(state(&client, worker), State::Created);
    test.finish(&[worker]);
}

#[test]
fn row_62_a_program_changed_while_it_is_read_is_refused() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    let program = [
        b"#!/bin/bash\necho the first\nexit 7\n".as_slice(),
        &vec![b'#'; 8 << 20],
    ]
    .concat();
    let agent = sealed_memfd(&program);
    // Every way to write, all the time that the helper copies it.
    let over = AtomicBool::new(false);
    let copy = File::from(agent.try_clone().unwrap());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut copy = &copy;
            while !over.load(Ordering::Relaxed) {
                assert!(copy.write(b"#!/bin/bash\necho the second\n").is_err());
                assert!(copy.set_len(1).is_err() && copy.set_len(1 << 30).is_err());
                assert!(map(copy).is_err(), "sealed, and mapped writable");
                let again = OpenOptions::new()
                    .write(true)
                    .open(format!("/proc/self/fd/{}", copy.as_raw_fd()));
                assert!(again.and_then(|mut again| again.write(b"x")).is_err());
                // The offset is shared with the helper, which does not use it.
                let _ = copy.read(&mut [0; 4096]);
            }
        });
        let written = StopOnDrop(&over);
        let (reply, console) = install(&client, worker, agent);
        drop(written);
        assert_eq!(reply, Reply::AgentStarted);
        wait_until(&client, worker, |state| state != State::Running);
        assert_eq!(read(&console.unwrap()), "the first\n");
    });
    test.finish(&[worker]);
}

#[test]
fn row_62_files_of_absurd_lengths_are_refused() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    for len in [MAX_AGENT_BYTES + 1, 1 << 40, i64::MAX as u64] {
        let sparse = File::from(memfd(b"#!/bin/true\n"));
        sparse.set_len(len).unwrap();
        seal(&sparse, SealFlag::F_SEAL_WRITE | all_but_write()).unwrap();
        assert_eq!(
            kind(install(&client, worker, sparse.into()).0),
            ErrorKind::Refused,
            "{len} bytes"
        );
    }
    assert_eq!(
        kind(install(&client, worker, sealed_memfd(b"")).0),
        ErrorKind::Refused
    );
    // A good one that cannot be read through this descriptor.
    let agent = sealed_memfd(b"#!/bin/bash\necho started\nexit 1\n");
    let path = format!("/proc/self/fd/{}", agent.as_raw_fd());
    let unreadable = OpenOptions::new().write(true).open(path).unwrap();
    assert_eq!(
        kind(install(&client, worker, unreadable.into()).0),
        ErrorKind::Failed
    );
    assert_eq!(state(&client, worker), State::Created);
    // None of these was the one start that a worker has.
    let (reply, console) = install(&client, worker, agent);
    assert_eq!(reply, Reply::AgentStarted);
    testbed::test_helper::wait_for_line(&console.unwrap(), "started");
    assert_eq!(client.ask(&Request::Kill { worker }).0, Reply::Killed);
    test.finish(&[worker]);
}

/// A connection whose closing waits for an hour: its peer, which is the second, takes nothing.
fn lingering() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 3600,
    };
    setsockopt(&stream, sockopt::Linger, &linger).unwrap();
    stream.set_nonblocking(true).unwrap();
    while stream.write(&[0; 1 << 16]).is_ok() {}
    (stream.into(), peer)
}

/// Send it with the descriptor, of which only what is on its way is left then. Where the helper has closed that first,
/// closing waits here: in a thread that nobody waits for.
fn send_and_close(socket: &Seqpacket, bytes: &[u8], descriptor: OwnedFd) {
    // The helper may have closed the connection by now.
    let _ = socket.send(bytes, Some(descriptor.as_fd()));
    std::thread::spawn(move || drop(descriptor));
}

#[test]
fn row_128_a_socket_that_waits_when_it_is_closed_holds_up_neither_its_worker_nor_others() {
    let test = TestHelper::new();
    let worker = create_worker(&test.client(), "a");
    let connect = || Seqpacket::connect(&test.host.socket(), false).unwrap();
    let receive = |socket: &Seqpacket| match socket.recv(wire::MAX_REPLY).unwrap() {
        Received::Packet { bytes, .. } => wire::decode::<Reply>(&bytes).unwrap(),
        other => panic!("{other:?}"),
    };
    let greet = || {
        let socket = connect();
        let hello = wire::encode(&Request::Hello { version: VERSION }).unwrap();
        socket.send(&hello, None).unwrap();
        assert_eq!(receive(&socket), Reply::Welcome);
        socket
    };
    let (stream, _peer) = lingering();
    let socket = greet();
    // The packet has the last reference by the time that the session takes it. Nobody else receives it: an agent's receiver
    // may have it for longer.
    let listener = listener(test.helper.pid());
    let session = until(|| match children(listener)[..] {
        [session] => Ok(session),
        ref several => Err(format!("not one session: {several:?}")),
    });
    kill(Pid::from_raw(session as i32), Signal::SIGSTOP).unwrap();
    wait_until_stopped(session);
    let list = wire::encode(&Request::List { after: None }).unwrap();
    socket.send(&list, Some(stream.as_fd())).unwrap();
    drop(stream);
    kill(Pid::from_raw(session as i32), Signal::SIGCONT).unwrap();
    assert!(matches!(receive(&socket), Reply::Listed { .. }));
    // The packet is taken: the kernel would close the socket for an hour.
    test.helper
        .log
        .wait(&["WARN", "a session has ended (signal: 14 (SIGALRM))"]);
    // As an agent.
    let (stream, _other_peer) = lingering();
    let socket = greet();
    let bootstrap = token();
    let install = wire::encode(&Request::InstallAgent { worker, bootstrap }).unwrap();
    send_and_close(&socket, &install, stream);
    assert_eq!(kind(receive(&socket)), ErrorKind::Refused);
    // In packets that are never received.
    let peers: Vec<TcpStream> = (0..10)
        .map(|_| {
            let (stream, peer) = lingering();
            let socket = connect();
            socket.send(b"no request", None).unwrap();
            send_and_close(&socket, b"x", stream);
            peer
        })
        .collect();
    test.finish(&[worker]);
    drop(peers);
}

/// Root passes every mode, as the group of the socket may pass the packaged one.
#[test]
fn row_128_nor_does_one_of_a_user_who_is_not_served() {
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", SUPERVISOR_UID, SLOTS);
    let helper = host.start_helper();
    let peers: Vec<TcpStream> = (0..10)
        .map(|_| {
            let (stream, peer) = lingering();
            let socket = Seqpacket::connect(&host.socket(), false).unwrap();
            send_and_close(&socket, b"x", stream);
            peer
        })
        .collect();
    until_is("the end of all ten", || {
        helper.log.count(&["closed the connection", "uid=0"]) == peers.len()
    });
}

/// Set how many files a process may have open (`prlimit(2)`), and return how many it might before.
fn set_open_files(pid: u32, limit: libc::rlim_t) -> libc::rlim_t {
    let mut before = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    let set = |new: *const libc::rlimit, old: *mut libc::rlimit| {
        // SAFETY: each is null, or a limit that outlives the call.
        let set = unsafe { libc::prlimit(pid as i32, libc::RLIMIT_NOFILE, new, old) };
        assert_eq!(set, 0, "{}", Errno::last());
    };
    set(std::ptr::null(), &mut before);
    let now = libc::rlimit {
        rlim_cur: limit,
        ..before
    };
    set(&now, std::ptr::null_mut());
    before.rlim_cur
}

#[test]
fn row_128_nor_does_one_for_which_no_session_can_be_forked() {
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", SUPERVISOR_UID, SLOTS);
    let helper = host.start_helper();
    let listener = listener(helper.pid());
    let open: Vec<u64> = std::fs::read_dir(format!("/proc/{listener}/fd"))
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
        .collect();
    let free: Vec<u64> = (0..).filter(|number| !open.contains(number)).take(3).collect();
    // Room for one end of a pipe; and for the whole pipe, but for no connection.
    for (room, failure) in [(1, "cannot fork a session"), (2, "cannot accept a connection")] {
        let seen = helper.log.len();
        let before = set_open_files(listener, free[room]);
        let (stream, _peer) = lingering();
        let socket = Seqpacket::connect(&host.socket(), false).unwrap();
        send_and_close(&socket, b"x", stream);
        drop(socket);
        let wait = |parts: &[&str]| helper.log.wait_from(seen, parts);
        wait(&["WARN", failure]);
        set_open_files(listener, before);
        wait(&["closed the connection", "uid=0"]);
    }
}
