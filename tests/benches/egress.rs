//! What it costs a job to download through the egress proxy, by name and through its HTTP proxy, against an ordinary
//! process of the host that downloads the same; and what it costs the supervisor, against a loop that reads and writes.
//!
//! `cargo bench -p testbed --bench egress`; needs root. The server sends as fast as a network of 1 Gbit/s, over the loopback
//! interface: without that limit two copies more on the same two processors would be all that is measured.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use testbed::bench::{Group, Options, Report, Way};
use testbed::test_factory::{TestFactory, lines};

/// Bytes a second: 1 Gbit/s.
const RATE: usize = 125_000_000;
/// What is sent in one piece.
const PIECE: usize = 1 << 18;

/// A server that sends so many bytes to all who ask, and then ends the connection.
fn server(bytes: usize) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            thread::spawn(move || send(stream, bytes));
        }
    });
    port
}

fn send(mut stream: TcpStream, bytes: usize) -> std::io::Result<()> {
    // Whatever it asks for.
    let _ = stream.read(&mut [0; 4096])?;
    let piece = vec![7; PIECE];
    let (started_at, mut sent) = (Instant::now(), 0);
    while sent < bytes {
        let due = Duration::from_secs_f64(sent as f64 / RATE as f64);
        thread::sleep(due.saturating_sub(started_at.elapsed()));
        stream.write_all(&piece)?;
        sent += PIECE;
    }
    Ok(())
}

/// A script that prints the microseconds of one download.
fn download(host: &str, port: u16) -> String {
    format!(
        "started_at=${{EPOCHREALTIME/.}}; exec 3<>/dev/tcp/{host}/{port}; echo >&3; cat <&3 >/dev/null; \
         echo $((${{EPOCHREALTIME/.}} - started_at))"
    )
}

/// The same through the job's HTTP proxy.
fn through_proxy(host: &str, port: u16) -> String {
    let open = "proxy=${http_proxy#http://}; started_at=${EPOCHREALTIME/.}; exec 3<>/dev/tcp/${proxy%:*}/${proxy#*:}";
    format!(
        "{open}; printf 'CONNECT {host}:{port} HTTP/1.1\\r\\n\\r\\n\\n' >&3; cat <&3 >/dev/null; \
         echo $((${{EPOCHREALTIME/.}} - started_at))"
    )
}

/// Seconds of a processor for reading what the server sends and writing it to another process, without anything else.
fn bare_loop(port: u16) -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (host, to) = ("127.0.0.1", listener.local_addr().unwrap().port());
    let mut reader = Command::new("bash")
        .args(["-c", &download(host, to)])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let (mut job, mut server) = (
        listener.accept().unwrap().0,
        TcpStream::connect((host, port)).unwrap(),
    );
    let now = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap());
    let before = now();
    // As large as the supervisor's.
    let mut buffer = vec![0; 64 << 10];
    let asked = job.read(&mut buffer).unwrap();
    server.write_all(&buffer[..asked]).unwrap();
    loop {
        match server.read(&mut buffer).unwrap() {
            0 => break,
            bytes => job.write_all(&buffer[..bytes]).unwrap(),
        }
    }
    let used = now() - before;
    drop(job);
    assert!(reader.wait().unwrap().success());
    used.as_secs_f64()
}

/// Seconds of a processor that a process has used (`proc_pid_stat(5)`: utime and stime).
fn processor_seconds(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: f64 = fields[11..13]
        .iter()
        .map(|field| field.parse::<f64>().unwrap())
        .sum();
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)
        .unwrap()
        .unwrap();
    ticks / per_second as f64
}

#[tokio::main]
async fn main() {
    let options = Options::from_args();
    let mut report = Report::new("egress");
    let bytes = options.size(1 << 30, 1 << 24);
    let rounds = options.size(5, 2);
    let port = server(bytes);
    let slot = format!(
        "[slots.a]\ntarget = \"TARGET\"\nnetwork.allow = [\"big.test:{port}\", \"127.0.0.1:{port}\"]\n"
    );
    let mut factory = TestFactory::new(&slot).await;
    factory.restart_with_hosts("127.0.0.1 big.test\n");
    factory.wait_completed(factory.submit("true")).await;
    let (mut direct, mut by_name, mut proxied) = (Vec::new(), Vec::new(), Vec::new());
    let (mut waiting, mut processor, mut bare) = (Vec::new(), Vec::new(), Vec::new());
    let for_a_gigabyte = |seconds: f64| seconds * 1e6 * 1e9 / bytes as f64;
    // What a job costs the supervisor that takes as long, and downloads nothing.
    let nothing = format!("sleep {}", bytes as f64 / RATE as f64);
    for _ in 0..rounds {
        let output = tokio::task::block_in_place(|| {
            Command::new("bash")
                .args(["-c", &download("127.0.0.1", port)])
                .output()
        });
        let text = String::from_utf8(output.unwrap().stdout).unwrap();
        direct.push(text.trim().parse::<f64>().unwrap());
        bare.push(for_a_gigabyte(tokio::task::block_in_place(|| bare_loop(port))));
        let before = processor_seconds(factory.supervisor.pid());
        factory.wait_completed(factory.submit(&nothing)).await;
        let idle = processor_seconds(factory.supervisor.pid()) - before;
        waiting.push(idle * 1e6);
        for (script, samples) in [
            (download("big.test", port), &mut by_name),
            (through_proxy("big.test", port), &mut proxied),
        ] {
            let before = processor_seconds(factory.supervisor.pid());
            let job = factory.submit(&script);
            factory.wait_completed(job).await;
            let used = processor_seconds(factory.supervisor.pid()) - before - idle;
            processor.push(for_a_gigabyte(used));
            let printed = lines(&factory.server.job(job), "stdout");
            samples.push(printed[0].parse::<f64>().unwrap());
        }
    }
    let way = |name: &str, mut samples: Vec<f64>| {
        samples.sort_by(f64::total_cmp);
        Way {
            name: name.to_owned(),
            samples,
        }
    };
    let group = report.add(Group {
        title: format!("A download of {} MiB at 1 Gbit/s", bytes >> 20),
        ways: vec![
            way("an ordinary process", direct),
            way("a job, by name", by_name),
            way("a job, through its HTTP proxy", proxied),
            way("the supervisor's processor time, for 1 GB more", processor),
            way("a bare loop's, for 1 GB", bare),
            way("the supervisor's, for a job that waits as long", waiting),
        ],
    });
    let (ways, name) = (group.ways.clone(), group.ways[0].name.clone());
    let ratios = [1, 2].map(|way| group.ratio(&ways[way].name, &name));
    report.aim("a job by name, against an ordinary process", ratios[0], 1.1);
    report.aim(
        "a job through its HTTP proxy, against an ordinary process",
        ratios[1],
        1.1,
    );
    report.aim(
        "processor seconds of the supervisor for 1 GB more, median",
        ways[3].median() / 1e6,
        0.5,
    );
    report.aim(
        "the same, against a bare loop",
        ways[3].median() / ways[4].median(),
        1.2,
    );
    report.end(&options);
    factory.finish().await;
}
