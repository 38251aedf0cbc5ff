//! The operator's terminal, passed through to a command in a sandbox: the command gets a terminal of the sandbox's
//! own, and the bytes go both ways. The operator's terminal itself is kept from jobs.

use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::Mode;
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use nix::sys::wait::WaitPidFlag;
use nix::unistd::Pid;

use crate::sys;

/// What may interrupt the operator's command.
pub type Signals = SignalFd;

/// From now on these signals are read, and end nothing by themselves.
pub fn block_signals() -> Result<Signals> {
    let mask = SigSet::from_iter([
        Signal::SIGCHLD,
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGWINCH,
    ]);
    mask.thread_block()?;
    SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .context("cannot watch for signals")
}

/// Which of the standard streams are the operator's terminal. A job gets none of these, but one of its own instead.
#[derive(Clone, Copy, Debug)]
pub struct TerminalStreams {
    is_input_terminal: bool,
    is_output_terminal: bool,
    is_error_terminal: bool,
}

impl TerminalStreams {
    pub fn has_any(self) -> bool {
        self.is_input_terminal || self.is_output_terminal || self.is_error_terminal
    }
}

pub fn ours() -> TerminalStreams {
    TerminalStreams {
        is_input_terminal: std::io::stdin().is_terminal(),
        is_output_terminal: std::io::stdout().is_terminal(),
        is_error_terminal: std::io::stderr().is_terminal(),
    }
}

/// In the sandbox, as a session's leader without a terminal: a new one, which becomes the session's. First the end
/// for who is outside.
pub fn open_pty() -> Result<(OwnedFd, OwnedFd)> {
    let master =
        posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).context("cannot make a terminal")?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname_r(&master)?;
    // Without O_NOCTTY it becomes the session's (`open(2)`).
    let terminal = nix::fcntl::open(&*name, OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
        .with_context(|| format!("cannot open {name}"))?;
    Ok((master.into(), terminal))
}

/// Put the job's terminal in the place of each stream that is the operator's; from now on this process has none of
/// them.
pub fn use_terminal(ours: TerminalStreams, terminal: &OwnedFd, command: &mut Command) -> Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    if ours.is_input_terminal {
        command.stdin(terminal.try_clone()?);
        nix::unistd::dup2_stdin(&null)?;
    }
    if ours.is_output_terminal {
        command.stdout(terminal.try_clone()?);
        nix::unistd::dup2_stdout(&null)?;
    }
    if ours.is_error_terminal {
        command.stderr(terminal.try_clone()?);
        nix::unistd::dup2_stderr(&null)?;
    }
    Ok(())
}

/// The group of this process, which is of the terminal's session, may read from the terminal.
pub fn set_foreground(leader: Pid) -> Result<()> {
    let terminal = File::options().read(true).write(true).open("/dev/tty")?;
    // We are in the background now; asking for the change must not stop us (`tcsetpgrp(3)`).
    let mut ignored = SigSet::empty();
    ignored.add(Signal::SIGTTOU);
    ignored.thread_block()?;
    match nix::unistd::tcsetpgrp(&terminal, leader) {
        // It may have asked for input while it was in the background, and been stopped for it.
        Ok(()) => drop(kill(Pid::from_raw(-leader.as_raw()), Signal::SIGCONT)),
        // It has ended already.
        Err(Errno::ESRCH | Errno::EPERM) => {}
        Err(errno) => return Err(errno).context("cannot give the terminal to the command"),
    }
    Ok(())
}

/// The sandbox's terminal, from outside, and the operator's as it was.
pub struct Terminal {
    job: File,
    ours: TerminalStreams,
    before: Option<Termios>,
}

impl Terminal {
    pub fn new(job: OwnedFd, ours: TerminalStreams) -> Result<Terminal> {
        let mut before = None;
        if ours.is_input_terminal {
            let typed = std::io::stdin();
            let now = tcgetattr(&typed).context("cannot examine the terminal")?;
            let mut raw = now.clone();
            cfmakeraw(&mut raw);
            tcsetattr(&typed, SetArg::TCSANOW, &raw).context("cannot set the terminal")?;
            before = Some(now);
        }
        let job = File::from(job);
        let terminal = Terminal { job, ours, before };
        terminal.resize();
        Ok(terminal)
    }

