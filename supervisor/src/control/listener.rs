//! Accepts connections and speaks HTTP on them, within bounds: how many there may be, how long a request may take to
//! arrive, and how much of it is kept. Each listener has a budget of descriptors of its own (see [`crate::descriptors`]).

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{ConnectInfo, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use jiff::Timestamp;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use super::api::{ErrorBody, PeerStatus};
use super::server::PeerUid;
use crate::descriptors::{CONTROL_CONNECTIONS, STATUS_CONNECTIONS};
use crate::limiter::ConnectionLimiter;
use crate::rate_limited_log::RateLimitedLog;

/// How long a request's head may take to arrive, and how long a connection may wait for the next request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection to the status page may last in all: its one answer is short.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(30);
/// What is kept of a request's head, in bytes.
const MAX_HEAD: usize = 16 << 10;
/// Connections of one user to the control socket.
const CONNECTIONS_OF_A_USER: usize = 32;
/// How soon it is tried again to listen, or to accept.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Speak HTTP/1 on this connection, to its end.
async fn serve_http(io: impl AsyncRead + AsyncWrite + Unpin, router: Router, keep_alive: bool) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .keep_alive(keep_alive);
    let served = http.serve_connection(TokioIo::new(io), TowerToHyperService::new(router));
    if let Err(error) = served.await {
        tracing::trace!("a connection of a client has ended: {error}");
    }
}

/// Serve operators at the control socket, without end. Consoles are followed for as long as a job runs, so that only the
/// number of connections is bounded: of each user, and of all. Root has its own.
pub(super) async fn serve_operators(listener: UnixListener, router: Router) {
    let others = CONTROL_CONNECTIONS - CONNECTIONS_OF_A_USER;
    let others = ConnectionLimiter::new(CONNECTIONS_OF_A_USER, others, others / CONNECTIONS_OF_A_USER);
    let root = ConnectionLimiter::new(CONNECTIONS_OF_A_USER, CONNECTIONS_OF_A_USER, 1);
    let log = RateLimitedLog::default();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                log.warn(format_args!("the control socket cannot accept: {error}"));
                sleep(RETRY_INTERVAL).await;
                continue;
            }
        };
        let peer = PeerUid(stream.peer_cred().ok().map(|peer| peer.uid()));
        let uid = peer.0.unwrap_or(u32::MAX);
        let limiter = if uid == 0 { &root } else { &others };
        let Some(permit) = limiter.take(uid) else {
            log.warn(format_args!(
                "the control socket has closed a connection of uid {uid}: it has too many connections"
            ));
            continue;
        };
        let router = router.clone().layer(Extension(ConnectInfo(peer)));
        tokio::spawn(async move {
            serve_http(stream, router, true).await;
            drop(permit);
        });
    }
}

/// Whether there is a listener at `factory.status_address`, and since when.
#[derive(Debug)]
pub struct StatusPage {
    address: SocketAddr,
    state: Mutex<(Instant, Result<(), String>)>,
}

impl StatusPage {
    /// Not listened at yet.
    pub fn new(address: SocketAddr) -> StatusPage {
        let why = Err("it has not been tried yet".to_owned());
        StatusPage {
            address,
            state: Mutex::new((Instant::now(), why)),
        }
    }

    /// `now` is the time by which all of the status is shown.
    pub fn shown(&self, now: Timestamp) -> PeerStatus {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        PeerStatus {
            address: self.address.to_string(),
            reachable: Some(state.1.is_ok()),
            since: now.checked_sub(state.0.elapsed()).unwrap_or(now),
            trouble: state.1.clone().err(),
            unanswered_since: None,
        }
    }

