//! The script of a seed.

use supervisor::backoff::Rng;

use crate::script::{
    AgentFault, CallFault, Change, Extent, Item, Mode, OF_HELPER, OF_SERVER, Point, Script, Step,
};

pub fn below(rng: &mut Rng, n: u64) -> u64 {
    rng.draw() % n.max(1)
}

fn pick<T: Copy>(rng: &mut Rng, from: &[T]) -> T {
    from[below(rng, from.len() as u64) as usize]
}

/// Mostly short, sometimes very long.
fn span(rng: &mut Rng) -> u64 {
    let most = pick(rng, &[500, 3_000, 20_000, 20_000, 90_000, 400_000]);
    1 + below(rng, most)
}

/// How long the supervisor stays down after its end.
fn down(rng: &mut Rng) -> u64 {
    pick(rng, &[0, 100, 100, 1_000, 1_000, 10_000, 10_000, 60_000, 600_000])
}

fn fault_of_server(rng: &mut Rng) -> CallFault {
    let json = below(rng, 2) == 0;
    let code = if json {
        pick(rng, &[401, 403, 408, 429, 500, 500, 503])
    } else {
        pick(rng, &[400, 403, 404, 404, 413, 500, 502, 502, 503, 504])
    };
    match below(rng, 11) {
        0 => CallFault::LostRequest,
        1 | 2 => CallFault::LostAnswer,
        3 => CallFault::Late(30_000 + below(rng, 120_000)),
        4 => CallFault::Twice {
            gap: below(rng, 20_000),
            second: json,
        },
        5 | 6 => CallFault::Status {
            code,
            json,
            done: below(rng, 2) == 0,
        },
        7 => CallFault::Html,
        8 => CallFault::Truncated,
        9 => CallFault::OtherIds,
        _ => CallFault::Slow(span(rng).min(29_000)),
    }
}

fn fault_of_helper(rng: &mut Rng) -> CallFault {
    match below(rng, 9) {
        0..3 => CallFault::Closed(pick(rng, &[Extent::Nothing, Extent::Half, Extent::All])),
        3 => CallFault::Busy,
        4 => CallFault::CouldNot,
        5 => CallFault::Garbage,
        6 => CallFault::LostAnswer,
        7 => CallFault::Late(60_000 + below(rng, 60_000)),
        _ => CallFault::Slow(span(rng)),
    }
}

fn mode(rng: &mut Rng) -> Mode {
    match below(rng, 6) {
        0 | 1 => Mode::Down,
        2 => Mode::Hung,
        3 => Mode::Slow(below(rng, 25_000)),
        4 => Mode::Errors,
        _ => Mode::Broken,
    }
}

/// The families of faults; a seed has some of them, so that each gets simulations of its own.
const FAMILIES: u64 = 20;

