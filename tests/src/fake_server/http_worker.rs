//! `/0/worker/*` and `/1/worker/*`: what an agent may ask.

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};

use super::http::{ApiResult, Body, RawBody, WorkerAuth};
use super::jobs::{FileKind, MAX_FILE};
use super::json::{
    AddFile, AddFileResult, Append, Bootstrap, Complete, CompleteDiagnostics, Id, Ping, Quota, StoreGet,
    StoreValue, WorkerFail,
};
use super::shared::App;
use super::state::id;
use super::types::ServerError;

pub fn routes() -> Router<App> {
    Router::new()
        .route("/0/worker/bootstrap", post(bootstrap))
        .route("/0/worker/ping", get(ping))
        .route("/0/worker/append", post(append))
        .route("/0/worker/fail", post(fail))
        .route("/0/worker/diagnostics/enable", post(diagnostics_enable))
        .route("/0/worker/diagnostics/complete", post(diagnostics_complete))
        .route("/1/worker/job/{job}/append", post(job_append))
        .route("/0/worker/job/{job}/task/{task}/append", post(task_append))
        .route("/0/worker/job/{job}/task/{task}/complete", post(task_complete))
        .route("/0/worker/job/{job}/complete", post(job_complete))
        .route("/0/worker/job/{job}/inputs/{input}", get(input))
        .route("/0/worker/job/{job}/chunk", post(chunk))
        .route("/1/worker/job/{job}/output", post(output))
        .route("/0/worker/job/{job}/quota", get(quota))
        .route("/0/worker/job/{job}/store/{name}", get(store_get).put(store_put))
}

async fn bootstrap(State(app): State<App>, Body(body): Body<Bootstrap>) -> ApiResult<(StatusCode, Json<Id>)> {
    let worker = app.with(|s| s.bootstrap(&body.bootstrap, &body.token))?;
    Ok((
        StatusCode::CREATED,
        Json(Id {
            id: worker.to_string(),
        }),
    ))
}

async fn ping(State(app): State<App>, WorkerAuth(me): WorkerAuth) -> Json<Ping> {
    Json(app.with(|s| s.worker_ping(me)))
}

async fn append(
    State(app): State<App>,
    WorkerAuth(me): WorkerAuth,
    Body(lines): Body<Vec<Append>>,
) -> StatusCode {
    app.with(|s| s.worker_append(me, lines));
    StatusCode::NO_CONTENT
}

async fn fail(
    State(app): State<App>,
    WorkerAuth(me): WorkerAuth,
    Body(body): Body<WorkerFail>,
) -> StatusCode {
    app.with(|s| s.fail_worker(me, body.reason.as_deref().unwrap_or("agent reported a failure")));
    StatusCode::NO_CONTENT
}

async fn diagnostics_enable(State(app): State<App>, WorkerAuth(me): WorkerAuth) -> StatusCode {
    app.with(|s| s.diagnostics(me, true));
    StatusCode::NO_CONTENT
}

async fn diagnostics_complete(
    State(app): State<App>,
    WorkerAuth(me): WorkerAuth,
    Body(body): Body<CompleteDiagnostics>,
) -> ApiResult<StatusCode> {
    app.with(|s| s.diagnostics_complete(me, body.hold))?;
    Ok(StatusCode::NO_CONTENT)
}

async fn job_append(
    State(app): State<App>,
    WorkerAuth(me): WorkerAuth,
    Path(job): Path<String>,
    Body(lines): Body<Vec<Append>>,
) -> ApiResult<StatusCode> {
    let job = id(&job)?;
    app.with(|s| {
        if s.workers_job(me, job)?.is_complete() {
            return Err(ServerError::Conflict(
                "job is already complete, cannot append".to_string(),
            ));
        }
        for line in &lines {
            s.check_stream(&line.stream)?;
        }
        for line in lines {
            s.append(job, line.task, &line.stream, Some(line.time), &line.payload);
        }
        Ok(())
    })?;
    Ok(StatusCode::NO_CONTENT)
}

