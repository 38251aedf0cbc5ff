//! The loop around the core: it keeps the clock, carries out what the core puts out, and hands the
//! answers back. It must never decide anything, and never begin an output before what was to be saved
//! ahead of it is on the disk: but for deletions, which follow from what there is, and make room.

mod operator;
mod persistence;
mod phases;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::act::Hands;
use crate::config_check::ConfigFile;
use crate::control::desk::{Desk, Word};
use crate::control::metrics::{self, Metrics};
use crate::factory::{Factory, Input, Outcome, Output};
use crate::notify::Watchdog;
use crate::pending_calls::PendingCalls;
use crate::store::Storage;
use crate::view::{Side, Trouble};
use crate::worker::Action;
pub use persistence::Persistence;
use phases::Phases;

/// How long a stop waits for what is under way.
const GRACE: Duration = Duration::from_secs(10);
/// A call that has had no answer for this long is shown as unanswered.
const UNANSWERED: Duration = Duration::from_secs(5);
/// Whoever looks waits no longer for a helper that must be asked first.
const LOOK: Duration = Duration::from_secs(1);

/// Milliseconds since 1970 that never go back, and do not jump, within one life: waits and limits are counted in them. The
/// host's clock may jump, as when it is set after the start: what is shown is in its time, see [`Clock::ahead`].
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

    pub fn now(&self) -> u64 {
        self.at + u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX / 2)
    }
}

/// Everything that the loop holds.
#[derive(Debug)]
pub struct Shell<S> {
    pub factory: Factory,
    pub persistence: Persistence<S>,
    pub hands: Arc<Hands>,
    pub clock: Clock,
    pub desk: Desk,
    pub file: Box<dyn ConfigFile>,
    pub watchdog: Watchdog,
}

