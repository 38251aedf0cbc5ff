//! What the unprivileged *supervisor* and the root *helper* may say to each other, and nothing else.
//!
//! This page is the specification. Supervisor and helper share a Unix socket of type
//! `SOCK_SEQPACKET` (`unix(7)`): one packet is one message, so there is no framing to get wrong.
//! Every packet is one [`Request`] or one [`Reply`], encoded by [`wire`]; a packet that is longer
//! than its limit, does not decode, or has bytes left over ends the connection. Descriptors travel
//! as `SCM_RIGHTS` exactly where a message below says so. Those that come with another request are
//! closed by the kernel, and nothing in the helper sees them; with another reply, they end the connection.
//!
//! # Course of a connection
//! 1. The client connects. The helper asks the kernel who it is (`SO_PEERCRED`) and closes
//!    the connection of every uid but the supervisor's.
//! 2. The client says [`Request::Hello`] with its [`VERSION`]; the helper answers
//!    [`Reply::Welcome`], or an [`ErrorKind::Version`] that names both versions, and closes the connection.
//! 3. Then any number of requests, one at a time, each answered by exactly one reply.
//!
//! ```
//! use protocol::{Received, Reply, Request, Seqpacket, VERSION, wire};
//!
//! // Two ends, as connect(2) and accept(2) would make them.
//! let (client, helper) = Seqpacket::pair()?;
//!
//!
//! client.send(&wire::encode(&Request::Hello { version: VERSION })?, None)?;
//!
//! let Received::Packet { bytes, descriptors } = helper.recv(wire::MAX_REQUEST)? else { panic!() };
//! assert!(descriptors.is_empty());
//! let Request::Hello { version: VERSION } = wire::decode(&bytes)? else { panic!() };
//! helper.send(&wire::encode(&Reply::Welcome)?, None)?;
//!
//! let Received::Packet { bytes, .. } = client.recv(wire::MAX_REPLY)? else { panic!() };
//! assert_eq!(wire::decode::<Reply>(&bytes)?, Reply::Welcome);
//!
//! drop(client);
//! assert!(matches!(helper.recv(wire::MAX_REQUEST)?, Received::Closed));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Rules that hold for every request
//! * It names things, it never describes them: no path, uid, pid, command or environment crosses.
//! * It is idempotent. Cut off anywhere and repeated, it gets to the same end; and
//!   [`Request::Delete`] gets to the end from every state whatever.
//! * Requests about one worker take turns (`flock(2)` on its directory); those about different
//!   workers never wait for each other, apart from the instant in which a slot is taken.
//! * An [`Error`] reply has changed nothing that `Delete` would not remove, and the connection goes on.
//! * After a reply, the connection ends if closing what came with the request takes more than 10 s (`SO_LINGER` in
//!   `socket(7)`).

#![warn(missing_docs)]

pub mod config;
mod message;
mod name;
mod socket;
mod sys;
pub mod usb;
pub mod wire;

pub use message::{Error, ErrorKind, Exit, MAX_LIST, Reply, Request, State, VERSION, WorkerInfo, one_line};
pub use name::{BadValue, BootstrapToken, SlotName, Target, TargetId, TargetName, Uid, UserName, WorkerId};
pub use socket::{Received, Seqpacket};

/// The largest agent that the helper copies, in bytes: 256 MiB. The real one has some tens of MiB.
pub const MAX_AGENT_BYTES: u64 = 256 << 20;
