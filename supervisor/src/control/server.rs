//! The control socket and the status address: HTTP in, words to the loop, answers out.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{ConnectInfo, Path as PathPart, Query, State};
use axum::http::{StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::stream;
use protocol::config::CONTROL_SOCKET;
use protocol::{ErrorKind, SlotName, WorkerId};
use serde::Deserialize;
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::api::{self, Details, Process, Refusal, Status};
use super::desk::{Answer, Operator, Word};
use super::listener::{Names, StatusPage, serve_operators};
use super::metrics::Metrics;
use super::{page, procs};
use crate::console;
use crate::helper::{self, Helper};
use crate::store::History;

/// How often a followed console is looked at.
const LOOK: Duration = Duration::from_millis(300);
/// How often the socket's directory is looked for, until the helper has made it.
const WAIT: Duration = Duration::from_secs(1);
/// How long a worker's details wait for its console.
const PATIENCE: Duration = Duration::from_secs(2);
/// Lines of the console in a worker's details.
const LAST_LINES: usize = 20;

/// All that the handlers need.
#[derive(Clone, Debug)]
pub struct Counter {
    pub words: mpsc::UnboundedSender<Word>,
    pub helper: Helper,
    pub history: Arc<History>,
    pub metrics: Arc<Metrics>,
    /// Where the helper says where the workers' cgroups are.
    pub cgroups: PathBuf,
}

/// Who connected to the control socket. None where the kernel does not say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer(pub(super) Option<u32>);

impl Peer {
    /// # Errors
    /// Where the kernel does not say who it is: an order is somebody's.
    fn operator(self) -> Said<Operator> {
        let unknown = || {
            No(
                StatusCode::FORBIDDEN,
                "the kernel does not say who connected: repeat it".into(),
            )
        };
        self.0.map(Operator::Uid).ok_or_else(unknown)
    }
}

/// Why an answer is not what was asked for.
struct No(StatusCode, String);

impl IntoResponse for No {
    fn into_response(self) -> Response {
        (self.0, Json(Refusal { message: self.1 })).into_response()
    }
}

type Said<T> = Result<T, No>;

impl Counter {
    /// Serve the operator at the socket in `dir`, without end.
    pub async fn serve(self, dir: PathBuf) {
        let router = Router::new()
            .route("/v1/workers/{worker}", get(details))
            .route("/v1/workers/{worker}/console", get(read_console))
            .route("/v1/workers/{worker}/destroy", post(destroy))
            .route("/v1/workers/{worker}/kill", post(kill))
            .route("/v1/drain", post(|state, by| drain_all(state, by, true)))
            .route("/v1/resume", post(|state, by| drain_all(state, by, false)))
            .route(
                "/v1/slots/{slot}/drain",
                post(|state, by, slot| drain_one(state, by, slot, true)),
            )
            .route(
                "/v1/slots/{slot}/resume",
                post(|state, by, slot| drain_one(state, by, slot, false)),
            )
            .route("/v1/reload", post(reload))
            .merge(public())
            .with_state(self);
        let listener = open(&dir).await;
        serve_operators(listener, router).await;
    }

    /// Serve what anybody may read at an address, by these names, without end.
    pub async fn serve_page(self, page: Arc<StatusPage>, names: Names) {
        page.serve(public().with_state(self), names).await;
    }

    async fn status(&self) -> Said<Status> {
        self.ask(Word::Status).await
    }

    async fn ask<T>(&self, word: impl FnOnce(oneshot::Sender<T>) -> Word) -> Said<T> {
        let stopping = || {
            No(
                StatusCode::SERVICE_UNAVAILABLE,
                "the supervisor is stopping".into(),
            )
        };
        let (answer, answered) = oneshot::channel();
        self.words.send(word(answer)).map_err(|_| stopping())?;
        answered.await.map_err(|_| stopping())
    }

    /// What a worker's processes have resident; where they cannot be seen, what their cgroup is charged with.
    fn memory(&self, worker: WorkerId, processes: &[Process]) -> u64 {
        match processes {
            [] => procs::charged(&self.cgroups, worker).unwrap_or(0),
            seen => procs::resident(seen),
        }
    }

    /// Done, or refused for a reason.
    async fn order(&self, refusal: StatusCode, word: impl FnOnce(Answer) -> Word) -> Said<StatusCode> {
        match self.ask(word).await? {
            Ok(()) => Ok(StatusCode::NO_CONTENT),
            Err(message) => Err(No(refusal, message)),
        }
    }
}

fn public() -> Router<Counter> {
    Router::new()
        .route("/", get(|| async { Html(page::PAGE) }))
        .route("/v1/status", get(status))
        .route("/metrics", get(metrics))
}

/// The helper makes the directory: until then there is nothing to do but to try again.
async fn open(dir: &Path) -> UnixListener {
    let path = dir.join(CONTROL_SOCKET);
    let mut said = false;
    loop {
        match listen(&path) {
            Ok(listener) => {
                tracing::info!(path = %path.display(), "control socket open");
                return listener;
            }
            Err(error) => {
                if !std::mem::replace(&mut said, true) {
                    tracing::warn!(
                        "no control socket at {} yet: {error}; the helper makes its directory when it starts",
                        path.display()
                    );
                }
                tokio::time::sleep(WAIT).await;
            }
        }
    }
}

/// Nobody else runs here (the store's lock sees to that), so what is there is an earlier life's.
fn listen(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = std::os::unix::net::UnixListener::bind(path)?;
    // The supervisor's user, its group, and root.
    fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

async fn status(State(counter): State<Counter>) -> Said<Json<Status>> {
    counter.status().await.map(Json)
}

async fn metrics(State(counter): State<Counter>) -> Said<Response> {
    let status = counter.status().await?;
    let mut memory_of: BTreeMap<SlotName, u64> = BTreeMap::new();
    for worker in &status.workers {
        let processes = worker.uid.map(procs::of).unwrap_or_default();
        let memory = counter.memory(worker.id, &processes);
        memory_of.insert(worker.slot.clone(), memory);
    }
    let text = counter.metrics.text(&status, &memory_of);
    Ok((
        [(
            header::CONTENT_TYPE,
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
        )],
        text,
    )
        .into_response())
}

async fn details(
    State(counter): State<Counter>,
    PathPart(worker): PathPart<WorkerId>,
) -> Said<Json<Details>> {
    let found = counter
        .status()
        .await?
        .workers
        .into_iter()
        .find(|w| w.id == worker);
    let found = found.ok_or_else(|| unknown(worker))?;
    let history = counter
        .history
        .of(worker)
        .map_err(|error| No(StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}")))?;
    // It is locked while it is being made or deleted, and may not be on the host at all.
    let console = timeout(PATIENCE, counter.helper.attach(worker)).await;
    let console = console.ok().and_then(Result::ok);
    let console = console.map(|console| last_lines(&console)).unwrap_or_default();
    let processes = found.uid.map(procs::of).unwrap_or_default();
    Ok(Json(Details {
        memory: counter.memory(worker, &processes),
        worker: found,
        history,
        processes,
        console,
    }))
}

fn last_lines(console: &File) -> Vec<String> {
    let lines = console::read(console).map(|read| read.lines).unwrap_or_default();
    let first = lines.len().saturating_sub(LAST_LINES);
    lines.into_iter().skip(first).collect()
}

fn unknown(worker: WorkerId) -> No {
    No(
        StatusCode::NOT_FOUND,
        format!("there is no worker {worker}: see `user-factory workers`"),
    )
}

#[derive(Deserialize)]
struct Follow {
    #[serde(default)]
    follow: bool,
}

/// The console as it was printed. Cleaning it is for who shows it on a terminal.
async fn read_console(
    State(counter): State<Counter>,
    PathPart(worker): PathPart<WorkerId>,
    Query(Follow { follow }): Query<Follow>,
) -> Said<Response> {
    let console = match counter.helper.attach(worker).await {
        Ok(console) => console,
        Err(helper::Error::Said(error)) => return Err(No(StatusCode::NOT_FOUND, error.to_string())),
        Err(error) => return Err(No(StatusCode::BAD_GATEWAY, error.to_string())),
    };
    let reader = Reader {
        counter,
        worker,
        console,
        at: 0,
        follow,
    };
    let body = Body::from_stream(stream::unfold(reader, Reader::next));
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], body).into_response())
}

