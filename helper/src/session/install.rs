//! Starting an agent: the session's part. The session checks, puts the job's files in place, and asks the monitor for the
//! worker's first process, for which it has neither the capabilities nor the system calls.
//!
//! Three processes take part. The session holds the worker's lock (`flock(2)` on its directory) from the first step to the
//! last, and one end of a socket pair. The first process has the other end, and keeps it open until the agent runs: if the
//! session dies, the first process reads the end of the socket and exits. Who waits has a time limit
//! ([`STEP_TIMEOUT_SECONDS`]).
//!
//! | step | process | what it does | cut off after it |
//! | --- | --- | --- | --- |
//! | 1 | session | [`check_agent`]: the memfd and its seals | nothing was changed |
//! | 2 | session | [`writable_dirs::make`], [`cgroup::create`], [`limits::limit_cgroup`] | empty directories, an empty cgroup: a repeat makes them again |
//! | 3 | session | sends [`MonitorRequest::Launch`] with the end of the socket pair | the monitor finds that nobody waits, and drops the request |
//! | 4 | monitor | when the root file system of jobs is up to date: clones the first process into its cgroup and namespaces | the first process ends, as above |
//! | 5 | session | meanwhile: [`copy_agent`] into `fs/run` | a part of the program, which a repeat replaces |
//! | 6 | first process | [`apply_sandbox`](crate::sandbox), then says `Filter` | as above; its mounts go with its namespace |
//! | 7 | first process | installs its filter, says `Ready`, and waits for `Go` | as above |
//! | 8 | session | [`timer::start`], if the slot has a run time | the timer ends with the cgroup |
//! | 9 | session | [`Worker::mark_started`]: a link, and one `fsync(2)` of the worker's directory. From here on no agent is started in this worker again | the worker is `Exited(Unknown)`: its job has not begun |
//! | 10 | session | says `Go` | the agent starts, and nobody was told: a repeat answers `AgentStarted` |
//! | 11 | first process | as pid 1, starts the agent; says `Done`, or `Failed` with the kernel's reason | the same |
//!
//! A repeat begins with step 1, and kills what an earlier attempt has left in the cgroup. `Delete` gets to its end from
//! every step.

