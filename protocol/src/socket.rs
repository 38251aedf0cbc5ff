//! One connected `SOCK_SEQPACKET` socket: whole packets in and out, each with at most one descriptor.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect,
    recvmsg, sendmsg, socket,
};

/// A connection between the two halves. Whether calls block is the descriptor's own affair.
#[derive(Debug)]
pub struct Seqpacket(OwnedFd);

/// What one `recv` brought.
#[derive(Debug)]
pub enum Received {
    /// The other end has closed.
    Closed,
    /// A whole packet, and the descriptors that came with it (closed when dropped).
    Packet {
        bytes: Vec<u8>,
        descriptors: Vec<OwnedFd>,
    },
    /// A packet longer than `limit`, or with more descriptors than one message can have. What came of
    /// it is thrown away; no sense can be made of this peer.
    Oversize,
}

impl Seqpacket {
    /// Connect to the socket at `path`.
    ///
    /// # Errors
    /// Those of `socket(2)` and `connect(2)`; with `nonblocking`, EAGAIN means that the listener's queue is full.
    pub fn connect(path: &Path, nonblocking: bool) -> nix::Result<Self> {
        let flags = if nonblocking {
            SockFlag::SOCK_NONBLOCK
        } else {
            SockFlag::empty()
        };
        let fd = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            flags | SockFlag::SOCK_CLOEXEC,
            None,
        )?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(Self(fd))
    }

    /// Send one packet. A closed peer is EPIPE, never a signal.
    pub fn send(&self, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> nix::Result<()> {
        let raw: Vec<RawFd> = descriptor.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
        let iov = [IoSlice::new(bytes)];
        loop {
            match sendmsg::<()>(self.0.as_raw_fd(), &iov, control, MsgFlags::MSG_NOSIGNAL, None) {
                Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Receive one packet of at most `limit` bytes.
    pub fn recv(&self, limit: usize) -> nix::Result<Received> {
        let mut bytes = vec![0; limit];
        // Room for two, so that a surplus one is seen; those beyond are closed by the kernel (MSG_CTRUNC).
        let mut control = nix::cmsg_space!([RawFd; 2]);
        let (length, flags, descriptors) = loop {
            let mut iov = [IoSliceMut::new(&mut bytes)];
            match recvmsg::<()>(
                self.0.as_raw_fd(),
                &mut iov,
                Some(&mut control),
                MsgFlags::MSG_CMSG_CLOEXEC,
            ) {
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
                Ok(message) => {
                    let mut descriptors = Vec::new();
                    for item in message.cmsgs()? {
                        if let ControlMessageOwned::ScmRights(raw) = item {
                            descriptors.append(&mut crate::sys::adopt(raw));
                        }
                    }
                    break (message.bytes, message.flags, descriptors);
                }
            }
        };
        if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
            return Ok(Received::Oversize);
        }
        // An empty packet looks like the end; no message is empty, so the connection ends either way.
        if length == 0 && descriptors.is_empty() {
            return Ok(Received::Closed);
        }
        bytes.truncate(length);
        Ok(Received::Packet { bytes, descriptors })
    }
}

impl From<OwnedFd> for Seqpacket {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl AsFd for Seqpacket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Seqpacket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::socketpair;

    fn pair() -> (Seqpacket, Seqpacket) {
        let (a, b) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        (a.into(), b.into())
    }

    #[test]
    fn packets_keep_their_borders_and_their_descriptor() {
        let (a, b) = pair();
        a.send(b"one", None).unwrap();
        a.send(b"two", Some(b.as_fd())).unwrap();
        let Received::Packet { bytes, descriptors } = b.recv(16).unwrap() else {
            panic!()
        };
        assert_eq!((bytes.as_slice(), descriptors.len()), (&b"one"[..], 0));
        let Received::Packet { bytes, descriptors } = b.recv(16).unwrap() else {
            panic!()
        };
        assert_eq!((bytes.as_slice(), descriptors.len()), (&b"two"[..], 1));
    }

    #[test]
    fn too_long_is_oversize_and_a_closed_peer_is_closed() {
        let (a, b) = pair();
        a.send(&[7; 17], None).unwrap();
        assert!(matches!(b.recv(16).unwrap(), Received::Oversize));
        drop(a);
        assert!(matches!(b.recv(16).unwrap(), Received::Closed));
        assert_eq!(b.send(b"x", None), Err(Errno::EPIPE));
    }
}
