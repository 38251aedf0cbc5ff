//! The core of the factory: inputs are answers and the time, outputs are calls, saves and log lines.
//!
//! It uses no socket, clock, disk or thread, so that a simulation can run the same code through years of failures in
//! seconds. Time moves only through the `now` of [`Factory::handle`]. All that is known of a worker id is in its one
//! [`Entry`], and a worker changes through [`Worker::step`] alone.
//!
//! It *polls* once in an interval, whatever the number of workers: ask the server for its
//! workers and the helper for its own, compare (`reconcile`), let each worker take its next step, then
//! ask for jobs. Everything that arrives between polls is acted on at once.
//! An idle factory does not ask the helper: see `poll`.

mod actions;
pub mod drain;
pub mod entry;
mod leasing;
mod poll;
pub mod targets;
#[cfg(test)]
mod tests;
pub mod unknown;
mod usb;

use std::collections::{BTreeMap, BTreeSet};

use protocol::config::Config;
use protocol::{SlotName, TargetId, WorkerId, WorkerInfo};

use crate::backoff::{Backoff, Rng};
use crate::buildomat::{JobId, Lease, ServerWorker};
use crate::call_error::{CallError, Peer};
use crate::identity::Identity;
use crate::schedule::SlotSchedule;
use crate::usb::UsbAbsences;
use crate::worker::{Action, Event, Phase, Worker, WorkerPolicy};

use drain::{Drain, Drains};
use entry::Owned;
pub use entry::{Entry, PendingWorker};
use targets::Targets;

/// A lease is renewed this often until the worker is online.
pub const RENEW_MS: u64 = 20_000;

/// What happened outside.
#[derive(Clone, Debug)]
pub enum Input {
    /// Time has passed.
    Tick,
    /// The answer to [`Output::ListServer`]: all workers of this factory's token.
    ServerListed(Result<Vec<ServerWorker>, CallError>),
    /// The answer to [`Output::ListHost`]: all workers that exist on this host.
    HostListed(Result<Vec<WorkerInfo>, CallError>),
    /// The answer to [`Output::ListTargets`].
    TargetsListed(targets::TargetList),
    /// The answer to [`Output::Lease`]: none where no job of these targets is queued.
    Leased(Result<Option<Lease>, CallError>),
    /// The answer to [`Output::MakeWorker`] for this job.
    WorkerMade(JobId, Result<ServerWorker, CallError>),
    /// The answer to [`Output::Renew`].
    Renewed(WorkerId, Result<bool, CallError>),
    /// The answer to [`Output::CarryOut`].
    Done(WorkerId, Event),
    /// Take no new jobs, on one slot or on all; or take them again.
    Drain(Option<SlotName>, Option<Drain>),
    /// The answer to [`Output::SaveDrain`].
    DrainSaved(Option<SlotName>, Option<Drain>),
    /// What the host's clock says, in milliseconds since 1970: drains end by it.
    WallClock(u64),
    /// The configuration has changed. A worker whose slot is no longer in it stays to its end.
    Configure(Box<Config>),
    /// Delete this worker, held or not, also where it may be another host's.
    Destroy(WorkerId),
    /// End this worker's processes and keep its files; the reason is why its job fails.
    Kill(WorkerId, String),
    /// This worker's job has stalled at its memory limit for long enough to be failed.
    MemoryStalled(WorkerId),
    /// Why the state cannot be saved, or may soon not be; None once it can.
    Storage(Option<String>),
    /// What the configuration file says else than the configuration in use, in a sentence; none where it says the same.
    FileDiffers(Option<String>),
    /// Why too little of the host is free for another job, in a sentence; none while enough is.
    Shortage(Option<String>),
    /// The slots whose USB devices are absent, or not clear.
    UsbAbsences(UsbAbsences),
    /// The host is being shut down: no jobs are taken until the supervisor starts again.
    HostStops,
    /// A self-test of all slots has come to its end: what did not hold, in a sentence; none where all did.
    SelfTested(Option<String>),
    /// Since when, in milliseconds since 1970, a call to this peer has had no answer, where that is longer than calls
    /// take; none once all have theirs.
    Unanswered(Peer, Option<u64>),
    /// The operator asks for the status.
    StatusRequested,
    /// Begin nothing any more. Answers to pending calls are still taken in, and saved.
    Stop,
}

