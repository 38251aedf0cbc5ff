//! The helper under the tracer: which of its processes is which, and the end of one of them, or of all, just
//! before a call of our choice.

use std::collections::BTreeMap;
use std::fs;
use std::sync::mpsc;
use std::thread::JoinHandle;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::calls::{WAITS, name};
use super::{Event, TraceAction, TracedCall, trace};
use crate::harness::until;

/// The kinds of processes that the helper is made of: see the page of the `helper` crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TracedKind {
    /// The helper's main process.
    Monitor,
    /// It accepts, and forks a process for each connection.
    Listener,
    /// One for each connection.
    Session,
    /// A session's child: it has become, or is about to become, the job's user.
    AsUser,
    /// Carries out a request of a session that takes no worker's namespaces.
    MonitorRequest,
    /// Builds the root file system that jobs see, or unmounts the last one.
    Builder,
    /// Brings the devices of workers up to date.
    DeviceRefresh,
    /// A worker's first process, until it runs as init.
    FirstProcess,
    /// The first process's child, until it is the agent.
    Agent,
}

/// In the order of [`TracedKind`].
pub const KINDS: [TracedKind; 9] = [
    TracedKind::Monitor,
    TracedKind::Listener,
    TracedKind::Session,
    TracedKind::AsUser,
    TracedKind::MonitorRequest,
    TracedKind::Builder,
    TracedKind::DeviceRefresh,
    TracedKind::FirstProcess,
    TracedKind::Agent,
];

/// Before which call of a kind of process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KillPoint {
    /// The nth, from 0.
    Nth(usize),
    /// The first of this number.
    First(i64),
}

/// Which process to kill, and when.
#[derive(Clone, Copy, Debug)]
pub struct KillPlan {
    /// Which of the helper's processes.
    pub kind: TracedKind,
    /// Before it makes this call.
    pub when: KillPoint,
    /// Everything that is the service's dies with it: all but the jobs.
    pub all: bool,
    /// It hangs there instead (`SIGSTOP`).
    pub hangs: Option<Connections>,
}

/// What becomes of the connections where another process hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connections {
    /// They end with it.
    Die,
    /// They are answered by the others.
    GoOn,
}

/// What was seen until the end, or until a process was killed.
#[derive(Debug, Default)]
pub struct TraceResult {
    /// The numbers of all calls of each kind of process, in order.
    pub calls: BTreeMap<TracedKind, Vec<i64>>,
    /// None where the plan's call never came.
    pub killed: Option<KilledProcess>,
}

#[derive(Clone, Copy, Debug)]
/// A process that was killed just before a call.
pub struct KilledProcess {
    /// Which of the helper's processes.
    pub kind: TracedKind,
    /// Of the call that was not made.
    pub number: i64,
    /// It was the monitor, or all: nobody serves now.
    pub service: bool,
}

impl std::fmt::Display for KilledProcess {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let all = if self.service { ", nobody serves" } else { "" };
        write!(f, "{:?} before {}{all}", self.kind, name(self.number))
    }
}

/// From when to when the monitor is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatchPeriod {
    /// It runs; until the next connection has ended, and the listener waits for others.
    OneConnection,
    /// It has stopped itself before it becomes the helper; until it serves, and has seen which devices are gone.
    Start,
}

/// Watch the monitor in a thread of its own, which returns at the span's end, or when it has killed. On return
/// of this, nothing is missed any more.
pub fn watch(monitor: u32, span: WatchPeriod, plan: Option<KillPlan>) -> JoinHandle<TraceResult> {
    watch_with(monitor, span, plan, |_, _| {})
}

/// The same; `also` sees every event before it is weighed.
pub fn watch_with(
    monitor: u32,
    span: WatchPeriod,
    plan: Option<KillPlan>,
    mut also: impl FnMut(Pid, &Event) + Send + 'static,
) -> JoinHandle<TraceResult> {
    let (ready, attached) = mpsc::channel();
    let monitor = Pid::from_raw(monitor as i32);
    let thread = std::thread::spawn(move || {
        let listener = (span == WatchPeriod::OneConnection).then(|| listener(monitor.as_raw() as u32));
        let listener = listener.map(|pid| Pid::from_raw(pid as i32));
        let mut watcher = Watcher::new(monitor, listener, span, plan);
        trace(
            monitor,
            listener.as_slice(),
            || {
                let _ = ready.send(());
            },
            |pid, event| {
                also(pid, &event);
                watcher.on(pid, event)
            },
        );
        watcher.seen
    });
    // An error is the thread's panic: who joins it gets it.
    let _ = attached.recv();
    thread
}

/// The helper's process that accepts connections: of the monitor's children the one that has its cgroup, waits for
/// signals by a descriptor, and has none of a mount namespace. Any other child has all of the monitor's descriptors
/// until it closes them.
pub fn listener(monitor: u32) -> u32 {
    let cgroup = |pid: u32| fs::read_to_string(format!("/proc/{pid}/cgroup")).ok();
    let is_listener = |pid: &u32| {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd"));
        let open: Vec<String> = descriptors
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| Some(fs::read_link(entry.path()).ok()?.display().to_string()))
            .collect();
        cgroup(*pid) == cgroup(monitor)
            && open.iter().any(|link| link == "anon_inode:[signalfd]")
            && !open.iter().any(|link| link.starts_with("mnt:["))
    };
    until(|| {
        let listener = children(monitor).into_iter().find(is_listener);
        listener.ok_or_else(|| format!("process {monitor} has no listener"))
    })
}

/// A process's children (`proc_pid_task_children(5)`), of one with a single thread.
pub fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .collect()
}

