//! Group E: a shell (`user-factory shell`) that is made while its worker is deleted. Both run under the tracer: each
//! is stopped before a call of our choice, and the other goes on from there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protocol::{Reply, Request, WorkerId};
use testbed::harness::{Running, TEST_TIMEOUT, TestHost, binaries, until_is};
use testbed::sample::Sample;
use testbed::test_helper::{TestHelper, create_worker, start_attack, wait_for_line};
use testbed::tracer::helper::{WatchPeriod, listener, watch_with};
use testbed::tracer::{Event, TraceAction, TracedCall, trace, wait_until_stopped};
use testbed::worker_snapshot::WorkerSnapshot;

/// Before the nth call of a process of this kind.
type Point = (&'static str, usize);

/// What a traced process tells the test.
#[derive(Debug, PartialEq, Eq)]
enum TracerEvent {
    /// It has stopped at its point, and waits for a word. It has the worker's lock.
    Stopped { locked: bool },
    /// It asks for the worker's lock, and goes on once it has it.
    AsksForTheLock,
    /// The shell's program runs.
    Inside,
    /// It has come to its end.
    Over,
}

/// Counts the calls of traced processes by their kind, and stops one before the call of its point.
struct Stopper {
    point: Option<Point>,
    seen: BTreeMap<&'static str, Vec<i64>>,
    events: Sender<TracerEvent>,
    go: Receiver<()>,
    /// Points begin with the first call for the worker's lock.
    has_started: bool,
    locked: bool,
}

impl Stopper {
    fn new(point: Option<Point>, events: Sender<TracerEvent>, go: Receiver<()>) -> Stopper {
        Stopper {
            point,
            seen: BTreeMap::new(),
            events,
            go,
            has_started: false,
            locked: false,
        }
    }

    fn enter(&mut self, kind: &'static str, call: TracedCall) {
        self.has_started |= call.number == libc::SYS_flock;
        if !self.has_started {
            return;
        }
        let calls = self.seen.entry(kind).or_default();
        calls.push(call.number);
        if self.point == Some((kind, calls.len() - 1)) {
            let locked = self.locked;
            let _ = self.events.send(TracerEvent::Stopped { locked });
            let _ = self.go.recv();
        }
        if call.number == libc::SYS_flock && call.arguments[1] == libc::LOCK_EX as u64 {
            let _ = self.events.send(TracerEvent::AsksForTheLock);
        }
    }

    /// The lock is had from the call that takes it to the one that gives it back.
    fn note_the_lock(&mut self, event: &Event) {
        match event {
            Event::Leave(call, 0) if call.number == libc::SYS_flock => {
                self.locked = call.arguments[1] == libc::LOCK_EX as u64;
            }
            _ => {}
        }
    }
}

/// One that is traced, from outside.
struct Traced {
    events: Receiver<TracerEvent>,
    go: Sender<()>,
    watcher: JoinHandle<BTreeMap<&'static str, Vec<i64>>>,
}

impl Traced {
    fn next(&self) -> TracerEvent {
        self.events
            .recv_timeout(TEST_TIMEOUT)
            .expect("it comes to something")
    }

    fn let_go(&self) {
        let _ = self.go.send(());
    }
}

/// A shell, stopped before its first instruction, then traced.
struct Shell {
    child: Child,
    /// Open: at its end the shell would end.
    _typed: ChildStdin,
    traced: Traced,
}

fn shell_command(program: &str, host: &TestHost, worker: WorkerId) -> Command {
    let mut command = Command::new(binaries().join(program));
    if program != "user-factory-manual" {
        command
            .arg("--stop-first")
            .arg(binaries().join("user-factory-manual"));
    }
    command
        .arg("shell")
        .arg("--root")
        .arg(&host.root)
        .arg(worker.to_string());
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

fn traced_shell(host: &TestHost, worker: WorkerId, point: Option<Point>) -> Shell {
    let mut child = shell_command("service-manager", host, worker)
        .spawn()
        .expect("the shell can be started");
    wait_until_stopped(child.id());
    let (sender, events) = channel();
    let (go, gone_on) = channel();
    let root = Pid::from_raw(child.id() as i32);
    let watcher = std::thread::spawn(move || {
        let mut stopper = Stopper::new(point, sender, gone_on);
        // Until its first exec it is another program.
        let mut is_helper = false;
        trace(
            root,
            &[],
            || (),
            |pid, event| {
                if pid == root {
                    stopper.note_the_lock(&event);
                }
                match event {
                    Event::Exec if pid == root => is_helper = true,
                    Event::Exec => {
                        // It is made: no point is behind this.
                        is_helper = false;
                        let _ = stopper.events.send(TracerEvent::Inside);
                        return TraceAction::Forget;
                    }
                    Event::Enter(call) if is_helper => {
                        stopper.enter(if pid == root { "shell" } else { "first" }, call);
                    }
                    Event::Gone if pid == root => {
                        let _ = stopper.events.send(TracerEvent::Over);
                    }
                    _ => {}
                }
                TraceAction::GoOn
            },
        );
        stopper.seen
    });
    Shell {
        _typed: child.stdin.take().expect("it was piped"),
        child,
        traced: Traced { events, go, watcher },
    }
}

/// The deletion of a worker, traced in the helper's processes that do it.
fn traced_deletion(test: &TestHelper, worker: WorkerId, point: Option<Point>) -> (Traced, JoinHandle<Reply>) {
    let (sender, events) = channel();
    let (go, gone_on) = channel();
    let (seen, calls) = channel();
    let mut stopper = Stopper::new(point, sender, gone_on);
    let monitor = test.helper.pid();
    let listener = Pid::from_raw(listener(monitor) as i32);
    let mut session = None;
    // The tracer's own thread ends with this span; what was seen comes by the channel.
    let watcher = watch_with(
        monitor,
        WatchPeriod::OneConnection,
        None,
        move |pid, event| match event {
            Event::Forked { parent, .. } if *parent == listener => session = Some(pid),
            Event::Enter(call)
                if session.is_some() && ![listener, Pid::from_raw(monitor as i32)].contains(&pid) =>
            {
                let kind = if session == Some(pid) { "session" } else { "user" };
                stopper.enter(kind, *call);
            }
            Event::Gone if session == Some(pid) => {
                let _ = seen.send(std::mem::take(&mut stopper.seen));
                let _ = stopper.events.send(TracerEvent::Over);
            }
            _ => {}
        },
    );
    let watcher = std::thread::spawn(move || {
        watcher.join().expect("the tracer does not fail");
        calls.recv().unwrap_or_default()
    });
    let client = test.client();
    let request = std::thread::spawn(move || client.ask(&Request::Delete { worker }).0);
    (Traced { events, go, watcher }, request)
}

/// A worker with a job that goes on.
fn running(test: &TestHelper) -> WorkerId {
    let client = test.client();
    let worker = create_worker(&client, "c");
    let console = start_attack(&client, worker, "never-end", &["idle"]);
    wait_for_line(&console, "ready");
    worker
}

/// The first of each call, and every so many of all.
fn points(kind: &'static str, calls: &[i64], every: usize) -> Vec<Point> {
    let mut names = BTreeSet::new();
    let numbered = calls.iter().enumerate();
    let chosen = numbered.filter(|(n, number)| names.insert(**number) || n % every == 0);
    chosen.map(|(n, _)| (kind, n)).collect()
}

/// Stop the shell at its point, the deletion at its own, let the shell go on as far as it comes, and then the deletion.
fn meet(test: &TestHelper, before: &WorkerSnapshot, at: (Point, Point)) {
    let worker = running(test);
    let shell = traced_shell(&test.host, worker, Some(at.0));
    let locked = loop {
        match shell.traced.next() {
            TracerEvent::Stopped { locked } => break Some(locked),
            // No two runs are quite the same: it had fewer calls.
            TracerEvent::Inside | TracerEvent::Over => break None,
            TracerEvent::AsksForTheLock => {}
        }
    };
    // Who holds the lock lets nobody else get to a point behind it.
    let point = (locked != Some(true)).then_some(at.1);
    let (deletion, request) = traced_deletion(test, worker, point);
    loop {
        match deletion.next() {
            TracerEvent::Stopped { .. } | TracerEvent::Over => break,
            TracerEvent::AsksForTheLock if point.is_none() => break,
            _ => {}
        }
    }
    if locked.is_some() {
        shell.traced.let_go();
        // As far as it comes: where the deletion has the lock, that is not far.
        while let TracerEvent::Stopped { .. } = shell.traced.next() {}
    }
    deletion.let_go();
    assert_eq!(request.join().expect("the helper answers"), Reply::Deleted);
    let left = WorkerSnapshot::take(&test.host);
    let Shell {
        mut child, traced, ..
    } = shell;
    let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
    // Both ask the kernel for its end, and the tracer goes first.
    traced.watcher.join().expect("the tracer does not fail");
    let _ = child.wait();
    deletion.watcher.join().expect("the tracer does not fail");
    assert_eq!(
        &left, before,
        "something is left: the shell was stopped at {at:?}"
    );
}

#[test]
fn row_65_a_shell_that_is_made_while_its_worker_is_deleted_does_not_outlive_it() {
    let test = TestHelper::new();
    // The helper's first worker finds nothing built.
    let worker = running(&test);
    test.delete(&[worker]);
    let before = WorkerSnapshot::take(&test.host);
    // What each does where nobody disturbs it.
    let worker = running(&test);
    let shell = traced_shell(&test.host, worker, None);
    while shell.traced.next() != TracerEvent::Inside {}
    let Shell {
        mut child,
        traced,
        _typed,
    } = shell;
    drop(_typed);
    let of_shell = traced.watcher.join().expect("the tracer does not fail");
    child.wait().expect("it is our child");
    let (deletion, request) = traced_deletion(&test, worker, None);
    assert_eq!(request.join().expect("the helper answers"), Reply::Deleted);
    let of_deletion = deletion.watcher.join().expect("the tracer does not fail");

    let position = |calls: &[i64], number| calls.iter().position(|call| *call == number);
    let until_the_clone = position(&of_shell["shell"], libc::SYS_clone3).expect("it makes its first process");
    // One that is in the cgroup is dead once the deletion has waited for it.
    let until_all_are_dead =
        position(&of_deletion["session"], libc::SYS_ppoll).expect("it waits for the dead");
    let pairs = |shells: Vec<Point>, deletions: Vec<Point>, every: usize| {
        let mut pairs = Vec::new();
        for (n, shell) in shells.iter().enumerate() {
            let some = deletions.iter().enumerate().filter(|(m, _)| (m + n) % every == 0);
            pairs.extend(some.map(|(_, deletion)| (*shell, *deletion)));
        }
        pairs
    };
    let of_session = &of_deletion["session"];
    let before_the_clone = pairs(
        points("shell", &of_shell["shell"][..=until_the_clone], 1),
        [
            points("session", of_session, 9),
            points("user", &of_deletion["user"], 20),
        ]
        .concat(),
        12,
    );
    let after_it = pairs(
        points("first", &of_shell["first"], 20),
        points("session", &of_session[..=until_all_are_dead], 1),
        16,
    );
    let sample = Sample::of(12);
    let numbered = before_the_clone.iter().chain(&after_it).enumerate();
    for (_, at) in numbered.filter(|(n, _)| sample.has(*n)) {
        meet(&test, &before, *at);
    }
    test.finish(&[]);
}

/// The pids in the cgroup of the worker's shell.
fn in_the_shell(host: &TestHost, worker: WorkerId) -> Vec<i32> {
    let procs = host
        .cgroup_dir()
        .join(format!("workers/{worker}-manual/cgroup.procs"));
    let text = fs::read_to_string(procs).unwrap_or_default();
    text.lines().filter_map(|pid| pid.parse().ok()).collect()
}

#[test]
fn row_65_a_shell_that_ends_late_ends_no_other_shell_of_its_worker() {
    let test = TestHelper::new();
    let before = WorkerSnapshot::take(&test.host);
    let worker = running(&test);
    let open = || {
        let mut command = shell_command("user-factory-manual", &test.host, worker);
        let (reader, mut writer) = std::io::pipe().expect("a pipe");
        let shell = Running::start_logging_stdout_with(&mut command, reader.into());
        writer.write_all(b"echo inside\n").expect("it reads");
        shell.log.wait(&["inside"]);
        (shell, writer)
    };
    let (mut first, typed) = open();
    let refused = shell_command("user-factory-manual", &test.host, worker)
        .stderr(Stdio::piped())
        .output()
        .expect("the shell can be started");
    let refused = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.contains("another shell is in worker"), "{refused}");
    // It is stopped when what it has started ends; so it removes its cgroup when the next one has it.
    first.signal(Signal::SIGSTOP);
    for pid in in_the_shell(&test.host, worker) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    until_is("the shell's end", || in_the_shell(&test.host, worker).is_empty());
    drop(typed);
    let (mut second, mut typed) = open();
    first.signal(Signal::SIGCONT);
    first.wait();
    typed.write_all(b"echo still\n").expect("it reads");
    second.log.wait(&["still"]);
    test.delete(&[worker]);
    assert_eq!(WorkerSnapshot::take(&test.host), before);
    second.wait();
    test.finish(&[]);
}
