//! The buildomat server's factory calls, typed. It must never log or send the token anywhere but to the
//! configured server, follow a redirect, or read an answer without bound.

use std::fmt;
use std::time::Duration;

use protocol::config::BaseUrl;
use protocol::{SlotName, TargetId, WorkerId};
use reqwest::{Client, Method, RequestBuilder, Response};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::view::{JobId, Lease, ServerWorker, Side, Trouble};

/// The longest answer that is read, in bytes.
const MAX_BODY: usize = 8 << 20;
/// The longest part of an error's text that is kept, in characters.
const MAX_MESSAGE: usize = 300;

/// The factory's token. No formatting prints it.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    pub fn new(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Why a call has no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// No answer, or none in time.
    Unreachable(String),
    /// The server, or a proxy before it, says no.
    Status { code: u16, message: String },
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
            Error::Status { code: 401, message } => write!(
                f,
                "the buildomat server refused with 401 ({message}): if this goes on, check the factory's token"
            ),
            Error::Status { code, message } => write!(
                f,
                "the buildomat server answered {code}: {message}: if this goes on, look into the server's log"
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
    /// Will the same call never work? 401 may be a token that is being replaced; 408 and 429 ask for patience.
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

    pub fn trouble(&self) -> Trouble {
        Trouble {
            side: Side::Server,
            refused: self.is_refusal(),
            sentence: self.to_string(),
        }
    }
}

type Result<T> = std::result::Result<T, Error>;

/// The server, as this factory may talk to it.
#[derive(Clone, Debug)]
pub struct Server {
    client: Client,
    base: String,
    token: Token,
}

impl Server {
    /// # Errors
    /// Where the host's TLS set-up cannot be used.
    pub fn new(base: &BaseUrl, token: Token) -> Result<Self> {
        let client = Client::builder()
            .user_agent(concat!("buildomat-user-factory/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(Duration::from_secs(10))
            .build()
            .map_err(|e| Error::Unreachable(causes(&e)))?;
        Ok(Self {
            client,
            base: base.as_str().to_owned(),
            token,
        })
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.client.request(method, format!("{}{path}", self.base));
        request
            .bearer_auth(&self.token.0)
            .timeout(Duration::from_secs(30))
    }

    /// # Errors
    /// Where the server is away or the token is not its.
    pub async fn ping(&self) -> Result<bool> {
        #[derive(Deserialize)]
        struct Answer {
            ok: bool,
        }
        json_of::<Answer>(self.request(Method::GET, "/0/factory/ping"))
            .await
            .map(|a| a.ok)
    }

    pub async fn workers(&self) -> Result<Vec<ServerWorker>> {
        json_of(self.request(Method::GET, "/0/factory/workers")).await
    }

    pub async fn lease(&self, targets: impl IntoIterator<Item = TargetId>) -> Result<Option<Lease>> {
        #[derive(Deserialize)]
        struct Answer {
            lease: Option<Lease>,
        }
        let targets: Vec<TargetId> = targets.into_iter().collect();
        let request = self
            .request(Method::POST, "/0/factory/lease")
            .json(&json!({ "supported_targets": targets }));
        json_of::<Answer>(request).await.map(|answer| answer.lease)
    }

    /// Is the lease still this factory's?
    pub async fn renew(&self, job: &JobId) -> Result<bool> {
        json_of(self.request(Method::POST, &format!("/0/factory/lease/{job}"))).await
    }

    /// A worker for this job alone: the console of a start that fails then has a log to go to.
    pub async fn make_worker(&self, target: TargetId, job: &JobId) -> Result<ServerWorker> {
        let body = json!({ "target": target, "job": job, "wait_for_flush": false });
        json_of(self.request(Method::POST, "/0/factory/worker").json(&body)).await
    }

    pub async fn associate(&self, worker: WorkerId, slot: &SlotName) -> Result<()> {
        let request = self.request(Method::PATCH, &format!("/0/factory/worker/{worker}"));
        answer(request.json(&json!({ "private": slot, "ip": null, "metadata": null })))
            .await
            .map(drop)
    }

    pub async fn delete(&self, worker: WorkerId) -> Result<bool> {
        json_of(self.request(Method::DELETE, &format!("/0/factory/worker/{worker}"))).await
    }

    /// A line for the job's log; true = the server has no job for it yet.
    pub async fn append(&self, worker: WorkerId, line: &str) -> Result<bool> {
        #[derive(Serialize)]
        struct Event<'a> {
            stream: &'a str,
            time: String,
            payload: &'a str,
        }
        #[derive(Deserialize)]
        struct Answer {
            retry: bool,
        }
        let event = Event {
            stream: "console",
            time: jiff::Timestamp::now().to_string(),
            payload: line,
        };
        let request = self.request(Method::POST, &format!("/0/factory/worker/{worker}/append"));
        json_of::<Answer>(request.json(&event)).await.map(|a| a.retry)
    }

    pub async fn fail(&self, worker: WorkerId, reason: &str) -> Result<()> {
        let request = self.request(Method::POST, &format!("/0/factory/worker/{worker}/fail"));
        answer(request.json(&json!({ "reason": reason }))).await.map(drop)
    }

    /// An agent's file, without the token: anybody may have it. The whole download has no time limit,
    /// so the caller must watch that it goes on.
    pub(crate) async fn file(
        &self,
        path: &str,
        query: &[(&str, String)],
        tag: &[(&'static str, String)],
    ) -> Result<Response> {
        let mut request = self.client.get(format!("{}{path}", self.base)).query(query);
        for (name, value) in tag {
            request = request.header(*name, value);
        }
        request.send().await.map_err(|e| Error::Unreachable(causes(&e)))
    }
}

/// The answer of a call that went well, and its body.
async fn answer(request: RequestBuilder) -> Result<Vec<u8>> {
    let response = request.send().await.map_err(|e| Error::Unreachable(causes(&e)))?;
    let status = response.status();
    let body = bounded(response).await;
    if status.is_success() {
        return body;
    }
    #[derive(Deserialize)]
    struct Said {
        message: String,
    }
    let body = body.unwrap_or_default();
    let said = serde_json::from_slice::<Said>(&body).map(|said| said.message);
    let message = said.unwrap_or_else(|_| String::from_utf8_lossy(&body).into_owned());
    let message: String = message
        .trim()
        .chars()
        .filter(|c| !c.is_control())
        .take(MAX_MESSAGE)
        .collect();
    let message = if message.is_empty() {
        "no reason given".into()
    } else {
        message
    };
    Err(Error::Status {
        code: status.as_u16(),
        message,
    })
}

async fn json_of<T: DeserializeOwned>(request: RequestBuilder) -> Result<T> {
    let body = answer(request).await?;
    serde_json::from_slice(&body).map_err(|e| Error::Body(e.to_string()))
}

async fn bounded(mut response: Response) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|e| Error::Body(causes(&e)))? {
        if body.len() + chunk.len() > MAX_BODY {
            return Err(Error::Body(format!("it is longer than {MAX_BODY} bytes")));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// The whole chain of an error: reqwest's own text leaves out the cause.
pub(crate) fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_clear_no_is_a_refusal() {
        let status = |code| Error::Status {
            code,
            message: String::new(),
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

    #[test]
    fn the_token_is_never_printed() {
        assert!(!format!("{:?}", Token::new("secret".into())).contains("secret"));
    }
}
