//! Connections of a job without the host's network, which pid 1 accepts and forwards to the supervisor.

use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use protocol::Seqpacket;
use protocol::config::PROXY_SOCKET;

use crate::unprivileged::{MAX_PER_ITERATION, Unprivileged};

/// Where connections come in, and where they go.
#[derive(Debug)]
pub struct ProxyListener {
    /// Each with the name of its connections.
    pub listeners: Vec<(TcpListener, String)>,
    pub proxy_dir: OwnedFd,
}

impl ProxyListener {
    /// What must stay open until pid 1 forwards.
    pub fn descriptors(&self) -> Vec<i32> {
        let listeners = self.listeners.iter().map(|(listener, _)| listener.as_raw_fd());
        listeners.chain([self.proxy_dir.as_raw_fd()]).collect()
    }

    /// Readable when a connection waits.
    pub fn poll_fds(&self) -> Vec<PollFd<'_>> {
        let listeners = self.listeners.iter().map(|(listener, _)| listener.as_fd());
        listeners.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect()
    }

    /// Forward the connections that are waiting. Where the supervisor does not run, or is busy, they are closed: the
    /// agent comes again.
    pub fn forward(&self, _proof: &Unprivileged) {
        let socket: PathBuf = format!("/proc/self/fd/{}/{PROXY_SOCKET}", self.proxy_dir.as_raw_fd()).into();
        let mut events = self.poll_fds();
        let _ = poll(&mut events, PollTimeout::ZERO);
        let ready = events.iter().map(|event| event.any() == Some(true));
        for (_, (listener, name)) in ready.zip(&self.listeners).filter(|(ready, _)| *ready) {
            for _ in 0..MAX_PER_ITERATION {
                let Ok((connection, _)) = listener.accept() else {
                    break;
                };
                if let Ok(supervisor) = Seqpacket::connect(&socket, true) {
                    let _ = supervisor.send(name.as_bytes(), Some(connection.as_fd()));
                }
            }
        }
    }
}
