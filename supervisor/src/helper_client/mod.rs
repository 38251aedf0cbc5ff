//! The helper, as a client: one connection an operation, so that a slow deletion holds up nothing, and a
//! helper that was restarted in between is no special case.
//!
//! It must never send what the protocol has no message for, and never wait without end.

mod socket;

use std::fmt;
use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use protocol::{
    BootstrapToken, ErrorKind, Received, Reply, Request, SlotName, VERSION, WorkerId, WorkerInfo, wire,
};
use tokio::time::timeout;

use crate::call_error::{CallError, Peer};
use crate::pending_calls::PendingCalls;

/// The time limit of calls that end every process or remove every file of a job.
const LONG: Duration = Duration::from_secs(30 * 60);
const SHORT: Duration = Duration::from_secs(60);
/// The most pages of a list: more than a helper with the widest uid range could fill.
const MAX_PAGES: usize = 8192;

/// Why the helper did not carry out a request.
#[derive(Debug)]
pub enum Error {
    /// The helper does not run, does not serve this user, or stopped during the call: the call can be repeated later.
    Unreachable(String),
    /// The helper answered with an error.
    Refused(protocol::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Unreachable(why) => f.write_str(why),
            Error::Refused(error) if error.kind == ErrorKind::Version => write!(
                f,
                "the helper speaks another version of the protocol than this supervisor's {VERSION} ({error}): \
                 install both from the same release and restart them"
            ),
            Error::Refused(error) => write!(f, "the helper says: {error}"),
        }
    }
}

impl std::error::Error for Error {}

impl Error {
    /// The error for the core. The call is worth repeating.
    pub fn call_error(&self) -> CallError {
        CallError::temporary(Peer::Helper, self)
    }
}

type Result<T> = std::result::Result<T, Error>;

/// A way to the helper: its socket, or a simulated host.
pub trait Connector: fmt::Debug + Send + Sync {
    /// Connect to the helper.
    ///
    /// # Errors
    /// [`Error::Unreachable`].
    fn connect(&self) -> Result<Box<dyn Connection>>;
}

/// A reply that is waited for.
pub type Pending<'a> = Pin<Box<dyn Future<Output = Result<Received>> + Send + 'a>>;

/// One connection: each packet sent gets one packet back.
pub trait Connection: Send + Sync {
    /// Send `packet` with the descriptor `fd`, and wait for the reply. The error is [`Error::Unreachable`]; a
    /// connection that had one is not used again.
    fn exchange<'a>(&'a self, packet: &'a [u8], fd: Option<BorrowedFd<'a>>) -> Pending<'a>;
}

/// The helper, over this connector.
#[derive(Clone, Debug)]
pub struct HelperClient {
    connector: Arc<dyn Connector>,
    pending: Arc<PendingCalls>,
}

impl HelperClient {
    /// A client of the helper at this Unix socket, which need not exist yet.
    pub fn new(socket: PathBuf) -> Self {
        Self::over(Arc::new(socket::Socket(socket)))
    }

    /// A client over another connector, for a simulation.
    pub fn over(connector: Arc<dyn Connector>) -> Self {
        Self {
            connector,
            pending: Arc::default(),
        }
    }

    /// The calls that wait for an answer, except those whose time depends on the number of a job's files.
    pub fn pending(&self) -> &PendingCalls {
        &self.pending
    }

