//! Destinations of a slot, and the HTTP proxy of a job.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};

use super::*;
use crate::buildomat::{self, HttpRequest, HttpResponse, Pending, Transport};

/// A buildomat server that takes lines for jobs' logs, and keeps them.
#[derive(Clone, Debug, Default)]
pub(super) struct RecordingTransport(Arc<Mutex<Vec<String>>>);

impl Transport for RecordingTransport {
    fn call(&self, call: HttpRequest) -> Pending<'_, HttpResponse> {
        let line = call
            .body
            .as_ref()
            .and_then(|body| body["payload"].as_str().map(str::to_owned));
        self.0.lock().unwrap().extend(line);
        Box::pin(async { Ok(HttpResponse::new(200, r#"{"retry":false}"#)) })
    }

    fn file<'a>(
        &'a self,
        _: &'a str,
        _: &'a [(&'a str, String)],
        _: &'a [(&'static str, String)],
    ) -> Pending<'a, reqwest::Response> {
        Box::pin(async { Err(buildomat::Error::Unreachable("no file".into())) })
    }
}

/// What a test asks.
struct Slot {
    test: TestProxy,
    records: Arc<EgressRecords>,
    lines: RecordingTransport,
}

/// A proxy for a worker whose slot has this network; names resolve to 127.0.0.1, as `of` says otherwise.
async fn slot_with(network: &str, of: impl Fn(&str) -> &'static str + Send + Sync + 'static) -> Slot {
    slot_of(network, of, |_| {}).await
}

/// The same, with a proxy that is changed before it opens.
async fn slot_of(
    network: &str,
    of: impl Fn(&str) -> &'static str + Send + Sync + 'static,
    change: impl FnOnce(&mut EgressProxy),
) -> Slot {
    let config = Config::parse(&format!(
        "[general]\nbaseurl = \"http://b\"\n[factory]\ntoken_file = \"/t\"\n[slots.a]\n\
         target = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\nnetwork = {network}\n"
    ));
    let records = Arc::new(EgressRecords::default());
    records.configure(&config.unwrap());
    let lines = RecordingTransport::default();
    let buildomat = BuildomatClient::over(Arc::new(lines.clone()));
    let test = test_proxy_with(0, |proxy| {
        proxy.records = records.clone();
        let pending = proxy.lines.take().expect("it does not serve yet").1;
        proxy.lines = Some((buildomat, pending));
        change(proxy);
        proxy.resolve =
            Arc::new(move |name, port| Ok(vec![SocketAddr::new(of(name).parse().unwrap(), port)]));
    })
    .await;
    Slot { test, records, lines }
}

async fn slot(network: &str) -> Slot {
    slot_with(network, |_| "127.0.0.1").await
}

impl Slot {
    /// A connection that pid 1 has accepted, with this name.
    fn connection(&self, name: &str) -> TcpStream {
        let (job, worker) = tcp();
        let client = self.test.call();
        // The connection may be closed already.
        let _ = client.send(name.as_bytes(), Some(worker.as_fd()));
        job.set_nonblocking(true).unwrap();
        TcpStream::from_std(job).unwrap()
    }

    /// What is answered to these bytes on one connection, until it ends.
    async fn answer(&self, name: &str, bytes: &[u8]) -> String {
        let mut job = self.connection(name);
        let answered = timeout(Duration::from_secs(20), async {
            let mut answer = Vec::new();
            job.write_all(bytes).await.ok();
            // A client of a proxy that ends its side has left.
            if name == TO_HTTP_PROXY {
                job.read_buf(&mut answer).await.ok();
            }
            job.shutdown().await.ok();
            job.read_to_end(&mut answer).await.ok();
            String::from_utf8(answer).unwrap()
        });
        answered.await.expect("it ends")
    }

    /// The status line of the proxy's answer to CONNECT, and its sentence.
    async fn connect(&self, to: &str) -> String {
        let request = format!("CONNECT {to} HTTP/1.1\r\nHost: {to}\r\n\r\n");
        self.answer(TO_HTTP_PROXY, request.as_bytes()).await
    }

    fn used(&self) -> Vec<String> {
        let used = self.records.of_worker(WORKER).unwrap().used;
        used.into_iter().map(|each| each.destination).collect()
    }

