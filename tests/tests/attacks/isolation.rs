//! Group C: getting out and across: sockets, devices, other jobs, secrets. What the hostile job attempts is in its module of the same name.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use protocol::{ErrorKind, Exit, Reply, Request, State, UserName, config};
use testbed::harness::{PAUSE, assert_warned, binaries, has_scopes, sealed_memfd, until, worker_id};
use testbed::host_snapshot::processes_of;
use testbed::test_helper::{
    SLOTS, TestHelper, attack, create, create_worker, install, kind, list, start_attack, wait_for_line,
    wait_until,
};

use crate::attacks::leftovers::ongoing;

/// Jobs have a `/tmp` of their own, which hides a test's host by itself. For `part`, a test of this file that
/// is left out otherwise, it is where jobs see the real host, and only what the helper does hides it.
fn where_jobs_look(part: &str) {
    let (_, module) = module_path!().split_once("::").expect("a module of the crate");
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([
        "--exact",
        &format!("{module}::{part}"),
        "--ignored",
        "--nocapture",
    ]);
    command.env("TMPDIR", "/srv").env("TESTBED_BINARIES", binaries());
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Something of the test's on the host, removed after it.
struct Made(PathBuf);

impl Drop for Made {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Let everybody on the host have it.
fn open_to_all(path: &Path) {
    let mode = if path.is_dir() { 0o755 } else { 0o777 };
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn abstract_socket(kind: SockType, name: &str) -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let made = socket(AddressFamily::Unix, kind, flags, None).unwrap();
    bind(
        made.as_raw_fd(),
        &UnixAddr::new_abstract(name.as_bytes()).unwrap(),
    )
    .unwrap();
    if kind != SockType::Datagram {
        listen(&made, Backlog::new(5).unwrap()).unwrap();
    }
    made
}

#[test]
fn row_38_sockets_of_the_host_are_unreachable_by_path_and_by_abstract_name() {
    where_jobs_look("sockets");
}

#[test]
#[ignore = "a part of row 38, which starts it"]
fn sockets() {
    let alone = "[slots.alone]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\nnetwork = \"none\"\n";
    let test = TestHelper::with(&format!("{SLOTS}{alone}"));
    let pid = std::process::id();
    let client = test.client();
    let made = |path: PathBuf| {
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        open_to_all(&path);
        (listener, Made(path))
    };
    let run = PathBuf::from(format!("/run/user-factory-test-{pid}.sock"));
    let proxy_dir = test.host.root.join(config::PROXY_DIR);
    let listeners = [
        made(run),
        made(proxy_dir.join(config::PROXY_SOCKET)),
        made(test.host.root.join("open.sock")),
    ];
    let datagrams = PathBuf::from(format!("/run/user-factory-test-{pid}.datagram"));
    let datagram = UnixDatagram::bind(&datagrams).unwrap();
    datagram.set_nonblocking(true).unwrap();
    open_to_all(&datagrams);
    let datagrams = Made(datagrams);
    for place in [&proxy_dir, &test.host.socket()] {
        open_to_all(place);
    }
    let names = ["stream", "datagram", "seqpacket"].map(|name| format!("user-factory-test-{pid}-{name}"));
    let kinds = [SockType::Stream, SockType::Datagram, SockType::SeqPacket];
    let abstracts: Vec<OwnedFd> = kinds
        .iter()
        .zip(&names)
        .map(|(kind, name)| abstract_socket(*kind, name))
        .collect();
    // That they can be reached at all.
    let _own = UnixStream::connect(&listeners[0].1.0).expect("the host's own processes reach it");
    listeners[0].0.accept().expect("it was just called");

    // One that is shown where it is, as a directory of an operator's would be, is another matter: the file is
    // there, and so is the listener. So the third is not among the arguments, and its end is looked at below.
    let at = |path: &Path| path.display().to_string();
    let mut args = vec![
        at(&listeners[0].1.0),
        at(&listeners[1].1.0),
        at(&datagrams.0),
        at(&test.host.socket()),
    ];
    let paths = args.len();
    for (kind, name) in ["stream", "datagram", "seqpacket"].iter().zip(&names) {
        args.push(format!("{kind}@{name}"));
    }
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let [worker, alone] = ["a", "alone"].map(|slot| create_worker(&client, slot));
    let elsewhere: Vec<String> = args[paths..]
        .iter()
        .map(|arg| format!("{arg}@elsewhere"))
        .collect();
    let elsewhere: Vec<&str> = args[..paths]
        .iter()
        .copied()
        .chain(elsewhere.iter().map(String::as_str))
        .collect();
    attack(&client, alone, "sockets", &elsewhere);
    if has_scopes() {
        attack(&client, worker, "sockets", &args);
    } else {
        assert_warned(
            &test.helper,
            "abstract sockets and signals are not kept within jobs",
        );
        attack(&client, worker, "sockets", &args[..paths]);
    }
    for (listener, made) in &listeners {
        let called = listener.accept().map(drop).expect_err("nobody may call");
        assert_eq!(
            called.kind(),
            std::io::ErrorKind::WouldBlock,
            "{}",
            made.0.display()
        );
    }
    let received = datagram.recv(&mut [0; 8]).expect_err("nobody may send");
    assert_eq!(received.kind(), std::io::ErrorKind::WouldBlock);
    for made in &abstracts {
        let received = nix::unistd::read(made, &mut [0; 8]).expect_err("nobody may send");
        assert!(
            [
                nix::errno::Errno::EAGAIN,
                nix::errno::Errno::EINVAL,
                nix::errno::Errno::ENOTCONN
            ]
            .contains(&received),
            "{received}"
        );
    }
    drop((listeners, datagrams));
    test.finish(&[worker, alone]);
}

/// One attempt of a job of slot a, to its end.
fn one(name: &str) -> String {
    let test = TestHelper::new();
    let worker = create_worker(&test.client(), "a");
    let console = attack(&test.client(), worker, name, &[]);
    test.finish(&[worker]);
    console
}

#[test]
fn row_39_device_nodes_of_the_host_are_neither_there_nor_made() {
    one("devices");
}

#[test]
fn row_40_no_input_is_injected_into_a_terminal() {
    let console = one("terminal");
    assert!(console.contains("typing is over"), "{console}");
}

/// A script of the host's job in slot c, and the number of its `sleep`, as the host has it.
fn neighbour(test: &TestHelper) -> (protocol::WorkerId, u32) {
    let client = test.client();
    let worker = create_worker(&client, "c");
    let script = b"#!/bin/bash\necho ready; exec sleep 1000\n";
    let (reply, console) = install(&client, worker, sealed_memfd(script));
    assert_eq!(reply, Reply::AgentStarted);
    wait_for_line(&console.unwrap(), "ready");
    let pid = until(|| {
        let all = processes_of(&test.host.uids);
        let line = all.iter().find(|line| line.ends_with("sleep"));
        line.map(|line| line.split(' ').next().unwrap().parse().unwrap())
            .ok_or(format!("{all:?}"))
    });
    (worker, pid)
}

fn assert_is_running(pid: u32, name: &str) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = |start: &str| {
        status
            .lines()
            .find(|line| line.starts_with(start))
            .unwrap_or_default()
    };
    assert!(
        line("Name:").contains(name) && !line("State:").contains('Z'),
        "{pid}: {status}"
    );
}

#[test]
fn row_41_processes_outside_of_the_job_get_no_signal() {
    let test = TestHelper::new();
    let client = test.client();
    let (other, sleeper) = neighbour(&test);
    let worker = create_worker(&client, "a");
    let pids = [std::process::id(), sleeper, test.helper.pid()].map(|pid| pid.to_string());
    attack(&client, worker, "signals", &[&pids[0], &pids[1], &pids[2]]);
    assert_is_running(sleeper, "sleep");
    assert_is_running(test.helper.pid(), "user-factory");
    test.finish(&[worker, other]);
}

#[test]
fn row_41_a_signal_to_all_ends_nothing_but_the_job_itself() {
    let test = TestHelper::new();
    let client = test.client();
    let (other, sleeper) = neighbour(&test);
    let worker = create_worker(&client, "a");
    start_attack(&client, worker, "kill-all", &[]);
    // It ends the job's own agent, and with that the job, itself included.
    let end = wait_until(&client, worker, |state| state != State::Running);
    assert_eq!(end, State::Exited(Exit::Signal(9)));
    assert_is_running(sleeper, "sleep");
    assert_is_running(test.helper.pid(), "user-factory");
    test.finish(&[worker, other]);
}

/// Of this process only: it may see what other tests, each in a process of its own, have left open.
fn secret() -> String {
    format!("s3cret-of-one-only-{}-", std::process::id())
}

fn backwards(secret: &str) -> String {
    secret.chars().rev().collect()
}

#[test]
fn row_42_another_jobs_files_are_out_of_reach() {
    where_jobs_look("files");
}

#[test]
#[ignore = "a part of row 42, which starts it"]
fn files() {
    let test = TestHelper::new();
    let client = test.client();
    let (first, second) = (create_worker(&client, "a"), create_worker(&client, "c"));
    ongoing(&client, first, "keep-secret", &[&secret()], "ready");
    let home = format!("/home/{}", UserName::from(first));
    let files = test.host.worker_dir(first);
    assert!(
        files.join("fs/work").join(secret()).exists(),
        "the first job has kept nothing"
    );
    let devices = test.host.root.join(config::RUN_DIR).join("devices");
    let devices = devices.join(first.to_string());
    // The worker's directory is closed to all but root. Suppose that it were not.
    for path in files.ancestors().take_while(|path| **path != test.host.root) {
        open_to_all(path);
    }
    let args = [
        backwards(&secret()),
        home,
        files.display().to_string(),
        devices.display().to_string(),
    ];
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let console = attack(&client, second, "seek", &args);
    assert!(
        console.contains("files were read") && !console.contains("\n0 files were read"),
        "{console}"
    );
    test.finish(&[first, second]);
}

#[test]
fn row_43_the_factorys_token_state_and_configuration_and_homes_are_hidden() {
    where_jobs_look("secrets");
}

#[test]
#[ignore = "a part of row 43, which starts it"]
fn secrets() {
    let test = TestHelper::new();
    let root = &test.host.root;
    let pid = std::process::id();
    // In all of these places everybody may read: what is tried is the hiding alone.
    let (home, roots) = (
        format!("/home/user-factory-test-{pid}"),
        format!("/root/user-factory-test-{pid}"),
    );
    let made = [&home, &roots].map(|path| Made(path.into()));
    let config_dir = root.join(config::CONFIG_PATH).parent().unwrap().to_owned();
    let state = root.join(config::STATE_DIR);
    let dirs = [
        PathBuf::from(&home),
        PathBuf::from(&roots),
        config_dir,
        state.clone(),
        state.join("supervisor"),
        state.join("workers"),
        root.join(config::RUN_DIR),
    ];
    for dir in &dirs {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("marker"), secret()).unwrap();
        open_to_all(&dir.join("marker"));
        open_to_all(dir);
    }
    let client = test.client();
    let worker = create_worker(&client, "a");
    let mut args = vec![backwards(&secret())];
    args.extend(dirs.iter().map(|dir| dir.display().to_string()));
    args.push(root.join(config::CONFIG_PATH).display().to_string());
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    attack(&client, worker, "seek", &args);
    fs::remove_file(state.join("workers/marker")).unwrap();
    drop(made);
    test.finish(&[worker]);
}

