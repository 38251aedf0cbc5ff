//! One worker's life: a pure function from (worker, event) to worker, and from worker to what is to be
//! done next.
//!
//! The next action follows from the saved worker alone, and every action can be repeated, so a crash
//! anywhere loses nothing: what was not known to be done is done again. Nothing here reads a clock, a socket or a
//! disk.

mod life;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use protocol::{BootstrapToken, SlotName, State, TargetId, WorkerId};

use crate::buildomat::{JobId, Scripts, ServerWorker};
use crate::call_error::CallError;

/// A worker that was lost before its job began is made again this often.
pub const MAX_REMAKES: u32 = 3;

/// A job that stalls at its memory limit is failed after so many seconds: twice systemd-oomd's default
/// (`DefaultMemoryPressureDurationSec=` in oomd.conf(5)), for a job that is only slow should come to its end.
pub const MAX_STALL_SECONDS: u64 = 60;

/// A server that has forgotten a worker, or what it knew of it, is believed after this: its database may have been
/// rolled back, but it may also be another server's list, or a cache's.
pub const FORGOTTEN_MS: u64 = 60_000;

/// How far a worker is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The server knows it, and it has a slot; the host has nothing yet.
    Reserved,
    /// Its user exists.
    Created,
    /// Its agent was started.
    Running {
        /// The agent has reported to the server, as the server said last.
        online: bool,
    },
    /// It was lost before its job began: the host is cleaned, then it is made again under its own name.
    /// An agent that still runs, but that the server has forgotten, is given time to be remembered.
    Resetting {
        /// The server, asked after the loss, says that the agent never came online; before that nothing is undone.
        /// Not saved: after a crash the server is asked once more.
        confirmed: bool,
    },
    /// It failed.
    Broken {
        /// The server knows, and so the console is in the job's log as far as it could be sent.
        reported: bool,
        /// So many lines of the console, from its first on, are in the job's log.
        lines_sent: u32,
    },
    /// The host is being cleaned.
    Destroying,
    /// The host is clean; the server may forget it.
    Destroyed,
}

impl Phase {
    /// As the status and the log print it.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Reserved => "reserved",
            Phase::Created => "created",
            Phase::Running { online: false } => "running",
            Phase::Running { online: true } => "online",
            Phase::Resetting { .. } => "clearing",
            Phase::Broken { reported: false, .. } => "broken",
            Phase::Broken { reported: true, .. } => "held",
            Phase::Destroying => "destroying",
            Phase::Destroyed => "destroyed",
        }
    }

    /// Has its end begun?
    pub fn is_ending(self) -> bool {
        matches!(self, Phase::Destroying | Phase::Destroyed)
    }

    /// Has its agent not been started yet?
    pub fn is_unstarted(self) -> bool {
        matches!(self, Phase::Reserved | Phase::Created)
    }

    /// Is its agent still expected to come online?
    pub fn is_starting(self) -> bool {
        matches!(
            self,
            Phase::Reserved | Phase::Created | Phase::Running { online: false } | Phase::Resetting { .. }
        )
    }
}

/// A worker: all that has to be remembered of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Worker {
    /// Given by the server.
    pub id: WorkerId,
    /// The one that it occupies until nothing of it is left on the host.
    pub slot: SlotName,
    /// The slot's when the worker was made.
    pub target: TargetId,
    /// The job that it was made for; unknown for one that was adopted.
    pub job: Option<JobId>,
    /// None until the server has told it, or if it is not usable.
    pub bootstrap: Option<BootstrapToken>,
    /// What the database has, apart from `confirmed` of [`Phase::Resetting`].
    pub phase: Phase,
    /// When the phase began, in milliseconds since 1970.
    pub since: u64,
    /// From when on the agent's time to come online, or the job's to be done, counts.
    pub waiting_since: u64,
    /// The server knows its slot.
    pub associated: bool,
    /// The server has it on hold.
    pub hold: bool,
    /// Since when, in milliseconds since 1970.
    pub hold_since: Option<u64>,
    /// The server no longer lists it.
    pub gone: bool,
    /// So often it was lost before its job began; at most [`MAX_REMAKES`].
    pub remakes: u32,
    /// Why it is broken.
    pub failure: Option<String>,
    /// What last stood in the way of its start, for the sentence when its time is up.
    pub trouble: Option<String>,
    /// What is known of the processes of a worker that has failed. Not saved: the host's next list tells.
    pub kill: Kill,
}

