//! Starts what each worker needs next, one action a worker at a time, and takes in how it went. What is needed is not
//! stored here: it follows from the worker.

use protocol::WorkerId;
use protocol::config::{Script, Slot};

use super::{Factory, Level, Output};
use crate::backoff::Backoff;
use crate::buildomat::Scripts;
use crate::call_error::CallError;
use crate::worker::{Action, Event};

/// A slot that failed a worker by itself takes no other for so long at first, doubled for each further failure.
const COOLDOWN_MS: u64 = 15_000;
const MAX_COOLDOWN_MS: u64 = 600_000;

/// The diagnostic scripts of the slot's jobs.
fn scripts_of(slot: &Slot) -> Scripts {
    let text = |script: &Option<Script>| script.as_ref().map(|script| script.as_str().to_owned());
    Scripts {
        pre_job_diagnostic_script: text(&slot.pre_job_diagnostic_script),
        post_job_diagnostic_script: text(&slot.post_job_diagnostic_script),
    }
}

impl Factory {
    /// The answer to an action.
    pub(super) fn handle_done(&mut self, now: u64, id: WorkerId, event: Event) {
        let Some(entry) = self.entries.get_mut(&id) else {
            return;
        };
        let is_owned = entry.owned().is_some();
        let Some(calls) = entry.calls_mut() else {
            return;
        };
        let Some(action) = calls.action.take() else {
            return;
        };
        calls.touched = self.input_number;
        if event.is_success() {
            (calls.backoff, calls.retry) = (Backoff::default(), None);
            calls.last_error.clear();
        }
        // Nothing is left of an orphan once it is deleted where it was.
        if event == Event::ServerDeleted || (event.is_success() && !is_owned) {
            return self.forget(now, id);
        }
        if let Event::CannotReport(why) = &event {
            let text = format!("{why}; the worker is deleted instead, which fails its job");
            self.log(Level::Error, Some(id), text);
        }
        let error = event.error().cloned();
        self.step(now, id, event);
        if let Some(error) = error {
            self.retry_later(now, id, &action, error);
        }
    }

    /// The worker, or the orphan, has come to its end.
    fn forget(&mut self, now: u64, id: WorkerId) {
        let Some(entry) = self.entries.get_mut(&id) else {
            return;
        };
        let slot = entry.owned().map(|owned| owned.worker.slot.clone());
        entry.end(self.input_number);
        if let Some(slot) = slot {
            self.out.push(Output::Remove(id));
            if let Some(cooldown) = self.cooldowns.get_mut(&slot) {
                let wait = COOLDOWN_MS << (cooldown.failures.clamp(1, 7) - 1);
                cooldown.until = now + wait.min(MAX_COOLDOWN_MS);
            }
        }
    }

    /// The action is repeated later.
    fn retry_later(&mut self, now: u64, id: WorkerId, action: &Action, error: CallError) {
        let Some(entry) = self.entries.get_mut(&id) else {
            return;
        };
        // A new phase has a new action, which has not failed yet.
        let next = entry.owned().map(|owned| owned.worker.next_action());
        if next.is_some_and(|next| next.is_none_or(|next| next.name() != action.name())) {
            return;
        }
        let Some(calls) = entry.calls_mut() else {
            return;
        };
        let wait = calls.backoff.fail_with(&error, &mut self.rng);
        calls.retry = Some((now + wait, error.peer));
        if calls.last_error != error.sentence {
            calls.last_error.clone_from(&error.sentence);
            let text = format!("cannot {}, will try again: {}", action.name(), error.sentence);
            self.log(Level::Warn, Some(id), text);
        }
    }

    pub(super) fn start_actions(&mut self, now: u64) {
        let (input_number, is_reconciled) = (self.input_number, self.is_reconciled);
        for (id, entry) in &mut self.entries {
            let mut may_start = true;
            let next = if let Some(owned) = entry.owned() {
                let is_removed = !self.schedule.may_have(&owned.worker.slot, owned.worker.target);
                // Nor is a user made for a worker that the server's newest list does not have: what the database says of
                // it may be older than its end.
                may_start = !(is_removed || self.file_differs.is_some() || owned.missing_since.is_some());
                owned.worker.next_action()
            } else {
                entry.orphan().map(|orphan| orphan.action.clone())
            };
            let Some(calls) = entry.calls_mut() else {
                continue;
            };
            calls.retry = calls.retry.filter(|(at, _)| *at > now);
            let Some(mut action) = next.filter(|_| calls.action.is_none() && calls.retry.is_none()) else {
                continue;
            };
            // What the previous run has saved may be old: before both lists have been compared, nothing is begun but
            // deletions.
            let deletes = matches!(action, Action::HostDelete | Action::ServerDelete { .. });
            if !(is_reconciled || deletes) || (action.needs_the_slot() && !may_start) {
                continue;
            }
            if let Action::Associate { slot, scripts } = &mut action {
                *scripts = self.config.slots.get(slot).map(scripts_of).unwrap_or_default();
            }
            if let Action::InstallAgent { agent, .. } = &mut action {
                let named = self.config.factory.agent.as_ref();
                *agent = named.map(|path| path.as_path().to_owned());
            }
            calls.action = Some(action.clone());
            calls.touched = input_number;
            self.out.push(Output::CarryOut(*id, action));
        }
    }
}
