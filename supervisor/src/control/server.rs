//! The control socket and the status address: HTTP requests become commands of the loop.

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
use tokio::sync::{Mutex, oneshot};
use tokio::time::timeout;

use super::api::{self, Details, EgressReport, ErrorBody, Process, Status, Step};
use super::listener::{Names, StatusPage, serve_operators};
use super::metrics::Metrics;
use super::processes;
use super::state::{Command, CommandQueue, Operator, ReplySender};
use super::status::time;
use crate::console;
use crate::egress_records::EgressRecords;
use crate::factory::drain::Drain;
use crate::helper_client::{self, HelperClient};
use crate::store::History;

/// How often a followed console is read.
const CONSOLE_INTERVAL: Duration = Duration::from_millis(300);
/// How often binding the socket is tried, until the helper has made its directory.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// How long a worker's details wait for its console.
const HELPER_TIMEOUT: Duration = Duration::from_secs(2);
/// The page that shows the status: one file, without anything from elsewhere. It asks for `/v1/status` itself, every two
/// seconds.
const PAGE: &str = include_str!("page.html");
/// Characters of a drain's reason.
const MAX_REASON: usize = 200;
/// Characters of what a self-test says did not hold.
const MAX_FAILURE: usize = 1000;
/// Lines of the console in a worker's details.
const LAST_LINES: usize = 20;

/// All that the handlers need.
#[derive(Clone, Debug)]
pub struct ControlServer {
    /// To the loop, which carries them out in order.
    pub commands: CommandQueue,
    /// For consoles.
    pub helper_client: HelperClient,
    /// For a worker's phases.
    pub history: Arc<History>,
    /// For `/metrics`.
    pub metrics: Arc<Metrics>,
    /// Where the helper says where the workers' cgroups are.
    pub cgroups: PathBuf,
    /// What jobs have connected to.
    pub egress: Arc<EgressRecords>,
    /// Whose status request the loop has: one at a time.
    pub status_turn: StatusTurn,
}

/// One request for the status at a time is in the queue of commands. A client that goes without its answer keeps its
/// turn until the loop has answered: with many such clients, the loop would have nothing else to do.
#[derive(Clone, Debug, Default)]
pub struct StatusTurn(Arc<Mutex<()>>);

impl StatusTurn {
    async fn ask(&self, commands: CommandQueue) -> ApiResult<Status> {
        let turn = self.0.clone().lock_owned().await;
        let asked = tokio::spawn(async move {
            let _turn = turn;
            ask(&commands, Command::Status).await
        });
        asked.await.map_err(|_| is_stopping())?
    }
}

/// Who connected to the control socket. None where the kernel does not say.
#[derive(Clone, Copy, Debug)]
pub(super) struct PeerUid(pub(super) Option<u32>);

impl PeerUid {
    /// # Errors
    /// Where the kernel does not say who it is: a command is logged with its operator.
    fn operator(self) -> ApiResult<Operator> {
        let unknown = || {
            ApiError(
                StatusCode::FORBIDDEN,
                "the kernel does not say who connected: repeat it".into(),
            )
        };
        self.0.map(Operator::Uid).ok_or_else(unknown)
    }
}

/// An answer that is not the one asked for: its status, and one sentence.
struct ApiError(StatusCode, String);

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.0, Json(ErrorBody { message: self.1 })).into_response()
    }
}

type ApiResult<T> = Result<T, ApiError>;

impl ControlServer {
    /// Serve the operator at the socket in `dir`, without end.
    pub async fn serve(self, dir: PathBuf) {
        let router = Router::new()
            .route("/v1/workers/{worker}", get(details))
            .route("/v1/workers/{worker}/console", get(read_console))
            .route("/v1/workers/{worker}/destroy", post(destroy))
            .route("/v1/workers/{worker}/kill", post(kill))
            .route("/v1/drain", post(|state, by, body| drain(state, by, None, body)))
            .route("/v1/resume", post(|state, by| resume(state, by, None)))
            .route(
                "/v1/slots/{slot}/drain",
                post(|state, by, PathPart(slot), body| drain(state, by, Some(slot), body)),
            )
            .route(
                "/v1/slots/{slot}/resume",
                post(|state, by, PathPart(slot)| resume(state, by, Some(slot))),
            )
            .route("/v1/slots/{slot}/egress", get(egress))
            .route("/v1/selftest", post(selftest))
            .route("/v1/host-stops", post(host_stops))
            .route("/v1/reload", post(reload))
            .merge(public())
            .with_state(self);
        let listener = open(&dir).await;
        serve_operators(listener, router).await;
    }

