//! The HTTP proxy of a job: CONNECT, and requests for `http://` URLs (RFC 9110, 7.6 and 9.3.6; RFC 9112, 3.2).

use std::convert::Infallible;
use std::future::pending;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::http::header::InvalidHeaderValue;
use axum::http::uri::{PathAndQuery, Uri};
use axum::http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version, header,
};
use futures_util::StreamExt;
use hyper::body::{Body as _, Incoming};
use hyper::service::service_fn;
use hyper::upgrade::Upgraded;
use hyper_util::rt::{TokioIo, TokioTimer};
use protocol::WorkerId;
use protocol::config::Destination;
use tokio::net::TcpStream;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use super::EgressProxy;
use super::destination::ConnectError;
use super::untrusted::{UntrustedTcpStream, Watch};
use super::workers::WorkerGone;
use crate::egress_records::JobEgress;
use crate::limiter::Permit;

/// The largest head of a request or an answer, in bytes.
const MAX_HEAD: usize = 64 << 10;

/// One connection of a job to its proxy.
struct Client {
    proxy: Arc<EgressProxy>,
    job: JobEgress,
    uid: u32,
    /// Forwards the one request of this connection to its server.
    request: Mutex<Option<AbortHandle>>,
    /// The permits of this connection, which counts as one of its worker's until the last byte has gone.
    _permits: [Permit<WorkerId>; 2],
    /// The permit for a destination, once the connection leads to a host.
    destination: Mutex<Option<Permit<WorkerId>>>,
    gone: WorkerGone,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serve a connection to its end: one request, or one tunnel, so that it has one connection to a server.
pub(super) async fn serve(
    proxy: Arc<EgressProxy>,
    job: JobEgress,
    uid: u32,
    permits: [Permit<WorkerId>; 2],
    stream: UntrustedTcpStream,
    mut gone: WorkerGone,
) {
    let (watch, idle, peer_timeout) = (stream.watch(), proxy.half_closed, proxy.peer_timeout);
    let client = Arc::new(Client {
        proxy,
        job,
        uid,
        request: Mutex::default(),
        _permits: permits,
        destination: Mutex::default(),
        gone: gone.clone(),
    });
    let service = service_fn(|request| {
        let client = client.clone();
        async move { Ok::<_, Infallible>(client.answer(request).await.unwrap_or_else(|refusal| refusal)) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(false)
        .header_read_timeout(peer_timeout)
        .max_buf_size(MAX_HEAD)
        .preserve_header_case(true)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut served = pin!(served);
    tokio::select! {
        served = &mut served => if let Err(error) = served {
            tracing::debug!(uid, "a connection to the HTTP proxy has broken: {error}");
            watch.break_off();
        },
        () = wait_until_left(&watch, idle) => tracing::debug!(uid, "a job has left its connection to the HTTP proxy"),
        () = gone.wait() => tracing::debug!(uid, "a connection to the HTTP proxy has ended with its worker"),
    }
    // Its server may take no more of it, and then nothing else ends it.
    if let Some(request) = lock(&client.request).take() {
        request.abort();
    }
}

/// Until the job has ended its side for so long: hyper does not see that while a server keeps it from reading. One that is
/// gone without a FIN is found by probes, see [`keep_alive`](super::untrusted::keep_alive).
async fn wait_until_left(watch: &Watch, idle: Duration) {
    let mut before = false;
    loop {
        sleep(idle).await;
        match watch.is_ended() {
            Some(true) if before => return,
            Some(now) => before = now,
            None => return pending().await,
        }
    }
}

impl Client {
    /// What the job gets. The error is an answer as well, of the proxy's own.
    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Result<Response<Body>, Response<Body>> {
        let (to, server) = match self.connect_for(&request).await {
            Ok(connected) => connected,
            Err(refusal) => {
                discard(request, self.proxy.peer_timeout);
                return Err(refusal);
            }
        };
        if request.method() == Method::CONNECT {
            tokio::spawn(async move {
                match hyper::upgrade::on(request).await {
                    Ok(upgraded) => self.tunnel(upgraded, server).await,
                    Err(error) => tracing::debug!("a tunnel was not begun: {error}"),
                }
            });
            return Ok(Response::new(Body::empty()));
        }
        let broken = |error: hyper::Error| {
            error_response(StatusCode::BAD_GATEWAY, &format!("{to} has broken off: {error}"))
        };
        let request = for_the_server(request)
            .map_err(|_| error_response(StatusCode::BAD_REQUEST, "the host of that URL is no host"))?;
        let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
            .max_buf_size(MAX_HEAD)
            .preserve_header_case(true)
            .handshake(TokioIo::new(server))
            .await
            .map_err(broken)?;
        let task = tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!("a connection of the HTTP proxy has broken: {error}");
            }
        });
        *lock(&self.request) = Some(task.abort_handle());
        let answer = sender.send_request(request).await.map_err(broken)?;
        let (mut head, body) = answer.into_parts();
        remove_hop_by_hop(&mut head.headers);
        Ok(Response::from_parts(head, Body::new(body)))
    }

    /// Where a request is for, and a connection to it. The error is an answer of the proxy's own.
    async fn connect_for(
        &self,
        request: &Request<Incoming>,
    ) -> Result<(Destination, TcpStream), Response<Body>> {
        let to = destination(request.method(), request.uri())
            .map_err(|why| error_response(StatusCode::BAD_REQUEST, &why))?;
        let Some(permit) = self.proxy.destination_of(self.job.worker).await else {
            self.proxy.metrics.count_connection(&self.job.slot, "refused");
            return Err(error_response(
                StatusCode::SERVICE_UNAVAILABLE,
                &format!(
                    "no connection to {to}: this job has too many to other hosts than the buildomat server"
                ),
            ));
        };
        *lock(&self.destination) = Some(permit);
        let server = self.proxy.connect(self.uid, &self.job, &to).await;
        let server = server.map_err(|error| match error {
            ConnectError::Refused { why, .. } => {
                error_response(StatusCode::FORBIDDEN, &format!("egress refused: {why}"))
            }
            ConnectError::Failed(error) => error_response(
                StatusCode::BAD_GATEWAY,
                &format!("cannot connect to {to}: {error}"),
            ),
        })?;
        Ok((to, server))
    }

    /// Forward bytes, of which the job may have sent some already.
    async fn tunnel(&self, upgraded: Upgraded, server: TcpStream) {
        let parts = match upgraded.downcast::<TokioIo<UntrustedTcpStream>>() {
            Ok(parts) => parts,
            Err(_) => return tracing::error!("a tunnel of the HTTP proxy is no connection of a job's"),
        };
        let (job, gone) = (parts.io.into_inner(), self.gone.clone());
        self.proxy
            .forward(self.uid, job, server, &parts.read_buf, gone)
            .await;
    }
}

/// Read what else there is of a request that is refused, for so long: to close a connection of which something is unread
/// breaks it off, and the job may lose the answer (RFC 9112, 9.6). Who waits for `100 Continue` sends nothing more.
fn discard(request: Request<Incoming>, limit: Duration) {
    if request.headers().contains_key(header::EXPECT) {
        return;
    }
    let mut rest = Body::new(request.into_body()).into_data_stream();
    tokio::spawn(timeout(limit, async move {
        while rest.next().await.is_some_and(|piece| piece.is_ok()) {}
    }));
}

/// Where a request is for. The error says what is wrong with it.
fn destination(method: &Method, uri: &Uri) -> Result<Destination, String> {
    let authority = uri
        .authority()
        .ok_or("this is an HTTP proxy: ask it for a whole URL, http://HOST/PATH")?;
    let default = match (method == Method::CONNECT, uri.scheme_str()) {
        (true, None) => None,
        (false, Some("http")) => Some(80),
        _ => return Err("this proxy takes CONNECT HOST:PORT, and URLs that begin with http://".into()),
    };
    if authority.as_str().contains('@') {
        return Err("this proxy takes no user in a URL".into());
    }
    // What stands there counts, and not what of it can be understood.
    let port = match (&authority.as_str()[authority.host().len()..], default) {
        ("", Some(port)) => port.to_string(),
        ("", None) => return Err("a port is missing: ask for CONNECT HOST:PORT".into()),
        (port, _) => port.trim_start_matches(':').to_owned(),
    };
    let host = authority.host();
    let host = host.strip_suffix('.').unwrap_or(host);
    if host.starts_with("*.") {
        return Err(format!("{host} is no host"));
    }
    format!("{host}:{port}").parse()
}

/// The request as the server gets it: for a path, with the host that the URL named (RFC 9112, 3.2.2). Its length is told
/// anew, from what was understood of it.
fn for_the_server(request: Request<Incoming>) -> Result<Request<Incoming>, InvalidHeaderValue> {
    let (mut head, body) = request.into_parts();
    // hyper tells no length of a body that is empty, which some servers want of a POST.
    let has_length = head.headers.contains_key(header::CONTENT_LENGTH);
    let authority = head.uri.authority().map_or("", |authority| authority.as_str());
    let host = HeaderValue::from_str(authority)?;
    let path = head.uri.path_and_query().cloned();
    head.uri = Uri::from(path.unwrap_or(PathAndQuery::from_static("/")));
    remove_hop_by_hop(&mut head.headers);
    head.headers.remove(header::CONTENT_LENGTH);
    if has_length && body.is_end_stream() {
        head.headers
            .insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
    }
    head.headers.insert(header::HOST, host);
    head.version = Version::HTTP_11;
    Ok(Request::from_parts(head, body))
}

/// Remove what is said to the next hop alone (RFC 9110, 7.6.1).
fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    let usual = [
        header::CONNECTION,
        HeaderName::from_static("keep-alive"),
        HeaderName::from_static("proxy-connection"),
        header::PROXY_AUTHENTICATE,
        header::PROXY_AUTHORIZATION,
        header::TE,
        header::TRAILER,
        header::TRANSFER_ENCODING,
        header::UPGRADE,
    ];
    for name in named.into_iter().chain(usual) {
        headers.remove(name);
    }
}