/// What is to be done outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Ask the server for its workers; answered with [`Input::ServerListed`].
    ListServer,
    /// Ask the helper for its workers; answered with [`Input::HostListed`].
    ListHost,
    /// Ask the server for all its targets, where the configuration names one; answered with [`Input::TargetsListed`].
    ListTargets,
    /// Ask for one job of one of these targets; answered with [`Input::Leased`].
    Lease(BTreeSet<TargetId>),
    /// Make a worker for a leased job; answered with [`Input::WorkerMade`].
    MakeWorker {
        /// The lease's.
        target: TargetId,
        /// The lease's.
        job: JobId,
    },
    /// Renew the lease of a job whose worker is not online yet; answered with [`Input::Renewed`].
    Renew {
        /// The worker that was made for the job.
        worker: WorkerId,
        /// The leased one.
        job: JobId,
    },
    /// Carry out a worker's next action; answered with [`Input::Done`].
    CarryOut(WorkerId, Action),
    /// Must be on the disk before any output after it is begun.
    Save(Worker),
    /// To be answered with [`Input::DrainSaved`] once it is on the disk, and not at all where it cannot be saved.
    SaveDrain(Option<SlotName>, Option<Drain>),
    /// Forget this worker. Must be on the disk before any output after it is begun.
    Remove(WorkerId),
    /// To the log, and to the status from [`Level::Warn`] on.
    Log(LogLine),
}

/// One line for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    /// The status keeps warnings and errors only.
    pub level: Level,
    /// None where the line is of no worker.
    pub worker: Option<WorkerId>,
    /// None where the line is of no slot.
    pub slot: Option<SlotName>,
    /// None where the line is of no job.
    pub job: Option<JobId>,
    /// One sentence, for an operator.
    pub text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
/// How urgent a line of the log is, in the order of syslog(3).
pub enum Level {
    /// All is as it should be.
    Info,
    /// An operator may have to act.
    Warn,
    /// The factory could not do what it should.
    Error,
}

/// How the server or the helper is.
#[derive(Clone, Debug, Default)]
pub struct PeerState {
    /// It did not answer the last time that it was asked, or refused.
    pub is_unreachable: bool,
    backoff: Backoff,
    retry_at: u64,
    /// When it last answered.
    pub answered_at: Option<u64>,
    /// Since when it is as it is now.
    pub since: u64,
    /// Why it is unreachable.
    pub error: String,
}

impl PeerState {
    fn since(now: u64) -> Self {
        Self {
            since: now,
            ..Self::default()
        }
    }
}

/// What the last self-test of all slots has found, since the supervisor started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SelfTest {
    /// When it came to its end.
    pub at: u64,
    /// What did not hold, in a sentence.
    pub failure: Option<String>,
}

