//! A host with a helper that serves root, so that a test itself is the client; and what tests ask at
//! its socket again and again.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::OnceLock;
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use protocol::{BootstrapToken, ErrorKind, Reply, Request, SlotName, State, WorkerId};

use crate::harness::{Client, Running, TEST_TIMEOUT, TestHost, binaries, sealed_memfd, worker_id};
use crate::host_snapshot::HostSnapshot;
use crate::small_disk::SmallDisk;

/// Three slots, the first two in conflict, the first with something of everything.
pub const SLOTS: &str = r#"
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

/// The host, its helper, and the snapshot from before the helper's first worker.
#[derive(Debug)]
pub struct TestHelper {
    /// Before the host, whose directory it is mounted in: the fields go in this order.
    pub disk: Option<SmallDisk>,
    /// With the helper's files in a directory of its own.
    pub host: TestHost,
    /// A test may replace it: the last one is then killed.
    pub helper: Running,
    /// Taken before the helper started.
    pub before: HostSnapshot,
}

impl TestHelper {
    /// With slots `a`, `b` and `c`.
    pub fn new() -> TestHelper {
        TestHelper::with(SLOTS)
    }

    /// With these slots.
    pub fn with(slots: &str) -> TestHelper {
        let host = TestHost::new();
        host.configure("http://127.0.0.1:9", 0, slots);
        TestHelper::on(host, None)
    }

    /// On this host, which is configured; its state directory is on `disk`.
    pub fn on(host: TestHost, disk: Option<SmallDisk>) -> TestHelper {
        let before = HostSnapshot::of_unused(&host);
        let helper = host.start_helper();
        TestHelper {
            disk,
            host,
            helper,
            before,
        }
    }

    /// A connection of its own, greeted.
    pub fn client(&self) -> Client {
        Client::new(&self.host)
    }

    /// Each must be deleted at the first request.
    pub fn delete(&self, workers: &[WorkerId]) {
        let client = self.client();
        for worker in workers {
            assert_eq!(client.ask(&Request::Delete { worker: *worker }).0, Reply::Deleted);
        }
    }

    /// Delete what the test made; then the host is as it was.
    pub fn finish(self, workers: &[WorkerId]) {
        self.delete(workers);
        let client = self.client();
        assert_eq!(list(&client), []);
        self.before.assert_unchanged(&self.host);
    }
}

/// Panics where it is no name of a slot.
pub fn slot(name: &str) -> SlotName {
    name.parse().unwrap()
}

/// `CreateUser` in the slot `name`, whatever comes of it.
pub fn create(client: &Client, worker: WorkerId, name: &str) -> Reply {
    client
        .ask(&Request::CreateUser {
            worker,
            slot: slot(name),
        })
        .0
}

/// A new worker in the slot `name`, which must be free.
pub fn create_worker(client: &Client, name: &str) -> WorkerId {
    let worker = worker_id();
    assert!(matches!(create(client, worker, name), Reply::UserCreated { .. }));
    worker
}

/// Of the right length, for no server.
pub fn token() -> BootstrapToken {
    "t0k3n".repeat(10).parse().unwrap()
}

