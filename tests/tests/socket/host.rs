//! What happens to the host, the configuration and the helper around its workers.

use protocol::config::CONFIG_PATH;
use testbed::small_disk::SmallDisk;
use testbed::worker_snapshot::WorkerSnapshot;

use super::*;

#[test]
fn a_restarted_helper_changes_nothing_for_a_running_worker() {
    let mut test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    let (reply, console) = install(
        &client,
        worker,
        sealed_memfd(b"#!/bin/bash\n(for i in 1 2; do sleep 0.3; echo $i; done; sleep 1000) & exit 0\n"),
    );
    assert_eq!(reply, Reply::AgentStarted);
    let console = console.unwrap();
    let before = processes_of(&test.host.uids);
    test.helper.signal(Signal::SIGKILL);
    test.helper.wait();
    test.helper = test.host.start_helper();
    wait_for_line(&console, "2");
    assert!(!before.is_empty());
    assert_eq!(state(&test.client(), worker), State::Running);
    assert_eq!(
        kind(create(&test.client(), worker_id(), "b")),
        ErrorKind::SlotTaken
    );
    // A connection outlives its helper, too.
    assert_eq!(state(&client, worker), State::Running);
    test.finish(&[worker]);
}

#[test]
fn a_replaced_configuration_directory_starts_no_job_until_it_is_back() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    let path = test.host.root.join(CONFIG_PATH);
    let (directory, moved) = (path.parent().unwrap(), test.host.root.join("moved"));
    fs::rename(directory, &moved).unwrap();
    fs::create_dir(directory).unwrap();
    fs::copy(moved.join("config.toml"), &path).unwrap();
    let (Reply::Error(error), _) = install(&client, worker, sealed_memfd(b"#!/bin/bash\n")) else {
        panic!("a job was started")
    };
    assert!(
        error.message().contains("restart the helper"),
        "{}",
        error.message()
    );
    fs::remove_dir_all(directory).unwrap();
    fs::rename(&moved, directory).unwrap();
    run(&client, worker, "exit 1");
    test.finish(&[worker]);
}

#[test]
fn a_slot_that_left_the_configuration_is_still_cleaned_up() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "c");
    let (reply, _) = install(
        &client,
        worker,
        sealed_memfd(b"#!/bin/bash\nsleep 1000 & exit 0\n"),
    );
    assert_eq!(reply, Reply::AgentStarted);
    test.host
        .configure("http://127.0.0.1:9", 0, SLOTS.split("[slots.c]").next().unwrap());
    assert_eq!(kind(create(&client, worker_id(), "c")), ErrorKind::NoSuchSlot);
    test.host
        .configure("http://127.0.0.1:9", 0, "[slots.c]\ncolour = 1\n");
    assert_eq!(kind(create(&test.client(), worker_id(), "a")), ErrorKind::Busy);
    test.finish(&[worker]);
}

#[test]
fn a_configuration_that_others_could_write_is_refused() {
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", 0, SLOTS);
    let path = host.root.join(CONFIG_PATH);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o664)).unwrap();
    let start = || {
        let mut command =
            std::process::Command::new(testbed::harness::binaries().join("user-factory-helper"));
        Running::start(
            command
                .arg("--root")
                .arg(&host.root)
                .args(["--cgroup", &host.cgroup]),
        )
    };
    let mut helper = start();
    assert!(!helper.wait().success());
    helper.log.wait(&["nobody else can write"]);
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
    let mut helper = start();
    assert!(!helper.wait().success());
    helper.log.wait(&["cannot open", "config.toml"]);
}

#[test]
fn a_full_disk_at_any_step_leaves_a_worker_that_delete_removes() {
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", 0, SLOTS);
    let disk = SmallDisk::in_memory(&host);
    let _helper = host.start_helper();
    let client = Client::new(&host);
    let before = HostSnapshot::take(&host);
    let mut outcomes = [0, 0, 0];
    // Inodes for ever more of the steps, then blocks; the first rounds fail at once, the last succeeds.
    let limits = (3..45)
        .map(|n| format!("nr_inodes={n},size=64m"))
        .chain((1..12).map(|n| format!("nr_inodes=1000,size={}k", 16 * n)));
    for limit in limits {
        disk.limit(&limit);
        let unused = WorkerSnapshot::take(&host);
        let worker = worker_id();
        let step = match create(&client, worker, "a") {
            Reply::Error(error) => {
                assert_eq!(error.kind, ErrorKind::Failed, "{limit}: {error}");
                0
            }
            Reply::UserCreated { .. } => match install(
                &client,
                worker,
                sealed_memfd(&[b"#!/bin/true\n", &[b'#'; 60_000][..]].concat()),
            )
            .0
            {
                Reply::Error(error) => {
                    assert_eq!(error.kind, ErrorKind::Failed, "{limit}: {error}");
                    1
                }
                _ => 2,
            },
            other => panic!("{other:?}"),
        };
        outcomes[step] += 1;
        assert_eq!(
            client.ask(&Request::Delete { worker }).0,
            Reply::Deleted,
            "with {limit}"
        );
        assert_eq!(WorkerSnapshot::take(&host), unused, "with {limit}");
    }
    before.assert_unchanged(&host);
    assert!(
        outcomes.iter().all(|count| *count > 0),
        "not every step failed once: {outcomes:?}"
    );
}

/// Start the helper with a socket that is already open, as systemd does.
fn with_socket(host: &TestHost, kind: nix::sys::socket::SockType, mode: u32) -> Running {
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, UnixAddr, bind, listen, socket};
    use std::os::fd::AsRawFd;
    let path = host.socket();
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let _ = fs::remove_file(&path);
    // Without close-on-exec; bash then puts it where sd_listen_fds(3) says.
    let fd = socket(AddressFamily::Unix, kind, SockFlag::empty(), None).unwrap();
    bind(fd.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    listen(&fd, Backlog::new(8).unwrap()).unwrap();
    let script = format!(
        "exec 3<&{}; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"",
        fd.as_raw_fd()
    );
    let mut command = std::process::Command::new("bash");
    command
        .args(["-c", &script, "bash"])
        .arg(testbed::harness::binaries().join("user-factory-helper"));
    Running::start(
        command
            .arg("--root")
            .arg(&host.root)
            .args(["--cgroup", &host.cgroup]),
    )
}

#[test]
fn a_socket_from_systemd_is_served() {
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", 0, SLOTS);
    let helper = with_socket(&host, nix::sys::socket::SockType::SeqPacket, 0o660);
    helper.log.wait(&["serving"]);
    assert_eq!(list(&Client::new(&host)), []);
}

#[test]
fn a_socket_from_systemd_that_is_open_to_all_or_of_another_kind_is_refused() {
    use nix::sys::socket::SockType;
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", 0, SLOTS);
    for (kind, mode, sentence) in [
        (SockType::SeqPacket, 0o666, "is open to everybody"),
        (SockType::Stream, 0o660, "not a listening SOCK_SEQPACKET"),
    ] {
        let mut helper = with_socket(&host, kind, mode);
        assert!(!helper.wait().success());
        helper.log.wait(&[sentence]);
    }
}

#[test]
fn a_range_without_a_free_uid_is_a_limit() {
    let mut host = TestHost::new();
    host.uids = *host.uids.start()..=*host.uids.start();
    host.configure("http://127.0.0.1:9", 0, SLOTS);
    let _helper = host.start_helper();
    let client = Client::new(&host);
    let worker = create_worker(&client, "a");
    assert_eq!(kind(create(&client, worker_id(), "c")), ErrorKind::Limit);
    assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    let worker = create_worker(&client, "c");
    assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
}
