//! The root helper, driven over its socket as the supervisor, or an attacker with its uid, would. Needs root.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::time::Instant;

use nix::sys::signal::Signal;
use protocol::{BootstrapToken, ErrorKind, Exit, Reply, Request, SlotName, State, WorkerId, wire};
use testbed::census::{Census, processes_of};
use testbed::harness::{Client, PATIENCE, Running, TestHost, memory, sealed, worker_id};

mod host;
mod life;
mod packets;

const SLOTS: &str = r#"
[slots.a]
target = "01HZX3N8Q4J5K6M7P8R9S0T1V2"
conflicts_with_slots = ["b"]
env.COLOUR = "deep red"
writable = ["/srv/of-the-job"]
read_only = { "/opt/shown" = "/usr/share" }
[slots.b]
target = "01HZX3N8Q4J5K6M7P8R9S0T1V2"
[slots.c]
target = "01HZX3N8Q4J5K6M7P8R9S0T1V2"
"#;

/// A host with a helper that serves root, so that the test itself is the client.
struct Stage {
    host: TestHost,
    helper: Running,
    before: Census,
}

impl Stage {
    fn new() -> Stage {
        let host = TestHost::new();
        host.configure("http://127.0.0.1:9", 0, SLOTS);
        let before = Census::take(&host);
        let helper = host.helper();
        Stage { host, helper, before }
    }

    fn client(&self) -> Client {
        Client::new(&self.host)
    }

    /// Delete what the test made; then the host is as it was.
    fn finish(self, workers: &[WorkerId]) {
        let client = self.client();
        for worker in workers {
            assert_eq!(client.ask(&Request::Delete { worker: *worker }).0, Reply::Deleted);
        }
        assert_eq!(list(&client), []);
        self.before.assert_unchanged(&self.host);
    }
}

fn slot(name: &str) -> SlotName {
    name.parse().unwrap()
}

fn create(client: &Client, worker: WorkerId, name: &str) -> Reply {
    client
        .ask(&Request::CreateUser {
            worker,
            slot: slot(name),
        })
        .0
}

fn created(client: &Client, name: &str) -> WorkerId {
    let worker = worker_id();
    assert!(matches!(create(client, worker, name), Reply::UserCreated { .. }));
    worker
}

fn token() -> BootstrapToken {
    "t0k3n".repeat(10).parse().unwrap()
}

fn install(client: &Client, worker: WorkerId, agent: OwnedFd) -> (Reply, Option<File>) {
    let (reply, mut descriptors) = client.ask_with(
        &Request::InstallAgent {
            worker,
            bootstrap: token(),
        },
        Some(agent.as_fd()),
    );
    assert_eq!(reply.carries_descriptor(), !descriptors.is_empty());
    (reply, descriptors.pop().map(File::from))
}

/// Install a script as the agent, let it run until its install has ended, and return the console.
fn run(client: &Client, worker: WorkerId, script: &str) -> (State, String) {
    let (reply, console) = install(
        client,
        worker,
        sealed(format!("#!/bin/bash\n{script}\n").as_bytes()),
    );
    assert_eq!(reply, Reply::AgentStarted);
    let state = wait_until(client, worker, |state| state != State::Running);
    (state, read(&console.unwrap()))
}

fn read(console: &File) -> String {
    let mut bytes = vec![0; 2 << 20];
    let n = console.read_at(&mut bytes, 0).unwrap();
    String::from_utf8_lossy(&bytes[..n]).into_owned()
}

fn state(client: &Client, worker: WorkerId) -> State {
    list(client)
        .into_iter()
        .find(|info| info.worker == worker)
        .expect("the worker exists")
        .state
}

fn wait_until(client: &Client, worker: WorkerId, good: impl Fn(State) -> bool) -> State {
    let begin = Instant::now();
    loop {
        let now = state(client, worker);
        if good(now) {
            return now;
        }
        assert!(begin.elapsed() < PATIENCE, "worker {worker} stays {now:?}");
        std::thread::yield_now();
    }
}

fn wait_for_line(console: &File, line: &str) {
    let begin = Instant::now();
    while !read(console).lines().any(|other| other == line) {
        assert!(
            begin.elapsed() < PATIENCE,
            "the console has no {line:?}:\n{}",
            read(console)
        );
        std::thread::yield_now();
    }
}

fn list(client: &Client) -> Vec<protocol::WorkerInfo> {
    match client.ask(&Request::List { after: None }).0 {
        Reply::Workers { workers, more: false } => workers,
        other => panic!("{other:?}"),
    }
}

fn kind(reply: Reply) -> ErrorKind {
    match reply {
        Reply::Error(error) => {
            assert!(
                !error.message().is_empty() && !error.message().contains('\n'),
                "{:?}",
                error.message()
            );
            error.kind
        }
        other => panic!("not an error: {other:?}"),
    }
}
