//! The egress proxy, for jobs whose slot has not the host's network: to the buildomat server, and to what
//! `network.allow` names.
//!
//! Pid 1 of such a worker accepts the TCP connections that are made in the job's network namespace to the server's port, to a
//! destination of the slot, or to the job's HTTP proxy. It sends us each as a descriptor, with its name ([`PROXY_SOCKET`]).
//! We connect ourselves and forward the bytes both ways; TLS is between the job and its server, so we see nothing and
//! can change nothing. Where the buildomat server speaks TLS, only connections that name it are forwarded: others may
//! be at the same address.
//!
//! Nothing that comes is believed. A name is looked up in the configuration of the worker's slot, and the job has no say in
//! how long it takes to accept the next client. What one client can make many or slow is its own: a worker has so many
//! connections whatever the others do, and a client that is no worker is refused before anything is received.

mod client_hello;
mod closer;
mod destination;
mod forward;
mod http_proxy;
mod route;
#[cfg(test)]
mod tests;
mod untrusted;
mod upstream;
mod workers;

pub use destination::try_destination;

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use protocol::config::{Config, Destination, PROXY_SOCKET, TO_HTTP_PROXY, TO_SERVER, USERDB_SLOT};
use protocol::{SlotName, UserName, WorkerId};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::spawn_blocking;
use tokio::time::{interval, sleep, timeout};

use crate::buildomat::BuildomatClient;
use crate::control::metrics::Metrics;
use crate::descriptors;
use crate::egress_records::EgressRecords;
use crate::job_log::{self, JobLog};
use crate::limiter::{ConnectionLimiter, Permit};
use crate::rate_limited_log::RateLimitedLog;
use client_hello::ClientHello;
use closer::Closer;
use forward::{Activity, forward, write_first};
use untrusted::{UntrustedTcpStream, break_off};
use upstream::Upstream;
use workers::{WorkerGone, Workers};

/// How often the socket is looked for, and tried to be made where it is not there.
const SOCKET_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// How long a client may take to bring its descriptor, and a job to send its first TLS message.
const PEER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection of which one side has ended may stall.
const HALF_CLOSED: Duration = Duration::from_secs(60);
/// Connections of one worker at the same time: an agent and its job's uploads need a few.
const CONNECTIONS_OF_A_WORKER: usize = 64;
/// How many of these may lead elsewhere than to the buildomat server: three quarters, so that what a job does elsewhere
/// does not keep its agent from the server.
const DESTINATIONS_OF_A_WORKER: usize = 48;
/// How many of these may lead elsewhere, or wait for that.
const ELSEWHERE_OF_A_WORKER: usize = 56;
/// The most connections whose packet is being received at the same time, and the most whose name is being looked up:
/// each takes a thread, and could take long.
const MAX_SLOW_CALLS: usize = 4;
/// The most clients that the kernel queues until they are accepted.
const BACKLOG: i32 = 4096;

/// A worker, and its slot where that is known.
type WorkerAndSlot = (WorkerId, Option<SlotName>);
/// Whose uid it is, if it is a worker's. The error says that this cannot be known now.
type WorkerOf = Box<dyn Fn(u32) -> io::Result<Option<WorkerAndSlot>> + Send + Sync>;

/// The addresses of a name, with this port.
type Resolve = Arc<dyn Fn(&str, u16) -> io::Result<Vec<SocketAddr>> + Send + Sync>;

/// Where what jobs connect to is written down.
#[derive(Clone, Debug)]
pub struct Reports {
    /// Slots, workers and destinations.
    pub records: Arc<EgressRecords>,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// For lines in jobs' logs.
    pub buildomat: BuildomatClient,
}

/// Everything that the egress proxy knows.
pub struct EgressProxy {
    directory: PathBuf,
    upstream: Upstream,
    /// What a connection must name as the server it is for, where that is looked at. None in it: no name, as the server
    /// is an address.
    tls_name: Option<Option<String>>,
    worker_of: WorkerOf,
    /// Is an HTTP proxy before all destinations, too (`general.proxy`)? It is the way of `upstream`.
    has_http_proxy: bool,
    resolve: Resolve,
    records: Arc<EgressRecords>,
    metrics: Arc<Metrics>,
    job_log: JobLog,
    /// Taken when it begins to serve.
    lines: Option<(BuildomatClient, mpsc::Receiver<(WorkerId, String)>)>,
    workers: Workers,
    limiter: ConnectionLimiter<WorkerId>,
    elsewhere: ConnectionLimiter<WorkerId>,
    destinations: ConnectionLimiter<WorkerId>,
    receiving: PerUidLimit,
    looking_up: PerUidLimit,
    peer_timeout: Duration,
    half_closed: Duration,
    closer: Closer,
    log: RateLimitedLog,
}

