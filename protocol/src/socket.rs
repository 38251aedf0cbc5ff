//! One connected `SOCK_SEQPACKET` socket: whole packets in and out, each with at most one descriptor.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, recvmsg, sendmsg,
    socket, socketpair,
};

/// A connection between two processes of the factory. Whether calls block is the descriptor's own affair.
#[derive(Debug)]
pub struct Seqpacket(OwnedFd);

/// What one call that receives brought.
#[derive(Debug)]
pub enum Received {
    /// The other end has closed.
    Closed,
    /// A whole packet, and the descriptors that came with it (closed when dropped).
    Packet {
        /// At most as long as `limit`.
        bytes: Vec<u8>,
        /// None, one or two; with [`Seqpacket::peek_all`] as many as one packet can have.
        descriptors: Vec<OwnedFd>,
    },
    /// A packet longer than `limit`, or with more descriptors than there was room for: no sense can be made of this
    /// peer.
    Oversize {
        /// Those that came with it, as far as there was room.
        descriptors: Vec<OwnedFd>,
    },
}

impl Seqpacket {
    /// Two ends that are connected to each other; their calls block.
    ///
    /// # Errors
    /// Those of `socketpair(2)`.
    pub fn pair() -> nix::Result<(Self, Self)> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (one, other) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        Ok((Self(one), Self(other)))
    }

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
        self.send_with(MsgFlags::empty(), bytes, descriptor)
    }

    /// [`Self::send`] without blocking: EAGAIN where the other end has no room for it now, whether calls block or not.
    pub fn try_send(&self, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> nix::Result<()> {
        self.send_with(MsgFlags::MSG_DONTWAIT, bytes, descriptor)
    }

    fn send_with(
        &self,
        flags: MsgFlags,
        bytes: &[u8],
        descriptor: Option<BorrowedFd<'_>>,
    ) -> nix::Result<()> {
        let flags = flags | MsgFlags::MSG_NOSIGNAL;
        let raw: Vec<RawFd> = descriptor.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
        let iov = [IoSlice::new(bytes)];
        loop {
            match sendmsg::<()>(self.0.as_raw_fd(), &iov, control, flags, None) {
                Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Receive one packet of at most `limit` bytes.
    pub fn recv(&self, limit: usize) -> nix::Result<Received> {
        // Room for two, so that a surplus one is seen; those beyond are closed by the kernel (MSG_CTRUNC).
        self.recv_with(MsgFlags::empty(), limit, nix::cmsg_space!([RawFd; 2]))
    }

    /// Receive copies of all that the next packet brings, which stays the next. Where there is none, the error is EAGAIN.
    pub fn peek_all(&self, limit: usize) -> nix::Result<Received> {
        /// `SCM_MAX_FD` of `unix(7)`.
        const MOST: usize = 253;
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        self.recv_with(flags, limit, nix::cmsg_space!([RawFd; MOST]))
    }

    /// Receive the next packet's bytes alone (`recvfrom(2)`). No process gets descriptors by this: the kernel closes those
    /// of the packet, which can take for ever (`SO_LINGER` in `socket(7)`).
    pub fn recv_bytes(&self, limit: usize) -> nix::Result<Received> {
        self.bytes_with(MsgFlags::empty(), limit)
    }

    /// The same, and the packet stays the next, with its descriptors.
    pub fn peek_bytes(&self, limit: usize) -> nix::Result<Received> {
        self.bytes_with(MsgFlags::MSG_PEEK, limit)
    }

    fn bytes_with(&self, flags: MsgFlags, limit: usize) -> nix::Result<Received> {
        let mut bytes = vec![0; limit];
        let length = loop {
            // With this flag it is that of the whole packet.
            match recv(self.0.as_raw_fd(), &mut bytes, flags | MsgFlags::MSG_TRUNC) {
                Err(Errno::EINTR) => {}
                result => break result?,
            }
        };
        let descriptors = Vec::new();
        if length > limit {
            return Ok(Received::Oversize { descriptors });
        }
        if length == 0 {
            return Ok(Received::Closed);
        }
        bytes.truncate(length);
        Ok(Received::Packet { bytes, descriptors })
    }

    fn recv_with(&self, flags: MsgFlags, limit: usize, mut control: Vec<u8>) -> nix::Result<Received> {
        let mut bytes = vec![0; limit];
        let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
        let (length, flags) = loop {
            let mut iov = [IoSliceMut::new(&mut bytes)];
            match recvmsg::<()>(self.0.as_raw_fd(), &mut iov, Some(&mut control), flags) {
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
                Ok(message) => break (message.bytes, message.flags),
            }
        };
        let descriptors = crate::sys::adopt(rights(&control));
        if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
            return Ok(Received::Oversize { descriptors });
        }
        // An empty packet looks like the end; no message is empty, so the connection ends either way.
        if length == 0 && descriptors.is_empty() {
            return Ok(Received::Closed);
        }
        bytes.truncate(length);
        Ok(Received::Packet { bytes, descriptors })
    }
}

/// The descriptors that the kernel has written down here, of which it makes one list (`cmsg(3)`, `unix(7)`). nix
/// does not look into a list that was cut, and then nobody would close what there is of it.
fn rights(control: &[u8]) -> Vec<RawFd> {
    let (length, rest) = control.split_at(size_of::<usize>());
    let kind = [libc::SOL_SOCKET, libc::SCM_RIGHTS].map(i32::to_ne_bytes);
    let Some(list) = rest.strip_prefix(kind.as_flattened()) else {
        return Vec::new();
    };
    let length = length.try_into().map_or(0, usize::from_ne_bytes);
    let list = &list[..length.saturating_sub(size_of::<libc::cmsghdr>())];
    let number = |bytes: &[u8]| bytes.try_into().map(RawFd::from_ne_bytes).ok();
    list.chunks_exact(size_of::<RawFd>()).filter_map(number).collect()
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

    #[test]
    fn packets_keep_their_borders_and_their_descriptor() {
        let (a, b) = Seqpacket::pair().unwrap();
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
    fn a_packet_that_was_looked_at_stays_and_bytes_come_alone() {
        let (a, b) = Seqpacket::pair().unwrap();
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let before = open();
        for _ in 0..100 {
            a.send(b"one", Some(b.as_fd())).unwrap();
            for _ in 0..2 {
                let all = b.peek_all(16).unwrap();
                let alone = b.peek_bytes(16).unwrap();
                assert!(
                    matches!(all, Received::Packet { bytes, descriptors } if bytes == b"one" && descriptors.len() == 1)
                );
                assert!(
                    matches!(alone, Received::Packet { bytes, descriptors } if bytes == b"one" && descriptors.is_empty())
                );
                assert!(matches!(b.peek_bytes(2), Ok(Received::Oversize { .. })));
            }
            let alone = b.recv_bytes(3).unwrap();
            assert!(
                matches!(alone, Received::Packet { bytes, descriptors } if bytes == b"one" && descriptors.is_empty())
            );
            a.send(b"two", Some(b.as_fd())).unwrap();
            // Too long, and gone.
            assert!(matches!(b.recv_bytes(0), Ok(Received::Oversize { .. })));
        }
        // Other tests of this process open some at the same time, but not a hundred.
        let left = open().saturating_sub(before);
        assert!(left < 100, "{left} descriptors are left");
        drop(a);
        assert!(matches!(b.peek_bytes(16), Ok(Received::Closed)));
        assert!(matches!(b.recv_bytes(16), Ok(Received::Closed)));
    }

    #[test]
    fn what_comes_of_too_many_descriptors_is_closed() {
        let (a, b) = Seqpacket::pair().unwrap();
        let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
        let own: Vec<OwnedFd> = (0..5).map(|_| a.0.try_clone().unwrap()).collect();
        let raw: Vec<RawFd> = own.iter().map(AsRawFd::as_raw_fd).collect();
        // Other tests of this process open some at the same time, but not a hundred.
        let before = open();
        for number in [3, 5].repeat(100) {
            let rights = [ControlMessage::ScmRights(&raw[..number])];
            let iov = [IoSlice::new(b"x")];
            sendmsg::<()>(a.as_raw_fd(), &iov, &rights, MsgFlags::empty(), None).unwrap();
            assert!(matches!(b.recv(16), Ok(Received::Oversize { .. })));
        }
        let left = open().saturating_sub(before);
        assert!(left < 100, "{left} descriptors are left");
    }

    #[test]
    fn nothing_but_a_list_of_descriptors_is_one() {
        let (a, b) = Seqpacket::pair().unwrap();
        nix::sys::socket::setsockopt(&b, nix::sys::socket::sockopt::PassCred, &true).unwrap();
        a.send(b"one", None).unwrap();
        match b.recv(16) {
            Ok(Received::Oversize { .. }) => {}
            Ok(Received::Packet { descriptors, .. }) => assert!(descriptors.is_empty()),
            other => panic!("{other:?}"),
        }
        let mut control = vec![0; 24];
        control[0] = 24;
        assert_eq!(rights(&control), []);
        control[8..16].copy_from_slice(&[1, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(rights(&control), [0, 0]);
        control[0] = 20;
        assert_eq!(rights(&control), [0]);
    }

    #[test]
    fn a_connection_is_made_as_it_is_asked_for_and_no_program_inherits_it() {
        use nix::fcntl::{FcntlArg, OFlag, fcntl};
        let path = std::env::temp_dir().join(format!("protocol-socket-{}", std::process::id()));
        let (kind, flags) = (SockType::SeqPacket, SockFlag::SOCK_CLOEXEC);
        let listener = socket(AddressFamily::Unix, kind, flags, None).unwrap();
        nix::sys::socket::bind(listener.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(2).unwrap()).unwrap();
        for nonblocking in [false, true] {
            let connected = Seqpacket::connect(&path, nonblocking).unwrap();
            assert_eq!(fcntl(&connected, FcntlArg::F_GETFD), Ok(libc::FD_CLOEXEC));
            let flags = OFlag::from_bits_truncate(fcntl(&connected, FcntlArg::F_GETFL).unwrap());
            assert_eq!(flags.contains(OFlag::O_NONBLOCK), nonblocking);
        }
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn too_long_is_oversize_and_a_closed_peer_is_closed() {
        let (a, b) = Seqpacket::pair().unwrap();
        a.send(&[7; 17], None).unwrap();
        assert!(matches!(b.recv(16).unwrap(), Received::Oversize { .. }));
        drop(a);
        assert!(matches!(b.recv(16).unwrap(), Received::Closed));
        assert_eq!(b.send(b"x", None), Err(Errno::EPIPE));
    }
}
