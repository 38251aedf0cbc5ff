//! Connections of a job without a network, which pid 1 accepts in its place and forwards to the supervisor.

use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;

use protocol::Seqpacket;
use protocol::config::PROXY_SOCKET;

use crate::unprivileged::TURN;

/// Where connections come in, and where they go.
#[derive(Debug)]
pub struct ProxyListener {
    pub listener: TcpListener,
    pub proxy_dir: OwnedFd,
}

impl ProxyListener {
    /// What must stay open until pid 1 forwards.
    pub fn descriptors(&self) -> [i32; 2] {
        [self.listener.as_raw_fd(), self.proxy_dir.as_raw_fd()]
    }

    /// Hand on the connections that are waiting. Where the supervisor is away, or busy, they are closed: the
    /// agent comes again.
    pub fn forward(&self) {
        let socket: PathBuf = format!("/proc/self/fd/{}/{PROXY_SOCKET}", self.proxy_dir.as_raw_fd()).into();
        for _ in 0..TURN {
            let Ok((connection, _)) = self.listener.accept() else {
                return;
            };
            if let Ok(supervisor) = Seqpacket::connect(&socket, true) {
                let _ = supervisor.send(b"c", Some(connection.as_fd()));
            }
        }
    }
}
