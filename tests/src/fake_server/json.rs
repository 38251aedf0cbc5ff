//! The bodies that cross the wire, with the names of the published schema. Both the fake server
//! and the fake agent speak through these. Ids stay strings here: a malformed one is the
//! server's 500, not a decoder's 400.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ulid::Ulid;

#[derive(Clone, Debug, Deserialize)]
pub struct WhatsNext {
    pub supported_targets: Vec<String>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct WorkerCreate {
    pub target: String,
    pub job: Option<String>,
    #[serde(default)]
    pub wait_for_flush: bool,
}

/// A worker as its factory sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FactoryWorker {
    pub id: Ulid,
    pub private: Option<String>,
    pub recycle: bool,
    pub bootstrap: String,
    pub online: bool,
    pub hold: bool,
    pub target: Ulid,
}

#[derive(Clone, Debug, Deserialize)]
/// A factory tells the server its owner tag for a worker.
pub struct Associate {
    /// The owner tag: it comes back in the factory's list of workers.
    pub private: String,
    /// For operators of the server.
    pub ip: Option<String>,
    /// For the agent (`FactoryMetadata`).
    pub metadata: Option<Value>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Reason {
    pub reason: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorkerFail {
    pub reason: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Append {
    pub stream: String,
    pub time: Timestamp,
    pub payload: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<u32>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Bootstrap {
    pub bootstrap: String,
    pub token: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
/// The answer to what makes a job or a file.
pub struct Id {
    /// A ULID, of the server's making.
    pub id: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ping {
    pub poweroff: bool,
    pub job: Option<PingJob>,
    pub factory_info: Option<Value>,
    pub factory_metadata: Option<Value>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PingJob {
    pub id: String,
    pub name: String,
    pub tasks: Vec<PingTask>,
    pub inputs: Vec<PingInput>,
    pub output_rules: Vec<OutputRule>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PingTask {
    pub id: u32,
    pub name: String,
    pub script: String,
    pub env_clear: bool,
    pub env: BTreeMap<String, String>,
    pub uid: u32,
    pub gid: u32,
    pub workdir: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PingInput {
    pub name: String,
    pub id: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputRule {
    pub rule: String,
    pub ignore: bool,
    pub size_change_ok: bool,
    pub require_match: bool,
}

impl OutputRule {
    /// A rule is a glob with marks in front: `!` leaves matches out, `=` wants at least one match,
    /// `%` lets a file change its size while it is read.
    pub fn parse(text: &str) -> Result<OutputRule, String> {
        let glob = text.trim_start_matches(['!', '=', '%']);
        let marks = &text[..text.len() - glob.len()];
        if !glob.starts_with('/') {
            return Err(format!("output rule {text:?} must name an absolute path"));
        }
        let has = |mark| marks.contains(mark);
        if has('!') && marks.len() > 1 {
            return Err(format!("output rule {text:?}: ! goes with no other mark"));
        }
        Ok(OutputRule {
            rule: glob.to_string(),
            ignore: has('!'),
            size_change_ok: has('%'),
            require_match: has('='),
        })
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Complete {
    pub failed: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CompleteDiagnostics {
    pub hold: bool,
}

/// Chunks that become a file: a job's input (`name`) or output (`path`).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct AddFile {
    #[serde(alias = "name")]
    pub path: String,
    pub size: u64,
    pub chunks: Vec<String>,
    pub commit_id: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
/// How far a commit of chunks is.
pub struct AddFileResult {
    /// The file is there, or will never be.
    pub complete: bool,
    /// Why there will be none.
    pub error: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoreValue {
    pub value: String,
    pub secret: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoreGet {
    pub value: Option<StoreValue>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Quota {
    pub max_bytes_per_output: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
/// A task as a user submits it.
pub struct TaskSubmit {
    /// In the job's log.
    pub name: String,
    /// Run by bash.
    pub script: String,
    #[serde(default)]
    /// Start from no variables but the agent's own.
    pub env_clear: bool,
    #[serde(default)]
    /// Beside those that the agent sets.
    pub env: BTreeMap<String, String>,
    /// 0 where none is said.
    pub uid: Option<u32>,
    /// 0 where none is said.
    pub gid: Option<u32>,
    /// `/` where none is said.
    pub workdir: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
/// A job as a user submits it.
pub struct JobSubmit {
    /// For operators of the server.
    pub name: String,
    /// A target's name or id.
    pub target: String,
    /// Globs with marks in front: `!`, `=` or `%`.
    pub output_rules: Vec<String>,
    /// At least one, run in this order.
    pub tasks: Vec<TaskSubmit>,
    #[serde(default)]
    /// Plain file names, each to be uploaded before the job is queued.
    pub inputs: Vec<String>,
    #[serde(default)]
    /// The server does nothing with them.
    pub tags: BTreeMap<String, String>,
    #[serde(default)]
    /// Jobs to wait for: this server refuses any.
    pub depends: BTreeMap<String, Value>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
/// A line of a job's log.
pub struct JobEvent {
    /// Its place in the log, from 0.
    pub seq: usize,
    /// None for lines that are of no task.
    pub task: Option<u32>,
    /// `stdout`, `stderr`, `control`, `console` or another.
    pub stream: String,
    /// When the server got it.
    pub time: Timestamp,
    /// When it was printed, by the worker's clock.
    pub time_remote: Option<Timestamp>,
    /// Without its line feed.
    pub payload: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
/// A file that a job has uploaded.
pub struct JobOutput {
    /// Of the file.
    pub id: Ulid,
    /// Absolute, as the job had it.
    pub path: String,
    /// In bytes.
    pub size: u64,
}
