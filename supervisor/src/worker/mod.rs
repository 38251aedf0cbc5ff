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

/// How often a worker that was lost before its job began is made again.
pub const MAX_REMAKES: u32 = 3;

/// A job that stalls at its memory limit is failed after this time, in seconds: twice systemd-oomd's default
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
    /// The worker failed.
    Broken {
        /// The server knows, and so the console is in the job's log as far as it could be sent.
        reported: bool,
        /// How many lines of the console, from its first on, are in the job's log.
        lines_sent: u32,
    },
    /// The host is being cleaned.
    Destroying,
    /// The host is clean; the server may forget it.
    Destroyed,
}

impl Phase {
    /// The phase's name, as the status and the log print it.
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
    /// The worker's id, given by the server.
    pub id: WorkerId,
    /// The slot that it occupies until nothing of the worker is left on the host.
    pub slot: SlotName,
    /// The target of the slot when the worker was made.
    pub target: TargetId,
    /// The job that it was made for; unknown for one that was adopted.
    pub job: Option<JobId>,
    /// The agent's bootstrap token; none until the server has sent it, or if it is not usable.
    pub bootstrap: Option<BootstrapToken>,
    /// How far the worker is. It is saved, apart from `confirmed` of [`Phase::Resetting`].
    pub phase: Phase,
    /// When the phase began, in milliseconds since 1970.
    pub since: u64,
    /// Since when the agent's time to come online, or the job's time limit, counts; in milliseconds of the core's time.
    pub waiting_since: u64,
    /// Does the server know its slot?
    pub associated: bool,
    /// Is it held on the server?
    pub hold: bool,
    /// Since when it is held, in milliseconds since 1970.
    pub hold_since: Option<u64>,
    /// Does the server no longer list it?
    pub gone: bool,
    /// How often it was lost before its job began; at most [`MAX_REMAKES`].
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
    /// Has the host shown processes that are not to be kept, and that have not been ended since?
    pub is_needed: bool,
    /// Was ending them tried in vain? Then the failure is reported to the server first.
    pub has_failed: bool,
    /// Has an operator asked for it, whatever the slot says?
    pub is_requested: bool,
}

/// What the configuration says of a worker: its times, in milliseconds, and what happens when it fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerPolicy {
    /// How long its agent may take to come online.
    pub online_timeout: u64,
    /// How long its job may take from when the agent is online; none where it has no limit.
    pub job_timeout: Option<u64>,
    /// Is a failed worker kept for an operator?
    pub hold_on_failure: bool,
    /// Do the processes of a failed worker go on?
    pub keep_processes: bool,
}

/// A worker as the server's list shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerState {
    /// The list does not have it.
    Gone,
    /// The list has the worker, with these properties.
    Has {
        /// Is it held, by an operator or because it failed?
        is_held: bool,
        /// Is it to be deleted?
        must_recycle: bool,
        /// Has its agent introduced itself?
        online: bool,
        /// Has the server stored its slot?
        associated: bool,
        /// The agent's bootstrap token; none where the list has none that is usable.
        bootstrap: Option<BootstrapToken>,
    },
}

impl From<&ServerWorker> for ServerState {
    fn from(w: &ServerWorker) -> Self {
        ServerState::Has {
            is_held: w.hold,
            must_recycle: w.recycle,
            online: w.online,
            associated: w.private.is_some(),
            bootstrap: w.bootstrap.clone(),
        }
    }
}

/// A worker as the helper's list shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostState {
    /// The list does not have it.
    Absent,
    /// The list has it, in this state.
    Has(State),
}

/// What can happen to a worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A poll has shown the worker; none for a side that did not answer, or answered before the last change.
    Seen {
        /// The server's list.
        server: Option<ServerState>,
        /// The helper's list.
        host: Option<HostState>,
    },
    /// The start could not go on for so long, since the server could not be asked or the configuration file differed:
    /// that time does not count against the agent.
    Waited {
        /// How long, in milliseconds.
        ms: u64,
    },
    /// The answer to [`Action::Associate`].
    Associated,
    /// The answer to [`Action::CreateUser`].
    UserCreated,
    /// The answer to [`Action::InstallAgent`].
    AgentStarted,
    /// Some lines of the console are in the job's log, but the others, or the failure, could not be sent.
    LinesReported {
        /// How many lines are there, from the console's first on.
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
    /// Its start cannot continue now, for this reason.
    Blocked(String),
    /// The server has forgotten it, as it was asked to. Nothing is left of it.
    ServerDeleted,
    /// The worker moves to this slot.
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
    /// Does the event say that an action was done?
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
        /// The slot that its owner tag on the server names.
        slot: SlotName,
        /// What the agent runs around the job.
        scripts: Scripts,
    },
    /// Make its user and directories.
    CreateUser {
        /// The slot that it takes on the host.
        slot: SlotName,
    },
    /// Start the agent in the worker's sandbox.
    InstallAgent {
        /// The token with which the agent introduces itself to the server.
        bootstrap: BootstrapToken,
        /// The agent's program on the host, where the configuration names one; otherwise the server's is used.
        agent: Option<PathBuf>,
    },
    /// End its processes. What they wrote stays.
    HostKill,
    /// Send the console from this line on to the job's log, then report the failure.
    ReportFailure {
        /// Why the worker failed, for the job's log.
        reason: String,
        /// How many lines of the console were sent before.
        lines_sent: u32,
    },
    /// Remove every trace from the host.
    HostDelete,
    /// Tell the server that the host is clean.
    ServerDelete {
        /// Does the server have no such worker? Then any answer is a success.
        gone: bool,
    },
}

impl Action {
    /// Does the helper look up the worker's slot in the configuration file for it?
    pub fn needs_the_slot(&self) -> bool {
        matches!(self, Action::CreateUser { .. } | Action::InstallAgent { .. })
    }

    /// The action as the log prints it, after "cannot".
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

    /// The next action for this worker, if any.
    pub fn next_action(&self) -> Option<Action> {
        match self.phase {
            // Before the console is sent, which is then complete; but a failure is reported also where nothing can be killed.
            Phase::Broken { reported, .. } if self.kill.is_needed && (reported || !self.kill.has_failed) => {
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