struct Reader {
    counter: Counter,
    worker: WorkerId,
    console: File,
    at: u64,
    follow: bool,
}

impl Reader {
    async fn next(mut self) -> Option<(io::Result<Vec<u8>>, Reader)> {
        loop {
            // Whether it can go on is asked before it is read, so that the last bytes are not missed.
            let goes_on = self.follow && self.goes_on().await;
            let mut bytes = vec![0; 64 << 10];
            match self.console.read_at(&mut bytes, self.at) {
                Ok(0) if goes_on => tokio::time::sleep(LOOK).await,
                Ok(0) => return None,
                Ok(n) => {
                    bytes.truncate(n);
                    self.at += n as u64;
                    return Some((Ok(bytes), self));
                }
                Err(error) => {
                    return Some((
                        Err(error),
                        Reader {
                            follow: false,
                            at: u64::MAX,
                            ..self
                        },
                    ));
                }
            }
        }
    }

    /// May the worker's agent print more, as far as the core knows?
    async fn goes_on(&self) -> bool {
        let status = self.counter.status().await;
        let phase = |w: api::Worker| w.phase;
        let workers = status.map(|status| status.workers).unwrap_or_default();
        let phase = workers.into_iter().find(|w| w.id == self.worker).map(phase);
        phase.is_some_and(|phase| ["reserved", "created", "running", "online"].contains(&&*phase))
    }
}