/// An answer of the proxy's own.
fn error_response(status: StatusCode, sentence: &str) -> Response<Body> {
    let mut answer = Response::new(Body::from(format!("{sentence}\n")));
    *answer.status_mut() = status;
    answer.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_for_the_host_and_port_of_its_target() {
        for (method, uri, expected) in [
            ("CONNECT", "example.com:443", Ok("example.com:443")),
            ("CONNECT", "Example.COM.:443", Ok("example.com:443")),
            ("CONNECT", "[2001:db8::1]:443", Ok("[2001:db8::1]:443")),
            ("GET", "http://example.com/a?b", Ok("example.com:80")),
            ("GET", "http://example.com:8080", Ok("example.com:8080")),
            ("CONNECT", "example.com", Err("port is missing")),
            ("CONNECT", "http://example.com:443/", Err("takes CONNECT")),
            ("GET", "https://example.com/", Err("takes CONNECT")),
            ("GET", "/path", Err("a whole URL")),
            ("GET", "http://user@example.com/", Err("no user")),
            ("CONNECT", "example.com:0", Err("from 1 to 65535")),
            ("GET", "http://example.com:99999/", Err("from 1 to 65535")),
            ("GET", "http://example.com:/", Err("from 1 to 65535")),
            ("GET", "http://example.com:+80/", Err("from 1 to 65535")),
            ("GET", "http://[2001:db8::1]/", Ok("[2001:db8::1]:80")),
            ("CONNECT", "*.example.com:443", Err("is no host")),
            ("CONNECT", "localhost:443", Err("the job itself")),
        ] {
            let found = match uri.parse::<Uri>() {
                Ok(uri) => destination(&method.parse().unwrap(), &uri),
                Err(error) => Err(error.to_string()),
            };
            match (found, expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found.to_string(), expected),
                (Err(why), Err(part)) => assert!(why.contains(part), "{uri}: {why}"),
                (found, _) => panic!("{method} {uri}: {found:?}"),
            }
        }
    }

    #[test]
    fn what_is_for_the_next_hop_alone_goes_and_all_that_is_named_with_it() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, x-Mine"),
            ("connection", "te"),
            ("x-mine", "1"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "websocket"),
            ("proxy-authorization", "Basic x"),
            ("accept", "*/*"),
        ] {
            headers.append(name.parse::<HeaderName>().unwrap(), value.parse().unwrap());
        }
        remove_hop_by_hop(&mut headers);
        let left: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(left, ["accept"]);
    }
}