/// Consecutive lease requests that were answered with an error.
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
    /// What the names of targets in it stand for.
    targets: Targets,
    /// Its slots.
    schedule: SlotSchedule,
    /// All that is known of each worker id.
    entries: BTreeMap<WorkerId, Entry>,
    /// A job that was leased while the helper was not asked, and when: its slot is chosen once the helper has
    /// answered.
    pending_lease: Option<(Lease, u64)>,
    pending_workers: Vec<PendingWorker>,
    /// Targets for which an unknown worker waits for a slot: it comes before new jobs.
    reserved_targets: BTreeSet<TargetId>,
    /// Slots for which one waits.
    reserved_slots: BTreeSet<SlotName>,
    /// The server's last list had a worker that may be another host's.
    foreign_listed: bool,
    /// Another host has been seen, since this run began.
    foreign_seen: bool,
    cooldowns: BTreeMap<SlotName, SlotCooldown>,
    server: PeerState,
    helper: PeerState,
    poll: poll::Poll,
    is_leasing: bool,
    /// The server refuses to say whether there is a job, or cannot.
    lease_failed: Option<LeaseFailure>,
    /// Since when a peer has not answered a call, where that is longer than calls take.
    unanswered: BTreeMap<Peer, u64>,
    /// No jobs are asked for before this, since no workers could be made for some.
    no_jobs: Backoff,
    no_jobs_until: u64,
    is_reconciled: bool,
    drains: Drains,
    /// The helper reads the configuration file at each request: a job that is leased while the file differs from the
    /// configuration in use might get another slot than it was leased for.
    file_differs: Option<(u64, String)>,
    /// Why the state cannot be saved.
    storage: Option<String>,
    /// Why too little of the host is free for another job.
    shortage: Option<String>,
    /// Why slots take no job: their USB devices.
    usb_absences: UsbAbsences,
    usb_logged: BTreeMap<SlotName, usb::LoggedAbsence>,
    selftest: Option<SelfTest>,
    host_stops: bool,
    is_stopped: bool,
    /// Counts inputs: the order of things, where the clock is too coarse.
    input_number: u64,
    /// So that the same error is not in the log once a second.
    last_lease_error: String,
    last_make_error: String,
    rng: Rng,
    out: Vec<Output>,
}

impl Factory {
    /// A factory with the workers of its previous run. The same `seed` and inputs give the same outputs.
    pub fn new(identity: Identity, config: Config, workers: Vec<Worker>, seed: u64, now: u64) -> Self {
        let mut factory = Self {
            identity,
            schedule: SlotSchedule::of(&config, &BTreeMap::new()),
            targets: Targets::new(&config, now),
            config,
            entries: BTreeMap::new(),
            pending_lease: None,
            pending_workers: Vec::new(),
            reserved_targets: BTreeSet::new(),
            reserved_slots: BTreeSet::new(),
            foreign_listed: false,
            foreign_seen: false,
            cooldowns: BTreeMap::new(),
            server: PeerState::since(now),
            helper: PeerState::since(now),
            poll: poll::Poll::new(now),
            is_leasing: false,
            lease_failed: None,
            unanswered: BTreeMap::new(),
            no_jobs: Backoff::default(),
            no_jobs_until: 0,
            is_reconciled: false,
            drains: Drains::new(),
            file_differs: None,
            storage: None,
            shortage: None,
            usb_absences: UsbAbsences::new(),
            usb_logged: BTreeMap::new(),
            selftest: None,
            host_stops: false,
            is_stopped: false,
            input_number: 0,
            last_lease_error: String::new(),
            last_make_error: String::new(),
            rng: Rng::new(seed),
            out: Vec::new(),
        };
        factory.expect_usb(None);
        for worker in workers {
            let starting = worker.phase.is_starting() && worker.job.is_some();
            let policy = factory.policy(&worker.slot);
            let started = worker.clone().step(Event::SupervisorStarted, now, &policy);
            if started != worker {
                factory.out.push(Output::Save(started.clone()));
            }
            let id = started.id;
            let entry = factory.entries.entry(id).or_default();
            entry.adopt(started, 0, starting.then_some(now));
        }
        factory
    }

    /// Set what the operator had drained in the previous run: slots, or all.
    #[must_use]
    pub fn with_drains(mut self, drains: Drains) -> Self {
        self.drains = drains;
        self
    }

