//! The egress proxy to the buildomat server, for jobs whose slot says `network = "none"`.
//!
//! The first process of such a worker sends us, as a descriptor, each TCP connection that is made to the
//! server's port in the job's network namespace ([`PROXY_SOCKET`]). We connect to the server ourselves and carry
//! the bytes both ways; TLS is between the agent and the server, so we see nothing and can change nothing. Where the
//! server speaks TLS, only connections that name it are carried: others may be at the same address.
//!
//! It must never believe anything that comes, and never let a job choose where a connection leads, nor how
//! long it takes to accept the next caller. What one caller can make many or slow is its own: a worker has so many
//! connections whatever the others do, and a caller that is no worker is refused before anything is received.

mod client_hello;
mod closer;
mod forward;
#[cfg(test)]
mod tests;
mod untrusted;
mod upstream;

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use protocol::config::{Config, PROXY_SOCKET};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::{interval, sleep, timeout};

use crate::descriptors;
use crate::limiter::{ConnectionLimiter, Permit};
use crate::rate_limited_log::RateLimitedLog;
use client_hello::ClientHello;
use closer::Closer;
use forward::forward;
use untrusted::UntrustedTcpStream;
use upstream::Upstream;

/// How often the socket is looked for, and tried to be made where it is not there.
const LOOK: Duration = Duration::from_secs(1);
/// How long a caller may take to bring its descriptor, and a job to send its first TLS message.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a connection of which one side has ended may stand still.
const HALF_CLOSED: Duration = Duration::from_secs(60);
/// Connections of one worker at the same time: an agent and its job's uploads need a few.
const CONNECTIONS_OF_A_WORKER: usize = 64;
/// Of them, those whose packet is being received at the same time: that takes a thread each, and could take long.
const RECEIVING: usize = 4;
/// Callers that the kernel keeps until they are accepted.
const BACKLOG: i32 = 4096;

/// Which uids are workers'.
type IsWorker = Box<dyn Fn(u32) -> bool + Send + Sync>;

/// Everything that the egress proxy knows.
pub struct EgressProxy {
    directory: PathBuf,
    upstream: Upstream,
    /// What a connection must name as the server it is for, where that is looked at. None in it: no name, as the server
    /// is an address.
    tls_name: Option<Option<String>>,
    is_worker: IsWorker,
    limiter: ConnectionLimiter<u32>,
    receiving: Mutex<HashMap<u32, Weak<Semaphore>>>,
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
    pub fn to_the_server(
        config: &Config,
        directory: PathBuf,
        userdb: PathBuf,
        connections: usize,
    ) -> io::Result<Option<EgressProxy>> {
        let Some((host, port)) = config.general.baseurl.name_and_port() else {
            return Ok(None);
        };
        let range = config.factory.uid_range;
        let is_worker = move |uid| {
            let record = || userdb.join(format!("{uid}.user")).symlink_metadata();
            range.contains(uid) && record().is_ok()
        };
        let tls = config.general.baseurl.as_str().starts_with("https://");
        let mut proxy = EgressProxy::new(directory, host.into(), port, Box::new(is_worker))?;
        if let Some(http_proxy) = &config.general.proxy {
            let (host, port) = http_proxy.host_and_port();
            proxy.upstream = proxy.upstream.through(host.into(), port);
        }
        proxy.tls_name = tls.then(|| tls_name(host));
        proxy.limiter = ConnectionLimiter::new(CONNECTIONS_OF_A_WORKER, connections, config.slots.len());
        Ok(Some(proxy))
    }

    fn new(directory: PathBuf, host: String, port: u16, is_worker: IsWorker) -> io::Result<EgressProxy> {
        Ok(EgressProxy {
            directory,
            upstream: Upstream::new(host, port),
            tls_name: None,
            is_worker,
            limiter: ConnectionLimiter::new(CONNECTIONS_OF_A_WORKER, 16 * CONNECTIONS_OF_A_WORKER, 1),
            receiving: Mutex::default(),
            half_closed: HALF_CLOSED,
            closer: Closer::start()?,
            log: RateLimitedLog::default(),
        })
    }

    /// Serve without end. Dropped with the runtime, it cuts every connection: agents make new ones.
    pub async fn serve(self) {
        let proxy = Arc::new(self);
        loop {
            let listener = proxy.open().await;
            proxy.accept_from(&listener).await;
        }
    }

    /// The helper makes the directory: until then there is nothing to do but to try again.
    async fn open(&self) -> UnixListener {
        let mut said = false;
        loop {
            let directory = self.directory.clone();
            let made = spawn_blocking(move || listen_in(&directory)).await;
            let made = made.map_err(io::Error::other).and_then(|made| made);
            match made.and_then(UnixListener::from_std) {
                Ok(open) => {
                    tracing::info!(directory = %self.directory.display(), "egress proxy open");
                    return open;
                }
                Err(error) if !said => {
                    said = true;
                    tracing::warn!(
                        directory = %self.directory.display(),
                        "the egress proxy cannot be opened yet: {error}; start the helper, which makes its directory"
                    );
                }
                Err(_) => {}
            }
            sleep(LOOK).await;
        }
    }

