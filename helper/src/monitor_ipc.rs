//! What sessions ask of the monitor, which alone may mount, make namespaces and set quotas;
//! and the few messages that are exchanged while a worker's first process starts. All of it stays among processes
//! of root's own making; even so a request names a worker, and its rest is read from the disk again.

use protocol::{BootstrapToken, Error, ErrorKind, Seqpacket, WorkerId};

/// What a session may ask of the monitor. The socket that comes with it takes the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MonitorRequest {
    /// Make the worker's first process. Answer: `Filter` and `Ready`; then, after `Go`, `Done`.
    Launch {
        /// It has a record, from which slot and uid are read.
        worker: WorkerId,
        /// For the agent's command line.
        bootstrap: BootstrapToken,
    },
    /// Nothing of the worker is on the disk any more: forget its quota. Answer: `Done`.
    #[expect(missing_docs, reason = "there is one field")]
    ClearQuota { worker: WorkerId },
}

impl MonitorRequest {
    /// The longest request, in bytes.
    pub const MAX: usize = 512;

    /// A letter, the worker's id and, for `Launch`, the token: at most 155 bytes.
    pub fn encode(&self) -> Vec<u8> {
        let (kind, worker, rest) = match self {
            MonitorRequest::Launch { worker, bootstrap } => (b'L', worker, bootstrap.as_str()),
            MonitorRequest::ClearQuota { worker } => (b'U', worker, ""),
        };
        format!("{}{worker}{rest}", char::from(kind)).into_bytes()
    }

    /// None where it is not exactly what [`MonitorRequest::encode`] makes.
    pub fn decode(bytes: &[u8]) -> Option<MonitorRequest> {
        let text = std::str::from_utf8(bytes).ok()?;
        let worker = text.get(1..27)?.parse().ok()?;
        match (text.get(..1)?, text.get(27..)?) {
            ("L", bootstrap) => Some(MonitorRequest::Launch {
                worker,
                bootstrap: bootstrap.parse().ok()?,
            }),
            ("U", "") => Some(MonitorRequest::ClearQuota { worker }),
            _ => None,
        }
    }
}

/// Why a request was not carried out: one to the monitor, or one of the supervisor's that takes nothing but the host.
#[derive(Debug)]
pub enum Failure {
    /// The host could not: the whole chain of reasons is sent.
    Failed(anyhow::Error),
    /// The same again may succeed.
    Busy(String),
}

/// Let `?` make an error of an operation from these.
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

from!(Failure { Failed(anyhow::Error) });

impl From<Failure> for Error {
    fn from(failure: Failure) -> Error {
        match failure {
            Failure::Failed(error) => Error::new(ErrorKind::Failed, format!("{error:#}")),
            Failure::Busy(sentence) => Error::new(ErrorKind::Busy, sentence),
        }
    }
}

/// A message between a session and the process that carries out its request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HandshakeMessage {
    /// All is prepared but the filter of system calls, which is installed next.
    Filter,
    /// All is prepared; write down that the agent is started, and say so.
    Ready,
    /// It is written down.
    Go,
    /// The kernel has accepted the agent's program, or the request is carried out.
    Done,
    /// It could not be, for this reason.
    Failed(String),
    /// It could not be now, for this reason; the same again may succeed.
    Busy(String),
}

impl HandshakeMessage {
    /// The longest message, in bytes.
    pub const MAX: usize = 1100;

    /// A reason is cut at [`HandshakeMessage::MAX`] bytes. The error is of `sendmsg(2)`.
    pub fn send_to(&self, to: &Seqpacket) -> nix::Result<()> {
        let mut bytes = match self {
            HandshakeMessage::Filter => "S".to_owned(),
            HandshakeMessage::Ready => "R".to_owned(),
            HandshakeMessage::Go => "G".to_owned(),
            HandshakeMessage::Done => "D".to_owned(),
            HandshakeMessage::Failed(sentence) => format!("F{sentence}"),
            HandshakeMessage::Busy(sentence) => format!("B{sentence}"),
        }
        .into_bytes();
        bytes.truncate(Self::MAX);
        to.send(&bytes, None)
    }

    /// None where no message begins so. What a reason has that is not UTF-8 is replaced.
    pub fn decode(bytes: &[u8]) -> Option<HandshakeMessage> {
        match bytes {
            b"S" => Some(HandshakeMessage::Filter),
            b"R" => Some(HandshakeMessage::Ready),
            b"G" => Some(HandshakeMessage::Go),
            b"D" => Some(HandshakeMessage::Done),
            [b'F', sentence @ ..] => Some(HandshakeMessage::Failed(
                String::from_utf8_lossy(sentence).into_owned(),
            )),
            [b'B', sentence @ ..] => Some(HandshakeMessage::Busy(
                String::from_utf8_lossy(sentence).into_owned(),
            )),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_survive_being_sent_and_nothing_else_is_one() {
        let worker = WorkerId::from_bits(7);
        let launch = MonitorRequest::Launch {
            worker,
            bootstrap: "abcdefgh01234567".parse().unwrap(),
        };
        for request in [launch, MonitorRequest::ClearQuota { worker }] {
            let bytes = request.encode();
            assert!(bytes.len() <= MonitorRequest::MAX);
            assert_eq!(MonitorRequest::decode(&bytes), Some(request));
            for cut in 0..27 {
                assert_eq!(MonitorRequest::decode(&bytes[..cut]), None);
            }
        }
        for bad in [
            "",
            "L",
            "X00000000000000000000000007",
            "U00000000000000000000000007x",
            "Lé",
        ] {
            assert_eq!(MonitorRequest::decode(bad.as_bytes()), None, "{bad}");
        }
    }
}
