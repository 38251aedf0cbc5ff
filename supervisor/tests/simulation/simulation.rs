//! The simulation: a server, a host, a network and a clock, and the order in which things happen in it.

use std::collections::{BTreeMap, VecDeque};

use protocol::config::Config;
use protocol::{Exit, SlotName, WorkerId};
use supervisor::backoff::{MAX_SERVER_WAIT, Rng};
use supervisor::control::api::{SlotState, Status};
use supervisor::factory::Input;

use crate::calls::InFlight;
use crate::checks::Checks;
use crate::host::Host;
use crate::plan::ConfigPlan;
use crate::report::Report;
use crate::script::{AgentFault, CallFault, CallKind, Item, Mode, Point, Script};
use crate::second::{SECOND, Second};
use crate::seed::below;
use crate::server::Server;
use crate::trace::Trace;

/// From the last fault until everything has come to its end, at most: a slot may rest for ten minutes, and as
/// long does the server wait for an agent that has gone silent; then an operator comes, and some jobs are left.
pub const SETTLE_MS: u64 = 1_500_000;
/// Within this time, while no fault is active, the factory has told what it knows.
const UNDISTURBED_MS: u64 = 300_000;
/// An operator looks after held workers this often, and releases those held for so long.
const VISIT_MS: u64 = 60_000;
const HELD_MS: u64 = 180_000;
pub const ONLINE_TIMEOUT_MS: u64 = 120_000;

#[derive(Debug)]
pub enum Event {
    Step(usize),
    Tick,
    Visit,
    Arrive(u64),
    Effect(u64),
    Again(u64),
    SimulatedResponse(u64),
    GiveUp(u64),
    Online(WorkerId, u64),
    Complete(WorkerId, u64),
    Ends(WorkerId, u64, Exit),
    Start,
    Reload,
    Back(Period),
    SecondStart,
}

/// What is not as usual for a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Period {
    Server,
    Helper,
    Host,
    NoLeases,
    HoldNew,
    Old,
    Drain,
    DrainSlot,
    Invalid,
    Disk,
    SecondCut,
    Undeletable,
}

/// How the supervisor's disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disk {
    Fine,
    Low,
    Full,
}

/// What the simulation asks of the code that runs the supervisor.
#[derive(Debug, Default)]
pub struct Requests {
    pub crash: Option<u64>,
    pub lose_database: bool,
    pub start: bool,
    pub inputs: Vec<Input>,
    /// An operator wants to know how things are.
    pub status: bool,
}

#[derive(Debug)]
pub struct Simulation {
    pub now: u64,
    pub script: Script,
    pub queue: BTreeMap<(u64, u64), Event>,
    pub sequence: u64,
    pub rng: Rng,
    pub server: Server,
    /// The script restores a snapshot.
    is_rolled_back: bool,
    pub snapshots: VecDeque<Server>,
    pub host: Host,
    pub locks: BTreeMap<WorkerId, u64>,
    pub plan: ConfigPlan,
    /// The configuration's file; None while it does not parse.
    pub file: Option<Config>,
    pub config: Config,
    pub server_mode: Mode,
    pub helper_mode: Mode,
    pub host_up: bool,
    pub until: BTreeMap<Period, u64>,
    pub drained: Option<SlotName>,
    pub undeletable: Option<WorkerId>,
    /// Slots that an operator has seen free, with a job queued for each.
    unused: BTreeMap<SlotName, (WorkerId, u64)>,
    pub armed: Vec<(CallKind, CallFault)>,
    pub every: Vec<(CallKind, CallFault, u64)>,
    /// Since when nothing stands in the way.
    pub undisturbed_since: Option<u64>,
    pub agent_faults: VecDeque<AgentFault>,
    pub to_kill_online: Vec<(WorkerId, u64)>,
    pub crash_at: Vec<(CallKind, Point, u64)>,
    pub calls: BTreeMap<u64, InFlight>,
    /// The last answer to each poll, in the trace.
    pub polled: BTreeMap<CallKind, String>,
    pub run: u64,
    pub is_running: bool,
    pub second: Second,
    pub disk: Disk,
    /// It is full after so many writes, for so long.
    pub full_after: Option<(u64, u64)>,
    /// How far the host's clock is from the truth.
    pub clock_error: i64,
    /// A supervisor that was told to stop stays down for so long.
    pub stop_for: u64,
    pub requests: Requests,
    pub checks: Checks,
    pub trace: Trace,
    pub report: Report,
    empty_since: Option<u64>,
    pub finished: bool,
}

