//! One thing is wrong for an hour: it is said, and not again and again, and nobody is called more for it.

use std::collections::BTreeSet;

use crate::runner::simulate;
use crate::script::{AgentFault, CallFault, CallKind, Item, Mode, Script, Step};

const MINUTE: u64 = 60_000;
/// The simulation counts calls by it.
pub const HALF_HOUR: u64 = 30 * MINUTE;

/// The most warnings and errors in half an hour, once the fault has lasted for one: these, and for each worker that
/// the supervisor has to do with in it as many as it can be made again, and its end.
const MAX_LINES: usize = 4;
const MAX_LINES_A_WORKER: usize = 5;
/// The most calls in half an hour. Four a second are the polls, since four workers are two pages of the helper's list;
/// what the helper cannot do for one of four workers it is asked again every 2.5 s at the most.
const MAX_CALLS: u64 = 4 * 1_803 + 4 * 720;

fn refusal(code: u16, json: bool) -> CallFault {
    CallFault::Status {
        code,
        json,
        done: false,
    }
}

/// Each of these, from the first minute on, for an hour.
fn faults() -> Vec<(&'static str, Vec<Item>)> {
    let long = 2 * HALF_HOUR;
    let every = |kind, fault| vec![Item::Every(kind, fault, long)];
    let agents = |fault| vec![Item::Agent(fault); 1_000];
    let old_server = [vec![Item::OldServer(long)], agents(AgentFault::DiesEarly)].concat();
    let untold = |fault| [every(CallKind::Fail, fault), agents(AgentFault::DiesEarly)].concat();
    vec![
        ("nothing", vec![]),
        ("the server is down", vec![Item::Server(Mode::Down, long)]),
        ("the server hangs", vec![Item::Server(Mode::Hung, long)]),
        ("the server is slow", vec![Item::Server(Mode::Slow(20_000), long)]),
        ("a proxy answers 502", vec![Item::Server(Mode::Errors, long)]),
        ("the server answers 500", vec![Item::Server(Mode::Broken, long)]),
        ("the helper is down", vec![Item::Helper(Mode::Down, long)]),
        ("the helper hangs", vec![Item::Helper(Mode::Hung, long)]),
        ("the helper is slow", vec![Item::Helper(Mode::Slow(20_000), long)]),
        ("the helper is busy", vec![Item::Helper(Mode::Errors, long)]),
        ("the server is held", vec![Item::NoLeases(long)]),
        (
            "lists make no sense",
            every(CallKind::Workers, CallFault::Truncated),
        ),
        ("lists are pages", every(CallKind::Workers, CallFault::Html)),
        (
            "lists come from elsewhere",
            every(CallKind::Workers, CallFault::OtherIds),
        ),
        ("leases are refused", every(CallKind::Lease, refusal(403, true))),
        ("leases are lost", every(CallKind::Lease, CallFault::LostAnswer)),
        (
            "leases come from elsewhere",
            every(CallKind::Lease, CallFault::OtherIds),
        ),
        ("workers are refused", every(CallKind::Make, refusal(403, true))),
        (
            "workers are refused by a proxy",
            every(CallKind::Make, refusal(403, false)),
        ),
        ("no worker can be made", every(CallKind::Make, refusal(500, true))),
        (
            "slots cannot be told",
            every(CallKind::Associate, refusal(500, true)),
        ),
        (
            "slots are refused",
            every(CallKind::Associate, refusal(401, true)),
        ),
        (
            "deletions are refused",
            every(CallKind::Delete, refusal(403, true)),
        ),
        (
            "deletions are lost",
            every(CallKind::Delete, CallFault::LostAnswer),
        ),
        ("failures cannot be told", untold(refusal(500, true))),
        ("failures are stopped by a proxy", untold(refusal(404, false))),
        (
            "console lines are lost",
            [
                every(CallKind::Append, CallFault::LostAnswer),
                agents(AgentFault::DiesEarly),
            ]
            .concat(),
        ),
        (
            "the host cannot be listed",
            every(CallKind::List, CallFault::CouldNot),
        ),
        (
            "the host answers garbage",
            every(CallKind::List, CallFault::Garbage),
        ),
        (
            "users cannot be made",
            every(CallKind::CreateUser, CallFault::Busy),
        ),
        (
            "the helper dies of users",
            every(
                CallKind::CreateUser,
                CallFault::Closed(crate::script::Extent::Half),
            ),
        ),
        (
            "agents cannot be started",
            every(CallKind::Install, CallFault::Busy),
        ),
        (
            "nothing can be deleted",
            every(CallKind::HostDelete, CallFault::CouldNot),
        ),
        (
            "the helper dies of deletions",
            every(
                CallKind::HostDelete,
                CallFault::Closed(crate::script::Extent::Nothing),
            ),
        ),
        ("the server is old", old_server),
        ("agents die", agents(AgentFault::DiesEarly)),
        ("agents are killed", agents(AgentFault::KilledEarly)),
        ("agents stay away", agents(AgentFault::NeverOnline)),
        ("drained", vec![Item::Drain(long)]),
    ]
}

/// Four slots and more jobs than they can do.
fn script(items: &[Item]) -> Script {
    let mut steps: Vec<Step> = (0..400)
        .map(|n| Step {
            at: n * 100,
            item: Item::Submit {
                target: n % 3,
                takes: 20_000,
            },
        })
        .collect();
    steps.extend(items.iter().map(|item| Step {
        at: MINUTE,
        item: *item,
    }));
    Script {
        seed: 4,
        slots: 4,
        poll_seconds: 1,
        steps,
        faults_end_at: 2 * HALF_HOUR,
        settles: false,
    }
}

pub fn each() {
    let mut bad = Vec::new();
    for (name, items) in faults() {
        let script = script(&items);
        let outcome = simulate(&script, false);
        let warnings = outcome.trace.warnings();
        let lines: Vec<&str> = warnings
            .iter()
            .filter(|(at, _)| *at >= HALF_HOUR)
            .map(|(_, line)| line.as_str())
            .collect();
        let workers: BTreeSet<&str> = lines
            .iter()
            .filter_map(|line| line.split("worker=").nth(1)?.split(' ').next())
            .collect();
        let calls = outcome.report.calls_per_half_hour.get(&1).copied().unwrap_or(0);
        println!(
            "{:>4} lines about {:>3} workers, {calls:>6} calls: {name}",
            lines.len(),
            workers.len()
        );
        let too_many = lines.len() > MAX_LINES + MAX_LINES_A_WORKER * workers.len();
        if too_many || calls > MAX_CALLS || outcome.failure.is_some() {
            let some: Vec<&&str> = lines.iter().take(12).collect();
            bad.push(format!(
                "{name}: {} lines, {calls} calls, {:?}: {some:#?}",
                lines.len(),
                outcome.failure
            ));
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}
