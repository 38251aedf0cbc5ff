//! Packets over the helper's Unix socket, without blocking.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use protocol::Seqpacket;
use protocol::wire::MAX_REPLY;
use tokio::io::unix::AsyncFd;

use super::{Error, Line, Pending, Result, Road};

/// Where the helper is.
#[derive(Debug)]
pub(super) struct Socket(pub(super) PathBuf);

impl Road for Socket {
    fn connect(&self) -> Result<Box<dyn Line>> {
        let socket = Seqpacket::connect(&self.0, true).map_err(|errno| self.absent(errno))?;
        let socket = watched(socket).map_err(|e| {
            Error::Away(format!(
                "cannot wait for the helper's socket: {e}; restart the supervisor"
            ))
        })?;
        Ok(Box::new(socket))
    }
}

impl Socket {
    fn absent(&self, errno: Errno) -> Error {
        let hint = match errno {
            Errno::ENOENT | Errno::ECONNREFUSED => "start the helper",
            Errno::EACCES => "run the supervisor as the user, and in the group, that the helper serves",
            Errno::EAGAIN => "it has too many callers; wait",
            _ => "see the helper's log",
        };
        Error::Away(format!(
            "the helper is away from {}: {errno}; {hint}",
            self.0.display()
        ))
    }
}

/// What tokio asks of its caller (the descriptor stays open, and the same, for as long as it is watched)
/// holds by the type: a `Seqpacket` owns its descriptor, and has no way to change it.
#[expect(
    deprecated,
    reason = "the replacement is an unsafe function, and this crate has no unsafe code"
)]
fn watched(socket: Seqpacket) -> std::io::Result<AsyncFd<Seqpacket>> {
    AsyncFd::new(socket)
}

impl Line for AsyncFd<Seqpacket> {
    fn exchange<'a>(&'a self, packet: &'a [u8], fd: Option<BorrowedFd<'a>>) -> Pending<'a> {
        Box::pin(async move {
            loop {
                let mut ready = self.writable().await.map_err(|e| Error::Away(e.to_string()))?;
                match self.get_ref().send(packet, fd.as_ref().map(AsFd::as_fd)) {
                    Ok(()) => break,
                    Err(Errno::EAGAIN) => ready.clear_ready(),
                    // It has hung up, but may have said why.
                    Err(Errno::EPIPE | Errno::ECONNRESET) => break,
                    Err(errno) => return Err(Error::Away(format!("cannot send to the helper: {errno}"))),
                }
            }
            loop {
                let mut ready = self.readable().await.map_err(|e| Error::Away(e.to_string()))?;
                match self.get_ref().recv(MAX_REPLY) {
                    Err(Errno::EAGAIN) => ready.clear_ready(),
                    Err(errno) => {
                        return Err(Error::Away(format!("cannot receive from the helper: {errno}")));
                    }
                    Ok(received) => return Ok(received),
                }
            }
        })
    }
}
