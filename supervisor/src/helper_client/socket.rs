//! Packets over the helper's Unix socket, without blocking.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use protocol::Seqpacket;
use protocol::wire::MAX_REPLY;
use tokio::io::unix::AsyncFd;

use super::{Connection, Connector, Error, Pending, Result};

/// Where the helper is.
#[derive(Debug)]
pub(super) struct Socket(pub(super) PathBuf);

impl Connector for Socket {
    fn connect(&self) -> Result<Box<dyn Connection>> {
        let socket = Seqpacket::connect(&self.0, true).map_err(|errno| self.absent(errno))?;
        let socket = watched(socket).map_err(|e| {
            Error::Unreachable(format!(
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
            Errno::EAGAIN => "it has too many clients; wait",
            _ => "see the helper's log",
        };
        Error::Unreachable(format!(
            "the helper cannot be reached at {}: {errno}; {hint}",
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

impl Connection for AsyncFd<Seqpacket> {
    fn exchange<'a>(&'a self, packet: &'a [u8], fd: Option<BorrowedFd<'a>>) -> Pending<'a> {
        Box::pin(async move {
            loop {
                let mut ready = self
                    .writable()
                    .await
                    .map_err(|e| Error::Unreachable(e.to_string()))?;
                match self.get_ref().send(packet, fd.as_ref().map(AsFd::as_fd)) {
                    Ok(()) => break,
                    Err(Errno::EAGAIN) => ready.clear_ready(),
                    // It has closed the connection, but may have answered why.
                    Err(Errno::EPIPE | Errno::ECONNRESET) => break,
                    Err(errno) => {
                        return Err(Error::Unreachable(format!("cannot send to the helper: {errno}")));
                    }
                }
            }
            let mut was_reset = false;
            loop {
                let mut ready = self
                    .readable()
                    .await
                    .map_err(|e| Error::Unreachable(e.to_string()))?;
                match self.get_ref().recv(MAX_REPLY) {
                    Err(Errno::EAGAIN) => ready.clear_ready(),
                    // It has closed without reading what was sent. The kernel reports that once, before its answer.
                    Err(Errno::ECONNRESET) if !was_reset => was_reset = true,
                    Err(errno) => {
                        return Err(Error::Unreachable(format!(
                            "cannot receive from the helper: {errno}"
                        )));
                    }
                    Ok(received) => return Ok(received),
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::os::unix::net::UnixListener;
    use std::path::Path;

    use nix::sys::socket::{
        AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, bind, listen, recv, socket,
    };
    use protocol::{ErrorKind, Reply, wire};

    use super::super::HelperClient;
    use super::*;

    fn listen_at(path: &Path) -> UnixListener {
        let flags = SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
        bind(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
        listen(&fd, Backlog::new(8).unwrap()).unwrap();
        fd.into()
    }

    /// The helper does this while it has no process that may read what is sent.
    #[tokio::test]
    async fn an_answer_from_a_helper_that_closed_without_reading_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("helper.sock");
        let listening = listen_at(&path);
        for waits in [true, false] {
            let there = listening.try_clone().unwrap();
            let answer = std::thread::spawn(move || {
                let connection = OwnedFd::from(there.accept().unwrap().0);
                if waits {
                    // Until the greeting lies there: the kernel then says that the connection was reset.
                    recv(connection.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK).unwrap();
                }
                let error = protocol::Error::new(ErrorKind::Busy, "the reason");
                let bytes = wire::encode(&Reply::Error(error)).unwrap();
                Seqpacket::from(connection).send(&bytes, None).unwrap();
            });
            let error = HelperClient::new(path.clone()).list().await.unwrap_err();
            assert!(
                matches!(&error, Error::Refused(error) if error.message() == "the reason"),
                "{waits}: {error:?}"
            );
            answer.join().unwrap();
        }
    }
}
