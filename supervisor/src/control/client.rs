//! The operator's command, as a client of the control socket. It uses nothing else.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use protocol::{SlotName, WorkerId};
use reqwest::{Client as Http, Method, RequestBuilder, Response};
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::api::{Details, Drain, EgressReport, ErrorBody, SelfTest, Status};
use crate::buildomat::causes;

/// A call has been answered in full by then, or the factory is unreachable. (A deletion is answered before it is done.)
const TIMEOUT: Duration = Duration::from_secs(20);

/// Why the factory did not do it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// The factory does not answer.
    Unreachable(String),
    /// It answered, and said no: one sentence, or a line for each mistake.
    Refused(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Unreachable(text) | Error::Refused(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for Error {}

/// A running factory, at its control socket.
#[derive(Clone, Debug)]
pub struct Client {
    http: Http,
    socket: PathBuf,
}

impl Client {
    /// # Errors
    /// Where no client can be set up at all.
    pub fn new(socket: &Path) -> Result<Self, Error> {
        let http = Http::builder()
            .unix_socket(socket)
            .no_proxy()
            .connect_timeout(Duration::from_secs(5));
        let http = http.build().map_err(|e| Error::Unreachable(causes(&e)))?;
        Ok(Self {
            http,
            socket: socket.to_owned(),
        })
    }

    /// `GET /v1/status`.
    ///
    /// # Errors
    /// [`Error::Unreachable`] after 5 s without an answer.
    pub async fn status(&self) -> Result<Status, Error> {
        self.json("/v1/status").await
    }

    /// `GET /v1/workers/WORKER`.
    ///
    /// # Errors
    /// [`Error::Refused`] where there is no such worker.
    pub async fn details(&self, worker: WorkerId) -> Result<Details, Error> {
        self.json(&format!("/v1/workers/{worker}")).await
    }

    /// `GET /v1/slots/SLOT/egress`.
    ///
    /// # Errors
    /// [`Error::Refused`] where there is no such slot, or its jobs have the host's network.
    pub async fn egress(&self, slot: &SlotName) -> Result<EgressReport, Error> {
        self.json(&format!("/v1/slots/{slot}/egress")).await
    }

    /// The console, piece by piece: [`Response::chunk`].
    pub async fn console(&self, worker: WorkerId, follow: bool) -> Result<Response, Error> {
        self.call(
            Method::GET,
            &format!("/v1/workers/{worker}/console?follow={follow}"),
        )
        .await
    }

    /// Take no jobs, on one slot or on all.
    pub async fn drain(&self, drain: &Drain) -> Result<(), Error> {
        let path = of_slot(drain.slot.as_ref(), "drain");
        self.send(self.request(Method::POST, &path).json(drain))
            .await
            .map(drop)
    }

    /// Take them again.
    pub async fn resume(&self, slot: Option<&SlotName>) -> Result<(), Error> {
        self.call(Method::POST, &of_slot(slot, "resume")).await.map(drop)
    }

    /// Fail its job, and delete it whatever holds it. The answer comes when that is saved, not when it is done.
    ///
    /// # Errors
    /// [`Error::Refused`] where there is no such worker.
    pub async fn destroy(&self, worker: WorkerId) -> Result<(), Error> {
        self.call(Method::POST, &format!("/v1/workers/{worker}/destroy"))
            .await
            .map(drop)
    }

    /// Fail its job, and end its processes; its files stay.
    ///
    /// # Errors
    /// [`Error::Refused`] where there is no such worker, or it is failed already.
    pub async fn kill(&self, worker: WorkerId) -> Result<(), Error> {
        self.call(Method::POST, &format!("/v1/workers/{worker}/kill"))
            .await
            .map(drop)
    }

    /// Say that the host is being shut down: no jobs are taken until the supervisor starts again.
    pub async fn host_stops(&self) -> Result<(), Error> {
        self.call(Method::POST, "/v1/host-stops").await.map(drop)
    }

    /// Say what a self-test of all slots has found.
    ///
    /// # Errors
    /// [`Error::Refused`] for a text of more than one line or 1000 characters.
    pub async fn selftest(&self, found: &SelfTest) -> Result<(), Error> {
        self.send(self.request(Method::POST, "/v1/selftest").json(found))
            .await
            .map(drop)
    }

    /// Use the configuration file for new workers.
    ///
    /// # Errors
    /// [`Error::Refused`], with a line for each mistake; then the one in use stays so.
    pub async fn reload(&self) -> Result<(), Error> {
        self.call(Method::POST, "/v1/reload").await.map(drop)
    }

    async fn json<T: DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        let answer = self.call(Method::GET, path).await?;
        let body = timeout(TIMEOUT, answer.json()).await;
        body.map_err(|_| self.late())?.map_err(|e| {
            Error::Refused(format!(
                "the factory's answer makes no sense ({}): use the command of its own release",
                causes(&e)
            ))
        })
    }

    fn late(&self) -> Error {
        Error::Unreachable(format!(
            "the factory at {} did not answer within {} s, and may still do what was asked: is `user-factory serve` \
             stopped or hung? Its log may say why",
            self.socket.display(),
            TIMEOUT.as_secs()
        ))
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        // The name is never looked up: the socket is where it leads.
        self.http.request(method, format!("http://user-factory{path}"))
    }

    async fn call(&self, method: Method, path: &str) -> Result<Response, Error> {
        self.send(self.request(method, path)).await
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response, Error> {
        let answer = timeout(TIMEOUT, request.send()).await.map_err(|_| self.late())?;
        let answer = answer.map_err(|e| {
            Error::Unreachable(format!(
                "the factory cannot be asked at {}: {}; is `user-factory serve` running, and may you open the socket?",
                self.socket.display(),
                causes(&e)
            ))
        })?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let message = timeout(TIMEOUT, answer.json::<ErrorBody>()).await;
        let message = message.map_err(|_| self.late())?.map(|refusal| refusal.message);
        Err(Error::Refused(
            message.unwrap_or_else(|_| format!("the factory answered {status}")),
        ))
    }
}

fn of_slot(slot: Option<&SlotName>, verb: &str) -> String {
    match slot {
        Some(slot) => format!("/v1/slots/{slot}/{verb}"),
        None => format!("/v1/{verb}"),
    }
}
