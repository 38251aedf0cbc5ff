//! The core of the factory: what goes in are answers and the time, what comes out are things to do.
//!
//! It knows no socket, clock, disk or thread, so that a simulator can drive the same code through years
//! of failures in a second. Time moves only through the `now` of [`Factory::handle`].
//!
//! It works in *rounds*, one a poll interval, whatever the number of workers: ask the server for its
//! workers and the helper for its own, compare (`reconcile`), let each worker take its next step, then
//! ask for jobs. Everything that arrives between rounds is acted on at once.
//! An idle factory does not ask the helper: see `poll`.

mod actions;
mod leasing;
mod poll;
mod status;
#[cfg(test)]
mod tests;
mod unknown;

use std::collections::{BTreeMap, BTreeSet};

use protocol::config::Config;
use protocol::{SlotName, TargetId, WorkerId, WorkerInfo};

use crate::backoff::{Backoff, Rng};
use crate::buildomat::{JobId, Lease, ServerWorker};
use crate::call_error::{CallError, Peer};
use crate::identity::Identity;
use crate::schedule::Plan;
use crate::worker::{Action, Event, Phase, Rules, Worker};

pub use status::time;

/// A lease is renewed this often until the worker is online.
pub const RENEW_MS: u64 = 20_000;

/// What happened outside.
#[derive(Clone, Debug)]
pub enum Input {
    /// Time has passed.
    Tick,
    ServerListed(Result<Vec<ServerWorker>, CallError>),
    HostListed(Result<Vec<WorkerInfo>, CallError>),
    Leased(Result<Option<Lease>, CallError>),
    /// The answer to [`Output::MakeWorker`] for this job.
    WorkerMade(JobId, Result<ServerWorker, CallError>),
    /// The answer to [`Output::Renew`].
    Renewed(WorkerId, Result<bool, CallError>),
    /// The answer to [`Output::Act`].
    Done(WorkerId, Outcome),
    /// Take no new jobs (or take them again).
    Drain(bool),
    /// The same for one slot.
    DrainSlot(SlotName, bool),
    /// The configuration has changed. A worker whose slot is no longer in it stays to its end.
    Configure(Box<Config>),
    /// Delete this worker, whoever holds it, and whosoever it is.
    Destroy(WorkerId),
    /// End this worker's processes and keep its files; the reason is why its job fails.
    Kill(WorkerId, String),
    /// Why the state cannot be saved, or may soon not be; None once it can.
    Storage(Option<String>),
    /// What the configuration file says else than the configuration in use, in a sentence; none where it says the same.
    FileDiffers(Option<String>),
    /// Since when, in milliseconds since 1970, a call of this side has had no answer, where that is longer than calls
    /// take; none once all have theirs.
    Unanswered(Peer, Option<u64>),
    /// Somebody wants to know how things are.
    StatusRequested,
    /// Begin nothing any more. Answers to what is under way are still taken in, and saved.
    Stop,
}

/// How an action went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Done,
    /// The failure is told up to this line of the console; the rest stands out.
    Partly {
        lines: u32,
        error: CallError,
    },
    /// Try again.
    Failed(CallError),
    /// The worker's processes could not be ended.
    KillFailed(CallError),
    /// The worker cannot be started here.
    StartFailed(String),
    /// The helper has no such worker.
    NoSuchWorker,
    /// The server does not know how to fail a worker.
    CannotReport(String),
}

/// What is to be done outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    ListServer,
    ListHost,
    Lease(BTreeSet<TargetId>),
    MakeWorker {
        target: TargetId,
        job: JobId,
    },
    Renew {
        worker: WorkerId,
        job: JobId,
    },
    Act(WorkerId, Action),
    /// Must be on the disk before any output after it is begun.
    Save(Worker),
    /// The same.
    Remove(WorkerId),
    Log(LogLine),
}

/// One line for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    pub level: Level,
    pub worker: Option<WorkerId>,
    pub slot: Option<SlotName>,
    pub job: Option<JobId>,
    pub text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    Info,
    Warn,
    Error,
}

