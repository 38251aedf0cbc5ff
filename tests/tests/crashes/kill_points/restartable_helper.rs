//! A host whose helper may be gone at any time, and one operation after the other at its socket.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use protocol::{Received, Reply, Request, Seqpacket, State, WorkerId, wire};
use testbed::harness::{Client, PAUSE, TEST_TIMEOUT, TestHost, worker_id};
use testbed::service_manager::Service;
use testbed::small_disk::SmallDisk;
use testbed::test_helper::{attack_program, list, slot, token};
use testbed::tracer::helper::{KillPlan, TraceResult, WatchPeriod, watch};
use testbed::tracer::wait_until_stopped;
use testbed::worker_snapshot::WorkerSnapshot;

/// Slots with something of everything that a slot can have.
pub const SLOTS: &str = r#"
[slots.rich]
target = "01HZX3N8Q4J5K6M7P8R9S0T1V2"
conflicts_with_slots = ["alone"]
add_to_groups = ["tty", "dialout"]
env.COLOUR = "deep red"
writable = ["/srv/of-the-job", "/opt/of-the-job"]
read_only = { "/opt/shown" = "/usr/share" }
devices = ["/dev/kmsg", "/dev/tty*"]
limits = { memory = "1G", cpus = 1, processes = 200, disk = "1G", run_time_seconds = 3600, best_effort = true }
[slots.alone]
target = "01HZX3N8Q4J5K6M7P8R9S0T1V2"
network = "none"
ignore_sync = true
[slots.plain]
target = "01HZX3N8Q4J5K6M7P8R9S0T1V2"
"#;

/// What is asked of the helper.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operation {
    Create,
    Install,
    Kill,
    Delete,
}

pub struct RestartableHelper {
    /// Before the host, whose directory it is mounted in: the fields go in this order.
    _disk: SmallDisk,
    pub host: TestHost,
    pub helper: Service,
    pub before: WorkerSnapshot,
}

impl RestartableHelper {
    pub fn new() -> RestartableHelper {
        let host = TestHost::new();
        host.configure("http://127.0.0.1:9", 0, SLOTS);
        // What is written to it is written at once: thousands of workers are made.
        let disk = SmallDisk::in_memory(&host);
        disk.limit("nr_inodes=0,size=1g");
        let helper = Service::new(&mut host.helper_command());
        let mut test = RestartableHelper {
            _disk: disk,
            before: WorkerSnapshot::take(&host),
            host,
            helper,
        };
        test.start();
        test.before = WorkerSnapshot::take(&test.host);
        test
    }

    /// Do it under the tracer. None: the helper's process closed the connection.
    pub fn under_the_tracer(
        &self,
        request: &Request,
        plan: Option<KillPlan>,
    ) -> (Option<Reply>, TraceResult) {
        let watcher = watch(self.helper.pid(), WatchPeriod::OneConnection, plan);
        let reply = ask(&self.host, request);
        (reply, watcher.join().expect("the tracer does not fail"))
    }

    /// Start the helper under the tracer, and see it serve, or die.
    pub fn start_under_the_tracer(&mut self, plan: Option<KillPlan>) -> TraceResult {
        let pid = self.helper.start_stopped();
        wait_until_stopped(pid);
        let watcher = watch(pid, WatchPeriod::Start, plan);
        watcher.join().expect("the tracer does not fail")
    }

    /// Start the helper, and wait until it serves.
    pub fn start(&mut self) {
        self.helper.start();
        self.host.wait_for_helper();
    }

    /// The helper was killed: start it again.
    pub fn restart(&mut self) {
        self.helper.wait_for_end();
        self.start();
    }

    /// Fail unless nothing is left of any worker.
    ///
    /// Where there was no worker by its record, a process that asked whether its uid is free may be on its way out.
    pub fn assert_clean(&self, was_one: bool, after: &str) {
        let end = Instant::now() + TEST_TIMEOUT;
        loop {
            let now = WorkerSnapshot::take(&self.host);
            if was_one || now == self.before || Instant::now() > end {
                assert_eq!(now, self.before, "after {after}: something is left");
                return;
            }
            std::thread::sleep(PAUSE);
        }
    }
}

pub fn request(operation: Operation, worker: WorkerId, name: &str) -> Request {
    match operation {
        Operation::Create => Request::CreateUser {
            worker,
            slot: slot(name),
        },
        Operation::Install => Request::InstallAgent {
            worker,
            bootstrap: token(),
        },
        Operation::Kill => Request::Kill { worker },
        Operation::Delete => Request::Delete { worker },
    }
}

/// Ask on a new connection, of a helper that may be killed at any moment. None: it was.
pub fn ask(host: &TestHost, request: &Request) -> Option<Reply> {
    ask_with(host, request).map(|(reply, _)| reply)
}

pub fn ask_with(host: &TestHost, request: &Request) -> Option<(Reply, Vec<OwnedFd>)> {
    let socket = Seqpacket::connect(&host.socket(), false).ok()?;
    let hello = Request::Hello {
        version: protocol::VERSION,
    };
    exchange(&socket, &hello, None)?;
    let agent = request
        .carries_descriptor()
        .then(|| attack_program("mixed-leftovers", &[]));
    exchange(&socket, request, agent)
}

fn exchange(socket: &Seqpacket, request: &Request, fd: Option<OwnedFd>) -> Option<(Reply, Vec<OwnedFd>)> {
    let bytes = wire::encode(request).expect("a request can be encoded");
    socket.send(&bytes, fd.as_ref().map(AsFd::as_fd)).ok()?;
    match socket.recv(wire::MAX_REPLY) {
        Ok(Received::Packet { bytes, descriptors }) => {
            Some((wire::decode(&bytes).expect("a reply"), descriptors))
        }
        _ => None,
    }
}

pub fn is_success(reply: &Reply) -> bool {
    matches!(
        reply,
        Reply::UserCreated { .. } | Reply::AgentStarted | Reply::Killed | Reply::Deleted
    )
}

/// A new worker, as far as it must be before `operation`; the console's reader waits until the job has done its
/// worst.
pub fn prepare(test: &RestartableHelper, operation: Operation, name: &str) -> WorkerId {
    let worker = worker_id();
    let must = |operation| {
        let reply = ask_with(&test.host, &request(operation, worker, name));
        let (reply, descriptors) = reply.expect("the helper answers");
        assert!(is_success(&reply), "{operation:?}: {reply:?}");
        descriptors
    };
    if operation > Operation::Create {
        must(Operation::Create);
    }
    if operation > Operation::Install {
        let console = must(Operation::Install).pop().expect("a console comes");
        testbed::test_helper::wait_for_line(&console.into(), "ready");
    }
    worker
}

/// How far the worker is; none, if there is none.
pub fn state_of(test: &RestartableHelper, worker: WorkerId) -> Option<State> {
    let all = list(&Client::new(&test.host));
    assert!(
        all.len() <= 1 && all.iter().all(|info| info.worker == worker),
        "{all:?}"
    );
    all.first().map(|info| info.state)
}
