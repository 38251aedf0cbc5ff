//! The root helper, driven over its socket as the supervisor, or an attacker with its uid, would. Needs root.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::time::Instant;

use nix::sys::signal::Signal;
use protocol::{BootstrapToken, ErrorKind, Exit, Reply, Request, SlotName, State, WorkerId, wire};
use testbed::census::{Census, processes_of};
use testbed::harness::{Client, PATIENCE, Running, TestHost, memory, sealed, worker_id};

const SLOTS: &str = r#"
[slots.a]
target = "01HZX3N8Q4J5K6M7P8R9S0T1V2"
conflicts_with_slots = ["b"]
env.COLOUR = "deep red"
writable = ["/srv/of-the-job"]
read_only = { "/opt/shown" = "/usr/share" }
[slots.b]
target = "01HZX3N8Q4J5K6M7P8R9S0T1V2"
[slots.c]
target = "01HZX3N8Q4J5K6M7P8R9S0T1V2"
"#;

/// A host with a helper that serves root, so that the test itself is the client.
struct Stage {
    host: TestHost,
    helper: Running,
    before: Census,
}

impl Stage {
    fn new() -> Stage {
        let host = TestHost::new();
        host.configure("http://127.0.0.1:9", 0, SLOTS);
        let before = Census::take(&host);
        let helper = host.helper();
        Stage { host, helper, before }
    }

    fn client(&self) -> Client {
        Client::new(&self.host)
    }

    /// Delete what the test made; then the host is as it was.
    fn finish(self, workers: &[WorkerId]) {
        let client = self.client();
        for worker in workers {
            assert_eq!(client.ask(&Request::Delete { worker: *worker }).0, Reply::Deleted);
        }
        assert_eq!(list(&client), []);
        self.before.assert_unchanged(&self.host);
    }
}

fn slot(name: &str) -> SlotName {
    name.parse().unwrap()
}

fn create(client: &Client, worker: WorkerId, name: &str) -> Reply {
    client
        .ask(&Request::CreateUser {
            worker,
            slot: slot(name),
        })
        .0
}

fn created(client: &Client, name: &str) -> WorkerId {
    let worker = worker_id();
    assert!(matches!(create(client, worker, name), Reply::UserCreated { .. }));
    worker
}

fn token() -> BootstrapToken {
    "t0k3n".repeat(10).parse().unwrap()
}

fn install(client: &Client, worker: WorkerId, agent: OwnedFd) -> (Reply, Option<File>) {
    let (reply, mut descriptors) = client.ask_with(
        &Request::InstallAgent {
            worker,
            bootstrap: token(),
        },
        Some(agent.as_fd()),
    );
    assert_eq!(reply.carries_descriptor(), !descriptors.is_empty());
    (reply, descriptors.pop().map(File::from))
}

/// Install a script as the agent, let it run until its install has ended, and return the console.
fn run(client: &Client, worker: WorkerId, script: &str) -> (State, String) {
    let (reply, console) = install(
        client,
        worker,
        sealed(format!("#!/bin/bash\n{script}\n").as_bytes()),
    );
    assert_eq!(reply, Reply::AgentStarted);
    let state = wait_until(client, worker, |state| state != State::Running);
    (state, read(&console.unwrap()))
}

fn read(console: &File) -> String {
    let mut bytes = vec![0; 2 << 20];
    let n = console.read_at(&mut bytes, 0).unwrap();
    String::from_utf8_lossy(&bytes[..n]).into_owned()
}

fn state(client: &Client, worker: WorkerId) -> State {
    list(client)
        .into_iter()
        .find(|info| info.worker == worker)
        .expect("the worker exists")
        .state
}

fn wait_until(client: &Client, worker: WorkerId, good: impl Fn(State) -> bool) -> State {
    let begin = Instant::now();
    loop {
        let now = state(client, worker);
        if good(now) {
            return now;
        }
        assert!(begin.elapsed() < PATIENCE, "worker {worker} stays {now:?}");
        std::thread::yield_now();
    }
}

