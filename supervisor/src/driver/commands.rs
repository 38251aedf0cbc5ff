//! The operator's commands, as inputs of the core. Queries are answered here.

use protocol::SlotName;
use tokio::sync::oneshot;

use super::Driver;
use crate::control::api::Status;
use crate::control::state::{Command, ReplySender};
use crate::control::status::{StatusInput, time};
use crate::factory::Input;
use crate::factory::drain::Drain;
use crate::store::Storage;

impl<S: Storage> Driver<S> {
    /// How things are.
    pub(super) fn send_status(&mut self, reply: oneshot::Sender<Status>) {
        let input = StatusInput {
            factory: &self.factory,
            now: self.clock.now(),
            ahead: self.clock.ahead(),
        };
        // The client may have gone.
        let _ = reply.send(self.status.status(&input));
    }

    pub(super) fn handle_command(&mut self, command: Command) -> Input {
        let now = self.clock.now();
        match command {
            Command::Input(input) => input,
            Command::Status(answer) => {
                self.send_status(answer);
                Input::Tick
            }
            Command::Drain {
                slot: Some(slot),
                answer,
                ..
            } if !self.factory.has_slot(&slot) => refused(
                answer,
                format!("there is no slot {slot}: see `user-factory status`"),
            ),
            Command::Drain {
                drain: Some(Drain { until: Some(end), .. }),
                answer,
                ..
            } if end <= self.clock.wall() => refused(
                answer,
                "the end of the drain has passed already by this host's clock: name a later time".into(),
            ),
            Command::Drain {
                slot,
                drain,
                by,
                answer,
            } => {
                self.drain_command = Some((by, answer));
                Input::Drain(slot, drain)
            }
            Command::Destroy { worker, by, answer } => {
                if !self.factory.owns(worker) && !self.factory.may_be_foreign(worker) {
                    return refused(
                        answer,
                        format!("there is no worker {worker}: see `user-factory workers`"),
                    );
                }
                tracing::warn!(%worker, %by, "an operator destroys a worker");
                done(answer, Input::Destroy(worker))
            }
            Command::Kill { worker, by, answer } => {
                if !self.factory.owns(worker) {
                    return refused(
                        answer,
                        format!("there is no worker {worker}: see `user-factory workers`"),
                    );
                }
                tracing::warn!(%worker, %by, "an operator ends a worker's processes");
                let reason = format!("an operator ({by}) ended its processes with `user-factory kill`");
                done(answer, Input::Kill(worker, reason))
            }
            Command::HostStops { by, answer } => {
                tracing::info!(%by, "the host is being shut down: no more jobs are taken");
                done(answer, Input::HostStops)
            }
            Command::SelfTested { failure, by, answer } => {
                tracing::info!(%by, passed = failure.is_none(), "an operator has tested all free slots");
                done(answer, Input::SelfTested(failure))
            }
            Command::Reload {
                by,
                refused: why,
                answer,
            } => match self.status.reload(now, self.factory.config(), why) {
                Ok(config) => {
                    let slots = config.slots.len();
                    tracing::info!(slots, %by, "configuration loaded again: new workers get what it says");
                    self.status.egress.configure(&config);
                    done(answer, Input::Configure(Box::new(config)))
                }
                Err(why) => {
                    tracing::error!(
                        "the changed configuration is not taken, the last one stays in use: {}",
                        why.replace('\n', "; ")
                    );
                    refused(answer, why)
                }
            },
        }
    }

    /// Save what is drained, and answer the operator's command, if it is one's. The input that says that it is saved.
    pub(super) fn save_drain(&mut self, slot: Option<SlotName>, drain: Option<Drain>) -> Input {
        let command = self.drain_command.take();
        let by = command.as_ref().map(|(by, _)| tracing::field::display(*by));
        let saved = self.persistence.store().save_drain(slot.as_ref(), drain.as_ref());
        let result = saved.map_err(|why| format!("it cannot be remembered: {why}"));
        let is_drain = drain.is_some();
        let reason = drain.as_ref().and_then(|drain| drain.reason.as_deref());
        let until = drain.as_ref().and_then(|drain| drain.until);
        let until = until.map(|end| tracing::field::display(time(end)));
        match (&result, &slot) {
            // The core has logged the end of one.
            (Ok(()), _) if command.is_none() => {}
            (Ok(()), Some(slot)) => {
                tracing::info!(%slot, drain = is_drain, by, reason, until, "an operator drains or resumes a slot");
            }
            (Ok(()), None) => {
                tracing::info!(
                    drain = is_drain,
                    by,
                    reason,
                    until,
                    "an operator drains or resumes all slots"
                );
            }
            (Err(why), _) => tracing::error!(drain = is_drain, by, "what is drained is not saved: {why}"),
        }
        let is_saved = result.is_ok();
        if let Some((_, answer)) = command {
            // The client may have gone.
            let _ = answer.send(result);
        }
        match is_saved {
            true => Input::DrainSaved(slot, drain),
            false => Input::Tick,
        }
    }
}

fn done(answer: ReplySender, input: Input) -> Input {
    let _ = answer.send(Ok(()));
    input
}

fn refused(answer: ReplySender, why: String) -> Input {
    let _ = answer.send(Err(why));
    Input::Tick
}
