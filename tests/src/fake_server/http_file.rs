//! `/file/*`: the agent, to anybody, without a length and without a checksum.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::header::{CONTENT_TYPE, ETAG, IF_NONE_MATCH};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_util::{StreamExt, stream};

use super::http::{ApiError, ApiResult};
use super::shared::{App, Behaviour};
use super::types::ServerError;

pub fn routes() -> Router<App> {
    Router::new()
        .route("/file/agent.gz", get(gzip))
        .route("/file/agent", get(plain))
}

type Hints = Query<HashMap<String, String>>;

async fn gzip(State(app): State<App>, Query(hints): Hints, headers: HeaderMap) -> ApiResult<Response> {
    let behaviour = app.behaviour();
    let wanted = !behaviour.no_gzip && is_linux(&hints);
    let agent = load(&app, wanted).await?;
    let packed = app.agent_gzip.get_or_try_init(async || {
        tokio::task::spawn_blocking(move || pack(&agent))
            .await
            .map_err(|_| ApiError(ServerError::Internal))?
    });
    Ok(send(packed.await?, &headers, &behaviour))
}

async fn plain(State(app): State<App>, Query(hints): Hints, headers: HeaderMap) -> ApiResult<Response> {
    let behaviour = app.behaviour();
    let wanted = !behaviour.no_plain && is_linux(&hints);
    Ok(send(&load(&app, wanted).await?, &headers, &behaviour))
}

/// This server has no agent for another system.
fn is_linux(hints: &HashMap<String, String>) -> bool {
    hints.get("kernel").is_some_and(|k| k == "Linux")
}

/// Reads the agent once; it stays the same for the life of the server.
async fn load(app: &App, wanted: bool) -> ApiResult<Bytes> {
    let Some(path) = app.agent.as_ref().filter(|_| wanted) else {
        return Err(ServerError::NotFound.into());
    };
    let read = async || tokio::fs::read(path).await.map(Bytes::from);
    let bytes = app.agent_plain.get_or_try_init(read).await.map_err(|e| {
        tracing::error!("cannot read the agent {}: {e}", path.display());
        ApiError(ServerError::Internal)
    })?;
    Ok(bytes.clone())
}

fn pack(agent: &[u8]) -> ApiResult<Bytes> {
    // Stored, and not compressed: the tests of a whole factory pack and unpack it hundreds of times.
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::none());
    let packed = packer.write_all(agent).and_then(|()| packer.finish());
    packed
        .map(Bytes::from)
        .map_err(|_| ApiError(ServerError::Internal))
}

fn send(bytes: &Bytes, headers: &HeaderMap, behaviour: &Behaviour) -> Response {
    let etag = behaviour.etag.then(|| {
        let mut hasher = DefaultHasher::new();
        bytes.hash(&mut hasher);
        format!("\"{:016x}\"", hasher.finish())
    });
    let known = headers.get(IF_NONE_MATCH).map(|value| value.as_bytes());
    if known.is_some() && known == etag.as_ref().map(|etag| etag.as_bytes()) {
        return StatusCode::NOT_MODIFIED.into_response();
    }
    let cut = behaviour.truncate_agent.unwrap_or(usize::MAX).min(bytes.len());
    let mut pieces: Vec<std::io::Result<Bytes>> = Vec::new();
    pieces.extend(
        (0..cut)
            .step_by(65536)
            .map(|at| Ok(bytes.slice(at..cut.min(at + 65536)))),
    );
    if cut < bytes.len() {
        pieces.push(Err(std::io::ErrorKind::ConnectionReset.into()));
    }
    // Before a break, let what is written so far go out: the caller shall see a body that stops short.
    let body = Body::from_stream(stream::iter(pieces).then(async |piece| {
        if piece.is_err() {
            tokio::task::yield_now().await;
        }
        piece
    }));
    let mut response = ([(CONTENT_TYPE, "application/octet-stream")], body).into_response();
    if let Some(etag) = etag {
        response
            .headers_mut()
            .insert(ETAG, etag.parse().expect("hex digits are a header"));
    }
    response
}
