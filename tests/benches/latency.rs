//! From a job in the queue to the first line of its output, through the real two processes, the fake server and the
//! fake agent: which waits for which.
//!
//! `cargo bench -p testbed --bench latency`; needs root. Jobs come one after the other, each at another moment of the
//! factory's poll interval.

use std::time::Duration;

use jiff::Timestamp;
use testbed::bench::{Group, Options, Report, Way};
use testbed::fake_server::{State, Ulid};
use testbed::harness::TEST_TIMEOUT;
use testbed::test_factory::TestFactory;

/// What is waited for, in this order, and who makes it happen.
const STEPS: [&str; 8] = [
    "queued to leased: the factory's next poll",
    "leased to made: the factory asks the helper, then the server for a worker",
    "made to associated: the factory tells the server the slot",
    "associated to user: the factory has the helper make the user",
    "user to agent: the factory has the helper start the agent",
    "agent to online: the agent installs itself, starts, and reports",
    "online to assigned: the server gives it the job",
    "assigned to first line: the agent's next ping, then the job",
];

/// The steps that are the factory's own.
const OWN: std::ops::Range<usize> = 1..5;

/// When each step of a job was over: the server's own times, and those of the supervisor's log.
async fn follow(factory: &TestFactory, job: Ulid) -> [Timestamp; STEPS.len() + 1] {
    let seen = factory.supervisor.log.len();
    let mut online = None;
    let see = |state: &State| {
        let job = &state.jobs[&job];
        if job.worker.is_some_and(|id| state.workers[&id].is_online()) {
            online.get_or_insert(Timestamp::now());
        }
        let line = job.events.iter().find(|event| event.payload == "first")?;
        Some((job.submitted, job.assigned, line.time))
    };
    let seen_by_server = factory.server.wait_for(TEST_TIMEOUT, see).await;
    let (submitted, assigned, line) = seen_by_server.unwrap_or_else(|e| panic!("{e:#}"));
    factory.wait_for_log_from(seen, &["worker phase", "phase=\"running\""]);
    let log = factory.supervisor.log.text_from(seen);
    let lines: Vec<&str> = log.lines().collect();
    let made = lines
        .iter()
        .position(|line| line.contains("call=\"make_worker\""));
    let made = made.expect("a worker was made");
    let after = |part: &str| {
        let line = lines[made..].iter().find(|line| line.contains(part));
        time_of(line.unwrap_or_else(|| panic!("no {part} in\n{log}")))
    };
    let leased = lines[..made].iter().rfind(|line| line.contains("call=\"lease\""));
    let online = online.expect("it has printed");
    [
        submitted,
        time_of(leased.expect("the job was leased")),
        time_of(lines[made]),
        after("call=\"associate\""),
        after("phase=\"created\""),
        after("phase=\"running\""),
        online,
        // A job that its worker was made for is assigned before that is online.
        assigned.expect("it has printed").max(online),
        line,
    ]
}

/// A line of the log begins with its time.
fn time_of(line: &str) -> Timestamp {
    let time = line.split_whitespace().next().unwrap_or_default();
    time.parse().unwrap_or_else(|e| panic!("{line}: {e}"))
}

#[tokio::main]
async fn main() {
    let options = Options::from_args();
    let mut report = Report::new("latency");
    let mut factory = TestFactory::new("[slots.a]\ntarget = \"TARGET\"\n").await;
    factory.restart_with_call_log();
    // The agent is downloaded once, by the first job.
    let first = factory.submit("echo first");
    factory.wait_completed(first).await;
    let jobs = options.size(100, 5);
    let mut steps = vec![Vec::new(); STEPS.len()];
    let (mut own, mut all) = (Vec::new(), Vec::new());
    for number in 0..jobs {
        idle(&factory).await;
        // All of the poll interval is met, evenly.
        tokio::time::sleep(Duration::from_secs(1) * number as u32 / jobs as u32).await;
        let job = factory.submit("echo first");
        let at = follow(&factory, job).await;
        let us = |from: usize, to: usize| at[from].duration_until(at[to]).as_secs_f64() * 1e6;
        for (step, samples) in steps.iter_mut().enumerate() {
            samples.push(us(step, step + 1));
        }
        own.push(us(OWN.start, OWN.end));
        all.push(us(0, STEPS.len()));
        factory.wait_completed(job).await;
    }
    let way = |name: &str, mut samples: Vec<f64>| {
        samples.sort_by(f64::total_cmp);
        Way {
            name: name.to_owned(),
            samples,
        }
    };
    let mut ways = vec![way("all: queued to first line", all)];
    ways.extend(STEPS.iter().zip(steps).map(|(name, samples)| way(name, samples)));
    ways.push(way("the factory's own: leased to agent started", own));
    let group = report.add(Group {
        title: "A job's way from the queue to its first line, on an idle factory".to_owned(),
        ways,
    });
    let own = group.ways.last().expect("just added").clone();
    report.aim(
        "the factory's own, median, in milliseconds",
        own.median() / 1e3,
        50.0,
    );
    report.aim(
        "the factory's own, p95, in milliseconds",
        own.quantile(0.95) / 1e3,
        50.0,
    );
    report.end(&options);
    factory.finish().await;
}

/// Wait until no worker is left on the server, and the factory has seen it.
async fn idle(factory: &TestFactory) {
    let gone = |state: &State| state.workers.values().all(|worker| worker.deleted).then_some(());
    factory.wait_for_state(gone).await;
    factory.wait_polls(2).await;
}
