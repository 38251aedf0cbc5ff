//! Group K: requests that two readers could understand in two ways, and very many or very slow connections to the
//! destinations of a slot.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::thread;

use testbed::fake_server::{State, Ulid};
use testbed::harness::TEST_TIMEOUT;
use testbed::test_factory::{TestFactory, lines};
use tokio::time::timeout;

use super::network_list::{FUNCTIONS, Server, factory, run, slot};

#[tokio::test(flavor = "multi_thread")]
async fn row_121_no_request_reaches_a_server_inside_of_another() {
    let server = Server::at(Ipv4Addr::LOCALHOST, 0);
    let port = server.port();
    let list = format!("{{ allow = [\"web.test:{port}\", \"127.0.0.1:{port}\"] }}");
    let factory = factory(&slot("a", &list), "127.0.0.1 web.test evil.test\n").await;
    let smuggled = format!(
        "GET http://evil.test:{port}/ HTTP/1.1\\r\\nHost: evil.test\\r\\nConnection: close\\r\\n\\r\\n"
    );
    // Its length as bash's printf makes it.
    let length = smuggled.replace("\\r\\n", "..").len();
    let post = format!("POST http://web.test:{port}/own HTTP/1.1\\r\\nHost: web.test\\r\\n");
    let close = "Connection: close\\r\\n";
    // What is sent, and the statuses of what comes back.
    let requests = [
        (format!("{post}{close}Content-Length: 2\\r\\n\\r\\nxx"), "200"),
        // Two requests, of which the second is for another.
        (format!("{post}Content-Length: 2\\r\\n\\r\\nxx{smuggled}"), "200"),
        // Two lengths: the second request is in the body, or after it.
        (
            format!(
                "{post}Content-Length: {}\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n0\\r\\n\\r\\n{smuggled}",
                length + 5
            ),
            "200",
        ),
        (
            format!(
                "{post}Transfer-Encoding: chunked\\r\\nContent-Length: {}\\r\\n\\r\\n0\\r\\n\\r\\n{smuggled}",
                length + 5
            ),
            "200",
        ),
        (
            format!("{post}Content-Length: 0\\r\\nContent-Length: {length}\\r\\n\\r\\n{smuggled}"),
            "400",
        ),
        (
            format!("{post}Content-Length: 0, {length}\\r\\n\\r\\n{smuggled}"),
            "400",
        ),
        (format!("{post}Content-Length: +0\\r\\n\\r\\n{smuggled}"), "400"),
        (format!("{post}Content-Length: 0x0\\r\\n\\r\\n{smuggled}"), "400"),
        (
            format!("{post}Content-Length : {length}\\r\\n\\r\\n{smuggled}"),
            "400",
        ),
        (
            format!("{post}Transfer-Encoding : chunked\\r\\n\\r\\n0\\r\\n\\r\\n{smuggled}"),
            "400",
        ),
        (
            format!("{post}Transfer-Encoding: xchunked\\r\\n\\r\\n0\\r\\n\\r\\n{smuggled}"),
            "400",
        ),
        (
            format!("{post}Transfer-Encoding: chunked, identity\\r\\n\\r\\n0\\r\\n\\r\\n{smuggled}"),
            "400",
        ),
        // A line that is folded, ends in half, or has a byte that ends it for some.
        (format!("{post}X: 1\\r\\n {smuggled}"), "400"),
        (format!("{post}X: 1\\r{smuggled}"), "400"),
        (format!("{post}X: 1\\x00\\r\\n\\r\\n{smuggled}"), "400"),
        (
            format!("{post}{close}X: 1\\nHost: evil.test\\nContent-Length: 2\\n\\nxx"),
            "200",
        ),
        (format!("POST http://web.test:{port}/own {smuggled}"), "400"),
        (format!("POST http://web.test:{port}/own\\r\\n{smuggled}"), "400"),
        // Another host in the head than in the URL, and heads that ask to be taken away.
        (
            format!(
                "POST http://web.test:{port}/own HTTP/1.1\\r\\nHost: evil.test\\r\\nHost: evil.test:80\\r\\n\
                 {close}Content-Length: 2\\r\\n\\r\\nxx"
            ),
            "200",
        ),
        (
            format!(
                "{post}Connection: close, host, content-length\\r\\nConnection: transfer-encoding\\r\\n\
                 Content-Length: 2\\r\\n\\r\\nxx"
            ),
            "200",
        ),
        (
            format!(
                "{post}Connection: close, host, transfer-encoding\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n\
                 2\\r\\nxx\\r\\n0\\r\\nHost: evil.test\\r\\n\\r\\n"
            ),
            "200",
        ),
        (
            format!(
                "{post}{close}Upgrade: h2c\\r\\nHTTP2-Settings: AAA\\r\\nContent-Length: 2\\r\\n\\r\\nxx"
            ),
            "200",
        ),
        // Names that a server of the proxy's own could take for two.
        (
            format!("CONNECT web.test:{port}\\r\\nHost: evil.test HTTP/1.1\\r\\n\\r\\n"),
            "400",
        ),
        (
            format!("CONNECT web.test:{port}\\x00.evil.test:{port} HTTP/1.1\\r\\n\\r\\n"),
            "400",
        ),
        (
            format!("CONNECT evil.test:{port}#web.test:{port} HTTP/1.1\\r\\n{close}\\r\\n"),
            "400",
        ),
        (
            format!("GET http://evil.test:{port}\\\\@web.test:{port}/ HTTP/1.1\\r\\n{close}\\r\\n"),
            "400",
        ),
    ];
    let script: String = requests
        .iter()
        .map(|(bytes, _)| format!("statuses '{bytes}'\n"))
        .collect();
    let printed = run(&factory, &script).await;
    assert_eq!(printed.len(), requests.len(), "{printed:?}");
    let others = requests
        .iter()
        .zip(&printed)
        .filter(|((_, expected), statuses)| statuses.trim() != *expected);
    let others: Vec<_> = others.collect();
    assert!(others.is_empty(), "{others:#?}");
    let taken = requests
        .iter()
        .filter(|(_, expected)| expected.starts_with("200"));
    let got = server.got();
    assert_eq!(got.len(), taken.count(), "{got:#?}");
    for bytes in &got {
        let bytes = bytes.to_ascii_lowercase();
        let count = |part: &str| bytes.matches(part).count();
        assert!(bytes.starts_with("post /own http/1.1\r\n"), "{bytes}");
        assert_eq!(count(" http/1.1\r\n"), 1, "{bytes}");
        assert_eq!(count(&format!("\r\nhost: web.test:{port}\r\n")), 1, "{bytes}");
        assert_eq!(count("\r\nhost:"), 1, "{bytes}");
        assert!(
            count("\r\ncontent-length:") + count("\r\ntransfer-encoding:") <= 1,
            "{bytes}"
        );
        assert!(!bytes.contains("evil") && !bytes.contains("upgrade"), "{bytes}");
    }
    factory.finish().await;
}