/// The calls of the monitor that tell what its next child is for.
const PURPOSES: [i64; 5] = [
    libc::SYS_pipe2,
    libc::SYS_recvmsg,
    libc::SYS_socketpair,
    libc::SYS_read,
    libc::SYS_wait4,
];

struct Watcher {
    monitor: Pid,
    span: WatchPeriod,
    plan: Option<KillPlan>,
    seen: TraceResult,
    alive: BTreeMap<Pid, TracedKind>,
    /// Of the monitor: what it called last that tells what its next child is for.
    last: i64,
    counting: bool,
    connection_gone: bool,
    reaped: bool,
    /// How often the monitor has begun to wait.
    waits: usize,
    /// The listener waits for connections.
    listens: bool,
}

impl Watcher {
    fn new(monitor: Pid, listener: Option<Pid>, span: WatchPeriod, plan: Option<KillPlan>) -> Watcher {
        let listener = listener.map(|pid| (pid, TracedKind::Listener));
        Watcher {
            monitor,
            span,
            plan,
            seen: TraceResult::default(),
            alive: [(monitor, TracedKind::Monitor)]
                .into_iter()
                .chain(listener)
                .collect(),
            last: 0,
            counting: span == WatchPeriod::OneConnection,
            connection_gone: false,
            reaped: false,
            waits: 0,
            listens: false,
        }
    }

    fn on(&mut self, pid: Pid, event: Event) -> TraceAction {
        match event {
            Event::Forked { parent, by } => {
                let kind = match self.alive.get(&parent) {
                    Some(TracedKind::Monitor) if by.number == libc::SYS_clone3 => TracedKind::FirstProcess,
                    Some(TracedKind::Monitor) if self.last == libc::SYS_recvmsg => TracedKind::MonitorRequest,
                    // It tells the monitor by a socket when it has done its work, or waits for the monitor.
                    Some(TracedKind::Monitor) if self.last == libc::SYS_socketpair => TracedKind::Builder,
                    // The listener writes to a pipe when it accepts.
                    Some(TracedKind::Monitor) if self.last == libc::SYS_pipe2 => TracedKind::Listener,
                    // It follows on what `inotify(7)` tells, or on the end of the one before it.
                    Some(TracedKind::Monitor) => TracedKind::DeviceRefresh,
                    Some(TracedKind::Listener) => TracedKind::Session,
                    Some(TracedKind::Session | TracedKind::AsUser) => TracedKind::AsUser,
                    Some(TracedKind::FirstProcess) => TracedKind::Agent,
                    Some(other) => *other,
                    None => return TraceAction::GoOn,
                };
                self.alive.insert(pid, kind);
                TraceAction::GoOn
            }
            Event::Enter(call) => self.enter(pid, call),
            Event::Leave(..) => TraceAction::GoOn,
            Event::Exec => match self.alive.get(&pid) {
                Some(TracedKind::Monitor) => {
                    self.counting = true;
                    TraceAction::GoOn
                }
                _ => {
                    self.alive.remove(&pid);
                    TraceAction::Forget
                }
            },
            Event::Gone => {
                if self.alive.remove(&pid) == Some(TracedKind::Session) {
                    self.connection_gone = true;
                }
                TraceAction::GoOn
            }
        }
    }

    fn enter(&mut self, pid: Pid, call: TracedCall) -> TraceAction {
        let Some(kind) = self.alive.get(&pid).copied() else {
            return TraceAction::GoOn;
        };
        // The monitor's own wait has four descriptors and more; that of Rust's start has three, other polls one.
        if kind == TracedKind::Monitor {
            if call.is_any_of(&PURPOSES) {
                self.last = call.number;
            }
            self.waits += usize::from(call.is_any_of(WAITS) && call.arguments[1] > 3);
        } else if kind == TracedKind::Listener {
            self.reaped |= self.connection_gone && call.number == libc::SYS_wait4;
            self.listens = call.is_any_of(WAITS);
        } else if kind == TracedKind::FirstProcess && call.is_any_of(WAITS) {
            // It runs as init from here on.
            self.alive.remove(&pid);
            return TraceAction::Forget;
        }
        let over = match self.span {
            WatchPeriod::OneConnection => self.listens && self.reaped,
            // Once before it knows that the listener accepts, and once after.
            WatchPeriod::Start => {
                let refreshes = self.alive.values().any(|kind| *kind == TracedKind::DeviceRefresh);
                self.listens && self.waits > 1 && !refreshes
            }
        };
        if over {
            return TraceAction::End;
        }
        // What the kernel makes of a wait that the tracer has interrupted is no call of the program.
        if !self.counting || call.number == libc::SYS_restart_syscall {
            return TraceAction::GoOn;
        }
        let calls = self.seen.calls.entry(kind).or_default();
        calls.push(call.number);
        let now = self.plan.filter(|plan| {
            plan.kind == kind
                && match plan.when {
                    KillPoint::Nth(n) => calls.len() == n + 1,
                    KillPoint::First(number) => number == call.number,
                }
        });
        let Some(plan) = now else {
            return TraceAction::GoOn;
        };
        self.seen.killed = Some(KilledProcess {
            kind,
            number: call.number,
            service: plan.all || kind == TracedKind::Monitor,
        });
        for (other, kind) in &self.alive {
            let jobs = matches!(kind, TracedKind::FirstProcess | TracedKind::Agent);
            let connection = *kind == TracedKind::Session;
            if *other == pid && plan.hangs.is_some() {
                let _ = kill(*other, Signal::SIGSTOP);
            } else if *other == pid
                || (plan.all && !jobs)
                || (plan.hangs == Some(Connections::Die) && connection)
            {
                let _ = kill(*other, Signal::SIGKILL);
            }
        }
        debug_assert!(self.alive.contains_key(&self.monitor) || !plan.all);
        TraceAction::End
    }
}
