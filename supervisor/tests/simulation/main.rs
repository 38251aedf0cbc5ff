//! The real supervisor in a simulation, driven by a seed.
//!
//! Everything of the supervisor is the product's own: the loop (`Driver`), the core, the store (SQLite, in memory-backed
//! files), the actions, and the reading of every answer. What it talks to is not: `net` stands where HTTP and the
//! helper's socket are, and behind it are a `server`, a `host`, `agents` and a clock that runs as fast as it can. A
//! `script` of jobs and faults is made from a `seed`, `simulation` lets it happen, `runner` runs the supervisor through
//! it, and ends it anywhere, and `invariants` looks at each call.
//!
//! ```text
//! cargo test --package supervisor --test simulation                     100,000 worker lives
//! LIVES=20000000 cargo test --package supervisor --test simulation      a night of them
//! FIRST=1000000 LIVES=… cargo test …                                    others: seeds from this one on
//! SEED=17 cargo test --package supervisor --test simulation             one simulation; with its trace where it fails
//! ```
//!
//! A seed that fails is made as short as it can be, and its trace printed; the same seed always gives the same trace.
mod agents;
mod call_rates;
mod calls;
mod checks;
mod disk;
mod faults;
mod helper_calls;
mod host;
mod invariants;
mod net;
mod plan;
mod report;
mod runner;
mod script;
mod second;
mod seed;
mod server;
mod server_calls;
mod shrink;
mod simulation;
mod steady;
mod trace;

use std::collections::BTreeMap;
use std::sync::Mutex;

use report::Report;
use script::Script;

fn number(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().expect("a number"))
}

/// The shortest script of a failure, with all that happened in it.
fn explain(script: &Script, failure: &str) -> String {
    let short = shrink::shrink(script, failure);
    let outcome = runner::simulate(&short, true);
    let steps: Vec<String> = short
        .steps
        .iter()
        .map(|step| format!("{:>10} ms  {:?}", step.at, step.item))
        .collect();
    format!(
        "seed {}: {failure}\n\n{} of {} steps are enough:\n{}\n\n{}\n=> {}\n\nSEED={} cargo test --package supervisor --test simulation",
        script.seed,
        short.steps.len(),
        script.steps.len(),
        steps.join("\n"),
        outcome.trace.lines().join("\n"),
        outcome.failure.unwrap_or_default(),
        script.seed,
    )
}

/// What all threads have simulated so far.
struct Progress {
    seed: u64,
    last: u64,
    report: Report,
    failed: Option<(u64, String)>,
}

/// Simulate seeds, one after another, until there are lives enough, or one has failed.
fn simulate_until(wanted: u64, progress: &Mutex<Progress>) {
    let lock = || progress.lock().expect("no thread has panicked");
    loop {
        let seed = {
            let mut progress = lock();
            let is_over = progress.report.lives >= wanted || progress.seed > progress.last;
            if is_over || progress.failed.is_some() {
                return;
            }
            progress.seed += 1;
            progress.seed - 1
        };
        let outcome = runner::simulate(&seed::script(seed), false);
        let mut progress = lock();
        progress.report.add(&outcome.report);
        if let Some(failure) = outcome.failure {
            progress.failed.get_or_insert((seed, failure));
        }
    }
}

#[test]
fn every_simulated_fault_keeps_the_invariants() {
    let only = number("SEED");
    let wanted = number("LIVES").unwrap_or(100_000);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let progress = Mutex::new(Progress {
        seed: only.or(number("FIRST")).unwrap_or(1),
        last: only.unwrap_or(u64::MAX),
        report: Report::default(),
        failed: None,
    });
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| simulate_until(wanted, &progress));
        }
    });
    let progress = progress.into_inner().expect("no thread has panicked");
    progress.report.print();
    if let Some((seed, failure)) = progress.failed {
        panic!("{}", explain(&seed::script(seed), &failure));
    }
    if only.is_some() {
        return;
    }
    let missing = progress.report.missing();
    assert!(
        missing.is_empty(),
        "{missing:?} never happened: let more of them run"
    );
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in 1..=12 {
        let script = seed::script(seed);
        let [first, second] = [(); 2].map(|()| runner::simulate(&script, true));
        assert!(first.trace.lines().len() > 100, "seed {seed} tells nothing");
        let (first, second) = (first.trace.lines(), second.trace.lines());
        if let Some(at) = (0..first.len().max(second.len())).find(|n| first.get(*n) != second.get(*n)) {
            let around = |lines: Vec<String>| lines[at.saturating_sub(3)..lines.len().min(at + 3)].join("\n");
            panic!(
                "seed {seed}, line {at}:\n{}\n---\n{}",
                around(first.clone()),
                around(second.clone())
            );
        }
    }
}

#[test]
fn a_lasting_fault_is_logged_once_and_adds_no_calls() {
    steady::each();
}

/// Not a test: what fails in so many simulations, by kind.
#[test]
#[ignore = "to reproduce a failure: SEEDS=300 cargo test --package supervisor --test simulation survey -- --ignored"]
fn survey() {
    let mut classes: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    let first = number("FIRST").unwrap_or(1);
    for seed in first..first + number("SEEDS").unwrap_or(300) {
        if let Some(failure) = runner::simulate(&seed::script(seed), false).failure {
            classes.entry(shrink::class(&failure)).or_default().push(seed);
        }
    }
    for (class, seeds) in classes {
        println!("{:>4} {class} {:?}", seeds.len(), &seeds[..seeds.len().min(6)]);
    }
}
