//! The operator's commands: each test types what an operator would type, and reads what they would
//! read. Needs root.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use testbed::harness::{PAUSE, Running, TEST_TIMEOUT, binaries, until};
use testbed::test_factory::TestFactory;

mod checks;
mod commands;
mod egress;
mod files;
mod free;
mod held;
mod jobs;
mod journal;
mod manual;
mod metrics;
mod reload;
mod residue;
mod selftest;
mod servers;
mod shutdown;
mod unreachable;
mod usb;

/// What a command has printed, and how it ended.
struct CommandOutput {
    status: i32,
    out: String,
    err: String,
}

impl From<Output> for CommandOutput {
    fn from(output: Output) -> CommandOutput {
        CommandOutput {
            status: output.status.code().expect("it exited"),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl CommandOutput {
    /// It has failed with this status, and has said why: in a text with these parts.
    #[track_caller]
    fn failed(&self, status: i32, parts: &[&str]) {
        assert!(
            self.status == status && parts.iter().all(|part| self.err.contains(part)),
            "{}: {}",
            self.status,
            self.err
        );
    }
}

fn command(factory: &TestFactory, args: &[&str]) -> Command {
    let mut command = Command::new(binaries().join("user-factory"));
    // What follows a command of its own is that command's.
    command
        .arg(args[0])
        .arg("--root")
        .arg(&factory.host.root)
        .args(&args[1..]);
    command.stdin(Stdio::null());
    command
}

/// Type a command, and let it come to its end. The server that it may wait for runs on other threads.
fn run_command(factory: &TestFactory, args: &[&str]) -> CommandOutput {
    tokio::task::block_in_place(|| {
        command(factory, args)
            .output()
            .expect("the command is there")
            .into()
    })
}

/// The same, as a user to whom nobody has given anything.
fn run_command_as_nobody(factory: &TestFactory, args: &[&str]) -> CommandOutput {
    let mut command = command(factory, args);
    command.uid(65_534).gid(65_534);
    tokio::task::block_in_place(|| command.output().expect("the command is there").into())
}

fn done(factory: &TestFactory, args: &[&str]) -> String {
    let result = run_command(factory, args);
    assert_eq!(result.status, 0, "{args:?}: {}{}", result.out, result.err);
    result.out
}

fn json(factory: &TestFactory, args: &[&str]) -> Value {
    let result = run_command(factory, &[args, &["--json"]].concat());
    serde_json::from_str(&result.out)
        .unwrap_or_else(|e| panic!("{args:?}: {e}: {}{}", result.out, result.err))
}

/// Wait until the status shows what is wanted.
async fn see<T>(factory: &TestFactory, mut wanted: impl FnMut(&Value) -> Option<T>) -> T {
    let ask = || {
        let status = ask_control_socket(factory, "/v1/status").unwrap_or_default();
        let parsed: Option<Value> = serde_json::from_str(&status).ok();
        let found = parsed.as_ref().and_then(&mut wanted);
        found.ok_or_else(|| format!("it never came: {status}\n{}", factory.supervisor.log.text()))
    };
    tokio::task::block_in_place(|| until(ask))
}

/// What the supervisor answers to a `GET`, as its commands ask.
fn ask_control_socket(factory: &TestFactory, path: &str) -> std::io::Result<String> {
    let mut stream = UnixStream::connect(socket(factory))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let body = text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
    Ok(body.unwrap_or_default())
}

/// The worker on this slot, once there is one.
async fn worker_on(factory: &TestFactory, slot: &str) -> String {
    see(factory, |status| {
        let mut slots = status["slots"].as_array()?.iter();
        let found = slots.find(|s| s["name"] == slot)?;
        found["worker"].as_str().map(str::to_owned)
    })
    .await
}

/// Wait until the factory answers, and both the server and the helper have answered it.
async fn answering(factory: &TestFactory) {
    see(factory, |status| {
        let both = status["server"]["reachable"] == true && status["helper"]["reachable"] == true;
        both.then_some(())
    })
    .await;
}

/// The first worker, once its agent is online as the factory sees it.
async fn online(factory: &TestFactory) -> String {
    see(factory, |status| {
        let worker = &status["workers"][0];
        (worker["phase"] == "online").then(|| worker["id"].as_str().expect("an id is a word").to_owned())
    })
    .await
}

/// How the slot is.
fn state_of(status: &Value, slot: &str) -> String {
    let mut slots = status["slots"].as_array().expect("there are slots").iter();
    let found = slots.find(|s| s["name"] == slot).expect("the slot is there");
    found["state"].as_str().expect("a state is a word").to_owned()
}

/// The value of a metric that has no labels.
fn metric(factory: &TestFactory, name: &str) -> Option<String> {
    let text = ask_control_socket(factory, "/metrics").expect("the supervisor answers");
    let name = format!("buildomat_user_factory_{name} ");
    text.lines()
        .find_map(|line| line.strip_prefix(&name))
        .map(str::to_owned)
}

fn socket(factory: &TestFactory) -> PathBuf {
    let place = protocol::config::CONTROL_DIR;
    factory
        .host
        .root
        .join(place)
        .join(protocol::config::CONTROL_SOCKET)
}
