//! The control API's JSON, version 1. Times are RFC 3339, in UTC.

use jiff::Timestamp;
use protocol::{SlotName, TargetId, TargetName, WorkerId};
use serde::{Deserialize, Serialize};

use crate::buildomat::JobId;

/// The factory at a glance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The version of the supervisor's package: `0.1.0`.
    pub version: String,
    /// The version of the protocol ([`protocol::VERSION`]), which the helper's must equal.
    pub protocol: u16,
    /// When this was answered, by the host's clock: ages are counted from it.
    pub now: Timestamp,
    /// When the supervisor started.
    pub started: Timestamp,
    /// The configuration that was loaded last.
    pub configuration: Configuration,
    /// The buildomat server.
    pub server: PeerStatus,
    /// The root helper.
    pub helper: PeerStatus,
    /// What listens at `factory.status_address`, where that is written; `reachable` says that it does.
    #[serde(default)]
    pub status_page: Option<PeerStatus>,
    /// No new jobs are taken: all slots are drained.
    pub draining: bool,
    /// What the operator has drained.
    #[serde(default)]
    pub drains: Vec<Drain>,
    /// All slots of the configuration, by name, and removed slots that still have a worker.
    pub slots: Vec<Slot>,
    /// All workers that the supervisor has not forgotten yet.
    pub workers: Vec<Worker>,
    /// Why the supervisor cannot save its state, or may soon not be able to.
    #[serde(default)]
    pub storage: Option<String>,
    /// Why too little of the host is free for another job (`factory.min_free`).
    #[serde(default)]
    pub shortage: Option<String>,
    /// What the last self-test of all slots has found, since the supervisor started.
    #[serde(default)]
    pub selftest: Option<SelfTest>,
    /// No jobs are taken until one has passed (`factory.selftest_at_start`).
    #[serde(default)]
    pub waits_for_selftest: bool,
    /// Why no jobs are taken, whatever slot is free.
    #[serde(default)]
    pub not_taken: Option<String>,
    /// The part of its owner tags that names this host: `HOST/INSTANCE`.
    #[serde(default)]
    pub identity: String,
    /// Workers on the server that may be another host's. While the server lists one, no jobs are taken.
    #[serde(default)]
    pub foreign: Vec<ForeignWorker>,
    /// The last warnings and errors, the oldest first.
    pub troubles: Vec<Problem>,
}

/// What a self-test of all slots has found (`user-factory selftest`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SelfTest {
    /// When the self-test ended. In a request it is ignored: the supervisor sets it.
    #[serde(default)]
    pub at: Timestamp,
    /// Which check failed, in one line of at most 1000 characters; none where all passed.
    pub failure: Option<String>,
}

/// An operator's drain: no jobs are taken.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// The drained slot; none where all slots are. In a request it is ignored: the path has it.
    #[serde(default)]
    pub slot: Option<SlotName>,
    /// The operator's text.
    #[serde(default)]
    pub reason: Option<String>,
    /// When the drain ends by itself; none where it lasts until `resume`.
    #[serde(default)]
    pub until: Option<Timestamp>,
}

impl Drain {
    /// Reason and end, as text that follows a word; empty where neither is given.
    pub fn details(&self) -> String {
        let until = self.until.map(|end| format!("until {end}"));
        let all: Vec<String> = self.reason.clone().into_iter().chain(until).collect();
        match all.is_empty() {
            true => String::new(),
            false => format!(" ({})", all.join(", ")),
        }
    }
}

/// The configuration in use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Configuration {
    /// The path of the configuration file.
    pub path: String,
    /// When the supervisor last loaded it.
    pub loaded: Timestamp,
    /// Why the last reload changed nothing.
    pub refused: Option<String>,
    /// Where the token in use was read.
    #[serde(default)]
    pub token: Option<String>,
}

/// The buildomat server, or the helper.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// The peer's URL, or the path of its socket.
    pub address: String,
    /// Does it answer? None before the first answer.
    pub reachable: Option<bool>,
    /// Since when `reachable` is as it is.
    pub since: Timestamp,
    /// Why it is not reachable.
    pub trouble: Option<String>,
    /// Since when a call has not been answered, where that is longer than calls take.
    #[serde(default)]
    pub unanswered_since: Option<Timestamp>,
}

/// What a slot is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SlotState {
    /// It can take a job now.
    Free,
    /// The slot could take a job, but the factory takes none.
    Closed,
    /// A job is running on it, or its worker is being made or deleted.
    Busy,
    /// A slot that conflicts with it is not free, a worker that was lost waits for it, or workers of removed slots leave no
    /// room for one more.
    Blocked,
    /// Its worker has failed, and is kept for an operator.
    Broken,
    /// Its worker is held on the server.
    Held,
    /// It failed workers by itself, and is cooling down.
    #[serde(rename = "resting")]
    CoolingDown,
    /// A USB device of it is absent, or it is not clear which one is meant.
    Absent,
    /// It takes no jobs: it is drained.
    Draining,
    /// It is no longer in the configuration, and goes with its worker.
    Removed,
}

impl SlotState {
    /// All states, for metrics, which have a series for each.
    pub const ALL: [SlotState; 10] = [
        SlotState::Free,
        SlotState::Closed,
        SlotState::Busy,
        SlotState::Blocked,
        SlotState::Broken,
        SlotState::Held,
        SlotState::CoolingDown,
        SlotState::Absent,
        SlotState::Draining,
        SlotState::Removed,
    ];

