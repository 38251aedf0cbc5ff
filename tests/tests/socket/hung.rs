//! A mount of the host's that does not answer, as of a network file system without its server. Here it is FUSE, which
//! nobody serves, and it is there for the helper alone: others on the machine would hang on it, too.

use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::ptrace;
use nix::sys::signal::kill;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use testbed::harness::tool;
use testbed::tracer::wait_until_stopped;

use super::*;

/// A helper in a mount namespace of its own, with a slot that shows a directory in which everything may hang.
struct HangingMountHelper {
    host: TestHost,
    helper: Running,
    namespace: File,
    place: tempfile::TempDir,
}

const SENTENCE: &str =
    "the host's mounts have not answered for 20 s: look for one that hangs (df hangs on it)";

impl HangingMountHelper {
    /// In its namespace, but not yet begun.
    fn stopped() -> HangingMountHelper {
        let place = create_shared_dir();
        let shown = place.path().join("shown");
        fs::create_dir(&shown).unwrap();
        let host = TestHost::new();
        let target = "target = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"";
        let slots = format!(
            "[slots.a]\n{target}\nread_only = {{ \"/opt/shown\" = \"{}\" }}\n[slots.b]\n{target}\n[slots.c]\n{target}\n",
            shown.display()
        );
        host.configure("http://127.0.0.1:9", 0, &slots);
        let own = host.helper_command();
        let mut command = Command::new(tool("unshare"));
        command.args(["--mount", "--propagation", "private", "bash", "-euc"]);
        command.args(["kill -STOP $$; exec \"$@\"", "bash"]);
        command.arg(own.get_program()).args(own.get_args());
        let helper = Running::start(&mut command);
        wait_until_stopped(helper.pid());
        let namespace = File::open(format!("/proc/{}/ns/mnt", helper.pid())).unwrap();
        HangingMountHelper {
            host,
            helper,
            namespace,
            place,
        }
    }

    fn go_on(&self) {
        self.helper.signal(Signal::SIGCONT);
        self.helper.log.wait(&["serving"]);
    }

    fn started() -> HangingMountHelper {
        let helper = HangingMountHelper::stopped();
        helper.go_on();
        helper
    }

    fn client(&self) -> Client {
        Client::new(&self.host)
    }

    fn shown(&self) -> PathBuf {
        self.place.path().join("shown")
    }

    /// In the namespace of the helper's host.
    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                unshare(CloneFlags::CLONE_FS).unwrap();
                setns(&self.namespace, CloneFlags::CLONE_NEWNS).unwrap();
                work()
            });
            thread.join().expect("the work is done")
        })
    }

    /// Mount what hangs. Once the descriptor is closed, what waits for it fails.
    fn hang(&self) -> File {
        self.inside(|| {
            let server = File::options().read(true).write(true).open("/dev/fuse").unwrap();
            let options = format!(
                "fd={},rootmode=40000,user_id=0,group_id=0,allow_other",
                server.as_raw_fd()
            );
            mount(
                Some("user-factory-test"),
                &self.shown(),
                Some("fuse"),
                MsFlags::empty(),
                Some(options.as_str()),
            )
            .unwrap();
            server
        })
    }

    fn release(&self) {
        self.inside(|| umount2(&self.shown(), MntFlags::MNT_DETACH).unwrap());
    }

    /// The helper's child that is in other mounts than the helper, if there is one, and not a worker's.
    fn builder(&self) -> Option<i32> {
        let monitor = self.helper.pid();
        let children = fs::read_to_string(format!("/proc/{monitor}/task/{monitor}/children")).unwrap();
        let mounts = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
        let own = mounts(&monitor.to_string());
        let is_one = |pid: &&str| {
            let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            mounts(pid).is_some() && mounts(pid) != own && !cgroup.contains("/workers/")
        };
        let all: Vec<i32> = children
            .split_whitespace()
            .filter(is_one)
            .map(|pid| pid.parse().unwrap())
            .collect();
        assert!(all.len() <= 1, "{all:?}");
        all.first().copied()
    }

    /// The same, once there is one: a session may be answered before the helper has begun to build.
    fn wait_for_builder(&self) -> i32 {
        until(|| self.builder().ok_or_else(|| "nothing is built".to_owned()))
    }
}

