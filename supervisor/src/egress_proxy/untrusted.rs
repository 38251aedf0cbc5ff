//! A TCP socket that a job has made, and may still hold.
//!
//! Every holder can take away its non-blocking mode at any time, as that belongs to the socket and
//! not to the descriptor. So that mode is never relied on: every call here says `MSG_DONTWAIT` itself. For
//! the same reason (`SO_LINGER`) a [`Closer`] closes it.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};
use protocol::config::MAX_CONNECTION_NAME;
use protocol::{Received, Seqpacket};
use socket2::{Domain, Protocol, SockRef, TcpKeepalive, Type};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

use super::closer::Closer;

/// The job's end of a connection.
#[derive(Debug)]
pub(super) struct UntrustedTcpStream(Arc<Socket>);

/// What looks at a connection that something else reads and writes, and does not keep it open.
#[derive(Debug)]
pub(super) struct Watch(Weak<Socket>);

#[derive(Debug)]
struct Socket {
    /// None while it is dropped.
    stream: Option<TcpStream>,
    closer: Closer,
}

impl UntrustedTcpStream {
    fn stream(&self) -> &TcpStream {
        self.0.stream()
    }

    pub(super) fn watch(&self) -> Watch {
        Watch(Arc::downgrade(&self.0))
    }
}

impl Watch {
    /// Has the job's side said that it sends no more, or broken off (`POLLRDHUP`, poll(2))? Also while there are bytes that
    /// nobody reads. None once the connection is closed.
    pub(super) fn is_ended(&self) -> Option<bool> {
        let socket = self.0.upgrade()?;
        let ended = PollFlags::from_bits_retain(nix::libc::POLLRDHUP);
        let mut event = [PollFd::new(socket.stream().as_fd(), ended)];
        Some(poll(&mut event, PollTimeout::ZERO).is_ok_and(|ready| ready > 0))
    }

    /// See [`break_off`].
    pub(super) fn break_off(&self) {
        if let Some(socket) = self.0.upgrade() {
            break_off(socket.stream());
        }
    }
}

/// Let this socket, when it is closed, break the connection off (RST) instead of ending it in good order (`SO_LINGER`,
/// socket(7)).
pub(super) fn break_off(socket: &impl AsFd) {
    let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
}

impl Socket {
    fn stream(&self) -> &TcpStream {
        self.stream.as_ref().expect("it is there until it is dropped")
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Otherwise it is closed by now.
        if let Some(Ok(stream)) = self.stream.take().map(TcpStream::into_std) {
            self.closer.close(stream.into());
        }
    }
}

/// Wait until there is something to receive, or nothing will ever come. That a socket is called readable is
/// no proof: tokio takes it for granted of one that was just accepted.
pub(super) async fn wait_readable(client: &UnixStream) {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    while client.readable().await.is_ok() {
        let seen = client.try_io(Interest::READABLE, || {
            Ok(recv(client.as_raw_fd(), &mut [0], flags)?)
        });
        if !seen.is_err_and(|error| is_retryable(&error)) {
            return;
        }
    }
}

/// Take the one descriptor of the one packet that the client should have sent by now, and the connection's name. This
/// may block, for whatever else it has sent is closed here.
pub(super) fn receive(client: UnixStream, closer: Closer) -> Result<(UntrustedTcpStream, String), String> {
    let client = client
        .into_std()
        .map_err(|error| format!("its socket cannot be used: {error}"))?;
    let (name, brought) = match Seqpacket::from(OwnedFd::from(client)).recv(MAX_CONNECTION_NAME) {
        Ok(Received::Packet {
            bytes,
            mut descriptors,
        }) if descriptors.len() == 1 => (String::from_utf8(bytes), descriptors.pop()),
        Ok(Received::Packet { descriptors, .. }) => {
            return Err(format!("it brought {} descriptors, not one", descriptors.len()));
        }
        Ok(Received::Oversize { .. }) => {
            return Err("it sent more than a name, or brought many descriptors".into());
        }
        Ok(Received::Closed) => return Err("it closed without sending anything".into()),
        Err(Errno::EAGAIN) => return Err("it sent nothing in time".into()),
        Err(errno) => return Err(format!("nothing can be received from it: {errno}")),
    };
    let brought = brought.ok_or("it brought no descriptor")?;
    check(&brought)?;
    let stream = adopt(brought, closer).map_err(|error| format!("its connection cannot be used: {error}"))?;
    Ok((stream, name.map_err(|_| "it sent no name")?))
}

/// Is this what was asked for: a TCP connection, with another end?
fn check(fd: &OwnedFd) -> Result<(), String> {
    let socket = SockRef::from(fd);
    let family = socket
        .domain()
        .map_err(|error| format!("it brought no socket: {error}"))?;
    let is_tcp = (family == Domain::IPV4 || family == Domain::IPV6)
        && socket.r#type().is_ok_and(|kind| kind == Type::STREAM)
        && socket.protocol().is_ok_and(|p| p == Some(Protocol::TCP));
    if !is_tcp {
        return Err("it brought a socket that is not TCP's".into());
    }
    match socket.peer_addr() {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("it brought a socket without another end: {error}")),
    }
}

fn adopt(fd: OwnedFd, closer: Closer) -> io::Result<UntrustedTcpStream> {
    // tokio asks for it, although nothing here depends on it.
    SockRef::from(&fd).set_nonblocking(true)?;
    keep_alive(&fd)?;
    let stream = Some(TcpStream::from_std(fd.into())?);
    Ok(UntrustedTcpStream(Arc::new(Socket { stream, closer })))
}

/// A connection may be idle for days; one whose other end is gone without a FIN is noticed in three minutes.
/// What has been read is forwarded at once: how to make packets of it was the first sender's affair.
pub(super) fn keep_alive(socket: &impl AsFd) -> io::Result<()> {
    let socket = SockRef::from(socket);
    let probes = TcpKeepalive::new()
        .with_time(Duration::from_secs(60))
        .with_interval(Duration::from_secs(30))
        .with_retries(4);
    socket.set_tcp_keepalive(&probes)?;
    socket.set_tcp_nodelay(true)
}

impl AsyncRead for UntrustedTcpStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let socket = self.get_mut().stream();
        loop {
            ready!(socket.poll_read_ready(cx))?;
            let space = into.initialize_unfilled();
            let received = socket.try_io(Interest::READABLE, || {
                Ok(recv(socket.as_raw_fd(), space, MsgFlags::MSG_DONTWAIT)?)
            });
            match received {
                Err(error) if is_retryable(&error) => {}
                Err(error) => return Poll::Ready(Err(error)),
                Ok(length) => {
                    into.advance(length);
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

impl AsyncWrite for UntrustedTcpStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let socket = self.get_mut().stream();
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        loop {
            ready!(socket.poll_write_ready(cx))?;
            let sent = socket.try_io(Interest::WRITABLE, || Ok(send(socket.as_raw_fd(), bytes, flags)?));
            match sent {
                Err(error) if is_retryable(&error) => {}
                sent => return Poll::Ready(sent),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(SockRef::from(self.get_mut().stream()).shutdown(Shutdown::Write))
    }
}

fn is_retryable(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
