//! packaging/firewall.nft, for real: in a network namespace, with services of a host and processes of jobs.
//! Needs root.
//!
//! This program starts itself again: in the namespace as `the_host`, there as each `player`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use protocol::config::UidRange;
use testbed::harness::{PAUSE, TEST_TIMEOUT, cgroup2_mount, tool};

/// The range of packaging/firewall.nft, which is the configuration's default.
static RANGE: LazyLock<RangeInclusive<u32>> = LazyLock::new(|| {
    let uids = UidRange::default();
    uids.first.get()..=uids.last.get()
});
/// How long an answer may take before it counts as none.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// The host's address that is not of the loopback network.
const OWN_ADDRESS: &str = "10.9.9.1";
/// Who serves at which port: the host, and job a.
const OF_THE_HOST: u16 = 7001;
const OF_JOB_A: u16 = 7002;
/// The port of the host's own addresses that leads to a container, which serves there under the same number.
const PUBLISHED: u16 = 7003;
/// The two ends of the way to the container: the host's addresses, and the container's.
const HOST_ADDRESSES: [&str; 2] = ["10.9.9.1", "fd09::1"];
const CONTAINER_ADDRESSES: [&str; 2] = ["10.9.9.2", "fd09::2"];
/// What a container engine loads for a published port, with IPv4 and IPv6.
const PUBLISH: &str = "table inet published {
    chain output {
        type nat hook output priority -100;
        ip daddr 10.9.9.1 meta l4proto { tcp, udp } th dport 7003 dnat ip to 10.9.9.2
        ip6 daddr fd09::1 meta l4proto { tcp, udp } th dport 7003 dnat ip6 to fd09::2
    }
}
";
/// What a player does, handed over in its environment.
const ACTION: &str = "USER_FACTORY_FIREWALL_TEST";

fn rules() -> PathBuf {
    testbed::sources::root().join("packaging/firewall.nft")
}

/// The network namespace of this process.
fn network() -> String {
    fs::read_link("/proc/self/ns/net")
        .expect("/proc is mounted")
        .display()
        .to_string()
}

/// This program again, as the test of that name alone.
fn again(name: &str, action: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("a test has a path"));
    command
        .args(["--exact", name, "--ignored", "--nocapture"])
        .env(ACTION, action);
    command
}

#[test]
fn a_job_reaches_its_own_servers_and_none_of_the_hosts_or_of_another_job() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this needs root: it makes a network namespace"
    );
    let nft = tool("nft");
    tool("ip");
    let mut unshare = Command::new(tool("unshare"));
    let inside = again("the_host", &format!("{}\n{}", nft.display(), network()));
    unshare
        .arg("--net")
        .arg(inside.get_program())
        .args(inside.get_args());
    for (name, value) in inside.get_envs() {
        unshare.env(name, value.expect("nothing is removed"));
    }
    let output = unshare.output().expect("unshare can be started");
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        output.status.success() && text.contains("the firewall was tried"),
        "{text}"
    );
}

