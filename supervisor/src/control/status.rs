//! The status: what the core and the supervisor around it know at one instant. It changes nothing.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use protocol::{SlotName, Target, UserName, WorkerId};

use super::api::{self, SlotState};
use crate::call_error::Peer;
use crate::factory::drain::Drain;
use crate::factory::entry::Owned;
use crate::factory::unknown::SHOWN_MS;
use crate::factory::{Entry, Factory, PeerState, PendingWorker};
use crate::worker::{Phase, Worker};

/// Milliseconds since 1970, for display.
pub fn time(ms: u64) -> Timestamp {
    let ms = i64::try_from(ms).unwrap_or(i64::MAX);
    Timestamp::from_millisecond(ms).unwrap_or(Timestamp::MAX)
}

/// What the status is made of: the core and the time at which it is shown.
#[derive(Clone, Copy, Debug)]
pub struct StatusInput<'a> {
    /// The core, which is only read: nothing is decided here.
    pub factory: &'a Factory,
    /// The core's time, in milliseconds.
    pub now: u64,
    /// By how many milliseconds the host's clock is ahead of `now`: all that is shown is in the host's time.
    pub ahead: i64,
}

/// What the state of each slot is looked up in.
struct Taken<'a> {
    owned: BTreeMap<&'a SlotName, &'a Worker>,
    orphans: BTreeMap<&'a SlotName, WorkerId>,
    pending: BTreeMap<&'a SlotName, &'a PendingWorker>,
    /// Slots that are excluded, each with the used slot that conflicts with it.
    excluded: BTreeMap<&'a SlotName, &'a SlotName>,
    /// Slots for which a lost worker waits.
    reserved: &'a BTreeSet<SlotName>,
    /// A removed slot that still has a worker, where there are as many workers as slots.
    removed: Option<&'a SlotName>,
}

