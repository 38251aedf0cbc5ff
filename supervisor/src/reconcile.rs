//! Whose is what exists? The store, the server and the host can each disagree with the others after a
//! crash; this compares all three and adopts or deletes what the database does not have.
//!
//! Pure. It must only ever be asked with two whole and fresh lists: a list that could not be had says
//! nothing about anybody.

use std::collections::{BTreeMap, BTreeSet};

use protocol::{SlotName, State, TargetId, WorkerId, WorkerInfo};

use crate::buildomat::ServerWorker;
use crate::identity::{Identity, Owner};
use crate::schedule::{FreeSlots, SlotSchedule};
use crate::worker::{Action, Kill, Phase, Worker};

/// A host that has just made a worker associates it at once. One that has been without an owner for so long, or for as
/// long as an agent may take, has lost the one that made it. (Should it return, it is too late: the server takes the
/// first owner tag and no other.)
const UNCLAIMED_MS: u64 = 60_000;
/// A worker of this host that its database does not know is made again this long after its agent should have been
/// online: a copy of this host, with its instance id, would have started it by then.
const RECLAIM_MS: u64 = 60_000;

/// All that a decision depends on.
#[derive(Debug)]
pub struct ReconcileInput<'a> {
    /// The slots of the configuration in use.
    pub schedule: &'a SlotSchedule,
    /// This host's.
    pub identity: &'a Identity,
    /// The workers of this factory, with their slots.
    pub known: &'a BTreeMap<WorkerId, SlotName>,
    /// The server's last list.
    pub server: &'a [ServerWorker],
    /// The helper's last list.
    pub host: &'a [WorkerInfo],
    /// Slots that are reserved for leased jobs.
    pub pending_slots: &'a BTreeSet<SlotName>,
    /// Workers that came to their end after a list was asked for.
    pub ended: &'a BTreeSet<WorkerId>,
    /// For how many milliseconds the server has listed those that are not known, and not held.
    pub unknown_for: &'a BTreeMap<WorkerId, u64>,
    /// How long an agent may take to come online, in milliseconds.
    pub online_timeout: u64,
    /// Workers that are not this host's, and that the operator wants deleted all the same.
    pub to_delete: &'a BTreeSet<WorkerId>,
    /// Another host has been seen to use the same token.
    pub foreign_seen: bool,
    /// A worker is being made: one without an owner may be it.
    pub is_making: bool,
    /// In milliseconds of the core's time.
    pub now: u64,
}

/// What to do about an unknown worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It becomes this factory's again.
    Adopt(Worker),
    /// It could, were its slot free: it comes before new jobs.
    Wait {
        /// The worker's.
        target: TargetId,
        /// Its slot; none where any of the target will do.
        slot: Option<SlotName>,
    },
    /// It has no owner: it is deleted, in this way.
    Delete {
        /// The one without an owner.
        worker: WorkerId,
        /// The one that it occupies on the host; none where the host does not have it.
        slot: Option<SlotName>,
        /// [`Action::HostDelete`], or [`Action::ServerDelete`] where the host is clean.
        action: Action,
    },
    /// It may be another host's: it is left alone, and an operator is told.
    Report {
        /// On the server.
        worker: WorkerId,
        /// For the log and the status.
        why: ForeignReason,
    },
}

/// Why a worker on the server is left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForeignReason {
    /// It has another host's owner tag.
    OtherOwner,
    /// It has no host's owner tag, and nothing shows that it is this one's.
    Untagged,
    /// It has this host's owner tag, and neither the database nor the host has it.
    Lost,
}