/// What is known of a worker in this life alone.
#[derive(Clone, Debug, Default)]
struct Runtime {
    /// An action is under way.
    doing: Option<Action>,
    backoff: Backoff,
    /// Not before this time, and because of this side.
    retry: Option<(u64, Peer)>,
    /// When its last action began or ended, in `Factory::turn`s: a host list asked for before is stale.
    touched: u64,
    /// When it became known: a server list asked for before does not show it.
    known: u64,
    /// Since when the server's lists do not show it.
    missing_since: Option<u64>,
    /// When to renew its lease; None when it needs no more.
    renew_at: Option<u64>,
    last_error: String,
}

/// A server's worker that the store does not know.
#[derive(Clone, Copy, Debug)]
struct UnknownWorker {
    /// The turn in which a list first showed it.
    turn: u64,
    /// From when on it waits for a slot.
    since: u64,
}

/// A job that was leased and has no worker yet.
#[derive(Clone, Debug)]
struct PendingWorker {
    job: JobId,
    slot: SlotName,
    target: TargetId,
    leased_at: u64,
    /// The turn in which its worker was first asked for.
    began: u64,
    /// The request is under way; otherwise, its answer was lost in this turn, and a list must show
    /// whether the worker was made.
    making: bool,
    turn: u64,
    backoff: Backoff,
    retry_at: u64,
}

/// How one of the partners is.
#[derive(Clone, Debug, Default)]
struct PeerState {
    away: bool,
    backoff: Backoff,
    retry_at: u64,
    /// When it last answered.
    answered_at: Option<u64>,
    /// Since when it is as it is now.
    since: u64,
    /// Why it is away.
    error: String,
}

impl PeerState {
    fn since(now: u64) -> Self {
        Self {
            since: now,
            ..Self::default()
        }
    }
}

/// Questions for a job that were answered with an error, in a row.
#[derive(Clone, Debug, Default)]
struct LeaseFailure {
    backoff: Backoff,
    retry_at: u64,
    /// The newest error.
    sentence: String,
}

/// A slot that failed a worker by itself.
#[derive(Clone, Copy, Debug, Default)]
struct SlotCooldown {
    failures: u32,
    until: u64,
}

/// The factory.
#[derive(Debug)]
pub struct Factory {
    identity: Identity,
    config: Config,
    /// Its slots.
    plan: Plan,
    workers: BTreeMap<WorkerId, Worker>,
    /// Nobody's workers, being ended: the slot that each occupies, and how.
    orphans: BTreeMap<WorkerId, (Option<SlotName>, Action)>,
    runtimes: BTreeMap<WorkerId, Runtime>,
    /// A job that was leased while the helper was left alone, and when: its slot is chosen once the helper has
    /// answered.
    pending_lease: Option<(Lease, u64)>,
    pending_workers: Vec<PendingWorker>,
    unknown: BTreeMap<WorkerId, UnknownWorker>,
    /// Targets that have a worker_seen waiting for a slot: it comes before new jobs.
    reserved_targets: BTreeSet<TargetId>,
    /// Workers on the server that may be another host's.
    foreign: unknown::Foreign,
    /// Workers whose end is newer than some list, and the turn of it.
    ended: BTreeMap<WorkerId, u64>,
    cooldowns: BTreeMap<SlotName, SlotCooldown>,
    server: PeerState,
    helper: PeerState,
    poll: poll::Poll,
    leasing: bool,
    /// The server refuses to say whether there is a job, or cannot.
    lease_failed: Option<LeaseFailure>,
    /// Since when a side has not answered a call, where that is longer than calls take.
    unanswered: BTreeMap<Peer, u64>,
    /// No jobs are asked for before this, since no workers could be made for some.
    no_jobs: Backoff,
    no_jobs_until: u64,
    reconciled: bool,
    draining: bool,
    drained_slots: BTreeSet<SlotName>,
    /// The helper reads the configuration file at each request: a job that is leased while the file differs from the
    /// configuration in use might get another slot than it was leased for.
    file_differs: Option<(u64, String)>,
    /// The workers on this host, by the last list.
    on_host: BTreeMap<WorkerId, WorkerInfo>,
    /// Why the state cannot be saved.
    storage: Option<String>,
    stopped: bool,
    /// By how many milliseconds the host's clock is ahead of the time of inputs: for what is shown alone.
    ahead: i64,
    /// Counts inputs: the order of things, where the clock is too coarse.
    turn: u64,
    /// So that the same error is not in the log once a second.
    last_lease_error: String,
    last_make_error: String,
    rng: Rng,
    out: Vec<Output>,
}

