//! A client's side of one connection, made of bytes; what lies beneath the dispatcher, a model of a host; and what
//! every connection must keep to, whatever is sent. `fuzz/` uses this, too: an input that it finds is a test here.

#[path = "../../../tests/src/helper_model.rs"]
#[allow(dead_code, reason = "the test over the real helper uses the rest")]
mod model;

use std::cell::RefCell;
use std::fs::File;
use std::io::{IoSlice, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Result, anyhow};
use helper::{CreateUserError, Failure, InstallError, Operations, PeerCredentials, SlotError, WorkerError};
use model::{Agent, Configuration, Model};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, Shutdown, SockFlag, SockType, sendmsg, shutdown, socketpair,
};
use protocol::{
    BootstrapToken, ErrorKind, MAX_LIST, Received, Reply, Request, Seqpacket, SlotName, State, Uid, UserName,
    VERSION, WorkerId, WorkerInfo, wire,
};

/// The most packets in one conversation: all of them, and all answers, fit into the socket's buffers.
const MAX_PACKETS: usize = 64;
/// The last is in no configuration; the first two conflict.
const SLOTS: [&str; 4] = ["a", "b", "c", "zz"];
/// So few that they run out before the slots do.
const UIDS: std::ops::RangeInclusive<u32> = 2_000_000..=2_000_000;

/// A descriptor that travels with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SentDescriptor {
    Program,
    NoProgram,
    Unsealed,
    Socket,
}

#[derive(Clone, Debug)]
pub struct Packet {
    pub bytes: Vec<u8>,
    pub descriptors: Vec<SentDescriptor>,
}

/// What a client sends, and whether the helper has too many of them.
#[derive(Debug)]
pub struct Conversation {
    pub is_busy: bool,
    pub packets: Vec<Packet>,
}

impl From<&[u8]> for Conversation {
    /// Any bytes are a conversation, most of it well formed: a fuzzer that flips one gets somewhere else.
    fn from(bytes: &[u8]) -> Self {
        let mut bytes = bytes.iter().copied();
        let mut packets = Vec::new();
        let is_busy = bytes.next() == Some(1);
        while let Some(what) = bytes.next().filter(|_| packets.len() < MAX_PACKETS) {
            let mut next = || bytes.next().unwrap_or_default();
            let (which, how) = (next(), next());
            let worker = WorkerId::from_bits(u128::from(which % 4) << 80 | 7);
            let slot = SLOTS[usize::from(which / 4 % 4)].parse().expect("a name");
            let request = match what % 11 {
                0 => Request::Hello {
                    version: which.into(),
                },
                1 | 2 => Request::CreateUser { worker, slot },
                3 => Request::InstallAgent {
                    worker,
                    bootstrap: "abcdefgh01234567".parse().expect("a token"),
                },
                4 => Request::Attach { worker },
                5 => Request::Kill { worker },
                6 => Request::Delete { worker },
                7 => Request::List { after: None },
                8 => Request::List { after: Some(worker) },
                9 => Request::Check,
                // Anything: this many bytes as they come.
                _ => {
                    let bytes = (0..u16::from(which) * 3).map(|_| next()).collect();
                    let descriptors = sent_descriptors(how, 0);
                    packets.push(Packet { bytes, descriptors });
                    continue;
                }
            };
            let descriptors = sent_descriptors(how, usize::from(request.carries_descriptor()));
            let mut bytes = wire::encode(&request).expect("a request can be encoded");
            match how / 16 {
                12 => bytes.truncate(usize::from(next()) % (bytes.len() + 1)),
                13 => bytes.push(next()),
                14 => {
                    let (at, bit) = (usize::from(next()) % bytes.len(), next() % 8);
                    bytes[at] ^= 1 << bit;
                }
                15 => bytes.resize(wire::MAX_REQUEST + usize::from(next() % 3) - 1, 0),
                _ => {}
            }
            packets.push(Packet { bytes, descriptors });
        }
        Conversation { is_busy, packets }
    }
}

/// What `how` makes of the number of descriptors that is called for.
fn sent_descriptors(how: u8, called_for: usize) -> Vec<SentDescriptor> {
    use SentDescriptor::*;
    let kind = [Program, NoProgram, Unsealed, Socket][usize::from(how / 4 % 4)];
    let number = match how {
        0xb0 => 0,
        0xb1 => 1,
        0xb2 => 2,
        0xb3 => 3,
        _ => called_for,
    };
    vec![kind; number]
}