fn wait_for_line(console: &File, line: &str) {
    let begin = Instant::now();
    while !read(console).lines().any(|other| other == line) {
        assert!(
            begin.elapsed() < PATIENCE,
            "the console has no {line:?}:\n{}",
            read(console)
        );
        std::thread::yield_now();
    }
}

fn list(client: &Client) -> Vec<protocol::WorkerInfo> {
    match client.ask(&Request::List { after: None }).0 {
        Reply::Workers { workers, more: false } => workers,
        other => panic!("{other:?}"),
    }
}

fn kind(reply: Reply) -> ErrorKind {
    match reply {
        Reply::Error(error) => {
            assert!(
                !error.message().is_empty() && !error.message().contains('\n'),
                "{:?}",
                error.message()
            );
            error.kind
        }
        other => panic!("not an error: {other:?}"),
    }
}

#[test]
fn a_worker_lives_and_leaves_nothing() {
    let stage = Stage::new();
    let client = stage.client();
    let worker = worker_id();
    let Reply::UserCreated { uid, name } = create(&client, worker, "a") else {
        panic!()
    };
    assert!(stage.host.uids.contains(&uid.get()));
    assert_eq!(
        name.to_string(),
        format!("bmat-{}", worker.to_string().to_lowercase())
    );
    let record = fs::read_to_string(stage.host.userdb().join(format!("{uid}.user"))).unwrap();
    assert!(record.contains(&format!("\"userName\":\"{name}\"")), "{record}");
    assert_eq!(list(&client)[0].state, State::Created);

    let script = "echo $*; id -un; (exec -a the-agent sleep 1000) & exit 0";
    let (reply, console) = install(
        &client,
        worker,
        sealed(format!("#!/bin/bash\n{script}").as_bytes()),
    );
    assert_eq!(reply, Reply::AgentStarted);
    let console = console.unwrap();
    wait_for_line(&console, &name.to_string());
    let expected = format!(
        "install -e COLOUR=deep red --no-service --no-setuid --use-var-run http://127.0.0.1:9 {}",
        token().as_str()
    );
    assert_eq!(read(&console).lines().next(), Some(&*expected));
    assert_eq!(state(&client, worker), State::Running);
    assert!(!processes_of(&stage.host.uids).is_empty());

    assert_eq!(client.ask(&Request::Kill { worker }).0, Reply::Killed);
    assert!(
        processes_of(&stage.host.uids).is_empty(),
        "a killed worker has processes"
    );
    assert_eq!(state(&client, worker), State::Exited(Exit::Unknown));
    stage.finish(&[worker]);
}

#[test]
fn what_is_asked_twice_is_done_once() {
    let stage = Stage::new();
    let client = stage.client();
    let worker = worker_id();
    let first = create(&client, worker, "a");
    assert_eq!(create(&client, worker, "a"), first);
    let agent = || sealed(b"#!/bin/bash\necho started; sleep 1000 & exit 0\n");
    for _ in 0..3 {
        let (reply, console) = install(&client, worker, agent());
        assert_eq!(reply, Reply::AgentStarted);
        wait_for_line(&console.unwrap(), "started");
    }
    assert_eq!(
        create(&client, worker, "a"),
        first,
        "the user is the same while the agent runs"
    );
    let console = client
        .ask(&Request::Attach { worker })
        .1
        .pop()
        .map(File::from)
        .unwrap();
    assert_eq!(read(&console).matches("started").count(), 1);
    for _ in 0..2 {
        assert_eq!(client.ask(&Request::Kill { worker }).0, Reply::Killed);
    }
    let (reply, _) = install(&client, worker, agent());
    assert_eq!(reply, Reply::AgentStarted);
    assert_eq!(
        state(&client, worker),
        State::Exited(Exit::Unknown),
        "an agent was started twice"
    );
    for _ in 0..2 {
        assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    }
    stage.finish(&[]);
}

