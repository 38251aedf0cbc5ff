//! How many system calls an operation takes, of all the helper's processes together, up to the agent's first
//! instruction. A count does not depend on how busy the machine is, so this is what fails where the helper gets
//! slower; times are for `cargo bench`. Needs root.
//!
//! A number here may be raised, with a reason: it is what docs/performance.md says that a worker costs.

use std::os::fd::AsFd;

use protocol::config::STATE_DIR;
use protocol::{Reply, Request, WorkerId};
use testbed::harness::{Client, TestHost, sealed_memfd, worker_id};
use testbed::small_disk::SmallDisk;
use testbed::tracer::helper::{KINDS, TracedKind, WatchPeriod, watch};

/// At most so many, for each operation on a connection of its own, which takes some 40 of them. The monitor may be woken
/// meanwhile by a child that has ended, which takes five. The state directory is on an ext4 without quotas: a deletion that has
/// one to remove takes some 30 more. They are the same on x86-64 and aarch64.
const BUDGET: [(&str, usize); 5] = [
    ("CreateUser", 102),
    ("InstallAgent", 630),
    ("List", 70),
    ("Kill", 67),
    ("Delete", 399),
];

/// The least of so many tries: waiting for what the kernel does takes more or fewer polls.
const TRIES: usize = 3;

#[test]
fn an_operation_takes_no_more_system_calls_than_its_budget() {
    let host = TestHost::new();
    host.configure(
        "http://127.0.0.1:1",
        0,
        "[slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n",
    );
    std::fs::create_dir_all(host.root.join(STATE_DIR)).expect("the test's directory is writable");
    let _disk = SmallDisk::roomy(&host, false);
    let helper = host.start_helper();
    let agent = sealed_memfd(&std::fs::read("/bin/sleep").expect("every host has it"));
    let counted = |request: Request| {
        let watcher = watch(helper.pid(), WatchPeriod::OneConnection, None);
        let client = Client::new(&host);
        let descriptor = matches!(request, Request::InstallAgent { .. }).then(|| agent.as_fd());
        let (reply, _) = client.ask_with(&request, descriptor);
        assert!(!matches!(reply, Reply::Error(_)), "{reply:?}");
        drop(client);
        let seen = watcher.join().expect("the tracer saw the end");
        KINDS.map(|kind| seen.calls.get(&kind).map_or(0, Vec::len))
    };
    let request = |what: &str, worker: WorkerId| match what {
        "CreateUser" => {
            let slot = "a".parse().expect("it is a name");
            Request::CreateUser { worker, slot }
        }
        "InstallAgent" => {
            let bootstrap = "abcdefgh01234567".parse().expect("it is a token");
            Request::InstallAgent { worker, bootstrap }
        }
        "List" => Request::List { after: None },
        "Kill" => Request::Kill { worker },
        _ => Request::Delete { worker },
    };
    let mut least = [[usize::MAX; KINDS.len()]; BUDGET.len()];
    for _ in 0..TRIES {
        let worker = worker_id();
        for ((what, _), least) in BUDGET.iter().zip(&mut least) {
            let now = counted(request(what, worker));
            if now.iter().sum::<usize>() < least.iter().fold(0, |sum: usize, n| sum.saturating_add(*n)) {
                *least = now;
            }
        }
    }
    let mut over = Vec::new();
    println!("{:<14}{:>7}{:>7}  of which", "", "calls", "budget");
    for ((what, budget), kinds) in BUDGET.iter().zip(&least) {
        let all: usize = kinds.iter().sum();
        let parts: Vec<String> = KINDS
            .iter()
            .zip(kinds)
            .filter(|(_, n)| **n > 0)
            .map(|(kind, n)| format!("{} {n}", name(*kind)))
            .collect();
        println!("{what:<14}{all:>7}{budget:>7}  {}", parts.join(", "));
        if all > *budget {
            over.push(format!("{what} takes {all} system calls, and may take {budget}"));
        }
    }
    assert!(over.is_empty(), "{}: see docs/performance.md", over.join("; "));
}

fn name(kind: TracedKind) -> &'static str {
    match kind {
        TracedKind::Monitor => "monitor",
        TracedKind::Listener => "listener",
        TracedKind::Session => "session",
        TracedKind::AsUser => "as the user",
        TracedKind::MonitorRequest => "monitor request",
        TracedKind::Builder => "root file system",
        TracedKind::DeviceRefresh => "devices",
        TracedKind::FirstProcess => "first process",
        TracedKind::Agent => "agent",
    }
}