/// `InstallAgent` with this descriptor: the reply, and the console where the reply carries one.
pub fn install(client: &Client, worker: WorkerId, agent: OwnedFd) -> (Reply, Option<File>) {
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
pub fn run(client: &Client, worker: WorkerId, script: &str) -> (State, String) {
    let (reply, console) = install(
        client,
        worker,
        sealed_memfd(format!("#!/bin/bash\n{script}\n").as_bytes()),
    );
    assert_eq!(reply, Reply::AgentStarted);
    let state = wait_until(client, worker, |state| state != State::Running);
    (state, read(&console.unwrap()))
}

/// The hostile job's program, which makes the attempt `name` with these arguments.
pub fn attack_program(name: &str, args: &[&str]) -> OwnedFd {
    static PROGRAM: OnceLock<Vec<u8>> = OnceLock::new();
    let read = || std::fs::read(binaries().join("hostile-job")).expect("the hostile job's program was built");
    let attempt = format!("\nATTACK {}", [&[name], args].concat().join("\t"));
    sealed_memfd(&[PROGRAM.get_or_init(read), attempt.as_bytes()].concat())
}

/// Let the hostile job make its attempt to the end, and fail unless all of it was blocked. Returns the console.
pub fn attack(client: &Client, worker: WorkerId, name: &str, args: &[&str]) -> String {
    let (reply, console) = install(client, worker, attack_program(name, args));
    assert_eq!(reply, Reply::AgentStarted);
    wait_until(client, worker, |state| state != State::Running);
    let console = read(&console.expect("a console comes with the reply"));
    assert!(
        console.contains("attempt over") && !console.contains("BROKEN"),
        "{name}:\n{console}"
    );
    console
}

/// Start the hostile job; the attempt goes on while the test does.
pub fn start_attack(client: &Client, worker: WorkerId, name: &str, args: &[&str]) -> File {
    let (reply, console) = install(client, worker, attack_program(name, args));
    assert_eq!(reply, Reply::AgentStarted);
    console.expect("a console comes with the reply")
}

/// The first 2 MiB of a console, whatever was read of it before.
pub fn read(console: &File) -> String {
    let mut bytes = vec![0; 2 << 20];
    let n = console.read_at(&mut bytes, 0).unwrap();
    String::from_utf8_lossy(&bytes[..n]).into_owned()
}

/// As `List` tells it; panics where the worker is not listed.
pub fn state(client: &Client, worker: WorkerId) -> State {
    list(client)
        .into_iter()
        .find(|info| info.worker == worker)
        .expect("the worker exists")
        .state
}

/// Wait for a worker with an agent until `good`; returns its state then.
pub fn wait_until(client: &Client, worker: WorkerId, good: impl Fn(State) -> bool) -> State {
    let end = Instant::now() + TEST_TIMEOUT;
    // The kernel says when the last process has left (`cgroups(7)`): that is when the agent has ended.
    let events = File::open(client.cgroups.join(format!("{worker}/cgroup.events"))).expect("it has an agent");
    loop {
        let _ = read(&events);
        let now = state(client, worker);
        if good(now) {
            return now;
        }
        assert!(
            ready(&events, PollFlags::POLLPRI, end),
            "worker {worker} stays {now:?}"
        );
    }
}

/// Wait until this happens at `path`, and there is what is looked for.
pub fn watch(path: &Path, what: AddWatchFlags, mut found: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + TEST_TIMEOUT;
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).expect("inotify");
    inotify.add_watch(path, what).expect("it can be watched");
    loop {
        while inotify.read_events().is_ok() {}
        if found() {
            return true;
        }
        if !ready(&inotify, PollFlags::POLLIN, end) {
            return false;
        }
    }
}

fn ready(fd: impl AsFd, what: PollFlags, end: Instant) -> bool {
    let left = end.saturating_duration_since(Instant::now());
    let mut fds = [PollFd::new(fd.as_fd(), what)];
    let timeout = PollTimeout::try_from(left).expect("it is short");
    poll(&mut fds, timeout).expect("poll") == 1
}

/// Wait until the console is as it is looked for.
pub fn wait_for_console(console: &File, found: impl Fn(&str) -> bool) {
    let path = format!("/proc/self/fd/{}", console.as_raw_fd());
    let found = watch(path.as_ref(), AddWatchFlags::IN_MODIFY, || found(&read(console)));
    assert!(found, "it is not on the console:\n{}", read(console));
}

/// Wait until a whole line of the console is this.
pub fn wait_for_line(console: &File, line: &str) {
    wait_for_console(console, |text| text.lines().any(|other| other == line));
}

/// All workers; panics where they are more than one reply holds.
pub fn list(client: &Client) -> Vec<protocol::WorkerInfo> {
    match client.ask(&Request::List { after: None }).0 {
        Reply::Listed { workers, more: false } => workers,
        other => panic!("{other:?}"),
    }
}

/// Of a reply that must be an error: its text is one line.
pub fn kind(reply: Reply) -> ErrorKind {
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

impl Default for TestHelper {
    fn default() -> Self {
        Self::new()
    }
}
