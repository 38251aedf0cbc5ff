//! The buildomat server's factory calls, typed: what is asked, and what an answer means. `http` carries them.

mod http;
mod types;

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use protocol::config::General;
use protocol::{TargetId, WorkerId};
use reqwest::{Method, Response};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::call_error::{CallError, Peer};
use crate::pending_calls::PendingCalls;
use crate::token::TokenStore;

pub use http::CALL_TIMEOUT;
pub(crate) use http::causes;
pub use types::{JobId, LEASE_MS, Lease, Scripts, ServerTarget, ServerWorker};

/// The longest part of an error's text that is kept, in characters.
const MAX_MESSAGE: usize = 300;

/// Why a call has no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// No answer, or none in time.
    Unreachable(String),
    /// The server says no.
    Status {
        /// The HTTP status, 300 or more.
        code: u16,
        /// The body's `message` or its text, in at most 300 characters.
        message: String,
        /// From `Retry-After`; none without one that can be read.
        retry_after: Option<Duration>,
    },
    /// Something before the server, such as a proxy, refuses: the server's own answer is not known.
    NotBuildomat {
        /// The HTTP status, 300 or more.
        code: u16,
        /// What the body says, in at most 300 characters.
        message: String,
        /// From `Retry-After`; none without one that can be read.
        retry_after: Option<Duration>,
    },
    /// The answer makes no sense, or has no end.
    Body(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Unreachable(why) => write!(
                f,
                "the buildomat server cannot be reached: {why}: if this goes on, check the network and general.baseurl"
            ),
            Error::Status {
                code: 401, message, ..
            } => write!(
                f,
                "the buildomat server refused with 401 ({message}): if this goes on, check the factory's token"
            ),
            Error::Status { code, message, .. } => write!(
                f,
                "the buildomat server answered {code}: {message}: if this goes on, look into the server's log"
            ),
            Error::NotBuildomat { code, message, .. } => write!(
                f,
                "something before the buildomat server answered {code}: {message}: if this goes on, check what \
                 answers at general.baseurl"
            ),
            Error::Body(why) => write!(
                f,
                "the buildomat server's answer makes no sense: {why}: if this goes on, check what answers at \
                 general.baseurl"
            ),
        }
    }
}

impl std::error::Error for Error {}

impl Error {
    /// Will the same call never work? 401 may be a token that is being replaced; 408 and 429 ask to wait.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Error::Status { code: 400..=499, .. })
            && !matches!(
                self,
                Error::Status {
                    code: 401 | 408 | 429,
                    ..
                }
            )
    }

    /// How long the server asks to wait, in milliseconds.
    fn retry_after(&self) -> Option<u64> {
        match self {
            Error::Status { retry_after, .. } | Error::NotBuildomat { retry_after, .. } => {
                retry_after.map(|wait| u64::try_from(wait.as_millis()).unwrap_or(u64::MAX))
            }
            Error::Unreachable(_) | Error::Body(_) => None,
        }
    }

    /// As the core takes it: is it worth a repetition, and when?
    pub fn call_error(&self) -> CallError {
        CallError {
            peer: Peer::Server,
            refused: self.is_refusal(),
            unauthorised: matches!(self, Error::Status { code: 401, .. }),
            retry_after: self.retry_after(),
            sentence: self.to_string(),
        }
    }
}

type Result<T> = std::result::Result<T, Error>;

/// A request that a [`Transport`] sends: an absolute path on the server, and a body for it.
#[derive(Clone, Debug)]
pub struct HttpRequest {
    /// GET, POST, PATCH or DELETE.
    pub method: Method,
    /// From the root of `general.baseurl`, beginning with `/0/`.
    pub path: String,
    /// JSON.
    pub body: Option<Value>,
}

/// What came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpResponse {
    /// The status code.
    pub code: u16,
    /// At most 8 MiB.
    pub body: Vec<u8>,
    /// `Retry-After` (RFC 9110, 10.2.3).
    pub retry_after: Option<Duration>,
}

impl HttpResponse {
    /// Without `Retry-After`.
    pub fn new(code: u16, body: impl Into<Vec<u8>>) -> Self {
        Self {
            code,
            body: body.into(),
            retry_after: None,
        }
    }
}

/// An answer that is waited for.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

/// What brings calls to the server and answers back: HTTP, or a simulated network.
pub trait Transport: fmt::Debug + Send + Sync {
    /// With the token. The error is [`Error::Unreachable`] where no answer came; an answer of any status is none.
    fn call(&self, call: HttpRequest) -> Pending<'_, HttpResponse>;

    /// A file that anybody may have, asked for without the token.
    fn file<'a>(
        &'a self,
        path: &'a str,
        query: &'a [(&'a str, String)],
        headers: &'a [(&'static str, String)],
    ) -> Pending<'a, Response>;
}

