//! The gate: the one way out for jobs whose slot says `network = "none"`.
//!
//! The first process of such a worker sends us, as a descriptor, each TCP connection that is made to the
//! server's port in the job's network namespace ([`GATE_SOCKET`]). We connect to the server ourselves and carry
//! the bytes both ways; TLS is between the agent and the server, so we see nothing and can change nothing.
//!
//! It must never believe anything that comes, and never let a job choose where a connection leads, nor how
//! long one of the runtime's own threads takes: what a job can make slow is done on the pool for blocking work,
//! where a worker has as many threads as it has seats, and no more.

mod complaints;
mod foreign;
mod seats;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use protocol::config::{Config, GATE_SOCKET};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpStream, UnixListener, UnixStream, lookup_host};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::{interval, sleep, timeout};

use complaints::Complaints;
use seats::{Seat, Seats};

/// How often the socket is looked for, and tried to be made where it is not there.
const LOOK: Duration = Duration::from_secs(1);
/// How long a caller may take to bring its descriptor.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long one of the server's addresses may take to answer; then the next is tried.
const CONNECT: Duration = Duration::from_secs(10);
/// Connections of one worker at the same time: an agent and its job's uploads need a few.
const SEATS_OF_A_WORKER: usize = 64;
/// Connections of all workers together.
const SEATS: usize = 1024;
/// Callers without a seat that are being hung up on at the same time.
const DOORMEN: usize = 64;
/// Descriptors that the rest of the supervisor may need.
const OTHER_FILES: u64 = 256;

/// Which uids are workers'.
type IsWorker = Box<dyn Fn(u32) -> bool + Send + Sync>;

/// Everything that the gate knows.
pub struct Gate {
    directory: PathBuf,
    host: String,
    port: u16,
    is_worker: IsWorker,
    seats: Seats,
    doormen: Arc<Semaphore>,
    complaints: Complaints,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Gate({} to {}:{})",
            self.directory.display(),
            self.host,
            self.port
        )
    }
}

impl Gate {
    /// The gate to the configuration's server; none where it has no name. It is there also while no slot is without a
    /// network: workers may be left whose slot was, and the configuration may be read again with one that is.
    pub fn to_the_server(config: &Config, directory: PathBuf) -> Option<Gate> {
        let (host, port) = config.general.baseurl.name_and_port()?;
        let range = config.factory.uid_range;
        let is_worker = Box::new(move |uid| range.contains(uid));
        Some(Gate::new(directory, host.into(), port, is_worker))
    }

    fn new(directory: PathBuf, host: String, port: u16, is_worker: IsWorker) -> Gate {
        Gate {
            directory,
            host,
            port,
            is_worker,
            seats: Seats::new(SEATS_OF_A_WORKER, SEATS.min(affordable())),
            doormen: Arc::new(Semaphore::new(DOORMEN)),
            complaints: Complaints::default(),
        }
    }

