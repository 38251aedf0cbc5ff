//! Group J: what anybody who reaches `factory.status_address` can do to the supervisor.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use protocol::config::{CONFIG_PATH, CONTROL_DIR, CONTROL_SOCKET};
use testbed::harness::{Running, SUPERVISOR_UID, TEST_TIMEOUT, binaries, raise_open_files};
use testbed::test_factory::{ONE, TestFactory};

use super::SOCKET;

/// A factory whose supervisor has at most so many open files, and a status page at the address.
async fn with_page(address: &str, open_files: u32) -> TestFactory {
    let mut factory = TestFactory::new(ONE).await;
    factory.end_supervisor(Signal::SIGTERM);
    let path = factory.host.root.join(CONFIG_PATH);
    let text = fs::read_to_string(&path).unwrap();
    let page = format!("[factory]\nstatus_address = \"{address}\"\nstatus_names = [\"ci.example\"]\n");
    fs::write(&path, text.replace("[factory]\n", &page)).unwrap();
    let mut command = Command::new("prlimit");
    command.arg(format!("--nofile={open_files}"));
    command.arg("setpriv").args([
        &format!("--reuid={SUPERVISOR_UID}"),
        &format!("--regid={SUPERVISOR_UID}"),
        "--clear-groups",
    ]);
    command.arg(binaries().join("user-factory")).arg("serve");
    factory.supervisor = Running::start(command.arg("--root").arg(&factory.host.root));
    factory
}

/// A port of loopback, which is another user's for as long as the listener is there.
fn taken() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

/// The first line of the answer to `GET /metrics` with these fields.
fn ask(address: &str, fields: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    write!(stream, "GET /metrics HTTP/1.1\r\n{fields}\r\n").unwrap();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    answer.lines().next().unwrap_or_default().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn row_103_half_sent_requests_stop_neither_the_factory_nor_the_page() {
    raise_open_files();
    let (listener, address) = taken();
    drop(listener);
    let factory = with_page(&address, 1024).await;
    factory.wait_for_log(&["status page open"]);
    let host = format!("Host: {address}\r\n");
    // More than the supervisor may have open, and for longer than the job takes.
    let half = || {
        let mut stream = TcpStream::connect(&address).unwrap();
        let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: ");
        stream
    };
    let started_at = Instant::now();
    let mut half_sent: Vec<TcpStream> = (0..3000).map(|_| half()).collect();
    let pid = factory.supervisor.pid();
    for n in 0..3 {
        factory.wait_completed(factory.submit(&format!("echo {n}"))).await;
        assert!(ask(&address, &host).contains(" 200 "), "the page does not answer");
        let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
        assert!(open < 300, "the supervisor has {open} open files");
        half_sent.extend((0..200).map(|_| half()));
    }
    assert!(started_at.elapsed() < TEST_TIMEOUT / 2);
    // The connection of one that says nothing at all is closed.
    let mut silent = TcpStream::connect(&address).unwrap();
    silent.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    assert_eq!(silent.read(&mut [0]).unwrap_or(0), 0);
    let logged = ["WARN", "closed its oldest connection"];
    factory.wait_for_log(&logged);
    let cut = factory.supervisor.log.count(&logged);
    assert!((1..5).contains(&cut), "{cut} lines tell of it");
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_103_an_address_that_is_taken_stops_nothing_and_is_tried_again() {
    let (listener, address) = taken();
    let factory = with_page(&address, 1024).await;
    factory.wait_for_log(&["ERROR", "cannot listen at factory.status_address", &address]);
    factory
        .wait_completed(factory.submit("echo without a page"))
        .await;
    let mut status = Command::new(binaries().join("user-factory"));
    let status = status
        .args(["status", "--root"])
        .arg(&factory.host.root)
        .output()
        .unwrap();
    let status = String::from_utf8(status.stdout).unwrap();
    assert!(
        status.contains("not open for") && status.contains(&address),
        "{status}"
    );
    assert_eq!(factory.supervisor.log.count(&["cannot listen"]), 1);
    drop(listener);
    factory.wait_for_log(&["status page open", &address]);
    assert!(ask(&address, &format!("Host: {address}\r\n")).contains(" 200 "));
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_103_a_request_for_another_host_is_refused() {
    let (listener, address) = taken();
    drop(listener);
    let factory = with_page(&address, 1024).await;
    factory.wait_for_log(&["status page open"]);
    let own = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    for name in [
        &*address,
        "localhost",
        "LocalHost:9464",
        "ci.example:9464",
        own.trim(),
    ] {
        assert!(
            ask(&address, &format!("Host: {name}\r\n")).contains(" 200 "),
            "{name}"
        );
    }
    for fields in [
        "Host: evil.example\r\n",
        "Host: localhost.evil.example\r\n",
        "Host:\r\n",
    ] {
        let answer = ask(&address, fields);
        assert!(answer.contains(" 421 "), "{fields}: {answer}");
    }
    // There is no host that it is for: a browser always says one.
    assert!(!ask(&address, "Host: localhost\r\nHost: evil.example\r\n").contains(" 200 "));
    factory.finish().await;
}

#[test]
#[ignore = "a part of row 103, which starts it"]
fn many_connections() {
    let socket = std::env::var_os(SOCKET).expect("row 103 starts it");
    let mut kept = Vec::new();
    for _ in 0..500 {
        let mut stream = UnixStream::connect(&socket).unwrap();
        let _ = stream.write_all(b"GET /v1/status HTTP/1.1\r\nHost: ");
        kept.push(stream);
    }
    println!("connected.");
    let _ = std::io::stdin().read(&mut [0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn row_103_a_user_with_many_connections_to_the_control_socket_leaves_root_its_own() {
    let factory = TestFactory::new(ONE).await;
    let socket = factory.host.root.join(CONTROL_DIR).join(CONTROL_SOCKET);
    factory.wait_for_log(&["control socket open"]);
    let mut user = Command::new(std::env::current_exe().unwrap());
    user.args([
        "--ignored",
        "--exact",
        "--nocapture",
        "attacks::status_page::many_connections",
    ]);
    user.env(SOCKET, &socket)
        .uid(SUPERVISOR_UID)
        .gid(SUPERVISOR_UID)
        .current_dir("/");
    let mut user = user.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let output = BufReader::new(user.stdout.take().unwrap());
    let mut lines = output.lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("connected.")));
    let pid = factory.supervisor.pid();
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    assert!(open < 150, "the supervisor has {open} open files");
    let mut status = Command::new(binaries().join("user-factory"));
    let status = status
        .args(["status", "--root"])
        .arg(&factory.host.root)
        .status()
        .unwrap();
    assert!(status.success());
    factory.wait_completed(factory.submit("echo done")).await;
    drop(user.stdin.take());
    user.wait().unwrap();
    factory.wait_for_log(&[
        "WARN",
        "control socket has closed a connection of uid",
        "too many connections",
    ]);
    factory.finish().await;
}
