//! The messages. The crate's page has the rules that hold for all of them.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{BootstrapToken, SlotName, Uid, UserName, WorkerId};

/// The version that this crate speaks. It changes with every change to a message.
pub const VERSION: u16 = 4;

/// The most workers in one [`Reply::Listed`]; ask again with `after` for the rest.
pub const MAX_LIST: usize = 256;

/// What the supervisor may ask for.
#[expect(missing_docs, reason = "the doc of a variant says what its fields are")]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// First packet of every connection, and only the first. Its encoding never changes. `version` is [`VERSION`].
    ///
    /// Answer: [`Reply::Welcome`]. Errors: `Version`, or `Busy` (too many connections); the helper closes it then.
    Hello { version: u16 },

    /// Take the slot for the worker, pick an unused uid = gid, make the user known, and the directory that says so.
    ///
    /// * Before: the slot is in the configuration and has nothing in it that the host lacks (else `NoSuchSlot` or `Busy`,
    ///   until an operator has corrected it); neither it nor a slot that conflicts with it (in
    ///   either direction) has a worker.
    /// * Answer: [`Reply::UserCreated`]; repeated for the same worker and slot, the same answer.
    /// * Errors: `NoSuchSlot`; `SlotTaken` (by another worker, or through a conflict; try again once that
    ///   one is deleted); `Refused` (the worker has another slot); `Limit` (no uid is free); `Failed`.
    CreateUser { worker: WorkerId, slot: SlotName },

    /// Make the worker's directories and its sandbox, and start `agent install` in it. With one descriptor: the agent's
    /// program in a memfd of 1 to [`MAX_AGENT_BYTES`](crate::MAX_AGENT_BYTES) bytes, sealed against
    /// writing, growing and shrinking (`F_SEAL_WRITE|GROW|SHRINK`, `fcntl(2)`). It is read from its
    /// beginning, whatever the file offset, and never parsed.
    ///
    /// * Before: the worker exists, and its slot is still in the configuration.
    /// * Answer: [`Reply::AgentStarted`] with the console, when the kernel has accepted the program.
    ///   Repeated after the agent was started, it starts nothing and gives the same answer: an agent
    ///   is never started twice in one worker.
    /// * Errors: `NoSuchWorker`, `NoSuchSlot`, `Refused` (the descriptor is not what is asked for, or there is not one),
    ///   `Busy` (the configuration has a mistake, a USB device of the slot is absent, the host took too long, or the
    ///   helper was restarted or lost a process meanwhile),
    ///   `Failed` (the host could not, or the program is none: the sentence has the kernel's reason,
    ///   and so has the console).
    InstallAgent {
        worker: WorkerId,
        bootstrap: BootstrapToken,
    },

    /// The console again, for a supervisor that has been restarted.
    ///
    /// * Answer: [`Reply::Attached`] with the console.
    /// * Errors: `NoSuchWorker`; `Failed`.
    Attach { worker: WorkerId },

    /// End every process of the worker. What it wrote, its user and its slot stay.
    ///
    /// * Answer: [`Reply::Killed`], when none is left.
    /// * Errors: `NoSuchWorker`; `Failed`.
    Kill { worker: WorkerId },

    /// Kill, then remove every file, IPC object, mount and cgroup of the worker, and its user; last of
    /// all the slot is free.
    ///
    /// * Answer: [`Reply::Deleted`], when nothing is left; also for a worker that never was.
    /// * Errors: `Failed`, or `Busy` where the helper was restarted meanwhile: something is left, the slot stays
    ///   taken, saying it again goes on.
    Delete { worker: WorkerId },

    /// Everything that exists on this host, in the order of ids, beginning after `after`: at most
    /// [`MAX_LIST`] workers. Takes no lock, so it never waits.
    ///
    /// Answer: [`Reply::Listed`]. Errors: `Failed`.
    List { after: Option<WorkerId> },

    /// Would the helper start with the configuration as the file is now? Nothing changes.
    ///
    /// Answer: [`Reply::Checked`]. Errors: `Refused`, with the file, the line and what is wrong.
    Check,
}

impl Request {
    /// Does this request come with one descriptor? All others come with none.
    pub fn carries_descriptor(&self) -> bool {
        matches!(self, Request::InstallAgent { .. })
    }
}

/// What the helper answers.
#[expect(missing_docs, reason = "the doc of a variant says what its fields are")]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// To `Hello`.
    Welcome,
    /// To `CreateUser`: the uid, which is the gid as well, and the name under which the host knows it.
    UserCreated { uid: Uid, name: UserName },
    /// To `InstallAgent`, with one descriptor: the console, a regular file open for reading alone.
    AgentStarted,
    /// To `Attach`, with one descriptor: the console, as above. It is empty until the agent starts.
    Attached { state: State },
    /// To `Kill`.
    Killed,
    /// To `Delete`.
    Deleted,
    /// To any request.
    Error(Error),
    /// To `List`. `more`: there are workers after the last of these.
    Listed { workers: Vec<WorkerInfo>, more: bool },
    /// To `Check`.
    Checked,
}

