//! The buildomat server's rules for a factory, as a plain value: it can be copied, and so rolled back.

use std::collections::BTreeMap;

use protocol::WorkerId;
use serde_json::{Value, json};
use supervisor::buildomat::JobId;

pub const LEASE_MS: u64 = 60_000;
const SILENT_MS: u64 = 600_000;
/// From a worker's making: one that is online and has no job by then is recycled.
const IDLE_MS: u64 = 1_800_000;
const MAX_RUNTIME_MS: u64 = 900_000;

#[derive(Clone, Debug)]
pub struct Worker {
    pub target: String,
    pub job: Option<JobId>,
    pub private: Option<String>,
    /// The agent that has introduced itself.
    pub agent: Option<u64>,
    pub hold: bool,
    pub recycle_asked: bool,
    pub deleted: bool,
    pub made: u64,
    pub heard: u64,
}

impl Worker {
    pub fn recycle(&self) -> bool {
        self.recycle_asked && !self.hold
    }
}

/// Why a job has failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    Cancelled,
    Overlong,
    /// Its worker was deleted, or told to go.
    Orphan,
    Told(String),
}

#[derive(Clone, Debug)]
pub struct Job {
    pub target: String,
    pub takes: u64,
    pub worker: Option<WorkerId>,
    pub assigned_at: u64,
    pub leased_at: u64,
    pub began: bool,
    pub cancelled: bool,
    pub end: Option<Result<(), Cause>>,
    pub lines: usize,
}

#[derive(Clone, Debug, Default)]
pub struct Server {
    pub workers: BTreeMap<WorkerId, Worker>,
    pub jobs: BTreeMap<JobId, Job>,
    leases: BTreeMap<JobId, u64>,
}

/// What an operator has set, which is not in the database that is rolled back.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    pub no_leases: bool,
    pub hold_new: bool,
    pub old: bool,
}

type Answer = (u16, Value);

fn refused(code: u16, message: &str) -> Answer {
    (code, json!({ "request_id": "r", "message": message }))
}

impl Server {
    pub fn view(id: WorkerId, w: &Worker) -> Value {
        json!({
            "id": id, "target": w.target, "private": w.private, "bootstrap": bootstrap(id),
            "online": w.agent.is_some(), "hold": w.hold, "recycle": w.recycle(),
        })
    }

    pub fn list(&self) -> Answer {
        let all = self.workers.iter().filter(|(_, w)| !w.deleted);
        (200, all.map(|(id, w)| Self::view(*id, w)).collect())
    }

    pub fn lease(&mut self, now: u64, targets: &[Value], settings: Settings) -> Answer {
        let wanted = |target: &str| targets.iter().any(|t| t == target);
        let free = |(id, job): &(&JobId, &mut Job)| {
            job.worker.is_none()
                && job.end.is_none()
                && !job.cancelled
                && wanted(&job.target)
                && !self.leases.contains_key(id)
        };
        let found = if settings.no_leases {
            None
        } else {
            self.jobs.iter_mut().find(free)
        };
        let Some((id, job)) = found else {
            return (200, json!({ "lease": null }));
        };
        job.leased_at = now;
        self.leases.insert(id.clone(), now + LEASE_MS);
        (200, json!({ "lease": { "job": id, "target": job.target } }))
    }

    pub fn renew(&mut self, now: u64, job: &JobId) -> Answer {
        let lease = self.leases.get_mut(job);
        let known = lease.map(|until| *until = now + LEASE_MS).is_some();
        (200, json!(known))
    }

    pub fn make(&mut self, now: u64, id: WorkerId, job: &JobId, hold: bool) -> Answer {
        let Some(j) = self.jobs.get_mut(job) else {
            return refused(500, "Internal Server Error");
        };
        if j.worker.is_some() || j.end.is_some() || j.cancelled {
            return refused(409, "job is already assigned, or not queued");
        }
        (j.worker, j.assigned_at) = (Some(id), now);
        let worker = Worker {
            target: j.target.clone(),
            job: Some(job.clone()),
            private: None,
            agent: None,
            hold,
            recycle_asked: false,
            deleted: false,
            made: now,
            heard: now,
        };
        self.leases.remove(job);
        let view = Self::view(id, &worker);
        self.workers.insert(id, worker);
        (201, view)
    }

    pub fn associate(&mut self, id: WorkerId, private: &str) -> Answer {
        match self.workers.get_mut(&id) {
            None => refused(500, "Internal Server Error"),
            Some(w) if w.deleted || w.private.as_ref().is_some_and(|p| p != private) => {
                refused(401, "not authorised")
            }
            Some(w) => {
                w.private = Some(private.to_owned());
                (204, Value::Null)
            }
        }
    }

    pub fn delete(&mut self, id: WorkerId) -> Answer {
        match self.workers.get_mut(&id) {
            None => refused(500, "Internal Server Error"),
            Some(w) => {
                w.deleted = true;
                self.end_orphans();
                (200, json!(true))
            }
        }
    }

    pub fn append(&mut self, id: WorkerId) -> Answer {
        let Some(w) = self.workers.get(&id) else {
            return refused(500, "Internal Server Error");
        };
        let Some(job) = &w.job else {
            let never = w.deleted || (w.recycle() && w.agent.is_none());
            return (200, json!({ "retry": !never }));
        };
        if let Some(job) = self.jobs.get_mut(job) {
            job.lines += 1;
        }
        (200, json!({ "retry": false }))
    }

