//! What a user submits and reads, and what an administrator does to workers and factories.

use std::collections::HashMap;

use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::routing::{get, post, put};
use axum::{Json, Router};
use serde::Deserialize;
use serde_json::{Value, json};

use super::http::{ApiResult, Body, RawBody, UserAuth};
use super::jobs::FileKind;
use super::json::{AddFile, AddFileResult, Id, JobEvent, JobOutput, JobSubmit, Reason, StoreValue};
use super::shared::App;
use super::state::{self, id};
use super::types::{Job, Progress, ServerError, Worker};
use super::ulid::Ulid;

pub fn routes() -> Router<App> {
    Router::new()
        .route("/0/jobs", post(submit))
        .route("/0/job/{job}", get(job))
        .route("/0/jobs/{job}/cancel", post(cancel))
        .route("/0/jobs/{job}/chunk", post(chunk))
        .route("/1/jobs/{job}/input", post(input))
        .route("/0/jobs/{job}/events", get(events))
        .route("/0/jobs/{job}/outputs", get(outputs))
        .route("/0/jobs/{job}/outputs/{output}", get(output))
        .route("/0/jobs/{job}/store", get(store))
        .route("/0/jobs/{job}/store/{name}", put(store_put))
        .route("/0/admin/target", post(target))
        .route("/0/admin/factory", post(factory))
        .route("/0/admin/factory/{factory}/enable", post(enable))
        .route("/0/admin/factory/{factory}/disable", post(disable))
        .route("/0/admin/worker/{worker}", get(worker))
        .route("/0/admin/worker/{worker}/events", get(worker_events))
        .route("/0/admin/worker/{worker}/hold", post(hold))
        .route("/0/admin/worker/{worker}/release", post(release))
        .route("/0/admin/worker/{worker}/recycle", post(recycle))
        .route("/0/control/hold", post(pause))
        .route("/0/control/resume", post(resume))
}

type Done = ApiResult<StatusCode>;

/// Changes the state under an id from the path; 204 when it went well.
fn change<T>(
    app: &App,
    text: &str,
    how: impl FnOnce(&mut state::State, Ulid) -> Result<T, ServerError>,
) -> Done {
    let id = id(text)?;
    app.with(|s| how(s, id))?;
    Ok(StatusCode::NO_CONTENT)
}

/// Reads something of a job.
fn of_job<T>(app: &App, text: &str, see: impl FnOnce(&Job) -> T) -> ApiResult<T> {
    let id = id(text)?;
    Ok(app.read(|s| s.job(id).map(see))?)
}

async fn submit(
    State(app): State<App>,
    _: UserAuth,
    Body(body): Body<JobSubmit>,
) -> ApiResult<(StatusCode, Json<Id>)> {
    let job = app.with(|s| s.submit_http(body))?;
    Ok((StatusCode::CREATED, Json(Id { id: job.to_string() })))
}

async fn job(State(app): State<App>, _: UserAuth, Path(job): Path<String>) -> ApiResult<Json<Value>> {
    let job = id(&job)?;
    Ok(Json(app.read(|s| s.job(job).map(|j| show_job(s, j)))?))
}

fn show_job(s: &state::State, j: &Job) -> Value {
    let task = |t: &super::types::Task| {
        let mut shown = json!(t.spec);
        shown["state"] = match t.progress {
            Progress::Pending => "pending",
            Progress::Completed => "completed",
            Progress::Failed => "failed",
        }
        .into();
        shown
    };
    let times = [
        ("submit", Some(j.submitted)),
        ("assign", j.assigned),
        ("complete", j.completed),
    ];
    let times: HashMap<_, _> = times.into_iter().filter_map(|(k, t)| Some((k, t?))).collect();
    let target = &s.targets[&j.target];
    json!({
        "id": j.id, "name": j.name, "owner": "user", "state": j.state(), "cancelled": j.cancelled,
        "target": target, "target_real": target, "tags": j.tags, "times": times,
        "output_rules": j.output_rules.iter().map(|(text, _)| text).collect::<Vec<_>>(),
        "tasks": j.tasks.iter().map(task).collect::<Vec<_>>(),
    })
}

async fn cancel(State(app): State<App>, _: UserAuth, Path(job): Path<String>) -> Done {
    change(&app, &job, |s, job| s.cancel(job))
}

async fn chunk(
    State(app): State<App>,
    _: UserAuth,
    Path(job): Path<String>,
    RawBody(bytes): RawBody,
) -> ApiResult<(StatusCode, Json<Id>)> {
    let job = id(&job)?;
    let chunk = app.with(|s| {
        let chunk = s.new_id();
        s.job_mut(job)?.chunks.insert(chunk, bytes);
        Ok::<_, ServerError>(chunk)
    })?;
    Ok((
        StatusCode::CREATED,
        Json(Id {
            id: chunk.to_string(),
        }),
    ))
}

async fn input(
    State(app): State<App>,
    _: UserAuth,
    Path(job): Path<String>,
    Body(add): Body<AddFile>,
) -> ApiResult<Json<AddFileResult>> {
    let job = id(&job)?;
    Ok(Json(app.with(|s| s.add_file(job, FileKind::Input, &add))?))
}

#[derive(Deserialize)]
struct From {
    #[serde(default)]
    minseq: usize,
}

async fn events(
    State(app): State<App>,
    _: UserAuth,
    Path(job): Path<String>,
    Query(from): Query<From>,
) -> ApiResult<Json<Vec<JobEvent>>> {
    of_job(&app, &job, |j| {
        j.events.iter().skip(from.minseq).cloned().collect()
    })
    .map(Json)
}

