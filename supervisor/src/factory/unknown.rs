//! Workers that the database does not have. Those that may be another host's are left alone, the operator is told, and no
//! jobs are taken while the server lists one; only an operator's command deletes them.

use std::collections::BTreeMap;

use protocol::{State, WorkerId};

use super::entry::{ForeignInfo, ListEntry};
use super::{Factory, Level, Output};
use crate::buildomat::ServerWorker;
use crate::identity::Owner;
use crate::reconcile::ForeignReason;
use crate::worker::HostState;

/// One that is no longer listed is shown for so long: two hosts that share a token take turns otherwise, and each looks
/// well while the other has nothing.
pub const SHOWN_MS: u64 = 600_000;
/// The most foreign workers that are kept, whatever a server lists. One is enough to take no jobs.
const MAX_SHOWN: usize = 100;

impl Factory {
    /// Note since when the server lists those that the database does not have.
    pub(super) fn note_unknown(&mut self, now: u64, list: &[ServerWorker]) {
        let mut before: BTreeMap<WorkerId, ListEntry> = BTreeMap::new();
        for (id, entry) in &mut self.entries {
            let listed = entry.unknown_mut().and_then(|unknown| unknown.listed.take());
            before.extend(listed.map(|listed| (*id, listed)));
        }
        for w in list {
            let Some(unknown) = self.entries.entry(w.id).or_default().unknown_mut() else {
                continue;
            };
            let new = ListEntry {
                input_number: self.input_number,
                since: now,
            };
            let mut listed = before.remove(&w.id).unwrap_or(new);
            // It waits for an operator, not for a slot.
            if w.hold {
                listed.since = now;
            }
            unknown.listed = Some(listed);
        }
    }

    /// A new list is compared: what it does not have is forgotten in time.
    pub(super) fn expire_foreign(&mut self, now: u64) {
        self.foreign_listed = false;
        for unknown in self.entries.values_mut().filter_map(|entry| entry.unknown_mut()) {
            unknown.to_delete &= unknown.listed.is_some();
            unknown
                .foreign
                .take_if(|foreign| now.saturating_sub(foreign.seen) >= SHOWN_MS);
        }
    }

    /// Does the server's list show this worker of the database with another host's owner tag? One whose end has begun
    /// does not count: that is this host's doing, or the operator's.
    pub(super) fn has_another_owner(&self, w: &ServerWorker) -> bool {
        let owned = self.owned(w.id);
        owned.is_some_and(|owned| !owned.worker.phase.is_ending())
            && matches!(self.identity.owner(w.private.as_deref()), Owner::Other(_))
    }

    pub(super) fn runs_here(&self, worker: WorkerId, host: Option<&BTreeMap<WorkerId, HostState>>) -> bool {
        host.is_some_and(|list| list.get(&worker) == Some(&HostState::Has(State::Running)))
    }

    /// A worker of the database turns out to be another host's. It is forgotten here, once a list of the host shows that
    /// it does not run here; what is left of it here goes when the server no longer has it.
    pub(super) fn leave_to_owner(&mut self, id: WorkerId, host_is_listed: bool, input_number: u64) {
        let is_settled = self
            .owned(id)
            .is_some_and(|owned| owned.calls.is_settled(input_number));
        if !(host_is_listed && is_settled) {
            return;
        }
        let text = "another host has the worker, by its owner tag on the server: it is left to that one";
        self.log(Level::Warn, Some(id), text.to_owned());
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.release();
        }
        self.out.push(Output::Remove(id));
    }

    /// A worker may be another host's. The log has it once, for as long as there is any.
    pub(super) fn report(&mut self, now: u64, id: WorkerId, private: Option<String>, why: ForeignReason) {
        let shown = self.entries.values().filter(|entry| entry.foreign().is_some());
        let shown = shown.count();
        self.foreign_listed = true;
        self.foreign_seen |= why == ForeignReason::OtherOwner;
        let Some(unknown) = self.entries.entry(id).or_default().unknown_mut() else {
            return;
        };
        if shown >= MAX_SHOWN && unknown.foreign.is_none() {
            return;
        }
        let since = unknown.foreign.as_ref().map_or(now, |foreign| foreign.since);
        let foreign = ForeignInfo {
            private,
            why,
            since,
            seen: now,
        };
        unknown.foreign = Some(foreign.clone());
        if shown == 0 {
            let text = self.foreign_text(id, &foreign);
            self.log(Level::Error, Some(id), text);
        }
    }

    /// What an operator should know of it, and do.
    pub fn foreign_text(&self, id: WorkerId, foreign: &ForeignInfo) -> String {
        let (tag, here) = (foreign.private.as_deref(), &self.identity);
        let tagged = match tag {
            Some(tag) => format!("has the owner tag {}", tag.escape_debug()),
            None => "is online without an owner tag".to_owned(),
        };
        let what = match foreign.why {
            ForeignReason::OtherOwner => format!(
                "worker {id} {tagged}, and this host tags its own SLOT@{here}: another host uses this factory's token"
            ),
            ForeignReason::Untagged => format!(
                "worker {id} {tagged}, is not known here, and this host tags its own SLOT@{here}: another host may \
                 use this factory's token"
            ),
            ForeignReason::Lost => format!(
                "worker {id} {tagged}, as this host tags its own, and neither the database nor the host has it: it \
                 was lost with an older database, or another host is a copy of this one ({here})"
            ),
        };
        format!(
            "{what}. It is left alone, and no jobs are taken while it is there: give each host a factory and a token \
             of its own. If its host is gone for good: `user-factory destroy {id} --yes`"
        )
    }

    /// Is this a worker that may be another host's?
    pub fn may_be_foreign(&self, worker: WorkerId) -> bool {
        let entry = self.entries.get(&worker);
        entry.is_some_and(|entry| entry.foreign().is_some())
    }
}
