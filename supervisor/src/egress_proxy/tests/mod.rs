//! A real proxy, between real sockets.

mod destinations;
mod hostile;

use super::*;

use std::io::{Read, Write};
use std::net::{TcpListener as StdListener, TcpStream as StdStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;

use protocol::{Received, Seqpacket};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

const WORKER: WorkerId = WorkerId::from_bits(7);

/// A time-out that a test can wait for.
const SHORT: Duration = Duration::from_secs(2);

/// More than all buffers on the way can hold.
const MUCH: usize = 64 << 20;

struct TestProxy {
    directory: tempfile::TempDir,
    port: u16,
    proxy: JoinHandle<()>,
}

/// A proxy for this uid, before a server that sends everything back.
async fn test_proxy(uid: u32) -> TestProxy {
    test_proxy_with(uid, |_| {}).await
}

/// The same, with a proxy that is changed before it opens.
async fn test_proxy_with(uid: u32, change: impl FnOnce(&mut EgressProxy)) -> TestProxy {
    let directory = tempfile::tempdir().unwrap();
    let port = echo().await;
    let mut proxy = proxy(directory.path(), port, uid);
    change(&mut proxy);
    let test = TestProxy {
        directory,
        port,
        proxy: tokio::spawn(proxy.serve()),
    };
    test.opened().await;
    test
}

fn open(directory: &Path, port: u16, uid: u32) -> JoinHandle<()> {
    tokio::spawn(proxy(directory, port, uid).serve())
}

/// Before a server at this port, for the worker [`WORKER`] with this uid. What is sent to the buildomat
/// server is discarded.
fn proxy(directory: &Path, port: u16, uid: u32) -> EgressProxy {
    let worker_of = Box::new(move |client| Ok((client == uid).then(|| (WORKER, "a".parse().ok()))));
    let reports = Reports {
        records: Arc::default(),
        metrics: Arc::default(),
        buildomat: BuildomatClient::over(Arc::new(destinations::RecordingTransport::default())),
    };
    EgressProxy::new(directory.into(), "127.0.0.1".into(), port, worker_of, &reports).unwrap()
}

async fn echo() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut from, mut to) = stream.split();
                tokio::io::copy(&mut from, &mut to).await.ok();
                to.shutdown().await.ok();
            });
        }
    });
    port
}

impl TestProxy {
    fn socket(&self) -> PathBuf {
        self.directory.path().join(PROXY_SOCKET)
    }

    async fn opened(&self) {
        while !self.socket().exists() {
            sleep(Duration::from_millis(10)).await;
        }
    }

    fn call(&self) -> Seqpacket {
        let client = Seqpacket::connect(&self.socket(), false).unwrap();
        let limit = Some(Duration::from_secs(20));
        SockRef::from(&client).set_read_timeout(limit).unwrap();
        client
    }

    fn bring(&self, fd: BorrowedFd<'_>) -> Seqpacket {
        let client = self.call();
        // The connection may be closed already.
        let _ = client.send(TO_SERVER.as_bytes(), Some(fd));
        client
    }

    /// A connection of a job that is through the egress proxy.
    async fn connection(&self) -> TcpStream {
        let (job, worker) = tcp();
        drop(self.bring(worker.as_fd()));
        drop(worker);
        job.set_nonblocking(true).unwrap();
        TcpStream::from_std(job).unwrap()
    }

    async fn works(&self) {
        let mut job = self.connection().await;
        let answer = timeout(Duration::from_secs(20), async {
            job.write_all(b"to the server").await.unwrap();
            job.shutdown().await.unwrap();
            let mut answer = String::new();
            job.read_to_string(&mut answer).await.unwrap();
            answer
        });
        assert_eq!(answer.await.expect("the egress proxy answers"), "to the server");
    }
}

/// The job's end of a connection, and the one that the worker's first process has accepted.
fn tcp() -> (StdStream, StdStream) {
    let listener = StdListener::bind("127.0.0.1:0").unwrap();
    let job = StdStream::connect(listener.local_addr().unwrap()).unwrap();
    job.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    (job, listener.accept().unwrap().0)
}

