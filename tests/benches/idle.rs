//! What supervisor and helper take of a host on which nothing happens: memory, processor time, and wake-ups.
//!
//! `cargo bench -p testbed --bench idle`; needs root. Ten minutes, or with `--small` ten seconds.

use std::fs;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use testbed::bench::{Options, Report};
use testbed::test_factory::TestFactory;
use testbed::tracer::helper::listener;

/// What the kernel has counted for a process, over all its threads (`proc(5)`).
#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    /// Times that a thread went to sleep: as often was it woken.
    sleeps: u64,
    /// Times that one was interrupted.
    preempted: u64,
    /// Nanoseconds on a processor.
    ran: u64,
    threads: u64,
}

fn counted(pid: u32) -> Counted {
    let mut all = Counted::default();
    for task in fs::read_dir(format!("/proc/{pid}/task"))
        .expect("it runs")
        .flatten()
    {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).expect("the thread is there");
        let status = read("status");
        let field = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.expect("the kernel counts it")
                .trim()
                .parse()
                .expect("a number")
        };
        let ran = read("schedstat");
        all.sleeps += field("voluntary_ctxt_switches:");
        all.preempted += field("nonvoluntary_ctxt_switches:");
        all.ran += ran
            .split(' ')
            .next()
            .expect("three fields")
            .parse::<u64>()
            .expect("a number");
        all.threads += 1;
    }
    all
}

/// Resident, and its fair share of that, in KiB.
fn memory(pid: u32) -> (u64, u64) {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("it runs");
    let field = |name: &str| -> u64 {
        let line = rollup
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .expect("the kernel counts it");
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    };
    (field("Rss:"), field("Pss:"))
}

fn children(pid: u32) -> usize {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("it runs");
    list.split_whitespace().count()
}

/// Wait so long; returns how often the host's mounts have changed, of which the helper is woken to follow them.
fn mounts_changed_within(length: Duration) -> usize {
    let table = fs::File::open("/proc/self/mountinfo").expect("/proc is mounted");
    let end = Instant::now() + length;
    let mut changes = 0;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return changes;
        }
        let mut events = [PollFd::new(table.as_fd(), PollFlags::POLLPRI)];
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        changes += usize::from(poll(&mut events, left).expect("a table can be waited for") > 0);
    }
}

fn main() {
    let options = Options::from_args();
    let length = Duration::from_secs(options.size(600, 10));
    let slots: String = (0..64)
        .map(|n| format!("[slots.s{n}]\ntarget = \"TARGET\"\n"))
        .collect();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let factory = runtime.block_on(async {
        let factory = TestFactory::new(&slots).await;
        // What is made once is made: a job has been there.
        let job = factory.submit("true");
        factory.wait_completed(job).await;
        factory
            .wait_for_state(|state| state.workers.values().all(|w| w.deleted).then_some(()))
            .await;
        factory.wait_polls(3).await;
        factory
    });
    let processes = [
        ("helper", factory.helper.pid()),
        ("supervisor", factory.supervisor.pid()),
        ("listener", listener(factory.helper.pid())),
    ];
    let before = processes.map(|(_, pid)| counted(pid));
    let requests = factory.server.all_requests().values().sum::<u64>();
    let begin = Instant::now();
    let mounts = mounts_changed_within(length);
    let seconds = begin.elapsed().as_secs_f64();
    let requests = factory.server.all_requests().values().sum::<u64>() - requests;
    println!("\nIdle for {seconds:.0} s, with 64 slots");
    println!(
        "  {:<11} {:>8} {:>8} {:>8} {:>11} {:>9} {:>10} {:>9}",
        "", "resident", "share", "threads", "processor", "wake-ups", "preempted", "children"
    );
    let mut all = Vec::new();
    for ((name, pid), before) in processes.into_iter().zip(before) {
        let (after, (resident, share)) = (counted(pid), memory(pid));
        let (woken, preempted) = (after.sleeps - before.sleeps, after.preempted - before.preempted);
        let part = (after.ran - before.ran) as f64 / 1e7 / seconds;
        println!(
            "  {name:<11} {:>5.1} MB {:>5.1} MB {:>8} {part:>9.4} % {woken:>9} {preempted:>10} {:>9}",
            resident as f64 / 1024.0,
            share as f64 / 1024.0,
            after.threads,
            children(pid),
        );
        all.push((resident as f64 / 1024.0, part, woken as f64));
    }
    println!("  requests at the server: {requests}; changes of the host's mounts: {mounts}");
    let report = Report::new("idle");
    report.aim("helper resident, in MB", all[0].0, 3.0);
    report.aim(
        "helper's wake-ups that no change of the host's mounts explains",
        (all[0].2 - mounts as f64).max(0.0),
        0.0,
    );
    report.aim("supervisor resident, in MB", all[1].0, 25.0);
    report.aim("supervisor, in % of a processor", all[1].1, 0.1);
    runtime.block_on(factory.finish());
}