#[test]
fn row_43_a_token_that_everybody_on_the_host_may_read_is_hidden() {
    where_jobs_look("open_token");
}

#[test]
#[ignore = "a part of row 43, which starts it"]
fn open_token() {
    let host = testbed::harness::TestHost::new();
    host.configure("http://127.0.0.1:9", 0, SLOTS);
    let token = host.root.join("token");
    fs::write(&token, secret()).unwrap();
    open_to_all(&token);
    let test = TestHelper::on(host, None);
    let client = test.client();
    let worker = create_worker(&client, "a");
    let token = token.display().to_string();
    attack(&client, worker, "seek", &[&backwards(&secret()), &token]);
    test.finish(&[worker]);
}

#[test]
fn row_43_a_token_that_was_replaced_since_is_hidden() {
    where_jobs_look("replaced_token");
}

#[test]
#[ignore = "a part of row 43, which starts it"]
fn replaced_token() {
    let host = testbed::harness::TestHost::new();
    host.configure("http://127.0.0.1:9", 0, SLOTS);
    let token = host.root.join("token");
    fs::write(&token, "an old one").unwrap();
    let test = TestHelper::on(host, None);
    let client = test.client();
    let first = create_worker(&client, "a");
    attack(
        &client,
        first,
        "seek",
        &[&backwards(&secret()), &token.display().to_string()],
    );
    // As an editor does it: the old file, and what lay over it, goes.
    let new = test.host.root.join(config::STATE_DIR).join("new-token");
    fs::write(&new, secret()).unwrap();
    open_to_all(&new);
    fs::rename(new, &token).unwrap();
    let second = create_worker(&client, "c");
    attack(
        &client,
        second,
        "seek",
        &[&backwards(&secret()), &token.display().to_string()],
    );
    test.finish(&[first, second]);
}