/// What to do about those that the store does not know. The order is that of the lists.
pub fn reconcile(q: &ReconcileInput<'_>) -> Vec<Decision> {
    let on_host: BTreeMap<WorkerId, &WorkerInfo> = q.host.iter().map(|info| (info.worker, info)).collect();
    let on_server: BTreeSet<WorkerId> = q.server.iter().map(|w| w.id).collect();
    let strange = |id: WorkerId| !q.known.contains_key(&id) && !q.ended.contains(&id);
    let mut used: BTreeSet<SlotName> = q.known.values().cloned().collect();
    used.extend(q.pending_slots.iter().cloned());
    used.extend(q.host.iter().map(|info| info.slot.clone()));
    let (mut free, all) = (q.schedule.free(&used, []), q.schedule.free(&BTreeSet::new(), []));
    let mut decisions = Vec::new();
    for w in q.server.iter().filter(|w| strange(w.id)) {
        let decision = match on_host.get(&w.id) {
            Some(info) => Some(present(q, w, info)),
            None => absent(q, w, &free, &all),
        };
        if let Some(Decision::Adopt(worker)) = &decision
            && !on_host.contains_key(&w.id)
        {
            free.take(&worker.slot);
        }
        decisions.extend(decision);
    }
    for info in q
        .host
        .iter()
        .filter(|info| strange(info.worker) && !on_server.contains(&info.worker))
    {
        let slot = Some(info.slot.clone());
        decisions.push(Decision::Delete {
            worker: info.worker,
            slot,
            action: Action::HostDelete,
        });
    }
    decisions
}

/// A worker of the server that this host has something of.
fn present(q: &ReconcileInput<'_>, w: &ServerWorker, info: &WorkerInfo) -> Decision {
    let slot = info.slot.clone();
    if q.to_delete.contains(&w.id) {
        return Decision::Adopt(adopted(w, slot, Phase::Destroying, q.now));
    }
    match q.identity.owner(w.private.as_deref()) {
        // Its files can have been copied with a disk. What runs here was started here, whatever its owner tag says.
        Owner::Other(_) if info.state != State::Running => Decision::Report {
            worker: w.id,
            why: ForeignReason::OtherOwner,
        },
        _ => Decision::Adopt(adopted(w, slot, phase_of(w, info.state), q.now)),
    }
}

/// A worker of the server that this host has nothing of.
fn absent(
    q: &ReconcileInput<'_>,
    w: &ServerWorker,
    free: &FreeSlots<'_>,
    all: &FreeSlots<'_>,
) -> Option<Decision> {
    let worker = w.id;
    let report = |why| Some(Decision::Report { worker, why });
    let end = Some(Decision::Delete {
        worker,
        slot: None,
        action: Action::ServerDelete { gone: false },
    });
    if q.to_delete.contains(&worker) {
        return end;
    }
    let owner = q.identity.owner(w.private.as_deref());
    let waits = match owner {
        Owner::Other(_) => return report(ForeignReason::OtherOwner),
        // It is kept for inspection.
        _ if w.hold => return None,
        Owner::SlotOnly(_) => return report(ForeignReason::Untagged),
        // Its job is over, and this host is clean of it.
        _ if w.recycle => return end,
        Owner::Nobody if w.online => return report(ForeignReason::Untagged),
        Owner::Own(_) if w.online => return report(ForeignReason::Lost),
        // Perhaps the one that is just being made: a later list will tell.
        Owner::Nobody if q.is_making => return None,
        Owner::Nobody => UNCLAIMED_MS.min(q.online_timeout),
        Owner::Own(_) => q.online_timeout.saturating_add(RECLAIM_MS),
    };
    let unknown_for = q.unknown_for.get(&worker).copied().unwrap_or(0);
    if unknown_for < waits {
        return None;
    }
    if let Some(slot) = slot_for(w, &owner, free) {
        return Some(Decision::Adopt(adopted(w, slot, Phase::Reserved, q.now)));
    }
    let expired = unknown_for >= waits.saturating_add(q.online_timeout);
    let comes = match &owner {
        Owner::Own(slot) => q.schedule.may_have(slot, w.target),
        _ => slot_for(w, &owner, all).is_some() || q.schedule.has_unresolved(),
    };
    if !expired && comes {
        // Its job has not begun, and need not fail because others were here first, or targets are not looked up yet.
        let slot = match owner {
            Owner::Own(slot) => Some(slot),
            _ => None,
        };
        Some(Decision::Wait {
            target: w.target,
            slot,
        })
    } else if owner == Owner::Nobody && q.foreign_seen {
        report(ForeignReason::Untagged)
    } else {
        end
    }
}

/// The slot in which this worker, of which the host has nothing, can be made.
fn slot_for(w: &ServerWorker, owner: &Owner, free: &FreeSlots<'_>) -> Option<SlotName> {
    let slot = match owner {
        Owner::Nobody => free.pick(w.target),
        // The server lets a slot be set once, so it is this one or none.
        Owner::Own(slot) | Owner::SlotOnly(slot) => free.has(slot.as_str(), w.target),
        Owner::Other(_) => None,
    };
    slot.cloned()
}

