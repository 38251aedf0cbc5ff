//! `/0/factory/*`: what a factory may ask. The rules of one call are pure, and the simulation of the
//! supervisor calls them as they are; over HTTP there is but the token in front of them.

use axum::extract::State as Extracted;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};

use super::http::{ApiResult, FactoryAuth, RawBody};
use super::json::{Append, Associate, Reason, WhatsNext, WorkerCreate};
use super::shared::App;
use super::state::{State, id};
use super::types::{ServerError, Worker};
use super::ulid::Ulid;

pub fn routes() -> Router<App> {
    Router::new()
        .route("/0/factory/ping", get(call))
        .route("/0/factory/lease", post(call))
        .route("/0/factory/lease/{job}", post(call))
        .route("/0/factory/worker", post(call))
        .route("/0/factory/worker/{worker}", get(call).patch(call).delete(call))
        .route("/0/factory/worker/{worker}/append", post(call))
        .route("/0/factory/worker/{worker}/fail", post(call))
        .route("/0/factory/worker/{worker}/flush", post(call))
        .route("/0/factory/workers", get(call))
        .route("/0/factory/targets", get(call))
}

async fn call(
    Extracted(app): Extracted<App>,
    FactoryAuth(me): FactoryAuth,
    method: Method,
    uri: Uri,
    RawBody(body): RawBody,
) -> ApiResult<Response> {
    let body = match body.is_empty() {
        true => Ok(Value::Null),
        false => serde_json::from_slice(&body),
    };
    let body = body.map_err(not_json)?;
    let (status, value) = app.with(|s| s.factory_call(me, method.as_str(), uri.path(), &body))?;
    let status = StatusCode::from_u16(status).expect("a call has a status");
    Ok(match value {
        Value::Null => status.into_response(),
        value => (status, Json(value)).into_response(),
    })
}

fn not_json(error: serde_json::Error) -> ServerError {
    ServerError::Invalid(format!("unable to parse JSON body: {error}"))
}

fn parse<'a, T: Deserialize<'a>>(body: &'a Value) -> Result<T, ServerError> {
    T::deserialize(body).map_err(not_json)
}

impl State {
    /// A call of the factory `me`: its status and body, `Null` where there is none
    /// (buildomat, `server/src/api/factory.rs`).
    pub fn factory_call(
        &mut self,
        me: Ulid,
        method: &str,
        path: &str,
        body: &Value,
    ) -> Result<(u16, Value), ServerError> {
        let path = path.strip_prefix("/0/factory/").ok_or(ServerError::NotFound)?;
        let parts: Vec<&str> = path.split('/').collect();
        let none = (204, Value::Null);
        Ok(match (method, &parts[..]) {
            ("GET", ["ping"]) => {
                self.factory_ping(me);
                (200, json!({ "ok": true }))
            }
            ("POST", ["lease"]) => {
                let body: WhatsNext = parse(body)?;
                let targets = body.supported_targets.iter().map(|t| id(t));
                let lease = self.lease(me, &targets.collect::<Result<Vec<_>, _>>()?);
                let lease = lease.map(|(job, target)| json!({ "job": job, "target": target }));
                (200, json!({ "lease": lease }))
            }
            ("POST", ["lease", job]) => (200, self.renew(me, id(job)?).into()),
            ("POST", ["worker"]) => {
                let body: WorkerCreate = parse(body)?;
                let (target, job) = (id(&body.target)?, body.job.as_deref().map(id).transpose()?);
                let worker = self.create_worker(me, target, job, body.wait_for_flush)?;
                (201, json!(self.workers[&worker].to_factory()))
            }
            ("GET", ["worker", worker]) => {
                let worker = id(worker)?;
                let found = match self.workers.contains_key(&worker) {
                    true => Some(self.owned(me, worker)?).filter(|w| !w.deleted),
                    false => None,
                };
                (200, json!({ "worker": found.map(|w| w.to_factory()) }))
            }
            ("GET", ["workers"]) => {
                let mine = |w: &&Worker| w.factory == me && !w.deleted;
                let mine = self.workers.values().filter(mine).map(Worker::to_factory);
                (200, mine.map(|w| json!(w)).collect())
            }
            ("GET", ["targets"]) if !self.no_targets => {
                let target = |(id, name)| json!({ "id": id, "name": name });
                (200, self.targets.iter().map(target).collect())
            }
            ("PATCH", ["worker", worker]) => {
                let body: Associate = parse(body)?;
                self.associate(me, id(worker)?, body)?;
                none
            }
            ("DELETE", ["worker", worker]) => (200, self.destroy(me, id(worker)?)?.into()),
            ("POST", ["worker", worker, "append"]) => {
                let line: Append = parse(body)?;
                let retry = self.factory_append(me, id(worker)?, line)?;
                (200, json!({ "retry": retry }))
            }
            ("POST", ["worker", worker, "fail"]) if !self.no_fail => {
                let body: Reason = parse(body)?;
                self.factory_fail(me, id(worker)?, &body.reason)?;
                none
            }
            ("POST", ["worker", worker, "flush"]) => {
                self.flush(me, id(worker)?)?;
                none
            }
            _ => return Err(ServerError::NotFound),
        })
    }
}
