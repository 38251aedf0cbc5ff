//! The server's rules for factories and workers, as a plain struct with pure methods: no I/O, and the
//! time is whatever `now` says. Jobs are in `jobs`, what happens by itself in `tick`.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::json;

use super::json::{Append, Associate, JobEvent, Ping, PingInput, PingJob, PingTask};
use super::types::{Factory, Hold, Job, Lease, ServerError, Worker};
use super::ulid::{IdGenerator, Ulid};

/// A malformed id is the real server's plain 500.
pub fn id(text: &str) -> Result<Ulid, ServerError> {
    text.parse().map_err(|_| ServerError::Internal)
}

/// How long a lease lasts unless it is renewed (buildomat, `server/src/jobs.rs`, `LEASE_LENGTH`).
pub const LEASE: Duration = Duration::from_secs(60);

/// A copy is a backup: restoring it rolls the server's database back.
#[derive(Clone, Debug)]
pub struct State {
    /// The server's clock, which tests move.
    pub now: Timestamp,
    /// Of the one user, who is the administrator, too.
    pub user_token: String,
    /// Names by id.
    pub targets: BTreeMap<Ulid, String>,
    /// Never removed.
    pub factories: BTreeMap<Ulid, Factory>,
    /// Deleted ones, too, in the order of their making.
    pub workers: BTreeMap<Ulid, Worker>,
    /// Ended ones, too, in the order of their submission.
    pub jobs: BTreeMap<Ulid, Job>,
    /// By the job; forgotten when the server starts again.
    pub leases: BTreeMap<Ulid, Lease>,
    /// An operator's hold on the whole server: nothing is leased.
    pub held: bool,
    /// Every new worker is made held, whatever its factory's setting is.
    pub hold_new_workers: bool,
    /// An older server, which knows no way to fail a worker: 404 to `/0/factory/worker/{id}/fail`.
    pub no_fail: bool,
    /// An older server, which does not list its targets: 404 to `/0/factory/targets`.
    pub no_targets: bool,
    /// A server that refuses events in streams that it does not know (400), as it knows them: `is_known_stream`.
    pub checks_streams: bool,
    ids: IdGenerator,
    last_id: u128,
}

impl State {
    pub(crate) fn new(now: Timestamp) -> State {
        State::with(now, IdGenerator::new())
    }

    /// Its ids and secrets are drawn from `ids`.
    pub fn with(now: Timestamp, mut ids: IdGenerator) -> State {
        State {
            now,
            user_token: ids.secret(),
            targets: BTreeMap::new(),
            factories: BTreeMap::new(),
            workers: BTreeMap::new(),
            jobs: BTreeMap::new(),
            leases: BTreeMap::new(),
            held: false,
            hold_new_workers: false,
            no_fail: false,
            no_targets: false,
            checks_streams: false,
            ids,
            last_id: 0,
        }
    }

    /// A fresh id, above every earlier one, so that the maps keep the order of creation.
    pub fn new_id(&mut self) -> Ulid {
        self.last_id = self.ids.id_bits(self.now).max(self.last_id + 1);
        Ulid::from_bits(self.last_id)
    }

    /// The jobs that have not ended, in the order of their submission.
    pub fn open_jobs(&self) -> impl Iterator<Item = &Job> {
        self.jobs.values().filter(|job| !job.is_complete())
    }

    pub(crate) fn add_target(&mut self, name: &str) -> Ulid {
        let id = self.new_id();
        self.targets.insert(id, name.to_string());
        id
    }

    /// By name or id.
    pub fn find_target(&self, name: &str) -> Option<Ulid> {
        self.targets
            .iter()
            .find(|(id, n)| *n == name || id.to_string() == name)
            .map(|(id, _)| *id)
    }

    /// Its id and its token.
    pub fn add_factory(&mut self, name: &str) -> (Ulid, String) {
        let (id, token) = (self.new_id(), self.ids.secret());
        let factory = Factory {
            id,
            name: name.to_string(),
            token: token.clone(),
            enable: true,
            hold_workers: false,
            last_ping: None,
        };
        self.factories.insert(id, factory);
        (id, token)
    }

