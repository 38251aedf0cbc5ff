//! Receiving the agent's program, which comes from the supervisor as a descriptor. A process with root's uid that received
//! one of a directory could change what is below; here it gives nothing that a job has not.

use std::mem::ManuallyDrop;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result, ensure};
use libc::off_t;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::sendfile::sendfile;
use nix::sys::stat::fstat;
use protocol::{MAX_AGENT_BYTES, Received, Seqpacket, wire};

use crate::monitor_ipc::{Failure, HandshakeMessage};
use crate::unprivileged::Unprivileged;

/// Copy the agent: from what the next packet brings to the connection that the session sends first, to the file that it
/// sends second. What comes from the supervisor stays open until this process ends: closing it can take for ever
/// (`SO_LINGER` in `socket(7)`).
pub fn receive(_proof: &Unprivileged, session: &Seqpacket) -> Result<(), Failure> {
    receive_agent(session)
}

fn receive_agent(session: &Seqpacket) -> Result<(), Failure> {
    let connection = ManuallyDrop::new(Seqpacket::from(receive_descriptor(session)?));
    let file = receive_descriptor(session)?;
    let sent = connection.peek_all(wire::MAX_REQUEST);
    let sent = ManuallyDrop::new(sent.context("cannot receive the agent")?);
    let descriptors = match &*sent {
        Received::Packet { descriptors, .. } | Received::Oversize { descriptors } => &descriptors[..],
        Received::Closed => &[],
    };
    let [agent] = descriptors else {
        let sentence = "InstallAgent did not come with one descriptor: send the agent's";
        return Err(Failure::Refused(sentence.into()));
    };
    let length = check(agent)?;
    Ok(copy(agent, length, &file).context("cannot copy the agent")?)
}

fn receive_descriptor(session: &Seqpacket) -> Result<OwnedFd> {
    let descriptor = match session.recv(HandshakeMessage::MAX)? {
        Received::Packet { mut descriptors, .. } => descriptors.pop(),
        _ => None,
    };
    descriptor.context("the session has exited")
}

/// The descriptor must be a memfd that nobody can change any more: reading it then neither blocks nor
/// races. Only memfds and files of tmpfs have seals at all (`fcntl(2)`). Returns the number of its bytes.
fn check(agent: &OwnedFd) -> Result<off_t, Failure> {
    let needed = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK;
    match fcntl(agent, FcntlArg::F_GET_SEALS) {
        Ok(seals) if SealFlag::from_bits_truncate(seals).contains(needed) => {}
        _ => {
            let sentence = "the agent's descriptor is not a memfd sealed against writing, growing and shrinking: seal it";
            return Err(Failure::Refused(sentence.into()));
        }
    }
    let stat = fstat(agent).context("cannot ask how long the agent is")?;
    match stat.st_size {
        length if (1..=MAX_AGENT_BYTES as off_t).contains(&length) => Ok(length),
        length => {
            let sentence = format!("the agent has {length} bytes: send 1 to {MAX_AGENT_BYTES}");
            Err(Failure::Refused(sentence))
        }
    }
}

fn copy(agent: &OwnedFd, length: off_t, file: &OwnedFd) -> Result<()> {
    // At an offset of our own: the sender shares the descriptor's.
    let mut at = 0;
    while at < length {
        let left = (length - at) as usize;
        let copied = sendfile(file, agent, Some(&mut at), left)?;
        ensure!(copied > 0, "{left} bytes of it are missing");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Seek, SeekFrom, Write};
    use std::os::fd::AsFd;

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use protocol::{Error, ErrorKind};

    use super::*;

    fn memfd(bytes: &[u8]) -> File {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let mut file = File::from(memfd_create("agent", flags).unwrap());
        file.write_all(bytes).unwrap();
        file
    }

    fn sealed(file: File, seals: SealFlag) -> OwnedFd {
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
        file.into()
    }

    fn all_seals() -> SealFlag {
        SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK
    }

    fn kind<T: std::fmt::Debug>(result: Result<T, Failure>) -> ErrorKind {
        Error::from(result.expect_err("nothing was refused")).kind
    }

    #[test]
    fn an_agent_has_all_three_seals_and_a_size_within_bounds() {
        let whole = all_seals();
        check(&sealed(memfd(b"x"), whole)).unwrap();
        check(&sealed(memfd(b"x"), whole | SealFlag::F_SEAL_SEAL)).unwrap();
        for without in whole {
            let agent = sealed(memfd(b"x"), whole - without);
            assert_eq!(kind(check(&agent)), ErrorKind::Refused, "without {without:?}");
        }
        let plain = File::open("/proc/self/exe").unwrap().into();
        assert_eq!(kind(check(&plain)), ErrorKind::Refused);
        for (length, is_good) in [
            (0, false),
            (1, true),
            (MAX_AGENT_BYTES, true),
            (MAX_AGENT_BYTES + 1, false),
        ] {
            let sparse = memfd(b"");
            sparse.set_len(length).unwrap();
            assert_eq!(check(&sealed(sparse, whole)).is_ok(), is_good, "{length} bytes");
        }
    }

    #[test]
    fn an_agent_is_copied_whole_wherever_its_offset_is() {
        let program: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
        let mut agent = memfd(&program);
        agent.seek(SeekFrom::Start(299_999)).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        let place = file.as_file().try_clone().unwrap();
        copy(&agent.into(), program.len() as off_t, &place.into()).unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap(), program);
    }

    #[test]
    fn an_agent_is_received_from_the_next_packet_of_the_connection_which_stays() {
        let (client, connection) = Seqpacket::pair().unwrap();
        let (session, receiver) = Seqpacket::pair().unwrap();
        let attempt = || {
            let file = tempfile::NamedTempFile::new().unwrap();
            for descriptor in [connection.as_fd(), file.as_file().as_fd()] {
                HandshakeMessage::Descriptor
                    .send_to(&session, Some(descriptor))
                    .unwrap();
            }
            (receive_agent(&receiver), std::fs::read(file.path()).unwrap())
        };
        let agent = sealed(memfd(b"#!"), all_seals());
        client.send(b"InstallAgent", Some(agent.as_fd())).unwrap();
        for _ in 0..2 {
            let (result, copied) = attempt();
            result.unwrap();
            assert_eq!(copied, b"#!");
        }
        connection.recv_bytes(0).unwrap();
        client.send(b"InstallAgent", None).unwrap();
        assert_eq!(kind(attempt().0), ErrorKind::Refused);
        connection.recv_bytes(0).unwrap();
        client.send(b"InstallAgent", Some(client.as_fd())).unwrap();
        assert_eq!(kind(attempt().0), ErrorKind::Refused);
        drop(session);
        assert_eq!(kind(receive_agent(&receiver)), ErrorKind::Failed);
    }
}