/// A line of the supervisor's `/proc/PID/status`, in KiB (`proc_pid_status(5)`).
fn memory(factory: &TestFactory, line: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", factory.supervisor.pid())).unwrap();
    let found = status.lines().find_map(|each| each.strip_prefix(line));
    let number = found.and_then(|rest| rest.split_whitespace().next());
    number.expect("the kernel counts it").parse().unwrap()
}

fn descriptors(factory: &TestFactory) -> usize {
    fs::read_dir(format!("/proc/{}/fd", factory.supervisor.pid()))
        .unwrap()
        .count()
}

/// The supervisor may have so much more memory for one job, in KiB: four times two buffers of 64 KiB for each of 48 connections,
/// and some for those of HTTP.
const MEMORY: u64 = 32 << 10;

/// Two slots with the same list.
async fn two_slots(port: u16) -> TestFactory {
    let list = format!("{{ allow = [\"web.test:{port}\", \"127.0.0.1:{port}\"] }}");
    let slots = format!("{}{}", slot("a", &list), slot("b", &list));
    let factory = factory(&slots, "127.0.0.1 web.test\n").await;
    // What the supervisor takes for any job is there by now.
    a_job_works(&factory, port, "alone").await;
    factory
}

/// A job starts, asks its destination in both ways and ends, in no more time than that should take.
async fn a_job_works(factory: &TestFactory, port: u16, how: &str) {
    let script = format!("connect web.test:{port}; url http://web.test:{port}/small; get web.test {port}");
    let printed = timeout(TEST_TIMEOUT / 5, run(factory, &script)).await;
    let printed = printed.unwrap_or_else(|_| panic!("a job is held up {how}"));
    assert_eq!(printed[..2], ["200", "200"], "{how}: {printed:?}");
    assert!(printed[2].starts_with("from"), "{how}: {printed:?}");
}