    pub fn fail(&mut self, id: WorkerId, reason: &str, settings: Settings) -> Answer {
        if settings.old {
            return refused(404, "Not Found");
        }
        if !self.workers.contains_key(&id) {
            return refused(500, "Internal Server Error");
        }
        self.fail_worker(id, reason);
        (204, Value::Null)
    }

    fn fail_worker(&mut self, id: WorkerId, reason: &str) {
        let Some(w) = self.workers.get_mut(&id) else {
            return;
        };
        if w.deleted || w.recycle_asked {
            return;
        }
        (w.recycle_asked, w.hold) = (true, true);
        if let Some(job) = w.job.clone() {
            self.end(&job, Err(Cause::Told(reason.to_owned())));
        }
    }

    fn end(&mut self, job: &JobId, end: Result<(), Cause>) {
        self.leases.remove(job);
        if let Some(j) = self.jobs.get_mut(job) {
            j.end.get_or_insert(end);
        }
    }

    /// An agent introduces itself. Is it let in?
    pub fn bootstrap(&mut self, now: u64, id: WorkerId, agent: u64) -> bool {
        let Some(w) = self.workers.get_mut(&id) else {
            return false;
        };
        let other = w.agent.is_some_and(|known| known != agent);
        if w.deleted || w.recycle() || w.private.is_none() || other {
            return false;
        }
        (w.agent, w.heard) = (Some(agent), now);
        if let Some(job) = w.job.as_ref().and_then(|job| self.jobs.get_mut(job)) {
            job.began = true;
        }
        true
    }

    /// The job of this agent is done. Is it one that the server knows?
    pub fn complete(&mut self, id: WorkerId, agent: u64) -> bool {
        let Some(w) = self.workers.get(&id).filter(|w| w.agent == Some(agent)) else {
            return false;
        };
        if let Some(job) = w.job.clone() {
            self.end(&job, Ok(()));
        }
        true
    }

    pub fn expire_leases(&mut self) {
        self.leases.clear();
    }

    pub fn cancel(&mut self, job: &JobId) {
        if let Some(j) = self.jobs.get_mut(job).filter(|j| j.end.is_none()) {
            j.cancelled = true;
            self.leases.remove(job);
        }
    }

    /// Leave so many of the jobs that wait.
    pub fn cancel_all_but(&mut self, many: usize) {
        let waiting = self
            .jobs
            .values_mut()
            .filter(|job| job.end.is_none() && job.worker.is_none());
        for job in waiting.skip(many) {
            job.cancelled = true;
        }
    }

    /// What the server does by itself, once a second. `pings`: is this agent there, and talking?
    /// Returns those whose agents it had to miss by itself, and when it had heard from them last.
    pub fn tick(&mut self, now: u64, pings: impl Fn(WorkerId, u64) -> bool) -> Vec<(WorkerId, u64)> {
        self.leases.retain(|_, until| *until > now);
        let mut silent = Vec::new();
        for (id, w) in self.workers.iter_mut().filter(|(_, w)| !w.deleted) {
            if let Some(agent) = w.agent {
                if pings(*id, agent) {
                    w.heard = now;
                }
                if now > w.heard + SILENT_MS && !w.hold && !w.recycle() {
                    silent.push((*id, w.heard));
                }
            }
            let job = w.job.as_ref().and_then(|job| self.jobs.get_mut(job));
            match job {
                Some(job) if job.end.is_some() => w.recycle_asked = true,
                Some(job) if job.cancelled => {
                    job.end = Some(Err(Cause::Cancelled));
                    w.recycle_asked = true;
                }
                // It is the server's to end a job whose agent is there, and has nothing to do with it; but what it
                // takes for not begun, it leaves to the factory, and here that is never helped out of it.
                Some(job) if w.agent.is_some() && now > job.assigned_at + MAX_RUNTIME_MS => {
                    job.end = Some(Err(Cause::Overlong));
                    w.recycle_asked = true;
                }
                Some(_) => {}
                None => w.recycle_asked |= w.agent.is_some() && now > w.made + IDLE_MS,
            }
        }
        for (id, _) in &silent {
            self.fail_worker(*id, "agent has stopped pinging");
        }
        for job in self
            .jobs
            .values_mut()
            .filter(|j| j.cancelled && j.worker.is_none())
        {
            job.end.get_or_insert(Err(Cause::Cancelled));
        }
        self.end_orphans();
        silent
    }

    pub fn end_orphans(&mut self) {
        for w in self.workers.values().filter(|w| w.deleted || w.recycle()) {
            if let Some(job) = w.job.as_ref().and_then(|job| self.jobs.get_mut(job)) {
                job.end.get_or_insert(Err(Cause::Orphan));
            }
        }
    }
}

/// A worker's token: made of its id, so that a rolled-back server knows it still.
pub fn bootstrap(id: WorkerId) -> String {
    format!("{id}{id}{:0>12}", "x")
}

impl Server {
    pub fn open_jobs(&self) -> Vec<JobId> {
        self.jobs
            .iter()
            .filter(|(_, job)| job.end.is_none())
            .map(|(id, _)| id.clone())
            .collect()
    }
}
