//! The loop around the core. It keeps the clock, carries out the core's outputs and passes the answers back. It decides
//! nothing. No output is started before everything that was to be saved ahead of it is on the disk; deletions are the
//! exception, as they follow from what exists and free space.

mod commands;
mod persistence;
mod phases;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::call_error::{CallError, Peer};
use crate::config_check::ConfigFile;
use crate::control::metrics::{self, Metrics};
use crate::control::state::{Command, Operator, ReplySender, StatusState};
use crate::executor::Executor;
use crate::factory::{Factory, Input, Output, drain};
use crate::free_resources::ResourceCheck;
use crate::job_log::JobLog;
use crate::notify::Watchdog;
use crate::pending_calls::PendingCalls;
use crate::store::Storage;
use crate::usb::UsbMonitor;
use crate::usb::job_devices::JobDevices;
use crate::worker::{Action, Event};
pub use persistence::Persistence;
use phases::Phases;

/// How long a stop waits for what is under way.
const GRACE: Duration = Duration::from_secs(10);
/// A call that has had no answer for this long is shown as unanswered.
const UNANSWERED: Duration = Duration::from_secs(5);
/// A status request waits no longer than this for a helper that must be asked first.
const STATUS_WAIT: Duration = Duration::from_secs(1);

/// Milliseconds since 1970 that never go back, and do not jump, within one run of the supervisor: waits and limits are
/// counted in them. The host's clock may jump, as when it is set after the start: what is shown is in its time, see
/// [`Clock::ahead`].
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    began: Instant,
    at: u64,
    /// The host's clock.
    wall: Option<fn() -> u64>,
}

fn wall() -> u64 {
    let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(at.as_millis()).unwrap_or(0)
}

impl Clock {
    /// It begins at the host's clock, and goes its own way from there.
    pub fn start() -> Self {
        Self {
            wall: Some(wall),
            ..Self::at(wall())
        }
    }

    /// A clock that reads `at` now, and beside which there is no other.
    pub fn at(at: u64) -> Self {
        Self {
            began: Instant::now(),
            at,
            wall: None,
        }
    }

    /// By how many milliseconds the host's clock is ahead of this one, by now.
    pub fn ahead(&self) -> i64 {
        let wall = self.wall.map(|wall| wall().cast_signed());
        wall.map_or(0, |wall| wall - self.now().cast_signed())
    }

    /// The host's clock, in milliseconds since 1970.
    pub fn wall(&self) -> u64 {
        self.now().saturating_add_signed(self.ahead())
    }

    /// Milliseconds since 1970, as this clock counts.
    pub fn now(&self) -> u64 {
        self.at + u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX / 2)
    }
}

/// The core, and everything that its loop uses.
#[derive(Debug)]
pub struct Driver<S> {
    /// It decides.
    pub factory: Factory,
    /// What it decides is saved before it is carried out.
    pub persistence: Persistence<S>,
    /// Carries out one action in a task of its own.
    pub executor: Arc<Executor>,
    /// The time of all inputs.
    pub clock: Clock,
    /// For the control socket.
    pub status: StatusState,
    /// Watched for changes.
    pub file: Box<dyn ConfigFile>,
    /// What is free on the host.
    pub resources: ResourceCheck,
    /// What is plugged into the host.
    pub usb: UsbMonitor,
    /// For lines in the logs of jobs that run.
    pub job_log: JobLog,
    /// Notified at each iteration of the loop.
    pub watchdog: Watchdog,
    /// Whose command to drain or resume is being saved, and where its answer goes.
    pub drain_command: Option<(Operator, ReplySender)>,
}