impl Factory {
    /// A factory with the workers of its last life. The same `seed` and inputs give the same outputs.
    pub fn new(identity: Identity, config: Config, workers: Vec<Worker>, seed: u64, now: u64) -> Self {
        let mut factory = Self {
            identity,
            plan: Plan::of(&config),
            config,
            workers: BTreeMap::new(),
            orphans: BTreeMap::new(),
            runtimes: BTreeMap::new(),
            pending_lease: None,
            pending_workers: Vec::new(),
            unknown: BTreeMap::new(),
            reserved_targets: BTreeSet::new(),
            foreign: unknown::Foreign::default(),
            ended: BTreeMap::new(),
            cooldowns: BTreeMap::new(),
            server: PeerState::since(now),
            helper: PeerState::since(now),
            poll: poll::Poll::new(now),
            leasing: false,
            lease_failed: None,
            unanswered: BTreeMap::new(),
            no_jobs: Backoff::default(),
            no_jobs_until: 0,
            reconciled: false,
            draining: false,
            drained_slots: BTreeSet::new(),
            file_differs: None,
            on_host: BTreeMap::new(),
            storage: None,
            stopped: false,
            ahead: 0,
            turn: 0,
            last_lease_error: String::new(),
            last_make_error: String::new(),
            rng: Rng::new(seed),
            out: Vec::new(),
        };
        for mut worker in workers {
            // Nobody knows how long nobody was here, nor what the clock has been through: waits begin anew.
            let since = worker.since.min(now);
            if (worker.since, worker.waiting_since) != (since, now) {
                (worker.since, worker.waiting_since) = (since, now);
                factory.out.push(Output::Save(worker.clone()));
            }
            let starting = worker.phase.is_starting() && worker.job.is_some();
            let runtime = Runtime {
                renew_at: starting.then_some(now),
                ..Runtime::default()
            };
            factory.runtimes.insert(worker.id, runtime);
            factory.workers.insert(worker.id, worker);
        }
        factory
    }

    /// The same, with what the operator had drained in the last life: slots, or all.
    #[must_use]
    pub fn drained(mut self, (slots, all): (BTreeSet<SlotName>, bool)) -> Self {
        (self.drained_slots, self.draining) = (slots, all);
        self
    }

    /// Take in what happened; what is to be done now, in this order.
    pub fn handle(&mut self, now: u64, input: Input) -> Vec<Output> {
        self.turn += 1;
        match input {
            Input::Tick => {}
            Input::Drain(draining) => self.draining = draining,
            Input::DrainSlot(slot, true) => drop(self.drained_slots.insert(slot)),
            Input::DrainSlot(slot, false) => drop(self.drained_slots.remove(&slot)),
            Input::Configure(config) => (self.plan, self.config) = (Plan::of(&config), *config),
            Input::Destroy(worker) if self.foreign.shows(worker) => self.foreign.order_deletion(worker),
            Input::Destroy(worker) => self.event(now, worker, Event::Destroy),
            Input::Kill(worker, reason) => self.event(now, worker, Event::Kill(reason)),
            Input::Storage(error) => {
                if error.is_none() {
                    self.retry_at_once(Peer::Database);
                }
                self.storage = error;
            }
            Input::StatusRequested if self.must_ask_helper(now) => self.ask_helper(),
            Input::StatusRequested => {}
            Input::Unanswered(peer, since) => {
                self.unanswered.remove(&peer);
                self.unanswered.extend(since.map(|since| (peer, since)));
            }
            Input::FileDiffers(difference) => self.note_file(now, difference),
            Input::Stop => self.stopped = true,
            Input::ServerListed(result) => self.server_listed(now, result),
            Input::HostListed(result) => self.host_listed(now, result),
            Input::Leased(result) => self.leased(now, result),
            Input::WorkerMade(job, result) => self.worker_made(now, &job, result),
            Input::Renewed(worker, result) => self.renewed(now, worker, result),
            Input::Done(worker, outcome) => self.done(now, worker, outcome),
        }
        if !self.stopped {
            self.begin_poll(now);
            self.start_actions(now);
            self.renew_leases(now);
        }
        std::mem::take(&mut self.out)
    }