/// While a job that nothing but SIGKILL ends is there, and while it is deleted, many ask for the other slot.
fn conflicting(mine: &str, other: &str) {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, mine);
    let console = start_attack(&client, worker, "daemons", &[]);
    wait_for_line(&console, "attempt over");
    let (over, refusals) = (AtomicBool::new(false), AtomicU32::new(0));
    let winners = std::thread::scope(|scope| {
        let ask = || {
            let client = test.client();
            while !over.load(Ordering::SeqCst) {
                let next = worker_id();
                let reply = create(&client, next, other);
                if let Reply::UserCreated { .. } = reply {
                    // First, so that what fails below does not leave the others asking for ever.
                    over.store(true, Ordering::SeqCst);
                    // At this instant, whatever the reply to Delete is doing.
                    let all = processes_of(&test.host.uids);
                    assert!(all.is_empty(), "the job of slot {mine} still has {all:?}");
                    assert!(!test.host.worker_dir(worker).exists(), "it still has files");
                    assert!(list(&client).iter().all(|info| info.worker != worker));
                    return Some(next);
                }
                assert_eq!(kind(reply), ErrorKind::SlotTaken);
                refusals.fetch_add(1, Ordering::SeqCst);
            }
            None
        };
        let threads = [(); 6].map(|()| scope.spawn(ask));
        // All of them have been refused before it goes.
        while refusals.load(Ordering::SeqCst) < 60 {
            assert!(!over.load(Ordering::SeqCst), "it got the slot at once");
            std::thread::sleep(PAUSE);
        }
        assert!(!processes_of(&test.host.uids).is_empty(), "the job is none");
        assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
        let threads = threads.into_iter().map(|thread| thread.join().unwrap());
        threads.flatten().collect::<Vec<_>>()
    });
    assert_eq!(winners.len(), 1, "{winners:?}");
    test.finish(&winners);
}

#[test]
fn row_50_a_conflicting_slot_waits_until_a_job_that_will_not_die_is_deleted() {
    conflicting("a", "b");
}

#[test]
fn row_50_a_conflict_that_only_the_other_slot_names_counts_too() {
    conflicting("b", "a");
}
