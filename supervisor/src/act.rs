//! Carrying out one action for one worker, and saying how it went in the core's words.
//!
//! Each action may be a repetition after a crash. Nothing is decided here beyond what an answer means.

use std::time::Duration;

use protocol::{BootstrapToken, ErrorKind, WorkerId};

use crate::agent::AgentCache;
use crate::console;
use crate::factory::Outcome;
use crate::helper::{self, Helper};
use crate::identity::Identity;
use crate::server::{self, Server};
use crate::view::{Side, Trouble};
use crate::worker::Action;

/// A server that has no job for the lines yet is asked again so many times, a second apart.
const APPEND_TRIES: u32 = 3;

/// What actions need.
#[derive(Debug)]
pub struct Hands {
    pub server: Server,
    pub helper: Helper,
    pub agent: AgentCache,
    /// What this host marks its workers with.
    pub identity: Identity,
}

impl Hands {
    pub async fn carry_out(&self, worker: WorkerId, action: Action) -> Outcome {
        match action {
            Action::Associate { slot, scripts } => {
                let mark = self.identity.mark(&slot);
                of_server(self.server.associate(worker, &mark, &scripts).await)
            }
            Action::CreateUser { slot } => of_helper(self.helper.create_user(worker, slot).await),
            Action::InstallAgent { bootstrap } => self.install(worker, bootstrap).await,
            Action::HostKill => match self.helper.kill(worker).await {
                Ok(()) => Outcome::Done,
                Err(helper::Error::Said(error)) if error.kind == ErrorKind::NoSuchWorker => Outcome::Done,
                Err(error @ helper::Error::Said(_)) => Outcome::KillFailed(error.trouble()),
                Err(error) => Outcome::Trouble(error.trouble()),
            },
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
                Ok(true) => {}
                // No job will have the others either; the failure matters more.
                Ok(false) => break,
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

    /// True once it is stored, or never wanted; false where after some tries there still is no job for it.
    async fn append(&self, worker: WorkerId, line: &str) -> Result<bool, server::Error> {
        for attempt in 1..=APPEND_TRIES {
            if !self.server.append(worker, line).await? {
                return Ok(true);
            }
            if attempt < APPEND_TRIES {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        Ok(false)
    }

    /// A worker without a console has nothing to say; that is no reason not to say that it failed.
    async fn console(&self, worker: WorkerId) -> Result<console::Lines, Trouble> {
        let none = console::Lines {
            first: 0,
            lines: Vec::new(),
        };
        match self.helper.attach(worker).await {
            Ok(console) => Ok(console::read(&console).unwrap_or(none)),
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
            ErrorKind::Refused | ErrorKind::Limit | ErrorKind::Failed => {
                Outcome::StartFailed(error.message().to_owned())
            }
            // Come back later. The file in which the helper finds no such slot has changed since the worker was leased.
            ErrorKind::Busy | ErrorKind::NoSuchSlot | ErrorKind::SlotTaken | ErrorKind::Version => {
                Outcome::Trouble(helper::Error::Said(error).trouble())
            }
        },
        Err(error) => Outcome::Trouble(error.trouble()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::helper::{Line, Pending, Road};
    use crate::identity::InstanceId;
    use crate::server::{Call, Carrier};
    use protocol::{Exit, Received, Reply, Request, State, wire};
    use std::io::Write;
    use std::os::fd::BorrowedFd;
    use std::sync::{Arc, Mutex};

    /// A helper with a console of a hundred lines, and a server that has no job for any of them.
    #[derive(Clone, Debug, Default)]
    struct NoJob(Arc<Mutex<Vec<String>>>);

    impl Carrier for NoJob {
        fn call(&self, call: Call) -> server::Pending<'_, server::Answer> {
            self.0.lock().unwrap().push(call.path);
            Box::pin(async { Ok(server::Answer::new(200, r#"{"retry":true}"#)) })
        }

        fn file<'a>(
            &'a self,
            _: &'a str,
            _: &'a [(&'a str, String)],
            _: &'a [(&'static str, String)],
        ) -> server::Pending<'a, reqwest::Response> {
            Box::pin(async { Err(server::Error::Unreachable("no file".into())) })
        }
    }

    impl Road for NoJob {
        fn connect(&self) -> Result<Box<dyn Line>, helper::Error> {
            Ok(Box::new(self.clone()))
        }
    }

    impl Line for NoJob {
        fn exchange<'a>(&'a self, packet: &'a [u8], _: Option<BorrowedFd<'a>>) -> Pending<'a> {
            let (reply, descriptors) = match wire::decode(packet).unwrap() {
                Request::Hello { .. } => (Reply::Welcome, vec![]),
                _ => {
                    let mut console = tempfile::tempfile().unwrap();
                    console.write_all(&b"line\n".repeat(100)).unwrap();
                    let state = State::Exited(Exit::Status(1));
                    (Reply::Attached { state }, vec![console.into()])
                }
            };
            let bytes = wire::encode(&reply).unwrap();
            Box::pin(async { Ok(Received::Packet { bytes, descriptors }) })
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_without_a_job_is_told_at_once_and_not_after_every_line() {
        let world = NoJob::default();
        let hands = Hands {
            server: Server::over(Arc::new(world.clone())),
            helper: Helper::over(Arc::new(world.clone())),
            agent: AgentCache::new("/nowhere".into(), Vec::new()),
            identity: Identity::new("here", InstanceId::parse("00000000").unwrap()),
        };
        let action = Action::Tell {
            reason: "it broke".into(),
            lines_sent: 0,
        };
        assert_eq!(
            hands.carry_out(WorkerId::from_bits(1), action).await,
            Outcome::Done
        );
        let calls = world.0.lock().unwrap();
        assert_eq!(calls.len(), APPEND_TRIES as usize + 1, "{calls:?}");
        assert!(calls.last().unwrap().ends_with("/fail"));
    }
}
