//! A tracer of system calls (`ptrace(2)`): tests see what a process and all that it starts call, in order,
//! and can end one of them just before a call is done.
//!
//! [`trace`] is the mechanism. [`helper`] knows the helper's processes, [`outward`] what of a program's calls
//! others can see, [`recorder`] what they change on the disk, and [`replay`] what a power loss leaves of that.

pub mod calls;
pub mod helper;
pub mod outward;
pub mod recorder;
pub mod replay;
pub(crate) mod sys;

pub use sys::descriptor_of;

use std::collections::{HashMap, HashSet};
use std::fs;

use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

use crate::harness::until;

/// A system call, as it is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TracedCall {
    /// `SYS_…` of this architecture.
    pub number: i64,
    /// As the kernel gets them: pointers are the traced process's.
    pub arguments: [u64; 6],
}

impl TracedCall {
    /// One of these.
    pub fn is_any_of(&self, numbers: &[libc::c_long]) -> bool {
        numbers.contains(&self.number)
    }
}

/// What a traced process, or thread, does.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// It exists, by this call of its parent's, and has done nothing yet.
    Forked {
        /// Which made it.
        parent: Pid,
        /// `clone` and its kin.
        by: TracedCall,
    },
    /// It is about to do this. A process that is killed now does not do it.
    Enter(TracedCall),
    /// It has done this, with this result; an error is negative.
    Leave(TracedCall, i64),
    /// It has become another program.
    Exec,
    /// It has ended, and who waits for it can see so from now on.
    Gone,
}

/// How to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceAction {
    /// To its next event.
    GoOn,
    /// Trace this process no longer.
    Forget,
    /// Trace nobody any longer. All go on by themselves.
    End,
}

/// Trace a running process, all its threads, and all that it starts, until `watch` says `End` or the process is
/// gone; and `others` that run already, with what they start. It must run in a thread of its own, which ends with it:
/// then the kernel lets everybody go.
///
/// `attached` is called when nothing that the process does from now on is missed. The process itself, once
/// dead, is left for its parent to reap.
pub fn trace(
    root: Pid,
    others: &[Pid],
    attached: impl FnOnce(),
    mut watch: impl FnMut(Pid, Event) -> TraceAction,
) {
    let options = Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEVFORK
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEEXEC;
    let all: Vec<Pid> = [&[root], others].concat().into_iter().flat_map(threads).collect();
    for thread in &all {
        seize(*thread, options);
    }
    // One that has stopped itself runs under the tracer all the same; but left alone later, it would stop again.
    let _ = kill(root, Signal::SIGCONT);
    attached();
    // What each is in the middle of.
    let mut inside: HashMap<Pid, Option<TracedCall>> = all.into_iter().map(|t| (t, None)).collect();
    // Children that stopped before their parents were seen to have made them.
    let mut early: HashSet<Pid> = HashSet::new();
    loop {
        let wait = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        // The root must not be reaped here.
        let unreaped = wait | WaitPidFlag::WEXITED | WaitPidFlag::WSTOPPED | WaitPidFlag::WNOWAIT;
        let status = match waitid(Id::All, unreaped) {
            Err(Errno::EINTR) => continue,
            Err(errno) => panic!("cannot wait for the traced: {errno}"),
            Ok(status) => status,
        };
        let pid = status.pid().expect("this wait has no time-out");
        if let WaitStatus::Exited(..) | WaitStatus::Signaled(..) = status {
            if pid == root {
                watch(pid, Event::Gone);
                return;
            }
            let _ = waitpid(pid, Some(wait));
            early.remove(&pid);
            if inside.remove(&pid).is_some() && watch(pid, Event::Gone) == TraceAction::End {
                return;
            }
            continue;
        }
        // The stop alone. Who was killed since the `waitid` has no stop any more, and is not waited for here: the first
        // process of a pid namespace ends after all others of it are reaped (pid_namespaces(7)), which is done here.
        let stop = wait | WaitPidFlag::WSTOPPED | WaitPidFlag::WNOHANG;
        let Ok(status) = waitid(Id::Pid(pid), stop) else {
            continue;
        };
        let mut signal: Option<Signal> = None;
        let mut then = TraceAction::GoOn;
        match status {
            WaitStatus::PtraceSyscall(_) => match sys::stopped_at(pid) {
                Some(sys::SyscallStop::Entry(call)) => {
                    inside.insert(pid, Some(call));
                    then = watch(pid, Event::Enter(call));
                }
                Some(sys::SyscallStop::Exit(result)) => {
                    if let Some(call) = inside.insert(pid, None).flatten() {
                        then = watch(pid, Event::Leave(call, result));
                    }
                }
                None => {}
            },
            WaitStatus::PtraceEvent(_, _, libc::PTRACE_EVENT_EXEC) => {
                then = watch(pid, Event::Exec);
            }
            // The first stop of a child that its parent has not told of yet; or one that was asked for.
            WaitStatus::PtraceEvent(_, _, libc::PTRACE_EVENT_STOP) if !inside.contains_key(&pid) => {
                early.insert(pid);
                continue;
            }
            WaitStatus::PtraceEvent(_, _, libc::PTRACE_EVENT_STOP) => {}
            // A signal is about to be delivered: waitid(2) tells of no event then.
            WaitStatus::PtraceEvent(_, other, 0) => signal = Some(other),
            WaitStatus::PtraceEvent(..) => {
                if let (Ok(child), Some(Some(by))) = (ptrace::getevent(pid), inside.get(&pid).copied()) {
                    let child = Pid::from_raw(child as i32);
                    inside.insert(child, None);
                    let first = watch(child, Event::Forked { parent: pid, by });
                    if first == TraceAction::End {
                        return;
                    }
                    if early.remove(&child) {
                        resume(child, None, first);
                    }
                }
            }
            // It has been killed, or another thread has become the program.
            _ => continue,
        }
        if then == TraceAction::End {
            return;
        }
        if then == TraceAction::Forget {
            inside.remove(&pid);
        }
        resume(pid, signal, then);
    }
}