impl Reply {
    /// Does this reply come with one descriptor? All others come with none.
    pub fn carries_descriptor(&self) -> bool {
        matches!(self, Reply::AgentStarted | Reply::Attached { .. })
    }
}

/// One worker on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerInfo {
    /// As the supervisor named it in [`Request::CreateUser`].
    pub worker: WorkerId,
    /// The slot that it was made for, which the configuration may have lost since.
    pub slot: SlotName,
    /// Its uid and gid, of the configuration's `factory.uid_range` as that was when it was made.
    pub uid: Uid,
    /// As the disk and the kernel say it at this moment.
    pub state: State,
    /// Bytes on disk that its user owns, where the file system of the state directory has user quotas
    /// (`quotactl(2)`, `dqb_curspace`).
    pub disk: Option<u64>,
}

/// How far a worker is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// Its agent has not been started.
    Created,
    /// Its agent has been started, and processes of it run.
    Running,
    /// Its agent has been started, and no process of it runs.
    Exited(Exit),
}

/// How an agent ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// It exited with this status.
    Status(u8),
    /// This signal ended it.
    Signal(u8),
    /// It could not be started.
    NotStarted,
    /// It had run for the slot's `run_time_seconds`, and was ended with all that it had started.
    TimedOut,
    /// Nobody saw it end: `Kill`, a reboot, the kernel's OOM killer.
    Unknown,
}

/// Why a request was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Error {
    /// Tells a program what to do about it.
    pub kind: ErrorKind,
    /// One sentence for the operator; see [`Error::new`].
    message: String,
}

/// What a program may want to tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorKind {
    /// The client speaks another version of the protocol.
    Version,
    /// The request contradicts what is there, or came with the wrong descriptor. Do not repeat it.
    Refused,
    /// Not now: too many connections, a configuration with a mistake, a helper that was restarted meanwhile.
    /// Come back later.
    Busy,
    /// The host has no worker of this id: it was never made, or has been deleted.
    NoSuchWorker,
    /// The configuration, as the file is now, has no slot of this name.
    NoSuchSlot,
    /// The slot, or one that conflicts with it, has a worker.
    SlotTaken,
    /// Nothing is left to give: every uid of the range is in use.
    Limit,
    /// The host could not: no space, no memory, no device.
    Failed,
}

/// `text` as it can be shown on a terminal and logged: control characters are escaped, as in a Rust string.
pub fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_control() {
            true => line.extend(c.escape_default()),
            false => line.push(c),
        }
    }
    line
}

impl Error {
    /// The longest sentence, in bytes.
    pub const MAX_MESSAGE: usize = 1024;

    /// `message` is cut at [`Error::MAX_MESSAGE`] bytes, its control characters escaped.
    pub fn new(kind: ErrorKind, message: impl fmt::Display) -> Self {
        let mut clean = String::new();
        for c in message.to_string().chars() {
            let piece = one_line(c.encode_utf8(&mut [0; 4]));
            if clean.len() + piece.len() > Self::MAX_MESSAGE {
                break;
            }
            clean.push_str(&piece);
        }
        Self { kind, message: clean }
    }

    /// One line of at most [`Error::MAX_MESSAGE`] bytes, without control characters.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_travel_with_three_messages() {
        let worker = WorkerId::from_bits(7);
        let install = Request::InstallAgent {
            worker,
            bootstrap: "abcdefgh01234567".parse().unwrap(),
        };
        assert!(install.carries_descriptor());
        assert!(!Request::Attach { worker }.carries_descriptor());
        let state = State::Created;
        assert!(Reply::AgentStarted.carries_descriptor() && Reply::Attached { state }.carries_descriptor());
        assert!(!Reply::Killed.carries_descriptor());
    }

    #[test]
    fn sentences_are_bounded_and_cannot_break_a_log() {
        let error = Error::new(ErrorKind::Failed, "a\nb\u{1b}[2J\0é");
        assert_eq!(error.message(), r"a\nb\u{1b}[2J\u{0}é");
        assert_eq!(error.to_string(), error.message());
        for (text, length) in [
            ("x".repeat(2000), 1024),
            ("é".repeat(2000), 1024),
            ("\n".repeat(2000), 1024),
        ] {
            assert_eq!(Error::new(ErrorKind::Failed, text).message().len(), length);
        }
        let escape = "x".repeat(1023) + "\n";
        assert_eq!(Error::new(ErrorKind::Failed, escape).message().len(), 1023);
        let odd = "x".to_owned() + &"é".repeat(2000);
        assert_eq!(Error::new(ErrorKind::Failed, odd).message().len(), 1023);
    }
}
