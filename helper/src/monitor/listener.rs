//! The listener: the process that waits for connections and forks a session for each, which accepts it.
//!
//! It installs the sessions' filter of system calls once, and every session inherits it. The kernel frees such
//! programs through one work queue for the whole host, which can hang for ever when there are many (row 86 of
//! `docs/evidence/attacks.md`). With a filter for each connection, the number of programs would be the supervisor's to choose.
//!
//! The listener has the capabilities and the system calls of a session, and reads nothing that the supervisor sends.
//! The monitor starts it, and starts another if it ends. While no listener accepts, for longer than one should take
//! to start, the monitor answers each connection with the reason, without reading from it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{getsockopt, sockopt};
use nix::sys::time::TimeSpec;
use nix::sys::wait::WaitPidFlag;
use nix::unistd::{Pid, getppid, pipe2};
use protocol::{Error, ErrorKind, Reply, Seqpacket, wire};

use crate::host::Host;
use crate::log::{error, warn};
use crate::privileges::seccomp;
use crate::session::{self, HostOperations, PeerCredentials};
use crate::{privileges, sys};

/// The most connections that are served at once; the supervisor makes one for each operation.
const MAX_SESSIONS: usize = 256;
/// The most further connections that are answered with `Busy` at once. Others wait in the socket's queue.
const MAX_BUSY: usize = 64;

/// The time after which a listener that does not accept yet is late, and the monitor logs it.
const LATE_AFTER: Duration = Duration::from_secs(10);
/// The least time from the start of one listener to the start of the next: one that ends at once must not use the
/// processor up.
const RESTART_AFTER: Duration = Duration::from_secs(1);
/// The pause after a connection could not be accepted, or no process be forked for it.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// A session's exit status when the configuration or the host's accounts were not as the listener had read them.
const EXIT_AFTER_READ: i32 = 1;

/// What the monitor knows of its listener.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    /// The only uid that is served.
    client: u32,
    /// The sessions' end of the socket on which they ask the monitor.
    monitor_socket: Seqpacket,
    /// The process, and a pipe whose other end it writes to when it accepts.
    child: Option<(Pid, File)>,
    /// The next is not started before.
    next_start: Instant,
    /// Since this time no listener accepts.
    down: Option<Instant>,
    /// It was logged that this lasts too long. From then on the monitor answers connections.
    is_logged: bool,
}

impl Listener {
    /// A listener for this listening socket. [`Listener::tick`] starts its process.
    pub fn new(socket: OwnedFd, client: u32, monitor_socket: Seqpacket, now: Instant) -> Result<Listener> {
        // The standard library's listener does not mind that packets have borders.
        let socket = UnixListener::from(socket);
        socket.set_nonblocking(true)?;
        Ok(Listener {
            socket,
            client,
            monitor_socket,
            child: None,
            next_start: now,
            down: Some(now),
            is_logged: false,
        })
    }

    /// Do what is due: start a listener, or log that none accepts.
    pub fn tick(&mut self, host: &Host, now: Instant) {
        if self.child.is_none() && self.next_start <= now {
            self.next_start = now + RESTART_AFTER;
            match start(host, self) {
                Ok(child) => self.child = Some(child),
                Err(error) => warn!("cannot start the process that accepts connections: {error:#}"),
            }
        }
        if !self.is_logged && self.down.is_some_and(|since| now >= since + LATE_AFTER) {
            self.is_logged = true;
            error!("{}", self.sentence(now));
        }
    }

    /// The reason why none accepts, and what the operator can do.
    fn sentence(&self, now: Instant) -> String {
        let seconds = self.down.map_or(0, |since| now.duration_since(since).as_secs());
        match &self.child {
            Some((pid, _)) => format!(
                "the helper has accepted no connection for {seconds} s: its process {pid} waits for the kernel to install \
                 a filter of system calls (seccomp). {}",
                seccomp::LATE_FILTER_HINT
            ),
            None => format!(
                "the helper has accepted no connection for {seconds} s: its process that accepts them ends whenever it is \
                 started. See the helper's log"
            ),
        }
    }