impl<S: Storage> Shell<S> {
    /// Run until the words end or one of them is [`Input::Stop`], then wait a little for what is under way. Jobs go
    /// on without us.
    ///
    /// # Errors
    /// Where the database cannot be written, and waiting would not help: nothing may be begun that would be
    /// forgotten.
    pub async fn run(mut self, mut words: mpsc::UnboundedReceiver<Word>) -> Result<()> {
        let mut under_way = JoinSet::new();
        let mut phases = Phases::of(&self.factory);
        let mut stopping: Option<Instant> = None;
        // Those who look, since when.
        let (mut lookers, mut looked) = (Vec::new(), Instant::now());
        // Answers of what was not begun.
        let mut unbegun = VecDeque::new();
        let mut input = Input::Tick;
        loop {
            let mut outputs = Vec::new();
            let difference = self.file.difference(self.factory.config());
            if difference.as_deref() != self.factory.file_difference() {
                tell_of_file(difference.as_deref());
                outputs = self
                    .factory
                    .handle(self.clock.now(), Input::FileDiffers(difference));
            }
            for (side, since) in self.unanswered() {
                outputs.extend(
                    self.factory
                        .handle(self.clock.now(), Input::Unanswered(side, since)),
                );
            }
            outputs.extend(self.factory.handle(self.clock.now(), input));
            for output in outputs {
                match output {
                    Output::Save(worker) => {
                        self.persistence.save(&worker)?;
                        phases.changed(&worker, &self.desk.metrics);
                    }
                    Output::Remove(worker) => {
                        self.persistence.remove(worker)?;
                        phases.gone(worker, self.clock.now(), &self.desk.metrics);
                    }
                    Output::Say(say) => {
                        self.desk.note(self.clock.now(), &say);
                        phases::log(&say);
                    }
                    output => match self.admitted(output) {
                        Ok(output) => {
                            let (metrics, hands) = (self.desk.metrics.clone(), self.hands.clone());
                            under_way.spawn(begun(metrics, hands, output));
                        }
                        Err(answer) => unbegun.push_back(*answer),
                    },
                }
            }
            self.persistence.look()?;
            if self.persistence.trouble() != self.factory.storage_trouble() {
                let trouble = self.persistence.trouble().cloned();
                self.tell_of_storage(trouble.as_ref());
                input = Input::Storage(trouble);
                continue;
            }
            if let Some(answer) = unbegun.pop_front() {
                input = answer;
                continue;
            }
            if stopping.is_some() && self.factory.is_idle() {
                break;
            }
            let now = self.clock.now();
            if !self.factory.is_looking() || looked.elapsed() >= LOOK {
                for reply in lookers.drain(..) {
                    self.show(reply);
                }
            }
            let deadline = self
                .factory
                .next_deadline()
                .map(|at| Duration::from_millis(at.saturating_sub(now)));
            let grace = stopping.map(|since| GRACE.saturating_sub(since.elapsed()));
            let mut wait = grace.or(deadline).unwrap_or(Duration::from_secs(3600));
            if !lookers.is_empty() {
                wait = wait.min(LOOK.saturating_sub(looked.elapsed()));
            }
            wait = wait.min(self.persistence.due_in());
            for (_, calls) in self.pending_calls() {
                if let Some(left) = calls
                    .longest()
                    .and_then(|longest| UNANSWERED.checked_sub(longest))
                {
                    // No less than a timer can wait for.
                    wait = wait.min(left + Duration::from_millis(1));
                }
            }
            // The core is then asked once more than it needs.
            if stopping.is_none()
                && let Some(again) = self.watchdog.alive()
            {
                wait = wait.min(again);
            }
            input = tokio::select! {
                // In this order: what happens must not depend on chance.
                biased;
                word = words.recv(), if stopping.is_none() => match word.unwrap_or(Word::Tell(Input::Stop)) {
                    Word::Status(reply) if self.factory.wants_a_look(self.clock.now()) => {
                        lookers.push(reply);
                        looked = Instant::now();
                        Input::Look
                    }
                    word => {
                        let input = self.hear(word);
                        if matches!(input, Input::Stop) {
                            tracing::info!("stopping: running jobs go on");
                            stopping = Some(Instant::now());
                        }
                        input
                    }
                },
                Some(answer) = under_way.join_next() => answer.context("a call came to no end")?,
                () = tokio::time::sleep(wait) => {
                    if stopping.is_some_and(|since| since.elapsed() >= GRACE) {
                        tracing::warn!("stopping without waiting longer: what is under way will be repeated");
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

    fn pending_calls(&self) -> [(Side, &PendingCalls); 2] {
        [
            (Side::Server, self.hands.server.pending()),
            (Side::Helper, self.hands.helper.pending()),
        ]
    }

    /// What is new of sides that do not answer.
    fn unanswered(&self) -> Vec<(Side, Option<u64>)> {
        let now = self.clock.now();
        let since = |calls: &PendingCalls| {
            let longest = calls.longest().filter(|longest| *longest >= UNANSWERED)?;
            let ms = u64::try_from(longest.as_millis()).unwrap_or(u64::MAX);
            Some(now.saturating_sub(ms))
        };
        let all = self.pending_calls().map(|(side, calls)| (side, since(calls)));
        let known = |side| self.factory.unanswered_since(side);
        all.into_iter()
            .filter(|(side, since)| since.is_some() != known(*side).is_some())
            .collect()
    }

    /// An output that may be begun now; otherwise the answer that it was not.
    fn admitted(&self, output: Output) -> Result<Output, Box<Input>> {
        if !self.persistence.is_behind() {
            return Ok(output);
        }
        let because = self.persistence.trouble().cloned().unwrap_or_default();
        let trouble = Trouble::passing(Side::Database, because);
        match output {
            // The server still learns that the factory lives.
            Output::Lease(_) => Ok(Output::Lease(Default::default())),
            Output::MakeWorker { job, .. } => Err(Input::WorkerMade(job, Err(trouble)).into()),
            Output::Do(_, Action::HostDelete | Action::ServerDelete { .. }) => Ok(output),
            Output::Do(worker, _) => Err(Input::Done(worker, Outcome::Trouble(trouble)).into()),
            _ => Ok(output),
        }
    }

    /// Say once that nothing can be saved, and once that it can.
    fn tell_of_storage(&mut self, trouble: Option<&String>) {
        let Some(why) = trouble else {
            tracing::info!("the database can be written again");
            return;
        };
        if self.factory.storage_trouble().is_some() {
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
        self.desk.trouble(self.clock.now(), text);
    }
}

fn tell_of_file(difference: Option<&str>) {
    match difference {
        Some(difference) => tracing::warn!("no jobs are taken: {difference}; running jobs go on"),
        None => tracing::info!("the configuration file says what is in use"),
    }
}

/// One piece of I/O, counted, and its answer.
async fn begun(metrics: Arc<Metrics>, hands: Arc<Hands>, output: Output) -> Input {
    let call = metrics::call_of(&output);
    let (worker, job) = phases::about(&output);
    let began = Instant::now();
    let answer = answer_to(output, &hands).await;
    if let Some(call) = call {
        let outcome = metrics.answered(call, &answer);
        let ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::debug!(worker, job, call = call.1, outcome, ms, "call");
    }
    answer
}

async fn answer_to(output: Output, hands: &Hands) -> Input {
    let server = &hands.server;
    match output {
        Output::ListServer => Input::ServerListed(server.workers().await.map_err(|e| e.trouble())),
        Output::ListHost => Input::HostListed(hands.helper.list().await.map_err(|e| e.trouble())),
        Output::Lease(targets) => Input::Leased(server.lease(targets).await.map_err(|e| e.trouble())),
        Output::MakeWorker { target, job } => {
            let made = server.make_worker(target, &job).await.map_err(|e| e.trouble());
            Input::WorkerMade(job, made)
        }
        Output::Renew { worker, job } => {
            Input::Renewed(worker, server.renew(&job).await.map_err(|e| e.trouble()))
        }
        Output::Do(worker, action) => Input::Done(worker, hands.carry_out(worker, action).await),
        // Done before, in order.
        Output::Save(_) | Output::Remove(_) | Output::Say(_) => Input::Tick,
    }
}
