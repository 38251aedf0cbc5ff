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
pub struct Associate {
    pub private: String,
    pub ip: Option<String>,
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
pub struct Id {
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
pub struct AddFileResult {
    pub complete: bool,
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
pub struct TaskSubmit {
    pub name: String,
    pub script: String,
    #[serde(default)]
    pub env_clear: bool,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub workdir: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JobSubmit {
    pub name: String,
    pub target: String,
    pub output_rules: Vec<String>,
    pub tasks: Vec<TaskSubmit>,
    #[serde(default)]
    pub inputs: Vec<String>,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
    #[serde(default)]
    pub depends: BTreeMap<String, Value>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JobEvent {
    pub seq: usize,
    pub task: Option<u32>,
    pub stream: String,
    pub time: Timestamp,
    pub time_remote: Option<Timestamp>,
    pub payload: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JobOutput {
    pub id: Ulid,
    pub path: String,
    pub size: u64,
}