    pub(crate) fn factory_by_token(&self, token: &str) -> Option<Ulid> {
        self.factories.values().find(|f| f.token == token).map(|f| f.id)
    }

    /// A deleted worker's agent is still let in: it is told to power off.
    pub fn worker_by_token(&self, token: &str) -> Option<Ulid> {
        self.workers
            .values()
            .find(|w| w.token.as_deref() == Some(token))
            .map(|w| w.id)
    }

    pub(crate) fn factory_ping(&mut self, factory: Ulid) {
        let now = self.now;
        if let Some(f) = self.factories.get_mut(&factory) {
            f.last_ping = Some(now);
        }
    }

    // Leases

    /// The oldest queued job of these targets, and its target; none also for a factory that is not enabled.
    pub fn lease(&mut self, factory: Ulid, targets: &[Ulid]) -> Option<(Ulid, Ulid)> {
        self.factory_ping(factory);
        if self.held || !self.factories[&factory].enable {
            return None;
        }
        let free =
            |j: &&Job| j.is_queued() && targets.contains(&j.target) && !self.leases.contains_key(&j.id);
        let (job, target) = self.open_jobs().find(free).map(|j| (j.id, j.target))?;
        self.leases.insert(
            job,
            Lease {
                factory,
                expiry: self.now + LEASE,
            },
        );
        Some((job, target))
    }

    /// False where the factory does not have the lease any more.
    pub fn renew(&mut self, factory: Ulid, job: Ulid) -> bool {
        let expiry = self.now + LEASE;
        match self.leases.get_mut(&job) {
            Some(lease) if lease.factory == factory => {
                lease.expiry = expiry;
                true
            }
            _ => false,
        }
    }

    // A factory's workers

    /// A conflict where the job has a worker or is not queued; no lease is asked for.
    pub fn create_worker(
        &mut self,
        factory: Ulid,
        target: Ulid,
        job: Option<Ulid>,
        wait_for_flush: bool,
    ) -> Result<Ulid, ServerError> {
        if !self.targets.contains_key(&target) {
            return Err(ServerError::Internal);
        }
        if let Some(job) = job {
            let j = self.jobs.get(&job).ok_or(ServerError::Internal)?;
            if let Some(worker) = j.worker {
                return Err(ServerError::Conflict(format!(
                    "job {job} already assigned to worker {worker}"
                )));
            }
            if !j.is_queued() {
                return Err(ServerError::Conflict(format!(
                    "job {job} is not queued but {}",
                    j.state()
                )));
            }
        }
        let hold = self.hold_new_workers || self.factories[&factory].hold_workers;
        let id = self.new_id();
        let worker = Worker {
            id,
            factory,
            target,
            created: self.now,
            bootstrap: self.ids.secret(),
            token: None,
            private: None,
            ip: None,
            metadata: None,
            wait_for_flush,
            recycle_asked: false,
            hold: hold.then(|| Hold {
                reason: "workers are created on hold".to_string(),
                time: self.now,
            }),
            deleted: false,
            diagnostics: false,
            last_ping: None,
            job: None,
            events: Vec::new(),
        };
        self.workers.insert(id, worker);
        if let Some(job) = job {
            self.assign(job, id);
        }
        Ok(id)
    }

    /// A worker that this factory may touch. An unknown one is the server's 500; a deleted one is found.
    pub fn owned(&mut self, factory: Ulid, worker: Ulid) -> Result<&mut Worker, ServerError> {
        match self.workers.get_mut(&worker) {
            None => Err(ServerError::Internal),
            Some(w) if w.factory != factory => Err(ServerError::Forbidden("not your worker")),
            Some(w) => Ok(w),
        }
    }

