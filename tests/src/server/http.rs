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
use super::model::Refusal;
use super::shared::{App, Down};
use super::ulid::{Ulid, fresh_id};
use super::{http_factory, http_file, http_user, http_worker, state};

pub fn router(app: App) -> Router {
    Router::new()
        .merge(http_factory::routes())
        .merge(http_worker::routes())
        .merge(http_user::routes())
        .merge(http_file::routes())
        .fallback(async || Refused(Refusal::NotFound))
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
    match app.behaviour().down {
        Down::Unavailable => StatusCode::SERVICE_UNAVAILABLE.into_response(),
        Down::No | Down::Closed => next.run(request).await,
    }
}

#[derive(Debug)]
pub struct Refused(pub Refusal);

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Refused {
        Refused(refusal)
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let id = fresh_id().to_string();
        let (status, body) = self.0.answer(&id);
        let status = StatusCode::from_u16(status).expect("a refusal has a status");
        (status, [("x-request-id", id)], Json(body)).into_response()
    }
}

pub type ApiResult<T> = Result<T, Refused>;

/// A JSON body, refused in the server's own form.
pub struct Body<T>(pub T);

impl<T: DeserializeOwned> FromRequest<App> for Body<T> {
    type Rejection = Refused;

    async fn from_request(request: Request, app: &App) -> ApiResult<Body<T>> {
        let Raw(bytes) = Raw::from_request(request, app).await?;
        let parsed = serde_json::from_slice(&bytes);
        parsed
            .map(Body)
            .map_err(|e| Refusal::Invalid(format!("unable to parse JSON body: {e}")).into())
    }
}

/// A body of bytes within the limit of a chunk.
pub struct Raw(pub Bytes);

impl FromRequest<App> for Raw {
    type Rejection = Refused;

    async fn from_request(request: Request, app: &App) -> ApiResult<Raw> {
        let bytes = Bytes::from_request(request, app).await;
        bytes.map(Raw).map_err(|e| Refusal::Invalid(e.body_text()).into())
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
) -> Result<T, Refused> {
    bearer(parts)
        .and_then(|token| app.read(|s| who(s, token)))
        .ok_or(Refused(Refusal::Unauthorised))
}

/// The factory that a request's token belongs to.
pub struct AsFactory(pub Ulid);

impl FromRequestParts<App> for AsFactory {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> ApiResult<AsFactory> {
        caller(parts, app, |s, token| s.factory_by_token(token)).map(AsFactory)
    }
}

/// The worker whose agent asks.
pub struct AsWorker(pub Ulid);

impl FromRequestParts<App> for AsWorker {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> ApiResult<AsWorker> {
        caller(parts, app, |s, token| s.worker_by_token(token)).map(AsWorker)
    }
}

/// The one user there is, who is the administrator too.
pub struct AsUser;

impl FromRequestParts<App> for AsUser {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> ApiResult<AsUser> {
        caller(parts, app, |s, token| (s.user_token == token).then_some(AsUser))
    }
}
