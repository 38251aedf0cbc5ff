//! The listener: the process that accepts connections and forks a session for each.
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
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
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
use crate::session::{self, OnHost, Peer};
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
/// The pause after a connection could not be accepted.
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
    state: State,
}

#[derive(Debug)]
enum State {
    Accepting(Child),
    /// No listener accepts.
    Down(Outage),
}

#[derive(Clone, Copy, Debug)]
struct Child {
    pid: Pid,
    begun: Instant,
}

/// From the end of one listener until the next accepts.
#[derive(Debug)]
struct Outage {
    since: Instant,
    /// Was it logged that the outage lasts too long? From then on the monitor answers connections.
    is_logged: bool,
    next: Next,
}

#[derive(Debug)]
enum Next {
    /// A listener is started at this time.
    Start(Instant),
    /// One has been started. It writes to the other end of this pipe when it accepts.
    Wait(Child, File),
}

impl Outage {
    fn new(since: Instant, start: Instant) -> Outage {
        Outage {
            since,
            is_logged: false,
            next: Next::Start(start),
        }
    }

    /// The reason of the outage, and what an operator can do.
    fn sentence(&self, now: Instant) -> String {
        let seconds = now.duration_since(self.since).as_secs();
        match &self.next {
            Next::Wait(Child { pid, .. }, _) => format!(
                "the helper has accepted no connection for {seconds} s: its process {pid} waits for the kernel to install \
                 a filter of system calls (seccomp). {}",
                seccomp::LATE_FILTER_HINT
            ),
            Next::Start(_) => format!(
                "the helper has accepted no connection for {seconds} s: its process that accepts them ends whenever it is \
                 started. See the helper's log"
            ),
        }
    }
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
            state: State::Down(Outage::new(now, now)),
        })
    }

    /// Do what is due: start a listener, or log that none accepts.
    pub fn tick(&mut self, host: &Host, now: Instant) {
        self.tick_with(now, |listener| start(host, listener));
    }

    fn tick_with(&mut self, now: Instant, start: impl FnOnce(&Listener) -> Result<(Pid, File)>) {
        let next = match &self.state {
            State::Down(Outage {
                next: Next::Start(at),
                ..
            }) if *at <= now => Some(match start(self) {
                Ok((pid, ready)) => Next::Wait(Child { pid, begun: now }, ready),
                Err(error) => {
                    warn!("cannot start the process that accepts connections: {error:#}");
                    Next::Start(now + RESTART_AFTER)
                }
            }),
            _ => None,
        };
        let State::Down(outage) = &mut self.state else {
            return;
        };
        if let Some(next) = next {
            outage.next = next;
        }
        if !outage.is_logged && now >= outage.since + LATE_AFTER {
            outage.is_logged = true;
            error!("{}", outage.sentence(now));
        }
    }

    /// When [`Listener::tick`] has something to do next.
    pub fn due(&self) -> Option<Instant> {
        let State::Down(outage) = &self.state else {
            return None;
        };
        let late = (!outage.is_logged).then(|| outage.since + LATE_AFTER);
        let start = match outage.next {
            Next::Start(at) => Some(at),
            Next::Wait(..) => None,
        };
        late.into_iter().chain(start).min()
    }

    /// The descriptors that the monitor waits for while no listener accepts.
    pub fn events(&self) -> Vec<PollFd<'_>> {
        let State::Down(outage) = &self.state else {
            return Vec::new();
        };
        let mut events = Vec::new();
        if let Next::Wait(_, ready) = &outage.next {
            events.push(PollFd::new(ready.as_fd(), PollFlags::POLLIN));
        }
        if outage.is_logged {
            events.push(PollFd::new(self.socket.as_fd(), PollFlags::POLLIN));
        }
        events
    }

    /// One of [`Listener::events`] has happened. True if a listener accepts from now on.
    pub fn on_event(&mut self, now: Instant) -> bool {
        let State::Down(outage) = &mut self.state else {
            return false;
        };
        if let Next::Wait(child, ready) = &mut outage.next
            && ready.read(&mut [0]).is_ok_and(|n| n == 1)
        {
            self.state = State::Accepting(*child);
            return true;
        }
        if outage.is_logged
            && let Ok(Some((connection, _))) = accept(&self.socket, self.client)
        {
            let reply = Reply::Error(Error::new(ErrorKind::Busy, outage.sentence(now)));
            // A new connection has room for it. Who is gone needs no answer.
            let _ = wire::encode(&reply).map(|bytes| Seqpacket::from(connection).try_send(&bytes, None));
        }
        false
    }

    /// Handle the end of a child of the monitor, which may be the listener.
    pub fn ended(&mut self, ended: Pid, status: ExitStatus, now: Instant) {
        let child = match &self.state {
            State::Accepting(child) => child,
            State::Down(Outage {
                next: Next::Wait(child, _),
                ..
            }) => child,
            State::Down(_) => return,
        };
        if ended != child.pid {
            return;
        }
        warn!(
            "the process that accepts connections has ended ({status}): another is started; sessions go on"
        );
        let start = now.max(child.begun + RESTART_AFTER);
        match &mut self.state {
            State::Down(outage) => outage.next = Next::Start(start),
            State::Accepting(_) => self.state = State::Down(Outage::new(now, start)),
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
        match accept(socket, *client) {
            Ok(Some((connection, peer))) => match serve(host, monitor_socket, connection, peer, is_busy) {
                Ok(pid) => drop(sessions.insert(pid)),
                Err(error) => warn!("closed the connection: cannot fork a session: {error}"),
            },
            Ok(None) => {}
            Err(error) => {
                warn!("cannot accept a connection: {error}");
                // It is still in the queue: what is missing, a descriptor or memory, takes time.
                pause = Some(TimeSpec::from_duration(ACCEPT_AGAIN_AFTER));
            }
        }
    }
}

