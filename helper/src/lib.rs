//! The root helper of the buildomat user factory.
//!
//! It listens on one Unix socket for the unprivileged supervisor and does four things: make a user, start the buildomat
//! agent as that user in a sandbox, end its processes, delete all that is left. The protocol is specified in the
//! `protocol` crate. The helper keeps no state in memory: the kernel and its state directory are its state, so it can be
//! restarted at any time.
//!
//! A folder says what a process that runs its code may still do:
//!
//! | folder | its processes |
//! | --- | --- |
//! | [`monitor`] | root with eleven capabilities: it builds what every job sees, starts the others, and reads nothing that the supervisor sends. Its *listener* accepts connections |
//! | [`session`] | root with five capabilities and a listed set of system calls: one for each connection. It decodes, decides and answers. What takes more it asks of the monitor ([`monitor_ipc`]) |
//! | [`sandbox`] | a worker's first process, from a copy of the monitor to the job's user |
//! | [`unprivileged`] | the job's user, with nothing: pid 1 of a worker, and the deletion of what the job wrote |
//! | [`host`] | shared by those with privileges: directories by descriptor, users, cgroups, records, abilities of the kernel |
//! | [`privileges`] | the capabilities and system calls that each kind of process keeps |
//! | [`manual`] | a program of its own, which no packet reaches: what an operator does as root |
//!
//! A folder imports from those below it in the order monitor, session, sandbox, unprivileged, host; `manual` is above
//! all, and `privileges`, `monitor_ipc`, `log` and `sys` are below. All `unsafe` is in [`sys`]. A test of the test bed
//! (`layers`) looks at the imports.

#![warn(missing_docs)]
#![allow(
    rustdoc::private_intra_doc_links,
    reason = "who reads these pages reviews the private items"
)]

mod host;
mod log;
mod manual;
mod monitor;
mod monitor_ipc;
mod privileges;
mod sandbox;
mod session;
mod sys;
mod unprivileged;

pub use manual::main as main_of_manual;
pub use monitor::main;
// For those who try the helper's parts by themselves, fuzzing and the test `dispatcher`; and for the test of
// `docs/review.md`.
pub use host::record::{Record, WorkerError, parse_exit, print_exit};
pub use log::start as start_log;
pub use monitor_ipc::{Failure, HandshakeMessage, MonitorRequest};
pub use privileges::{CAPABILITIES, Filter, ProcessKind};
pub use session::allocation::CreateUserError;
pub use session::install::InstallError;
pub use session::policy::SlotError;
pub use session::{Operations, PeerCredentials, serve as serve_connection};