async fn destroy(
    State(counter): State<Counter>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    PathPart(worker): PathPart<WorkerId>,
) -> Said<StatusCode> {
    let by = peer.operator()?;
    counter
        .order(StatusCode::NOT_FOUND, |answer| Word::Destroy {
            worker,
            by,
            answer,
        })
        .await
}

async fn kill(
    State(counter): State<Counter>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    PathPart(worker): PathPart<WorkerId>,
) -> Said<StatusCode> {
    let by = peer.operator()?;
    counter
        .order(StatusCode::NOT_FOUND, |answer| Word::Kill { worker, by, answer })
        .await
}

async fn drain_all(
    State(counter): State<Counter>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    drain: bool,
) -> Said<StatusCode> {
    let by = peer.operator()?;
    let word = |answer| Word::Drain {
        slot: None,
        drain,
        by,
        answer,
    };
    counter.order(StatusCode::CONFLICT, word).await
}

async fn drain_one(
    State(counter): State<Counter>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    PathPart(slot): PathPart<SlotName>,
    drain: bool,
) -> Said<StatusCode> {
    let by = peer.operator()?;
    let word = |answer| Word::Drain {
        slot: Some(slot),
        drain,
        by,
        answer,
    };
    counter.order(StatusCode::NOT_FOUND, word).await
}

/// Why the helper, which reads the same file and sees more of the host, would not start with the configuration. One that
/// is away says nothing: it is asked again by the first worker that it is to make.
pub async fn refused_by(helper: &Helper) -> Option<String> {
    match timeout(PATIENCE, helper.check()).await {
        Ok(Err(helper::Error::Said(error))) if error.kind == ErrorKind::Refused => Some(error.to_string()),
        _ => None,
    }
}

async fn reload(State(counter): State<Counter>, ConnectInfo(peer): ConnectInfo<Peer>) -> Said<StatusCode> {
    let by = peer.operator()?;
    let refused = refused_by(&counter.helper).await;
    let word = |answer| Word::Reload { by, refused, answer };
    counter.order(StatusCode::UNPROCESSABLE_ENTITY, word).await
}