impl<S: Storage> Driver<S> {
    /// Run until the commands end or one of them is [`Input::Stop`], then wait a little for pending calls. Jobs go on
    /// without the supervisor.
    ///
    /// # Errors
    /// Where the database cannot be written, and waiting would not help: nothing may be begun that would be
    /// forgotten.
    pub async fn run(mut self, mut commands: mpsc::UnboundedReceiver<Command>) -> Result<()> {
        let mut calls = JoinSet::new();
        let mut phases = Phases::of(&self.factory);
        let mut job_devices = JobDevices::default();
        let mut stopping: Option<Instant> = None;
        // Status requests that wait for the helper, and since when.
        let (mut status_requests, mut requested) = (Vec::new(), Instant::now());
        // Answers to outputs that are carried out at once, and to calls that were not started.
        let mut answers = VecDeque::new();
        let mut input = Input::Tick;
        loop {
            let mut outputs = Vec::new();
            let difference = self.file.difference(self.factory.config());
            if difference.as_deref() != self.factory.file_difference() {
                log_file_difference(difference.as_deref());
                outputs = self
                    .factory
                    .handle(self.clock.now(), Input::FileDiffers(difference));
            }
            let shortage = self.resources.shortage(&self.factory.config().factory.min_free);
            if shortage.as_deref() != self.factory.shortage() {
                outputs.extend(self.factory.handle(self.clock.now(), Input::Shortage(shortage)));
            }
            let slots = &self.factory.config().slots;
            if let Some(absences) = self.usb.absences(slots, self.factory.usb_absences()) {
                self.log_unplugged(&mut job_devices);
                if absences != *self.factory.usb_absences() {
                    outputs.extend(
                        self.factory
                            .handle(self.clock.now(), Input::UsbAbsences(absences)),
                    );
                }
            }
            // Not while an operator's command waits for its answer, which the next save is taken for.
            let wall = self.clock.wall();
            let is_over = drain::next_end(self.factory.drains()).is_some_and(|end| end <= wall);
            if is_over && self.drain_command.is_none() {
                outputs.extend(self.factory.handle(self.clock.now(), Input::WallClock(wall)));
            }
            for (peer, since) in self.unanswered() {
                outputs.extend(
                    self.factory
                        .handle(self.clock.now(), Input::Unanswered(peer, since)),
                );
            }
            outputs.extend(self.factory.handle(self.clock.now(), input));
            for output in outputs {
                match output {
                    Output::Save(worker) => {
                        self.persistence.save(&worker)?;
                        let slots = &self.factory.config().slots;
                        job_devices.note_worker(&worker, slots, self.usb.devices(), &self.usb.unread());
                        phases.record_change(&worker, &self.status.metrics);
                    }
                    Output::SaveDrain(slot, drain) => answers.push_back(self.save_drain(slot, drain)),
                    Output::Remove(worker) => {
                        self.persistence.remove(worker)?;
                        phases.record_removal(worker, self.clock.now(), &self.status.metrics);
                        self.status.egress.forget(worker);
                    }
                    Output::Log(line) => {
                        self.status.note(self.clock.now(), &line);
                        phases::log(&line);
                    }
                    output => match self.admit(output) {
                        Ok(output) => {
                            let (metrics, executor) = (self.status.metrics.clone(), self.executor.clone());
                            calls.spawn(run_call(metrics, executor, output));
                        }
                        Err(answer) => answers.push_back(*answer),
                    },
                }
            }
            self.persistence.retry()?;
            if self.persistence.problem() != self.factory.storage_problem() {
                let problem = self.persistence.problem().cloned();
                self.log_storage(problem.as_ref());
                input = Input::Storage(problem);
                continue;
            }
            if let Some(answer) = answers.pop_front() {
                input = answer;
                continue;
            }
            if stopping.is_some() && self.factory.has_no_pending_calls() {
                break;
            }
            let now = self.clock.now();
            if !self.factory.is_waiting_for_helper() || requested.elapsed() >= STATUS_WAIT {
                for reply in status_requests.drain(..) {
                    self.send_status(reply);
                }
            }
            let deadline = self
                .factory
                .next_deadline()
                .map(|at| Duration::from_millis(at.saturating_sub(now)));
            let grace = stopping.map(|since| GRACE.saturating_sub(since.elapsed()));
            let mut wait = grace.or(deadline).unwrap_or(Duration::from_secs(3600));
            if !status_requests.is_empty() {
                wait = wait.min(STATUS_WAIT.saturating_sub(requested.elapsed()));
            }
            wait = wait.min(self.persistence.due_in());
            for (_, calls) in self.pending_calls() {
                if let Some(left) = calls
                    .longest()
                    .and_then(|longest| UNANSWERED.checked_sub(longest))
                {
                    // A timer waits no less than this.
                    wait = wait.min(left + Duration::from_millis(1));
                }
            }
            if let Some(due) = self.usb.due_in().filter(|_| stopping.is_none()) {
                // A timer waits no less than this.
                wait = wait.min(due.max(Duration::from_millis(1)));
            }
            // The core then gets one tick more than it needs.
            if stopping.is_none()
                && let Some(again) = self.watchdog.notify_watchdog()
            {
                wait = wait.min(again);
            }
            input = tokio::select! {
                // In this order, so that a run does not depend on chance. Commands come as fast as others send them:
                // calls, each of which the core has asked for, do not wait for them.
                biased;
                Some(answer) = calls.join_next() => answer.context("a call came to no end")?,
                command = commands.recv(), if stopping.is_none() => match command.unwrap_or(Command::Input(Input::Stop)) {
                    Command::Status(reply) if self.factory.must_ask_helper(self.clock.now()) => {
                        status_requests.push(reply);
                        requested = Instant::now();
                        Input::StatusRequested
                    }
                    command => {
                        let input = self.handle_command(command);
                        if matches!(input, Input::Stop) {
                            self.log_running();
                            stopping = Some(Instant::now());
                        }
                        input
                    }
                },
                () = tokio::time::sleep(wait) => {
                    if stopping.is_some_and(|since| since.elapsed() >= GRACE) {
                        tracing::warn!("stopping without waiting longer: pending calls will be repeated");
                        break;
                    }
                    Input::Tick
                }
            };
        }
        self.persistence.finish()?;
        tracing::info!("stopped");
        Ok(())
    }

    fn pending_calls(&self) -> [(Peer, &PendingCalls); 2] {
        [
            (Peer::Server, self.executor.buildomat.pending()),
            (Peer::Helper, self.executor.helper_client.pending()),
        ]
    }

