//! The loop around the core: it keeps the clock, carries out what the core puts out, and hands the
//! answers back. It must never decide anything, and never begin an output before what was to be saved
//! ahead of it is on the disk.

mod operator;
mod phases;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::act::Hands;
use crate::control::desk::{Desk, Word};
use crate::control::metrics;
use crate::factory::{Factory, Input, Output};
use crate::notify::Watchdog;
use crate::store::{Store, Unsaved};
use phases::Phases;

/// How long a stop waits for what is under way.
const GRACE: Duration = Duration::from_secs(10);
/// How soon, and how late at most, a change is written again that could not be. The watchdog's patience is longer.
const FIRST_WAIT: Duration = Duration::from_millis(500);
const LAST_WAIT: Duration = Duration::from_secs(15);
/// Whoever looks waits no longer for a helper that must be asked first.
const LOOK: Duration = Duration::from_secs(1);

/// Milliseconds since 1970 that never go back, and do not jump, within one life.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    began: Instant,
    at: u64,
}

impl Clock {
    pub fn start() -> Self {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self::at(u64::try_from(at.as_millis()).unwrap_or(0))
    }

    /// A clock that reads `at` now.
    pub fn at(at: u64) -> Self {
        Self {
            began: Instant::now(),
            at,
        }
    }

    pub fn now(&self) -> u64 {
        self.at + u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX / 2)
    }
}

/// What is said to the loop, in its order. Its end is the word to stop.
#[derive(Debug)]
pub struct Ears {
    words: mpsc::UnboundedReceiver<Word>,
    /// Heard while nothing could be done about it.
    kept: VecDeque<Word>,
}

impl From<mpsc::UnboundedReceiver<Word>> for Ears {
    fn from(words: mpsc::UnboundedReceiver<Word>) -> Self {
        let kept = VecDeque::new();
        Self { words, kept }
    }
}

impl Ears {
    async fn next(&mut self) -> Word {
        match self.kept.pop_front() {
            Some(word) => word,
            None => self.fresh().await,
        }
    }

    async fn fresh(&mut self) -> Word {
        self.words.recv().await.unwrap_or(Word::Tell(Input::Stop))
    }
}

/// Everything that the loop holds.
#[derive(Debug)]
pub struct Shell {
    pub factory: Factory,
    pub store: Store,
    pub hands: Arc<Hands>,
    pub clock: Clock,
    pub desk: Desk,
    pub watchdog: Watchdog,
}

impl Shell {
    /// Run until the words end or one of them is [`Input::Stop`], then wait a little for what is under way. Jobs go
    /// on without us.
    ///
    /// # Errors
    /// Where the database cannot be written, and waiting would not help: nothing may be begun that would be
    /// forgotten.
    pub async fn run(mut self, mut ears: Ears) -> Result<()> {
        let mut under_way = JoinSet::new();
        let mut phases = Phases::of(&self.factory);
        let mut stopping: Option<Instant> = None;
        // Those who look, since when.
        let (mut lookers, mut looked) = (Vec::new(), Instant::now());
        let mut input = Input::Tick;
        loop {
            for output in self.factory.handle(self.clock.now(), input) {
                match output {
                    Output::Save(worker) => {
                        let save = |store: &mut Store| store.save(&worker);
                        self.written(save, &mut ears, stopping.is_some()).await?;
                        phases.changed(&worker, &self.desk.metrics);
                    }
                    Output::Remove(worker) => {
                        let remove = |store: &mut Store| store.remove(worker);
                        self.written(remove, &mut ears, stopping.is_some()).await?;
                        phases.gone(worker, self.clock.now(), &self.desk.metrics);
                    }
                    Output::Say(say) => {
                        self.desk.note(self.clock.now(), &say);
                        phases::log(&say);
                    }
                    output => drop(under_way.spawn(self.begun(output))),
                }
            }
            if stopping.is_some() && self.factory.is_idle() {
                break;
            }
            let now = self.clock.now();
            if !self.factory.is_looking() || looked.elapsed() >= LOOK {
                for looker in lookers.drain(..) {
                    self.show(looker);
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
            // The core is then asked once more than it needs.
            if stopping.is_none()
                && let Some(again) = self.watchdog.alive()
            {
                wait = wait.min(again);
            }
            input = tokio::select! {
                // In this order: what happens must not depend on chance.
                biased;
                word = ears.next(), if stopping.is_none() => match word {
                    Word::Status(looker) if self.factory.wants_a_look(self.clock.now()) => {
                        lookers.push(looker);
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
                    if grace.is_some() {
                        tracing::warn!("stopping without waiting longer: what is under way will be repeated");
                        break;
                    }
                    Input::Tick
                }
            };
        }
        tracing::info!("stopped");
        Ok(())
    }

    /// Write a change, as soon as it can be: a full disk is waited for, and told once. Whoever asks meanwhile is
    /// answered; what is told is kept for later.
    ///
    /// # Errors
    /// Where waiting does not help, or is not wanted any more.
    async fn written(
        &mut self,
        write: impl Fn(&mut Store) -> Result<(), Unsaved>,
        ears: &mut Ears,
        mut stopping: bool,
    ) -> Result<()> {
        let mut wait = FIRST_WAIT;
        loop {
            let unsaved = match write(&mut self.store) {
                Ok(()) if wait == FIRST_WAIT => return Ok(()),
                Ok(()) => {
                    tracing::info!("the database can be written again");
                    return Ok(());
                }
                Err(unsaved) => unsaved,
            };
            if !unsaved.passing {
                return Err(unsaved).context("the database cannot be written");
            }
            if wait == FIRST_WAIT {
                let text = format!(
                    "the database cannot be written, and nothing is begun until it can: {unsaved}; running jobs go on"
                );
                tracing::error!("{text}");
                self.desk.trouble(self.clock.now(), text);
            }
            self.watchdog.alive();
            let again = Instant::now() + wait;
            wait = (wait * 2).min(LAST_WAIT);
            loop {
                if stopping {
                    return Err(unsaved).context("stopped while the database could not be written");
                }
                tokio::select! {
                    biased;
                    word = ears.fresh() => match word {
                        Word::Tell(Input::Stop) => stopping = true,
                        Word::Status(_) => drop(self.hear(word)),
                        word => ears.kept.push_back(word),
                    },
                    () = tokio::time::sleep_until(again) => break,
                }
            }
        }
    }

    /// One piece of I/O, counted, and its answer.
    fn begun(&self, output: Output) -> impl Future<Output = Input> + use<> {
        let (metrics, hands) = (self.desk.metrics.clone(), self.hands.clone());
        async move {
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
    }
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
