//! Pid 1 of a worker: already the job's user, without privileges. It starts the agent, keeps the
//! agent's children, writes what they print to the bounded console, and reports how the agent ended;
//! with its own end the kernel ends whatever is left in the pid namespace.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::WaitPidFlag;
use nix::unistd::Pid;
use protocol::Exit;

use crate::host::record::{TIMED_OUT, print_exit};
use crate::sys;
use crate::unprivileged::proxy::ProxyListener;
use crate::unprivileged::{MAX_PER_ITERATION, Unprivileged};

/// Files of root's that pid 1 was given open for writing.
pub struct Files {
    pub console: File,
    pub exit: File,
}

/// What the slot says about pid 1.
pub struct InitConfig {
    /// Bytes of the console that are kept.
    pub console: u64,
    /// From the agent's start until everything is ended.
    pub time: Option<Duration>,
    /// The way to the server and the slot's destinations, for a job that has no other.
    pub proxy: Option<ProxyListener>,
}

/// A started `agent install`, and the end of the pipe that it prints into.
pub struct Agent {
    install: Pid,
    output: OwnedFd,
    children_ended: SignalFd,
}

/// Start `agent install …`. The error is the kernel's reason.
pub fn spawn_agent(_proof: &Unprivileged, mut command: Command) -> io::Result<Agent> {
    let mask = SigSet::from(Signal::SIGCHLD);
    let children_ended = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let (output, input) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    let child = command
        .stdin(Stdio::null())
        .stdout(input.try_clone()?)
        .stderr(input)
        .spawn()?;
    // Only now: the agent would inherit it, and so would all that it starts, and debuggers and shells wait
    // for this signal. A child that has ended by now is found because we tell ourselves of it.
    mask.thread_block()?;
    nix::sys::signal::raise(Signal::SIGCHLD)?;
    nix::fcntl::fcntl(&output, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(Agent {
        install: Pid::from_raw(child.id() as i32),
        output,
        children_ended,
    })
}

/// What `run` keeps of the agent's output.
struct Console<'a> {
    file: &'a File,
    left: u64,
}

impl Console<'_> {
    /// Take what is in the pipe now. False at its end.
    ///
    /// Never more than the largest pipe holds: who prints faster than this reads must not keep pid 1 from
    /// everything else, its end included.
    fn pump(&mut self, pipe: &OwnedFd) -> bool {
        let mut buffer = [0; 16 << 10];
        for _ in 0..64 {
            match nix::unistd::read(pipe, &mut buffer) {
                Ok(0) => return false,
                Ok(n) => self.keep(&buffer[..n]),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return true,
                Err(_) => return false,
            }
        }
        true
    }

    fn keep(&mut self, bytes: &[u8]) {
        if self.left == 0 {
            return;
        }
        let kept = &bytes[..bytes.len().min(self.left as usize)];
        self.left -= kept.len() as u64;
        // A full disk loses console lines, and nothing else.
        let _ = self.file.write_all(kept);
        if self.left == 0 {
            let _ = write!(self.file, "\n[the console is full: what follows was dropped]\n");
        }
    }
}

/// Reap children, copy output and enforce the run time until the agent has ended. Returns the status for pid 1 itself.
///
/// `install` starts the real agent and exits, so the agent is the child that is there when it does.
pub fn run(proof: &Unprivileged, agent: Agent, files: &Files, config: &InitConfig) -> i32 {
    let mut console = Console {
        file: &files.console,
        left: config.console,
    };
    let end = config.time.map(|time| Instant::now() + time);
    let mut awaited = vec![agent.install];
    let mut installing = true;
    let mut open = true;
    // More children may have ended than one turn reaps.
    let mut unreaped = false;
    let exit = 'ended: loop {
        let mut events = vec![PollFd::new(agent.children_ended.as_fd(), PollFlags::POLLIN)];
        if open {
            events.push(PollFd::new(agent.output.as_fd(), PollFlags::POLLIN));
        }
        if let Some(proxy) = &config.proxy {
            events.extend(proxy.poll_fds());
        }
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            break Exit::TimedOut;
        }
        // A millisecond more than is left, so that it is over then; days are waited for in parts.
        let wait = match left {
            _ if unreaped => PollTimeout::ZERO,
            None => PollTimeout::NONE,
            Some(left) => PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX),
        };
        let _ = poll(&mut events, wait);
        while let Ok(Some(_)) = agent.children_ended.read_signal() {}
        if let Some(proxy) = &config.proxy {
            proxy.forward(proof);
        }
        open = open && console.pump(&agent.output);
        unreaped = true;
        for _ in 0..MAX_PER_ITERATION {
            let (pid, ended) = match sys::wait(None, WaitPidFlag::WNOHANG) {
                Ok(Some(ended)) => ended,
                Ok(None) => {
                    unreaped = false;
                    break;
                }
                Err(Errno::EINTR) => continue,
                // No child at all: nobody is left of the agent.
                Err(_) => break 'ended Exit::Unknown,
            };
            if !awaited.contains(&pid) {
                continue;
            }
            awaited.retain(|other| *other != pid);
            let exit = match ended.signal() {
                Some(signal) => Exit::Signal(signal as u8),
                None => Exit::Status(ended.code().unwrap_or_default() as u8),
            };
            if installing && exit == Exit::Status(0) {
                installing = false;
                awaited = children();
            }
            if awaited.is_empty() {
                break 'ended exit;
            }
        }
    };
    console.pump(&agent.output);
    if exit == Exit::TimedOut {
        console.keep(TIMED_OUT.as_bytes());
    }
    let _ = (&files.exit).write_all(print_exit(exit).as_bytes());
    0
}

/// The agent's program could not be started: say so where an operator and the supervisor will look.
pub fn record_not_started(_proof: &Unprivileged, files: &Files, sentence: &str) {
    let _ = writeln!(&files.console, "{sentence}");
    let _ = (&files.exit).write_all(print_exit(Exit::NotStarted).as_bytes());
}

/// Our children now (`proc_pid_task_children(5)`).
fn children() -> Vec<Pid> {
    let mut text = String::new();
    let _ = File::open("/proc/self/task/1/children")
        .and_then(|file| file.take(64 << 10).read_to_string(&mut text));
    text.split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .map(Pid::from_raw)
        .collect()
}

impl Agent {
    /// What must stay open.
    pub fn descriptors(&self) -> [i32; 2] {
        [self.output.as_raw_fd(), self.children_ended.as_raw_fd()]
    }
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Agent({}, {})", self.install, self.output.as_raw_fd())
    }
}

impl std::fmt::Debug for Files {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Files")
    }
}
