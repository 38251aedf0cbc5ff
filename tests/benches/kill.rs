//! Ending a worker's processes, by `Kill` over the helper's socket: against writing `cgroup.kill` and waiting for
//! `populated 0`, which is the least that it can take.
//!
//!     cargo bench -p testbed --bench kill

use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use protocol::{Reply, Request, WorkerId};
use testbed::bench::{Group, Options, Report, c_program, time};
use testbed::harness::{Client, PAUSE, TestHost, sealed_memfd, worker_id};

fn main() {
    let options = Options::from_args();
    let crowds = [
        ("one", "1 process", "1", 100),
        ("hundred", "100 processes", options.size("100", "10"), 50),
        ("thousands", "5,000 processes", options.size("5000", "100"), 10),
        ("bomb", "A live fork bomb, limited to 1,000 processes", "bomb", 3),
    ];
    let host = TestHost::new();
    let slot = |(part, _, crowd, _): &(&str, &str, &str, usize)| {
        let most = if *crowd == "bomb" { 1_000 } else { 6_000 };
        format!(
            "[slots.{part}]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\nenv.CROWD = \"{crowd}\"\nlimits.processes = {most}\n"
        )
    };
    host.configure(
        "http://127.0.0.1:1",
        0,
        &crowds.iter().map(slot).collect::<String>(),
    );
    let _helper = host.start_helper();
    let tools = tempfile::tempdir().expect("a directory");
    let program = c_program(tools.path(), "crowd", &["-O2", "-static"]);
    let ways = Ways {
        client: Client::new(&host),
        agent: sealed_memfd(&fs::read(program).expect("it was built")),
        host,
    };
    let mut report = Report::new("kill");
    for (part, title, _, rounds) in crowds {
        if !options.wants(part) {
            continue;
        }
        let group = Group::measure(
            title,
            options.size(rounds, 1),
            vec![
                ("helper", Box::new(|| ways.by_the_helper(part))),
                ("cgroup.kill", Box::new(|| ways.by_the_kernel(part))),
            ],
        );
        let ratio = report.add(group).ratio("helper", "cgroup.kill");
        report.aim(title, ratio, 2.0);
    }
    report.end(&options);
}

struct Ways {
    client: Client,
    agent: OwnedFd,
    host: TestHost,
}

impl Ways {
    /// A worker whose crowd is there.
    fn crowd(&self, slot: &str) -> WorkerId {
        let worker = worker_id();
        let slot = slot.parse().expect("it is a name");
        self.client.ask(&Request::CreateUser { worker, slot });
        let bootstrap = "abcdefgh01234567".parse().expect("it is a token");
        let request = Request::InstallAgent { worker, bootstrap };
        let (reply, mut descriptors) = self.client.ask_with(&request, Some(self.agent.as_fd()));
        assert_eq!(reply, Reply::AgentStarted);
        let mut console = fs::File::from(descriptors.pop().expect("the console comes with it"));
        let mut text = String::new();
        while !text.contains('\n') {
            console.read_to_string(&mut text).expect("a file of root's");
            std::thread::sleep(PAUSE);
        }
        assert_eq!(text, "ready\n");
        worker
    }

    fn by_the_helper(&self, slot: &str) -> Duration {
        let worker = self.crowd(slot);
        let took = time(|| assert_eq!(self.client.ask(&Request::Kill { worker }).0, Reply::Killed));
        self.client.ask(&Request::Delete { worker });
        took
    }

    fn by_the_kernel(&self, slot: &str) -> Duration {
        let worker = self.crowd(slot);
        let cgroup = self.host.cgroup_dir().join("workers").join(worker.to_string());
        let took = time(|| {
            let events = fs::File::open(cgroup.join("cgroup.events")).expect("it has a cgroup");
            fs::write(cgroup.join("cgroup.kill"), "1").expect("root may");
            let populated = || {
                let text = fs::read_to_string(cgroup.join("cgroup.events")).expect("it has a cgroup");
                text.contains("populated 1")
            };
            while populated() {
                // What the kernel tells of a cgroup may come 10 ms later.
                let mut change = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
                poll(&mut change, PollTimeout::from(1u8)).expect("it can be polled");
            }
        });
        self.client.ask(&Request::Delete { worker });
        took
    }
}
