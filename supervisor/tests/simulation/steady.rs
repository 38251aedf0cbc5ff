//! One thing is wrong for an hour: it is said, and not again and again, and nobody is called more for it.

use std::collections::BTreeSet;

use crate::runner::simulate;
use crate::script::{Fate, Item, Kind, Misdeed, Mode, Script, Step};

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

fn refusal(code: u16, json: bool) -> Fate {
    Fate::Status {
        code,
        json,
        done: false,
    }
}

/// Each of these, from the first minute on, for an hour.
fn faults() -> Vec<(&'static str, Vec<Item>)> {
    let long = 2 * HALF_HOUR;
    let every = |kind, fate| vec![Item::Every(kind, fate, long)];
    let agents = |misdeed| vec![Item::Agent(misdeed); 1_000];
    let old_server = [vec![Item::OldServer(long)], agents(Misdeed::DiesEarly)].concat();
    let untold = |fate| [every(Kind::Fail, fate), agents(Misdeed::DiesEarly)].concat();
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
        ("lists make no sense", every(Kind::Workers, Fate::Truncated)),
        ("lists are pages", every(Kind::Workers, Fate::Html)),
        ("lists come from elsewhere", every(Kind::Workers, Fate::OtherIds)),
        ("leases are refused", every(Kind::Lease, refusal(403, true))),
        ("leases are lost", every(Kind::Lease, Fate::LostAnswer)),
        ("leases come from elsewhere", every(Kind::Lease, Fate::OtherIds)),
        ("workers are refused", every(Kind::Make, refusal(403, true))),
        (
            "workers are refused by a proxy",
            every(Kind::Make, refusal(403, false)),
        ),
        ("no worker can be made", every(Kind::Make, refusal(500, true))),
        ("slots cannot be told", every(Kind::Associate, refusal(500, true))),
        ("slots are refused", every(Kind::Associate, refusal(401, true))),
        ("deletions are refused", every(Kind::Delete, refusal(403, true))),
        ("deletions are lost", every(Kind::Delete, Fate::LostAnswer)),
        ("failures cannot be told", untold(refusal(500, true))),
        ("failures are stopped by a proxy", untold(refusal(404, false))),
        (
            "console lines are lost",
            [every(Kind::Append, Fate::LostAnswer), agents(Misdeed::DiesEarly)].concat(),
        ),
        ("the host cannot be listed", every(Kind::List, Fate::CouldNot)),
        ("the host answers garbage", every(Kind::List, Fate::Garbage)),
        ("users cannot be made", every(Kind::CreateUser, Fate::Busy)),
        (
            "the helper dies of users",
            every(Kind::CreateUser, Fate::Closed(crate::script::Extent::Half)),
        ),
        ("agents cannot be started", every(Kind::Install, Fate::Busy)),
        ("nothing can be deleted", every(Kind::HostDelete, Fate::CouldNot)),
        (
            "the helper dies of deletions",
            every(Kind::HostDelete, Fate::Closed(crate::script::Extent::Nothing)),
        ),
        ("the server is old", old_server),
        ("agents die", agents(Misdeed::DiesEarly)),
        ("agents are killed", agents(Misdeed::KilledEarly)),
        ("agents stay away", agents(Misdeed::NeverOnline)),
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
        calm_at: 2 * HALF_HOUR,
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