fn fault(rng: &mut Rng, family: u64) -> Item {
    let which = rng.draw() % 64;
    match family {
        0 => Item::Call(pick(rng, &OF_SERVER), fault_of_server(rng)),
        1 => Item::Call(pick(rng, &OF_HELPER), fault_of_helper(rng)),
        2 => match below(rng, 2) {
            0 => Item::Every(pick(rng, &OF_SERVER), fault_of_server(rng), span(rng)),
            _ => Item::Every(pick(rng, &OF_HELPER), fault_of_helper(rng), span(rng)),
        },
        3 => Item::Server(mode(rng), span(rng)),
        4 => match below(rng, 3) {
            0 => Item::Helper(mode(rng), span(rng)),
            1 => Item::HelperRestart(pick(rng, &[Extent::Nothing, Extent::Half, Extent::All])),
            _ => Item::Reboot(pick(rng, &[5_000, 60_000, 60_000, 900_000])),
        },
        19 => match below(rng, 4) {
            0 => Item::Suspend(pick(rng, &[30_000, 900_000, 86_400_000])),
            1 => Item::Damage(which),
            _ => Item::Undeletable(which, span(rng)),
        },
        // There is a second host from the first of these on.
        16..19 => match below(rng, 12) {
            0 => Item::SecondCrashes(down(rng)),
            1 | 2 => Item::SecondCut(span(rng)),
            3 if below(rng, 4) == 0 => Item::SecondIsLost,
            _ => Item::SecondStarts,
        },
        14 | 15 => match below(rng, 4) {
            0 => Item::DiskFull(span(rng)),
            1 => Item::DiskLow(span(rng)),
            _ => Item::DiskFullAfter(below(rng, 12), span(rng)),
        },
        // Dying is what all this is about.
        5 | 12 | 13.. => {
            let calls = [&OF_SERVER[..], &OF_HELPER].concat();
            match below(rng, 4) {
                0 => Item::Crash(down(rng)),
                1 => Item::CrashAfterSaves(1 + below(rng, 6), down(rng)),
                2 => {
                    let point = pick(rng, &[Point::Sent, Point::CarriedOut, Point::Answered]);
                    Item::CrashAt(pick(rng, &calls), point, down(rng))
                }
                _ => Item::CrashAt(pick(rng, &OF_HELPER), Point::HalfDone, down(rng)),
            }
        }
        6 => match below(rng, 4) {
            0 => Item::LoseDatabase(down(rng)),
            1 => Item::Stop(down(rng)),
            _ => {
                let year = 365 * 86_400;
                let by = pick(rng, &[30, 3_600, year, 40 * year]);
                Item::Clock(if below(rng, 2) == 0 { by } else { -by })
            }
        },
        7 => match below(rng, 10) {
            0 => Item::Agent(AgentFault::NeverOnline),
            1 => Item::Agent(AgentFault::LateOnline(span(rng))),
            2 => Item::Agent(AgentFault::DiesEarly),
            3 => Item::Agent(AgentFault::KilledEarly),
            4 => Item::Agent(AgentFault::DiesLate),
            5 => Item::Agent(AgentFault::KilledLate),
            6 => Item::Agent(AgentFault::TimesOut),
            7 => Item::Agent(AgentFault::KilledAtOnce),
            8 => Item::Agent(AgentFault::JobHangs),
            _ => Item::Kill(which),
        },
        8 => match below(rng, 4) {
            0 => Item::Hold(which),
            1 => Item::Release(which),
            2 => Item::Recycle(which),
            _ => Item::Cancel(which),
        },
        9 => match below(rng, 6) {
            0 => Item::Drain(span(rng)),
            1 => Item::DrainSlot(which, span(rng)),
            2 => Item::NoLeases(span(rng)),
            3 => Item::HoldNew(span(rng).min(60_000)),
            4 => Item::OldServer(span(rng)),
            _ => Item::ExpireLeases,
        },
        10 => Item::Rollback(below(rng, 10)),
        11 => {
            let delay = pick(rng, &[0, 0, 200, 5_000]);
            match below(rng, 6) {
                0 => Item::Config(Change::Add, delay),
                1 => Item::Config(Change::Remove(which), delay),
                2 => Item::Config(Change::Rename(which), delay),
                3 => Item::Config(Change::Conflicts(which), delay),
                4 => Item::Config(Change::Target(which), delay),
                _ => Item::InvalidConfig(span(rng).min(30_000)),
            }
        }
    }
}

/// The simulation of a seed.
pub fn script(seed: u64) -> Script {
    let rng = &mut Rng::new(seed);
    let slots = 3 + below(rng, 6);
    let jobs = 200;
    let every = 13_000 / slots;
    let mut steps = Vec::new();
    let mut at = 0;
    for _ in 0..jobs {
        at += below(rng, 2 * every);
        let takes = pick(rng, &[500, 2_000, 2_000, 5_000, 5_000, 15_000, 40_000]);
        let item = Item::Submit {
            target: below(rng, 3),
            takes: 200 + below(rng, takes),
        };
        steps.push(Step { at, item });
    }
    let families: Vec<u64> = (0..1 + below(rng, 6)).map(|_| below(rng, FAMILIES)).collect();
    let faults = pick(rng, &[3, 10, 30, 60, 100, 200]);
    for _ in 0..faults {
        let family = pick(rng, &families);
        let item = fault(rng, family);
        steps.push(Step {
            at: below(rng, at),
            item,
        });
    }
    steps.sort_by_key(|step| step.at);
    Script {
        seed,
        slots,
        poll_seconds: 1 + below(rng, 3),
        steps,
        faults_end_at: at + 30_000,
        settles: true,
    }
}