    /// Serve what everybody may read at an address, by these names, without end.
    pub async fn serve_page(mut self, page: Arc<StatusPage>, names: Names) {
        // The operator's own requests do not wait for everybody's.
        self.status_turn = StatusTurn::default();
        page.serve(public().with_state(self), names).await;
    }

    async fn status(&self) -> ApiResult<Status> {
        self.status_turn.ask(self.commands.clone()).await
    }

    /// What a worker's processes have resident; where they cannot be seen, what their cgroup is charged with.
    fn memory(&self, worker: WorkerId, processes: &[Process]) -> u64 {
        match processes {
            [] => processes::charged_bytes(&self.cgroups, worker).unwrap_or(0),
            seen => processes::resident_bytes(seen),
        }
    }

    /// Pass a command to the loop: done, or refused for a reason.
    async fn command(
        &self,
        refusal: StatusCode,
        command: impl FnOnce(ReplySender) -> Command,
    ) -> ApiResult<StatusCode> {
        match ask(&self.commands, command).await? {
            Ok(()) => Ok(StatusCode::NO_CONTENT),
            Err(message) => Err(ApiError(refusal, message)),
        }
    }
}

fn is_stopping() -> ApiError {
    ApiError(
        StatusCode::SERVICE_UNAVAILABLE,
        "the supervisor is stopping".into(),
    )
}

/// Pass a command to the loop, and wait for what it answers.
async fn ask<T>(
    commands: &CommandQueue,
    command: impl FnOnce(oneshot::Sender<T>) -> Command,
) -> ApiResult<T> {
    let (answer, answered) = oneshot::channel();
    commands.send(command(answer)).map_err(|_| is_stopping())?;
    answered.await.map_err(|_| is_stopping())
}

fn public() -> Router<ControlServer> {
    Router::new()
        .route("/", get(|| async { Html(PAGE) }))
        .route("/v1/status", get(status))
        .route("/metrics", get(metrics))
}

