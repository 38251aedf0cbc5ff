//! Bounds on the calls of any sixty seconds.

use std::collections::{BTreeMap, VecDeque};

use protocol::WorkerId;

use crate::script::CallKind;

const WINDOW_MS: u64 = 60_000;

#[derive(Debug, Default)]
pub struct CallRates {
    calls: BTreeMap<(CallKind, Option<WorkerId>), VecDeque<u64>>,
    starts: VecDeque<u64>,
    leases: VecDeque<u64>,
    rollbacks: VecDeque<u64>,
}

fn recent(times: &mut VecDeque<u64>, now: u64) -> usize {
    while times.front().is_some_and(|at| at + WINDOW_MS < now) {
        times.pop_front();
    }
    times.len()
}

impl CallRates {
    pub fn started(&mut self, now: u64) {
        self.starts.push_back(now);
    }

    pub fn rolled_back(&mut self, now: u64) {
        self.rollbacks.push_back(now);
    }

    pub fn leased(&mut self, now: u64) {
        self.leases.push_back(now);
    }

    /// A call has been made. An error where it is one too many.
    pub fn called(&mut self, now: u64, kind: CallKind, about: Option<WorkerId>) -> Result<(), String> {
        let starts = recent(&mut self.starts, now);
        let leases = recent(&mut self.leases, now);
        let rollbacks = recent(&mut self.rollbacks, now);
        let times = self.calls.entry((kind, about)).or_default();
        times.push_back(now);
        let many = recent(times, now);
        let bound = bound(kind, starts, leases, rollbacks);
        if many > bound {
            let about = about.map(|id| format!(" for {id}")).unwrap_or_default();
            return Err(format!(
                "{many} calls {kind:?}{about} in a minute, more than {bound}"
            ));
        }
        if self.calls.len() > 2_000 {
            self.calls
                .retain(|_, times| times.back().is_some_and(|at| at + WINDOW_MS >= now));
        }
        Ok(())
    }
}

/// The most calls of a kind in any minute; for those about a worker or a job, about one and the same. `starts`,
/// `leases` and `rollbacks`: how often in it the supervisor was started, a job was leased, and the server's database
/// was rolled back. A new run knows nothing of the waits of the previous one; what a server has forgotten it is told
/// again.
fn bound(kind: CallKind, starts: usize, leases: usize, rollbacks: usize) -> usize {
    match kind {
        // One a poll, and polls are a second apart; a new run begins with one.
        CallKind::Workers => 61 + starts,
        // And an operator asks for the status once a minute.
        CallKind::List => 63 + starts,
        // The same; a leased job is a reason to ask for another. (One may have been leased just before.)
        CallKind::Lease => 62 + starts + leases,
        // Waits of 0.25, 0.5, 1 … 30 s at the least fill a minute with seven; two of a phase before.
        CallKind::Make | CallKind::Associate | CallKind::Delete | CallKind::Fail => {
            9 * (1 + starts) + rollbacks
        }
        // One in twenty seconds; a server that was rolled back gives a job more than once.
        CallKind::Renew => 10 + starts,
        // A line three times, and the lines of a console of which the first could not be sent.
        CallKind::Append => 30 * (1 + starts),
        // Waits of 0.25 s at first and 2.5 s at the least later.
        CallKind::CreateUser | CallKind::Install | CallKind::Attach | CallKind::HostDelete => {
            30 * (1 + starts)
        }
        // Two workers a page, and at most nine of them.
        CallKind::ListMore => 5 * (63 + starts),
        CallKind::File => 4 * (1 + starts),
    }
}