/// The server, as this factory may talk to it.
#[derive(Clone, Debug)]
pub struct BuildomatClient {
    transport: Arc<dyn Transport>,
    /// For an operator who is told that the token was refused.
    tokens: Option<TokenStore>,
    pending: Arc<PendingCalls>,
}

impl BuildomatClient {
    /// # Errors
    /// Where the host's TLS set-up cannot be used.
    pub fn new(general: &General, tokens: TokenStore) -> Result<Self> {
        let transport = Arc::new(http::Http::new(general, tokens.clone())?);
        let tokens = Some(tokens);
        let pending = Arc::default();
        Ok(Self {
            transport,
            tokens,
            pending,
        })
    }

    /// Over another way than HTTP, for a simulation.
    pub fn over(transport: Arc<dyn Transport>) -> Self {
        Self {
            transport,
            tokens: None,
            pending: Arc::default(),
        }
    }

    /// Calls without an answer; downloads of the agent are none of them.
    pub fn pending(&self) -> &PendingCalls {
        &self.pending
    }

    /// # Errors
    /// Where the server is unreachable or the token is not its.
    pub async fn ping(&self) -> Result<bool> {
        #[derive(Deserialize)]
        struct Pong {
            ok: bool,
        }
        self.json_of::<Pong>(Method::GET, "/0/factory/ping".into(), None)
            .await
            .map(|a| a.ok)
    }

    /// All workers of this factory that the server has, also those of other hosts with the same token.
    ///
    /// # Errors
    /// No answer, or another than a list.
    pub async fn list_workers(&self) -> Result<Vec<ServerWorker>> {
        self.json_of(Method::GET, "/0/factory/workers".into(), None).await
    }

    /// All targets that the server has, of whichever factory; none where it has no call for that (404).
    ///
    /// # Errors
    /// No answer, or another than a list.
    pub async fn list_targets(&self) -> Result<Option<Vec<ServerTarget>>> {
        let listed = self.json_of(Method::GET, "/0/factory/targets".into(), None).await;
        match listed {
            Err(Error::Status { code: 404, .. }) => Ok(None),
            listed => listed.map(Some),
        }
    }

    /// A job for one of these targets, leased for [`LEASE_MS`]. None where there is none.
    ///
    /// # Errors
    /// No answer, or a refusal.
    pub async fn lease(&self, targets: impl IntoIterator<Item = TargetId>) -> Result<Option<Lease>> {
        #[derive(Deserialize)]
        struct Leased {
            lease: Option<Lease>,
        }
        let targets: Vec<TargetId> = targets.into_iter().collect();
        let body = json!({ "supported_targets": targets });
        self.json_of::<Leased>(Method::POST, "/0/factory/lease".into(), Some(body))
            .await
            .map(|answer| answer.lease)
    }

    /// Is the lease still this factory's?
    pub async fn renew(&self, job: &JobId) -> Result<bool> {
        self.json_of(Method::POST, format!("/0/factory/lease/{job}"), None)
            .await
    }

    /// A worker for this job alone: the console of a start that fails then has a log to go to.
    pub async fn make_worker(&self, target: TargetId, job: &JobId) -> Result<ServerWorker> {
        let body = json!({ "target": target, "job": job, "wait_for_flush": false });
        self.json_of(Method::POST, "/0/factory/worker".into(), Some(body))
            .await
    }

    /// The worker's owner tag, set once, and what the agent is to run before and after the job.
    pub async fn associate(&self, worker: WorkerId, owner_tag: &str, scripts: &Scripts) -> Result<()> {
        let metadata = (*scripts != Scripts::default()).then(|| {
            json!({
                "v": "1",
                "pre_job_diagnostic_script": scripts.pre_job_diagnostic_script,
                "post_job_diagnostic_script": scripts.post_job_diagnostic_script,
            })
        });
        let body = json!({ "private": owner_tag, "ip": null, "metadata": metadata });
        self.answer(Method::PATCH, format!("/0/factory/worker/{worker}"), Some(body))
            .await
            .map(drop)
    }

    /// The worker is gone on this host: the server forgets it, and fails its job if that has not ended. True where it is
    /// deleted.
    ///
    /// # Errors
    /// No answer, or a refusal.
    pub async fn delete(&self, worker: WorkerId) -> Result<bool> {
        self.json_of(Method::DELETE, format!("/0/factory/worker/{worker}"), None)
            .await
    }

    /// A line for the job's log; true = the server has no job for it yet.
    pub async fn append(&self, worker: WorkerId, line: &str) -> Result<bool> {
        #[derive(Deserialize)]
        struct Appended {
            retry: bool,
        }
        let time = jiff::Timestamp::now().to_string();
        let body = json!({ "stream": "console", "time": time, "payload": line });
        self.json_of::<Appended>(
            Method::POST,
            format!("/0/factory/worker/{worker}/append"),
            Some(body),
        )
        .await
        .map(|a| a.retry)
    }