impl Simulation {
    pub fn new(script: &Script, trace: Trace) -> Self {
        let plan = ConfigPlan::new(script.slots, script.poll_seconds, script.seed);
        let config = plan.config();
        let mut simulation = Self {
            now: 0,
            script: script.clone(),
            queue: BTreeMap::new(),
            sequence: 0,
            rng: Rng::new(script.seed ^ 0x5157),
            server: Server::new(script.seed),
            is_rolled_back: script
                .steps
                .iter()
                .any(|step| matches!(step.item, Item::Rollback(_))),
            snapshots: VecDeque::new(),
            host: Host::numbered_from(0),
            locks: BTreeMap::new(),
            file: Some(config.clone()),
            checks: Checks::new(config.clone()),
            config: config.clone(),
            plan,
            server_mode: Mode::Up,
            helper_mode: Mode::Up,
            host_up: true,
            until: BTreeMap::new(),
            drained: None,
            undeletable: None,
            unused: BTreeMap::new(),
            armed: Vec::new(),
            every: Vec::new(),
            undisturbed_since: None,
            agent_faults: VecDeque::new(),
            to_kill_online: Vec::new(),
            crash_at: Vec::new(),
            calls: BTreeMap::new(),
            polled: BTreeMap::new(),
            run: 0,
            is_running: false,
            second: Second::new(config.clone()),
            disk: Disk::Fine,
            full_after: None,
            clock_error: 0,
            stop_for: 0,
            requests: Requests::default(),
            trace,
            report: Report::default(),
            empty_since: None,
            finished: false,
        };
        for n in 0..script.steps.len() {
            simulation.at(script.steps[n].at, Event::Step(n));
        }
        simulation.at(0, Event::Start);
        simulation.at(1_000, Event::Tick);
        simulation.at(VISIT_MS, Event::Visit);
        simulation
    }

    pub fn at(&mut self, at: u64, event: Event) {
        self.sequence += 1;
        self.queue.insert((at, self.sequence), event);
    }

    pub fn after(&mut self, ms: u64, event: Event) {
        self.at(self.now + ms, event);
    }

    pub fn chance(&mut self, n: u64) -> u64 {
        below(&mut self.rng, n)
    }

    pub fn next_at(&self) -> u64 {
        self.queue.keys().next().map_or(u64::MAX, |(at, _)| *at)
    }

    /// What the host's clock reads.
    pub fn wall(&self) -> u64 {
        let truth = self.server.wall(self.now) as i64;
        (truth + self.clock_error).max(0) as u64
    }

    pub fn helper_mode(&self) -> Mode {
        if self.host_up {
            self.helper_mode
        } else {
            Mode::Down
        }
    }

    /// The helper, as the supervisor of this run meets it.
    pub fn helper_mode_of(&self, run: u64) -> Mode {
        if run & SECOND == 0 {
            self.helper_mode()
        } else {
            Mode::Up
        }
    }

    pub fn faults_are_over(&self) -> bool {
        self.now >= self.script.faults_end_at
    }

    pub fn note(&self, line: impl FnOnce() -> String) {
        self.trace.note(self.now, line);
    }

    /// Let the next thing happen, if it is due.
    pub fn step(&mut self, now: u64) {
        self.now = now;
        self.server.at(now);
        let Some(entry) = self.queue.first_entry().filter(|entry| entry.key().0 <= now) else {
            return;
        };
        let event = entry.remove();
        // Nothing else makes a worker on a host.
        let changes_hosts = matches!(event, Event::Effect(_) | Event::Step(_));
        match event {
            Event::Step(n) => {
                let item = self.script.steps[n].item;
                self.note(|| format!("* {item:?}"));
                self.happen(item);
            }
            Event::Tick => self.tick(),
            Event::Visit => self.operator_visit(),
            Event::Arrive(call) => self.arrive(call),
            Event::Effect(call) => self.effect(call),
            Event::Again(call) => self.again(call),
            Event::SimulatedResponse(call) => self.answer(call),
            Event::GiveUp(call) => self.give_up(call),
            Event::Online(id, agent) => self.online(id, agent),
            Event::Complete(id, agent) => self.complete(id, agent),
            Event::Ends(id, agent, exit) => self.end_agent(id, agent, exit),
            Event::Start => self.start(),
            Event::Reload => self.reload(),
            Event::Back(period) => self.end_period(period),
            Event::SecondStart => self.start_second(),
        }
        if changes_hosts {
            self.checks.after_step(&self.host);
            self.check_hosts();
        }
    }

