//! The agent's calls. What the server refuses is an error at once; what merely fails on the way is
//! tried again each second, for ever.

use std::io::Write;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use ureq::Body;
use ureq::http::Response;

use crate::fake_server::json::{
    AddFile, AddFileResult, Append, Bootstrap, Complete, CompleteDiagnostics, Id, Ping, Quota, StoreGet,
    StoreValue, WorkerFail,
};

#[derive(Clone, Debug)]
pub struct Client {
    agent: ureq::Agent,
    base: String,
    bearer: String,
}

type Reply = Result<Response<Body>, ureq::Error>;

impl Client {
    pub fn new(base: &str, token: &str) -> Client {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(15)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .build();
        let agent = ureq::Agent::new_with_config(config);
        Client {
            agent,
            base: base.to_string(),
            bearer: format!("Bearer {token}"),
        }
    }

    fn once(&self, method: &str, path: &str, body: impl ureq::AsSendBody) -> Reply {
        let request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header("authorization", &self.bearer)
            .header("content-type", "application/json")
            .body(body)?;
        self.agent.run(request)
    }

    fn call(&self, method: &str, path: &str, body: &[u8]) -> Result<Response<Body>> {
        loop {
            let reason = match self.once(method, path, body) {
                Ok(reply) if reply.status().is_success() => return Ok(reply),
                Ok(reply) if reply.status().is_client_error() => {
                    let status = reply.status();
                    let text = reply.into_body().read_to_string().unwrap_or_default();
                    bail!("{method} {path}: {status}: {text}");
                }
                Ok(reply) => reply.status().to_string(),
                Err(e) => e.to_string(),
            };
            eprintln!("ERROR: {method} {path}: {reason}; trying again");
            sleep(Duration::from_secs(1));
        }
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let mut reply = self.call("GET", path, &[])?;
        reply
            .body_mut()
            .read_json()
            .with_context(|| format!("GET {path}: the answer is not understood"))
    }

    fn send<T: Serialize + ?Sized>(&self, method: &str, path: &str, body: &T) -> Result<Response<Body>> {
        self.call(method, path, &serde_json::to_vec(body)?)
    }

    /// Every refusal is only a reason to ask again a second later: a bad token never ends by itself.
    pub fn bootstrap(&self, bootstrap: &str, token: &str) -> String {
        let body = Bootstrap {
            bootstrap: bootstrap.to_string(),
            token: token.to_string(),
        };
        loop {
            let reply = self.send("POST", "/0/worker/bootstrap", &body);
            match reply.and_then(|mut r| Ok(r.body_mut().read_json::<Id>()?)) {
                Ok(worker) => return worker.id,
                Err(e) => eprintln!("ERROR: bootstrap: {e:#}"),
            }
            sleep(Duration::from_secs(1));
        }
    }

    pub fn ping(&self) -> Result<Ping> {
        self.get("/0/worker/ping")
    }

    pub fn fail(&self, reason: Option<&str>) -> Result<()> {
        let body = WorkerFail {
            reason: reason.map(str::to_string),
        };
        self.send("POST", "/0/worker/fail", &body).map(drop)
    }

    /// Lines for the job's log, or without one for the worker's.
    pub fn append(&self, job: Option<&str>, lines: &[Append]) -> Result<()> {
        let path = match job {
            Some(job) => format!("/1/worker/job/{job}/append"),
            None => "/0/worker/append".to_string(),
        };
        self.send("POST", &path, lines).map(drop)
    }

    pub fn task_complete(&self, job: &str, task: u32, failed: bool) -> Result<()> {
        let path = format!("/0/worker/job/{job}/task/{task}/complete");
        self.send("POST", &path, &Complete { failed }).map(drop)
    }

    pub fn job_complete(&self, job: &str, failed: bool) -> Result<()> {
        self.send(
            "POST",
            &format!("/0/worker/job/{job}/complete"),
            &Complete { failed },
        )
        .map(drop)
    }

    pub fn diagnostics_enable(&self) -> Result<()> {
        self.send("POST", "/0/worker/diagnostics/enable", &json!({}))
            .map(drop)
    }

    pub fn diagnostics_complete(&self, hold: bool) -> Result<()> {
        self.send(
            "POST",
            "/0/worker/diagnostics/complete",
            &CompleteDiagnostics { hold },
        )
        .map(drop)
    }

    pub fn input(&self, job: &str, input: &str, mut to: impl Write) -> Result<()> {
        let reply = self.call("GET", &format!("/0/worker/job/{job}/inputs/{input}"), &[])?;
        std::io::copy(&mut reply.into_body().into_reader(), &mut to)?;
        Ok(())
    }

    pub fn quota(&self, job: &str) -> Result<u64> {
        self.get(&format!("/0/worker/job/{job}/quota"))
            .map(|q: Quota| q.max_bytes_per_output)
    }

    pub fn chunk(&self, job: &str, bytes: &[u8]) -> Result<String> {
        let mut reply = self.call("POST", &format!("/0/worker/job/{job}/chunk"), bytes)?;
        Ok(reply.body_mut().read_json::<Id>()?.id)
    }

    /// Asks until the server has put the file together.
    pub fn add_output(&self, job: &str, add: &AddFile) -> Result<()> {
        loop {
            let mut reply = self.send("POST", &format!("/1/worker/job/{job}/output"), add)?;
            match reply.body_mut().read_json()? {
                AddFileResult {
                    complete: true,
                    error: None,
                } => return Ok(()),
                AddFileResult {
                    complete: true,
                    error: Some(error),
                } => bail!("{}: {error}", add.path),
                AddFileResult { complete: false, .. } => sleep(Duration::from_millis(250)),
            }
        }
    }

    pub fn store_get(&self, job: &str, name: &str) -> Result<Option<String>> {
        let found: StoreGet = self.get(&format!("/0/worker/job/{job}/store/{name}"))?;
        Ok(found.value.map(|v| v.value))
    }

    pub fn store_put(&self, job: &str, name: &str, value: String, secret: bool) -> Result<()> {
        let body = StoreValue { value, secret };
        self.send("PUT", &format!("/0/worker/job/{job}/store/{name}"), &body)
            .map(drop)
    }
}