#[test]
fn slots_are_taken_once_and_conflict_both_ways() {
    let stage = Stage::new();
    let client = stage.client();
    assert_eq!(kind(create(&client, worker_id(), "zz")), ErrorKind::NoSuchSlot);
    let a = created(&client, "a");
    assert_eq!(kind(create(&client, worker_id(), "a")), ErrorKind::SlotTaken);
    assert_eq!(kind(create(&client, worker_id(), "b")), ErrorKind::SlotTaken);
    assert_eq!(kind(create(&client, a, "c")), ErrorKind::Refused);
    let c = created(&client, "c");
    assert_eq!(client.ask(&Request::Delete { worker: a }).0, Reply::Deleted);
    let b = created(&client, "b");
    assert_eq!(kind(create(&client, worker_id(), "a")), ErrorKind::SlotTaken);
    let mut slots: Vec<_> = list(&client)
        .into_iter()
        .map(|info| info.slot.to_string())
        .collect();
    slots.sort();
    assert_eq!(slots, ["b", "c"]);
    stage.finish(&[b, c]);
}

#[test]
fn of_many_that_want_a_slot_at_the_same_instant_one_gets_it() {
    let stage = Stage::new();
    let winners: Vec<WorkerId> = std::thread::scope(|scope| {
        let tries: Vec<_> = (0..16)
            .map(|i| {
                let stage = &stage;
                scope.spawn(move || {
                    let worker = worker_id();
                    let reply = create(&stage.client(), worker, if i % 2 == 0 { "a" } else { "b" });
                    matches!(reply, Reply::UserCreated { .. }).then_some(worker)
                })
            })
            .collect();
        tries
            .into_iter()
            .filter_map(|thread| thread.join().unwrap())
            .collect()
    });
    assert_eq!(winners.len(), 1);
    stage.finish(&winners);
}

#[test]
fn unknown_workers_are_said_to_be_unknown_and_deleting_them_is_done_already() {
    let stage = Stage::new();
    let client = stage.client();
    let worker = worker_id();
    assert_eq!(
        kind(client.ask(&Request::Attach { worker }).0),
        ErrorKind::NoSuchWorker
    );
    assert_eq!(
        kind(client.ask(&Request::Kill { worker }).0),
        ErrorKind::NoSuchWorker
    );
    assert_eq!(
        kind(install(&client, worker, sealed(b"x")).0),
        ErrorKind::NoSuchWorker
    );
    assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    stage.finish(&[]);
}

#[test]
fn a_job_sees_what_the_design_says_and_no_more() {
    let stage = Stage::new();
    let client = stage.client();
    let worker = created(&client, "a");
    let secret = stage.host.root.join("etc/buildomat-user-factory");
    let script = format!(
        r#"exec 2>&1
        for place in "$HOME" /input /work /tmp /var/tmp /opt/buildomat /var/run/buildomat /dev/shm /srv/of-the-job; do
            [ -z "$(ls -A $place)" ] && touch "$place/new" && echo "private $place"
        done
        for place in / /usr /etc /opt /home /run /dev /sys /root /opt/shown; do
            touch "$place/new" 2>/dev/null && echo "WRITABLE $place"
        done
        for hidden in {secret} /root/.cargo /run/systemd /run/dbus /.buildomat-factory/workers; do
            [ -e "$hidden" ] && echo "SEEN $hidden"
        done
        [ -d /opt/shown/doc ] && echo "shown"
        ls /home | wc -l
        grep -E '^(Cap|NoNewPrivs)' /proc/self/status | tr -d '\t' | tr '\n' ' '; echo
        ls /proc/self/fd | wc -l
        stat -c %a /dev/null
        getent passwd "$(id -u)" | cut -d: -f6; echo "$HOME"
        ls -d /proc/[0-9]* | wc -l
        mount -t tmpfs none /tmp; [ $? -ne 0 ] && echo "no mount"
        exit 3"#,
        secret = secret.display()
    );
    let (state, console) = run(&client, worker, &script);
    assert_eq!(state, State::Exited(Exit::Status(3)));
    assert_eq!(console.matches("private ").count(), 9, "{console}");
    assert!(
        !console.contains("WRITABLE") && !console.contains("SEEN"),
        "{console}"
    );
    assert!(console.contains("\nshown\n1\n"), "{console}");
    let none = "0".repeat(16);
    let status = format!(
        "CapInh:{none} CapPrm:{none} CapEff:{none} CapBnd:{none} CapAmb:{none} NoNewPrivs:1 \n4\n666\n"
    );
    assert!(console.contains(&status), "{console}");
    let home = format!("/home/bmat-{}\n", worker.to_string().to_lowercase());
    assert!(console.contains(&home.repeat(2)), "{console}");
    assert!(console.contains("no mount"), "{console}");
    stage.finish(&[worker]);
}

