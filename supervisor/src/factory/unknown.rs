//! Workers on the server that may be another host's: they are left alone, a person is told, and no jobs are taken
//! while the server lists one. Only the operator's word deletes them.

use std::collections::{BTreeMap, BTreeSet};

use protocol::{State, WorkerId};

use super::{Factory, Level, Output, Runtime};
use crate::buildomat::ServerWorker;
use crate::control::api;
use crate::identity::Owner;
use crate::reconcile::NotOurs;
use crate::worker::OnHost;

/// One that is no longer listed is shown for so long: two hosts that share a token take turns otherwise, and each looks
/// well while the other has nothing.
const SHOWN_MS: u64 = 600_000;
/// So many are kept at most, whatever a server lists. More of them take no jobs away than one does.
const MAX_SHOWN: usize = 100;

#[derive(Clone, Debug)]
struct Worker {
    private: Option<String>,
    why: NotOurs,
    since: u64,
    /// When it was last listed.
    seen: u64,
}

/// What is known of them.
#[derive(Debug, Default)]
pub(super) struct Foreign {
    workers: BTreeMap<WorkerId, Worker>,
    /// The operator wants these deleted.
    to_delete: BTreeSet<WorkerId>,
    /// The server's last list had one.
    listed: bool,
    others_seen: bool,
}

impl Foreign {
    pub(super) fn shows(&self, worker: WorkerId) -> bool {
        self.workers.contains_key(&worker)
    }

    pub(super) fn order_deletion(&mut self, worker: WorkerId) {
        self.to_delete.insert(worker);
    }

    pub(super) fn to_delete(&self) -> &BTreeSet<WorkerId> {
        &self.to_delete
    }

    /// Does the server's last list have one?
    pub(super) fn is_listed(&self) -> bool {
        self.listed
    }

    /// Has another host been seen, since this life began?
    pub(super) fn others_seen(&self) -> bool {
        self.others_seen
    }

    pub(super) fn forget(&mut self, worker: WorkerId) {
        self.workers.remove(&worker);
        self.to_delete.remove(&worker);
    }

    /// A new list is compared: what it does not have is forgotten in time.
    pub(super) fn retain(&mut self, now: u64, list: &[ServerWorker]) {
        let listed: BTreeSet<WorkerId> = list.iter().map(|w| w.id).collect();
        self.to_delete.retain(|id| listed.contains(id));
        self.workers.retain(|_, w| now.saturating_sub(w.seen) < SHOWN_MS);
        self.listed = false;
    }
}

impl Factory {
    /// Those of the store's workers that the server's list shows with another host's mark. One whose end has begun is
    /// not among them: that is this host's doing, or the operator's.
    pub(super) fn with_other_owners(&self, list: &[ServerWorker]) -> BTreeSet<WorkerId> {
        let other = |w: &&ServerWorker| {
            let known = self.workers.get(&w.id);
            known.is_some_and(|known| !known.phase.is_ending())
                && matches!(self.identity.owner(w.private.as_deref()), Owner::Other(_))
        };
        list.iter().filter(other).map(|w| w.id).collect()
    }

    pub(super) fn runs_here(&self, worker: WorkerId, host: Option<&BTreeMap<WorkerId, OnHost>>) -> bool {
        host.is_some_and(|list| list.get(&worker) == Some(&OnHost::Has(State::Running)))
    }

    /// A worker of the store turns out to be another host's. It is forgotten here, once a list of the host shows that
    /// it does not run here; what is left of it here goes when the server no longer has it.
    pub(super) fn leave_to_other_host(&mut self, worker: WorkerId, host_is_listed: bool, turn: u64) {
        let settled = |r: &Runtime| r.doing.is_none() && r.touched < turn;
        let settled = self.runtimes.get(&worker).is_none_or(settled);
        if !(host_is_listed && settled) {
            return;
        }
        let text = "another host has the worker, by its mark on the server: it is left to that one";
        self.log(Level::Warn, Some(worker), text.to_owned());
        self.runtimes.remove(&worker);
        self.workers.remove(&worker);
        self.out.push(Output::Remove(worker));
    }

    /// A worker may be another host's. The log has it once, for as long as there is any.
    pub(super) fn report(&mut self, now: u64, worker: WorkerId, private: Option<String>, why: NotOurs) {
        let first = self.foreign.workers.is_empty();
        self.foreign.listed = true;
        self.foreign.others_seen |= why == NotOurs::OtherHost;
        if self.foreign.workers.len() >= MAX_SHOWN && !self.foreign.shows(worker) {
            return;
        }
        let new = Worker {
            private: private.clone(),
            why,
            since: now,
            seen: now,
        };
        let entry = self.foreign.workers.entry(worker).or_insert(new);
        (entry.private, entry.why, entry.seen) = (private, why, now);
        let entry = entry.clone();
        if first {
            let text = self.foreign_text(worker, &entry);
            self.log(Level::Error, Some(worker), text);
        }
    }

    /// What a person should know of it, and do.
    fn foreign_text(&self, id: WorkerId, worker: &Worker) -> String {
        let (mark, here) = (worker.private.as_deref(), &self.identity);
        let marked = match mark {
            Some(mark) => format!("is marked {}", mark.escape_debug()),
            None => "is online without a mark".to_owned(),
        };
        let what = match worker.why {
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

    /// All of them, for who looks.
    pub fn foreign_workers(&self, now: u64) -> Vec<api::ForeignWorker> {
        let workers = self.foreign.workers.iter();
        workers
            .filter(|(_, worker)| now.saturating_sub(worker.seen) < SHOWN_MS)
            .map(|(id, worker)| api::ForeignWorker {
                id: *id,
                private: worker.private.clone(),
                since: self.time(worker.since),
                text: self.foreign_text(*id, worker),
            })
            .collect()
    }

    /// Is this a worker that may be another host's?
    pub fn is_foreign(&self, worker: WorkerId) -> bool {
        self.foreign.shows(worker)
    }

    /// How this host marks its workers, without the slot.
    pub fn mark(&self) -> String {
        self.identity.to_string()
    }
}