    pub fn new_call(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    /// The supervisor reads the file again.
    pub fn reload(&mut self) {
        if let Some(config) = self.file.clone() {
            self.config = config.clone();
            self.checks.reloaded(self.now, config.clone());
            self.send_input(Input::Configure(Box::new(config)));
        }
    }

    pub fn start(&mut self) {
        // Without a reserve nothing of the database can be opened on a full disk; with one it can.
        let full = self.disk == Disk::Full && self.script.seed.is_multiple_of(2);
        if !self.host_up || self.file.is_none() || full {
            // systemd tries again.
            return self.after(5_000, Event::Start);
        }
        if self.is_running || self.finished {
            return;
        }
        self.run += 1;
        self.is_running = true;
        let config = self.file.clone().expect("looked at above");
        self.config = config.clone();
        self.checks.started(self.now, config);
        self.requests.start = true;
    }

    /// The supervisor writes to its disk: is that carried out?
    pub fn may_write(&mut self) -> bool {
        if let Some((left, ms)) = self.full_after {
            self.full_after = left.checked_sub(1).map(|left| (left, ms));
            if self.full_after.is_none() {
                self.report.count(&Item::DiskFullAfter(0, ms));
                self.disk_is(Disk::Full, ms);
            }
        }
        let is_persisted = self.disk != Disk::Full;
        self.checks.note_persist(self.now, is_persisted);
        if !is_persisted {
            self.note(|| "  the disk is full".into());
        }
        is_persisted
    }

    pub fn disk_is(&mut self, disk: Disk, ms: u64) {
        self.disk = disk;
        self.checks.disk_is_bad(self.now);
        self.lasts(Period::Disk, ms);
    }

    /// The supervisor is no more; it is started again later.
    pub fn ended(&mut self, down: u64) {
        self.note(|| format!("* the supervisor is gone, for {down} ms"));
        self.is_running = false;
        self.requests.inputs.clear();
        self.abandon_calls();
        self.checks.supervisor_ended();
        self.after(down, Event::Start);
    }

    pub fn tick(&mut self) {
        if self.faults_are_over() && !self.script.settles {
            self.finished = true;
            return;
        }
        if self.now >= self.script.faults_end_at && self.now < self.script.faults_end_at + 1_000 {
            self.end_faults();
        }
        let (host, second) = (&self.host, &self.second.host);
        let reachable = self.agents_reach_server();
        let missed = self
            .server
            .tick(|id, agent| !reachable || host.runs(id, agent) || second.runs(id, agent));
        let undisturbed = self.is_running
            && self.every.is_empty()
            && !self
                .calls
                .values()
                .any(|call| matches!(call.fault, CallFault::Late(_)))
            && self.locks.values().all(|until| *until <= self.now + 1_000)
            && matches!((self.server_mode, self.helper_mode()), (Mode::Up, Mode::Up));
        self.undisturbed_since = undisturbed.then_some(self.undisturbed_since.unwrap_or(self.now));
        self.checks.processes_end(undisturbed, &self.server, &self.host);
        self.checks.jobs_end(undisturbed, &self.server, &self.host);
        for (id, last_ping) in missed {
            // While no fault is active the factory sees long before what became of its agent; or it shows that it does
            // not know.
            let shown = self.checks.track(id).foreign_since.is_some() || self.second.own.contains(&id);
            if !shown
                && self
                    .undisturbed_since
                    .is_some_and(|since| since.max(last_ping) + UNDISTURBED_MS <= self.now)
            {
                self.checks.fail(format!(
                    "the server had to miss the agent of {id}, of which the factory says nothing"
                ));
            }
        }
        if self.is_rolled_back && (self.now / 1_000).is_multiple_of(60) {
            self.snapshots.push_back(self.server.clone());
            if self.snapshots.len() > 10 {
                self.snapshots.pop_front();
            }
        }
        self.checks
            .recycled(self.now, self.undisturbed_since, &self.server, &self.host);
        let can_ask = self.is_running && self.agents_reach_server();
        self.checks.note_second(&self.server, can_ask);
        self.retire_second();
        // At whole seconds, or what is once a minute would drift away from it.
        self.at((self.now / 1_000 + 1) * 1_000, Event::Tick);
        if !self.is_empty() {
            self.empty_since = None;
        }
        if self.faults_are_over() && self.is_empty() {
            let since = *self.empty_since.get_or_insert(self.now);
            self.report.settled(since - self.script.faults_end_at);
            // The supervisor may have to learn of it.
            self.finished = self.now > since + 70_000;
        } else if self.now > self.script.faults_end_at + SETTLE_MS {
            let live = self.server.live();
            let hosts = self.host.workers();
            let left: Vec<String> = live
                .map(|w| format!("\n  {} on the server: {w:?}", w.id))
                .chain(hosts.map(|(id, w)| format!("\n  {id} on the host: {w:?}")))
                .chain(
                    self.server
                        .open_jobs()
                        .map(|job| format!("\n  {} is open", job.id)),
                )
                .collect();
            self.checks.fail(format!("things do not settle{}", left.concat()));
        }
    }

    pub fn is_empty(&self) -> bool {
        self.host.is_empty()
            && self.second.host.is_empty()
            && !self.second.is_running
            && self.server.live().next().is_none()
            && self.server.open_jobs().next().is_none()
    }

    /// An operator looks after what is held.
    pub fn operator_visit(&mut self) {
        let now = self.now;
        let held = self.server.live().filter(|w| w.hold.is_some());
        for id in held.map(|w| w.id).collect::<Vec<_>>() {
            if self.checks.held_since(id, now) + HELD_MS <= now {
                self.server.release(id).expect("it is there");
                self.note(|| format!("an operator releases {id}"));
            }
        }
        self.requests.status = self.is_running;
        self.after(VISIT_MS, Event::Visit);
    }

    /// What the operator sees: workers of which the supervisor does not know whose they are, and which nobody has. They
    /// are deleted when the operator says so.
    pub fn status_answered(&mut self, status: &Status) {
        self.jobs_get_slots(status);
        for foreign in &status.foreign {
            let listed = self.server.workers.get(&foreign.id).is_some_and(|w| !w.deleted);
            let since = self.checks.foreign_since(foreign.id, self.now);
            let others = self.second.is_there() && self.second.own.contains(&foreign.id);
            let nobodys = !others && self.host.get(foreign.id).is_none();
            if listed && nobodys && since + HELD_MS <= self.now {
                self.note(|| format!("an operator destroys {}", foreign.id));
                self.checks.deletion_requested(foreign.id);
                self.send_input(Input::Destroy(foreign.id));
            }
        }
    }

    /// While no fault is active no slot is free from one visit to the next while a job is queued for it.
    fn jobs_get_slots(&mut self, status: &Status) {
        let seen = std::mem::take(&mut self.unused);
        let undisturbed = self
            .undisturbed_since
            .is_some_and(|since| since + MAX_SERVER_WAIT <= self.now);
        if !undisturbed || self.server.held {
            return;
        }
        for slot in status.slots.iter().filter(|slot| slot.state == SlotState::Free) {
            let target = slot.target.map(|target| target.to_string()).unwrap_or_default();
            let Some(job) = self.server.queued_for(&target) else {
                continue;
            };
            // Jobs take turns: one that is leased meanwhile has had the slot, or one that excludes it.
            let others = self.config.slots.iter().filter(|(name, other)| {
                let conflicts = self
                    .config
                    .slots
                    .get(&slot.name)
                    .map(|slot| &slot.conflicts_with_slots);
                other.conflicts_with_slots.contains(&slot.name)
                    || conflicts.is_some_and(|all| all.contains(*name))
            });
            let targets: Vec<String> = others.map(|(_, other)| other.target.to_string()).collect();
            let is_leased = |since| {
                let mut targets = targets.iter().chain([&target]);
                targets.any(|target| self.server.leased_since(target, since).is_some())
            };
            match seen.get(&slot.name) {
                Some((before, since)) if *before == job && !is_leased(*since) => {
                    self.checks
                        .fail(format!("slot {} is free, and job {job} is not leased", slot.name));
                }
                _ => drop(self.unused.insert(slot.name.clone(), (job, self.now))),
            }
        }
    }
}