    /// Serve without end. Dropped with the runtime, it cuts every connection: agents make new ones.
    pub async fn serve(self) {
        let gate = Arc::new(self);
        loop {
            let listener = gate.open().await;
            gate.welcome(&listener).await;
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
                    tracing::info!(directory = %self.directory.display(), "gate open");
                    return open;
                }
                Err(error) if !said => {
                    said = true;
                    tracing::warn!(
                        directory = %self.directory.display(),
                        "the gate cannot be opened yet: {error}; start the helper, which makes its directory"
                    );
                }
                Err(_) => {}
            }
            sleep(LOOK).await;
        }
    }

    /// Let callers in until the socket is gone. One that was replaced is the affair of who replaced it: a
    /// newer supervisor; to take it back would only set the two against each other.
    async fn welcome(self: &Arc<Self>, listener: &UnixListener) {
        let path = self.directory.join(GATE_SOCKET);
        let mut look = interval(LOOK);
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((caller, _)) => self.admit(caller).await,
                    Err(error) => {
                        self.complaints.say(format_args!("the gate cannot accept: {error}; see the supervisor's limit of open files"));
                        sleep(LOOK).await;
                    }
                },
                _ = look.tick() => match tokio::fs::symlink_metadata(&path).await {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        tracing::warn!("the gate's socket was removed: it is made again");
                        return;
                    }
                    _ => {}
                },
            }
        }
    }

    async fn admit(self: &Arc<Self>, caller: UnixStream) {
        let uid = match caller.peer_cred() {
            Ok(peer) if (self.is_worker)(peer.uid()) => peer.uid(),
            Ok(peer) => return self.hang_up(caller, peer.uid(), "this uid is no worker's").await,
            Err(_) => {
                return self
                    .hang_up(caller, u32::MAX, "the kernel does not name it")
                    .await;
            }
        };
        let Some(seat) = self.seats.take(uid) else {
            return self.hang_up(caller, uid, "it has too many connections").await;
        };
        let gate = self.clone();
        tokio::spawn(async move { gate.pass(caller, uid, seat).await });
    }

    /// What the caller may have sent already is closed with its socket, and that can take as long as it
    /// likes (`SO_LINGER`, `socket(7)`). Where many do that, the gate waits; the supervisor does not.
    async fn hang_up(&self, caller: UnixStream, uid: u32, why: &str) {
        self.complaints
            .say(format_args!("the gate has hung up on uid {uid}: {why}"));
        let doorman = self.doormen.clone().acquire_owned().await;
        spawn_blocking(move || drop((caller, doorman)));
    }

    /// One connection from its beginning to its end. The seat is free when the last descriptor is closed.
    async fn pass(&self, caller: UnixStream, uid: u32, seat: Seat) {
        // Where it has said nothing, nothing is found.
        let _ = timeout(PATIENCE, foreign::has_spoken(&caller)).await;
        let (brought, seat) = match spawn_blocking(move || (foreign::receive(caller), seat)).await {
            Ok(received) => received,
            Err(error) => return tracing::error!("the gate could not receive: {error}"),
        };
        let mut job = match brought {
            Ok(job) => job,
            Err(why) => {
                return self
                    .complaints
                    .say(format_args!("the gate has hung up on uid {uid}: {why}"));
            }
        };
        match self.connect().await {
            Ok(mut server) => {
                if let Err(error) = copy_bidirectional(&mut job, &mut server).await {
                    tracing::debug!(uid, "a connection through the gate has broken: {error}");
                }
            }
            Err(error) => tracing::debug!(
                uid,
                "the gate cannot reach {}:{} for a job: {error}",
                self.host,
                self.port
            ),
        }
        spawn_blocking(move || drop((job, seat)));
    }

    /// Asked anew each time, as the server may move; the name is the configuration's, never the job's. The
    /// look-up has no limit here, for it could not be cut off: the seat bounds how many there are.
    async fn connect(&self) -> io::Result<TcpStream> {
        let mut last = io::Error::other("the name has no address");
        for address in lookup_host((self.host.as_str(), self.port)).await? {
            match timeout(CONNECT, TcpStream::connect(address)).await {
                Ok(Ok(server)) => {
                    foreign::keep_alive(&server)?;
                    return Ok(server);
                }
                Ok(Err(error)) => last = error,
                Err(_) => last = io::ErrorKind::TimedOut.into(),
            }
        }
        Err(last)
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
    socket.listen(128)?;
    socket.set_nonblocking(true)?;
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o666))?;
    std::fs::rename(&new, directory.join(GATE_SOCKET))?;
    Ok(OwnedFd::from(socket).into())
}

/// How many connections there are descriptors for: three each, the caller's, the job's and the server's. The
/// soft limit is often too low for that, and ours to raise.
fn affordable() -> usize {
    let wanted = OTHER_FILES + 3 * SEATS as u64;
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return SEATS_OF_A_WORKER;
    };
    let raised = soft.max(wanted.min(hard));
    let have = match setrlimit(Resource::RLIMIT_NOFILE, raised, hard) {
        Ok(()) => raised,
        Err(_) => soft,
    };
    usize::try_from(have.saturating_sub(OTHER_FILES) / 3).map_or(SEATS, |seats| seats.max(1))
}