async fn task_append(
    state: State<App>,
    me: WorkerAuth,
    Path((job, task)): Path<(String, u32)>,
    Body(line): Body<Append>,
) -> ApiResult<StatusCode> {
    job_append(
        state,
        me,
        Path(job),
        Body(vec![Append {
            task: Some(task),
            ..line
        }]),
    )
    .await
}

async fn task_complete(
    State(app): State<App>,
    WorkerAuth(me): WorkerAuth,
    Path((job, task)): Path<(String, u32)>,
    Body(body): Body<Complete>,
) -> ApiResult<StatusCode> {
    let job = id(&job)?;
    app.with(|s| s.workers_job(me, job)?.complete_task(task, body.failed))?;
    Ok(StatusCode::NO_CONTENT)
}

async fn job_complete(
    State(app): State<App>,
    WorkerAuth(me): WorkerAuth,
    Path(job): Path<String>,
    Body(body): Body<Complete>,
) -> ApiResult<StatusCode> {
    let job = id(&job)?;
    app.with(|s| {
        if s.workers_job(me, job)?.is_complete() {
            return Err(ServerError::Conflict("job is already complete".to_string()));
        }
        s.finish(job, body.failed);
        Ok(())
    })?;
    Ok(StatusCode::NO_CONTENT)
}

async fn input(
    State(app): State<App>,
    WorkerAuth(me): WorkerAuth,
    Path((job, input)): Path<(String, String)>,
) -> ApiResult<Bytes> {
    let (job, input) = (id(&job)?, id(&input)?);
    let bytes = app.read(|s| {
        let j = s.workers_job(me, job)?;
        let known = j.inputs.iter().any(|i| i.file == Some(input));
        known
            .then(|| j.files[&input].clone())
            .ok_or(ServerError::Internal)
    })?;
    Ok(bytes)
}

async fn chunk(
    State(app): State<App>,
    WorkerAuth(me): WorkerAuth,
    Path(job): Path<String>,
    RawBody(bytes): RawBody,
) -> ApiResult<(StatusCode, Json<Id>)> {
    let job = id(&job)?;
    let chunk = app.with(|s| {
        let chunk = s.new_id();
        s.workers_job(me, job)?.chunks.insert(chunk, bytes);
        Ok::<_, ServerError>(chunk)
    })?;
    Ok((
        StatusCode::CREATED,
        Json(Id {
            id: chunk.to_string(),
        }),
    ))
}

async fn output(
    State(app): State<App>,
    WorkerAuth(me): WorkerAuth,
    Path(job): Path<String>,
    Body(add): Body<AddFile>,
) -> ApiResult<Json<AddFileResult>> {
    let job = id(&job)?;
    let result = app.with(|s| {
        s.workers_job(me, job)?;
        s.add_file(job, FileKind::Output, &add)
    })?;
    Ok(Json(result))
}

async fn quota(
    State(app): State<App>,
    WorkerAuth(me): WorkerAuth,
    Path(job): Path<String>,
) -> ApiResult<Json<Quota>> {
    let job = id(&job)?;
    app.read(|s| s.workers_job(me, job).map(|_| ()))?;
    Ok(Json(Quota {
        max_bytes_per_output: MAX_FILE,
    }))
}

async fn store_get(
    State(app): State<App>,
    WorkerAuth(me): WorkerAuth,
    Path((job, name)): Path<(String, String)>,
) -> ApiResult<Json<StoreGet>> {
    let job = id(&job)?;
    let value = app.read(|s| {
        s.workers_job(me, job)
            .map(|j| j.store.get(&name).map(|v| v.value.clone()))
    })?;
    Ok(Json(StoreGet { value }))
}

async fn store_put(
    State(app): State<App>,
    WorkerAuth(me): WorkerAuth,
    Path((job, name)): Path<(String, String)>,
    Body(value): Body<StoreValue>,
) -> ApiResult<StatusCode> {
    let job = id(&job)?;
    app.with(|s| {
        let now = s.now;
        s.workers_job(me, job)
            .map(|j| j.store_put(&name, value, "worker", now))
    })?;
    Ok(StatusCode::NO_CONTENT)
}