    /// Take in what happened; what is to be done now, in this order.
    pub fn handle(&mut self, now: u64, input: Input) -> Vec<Output> {
        self.input_number += 1;
        match input {
            Input::Tick => {}
            Input::Drain(slot, drain) => self.out.push(Output::SaveDrain(slot, drain)),
            Input::DrainSaved(slot, Some(drain)) => drop(self.drains.insert(slot, drain)),
            Input::DrainSaved(slot, None) => drop(self.drains.remove(&slot)),
            Input::WallClock(wall) => self.end_drains(wall),
            Input::Configure(config) => {
                self.targets.look_up(&config, now);
                self.schedule = SlotSchedule::of(&config, self.targets.ids());
                let old = std::mem::replace(&mut self.config, *config);
                self.expect_usb(Some(&old));
            }
            Input::Destroy(worker) => self.destroy(now, worker),
            Input::Kill(worker, reason) => self.step(now, worker, Event::Kill(reason)),
            Input::MemoryStalled(worker) => self.step(now, worker, Event::MemoryStalled),
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
            Input::Shortage(shortage) => self.note_shortage(shortage),
            Input::UsbAbsences(absences) => self.note_usb(absences),
            Input::SelfTested(failure) => self.note_selftest(now, failure),
            Input::HostStops => self.host_stops = true,
            Input::Stop => self.is_stopped = true,
            Input::ServerListed(result) => self.handle_server_list(now, result),
            Input::HostListed(result) => self.handle_host_list(now, result),
            Input::TargetsListed(answer) => self.handle_target_list(now, answer),
            Input::Leased(result) => self.leased(now, result),
            Input::WorkerMade(job, result) => self.worker_made(now, &job, result),
            Input::Renewed(worker, result) => self.renewed(now, worker, result),
            Input::Done(worker, event) => self.handle_done(now, worker, event),
        }
        if !self.is_stopped {
            self.ask_for_targets(now);
            self.begin_poll(now);
            self.start_actions(now);
            self.renew_leases(now);
        }
        self.log_absences(now);
        std::mem::take(&mut self.out)
    }

    /// When to say [`Input::Tick`] next; None while an answer must come first.
    pub fn next_deadline(&self) -> Option<u64> {
        if self.is_stopped {
            return None;
        }
        let retries = self.entries.values().filter_map(|entry| entry.calls());
        let retries = retries.filter(|calls| calls.action.is_none());
        let retries = retries.filter_map(|calls| calls.retry.map(|(at, _)| at));
        let renewals = self.entries.values().filter_map(|entry| entry.owned()?.renew_at);
        let others = self.poll.next().into_iter().chain(self.targets.next());
        retries.chain(renewals).chain(others).min()
    }

    /// All that is known of each worker id.
    pub fn entries(&self) -> &BTreeMap<WorkerId, Entry> {
        &self.entries
    }

    /// This factory's workers, the oldest first.
    pub fn workers(&self) -> impl Iterator<Item = &Worker> {
        let owned = self.entries.values().filter_map(|entry| entry.owned());
        owned.map(|owned| &owned.worker)
    }

    fn owned(&self, worker: WorkerId) -> Option<&Owned> {
        self.entries.get(&worker)?.owned()
    }

    /// Has every call had its answer?
    pub fn has_no_pending_calls(&self) -> bool {
        let mut calls = self.entries.values().filter_map(|entry| entry.calls());
        !self.is_leasing
            && !self.targets.is_asking()
            && !calls.any(|calls| calls.action.is_some())
            && !self.pending_workers.iter().any(|p| p.is_making)
    }

    fn log(&mut self, level: Level, worker: Option<WorkerId>, text: String) {
        let known = worker.and_then(|id| self.owned(id)).map(|owned| &owned.worker);
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
        let waiting = self.workers().filter(|w| w.phase.is_unstarted());
        let waiting: Vec<WorkerId> = waiting.map(|w| w.id).collect();
        for id in waiting {
            let ms = now.saturating_sub(since);
            self.step(now, id, Event::Waited { ms });
        }
    }