impl SentDescriptor {
    fn open(self) -> OwnedFd {
        let memory = |program: &[u8], seals| {
            let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
            let mut file = File::from(memfd_create("agent", flags).expect("a memfd"));
            file.write_all(program).expect("a memfd can be written");
            fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).expect("a memfd can be sealed");
            file.into()
        };
        match self {
            SentDescriptor::Program => memory(b"#!", SealFlag::F_SEAL_WRITE),
            SentDescriptor::NoProgram => memory(b"?", SealFlag::F_SEAL_WRITE),
            SentDescriptor::Unsealed => memory(b"#!", SealFlag::empty()),
            SentDescriptor::Socket => pair().0,
        }
    }

    /// What it is to the model.
    fn agent(self) -> Agent {
        match self {
            SentDescriptor::Program => Agent::Stays,
            SentDescriptor::NoProgram => Agent::NoProgram,
            SentDescriptor::Unsealed | SentDescriptor::Socket => Agent::Unsealed,
        }
    }
}

fn pair() -> (OwnedFd, OwnedFd) {
    let flags = SockFlag::SOCK_CLOEXEC;
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).expect("a pair of sockets")
}

/// A host in which everything happens as the contract says.
struct ModelOperations(RefCell<Model>);

/// The error of `CreateUser` that becomes this kind.
fn cannot_create(kind: ErrorKind, worker: WorkerId, slot: &SlotName) -> CreateUserError {
    match kind {
        ErrorKind::NoSuchSlot => SlotError::NoSuchSlot(slot.clone()).into(),
        ErrorKind::SlotTaken => SlotError::SlotTaken("it has a worker".into()).into(),
        ErrorKind::Refused => CreateUserError::HasOtherSlot {
            worker,
            has: slot.clone(),
            asked: slot.clone(),
        },
        ErrorKind::Limit => CreateUserError::NoFreeUid,
        ErrorKind::Busy => CreateUserError::Misconfigured(anyhow!("it has a mistake")),
        ErrorKind::Failed => anyhow!("it failed").into(),
        other => unreachable!("no {other:?} for CreateUser"),
    }
}

/// The error of `Attach` and `Kill` that becomes this kind.
fn cannot_use(kind: ErrorKind, worker: WorkerId) -> WorkerError {
    match kind {
        ErrorKind::NoSuchWorker => WorkerError::NoSuchWorker(worker),
        ErrorKind::Failed => anyhow!("it failed").into(),
        other => unreachable!("no {other:?} for a worker"),
    }
}

/// The error of `InstallAgent` that becomes this kind.
fn cannot_install(kind: ErrorKind, worker: WorkerId) -> InstallError {
    match kind {
        ErrorKind::NoSuchSlot => InstallError::NoSuchSlot("a".parse().expect("a name")),
        ErrorKind::Refused => Failure::Refused("it has no seals".into()).into(),
        ErrorKind::Busy => Failure::Busy("it was restarted".into()).into(),
        other => cannot_use(other, worker).into(),
    }
}

fn console() -> File {
    File::open("/dev/null").expect("/dev/null can be opened")
}

/// What it is to the model.
fn agent_of(descriptor: OwnedFd) -> Agent {
    use std::os::unix::fs::FileExt;
    let seals = fcntl(&descriptor, FcntlArg::F_GET_SEALS).unwrap_or_default();
    let mut begin = [0];
    match SealFlag::from_bits_truncate(seals).contains(SealFlag::F_SEAL_WRITE) {
        false => Agent::Unsealed,
        true if File::from(descriptor).read_at(&mut begin, 0).is_ok() && begin == *b"#" => Agent::Stays,
        true => Agent::NoProgram,
    }
}

impl Operations for ModelOperations {
    fn create_user(&self, worker: WorkerId, slot: &SlotName) -> Result<(Uid, UserName), CreateUserError> {
        let made = self.0.borrow_mut().create_user(worker, slot);
        let uid = made.map_err(|kind| cannot_create(kind, worker, slot))?;
        Ok((uid, worker.into()))
    }

    fn install_agent(
        &self,
        worker: WorkerId,
        connection: &Seqpacket,
        _: &BootstrapToken,
    ) -> Result<File, InstallError> {
        let agent = match connection.peek_all(wire::MAX_REQUEST) {
            Ok(Received::Packet { mut descriptors, .. }) if descriptors.len() == 1 => descriptors.pop(),
            _ => None,
        };
        let agent = agent.map_or(Agent::Unsealed, agent_of);
        let installed = self.0.borrow_mut().install_agent(worker, agent);
        installed.map_err(|kind| cannot_install(kind, worker))?;
        Ok(console())
    }

    fn attach(&self, worker: WorkerId) -> Result<(State, File), WorkerError> {
        let attached = self.0.borrow_mut().attach(worker);
        Ok((attached.map_err(|kind| cannot_use(kind, worker))?, console()))
    }

    fn kill(&self, worker: WorkerId) -> Result<(), WorkerError> {
        let killed = self.0.borrow_mut().kill(worker);
        killed.map_err(|kind| cannot_use(kind, worker))
    }

    fn delete(&self, worker: WorkerId) -> Result<(), Failure> {
        self.0.borrow_mut().delete(worker);
        Ok(())
    }

    fn list(&self, after: Option<WorkerId>) -> Result<(Vec<WorkerInfo>, bool), Failure> {
        Ok(self.0.borrow().list(after, MAX_LIST))
    }

