//! A test bed in memory for the core: the test bed's server and helper, a clock and a disk. Answers come in any order,
//! get lost, and everything can stop.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use protocol::{BootstrapToken, Exit, SlotName, State};
use testbed::fake_server::{self, Job, JobSpec, Progress};
use testbed::helper_model::{Agent, Configuration, Model};

use super::super::*;
use crate::buildomat::ServerTarget;
use crate::control::status::StatusInput;
use crate::identity::{InstanceId, Owner};
use crate::worker::Worker;

pub const CONFIG: &str = "[general]\nbaseurl = \"http://h\"\n[factory]\ntoken_file = \"/t\"\n\
    [slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\nconflicts_with_slots = [\"b\"]\n\
    [slots.b]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n\
    [slots.c]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V3\"\n";

pub struct CoreTestBed {
    pub core: Factory,
    /// That of the next run.
    pub config: Config,
    pub now: u64,
    pub disk: BTreeMap<WorkerId, Worker>,
    pub pending: Vec<Output>,
    pub server: fake_server::State,
    factory: WorkerId,
    pub host: Model,
    pub server_up: bool,
    pub helper_up: bool,
    /// No agent comes online or ends its job.
    pub agents_sleep: bool,
    /// The next answer of this kind is lost after it was carried out.
    pub lose: Option<&'static str>,
    pub start_fails: Option<&'static str>,
    /// Lease requests are answered so.
    pub lease_fails: Option<CallError>,
    pub refuses_workers: bool,
    /// What the server has with a name; none where it has no call for that.
    pub targets: Option<Vec<ServerTarget>>,
    /// Requests for them are answered with an error.
    pub targets_fail: bool,
    pub logged: Vec<String>,
    pub counts: BTreeMap<&'static str, usize>,
}

pub fn here() -> Identity {
    Identity::new("here", InstanceId::parse("00000000").unwrap())
}

pub fn job(n: u128) -> JobId {
    job_id(WorkerId::from_bits(n))
}

/// A target or a job in the server's type.
pub fn ulid(id: impl std::fmt::Display) -> WorkerId {
    id.to_string().parse().unwrap()
}

fn moment(now: u64) -> Timestamp {
    Timestamp::from_millisecond(now as i64).unwrap()
}

fn kind(output: &Output) -> &'static str {
    match output {
        Output::ListServer => "workers",
        Output::ListHost => "list",
        Output::ListTargets => "targets",
        Output::Lease(_) => "lease",
        Output::MakeWorker { .. } => "make",
        Output::Renew { .. } => "renew",
        Output::CarryOut(_, action) => action.name(),
        Output::Save(_) | Output::SaveDrain(..) | Output::Remove(_) | Output::Log(_) => "disk",
    }
}

impl CoreTestBed {
    pub fn new() -> Self {
        Self::with(CONFIG)
    }

    /// With another configuration, which has the same slots.
    pub fn with(config: &str) -> Self {
        let config = Config::parse(config).unwrap();
        let mut server = fake_server::State::with(moment(1000), fake_server::IdGenerator::of_seed(7));
        for slot in Config::parse(CONFIG).unwrap().slots.values() {
            server.targets.insert(ulid(&slot.target), slot.target.to_string());
        }
        let (factory, _) = server.add_factory("f");
        let uids = config.factory.uid_range;
        let host = Model::new(Configuration::from(&config), uids.first.get()..=uids.last.get());
        let core = Factory::new(here(), config.clone(), Vec::new(), 7, 1000);
        Self {
            core,
            config,
            now: 1000,
            disk: BTreeMap::new(),
            pending: Vec::new(),
            server,
            factory,
            host,
            server_up: true,
            helper_up: true,
            agents_sleep: false,
            lose: None,
            start_fails: None,
            lease_fails: None,
            refuses_workers: false,
            targets: None,
            targets_fail: false,
            logged: Vec::new(),
            counts: BTreeMap::new(),
        }
    }