impl std::fmt::Debug for EgressProxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "EgressProxy({} to {})",
            self.directory.display(),
            self.upstream
        )
    }
}

impl EgressProxy {
    /// The egress proxy to the configuration's server; none where it has no name. It is there also while no slot is without a
    /// network: workers may be left whose slot was, and the configuration may be read again with one that is.
    ///
    /// Who is a worker the helper says, in the host's user records at `userdb`. There are at most so many `connections`.
    ///
    /// # Errors
    /// Where there can be no more threads.
    pub fn from_config(
        config: &Config,
        directory: PathBuf,
        userdb: PathBuf,
        connections: usize,
        reports: &Reports,
    ) -> io::Result<Option<EgressProxy>> {
        let Some((host, port)) = config.general.baseurl.name_and_port() else {
            return Ok(None);
        };
        let range = config.factory.uid_range;
        let worker_of = move |uid| {
            if !range.contains(uid) {
                return Ok(None);
            }
            match std::fs::read(userdb.join(format!("{uid}.user"))) {
                Ok(record) => Ok(worker_in(&record)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error),
            }
        };
        let tls = config.general.baseurl.as_str().starts_with("https://");
        let mut proxy = EgressProxy::new(directory, host.into(), port, Box::new(worker_of), reports)?;
        if let Some(http_proxy) = &config.general.proxy {
            let (host, port) = http_proxy.host_and_port();
            proxy.upstream = proxy.upstream.through(host.into(), port);
            proxy.has_http_proxy = true;
        }
        proxy.tls_name = tls.then(|| tls_name(host));
        let slots = config.slots.len();
        proxy.limiter = ConnectionLimiter::new(CONNECTIONS_OF_A_WORKER, connections, slots);
        proxy.elsewhere = ConnectionLimiter::new(ELSEWHERE_OF_A_WORKER, connections / 8 * 7, slots);
        proxy.destinations = ConnectionLimiter::new(DESTINATIONS_OF_A_WORKER, connections / 4 * 3, slots);
        Ok(Some(proxy))
    }

    fn new(
        directory: PathBuf,
        host: String,
        port: u16,
        worker_of: WorkerOf,
        reports: &Reports,
    ) -> io::Result<EgressProxy> {
        let (job_log, lines) = JobLog::new();
        Ok(EgressProxy {
            directory,
            upstream: Upstream::new(host, port),
            tls_name: None,
            worker_of,
            has_http_proxy: false,
            resolve: Arc::new(|name, port| Ok((name, port).to_socket_addrs()?.collect())),
            records: reports.records.clone(),
            metrics: reports.metrics.clone(),
            job_log,
            lines: Some((reports.buildomat.clone(), lines)),
            workers: Workers::default(),
            limiter: ConnectionLimiter::new(CONNECTIONS_OF_A_WORKER, 16 * CONNECTIONS_OF_A_WORKER, 1),
            elsewhere: ConnectionLimiter::new(ELSEWHERE_OF_A_WORKER, usize::MAX, 1),
            destinations: ConnectionLimiter::new(DESTINATIONS_OF_A_WORKER, usize::MAX, 1),
            receiving: PerUidLimit::default(),
            looking_up: PerUidLimit::default(),
            peer_timeout: PEER_TIMEOUT,
            half_closed: HALF_CLOSED,
            closer: Closer::start()?,
            log: RateLimitedLog::default(),
        })
    }

    /// Serve without end. Dropped with the runtime, it cuts every connection: agents make new ones.
    pub async fn serve(mut self) {
        if let Some((buildomat, lines)) = self.lines.take() {
            tokio::spawn(job_log::send_lines(buildomat, lines));
        }
        let proxy = Arc::new(self);
        loop {
            let listener = proxy.open().await;
            proxy.accept_from(&listener).await;
        }
    }

    /// The helper makes the directory: until then there is nothing to do but to try again.
    async fn open(&self) -> UnixListener {
        let mut logged = false;
        loop {
            let directory = self.directory.clone();
            let made = spawn_blocking(move || listen_in(&directory)).await;
            let made = made.map_err(io::Error::other).and_then(|made| made);
            match made.and_then(UnixListener::from_std) {
                Ok(open) => {
                    tracing::info!(directory = %self.directory.display(), "egress proxy open");
                    return open;
                }
                Err(error) if !logged => {
                    logged = true;
                    tracing::warn!(
                        directory = %self.directory.display(),
                        "the egress proxy cannot be opened yet: {error}; start the helper, which makes its directory"
                    );
                }
                Err(_) => {}
            }
            sleep(SOCKET_CHECK_INTERVAL).await;
        }
    }