/// Are the processes of a worker that has failed to be ended?
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kill {
    /// The host has shown some that are not to be kept, and they have not been ended since.
    pub wanted: bool,
    /// It was tried in vain, so the failure is reported to the server first.
    pub failed: bool,
    /// An operator wants it, whatever the slot says.
    pub asked: bool,
}

/// What the configuration says of a worker's life. Times are in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// For its agent to come online.
    pub online_timeout: u64,
    /// For its job, from when the agent is online.
    pub job_timeout: Option<u64>,
    /// Is it kept for an operator when it has failed?
    pub hold_on_failure: bool,
    /// Do its processes go on when it has failed?
    pub keep_processes: bool,
}

/// A worker as the server's list shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OnServer {
    /// The list does not have it.
    Gone,
    /// The list has it, and says this.
    Has {
        /// An operator, or a failure, has frozen it.
        hold: bool,
        /// It is to be torn down.
        recycle: bool,
        /// Its agent has introduced itself.
        online: bool,
        /// The server has stored its slot.
        associated: bool,
        /// None where the list has none that is usable.
        bootstrap: Option<BootstrapToken>,
    },
}

impl From<&ServerWorker> for OnServer {
    fn from(w: &ServerWorker) -> Self {
        OnServer::Has {
            hold: w.hold,
            recycle: w.recycle,
            online: w.online,
            associated: w.private.is_some(),
            bootstrap: w.bootstrap.clone(),
        }
    }
}

/// A worker as the helper's list shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnHost {
    /// The list does not have it.
    Absent,
    /// The list has it, in this state.
    Has(State),
}

/// What can happen to a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A poll has shown this; None where that side did not answer, or answered before the last change.
    Seen {
        /// The server's list.
        server: Option<OnServer>,
        /// The helper's list.
        host: Option<OnHost>,
    },
    /// The start could not go on for so long, since the server could not be asked or the configuration file differed:
    /// that time does not count against the agent.
    Waited {
        /// Milliseconds.
        ms: u64,
    },
    /// The answer to [`Action::Associate`].
    Associated,
    /// The answer to [`Action::CreateUser`].
    UserCreated,
    /// The answer to [`Action::InstallAgent`].
    AgentStarted,
    /// So many lines of the console are in the job's log, and this stood in the way of the others, or of the failure.
    LinesReported {
        /// From the console's first line on.
        lines: u32,
        /// Why the rest was not sent.
        error: CallError,
    },
    /// The server knows that it failed.
    FailureReported,
    /// The failure cannot be reported, for this reason: only the worker's deletion will fail the job.
    CannotReport(String),
    /// No trace of it is left on the host.
    HostClean,
    /// The host does not have a worker that it should have.
    HostLost,
    /// Its slot is no longer in the configuration.
    SlotRemoved,
    /// It cannot be started here, for this reason.
    StartFailed(String),
    /// An action did not work, and will be tried again.
    CallFailed(CallError),
    /// Its start cannot go on now, for this reason.
    Blocked(String),
    /// The server has forgotten it, as it was asked to. Nothing is left of it.
    ServerDeleted,
    /// It gets this slot.
    SlotChanged(SlotName),
    /// A new run of the supervisor has begun.
    SupervisorStarted,
    /// No process of it is left on the host.
    Killed,
    /// Its processes could not be ended.
    KillFailed(CallError),
    /// An operator wants its processes ended, for this reason.
    Kill(String),
    /// Its job stalls at the slot's memory limit ([`crate::memory_stall`]).
    MemoryStalled,
    /// The operator wants it deleted, held or not.
    Destroy,
}

impl Event {
    /// Is it that an action was done?
    pub fn is_success(&self) -> bool {
        matches!(
            self,
            Event::Associated
                | Event::UserCreated
                | Event::AgentStarted
                | Event::Killed
                | Event::FailureReported
                | Event::HostClean
                | Event::ServerDeleted
        )
    }

