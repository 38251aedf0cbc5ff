//! One server and three factories, each on a host with a network of its own, for the same target; one host is cut off
//! in the middle, and is back later. Needs root.
//!
//! The test starts its program again in a network namespace, where nothing else is.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};

use testbed::fake_server::{JobSpec, Server, ServerOptions, State, Ulid};
use testbed::harness::{Running, SUPERVISOR_UID, TEST_TIMEOUT, TestHost, binaries, tool};
use testbed::host_snapshot::HostSnapshot;
use testbed::test_factory::{TWO, lines};

const HOSTS: usize = 3;
const JOBS: usize = 60;
/// The server's, in the network that all share.
const SERVER: [u8; 4] = [10, 98, 0, 1];

fn ip(words: &str) {
    let output = Command::new("ip").args(words.split(' ')).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {words}: {errors}");
}

#[test]
fn sixty_jobs_end_once_each_on_three_hosts_of_which_one_is_cut_off_for_a_while() {
    let place = binaries();
    tool("ip");
    tool("setpriv");
    let output = Command::new(tool("unshare"))
        .arg("--net")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "end_to_end::fleet::fleet", "--ignored", "--nocapture"])
        .env("TESTBED_BINARIES", place)
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

/// A host with its factory. What is in its network ends with the first field.
struct Member {
    supervisor: Running,
    _helper: Running,
    host: TestHost,
    before: HostSnapshot,
    network: Network,
}

/// A network namespace that exists as long as a process in it, and its end of the cable.
struct Network {
    process: std::process::Child,
    cable: String,
}

impl Network {
    fn new(number: usize) -> Network {
        let mut process = Command::new("unshare")
            .args(["--net", "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // It says this once it is in there.
        use std::io::{Read, Write};
        process.stdin.as_mut().unwrap().write_all(b"!").unwrap();
        let mut word = [0];
        process.stdout.as_mut().unwrap().read_exact(&mut word).unwrap();
        let pid = process.id();
        let cable = format!("host{number}");
        ip(&format!("link add {cable} type veth peer name wire netns {pid}"));
        ip(&format!("link set {cable} master hub up"));
        let network = Network { process, cable };
        for words in [
            "link set lo up".to_owned(),
            format!("addr add 10.98.0.{}/24 dev wire", 10 + number),
            "link set wire up".to_owned(),
        ] {
            let status = network.inside("ip").args(words.split(' ')).status();
            assert!(status.unwrap().success(), "ip {words}");
        }
        network
    }

    fn inside(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{}/ns/net", self.process.id()));
        command.arg(program);
        command
    }

    /// The same command, in here.
    fn with(&self, plain: &Command) -> Command {
        let mut command = self.inside("setpriv");
        command.args(["--clear-groups", "--"]);
        command.arg(plain.get_program()).args(plain.get_args());
        command
    }

    fn plug(&self, word: &str) {
        ip(&format!("link set {} {word}", self.cable));
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        let _ = self.process.wait();
    }
}

impl Member {
    fn new(number: usize, server: &Server, target: Ulid) -> Member {
        let network = Network::new(number);
        let host = TestHost::new();
        let (_, token) = server.add_factory(&network.cable);
        let slots = TWO.replace("TARGET", &target.to_string());
        host.configure(&server.url(), SUPERVISOR_UID, &slots);
        host.write_token(&token);
        let before = HostSnapshot::of_unused(&host);
        let helper = Running::start(&mut network.with(&host.helper_command()));
        helper.log.wait(&["serving"]);
        let plain = host.supervisor_command();
        let mut command = network.inside("setpriv");
        let id = SUPERVISOR_UID.to_string();
        command.args(["--reuid", &id, "--regid", &id, "--clear-groups", "--"]);
        command.arg(plain.get_program()).args(plain.get_args());
        let supervisor = Running::start(&mut command);
        Member {
            supervisor,
            _helper: helper,
            host,
            before,
            network,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a part of the test above, which starts it"]
async fn fleet() {
    ip("link set lo up");
    // An address of its own: otherwise it has the lowest of its ports', and another with each host that is added, while those
    // before still send to the old one.
    ip("link add hub address 02:00:0a:62:00:01 type bridge");
    ip("addr add 10.98.0.1/24 dev hub");
    ip("link set hub up");
    let options = ServerOptions {
        listen: (SERVER, 0).into(),
        agent: Some(binaries().join("fake-agent")),
        ..ServerOptions::default()
    };
    let server = Server::start(options).await.unwrap();
    let target = server.add_target("linux");
    let members: Vec<Member> = (0..HOSTS)
        .map(|number| tokio::task::block_in_place(|| Member::new(number, &server, target)))
        .collect();
    let jobs: Vec<Ulid> = (0..JOBS)
        .map(|_| {
            let script = "echo begun; sleep 0.3; echo done";
            server.submit_job(JobSpec::script("linux", script)).unwrap()
        })
        .collect();
    let complete = |state: &State| jobs.iter().filter(|job| state.jobs[job].is_complete()).count();
    let hosts = |state: &State| {
        let workers = jobs.iter().filter_map(|job| state.jobs[job].worker);
        let factories: BTreeSet<Ulid> = workers.map(|worker| state.workers[&worker].factory).collect();
        factories.len()
    };
    let wait_for = async |what: &str, seen: &mut dyn FnMut(&State) -> bool| {
        let seen = server
            .wait_for(3 * TEST_TIMEOUT, |state| seen(state).then_some(()))
            .await;
        seen.unwrap_or_else(|e| {
            let logs: Vec<String> = members.iter().map(|m| m.supervisor.log.text()).collect();
            panic!("{what}: {e:#}\n{}", logs.join("\n---\n"))
        });
    };

    wait_for("a third of the jobs, and one of each host", &mut |state| {
        complete(state) >= JOBS / 3 && hosts(state) == HOSTS
    })
    .await;
    let cut = &members[1];
    cut.network.plug("down");
    cut.supervisor.log.wait(&["server unreachable"]);
    wait_for("two thirds, by the others", &mut |state| {
        complete(state) >= 2 * JOBS / 3
    })
    .await;
    cut.network.plug("up");
    cut.supervisor.log.wait(&["server back"]);
    wait_for("all jobs", &mut |state| complete(state) == JOBS).await;
    wait_for("the end of all workers", &mut |state| {
        state.workers.values().all(|worker| worker.deleted)
    })
    .await;

    for job in &jobs {
        let job = server.job(*job);
        assert_eq!(job.state(), "completed", "{:#?}", job.events);
        assert_eq!(lines(&job, "stdout"), ["begun", "done"], "it was not run once");
    }
    for member in &members {
        member.before.assert_unchanged(&member.host);
    }
    server.stop().await;
}