impl StatusInput<'_> {
    /// Milliseconds of the core's time, for display.
    pub fn time(&self, ms: u64) -> Timestamp {
        time(ms.saturating_add_signed(self.ahead))
    }

    fn rounded(&self, ms: u64) -> Timestamp {
        let at = self.time(ms);
        at.round(jiff::Unit::Second).unwrap_or(at)
    }

    /// How the server is; `address` is where it was asked.
    pub fn server(&self, address: String) -> api::PeerStatus {
        self.peer(Peer::Server, self.factory.server(), address)
    }

    /// How the helper is; `address` is where it was asked.
    pub fn helper(&self, address: String) -> api::PeerStatus {
        self.peer(Peer::Helper, self.factory.helper(), address)
    }

    fn peer(&self, peer: Peer, state: &PeerState, address: String) -> api::PeerStatus {
        let asked = state.is_unreachable || state.answered_at.is_some();
        let unanswered_since = self.factory.unanswered_since(peer);
        api::PeerStatus {
            address,
            reachable: asked.then_some(!state.is_unreachable),
            since: self.time(state.since),
            trouble: state.is_unreachable.then(|| state.error.clone()),
            unanswered_since: unanswered_since.map(|since| self.time(since)),
        }
    }

    /// Every slot of the configuration, in the order of names, and those that only a worker still has.
    pub fn slots(&self) -> Vec<api::Slot> {
        let used = self.factory.taken();
        let slots = &self.factory.config().slots;
        let orphans = self.factory.entries().iter();
        let taken = Taken {
            owned: self.factory.workers().map(|w| (&w.slot, w)).collect(),
            orphans: orphans
                .filter_map(|(id, entry)| Some((entry.orphan()?.slot.as_ref()?, *id)))
                .collect(),
            pending: self
                .factory
                .pending_workers()
                .iter()
                .map(|p| (&p.slot, p))
                .collect(),
            excluded: self.factory.schedule().excluded(&used),
            reserved: self.factory.reserved_slots(),
            removed: used
                .iter()
                .find(|slot| !slots.contains_key(*slot) && self.factory.schedule().is_full(&used)),
        };
        let removed = self.factory.workers().map(|w| &w.slot);
        let removed = removed.filter(|slot| !slots.contains_key(*slot));
        let names: BTreeSet<&SlotName> = slots.keys().chain(removed).collect();
        names.into_iter().map(|slot| self.slot(slot, &taken)).collect()
    }

    fn slot(&self, name: &SlotName, taken: &Taken<'_>) -> api::Slot {
        let configured = self.factory.config().slots.get(name);
        let worker = taken.owned.get(name).copied();
        let orphan = taken.orphans.get(name).copied();
        let pending = taken.pending.get(name).copied();
        let (state, because) = if let Some(worker) = worker {
            match worker.phase {
                _ if configured.is_none() => (SlotState::Removed, Some("it goes with its worker".into())),
                Phase::Broken { .. } => (SlotState::Broken, worker.failure.clone()),
                _ if worker.hold => (SlotState::Held, Some("held on the server".into())),
                phase => (SlotState::Busy, Some(phase.name().to_owned())),
            }
        } else if pending.is_some() {
            (SlotState::Busy, Some("leased".into()))
        } else if let Some(id) = orphan {
            let because = format!("orphaned worker {id} is being deleted");
            (SlotState::Busy, Some(because))
        } else if let Some(drain) = self.factory.drains().get(&Some(name.clone())) {
            let details = api_drain(None, drain).details();
            let details = details.trim_start_matches(" (").trim_end_matches(')');
            (
                SlotState::Draining,
                (!details.is_empty()).then(|| details.to_owned()),
            )
        } else if let Some(why) = self.factory.unresolved_target(name) {
            (SlotState::Closed, Some(why))
        } else if taken.reserved.contains(name) {
            let because = "a worker that was lost waits for it";
            (SlotState::Blocked, Some(because.into()))
        } else if let Some(other) = taken.excluded.get(name) {
            (SlotState::Blocked, Some(format!("conflicts with {other}")))
        } else if let Some(other) = &taken.removed {
            let because = format!("there are as many workers as slots, one in {other}, which was removed");
            (SlotState::Blocked, Some(because))
        } else if let Some(absence) = self.factory.usb_absences().get(name) {
            (SlotState::Absent, Some(absence.because()))
        } else if let Some(until) = self.factory.cooldown(name).filter(|until| *until > self.now) {
            let because = format!("until {}", self.rounded(until));
            (SlotState::CoolingDown, Some(because))
        } else if let Some(why) = self.not_taken() {
            let draining = self.factory.is_draining();
            let state = if draining {
                SlotState::Draining
            } else {
                SlotState::Closed
            };
            (state, Some(why))
        } else {
            (SlotState::Free, None)
        };
        let leased = pending.map(|pending| pending.job.clone());
        api::Slot {
            name: name.clone(),
            target: self.factory.schedule().target(name),
            target_name: configured.and_then(|slot| match &slot.target {
                Target::Name(name) => Some(name.clone()),
                Target::Id(_) => None,
            }),
            state,
            because,
            worker: worker.map(|w| w.id).or(orphan),
            job: worker.and_then(|w| w.job.clone()).or(leased),
            since: worker.map(|w| time(w.id.made_at())),
        }
    }

    /// Every worker, in the order of their ids: the oldest first.
    pub fn workers(&self) -> Vec<api::Worker> {
        let entries = self.factory.entries().values();
        entries
            .filter_map(|entry| Some(self.worker(entry, entry.owned()?)))
            .collect()
    }

    fn worker(&self, entry: &Entry, owned: &Owned) -> api::Worker {
        let (worker, on_host) = (&owned.worker, entry.on_host.as_ref());
        let error = Some(owned.calls.last_error.clone()).filter(|text| !text.is_empty());
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
            next: next_step(worker, error.as_deref()),
            trouble: error,
        }
    }

    /// What the operator has drained.
    pub fn drains(&self) -> Vec<api::Drain> {
        let drains = self.factory.drains().iter();
        drains
            .map(|(slot, drain)| api_drain(slot.clone(), drain))
            .collect()
    }

    /// Why no jobs are taken, whatever slot is free.
    pub fn not_taken(&self) -> Option<String> {
        if let Some(drain) = self.factory.drains().get(&None) {
            let details = api_drain(None, drain).details();
            return Some(format!(
                "all slots are drained{details}: `user-factory resume` takes jobs again"
            ));
        }
        if let Some(why) = self.factory.not_asked_for() {
            return Some(why.to_owned());
        }
        let (sentence, at) = self.factory.lease_failure()?;
        Some(format!(
            "{sentence}; the next lease request is at {}",
            self.rounded(at)
        ))
    }

    /// The workers that may be another host's.
    pub fn foreign_workers(&self) -> Vec<api::ForeignWorker> {
        let entries = self.factory.entries().iter();
        let foreign = entries.filter_map(|(id, entry)| Some((*id, entry.foreign()?)));
        foreign
            .filter(|(_, foreign)| self.now.saturating_sub(foreign.seen) < SHOWN_MS)
            .map(|(id, foreign)| api::ForeignWorker {
                id,
                private: foreign.private.clone(),
                since: self.time(foreign.since),
                text: self.factory.foreign_text(id, foreign),
            })
            .collect()
    }
}

fn api_drain(slot: Option<SlotName>, drain: &Drain) -> api::Drain {
    api::Drain {
        slot,
        reason: drain.reason.clone(),
        until: drain.until.map(time),
    }
}

/// What happens next, or what an operator has to do: the sentence under `show`.
fn next_step(worker: &Worker, error: Option<&str>) -> String {
    if error.is_some() && worker.next_action().is_some() {
        return "it is tried again by itself, more and more seldom; the problem above says what to correct"
            .into();
    }
    match worker.phase {
        Phase::Broken { .. } if worker.kill.is_needed => "its processes are being ended".into(),
        Phase::Broken { reported: false, .. } => "the server is being told that it failed".into(),
        Phase::Broken { reported: true, .. } => {
            "look into it (show, logs, shell), then release it on the server: it is deleted then".into()
        }
        Phase::Destroying | Phase::Destroyed => "it is being deleted".into(),
        _ if worker.hold => "it is held on the server: it stays as it is until released there".into(),
        Phase::Reserved | Phase::Created => "its user and its agent are being made".into(),
        Phase::Running { online: false } => {
            "its agent has been started, and is to report to the server".into()
        }
        Phase::Running { online: true } => "its job runs; the server says when it is done with".into(),
        Phase::Resetting { .. } => "it was lost before its job began, and is made again".into(),
    }
}