    /// Fail the worker's job, and hold the worker for an operator.
    ///
    /// # Errors
    /// No answer, or a refusal: 404 where the server has no such call.
    pub async fn fail(&self, worker: WorkerId, reason: &str) -> Result<()> {
        let body = json!({ "reason": reason });
        self.answer(
            Method::POST,
            format!("/0/factory/worker/{worker}/fail"),
            Some(body),
        )
        .await
        .map(drop)
    }

    /// An agent's file, without the token: anybody may have it. The whole download has no time limit,
    /// so the caller must watch that it goes on.
    pub(crate) async fn download_file(
        &self,
        path: &str,
        query: &[(&str, String)],
        tag: &[(&'static str, String)],
    ) -> Result<Response> {
        self.transport.file(path, query, tag).await
    }

    /// The body of an answer to a call that went well.
    async fn answer(&self, method: Method, path: String, body: Option<Value>) -> Result<Vec<u8>> {
        let _pending = self.pending.begin();
        let HttpResponse {
            code,
            body,
            retry_after,
        } = self.transport.call(HttpRequest { method, path, body }).await?;
        if (200..300).contains(&code) {
            return Ok(body);
        }
        #[derive(Deserialize)]
        struct ErrorBody {
            message: String,
        }
        let parsed = serde_json::from_slice::<ErrorBody>(&body);
        let text = match &parsed {
            Ok(parsed) => parsed.message.as_str().into(),
            Err(_) => String::from_utf8_lossy(&body),
        };
        let mut message = shortened(&text);
        if message.is_empty() {
            message = "no reason given".into();
        }
        if let (401, Some(tokens)) = (code, &self.tokens) {
            message += &format!("; the token is of {}", tokens.source());
        }
        Err(match parsed {
            Ok(_) => Error::Status {
                code,
                message,
                retry_after,
            },
            Err(_) => Error::NotBuildomat {
                code,
                message,
                retry_after,
            },
        })
    }

    async fn json_of<T: DeserializeOwned>(
        &self,
        method: Method,
        path: String,
        body: Option<Value>,
    ) -> Result<T> {
        let body = self.answer(method, path, body).await?;
        serde_json::from_slice(&body).map_err(|e| Error::Body(shortened(&e.to_string())))
    }
}

/// What of somebody else's text can stand in a sentence. A JSON error quotes the wrong value, too.
fn shortened(text: &str) -> String {
    let plain = text.trim().chars().filter(|c| !c.is_control());
    plain.take(MAX_MESSAGE).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_clear_no_is_a_refusal() {
        let status = |code| Error::Status {
            code,
            message: String::new(),
            retry_after: None,
        };
        for (code, refusal) in [
            (400, true),
            (401, false),
            (403, true),
            (404, true),
            (429, false),
            (500, false),
            (503, false),
        ] {
            assert_eq!(status(code).is_refusal(), refusal, "{code}");
        }
        assert!(!Error::Unreachable(String::new()).is_refusal());
    }

    /// Whatever is asked: this.
    #[derive(Debug)]
    struct Always(u16, &'static str);

    impl Transport for Always {
        fn call(&self, _: HttpRequest) -> Pending<'_, HttpResponse> {
            Box::pin(async { Ok(HttpResponse::new(self.0, self.1)) })
        }

        fn file<'a>(
            &'a self,
            _: &'a str,
            _: &'a [(&'a str, String)],
            _: &'a [(&'static str, String)],
        ) -> Pending<'a, Response> {
            Box::pin(async { Err(Error::Unreachable("no file".into())) })
        }
    }

    #[tokio::test]
    async fn a_refusal_without_the_servers_json_is_a_proxys() {
        let fail = |code, body| async move {
            let buildomat = BuildomatClient::over(Arc::new(Always(code, body)));
            buildomat.fail(WorkerId::from_bits(1), "x").await.unwrap_err()
        };
        let servers = fail(404, r#"{"request_id":"r","message":"Not Found"}"#).await;
        assert!(servers.is_refusal(), "{servers}");
        for (code, body) in [
            (404, "<html>Not Found</html>"),
            (403, ""),
            (400, "{\"mess"),
            (404, "[]"),
        ] {
            let proxys = fail(code, body).await;
            assert!(!proxys.is_refusal(), "{proxys}");
            assert!(proxys.to_string().contains("something before"), "{proxys}");
        }
    }

    #[tokio::test]
    async fn an_answer_that_makes_no_sense_is_not_repeated_whole() {
        let answer = format!(r#"{{"ok":"{}"}}"#, "long".repeat(9999));
        let buildomat = BuildomatClient::over(Arc::new(Always(200, answer.leak())));
        let sentence = buildomat.ping().await.unwrap_err().to_string();
        assert!(
            sentence.contains("makes no sense") && sentence.len() < 600,
            "{sentence}"
        );
    }
}
