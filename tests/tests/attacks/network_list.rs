//! Group K: a job whose slot has a list of destinations (`network.allow`) tries to reach others.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use protocol::Seqpacket;
use protocol::config::{PROXY_DIR, PROXY_SOCKET};
use testbed::fake_server::{State, Ulid};
use testbed::harness::{SUPERVISOR_UID, binaries};
use testbed::test_factory::{TestFactory, lines};

/// Functions of bash for jobs. `get HOST PORT` asks a server itself, and prints the last line of its answer; `first BYTES` sends
/// these bytes to the HTTP proxy, and prints the status of its first answer; `statuses BYTES` prints those of all; `connect
/// HOST:PORT` and `url URL` ask the proxy in the usual way, and print the status. Each prints `none` where nothing comes.
pub(super) const FUNCTIONS: &str = r#"
trap '' PIPE
to_proxy() { exec 3<>/dev/tcp/127.64.0.1/3128 && printf %b "$1" >&3; }
get() {
    local answer
    answer=$(exec 2>/dev/null 3<>"/dev/tcp/$1/$2" &&
        printf %b "GET / HTTP/1.1\r\nHost: $1\r\nConnection: close\r\n\r\n" >&3 &&
        timeout 100 tr -d '\r' <&3 | tail -n 1)
    echo "${answer:-none}"
}
first() { (to_proxy "$1"; read -r -t 100 _ status _ <&3; echo "${status:-none}"); }
statuses() { (to_proxy "$1"; timeout 100 tr -d '\r' <&3 | sed -n 's,.*HTTP/1.1 \(...\).*,\1,p' | tr '\n' ' '; echo); }
connect() { first "CONNECT $1 HTTP/1.1\r\nHost: $1\r\nConnection: close\r\n\r\n"; }
url() { first "GET $1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"; }
"#;

/// A web server of the test that keeps what it gets on each connection. To each head of a request it answers
/// `from ADDRESS`.
pub(super) struct Server {
    pub address: SocketAddr,
    got: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Server {
    pub fn at(address: impl Into<IpAddr>, port: u16) -> Server {
        let listener = TcpListener::bind((address.into(), port)).unwrap();
        let address = listener.local_addr().unwrap();
        let got: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
        let all = got.clone();
        thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                let number = {
                    let mut all = all.lock().unwrap();
                    all.push(Vec::new());
                    all.len() - 1
                };
                let all = all.clone();
                thread::spawn(move || {
                    answer(&stream, address, |byte| all.lock().unwrap()[number].push(byte))
                });
            }
        });
        Server { address, got }
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// What it got, by connection.
    pub fn got(&self) -> Vec<String> {
        let got = self.got.lock().unwrap();
        got.iter()
            .map(|bytes| String::from_utf8_lossy(bytes).into_owned())
            .collect()
    }
}

