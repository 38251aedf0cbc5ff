//! One connection, in a process of its own: packets in, one request at a time, replies out.

pub mod allocation;
pub mod install;
pub mod policy;
mod timer;

use std::fs::File;
use std::os::fd::AsFd;
use std::time::Instant;

use anyhow::Result;
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;
use nix::unistd::alarm;
use protocol::{
    BootstrapToken, Error, ErrorKind, MAX_LIST, Received, Reply, Request, Seqpacket, SlotName, State, Uid,
    UserName, VERSION, WorkerId, WorkerInfo, wire,
};

use crate::host::record::{self, Worker, WorkerError};
use crate::host::startup_check::check_configuration;
use crate::host::{Host, cgroup};
use crate::log::{info, warn};
use crate::monitor_ipc::{Failure, HandshakeMessage, MonitorRequest};
use crate::unprivileged::kill_all;
use allocation::CreateUserError;
use install::InstallError;

/// Answers and the descriptor that goes with them.
type ReplyWithFile = (Reply, Option<File>);

/// What is beneath a connection: the host, or a model of one where connections are tested. Each does what the
/// request of its name says in the `protocol` crate, and has the errors that may be answered to it.
pub trait Operations {
    /// [`Request::CreateUser`].
    fn create_user(&self, worker: WorkerId, slot: &SlotName) -> Result<(Uid, UserName), CreateUserError>;
    /// [`Request::InstallAgent`], which is the connection's next packet: the file is the console, open for reading.
    fn install_agent(
        &self,
        worker: WorkerId,
        connection: &Seqpacket,
        bootstrap: &BootstrapToken,
    ) -> Result<File, InstallError>;
    /// [`Request::Attach`]: the file is the console, open for reading.
    fn attach(&self, worker: WorkerId) -> Result<(State, File), WorkerError>;
    /// [`Request::Kill`].
    fn kill(&self, worker: WorkerId) -> Result<(), WorkerError>;
    /// [`Request::Delete`].
    fn delete(&self, worker: WorkerId) -> Result<(), Failure>;
    /// [`Request::List`]: at most [`MAX_LIST`], and if there are more.
    fn list(&self, after: Option<WorkerId>) -> Result<(Vec<WorkerInfo>, bool), Failure>;
    /// [`Request::Check`]. The error is [`ErrorKind::Refused`]: the reason alone matters, for nothing was tried that could have failed.
    fn check(&self) -> Result<()>;
}

/// How long a peer may take to greet and to take an answer, and the kernel to close what came with a packet, in seconds.
const PEER_TIMEOUT_SECONDS: u16 = 10;