/// Submit a job that is to stay until it is released, and wait until it says `ready`.
async fn staying(factory: &TestFactory, script: &str) -> Ulid {
    let job = factory.submit(&format!(
        "{FUNCTIONS}ulimit -n 20000\n{script}\necho ready\n{}; true",
        factory.until_release()
    ));
    let ready = |state: &State| {
        let job = &state.jobs[&job];
        let is_ready = job.events.iter().any(|event| event.payload == "ready");
        (is_ready || job.is_complete()).then_some(is_ready)
    };
    assert!(
        factory.wait_for_state(ready).await,
        "{:#?}",
        factory.server.job(job).events
    );
    job
}

#[tokio::test(flavor = "multi_thread")]
async fn row_122_slow_readers_take_bounded_memory_and_hold_up_no_other_job() {
    // A server that never comes to an end for `/large`.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            thread::spawn(move || {
                let mut head = Vec::new();
                let mut byte = [0];
                while !head.ends_with(b"\r\n\r\n") && matches!(stream.read(&mut byte), Ok(1)) {
                    head.push(byte[0]);
                }
                if !head.starts_with(b"GET /large ") {
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfrom ");
                    return;
                }
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
                // More than all buffers between here and the job, unless one of them has no bound.
                let megabyte = vec![7; 1 << 20];
                for _ in 0..256 {
                    if stream.write_all(&megabyte).is_err() {
                        return;
                    }
                }
            });
        }
    });
    let factory = two_slots(port).await;
    let before = memory(&factory, "VmRSS:");
    // A byte of each now and then, for as long as it runs.
    let slow = staying(
        &factory,
        &format!(
            r#"
            for n in {{1..23}}; do
                exec {{fd}}<>/dev/tcp/web.test/{port}; printf %b "GET /large HTTP/1.1\r\n\r\n" >&$fd; all="$all $fd"
                exec {{fd}}<>/dev/tcp/127.64.0.1/3128; all="$all $fd"
                printf %b "GET http://web.test:{port}/large HTTP/1.1\r\nHost: x\r\n\r\n" >&$fd
            done
            for fd in $all; do LC_ALL=C read -r -N 1 -u $fd; [ "$REPLY" = H ] || echo "no answer"; done
            (while sleep 1; do for fd in $all; do LC_ALL=C read -r -N 1 -u $fd; done; done) >/dev/null 2>&1 &
            "#
        ),
    )
    .await;
    // Each has read the first byte of its answer. While this job runs, the rest of it fills what there is of buffers.
    a_job_works(&factory, port, "beside slow readers").await;
    let most = memory(&factory, "VmHWM:");
    assert!(most < before + MEMORY, "{before} KiB have become {most}");
    factory.release();
    factory.wait_completed(slow).await;
    let printed = lines(&factory.server.job(slow), "stdout");
    assert_eq!(printed, ["ready"]);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_123_ten_thousand_connections_leave_the_next_job_its_own() {
    let server = Server::at(Ipv4Addr::LOCALHOST, 0);
    let port = server.port();
    let factory = two_slots(port).await;
    let (before, open) = (memory(&factory, "VmRSS:"), descriptors(&factory));
    // All stay open at the job's end: nothing to the destination, and half a head to the proxy.
    let greedy = staying(
        &factory,
        &format!(
            r#"
            for n in {{1..5000}}; do
                exec {{fd}}<>/dev/tcp/127.64.0.2/{port} && made=$((made+1))
            done 2>/dev/null
            for n in {{1..5000}}; do
                exec {{fd}}<>/dev/tcp/127.64.0.1/3128 && printf 'CONNECT web.test' >&$fd && made=$((made+1))
            done 2>/dev/null
            echo "$made"
            "#
        ),
    )
    .await;
    let at_once = server.got().len();
    a_job_works(&factory, port, "beside ten thousand connections").await;
    let (most, now) = (memory(&factory, "VmHWM:"), descriptors(&factory));
    assert!(most < before + MEMORY, "{before} KiB have become {most}");
    assert!(now <= open + 3 * 64 + 16, "{open} descriptors have become {now}");
    factory.wait_for_log(&["WARN", "closed a connection of uid", "too many connections"]);
    assert!(
        factory.supervisor.log.count(&["closed a connection of uid"]) < 20,
        "the log is filled"
    );
    factory.release();
    factory.wait_completed(greedy).await;
    let printed = lines(&factory.server.job(greedy), "stdout");
    assert!(printed[0].parse::<u32>().unwrap() > 9_900, "{printed:?}");
    assert!(at_once > 0, "none of them reached the server");
    factory.finish().await;
}