#[test]
fn how_an_agent_ended_is_reported() {
    let stage = Stage::new();
    let client = stage.client();
    for (script, exit) in [
        ("exit 0", Exit::Unknown),
        ("exit 7", Exit::Status(7)),
        ("kill -9 $$", Exit::Signal(9)),
        ("(read -t 0.1 < <(:); exit 5) & exit 0", Exit::Status(5)),
        ("(exec bash -c 'kill -11 $$') & exit 0", Exit::Signal(11)),
    ] {
        let worker = created(&client, "c");
        let (state, console) = run(&client, worker, script);
        // An agent that `install` did not leave behind may have ended before anybody could look.
        let quick = matches!(state, State::Exited(Exit::Unknown | Exit::Status(0)));
        assert!(
            state == State::Exited(exit) || (script.ends_with("exit 0") && quick),
            "{script}: {state:?}\n{console}"
        );
        assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    }
    stage.finish(&[]);
}

#[test]
fn an_agent_that_is_no_program_fails_with_the_kernels_reason() {
    let stage = Stage::new();
    let client = stage.client();
    let worker = created(&client, "a");
    let Reply::Error(error) = install(&client, worker, sealed(b"\x7fNOT A PROGRAM")).0 else {
        panic!()
    };
    assert_eq!(error.kind, ErrorKind::Failed);
    assert!(
        error.message().contains("Exec format error"),
        "{}",
        error.message()
    );
    let (reply, mut console) = client.ask(&Request::Attach { worker });
    wait_until(&client, worker, |state| state == State::Exited(Exit::NotStarted));
    assert!(matches!(reply, Reply::Attached { .. }));
    assert!(read(&File::from(console.pop().unwrap())).contains("Exec format error"));
    stage.finish(&[worker]);
}

#[test]
fn agents_that_could_still_change_are_refused() {
    let stage = Stage::new();
    let client = stage.client();
    let worker = created(&client, "a");
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let open = |path: &std::path::Path| -> OwnedFd {
        fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap()
            .into()
    };
    let sparse = File::from(memory(b"x"));
    sparse.set_len(protocol::MAX_AGENT_BYTES + 1).unwrap();
    let seals = nix::fcntl::SealFlag::F_SEAL_WRITE
        | nix::fcntl::SealFlag::F_SEAL_GROW
        | nix::fcntl::SealFlag::F_SEAL_SHRINK;
    nix::fcntl::fcntl(&sparse, nix::fcntl::FcntlArg::F_ADD_SEALS(seals)).unwrap();
    let bad: Vec<OwnedFd> = vec![
        memory(b"#!/bin/true\n"),
        sealed(b""),
        sparse.into(),
        File::open("/bin/true").unwrap().into(),
        File::open("/").unwrap().into(),
        open(&fifo),
        open("/dev/null".as_ref()),
        Client::silent(&stage.host)
            .0
            .as_fd()
            .try_clone_to_owned()
            .unwrap(),
    ];
    for descriptor in bad {
        assert_eq!(kind(install(&client, worker, descriptor).0), ErrorKind::Refused);
        assert_eq!(state(&client, worker), State::Created);
    }
    stage.finish(&[worker]);
}

