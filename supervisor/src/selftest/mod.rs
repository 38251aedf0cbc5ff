//! Does what is promised hold on this host? In each free slot a worker is made as for a job, and in it the program
//! `user-factory-probe` runs: it tries what a job must not be able to do, and what the slot promises.
//!
//! The worker is made by `user-factory-manual run`, so nothing of this is in the helper.

pub mod calls;
pub mod expected;
pub mod run;

use serde::{Deserialize, Serialize};

/// What became of a promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Ok,
    Failed,
    /// This kernel or file system cannot keep it, and the configuration or a page says that it need not.
    NotEnforced,
    /// It would take too long, or too much of the host.
    NotTried,
}

impl Outcome {
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
    pub promise: String,
    pub tried: String,
    pub seen: String,
    pub outcome: Outcome,
}

impl Attempt {
    pub fn new(
        promise: &str,
        tried: impl Into<String>,
        seen: impl Into<String>,
        outcome: Outcome,
    ) -> Attempt {
        Attempt {
            promise: promise.into(),
            tried: tried.into(),
            seen: seen.into(),
            outcome,
        }
    }
}

/// What was tried in one slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SlotReport {
    pub slot: String,
    /// Why nothing was tried: the slot, or one that conflicts with it, has a worker.
    pub busy: Option<String>,
    pub attempts: Vec<Attempt>,
}

impl SlotReport {
    pub fn has_failed(&self) -> bool {
        self.attempts
            .iter()
            .any(|attempt| attempt.outcome == Outcome::Failed)
    }
}

/// Did all that was tried hold, in at least one slot?
pub fn holds(slots: &[SlotReport]) -> bool {
    slots.iter().any(|slot| slot.busy.is_none()) && !slots.iter().any(SlotReport::has_failed)
}