    /// Let callers in until the socket is gone. One that was replaced is the affair of who replaced it: a
    /// newer supervisor; to take it back would only set the two against each other.
    async fn accept_from(self: &Arc<Self>, listener: &UnixListener) {
        let path = self.directory.join(PROXY_SOCKET);
        let mut look = interval(LOOK);
        loop {
            // Only for as long as the closer needs, which waits for no caller.
            while self.closer.pending() >= descriptors::MAX_PENDING_CLOSES {
                sleep(Duration::from_millis(1)).await;
            }
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((caller, _)) => self.admit(caller),
                    Err(error) => {
                        self.log.warn(format_args!("the egress proxy cannot accept: {error}; see the supervisor's limit of open files"));
                        sleep(LOOK).await;
                    }
                },
                _ = look.tick() => match tokio::fs::symlink_metadata(&path).await {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        tracing::warn!("the egress proxy's socket was removed: it is made again");
                        return;
                    }
                    _ => {}
                },
            }
        }
    }

    fn admit(self: &Arc<Self>, caller: UnixStream) {
        let uid = match caller.peer_cred() {
            Ok(peer) if (self.is_worker)(peer.uid()) => peer.uid(),
            Ok(peer) => return self.hang_up(caller, peer.uid(), "this uid is no worker's"),
            Err(_) => return self.hang_up(caller, u32::MAX, "the kernel does not name it"),
        };
        let Some(permit) = self.limiter.take(uid) else {
            return self.hang_up(caller, uid, "it has too many connections");
        };
        let proxy = self.clone();
        tokio::spawn(async move { proxy.serve_caller(caller, uid, permit).await });
    }

    /// What the caller may have sent already is closed with its socket.
    fn hang_up(&self, caller: UnixStream, uid: u32, why: &str) {
        self.log.warn(format_args!(
            "the egress proxy has closed a connection of uid {uid}: {why}"
        ));
        // Otherwise it is closed by now.
        if let Ok(caller) = caller.into_std() {
            self.closer.close(caller.into());
        }
    }

    /// One connection from its beginning to its end.
    async fn serve_caller(&self, caller: UnixStream, uid: u32, permit: Permit<u32>) {
        // Where it has said nothing, nothing is found.
        let _ = timeout(PATIENCE, untrusted::has_spoken(&caller)).await;
        let turn = self.turns_of(uid).acquire_owned().await;
        // Closing what else it has sent can take long. The thread has the permit, for as long as it takes.
        let received = spawn_blocking(move || (untrusted::receive(caller), permit, turn)).await;
        let (received, permit, turn) = match received {
            Ok(received) => received,
            Err(error) => return tracing::error!("the egress proxy could not receive: {error}"),
        };
        drop(turn);
        let mut job = match received {
            Ok(job) => job,
            Err(why) => {
                return self.log.warn(format_args!(
                    "the egress proxy has closed a connection of uid {uid}: {why}"
                ));
            }
        };
        self.carry(&mut job, uid).await;
        if let Ok(job) = job.into_descriptor() {
            self.closer.close(job);
        }
        drop(permit);
    }

    fn turns_of(&self, uid: u32) -> Arc<Semaphore> {
        let mut receiving = self.receiving.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(turns) = receiving.get(&uid).and_then(Weak::upgrade) {
            return turns;
        }
        receiving.retain(|_, turns| turns.strong_count() > 0);
        let turns = Arc::new(Semaphore::new(RECEIVING));
        receiving.insert(uid, Arc::downgrade(&turns));
        turns
    }

    async fn carry(&self, job: &mut UntrustedTcpStream, uid: u32) {
        let first = match &self.tls_name {
            None => Vec::new(),
            Some(name) => match timeout(PATIENCE, client_hello_for(name.as_deref(), job)).await {
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
            Ok(mut server) => {
                let carried = match server.write_all(&first).await {
                    Ok(()) => forward(job, &mut server, self.half_closed).await,
                    Err(error) => Err(error),
                };
                if let Err(error) = carried {
                    tracing::debug!(uid, "a connection through the egress proxy has broken: {error}");
                }
            }
            Err(error) => tracing::debug!(
                uid,
                "the egress proxy cannot reach {} for a job: {error}",
                self.upstream
            ),
        }
    }
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
                let say =
                    |name: Option<&str>| name.map_or("no server".to_owned(), |name| format!("{name:?}"));
                let (named, name) = (say(named.as_deref()), say(name));
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