    /// What has come to its end is over at once, saved or not: the next run compares the time again.
    fn end_drains(&mut self, wall: u64) {
        for slot in drain::ended(&self.drains, wall) {
            self.drains.remove(&slot);
            let of = slot
                .as_ref()
                .map_or("all slots".into(), |slot| format!("slot {slot}"));
            let text = format!("the drain of {of} has come to its end: jobs are taken again");
            self.log(Level::Info, None, text);
            self.out.push(Output::SaveDrain(slot, None));
        }
    }

    /// Jobs that are leased already are made all the same.
    fn note_shortage(&mut self, shortage: Option<String>) {
        let old = std::mem::replace(&mut self.shortage, shortage);
        match (&old, &self.shortage) {
            (None, Some(why)) => {
                let text = format!("no jobs are taken: {why}; running jobs go on");
                self.log(Level::Warn, None, text);
            }
            (Some(_), None) => self.log(Level::Info, None, "enough is free again for jobs".into()),
            _ => {}
        }
    }

    fn note_selftest(&mut self, now: u64, failure: Option<String>) {
        let (level, text) = match &failure {
            None => (Level::Info, "the self-test has passed".into()),
            Some(failure) => (Level::Error, format!("the self-test has failed: {failure}")),
        };
        self.log(level, None, text);
        self.selftest = Some(SelfTest { at: now, failure });
    }

    /// A slot that is no longer in the configuration has no policy of its own any more.
    fn policy(&self, slot: &SlotName) -> WorkerPolicy {
        let slot = self.config.slots.get(slot);
        WorkerPolicy {
            online_timeout: self.config.factory.online_timeout_seconds * 1000,
            job_timeout: slot.and_then(|slot| slot.job_timeout_seconds).map(|s| s * 1000),
            hold_on_failure: slot.is_none_or(|slot| slot.hold_on_failure),
            keep_processes: slot.is_some_and(|slot| slot.keep_processes),
        }
    }

    /// The operator wants it deleted.
    fn destroy(&mut self, now: u64, id: WorkerId) {
        let unknown = self.entries.get_mut(&id).and_then(|entry| entry.unknown_mut());
        match unknown {
            Some(unknown) => unknown.to_delete |= unknown.foreign.is_some(),
            None => self.step(now, id, Event::Destroy),
        }
    }

    /// One worker, one event: saved if it changed anything.
    fn step(&mut self, now: u64, id: WorkerId, event: Event) {
        let Some(old) = self.owned(id).map(|owned| owned.worker.clone()) else {
            return;
        };
        let mut policy = self.policy(&old.slot);
        if self.file_differs.is_some() && old.phase.is_unstarted() {
            // It waits for the operator, as long as that takes.
            policy.online_timeout = u64::MAX;
        }
        let new = old.clone().step(event, now, &policy);
        let Some(owned) = self.entries.get_mut(&id).and_then(|entry| entry.owned_mut()) else {
            return;
        };
        if new == old {
            return;
        }
        if std::mem::discriminant(&new.phase) != std::mem::discriminant(&old.phase) {
            // A new action does not wait for the failures of the last.
            (owned.calls.backoff, owned.calls.retry) = (Backoff::default(), None);
            if !new.phase.is_starting() {
                owned.renew_at = None;
            }
        }
        let came_online = new.phase == (Phase::Running { online: true }) && old.phase != new.phase;
        if came_online {
            owned.renew_at = None;
        }
        owned.worker = new.clone();
        self.out.push(Output::Save(new.clone()));
        if came_online {
            self.cooldowns.remove(&new.slot);
        }
        if matches!(new.phase, Phase::Broken { .. }) && old.phase.is_starting() {
            self.cooldowns.entry(new.slot.clone()).or_default().failures += 1;
        }
        if new.remakes > old.remakes {
            let text = "the worker was lost before its job began: it is made again".to_owned();
            self.log(Level::Warn, Some(id), text);
        }
        if new.failure != old.failure
            && let Some(reason) = new.failure
        {
            let text = format!(
                "the worker is broken: {reason}; look into its job's log, and release the worker on the server"
            );
            self.log(Level::Warn, Some(id), text);
        }
    }