#[test]
fn descriptors_travel_only_where_a_message_calls_for_one() {
    let stage = Stage::new();
    let agent = sealed(b"#!/bin/true\n");
    let worker = created(&stage.client(), "a");
    for request in [
        Request::Hello { version: 1 },
        Request::Kill { worker },
        Request::List { after: None },
    ] {
        let client = if matches!(request, Request::Hello { .. }) {
            Client::silent(&stage.host)
        } else {
            stage.client()
        };
        client
            .0
            .send(&wire::encode(&request).unwrap(), Some(agent.as_fd()))
            .unwrap();
        assert!(
            client.reply().is_none(),
            "{request:?} with a descriptor was answered"
        );
    }
    let client = stage.client();
    client
        .0
        .send(
            &wire::encode(&Request::InstallAgent {
                worker,
                bootstrap: token(),
            })
            .unwrap(),
            None,
        )
        .unwrap();
    assert!(
        client.reply().is_none(),
        "InstallAgent without a descriptor was answered"
    );
    stage
        .helper
        .log
        .wait(&["hung up", "InstallAgent came with 0 descriptors"]);
    for count in [2, 3, 200] {
        use std::os::fd::AsRawFd;
        let client = stage.client();
        let bytes = wire::encode(&Request::InstallAgent {
            worker,
            bootstrap: token(),
        })
        .unwrap();
        let descriptors = vec![agent.as_raw_fd(); count];
        let rights = nix::sys::socket::ControlMessage::ScmRights(&descriptors);
        let packet = [std::io::IoSlice::new(&bytes)];
        let flags = nix::sys::socket::MsgFlags::empty();
        nix::sys::socket::sendmsg::<()>(client.0.as_raw_fd(), &packet, &[rights], flags, None).unwrap();
        assert!(
            client.reply().is_none(),
            "InstallAgent with {count} descriptors was answered"
        );
    }
    assert_eq!(state(&stage.client(), worker), State::Created);
    stage.finish(&[worker]);
}

#[test]
fn garbage_ends_its_connection_and_no_other() {
    let stage = Stage::new();
    let witness = stage.client();
    let good = wire::encode(&Request::Kill { worker: worker_id() }).unwrap();
    let mut packets: Vec<Vec<u8>> = vec![vec![0xff], vec![7], vec![0; 300], vec![1; 513], vec![0xfd; 4000]];
    packets.extend((1..good.len()).map(|len| good[..len].to_vec()));
    packets.push([&good[..], &good[..]].concat());
    packets.push([&good[..], &[0]].concat());
    for packet in &packets {
        let client = stage.client();
        client.0.send(packet, None).unwrap();
        assert!(client.reply().is_none(), "{packet:?} was answered");
    }
    assert_eq!(list(&witness), []);
    for bit in 0..good.len() * 8 {
        let mut flipped = good.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let client = stage.client();
        client.0.send(&flipped, None).unwrap();
        let _ = client.reply();
    }
    assert_eq!(list(&witness), []);
    stage.finish(&[]);
}

#[test]
fn the_greeting_comes_first_and_once_and_names_both_versions() {
    let stage = Stage::new();
    let client = Client::silent(&stage.host);
    assert_eq!(
        kind(client.ask(&Request::List { after: None }).0),
        ErrorKind::Refused
    );
    assert!(
        client.reply().is_none(),
        "the connection goes on without a greeting"
    );
    assert_eq!(
        kind(
            stage
                .client()
                .ask(&Request::Hello {
                    version: protocol::VERSION
                })
                .0
        ),
        ErrorKind::Refused
    );
    let client = Client::silent(&stage.host);
    let (reply, _) = client.ask(&Request::Hello { version: 999 });
    let Reply::Error(error) = reply else {
        panic!("{reply:?}")
    };
    assert_eq!(error.kind, ErrorKind::Version);
    assert!(error.message().contains("999") && error.message().contains(&protocol::VERSION.to_string()));
    assert!(client.reply().is_none());
    stage.finish(&[]);
}

