//! Carries out one action for one worker, and returns how it went as the core's input.
//!
//! Each action may be a repetition after a crash. Nothing is decided here beyond what an answer means.

use std::path::PathBuf;
use std::time::Duration;

use protocol::{BootstrapToken, ErrorKind, WorkerId};

use crate::agent_cache::{Agent, AgentCache};
use crate::buildomat::{self, BuildomatClient};
use crate::call_error::{CallError, Peer};
use crate::console;
use crate::helper_client::{self, HelperClient};
use crate::identity::Identity;
use crate::worker::{Action, Event};

/// A server that has no job for the lines yet is asked again so many times, a second apart.
const APPEND_TRIES: u32 = 3;

/// What actions need.
#[derive(Debug)]
pub struct Executor {
    /// For owner tags, failures, lines of the console and the deletion there.
    pub buildomat: BuildomatClient,
    /// For all that is done on the host.
    pub helper_client: HelperClient,
    /// The program for `InstallAgent`.
    pub agent: AgentCache,
    /// What this host tags its workers with.
    pub identity: Identity,
}

impl Executor {
    /// Carry out one action, and say what came of it. It may be dropped and repeated anywhere.
    pub async fn carry_out(&self, worker: WorkerId, action: Action) -> Event {
        match action {
            Action::Associate { slot, scripts } => {
                let owner_tag = self.identity.owner_tag(&slot);
                match self.buildomat.associate(worker, &owner_tag, &scripts).await {
                    Ok(()) => Event::Associated,
                    Err(error) => Event::CallFailed(error.call_error()),
                }
            }
            Action::CreateUser { slot } => match self.helper_client.create_user(worker, slot).await {
                Ok(()) => Event::UserCreated,
                Err(error) => start_failed(error),
            },
            Action::InstallAgent { bootstrap, agent } => self.install(worker, bootstrap, agent).await,
            Action::HostKill => match self.helper_client.kill(worker).await {
                Ok(()) => Event::Killed,
                Err(helper_client::Error::Refused(error)) if error.kind == ErrorKind::NoSuchWorker => {
                    Event::Killed
                }
                Err(error @ helper_client::Error::Refused(_)) => Event::KillFailed(error.call_error()),
                Err(error) => Event::CallFailed(error.call_error()),
            },
            Action::ReportFailure { reason, lines_sent } => {
                self.report_failure(worker, &reason, lines_sent).await
            }
            // The helper answers Failed where something is left: a repetition goes on.
            Action::HostDelete => match self.helper_client.delete(worker).await {
                Ok(()) => Event::HostClean,
                Err(error) => Event::CallFailed(error.call_error()),
            },
            Action::ServerDelete { gone } => match self.buildomat.delete(worker).await {
                Ok(_) => Event::ServerDeleted,
                // There is nothing to delete: that is what was wanted.
                Err(buildomat::Error::Status { .. }) if gone => Event::ServerDeleted,
                Err(error) => Event::CallFailed(error.call_error()),
            },
        }
    }

    async fn install(&self, worker: WorkerId, bootstrap: BootstrapToken, named: Option<PathBuf>) -> Event {
        let agent = match named {
            Some(path) => Agent::of_the_host(path).await,
            None => self.agent.get(&self.buildomat).await,
        };
        let agent = match agent {
            Ok(agent) => agent,
            Err(sentence) => return Event::CallFailed(CallError::temporary(Peer::Server, sentence)),
        };
        match self
            .helper_client
            .install_agent(worker, bootstrap, agent.as_fd())
            .await
        {
            Ok(_) => Event::AgentStarted,
            Err(error) => start_failed(error),
        }
    }

    /// The console's lines, then the failure: in this order, both are in the job's log.
    async fn report_failure(&self, worker: WorkerId, reason: &str, lines_sent: u32) -> Event {
        let (first, lines) = match self.console(worker).await {
            Ok(lines) => (lines.first, lines.lines),
            Err(error) => return Event::CallFailed(error),
        };
        for (number, line) in (first..).zip(&lines).filter(|(number, _)| *number >= lines_sent) {
            match self.append(worker, line).await {
                Ok(true) => {}
                // No job will take the others either; the failure matters more.
                Ok(false) => break,
                Err(error) if error.is_refusal() => break,
                Err(error) => {
                    return Event::LinesReported {
                        lines: number,
                        error: error.call_error(),
                    };
                }
            }
        }
        let sent = (first + u32::try_from(lines.len()).unwrap_or(0)).max(lines_sent);
        match self.buildomat.fail(worker, reason).await {
            Ok(()) => Event::FailureReported,
            Err(buildomat::Error::Status { code: 404, .. }) => Event::CannotReport(
                "the buildomat server is too old to be told that a worker failed (it answered 404): update it".into(),
            ),
            Err(error) if error.is_refusal() => Event::CannotReport(error.to_string()),
            Err(error) => Event::LinesReported { lines: sent, error: error.call_error() },
        }
    }