    /// Whom a shutdown of the host would end. A restart of the supervisor ends nobody.
    fn log_running(&self) {
        tracing::info!("stopping: running jobs go on");
        for worker in self.factory.workers() {
            let job = worker.job.as_ref().map(tracing::field::display);
            tracing::info!(
                worker = %worker.id, slot = %worker.slot, phase = worker.phase.name(), job,
                "this worker goes on, and ends if the host is shut down"
            );
        }
    }

    /// Peers that have become unanswered, or answer again.
    fn unanswered(&self) -> Vec<(Peer, Option<u64>)> {
        let now = self.clock.now();
        let since = |calls: &PendingCalls| {
            let longest = calls.longest().filter(|longest| *longest >= UNANSWERED)?;
            let ms = u64::try_from(longest.as_millis()).unwrap_or(u64::MAX);
            Some(now.saturating_sub(ms))
        };
        let all = self.pending_calls().map(|(peer, calls)| (peer, since(calls)));
        let known = |peer| self.factory.unanswered_since(peer);
        all.into_iter()
            .filter(|(peer, since)| since.is_some() != known(*peer).is_some())
            .collect()
    }

    /// An output that may be started now; otherwise the answer that it was not.
    fn admit(&self, output: Output) -> Result<Output, Box<Input>> {
        if !self.persistence.is_behind() {
            return Ok(output);
        }
        let because = self.persistence.problem().cloned().unwrap_or_default();
        let problem = CallError::temporary(Peer::Database, because);
        match output {
            // The server still learns that the factory is running.
            Output::Lease(_) => Ok(Output::Lease(Default::default())),
            Output::MakeWorker { job, .. } => Err(Input::WorkerMade(job, Err(problem)).into()),
            Output::CarryOut(_, Action::HostDelete | Action::ServerDelete { .. }) => Ok(output),
            Output::CarryOut(worker, _) => Err(Input::Done(worker, Event::CallFailed(problem)).into()),
            _ => Ok(output),
        }
    }

    /// Log which devices of running jobs are unplugged, or are back, in the jobs' logs as well.
    fn log_unplugged(&mut self, job_devices: &mut JobDevices) {
        let now = self.clock.now();
        let slots = &self.factory.config().slots;
        let lines = job_devices.update(
            now,
            self.factory.workers(),
            slots,
            self.usb.devices(),
            &self.usb.unread(),
        );
        for line in lines {
            self.status.note(now, &line);
            phases::log(&line);
            if let Some(worker) = line.worker {
                self.job_log.queue(worker, line.text);
            }
        }
    }

    /// Log once that nothing can be saved, and once that it can.
    fn log_storage(&mut self, problem: Option<&String>) {
        let Some(why) = problem else {
            tracing::info!("the database can be written again");
            return;
        };
        if self.factory.storage_problem().is_some() {
            return;
        }
        let text = if self.persistence.is_behind() {
            format!(
                "the database cannot be written, and nothing is begun until it can: {why}; running jobs go on, and \
                 workers are deleted"
            )
        } else {
            format!(
                "the database may soon not be written any more, and no jobs are taken: {why}; running jobs go on"
            )
        };
        tracing::error!("{text}");
        self.status.note_problem(self.clock.now(), text);
    }
}

fn log_file_difference(difference: Option<&str>) {
    match difference {
        Some(difference) => tracing::warn!("no jobs are taken: {difference}; running jobs go on"),
        None => tracing::info!("the configuration file again matches the loaded configuration"),
    }
}

/// One piece of I/O, counted, and its answer.
async fn run_call(metrics: Arc<Metrics>, executor: Arc<Executor>, output: Output) -> Input {
    let call = metrics::call_of(&output);
    let (worker, job) = phases::about(&output);
    let began = Instant::now();
    let answer = answer_to(output, &executor).await;
    if let Some(call) = call {
        let outcome = metrics.count_call(call, &answer);
        let ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::debug!(worker, job, call = call.1, outcome, ms, "call");
    }
    answer
}

async fn answer_to(output: Output, executor: &Executor) -> Input {
    let buildomat = &executor.buildomat;
    match output {
        Output::ListServer => Input::ServerListed(buildomat.list_workers().await.map_err(|e| e.call_error())),
        Output::ListTargets => {
            Input::TargetsListed(buildomat.list_targets().await.map_err(|e| e.call_error()))
        }
        Output::ListHost => {
            Input::HostListed(executor.helper_client.list().await.map_err(|e| e.call_error()))
        }
        Output::Lease(targets) => Input::Leased(buildomat.lease(targets).await.map_err(|e| e.call_error())),
        Output::MakeWorker { target, job } => {
            let made = buildomat
                .make_worker(target, &job)
                .await
                .map_err(|e| e.call_error());
            Input::WorkerMade(job, made)
        }
        Output::Renew { worker, job } => {
            Input::Renewed(worker, buildomat.renew(&job).await.map_err(|e| e.call_error()))
        }
        Output::CarryOut(worker, action) => Input::Done(worker, executor.carry_out(worker, action).await),
        // Done before, in order.
        Output::Save(_) | Output::SaveDrain(..) | Output::Remove(_) | Output::Log(_) => Input::Tick,
    }
}
