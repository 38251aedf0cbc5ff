//! What the server does by itself, once a tick (buildomat, `server/src/workers.rs` and `jobs.rs`): leases run
//! out, workers of finished jobs are recycled, jobs are given to free workers, and the stuck ones are dealt with.

use std::time::Duration;

use super::state::State;
use super::types::{Job, Worker};
use super::ulid::Ulid;

/// A worker that is online this long without a job is recycled (buildomat, `server/src/workers.rs`).
pub const IDLE: Duration = Duration::from_secs(30 * 60);
/// A worker whose agent has sent no ping for this long is failed (buildomat, `server/src/workers.rs`, `TEN_MINUTES`).
pub const SILENT: Duration = Duration::from_secs(10 * 60);

impl State {
    /// Everything that is due by [`State::now`](State).
    pub fn tick(&mut self) {
        self.expire_leases();
        self.recycle_finished();
        self.abort_overlong();
        self.fail_silent();
        self.end_cancelled();
        self.fail_orphans();
        self.assign_queued();
    }

    fn is_older(&self, time: jiff::Timestamp, limit: Duration) -> bool {
        time + limit < self.now
    }

    /// Ids first: the rules change the maps that they look at.
    fn pick_workers(&self, wanted: impl Fn(&Worker) -> bool) -> Vec<Ulid> {
        self.workers
            .values()
            .filter(|w| wanted(w))
            .map(|w| w.id)
            .collect()
    }

    fn expire_leases(&mut self) {
        let now = self.now;
        self.leases.retain(|_, lease| lease.expiry > now);
    }

    fn recycle_finished(&mut self) {
        let is_done = |w: &Worker| match w.job {
            Some(job) => self.jobs[&job].is_complete() && !w.diagnostics,
            None => w.is_online() && self.is_older(w.created, IDLE),
        };
        for id in self.pick_workers(|w| !w.deleted && is_done(w)) {
            if let Some(w) = self.workers.get_mut(&id) {
                w.recycle_asked = true;
            }
        }
    }

    fn abort_overlong(&mut self) {
        let overlong = |w: &Worker| {
            if w.is_finished() {
                return None;
            }
            let j = w.job.map(|job| &self.jobs[&job]).filter(|j| !j.is_complete())?;
            self.is_older(j.assigned?, j.max_runtime)
                .then_some((w.id, j.id, j.max_runtime))
        };
        let found: Vec<_> = self.workers.values().filter_map(overlong).collect();
        for (worker, job, limit) in found {
            self.control(
                job,
                &format!("job duration exceeds {} seconds; aborting", limit.as_secs()),
            );
            // Even of a held worker: the job is over, the worker stays for the operator who holds it.
            self.finish(job, true);
            if let Some(w) = self.workers.get_mut(&worker) {
                w.recycle_asked = true;
            }
        }
    }

    fn fail_silent(&mut self) {
        let silent = self.pick_workers(|w| {
            w.is_online()
                && !w.is_finished()
                && w.hold.is_none()
                && w.last_ping.is_some_and(|ping| self.is_older(ping, SILENT))
        });
        for id in silent {
            self.fail_worker(id, "agent has stopped pinging");
        }
    }

    fn end_cancelled(&mut self) {
        let cancelled = self.open_jobs().filter(|j| j.cancelled);
        let cancelled: Vec<_> = cancelled.map(|j| (j.id, j.worker)).collect();
        for (job, worker) in cancelled {
            if let Some(w) = worker.and_then(|w| self.workers.get_mut(&w)) {
                w.recycle_asked |= !w.deleted;
            }
            self.finish(job, true);
        }
    }

    /// Jobs whose worker is gone or told to go, started or not.
    pub fn fail_orphans(&mut self) {
        let is_finished = |worker: &Ulid| self.workers.get(worker).is_some_and(Worker::is_finished);
        let orphan = |j: &Job| Some((j.worker.filter(is_finished)?, j.id));
        let mut orphans: Vec<(Ulid, Ulid)> = self.open_jobs().filter_map(orphan).collect();
        // In the order of the workers.
        orphans.sort_unstable();
        for (_, job) in orphans {
            self.control(job, "worker failed without completing job");
            self.finish(job, true);
        }
    }

    fn assign_queued(&mut self) {
        let is_free = |w: &&Worker| w.is_online() && w.job.is_none() && !w.is_finished() && w.hold.is_none();
        let free = self.workers.values().filter(is_free);
        for (worker, target) in free.map(|w| (w.id, w.target)).collect::<Vec<_>>() {
            let mut queued = self.open_jobs().filter(|j| j.is_queued() && j.target == target);
            let job = queued.next().map(|j| j.id);
            drop(queued);
            if let Some(job) = job {
                self.assign(job, worker);
            }
        }
    }
}
