//! A network of a job's own, with nothing in it but itself and a door to the buildomat server.
//!
//! The job's pid 1 listens where the job believes the server to be. Each connection that it accepts it hands
//! to the supervisor, through a socket in a directory that the job cannot see; the supervisor passes the
//! bytes on. So the job has no interface, no route and no name service that could lead anywhere else; TLS
//! stays between agent and server; and the helper needs neither firewall rules nor addresses.

use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use protocol::Seqpacket;
use protocol::config::{BaseUrl, GATE_SOCKET};

use crate::init::TURN;
use crate::sys;

/// The job's `/etc/hosts`: the server is here. None where an address says so already.
pub fn hosts(baseurl: &BaseUrl) -> Option<String> {
    let (name, _) = baseurl.name_and_port()?;
    let is_address = name.parse::<std::net::Ipv4Addr>().is_ok();
    (!is_address).then(|| format!("127.0.0.1 localhost {name}\n::1 localhost\n"))
}

/// Where connections come in, and where they go.
#[derive(Debug)]
pub struct Door {
    listener: TcpListener,
    gate: OwnedFd,
}

/// Leave the host's network for a new one, and listen in it.
pub fn enter(baseurl: &BaseUrl, gate: &OwnedFd) -> Result<Door> {
    let (name, port) = baseurl.name_and_port().context("the server has no name")?;
    unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
    let control = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .context("cannot open a socket")?;
    sys::bring_up_loopback(control.as_fd()).context("cannot bring up the job's loopback")?;
    let address = name.parse().unwrap_or(std::net::Ipv4Addr::LOCALHOST);
    let listener = TcpListener::bind((address, port))
        .with_context(|| format!("cannot listen on {address}:{port} for the job"))?;
    listener.set_nonblocking(true)?;
    Ok(Door {
        listener,
        gate: gate.try_clone()?,
    })
}

impl Door {
    /// What must stay open until pid 1 keeps house.
    pub fn descriptors(&self) -> [i32; 2] {
        [self.listener.as_raw_fd(), self.gate.as_raw_fd()]
    }

    pub fn listener(&self) -> &TcpListener {
        &self.listener
    }

    /// Hand on the connections that are waiting. Where the supervisor is away, or busy, they are closed: the
    /// agent comes again.
    pub fn pass_on(&self) {
        let socket: PathBuf = format!("/proc/self/fd/{}/{GATE_SOCKET}", self.gate.as_raw_fd()).into();
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
