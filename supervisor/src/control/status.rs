//! What the core shows of itself: slots, workers and partners at one instant. It changes nothing.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use protocol::config::Config;
use protocol::{SlotName, UserName, WorkerId};

use super::{Factory, PeerState};
use crate::call_error::Peer;
use crate::control::api::{self, SlotState};
use crate::worker::{Phase, Worker};

/// Milliseconds since 1970, for people.
pub fn time(ms: u64) -> Timestamp {
    let ms = i64::try_from(ms).unwrap_or(i64::MAX);
    Timestamp::from_millisecond(ms).unwrap_or(Timestamp::MAX)
}

/// What all slots are looked up in.
struct Taken<'a> {
    workers: BTreeMap<&'a SlotName, &'a Worker>,
    /// By which used slot.
    excluded: BTreeMap<&'a SlotName, &'a SlotName>,
}

impl Factory {
    /// The host's clock is so many milliseconds ahead of the core's time: whatever is shown is in the former.
    pub fn set_ahead(&mut self, ahead: i64) {
        self.ahead = ahead;
    }

    /// Milliseconds of the core's time, for people.
    pub fn time(&self, ms: u64) -> Timestamp {
        time(ms.saturating_add_signed(self.ahead))
    }

    /// What the configuration file says else than the configuration in use.
    pub fn file_difference(&self) -> Option<&str> {
        self.file_differs
            .as_ref()
            .map(|(_, difference)| difference.as_str())
    }

    pub fn draining(&self) -> bool {
        self.draining
    }

    /// How the server is; `address` is where it was asked.
    pub fn server_status(&self, address: String) -> api::PeerStatus {
        self.peer(Peer::Server, &self.server, address)
    }

    /// How the helper is; `address` is where it was asked.
    pub fn helper_status(&self, address: String) -> api::PeerStatus {
        self.peer(Peer::Helper, &self.helper, address)
    }

    fn peer(&self, peer: Peer, state: &PeerState, address: String) -> api::PeerStatus {
        let asked = state.away || state.answered_at.is_some();
        api::PeerStatus {
            address,
            reachable: asked.then_some(!state.away),
            since: self.time(state.since),
            trouble: state.away.then(|| state.error.clone()),
            unanswered_since: self.unanswered_since(peer).map(|since| self.time(since)),
        }
    }

    /// Every slot of the configuration, in the order of names, and those that only a worker still has.
    pub fn slots(&self, now: u64) -> Vec<api::Slot> {
        let used = self.used();
        let taken = Taken {
            workers: self.workers.values().map(|w| (&w.slot, w)).collect(),
            excluded: self.plan.excluded(&used),
        };
        let removed = self.workers.values().map(|w| &w.slot);
        let removed = removed.filter(|slot| !self.config.slots.contains_key(*slot));
        let names: BTreeSet<&SlotName> = self.config.slots.keys().chain(removed).collect();
        names
            .into_iter()
            .map(|slot| self.slot(now, slot, &taken))
            .collect()
    }

    fn slot(&self, now: u64, name: &SlotName, taken: &Taken<'_>) -> api::Slot {
        let target = self.config.slots.get(name).map(|slot| slot.target);
        let worker = taken.workers.get(name).copied();
        let pending = self.pending_workers.iter().find(|p| p.slot == *name);
        let orphan = self
            .orphans
            .iter()
            .find(|(_, (slot, _))| slot.as_ref() == Some(name));
        let (state, because) = if let Some(worker) = worker {
            match worker.phase {
                _ if target.is_none() => (SlotState::Removed, Some("it goes with its worker".into())),
                Phase::Broken { .. } => (SlotState::Broken, worker.failure.clone()),
                _ if worker.hold => (SlotState::Held, Some("held on the server".into())),
                phase => (SlotState::Busy, Some(phase.name().to_owned())),
            }
        } else if pending.is_some() {
            (SlotState::Busy, Some("leased".into()))
        } else if let Some((id, _)) = orphan {
            (
                SlotState::Busy,
                Some(format!("nobody's worker {id} is being deleted")),
            )
        } else if self.drained_slots.contains(name) {
            (SlotState::Draining, None)
        } else if let Some(other) = taken.excluded.get(name) {
            (SlotState::Blocked, Some(format!("conflicts with {other}")))
        } else if let Some(rest) = self.cooldowns.get(name).filter(|rest| rest.until > now) {
            (
                SlotState::Resting,
                Some(format!(
                    "until {}",
                    self.time(rest.until)
                        .round(jiff::Unit::Second)
                        .unwrap_or(self.time(rest.until))
                )),
            )
        } else if let Some(why) = self.not_taken() {
            let state = if self.draining {
                SlotState::Draining
            } else {
                SlotState::Closed
            };
            (state, Some(why))
        } else {
            (SlotState::Free, None)
        };
        api::Slot {
            name: name.clone(),
            target,
            state,
            because,
            worker: worker.map(|w| w.id).or(orphan.map(|(id, _)| *id)),
            job: worker
                .and_then(|w| w.job.clone())
                .or(pending.map(|p| p.job.clone())),
            since: worker.map(|w| time(w.id.made_at())),
        }
    }

