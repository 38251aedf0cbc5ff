//! Workers that the database does not have. Those that may be another host's are left alone, the operator is told, and no
//! jobs are taken while the server lists one; only an operator's command deletes them.

use std::collections::BTreeMap;

use protocol::{State as HostState, WorkerId};

use super::entry::{Listed, OtherHost};
use super::{Factory, Level, Output};
use crate::buildomat::ServerWorker;
use crate::identity::Owner;
use crate::reconcile::NotOurs;
use crate::worker::OnHost;

/// One that is no longer listed is shown for so long: two hosts that share a token take turns otherwise, and each looks
/// well while the other has nothing.
pub const SHOWN_MS: u64 = 600_000;
/// So many are kept at most, whatever a server lists. More of them take no jobs away than one does.
const MAX_SHOWN: usize = 100;

impl Factory {
    /// Note since when the server lists those that the database does not have.
    pub(super) fn note_unknown(&mut self, now: u64, list: &[ServerWorker]) {
        let mut before: BTreeMap<WorkerId, Listed> = BTreeMap::new();
        for (id, entry) in &mut self.entries {
            let listed = entry.unknown_mut().and_then(|unknown| unknown.listed.take());
            before.extend(listed.map(|listed| (*id, listed)));
        }
        for w in list {
            let Some(unknown) = self.entries.entry(w.id).or_default().unknown_mut() else {
                continue;
            };
            let new = Listed {
                turn: self.turn,
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
    pub(super) fn expire_other_hosts(&mut self, now: u64) {
        self.other_host_listed = false;
        for unknown in self.entries.values_mut().filter_map(|entry| entry.unknown_mut()) {
            unknown.to_delete &= unknown.listed.is_some();
            unknown
                .other_host
                .take_if(|other| now.saturating_sub(other.seen) >= SHOWN_MS);
        }
    }

    /// Does the server's list show this worker of the database with another host's mark? One whose end has begun does not
    /// count: that is this host's doing, or the operator's.
    pub(super) fn has_another_owner(&self, w: &ServerWorker) -> bool {
        let owned = self.owned(w.id);
        owned.is_some_and(|owned| !owned.worker.phase.is_ending())
            && matches!(self.identity.owner(w.private.as_deref()), Owner::Other(_))
    }

    pub(super) fn runs_here(&self, worker: WorkerId, host: Option<&BTreeMap<WorkerId, OnHost>>) -> bool {
        host.is_some_and(|list| list.get(&worker) == Some(&OnHost::Has(HostState::Running)))
    }

    /// A worker of the database turns out to be another host's. It is forgotten here, once a list of the host shows that
    /// it does not run here; what is left of it here goes when the server no longer has it.
    pub(super) fn leave_to_other_host(&mut self, id: WorkerId, host_is_listed: bool, turn: u64) {
        let is_settled = self.owned(id).is_some_and(|owned| owned.calls.is_settled(turn));
        if !(host_is_listed && is_settled) {
            return;
        }
        let text = "another host has the worker, by its mark on the server: it is left to that one";
        self.log(Level::Warn, Some(id), text.to_owned());
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.release();
        }
        self.out.push(Output::Remove(id));
    }

    /// A worker may be another host's. The log has it once, for as long as there is any.
    pub(super) fn report(&mut self, now: u64, id: WorkerId, private: Option<String>, why: NotOurs) {
        let shown = self.entries.values().filter(|entry| entry.other_host().is_some());
        let shown = shown.count();
        self.other_host_listed = true;
        self.other_host_seen |= why == NotOurs::OtherHost;
        let Some(unknown) = self.entries.entry(id).or_default().unknown_mut() else {
            return;
        };
        if shown >= MAX_SHOWN && unknown.other_host.is_none() {
            return;
        }
        let since = unknown.other_host.as_ref().map_or(now, |other| other.since);
        let other = OtherHost {
            private,
            why,
            since,
            seen: now,
        };
        unknown.other_host = Some(other.clone());
        if shown == 0 {
            let text = self.other_host_text(id, &other);
            self.log(Level::Error, Some(id), text);
        }
    }

    /// What an operator should know of it, and do.
    pub fn other_host_text(&self, id: WorkerId, other: &OtherHost) -> String {
        let (mark, here) = (other.private.as_deref(), &self.identity);
        let marked = match mark {
            Some(mark) => format!("is marked {}", mark.escape_debug()),
            None => "is online without a mark".to_owned(),
        };
        let what = match other.why {
            NotOurs::OtherHost => format!(
                "worker {id} {marked}, and this host marks its own SLOT@{here}: another host uses this factory's token"
            ),
            NotOurs::NoMark => format!(
                "worker {id} {marked}, is not known here, and this host marks its own SLOT@{here}: another host may \
                 use this factory's token"
            ),
            NotOurs::Lost => format!(
                "worker {id} {marked}, as this host marks its own, and neither the database nor the host has it: it \
                 was lost with an older database, or another host is a copy of this one ({here})"
            ),
        };
        format!(
            "{what}. It is left alone, and no jobs are taken while it is there: give each host a factory and a token \
             of its own. If its host is gone for good: `user-factory destroy {id} --yes`"
        )
    }

    /// Is this a worker that may be another host's?
    pub fn may_be_another_hosts(&self, worker: WorkerId) -> bool {
        let entry = self.entries.get(&worker);
        entry.is_some_and(|entry| entry.other_host().is_some())
    }
}