    /// When [`Listener::tick`] has something to do next.
    pub fn due(&self) -> Option<Instant> {
        let late = self
            .down
            .filter(|_| !self.is_logged)
            .map(|since| since + LATE_AFTER);
        let start = self.child.is_none().then_some(self.next_start);
        late.into_iter().chain(start).min()
    }

    /// The descriptors that the monitor waits for while no listener accepts.
    pub fn events(&self) -> Vec<PollFd<'_>> {
        let child = self.child.iter().filter(|_| self.down.is_some());
        let socket = self.is_logged.then(|| self.socket.as_fd());
        let descriptors = child.map(|(_, ready)| ready.as_fd()).chain(socket);
        descriptors.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect()
    }

    /// One of [`Listener::events`] has happened. True if a listener accepts from now on.
    pub fn on_event(&mut self, now: Instant) -> bool {
        if let Some((_, ready)) = &mut self.child
            && ready.read(&mut [0]).is_ok_and(|n| n == 1)
        {
            self.down = None;
            self.is_logged = false;
            return true;
        }
        if self.is_logged {
            let reply = Reply::Error(Error::new(ErrorKind::Busy, self.sentence(now)));
            let answer = |connection: &Seqpacket, peer| {
                if is_served(peer, self.client) {
                    // A new connection has room for it. Who is gone needs no answer.
                    let _ = wire::encode(&reply).map(|bytes| connection.try_send(&bytes, None));
                }
                0
            };
            if !matches!(fork_session(&self.socket, &[], answer), Ok((_, true))) {
                // It is still in the queue, and launches fail for the same reason.
                std::thread::sleep(ACCEPT_AGAIN_AFTER);
            }
        }
        false
    }

    /// Handle the end of a child of the monitor, which may be the listener.
    pub fn handle_exit(&mut self, ended: Pid, status: ExitStatus, now: Instant) {
        if self.child.take_if(|(pid, _)| *pid == ended).is_some() {
            warn!(
                "the process that accepts connections has ended ({status}): another is started; sessions go on"
            );
            self.down.get_or_insert(now);
        }
    }
}

/// Fork a listener. It writes to the pipe when it accepts.
fn start(host: &Host, listener: &Listener) -> Result<(Pid, File)> {
    let (ready, accepts) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    let monitor = Pid::this();
    let pid = sys::fork(|| match listen(host, listener, accepts.into(), monitor) {
        Ok(()) => 0,
        Err(error) => {
            error!("cannot accept connections: {error:#}");
            1
        }
    })?;
    Ok((pid, ready.into()))
}

/// The listener's loop.
fn listen(host: &Host, listener: &Listener, mut accepts: File, monitor: Pid) -> Result<()> {
    let Listener {
        socket,
        client,
        monitor_socket,
        ..
    } = listener;
    // The lock and the host's mount namespace are the monitor's alone.
    let own = [
        socket.as_raw_fd(),
        monitor_socket.as_raw_fd(),
        accepts.as_raw_fd(),
    ];
    sys::close_all_but(&[&host.descriptors()[..], &own].concat())?;
    // The monitor has blocked both.
    let mask = SigSet::from_iter([Signal::SIGCHLD, Signal::SIGTERM]);
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    // However the monitor ends, the next one has a listener of its own. A signal that is read here: whoever was
    // accepted has a session by then. It is set before the filter, whose installation may hang.
    prctl::set_pdeathsig(Signal::SIGTERM).context("cannot ask to be told of the monitor's end")?;
    ensure!(getppid() == monitor, "the monitor has ended");
    privileges::ProcessKind::Session.drop_others()?;
    accepts.write_all(b"1")?;
    drop(accepts);
    let mut sessions = BTreeSet::new();
    let mut pause = None;
    loop {
        let mut events = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        if pause.is_none() && sessions.len() < MAX_SESSIONS + MAX_BUSY {
            events.push(PollFd::new(socket.as_fd(), PollFlags::POLLIN));
        }
        match ppoll(&mut events, pause.take(), None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("cannot wait for connections"),
        }
        let is_called = events.get(1).is_some_and(|event| event.any() == Some(true));
        while let Some(signal) = signals.read_signal()? {
            if signal.ssi_signo == Signal::SIGTERM as u32 {
                return Ok(());
            }
        }
        if reap(&mut sessions) {
            // The next sessions begin with it.
            let _ = (host.configuration(), host.accounts());
        }
        if !is_called {
            continue;
        }
        let is_busy = sessions.len() >= MAX_SESSIONS;
        let keep = [&host.descriptors()[..], &[monitor_socket.as_raw_fd()]].concat();
        let forked = fork_session(socket, &keep, |connection, peer| {
            if !is_served(peer, *client) {
                return 0;
            }
            let before = host.reads();
            let operations = HostOperations {
                host,
                monitor: monitor_socket,
            };
            session::serve(&operations, peer, is_busy, connection);
            match host.reads() == before {
                true => 0,
                false => EXIT_AFTER_READ,
            }
        });
        let is_taken = match forked {
            Ok((pid, is_taken)) => {
                sessions.insert(pid);
                is_taken
            }
            Err(error) => {
                warn!("cannot fork a session: {error}");
                false
            }
        };
        if !is_taken {
            // It is still in the queue: what is missing, a descriptor or memory, takes time.
            pause = Some(TimeSpec::from_duration(ACCEPT_AGAIN_AFTER));
        }
    }
}