#[test]
fn only_the_supervisors_uid_is_served() {
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", testbed::harness::SUPERVISOR_UID, SLOTS);
    let helper = host.helper();
    // Root passes every mode, so the socket lets it in; the helper does not.
    let client = Client::silent(&host);
    let _ = client.0.send(
        &wire::encode(&Request::Hello {
            version: protocol::VERSION,
        })
        .unwrap(),
        None,
    );
    assert!(client.reply().is_none(), "another uid was served");
    helper.log.wait(&["hung up", "uid=0"]);
    assert_eq!(
        fs::metadata(host.socket()).unwrap().permissions().mode() & 0o777,
        0o600
    );
}

#[test]
fn what_a_job_left_in_odd_shapes_is_deleted() {
    let stage = Stage::new();
    let client = stage.client();
    let worker = created(&client, "a");
    let script = r#"cd /work
        mkdir -p dark/inner; touch dark/inner/file; chmod 0 dark/inner dark
        touch -- "-rf" $'new\nline' $'\xff\xfe' "..." "$(printf 'x%.0s' {1..255})"
        ln -s /etc to-etc; ln -s /work/loop loop; mkfifo fifo
        python3 - <<'P'
import os, socket
socket.socket(socket.AF_UNIX).bind('/tmp/socket')
os.chdir('/work')
for i in range(3000):
    os.mkdir('d' * 100); os.chdir('d' * 100)
open('bottom', 'w').close()
os.chdir('/var/tmp')
for i in range(5000):
    open(str(i), 'w').close()
P
        chmod 0 /tmp /work "$HOME"
        ipcmk -M 4096 >/dev/null
        trap '' TERM HUP INT; (setsid nohup bash -c 'trap "" TERM; kill -STOP $$' &) ; echo made
        sleep 1000 & exit 0"#;
    let (reply, console) = install(
        &client,
        worker,
        sealed(format!("#!/bin/bash\n{script}").as_bytes()),
    );
    assert_eq!(reply, Reply::AgentStarted);
    wait_for_line(&console.unwrap(), "made");
    stage.finish(&[worker]);
}

#[test]
fn an_endless_console_is_bounded_and_harms_nobody() {
    let stage = Stage::new();
    let client = stage.client();
    let worker = created(&client, "a");
    let (reply, console) = install(&client, worker, sealed(b"#!/bin/bash\nyes & exec sleep 1000\n"));
    assert_eq!(reply, Reply::AgentStarted);
    let console = console.unwrap();
    let begin = Instant::now();
    while !read(&console).ends_with("was dropped]\n") {
        assert!(begin.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
    assert!(console.metadata().unwrap().len() < protocol::MAX_CONSOLE_BYTES + 100);
    assert!(console.write_at(b"x", 0).is_err(), "the console can be written");
    let mut byte = [0];
    assert_eq!((&console).read(&mut byte).unwrap(), 1);
    stage.finish(&[worker]);
}

#[test]
fn a_restarted_helper_changes_nothing_for_a_running_worker() {
    let mut stage = Stage::new();
    let client = stage.client();
    let worker = created(&client, "a");
    let (reply, console) = install(
        &client,
        worker,
        sealed(
            b"#!/bin/bash\n(for i in 1 2; do read -t 0.3 < <(sleep 1); echo $i; done; sleep 1000) & exit 0\n",
        ),
    );
    assert_eq!(reply, Reply::AgentStarted);
    let console = console.unwrap();
    let before = processes_of(&stage.host.uids);
    stage.helper.signal(Signal::SIGKILL);
    stage.helper.wait();
    stage.helper = stage.host.helper();
    wait_for_line(&console, "2");
    assert!(!before.is_empty());
    assert_eq!(state(&stage.client(), worker), State::Running);
    assert_eq!(
        kind(create(&stage.client(), worker_id(), "b")),
        ErrorKind::SlotTaken
    );
    // A connection outlives its helper, too.
    assert_eq!(state(&client, worker), State::Running);
    stage.finish(&[worker]);
}

#[test]
fn a_slot_that_left_the_configuration_is_still_cleaned_up() {
    let stage = Stage::new();
    let client = stage.client();
    let worker = created(&client, "c");
    let (reply, _) = install(&client, worker, sealed(b"#!/bin/bash\nsleep 1000 & exit 0\n"));
    assert_eq!(reply, Reply::AgentStarted);
    stage
        .host
        .configure("http://127.0.0.1:9", 0, SLOTS.split("[slots.c]").next().unwrap());
    assert_eq!(kind(create(&client, worker_id(), "c")), ErrorKind::NoSuchSlot);
    stage
        .host
        .configure("http://127.0.0.1:9", 0, "[slots.c]\ncolour = 1\n");
    assert_eq!(kind(create(&stage.client(), worker_id(), "a")), ErrorKind::Failed);
    stage.finish(&[worker]);
}

#[test]
fn a_second_helper_is_refused() {
    let stage = Stage::new();
    let mut second = std::process::Command::new(testbed::harness::binaries().join("user-factory-helper"));
    let mut second = Running::start(
        second
            .arg("--root")
            .arg(&stage.host.root)
            .args(["--cgroup", &stage.host.cgroup]),
    );
    assert!(!second.wait().success());
    second.log.wait(&["another helper serves"]);
    stage.finish(&[]);
}

#[test]
fn a_configuration_that_others_could_write_is_refused() {
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", 0, SLOTS);
    let path = host.root.join(protocol::config::CONFIG_PATH);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o664)).unwrap();
    let start = || {
        let mut command =
            std::process::Command::new(testbed::harness::binaries().join("user-factory-helper"));
        Running::start(
            command
                .arg("--root")
                .arg(&host.root)
                .args(["--cgroup", &host.cgroup]),
        )
    };
    let mut helper = start();
    assert!(!helper.wait().success());
    helper.log.wait(&["nobody else can write"]);
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &path).unwrap();
    let mut helper = start();
    assert!(!helper.wait().success());
    helper.log.wait(&["cannot open", "config.toml"]);
}