/// On to its next stop. One that was killed meanwhile is gone: its end is told in its turn.
fn resume(pid: Pid, signal: Option<Signal>, then: TraceAction) {
    let _ = match then {
        TraceAction::Forget => ptrace::detach(pid, signal),
        _ => ptrace::syscall(pid, signal),
    };
}

fn seize(thread: Pid, options: Options) {
    loop {
        match ptrace::seize(thread, options) {
            Ok(()) => break,
            // The last tracer is on its way out.
            Err(Errno::EPERM) => std::thread::yield_now(),
            Err(errno) => panic!("cannot trace {thread}: {errno}"),
        }
    }
    ptrace::interrupt(thread).expect("it is traced by now");
}

fn threads(pid: Pid) -> Vec<Pid> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("the process exists");
    let number = |entry: fs::DirEntry| entry.file_name().to_str()?.parse().ok();
    tasks.flatten().filter_map(number).map(Pid::from_raw).collect()
}

/// Wait until a process has stopped itself, to be traced from its first instruction on.
pub fn wait_until_stopped(pid: u32) {
    until(|| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let is_stopped = stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'));
        is_stopped
            .then_some(())
            .ok_or(format!("process {pid} does not stop: {stat}"))
    });
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;
    use crate::harness::{TEST_TIMEOUT, binaries};

    /// It is killed at many an instant, so also between the `waitid` that shows a stop and the one that takes it. Needs
    /// root.
    #[test]
    fn the_first_process_of_a_pid_namespace_ends_whenever_it_is_killed() {
        for life in 0..40 {
            let (tell, ended) = channel();
            std::thread::spawn(move || {
                let busy = "while :; do /bin/true & done & while :; do cd /; done";
                let mut unshare = Command::new(binaries().join("service-manager"))
                    .args([
                        "--stop-first",
                        "/usr/bin/unshare",
                        "--pid",
                        "--fork",
                        "sh",
                        "-c",
                        busy,
                    ])
                    .spawn()
                    .expect("the program that stops first can be started");
                let root = Pid::from_raw(unshare.id() as i32);
                // Traced before it makes its child.
                wait_until_stopped(unshare.id());
                let mut is_made = false;
                trace(
                    root,
                    &[],
                    || (),
                    |pid, event| {
                        let Event::Forked { parent, .. } = event else {
                            return TraceAction::GoOn;
                        };
                        if parent == root && !std::mem::replace(&mut is_made, true) {
                            std::thread::spawn(move || {
                                std::thread::sleep(Duration::from_micros(20_000 + life * 241));
                                kill(pid, Signal::SIGKILL).expect("it is running");
                            });
                        }
                        TraceAction::GoOn
                    },
                );
                let status = unshare.wait().expect("it is our child");
                assert!(is_made, "this needs root: {status}");
                let _ = tell.send(());
            });
            ended.recv_timeout(TEST_TIMEOUT).expect("it ends");
        }
    }
}