    /// Why an action was not done that is to be repeated.
    pub fn error(&self) -> Option<&CallError> {
        match self {
            Event::CallFailed(error) | Event::KillFailed(error) | Event::LinesReported { error, .. } => {
                Some(error)
            }
            _ => None,
        }
    }
}

/// What is to be done for a worker. Each can be repeated without harm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Tell the server the slot: before this it refuses the agent.
    Associate {
        /// The one that its owner tag on the server names.
        slot: SlotName,
        /// What the agent runs around the job.
        scripts: Scripts,
    },
    /// Make its user and directories.
    CreateUser {
        /// The one that it takes on the host.
        slot: SlotName,
    },
    /// Start the agent in the worker's sandbox.
    InstallAgent {
        /// The agent's own, for its introduction to the server.
        bootstrap: BootstrapToken,
        /// The host's program, where the configuration names one; otherwise the server's.
        agent: Option<PathBuf>,
    },
    /// End its processes. What they wrote stays.
    HostKill,
    /// The console from this line on into the job's log, then the failure.
    ReportFailure {
        /// For the job's log.
        reason: String,
        /// So many lines of the console were sent before.
        lines_sent: u32,
    },
    /// Remove every trace from the host.
    HostDelete,
    /// Tell the server that the host is clean.
    ServerDelete {
        /// The server has no such worker: any answer will do.
        gone: bool,
    },
}

impl Action {
    /// Does the helper look up the worker's slot in the configuration file for it?
    pub fn needs_the_slot(&self) -> bool {
        matches!(self, Action::CreateUser { .. } | Action::InstallAgent { .. })
    }

    /// As the log prints it, after "cannot".
    pub fn name(&self) -> &'static str {
        match self {
            Action::Associate { .. } => "associate",
            Action::CreateUser { .. } => "create user",
            Action::InstallAgent { .. } => "install agent",
            Action::HostKill => "end its processes",
            Action::ReportFailure { .. } => "report the failure",
            Action::HostDelete => "delete on the host",
            Action::ServerDelete { .. } => "delete on the server",
        }
    }
}

impl Worker {
    /// Since when it waits for an operator, in milliseconds since 1970: held on the server, or failed and reported.
    pub fn waits_since(&self) -> Option<u64> {
        match self.phase {
            Phase::Broken { reported: true, .. } => Some(self.since),
            Phase::Destroying | Phase::Destroyed => None,
            _ => self.hold_since.filter(|_| self.hold),
        }
    }

    /// The one thing to do now, if any.
    pub fn next_action(&self) -> Option<Action> {
        match self.phase {
            // Before the console is sent, which is then complete; but a failure is reported also where nothing can be killed.
            Phase::Broken { reported, .. } if self.kill.wanted && (reported || !self.kill.failed) => {
                Some(Action::HostKill)
            }
            Phase::Broken {
                reported: false,
                lines_sent,
            } => Some(Action::ReportFailure {
                reason: self.failure.clone().unwrap_or_default(),
                lines_sent,
            }),
            Phase::Destroying => Some(Action::HostDelete),
            Phase::Destroyed => Some(Action::ServerDelete { gone: self.gone }),
            // A held worker is kept for inspection.
            _ if self.hold => None,
            Phase::Reserved | Phase::Created | Phase::Running { online: false } if !self.associated => {
                Some(Action::Associate {
                    slot: self.slot.clone(),
                    // The factory knows them.
                    scripts: Scripts::default(),
                })
            }
            Phase::Reserved => Some(Action::CreateUser {
                slot: self.slot.clone(),
            }),
            Phase::Created => self
                .bootstrap
                .clone()
                // The factory knows the agent, too.
                .map(|bootstrap| Action::InstallAgent {
                    bootstrap,
                    agent: None,
                }),
            Phase::Resetting { confirmed: true } => Some(Action::HostDelete),
            Phase::Running { .. }
            | Phase::Resetting { confirmed: false }
            | Phase::Broken { reported: true, .. } => None,
        }
    }
}
