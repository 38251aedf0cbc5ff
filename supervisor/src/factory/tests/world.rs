//! A world in memory for the core: a server, a host, a clock and a disk, in a few lines. Answers come in
//! any order, get lost, and everything can go away.

use std::collections::{BTreeMap, BTreeSet};

use protocol::{BootstrapToken, Exit, SlotName, State, Uid};

use super::super::*;
use crate::control::status::View;
use crate::identity::{InstanceId, Owner};
use crate::worker::Worker;

pub const CONFIG: &str = "[general]\nbaseurl = \"http://h\"\n[factory]\ntoken_file = \"/t\"\n\
    [slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\nconflicts_with_slots = [\"b\"]\n\
    [slots.b]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n\
    [slots.c]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V3\"\n";

pub struct World {
    pub core: Factory,
    pub now: u64,
    pub disk: BTreeMap<WorkerId, Worker>,
    pub pending: Vec<Output>,
    pub server: BTreeMap<WorkerId, ServerWorker>,
    pub jobs_of: BTreeMap<WorkerId, JobId>,
    pub queue: Vec<Lease>,
    /// Leased jobs without a worker, and when they return to the queue.
    pub leased: Vec<(u64, Lease)>,
    pub host: BTreeMap<WorkerId, (SlotName, State)>,
    pub done: BTreeSet<JobId>,
    pub failed: BTreeSet<JobId>,
    pub server_up: bool,
    pub helper_up: bool,
    pub old_server: bool,
    /// No agent comes online or ends its job.
    pub agents_sleep: bool,
    /// The next answer of this kind is lost after it was carried out.
    pub lose: Option<&'static str>,
    pub start_fails: Option<&'static str>,
    /// Questions for a job are answered so.
    pub lease_fails: Option<CallError>,
    pub refuses_workers: bool,
    pub said: Vec<String>,
    pub counts: BTreeMap<&'static str, usize>,
    ids: u128,
    agents: BTreeMap<WorkerId, usize>,
}

pub fn here() -> Identity {
    Identity::new("here", InstanceId::parse("00000000").unwrap())
}

pub fn job(n: u128) -> JobId {
    JobId::try_from(WorkerId::from_bits(n).to_string()).unwrap()
}

fn kind(output: &Output) -> &'static str {
    match output {
        Output::ListServer => "workers",
        Output::ListHost => "list",
        Output::Lease(_) => "lease",
        Output::MakeWorker { .. } => "make",
        Output::Renew { .. } => "renew",
        Output::Act(_, action) => action.name(),
        Output::Save(_) | Output::SaveDrain(..) | Output::Remove(_) | Output::Log(_) => "disk",
    }
}

impl World {
    pub fn new() -> Self {
        let core = Factory::new(here(), Config::parse(CONFIG).unwrap(), Vec::new(), 7, 1000);
        Self {
            core,
            now: 1000,
            disk: BTreeMap::new(),
            pending: Vec::new(),
            server: BTreeMap::new(),
            jobs_of: BTreeMap::new(),
            queue: Vec::new(),
            leased: Vec::new(),
            host: BTreeMap::new(),
            done: BTreeSet::new(),
            failed: BTreeSet::new(),
            server_up: true,
            helper_up: true,
            old_server: false,
            agents_sleep: false,
            lose: None,
            start_fails: None,
            lease_fails: None,
            refuses_workers: false,
            said: Vec::new(),
            counts: BTreeMap::new(),
            ids: 1000,
            agents: BTreeMap::new(),
        }
    }