    /// True once it is stored, or not wanted; false where after some tries there still is no job for it.
    async fn append(&self, worker: WorkerId, line: &str) -> Result<bool, buildomat::Error> {
        for attempt in 1..=APPEND_TRIES {
            if !self.buildomat.append(worker, line).await? {
                return Ok(true);
            }
            if attempt < APPEND_TRIES {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        Ok(false)
    }

    /// A worker without a console has no lines; its failure is reported all the same.
    async fn console(&self, worker: WorkerId) -> Result<console::Lines, CallError> {
        let none = console::Lines {
            first: 0,
            lines: Vec::new(),
        };
        match self.helper_client.attach(worker).await {
            Ok(console) => Ok(console::read(&console).unwrap_or(none)),
            Err(helper_client::Error::Refused(error))
                if !matches!(error.kind, ErrorKind::Busy | ErrorKind::Version) =>
            {
                Ok(none)
            }
            Err(error) => Err(error.call_error()),
        }
    }
}

/// What a step of a worker's start met with.
fn start_failed(error: helper_client::Error) -> Event {
    match error {
        helper_client::Error::Refused(error) => match error.kind {
            ErrorKind::NoSuchWorker => Event::HostLost,
            ErrorKind::Refused | ErrorKind::Limit | ErrorKind::Failed => {
                Event::StartFailed(error.message().to_owned())
            }
            // Come back later. The file in which the helper finds no such slot has changed since the worker was leased.
            ErrorKind::Busy | ErrorKind::NoSuchSlot | ErrorKind::SlotTaken | ErrorKind::Version => {
                Event::CallFailed(helper_client::Error::Refused(error).call_error())
            }
        },
        error => Event::CallFailed(error.call_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buildomat::{HttpRequest, Transport};
    use crate::helper_client::{Connection, Connector, Pending};
    use crate::identity::InstanceId;
    use protocol::{Exit, Received, Reply, Request, State, wire};
    use std::io::Write;
    use std::os::fd::BorrowedFd;
    use std::sync::{Arc, Mutex};

    /// A helper with a console of a hundred lines, and a server that has no job for any of them.
    #[derive(Clone, Debug, Default)]
    struct NoJob(Arc<Mutex<Vec<String>>>);

    impl Transport for NoJob {
        fn call(&self, call: HttpRequest) -> buildomat::Pending<'_, buildomat::HttpResponse> {
            self.0.lock().unwrap().push(call.path);
            Box::pin(async { Ok(buildomat::HttpResponse::new(200, r#"{"retry":true}"#)) })
        }

        fn file<'a>(
            &'a self,
            _: &'a str,
            _: &'a [(&'a str, String)],
            _: &'a [(&'static str, String)],
        ) -> buildomat::Pending<'a, reqwest::Response> {
            Box::pin(async { Err(buildomat::Error::Unreachable("no file".into())) })
        }
    }

    impl Connector for NoJob {
        fn connect(&self) -> Result<Box<dyn Connection>, helper_client::Error> {
            Ok(Box::new(self.clone()))
        }
    }

    impl Connection for NoJob {
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
    async fn a_failure_without_a_job_is_reported_at_once_and_not_after_every_line() {
        let server_and_helper = NoJob::default();
        let executor = Executor {
            buildomat: BuildomatClient::over(Arc::new(server_and_helper.clone())),
            helper_client: HelperClient::over(Arc::new(server_and_helper.clone())),
            agent: AgentCache::new("/nowhere".into(), Vec::new()),
            identity: Identity::new("here", InstanceId::parse("00000000").unwrap()),
        };
        let action = Action::ReportFailure {
            reason: "it broke".into(),
            lines_sent: 0,
        };
        assert_eq!(
            executor.carry_out(WorkerId::from_bits(1), action).await,
            Event::FailureReported
        );
        let calls = server_and_helper.0.lock().unwrap();
        assert_eq!(calls.len(), APPEND_TRIES as usize + 1, "{calls:?}");
        assert!(calls.last().unwrap().ends_with("/fail"));
    }
}
