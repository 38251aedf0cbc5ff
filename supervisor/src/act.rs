//! Carrying out one action for one worker, and saying how it went in the core's words.
//!
//! Each action may be a repetition after a crash. Nothing is decided here beyond what an answer means.

use std::fs::File;
use std::time::Duration;

use protocol::{BootstrapToken, ErrorKind, WorkerId};

use crate::agent::AgentCache;
use crate::console;
use crate::factory::Outcome;
use crate::helper::{self, Helper};
use crate::server::{self, Server};
use crate::view::{Side, Trouble};
use crate::worker::Action;

/// A server that has no job for a line yet is asked again so many times, a second apart.
const APPEND_TRIES: u32 = 3;

/// The three that actions need.
#[derive(Debug)]
pub struct Hands {
    pub server: Server,
    pub helper: Helper,
    pub agent: AgentCache,
}

impl Hands {
    pub async fn carry_out(&self, worker: WorkerId, action: Action) -> Outcome {
        match action {
            Action::Associate { slot } => of_server(self.server.associate(worker, &slot).await),
            Action::CreateUser { slot } => of_helper(self.helper.create_user(worker, slot).await),
            Action::InstallAgent { bootstrap } => self.install(worker, bootstrap).await,
            Action::Tell { reason, lines_sent } => self.tell(worker, &reason, lines_sent).await,
            // The helper answers Failed where something is left: saying it again goes on.
            Action::HostDelete => match self.helper.delete(worker).await {
                Ok(()) => Outcome::Done,
                Err(error) => Outcome::Trouble(error.trouble()),
            },
            Action::ServerDelete { gone } => match self.server.delete(worker).await {
                Ok(_) => Outcome::Done,
                // There is nothing to delete: that is what was wanted.
                Err(server::Error::Status { .. }) if gone => Outcome::Done,
                Err(error) => Outcome::Trouble(error.trouble()),
            },
        }
    }

    async fn install(&self, worker: WorkerId, bootstrap: BootstrapToken) -> Outcome {
        let agent = match self.agent.get(&self.server).await {
            Ok(agent) => agent,
            Err(sentence) => return Outcome::Trouble(Trouble::passing(Side::Server, sentence)),
        };
        of_helper(
            self.helper
                .install_agent(worker, bootstrap, agent.as_fd())
                .await
                .map(drop),
        )
    }

    /// The console's lines, then the failure itself: said in this order, both are in the job's log.
    async fn tell(&self, worker: WorkerId, reason: &str, lines_sent: u32) -> Outcome {
        let (first, lines) = match self.console(worker).await {
            Ok(lines) => (lines.first, lines.lines),
            Err(trouble) => return Outcome::Trouble(trouble),
        };
        for (number, line) in (first..).zip(&lines).filter(|(number, _)| *number >= lines_sent) {
            match self.append(worker, line).await {
                Ok(()) => {}
                Err(error) if error.is_refusal() => break,
                Err(error) => {
                    return Outcome::Partly {
                        lines: number,
                        trouble: error.trouble(),
                    };
                }
            }
        }
        let told = (first + u32::try_from(lines.len()).unwrap_or(0)).max(lines_sent);
        match self.server.fail(worker, reason).await {
            Ok(()) => Outcome::Done,
            Err(server::Error::Status { code: 404, .. }) => Outcome::CannotTell(
                "the buildomat server is too old to be told that a worker failed (it answered 404): update it".into(),
            ),
            Err(error) if error.is_refusal() => Outcome::CannotTell(error.to_string()),
            Err(error) => Outcome::Partly { lines: told, trouble: error.trouble() },
        }
    }

    /// Once stored, or never wanted: done. Still wanted after some tries: given up, the failure matters more.
    async fn append(&self, worker: WorkerId, line: &str) -> Result<(), server::Error> {
        for attempt in 1..=APPEND_TRIES {
            if !self.server.append(worker, line).await? || attempt == APPEND_TRIES {
                break;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        Ok(())
    }

    /// A worker without a console has nothing to say; that is no reason not to say that it failed.
    async fn console(&self, worker: WorkerId) -> Result<console::Lines, Trouble> {
        let none = console::Lines {
            first: 0,
            lines: Vec::new(),
        };
        match self.helper.attach(worker).await {
            Ok(fd) => Ok(console::read(&File::from(fd)).unwrap_or(none)),
            Err(helper::Error::Said(error))
                if !matches!(error.kind, ErrorKind::Busy | ErrorKind::Version) =>
            {
                Ok(none)
            }
            Err(error) => Err(error.trouble()),
        }
    }
}

fn of_server(result: Result<(), server::Error>) -> Outcome {
    match result {
        Ok(()) => Outcome::Done,
        Err(error) => Outcome::Trouble(error.trouble()),
    }
}

/// What a step of a worker's start met with.
fn of_helper(result: Result<(), helper::Error>) -> Outcome {
    match result {
        Ok(()) => Outcome::Done,
        Err(helper::Error::Said(error)) => match error.kind {
            ErrorKind::NoSuchWorker => Outcome::NoSuchWorker,
            ErrorKind::Refused | ErrorKind::NoSuchSlot | ErrorKind::Limit | ErrorKind::Failed => {
                Outcome::StartFailed(error.message().to_owned())
            }
            ErrorKind::Busy | ErrorKind::SlotTaken | ErrorKind::Version => {
                Outcome::Trouble(helper::Error::Said(error).trouble())
            }
        },
        Err(error) => Outcome::Trouble(error.trouble()),
    }
}
