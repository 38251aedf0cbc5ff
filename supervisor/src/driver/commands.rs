//! The operator's commands, as inputs of the core. Queries are answered here.

use tokio::sync::oneshot;

use super::Driver;
use crate::control::api::Status;
use crate::control::state::{Answer, Command};
use crate::factory::Input;
use crate::store::Storage;

impl<S: Storage> Driver<S> {
    /// How things are.
    pub(super) fn send_status(&mut self, reply: oneshot::Sender<Status>) {
        self.factory.set_ahead(self.clock.ahead());
        // Who asked may have gone.
        let _ = reply.send(self.status.status(&self.factory, self.clock.now()));
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
                slot: None,
                drain,
                by,
                answer,
            } => {
                if let Err(why) = self.persistence.store().save_drain(None, drain) {
                    return refused(answer, format!("it cannot be remembered: {why}"));
                }
                tracing::info!(drain, %by, "an operator drains or resumes all slots");
                done(answer, Input::Drain(drain))
            }
            Command::Drain {
                slot: Some(slot),
                drain,
                by,
                answer,
            } => {
                if !self.factory.has_slot(&slot) {
                    return refused(
                        answer,
                        format!("there is no slot {slot}: see `user-factory status`"),
                    );
                }
                if let Err(why) = self.persistence.store().save_drain(Some(&slot), drain) {
                    return refused(answer, format!("it cannot be remembered: {why}"));
                }
                tracing::info!(%slot, drain, %by, "an operator drains or resumes a slot");
                done(answer, Input::DrainSlot(slot, drain))
            }
            Command::Destroy { worker, by, answer } => {
                if !self.factory.knows(worker) && !self.factory.is_foreign(worker) {
                    return refused(
                        answer,
                        format!("there is no worker {worker}: see `user-factory workers`"),
                    );
                }
                tracing::warn!(%worker, %by, "an operator destroys a worker");
                done(answer, Input::Destroy(worker))
            }
            Command::Kill { worker, by, answer } => {
                if !self.factory.knows(worker) {
                    return refused(
                        answer,
                        format!("there is no worker {worker}: see `user-factory workers`"),
                    );
                }
                tracing::warn!(%worker, %by, "an operator ends a worker's processes");
                let reason = format!("an operator ({by}) ended its processes with `user-factory kill`");
                done(answer, Input::Kill(worker, reason))
            }
            Command::Reload {
                by,
                refused: why,
                answer,
            } => match self.status.reload(now, self.factory.config(), why) {
                Ok(config) => {
                    let slots = config.slots.len();
                    tracing::info!(slots, %by, "configuration loaded again: new workers get what it says");
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
}

fn done(answer: Answer, input: Input) -> Input {
    let _ = answer.send(Ok(()));
    input
}

fn refused(answer: Answer, why: String) -> Input {
    let _ = answer.send(Err(why));
    Input::Tick
}