    /// May be repeated with the same owner tag; another one is refused (401), and so is a deleted worker (buildomat,
    /// `server/src/db/mod.rs`, `worker_associate`).
    pub fn associate(&mut self, factory: Ulid, worker: Ulid, body: Associate) -> Result<(), ServerError> {
        let w = self.owned(factory, worker)?;
        if w.deleted || w.private.as_ref().is_some_and(|p| *p != body.private) {
            return Err(ServerError::Unauthorised);
        }
        w.private = Some(body.private);
        w.ip = body.ip.or(w.ip.take());
        w.metadata = body.metadata.or(w.metadata.take());
        Ok(())
    }

    /// The job that was still running there fails at the next tick, or at once when none comes.
    pub fn destroy(&mut self, factory: Ulid, worker: Ulid) -> Result<bool, ServerError> {
        let w = self.owned(factory, worker)?;
        w.deleted = true;
        w.diagnostics = false;
        self.fail_orphans();
        Ok(true)
    }

    pub(crate) fn flush(&mut self, factory: Ulid, worker: Ulid) -> Result<(), ServerError> {
        self.owned(factory, worker)?.wait_for_flush = false;
        Ok(())
    }

    /// An older server stores events of any stream.
    pub fn check_stream(&self, stream: &str) -> Result<(), ServerError> {
        match self.checks_streams && !is_known_stream(stream) {
            true => Err(ServerError::Invalid(format!("unknown stream {stream:?}"))),
            false => Ok(()),
        }
    }

    /// `true` = keep the line and try again: there is no job yet to keep it in.
    pub fn factory_append(&mut self, factory: Ulid, worker: Ulid, line: Append) -> Result<bool, ServerError> {
        self.check_stream(&line.stream)?;
        let w = self.owned(factory, worker)?;
        let (job, never) = (w.job, w.deleted || (w.must_recycle() && !w.is_online()));
        let Some(job) = job else { return Ok(!never) };
        if !self.jobs[&job].is_complete() {
            self.append(job, None, &line.stream, Some(line.time), &line.payload);
        }
        Ok(false)
    }

    /// Its job fails, and the worker is held: see [`State::fail_worker`].
    pub fn factory_fail(&mut self, factory: Ulid, worker: Ulid, reason: &str) -> Result<(), ServerError> {
        self.owned(factory, worker)?;
        self.fail_worker(worker, reason);
        Ok(())
    }

    /// Fails the job, holds the worker, and has it recycled once an operator lifts the hold. Of a worker
    /// already failed, recycled or deleted it changes nothing (buildomat, `server/src/db/mod.rs`,
    /// `worker_mark_failed`).
    pub fn fail_worker(&mut self, worker: Ulid, reason: &str) {
        let now = self.now;
        let Some(w) = self.workers.get_mut(&worker) else {
            return;
        };
        if w.deleted || w.recycle_asked {
            return;
        }
        w.recycle_asked = true;
        w.hold = Some(Hold {
            reason: format!("worker failed: {reason}"),
            time: now,
        });
        if let Some(job) = w.job.filter(|job| !self.jobs[job].is_complete()) {
            self.control(job, &format!("worker failed: {reason}"));
            self.finish(job, true);
        }
    }

    // What an operator does

    fn known(&mut self, worker: Ulid) -> Result<&mut Worker, ServerError> {
        self.workers.get_mut(&worker).ok_or(ServerError::Internal)
    }

    /// Changes nothing of one that is held already; a conflict where it is deleted.
    pub fn hold(&mut self, worker: Ulid, reason: &str) -> Result<(), ServerError> {
        let hold = Hold {
            reason: reason.to_string(),
            time: self.now,
        };
        let w = self.known(worker)?;
        if w.deleted {
            return Err(ServerError::Conflict(format!(
                "worker {worker} is already deleted"
            )));
        }
        w.hold.get_or_insert(hold);
        Ok(())
    }

    /// A recycling that was asked for while it was held takes effect.
    pub fn release(&mut self, worker: Ulid) -> Result<(), ServerError> {
        self.known(worker)?.hold = None;
        self.fail_orphans();
        Ok(())
    }

    /// Takes effect once it is not held.
    pub fn recycle(&mut self, worker: Ulid) -> Result<(), ServerError> {
        let w = self.known(worker)?;
        w.recycle_asked |= !w.deleted;
        self.fail_orphans();
        Ok(())
    }