fn command(args: &[&str]) -> String {
    let output = Command::new(args[0])
        .args(&args[1..])
        .output()
        .expect("it can be started");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Cgroups as deep as those of workers are under systemd.
struct Cgroups(PathBuf);

impl Cgroups {
    fn new() -> Cgroups {
        let top = cgroup2_mount().join(format!("user-factory-test-firewall-{}", std::process::id()));
        let cgroups = Cgroups(top);
        for worker in ["a", "b"] {
            fs::create_dir_all(cgroups.worker(worker)).expect("cgroups can be made");
        }
        cgroups
    }

    fn worker(&self, name: &str) -> PathBuf {
        self.0.join("a.service/workers").join(name)
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        let workers = self.0.join("a.service/workers");
        let _ = fs::write(self.0.join("cgroup.kill"), "1");
        let end = Instant::now() + TEST_TIMEOUT;
        for dir in [
            self.worker("a"),
            self.worker("b"),
            workers,
            self.0.join("a.service"),
            self.0.clone(),
        ] {
            while fs::remove_dir(&dir).is_err() && dir.exists() && Instant::now() < end {
                std::thread::sleep(PAUSE);
            }
        }
    }
}

/// A process of one of the users. Its end is that of its standard input.
struct FirewallProcess(Child);

impl FirewallProcess {
    fn start(uid: u32, cgroup: &str, what: &str) -> FirewallProcess {
        let action = format!("{uid}\n{cgroup}\n{what}");
        let mut command = again("player", &action);
        if what == "container" {
            let mut unshare = Command::new(tool("unshare"));
            unshare.arg("--net").arg(command.get_program());
            unshare.args(command.get_args()).env(ACTION, &action);
            command = unshare;
        }
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        FirewallProcess(child.expect("this program can be started"))
    }

    /// What it reports, up to the last word.
    fn report(&mut self) -> Vec<String> {
        let lines = BufReader::new(self.0.stdout.as_mut().expect("it was piped")).lines();
        let lines = lines.map(|line| line.expect("a report is text"));
        let report: Vec<String> = lines.take_while(|line| line != "REPORT over").collect();
        report
            .into_iter()
            .filter_map(|line| Some(line.strip_prefix("REPORT ")?.to_owned()))
            .collect()
    }
}

impl Drop for FirewallProcess {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

fn addresses(port: u16) -> Vec<SocketAddr> {
    ["127.0.0.1", "[::1]", OWN_ADDRESS]
        .map(|host| format!("{host}:{port}").parse().unwrap())
        .to_vec()
}

fn at(addresses: [&str; 2], port: u16) -> Vec<SocketAddr> {
    addresses
        .map(|address| SocketAddr::new(address.parse().unwrap(), port))
        .to_vec()
}

fn ip(args: &str) {
    let ip = tool("ip").display().to_string();
    command(&[&[&*ip][..], &args.split(' ').collect::<Vec<_>>()].concat());
}

/// In a network namespace of its own: take the other end of the host's veth pair into it, and serve there.
fn become_container() {
    let host = format!("--net=/proc/{}/ns/net", std::os::unix::process::parent_id());
    let nsenter = tool("nsenter").display().to_string();
    let own = std::process::id().to_string();
    command(&[&nsenter, &host, "ip", "link", "set", "two", "netns", &own]);
    ip("link set lo up");
    ip(&format!("address add {}/24 dev two", CONTAINER_ADDRESSES[0]));
    ip(&format!(
        "address add {}/64 dev two nodad",
        CONTAINER_ADDRESSES[1]
    ));
    ip("link set two up");
    serve(&at(CONTAINER_ADDRESSES, PUBLISHED));
}

/// Serve at these addresses, over both protocols, until the process ends: say back what is said.
fn serve(addresses: &[SocketAddr]) {
    for address in addresses {
        let listener = TcpListener::bind(address).expect("the port is free");
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut word = [0; 2];
                let _ = stream
                    .read_exact(&mut word)
                    .and_then(|()| stream.write_all(&word));
            }
        });
        let socket = UdpSocket::bind(address).expect("the port is free");
        std::thread::spawn(move || {
            let mut word = [0; 2];
            loop {
                // Errors here are those of answers that were refused.
                if let Ok((_, peer)) = socket.recv_from(&mut word) {
                    let _ = socket.send_to(&word, peer);
                }
            }
        });
    }
}

/// Send two bytes and read them back: `works`, `refused` at once, or `no answer`.
fn ask(protocol: &str, address: SocketAddr) -> &'static str {
    let begin = Instant::now();
    let mut word = [0; 2];
    let result = if protocol == "tcp" {
        TcpStream::connect_timeout(&address, ANSWER_TIMEOUT).and_then(|mut stream| {
            stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
            stream.write_all(b"hi")?;
            stream.read_exact(&mut word)
        })
    } else {
        let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        UdpSocket::bind(any).and_then(|socket| {
            socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
            socket.connect(address)?;
            socket.send(b"hi")?;
            socket.recv(&mut word).map(drop)
        })
    };
    match result {
        Ok(()) if word == *b"hi" => "works",
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::ConnectionRefused | ErrorKind::PermissionDenied
            ) && begin.elapsed() < ANSWER_TIMEOUT =>
        {
            "refused"
        }
        _ => "no answer",
    }
}