    /// Send [`Request::CreateUser`].
    ///
    /// # Errors
    /// Those of the request, or no answer within the time of a short call.
    pub async fn create_user(&self, worker: WorkerId, slot: SlotName) -> Result<()> {
        match self
            .ask(&Request::CreateUser { worker, slot }, None, SHORT)
            .await?
        {
            (Reply::UserCreated { .. }, _) => Ok(()),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Start the agent. Returns its console.
    pub async fn install_agent(
        &self,
        worker: WorkerId,
        bootstrap: BootstrapToken,
        agent: BorrowedFd<'_>,
    ) -> Result<OwnedFd> {
        match self
            .ask(&Request::InstallAgent { worker, bootstrap }, Some(agent), SHORT)
            .await?
        {
            (Reply::AgentStarted, Some(console)) => Ok(console),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Returns the console of a worker.
    pub async fn attach(&self, worker: WorkerId) -> Result<File> {
        match self.ask(&Request::Attach { worker }, None, SHORT).await? {
            (Reply::Attached { .. }, Some(console)) => Ok(console.into()),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// End every process of a worker. Its files stay.
    pub async fn kill(&self, worker: WorkerId) -> Result<()> {
        match self.ask(&Request::Kill { worker }, None, LONG).await? {
            (Reply::Killed, _) => Ok(()),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Send [`Request::Delete`]. Its time depends on the number of the job's files.
    ///
    /// # Errors
    /// Those of the request, or no answer.
    pub async fn delete(&self, worker: WorkerId) -> Result<()> {
        match self.ask(&Request::Delete { worker }, None, LONG).await? {
            (Reply::Deleted, _) => Ok(()),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// Would the helper start with the configuration as the file is now?
    pub async fn check(&self) -> Result<()> {
        match self.ask(&Request::Check, None, SHORT).await? {
            (Reply::Checked, _) => Ok(()),
            (other, _) => Err(unexpected(&other)),
        }
    }

    /// List all workers of this host.
    pub async fn list(&self) -> Result<Vec<WorkerInfo>> {
        let _pending = self.pending.begin();
        timeout(SHORT, self.list_pages())
            .await
            .unwrap_or_else(|_| Err(late(SHORT)))
    }

    async fn list_pages(&self) -> Result<Vec<WorkerInfo>> {
        let connection = self.connect().await?;
        let mut all: Vec<WorkerInfo> = Vec::new();
        for _ in 0..MAX_PAGES {
            let after = all.last().map(|info| info.worker);
            let (workers, more) = match exchange(&*connection, &Request::List { after }, None).await? {
                (Reply::Listed { workers, more }, _) => (workers, more),
                (other, _) => return Err(unexpected(&other)),
            };
            let goes_on = |last: &WorkerInfo| after.is_none_or(|after| last.worker > after);
            if more && !workers.last().is_some_and(goes_on) {
                return Err(Error::Unreachable(
                    "the helper's list of workers does not go on: see its log".into(),
                ));
            }
            all.extend(workers);
            if !more {
                return Ok(all);
            }
        }
        Err(Error::Unreachable(
            "the helper's list of workers has no end: see its log".into(),
        ))
    }

    async fn ask(
        &self,
        request: &Request,
        fd: Option<BorrowedFd<'_>>,
        limit: Duration,
    ) -> Result<(Reply, Option<OwnedFd>)> {
        let pending = self.pending.begin();
        let connection = timeout(SHORT, self.connect())
            .await
            .unwrap_or_else(|_| Err(late(SHORT)))?;
        // Until it ends.
        let _pending = (limit == SHORT).then_some(pending);
        timeout(limit, exchange(&*connection, request, fd))
            .await
            .unwrap_or_else(|_| Err(late(limit)))
    }

    async fn connect(&self) -> Result<Box<dyn Connection>> {
        let connection = self.connector.connect()?;
        match exchange(&*connection, &Request::Hello { version: VERSION }, None).await? {
            (Reply::Welcome, _) => Ok(connection),
            (other, _) => Err(unexpected(&other)),
        }
    }
}

/// Send one request. Returns the reply, and the descriptor that came with it, if any.
async fn exchange(
    connection: &dyn Connection,
    request: &Request,
    fd: Option<BorrowedFd<'_>>,
) -> Result<(Reply, Option<OwnedFd>)> {
    let packet =
        wire::encode(request).map_err(|e| Error::Unreachable(format!("cannot encode a request: {e}")))?;
    match connection.exchange(&packet, fd).await? {
        Received::Closed => Err(Error::Unreachable(
            "the helper closed the connection without an answer: see its log".into(),
        )),
        Received::Oversize { .. } => Err(Error::Unreachable(
            "the helper's answer is too long: see its log".into(),
        )),
        Received::Packet { bytes, descriptors } => decode_reply(&bytes, descriptors),
    }
}

fn decode_reply(bytes: &[u8], mut descriptors: Vec<OwnedFd>) -> Result<(Reply, Option<OwnedFd>)> {
    let reply: Reply = wire::decode(bytes).map_err(|e| {
        Error::Unreachable(format!(
            "the helper's answer does not decode ({e}): install both from the same release"
        ))
    })?;
    if descriptors.len() != usize::from(reply.carries_descriptor()) {
        return Err(unexpected(&reply));
    }
    match reply {
        Reply::Error(error) => Err(Error::Refused(error)),
        reply => Ok((reply, descriptors.pop())),
    }
}

fn unexpected(reply: &Reply) -> Error {
    Error::Unreachable(format!(
        "the helper answered something else than was asked ({reply:?}): see its log"
    ))
}

fn late(limit: Duration) -> Error {
    Error::Unreachable(format!(
        "the helper did not answer within {} s: see its log",
        limit.as_secs()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_absent_helper_is_away_and_the_sentence_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let error = HelperClient::new(dir.path().join("no.sock"))
            .list()
            .await
            .unwrap_err();
        assert!(
            matches!(&error, Error::Unreachable(text) if text.contains("start the helper")),
            "{error}"
        );
    }

    #[test]
    fn a_reply_with_the_wrong_descriptors_is_none() {
        let started = wire::encode(&Reply::AgentStarted).unwrap();
        assert!(decode_reply(&started, vec![]).is_err());
        let deleted = wire::encode(&Reply::Deleted).unwrap();
        let fd = File::open("/dev/null").unwrap().into();
        assert!(decode_reply(&deleted, vec![fd]).is_err());
        assert!(decode_reply(&deleted, vec![]).is_ok());
        let refusal = wire::encode(&Reply::Error(protocol::Error::new(ErrorKind::Version, "v2"))).unwrap();
        assert!(
            decode_reply(&refusal, vec![])
                .unwrap_err()
                .to_string()
                .contains("same release")
        );
    }
}
