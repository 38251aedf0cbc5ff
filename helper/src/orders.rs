//! What the processes of connections ask of the daemon, which alone may mount, make namespaces and set quotas;
//! and the few words that are spoken while a worker's first process starts. All of it stays among processes
//! of root's own making; even so an order names a worker, and its rest is read from the disk again.

use protocol::{BootstrapToken, Seqpacket, WorkerId};

/// A connection's order. The socket that comes with it takes the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Make the worker's first process. Answer: `Filter` and `Ready`; then, after `Go`, `Done`.
    Launch {
        worker: WorkerId,
        bootstrap: BootstrapToken,
    },
    /// Nothing of the worker is on the disk any more: forget its quota. Answer: `Done`.
    Unlimit { worker: WorkerId },
}

impl Order {
    /// The longest order, in bytes.
    pub const MAX: usize = 512;

    pub fn encode(&self) -> Vec<u8> {
        let (kind, worker, rest) = match self {
            Order::Launch { worker, bootstrap } => (b'L', worker, bootstrap.as_str()),
            Order::Unlimit { worker } => (b'U', worker, ""),
        };
        format!("{}{worker}{rest}", char::from(kind)).into_bytes()
    }

    pub fn decode(bytes: &[u8]) -> Option<Order> {
        let text = std::str::from_utf8(bytes).ok()?;
        let worker = text.get(1..27)?.parse().ok()?;
        match (text.get(..1)?, text.get(27..)?) {
            ("L", bootstrap) => Some(Order::Launch {
                worker,
                bootstrap: bootstrap.parse().ok()?,
            }),
            ("U", "") => Some(Order::Unlimit { worker }),
            _ => None,
        }
    }
}

/// A word between a connection and the process that carries out its order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Word {
    /// All is prepared but the filter of system calls, which is installed next.
    Filter,
    /// All is prepared; write down that the agent is started, and say so.
    Ready,
    /// It is written down.
    Go,
    /// The kernel has accepted the agent's program, or the order is carried out.
    Done,
    /// It could not be, for this reason.
    Failed(String),
    /// It could not be now, for this reason; the same again may succeed.
    Busy(String),
}

impl Word {
    /// The longest word, in bytes.
    pub const MAX: usize = 1100;

    pub fn say(&self, to: &Seqpacket) -> nix::Result<()> {
        let mut bytes = match self {
            Word::Filter => "S".to_owned(),
            Word::Ready => "R".to_owned(),
            Word::Go => "G".to_owned(),
            Word::Done => "D".to_owned(),
            Word::Failed(sentence) => format!("F{sentence}"),
            Word::Busy(sentence) => format!("B{sentence}"),
        }
        .into_bytes();
        bytes.truncate(Self::MAX);
        to.send(&bytes, None)
    }

    pub fn decode(bytes: &[u8]) -> Option<Word> {
        match bytes {
            b"S" => Some(Word::Filter),
            b"R" => Some(Word::Ready),
            b"G" => Some(Word::Go),
            b"D" => Some(Word::Done),
            [b'F', sentence @ ..] => Some(Word::Failed(String::from_utf8_lossy(sentence).into_owned())),
            [b'B', sentence @ ..] => Some(Word::Busy(String::from_utf8_lossy(sentence).into_owned())),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_survive_being_sent_and_nothing_else_is_one() {
        let worker = WorkerId::from_bits(7);
        let launch = Order::Launch {
            worker,
            bootstrap: "abcdefgh01234567".parse().unwrap(),
        };
        for order in [launch, Order::Unlimit { worker }] {
            let bytes = order.encode();
            assert!(bytes.len() <= Order::MAX);
            assert_eq!(Order::decode(&bytes), Some(order));
            for cut in 0..27 {
                assert_eq!(Order::decode(&bytes[..cut]), None);
            }
        }
        for bad in [
            "",
            "L",
            "X00000000000000000000000007",
            "U00000000000000000000000007x",
            "Lé",
        ] {
            assert_eq!(Order::decode(bad.as_bytes()), None, "{bad}");
        }
    }
}