    /// Accept connections until the socket is gone. One that was replaced is the affair of who replaced it: a
    /// newer supervisor; to take it back would only set the two against each other.
    async fn accept_from(self: &Arc<Self>, listener: &UnixListener) {
        let path = self.directory.join(PROXY_SOCKET);
        let mut check = interval(SOCKET_CHECK_INTERVAL);
        loop {
            // Only for as long as the closer needs, which waits for no client.
            while self.closer.pending() >= descriptors::MAX_PENDING_CLOSES {
                sleep(Duration::from_millis(1)).await;
            }
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((client, _)) => self.admit(client),
                    Err(error) => {
                        self.log.warn(format_args!("the egress proxy cannot accept: {error}; see the supervisor's limit of open files"));
                        sleep(SOCKET_CHECK_INTERVAL).await;
                    }
                },
                _ = check.tick() => {
                    self.workers.remove_gone(|uid| Ok((self.worker_of)(uid)?.map(|(worker, _)| worker)));
                    match tokio::fs::symlink_metadata(&path).await {
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {
                            tracing::warn!("the egress proxy's socket was removed: it is made again");
                            return;
                        }
                        _ => {}
                    }
                }
            }
        }
    }

    fn admit(self: &Arc<Self>, client: UnixStream) {
        let uid = match client.peer_cred() {
            Ok(peer) => peer.uid(),
            Err(_) => return self.close(client, u32::MAX, "the kernel does not name it"),
        };
        let worker = match (self.worker_of)(uid) {
            Ok(Some(worker)) => worker,
            Ok(None) => return self.close(client, uid, "this uid is no worker's"),
            Err(error) => {
                let why = format!("whose uid this is cannot be read: {error}");
                return self.close(client, uid, &why);
            }
        };
        let Some(permit) = self.limiter.take(worker.0) else {
            return self.close(client, uid, "it has too many connections");
        };
        let proxy = self.clone();
        tokio::spawn(async move { proxy.serve_client(client, uid, worker, permit).await });
    }

    /// What the client may have sent already is closed with its socket.
    fn close(&self, client: UnixStream, uid: u32, why: &str) {
        self.log.warn(format_args!(
            "the egress proxy has closed a connection of uid {uid}: {why}"
        ));
        // Otherwise it is closed by now.
        if let Ok(client) = client.into_std() {
            self.closer.close(client.into());
        }
    }

    /// One connection from its beginning to its end.
    async fn serve_client(
        self: Arc<Self>,
        client: UnixStream,
        uid: u32,
        (worker, slot): WorkerAndSlot,
        permit: Permit<WorkerId>,
    ) {
        let gone = self.workers.connection_of(worker, uid);
        // Where it has said nothing, nothing is found.
        let _ = timeout(self.peer_timeout, untrusted::wait_readable(&client)).await;
        let slow_call = self.receiving.of(uid).acquire_owned().await;
        // Closing what else it has sent can take long. The thread has the permit, for as long as it takes.
        let closer = self.closer.clone();
        let received = spawn_blocking(move || (untrusted::receive(client, closer), permit, slow_call)).await;
        let (received, permit, slow_call) = match received {
            Ok(received) => received,
            Err(error) => return tracing::error!("the egress proxy could not receive: {error}"),
        };
        drop(slow_call);
        let closed = |why: &str| {
            self.log.warn(format_args!(
                "the egress proxy has closed a connection of uid {uid}: {why}"
            ));
        };
        let (stream, name) = match received {
            Ok(received) => received,
            Err(why) => return closed(&why),
        };
        if name == TO_SERVER {
            self.forward_to_server(stream, uid, gone).await;
        } else {
            let job = slot.and_then(|slot| self.records.of_job(worker, &slot));
            let Some(job) = job else {
                return closed(
                    "its slot has the host's network, is no longer in the configuration, or is not known",
                );
            };
            let Some(elsewhere) = self.elsewhere.take(worker) else {
                return closed("it has too many connections to other hosts than the server");
            };
            if name == TO_HTTP_PROXY {
                let permits = [permit, elsewhere];
                return http_proxy::serve(self.clone(), job, uid, permits, stream, gone).await;
            }
            let Ok(to) = name.parse::<Destination>() else {
                return closed("it names no destination");
            };
            let Some(_destination) = self.destination_of(worker).await else {
                self.metrics.count_connection(&job.slot, "refused");
                return closed("it has too many connections to other hosts than the server");
            };
            match self.connect(uid, &job, &to).await {
                Ok(server) => self.forward(uid, stream, server, &[], gone).await,
                Err(_) => stream.watch().break_off(),
            }
        }
        // It counts until it is closed.
        drop(permit);
    }

    /// A connection of a worker to another host than the server, once it has one less than it may have. None where that takes
    /// too long.
    async fn destination_of(&self, worker: WorkerId) -> Option<Permit<WorkerId>> {
        let permit = async {
            loop {
                if let Some(permit) = self.destinations.take(worker) {
                    return permit;
                }
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(self.peer_timeout, permit).await.ok()
    }

    async fn forward_to_server(&self, mut job: UntrustedTcpStream, uid: u32, gone: WorkerGone) {
        let first = match &self.tls_name {
            None => Vec::new(),
            Some(name) => match timeout(self.peer_timeout, client_hello_for(name.as_deref(), &mut job)).await
            {
                Ok(Ok(first)) => first,
                refused => {
                    let why = match refused {
                        Ok(Err(why)) => why,
                        _ => "it sent no whole ClientHello in time".into(),
                    };
                    return self.log.warn(format_args!(
                        "the egress proxy has closed a connection of uid {uid}, which may only lead to the buildomat server: {why}"
                    ));
                }
            },
        };
        match self.upstream.connect().await {
            Ok(server) => self.forward(uid, job, server, &first, gone).await,
            Err(error) => tracing::debug!(
                uid,
                "the egress proxy cannot reach {} for a job: {error}",
                self.upstream
            ),
        }
    }

    /// Forward the bytes of a connection, of which the job has sent some already, until it ends, or its worker does.
    /// What has broken off on one side breaks off on the other, unless that one has all: an end in good order says that
    /// this was all.
    async fn forward(
        &self,
        uid: u32,
        mut job: UntrustedTcpStream,
        mut server: TcpStream,
        first: &[u8],
        mut gone: WorkerGone,
    ) {
        let activity = Activity::default();
        let watch = job.watch();
        let has_ended = || watch.is_ended().unwrap_or(true);
        let forwarded = async {
            write_first(&mut server, first, self.half_closed).await?;
            forward(&activity, &mut job, &mut server, self.half_closed, has_ended).await
        };
        let forwarded = tokio::select! {
            forwarded = forwarded => forwarded,
            () = gone.wait() => Err(io::Error::other("its worker is gone")),
        };
        if let Err(error) = forwarded {
            tracing::debug!(uid, "a connection through the egress proxy has broken: {error}");
            if !activity.server_has_all() {
                break_off(&server);
            }
            if !activity.job_has_all() {
                watch.break_off();
            }
        }
    }
}

/// How many of the calls of `MAX_SLOW_CALLS` each uid may have at once.
#[derive(Debug, Default)]
struct PerUidLimit(Mutex<HashMap<u32, Weak<Semaphore>>>);

impl PerUidLimit {
    fn of(&self, uid: u32) -> Arc<Semaphore> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(calls) = all.get(&uid).and_then(Weak::upgrade) {
            return calls;
        }
        all.retain(|_, calls| calls.strong_count() > 0);
        let calls = Arc::new(Semaphore::new(MAX_SLOW_CALLS));
        all.insert(uid, Arc::downgrade(&calls));
        calls
    }
}