    /// The state's name in JSON and in labels of metrics.
    pub fn name(self) -> &'static str {
        match self {
            SlotState::Free => "free",
            SlotState::Closed => "closed",
            SlotState::Busy => "busy",
            SlotState::Blocked => "blocked",
            SlotState::Broken => "broken",
            SlotState::Held => "held",
            SlotState::CoolingDown => "resting",
            SlotState::Absent => "absent",
            SlotState::Draining => "draining",
            SlotState::Removed => "removed",
        }
    }

    /// Does it wait for an operator?
    pub fn needs_operator(self) -> bool {
        matches!(self, SlotState::Broken | SlotState::Held | SlotState::Absent)
    }
}

/// One slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// The slot's name in the configuration.
    pub name: SlotName,
    /// The target's id; none for a slot that is no longer in the configuration, or whose target's name is not looked up
    /// yet.
    pub target: Option<TargetId>,
    /// The target's name in the configuration; none where the configuration has its id.
    #[serde(default)]
    pub target_name: Option<TargetName>,
    /// What the slot is doing; where several states apply, one of them.
    pub state: SlotState,
    /// What the state alone does not say: the conflict, the end of the cooldown, the device that is absent.
    pub because: Option<String>,
    /// The worker that occupies the slot.
    pub worker: Option<WorkerId>,
    /// The job of that worker, or the one that is leased for the slot.
    pub job: Option<JobId>,
    /// Since when the slot has its worker.
    pub since: Option<Timestamp>,
}

impl Slot {
    /// Does it take no job since the name of its target is not looked up, or not known?
    pub fn is_unresolved(&self) -> bool {
        self.target_name.is_some() && self.target.is_none()
    }
}

/// One worker, as the supervisor knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Worker {
    /// The worker's id, the same on the server and the helper.
    pub id: WorkerId,
    /// The slot that the worker occupies, also after the slot was removed from the configuration.
    pub slot: SlotName,
    /// reserved, created, running, online, clearing, broken, held, destroying or destroyed.
    pub phase: String,
    /// Since when the worker is in this phase.
    pub since: Timestamp,
    /// The worker's job; none where the worker was found without one, on the server or on the host.
    pub job: Option<JobId>,
    /// The name of the worker's user on this host.
    pub user: String,
    /// The user's uid; none where the helper does not list the worker: it is not made yet, or deleted.
    pub uid: Option<u32>,
    /// Bytes that the worker has on this host's disk; none where the helper cannot count them, which needs user quotas.
    pub disk: Option<u64>,
    /// Since when the worker is held on the server; none where it is not.
    pub hold: Option<Timestamp>,
    /// Why it failed.
    pub failure: Option<String>,
    /// Why its next action fails at present.
    pub trouble: Option<String>,
    /// What happens next, or what an operator has to do.
    pub next: String,
}

/// A worker of this factory on the server that may be another host's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForeignWorker {
    /// The worker's id on the server.
    pub id: WorkerId,
    /// Its owner tag, or whatever the server has instead.
    pub private: Option<String>,
    /// When this supervisor first saw it.
    pub since: Timestamp,
    /// What is known of it, and what an operator has to do.
    pub text: String,
}

/// One worker, with what has to be read from the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Details {
    /// The worker, as in [`Status::workers`].
    pub worker: Worker,
    /// Its phases so far, the oldest first.
    pub history: Vec<Step>,
    /// Its processes now.
    pub processes: Vec<Process>,
    /// The sum of their resident memory, in bytes; what they share is counted once for each.
    pub memory: u64,
    /// The last lines of its console, without control characters.
    pub console: Vec<String>,
    /// Destinations that the job has connected to or was refused, without the host's network; none where there are
    /// none.
    #[serde(default)]
    pub egress: Option<EgressReport>,
}

/// What jobs without the host's network have connected to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EgressReport {
    /// Destinations to which there were connections, by name.
    pub used: Vec<DestinationUse>,
    /// Destinations that were refused, by name.
    pub refused: Vec<DestinationUse>,
}

/// One destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DestinationUse {
    /// The destination, `HOST:PORT`.
    pub destination: String,
    /// How many connections there were, or were refused.
    pub connections: u64,
    /// When the last connection was made or refused.
    pub last: Timestamp,
}

/// The beginning of a phase.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// When the phase began, by the host's clock at that time.
    pub at: Timestamp,
    /// The phase's name, as in [`Worker::phase`].
    pub phase: String,
    /// Why the phase began, where its name does not say it: a failure's reason.
    pub note: Option<String>,
}

/// A process of a worker's user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// The process id on the host, not in the job's namespace.
    pub pid: i32,
    /// The process's name (`comm` of `proc_pid_stat(5)`): at most 15 bytes, which the job may choose.
    pub name: String,
    /// The process's state, as in `proc_pid_stat(5)`: R, S, D, T, Z …
    pub state: char,
    /// Resident memory in bytes.
    pub memory: u64,
}

/// A line of the log that an operator should know of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// By the host's clock at that time.
    pub at: Timestamp,
    /// The worker that the line is about, if any.
    pub worker: Option<WorkerId>,
    /// The slot that the line is about, if any.
    pub slot: Option<SlotName>,
    /// The log line, one sentence.
    pub text: String,
}

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// One sentence for the operator, or a line for each mistake of a configuration.
    pub message: String,
}