/// Serve this connection to its end. This process receives no descriptor from it: with that of a directory of the host it
/// could change what is below, with root's rights.
pub fn serve(operations: &dyn Operations, peer: PeerCredentials, is_busy: bool, socket: &Seqpacket) {
    // A peer that says nothing, or does not read, must not keep a process for ever.
    let time = |seconds| TimeVal::new(seconds, 0);
    let limited = setsockopt(
        socket,
        sockopt::ReceiveTimeout,
        &time(PEER_TIMEOUT_SECONDS.into()),
    )
    .and_then(|()| setsockopt(socket, sockopt::SendTimeout, &time(PEER_TIMEOUT_SECONDS.into())));
    if let Err(errno) = limited {
        return warn!("closed the connection: cannot limit how long it is waited for: {errno}");
    }
    let mut is_greeted = false;
    loop {
        // The packet stays until it is answered: the agent comes with it.
        let bytes = match socket.peek_bytes(wire::MAX_REQUEST) {
            Ok(Received::Closed) => return,
            Ok(Received::Packet { bytes, .. }) => bytes,
            Ok(Received::Oversize { .. }) => {
                return warn!("closed the connection: a packet is larger than any request");
            }
            Err(Errno::ECONNRESET) => return,
            Err(errno) => return warn!("closed the connection: cannot receive: {errno}"),
        };
        let request: Request = match wire::decode(&bytes) {
            Ok(request) => request,
            Err(error) => {
                return warn!(
                    "closed the connection: a packet of {} bytes is no request: {error}",
                    bytes.len()
                );
            }
        };
        let begin = Instant::now();
        let (reply, descriptor) = match (&request, is_greeted) {
            (Request::Hello { version: VERSION }, false) if is_busy => {
                let message = "the helper serves as many connections as it can: try again later";
                (Reply::Error(Error::new(ErrorKind::Busy, message)), None)
            }
            (Request::Hello { version: VERSION }, false) => {
                is_greeted = true;
                let _ = setsockopt(socket, sockopt::ReceiveTimeout, &time(3600));
                (Reply::Welcome, None)
            }
            (Request::Hello { version }, false) => {
                let message = format!(
                    "the helper has version {VERSION} of the protocol, the supervisor version {version}: install both from one release"
                );
                (Reply::Error(Error::new(ErrorKind::Version, message)), None)
            }
            (_, false) => (
                Reply::Error(Error::new(
                    ErrorKind::Refused,
                    "the first packet of a connection must be Hello",
                )),
                None,
            ),
            (_, true) => {
                answer(operations, &request, socket).unwrap_or_else(|error| (Reply::Error(error), None))
            }
        };
        audit(peer, &request, &reply, begin);
        let sent = wire::encode(&reply).map_err(|_| Errno::EMSGSIZE);
        let sent = sent.and_then(|bytes| socket.send(&bytes, descriptor.as_ref().map(AsFd::as_fd)));
        if let Err(errno) = sent {
            return warn!("closed the connection: cannot answer: {errno}");
        }
        // Closing what came with it can take for ever (`SO_LINGER` in `socket(7)`): the signal ends that, and this process.
        alarm::set(PEER_TIMEOUT_SECONDS.into());
        let taken = socket.recv_bytes(0);
        alarm::cancel();
        // It cannot be taken where the peer is gone.
        if !is_greeted || taken.is_err() {
            return;
        }
    }
}

fn answer(
    operations: &dyn Operations,
    request: &Request,
    connection: &Seqpacket,
) -> Result<ReplyWithFile, Error> {
    let refused = |message: &str| Error::new(ErrorKind::Refused, message);
    Ok(match request {
        Request::Hello { .. } => return Err(refused("Hello was sent before")),
        Request::CreateUser { worker, slot } => {
            let (uid, name) = operations.create_user(*worker, slot)?;
            (Reply::UserCreated { uid, name }, None)
        }
        Request::InstallAgent { worker, bootstrap } => {
            let console = operations.install_agent(*worker, connection, bootstrap)?;
            (Reply::AgentStarted, Some(console))
        }
        Request::Attach { worker } => {
            let (state, console) = operations.attach(*worker)?;
            (Reply::Attached { state }, Some(console))
        }
        Request::Kill { worker } => operations.kill(*worker).map(|()| (Reply::Killed, None))?,
        Request::Delete { worker } => operations.delete(*worker).map(|()| (Reply::Deleted, None))?,
        Request::List { after } => {
            let (workers, more) = operations.list(*after)?;
            (Reply::Listed { workers, more }, None)
        }
        Request::Check => {
            let checked = operations.check().map(|()| (Reply::Checked, None));
            checked.map_err(|error| refused(&format!("{error:#}")))?
        }
    })
}

/// The host, and the way to the monitor.
pub struct HostOperations<'a> {
    pub host: &'a Host,
    pub monitor: &'a Seqpacket,
}

impl HostOperations<'_> {
    /// A session may set no quota.
    fn clean_up(&self, worker: WorkerId) -> Result<(), Failure> {
        let monitor = install::request(self.monitor, &MonitorRequest::CleanUp { worker })?;
        install::expect(&monitor, HandshakeMessage::Done)
    }
}

