//! The front of the HTTP API: routes, who is asking, and what a refusal looks like on the wire.

use axum::Json;
use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, FromRequest, FromRequestParts, MatchedPath, Request, State};
use axum::http::StatusCode;
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;

use super::jobs::MAX_CHUNK;
use super::shared::{App, Outage};
use super::types::ServerError;
use super::ulid::{Ulid, fresh_id};
use super::{http_factory, http_file, http_user, http_worker, state};

pub fn router(app: App) -> Router {
    Router::new()
        .merge(http_factory::routes())
        .merge(http_worker::routes())
        .merge(http_user::routes())
        .merge(http_file::routes())
        .fallback(async || ApiError(ServerError::NotFound))
        .layer(middleware::from_fn_with_state(app.clone(), count_request))
        .layer(DefaultBodyLimit::max(MAX_CHUNK))
        .with_state(app)
}

/// Counts every request that arrives, and refuses it when the server is to seem down.
async fn count_request(State(app): State<App>, request: Request, next: Next) -> Response {
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or("?", |p| p.as_str());
    app.count(format!("{} {route}", request.method()));
    match app.behaviour().outage {
        Outage::Unavailable => StatusCode::SERVICE_UNAVAILABLE.into_response(),
        Outage::None | Outage::Closed => next.run(request).await,
    }
}

#[derive(Debug)]
pub struct ApiError(pub ServerError);

impl From<ServerError> for ApiError {
    fn from(error: ServerError) -> ApiError {
        ApiError(error)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let id = fresh_id().to_string();
        let (status, body) = self.0.answer(&id);
        let status = StatusCode::from_u16(status).expect("a refusal has a status");
        (status, [("x-request-id", id)], Json(body)).into_response()
    }
}

pub type ApiResult<T> = Result<T, ApiError>;

/// A JSON body, refused in the server's own form.
pub struct Body<T>(pub T);

impl<T: DeserializeOwned> FromRequest<App> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> ApiResult<Body<T>> {
        let RawBody(bytes) = RawBody::from_request(request, app).await?;
        let parsed = serde_json::from_slice(&bytes);
        parsed
            .map(Body)
            .map_err(|e| ServerError::Invalid(format!("unable to parse JSON body: {e}")).into())
    }
}

/// A body of bytes within the limit of a chunk.
pub struct RawBody(pub Bytes);

impl FromRequest<App> for RawBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> ApiResult<RawBody> {
        let bytes = Bytes::from_request(request, app).await;
        bytes
            .map(RawBody)
            .map_err(|e| ServerError::Invalid(e.body_text()).into())
    }
}

fn bearer(parts: &Parts) -> Option<&str> {
    parts
        .headers
        .get(AUTHORIZATION)?
        .to_str()
        .ok()?
        .strip_prefix("Bearer ")
}

fn caller<T>(
    parts: &Parts,
    app: &App,
    who: impl FnOnce(&state::State, &str) -> Option<T>,
) -> Result<T, ApiError> {
    bearer(parts)
        .and_then(|token| app.read(|s| who(s, token)))
        .ok_or(ApiError(ServerError::Unauthorised))
}

/// The factory that a request's token belongs to.
pub struct FactoryAuth(pub Ulid);

impl FromRequestParts<App> for FactoryAuth {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> ApiResult<FactoryAuth> {
        caller(parts, app, |s, token| s.factory_by_token(token)).map(FactoryAuth)
    }
}

/// The worker whose agent asks.
pub struct WorkerAuth(pub Ulid);

impl FromRequestParts<App> for WorkerAuth {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> ApiResult<WorkerAuth> {
        caller(parts, app, |s, token| s.worker_by_token(token)).map(WorkerAuth)
    }
}

/// The one user there is, who is the administrator too.
pub struct UserAuth;

impl FromRequestParts<App> for UserAuth {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> ApiResult<UserAuth> {
        caller(parts, app, |s, token| (s.user_token == token).then_some(UserAuth))
    }
}
