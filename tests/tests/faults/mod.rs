//! Real faults: the real binaries, and a world around them that breaks. Each test ends in the right state, with one
//! line of the log that names what was wrong and what to do, and with nothing for an operator to clean up. The rows are
//! those of group G. Needs root.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::fake_server::Ulid;
use testbed::harness::{Log, Running, SUPERVISOR_UID, TestHost, binaries, until_is};
use testbed::test_factory::{ONE, TWO, TestFactory, lines};

mod clock;
mod database;
mod devices;
mod disk;
mod identity;
mod kernel;
mod killed;
mod server;
mod slots;
mod storage;
mod twice;
mod upgrade;

/// The log has one line with all of these, and no second.
fn once(log: &Log, from: usize, parts: &[&str]) {
    tokio::task::block_in_place(|| log.wait_for_exactly(1, from, parts));
}

/// Start what will refuse to work; the line that says why, and what to do.
fn refused(command: &mut std::process::Command, parts: &[&str]) {
    let mut running = Running::start(command);
    assert!(!running.wait().success(), "it works:\n{}", running.log.text());
    once(&running.log, 0, parts);
}

fn worker_of(factory: &TestFactory, job: Ulid) -> Ulid {
    factory.server.job(job).worker.expect("the job runs")
}

/// Type a command on this host: its exit status and what it prints.
fn command(host: &TestHost, words: &[&str]) -> (i32, String) {
    let mut command = std::process::Command::new(binaries().join("user-factory"));
    command.args(words).arg("--root").arg(&host.root);
    let output = tokio::task::block_in_place(|| command.output().unwrap());
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    (output.status.code().expect("it exited"), text)
}

/// The slot of the job's worker.
fn slot_of(factory: &TestFactory, job: Ulid) -> String {
    let private = factory.server.worker(worker_of(factory, job)).private;
    let private = private.expect("it is associated");
    let (slot, _) = private.split_once('@').expect("it has the host's owner tag");
    slot.to_owned()
}

/// The processes of a job, each with its command line.
fn processes(factory: &TestFactory, job: Ulid) -> Vec<(Pid, String)> {
    let worker = worker_of(factory, job).to_string();
    let cgroup = factory.host.cgroup_dir().join("workers").join(worker);
    let pids = fs::read_to_string(cgroup.join("cgroup.procs")).expect("the worker has a cgroup");
    let pids = pids.lines().map(|pid| pid.parse().expect("a pid"));
    pids.map(|pid: i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        (Pid::from_raw(pid), line)
    })
    .collect()
}

/// The worker's first process.
fn pid_1(factory: &TestFactory, job: Ulid) -> Pid {
    let is_first = |pid: &Pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let inner = status.lines().find_map(|line| line.strip_prefix("NSpid:"));
        inner.and_then(|line| line.split_whitespace().next_back()) == Some("1")
    };
    let all = processes(factory, job);
    let found = all.iter().map(|(pid, _)| *pid).find(is_first);
    found.unwrap_or_else(|| panic!("no pid 1 in {all:?}"))
}