    fn check(&self) -> Result<()> {
        Ok(())
    }
}

/// What must be answered, packet by packet, until the helper closes the connection: the page of the `protocol` crate.
fn answers(conversation: &Conversation, mut model: Model) -> Vec<Result<Reply, ErrorKind>> {
    let mut answers = Vec::new();
    let mut is_greeted = false;
    for Packet { bytes, descriptors } in &conversation.packets {
        let Ok(request) = wire::decode::<Request>(bytes) else {
            break;
        };
        if bytes.len() > wire::MAX_REQUEST {
            break;
        }
        if !is_greeted {
            answers.push(match request {
                Request::Hello { version: VERSION } if conversation.is_busy => Err(ErrorKind::Busy),
                Request::Hello { version: VERSION } => {
                    is_greeted = true;
                    Ok(Reply::Welcome)
                }
                Request::Hello { .. } => Err(ErrorKind::Version),
                _ => Err(ErrorKind::Refused),
            });
            if !is_greeted {
                break;
            }
            continue;
        }
        answers.push(match request {
            Request::Hello { .. } => Err(ErrorKind::Refused),
            Request::CreateUser { worker, slot } => {
                model.create_user(worker, &slot).map(|uid| Reply::UserCreated {
                    uid,
                    name: worker.into(),
                })
            }
            Request::InstallAgent { worker, .. } => {
                let agent = match descriptors[..] {
                    [agent] => agent.agent(),
                    _ => Agent::Unsealed,
                };
                model.install_agent(worker, agent).map(|()| Reply::AgentStarted)
            }
            Request::Attach { worker } => model.attach(worker).map(|state| Reply::Attached { state }),
            Request::Kill { worker } => model.kill(worker).map(|()| Reply::Killed),
            Request::Delete { worker } => {
                model.delete(worker);
                Ok(Reply::Deleted)
            }
            Request::Check => Ok(Reply::Checked),
            Request::List { after } => {
                let (workers, more) = model.list(after, MAX_LIST);
                Ok(Reply::Listed { workers, more })
            }
        });
    }
    answers
}

fn send(socket: &OwnedFd, packet: &Packet) {
    let open: Vec<OwnedFd> = packet.descriptors.iter().map(|it| it.open()).collect();
    let raw: Vec<i32> = open.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
    let iov = [IoSlice::new(&packet.bytes)];
    sendmsg::<()>(socket.as_raw_fd(), &iov, control, MsgFlags::empty(), None).expect("a packet can be sent");
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd")
        .expect("/proc is mounted")
        .count()
}

/// Serve the conversation by the real dispatcher, with a model beneath it. Panics where anything is not as it must
/// be: the answers, up to the packet at which the helper has to close the connection; what comes with them; and that no
/// descriptor is left. One at a time in a process, which has nothing else to do.
pub fn check_conversation(conversation: &Conversation) {
    let before = open_descriptors();
    let slots = SLOTS[..3].iter().map(|name| name.parse().expect("a name"));
    let configuration = Configuration {
        slots: slots.collect(),
        conflicts: [("a", "b")]
            .map(|(a, b)| (a.parse().expect("a name"), b.parse().expect("a name")))
            .into(),
    };
    let model = Model::new(configuration, UIDS);
    let (client, server) = pair();
    for packet in &conversation.packets {
        send(&client, packet);
    }
    shutdown(client.as_raw_fd(), Shutdown::Write).expect("a socket can be shut down");
    let client = Seqpacket::from(client);
    let operations = ModelOperations(RefCell::new(model.clone()));
    let peer = PeerCredentials { uid: 0, pid: 1 };
    helper::serve_connection(&operations, peer, conversation.is_busy, &server.into());

    let mut answered = Vec::new();
    loop {
        let (bytes, descriptors) = match client.recv(wire::MAX_REPLY) {
            Ok(Received::Packet { bytes, descriptors }) => (bytes, descriptors),
            // The helper has not read all of it. What it answered before is still to come.
            Err(Errno::ECONNRESET) => continue,
            Ok(Received::Closed) => break,
            other => panic!("received {other:?}"),
        };
        let reply: Reply = wire::decode(&bytes).expect("a reply");
        assert_eq!(
            descriptors.len(),
            usize::from(reply.carries_descriptor()),
            "{reply:?}"
        );
        for console in &descriptors {
            let flags = fcntl(console, FcntlArg::F_GETFL).expect("a descriptor has flags");
            assert_eq!(
                OFlag::from_bits_truncate(flags) & OFlag::O_ACCMODE,
                OFlag::O_RDONLY
            );
        }
        answered.push(match reply {
            Reply::Error(error) => Err(error.kind),
            reply => Ok(reply),
        });
    }
    assert_eq!(answered, answers(conversation, model), "{conversation:?}");
    drop(client);
    assert_eq!(
        open_descriptors(),
        before,
        "descriptors are left: {conversation:?}"
    );
}