fn is_closed(client: &Seqpacket) -> bool {
    matches!(
        client.recv(1),
        Ok(Received::Closed) | Err(nix::errno::Errno::ECONNRESET)
    )
}

/// Has the other end been closed without a byte?
fn is_closed_without_data(mut job: &StdStream) -> bool {
    let mut answer = Vec::new();
    match job.read_to_end(&mut answer) {
        Ok(length) => length == 0,
        Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
    }
}

#[tokio::test]
async fn a_caller_has_ten_seconds() {
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(
        proxy(directory.path(), 1, 0).peer_timeout,
        Duration::from_secs(10)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_go_both_ways_and_each_end_sees_the_other_close() {
    let test = test_proxy(0).await;
    test.works().await;
    // At the same time, and more than fits into the buffers.
    let (mut from, mut to) = test.connection().await.into_split();
    let sent = tokio::spawn(async move {
        let some = vec![7; 1 << 20];
        for _ in 0..MUCH >> 20 {
            to.write_all(&some).await.unwrap();
        }
        to.shutdown().await.unwrap();
    });
    test.works().await;
    let (mut length, mut some) = (0, vec![0; 1 << 16]);
    loop {
        match from.read(&mut some).await.unwrap() {
            0 => break,
            n => length += n,
        }
    }
    sent.await.unwrap();
    assert_eq!(length, MUCH);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_cannot_be_reached_is_a_connection_that_ends() {
    let test = test_proxy(0).await;
    let nobody = StdListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    test.proxy.abort();
    let other = tempfile::tempdir().unwrap();
    let test = TestProxy {
        proxy: open(other.path(), nobody.port(), 0),
        directory: other,
        port: test.port,
    };
    test.opened().await;
    let (job, worker) = tcp();
    drop(test.bring(worker.as_fd()));
    drop(worker);
    assert!(is_closed_without_data(&job));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_socket_is_made_when_its_directory_appears_and_again_when_it_was_removed() {
    let above = tempfile::tempdir().unwrap();
    let port = echo().await;
    let directory = above.path().join("proxy");
    let proxy = open(&directory, port, 0);
    for _ in 0..2 {
        std::fs::create_dir(&directory).unwrap();
        while !directory.join(PROXY_SOCKET).exists() {
            sleep(Duration::from_millis(10)).await;
        }
        let mode = std::fs::metadata(directory.join(PROXY_SOCKET))
            .unwrap()
            .permissions();
        assert_eq!(mode.mode() & 0o777, 0o666);
        // At once: the supervisor may make its socket again meanwhile.
        let removed = above.path().join("removed");
        std::fs::rename(&directory, &removed).unwrap();
        std::fs::remove_dir_all(removed).unwrap();
    }
    proxy.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_socket_replaces_the_old_one_without_a_gap() {
    let mut test = test_proxy(0).await;
    // What a supervisor leaves that was ended in the middle.
    std::fs::write(test.directory.path().join("new.sock"), "").unwrap();
    let path = test.socket();
    let over = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let until = over.clone();
    let watch = std::thread::spawn(move || {
        while !until.load(std::sync::atomic::Ordering::Relaxed) {
            let client = Seqpacket::connect(&path, false).expect("there is always somebody");
            // Each until it is closed: many at a time would take all of this uid's connections.
            let _ = client.send(TO_SERVER.as_bytes(), None);
            assert!(is_closed(&client));
        }
    });
    for _ in 0..2 {
        let port = echo().await;
        let inode = || std::fs::metadata(test.socket()).unwrap().ino();
        let older = inode();
        let newer = open(test.directory.path(), port, 0);
        while inode() == older {
            sleep(Duration::from_millis(1)).await;
        }
        std::mem::replace(&mut test.proxy, newer).abort();
        (test.port, _) = (port, test.works().await);
    }
    over.store(true, std::sync::atomic::Ordering::Relaxed);
    tokio::task::block_in_place(|| watch.join().unwrap());
}