/// The state directory on a small file system of its own, of which the limits can be changed.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(host: &TestHost) -> SmallDisk {
        let place = host.root.join(protocol::config::STATE_DIR);
        let disk = SmallDisk(place);
        disk.command(&[
            "mount",
            "-t",
            "tmpfs",
            "-o",
            "mode=755,size=64m,nr_inodes=1000",
            "none",
        ]);
        disk
    }

    fn limit(&self, options: &str) {
        self.command(&["mount", "-o", &format!("remount,{options}")]);
    }

    fn command(&self, words: &[&str]) {
        let status = std::process::Command::new(words[0])
            .args(&words[1..])
            .arg(&self.0)
            .status()
            .unwrap();
        assert!(status.success(), "{words:?} failed");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        self.command(&["umount", "--lazy"]);
    }
}

#[test]
fn a_full_disk_at_any_step_leaves_a_worker_that_delete_removes() {
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", 0, SLOTS);
    let disk = SmallDisk::mount(&host);
    let _helper = host.helper();
    let client = Client::new(&host);
    let before = Census::take(&host);
    let mut outcomes = [0, 0, 0];
    // Inodes for ever more of the steps, then blocks; the first rounds fail at once, the last succeeds.
    let limits = (3..45)
        .map(|n| format!("nr_inodes={n},size=64m"))
        .chain((1..12).map(|n| format!("nr_inodes=1000,size={}k", 16 * n)));
    for limit in limits {
        disk.limit(&limit);
        let worker = worker_id();
        let step = match create(&client, worker, "a") {
            Reply::Error(error) => {
                assert_eq!(error.kind, ErrorKind::Failed, "{limit}: {error}");
                0
            }
            Reply::UserCreated { .. } => match install(
                &client,
                worker,
                sealed(&[b"#!/bin/true\n", &[b'#'; 60_000][..]].concat()),
            )
            .0
            {
                Reply::Error(error) => {
                    assert_eq!(error.kind, ErrorKind::Failed, "{limit}: {error}");
                    1
                }
                _ => 2,
            },
            other => panic!("{other:?}"),
        };
        outcomes[step] += 1;
        assert_eq!(
            client.ask(&Request::Delete { worker }).0,
            Reply::Deleted,
            "with {limit}"
        );
        before.assert_unchanged(&host);
    }
    assert!(
        outcomes.iter().all(|count| *count > 0),
        "not every step failed once: {outcomes:?}"
    );
}