    pub fn status_input(&self) -> StatusInput<'_> {
        StatusInput {
            factory: &self.core,
            now: self.now,
            ahead: 0,
        }
    }

    pub fn submit(&mut self, n: u128, target: char) {
        let made = self.submit_any(&format!("01HZX3N8Q4J5K6M7P8R9S0T1V{target}"));
        let id = WorkerId::from_bits(n);
        let made = self.server.jobs.remove(&made).unwrap();
        self.server.jobs.insert(id, Job { id, ..made });
    }

    fn submit_any(&mut self, target: &str) -> WorkerId {
        let spec = JobSpec {
            max_runtime: Duration::from_secs(86_400 * 3_650),
            ..JobSpec::script(target, "true")
        };
        self.server.submit_spec(spec).unwrap()
    }

    /// A worker that this supervisor has not asked for; with a job if its agent is there.
    pub fn insert(&mut self, worker: &ServerWorker) {
        let made = self
            .server
            .create_worker(self.factory, ulid(worker.target), None, false);
        let made = self.server.workers.remove(&made.unwrap()).unwrap();
        let job = worker.online.then(|| self.submit_any(&worker.target.to_string()));
        if let Some(job) = job {
            self.server.jobs.get_mut(&job).unwrap().worker = Some(worker.id);
        }
        let worker = fake_server::Worker {
            id: worker.id,
            private: worker.private.clone(),
            bootstrap: worker
                .bootstrap
                .as_ref()
                .map_or("-", BootstrapToken::as_str)
                .into(),
            token: worker.online.then(|| "t".repeat(32)),
            job,
            ..made
        };
        self.server.workers.insert(worker.id, worker);
    }

    /// What the server says of its workers.
    pub fn listed(&self) -> BTreeMap<WorkerId, ServerWorker> {
        let live = self.server.workers.values().filter(|w| !w.deleted);
        live.map(|w| (w.id, answered(w))).collect()
    }

    fn ended(&self, how: Progress) -> BTreeSet<JobId> {
        let ended = self.server.jobs.values().filter(|job| job.progress == how);
        ended.map(|job| job_id(job.id)).collect()
    }

    pub fn done(&self) -> BTreeSet<JobId> {
        self.ended(Progress::Completed)
    }

    pub fn failed(&self) -> BTreeSet<JobId> {
        self.ended(Progress::Failed)
    }

    /// How many jobs can be leased.
    pub fn queued(&self) -> usize {
        let queued = self.server.jobs.values().filter(|job| job.is_queued());
        queued
            .filter(|job| !self.server.leases.contains_key(&job.id))
            .count()
    }

    /// How many workers were made for jobs.
    pub fn made(&self) -> usize {
        self.server.workers.values().filter(|w| w.job.is_some()).count()
    }

    /// The host has a worker that the core has not asked for.
    pub fn on_host(&mut self, id: WorkerId, slot: &str, agent: Agent) {
        self.host.create_user(id, &slot.parse().unwrap()).unwrap();
        self.host.install_agent(id, agent).unwrap();
    }

    pub fn send_input(&mut self, input: Input) {
        let mut saved = Vec::new();
        for output in self.core.handle(self.now, input) {
            match output {
                Output::Save(worker) => drop(self.disk.insert(worker.id, worker)),
                Output::Remove(worker) => drop(self.disk.remove(&worker)),
                Output::SaveDrain(slot, drained) => saved.push(Input::DrainSaved(slot, drained)),
                Output::Log(line) => self.logged.push(line.text),
                output => self.pending.push(output),
            }
        }
        for input in saved {
            self.send_input(input);
        }
        let kept: Vec<&Worker> = self.core.workers().collect();
        assert_eq!(
            kept,
            self.disk.values().collect::<Vec<_>>(),
            "the disk knows less than the core"
        );
    }

    /// The core dies and comes back with what it saved. What was under way may have happened or not.
    pub fn crash(&mut self, happened: bool) {
        for output in std::mem::take(&mut self.pending) {
            if happened {
                self.carry_out(output);
            }
        }
        let workers = self.disk.values().cloned().collect();
        // What a new run counts anew is not saved before something else changes.
        self.disk
            .values_mut()
            .for_each(|worker| worker.waiting_since = self.now);
        self.core = Factory::new(here(), self.config.clone(), workers, 8, self.now);
        // What a new run begins with is new: the waits.
        self.disk = self.core.workers().map(|w| (w.id, w.clone())).collect();
        self.send_input(Input::Tick);
    }

    pub fn reboot(&mut self) {
        for id in self.host.workers().map(|(id, _)| id).collect::<Vec<_>>() {
            self.host.end(id, Exit::Unknown);
        }
    }

    /// Answer the pending output number `which` (of any), or let the time pass to the next deadline.
    pub fn step(&mut self, which: usize) {
        if self.pending.is_empty() {
            self.now = self
                .core
                .next_deadline()
                .expect("nothing pending, so a deadline")
                .max(self.now);
            self.server_ticks();
            return self.send_input(Input::Tick);
        }
        let output = self.pending.swap_remove(which % self.pending.len());
        self.now += 1;
        *self.counts.entry(kind(&output)).or_default() += 1;
        let name = kind(&output);
        let mut input = self.carry_out(output.clone());
        if self.lose == Some(name) {
            self.lose = None;
            input = error(&output);
        }
        self.check();
        self.send_input(input);
    }

    /// Until `end` holds; at most so many steps.
    pub fn run(&mut self, end: impl Fn(&CoreTestBed) -> bool) {
        for n in 0..20_000 {
            if end(self) {
                return;
            }
            self.step(n * 7);
            if n % 5 == 0 && !self.agents_sleep {
                self.agents_work();
            }
        }
        panic!("no end: {:#?} {:#?} {:?}", self.disk, self.server, self.logged);
    }

    pub fn is_empty(&self) -> bool {
        self.disk.is_empty()
            && self.host.workers().next().is_none()
            && self.listed().is_empty()
            && self.queued() == 0
            && self.server.leases.is_empty()
    }

    fn runs(&self, id: WorkerId) -> bool {
        self.host.get(id).is_some_and(|w| w.state == State::Running)
    }

    /// Agents that run talk to the server, and it does what it does by itself.
    fn server_ticks(&mut self) {
        self.server.now = moment(self.now);
        for w in self.listed().into_values() {
            if w.online && self.runs(w.id) {
                self.server.worker_ping(w.id);
            }
        }
        self.server.tick();
    }

    /// Agents come online, then their jobs end.
    pub fn agents_work(&mut self) {
        for w in self.listed().into_values() {
            if !self.runs(w.id) || w.hold || w.private.is_none() {
                continue;
            }
            if w.online {
                if let Some(job) = self.server.workers[&w.id].job {
                    self.server.finish(job, false);
                }
                self.server.recycle(w.id).unwrap();
            }
            // One that is told to go, or another's, is not let in.
            let bootstrap = self.server.workers[&w.id].bootstrap.clone();
            let _ = self.server.bootstrap(&bootstrap, &"t".repeat(32));
        }
    }

    fn check(&self) {
        let config = Config::parse(CONFIG).unwrap();
        let slots: Vec<&SlotName> = self.host.workers().map(|(_, w)| &w.slot).collect();
        for (i, a) in slots.iter().enumerate() {
            assert!(
                !slots[..i].iter().any(|b| a == b || config.are_conflicting(a, b)),
                "two workers on {slots:?}"
            );
        }
        let mut jobs = BTreeSet::new();
        for job in self.server.workers.values().filter_map(|w| w.job) {
            assert!(jobs.insert(job), "two workers for job {job}");
        }
    }

    fn carry_out(&mut self, output: Output) -> Input {
        let of_helper = matches!(
            output,
            Output::ListHost
                | Output::CarryOut(
                    _,
                    Action::CreateUser { .. } | Action::InstallAgent { .. } | Action::HostDelete
                )
        );
        if !(if of_helper { self.helper_up } else { self.server_up }) {
            return error(&output);
        }
        self.server.now = moment(self.now);
        match output {
            Output::ListServer => Input::ServerListed(Ok(self.listed().into_values().collect())),
            Output::ListHost => Input::HostListed(Ok(self.host.list(None, protocol::MAX_LIST).0)),
            Output::ListTargets => Input::TargetsListed(match self.targets_fail {
                true => Err(CallError::temporary(Peer::Server, "too busy")),
                false => Ok(self.targets.clone()),
            }),
            Output::Lease(_) if let Some(error) = self.lease_fails.clone() => Input::Leased(Err(error)),
            Output::Lease(targets) => {
                let targets: Vec<WorkerId> = targets.iter().map(ulid).collect();
                let lease = self.server.lease(self.factory, &targets);
                let lease = lease.map(|(job, target)| Lease {
                    target: target.to_string().parse().unwrap(),
                    job: job_id(job),
                });
                Input::Leased(Ok(lease))
            }
            Output::MakeWorker { target, job } => self.make(target, job),
            Output::Renew { worker, job } => {
                let renewed = self.server.renew(self.factory, ulid(job));
                Input::Renewed(worker, Ok(renewed))
            }
            Output::CarryOut(id, action) => Input::Done(id, self.carry_out_action(id, action)),
            Output::Save(_) | Output::SaveDrain(..) | Output::Remove(_) | Output::Log(_) => {
                unreachable!("carried out at once")
            }
        }
    }

    fn make(&mut self, target: TargetId, job: JobId) -> Input {
        let made = match self.refuses_workers {
            true => Err("not now".to_owned()),
            false => {
                let made = self
                    .server
                    .create_worker(self.factory, ulid(target), Some(ulid(&job)), false);
                made.map_err(|refusal| refusal.to_string())
            }
        };
        let made = made.map(|id| answered(&self.server.workers[&id]));
        Input::WorkerMade(job, made.map_err(|why| CallError::refused(Peer::Server, why)))
    }

    fn carry_out_action(&mut self, id: WorkerId, action: Action) -> Event {
        let done = match &action {
            Action::Associate { .. } => Event::Associated,
            Action::CreateUser { .. } => Event::UserCreated,
            Action::InstallAgent { .. } => Event::AgentStarted,
            Action::HostKill => Event::Killed,
            Action::ReportFailure { .. } => Event::FailureReported,
            Action::HostDelete => Event::HostClean,
            Action::ServerDelete { .. } => Event::ServerDeleted,
        };
        match action {
            Action::Associate { slot, .. } => {
                let body = fake_server::Associate {
                    private: here().owner_tag(&slot),
                    ip: None,
                    metadata: None,
                };
                let is_refused = self.server.associate(self.factory, id, body).is_err();
                let private = self.server.workers[&id].private.as_deref();
                if is_refused && matches!(here().owner(private), Owner::Other(_)) {
                    return Event::CallFailed(CallError::temporary(Peer::Server, "not authorised"));
                }
                assert!(
                    !is_refused,
                    "the slot is set once, and no worker is associated after its deletion"
                );
            }
            Action::CreateUser { slot } => {
                if let Err(kind) = self.host.create_user(id, &slot) {
                    return Event::CallFailed(CallError::temporary(Peer::Helper, format!("{kind:?}")));
                }
            }
            Action::InstallAgent { .. } => {
                if let Some(reason) = self.start_fails {
                    return Event::StartFailed(reason.into());
                }
                let Some(w) = self.host.get(id) else {
                    return Event::HostLost;
                };
                let is_online = self
                    .server
                    .workers
                    .get(&id)
                    .is_some_and(|w| !w.deleted && w.is_online());
                assert!(
                    w.state != State::Created || !is_online,
                    "a second agent after one was online"
                );
                self.host.install_agent(id, Agent::Stays).unwrap();
            }
            Action::HostKill => drop(self.host.kill(id)),
            Action::ReportFailure { .. } if self.server.no_fail => {
                return Event::CannotReport("too old".into());
            }
            Action::ReportFailure { .. } => self.server.factory_fail(self.factory, id, "it failed").unwrap(),
            Action::HostDelete => self.host.delete(id),
            Action::ServerDelete { .. } => {
                assert!(
                    self.host.get(id).is_none(),
                    "deleted on the server while the host still has it"
                );
                assert!(self.server.destroy(self.factory, id).unwrap());
            }
        }
        done
    }

    /// An operator lifts every hold, and has the workers recycled.
    pub fn release(&mut self) {
        for id in self.listed().into_values().filter(|w| w.hold).map(|w| w.id) {
            self.server.release(id).unwrap();
            self.server.recycle(id).unwrap();
        }
    }
}

