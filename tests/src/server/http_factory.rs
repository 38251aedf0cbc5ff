//! `/0/factory/*`: what a factory may ask.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

use super::http::{Answer, AsFactory, Body, id};
use super::model::{Refusal, Worker};
use super::shared::App;
use super::wire::{Append, Associate, FactoryWorker, Reason, WhatsNext, WorkerCreate};

pub fn routes() -> Router<App> {
    Router::new()
        .route("/0/factory/ping", get(ping))
        .route("/0/factory/lease", post(lease))
        .route("/0/factory/lease/{job}", post(renew))
        .route("/0/factory/worker", post(create))
        .route(
            "/0/factory/worker/{worker}",
            get(worker).patch(associate).delete(destroy),
        )
        .route("/0/factory/worker/{worker}/append", post(append))
        .route("/0/factory/worker/{worker}/fail", post(fail))
        .route("/0/factory/worker/{worker}/flush", post(flush))
        .route("/0/factory/workers", get(workers))
}

async fn ping(State(app): State<App>, AsFactory(me): AsFactory) -> Json<Value> {
    app.with(|s| s.factory_ping(me));
    Json(json!({ "ok": true }))
}

async fn lease(
    State(app): State<App>,
    AsFactory(me): AsFactory,
    Body(body): Body<WhatsNext>,
) -> Answer<Json<Value>> {
    let targets = body
        .supported_targets
        .iter()
        .map(|t| id(t))
        .collect::<Result<Vec<_>, _>>()?;
    let lease = app.with(|s| s.lease(me, &targets));
    let lease = lease.map(|(job, target)| json!({ "job": job, "target": target }));
    Ok(Json(json!({ "lease": lease })))
}

async fn renew(
    State(app): State<App>,
    AsFactory(me): AsFactory,
    Path(job): Path<String>,
) -> Answer<Json<bool>> {
    let job = id(&job)?;
    Ok(Json(app.with(|s| s.renew(me, job))))
}

async fn create(
    State(app): State<App>,
    AsFactory(me): AsFactory,
    Body(body): Body<WorkerCreate>,
) -> Answer<(StatusCode, Json<FactoryWorker>)> {
    let (target, job) = (id(&body.target)?, body.job.as_deref().map(id).transpose()?);
    let made = app.with(|s| {
        let worker = s.create_worker(me, target, job, body.wait_for_flush)?;
        Ok::<_, Refusal>(s.workers[&worker].to_factory())
    })?;
    Ok((StatusCode::CREATED, Json(made)))
}

async fn worker(
    State(app): State<App>,
    AsFactory(me): AsFactory,
    Path(worker): Path<String>,
) -> Answer<Json<Value>> {
    let worker = id(&worker)?;
    let found = app.look(|s| match s.workers.contains_key(&worker) {
        true => s.owned(me, worker).map(|w| (!w.deleted).then(|| w.to_factory())),
        false => Ok(None),
    })?;
    Ok(Json(json!({ "worker": found })))
}

async fn workers(State(app): State<App>, AsFactory(me): AsFactory) -> Json<Vec<FactoryWorker>> {
    let mine = |w: &&Worker| w.factory == me && !w.deleted;
    Json(app.look(|s| s.workers.values().filter(mine).map(Worker::to_factory).collect()))
}

async fn associate(
    State(app): State<App>,
    AsFactory(me): AsFactory,
    Path(worker): Path<String>,
    Body(body): Body<Associate>,
) -> Answer<StatusCode> {
    let worker = id(&worker)?;
    app.with(|s| s.associate(me, worker, body))?;
    Ok(StatusCode::NO_CONTENT)
}

async fn destroy(
    State(app): State<App>,
    AsFactory(me): AsFactory,
    Path(worker): Path<String>,
) -> Answer<Json<bool>> {
    let worker = id(&worker)?;
    Ok(Json(app.with(|s| s.destroy(me, worker))?))
}

async fn append(
    State(app): State<App>,
    AsFactory(me): AsFactory,
    Path(worker): Path<String>,
    Body(line): Body<Append>,
) -> Answer<Json<Value>> {
    let worker = id(&worker)?;
    let retry = app.with(|s| s.factory_append(me, worker, line))?;
    Ok(Json(json!({ "retry": retry })))
}

async fn fail(
    State(app): State<App>,
    AsFactory(me): AsFactory,
    Path(worker): Path<String>,
    Body(body): Body<Reason>,
) -> Answer<StatusCode> {
    if app.behaviour().no_fail {
        return Err(Refusal::NotFound.into());
    }
    let worker = id(&worker)?;
    app.with(|s| s.factory_fail(me, worker, &body.reason))?;
    Ok(StatusCode::NO_CONTENT)
}

async fn flush(
    State(app): State<App>,
    AsFactory(me): AsFactory,
    Path(worker): Path<String>,
) -> Answer<StatusCode> {
    let worker = id(&worker)?;
    app.with(|s| s.flush(me, worker))?;
    Ok(StatusCode::NO_CONTENT)
}
