//! A person's terminal, passed through to a command in a sandbox: the command gets a terminal of the sandbox's
//! own, and the bytes go both ways. The person's terminal itself is never in the hands of a job.

use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::Mode;
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::sys;

/// What may interrupt a person's command.
pub type Signals = SignalFd;

/// From now on these signals are read, and end nothing by themselves.
pub fn signals() -> Result<Signals> {
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

/// Is a person there to be passed through?
pub fn is_ours() -> bool {
    std::io::stdin().is_terminal() && std::io::stdout().is_terminal()
}

/// In the sandbox, as a session's leader without a terminal: a new one, which becomes the session's, and the
/// command's streams.
pub fn of_the_job() -> Result<(OwnedFd, [Stdio; 3])> {
    let master =
        posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).context("cannot make a terminal")?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname_r(&master)?;
    // Without O_NOCTTY it becomes the session's (`open(2)`).
    let terminal = nix::fcntl::open(&*name, OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
        .with_context(|| format!("cannot open {name}"))?;
    let streams = [terminal.try_clone()?, terminal.try_clone()?, terminal].map(Stdio::from);
    Ok((master.into(), streams))
}

/// The group of this process, which is of the terminal's session, may read from the terminal.
pub fn to_the_foreground(leader: Pid) -> Result<()> {
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

/// The sandbox's terminal, from outside, and the person's as it was.
pub struct Terminal {
    job: File,
    before: Termios,
}

impl Terminal {
    pub fn new(job: OwnedFd) -> Result<Terminal> {
        let ours = std::io::stdin();
        let before = tcgetattr(&ours).context("cannot examine the terminal")?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(&ours, SetArg::TCSANOW, &raw).context("cannot set the terminal")?;
        let terminal = Terminal {
            job: File::from(job),
            before,
        };
        terminal.resize();
        Ok(terminal)
    }

    fn resize(&self) {
        // A terminal without a size has none to pass on.
        let _ = sys::copy_window_size(std::io::stdin().as_fd(), self.job.as_fd());
    }

    /// Some of what the job has printed. False at its end: nobody has the other side open any more.
    fn print(&mut self) -> bool {
        let mut buffer = [0; 16 << 10];
        match self.job.read(&mut buffer) {
            Ok(0) | Err(_) => false,
            Ok(n) => {
                let mut out = std::io::stdout().lock();
                out.write_all(&buffer[..n]).and_then(|()| out.flush()).is_ok()
            }
        }
    }

    /// Some of what was typed.
    fn pass_on(&mut self) {
        let mut buffer = [0; 4 << 10];
        if let Ok(n) = nix::unistd::read(std::io::stdin(), &mut buffer) {
            let _ = self.job.write_all(&buffer[..n]);
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &self.before);
    }
}

/// Pass bytes both ways until the sandbox's first process has ended; its status. A signal that would end us ends it.
pub fn attend(first: Pid, mut terminal: Option<Terminal>, signals: &Signals) -> Result<u8> {
    loop {
        let ours = std::io::stdin();
        let mut events = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        if let Some(terminal) = &terminal {
            events.push(PollFd::new(terminal.job.as_fd(), PollFlags::POLLIN));
            events.push(PollFd::new(ours.as_fd(), PollFlags::POLLIN));
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
            terminal.pass_on();
        }
        while let Some(signal) = signals.read_signal()? {
            match Signal::try_from(signal.ssi_signo as i32) {
                Ok(Signal::SIGCHLD) => {}
                Ok(Signal::SIGWINCH) => terminal.iter().for_each(Terminal::resize),
                // The kernel ends everything else in there with it.
                _ => drop(kill(first, Signal::SIGKILL)),
            }
        }
        match waitpid(first, Some(WaitPidFlag::WNOHANG))? {
            WaitStatus::StillAlive => {}
            status => {
                // Its last words.
                while terminal.as_mut().is_some_and(Terminal::print) {}
                return Ok(match status {
                    WaitStatus::Exited(_, status) => status as u8,
                    WaitStatus::Signaled(_, signal, _) => 128 + signal as u8,
                    _ => 1,
                });
            }
        }
    }
}