fn phase_of(w: &ServerWorker, state: State) -> Phase {
    match state {
        _ if w.recycle => Phase::Destroying,
        // Nobody knows whether its user was made to the end. Asked again, the helper sees to it.
        State::Created => Phase::Reserved,
        State::Running | State::Exited(_) => Phase::Running { online: w.online },
    }
}

/// A worker as the server describes it, in this slot.
pub fn adopted(w: &ServerWorker, slot: SlotName, phase: Phase, now: u64) -> Worker {
    Worker {
        id: w.id,
        slot,
        target: w.target,
        job: None,
        bootstrap: w.bootstrap.clone(),
        phase,
        since: now,
        waiting_since: now,
        associated: w.private.is_some(),
        hold: w.hold,
        hold_since: w.hold.then_some(now),
        gone: false,
        remakes: 0,
        failure: None,
        trouble: None,
        kill: Kill::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::InstanceId;
    use proptest::prelude::*;
    use protocol::config::Config;
    use protocol::{Exit, Uid};

    fn config() -> Config {
        let t = TargetId::from_bits(1);
        Config::parse(&format!(
            "[general]\nbaseurl = \"http://h\"\n[factory]\ntoken_file = \"/t\"\n\
             [slots.a]\ntarget = \"{t}\"\n[slots.b]\ntarget = \"{t}\"\nconflicts_with_slots = [\"a\"]\n"
        ))
        .unwrap()
    }

    fn server(id: u128, private: Option<&str>, online: bool, hold: bool, recycle: bool) -> ServerWorker {
        ServerWorker {
            id: WorkerId::from_bits(id),
            target: TargetId::from_bits(1),
            private: private.map(str::to_owned),
            bootstrap: None,
            online,
            hold,
            recycle,
        }
    }

    fn host(id: u128, slot: &str, state: State) -> WorkerInfo {
        let uid = Uid::try_from(2_000_000).unwrap();
        WorkerInfo {
            worker: WorkerId::from_bits(id),
            slot: slot.parse().unwrap(),
            uid,
            state,
            disk: None,
        }
    }

    /// What is asked besides the lists.
    #[derive(Clone, Default)]
    struct Around {
        /// The targets of the slots are names that are not looked up yet.
        unresolved: bool,
        is_making: bool,
        unknown_for: u64,
        to_delete: bool,
        foreign_seen: bool,
    }

    const TIMEOUT: u64 = 300_000;
    const LONG: Around = Around {
        unresolved: false,
        is_making: false,
        unknown_for: TIMEOUT + RECLAIM_MS,
        to_delete: false,
        foreign_seen: false,
    };

    fn decide(server: &[ServerWorker], host: &[WorkerInfo], around: &Around) -> Vec<String> {
        let (known, pending_slots, ended) = (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
        let mut config = config();
        for slot in config.slots.values_mut().filter(|_| around.unresolved) {
            slot.target = protocol::Target::Name("linux".parse().unwrap());
        }
        let schedule = SlotSchedule::of(&config, &BTreeMap::new());
        let unknown_for = server.iter().map(|w| (w.id, around.unknown_for)).collect();
        let to_delete = server.iter().filter(|_| around.to_delete).map(|w| w.id);
        let q = ReconcileInput {
            schedule: &schedule,
            identity: &Identity::new("here", InstanceId::parse("00000000").unwrap()),
            known: &known,
            server,
            host,
            pending_slots: &pending_slots,
            ended: &ended,
            unknown_for: &unknown_for,
            online_timeout: TIMEOUT,
            to_delete: &to_delete.collect(),
            foreign_seen: around.foreign_seen,
            is_making: around.is_making,
            now: 5,
        };
        let show = |d: Decision| match d {
            Decision::Adopt(w) => format!("adopt {} {}", w.slot, w.phase.name()),
            Decision::Wait { slot, .. } => slot.map_or("wait".to_owned(), |slot| format!("wait for {slot}")),
            Decision::Delete { action, .. } => action.name().to_owned(),
            Decision::Report { why, .. } => format!("{why:?}"),
        };
        reconcile(&q).into_iter().map(show).collect()
    }

    const OWN: Option<&str> = Some("a@here/00000000");
    const OTHER: Option<&str> = Some("a@here/11111111");
    const EXITED: State = State::Exited(Exit::Unknown);

    #[test]
    fn what_only_the_server_has_is_taken_up_ended_or_left_to_its_owner() {
        let long = |unknown_for| Around { unknown_for, ..LONG };
        let new = Around::default();
        let making = Around {
            is_making: true,
            ..LONG
        };
        let unresolved = |unknown_for| Around {
            unresolved: true,
            unknown_for,
            ..LONG
        };
        let others = Around {
            foreign_seen: true,
            ..LONG
        };
        let to_delete = Around {
            to_delete: true,
            ..Around::default()
        };
        let end = "delete on the server";
        // Its private; then: online, held, to be recycled.
        for (private, [online, hold, recycle], around, expected) in [
            (None, [false; 3], &new, ""),
            (None, [false; 3], &long(UNCLAIMED_MS - 1), ""),
            (None, [false; 3], &long(UNCLAIMED_MS), "adopt a reserved"),
            (None, [false; 3], &making, ""),
            (None, [false; 3], &others, "adopt a reserved"),
            (None, [false, true, false], &LONG, ""),
            (None, [false, false, true], &new, end),
            (None, [true, false, false], &LONG, "Untagged"),
            (OWN, [false; 3], &new, ""),
            (OWN, [false; 3], &long(TIMEOUT + RECLAIM_MS - 1), ""),
            (OWN, [false; 3], &LONG, "adopt a reserved"),
            (Some("zz@here/00000000"), [false; 3], &new, ""),
            (Some("zz@here/00000000"), [false; 3], &LONG, end),
            (OWN, [false; 3], &unresolved(TIMEOUT + RECLAIM_MS), "wait for a"),
            (
                Some("zz@here/00000000"),
                [false; 3],
                &unresolved(TIMEOUT + RECLAIM_MS),
                end,
            ),
            (None, [false; 3], &unresolved(UNCLAIMED_MS + TIMEOUT - 1), "wait"),
            (None, [false; 3], &unresolved(UNCLAIMED_MS + TIMEOUT), end),
            (OWN, [true, false, false], &LONG, "Lost"),
            (OWN, [true, true, false], &LONG, ""),
            (OWN, [true, false, true], &new, end),
            (Some("a"), [false; 3], &LONG, "Untagged"),
            (Some("a"), [true, false, false], &LONG, "Untagged"),
            (Some("a"), [true, false, true], &LONG, "Untagged"),
            (OTHER, [false; 3], &LONG, "OtherOwner"),
            (OTHER, [true, false, false], &LONG, "OtherOwner"),
            (OTHER, [true, true, false], &LONG, "OtherOwner"),
            (OTHER, [true, false, true], &LONG, "OtherOwner"),
            (Some("no tag at all"), [true, false, true], &LONG, "OtherOwner"),
            (OTHER, [true, false, false], &to_delete, end),
            (OTHER, [true, true, false], &to_delete, end),
            (OWN, [true, false, false], &to_delete, end),
        ] {
            let worker = server(1, private, online, hold, recycle);
            assert_eq!(
                decide(std::slice::from_ref(&worker), &[], around).join(" "),
                expected,
                "{worker:?}"
            );
        }
    }

    #[test]
    fn what_the_host_has_is_this_hosts_unless_another_tagged_it_and_nothing_of_it_runs() {
        let new = Around::default();
        for (private, [online, hold, recycle], state, expected) in [
            (OWN, [true, false, false], State::Running, "adopt a online"),
            (OWN, [true, true, false], EXITED, "adopt a online"),
            (OWN, [false; 3], State::Created, "adopt a reserved"),
            (OWN, [true, false, true], State::Running, "adopt a destroying"),
            (None, [false; 3], State::Created, "adopt a reserved"),
            (Some("a"), [true, false, false], State::Running, "adopt a online"),
            (Some("a"), [true, false, false], EXITED, "adopt a online"),
            (OTHER, [true, false, false], State::Running, "adopt a online"),
            (OTHER, [true, false, false], EXITED, "OtherOwner"),
            (OTHER, [false; 3], State::Created, "OtherOwner"),
            (OTHER, [true, false, true], EXITED, "OtherOwner"),
        ] {
            let worker = server(1, private, online, hold, recycle);
            let decided = decide(std::slice::from_ref(&worker), &[host(1, "a", state)], &new);
            assert_eq!(decided.join(" "), expected, "{worker:?} {state:?}");
        }
        let to_delete = Around {
            to_delete: true,
            ..Around::default()
        };
        let worker = server(1, OTHER, true, false, false);
        let decided = decide(&[worker], &[host(1, "a", EXITED)], &to_delete);
        assert_eq!(decided, ["adopt a destroying"]);
        let alone = decide(&[], &[host(1, "a", State::Running)], &new);
        assert_eq!(alone, ["delete on the host"]);
    }

    #[test]
    fn two_lost_workers_do_not_share_conflicting_slots() {
        let both = [
            server(1, None, false, false, false),
            server(2, None, false, false, false),
        ];
        let around = Around {
            unknown_for: UNCLAIMED_MS,
            ..LONG
        };
        assert_eq!(decide(&both, &[], &around), ["adopt a reserved", "wait"]);
    }

    #[test]
    fn a_worker_whose_slot_is_busy_waits_for_it_and_not_for_ever() {
        let busy = [host(2, "b", State::Running)];
        let decide = |private, foreign_seen, unknown_for| {
            let around = Around {
                foreign_seen,
                unknown_for,
                ..LONG
            };
            let orphans = [server(1, private, false, false, false)];
            decide(&orphans, &busy, &around)[0].clone()
        };
        for (private, waits, wait) in [
            (OWN, TIMEOUT + RECLAIM_MS, "wait for a"),
            (None, UNCLAIMED_MS, "wait"),
        ] {
            let decide = |others, waited| decide(private, others, waits + waited);
            assert_eq!(decide(false, TIMEOUT - 1), wait);
            assert_eq!(decide(false, TIMEOUT), "delete on the server");
            // It may be the other's: then nothing says that it has no owner.
            let left = if private.is_none() {
                "Untagged"
            } else {
                "delete on the server"
            };
            assert_eq!(decide(true, TIMEOUT), left);
        }
    }

    proptest! {
        #[test]
        fn every_unknown_worker_has_one_decision_at_most_and_slots_are_never_shared(
            orphans in proptest::collection::vec((0u128..8, 0usize..5, any::<(bool, bool, bool)>()), 0..8),
            on_host in proptest::collection::vec((0u128..8, any::<bool>()), 0..3),
            is_making: bool,
            long: bool,
            foreign_seen: bool,
        ) {
            let privates = [None, OWN, Some("b@here/00000000"), Some("a"), OTHER];
            let mut list: Vec<ServerWorker> =
                orphans.iter().map(|(id, p, (x, y, z))| server(*id, privates[*p], *x, *y, *z)).collect();
            list.sort_by_key(|w| w.id);
            list.dedup_by_key(|w| w.id);
            let mut here: Vec<WorkerInfo> = on_host
                .iter()
                .map(|(id, runs)| host(*id, "zz", if *runs { State::Running } else { EXITED }))
                .collect();
            here.sort_by_key(|w| w.worker);
            here.dedup_by_key(|w| w.worker);
            let around = Around { is_making, foreign_seen, ..if long { LONG } else { Around::default() } };
            let decided = decide(&list, &here, &around);
            let reserved = decided.iter().filter(|d| *d == "adopt a reserved" || *d == "adopt b reserved").count();
            prop_assert!(reserved <= 1, "a and b exclude each other");
            // Another's is never ended, nor taken up unless it runs here.
            for w in list.iter().filter(|w| w.private.as_deref() == OTHER) {
                let alone = decide(std::slice::from_ref(w), &here, &around);
                let runs = here.iter().any(|i| i.worker == w.id && i.state == State::Running);
                let here_alone = here.iter().filter(|i| i.worker != w.id).count();
                prop_assert_eq!(alone[0] == "OtherOwner", !runs, "{:?}", alone);
                prop_assert_eq!(alone.len(), 1 + here_alone);
            }
        }
    }
}
