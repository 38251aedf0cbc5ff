//! Whose is what exists? The store, the server and the host can each disagree with the others after a
//! crash; this compares all three and gives every stray an owner or an end.
//!
//! Pure. It must only ever be asked with two whole and fresh lists: a list that could not be had says
//! nothing about anybody.

use std::collections::{BTreeMap, BTreeSet};

use protocol::{SlotName, State, TargetId, WorkerId, WorkerInfo};

use crate::schedule::{Free, Plan};
use crate::view::ServerWorker;
use crate::worker::{Action, Kill, Phase, Worker};

/// All that a decision depends on.
#[derive(Debug)]
pub struct Question<'a> {
    pub plan: &'a Plan,
    pub known: &'a BTreeMap<WorkerId, Worker>,
    pub server: &'a [ServerWorker],
    pub host: &'a [WorkerInfo],
    /// Slots promised to leased jobs.
    pub promised: &'a BTreeSet<SlotName>,
    /// Workers that came to their end after a list was asked for.
    pub ended: &'a BTreeSet<WorkerId>,
    /// Workers of the server that have waited for a slot for too long.
    pub tired: &'a BTreeSet<WorkerId>,
    /// A worker is being made: one without a slot may be it.
    pub making: bool,
    pub now: u64,
}

/// What to do about a stray.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It becomes this factory's again.
    Adopt(Worker),
    /// It could, had it a slot of this target: it comes next.
    Wait(TargetId),
    /// Nobody's: end it, in this way. `slot`: the one that it occupies on the host.
    End {
        worker: WorkerId,
        slot: Option<SlotName>,
        action: Action,
    },
}

/// What to do about those that the store does not know. The order is that of the lists.
pub fn reconcile(q: &Question<'_>) -> Vec<Decision> {
    let on_host: BTreeMap<WorkerId, &WorkerInfo> = q.host.iter().map(|info| (info.worker, info)).collect();
    let on_server: BTreeSet<WorkerId> = q.server.iter().map(|w| w.id).collect();
    let strange = |id: WorkerId| !q.known.contains_key(&id) && !q.ended.contains(&id);
    let mut used: BTreeSet<SlotName> = q.known.values().map(|w| w.slot.clone()).collect();
    used.extend(q.promised.iter().cloned());
    used.extend(q.host.iter().map(|info| info.slot.clone()));
    let (mut free, all) = (q.plan.free(&used, []), q.plan.free(&BTreeSet::new(), []));
    let mut decisions = Vec::new();
    for w in q.server.iter().filter(|w| strange(w.id)) {
        if let Some(info) = on_host.get(&w.id) {
            decisions.push(Decision::Adopt(adopted(
                w,
                info.slot.clone(),
                phase_of(w, info.state),
                q.now,
            )));
        } else if w.hold || (w.private.is_none() && q.making) {
            // Somebody's evidence, or perhaps the one that is just being made: a later list will tell.
        } else if let Some(slot) = slot_for(w, &free) {
            free.take(&slot);
            decisions.push(Decision::Adopt(adopted(w, slot, Phase::Reserved, q.now)));
        } else if !q.tired.contains(&w.id) && slot_for(w, &all).is_some() {
            // Its job has not begun, and need not fail because others were here first.
            decisions.push(Decision::Wait(w.target));
        } else {
            decisions.push(Decision::End {
                worker: w.id,
                slot: None,
                action: Action::ServerDelete { gone: false },
            });
        }
    }
    for info in q
        .host
        .iter()
        .filter(|info| strange(info.worker) && !on_server.contains(&info.worker))
    {
        let slot = Some(info.slot.clone());
        decisions.push(Decision::End {
            worker: info.worker,
            slot,
            action: Action::HostDelete,
        });
    }
    decisions
}