    /// Every worker, in the order of their ids: the oldest first.
    pub fn shown(&self) -> Vec<api::Worker> {
        self.workers.values().map(|w| self.shown_one(w)).collect()
    }

    fn shown_one(&self, worker: &Worker) -> api::Worker {
        let runtime = self.runtimes.get(&worker.id);
        let on_host = self.on_host.get(&worker.id);
        let trouble = runtime
            .map(|r| r.last_error.clone())
            .filter(|text| !text.is_empty());
        api::Worker {
            id: worker.id,
            slot: worker.slot.clone(),
            phase: worker.phase.name().to_owned(),
            since: self.time(worker.since),
            job: worker.job.clone(),
            user: UserName::from(worker.id).to_string(),
            uid: on_host.map(|info| info.uid.get()),
            disk: on_host.and_then(|info| info.disk),
            hold: worker.waits_since().map(|since| self.time(since)),
            failure: worker.failure.clone(),
            next: next(worker, trouble.as_deref()),
            trouble,
        }
    }

    /// Since when a call of this side has had no answer, in milliseconds since 1970, where that is longer than calls take.
    pub fn unanswered_since(&self, peer: Peer) -> Option<u64> {
        self.unanswered.get(&peer).copied()
    }

    /// Why no jobs are taken, whatever slot is free.
    pub fn not_taken(&self) -> Option<String> {
        let failure = self.lease_failed.as_ref();
        self.not_asked_for().or_else(|| {
            let failure = failure?;
            let at = self.time(failure.retry_at);
            let at = at.round(jiff::Unit::Second).unwrap_or(at);
            Some(format!("{}; the next question is at {at}", failure.sentence))
        })
    }

    /// Why the server is not asked for jobs, whatever slot is free.
    pub(super) fn not_asked_for(&self) -> Option<String> {
        let why = if self.draining {
            "all slots are drained: `user-factory resume` takes jobs again"
        } else if self.storage.is_some() {
            "the supervisor's state cannot be saved"
        } else if self.foreign.is_listed() {
            "another host may use this factory's token"
        } else if self.server.away {
            "the server is away"
        } else if self.helper.away {
            "the helper is away"
        } else if self.unanswered_since(Peer::Helper).is_some() {
            "the helper is not answering"
        } else if self.unanswered_since(Peer::Server).is_some() {
            "the server is not answering"
        } else if let Some(difference) = self.file_difference() {
            difference
        } else if !self.reconciled {
            "the server and the helper have not both answered yet"
        } else {
            return None;
        };
        Some(why.to_owned())
    }

    /// Why the state cannot be saved, or may soon not be.
    pub fn storage_problem(&self) -> Option<&String> {
        self.storage.as_ref()
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Is this slot in the configuration?
    pub fn has_slot(&self, slot: &SlotName) -> bool {
        self.config.slots.contains_key(slot)
    }

    /// Is this worker known?
    pub fn knows(&self, worker: WorkerId) -> bool {
        self.workers.contains_key(&worker)
    }
}

/// What happens next, or what a person has to do: the sentence under `show`.
fn next(worker: &Worker, trouble: Option<&str>) -> String {
    if trouble.is_some() && worker.next_action().is_some() {
        return "it is tried again by itself, more and more seldom; the trouble above says what to mend"
            .into();
    }
    match worker.phase {
        Phase::Broken { .. } if worker.kill.wanted => "its processes are being ended".into(),
        Phase::Broken { reported: false, .. } => "the server is being told that it failed".into(),
        Phase::Broken { reported: true, .. } => {
            "look into it (show, logs, shell), then release it on the server: it is deleted then".into()
        }
        Phase::Destroying | Phase::Destroyed => "it is being deleted".into(),
        _ if worker.hold => "somebody holds it on the server: it stays as it is until released there".into(),
        Phase::Reserved | Phase::Created => "its user and its agent are being made".into(),
        Phase::Running { online: false } => {
            "its agent has been started, and is to report to the server".into()
        }
        Phase::Running { online: true } => "its job runs; the server says when it is done with".into(),
        Phase::Resetting { .. } => "it was lost before its job began, and is made again".into(),
    }
}
