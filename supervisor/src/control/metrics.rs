//! Numbers for Prometheus, in the OpenMetrics text format (<https://prometheus.io/docs/specs/om/open_metrics_spec/>).
//!
//! What adds up is counted here as it happens; what is a state is read off the status at each scrape. Names
//! begin with `buildomat_user_factory_`; durations are in seconds, sizes in bytes.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicU64};

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use protocol::SlotName;

use super::api::{PeerStatus, SlotState, Status};
use crate::call_error::{CallError, Peer};
use crate::factory::{Input, Output};
use crate::worker::{Action, Event};

const PREFIX: &str = "buildomat_user_factory";
/// The call that cleans up on this host.
const DELETE: &str = "delete";

/// A call to the server or the helper.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    partner: &'static str,
    call: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Phase {
    phase: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct State {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DrainLabels {
    slot: String,
    reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SlotLabels {
    slot: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HeldLabels {
    worker: String,
    slot: String,
    phase: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PeerLabels {
    partner: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Version {
    version: String,
    protocol: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EgressLabels {
    slot: String,
    result: &'static str,
}

type Seconds = Family<Phase, Histogram, fn() -> Histogram>;
type Whole<L> = Family<L, Gauge<i64, AtomicI64>>;
type Real<L> = Family<L, Gauge<f64, AtomicU64>>;

/// What is counted.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    calls: Family<CallLabels, Counter>,
    leases: Counter,
    phases: Seconds,
    cleanup_failures: Counter,
    reloads_refused: Counter,
    egress: Family<EgressLabels, Counter>,
}

fn phase_buckets() -> Histogram {
    Histogram::new([
        0.01,
        0.05,
        0.1,
        0.5,
        1.0,
        5.0,
        10.0,
        60.0,
        300.0,
        1800.0,
        3600.0,
        4.0 * 3600.0,
        24.0 * 3600.0,
    ])
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix(PREFIX);
        let phases: Seconds = Family::new_with_constructor(phase_buckets);
        let (calls, leases) = (Family::default(), Counter::default());
        let (cleanup_failures, reloads_refused) = (Counter::default(), Counter::default());
        registry.register(
            "calls",
            "Calls to the server and the helper, by how they went",
            calls.clone(),
        );
        registry.register(
            "leases",
            "Jobs that the server has leased to this factory",
            leases.clone(),
        );
        registry.register_with_unit(
            "phase",
            "How long workers were in each phase that has ended",
            Unit::Seconds,
            phases.clone(),
        );
        registry.register(
            "cleanup_failures",
            "Deletions of a worker on this host that did not get to their end",
            cleanup_failures.clone(),
        );
        registry.register(
            "reloads_refused",
            "Changed configurations that were not taken",
            reloads_refused.clone(),
        );
        let egress = Family::default();
        registry.register(
            "egress_connections",
            "Connections of jobs without the host's network to other hosts than the server, and those that were refused or failed",
            egress.clone(),
        );
        Self {
            registry,
            calls,
            leases,
            phases,
            cleanup_failures,
            reloads_refused,
            egress,
        }
    }
}

impl Metrics {
    /// A call that [`call_of`] has named has been answered, or not.
    /// Returns how it went.
    pub fn count_call(&self, (peer, call): (Peer, &'static str), input: &Input) -> &'static str {
        let outcome = outcome_of(input);
        let peer = match peer {
            Peer::Server => "server",
            Peer::Helper => "helper",
            Peer::Database => "database",
        };
        self.calls
            .get_or_create(&CallLabels {
                partner: peer,
                call,
                outcome,
            })
            .inc();
        if let Input::Leased(Ok(Some(_))) = input {
            self.leases.inc();
        }
        if call == DELETE && outcome != "ok" {
            self.cleanup_failures.inc();
        }
        outcome
    }

    /// A worker has left this phase after so many milliseconds.
    pub fn observe_phase(&self, phase: &str, ms: u64) {
        let labels = Phase {
            phase: phase.to_owned(),
        };
        self.phases.get_or_create(&labels).observe(ms as f64 / 1000.0);
    }

    /// Count a reload that was refused.
    pub fn count_refused_reload(&self) {
        self.reloads_refused.inc();
    }

    /// Count a connection of a job of this slot: `connected`, `refused` or `failed`.
    pub fn count_connection(&self, slot: &SlotName, result: &'static str) {
        let slot = slot.to_string();
        self.egress.get_or_create(&EgressLabels { slot, result }).inc();
    }

    /// Everything, at this instant; `memory` is what each slot's worker takes, in bytes.
    pub fn text(&self, status: &Status, memory: &BTreeMap<SlotName, u64>) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = text::encode_registry(&mut text, &self.registry);
        let _ = text::encode_registry(&mut text, &states(status, memory));
        let _ = text::encode_eof(&mut text);
        text
    }
}

/// What is a state, not a count.
fn states(status: &Status, memory: &BTreeMap<SlotName, u64>) -> Registry {
    let mut registry = Registry::with_prefix(PREFIX);
    let version: Whole<Version> = Family::default();
    version
        .get_or_create(&Version {
            version: status.version.clone(),
            protocol: status.protocol,
        })
        .set(1);
    registry.register("build", "The supervisor's version; always 1", version);

    let reachable: Whole<PeerLabels> = Family::default();
    let with = |peer: &'static str, seen: &PeerStatus| {
        reachable
            .get_or_create(&PeerLabels { partner: peer })
            .set(i64::from(
                seen.reachable == Some(true) && seen.unanswered_since.is_none(),
            ));
    };
    with("server", &status.server);
    with("helper", &status.helper);
    registry.register(
        "reachable",
        "Did it answer when it was asked last, or is it not yet late?",
        reachable,
    );

    let draining: Gauge = Gauge::default();
    draining.set(i64::from(status.draining));
    registry.register(
        "draining",
        "Are no new jobs taken, by the operator's command?",
        draining,
    );

    let drains: Real<DrainLabels> = Family::default();
    for drain in &status.drains {
        let labels = DrainLabels {
            slot: drain.slot.as_ref().map(ToString::to_string).unwrap_or_default(),
            reason: drain.reason.clone().unwrap_or_default(),
        };
        let until = drain.until.map_or(0.0, |end| end.as_duration().as_secs_f64());
        drains.get_or_create(&labels).set(until);
    }
    registry.register_with_unit(
        "drain_end",
        "When each drain ends, since 1970; 0 where it lasts until it is resumed. No slot: all",
        Unit::Seconds,
        drains,
    );

    let taken: Gauge = Gauge::default();
    taken.set(i64::from(status.not_taken.is_none()));
    registry.register(
        "jobs_taken",
        "Are jobs taken where a slot is free? Status says why not",
        taken,
    );

    let refused: Gauge = Gauge::default();
    refused.set(i64::from(status.configuration.refused.is_some()));
    registry.register(
        "configuration_refused",
        "Is the configuration in use older than the file, which has mistakes?",
        refused,
    );

    let writable: Gauge = Gauge::default();
    writable.set(i64::from(status.storage.is_none()));
    registry.register(
        "state_writable",
        "Can the supervisor save its state, with room for more?",
        writable,
    );

    let enough: Gauge = Gauge::default();
    enough.set(i64::from(status.shortage.is_none()));
    registry.register(
        "enough_free",
        "Is as much disk, inodes and memory free as factory.min_free asks for?",
        enough,
    );

    let failed: Gauge = Gauge::default();
    let last = status.selftest.as_ref();
    failed.set(i64::from(last.is_some_and(|last| last.failure.is_some())));
    registry.register(
        "selftest_failed",
        "Has the last self-test of all slots, since the start, found what does not hold?",
        failed,
    );

    let foreign: Gauge = Gauge::default();
    foreign.set(i64::try_from(status.foreign.len()).unwrap_or(i64::MAX));
    registry.register(
        "foreign_workers",
        "Workers on the server that may be another host's, of the last ten minutes",
        foreign,
    );

    let slots: Whole<State> = Family::default();
    for state in SlotState::ALL {
        let count = status.slots.iter().filter(|slot| slot.state == state).count();
        slots
            .get_or_create(&State { state: state.name() })
            .set(count as i64);
    }
    registry.register("slots", "Slots by what they are doing", slots);

    let workers: Whole<Phase> = Family::default();
    for worker in &status.workers {
        workers
            .get_or_create(&Phase {
                phase: worker.phase.clone(),
            })
            .inc();
    }
    registry.register("workers", "Workers by phase", workers);

    let held: Real<HeldLabels> = Family::default();
    for worker in &status.workers {
        if let Some(since) = worker.hold {
            let labels = HeldLabels {
                worker: worker.id.to_string(),
                slot: worker.slot.to_string(),
                phase: worker.phase.clone(),
            };
            held.get_or_create(&labels)
                .set(status.now.duration_since(since).as_secs_f64().max(0.0));
        }
    }
    registry.register_with_unit(
        "held",
        "How long each worker that waits for an operator has been held",
        Unit::Seconds,
        held,
    );

    let deleted = status.workers.iter().filter(|worker| {
        let phase = worker.phase.as_str();
        matches!(phase, "clearing" | "destroying" | "destroyed")
    });
    let longest = deleted.map(|worker| status.now.duration_since(worker.since).as_secs_f64());
    let oldest: Gauge<f64, AtomicU64> = Gauge::default();
    oldest.set(longest.fold(0.0, f64::max));
    registry.register_with_unit(
        "cleanup",
        "How long the worker that is being deleted for the longest has been in its phase",
        Unit::Seconds,
        oldest,
    );

    let resident = memory.iter().map(|(slot, bytes)| (slot, *bytes));
    registry.register_with_unit(
        "slot_memory",
        "Memory of the slot's worker: resident, or charged to its cgroup",
        Unit::Bytes,
        bytes_by_slot(resident),
    );
    let on_disk = status.workers.iter().filter_map(|w| Some((&w.slot, w.disk?)));
    registry.register_with_unit(
        "slot_disk",
        "What the slot's worker has on disk, where user quotas count it",
        Unit::Bytes,
        bytes_by_slot(on_disk),
    );
    registry
}

fn bytes_by_slot<'a>(all: impl Iterator<Item = (&'a SlotName, u64)>) -> Whole<SlotLabels> {
    let family: Whole<SlotLabels> = Family::default();
    for (slot, bytes) in all {
        let slot = slot.to_string();
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        family.get_or_create(&SlotLabels { slot }).set(bytes);
    }
    family
}

/// Whom an output asks, and for what.
pub fn call_of(output: &Output) -> Option<(Peer, &'static str)> {
    Some(match output {
        Output::ListServer => (Peer::Server, "workers"),
        Output::ListTargets => (Peer::Server, "targets"),
        Output::Lease(_) => (Peer::Server, "lease"),
        Output::MakeWorker { .. } => (Peer::Server, "make_worker"),
        Output::Renew { .. } => (Peer::Server, "renew"),
        Output::ListHost => (Peer::Helper, "list"),
        Output::CarryOut(_, action) => match action {
            Action::Associate { .. } => (Peer::Server, "associate"),
            Action::ReportFailure { .. } => (Peer::Server, "fail"),
            Action::ServerDelete { .. } => (Peer::Server, "delete_worker"),
            Action::CreateUser { .. } => (Peer::Helper, "create_user"),
            Action::InstallAgent { .. } => (Peer::Helper, "install_agent"),
            Action::HostKill => (Peer::Helper, "kill"),
            Action::HostDelete => (Peer::Helper, DELETE),
        },
        Output::Save(_) | Output::SaveDrain(..) | Output::Remove(_) | Output::Log(_) => return None,
    })
}

fn outcome_of(input: &Input) -> &'static str {
    let of = |error: &CallError| match error {
        error if error.unauthorised => "unauthorised",
        error if error.refused => "refused",
        _ => "failed",
    };
    match input {
        Input::ServerListed(Err(t)) | Input::HostListed(Err(t)) | Input::Leased(Err(t)) => of(t),
        Input::TargetsListed(Err(t)) => of(t),
        Input::TargetsListed(Ok(None)) => "refused",
        Input::WorkerMade(_, Err(t)) | Input::Renewed(_, Err(t)) => of(t),
        Input::Done(_, event) => match (event, event.error()) {
            (_, Some(error)) => of(error),
            (Event::StartFailed(_) | Event::HostLost | Event::CannotReport(_), _) => "refused",
            _ => "ok",
        },
        _ => "ok",
    }
}
