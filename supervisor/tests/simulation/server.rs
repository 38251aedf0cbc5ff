//! The test bed's server, with the clock of this simulation. Its rules are the test bed's; here is what the simulation
//! makes of it: jobs that say how long they take, agents that are numbers, and a database that is rolled back.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::time::Duration;

use jiff::Timestamp;
use protocol::{TargetId, WorkerId};
use serde_json::Value;
use supervisor::buildomat::HttpRequest;
use testbed::fake_server::{IdGenerator, Job, JobSpec, Progress, State, Worker};

/// How long the server leases a job.
pub const LEASE_MS: u64 = testbed::fake_server::LEASE.as_millis() as u64;
/// The server ends a job that has taken so long, and whose agent is there. One whose agent never came it leaves to
/// the factory here, which is never helped out of it.
const MAX_RUNTIME: Duration = Duration::from_secs(900);
const NO_LIMIT: Duration = Duration::from_secs(86_400 * 365);
/// What the time of a simulation begins with.
const EPOCH_MS: u64 = 1_800_000_000_000;

/// A copy is a backup of its database.
#[derive(Clone, Debug)]
pub struct Server {
    state: State,
    factory: WorkerId,
    /// How much longer the server's time is than this simulation's, in which hosts have slept.
    slept: u64,
    /// When each job was leased last.
    pub leased_at: BTreeMap<WorkerId, u64>,
}

impl Deref for Server {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl DerefMut for Server {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

fn time(now: u64) -> Timestamp {
    Timestamp::from_millisecond((EPOCH_MS + now) as i64).expect("a time of this simulation")
}

/// The token of an agent, which is a number here.
fn token(agent: u64) -> String {
    format!("agent-{agent:0>16}")
}

impl Server {
    pub fn new(seed: u64) -> Self {
        let mut state = State::with(time(0), IdGenerator::of_seed(seed));
        for n in 1..=3 {
            let target = TargetId::from_bits(n).to_string();
            state.targets.insert(WorkerId::from_bits(n), target);
        }
        let (factory, _) = state.add_factory("f");
        Self {
            state,
            factory,
            slept: 0,
            leased_at: BTreeMap::new(),
        }
    }

    pub fn at(&mut self, now: u64) {
        self.state.now = time(now + self.slept);
    }

    /// All hosts sleep for so long.
    pub fn hosts_sleep(&mut self, now: u64, ms: u64) {
        self.slept += ms;
        self.at(now);
        self.state.tick();
    }

    /// What a right clock reads.
    pub fn wall(&self, now: u64) -> u64 {
        EPOCH_MS + now + self.slept
    }

    /// A call of the factory's: the status and the body that come back.
    pub fn call(&mut self, now: u64, call: &HttpRequest) -> (u16, Value) {
        let (me, body) = (self.factory, call.body.as_ref().unwrap_or(&Value::Null));
        let answer = self
            .state
            .factory_call(me, call.method.as_str(), &call.path, body);
        let answer = answer.unwrap_or_else(|refusal| refusal.answer("r"));
        let leased = answer.1["lease"]["job"].as_str();
        if let Some(job) = leased.and_then(|job| job.parse().ok()) {
            self.leased_at.insert(job, now);
        }
        answer
    }

    pub fn submit(&mut self, target: u64, takes: u64) {
        let spec = JobSpec {
            max_runtime: NO_LIMIT,
            ..JobSpec::script(
                &TargetId::from_bits(1 + u128::from(target)).to_string(),
                &takes.to_string(),
            )
        };
        self.state.submit_spec(spec).expect("a job as any other");
    }

    /// How long the worker's job takes.
    pub fn takes(&self, id: WorkerId) -> u64 {
        let job = self.workers.get(&id).and_then(|w| self.jobs.get(&w.job?));
        job.map_or(1_000, |job| job.tasks[0].spec.script.parse().expect("a time"))
    }