    // The agent's part

    /// The worker whose bootstrap token this is, online from now on; 401 unless it is associated, and not told to go
    /// (buildomat, `server/src/db/mod.rs`, `worker_bootstrap`).
    pub fn bootstrap(&mut self, bootstrap: &str, token: &str) -> Result<Ulid, ServerError> {
        let w = self
            .workers
            .values_mut()
            .find(|w| w.bootstrap == bootstrap)
            .ok_or(ServerError::Unauthorised)?;
        let other = w.token.as_ref().is_some_and(|t| t != token);
        if w.is_finished() || w.private.is_none() || other || token.len() < 16 {
            return Err(ServerError::Unauthorised);
        }
        w.token = Some(token.to_string());
        w.last_ping = Some(self.now);
        Ok(w.id)
    }

    /// Its agent is there.
    pub fn record_ping(&mut self, worker: Ulid) {
        let now = self.now;
        if let Some(w) = self.workers.get_mut(&worker) {
            w.last_ping = Some(now);
        }
    }

    /// What its agent is to do; panics on an id that this server never gave.
    pub fn worker_ping(&mut self, worker: Ulid) -> Ping {
        self.record_ping(worker);
        let w = &self.workers[&worker];
        let f = &self.factories[&w.factory];
        let job = w.job.filter(|_| !w.wait_for_flush).map(|job| &self.jobs[&job]);
        Ping {
            poweroff: w.is_finished(),
            job: job.map(describe),
            factory_info: Some(json!({ "id": f.id, "name": f.name, "private": w.private })),
            factory_metadata: w.metadata.clone(),
        }
    }

    pub(crate) fn worker_append(&mut self, worker: Ulid, lines: Vec<Append>) {
        let now = self.now;
        let Some(w) = self.workers.get_mut(&worker) else {
            return;
        };
        for line in lines {
            w.events.push(JobEvent {
                seq: w.events.len(),
                task: None,
                stream: line.stream,
                time: now,
                time_remote: Some(line.time),
                payload: line.payload,
            });
        }
    }

    pub(crate) fn diagnostics(&mut self, worker: Ulid, wanted: bool) {
        if let Some(w) = self.workers.get_mut(&worker) {
            w.diagnostics = wanted && !w.deleted;
        }
    }

    pub(crate) fn diagnostics_complete(&mut self, worker: Ulid, hold: bool) -> Result<(), ServerError> {
        self.diagnostics(worker, false);
        if hold {
            self.hold(worker, "diagnostics requested hold")?;
        }
        self.recycle(worker)
    }
}

fn describe(j: &Job) -> PingJob {
    let task = |(i, t): (usize, &super::types::Task)| PingTask {
        id: i as u32,
        name: t.spec.name.clone(),
        script: t.spec.script.clone(),
        env_clear: t.spec.env_clear,
        env: t.spec.env.clone(),
        uid: t.spec.uid.unwrap_or(0),
        gid: t.spec.gid.unwrap_or(0),
        workdir: t.spec.workdir.clone().unwrap_or_else(|| "/".to_string()),
    };
    let input = |i: &super::types::Input| {
        i.file.map(|file| PingInput {
            name: i.name.clone(),
            id: file.to_string(),
        })
    };
    PingJob {
        id: j.id.to_string(),
        name: j.name.clone(),
        tasks: j.tasks.iter().enumerate().map(task).collect(),
        inputs: j.inputs.iter().filter_map(input).collect(),
        output_rules: j.output_rules.iter().map(|(_, rule)| rule.clone()).collect(),
    }
}

/// The streams that newer servers know (buildomat, `common/src/job_streams.rs`).
fn is_known_stream(stream: &str) -> bool {
    let parts: Vec<&str> = stream.split('.').collect();
    matches!(
        parts[..],
        ["agent" | "console" | "control" | "error" | "panic" | "stderr" | "stdout" | "task" | "worker"]
            | ["bg" | "diag", _]
            | ["bg", _, "stdout" | "stderr"]
    )
}