    /// True where this is another state than before.
    fn set(&self, new: Result<(), String>) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.1 == new {
            return false;
        }
        *state = (Instant::now(), new);
        true
    }

    /// Listen, as soon as the address is free.
    async fn listen(&self) -> TcpListener {
        loop {
            match TcpListener::bind(self.address).await {
                Ok(listener) => {
                    self.set(Ok(()));
                    tracing::info!(address = %self.address, "status page open");
                    return listener;
                }
                Err(error) => {
                    if self.set(Err(error.to_string())) {
                        tracing::error!(
                            "cannot listen at factory.status_address {}: {error}; it is tried again until it can be: \
                             end who listens there, or name another address and restart",
                            self.address
                        );
                    }
                    sleep(RETRY_INTERVAL).await;
                }
            }
        }
    }

    /// Serve all clients that reach the address, without end. Where there are too many connections, the oldest is closed:
    /// a request that arrives at once is answered long before its connection is.
    pub(super) async fn serve(&self, router: Router, names: Names) {
        let router = router.layer(middleware::from_fn_with_state(Arc::new(names), check_host));
        let listener = self.listen().await;
        let log = RateLimitedLog::default();
        let permits = Arc::new(Semaphore::new(STATUS_CONNECTIONS));
        let mut connections = VecDeque::new();
        loop {
            let stream: TcpStream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    log.warn(format_args!("the status page cannot accept: {error}"));
                    sleep(RETRY_INTERVAL).await;
                    continue;
                }
            };
            connections.retain(|connection: &tokio::task::AbortHandle| !connection.is_finished());
            if permits.available_permits() == 0
                && let Some(oldest) = connections.pop_front()
            {
                oldest.abort();
                log.warn(format_args!(
                    "the status page has closed its oldest connection: there are {STATUS_CONNECTIONS}"
                ));
            }
            // An aborted connection is closed when the runtime gets to it.
            let Ok(permit) = permits.clone().acquire_owned().await else {
                return;
            };
            let router = router.clone();
            let serve = async move {
                let _ = timeout(CONNECTION_TIMEOUT, serve_http(stream, router, false)).await;
                drop(permit);
            };
            connections.push_back(tokio::spawn(serve).abort_handle());
        }
    }
}

/// The names by which a request may call this host. An address needs no name: a foreign page, in a browser that
/// can reach this host, has a name, and may let it lead here (DNS rebinding).
#[derive(Debug)]
pub struct Names(Vec<String>);

impl Names {
    /// `localhost`, the name of this host, and these.
    pub fn new<'a>(others: impl IntoIterator<Item = &'a str>) -> Names {
        let uname = nix::sys::utsname::uname().ok();
        let own = uname.and_then(|uname| Some(uname.nodename().to_str()?.to_owned()));
        let mut names: Vec<String> = own.into_iter().collect();
        names.extend(others.into_iter().map(str::to_owned));
        names.push("localhost".into());
        Names(names)
    }

    /// Is this, of a `Host` field or a URI, this host?
    fn has(&self, host: &str) -> bool {
        let name = match host.strip_prefix('[') {
            Some(rest) => {
                return rest
                    .split(']')
                    .next()
                    .is_some_and(|ip| ip.parse::<IpAddr>().is_ok());
            }
            None => host.split(':').next().unwrap_or_default(),
        };
        let name = name.trim_end_matches('.');
        name.parse::<IpAddr>().is_ok() || self.0.iter().any(|own| own.eq_ignore_ascii_case(name))
    }
}

async fn check_host(State(names): State<Arc<Names>>, request: Request, next: Next) -> Response {
    let in_uri = request.uri().host().map(|host| Ok(host.to_owned()));
    let fields = request.headers().get_all(header::HOST).iter();
    let fields = fields.map(|field| field.to_str().map(str::to_owned));
    for host in in_uri.into_iter().chain(fields) {
        let known = host.as_ref().is_ok_and(|host| names.has(host));
        if !known {
            let name = host.unwrap_or_default();
            let message = format!(
                "this is not {name:.100?}: ask by address, or add the name to factory.status_names and restart the supervisor"
            );
            return (StatusCode::MISDIRECTED_REQUEST, Json(ErrorBody { message })).into_response();
        }
    }
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_may_call_this_host_by_its_names_and_addresses_alone() {
        let names = Names::new(["ci-1.example.com"]);
        for host in [
            "localhost",
            "LOCALHOST:9464",
            "ci-1.example.com:9464",
            "ci-1.example.com.",
            "127.0.0.1",
            "192.0.2.7:80",
            "[::1]:9464",
            "[2001:db8::1]",
        ] {
            assert!(names.has(host), "{host}");
        }
        for host in [
            "",
            "evil.example",
            "localhost.evil.example",
            "ci-1.example.com.evil.example:9464",
            "127.0.0.1.evil.example",
            "[evil.example]",
            "example.com",
        ] {
            assert!(!names.has(host), "{host}");
        }
    }
}
