//! Making a failing script shorter: parts of it are left out for as long as the same thing still goes wrong.

use crate::runner::simulate;
use crate::script::Script;

/// The most simulations that are tried.
const TRIES: usize = 400;

/// What went wrong, without the names and numbers in it.
pub fn class(failure: &str) -> String {
    failure
        .split_whitespace()
        .filter(|word| !word.contains(|c: char| c.is_ascii_digit()))
        .take(12)
        .collect::<Vec<_>>()
        .join(" ")
}

/// The shortest script found that fails as this one does.
pub fn shrink(script: &Script, failure: &str) -> Script {
    let wanted = class(failure);
    let mut tries = 0;
    let mut best = script.clone();
    let mut parts = 2;
    while parts <= best.steps.len().max(2) && tries < TRIES && !best.steps.is_empty() {
        let size = best.steps.len().div_ceil(parts);
        let shorter = (0..best.steps.len()).step_by(size).find_map(|from| {
            tries += 1;
            let mut candidate = best.clone();
            candidate.steps.drain(from..(from + size).min(best.steps.len()));
            let outcome = simulate(&candidate, false);
            (outcome.failure.as_deref().map(class) == Some(wanted.clone())).then_some(candidate)
        });
        match shorter {
            Some(shorter) => {
                best = shorter;
                parts = (parts - 1).max(2);
            }
            None if size == 1 => break,
            None => parts = (parts * 2).min(best.steps.len()),
        }
    }
    sooner(best, &wanted)
}

/// The same, without the time before the first step, if it fails as well.
fn sooner(script: Script, wanted: &str) -> Script {
    let mut sooner = script.clone();
    let idle = sooner
        .steps
        .first()
        .map_or(0, |step| step.at)
        .saturating_sub(1_500);
    for step in &mut sooner.steps {
        step.at -= idle;
    }
    sooner.faults_end_at -= idle;
    let outcome = simulate(&sooner, false);
    if outcome.failure.as_deref().map(class).as_deref() == Some(wanted) {
        sooner
    } else {
        script
    }
}
