//! What a hostile client could do at the egress proxy: none of it reaches the server, or holds up the others.

use std::os::fd::AsRawFd;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use protocol::config::MAX_CONNECTION_NAME;

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_of_a_uid_that_is_no_workers_is_closed() {
    let test = test_proxy(1).await;
    let (job, worker) = tcp();
    let client = test.bring(worker.as_fd());
    drop(worker);
    assert!(is_closed(&client) && is_closed_without_data(&job));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_that_sends_anything_but_a_name_and_one_connection_is_refused() {
    let test = test_proxy(0).await;
    let (_job, worker) = tcp();
    let listening = StdListener::bind("127.0.0.1:0").unwrap();
    let unconnected = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    udp.connect(listening.local_addr().unwrap()).unwrap();
    let (unix, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let (pipe, _other) = io::pipe().unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    for fd in [
        listening.as_fd(),
        unconnected.as_fd(),
        udp.as_fd(),
        unix.as_fd(),
        pipe.as_fd(),
        file.as_fd(),
    ] {
        assert!(is_closed(&test.bring(fd)));
    }

    let client = test.call();
    client.send(TO_SERVER.as_bytes(), None).unwrap();
    assert!(is_closed(&client), "no descriptor");
    for name in [
        "",
        "x",
        "x:1:2",
        "b.example:443",
        &"x".repeat(MAX_CONNECTION_NAME + 1),
    ] {
        let (job, worker) = tcp();
        let client = test.call();
        client.send(name.as_bytes(), Some(worker.as_fd())).unwrap();
        drop(worker);
        assert!(is_closed(&client) && is_closed_without_data(&job), "{name:.100}");
    }
    for count in [2, 3, 200] {
        let client = test.call();
        let raw = vec![worker.as_raw_fd(); count];
        sendmsg::<()>(
            client.as_raw_fd(),
            &[io::IoSlice::new(TO_SERVER.as_bytes())],
            &[ControlMessage::ScmRights(&raw)],
            MsgFlags::empty(),
            None,
        )
        .unwrap();
        assert!(is_closed(&client), "{count} descriptors");
    }
    test.works().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_callers_delay_no_other_and_time_out() {
    let test = test_proxy_with(0, |proxy| proxy.peer_timeout = SHORT).await;
    let silent: Vec<Seqpacket> = (0..CONNECTIONS_OF_A_WORKER - 1).map(|_| test.call()).collect();
    test.works().await;
    assert!(silent.iter().all(is_closed));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_has_so_many_connections_and_gets_them_back() {
    let test = test_proxy(0).await;
    let mut kept = Vec::new();
    for _ in 0..CONNECTIONS_OF_A_WORKER {
        let mut job = test.connection().await;
        job.write_all(b"x").await.unwrap();
        assert_eq!(job.read_u8().await.unwrap(), b'x');
        kept.push(job);
    }
    let (job, worker) = tcp();
    let client = test.bring(worker.as_fd());
    drop(worker);
    assert!(is_closed(&client) && is_closed_without_data(&job));
    drop(kept);
    // The egress proxy sees their ends a little later.
    let end = std::time::Instant::now() + Duration::from_secs(20);
    loop {
        let (job, worker) = tcp();
        drop(test.bring(worker.as_fd()));
        drop(worker);
        (&job).write_all(b"x").unwrap();
        if matches!((&job).read(&mut [0]), Ok(1)) {
            break;
        }
        assert!(
            std::time::Instant::now() < end,
            "the connections have not come back"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_socket_that_its_sender_keeps_and_makes_blocking_blocks_nothing() {
    let test = test_proxy(0).await;
    let (job, worker) = tcp();
    drop(test.bring(worker.as_fd()));
    (&job).write_all(b"x").unwrap();
    (&job).read_exact(&mut [0]).unwrap();
    // The egress proxy is past its checks. All that comes back from now on is not read.
    fcntl(worker.as_fd(), FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    job.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let some = vec![7; 1 << 20];
    while (&job).write_all(&some).is_ok() {}
    assert!(
        !fcntl(worker.as_fd(), FcntlArg::F_GETFL)
            .is_ok_and(|flags| OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK))
    );
    test.works().await;
}

/// A TCP connection of which closing the second end takes a thousand seconds, or until the first is closed.
fn slow_to_close() -> (StdStream, StdStream) {
    let (job, worker) = tcp();
    let worker_is = SockRef::from(&worker);
    worker_is.set_linger(Some(Duration::from_secs(1000))).unwrap();
    worker.set_nonblocking(true).unwrap();
    while (&worker).write(&[7; 4096]).is_ok() {}
    (job, worker)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_socket_that_takes_long_to_close_holds_up_nothing() {
    let test = test_proxy(0).await;
    let mut jobs = Vec::new();
    // One that is taken and closed at its end, one that is refused, and one that is not even received.
    for (name, count) in [(TO_SERVER, 1), ("x", 1), (TO_SERVER, 3)] {
        let client = test.call();
        for _ in 0..count {
            let (job, worker) = slow_to_close();
            let _ = client.send(name.as_bytes(), Some(worker.as_fd()));
            // The last one to close it has to wait: that must not be this test.
            std::thread::spawn(move || drop(worker));
            job.shutdown(std::net::Shutdown::Write).unwrap();
            jobs.push(job);
        }
    }
    test.works().await;
    test.works().await;
}

/// More than any pool of threads in here could wait for.
const MANY: usize = 600;

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn many_untrusted_clients_with_sockets_that_take_long_to_close_hold_up_no_worker() {
    // Whether a client is a worker is asked once for each: the untrusted ones come first.
    let asked = std::sync::atomic::AtomicUsize::new(0);
    let test = test_proxy_with(0, |proxy| {
        let order = std::sync::atomic::Ordering::Relaxed;
        proxy.worker_of =
            Box::new(move |_| Ok((asked.fetch_add(1, order) >= MANY).then(|| (WORKER, "a".parse().ok()))));
    })
    .await;
    // Nobody is accepted before all have sent what they have: the one thread that does is held.
    let (go_on, held) = std::sync::mpsc::channel::<()>();
    let (tell, is_held) = std::sync::mpsc::channel();
    tokio::spawn(async move {
        tell.send(()).unwrap();
        let _ = held.recv();
    });
    is_held.recv().unwrap();
    let mut untrusted = Vec::new();
    for _ in 0..MANY {
        let client = test.call();
        let (job, worker) = slow_to_close();
        client.send(TO_SERVER.as_bytes(), Some(worker.as_fd())).unwrap();
        // The packet has it still, and closing that one has to wait.
        drop(worker);
        untrusted.push((job, client));
    }
    drop(go_on);
    test.works().await;
    assert!(untrusted.iter().all(|(_, client)| is_closed(client)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_connection_that_one_side_has_ended_and_the_other_does_not_gives_its_place_back() {
    let test = test_proxy_with(0, |proxy| {
        proxy.half_closed = Duration::from_millis(200);
        // One that never answers and never ends.
        proxy.upstream = Upstream::new("127.0.0.1".into(), silent());
        proxy.limiter = ConnectionLimiter::new(2, 2, 1);
    })
    .await;
    for _ in 0..5 {
        let (job, worker) = tcp();
        let client = test.bring(worker.as_fd());
        drop(worker);
        assert!(is_closed(&client));
        job.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(is_closed_without_data(&job));
    }
}

/// A server that takes connections and does nothing with them, as long as the test's process is there.
fn silent() -> u16 {
    let listener = StdListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        while let Ok((stream, _)) = listener.accept() {
            kept.push(stream);
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_tls_connection_reaches_the_server_that_it_names_or_nobody() {
    use super::super::client_hello::tests::client_hello;
    let tls = |name: Option<&str>| {
        let name = name.map(str::to_owned);
        test_proxy_with(0, |proxy| proxy.tls_name = Some(name))
    };
    let test = tls(Some("build.example")).await;
    let hello = client_hello("build.EXAMPLE");
    let mut job = test.connection().await;
    // In two parts, of which the first says nothing yet.
    job.write_all(&hello[..3]).await.unwrap();
    sleep(Duration::from_millis(50)).await;
    job.write_all(&[&hello[3..], b"and more"].concat()).await.unwrap();
    job.shutdown().await.unwrap();
    assert_eq!(answer(job).await, [&hello[..], b"and more"].concat());
    for first in [client_hello("other.example"), b"GET / HTTP/1.1\r\n\r\n".to_vec()] {
        let mut job = test.connection().await;
        job.write_all(&first).await.unwrap();
        assert_eq!(answer(job).await, b"");
    }
    // A client of a server without a name names none.
    let test = tls(None).await;
    let mut job = test.connection().await;
    job.write_all(&client_hello("build.example")).await.unwrap();
    assert_eq!(answer(job).await, b"");
}

/// All that comes back: from the server what was sent, and otherwise nothing.
async fn answer(mut job: TcpStream) -> Vec<u8> {
    let mut answer = Vec::new();
    let all = timeout(Duration::from_secs(20), job.read_to_end(&mut answer)).await;
    let _ = all.expect("the connection ends");
    answer
}