impl Operations for HostOperations<'_> {
    fn create_user(&self, worker: WorkerId, slot: &SlotName) -> Result<(Uid, UserName), CreateUserError> {
        allocation::create_user(self.host, &|id, _| self.clean_up(id), worker, slot)
    }

    fn install_agent(
        &self,
        worker: WorkerId,
        connection: &Seqpacket,
        bootstrap: &BootstrapToken,
    ) -> Result<File, InstallError> {
        let (worker, record) = Worker::existing(self.host, worker)?;
        install::install(self.host, self.monitor, &worker, &record, connection, bootstrap)?;
        Ok(worker.console()?)
    }

    fn attach(&self, worker: WorkerId) -> Result<(State, File), WorkerError> {
        let (worker, _) = Worker::existing(self.host, worker)?;
        Ok((worker.state(self.host)?, worker.console()?))
    }

    fn kill(&self, worker: WorkerId) -> Result<(), WorkerError> {
        let (worker, record) = Worker::existing(self.host, worker)?;
        cgroup::kill_and_remove(&self.host.cgroups, worker.id)?;
        Ok(kill_all(record.uid)?)
    }

    fn delete(&self, worker: WorkerId) -> Result<(), Failure> {
        allocation::delete(self.host, &|id, _| self.clean_up(id), worker)
    }

    fn list(&self, after: Option<WorkerId>) -> Result<(Vec<WorkerInfo>, bool), Failure> {
        let all = record::list(self.host)?;
        for id in all.damaged {
            warn!(
                "the record is damaged: the worker is lost, and will be deleted before a slot is taken worker={id}"
            );
        }
        let mut rest = all
            .workers
            .into_iter()
            .filter(|(id, _)| after.is_none_or(|after| *id > after));
        let mut workers = Vec::new();
        for (id, record) in rest.by_ref().take(MAX_LIST) {
            workers.extend(record::info(self.host, id, record)?);
        }
        Ok((workers, rest.next().is_some()))
    }

    fn check(&self) -> Result<()> {
        let (config, _) = self.host.configuration()?;
        check_configuration(self.host, &config).map(drop)
    }
}

/// The request's name alone: nothing formats what may hold a token.
fn name(request: &Request) -> &'static str {
    match request {
        Request::Hello { .. } => "Hello",
        Request::CreateUser { .. } => "CreateUser",
        Request::InstallAgent { .. } => "InstallAgent",
        Request::Attach { .. } => "Attach",
        Request::Kill { .. } => "Kill",
        Request::Delete { .. } => "Delete",
        Request::List { .. } => "List",
        Request::Check => "Check",
    }
}

/// Who is at the other end, as the kernel says.
#[derive(Clone, Copy, Debug)]
pub struct PeerCredentials {
    /// The uid at the moment of connecting (`SO_PEERCRED`, `socket(7)`).
    pub uid: u32,
    /// The process id at that moment, for the log only: it may be another process's since.
    pub pid: i32,
}

/// One line a request: who, what, which worker, which slot, how it ended, how long it took. Polls that went
/// well are not worth one.
fn audit(peer: PeerCredentials, request: &Request, reply: &Reply, begin: Instant) {
    let (worker, slot) = match request {
        Request::Hello { .. } | Request::List { .. } | Request::Check => (None, None),
        Request::CreateUser { worker, slot } => (Some(*worker), Some(slot.to_string())),
        Request::InstallAgent { worker, .. }
        | Request::Attach { worker }
        | Request::Kill { worker }
        | Request::Delete { worker } => (Some(*worker), None),
    };
    let worker = worker.map(|id| id.to_string()).unwrap_or_default();
    let slot = slot.unwrap_or_default();
    let (what, PeerCredentials { uid, pid }) = (name(request), peer);
    let fields = format!(
        "uid={uid} pid={pid} what={what:?} worker={worker:?} slot={slot:?} microseconds={}",
        begin.elapsed().as_micros()
    );
    match (request, reply) {
        (_, Reply::Error(error)) => warn!("{error} {fields} outcome={:?}", error.kind),
        (Request::Hello { .. } | Request::List { .. }, _) => {}
        _ => info!("request {fields} outcome=\"done\""),
    }
}