    async fn logged_lines(&self, count: usize) -> Vec<String> {
        let waited = timeout(Duration::from_secs(20), async {
            while self.lines.0.lock().unwrap().len() < count {
                sleep(Duration::from_millis(5)).await;
            }
        });
        waited.await.expect("the job's log has the lines");
        self.lines.0.lock().unwrap().clone()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_leads_to_the_destination_that_it_names_if_the_slot_has_it() {
    let port = echo().await;
    let (by_name, by_address) = (format!("a.example:{port}"), format!("127.0.0.1:{port}"));
    let slot = slot(&format!("{{ allow = [{by_name:?}, {by_address:?}] }}")).await;
    assert_eq!(slot.answer(&by_name, b"by name").await, "by name");
    assert_eq!(slot.answer(&by_address, b"by address").await, "by address");
    assert_eq!(slot.used(), [by_address.clone(), by_name]);
    for other in [
        format!("b.example:{port}"),
        format!("127.0.0.2:{port}"),
        "a.example:1".into(),
    ] {
        assert_eq!(slot.answer(&other, b"x").await, "");
        let line = format!("egress refused: {other} is not in the slot's network.allow");
        assert_eq!(slot.logged_lines(1).await.last(), Some(&line));
        slot.lines.0.lock().unwrap().clear();
    }
    // The list of a configuration that was loaded again counts for jobs that run.
    slot.records.configure(&no_slots());
    assert_eq!(slot.answer(&by_address, b"x").await, "");
}

/// A configuration in which slot `a` is no more.
fn no_slots() -> Config {
    let text = "[general]\nbaseurl = \"http://b\"\n[factory]\ntoken_file = \"/t\"\n[slots.b]\n\
                target = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n";
    Config::parse(text).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_http_proxy_tunnels_to_what_the_slot_allows_and_tells_once_what_it_refuses() {
    let port = echo().await;
    let network = format!("{{ allow = [\"*.example:{port}\", \"127.0.0.1:{port}\"] }}");
    let slot = slot(&network).await;
    for allowed in [
        format!("a.b.example:{port}"),
        format!("A.EXAMPLE.:{port}"),
        format!("127.0.0.1:{port}"),
    ] {
        let mut job = slot.connection(TO_HTTP_PROXY);
        let request = format!("CONNECT {allowed} HTTP/1.1\r\nHost: x\r\n\r\nearly");
        job.write_all(request.as_bytes()).await.unwrap();
        let mut answer = vec![0; 512];
        let mut length = 0;
        while !answer[..length].ends_with(b"\r\n\r\nearly") {
            let read = job.read(&mut answer[length..]).await.unwrap();
            assert!(read > 0, "{:?}", String::from_utf8_lossy(&answer[..length]));
            length += read;
        }
        assert!(answer.starts_with(b"HTTP/1.1 200 "), "{allowed}");
        job.write_all(b" and late").await.unwrap();
        job.shutdown().await.unwrap();
        let mut late = String::new();
        job.read_to_string(&mut late).await.unwrap();
        assert_eq!(late, " and late");
    }
    for _ in 0..3 {
        let answer = slot.connect("evil.test:443").await;
        assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
        let sentence = "egress refused: evil.test:443 is not in the slot's network.allow\n";
        assert!(answer.ends_with(sentence), "{answer}");
    }
    let answer = slot.connect("other.test:443").await;
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
    let sentence = |host| format!("egress refused: {host}:443 is not in the slot's network.allow");
    assert_eq!(
        slot.logged_lines(2).await,
        ["evil.test", "other.test"].map(sentence)
    );
    let report = slot.records.of_worker(WORKER).unwrap();
    let refused: Vec<_> = report
        .refused
        .iter()
        .map(|each| (&*each.destination, each.connections))
        .collect();
    assert_eq!(refused, [("evil.test:443", 3), ("other.test:443", 1)]);
    assert_eq!(slot.records.of_slot(&"a".parse().unwrap()), Some(report));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_sends_all_of_a_refused_upload_gets_the_answer_to_it() {
    let slot = slot("{ allow = [\"a.example:80\"] }").await;
    let mut job = slot.connection(TO_HTTP_PROXY);
    // More than the buffers of both sides hold.
    let body = vec![7; 8 << 20];
    let head = format!(
        "POST http://evil.test/ HTTP/1.1\r\nHost: evil.test\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let answered = timeout(Duration::from_secs(20), async {
        job.write_all(head.as_bytes()).await.unwrap();
        job.write_all(&body).await.unwrap();
        let mut answer = String::new();
        job.read_to_string(&mut answer).await.unwrap();
        answer
    });
    let answer = answered.await.expect("it ends");
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
    assert!(
        answer.ends_with("is not in the slot's network.allow\n"),
        "{answer}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_at_an_address_that_is_not_public_leads_nowhere_unless_the_slot_has_the_address() {
    let port = echo().await;
    for (network, is_allowed) in [
        (format!("{{ allow = [\"a.example:{port}\"] }}"), false),
        ("{ audit = true }".into(), false),
        (
            format!("{{ allow = [\"a.example:{port}\", \"127.0.0.1:1\"] }}"),
            false,
        ),
        (
            format!("{{ allow = [\"a.example:{port}\", \"127.0.0.1:{port}\"] }}"),
            true,
        ),
        (
            format!("{{ audit = true, allow = [\"127.0.0.1:{port}\"] }}"),
            true,
        ),
    ] {
        let slot = slot(&network).await;
        let answer = slot.connect(&format!("a.example:{port}")).await;
        assert_eq!(
            answer.starts_with("HTTP/1.1 200 "),
            is_allowed,
            "{network}: {answer}"
        );
        if !is_allowed {
            let sentence = format!("a.example:{port} is at an address that is not public");
            assert!(
                answer.contains(&sentence) && !answer.contains("127.0.0.1"),
                "{answer}"
            );
        }
    }
    // By number, in every way to write one.
    let slot = slot_with("{ audit = true }", |name| match name {
        "0x7f000001" => "127.0.0.1",
        "metadata.example" => "169.254.169.254",
        _ => "fd00:ec2::254",
    })
    .await;
    for host in [
        "127.0.0.1",
        "[::1]",
        "169.254.169.254",
        "0x7f000001",
        "metadata.example",
        "v6.example",
    ] {
        let answer = slot.connect(&format!("{host}:{port}")).await;
        assert!(answer.starts_with("HTTP/1.1 403 "), "{host}: {answer}");
    }
    for host in [
        "2130706433",
        "127.1",
        "localhost",
        "0.0.0.0",
        "[::ffff:127.0.0.1]",
    ] {
        let answer = slot.connect(&format!("{host}:{port}")).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{host}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_address_that_was_looked_at_is_the_one_that_is_connected_to() {
    let port = echo().await;
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    // Only the first answer is an address of the slot's.
    let network = format!("{{ allow = [\"a.example:{port}\", \"127.0.0.1:{port}\"] }}");
    let slot = slot_with(&network, move |_| match count.fetch_add(1, Ordering::Relaxed) {
        0 => "127.0.0.1",
        _ => "127.0.0.2",
    })
    .await;
    for status in ["200", "403"] {
        let answer = slot.connect(&format!("a.example:{port}")).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    }
    assert_eq!(asked.load(Ordering::Relaxed), 2, "a look-up each");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_that_is_refused_is_not_looked_up() {
    let slot = slot_with("{ allow = [\"a.example:443\"] }", |name| {
        panic!("{name} was looked up")
    })
    .await;
    let answer = slot.connect("secret.of.the.job.evil.test:443").await;
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
}

/// A server that answers each request with what it got, and then ends the connection.
async fn reflect() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut got = Vec::new();
                let mut some = [0; 4096];
                // It says no more once its request is over.
                while let Ok(Ok(length @ 1..)) =
                    timeout(Duration::from_millis(300), stream.read(&mut some)).await
                {
                    got.extend_from_slice(&some[..length]);
                }
                let head = format!(
                    "HTTP/1.1 200 OK\r\nConnection: close, x-hop\r\nX-Hop: 1\r\nContent-Length: {}\r\n\r\n",
                    got.len()
                );
                stream.write_all(head.as_bytes()).await.ok();
                stream.write_all(&got).await.ok();
            });
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_for_a_url_reaches_the_server_as_it_was_understood() {
    let port = reflect().await;
    let slot = slot(&format!(
        "{{ allow = [\"a.example:{port}\", \"127.0.0.1:{port}\"] }}"
    ))
    .await;
    let ask = async |head: &str, body: &str| {
        let request = format!("{head} HTTP/1.1\r\n{body}");
        let answer = slot.answer(TO_HTTP_PROXY, request.as_bytes()).await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        (head.to_ascii_lowercase(), body.to_owned())
    };
    let url = format!("http://a.example:{port}/path?query");
    let (head, got) = ask(
        &format!("POST {url}"),
        "Host: evil.test\r\nProxy-Authorization: x\r\nX-OwnCase: 1\r\nContent-Length: 4\r\n\r\nbody",
    )
    .await;
    assert!(
        head.starts_with("http/1.1 200 ") && !head.contains("x-hop"),
        "{head}"
    );
    assert!(
        got.starts_with("POST /path?query HTTP/1.1\r\n") && got.ends_with("\r\n\r\nbody"),
        "{got}"
    );
    assert!(got.contains("X-OwnCase: 1\r\n"), "{got}");
    let got = got.to_ascii_lowercase();
    assert!(got.contains(&format!("host: a.example:{port}\r\n")), "{got}");
    assert!(!got.contains("evil") && !got.contains("proxy"), "{got}");
    // A length of nothing is sent as well: some servers want one.
    let (_, got) = ask(&format!("POST {url}"), "Content-Length: 0\r\n\r\n").await;
    assert!(
        got.to_ascii_lowercase().contains("content-length: 0\r\n"),
        "{got}"
    );

    // Two lengths: a server that believes the other one would see a second request, for another host.
    let smuggled = "0\r\n\r\nGET http://evil.test/ HTTP/1.1\r\nHost: evil.test\r\n\r\n";
    let both = format!(
        "Transfer-Encoding: chunked\r\nContent-Length: {}\r\n\r\n{smuggled}",
        smuggled.len()
    );
    let (head, got) = ask(&format!("POST {url}"), &both).await;
    assert!(head.starts_with("http/1.1 200 "), "{head}");
    assert!(
        got.ends_with("\r\n\r\n0\r\n\r\n") && !got.contains("evil"),
        "{got}"
    );
    for odd in [
        "Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
        "Content-Length: +1\r\n\r\nx",
        "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        "X: 1\r\n GET http://evil.test/ HTTP/1.1\r\n\r\n",
    ] {
        let (head, _) = ask(&format!("POST {url}"), odd).await;
        assert!(head.starts_with("http/1.1 400 "), "{odd:?}: {head}");
    }
    for (request, part) in [
        ("GET http://evil.test/", "not in the slot's network.allow"),
        ("GET http://user@a.example/", "no user"),
        ("GET /", "a whole URL"),
        ("GET https://a.example/", "takes CONNECT"),
    ] {
        let (_, body) = ask(request, "Host: x\r\n\r\n").await;
        assert!(body.contains(part), "{request}: {body}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_job_that_reads_nothing_and_one_that_sends_half_a_head_hold_up_no_other() {
    let port = echo().await;
    let slot = slot(&format!("{{ allow = [\"127.0.0.1:{port}\"] }}")).await;
    let to = format!("127.0.0.1:{port}");
    let mut slow = Vec::new();
    for n in 0..DESTINATIONS_OF_A_WORKER - 2 {
        let mut job = slot.connection(if n % 2 == 0 { &to } else { TO_HTTP_PROXY });
        match n % 2 {
            // It sends until nothing more fits, and takes nothing.
            0 => {
                while let Ok(Ok(())) = timeout(Duration::from_millis(20), job.write_all(&[7; 1 << 16])).await
                {
                }
            }
            _ => job.write_all(b"CONNECT a.exam").await.unwrap(),
        }
        slow.push(job);
    }
    assert_eq!(slot.answer(&to, b"quick").await, "quick");
    let answer = slot.connect(&to).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    drop(slow);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_with_all_its_connections_leaves_its_agent_some_to_the_server() {
    let port = echo().await;
    let to = format!("127.0.0.1:{port}");
    let network = format!("{{ allow = [{to:?}] }}");
    // Long enough for all these connections on a busy machine.
    let limit = 2 * SHORT;
    let slot = slot_of(&network, |_| "127.0.0.1", |proxy| proxy.peer_timeout = limit).await;
    let mut kept = Vec::new();
    for _ in 0..DESTINATIONS_OF_A_WORKER {
        let mut job = slot.connection(&to);
        job.write_all(b"x").await.unwrap();
        assert_eq!(job.read_u8().await.unwrap(), b'x');
        kept.push(job);
    }
    // These wait, and some more than wait are closed.
    let waiting: Vec<_> = (0..CONNECTIONS_OF_A_WORKER)
        .map(|n| slot.connection(if n % 2 == 0 { TO_HTTP_PROXY } else { &to }))
        .collect();
    // Those that are closed count until they are, and those that wait for longer than this.
    let served = timeout(limit / 5 * 4, async {
        while slot.answer(TO_SERVER, b"agent").await != "agent" {}
    });
    served.await.expect("the agent has its connection");
    drop(waiting);
    assert_eq!(slot.answer(&to, b"one too many").await, "");
    slot.test.works().await;
    kept.pop();
    // The egress proxy sees its end a little later.
    let waited = timeout(Duration::from_secs(20), async {
        while slot.answer(&to, b"x").await != "x" {}
    });
    waited.await.expect("it has its connection back");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_connection_more_than_a_job_may_have_waits_for_the_end_of_another() {
    let port = echo().await;
    let (to, network) = (
        format!("127.0.0.1:{port}"),
        format!("{{ allow = [\"127.0.0.1:{port}\"] }}"),
    );
    let only_one = |proxy: &mut EgressProxy| {
        proxy.destinations = ConnectionLimiter::new(1, 1, 1);
        proxy.peer_timeout = SHORT;
    };
    let slot = slot_of(&network, |_| "127.0.0.1", only_one).await;
    let mut first = slot.connection(&to);
    first.write_all(b"x").await.unwrap();
    assert_eq!(first.read_u8().await.unwrap(), b'x');
    let mut second = slot.connection(TO_HTTP_PROXY);
    let request = format!("CONNECT {to} HTTP/1.1\r\n\r\n");
    second.write_all(request.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    let early = timeout(Duration::from_millis(300), second.peek(&mut answer)).await;
    assert!(early.is_err(), "{early:?}");
    drop(first);
    let answered = timeout(Duration::from_secs(20), second.read_exact(&mut answer)).await;
    answered.expect("it has its turn").unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
    // One that waits for too long is told why.
    let refused = slot.connect(&to).await;
    assert!(
        refused.starts_with("HTTP/1.1 503 ") && refused.contains("too many"),
        "{refused}"
    );
}

/// A server that waits for a byte, sends a part of an answer, and breaks off when it is told to.
fn breaking(go_on: Receiver<()>) -> u16 {
    let listener = StdListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let _ = stream.read(&mut [0]);
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\na part");
            let _ = go_on.recv();
            SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_its_server_breaks_off_does_not_end_in_good_order_for_a_job() {
    let (break_off, go_on) = channel();
    let port = breaking(go_on);
    let to = format!("127.0.0.1:{port}");
    let slot = slot(&format!("{{ allow = [{to:?}] }}")).await;
    for (name, request) in [
        (&*to, "x".to_owned()),
        (TO_HTTP_PROXY, format!("CONNECT {to} HTTP/1.1\r\n\r\nx")),
        (TO_HTTP_PROXY, format!("GET http://{to}/ HTTP/1.0\r\n\r\n")),
    ] {
        let mut job = slot.connection(name);
        job.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let error = timeout(Duration::from_secs(20), async {
            while !answer.ends_with(b"a part") {
                assert_ne!(job.read_buf(&mut answer).await.unwrap(), 0, "{request}");
            }
            break_off.send(()).unwrap();
            job.read_u8().await.unwrap_err()
        });
        let error = error.await.expect("it ends");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{request}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_workers_connections_end_with_it_whatever_their_servers_do() {
    let may_read = Arc::new(AtomicBool::new(false));
    let (port, ended) = server_that_reads_nothing(false, may_read.clone());
    let to = format!("127.0.0.1:{port}");
    let is_gone = Arc::new(AtomicBool::new(false));
    let gone = is_gone.clone();
    let slot = slot_of(
        &format!("{{ allow = [{to:?}] }}"),
        |_| "127.0.0.1",
        |proxy| {
            proxy.upstream = Upstream::new("127.0.0.1".into(), port);
            proxy.worker_of =
                Box::new(move |_| Ok((!gone.load(Ordering::Relaxed)).then(|| (WORKER, "a".parse().ok()))));
        },
    )
    .await;
    let mut jobs = Vec::new();
    for (name, request) in [
        (TO_SERVER, String::new()),
        (&*to, String::new()),
        (TO_HTTP_PROXY, format!("CONNECT {to} HTTP/1.1\r\n\r\n")),
        (
            TO_HTTP_PROXY,
            format!("POST http://{to}/ HTTP/1.1\r\nContent-Length: {MUCH}\r\n\r\n"),
        ),
    ] {
        let mut job = slot.connection(name);
        job.write_all(request.as_bytes()).await.unwrap();
        // More than all buffers on the way hold.
        let some = vec![7; 1 << 20];
        while let Ok(Ok(())) = timeout(Duration::from_millis(200), job.write_all(&some)).await {}
        jobs.push(job);
    }
    is_gone.store(true, Ordering::Relaxed);
    for mut job in jobs {
        let read = async { while let Ok(1..) = job.read(&mut [0; 4096]).await {} };
        let over = timeout(Duration::from_secs(20), read).await;
        over.expect("it ends with its worker");
    }
    may_read.store(true, Ordering::Relaxed);
    for _ in 0..4 {
        let over = tokio::task::block_in_place(|| ended.recv_timeout(Duration::from_secs(20)));
        over.expect("the connection to the server ends");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_that_take_long_to_look_up_keep_no_agent_from_the_server() {
    let (go_on, held) = channel::<()>();
    let held = Mutex::new(held);
    let slot = slot_with("{ audit = true }", move |_| {
        // Until the test lets go.
        let _ = held.lock().unwrap().recv();
        "127.0.0.1"
    })
    .await;
    let mut waiting = Vec::new();
    for n in 0..DESTINATIONS_OF_A_WORKER {
        let mut job = slot.connection(TO_HTTP_PROXY);
        let request = format!("CONNECT n{n}.example:443 HTTP/1.1\r\n\r\n");
        job.write_all(request.as_bytes()).await.unwrap();
        waiting.push(job);
    }
    slot.test.works().await;
    drop((go_on, waiting));
}

/// A server that answers at once if it is told to, and reads nothing until it may. It tells when a connection has ended.
fn server_that_reads_nothing(answers: bool, may_read: Arc<AtomicBool>) -> (u16, Receiver<()>) {
    let listener = StdListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (tell, ended) = channel();
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let (tell, may_read) = (tell.clone(), may_read.clone());
            std::thread::spawn(move || {
                if answers {
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
                }
                while !may_read.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(10));
                }
                let _ = io::copy(&mut stream, &mut io::sink());
                let _ = tell.send(());
            });
        }
    });
    (port, ended)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_ends_with_its_job_whatever_its_server_does() {
    for answers in [false, true] {
        let may_read = Arc::new(AtomicBool::new(false));
        let (port, ended) = server_that_reads_nothing(answers, may_read.clone());
        let network = format!("{{ allow = [\"127.0.0.1:{port}\"] }}");
        let slot = slot_of(
            &network,
            |_| "127.0.0.1",
            |proxy| {
                proxy.half_closed = Duration::from_millis(100);
                proxy.destinations = ConnectionLimiter::new(1, 1, 1);
            },
        )
        .await;
        // More than all buffers on the way hold.
        let begin = format!("POST http://127.0.0.1:{port}/ HTTP/1.1\r\nContent-Length: {MUCH}\r\n\r\n");
        let used = || {
            slot.records
                .of_worker(WORKER)
                .map_or(0, |report| report.used[0].connections)
        };
        for count in 1..=3 {
            // There is one connection at a time, so that each waits for the end of the last.
            let waited = timeout(Duration::from_secs(20), async {
                while used() < count {
                    let mut job = slot.connection(TO_HTTP_PROXY);
                    job.write_all(begin.as_bytes()).await.ok();
                    let some = vec![7; 1 << 20];
                    while let Ok(Ok(())) = timeout(Duration::from_millis(200), job.write_all(&some)).await {}
                    // It breaks off. A FIN would wait behind what does not fit, and the end for probes.
                    SockRef::from(&job).set_linger(Some(Duration::ZERO)).unwrap();
                }
            });
            waited.await.expect("the last connection is given back");
        }
        may_read.store(true, Ordering::Relaxed);
        for _ in 0..3 {
            let over = tokio::task::block_in_place(|| ended.recv_timeout(Duration::from_secs(20)));
            over.expect("the connection to the server ends");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn before_a_companys_proxy_an_address_must_be_public_or_listed_as_well() {
    let nobody = StdListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let slot = slot_of(
        "{ audit = true, allow = [\"10.0.0.1:80\"] }",
        |name| panic!("{name} was looked up"),
        |proxy| {
            proxy.has_http_proxy = true;
            let upstream = Upstream::new("127.0.0.1".into(), 1);
            proxy.upstream = upstream.through("127.0.0.1".into(), nobody);
        },
    )
    .await;
    for (to, status) in [
        ("169.254.169.254:80", "403"),
        ("10.0.0.2:80", "403"),
        ("10.0.0.1:80", "502"),
        ("a.example:80", "502"),
    ] {
        let answer = slot.connect(to).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{to}: {answer}"
        );
    }
}