    /// An agent introduces itself. Is it let in?
    pub fn bootstrap(&mut self, id: WorkerId, agent: u64) -> bool {
        let Some(bootstrap) = self.workers.get(&id).map(|w| w.bootstrap.clone()) else {
            return false;
        };
        if self.state.bootstrap(&bootstrap, &token(agent)).is_err() {
            return false;
        }
        if let Some(job) = self.workers[&id]
            .job
            .and_then(|job| self.state.jobs.get_mut(&job))
        {
            job.max_runtime = MAX_RUNTIME;
        }
        true
    }

    /// The job of this agent is done. Is it one that the server knows?
    pub fn complete(&mut self, id: WorkerId, agent: u64) -> bool {
        let known = self.workers.get(&id).filter(|w| w.token == Some(token(agent)));
        let job = known.map(|w| w.job);
        if let Some(Some(job)) = job {
            self.finish(job, false);
        }
        job.is_some()
    }

    /// What the server does by itself, once a second. `pings`: is this agent there, and talking?
    /// Returns those whose agents it had to miss by itself, and when it last received a ping of each.
    pub fn tick(&mut self, pings: impl Fn(WorkerId, u64) -> bool) -> Vec<(WorkerId, u64)> {
        let talks = self.live().filter(|w| {
            let agent = w.token.as_ref().and_then(|token| token.strip_prefix("agent-"));
            agent.is_some_and(|agent| pings(w.id, agent.parse().expect("a number")))
        });
        for id in talks.map(|w| w.id).collect::<Vec<_>>() {
            self.record_ping(id);
        }
        let before = self.live().filter(|w| w.hold.is_none());
        let before: Vec<WorkerId> = before.map(|w| w.id).collect();
        self.state.tick();
        let held = before.iter().map(|id| &self.workers[id]);
        let missed = held.filter(|w| w.hold.is_some()).map(|w| {
            let last_ping = w.last_ping.expect("its agent has talked").as_millisecond();
            (w.id, (last_ping as u64).saturating_sub(EPOCH_MS + self.slept))
        });
        missed.collect()
    }

    pub fn live(&self) -> impl Iterator<Item = &Worker> {
        self.workers.values().filter(|w| !w.deleted)
    }

    /// The first job that can be leased for this target.
    pub fn queued_for(&self, target: &str) -> Option<WorkerId> {
        let mut jobs = self.open_jobs();
        let free = |job: &&Job| {
            job.is_queued() && !self.leases.contains_key(&job.id) && job.target.to_string() == target
        };
        jobs.find(free).map(|job| job.id)
    }

    /// A job of this target that was leased since then.
    pub fn leased_since(&self, target: &str, since: u64) -> Option<WorkerId> {
        let mut leased = self
            .leased_at
            .iter()
            .filter(|(_, at)| **at >= since)
            .map(|(job, _)| *job);
        leased.find(|job| {
            self.jobs
                .get(job)
                .is_some_and(|job| job.target.to_string() == target)
        })
    }

    /// Leave so many of the jobs that wait.
    pub fn cancel_all_but(&mut self, many: usize) {
        let waiting = self.open_jobs().filter(|job| job.is_queued());
        for job in waiting.map(|job| job.id).skip(many).collect::<Vec<_>>() {
            self.cancel(job).expect("it waits");
        }
    }

    /// The database is again what it was. What an operator has set is not in it; and the jobs that it has lost are
    /// submitted again, by those who wait for them.
    pub fn roll_back(&mut self, old: Server) {
        let new = std::mem::replace(self, old);
        (self.held, self.no_fail, self.now) = (new.held, new.no_fail, new.now);
        (self.hold_new_workers, self.slept) = (new.hold_new_workers, new.slept);
        for (id, job) in new.state.jobs {
            let anew = Job {
                worker: None,
                assigned: None,
                completed: None,
                progress: Progress::Pending,
                events: Vec::new(),
                max_runtime: NO_LIMIT,
                ..job
            };
            self.state.jobs.entry(id).or_insert(anew);
        }
    }
}
