//! What the fake server remembers. Plain data: the rules are in `state`, `jobs` and `tick`.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use axum::body::Bytes;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::json::{FactoryWorker, JobEvent, JobOutput, OutputRule, StoreValue, TaskSubmit};
use super::ulid::Ulid;

#[derive(Clone, Debug)]
/// A factory as the server knows it.
pub struct Factory {
    /// Given by the server.
    pub id: Ulid,
    /// In the log of its jobs.
    pub name: String,
    /// What it authenticates itself with.
    pub token: String,
    /// It may lease jobs.
    pub enable: bool,
    /// Its new workers are created on hold.
    pub hold_workers: bool,
    /// None before its first.
    pub last_ping: Option<Timestamp>,
}

#[derive(Clone, Debug)]
/// Why a worker is frozen.
pub struct Hold {
    /// As an operator sees it.
    pub reason: String,
    /// When it began.
    pub time: Timestamp,
}

#[derive(Clone, Debug)]
/// A worker as the server knows it: deleted ones are kept.
pub struct Worker {
    /// Given by the server.
    pub id: Ulid,
    /// The one that made it, and that alone may change it.
    pub factory: Ulid,
    /// It gets jobs of this one only.
    pub target: Ulid,
    /// By the server's clock.
    pub created: Timestamp,
    /// What its agent trades for a token of its own, once.
    pub bootstrap: String,
    /// The agent's own token, from its bootstrap on.
    pub token: Option<String>,
    /// The factory's owner tag, from when it is associated.
    pub private: Option<String>,
    /// What the factory has told, if anything.
    pub ip: Option<String>,
    /// What the factory has told for the agent (`FactoryMetadata`).
    pub metadata: Option<Value>,
    /// The agent gets no job before the factory says that its lines are all there.
    pub wait_for_flush: bool,
    /// Recycling was asked for. A hold hides it from everyone: see [`Worker::must_recycle`].
    pub recycle_asked: bool,
    /// None while nobody holds it.
    pub hold: Option<Hold>,
    /// Its factory has destroyed it.
    pub deleted: bool,
    /// Its agent still runs the script that follows the job.
    pub diagnostics: bool,
    /// Its agent's; none before the first.
    pub last_ping: Option<Timestamp>,
    /// For good, once it is assigned.
    pub job: Option<Ulid>,
    /// What its agent said outside of any job.
    pub events: Vec<JobEvent>,
}

impl Worker {
    /// It is to be torn down: asked for, and not held back.
    pub fn must_recycle(&self) -> bool {
        self.recycle_asked && self.hold.is_none()
    }

    /// Its agent has traded the bootstrap token.
    pub fn is_online(&self) -> bool {
        self.token.is_some()
    }

    /// Told to go, or gone.
    pub fn is_finished(&self) -> bool {
        self.deleted || self.must_recycle()
    }

