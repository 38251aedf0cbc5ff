//! Forwards the bytes of one connection, both ways.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf, copy_bidirectional_with_sizes};
use tokio::time::{sleep, timeout};

/// Bytes that wait for a side that reads slowly, for each direction of a connection.
const BUFFER: usize = 64 << 10;

/// What has happened on both sides of a connection.
#[derive(Debug, Default)]
pub(super) struct Activity {
    /// Bytes that were read or written.
    bytes: AtomicU64,
    /// One side will send no more.
    half_closed: AtomicBool,
    /// The job has all that the server has sent, and knows that this was all.
    job_has_all: AtomicBool,
    /// The same of the server.
    server_has_all: AtomicBool,
}

/// Until both sides have sent all that they will, or, once one has, until no byte has moved for `idle`: who has closed its
/// side may be gone. `job_has_ended` says whether the job has: while the server takes nothing, nothing is read of the job.
///
/// # Errors
/// Where a side has broken off, or the time is over. The activity says which side has the end of what the other has sent.
pub(super) async fn forward(
    activity: &Activity,
    job: impl AsyncRead + AsyncWrite + Unpin,
    server: impl AsyncRead + AsyncWrite + Unpin,
    idle: Duration,
    job_has_ended: impl Fn() -> bool,
) -> io::Result<()> {
    let mut job = Watched {
        side: job,
        activity,
        has_all: &activity.job_has_all,
    };
    let mut server = Watched {
        side: server,
        activity,
        has_all: &activity.server_has_all,
    };
    tokio::select! {
        copied = copy_bidirectional_with_sizes(&mut job, &mut server, BUFFER, BUFFER) => copied.map(drop),
        () = activity.has_stopped(idle, job_has_ended) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Write what a side has sent already, within `idle`: the other may take nothing.
///
/// # Errors
/// Where it has broken off, or the time is over.
pub(super) async fn write_first(
    to: &mut (impl AsyncWrite + Unpin),
    bytes: &[u8],
    idle: Duration,
) -> io::Result<()> {
    timeout(idle, to.write_all(bytes)).await?
}

impl Activity {
    pub(super) fn job_has_all(&self) -> bool {
        self.job_has_all.load(Ordering::Relaxed)
    }

    pub(super) fn server_has_all(&self) -> bool {
        self.server_has_all.load(Ordering::Relaxed)
    }

    async fn has_stopped(&self, idle: Duration, job_has_ended: impl Fn() -> bool) {
        let state = || {
            let half_closed = self.half_closed.load(Ordering::Relaxed) || job_has_ended();
            (half_closed, self.bytes.load(Ordering::Relaxed))
        };
        let mut before = state();
        loop {
            sleep(idle).await;
            let now = state();
            if now == before && now.0 {
                return;
            }
            before = now;
        }
    }

    fn moved(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

struct Watched<'a, S> {
    side: S,
    activity: &'a Activity,
    has_all: &'a AtomicBool,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<'_, S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = into.filled().len();
        ready!(Pin::new(&mut this.side).poll_read(cx, into))?;
        match into.filled().len() - before {
            0 => this.activity.half_closed.store(true, Ordering::Relaxed),
            bytes => this.activity.moved(bytes),
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<'_, S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = ready!(Pin::new(&mut this.side).poll_write(cx, bytes))?;
        this.activity.moved(written);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().side).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(Pin::new(&mut this.side).poll_shutdown(cx))?;
        this.has_all.store(true, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::time::Instant;

    use super::*;

    const IDLE: Duration = Duration::from_secs(60);

    /// Forward, and say whether the job and the server have all.
    async fn forwarded(
        job: DuplexStream,
        server: DuplexStream,
        job_has_ended: bool,
    ) -> (io::Result<()>, [bool; 2]) {
        let activity = Activity::default();
        let forwarded = forward(&activity, job, server, IDLE, || job_has_ended).await;
        (forwarded, [activity.job_has_all(), activity.server_has_all()])
    }

    #[tokio::test(start_paused = true)]
    async fn a_half_closed_connection_ends_when_nothing_has_moved_for_a_while_and_not_before() {
        let (mut job, proxy_job) = duplex(64);
        let (mut server, proxy_server) = duplex(64);
        let started_at = Instant::now();
        let forwarding = tokio::spawn(forwarded(proxy_job, proxy_server, false));
        // A connection that is open both ways may be idle for days.
        sleep(100 * IDLE).await;
        assert!(!forwarding.is_finished());
        job.write_all(b"request").await.unwrap();
        job.shutdown().await.unwrap();
        let mut request = String::new();
        server.read_to_string(&mut request).await.unwrap();
        assert_eq!(request, "request");
        // An answer that takes its time is no answer that does not come.
        for _ in 0..10 {
            sleep(IDLE / 2).await;
            server.write_all(b"x").await.unwrap();
            assert_eq!(job.read_u8().await.unwrap(), b'x');
        }
        let last = started_at.elapsed();
        let ended = timeout(10 * IDLE, forwarding).await;
        let (ended, has_all) = ended.expect("it ends").unwrap();
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(has_all, [false, true]);
        let idle = started_at.elapsed() - last;
        assert!((IDLE..=2 * IDLE).contains(&idle), "{idle:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_job_that_has_gone_is_noticed_though_its_server_takes_nothing() {
        let (mut job, proxy_job) = duplex(64);
        let (_server, proxy_server) = duplex(64);
        let started_at = Instant::now();
        let forwarding = tokio::spawn(forwarded(proxy_job, proxy_server, true));
        job.write_all(&[7; 65]).await.unwrap();
        let ended = timeout(10 * IDLE, forwarding).await;
        let (ended, has_all) = ended.expect("it ends").unwrap();
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(has_all, [false, false]);
        assert!(started_at.elapsed() <= 2 * IDLE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_ends_when_both_sides_have() {
        let (mut job, proxy_job) = duplex(64);
        let (mut server, proxy_server) = duplex(64);
        let forwarding = tokio::spawn(forwarded(proxy_job, proxy_server, false));
        job.shutdown().await.unwrap();
        server.write_all(b"answer").await.unwrap();
        server.shutdown().await.unwrap();
        let mut answer = String::new();
        job.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "answer");
        let (ended, has_all) = forwarding.await.unwrap();
        ended.unwrap();
        assert_eq!(has_all, [true, true]);
    }
}
