//! The loop around the core: it keeps the clock, carries out what the core puts out, and hands the
//! answers back. It must never decide anything, and never begin an output before what was to be saved
//! ahead of it is on the disk.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use protocol::WorkerId;
use tokio::sync::mpsc;

use crate::act::Hands;
use crate::factory::{Factory, Input, Level, Output, Say};
use crate::store::{Store, Unsaved};
use crate::worker::Worker;

/// How long a stop waits for what is under way.
const GRACE: Duration = Duration::from_secs(10);
/// How soon, and how late at most, a change is written again that could not be.
const FIRST_WAIT: Duration = Duration::from_millis(500);
const LAST_WAIT: Duration = Duration::from_secs(15);

/// Milliseconds since 1970 that never go back, and do not jump, within one life.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    began: Instant,
    at: u64,
}

impl Clock {
    pub fn start() -> Self {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            began: Instant::now(),
            at: u64::try_from(at.as_millis()).unwrap_or(0),
        }
    }

    pub fn now(&self) -> u64 {
        self.at + u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX / 2)
    }
}

/// Everything that the loop holds.
#[derive(Debug)]
pub struct Shell {
    pub factory: Factory,
    pub store: Store,
    pub hands: Arc<Hands>,
    pub clock: Clock,
}

impl Shell {
    /// Run until `stop` is done, then wait a little for what is under way. Jobs go on without us.
    ///
    /// # Errors
    /// Where the database cannot be written, and waiting would not help: nothing may be begun that would be
    /// forgotten.
    pub async fn run(mut self, stop: impl Future<Output = ()>) -> Result<()> {
        let (answers, mut inbox) = mpsc::unbounded_channel();
        let mut phases: BTreeMap<WorkerId, &'static str> =
            self.factory.workers().map(|w| (w.id, w.phase.name())).collect();
        let mut stop = std::pin::pin!(stop);
        let mut stopping: Option<Instant> = None;
        let mut input = Input::Tick;
        loop {
            for output in self.factory.handle(self.clock.now(), input) {
                match output {
                    Output::Save(worker) => {
                        let stop = stopping.is_none().then_some(&mut stop);
                        written(|| self.store.save(&worker), stop).await?;
                        log_phase(&mut phases, &worker);
                    }
                    Output::Remove(worker) => {
                        let stop = stopping.is_none().then_some(&mut stop);
                        written(|| self.store.remove(worker), stop).await?;
                        phases.remove(&worker);
                        tracing::info!(%worker, "worker forgotten");
                    }
                    Output::Say(say) => log(&say),
                    output => begin(output, &self.hands, &answers),
                }
            }
            if stopping.is_some() && self.factory.is_idle() {
                break;
            }
            let now = self.clock.now();
            let deadline = self
                .factory
                .next_deadline()
                .map(|at| Duration::from_millis(at.saturating_sub(now)));
            let grace = stopping.map(|since| GRACE.saturating_sub(since.elapsed()));
            let wait = grace.or(deadline).unwrap_or(Duration::from_secs(3600));
            input = tokio::select! {
                () = &mut stop, if stopping.is_none() => {
                    tracing::info!("stopping: running jobs go on");
                    stopping = Some(Instant::now());
                    Input::Stop
                }
                Some(answer) = inbox.recv() => answer,
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
}

/// Write a change, as soon as it can be: a full disk is waited for, and told once.
///
/// # Errors
/// Where waiting does not help, or `stop` is done, or was before (none).
async fn written(
    mut write: impl FnMut() -> Result<(), Unsaved>,
    mut stop: Option<&mut (impl Future<Output = ()> + Unpin)>,
) -> Result<()> {
    const STOPPED: &str = "stopped while the database could not be written";
    let mut wait = FIRST_WAIT;
    loop {
        let unsaved = match write() {
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
            tracing::error!(
                "the database cannot be written, and nothing is begun until it can: {unsaved}; running jobs go on"
            );
        }
        let Some(stop) = &mut stop else {
            return Err(unsaved).context(STOPPED);
        };
        tokio::select! {
            () = &mut **stop => return Err(unsaved).context(STOPPED),
            () = tokio::time::sleep(wait) => wait = (wait * 2).min(LAST_WAIT),
        }
    }
}

/// Begin one piece of I/O; its answer comes through `answers`.
fn begin(output: Output, hands: &Arc<Hands>, answers: &mpsc::UnboundedSender<Input>) {
    let (hands, answers) = (hands.clone(), answers.clone());
    tokio::spawn(async move {
        let server = &hands.server;
        let input = match output {
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
            Output::Save(_) | Output::Remove(_) | Output::Say(_) => return,
        };
        // The loop has ended: nobody is left to be told.
        let _ = answers.send(input);
    });
}

fn log_phase(phases: &mut BTreeMap<WorkerId, &'static str>, worker: &Worker) {
    let phase = worker.phase.name();
    if phases.insert(worker.id, phase) != Some(phase) {
        let job = worker.job.as_ref().map(tracing::field::display);
        tracing::info!(worker = %worker.id, slot = %worker.slot, phase, job, "worker phase");
    }
}

fn log(say: &Say) {
    let worker = say.worker.as_ref().map(tracing::field::display);
    let slot = say.slot.as_ref().map(tracing::field::display);
    let job = say.job.as_ref().map(tracing::field::display);
    let text = &say.text;
    match say.level {
        Level::Info => tracing::info!(worker, slot, job, "{text}"),
        Level::Warn => tracing::warn!(worker, slot, job, "{text}"),
        Level::Error => tracing::error!(worker, slot, job, "{text}"),
    }
}