    pub fn view(&self) -> View<'_> {
        View {
            factory: &self.core,
            now: self.now,
            ahead: 0,
        }
    }

    pub fn submit(&mut self, n: u128, target: char) {
        let target = format!("01HZX3N8Q4J5K6M7P8R9S0T1V{target}").parse().unwrap();
        self.queue.push(Lease { target, job: job(n) });
    }

    pub fn tell(&mut self, input: Input) {
        let mut saved = Vec::new();
        for output in self.core.handle(self.now, input) {
            match output {
                Output::Save(worker) => drop(self.disk.insert(worker.id, worker)),
                Output::Remove(worker) => drop(self.disk.remove(&worker)),
                Output::SaveDrain(slot, drained) => saved.push(Input::DrainSaved(slot, drained)),
                Output::Log(say) => self.said.push(say.text),
                output => self.pending.push(output),
            }
        }
        for input in saved {
            self.tell(input);
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
        // What a new life counts anew is not saved before something else changes.
        self.disk
            .values_mut()
            .for_each(|worker| worker.waiting_since = self.now);
        self.core = Factory::new(here(), Config::parse(CONFIG).unwrap(), workers, 8, self.now);
        // What a new life begins with is new: the waits.
        self.disk = self.core.workers().map(|w| (w.id, w.clone())).collect();
        self.tell(Input::Tick);
    }

    pub fn reboot(&mut self) {
        for (_, state) in self.host.values_mut() {
            if *state == State::Running {
                *state = State::Exited(Exit::Unknown);
            }
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
            self.expire();
            return self.tell(Input::Tick);
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
        self.tell(input);
    }

    /// Until `end` holds; at most so many steps.
    pub fn run(&mut self, end: impl Fn(&World) -> bool) {
        for n in 0..20_000 {
            if end(self) {
                return;
            }
            self.step(n * 7);
            if n % 5 == 0 && !self.agents_sleep {
                self.agents_work();
            }
        }
        panic!("no end: {:#?} {:#?} {:?}", self.disk, self.server, self.said);
    }

    pub fn is_empty(&self) -> bool {
        self.disk.is_empty()
            && self.host.is_empty()
            && self.server.is_empty()
            && self.queue.is_empty()
            && self.leased.is_empty()
    }

    fn expire(&mut self) {
        let now = self.now;
        let (old, young): (Vec<_>, Vec<_>) = std::mem::take(&mut self.leased)
            .into_iter()
            .partition(|(at, _)| *at <= now);
        self.leased = young;
        self.queue.extend(old.into_iter().map(|(_, lease)| lease));
    }

    /// Agents come online, then their jobs end.
    pub fn agents_work(&mut self) {
        for (id, w) in &mut self.server {
            let running = self
                .host
                .get(id)
                .is_some_and(|(_, state)| *state == State::Running);
            if !running || w.hold || w.private.is_none() {
                continue;
            }
            if w.online {
                w.recycle = true;
                if let Some(job) = self.jobs_of.get(id).filter(|job| !self.failed.contains(job)) {
                    self.done.insert(job.clone());
                }
            }
            w.online = true;
        }
    }

    fn check(&self) {
        let config = Config::parse(CONFIG).unwrap();
        let slots: Vec<&SlotName> = self.host.values().map(|(slot, _)| slot).collect();
        for (i, a) in slots.iter().enumerate() {
            assert!(
                !slots[..i].iter().any(|b| a == b || config.conflict(a, b)),
                "two workers on {slots:?}"
            );
        }
        for (job, count) in self
            .jobs_of
            .values()
            .map(|job| (job, self.jobs_of.values().filter(|j| *j == job).count()))
        {
            assert!(count == 1, "two workers for job {job}");
        }
    }

    fn carry_out(&mut self, output: Output) -> Input {
        let of_helper = matches!(
            output,
            Output::ListHost
                | Output::Act(
                    _,
                    Action::CreateUser { .. } | Action::InstallAgent { .. } | Action::HostDelete
                )
        );
        if !(if of_helper { self.helper_up } else { self.server_up }) {
            return error(&output);
        }
        match output {
            Output::ListServer => Input::ServerListed(Ok(self.server.values().cloned().collect())),
            Output::ListHost => Input::HostListed(Ok(self.list())),
            Output::Lease(_) if let Some(error) = self.lease_fails.clone() => Input::Leased(Err(error)),
            Output::Lease(targets) => {
                let at = self
                    .queue
                    .iter()
                    .position(|lease| targets.contains(&lease.target));
                let lease = at.map(|at| self.queue.remove(at));
                self.leased
                    .extend(lease.clone().map(|lease| (self.now + 60_000, lease)));
                Input::Leased(Ok(lease))
            }
            Output::MakeWorker { target, job } => self.make(target, job),
            Output::Renew { worker, .. } => Input::Renewed(worker, Ok(false)),
            Output::Act(id, action) => Input::Done(id, self.act(id, action)),
            Output::Save(_) | Output::SaveDrain(..) | Output::Remove(_) | Output::Log(_) => {
                unreachable!("carried out at once")
            }
        }
    }

    fn list(&self) -> Vec<WorkerInfo> {
        let uid = Uid::try_from(5000).unwrap();
        let info = |(id, (slot, state)): (&WorkerId, &(SlotName, State))| WorkerInfo {
            worker: *id,
            slot: slot.clone(),
            uid,
            state: *state,
            disk: None,
        };
        self.host.iter().map(info).collect()
    }

    fn make(&mut self, target: TargetId, job: JobId) -> Input {
        if self.refuses_workers || self.leased.iter().all(|(_, lease)| lease.job != job) {
            return Input::WorkerMade(job, Err(CallError::refused(Peer::Server, "no such lease")));
        }
        self.leased.retain(|(_, lease)| lease.job != job);
        self.ids += 1;
        let worker = ServerWorker {
            id: WorkerId::from_bits(self.ids),
            target,
            private: None,
            bootstrap: Some(BootstrapToken::try_from("t".repeat(64)).unwrap()),
            online: false,
            hold: false,
            recycle: false,
        };
        self.server.insert(worker.id, worker.clone());
        self.jobs_of.insert(worker.id, job.clone());
        Input::WorkerMade(job, Ok(worker))
    }

    fn act(&mut self, id: WorkerId, action: Action) -> Event {
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
                let w = self
                    .server
                    .get_mut(&id)
                    .expect("it is associated before it is deleted");
                if w.private
                    .as_ref()
                    .is_some_and(|old| matches!(here().owner(Some(old)), Owner::Other(_)))
                {
                    return Event::CallFailed(CallError::passing(Peer::Server, "not authorised"));
                }
                assert!(
                    w.private.as_ref().is_none_or(|old| *old == here().mark(&slot)),
                    "the slot is set once"
                );
                w.private = Some(here().mark(&slot));
            }
            Action::CreateUser { slot } => {
                let config = Config::parse(CONFIG).unwrap();
                let other = |(o, (s, _)): (&WorkerId, &(SlotName, State))| {
                    *o != id && (*s == slot || config.conflict(s, &slot))
                };
                if self.host.iter().any(other) {
                    return Event::CallFailed(CallError::passing(Peer::Helper, "slot taken"));
                }
                self.host.entry(id).or_insert((slot, State::Created));
            }
            Action::InstallAgent { .. } => {
                if let Some(reason) = self.start_fails {
                    return Event::StartFailed(reason.into());
                }
                let Some((_, state)) = self.host.get_mut(&id) else {
                    return Event::HostLost;
                };
                if *state == State::Created {
                    *self.agents.entry(id).or_default() += 1;
                    assert!(
                        self.server.get(&id).is_none_or(|w| !w.online),
                        "a second agent after one was online"
                    );
                    *state = State::Running;
                }
            }
            Action::HostKill => {
                if let Some((_, state)) = self.host.get_mut(&id) {
                    *state = State::Exited(Exit::Unknown);
                }
            }
            Action::ReportFailure { .. } => {
                if self.old_server {
                    return Event::CannotReport("too old".into());
                }
                self.server.get_mut(&id).expect("told before it is deleted").hold = true;
                self.failed.extend(
                    self.jobs_of
                        .get(&id)
                        .filter(|job| !self.done.contains(job))
                        .cloned(),
                );
            }
            Action::HostDelete => drop(self.host.remove(&id)),
            Action::ServerDelete { .. } => {
                assert!(
                    !self.host.contains_key(&id),
                    "deleted on the server while the host still has it"
                );
                self.server.remove(&id);
                self.failed.extend(
                    self.jobs_of
                        .get(&id)
                        .filter(|job| !self.done.contains(job))
                        .cloned(),
                );
            }
        }
        done
    }

    /// A person lifts every hold.
    pub fn release(&mut self) {
        for w in self.server.values_mut().filter(|w| w.hold) {
            (w.hold, w.recycle) = (false, true);
        }
    }
}

fn error(output: &Output) -> Input {
    let t = |peer| CallError::passing(peer, "away");
    match output.clone() {
        Output::ListServer => Input::ServerListed(Err(t(Peer::Server))),
        Output::ListHost => Input::HostListed(Err(t(Peer::Helper))),
        Output::Lease(_) => Input::Leased(Err(t(Peer::Server))),
        Output::MakeWorker { job, .. } => Input::WorkerMade(job, Err(t(Peer::Server))),
        Output::Renew { worker, .. } => Input::Renewed(worker, Err(t(Peer::Server))),
        Output::Act(
            id,
            Action::Associate { .. } | Action::ReportFailure { .. } | Action::ServerDelete { .. },
        ) => Input::Done(id, Event::CallFailed(t(Peer::Server))),
        Output::Act(id, _) => Input::Done(id, Event::CallFailed(t(Peer::Helper))),
        Output::Save(_) | Output::SaveDrain(..) | Output::Remove(_) | Output::Log(_) => Input::Tick,
    }
}