    // What the control API shows.

    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    pub(crate) fn schedule(&self) -> &SlotSchedule {
        &self.schedule
    }

    /// Jobs that were leased and have no worker yet.
    pub(crate) fn pending_workers(&self) -> &[PendingWorker] {
        &self.pending_workers
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.drains.contains_key(&None)
    }

    pub(crate) fn drains(&self) -> &Drains {
        &self.drains
    }

    /// Until when this slot takes no jobs since it has failed workers by itself.
    pub(crate) fn cooldown(&self, slot: &SlotName) -> Option<u64> {
        self.cooldowns.get(slot).map(|cooldown| cooldown.until)
    }

    pub(crate) fn server(&self) -> &PeerState {
        &self.server
    }

    pub(crate) fn helper(&self) -> &PeerState {
        &self.helper
    }

    /// Since when a call to this peer has had no answer, where that is longer than calls take.
    pub(crate) fn unanswered_since(&self, peer: Peer) -> Option<u64> {
        self.unanswered.get(&peer).copied()
    }

    /// Why the state cannot be saved, or may soon not be.
    pub(crate) fn storage_problem(&self) -> Option<&String> {
        self.storage.as_ref()
    }

    /// Why too little of the host is free for another job.
    pub(crate) fn shortage(&self) -> Option<&str> {
        self.shortage.as_deref()
    }

    /// What the last self-test of all slots has found.
    pub(crate) fn selftest(&self) -> Option<&SelfTest> {
        self.selftest.as_ref()
    }

    /// Are no jobs taken until a self-test of all slots has passed (`factory.selftest_at_start`)?
    pub(crate) fn waits_for_selftest(&self) -> bool {
        let has_passed = self.selftest.as_ref().is_some_and(|last| last.failure.is_none());
        self.config.factory.selftest_at_start && !has_passed
    }

    /// What the configuration file says else than the configuration in use.
    pub(crate) fn file_difference(&self) -> Option<&str> {
        self.file_differs
            .as_ref()
            .map(|(_, difference)| difference.as_str())
    }

    /// Why the last lease request failed, and when the next is sent.
    pub(crate) fn lease_failure(&self) -> Option<(&str, u64)> {
        let failure = self.lease_failed.as_ref()?;
        Some((&failure.sentence, failure.retry_at))
    }

    /// Why the server is not asked for jobs, whatever slot is free.
    pub(crate) fn not_asked_for(&self) -> Option<&str> {
        Some(if self.host_stops {
            "the host is being shut down"
        } else if self.is_draining() {
            "all slots are drained: `user-factory resume` takes jobs again"
        } else if self.storage.is_some() {
            "the supervisor's state cannot be saved"
        } else if self.foreign_listed {
            "another host may use this factory's token"
        } else if self.waits_for_selftest() {
            match self.selftest {
                None => {
                    "the self-test has not been done since the start: `user-factory selftest`, as root, does it"
                }
                Some(_) => "the self-test has failed: `user-factory selftest`, as root, does it again",
            }
        } else if self.server.is_unreachable {
            "the server is unreachable"
        } else if self.helper.is_unreachable {
            "the helper is unreachable"
        } else if self.unanswered_since(Peer::Helper).is_some() {
            "the helper is not answering"
        } else if self.unanswered_since(Peer::Server).is_some() {
            "the server is not answering"
        } else if let Some(difference) = self.file_difference() {
            difference
        } else if let Some(shortage) = self.shortage() {
            shortage
        } else if !self.is_reconciled {
            "the server and the helper have not both answered yet"
        } else {
            return None;
        })
    }

    /// Is this slot in the configuration?
    pub(crate) fn has_slot(&self, slot: &SlotName) -> bool {
        self.config.slots.contains_key(slot)
    }

    /// Is this worker this factory's?
    pub(crate) fn owns(&self, worker: WorkerId) -> bool {
        self.owned(worker).is_some()
    }
}