#[test]
fn a_socket_from_systemd_is_served() {
    use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
    use std::os::fd::AsRawFd;
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", 0, SLOTS);
    let path = host.socket();
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    // Without close-on-exec, as systemd hands it over; bash then puts it where sd_listen_fds(3) says.
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::empty(), None).unwrap();
    bind(fd.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    listen(&fd, Backlog::new(8).unwrap()).unwrap();
    let script = format!(
        "exec 3<&{}; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"",
        fd.as_raw_fd()
    );
    let mut command = std::process::Command::new("bash");
    command
        .args(["-c", &script, "bash"])
        .arg(testbed::harness::binaries().join("user-factory-helper"));
    let helper = Running::start(
        command
            .arg("--root")
            .arg(&host.root)
            .args(["--cgroup", &host.cgroup]),
    );
    helper.log.wait(&["serving"]);
    drop(fd);
    assert_eq!(list(&Client::new(&host)), []);
}

#[test]
fn a_job_gets_its_slots_groups_and_devices() {
    let host = TestHost::new();
    let groups = fs::read_to_string("/etc/group").unwrap();
    let fields = groups.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let group = fields
        .clone()
        .find(|fields| fields[2] != "0")
        .expect("the host has a group besides root's");
    let slots = format!(
        "[slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\nadd_to_groups = [\"{}\"]\ndevices = [\"/dev/console\", \"/dev/null\"]\n",
        group[0]
    );
    host.configure("http://127.0.0.1:9", 0, &slots);
    let before = Census::take(&host);
    let _helper = host.helper();
    let client = Client::new(&host);
    let worker = created(&client, "a");
    let (_, console) = run(
        &client,
        worker,
        "id -G; stat -c '%t:%T %a %u' /dev/console; id -u; exit 1",
    );
    let lines: Vec<&str> = console.lines().collect();
    let uid = lines[2];
    assert_eq!(lines[0], format!("{uid} {}", group[2]), "{console}");
    assert_eq!(lines[1], format!("5:1 600 {uid}"), "{console}");
    assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    before.assert_unchanged(&host);
}

#[test]
fn a_range_without_a_free_uid_is_a_limit() {
    let mut host = TestHost::new();
    host.uids = *host.uids.start()..=*host.uids.start();
    host.configure("http://127.0.0.1:9", 0, SLOTS);
    let _helper = host.helper();
    let client = Client::new(&host);
    let worker = created(&client, "a");
    assert_eq!(kind(create(&client, worker_id(), "c")), ErrorKind::Limit);
    assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    let worker = created(&client, "c");
    assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
}

#[test]
fn too_many_connections_are_told_to_come_back() {
    let stage = Stage::new();
    let mut clients = Vec::new();
    loop {
        let client = Client::silent(&stage.host);
        let _ = client.0.send(
            &wire::encode(&Request::Hello {
                version: protocol::VERSION,
            })
            .unwrap(),
            None,
        );
        match client.reply().expect("an answer").0 {
            Reply::Welcome { .. } => clients.push(client),
            error => {
                assert_eq!(kind(error), ErrorKind::Busy);
                break;
            }
        }
        assert!(clients.len() <= 300, "there is no end to connections");
    }
    clients.clear();
    let begin = Instant::now();
    // As soon as their processes have ended there is room again.
    while !matches!(
        Client::silent(&stage.host)
            .ask(&Request::Hello {
                version: protocol::VERSION
            })
            .0,
        Reply::Welcome { .. }
    ) {
        assert!(begin.elapsed() < PATIENCE);
    }
    stage.finish(&[]);
}