fn job_id(id: WorkerId) -> JobId {
    JobId::try_from(id.to_string()).unwrap()
}

/// A worker as the client reads it.
fn answered(worker: &fake_server::Worker) -> ServerWorker {
    let text = serde_json::to_string(&worker.to_factory()).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn error(output: &Output) -> Input {
    let t = |peer| CallError::temporary(peer, "unreachable");
    match output.clone() {
        Output::ListServer => Input::ServerListed(Err(t(Peer::Server))),
        Output::ListHost => Input::HostListed(Err(t(Peer::Helper))),
        Output::ListTargets => Input::TargetsListed(Err(t(Peer::Server))),
        Output::Lease(_) => Input::Leased(Err(t(Peer::Server))),
        Output::MakeWorker { job, .. } => Input::WorkerMade(job, Err(t(Peer::Server))),
        Output::Renew { worker, .. } => Input::Renewed(worker, Err(t(Peer::Server))),
        Output::CarryOut(
            id,
            Action::Associate { .. } | Action::ReportFailure { .. } | Action::ServerDelete { .. },
        ) => Input::Done(id, Event::CallFailed(t(Peer::Server))),
        Output::CarryOut(id, _) => Input::Done(id, Event::CallFailed(t(Peer::Helper))),
        Output::Save(_) | Output::SaveDrain(..) | Output::Remove(_) | Output::Log(_) => Input::Tick,
    }
}