    /// When to say [`Input::Tick`] next; None while an answer must come first.
    pub fn next_deadline(&self) -> Option<u64> {
        if self.stopped {
            return None;
        }
        let retries = self
            .runtimes
            .values()
            .filter(|r| r.doing.is_none())
            .filter_map(|r| r.retry.map(|(at, _)| at));
        let renewals = self.runtimes.values().filter_map(|r| r.renew_at);
        retries.chain(renewals).chain(self.poll.next()).min()
    }

    pub fn workers(&self) -> impl Iterator<Item = &Worker> {
        self.workers.values()
    }

    /// Is nothing under way?
    pub fn has_no_pending_calls(&self) -> bool {
        !self.leasing
            && !self.runtimes.values().any(|r| r.doing.is_some())
            && !self.pending_workers.iter().any(|p| p.making)
    }

    fn log(&mut self, level: Level, worker: Option<WorkerId>, text: String) {
        let known = worker.and_then(|id| self.workers.get(&id));
        let (slot, job) = known.map_or((None, None), |w| (Some(w.slot.clone()), w.job.clone()));
        self.out.push(Output::Log(LogLine {
            level,
            worker,
            slot,
            job,
            text,
        }));
    }

    fn note_file(&mut self, now: u64, difference: Option<String>) {
        let since = self.file_differs.take().map(|(since, _)| since);
        if let Some(difference) = difference {
            self.file_differs = Some((since.unwrap_or(now), difference));
            return;
        }
        let Some(since) = since else { return };
        let waiting = self.workers.values().filter(|w| w.phase.is_unstarted());
        let waiting: Vec<WorkerId> = waiting.map(|w| w.id).collect();
        for id in waiting {
            let ms = now.saturating_sub(since);
            self.event(now, id, Event::Waited { ms });
        }
    }

    /// A slot that is no longer in the configuration has no more rules of its own.
    fn rules(&self, slot: &SlotName) -> Rules {
        let slot = self.config.slots.get(slot);
        Rules {
            online_timeout: self.config.factory.online_timeout_seconds * 1000,
            job_timeout: slot.and_then(|slot| slot.job_timeout_seconds).map(|s| s * 1000),
            hold_on_failure: slot.is_none_or(|slot| slot.hold_on_failure),
            keep_processes: slot.is_some_and(|slot| slot.keep_processes),
        }
    }

    /// One worker, one event: saved if it changed anything.
    fn event(&mut self, now: u64, id: WorkerId, event: Event) {
        let Some(old) = self.workers.get(&id).cloned() else {
            return;
        };
        let mut rules = self.rules(&old.slot);
        if self.file_differs.is_some() && old.phase.is_unstarted() {
            // It waits for the operator, as long as that takes.
            rules.online_timeout = u64::MAX;
        }
        let new = old.clone().step(event, now, &rules);
        if new == old {
            return;
        }
        if std::mem::discriminant(&new.phase) != std::mem::discriminant(&old.phase) {
            // A new duty is not put off by the troubles of the last.
            if let Some(runtime) = self.runtimes.get_mut(&id) {
                (runtime.backoff, runtime.retry) = (Backoff::default(), None);
                if !new.phase.is_starting() {
                    runtime.renew_at = None;
                }
            }
        }
        if new.phase == (Phase::Running { online: true }) && old.phase != new.phase {
            self.cooldowns.remove(&new.slot);
            if let Some(runtime) = self.runtimes.get_mut(&id) {
                runtime.renew_at = None;
            }
        }
        if matches!(new.phase, Phase::Broken { .. }) && old.phase.is_starting() {
            self.cooldowns.entry(new.slot.clone()).or_default().failures += 1;
        }
        if new.remakes > old.remakes {
            let text = "the worker was lost before its job began: it is made again".to_owned();
            self.log(Level::Warn, Some(id), text);
        }
        let failed = (new.failure != old.failure)
            .then(|| new.failure.clone())
            .flatten();
        self.out.push(Output::Save(new.clone()));
        self.workers.insert(id, new);
        if let Some(reason) = failed {
            let text = format!(
                "the worker is broken: {reason}; look into its job's log, and release the worker on the server"
            );
            self.log(Level::Warn, Some(id), text);
        }
    }
}