fn answer(mut stream: &TcpStream, address: SocketAddr, mut keep: impl FnMut(u8)) {
    let mut head = Vec::new();
    let mut byte = [0];
    while matches!(stream.read(&mut byte), Ok(1)) {
        keep(byte[0]);
        head.push(byte[0]);
        if !head.ends_with(b"\r\n\r\n") {
            continue;
        }
        let body = format!("from {address}\n");
        let length = body.len();
        if write!(
            stream,
            "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .is_err()
            || String::from_utf8_lossy(&head).contains("Connection: close")
        {
            return;
        }
        head.clear();
    }
}

/// A slot with this network.
pub(super) fn slot(name: &str, network: &str) -> String {
    format!("[slots.{name}]\ntarget = \"TARGET\"\nnetwork = {network}\n")
}

/// A factory with these slots, whose supervisor finds these names.
pub(super) async fn factory(slots: &str, hosts: &str) -> TestFactory {
    let mut factory = TestFactory::new(slots).await;
    factory.restart_with_hosts(hosts);
    factory
}

/// What a job with this script prints, line by line.
pub(super) async fn run(factory: &TestFactory, script: &str) -> Vec<String> {
    let job = factory.submit(&format!("{FUNCTIONS}{script}"));
    factory.wait_completed(job).await;
    lines(&factory.server.job(job), "stdout")
}

/// What a running job's log says was refused, once there is so much.
async fn refused(factory: &TestFactory, job: Ulid, count: usize) -> Vec<String> {
    let see = |state: &State| {
        let events = state.jobs[&job].events.iter();
        let lines = events.filter_map(|event| event.payload.strip_prefix("egress refused: "));
        let lines: Vec<String> = lines.map(str::to_owned).collect();
        (lines.len() >= count || state.jobs[&job].is_complete()).then_some(lines)
    };
    factory.wait_for_state(see).await
}

/// So is a destination that the list does not have.
fn not_in_the_list(destination: &str) -> String {
    format!("{destination} is not in the slot's network.allow")
}

/// Have the running factory use these slots.
fn reload(factory: &TestFactory, slots: &str) {
    factory.configure(slots);
    let mut command = Command::new(binaries().join("user-factory"));
    command.args(["reload", "--root"]).arg(&factory.host.root);
    let done = tokio::task::block_in_place(|| command.output().unwrap());
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// An address of this host that is not of its loopback, if it has one. Nothing is sent.
fn own_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("203.0.113.1:9").ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// A port of the host, for TCP and UDP.
struct Endpoint {
    tcp: TcpListener,
    udp: UdpSocket,
    at: SocketAddr,
}

impl Endpoint {
    fn at(address: IpAddr, port: u16) -> Endpoint {
        let tcp = TcpListener::bind((address, port)).unwrap();
        let at = tcp.local_addr().unwrap();
        let udp = UdpSocket::bind(at).unwrap();
        tcp.set_nonblocking(true).unwrap();
        udp.set_nonblocking(true).unwrap();
        Endpoint { tcp, udp, at }
    }

    /// How many connections and packets have come since it was asked.
    fn received(&self) -> usize {
        let connections = std::iter::from_fn(|| self.tcp.accept().ok()).count();
        connections + std::iter::from_fn(|| self.udp.recv(&mut [0; 64]).ok()).count()
    }
}

/// A job sends to these itself, by TCP and UDP, without a list of its slot, and with one that does not have them.
async fn send_to_all(factory: &TestFactory, endpoints: &[Endpoint]) {
    let mut script = String::new();
    for Endpoint { at, .. } in endpoints {
        let (ip, port) = (at.ip(), at.port());
        script += &format!(
            "(exec 3<>/dev/tcp/{ip}/{port}) 2>/dev/null && echo '{at} yes' || echo '{at} no'\n\
             (echo hello >/dev/udp/{ip}/{port}) 2>/dev/null\n"
        );
    }
    // Where it could send anything, of any protocol: its loopback is all that there is.
    let routes = "tail -n +3 /proc/net/dev | cut -d: -f1 | grep -v '^ *lo$'; tail -n +2 /proc/net/route\n\
                  grep -v ' lo$' /proc/net/ipv6_route; echo over\n";
    let printed = run(factory, &format!("{script}{routes}")).await;
    let mut expected: Vec<String> = endpoints
        .iter()
        .map(|endpoint| format!("{} no", endpoint.at))
        .collect();
    expected.push("over".into());
    assert_eq!(printed, expected);
    for endpoint in endpoints {
        assert_eq!(endpoint.received(), 0, "{}", endpoint.at);
    }
    // With the host's network, all of it works.
    reload(factory, &slot("a", "\"host\""));
    let printed = run(factory, &script).await;
    let expected: Vec<String> = endpoints
        .iter()
        .map(|endpoint| format!("{} yes", endpoint.at))
        .collect();
    assert_eq!(printed, expected);
    for endpoint in endpoints {
        assert_eq!(endpoint.received(), 2, "{}", endpoint.at);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn row_116_a_job_has_no_way_to_any_address_but_those_of_its_loopback() {
    let server = Server::at(Ipv4Addr::LOCALHOST, 0);
    let port = server.port();
    let list = format!("{{ allow = [\"web.test:{port}\", \"127.0.0.1:{port}\"] }}");
    let factory = factory(&slot("a", &list), "127.0.0.1 web.test\n").await;
    let addresses = [
        Some(factory.host.loopback().into()),
        Some(Ipv4Addr::LOCALHOST.into()),
        Some("::1".parse().unwrap()),
        own_address(),
    ];
    let endpoints: Vec<Endpoint> = addresses
        .into_iter()
        .flatten()
        .map(|address| Endpoint::at(address, 0))
        .collect();
    send_to_all(&factory, &endpoints).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_117_no_name_server_gets_a_packet_of_a_job() {
    let factory = factory(&slot("a", "{ audit = true }"), "").await;
    let endpoints = [Endpoint::at(factory.host.loopback().into(), 53)];
    send_to_all(&factory, &endpoints).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_117_the_supervisor_looks_up_no_name_that_the_list_does_not_have() {
    let server = Server::at(Ipv4Addr::LOCALHOST, 0);
    let port = server.port();
    let list = format!("{{ allow = [\"web.test:{port}\", \"*.wild.test:{port}\", \"127.0.0.1:{port}\"] }}");
    let hosts = "127.0.0.1 web.test secret.evil.test secret.web.test wild.test\n";
    let factory = factory(&slot("a", &list), hosts).await;
    // The first place that a name is looked up in (`nsswitch.conf(5)`).
    let file = factory.host.root.join("etc/hosts.test");
    let watch = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
    watch.add_watch(&file, AddWatchFlags::IN_OPEN).unwrap();
    let look_ups = || match watch.read_events() {
        Ok(events) => events.len(),
        Err(errno) => {
            assert_eq!(errno, Errno::EAGAIN);
            0
        }
    };
    let refused = format!(
        "for name in secret.evil.test SECRET.evil.test. secret.web.test wild.test; do\n\
         connect $name:{port}; url http://$name:{port}/; get $name {port}; done; connect web.test:1\n"
    );
    // A job prints when the supervisor has its connections: look-ups from before do not count.
    let job = factory.submit(&format!(
        "{FUNCTIONS}echo ready; {}; {refused}",
        factory.until_release()
    ));
    factory.wait_for_line(job, "ready").await;
    look_ups();
    factory.release();
    factory.wait_completed(job).await;
    let printed = lines(&factory.server.job(job), "stdout");
    let mut expected = vec!["ready"];
    expected.extend(["403", "403", "none"].repeat(4));
    expected.push("403");
    assert_eq!(printed, expected);
    assert_eq!(look_ups(), 0, "a name was looked up");
    // One that it has is.
    assert_eq!(
        run(&factory, &format!("connect web.test:{port}\n")).await,
        ["200"]
    );
    assert!(look_ups() > 0, "look-ups are not seen");
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_118_a_port_that_the_list_does_not_have_is_refused_however_it_is_written() {
    let server = Server::at(Ipv4Addr::LOCALHOST, 0);
    let other = Server::at(Ipv4Addr::LOCALHOST, 0);
    let (own, port) = (server.port(), other.port());
    let list = format!("{{ allow = [\"web.test:{own}\", \"127.0.0.1:{own}\"] }}");
    let factory = factory(&slot("a", &list), "127.0.0.1 web.test\n").await;
    let overflowing = u32::from(port) + 65_536;
    let job = factory.submit(&format!(
            "{FUNCTIONS}get web.test {port}; get 127.0.0.1 {port}\n\
             connect web.test:{port}; connect 127.0.0.1:{port}; url http://web.test:{port}/; url http://web.test/\n\
             connect web.test:0{port}; connect web.test:{overflowing}; connect web.test:{own}:{port}; connect web.test\n\
             connect web.test:{own}@127.0.0.1:{port}; url http://web.test:{own}@127.0.0.1:{port}/\n\
             url http://127.0.0.1:{port}#@web.test:{own}/\n\
             first 'GET http://web.test:{own}/ HTTP/1.1\\r\\nHost: web.test:{port}\\r\\nConnection: close\\r\\n\\r\\n'\n\
             get web.test {own}; connect web.test:{own}; {}; true",
            factory.until_release()
    ));
    // The list has been compared, and not only the address.
    let mut logged = refused(&factory, job, 3).await;
    logged.sort();
    let mut expected = [
        not_in_the_list(&format!("127.0.0.1:{port}")),
        not_in_the_list(&format!("web.test:{port}")),
        not_in_the_list("web.test:80"),
    ];
    expected.sort();
    assert_eq!(logged, expected);
    factory.release();
    factory.wait_completed(job).await;
    let printed = lines(&factory.server.job(job), "stdout");
    let from = format!("from {}", server.address);
    let (refused, allowed) = printed.split_at(printed.len() - 3);
    assert_eq!(allowed, ["200", &from, "200"], "{printed:?}");
    assert_eq!(refused[..6], ["none", "none", "403", "403", "403", "403"]);
    assert!(
        refused.len() == 13 && refused[6..].iter().all(|it| it == "400" || it == "403"),
        "{refused:?}"
    );
    assert_eq!(other.got(), [""; 0]);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_119_no_spelling_of_a_loopback_or_metadata_address_is_connected_to() {
    let server = Server::at(Ipv4Addr::LOCALHOST, 0);
    let port = server.port();
    let six = Server::at("::1".parse::<IpAddr>().unwrap(), port);
    let hosts = "127.0.0.1 web.test inside.test\n169.254.169.254 metadata.test\n::1 six.test\n";
    // All names that it can think of, and so the most that a slot can allow.
    let open = format!("{{ audit = true, allow = [\"web.test:{port}\"] }}");
    let factory = factory(&slot("a", &open), hosts).await;
    // Those that are an address of a server of the test's come first.
    let spellings = [
        "web.test",
        "inside.test",
        "127.0.0.1",
        "127.0.0.1.",
        "[::1]",
        "[0:0:0:0:0:0:0:1]",
        "six.test",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "017700000001",
        "localhost",
        "LOCALHOST",
        "localhost.",
        "0.0.0.0",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[::1%25lo]",
        "127.64.0.1",
        "127.64.0.2",
        "169.254.169.254",
        "metadata.test",
        "[::ffff:169.254.169.254]",
        "[fd00:ec2::254]",
        "[fe80::a9fe:a9fe]",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "x@127.0.0.1",
    ];
    let all = spellings.map(|host| format!("'{host}'")).join(" ");
    let script =
        format!("for host in {all}; do connect \"$host:{port}\"; url \"http://$host:{port}/\"; done\n");
    let printed = run(&factory, &script).await;
    assert_eq!(printed.len(), 2 * spellings.len(), "{printed:?}");
    for (host, statuses) in spellings.iter().zip(printed.chunks(2)) {
        for status in statuses {
            assert!(status == "400" || status == "403", "{host}: {printed:?}");
        }
    }
    assert_eq!([server.got(), six.got()].concat(), [""; 0]);
    // The first seven are there, for a slot that has their addresses.
    reload(
        &factory,
        &slot(
            "a",
            &format!("{{ audit = true, allow = [\"127.0.0.1:{port}\", \"[::1]:{port}\"] }}"),
        ),
    );
    let printed = run(&factory, &script).await;
    assert_eq!(printed[..14], ["200"; 14], "{printed:?}");
    let metadata = spellings
        .iter()
        .position(|host| *host == "127.64.0.1")
        .expect("it is there");
    let refused = &printed[2 * metadata..];
    assert!(
        refused.iter().all(|status| status == "400" || status == "403"),
        "{refused:?}"
    );
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_120_a_name_that_moves_to_an_address_of_the_host_leads_there_for_nobody() {
    let allowed = Server::at(Ipv4Addr::LOCALHOST, 0);
    let port = allowed.port();
    let list = format!("{{ allow = [\"web.test:{port}\", \"127.0.0.1:{port}\"] }}");
    let factory = factory(&slot("a", &list), "127.0.0.1 web.test\n").await;
    let inside = factory.host.loopback();
    let inside = (inside, Server::at(inside, port));
    let hosts = factory.host.root.join("etc/hosts.test");
    let step = |name: &str| factory.shared().join(name);
    let wait = |name: &str| {
        let file = step(name);
        format!(
            "echo before {name}; until [ -e {} ]; do sleep 0.2; done",
            file.display()
        )
    };
    let job = factory.submit(&format!(
        r#"{FUNCTIONS}
        again() {{
            exec 4<>/dev/tcp/127.64.0.1/3128
            printf %b "GET http://web.test:{port}/ HTTP/1.1\r\nHost: x\r\n\r\n" >&4
            read -r _ status _ <&4; read_head; read -r _ <&4; echo "$status"
        }}
        read_head() {{ while read -r line <&4 && [ -n "${{line%$'\r'}}" ]; do :; done; }}
        all() {{ again; connect web.test:{port}; get web.test {port}; }}
        all; {}; all; {}; all
        "#,
        wait("inside"),
        wait("both")
    ));
    factory.wait_for_line(job, "before inside").await;
    fs::write(&hosts, format!("{} web.test\n", inside.0)).unwrap();
    fs::write(step("inside"), "").unwrap();
    factory.wait_for_line(job, "before both").await;
    // Some answers are allowed, and some are not.
    fs::write(&hosts, format!("{} web.test\n127.0.0.1 web.test\n", inside.0)).unwrap();
    fs::write(step("both"), "").unwrap();
    factory.wait_completed(job).await;
    let from = format!("from {}", allowed.address);
    assert_eq!(
        lines(&factory.server.job(job), "stdout"),
        [
            "200",
            "200",
            &from,
            "before inside",
            "403",
            "403",
            "none",
            "before both",
            "200",
            "200",
            &from
        ]
    );
    assert_eq!(inside.1.got(), [""; 0]);
    factory.finish().await;
}

/// What the test's own program finds in its environment when it is to be a worker.
const AS_WORKER: &str = "USER_FACTORY_TEST_DESTINATION";

#[test]
#[ignore = "a part of row 124, which starts it"]
fn a_worker_that_is_its_own_pid_1() {
    let words = std::env::var(AS_WORKER).expect("row 124 starts it");
    let (socket, destination) = words.split_once(' ').unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut job = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let accepted = listener.accept().unwrap().0;
    match Seqpacket::connect(std::path::Path::new(socket), false) {
        Ok(caller) => {
            caller
                .send(destination.as_bytes(), Some(accepted.as_fd()))
                .unwrap();
            drop(accepted);
            let request = b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n";
            let _ = job.write_all(request);
            let mut answer = String::new();
            let _ = job.read_to_string(&mut answer);
            println!("answer: {:?}.", answer.lines().last().unwrap_or("none"));
        }
        Err(errno) => println!("answer: {errno}."),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn row_124_what_a_job_changes_of_its_own_network_leads_to_no_other_destination() {
    let server = Server::at(Ipv4Addr::LOCALHOST, 0);
    let evil = Server::at(Ipv4Addr::LOCALHOST, 0);
    let (port, other) = (server.port(), evil.port());
    let list = format!("{{ allow = [\"web.test:{port}\", \"127.0.0.1:{port}\"] }}");
    let hosts = "127.0.0.1 web.test evil.test\n";
    let factory = factory(&slot("a", &list), hosts).await;
    let socket = factory.host.root.join(PROXY_DIR).join(PROXY_SOCKET);
    let job = factory.submit(&format!(
        r#"{FUNCTIONS}
        tries() {{ if ("$@") >/dev/null 2>&1; then echo "done: $*"; fi; }}
        add() {{ echo "127.64.0.2 evil.test" >>"$1"; }}
        tries add /etc/hosts
        cp /etc/hosts hosts && echo "127.64.0.2 evil.test" >>hosts
        tries mount --bind hosts /etc/hosts
        tries mv hosts /etc/hosts
        tries ip address add 10.77.0.1/32 dev lo
        tries ip route add default dev lo
        tries ip link set lo down
        tries ip link add eth9 type dummy
        tries ls {socket}
        tries ls /proc/1/fd/
        tries ls /proc/1/root/
        grep -c {PROXY_SOCKET} /proc/net/unix
        get evil.test {other}; get web.test {port}
        {}; true"#,
        factory.until_release(),
        socket = socket.display(),
    ));
    let from = format!("from {}", server.address);
    factory.wait_for_line(job, &from).await;

    // A worker that could send its connections itself gets no further than its list.
    let see = |state: &State| {
        let worker = state.jobs[&job].worker?;
        Some(worker.to_string())
    };
    let worker = factory.wait_for_state(see).await.parse().unwrap();
    let uid = std::os::unix::fs::MetadataExt::uid(
        &fs::metadata(factory.host.worker_dir(worker).join("fs/work")).unwrap(),
    );
    let as_worker = |destination: &str| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let test = "attacks::network_list::a_worker_that_is_its_own_pid_1";
        command.args(["--ignored", "--exact", "--nocapture", test]);
        command.env(AS_WORKER, format!("{} {destination}", socket.display()));
        command.uid(uid).gid(uid).current_dir("/").stdin(Stdio::null());
        let output = tokio::task::block_in_place(|| command.output().unwrap());
        let output = String::from_utf8_lossy(&output.stdout).into_owned();
        let (_, answer) = output.split_once("answer: ").expect("it says how it went");
        answer.lines().next().expect("a line").to_owned()
    };
    let own = format!("web.test:{port}");
    assert!(as_worker(&own).contains("EACCES"), "the directory is open");
    let closed = factory.host.root.join(PROXY_DIR).parent().unwrap().to_owned();
    assert_ne!(uid, SUPERVISOR_UID);
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(as_worker(&own), format!("{from:?}."));
    for destination in [
        format!("evil.test:{other}"),
        format!("web.test:{other}"),
        format!("127.0.0.1:{other}"),
        format!("web.test:{port}@evil.test:{other}"),
        format!("*.test:{other}"),
        String::new(),
    ] {
        assert_eq!(as_worker(&destination), "\"none\".", "{destination}");
    }
    let logged = refused(&factory, job, 4).await;
    assert_eq!(
        logged[..3],
        [
            not_in_the_list(&format!("evil.test:{other}")),
            not_in_the_list(&format!("web.test:{other}")),
            not_in_the_list(&format!("127.0.0.1:{other}"))
        ]
    );
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o710)).unwrap();

    factory.release();
    factory.wait_completed(job).await;
    assert_eq!(
        lines(&factory.server.job(job), "stdout"),
        ["0", "none", &from],
        "something of it worked"
    );
    assert_eq!(evil.got(), [""; 0]);
    factory.finish().await;
}
