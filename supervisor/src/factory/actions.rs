//! Handing out what each worker needs next, one action a worker at a time, and taking in how it went. What
//! is needed is never remembered here: it follows from the worker.

use protocol::WorkerId;
use protocol::config::{Script, Slot};

use super::{Factory, Level, Outcome, Output};
use crate::backoff::Backoff;
use crate::buildomat::Scripts;
use crate::call_error::CallError;
use crate::worker::{Action, Event, Worker};

/// A slot that failed a worker by itself rests this long at first, doubled for each further failure.
const COOLDOWN_MS: u64 = 15_000;
const MAX_COOLDOWN_MS: u64 = 600_000;

/// What the slot's jobs are examined with.
fn scripts_of(slot: &Slot) -> Scripts {
    let text = |script: &Option<Script>| script.as_ref().map(|script| script.as_str().to_owned());
    Scripts {
        pre_job_diagnostic_script: text(&slot.pre_job_diagnostic_script),
        post_job_diagnostic_script: text(&slot.post_job_diagnostic_script),
    }
}

impl Factory {
    pub(super) fn done(&mut self, now: u64, id: WorkerId, outcome: Outcome) {
        let turn = self.turn;
        let Some(runtime) = self.runtimes.get_mut(&id) else {
            return;
        };
        let Some(action) = std::mem::take(&mut runtime.doing) else {
            return;
        };
        runtime.touched = turn;
        match outcome {
            Outcome::Done => {
                (runtime.backoff, runtime.retry) = (Backoff::default(), None);
                runtime.last_error.clear();
                self.succeeded(now, id, &action);
            }
            Outcome::Partly { lines, error } => {
                self.event(now, id, Event::LinesReported { lines });
                self.retry_later(now, id, &action, error);
            }
            Outcome::Failed(error) => {
                self.event(now, id, Event::CallFailed(error.sentence.clone()));
                self.retry_later(now, id, &action, error);
            }
            Outcome::KillFailed(error) => {
                self.event(now, id, Event::KillFailed);
                self.retry_later(now, id, &action, error);
            }
            Outcome::StartFailed(reason) => self.event(now, id, Event::StartFailed(reason)),
            Outcome::NoSuchWorker => self.event(now, id, Event::HostLost),
            Outcome::CannotReport(why) => {
                self.log(
                    Level::Error,
                    Some(id),
                    format!("{why}; the worker is deleted instead, which fails its job"),
                );
                self.event(now, id, Event::CannotReport);
            }
        }
    }

    fn succeeded(&mut self, now: u64, id: WorkerId, action: &Action) {
        let event = match action {
            Action::Associate { .. } => Event::Associated,
            Action::CreateUser { .. } => Event::UserCreated,
            Action::InstallAgent { .. } => Event::AgentStarted,
            Action::HostKill => Event::Killed,
            Action::ReportFailure { .. } => Event::FailureReported,
            Action::HostDelete => Event::HostClean,
            Action::ServerDelete { .. } => return self.forget(now, id),
        };
        if self.workers.contains_key(&id) {
            self.event(now, id, event);
        } else {
            self.forget(now, id);
        }
    }

    /// The worker, or the orphan, has come to its end.
    fn forget(&mut self, now: u64, id: WorkerId) {
        self.runtimes.remove(&id);
        self.orphans.remove(&id);
        self.on_host.remove(&id);
        self.foreign.forget(id);
        self.ended.insert(id, self.turn);
        if let Some(worker) = self.workers.remove(&id) {
            self.out.push(Output::Remove(id));
            if let Some(rest) = self.cooldowns.get_mut(&worker.slot) {
                rest.until = now + (COOLDOWN_MS << (rest.failures.clamp(1, 7) - 1)).min(MAX_COOLDOWN_MS);
            }
        }
    }

    /// The action is repeated later.
    fn retry_later(&mut self, now: u64, id: WorkerId, action: &Action, error: CallError) {
        // A new phase has a new duty, which has not failed yet.
        let same = |w: &Worker| w.next_action().is_some_and(|duty| duty.name() == action.name());
        if self.workers.get(&id).is_some_and(|w| !same(w)) {
            return;
        }
        let Some(runtime) = self.runtimes.get_mut(&id) else {
            return;
        };
        let wait = runtime.backoff.fail_with(&error, &mut self.rng);
        runtime.retry = Some((now + wait, error.peer));
        if runtime.last_error != error.sentence {
            runtime.last_error = error.sentence.clone();
            self.log(
                Level::Warn,
                Some(id),
                format!("cannot {}, will try again: {}", action.name(), error.sentence),
            );
        }
    }

    pub(super) fn start_actions(&mut self, now: u64) {
        for runtime in self.runtimes.values_mut() {
            runtime.retry = runtime.retry.filter(|(at, _)| *at > now);
        }
        let duties = self
            .workers
            .iter()
            .filter_map(|(id, w)| Some((*id, w.next_action()?)));
        let orphans = self.orphans.iter().map(|(id, (_, action))| (*id, action.clone()));
        // What the last life has saved may be old: before both lists have been compared, nothing is begun but deletions.
        let deletes = |action: &Action| matches!(action, Action::HostDelete | Action::ServerDelete { .. });
        let duties = duties.chain(orphans);
        let duties = duties.filter(|(_, action)| self.reconciled || deletes(action));
        let duties: Vec<(WorkerId, Action)> = duties.collect();
        for (id, mut action) in duties {
            let runtime = self.runtimes.entry(id).or_default();
            if runtime.doing.is_some() || runtime.retry.is_some() {
                continue;
            }
            if action.needs_the_slot() {
                let worker = self.workers.get(&id);
                let is_removed = worker.is_some_and(|worker| {
                    let slot = self.config.slots.get(&worker.slot);
                    slot.is_none_or(|slot| slot.target != worker.target)
                });
                // Nor is a user made for a worker that the server's newest list does not have: what the store says of it
                // may be older than its end.
                if is_removed || self.file_differs.is_some() || runtime.missing_since.is_some() {
                    continue;
                }
            }
            if let Action::Associate { slot, scripts } = &mut action {
                *scripts = self.config.slots.get(slot).map(scripts_of).unwrap_or_default();
            }
            runtime.doing = Some(action.clone());
            runtime.touched = self.turn;
            self.out.push(Output::Act(id, action));
        }
    }
}