use std::fs::{File, Permissions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::sendfile::sendfile;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;
use protocol::{BootstrapToken, Error, ErrorKind, MAX_AGENT_BYTES, Received, Seqpacket, SlotName, wire};

use crate::host::directory::{open_dir, open_file};
use crate::host::record::{Record, Worker, WorkerError};
use crate::host::{Host, abilities, cgroup, misconfigured, no_such_slot, users};
use crate::monitor_ipc::{Failure, HandshakeMessage, MonitorRequest, from};
use crate::privileges::seccomp;
use crate::sandbox::{AGENT, limits, writable_dirs};
use crate::session::timer;

/// Why `InstallAgent` was not done.
#[derive(Debug)]
pub enum InstallError {
    /// There is no such worker, or its record is damaged.
    Worker(WorkerError),
    /// It has left the configuration.
    NoSuchSlot(SlotName),
    /// The descriptor is not what is asked for.
    BadAgent(String),
    /// The configuration has a mistake, or the slot names what the host lacks.
    Misconfigured(anyhow::Error),
    /// The sandbox could not be made, or the kernel does not take the program.
    Host(Failure),
}

from!(InstallError { Worker(WorkerError), Host(Failure), Host(anyhow::Error) });

impl From<InstallError> for Error {
    fn from(error: InstallError) -> Error {
        match error {
            InstallError::Worker(error) => error.into(),
            InstallError::NoSuchSlot(slot) => no_such_slot(&slot),
            InstallError::BadAgent(sentence) => Error::new(ErrorKind::Refused, sentence),
            InstallError::Misconfigured(error) => misconfigured(error),
            InstallError::Host(failure) => failure.into(),
        }
    }
}

/// Start the agent, unless it was started before. Returns when the kernel has accepted the program.
pub fn install(
    host: &Host,
    monitor: &Seqpacket,
    worker: &Worker,
    record: &Record,
    agent: OwnedFd,
    bootstrap: &BootstrapToken,
) -> Result<(), InstallError> {
    if worker.is_started()? {
        return Ok(());
    }
    let agent = check_agent(agent)?;
    let (config, _) = host.configuration().map_err(InstallError::Misconfigured)?;
    let slot = config.slots.get(&record.slot);
    let slot = slot.ok_or_else(|| InstallError::NoSuchSlot(record.slot.clone()))?;
    abilities::check(&record.slot, &slot.limits, host.abilities).map_err(InstallError::Misconfigured)?;
    users::groups(host, &slot.add_to_groups).map_err(InstallError::Misconfigured)?;
    writable_dirs::make(
        worker.dir(),
        record.uid,
        &writable_dirs::of(&worker.user(), record.uid, slot),
    )?;
    // A first attempt that was cut off may have left its pid 1, waiting for a message that will not come.
    cgroup::kill_and_remove(&host.cgroups, worker.id)?;
    let cgroup =
        cgroup::create(&host.cgroups, &worker.id.to_string()).context("cannot make the worker's cgroup")?;
    limits::limit_cgroup(&cgroup, slot, host.abilities)?;
    let child = request(
        monitor,
        &MonitorRequest::Launch {
            worker: worker.id,
            bootstrap: bootstrap.clone(),
        },
    )?;
    // Meanwhile: its first process needs about as long for the sandbox. It waits for `Go` before it looks.
    let run = open_dir(worker.dir(), "fs/run").context("cannot open the worker's fs/run")?;
    copy_agent(&agent, &run)?;
    expect(&child, HandshakeMessage::Filter)?;
    set_receive_timeout(&child, FILTER_TIMEOUT_SECONDS)?;
    expect(&child, HandshakeMessage::Ready)?;
    set_receive_timeout(&child, STEP_TIMEOUT_SECONDS)?;
    if let Some(seconds) = slot.limits.run_time_seconds {
        timer::start(worker, &cgroup, Duration::from_secs(seconds))?;
    }
    worker.mark_started()?;
    HandshakeMessage::Go
        .send_to(&child, None)
        .context("the worker's pid 1 has exited")?;
    Ok(expect(&child, HandshakeMessage::Done)?)
}

/// How long the monitor, or a process of its making, may take for a step, in seconds. One that hangs in a mount must not
/// keep the worker's lock: its deletion would wait for ever. With the filter it is less than the supervisor waits for an
/// answer, a minute: so the supervisor gets the reason.
const STEP_TIMEOUT_SECONDS: i64 = 45;
/// The same for a job's filter of system calls, which takes a millisecond or does not end.
const FILTER_TIMEOUT_SECONDS: i64 = 10;

fn set_receive_timeout(answers: &impl AsFd, seconds: i64) -> Result<()> {
    setsockopt(answers, sockopt::ReceiveTimeout, &TimeVal::new(seconds, 0))
        .context("cannot limit how long an answer is waited for")
}

/// Ask the monitor: the other end of the socket that it gets answers.
pub fn request(monitor: &Seqpacket, request: &MonitorRequest) -> Result<Seqpacket, Failure> {
    let (here, there) = Seqpacket::pair().context("cannot make a pair of sockets")?;
    set_receive_timeout(&here, STEP_TIMEOUT_SECONDS)?;
    let sent = monitor.send(&request.to_bytes(), Some(there.as_fd()));
    let restarted = "the helper was restarted: repeat the request on a new connection";
    sent.map_err(|_| Failure::Busy(restarted.into()))?;
    Ok(here)
}

/// Wait for this message.
pub fn expect(from: &Seqpacket, expected: HandshakeMessage) -> Result<(), Failure> {
    let packet = match from.recv(HandshakeMessage::MAX) {
        Ok(Received::Packet { bytes, .. }) => bytes,
        // The request did not fail: nobody is left who could say so.
        Err(Errno::EAGAIN) => {
            return Err(Failure::Busy(match expected {
                HandshakeMessage::Ready => format!(
                    "the kernel did not install the job's filter of system calls (seccomp) within {FILTER_TIMEOUT_SECONDS} s. {}",
                    seccomp::LATE_FILTER_HINT
                ),
                _ => format!(
                    "the helper did not finish this step within {STEP_TIMEOUT_SECONDS} s: look for its processes in state D in ps, and repeat"
                ),
            }));
        }
        _ => {
            let killed =
                "the process for this step was killed: look for the reason in the kernel's log, and repeat";
            return Err(Failure::Busy(killed.into()));
        }
    };
    Err(match wire::decode(&packet) {
        Ok(message) if message == expected => return Ok(()),
        Ok(HandshakeMessage::Failed(error)) => error.into(),
        other => Failure::Failed(anyhow!(
            "the process for this step sent {other:?} instead of {expected:?}"
        )),
    })
}

/// The descriptor must be a memfd that nobody can change any more: reading it then neither blocks nor
/// races. Only memfds and files of tmpfs have seals at all (`fcntl(2)`).
fn check_agent(fd: OwnedFd) -> Result<File, InstallError> {
    let needed = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK;
    match fcntl(&fd, FcntlArg::F_GET_SEALS) {
        Ok(seals) if SealFlag::from_bits_truncate(seals).contains(needed) => {}
        _ => {
            let sentence = "the agent's descriptor is not a memfd sealed against writing, growing and shrinking: seal it";
            return Err(InstallError::BadAgent(sentence.into()));
        }
    }
    let file = File::from(fd);
    let len = file.metadata().context("cannot ask how long the agent is")?.len();
    if len == 0 || len > MAX_AGENT_BYTES {
        let sentence = format!("the agent has {len} bytes: send 1 to {MAX_AGENT_BYTES}");
        return Err(InstallError::BadAgent(sentence));
    }
    Ok(file)
}

/// Copy the agent into the worker's directory: a file of root's that the job may run and read.
fn copy_agent(agent: &File, run: &OwnedFd) -> Result<()> {
    let name = AGENT.rsplit('/').next().expect("a path has a last part");
    let describe = || "cannot copy the agent";
    let copy =
        open_file(run, name, OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC).with_context(describe)?;
    // At an offset of our own: the sender shares the descriptor's.
    let (mut at, end) = (0, agent.metadata()?.len() as i64);
    while at < end {
        let left = (end - at) as usize;
        let copied = sendfile(&copy, agent, Some(&mut at), left).with_context(describe)?;
        ensure!(
            copied > 0,
            "cannot copy the agent: {left} bytes of it are missing"
        );
    }
    copy.set_permissions(Permissions::from_mode(0o755))
        .with_context(describe)
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom, Write};

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::host::directory::tests::open_path;

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

    /// What is answered: the kind and the sentence.
    fn refusal(result: Result<impl std::fmt::Debug, impl Into<Error>>) -> (ErrorKind, String) {
        let Err(error) = result else {
            panic!("nothing was refused");
        };
        let error = error.into();
        (error.kind, error.message().to_owned())
    }

    #[test]
    fn each_variant_of_the_error_has_its_kind_and_its_sentence() {
        let mistake = || anyhow!("no b").context("line 7");
        for (error, kind, sentence) in [
            (
                WorkerError::NoSuchWorker(protocol::WorkerId::from_bits(0)).into(),
                ErrorKind::NoSuchWorker,
                "worker 00000000000000000000000000 does not exist on this host",
            ),
            (
                InstallError::NoSuchSlot("a".parse().unwrap()),
                ErrorKind::NoSuchSlot,
                "slot a is not in the configuration: add it or use another",
            ),
            (InstallError::BadAgent("x".into()), ErrorKind::Refused, "x"),
            (
                InstallError::Misconfigured(mistake()),
                ErrorKind::Busy,
                "line 7: no b",
            ),
            (Failure::Busy("later".into()).into(), ErrorKind::Busy, "later"),
            (mistake().into(), ErrorKind::Failed, "line 7: no b"),
        ] {
            assert_eq!(refusal(Err::<(), InstallError>(error)), (kind, sentence.into()));
        }
    }

    #[test]
    fn an_agent_has_all_three_seals_and_a_size_within_bounds() {
        let all = [
            SealFlag::F_SEAL_WRITE,
            SealFlag::F_SEAL_GROW,
            SealFlag::F_SEAL_SHRINK,
        ];
        let whole: SealFlag = all.into_iter().collect();
        check_agent(sealed(memfd(b"x"), whole)).unwrap();
        check_agent(sealed(memfd(b"x"), whole | SealFlag::F_SEAL_SEAL)).unwrap();
        for without in all {
            let agent = sealed(memfd(b"x"), whole - without);
            assert_eq!(
                refusal(check_agent(agent)).0,
                ErrorKind::Refused,
                "without {without:?}"
            );
        }
        let plain = File::open("/proc/self/exe").unwrap().into();
        assert_eq!(refusal(check_agent(plain)).0, ErrorKind::Refused);
        for (length, is_good) in [
            (0, false),
            (1, true),
            (MAX_AGENT_BYTES, true),
            (MAX_AGENT_BYTES + 1, false),
        ] {
            let sparse = memfd(b"");
            sparse.set_len(length).unwrap();
            assert_eq!(
                check_agent(sealed(sparse, whole)).is_ok(),
                is_good,
                "{length} bytes"
            );
        }
    }

    #[test]
    fn an_agent_is_copied_whole_wherever_its_offset_is_and_over_what_a_crash_has_left() {
        let place = tempfile::tempdir().unwrap();
        let run = open_path(place.path()).unwrap();
        let path = place.path().join(AGENT.rsplit('/').next().unwrap());
        std::fs::write(&path, "y".repeat(1 << 20)).unwrap();
        let program: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
        let mut agent = memfd(&program);
        agent.seek(SeekFrom::Start(299_999)).unwrap();
        copy_agent(&agent, &run).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), program);
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777,
            0o755
        );
        std::fs::remove_file(&path).unwrap();
        copy_agent(&agent, &run).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), program);
    }

    #[test]
    fn a_request_reaches_the_monitor_with_the_way_back_or_is_to_be_repeated() {
        let (connection, monitor) = Seqpacket::pair().unwrap();
        let clear_quota = MonitorRequest::ClearQuota {
            worker: protocol::WorkerId::from_bits(7),
        };
        let answer = request(&connection, &clear_quota).unwrap();
        let Ok(Received::Packet {
            bytes,
            mut descriptors,
        }) = monitor.recv(MonitorRequest::MAX)
        else {
            panic!("no request came");
        };
        assert_eq!(MonitorRequest::from_bytes(&bytes).as_ref(), Some(&clear_quota));
        let back = Seqpacket::from(descriptors.pop().unwrap());
        HandshakeMessage::Done.send_to(&back, None).unwrap();
        expect(&answer, HandshakeMessage::Done).unwrap();
        drop(monitor);
        assert_eq!(refusal(request(&connection, &clear_quota)).0, ErrorKind::Busy);
    }

    #[test]
    fn only_the_message_that_is_waited_for_is_taken_for_it() {
        let (here, there) = Seqpacket::pair().unwrap();
        for message in [
            HandshakeMessage::Filter,
            HandshakeMessage::Ready,
            HandshakeMessage::Go,
            HandshakeMessage::Done,
        ] {
            message.send_to(&there, None).unwrap();
            expect(&here, message).unwrap();
        }
        HandshakeMessage::Ready.send_to(&there, None).unwrap();
        let refusal = |expected| refusal(expect(&here, expected));
        let (kind, text) = refusal(HandshakeMessage::Done);
        assert_eq!(kind, ErrorKind::Failed);
        assert!(text.contains("sent Ok(Ready) instead of Done"), "{text}");
        let send = |message: HandshakeMessage| message.send_to(&there, None).unwrap();
        send(HandshakeMessage::failed(anyhow!("no space")));
        assert_eq!(
            refusal(HandshakeMessage::Done),
            (ErrorKind::Failed, "no space".into())
        );
        send(HandshakeMessage::failed(Failure::Busy("later".into())));
        assert_eq!(refusal(HandshakeMessage::Done), (ErrorKind::Busy, "later".into()));
        let soon = TimeVal::new(0, 1);
        setsockopt(&here, sockopt::ReceiveTimeout, &soon).unwrap();
        let is_busy = |expected, parts: &[&str]| {
            let (kind, sentence) = refusal(expected);
            assert_eq!(kind, ErrorKind::Busy);
            assert!(parts.iter().all(|part| sentence.contains(part)), "{sentence}");
        };
        is_busy(HandshakeMessage::Done, &["state D"]);
        is_busy(HandshakeMessage::Ready, &["seccomp", "bpf_prog_free_deferred"]);
        drop(there);
        is_busy(HandshakeMessage::Done, &["was killed"]);
    }
}