/// Accept the next connection, and say whose it is.
fn accept(socket: &UnixListener) -> io::Result<Option<(Seqpacket, PeerCredentials)>> {
    let connection = match socket.accept() {
        Ok((connection, _)) => OwnedFd::from(connection),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
        Err(error) => return Err(error),
    };
    let peer = getsockopt(&connection, sockopt::PeerCredentials)?;
    let peer = PeerCredentials {
        uid: peer.uid(),
        pid: peer.pid(),
    };
    Ok(Some((connection.into(), peer)))
}

fn is_served(PeerCredentials { uid, pid }: PeerCredentials, client: u32) -> bool {
    if uid != client {
        warn!("closed the connection: the helper serves uid {client} alone uid={uid} pid={pid}");
    }
    uid == client
}

/// Fork a process that accepts the next connection, has these descriptors besides, and ends with it. False if it could not
/// accept: then the connection is still in the queue.
///
/// Whoever closes the last descriptor of a connection closes what is in packets that nobody has received, which can wait for
/// ever (`SO_LINGER` in `socket(7)`), but not in a process that ends. So no other process has the connection.
fn fork_session(
    socket: &UnixListener,
    keep: &[RawFd],
    serve: impl FnOnce(&Seqpacket, PeerCredentials) -> i32,
) -> io::Result<(Pid, bool)> {
    let (accepted, accepts) = pipe2(OFlag::O_CLOEXEC)?;
    let pid = sys::fork(|| {
        let next = match accept(socket) {
            Ok(next) => next,
            Err(error) => {
                warn!("cannot accept a connection: {error}");
                return 0;
            }
        };
        // Those that follow are other processes'.
        let _ = nix::unistd::write(&accepts, b"1");
        let Some((connection, peer)) = next else {
            return 0;
        };
        let keep = [keep, &[connection.as_raw_fd()]].concat();
        if sys::close_all_but(&keep).is_err() || SigSet::empty().thread_set_mask().is_err() {
            warn!("closed the connection: cannot close what is not a session's");
            return 0;
        }
        let status = serve(&connection, peer);
        // Closed by its end.
        std::mem::forget(connection);
        status
    })?;
    drop(accepts);
    Ok((pid, nix::unistd::read(&accepted, &mut [0]) == Ok(1)))
}

/// Collect sessions that have ended. True if one had to read what the listener should know.
fn reap(sessions: &mut BTreeSet<Pid>) -> bool {
    let mut has_read = false;
    while let Ok(Some((child, ended))) = sys::wait(None, WaitPidFlag::WNOHANG) {
        has_read |= ended.code() == Some(EXIT_AFTER_READ);
        if sessions.remove(&child) && ended.signal().is_some() {
            warn!("a session has ended ({ended}): a request that was not answered is lost, repeat it");
        }
    }
    has_read
}
