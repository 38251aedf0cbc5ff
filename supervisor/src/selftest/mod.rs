//! Does what is guaranteed hold on this host? In each free slot a worker is made as for a job, and in it the program
//! `user-factory-probe` runs: it tries what a job must not be able to do, and what the slot guarantees.
//!
//! The worker is made by `user-factory-manual run`, so nothing of this is in the helper.

pub mod calls;
pub mod expected;
pub mod run;

use serde::{Deserialize, Serialize};

/// What became of a guarantee.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// What was seen is what is guaranteed.
    Ok,
    /// What was seen is not what is guaranteed.
    Failed,
    /// This kernel or file system cannot keep it, and the configuration or a page says that it need not.
    NotEnforced,
    /// It would take too long, or too much of the host.
    NotTried,
}

impl Outcome {
    /// As the table has it.
    pub fn name(self) -> &'static str {
        match self {
            Outcome::Ok => "ok",
            Outcome::Failed => "FAILED",
            Outcome::NotEnforced => "not enforced",
            Outcome::NotTried => "not tried",
        }
    }
}

/// One attempt: a line of the table, and of what the probe prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// What must hold, in a few words.
    #[serde(rename = "promise")]
    pub guarantee: String,
    /// The call, file or address.
    pub tried: String,
    /// The error, or what came of it.
    pub seen: String,
    /// Does the guarantee hold?
    pub outcome: Outcome,
}

impl Attempt {
    /// A line of the table.
    pub fn new(
        guarantee: &str,
        tried: impl Into<String>,
        seen: impl Into<String>,
        outcome: Outcome,
    ) -> Attempt {
        Attempt {
            guarantee: guarantee.into(),
            tried: tried.into(),
            seen: seen.into(),
            outcome,
        }
    }
}

/// What was tried in one slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SlotReport {
    /// Its name in the configuration.
    pub slot: String,
    /// Why nothing was tried: the slot, or one that conflicts with it, has a worker, or a USB device of it is absent.
    pub busy: Option<String>,
    /// In the order in which they were made.
    pub attempts: Vec<Attempt>,
}

impl SlotReport {
    /// Did a guarantee not hold?
    pub fn has_failed(&self) -> bool {
        self.attempts
            .iter()
            .any(|attempt| attempt.outcome == Outcome::Failed)
    }
}

/// Characters of one part of [`failure`].
const SHOWN: usize = 200;

/// What did not hold, in one line without control characters: the first of it, and how much more there is.
pub fn failure(slots: &[SlotReport]) -> Option<String> {
    let attempts = slots
        .iter()
        .flat_map(|slot| slot.attempts.iter().map(|attempt| (&slot.slot, attempt)));
    let mut failed = attempts.filter(|(_, attempt)| attempt.outcome == Outcome::Failed);
    let (slot, first) = failed.next()?;
    // A job may have chosen names in it.
    let short = |text: &str| -> String {
        let plain = text.chars().map(|c| if c.is_control() { '?' } else { c });
        plain.take(SHOWN).collect()
    };
    let more = match failed.count() {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    Some(format!(
        "in slot {slot} it does not hold that {}: tried {}, seen {}{more}",
        short(&first.guarantee),
        short(&first.tried),
        short(&first.seen)
    ))
}

/// Did all that was tried hold, in at least one slot?
pub fn holds(slots: &[SlotReport]) -> bool {
    slots.iter().any(|slot| slot.busy.is_none()) && !slots.iter().any(SlotReport::has_failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_is_one_line_that_may_be_sent() {
        let slot = |outcomes: &[Outcome]| SlotReport {
            slot: "a".into(),
            busy: None,
            attempts: outcomes
                .iter()
                .map(|outcome| Attempt::new("it ends", "a\x1b[2J\nb", "x".repeat(5000), *outcome))
                .collect(),
        };
        assert_eq!(failure(&[slot(&[Outcome::Ok, Outcome::NotTried])]), None);
        let text = failure(&[slot(&[Outcome::Ok, Outcome::Failed]), slot(&[Outcome::Failed])]).unwrap();
        assert!(
            text.starts_with("in slot a it does not hold that it ends: tried a?[2J?b, seen xx"),
            "{text}"
        );
        assert!(text.ends_with("x; and 1 more"), "{text}");
        assert!(text.chars().count() <= 1000 && !text.chars().any(char::is_control));
    }
}