    /// As the factory's API shows it.
    pub fn to_factory(&self) -> FactoryWorker {
        FactoryWorker {
            id: self.id,
            private: self.private.clone(),
            recycle: self.must_recycle(),
            bootstrap: self.bootstrap.clone(),
            online: self.is_online(),
            hold: self.hold.is_some(),
            target: self.target,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
/// How a job or a task stands.
pub enum Progress {
    /// Not begun, or under way.
    Pending,
    /// Every task succeeded.
    Completed,
    /// A task failed, or something else ended it.
    Failed,
}

impl Progress {
    pub(crate) fn ended(failed: bool) -> Progress {
        if failed {
            Progress::Failed
        } else {
            Progress::Completed
        }
    }
}

#[derive(Clone, Debug)]
/// One step of a job.
pub struct Task {
    /// As it was submitted.
    pub spec: TaskSubmit,
    /// As the agent has told.
    pub progress: Progress,
}

/// A named input; `file` is none until it has been uploaded.
#[derive(Clone, Debug)]
pub struct Input {
    pub(crate) name: String,
    pub(crate) file: Option<Ulid>,
}

#[derive(Clone, Debug)]
/// A job as the server knows it: ended ones are kept.
pub struct Job {
    /// Given by the server.
    pub id: Ulid,
    /// Its user's choice; names need not differ.
    pub name: String,
    /// Only workers of this one get it.
    pub target: Ulid,
    /// Run in this order.
    pub tasks: Vec<Task>,
    /// It is not queued before all have a file.
    pub inputs: Vec<Input>,
    /// Each as it was written, and parsed.
    pub output_rules: Vec<(String, OutputRule)>,
    /// Its user's; the server does nothing with them.
    pub tags: BTreeMap<String, String>,
    /// From its assignment on; then the job is aborted.
    pub max_runtime: Duration,
    /// For good, once it is assigned.
    pub worker: Option<Ulid>,
    /// Of the whole job.
    pub progress: Progress,
    /// Its user wants it ended; the next tick does.
    pub cancelled: bool,
    /// By the server's clock.
    pub submitted: Timestamp,
    /// None while no worker has it.
    pub assigned: Option<Timestamp>,
    /// None while it has not ended.
    pub completed: Option<Timestamp>,
    /// Its log, in order.
    pub events: Vec<JobEvent>,
    /// What the agent has uploaded.
    pub outputs: Vec<JobOutput>,
    /// What its tasks have stored, by name.
    pub store: BTreeMap<String, StoreEntry>,
    /// Uploaded pieces that are no file yet.
    pub chunks: HashMap<Ulid, Bytes>,
    /// Inputs and outputs, by the id of the file.
    pub files: HashMap<Ulid, Bytes>,
    /// Commits under way or done: the second call with the same id gets the result.
    pub commits: HashMap<String, Option<String>>,
}

impl Job {
    /// It has ended, one way or the other.
    pub fn is_complete(&self) -> bool {
        self.progress != Progress::Pending
    }

    pub(crate) fn is_waiting(&self) -> bool {
        self.inputs.iter().any(|i| i.file.is_none())
    }

    /// A factory may lease it.
    pub fn is_queued(&self) -> bool {
        !self.is_complete() && !self.cancelled && self.worker.is_none() && !self.is_waiting()
    }

    /// The word that the server shows for it.
    pub fn state(&self) -> &'static str {
        match self.progress {
            Progress::Failed => "failed",
            Progress::Completed => "completed",
            Progress::Pending if self.worker.is_some() => "running",
            Progress::Pending if self.is_waiting() => "waiting",
            Progress::Pending => "queued",
        }
    }
}

#[derive(Clone, Debug)]
/// A value that a task has stored.
pub struct StoreEntry {
    pub(crate) value: StoreValue,
    pub(crate) source: &'static str,
    pub(crate) time: Timestamp,
}

#[derive(Clone, Debug)]
/// Who may make a worker for a job, and until when.
pub struct Lease {
    pub(crate) factory: Ulid,
    pub(crate) expiry: Timestamp,
}

/// A job as a test writes it; `JobSpec::script` fills in what most tests don't care about.
#[derive(Clone, Debug)]
pub struct JobSpec {
    /// `test`, unless the test says otherwise.
    pub name: String,
    /// A target's name or id.
    pub target: String,
    /// At least one.
    pub tasks: Vec<TaskSubmit>,
    /// Inputs that are there from the start.
    pub inputs: Vec<(String, Bytes)>,
    /// As [`JobSubmit::output_rules`](super::JobSubmit).
    pub output_rules: Vec<String>,
    /// From the job's assignment on.
    pub max_runtime: Duration,
}

impl JobSpec {
    /// One task that runs a bash script in `/work`.
    pub fn script(target: &str, script: &str) -> JobSpec {
        JobSpec {
            name: "test".to_string(),
            target: target.to_string(),
            tasks: vec![JobSpec::task("main", script)],
            inputs: Vec::new(),
            output_rules: Vec::new(),
            max_runtime: MAX_RUNTIME,
        }
    }

    pub(crate) fn task(name: &str, script: &str) -> TaskSubmit {
        TaskSubmit {
            name: name.to_string(),
            script: script.to_string(),
            env_clear: false,
            env: BTreeMap::new(),
            uid: None,
            gid: None,
            workdir: Some("/work".to_string()),
        }
    }
}

/// Of a job whose test does not say. The real server has it from its configuration, where `job.max_runtime` has no
/// default (buildomat, `server/src/config.rs`).
pub const MAX_RUNTIME: Duration = Duration::from_secs(6 * 3600);

/// Why a call is refused; the HTTP side turns each into its status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerError {
    /// 401
    Unauthorised,
    /// 403
    Forbidden(&'static str),
    /// 409
    Conflict(String),
    /// 400
    Invalid(String),
    /// 404
    NotFound,
    /// 500, and the reason is not for the caller
    Internal,
}

impl ServerError {
    /// Its status and its body (`Error` of the published schema).
    pub fn answer(&self, request_id: &str) -> (u16, Value) {
        let (status, code) = match self {
            ServerError::Unauthorised => (401, None),
            ServerError::Forbidden(_) => (403, None),
            ServerError::Conflict(_) => (409, Some("conflict")),
            ServerError::Invalid(_) => (400, Some("invalid")),
            ServerError::NotFound => (404, None),
            ServerError::Internal => (500, Some("Internal")),
        };
        let mut body = json!({ "request_id": request_id, "message": self.to_string() });
        if let Some(code) = code {
            body["error_code"] = code.into();
        }
        (status, body)
    }
}

impl std::fmt::Display for ServerError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ServerError::Unauthorised => f.write_str("not authorised"),
            ServerError::Forbidden(what) => f.write_str(what),
            ServerError::Conflict(what) | ServerError::Invalid(what) => f.write_str(what),
            ServerError::NotFound => f.write_str("Not Found"),
            ServerError::Internal => f.write_str("Internal Server Error"),
        }
    }
}

impl std::error::Error for ServerError {}