#[test]
#[ignore = "a part of the other test, which starts it"]
fn player() {
    let action = std::env::var(ACTION).expect("the other test gives an action");
    let [uid, cgroup, what] = action.split('\n').collect::<Vec<_>>()[..] else {
        panic!("{action:?}")
    };
    if !cgroup.is_empty() {
        fs::write(Path::new(cgroup).join("cgroup.procs"), "0").expect("root may move itself");
    }
    let uid: u32 = uid.parse().expect("a uid");
    if what == "container" {
        become_container();
    }
    let gid = Gid::from_raw(uid);
    setgroups(&[]).unwrap();
    setresgid(gid, gid, gid).unwrap();
    setresuid(Uid::from_raw(uid), Uid::from_raw(uid), Uid::from_raw(uid)).unwrap();
    let mut report = String::from("\n");
    if what == "serve" {
        serve(&addresses(OF_JOB_A));
    } else if what == "ask" {
        let stub = "127.0.0.53:53".parse().unwrap();
        let all = addresses(OF_THE_HOST)
            .into_iter()
            .chain(addresses(OF_JOB_A))
            .chain(at(HOST_ADDRESSES, PUBLISHED))
            .chain([stub]);
        // At the same time: what gets no answer takes `ANSWER_TIMEOUT`.
        let asked: Vec<_> = all
            .flat_map(|address| ["tcp", "udp"].map(|protocol| (protocol, address)))
            .map(|(protocol, address)| {
                let outcome = std::thread::spawn(move || ask(protocol, address));
                (protocol, address, outcome)
            })
            .collect();
        for (protocol, address, outcome) in asked {
            let outcome = outcome.join().expect("asking does not panic");
            writeln!(report, "REPORT {protocol} {address} {outcome}").unwrap();
        }
    }
    println!("{report}REPORT over");
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

/// Everybody asks everybody. The outcomes, by who asked, the protocol and the address.
fn outcomes(cgroups: &Cgroups) -> BTreeMap<(&'static str, String, SocketAddr), String> {
    let cgroup = |name: &str| cgroups.worker(name).display().to_string();
    let (first, last) = (*RANGE.start(), *RANGE.end());
    let who = [
        ("job a", first, cgroup("a")),
        ("job b", last, cgroup("b")),
        ("a process in no job's cgroup", first, String::new()),
        ("just below the range", first - 1, String::new()),
        ("just above the range", last + 1, String::new()),
        ("the host", 0, String::new()),
    ];
    // All ask at the same time: what gets no answer takes `ANSWER_TIMEOUT`.
    let mut processes = who.map(|(name, uid, cgroup)| (name, FirewallProcess::start(uid, &cgroup, "ask")));
    let mut outcomes = BTreeMap::new();
    for (name, player) in &mut processes {
        for line in player.report() {
            let [protocol, address, outcome] = line.splitn(3, ' ').collect::<Vec<_>>()[..] else {
                panic!("{line:?}")
            };
            outcomes.insert(
                (*name, protocol.to_owned(), address.parse().unwrap()),
                outcome.to_owned(),
            );
        }
    }
    assert_eq!(outcomes.len(), processes.len() * 18, "one of them did not report");
    outcomes
}

#[test]
#[ignore = "a part of the other test, which starts it"]
fn the_host() {
    let action = std::env::var(ACTION).expect("the other test gives an action");
    let (nft, outside) = action.split_once('\n').expect("an action has two lines");
    assert_ne!(network(), outside, "the host's own network is not for tests");
    for args in [
        "link set lo up",
        "link add one type veth peer name two",
        "address add 10.9.9.1/24 dev one",
        "address add fd09::1/64 dev one nodad",
        "link set one up",
    ] {
        ip(args);
    }
    let mut container = FirewallProcess::start(0, "", "container");
    assert_eq!(container.report(), [""; 0], "the container serves");
    let mut publish = tempfile::NamedTempFile::new().unwrap();
    publish.write_all(PUBLISH.as_bytes()).unwrap();
    command(&[nft, "-f", &publish.path().display().to_string()]);
    let cgroups = Cgroups::new();
    let stub = "127.0.0.53:53".parse().unwrap();
    serve(&[addresses(OF_THE_HOST), vec![stub]].concat());
    let mut job_a = FirewallProcess::start(
        *RANGE.start(),
        &cgroups.worker("a").display().to_string(),
        "serve",
    );
    assert_eq!(job_a.report(), [""; 0], "job a serves");

    // Without the rules everything works, or what follows would show nothing.
    for (what, outcome) in outcomes(&cgroups) {
        assert_eq!(outcome, "works", "{what:?} without the rules");
    }

    command(&[nft, "add table inet of_others"]);
    let rules = rules().display().to_string();
    for _ in 0..2 {
        command(&[nft, "-f", &rules]);
    }
    let tables = command(&[nft, "list", "tables"]);
    assert_eq!(
        tables.lines().count(),
        3,
        "loading twice is not loading once: {tables}"
    );
    for ((who, protocol, address), outcome) in outcomes(&cgroups) {
        let outsider = !matches!(who, "job a" | "job b" | "a process in no job's cgroup");
        let expected = match (who, address.port()) {
            (_, 53) => "works",
            ("job a", OF_JOB_A) => "works",
            // What a job answers over UDP is a packet of its own, and the host no place for it.
            (_, OF_JOB_A) if outsider && protocol == "udp" => "no answer",
            _ if outsider => "works",
            _ => "refused",
        };
        assert_eq!(outcome, expected, "{who} at {protocol} {address}");
    }
    println!("the firewall was tried");
}