    fn resize(&self) {
        let (input, output, errors) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
        let operator = match (self.ours.is_input_terminal, self.ours.is_output_terminal) {
            (true, _) => input.as_fd(),
            (_, true) => output.as_fd(),
            _ => errors.as_fd(),
        };
        // A terminal without a size has none to pass on.
        let _ = sys::copy_window_size(operator, self.job.as_fd());
    }

    /// Some of what the job has printed. False at its end: nobody has the other side open any more.
    fn print(&mut self) -> bool {
        let mut buffer = [0; 16 << 10];
        let text = match self.job.read(&mut buffer) {
            Ok(0) | Err(_) => return false,
            Ok(n) => &buffer[..n],
        };
        let printed = if self.ours.is_output_terminal {
            let mut out = std::io::stdout().lock();
            out.write_all(text).and_then(|()| out.flush())
        } else {
            std::io::stderr().lock().write_all(text)
        };
        printed.is_ok()
    }

    fn has_output(&self) -> bool {
        let mut events = [PollFd::new(self.job.as_fd(), PollFlags::POLLIN)];
        poll(&mut events, PollTimeout::ZERO).is_ok() && events[0].any() == Some(true)
    }

    /// Some of what was typed. False at its end.
    fn forward_input(&mut self) -> bool {
        let mut buffer = [0; 4 << 10];
        match nix::unistd::read(std::io::stdin(), &mut buffer) {
            Ok(0) => false,
            Ok(n) => self.job.write_all(&buffer[..n]).is_ok(),
            Err(errno) => errno == Errno::EINTR,
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, before);
        }
    }
}

/// Pass bytes both ways until the sandbox's first process has ended; its status. A signal that would end us ends it.
pub fn relay_until_exit(first: Pid, mut terminal: Option<Terminal>, signals: &Signals) -> Result<u8> {
    let mut typed = terminal.as_ref().is_some_and(|it| it.ours.is_input_terminal);
    loop {
        let keyboard = std::io::stdin();
        let mut events = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        if let Some(terminal) = &terminal {
            events.push(PollFd::new(terminal.job.as_fd(), PollFlags::POLLIN));
            if typed {
                events.push(PollFd::new(keyboard.as_fd(), PollFlags::POLLIN));
            }
        }
        match poll(&mut events, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("cannot wait for the command"),
        }
        let ready: Vec<bool> = events.iter().map(|event| event.any() == Some(true)).collect();
        drop(events);
        if ready.get(1) == Some(&true) && !terminal.as_mut().is_some_and(Terminal::print) {
            terminal = None;
        } else if let (Some(true), Some(terminal)) = (ready.get(2), &mut terminal) {
            typed = terminal.forward_input();
        }
        while let Some(signal) = signals.read_signal()? {
            match Signal::try_from(signal.ssi_signo as i32) {
                Ok(Signal::SIGCHLD) => {}
                Ok(Signal::SIGWINCH) => terminal.iter().for_each(Terminal::resize),
                // The kernel ends everything else in there with it.
                _ => drop(kill(first, Signal::SIGKILL)),
            }
        }
        if let Some((_, ended)) = sys::wait(Some(first), WaitPidFlag::WNOHANG)? {
            // What it printed last: as much as a terminal keeps. A process of the job's may have it open, and print for
            // ever.
            let mut reads = 0..64;
            while terminal.as_mut().is_some_and(|it| it.has_output() && it.print()) && reads.next().is_some()
            {
            }
            return Ok(status_of(ended) as u8);
        }
    }
}

/// As a shell says it.
pub fn status_of(ended: ExitStatus) -> i32 {
    let of_signal = ended.signal().map(|signal| 128 + signal);
    of_signal.or(ended.code()).unwrap_or(1)
}