/// Accept the next connection. None where there is none, or it was another uid's.
fn accept(socket: &UnixListener, client: u32) -> io::Result<Option<(OwnedFd, Peer)>> {
    let connection = match socket.accept() {
        Ok((connection, _)) => OwnedFd::from(connection),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
        Err(error) => return Err(error),
    };
    let peer = getsockopt(&connection, sockopt::PeerCredentials)?;
    let peer = Peer {
        uid: peer.uid(),
        pid: peer.pid(),
    };
    if peer.uid != client {
        let Peer { uid, pid } = peer;
        warn!("closed the connection: the helper serves uid {client} alone uid={uid} pid={pid}");
        return Ok(None);
    }
    Ok(Some((connection, peer)))
}

/// Fork a session for this connection.
fn serve(
    host: &Host,
    monitor_socket: &Seqpacket,
    connection: OwnedFd,
    peer: Peer,
    is_busy: bool,
) -> io::Result<Pid> {
    let own = [connection.as_raw_fd(), monitor_socket.as_raw_fd()];
    let keep = [&host.descriptors()[..], &own].concat();
    sys::fork(|| {
        // The listening socket is the listener's alone.
        if sys::close_all_but(&keep).is_ok() && SigSet::empty().thread_set_mask().is_ok() {
            let before = host.reads();
            session::serve(
                &OnHost {
                    host,
                    monitor: monitor_socket,
                },
                peer,
                is_busy,
                connection.into(),
            );
            return if host.reads() == before {
                0
            } else {
                EXIT_AFTER_READ
            };
        }
        warn!("closed the connection: cannot close what is not a session's");
        0
    })
}

/// Collect sessions that have ended. True if one had to read what the listener should know.
fn reap(sessions: &mut BTreeSet<Pid>) -> bool {
    let mut has_read = false;
    while let Ok(Some((child, ended))) = sys::wait(None, WaitPidFlag::WNOHANG) {
        has_read |= ended.code() == Some(EXIT_AFTER_READ);
        if sessions.remove(&child) && ended.signal().is_some() {
            warn!("a session has ended ({ended}): its request is lost, repeat it");
        }
    }
    has_read
}