/// Can this worker, of which the host has nothing, still be made here? Its bootstrap token must be unused.
fn slot_for(w: &ServerWorker, free: &Free<'_>) -> Option<SlotName> {
    if w.online || w.recycle {
        return None;
    }
    let slot = match &w.private {
        None => free.pick(w.target),
        // The server lets a slot be set once, so it is this one or none.
        Some(name) => free.has(name, w.target),
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
        let uid = Uid::try_from(5000).unwrap();
        WorkerInfo {
            worker: WorkerId::from_bits(id),
            slot: slot.parse().unwrap(),
            uid,
            state,
            disk: None,
        }
    }

    fn decide(server: &[ServerWorker], host: &[WorkerInfo], making: bool) -> Vec<String> {
        decide_tired(server, host, making, &BTreeSet::new())
    }

    fn decide_tired(
        server: &[ServerWorker],
        host: &[WorkerInfo],
        making: bool,
        tired: &BTreeSet<WorkerId>,
    ) -> Vec<String> {
        let (known, promised, ended) = (BTreeMap::new(), BTreeSet::new(), BTreeSet::new());
        let plan = Plan::of(&config());
        let q = Question {
            plan: &plan,
            known: &known,
            server,
            host,
            promised: &promised,
            ended: &ended,
            tired,
            making,
            now: 5,
        };
        let show = |d: Decision| match d {
            Decision::Adopt(w) => format!("adopt {} {}", w.slot, w.phase.name()),
            Decision::Wait(_) => "wait".to_owned(),
            Decision::End { action, .. } => action.name().to_owned(),
        };
        reconcile(&q).into_iter().map(show).collect()
    }

    #[test]
    fn strays_of_the_server_and_the_host() {
        let no: &[WorkerInfo] = &[];
        let has = |state| vec![host(1, "a", state)];
        for (worker, on_host, making, expected) in [
            (
                server(1, None, false, false, false),
                no,
                false,
                "adopt a reserved",
            ),
            (
                server(1, Some("b"), false, false, false),
                no,
                false,
                "adopt b reserved",
            ),
            (
                server(1, Some("zz"), false, false, false),
                no,
                false,
                "delete on the server",
            ),
            (
                server(1, Some("a"), true, false, false),
                no,
                false,
                "delete on the server",
            ),
            (
                server(1, None, false, false, true),
                no,
                false,
                "delete on the server",
            ),
            (server(1, None, false, true, false), no, false, ""),
            (server(1, None, false, false, false), no, true, ""),
            (
                server(1, Some("a"), true, false, false),
                &has(State::Running),
                false,
                "adopt a online",
            ),
            (
                server(1, Some("a"), true, true, false),
                &has(State::Exited(Exit::Unknown)),
                false,
                "adopt a online",
            ),
            (
                server(1, Some("a"), false, false, false),
                &has(State::Created),
                false,
                "adopt a reserved",
            ),
            (
                server(1, Some("a"), true, false, true),
                &has(State::Running),
                false,
                "adopt a destroying",
            ),
        ] {
            assert_eq!(
                decide(std::slice::from_ref(&worker), on_host, making).join(" "),
                expected,
                "{worker:?}"
            );
        }
        assert_eq!(decide(&[], &has(State::Running), false), ["delete on the host"]);
    }

    #[test]
    fn two_lost_workers_do_not_share_conflicting_slots() {
        let both = [
            server(1, None, false, false, false),
            server(2, None, false, false, false),
        ];
        assert_eq!(decide(&both, &[], false), ["adopt a reserved", "wait"]);
    }

    #[test]
    fn a_worker_whose_slot_is_busy_waits_for_it_and_not_for_ever() {
        let strays = [server(1, Some("a"), false, false, false)];
        let busy = [host(2, "b", State::Running)];
        let decide = |tired: &BTreeSet<WorkerId>| decide_tired(&strays, &busy, false, tired);
        assert_eq!(decide(&BTreeSet::new()), ["wait", "delete on the host"]);
        let tired = BTreeSet::from([WorkerId::from_bits(1)]);
        assert_eq!(decide(&tired), ["delete on the server", "delete on the host"]);
    }

    proptest! {
        #[test]
        fn every_stray_has_one_decision_at_most_and_slots_are_never_shared(
            strays in proptest::collection::vec((0u128..8, 0usize..4, any::<(bool, bool, bool)>()), 0..8),
            making: bool,
        ) {
            let privates = [None, Some("a"), Some("b"), Some("gone")];
            let mut list: Vec<ServerWorker> =
                strays.iter().map(|(id, p, (x, y, z))| server(*id, privates[*p], *x, *y, *z)).collect();
            list.sort_by_key(|w| w.id);
            list.dedup_by_key(|w| w.id);
            let reserved = decide(&list, &[], making).iter().filter(|d| d.starts_with("adopt")).count();
            prop_assert!(reserved <= 1, "a and b exclude each other");
        }
    }
}
