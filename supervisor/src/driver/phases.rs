//! The phase that each worker is in, and since when: for the log and for the metrics.

use std::collections::BTreeMap;

use protocol::WorkerId;

use crate::control::metrics::Metrics;
use crate::factory::{Factory, Level, LogLine, Output};
use crate::worker::Worker;

pub(super) struct Phases(BTreeMap<WorkerId, (&'static str, u64)>);

impl Phases {
    pub(super) fn of(factory: &Factory) -> Self {
        Self(
            factory
                .workers()
                .map(|w| (w.id, (w.phase.name(), w.since)))
                .collect(),
        )
    }

    pub(super) fn record_change(&mut self, worker: &Worker, metrics: &Metrics) {
        let phase = worker.phase.name();
        let old = self.0.insert(worker.id, (phase, worker.since));
        if old.is_some_and(|(old, _)| old == phase) {
            return;
        }
        if let Some((old, since)) = old {
            metrics.observe_phase(old, worker.since.saturating_sub(since));
        }
        let job = worker.job.as_ref().map(tracing::field::display);
        tracing::info!(worker = %worker.id, slot = %worker.slot, phase, job, "worker phase");
    }

    pub(super) fn record_removal(&mut self, worker: WorkerId, now: u64, metrics: &Metrics) {
        if let Some((phase, since)) = self.0.remove(&worker) {
            metrics.observe_phase(phase, now.saturating_sub(since));
        }
        tracing::info!(%worker, "worker forgotten");
    }
}

/// The worker and the job that a call is about, for the log.
pub(super) fn about(output: &Output) -> (Option<String>, Option<String>) {
    match output {
        Output::CarryOut(worker, _) => (Some(worker.to_string()), None),
        Output::Renew { worker, job } => (Some(worker.to_string()), Some(job.to_string())),
        Output::MakeWorker { job, .. } => (None, Some(job.to_string())),
        _ => (None, None),
    }
}

pub(super) fn log(line: &LogLine) {
    let worker = line.worker.as_ref().map(tracing::field::display);
    let slot = line.slot.as_ref().map(tracing::field::display);
    let job = line.job.as_ref().map(tracing::field::display);
    let text = &line.text;
    match line.level {
        Level::Info => tracing::info!(worker, slot, job, "{text}"),
        Level::Warn => tracing::warn!(worker, slot, job, "{text}"),
        Level::Error => tracing::error!(worker, slot, job, "{text}"),
    }
}
