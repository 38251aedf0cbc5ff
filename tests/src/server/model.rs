//! What the fake server remembers. Plain data: the rules are in `state`, `jobs` and `tick`.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use axum::body::Bytes;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::ulid::Ulid;
use super::wire::{FactoryWorker, JobEvent, JobOutput, OutputRule, StoreValue, TaskSubmit};

#[derive(Clone, Debug)]
pub struct Factory {
    pub id: Ulid,
    pub name: String,
    pub token: String,
    pub enable: bool,
    pub hold_workers: bool,
    pub last_ping: Option<Timestamp>,
}

#[derive(Clone, Debug)]
pub struct Hold {
    pub reason: String,
    pub time: Timestamp,
}

#[derive(Clone, Debug)]
pub struct Worker {
    pub id: Ulid,
    pub factory: Ulid,
    pub target: Ulid,
    pub created: Timestamp,
    pub bootstrap: String,
    /// The agent's own token, from its bootstrap on.
    pub token: Option<String>,
    pub private: Option<String>,
    pub ip: Option<String>,
    pub metadata: Option<Value>,
    pub wait_for_flush: bool,
    /// Recycling was asked for. A hold hides it from everyone: see [`Worker::recycle`].
    pub recycle_asked: bool,
    pub hold: Option<Hold>,
    pub deleted: bool,
    pub diagnostics: bool,
    pub last_ping: Option<Timestamp>,
    pub job: Option<Ulid>,
    pub events: Vec<JobEvent>,
}

impl Worker {
    pub fn recycle(&self) -> bool {
        self.recycle_asked && self.hold.is_none()
    }

    pub fn online(&self) -> bool {
        self.token.is_some()
    }

    /// Told to go, or gone.
    pub fn finished(&self) -> bool {
        self.deleted || self.recycle()
    }

    pub fn to_factory(&self) -> FactoryWorker {
        FactoryWorker {
            id: self.id,
            private: self.private.clone(),
            recycle: self.recycle(),
            bootstrap: self.bootstrap.clone(),
            online: self.online(),
            hold: self.hold.is_some(),
            target: self.target,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    Pending,
    Completed,
    Failed,
}

impl Progress {
    pub fn ended(failed: bool) -> Progress {
        if failed {
            Progress::Failed
        } else {
            Progress::Completed
        }
    }
}

#[derive(Clone, Debug)]
pub struct Task {
    pub spec: TaskSubmit,
    pub progress: Progress,
}

/// A named input; `file` is none until it has been uploaded.
#[derive(Clone, Debug)]
pub struct Input {
    pub name: String,
    pub file: Option<Ulid>,
}

#[derive(Clone, Debug)]
pub struct Job {
    pub id: Ulid,
    pub name: String,
    pub target: Ulid,
    pub tasks: Vec<Task>,
    pub inputs: Vec<Input>,
    pub output_rules: Vec<(String, OutputRule)>,
    pub tags: BTreeMap<String, String>,
    pub max_runtime: Duration,
    pub worker: Option<Ulid>,
    pub progress: Progress,
    pub cancelled: bool,
    pub submitted: Timestamp,
    pub assigned: Option<Timestamp>,
    pub completed: Option<Timestamp>,
    pub events: Vec<JobEvent>,
    pub outputs: Vec<JobOutput>,
    pub store: BTreeMap<String, Stored>,
    pub chunks: HashMap<Ulid, Bytes>,
    pub files: HashMap<Ulid, Bytes>,
    /// Commits under way or done: the second call with the same id gets the result.
    pub commits: HashMap<String, Option<String>>,
}

impl Job {
    pub fn complete(&self) -> bool {
        self.progress != Progress::Pending
    }

    pub fn waiting(&self) -> bool {
        self.inputs.iter().any(|i| i.file.is_none())
    }

    pub fn queued(&self) -> bool {
        !self.complete() && !self.cancelled && self.worker.is_none() && !self.waiting()
    }

    /// The word that the server shows for it.
    pub fn state(&self) -> &'static str {
        match self.progress {
            Progress::Failed => "failed",
            Progress::Completed => "completed",
            Progress::Pending if self.worker.is_some() => "running",
            Progress::Pending if self.waiting() => "waiting",
            Progress::Pending => "queued",
        }
    }
}

#[derive(Clone, Debug)]
pub struct Stored {
    pub value: StoreValue,
    pub source: &'static str,
    pub time: Timestamp,
}

#[derive(Clone, Debug)]
pub struct Lease {
    pub factory: Ulid,
    pub expiry: Timestamp,
}

/// A job as a test writes it; `JobSpec::script` fills in what most tests don't care about.
#[derive(Clone, Debug)]
pub struct JobSpec {
    pub name: String,
    /// A target's name or id.
    pub target: String,
    pub tasks: Vec<TaskSubmit>,
    /// Inputs that are there from the start.
    pub inputs: Vec<(String, Bytes)>,
    pub output_rules: Vec<String>,
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

    pub fn task(name: &str, script: &str) -> TaskSubmit {
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

pub const MAX_RUNTIME: Duration = Duration::from_secs(6 * 3600);

/// Why a call is refused; the HTTP side turns each into its status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
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

impl Refusal {
    /// Its status and its body (`Error` of the published schema).
    pub fn answer(&self, request_id: &str) -> (u16, Value) {
        let (status, code) = match self {
            Refusal::Unauthorised => (401, None),
            Refusal::Forbidden(_) => (403, None),
            Refusal::Conflict(_) => (409, Some("conflict")),
            Refusal::Invalid(_) => (400, Some("invalid")),
            Refusal::NotFound => (404, None),
            Refusal::Internal => (500, Some("Internal")),
        };
        let mut body = json!({ "request_id": request_id, "message": self.to_string() });
        if let Some(code) = code {
            body["error_code"] = code.into();
        }
        (status, body)
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Refusal::Unauthorised => f.write_str("not authorised"),
            Refusal::Forbidden(what) => f.write_str(what),
            Refusal::Conflict(what) | Refusal::Invalid(what) => f.write_str(what),
            Refusal::NotFound => f.write_str("Not Found"),
            Refusal::Internal => f.write_str("Internal Server Error"),
        }
    }
}

impl std::error::Error for Refusal {}