/// Ask for a launch, and do not wait for the answer.
fn begin_install(client: &Client, worker: WorkerId) {
    let request = Request::InstallAgent {
        worker,
        bootstrap: token(),
    };
    let agent = sealed_memfd(b"#!/bin/bash\nexit 1\n");
    client
        .socket
        .send(&wire::encode(&request).unwrap(), Some(agent.as_fd()))
        .unwrap();
}

fn assert_told(client: &Client) {
    let (reply, _) = client.reply().expect("the helper answers");
    let Reply::Error(error) = reply else {
        panic!("{reply:?}");
    };
    assert_eq!(error.kind, ErrorKind::Busy);
    assert!(error.message().contains(SENTENCE), "{error}");
}

fn is_answered(client: &Client) -> bool {
    let mut events = [nix::poll::PollFd::new(
        client.socket.as_fd(),
        nix::poll::PollFlags::POLLIN,
    )];
    nix::poll::poll(&mut events, nix::poll::PollTimeout::ZERO).unwrap() > 0
}

fn assert_launches(helper: &HangingMountHelper, worker: WorkerId) {
    let (reply, _) = install(&helper.client(), worker, sealed_memfd(b"#!/bin/bash\nexit 1\n"));
    assert_eq!(reply, Reply::AgentStarted);
}

fn end(helper: &HangingMountHelper, workers: &[WorkerId]) {
    for worker in workers {
        let deleted = helper.client().ask(&Request::Delete { worker: *worker }).0;
        assert_eq!(deleted, Reply::Deleted);
    }
}

#[test]
fn a_mount_that_hangs_delays_launches_only_and_they_fail_in_time() {
    let helper = HangingMountHelper::started();
    let client = helper.client();
    let (first, second) = (create_worker(&client, "a"), create_worker(&client, "b"));
    let server = helper.hang();
    let waiting = [helper.client(), helper.client()];
    begin_install(&waiting[0], first);
    begin_install(&waiting[1], second);
    // The monitor makes these their sessions, while a builder hangs.
    let other = helper.client();
    assert_eq!(list(&other).len(), 2);
    let third = create_worker(&other, "c");
    assert_eq!(other.ask(&Request::Kill { worker: third }).0, Reply::Killed);
    assert_eq!(other.ask(&Request::Delete { worker: third }).0, Reply::Deleted);
    helper.wait_for_builder();
    assert!(!waiting.iter().any(is_answered), "a launch did not wait");
    waiting.iter().for_each(assert_told);
    // The kernel has ended the builder; the next is another.
    helper.release();
    assert_launches(&helper, first);
    assert_launches(&helper, second);
    end(&helper, &[first, second]);
    drop(server);
}

#[test]
fn a_builder_that_cannot_be_ended_is_the_only_one_until_it_is_gone() {
    let helper = HangingMountHelper::started();
    let client = helper.client();
    let worker = create_worker(&client, "a");
    let server = helper.hang();
    let waiting = helper.client();
    begin_install(&waiting, worker);
    let builder = Pid::from_raw(helper.wait_for_builder());
    // While it is traced, the signal that ends it does not, whatever it waits for (`ptrace(2)`): as if it were in state D.
    ptrace::seize(builder, ptrace::Options::empty()).unwrap();
    assert_told(&waiting);
    assert_eq!(helper.builder(), Some(builder.as_raw()));
    // No second one is begun, and nobody waits for the first.
    let asked = Instant::now();
    begin_install(&waiting, worker);
    assert_told(&waiting);
    assert!(asked.elapsed().as_secs() < 15, "it waited {:?}", asked.elapsed());
    assert_eq!(helper.builder(), Some(builder.as_raw()));
    kill(builder, Signal::SIGKILL).unwrap();
    // Its parent is told after its tracer.
    waitpid(builder, None).unwrap();
    until_is("the builder's end", || helper.builder().is_none());
    helper.release();
    assert_launches(&helper, worker);
    end(&helper, &[worker]);
    drop(server);
}

#[test]
fn a_mount_that_hangs_when_the_helper_starts_keeps_no_worker_from_being_deleted() {
    let helper = HangingMountHelper::stopped();
    let server = helper.hang();
    helper.go_on();
    helper
        .helper
        .log
        .wait(&["WARN", "no job can be started", SENTENCE]);
    let worker = create_worker(&helper.client(), "a");
    end(&helper, &[worker]);
    helper.release();
    let worker = create_worker(&helper.client(), "a");
    assert_launches(&helper, worker);
    end(&helper, &[worker]);
    drop(server);
}
