//! What sessions ask of the monitor, which alone may mount, make namespaces and set quotas;
//! and the few messages that are exchanged while a worker's first process starts. All of it stays among processes
//! of root's own making; even so a request names a worker, and its rest is read from the disk again.

use std::os::fd::BorrowedFd;

use protocol::usb::UsbProblem;
use protocol::{BootstrapToken, Error, ErrorKind, Seqpacket, WorkerId, wire};
use serde::{Deserialize, Serialize};

/// A request of a session to the monitor. The answer goes to the socket that comes with it.
///
/// It has a form of its own: a mistake in what decodes the supervisor's packets must not be the monitor's, too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MonitorRequest {
    /// Make the worker's first process. Answer: `Filter` and `Ready`; then, after `Go`, `Done`.
    Launch {
        /// The worker, whose record has its slot and uid.
        worker: WorkerId,
        /// The token for the agent's command line.
        bootstrap: BootstrapToken,
    },
    /// Have a process of the worker's user receive an agent and copy it. It gets two messages `Descriptor`: with the
    /// supervisor's connection, whose next packet brings the agent, and with the file. Answer: `Done`.
    #[expect(missing_docs, reason = "there is one field")]
    CopyAgent { worker: WorkerId },
    /// Reset the worker's USB devices, and clear its quota: nothing of it is on the disk any more. Answer: `Done`.
    #[expect(missing_docs, reason = "there is one field")]
    CleanUp { worker: WorkerId },
}

impl MonitorRequest {
    /// The longest request, in bytes: its number, the worker's id, and a token of 128 bytes.
    pub const MAX: usize = 1 + 16 + 128;

    /// Its number, the worker's id with the highest byte first, and the token.
    pub fn to_bytes(&self) -> Vec<u8> {
        let (number, worker, token) = match self {
            MonitorRequest::Launch { worker, bootstrap } => (0, worker, bootstrap.as_str()),
            MonitorRequest::CleanUp { worker } => (1, worker, ""),
            MonitorRequest::CopyAgent { worker } => (2, worker, ""),
        };
        [&[number], &worker.to_bits().to_be_bytes()[..], token.as_bytes()].concat()
    }

    /// None if that is no request.
    pub fn from_bytes(bytes: &[u8]) -> Option<MonitorRequest> {
        let (number, rest) = bytes.split_first()?;
        let (worker, token) = rest.split_first_chunk()?;
        let worker = WorkerId::from_bits(u128::from_be_bytes(*worker));
        match number {
            0 => Some(MonitorRequest::Launch {
                worker,
                bootstrap: std::str::from_utf8(token).ok()?.parse().ok()?,
            }),
            1 if token.is_empty() => Some(MonitorRequest::CleanUp { worker }),
            2 if token.is_empty() => Some(MonitorRequest::CopyAgent { worker }),
            _ => None,
        }
    }
}

/// Why a request was not carried out: a request to the monitor, or one of the supervisor that depends on the host
/// alone.
#[derive(Debug)]
pub enum Failure {
    /// The host could not do it. The whole chain of reasons is sent.
    Failed(anyhow::Error),
    /// The same request may succeed if it is repeated.
    Busy(String),
    /// What came with the request is not what is asked for.
    Refused(String),
}

/// Implement `From` for the error of an operation, so that `?` converts these errors.
macro_rules! from {
    ($error:ident { $($variant:ident($of:ty)),+ }) => {
        $(impl From<$of> for $error {
            fn from(error: $of) -> Self {
                $error::$variant(error.into())
            }
        })+
    };
}

pub(crate) use from;

from!(Failure { Failed(anyhow::Error), Failed(nix::Error), Failed(std::io::Error) });

/// A job waits for what is to be plugged in.
impl From<UsbProblem> for Failure {
    fn from(problem: UsbProblem) -> Failure {
        Failure::Busy(problem.to_string())
    }
}

/// The error that another process has sent.
impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        match error.kind {
            ErrorKind::Busy => Failure::Busy(error.to_string()),
            ErrorKind::Refused => Failure::Refused(error.to_string()),
            _ => Failure::Failed(error.into()),
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Error {
        match failure {
            Failure::Failed(error) => Error::new(ErrorKind::Failed, format!("{error:#}")),
            Failure::Busy(sentence) => Error::new(ErrorKind::Busy, sentence),
            Failure::Refused(sentence) => Error::new(ErrorKind::Refused, sentence),
        }
    }
}

/// A message between a session and the process that carries out its request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HandshakeMessage {
    /// The descriptor that comes with it.
    Descriptor,
    /// Everything is prepared except the filter of system calls, which is installed next.
    Filter,
    /// Everything is prepared: the session must record the start of the agent, and then send `Go`.
    Ready,
    /// The start of the agent is recorded.
    Go,
    /// The kernel has accepted the agent's program, or the request is carried out.
    Done,
    /// The request was not carried out, for this reason.
    Failed(Error),
}

impl HandshakeMessage {
    /// The longest message, in bytes: its number, the kind of the error, and a sentence with its length.
    pub const MAX: usize = 1 + 1 + 3 + Error::MAX_MESSAGE;

    /// A `Failed` message with this reason.
    pub fn failed(reason: impl Into<Failure>) -> HandshakeMessage {
        HandshakeMessage::Failed(reason.into().into())
    }

    /// Send the message. This does not block: a receiver that behaves as it should has room for the few messages of a
    /// start.
    ///
    /// # Errors
    /// Those of `sendmsg(2)`.
    pub fn send_to(&self, to: &Seqpacket, descriptor: Option<BorrowedFd<'_>>) -> nix::Result<()> {
        to.try_send(
            &wire::encode(self).expect("it is shorter than a reply"),
            descriptor,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_messages_fit() {
        let bootstrap = "a".repeat(128).parse().unwrap();
        let worker = WorkerId::from_bits(u128::MAX);
        let launch = MonitorRequest::Launch { worker, bootstrap };
        assert_eq!(launch.to_bytes().len(), MonitorRequest::MAX);
        for request in [
            launch,
            MonitorRequest::CleanUp { worker },
            MonitorRequest::CopyAgent { worker },
        ] {
            let bytes = request.to_bytes();
            assert_eq!(MonitorRequest::from_bytes(&bytes), Some(request));
            // Neither cut off, nor longer than it may be, nor of another number.
            assert_eq!(MonitorRequest::from_bytes(&bytes[..16]), None);
            assert_eq!(MonitorRequest::from_bytes(&[&bytes[..], b"/"].concat()), None);
            assert_eq!(MonitorRequest::from_bytes(&[&[3], &bytes[1..]].concat()), None);
        }
        let reason = Failure::Busy("x".repeat(2 * Error::MAX_MESSAGE));
        let message = wire::encode(&HandshakeMessage::failed(reason)).unwrap();
        assert_eq!(message.len(), HandshakeMessage::MAX);
    }

    #[test]
    fn a_receiver_that_takes_nothing_does_not_block_the_sender() {
        let (from, _to) = Seqpacket::pair().unwrap();
        let refused = (0..1_000_000).find_map(|_| HandshakeMessage::Done.send_to(&from, None).err());
        assert_eq!(refused, Some(nix::errno::Errno::EAGAIN));
    }
}
