//! Closes sockets that a job may have made slow to close (`SO_LINGER`, `socket(7)`), and those that may hold such
//! sockets in packets that have not been received.
//!
//! `close(2)` of such a socket waits, without end if its other end likes, unless the closing thread is about to end
//! (`inet_release` in the kernel's `net/ipv4/af_inet.c`). So a thread of its own closes them by ending: it first takes a
//! table of descriptors of its own (`unshare(2)`), in which they are open once more; then they are closed in the
//! process's table, which is not the last time and so takes no time.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use nix::sched::{CloneFlags, unshare};

#[derive(Clone, Debug)]
pub(super) struct Closer {
    queue: Sender<OwnedFd>,
    pending: Arc<AtomicUsize>,
}

impl Closer {
    /// # Errors
    /// Where there can be no more threads.
    pub(super) fn start() -> io::Result<Closer> {
        let (queue, descriptors) = channel();
        let pending = Arc::new(AtomicUsize::new(0));
        let done = pending.clone();
        let work = move || close_each(&descriptors, &done);
        thread::Builder::new().name("closer".into()).spawn(work)?;
        Ok(Closer { queue, pending })
    }

    /// Close it soon; never waits.
    pub(super) fn close(&self, descriptor: OwnedFd) {
        self.pending.fetch_add(1, Ordering::Relaxed);
        // The thread ends with the last sender.
        let _ = self.queue.send(descriptor);
    }

    /// How many descriptors are not closed yet.
    pub(super) fn pending(&self) -> usize {
        self.pending.load(Ordering::Relaxed)
    }
}

fn close_each(descriptors: &Receiver<OwnedFd>, pending: &AtomicUsize) {
    while let Ok(first) = descriptors.recv() {
        let mut batch = vec![first];
        batch.extend(descriptors.try_iter());
        let count = batch.len();
        close(batch);
        pending.fetch_sub(count, Ordering::Relaxed);
    }
}

fn close(batch: Vec<OwnedFd>) {
    let (tell, has_own_table) = channel();
    let (closed, may_end) = channel::<()>();
    let end = move || {
        let own = unshare(CloneFlags::CLONE_FILES);
        // Both: who does not listen any more has ended.
        let _ = tell.send(own);
        let _ = may_end.recv();
    };
    let thread = thread::Builder::new().name("closing".into()).spawn(end);
    let own = thread.map(|_| has_own_table.recv());
    if !matches!(own, Ok(Ok(Ok(())))) {
        tracing::debug!("no thread can close sockets by ending ({own:?}): closing them may take long");
    }
    drop(batch);
    drop(closed);
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    use socket2::SockRef;

    use super::*;

    /// A socket of which closing takes a thousand seconds, and its other end.
    fn slow_to_close() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let other = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let socket = listener.accept().unwrap().0;
        let linger = Some(Duration::from_secs(1000));
        SockRef::from(&socket).set_linger(linger).unwrap();
        socket.set_nonblocking(true).unwrap();
        while (&socket).write(&[7; 4096]).is_ok() {}
        (socket, other)
    }

    #[test]
    fn a_socket_that_lingers_is_closed_at_once_and_its_other_end_gets_all_that_was_sent() {
        let closer = Closer::start().unwrap();
        let mut others = Vec::new();
        let started_at = Instant::now();
        for _ in 0..20 {
            let (socket, other) = slow_to_close();
            closer.close(socket.into());
            others.push(other);
        }
        while closer.pending() > 0 {
            assert!(started_at.elapsed() < Duration::from_secs(60), "closing waits");
            thread::sleep(Duration::from_millis(1));
        }
        for mut other in others {
            let mut length = 0;
            let mut some = [0; 4096];
            while let n @ 1.. = other.read(&mut some).unwrap() {
                length += n;
            }
            assert!(length >= 4096);
        }
    }
}