/// The worker that a user record of the helper's is for, and its slot. A helper that made it before an upgrade may have
/// written down no slot.
fn worker_in(record: &[u8]) -> Option<WorkerAndSlot> {
    let record: serde_json::Value = serde_json::from_slice(record).ok()?;
    let field = |name: &str| record[name].as_str().map(str::to_owned);
    let user = UserName::try_from(field("userName")?).ok()?;
    let slot = field(USERDB_SLOT).and_then(|slot| slot.parse().ok());
    Some((user.worker(), slot))
}

/// What clients name a server of this host; no name where it is an address (RFC 6066, 3).
fn tls_name(host: &str) -> Option<String> {
    let is_address = host.parse::<std::net::IpAddr>().is_ok();
    (!is_address).then(|| host.trim_end_matches('.').to_ascii_lowercase())
}

/// The first bytes of the job, which are for the server of this name.
async fn client_hello_for(name: Option<&str>, job: &mut UntrustedTcpStream) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::with_capacity(2048);
    loop {
        match client_hello::read(&bytes)? {
            ClientHello::Incomplete => {}
            ClientHello::For(named) if named.as_deref() == name => return Ok(bytes),
            ClientHello::For(named) => {
                let shown =
                    |name: Option<&str>| name.map_or("no server".to_owned(), |name| format!("{name:?}"));
                let (named, name) = (shown(named.as_deref()), shown(name));
                return Err(format!("its ClientHello names {named:.100}, not {name}"));
            }
        }
        match job.read_buf(&mut bytes).await {
            Ok(0) => return Err("it ended before its ClientHello did".into()),
            Ok(_) => {}
            Err(error) => return Err(format!("it broke off before its ClientHello: {error}")),
        }
    }
}

/// A socket under a name of its own, then renamed over the old one: there is no moment without a socket that
/// somebody listens at. Its mode lets workers in, whose uids share no group; who they are is asked later.
fn listen_in(directory: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    let new = directory.join("new.sock");
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
    socket.bind(&SockAddr::unix(&new)?)?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o666))?;
    std::fs::rename(&new, directory.join(PROXY_SOCKET))?;
    Ok(OwnedFd::from(socket).into())
}
