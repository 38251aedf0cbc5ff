//! What the buildomat server's answers say, parsed once. These types do nothing: the core takes them as inputs.

use std::fmt;

use protocol::{BootstrapToken, TargetId, WorkerId};
use serde::{Deserialize, Deserializer, Serialize};

/// A job, as the server names it. It goes into a URL, so nothing but a ULID is let through.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JobId(String);

impl TryFrom<String> for JobId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if text.parse::<WorkerId>().is_ok() {
            Ok(Self(text))
        } else {
            let short: String = text.chars().take(64).collect();
            Err(format!("{short:?} is not a job's id: a ULID has 26 characters"))
        }
    }
}

impl From<JobId> for String {
    fn from(job: JobId) -> String {
        job.0
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How long a lease lasts unless it is renewed, in milliseconds (buildomat, `server/src/jobs.rs`, `LEASE_LENGTH`).
pub const LEASE_MS: u64 = 60_000;

/// A job that is leased to this factory for [`LEASE_MS`].
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Lease {
    /// One of those that were asked for.
    pub target: TargetId,
    /// For the worker that is made for it.
    pub job: JobId,
}

/// A target as `GET /0/factory/targets` lists it: all that the server has, `[{"id", "name"}]` (buildomat,
/// `server/src/api/factory.rs`, `FactoryTarget`). Servers from before 2026 have no such call.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ServerTarget {
    /// The id by which jobs are leased.
    pub id: TargetId,
    /// The name by which jobs ask for the target.
    pub name: String,
}

/// A worker as the server sees it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ServerWorker {
    /// The worker's id, given by the server, which never changes.
    pub id: WorkerId,
    /// The target of the job that the worker was made for.
    pub target: TargetId,
    /// Its owner tag, once it is associated: see `identity`.
    #[serde(default)]
    pub private: Option<String>,
    /// The agent's bootstrap token; none where it is not valid.
    #[serde(default, deserialize_with = "usable")]
    pub bootstrap: Option<BootstrapToken>,
    /// Has its agent introduced itself? Once true, it stays true.
    pub online: bool,
    /// Is it held, by an operator or because it failed?
    pub hold: bool,
    /// Is it to be deleted?
    pub recycle: bool,
}

fn usable<'de, D: Deserializer<'de>>(from: D) -> Result<Option<BootstrapToken>, D::Error> {
    Ok(Option::<String>::deserialize(from)?.and_then(|text| BootstrapToken::try_from(text).ok()))
}

/// What the agent runs before and after the job, in the server's words (`FactoryMetadata`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scripts {
    /// None where the slot has none.
    pub pre_job_diagnostic_script: Option<String>,
    /// None where the slot has none.
    pub post_job_diagnostic_script: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_worker_parses_and_an_unusable_token_is_none() {
        let text = r#"{"id":"01HZX3N8Q4J5K6M7P8R9S0T1V2","target":"01HZX3N8Q4J5K6M7P8R9S0T1V3","private":null,
            "bootstrap":"--help","online":false,"hold":true,"recycle":false,"more":1}"#;
        let worker: ServerWorker = serde_json::from_str(text).unwrap();
        assert!(worker.hold && worker.bootstrap.is_none() && worker.private.is_none());
    }

    #[test]
    fn a_job_id_cannot_be_a_path() {
        assert!(JobId::try_from("../../admin".to_owned()).is_err());
        assert!(JobId::try_from("01HZX3N8Q4J5K6M7P8R9S0T1V2".to_owned()).is_ok());
    }
}