/// The helper makes the directory: until then there is nothing to do but to try again.
async fn open(dir: &Path) -> UnixListener {
    let path = dir.join(CONTROL_SOCKET);
    let mut logged = false;
    loop {
        match listen(&path) {
            Ok(listener) => {
                tracing::info!(path = %path.display(), "control socket open");
                return listener;
            }
            Err(error) => {
                if !std::mem::replace(&mut logged, true) {
                    tracing::warn!(
                        "no control socket at {} yet: {error}; the helper makes its directory when it starts",
                        path.display()
                    );
                }
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
        }
    }
}

/// No other supervisor runs (the store's lock ensures that): a socket that is there is left by an earlier one.
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

async fn status(State(server): State<ControlServer>) -> ApiResult<Json<Status>> {
    server.status().await.map(Json)
}

async fn metrics(State(server): State<ControlServer>) -> ApiResult<Response> {
    let status = server.status().await?;
    let mut memory_of: BTreeMap<SlotName, u64> = BTreeMap::new();
    for worker in &status.workers {
        let processes = worker.uid.map(processes::read_processes).unwrap_or_default();
        let memory = server.memory(worker.id, &processes);
        memory_of.insert(worker.slot.clone(), memory);
    }
    let text = server.metrics.text(&status, &memory_of);
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
    State(server): State<ControlServer>,
    PathPart(worker): PathPart<WorkerId>,
) -> ApiResult<Json<Details>> {
    let found = server
        .status()
        .await?
        .workers
        .into_iter()
        .find(|w| w.id == worker);
    let found = found.ok_or_else(|| unknown(worker))?;
    let history = server
        .history
        .of(worker)
        .map_err(|error| ApiError(StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}")))?;
    let history = history.into_iter().map(|change| Step {
        at: time(change.at),
        phase: change.phase,
        note: change.note,
    });
    // It is locked while it is being made or deleted, and may not be on the host at all.
    let console = timeout(HELPER_TIMEOUT, server.helper_client.attach(worker)).await;
    let console = console.ok().and_then(Result::ok);
    let console = console.map(|console| last_lines(&console)).unwrap_or_default();
    let processes = found.uid.map(processes::read_processes).unwrap_or_default();
    Ok(Json(Details {
        memory: server.memory(worker, &processes),
        egress: server.egress.of_worker(found.id),
        worker: found,
        history: history.collect(),
        processes,
        console,
    }))
}

/// What recent jobs of a slot have connected to.
async fn egress(
    State(server): State<ControlServer>,
    PathPart(slot): PathPart<SlotName>,
) -> ApiResult<Json<EgressReport>> {
    let report = server.egress.of_slot(&slot);
    report.map(Json).ok_or_else(|| {
        ApiError(
            StatusCode::NOT_FOUND,
            format!("there is no slot {slot} without the host's network: set network = {{ audit = true }} in [slots.{slot}]"),
        )
    })
}

fn last_lines(console: &File) -> Vec<String> {
    let lines = console::read(console).map(|read| read.lines).unwrap_or_default();
    let first = lines.len().saturating_sub(LAST_LINES);
    lines.into_iter().skip(first).collect()
}

fn unknown(worker: WorkerId) -> ApiError {
    ApiError(
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
    State(server): State<ControlServer>,
    PathPart(worker): PathPart<WorkerId>,
    Query(Follow { follow }): Query<Follow>,
) -> ApiResult<Response> {
    let console = match server.helper_client.attach(worker).await {
        Ok(console) => console,
        Err(helper_client::Error::Refused(error)) => {
            return Err(ApiError(StatusCode::NOT_FOUND, error.to_string()));
        }
        Err(error) => return Err(ApiError(StatusCode::BAD_GATEWAY, error.to_string())),
    };
    let reader = Reader {
        server,
        worker,
        console,
        at: 0,
        follow,
    };
    let body = Body::from_stream(stream::unfold(reader, Reader::next));
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], body).into_response())
}

struct Reader {
    server: ControlServer,
    worker: WorkerId,
    console: File,
    at: u64,
    follow: bool,
}