async fn outputs(
    State(app): State<App>,
    _: UserAuth,
    Path(job): Path<String>,
) -> ApiResult<Json<Vec<JobOutput>>> {
    of_job(&app, &job, |j| j.outputs.clone()).map(Json)
}

async fn output(
    State(app): State<App>,
    _: UserAuth,
    Path((job, output)): Path<(String, String)>,
) -> ApiResult<Bytes> {
    let output = id(&output)?;
    let listed = |j: &Job| {
        j.outputs
            .iter()
            .any(|o| o.id == output)
            .then(|| j.files[&output].clone())
    };
    Ok(of_job(&app, &job, listed)?.ok_or(ServerError::Internal)?)
}

async fn store(State(app): State<App>, _: UserAuth, Path(job): Path<String>) -> ApiResult<Json<Value>> {
    of_job(&app, &job, |j| {
        let show = |(name, s): (&String, &super::types::StoreEntry)| {
            let value = (!s.value.secret).then_some(&s.value.value);
            let info = json!({
                "secret": s.value.secret, "source": s.source, "time_update": s.time, "value": value,
            });
            (name.clone(), info)
        };
        Json(j.store.iter().map(show).collect())
    })
}

async fn store_put(
    State(app): State<App>,
    _: UserAuth,
    Path((job, name)): Path<(String, String)>,
    Body(value): Body<StoreValue>,
) -> Done {
    change(&app, &job, |s, job| {
        let now = s.now;
        s.job_mut(job).map(|j| j.store_put(&name, value, "user", now))
    })
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

async fn target(State(app): State<App>, _: UserAuth, Body(new): Body<Named>) -> (StatusCode, Json<Value>) {
    let id = app.with(|s| s.add_target(&new.name));
    (StatusCode::CREATED, Json(json!({ "id": id })))
}

async fn factory(State(app): State<App>, _: UserAuth, Body(new): Body<Named>) -> (StatusCode, Json<Value>) {
    let (id, token) = app.with(|s| s.add_factory(&new.name));
    (
        StatusCode::CREATED,
        Json(json!({ "id": id, "name": new.name, "token": token })),
    )
}

#[derive(Deserialize)]
struct Enable {
    hold_workers: Option<bool>,
}

async fn enable(
    State(app): State<App>,
    _: UserAuth,
    Path(factory): Path<String>,
    Body(body): Body<Enable>,
) -> Done {
    change(&app, &factory, |s, factory| {
        let f = s.factories.get_mut(&factory).ok_or(ServerError::Internal)?;
        f.enable = true;
        f.hold_workers = body.hold_workers.unwrap_or(false);
        Ok(())
    })
}

async fn disable(State(app): State<App>, _: UserAuth, Path(factory): Path<String>) -> Done {
    change(&app, &factory, |s, factory| {
        s.factories
            .get_mut(&factory)
            .map(|f| f.enable = false)
            .ok_or(ServerError::Internal)
    })
}

async fn pause(State(app): State<App>, _: UserAuth) -> StatusCode {
    app.with(|s| s.held = true);
    StatusCode::NO_CONTENT
}

async fn resume(State(app): State<App>, _: UserAuth) -> StatusCode {
    app.with(|s| s.held = false);
    StatusCode::NO_CONTENT
}

async fn worker(State(app): State<App>, _: UserAuth, Path(worker): Path<String>) -> ApiResult<Json<Value>> {
    let worker = id(&worker)?;
    let shown = app.read(|s| s.workers.get(&worker).map(|w| show_worker(s, w)));
    Ok(Json(shown.ok_or(ServerError::Internal)?))
}

fn show_worker(s: &state::State, w: &Worker) -> Value {
    let job =
        |j: &Job| json!({ "id": j.id, "name": j.name, "owner": "user", "state": j.state(), "tags": j.tags });
    json!({
        "id": w.id, "factory": w.factory, "factory_private": w.private, "factory_ip": w.ip,
        "target": s.targets[&w.target], "bootstrap": w.is_online(), "deleted": w.deleted,
        "recycle": w.must_recycle(), "diagnostics": w.diagnostics, "lastping": w.last_ping,
        "hold": w.hold.as_ref().map(|h| json!({ "reason": h.reason, "time": h.time })),
        "jobs": w.job.iter().map(|id| job(&s.jobs[id])).collect::<Vec<_>>(),
    })
}

async fn worker_events(
    State(app): State<App>,
    _: UserAuth,
    Path(worker): Path<String>,
    Query(from): Query<From>,
) -> ApiResult<Json<Vec<JobEvent>>> {
    let worker = id(&worker)?;
    let events = app.read(|s| s.workers.get(&worker).map(|w| w.events.clone()));
    Ok(Json(
        events
            .ok_or(ServerError::Internal)?
            .into_iter()
            .skip(from.minseq)
            .collect(),
    ))
}

async fn hold(
    State(app): State<App>,
    _: UserAuth,
    Path(worker): Path<String>,
    Body(body): Body<Reason>,
) -> Done {
    change(&app, &worker, |s, worker| s.hold(worker, &body.reason))
}

async fn release(State(app): State<App>, _: UserAuth, Path(worker): Path<String>) -> Done {
    change(&app, &worker, |s, worker| s.release(worker))
}

async fn recycle(State(app): State<App>, _: UserAuth, Path(worker): Path<String>) -> Done {
    change(&app, &worker, |s, worker| s.recycle(worker))
}