impl Reader {
    async fn next(mut self) -> Option<(io::Result<Vec<u8>>, Reader)> {
        loop {
            // Whether it can go on is asked before it is read, so that the last bytes are not missed.
            let may_print_more = self.follow && self.may_print_more().await;
            let mut bytes = vec![0; 64 << 10];
            match self.console.read_at(&mut bytes, self.at) {
                Ok(0) if may_print_more => tokio::time::sleep(CONSOLE_INTERVAL).await,
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
    async fn may_print_more(&self) -> bool {
        let status = self.server.status().await;
        let phase = |w: api::Worker| w.phase;
        let workers = status.map(|status| status.workers).unwrap_or_default();
        let phase = workers.into_iter().find(|w| w.id == self.worker).map(phase);
        phase.is_some_and(|phase| ["reserved", "created", "running", "online"].contains(&&*phase))
    }
}

async fn destroy(
    State(server): State<ControlServer>,
    ConnectInfo(peer): ConnectInfo<PeerUid>,
    PathPart(worker): PathPart<WorkerId>,
) -> ApiResult<StatusCode> {
    let by = peer.operator()?;
    server
        .command(StatusCode::NOT_FOUND, |answer| Command::Destroy {
            worker,
            by,
            answer,
        })
        .await
}

async fn kill(
    State(server): State<ControlServer>,
    ConnectInfo(peer): ConnectInfo<PeerUid>,
    PathPart(worker): PathPart<WorkerId>,
) -> ApiResult<StatusCode> {
    let by = peer.operator()?;
    server
        .command(StatusCode::NOT_FOUND, |answer| Command::Kill {
            worker,
            by,
            answer,
        })
        .await
}

/// A text that comes with a command is shown on terminals.
fn check_line(what: &str, text: Option<&str>, max: usize) -> ApiResult<()> {
    let is_good =
        |text: &str| (1..=max).contains(&text.chars().count()) && !text.chars().any(char::is_control);
    if text.is_none_or(is_good) {
        return Ok(());
    }
    Err(ApiError(
        StatusCode::BAD_REQUEST,
        format!("{what} must have 1 to {max} characters in one line: write another"),
    ))
}

/// Take no jobs until the supervisor starts again.
async fn host_stops(
    State(server): State<ControlServer>,
    ConnectInfo(peer): ConnectInfo<PeerUid>,
) -> ApiResult<StatusCode> {
    let by = peer.operator()?;
    server
        .command(StatusCode::INTERNAL_SERVER_ERROR, |answer| Command::HostStops {
            by,
            answer,
        })
        .await
}

async fn selftest(
    State(server): State<ControlServer>,
    ConnectInfo(peer): ConnectInfo<PeerUid>,
    Json(api::SelfTest { failure, .. }): Json<api::SelfTest>,
) -> ApiResult<StatusCode> {
    let by = peer.operator()?;
    check_line("what a self-test says", failure.as_deref(), MAX_FAILURE)?;
    let command = |answer| Command::SelfTested { failure, by, answer };
    server.command(StatusCode::CONFLICT, command).await
}

async fn drain(
    state: State<ControlServer>,
    peer: ConnectInfo<PeerUid>,
    slot: Option<SlotName>,
    body: Option<Json<api::Drain>>,
) -> ApiResult<StatusCode> {
    let Json(body) = body.unwrap_or_default();
    check_line("the reason of a drain", body.reason.as_deref(), MAX_REASON)?;
    let until = body
        .until
        .map(|end| u64::try_from(end.as_millisecond()).unwrap_or(0));
    let drain = Drain {
        reason: body.reason,
        until,
    };
    set_drain(state, peer, slot, Some(drain)).await
}

async fn resume(
    state: State<ControlServer>,
    peer: ConnectInfo<PeerUid>,
    slot: Option<SlotName>,
) -> ApiResult<StatusCode> {
    set_drain(state, peer, slot, None).await
}

async fn set_drain(
    State(server): State<ControlServer>,
    ConnectInfo(peer): ConnectInfo<PeerUid>,
    slot: Option<SlotName>,
    drain: Option<Drain>,
) -> ApiResult<StatusCode> {
    let by = peer.operator()?;
    let refusal = match slot {
        Some(_) => StatusCode::NOT_FOUND,
        None => StatusCode::CONFLICT,
    };
    let command = |answer| Command::Drain {
        slot,
        drain,
        by,
        answer,
    };
    server.command(refusal, command).await
}

/// Why the helper, which reads the same file and sees more of the host, would not start with the configuration. One that
/// is unreachable says nothing: it is asked again by the first worker that it is to make.
pub async fn refused_by(helper_client: &HelperClient) -> Option<String> {
    match timeout(HELPER_TIMEOUT, helper_client.check()).await {
        Ok(Err(helper_client::Error::Refused(error))) if error.kind == ErrorKind::Refused => {
            Some(error.to_string())
        }
        _ => None,
    }
}

async fn reload(
    State(server): State<ControlServer>,
    ConnectInfo(peer): ConnectInfo<PeerUid>,
) -> ApiResult<StatusCode> {
    let by = peer.operator()?;
    let refused = refused_by(&server.helper_client).await;
    let command = |answer| Command::Reload { by, refused, answer };
    server.command(StatusCode::UNPROCESSABLE_ENTITY, command).await
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn clients_that_do_not_wait_for_their_answer_leave_one_request_in_the_queue() {
        let (queue, mut commands) = mpsc::unbounded_channel();
        let turn = StatusTurn::default();
        for _ in 0..100 {
            let asked = tokio::spawn({
                let (turn, queue) = (turn.clone(), queue.clone());
                async move { turn.ask(queue).await.is_ok() }
            });
            tokio::task::yield_now().await;
            asked.abort();
            let _ = asked.await;
        }
        let Some(Command::Status(answer)) = commands.recv().await else {
            panic!("the first was asked")
        };
        assert!(commands.is_empty());
        // With its answer it is the next one's turn.
        drop(answer);
        let next = tokio::spawn(async move { turn.ask(queue).await.is_ok() });
        assert!(matches!(commands.recv().await, Some(Command::Status(_))));
        assert!(!next.await.unwrap());
    }
}
