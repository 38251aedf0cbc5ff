//! Starting an agent: the session's part. The session checks, puts the job's files in place, and asks the monitor for the
//! worker's first process, for which it has neither the capabilities nor the system calls.
//!
//! Four processes take part. The session holds the worker's lock (`flock(2)` on its directory) from the first step to the
//! last, and one end of two socket pairs. The receiver and the first process have the others; the latter keeps it open until
//! the agent runs: if the session dies, the first process reads the end of the socket and exits. The session waits for both
//! together no longer than [`STEP_TIMEOUT_SECONDS`].
//!
//! | step | process | what it does | cut off after it |
//! | --- | --- | --- | --- |
//! | 1 | session | [`writable_dirs::make`], [`cgroup::create`], [`limits::limit_cgroup`] | empty directories, an empty cgroup: a repeat makes them again |
//! | 2 | session | makes the agent's file in `fs/run`; sends [`MonitorRequest::CopyAgent`], and the descriptors of the connection and the file | an empty file, which a repeat replaces |
//! | 3 | receiver | forked by the monitor, as the job's user: [`agent::receive`](crate::unprivileged::agent::receive), then says `Done`, or `Failed` with what is wrong with the agent; meanwhile, the next steps | a part of the program, in a file that a repeat replaces |
//! | 4 | session | sends [`MonitorRequest::Launch`] with the end of the socket pair | the monitor finds that nobody waits, and drops the request |
//! | 5 | monitor | when the root file system of jobs is up to date: clones the first process into its cgroup and namespaces | the first process ends, as above |
//! | 6 | first process | [`apply_sandbox`](crate::sandbox), then says `Filter` | as above; its mounts go with its namespace |
//! | 7 | first process | installs its filter, says `Ready`, and waits for `Go` | as above |
//! | 8 | session | [`timer::start`], if the slot has a run time | the timer ends with the cgroup |
//! | 9 | session | [`Worker::mark_started`]: a link, and one `fsync(2)` of the worker's directory. From here on no agent is started in this worker again | the worker is `Exited(Unknown)`: its job has not begun |
//! | 10 | session | says `Go` | the agent starts, and nobody was told: a repeat answers `AgentStarted` |
//! | 11 | first process | as pid 1, starts the agent; says `Done`, or `Failed` with the kernel's reason | the same |
//!
//! A repeat begins with step 1, and kills the receiver and the first process of an earlier attempt. `Delete` gets to its end from
//! every step.

use std::fs::Permissions;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use libc::time_t;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;
use protocol::{BootstrapToken, Error, Received, Seqpacket, SlotName, wire};

use crate::host::directory::{open_dir, open_file, remove_file};
use crate::host::record::{Record, Worker, WorkerError};
use crate::host::{Host, abilities, cgroup, misconfigured, no_such_slot, users};
use crate::monitor_ipc::{Failure, HandshakeMessage, MonitorRequest, from};
use crate::privileges::seccomp;
use crate::sandbox::{AGENT, limits, writable_dirs};
use crate::session::timer;
use crate::unprivileged::kill_all;

/// Why `InstallAgent` was not done.
#[derive(Debug)]
pub enum InstallError {
    /// There is no such worker, or its record is damaged.
    Worker(WorkerError),
    /// It has left the configuration.
    NoSuchSlot(SlotName),
    /// The configuration has a mistake, or the slot names what the host lacks.
    Misconfigured(anyhow::Error),
    /// The agent's descriptor is not what is asked for, the sandbox could not be made, or the kernel does not take the
    /// program.
    Host(Failure),
}

from!(InstallError { Worker(WorkerError), Host(Failure), Host(anyhow::Error) });

impl From<InstallError> for Error {
    fn from(error: InstallError) -> Error {
        match error {
            InstallError::Worker(error) => error.into(),
            InstallError::NoSuchSlot(slot) => no_such_slot(&slot),
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
    connection: &Seqpacket,
    bootstrap: &BootstrapToken,
) -> Result<(), InstallError> {
    if worker.is_started()? {
        return Ok(());
    }
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
    // A first attempt that was cut off may have left its pid 1, waiting for a message that will not come, and its receiver.
    cgroup::kill_and_remove(&host.cgroups, worker.id)?;
    kill_all(record.uid)?;
    let cgroup =
        cgroup::create(&host.cgroups, &worker.id.to_string()).context("cannot make the worker's cgroup")?;
    limits::limit_cgroup(&cgroup, slot, host.abilities)?;
    let begin = Instant::now();
    let receiver = start_receiver(monitor, worker, connection)?;
    let child = request(
        monitor,
        &MonitorRequest::Launch {
            worker: worker.id,
            bootstrap: bootstrap.clone(),
        },
    )?;
    expect(&receiver, HandshakeMessage::Done)?;
    let left = STEP_TIMEOUT_SECONDS - begin.elapsed().as_secs() as time_t;
    set_receive_timeout(&child, left.max(1))?;
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

/// Have the agent, which the connection's next packet brings, copied into the worker's directory: a file of root's that the
/// job may run and read. The answer comes to the socket that is returned.
fn start_receiver(
    monitor: &Seqpacket,
    worker: &Worker,
    connection: &Seqpacket,
) -> Result<Seqpacket, Failure> {
    let describe = || "cannot make the agent's file";
    let run = open_dir(worker.dir(), "fs/run").with_context(describe)?;
    let name = AGENT.rsplit('/').next().expect("a path has a last part");
    // Each attempt has a file of its own: the receiver of one that was cut off may not have become the user yet.
    remove_file(&run, name).with_context(describe)?;
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
    let file = open_file(&run, name, flags).with_context(describe)?;
    file.set_permissions(Permissions::from_mode(0o755))
        .with_context(describe)?;
    let receiver = request(monitor, &MonitorRequest::CopyAgent { worker: worker.id })?;
    for descriptor in [connection.as_fd(), file.as_fd()] {
        HandshakeMessage::Descriptor
            .send_to(&receiver, Some(descriptor))
            .context("the process that copies the agent has exited")?;
    }
    Ok(receiver)
}

/// How long the monitor, or a process of its making, may take for a step, in seconds. One that hangs in a mount must not
/// keep the worker's lock: its deletion would wait for ever. With the filter it is less than the supervisor waits for an
/// answer, a minute: so the supervisor gets the reason.
const STEP_TIMEOUT_SECONDS: time_t = 45;
/// The same for a job's filter of system calls, which takes a millisecond or does not end.
const FILTER_TIMEOUT_SECONDS: time_t = 10;

fn set_receive_timeout(answers: &impl AsFd, seconds: time_t) -> Result<()> {
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
    let packet = match from.recv_bytes(HandshakeMessage::MAX) {
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

#[cfg(test)]
mod tests {
    use protocol::ErrorKind;

    use super::*;

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
            (Failure::Refused("x".into()).into(), ErrorKind::Refused, "x"),
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
    fn a_request_reaches_the_monitor_with_the_way_back_or_is_to_be_repeated() {
        let (connection, monitor) = Seqpacket::pair().unwrap();
        let clean_up = MonitorRequest::CleanUp {
            worker: protocol::WorkerId::from_bits(7),
        };
        let answer = request(&connection, &clean_up).unwrap();
        let Ok(Received::Packet {
            bytes,
            mut descriptors,
        }) = monitor.recv(MonitorRequest::MAX)
        else {
            panic!("no request came");
        };
        assert_eq!(MonitorRequest::from_bytes(&bytes).as_ref(), Some(&clean_up));
        let back = Seqpacket::from(descriptors.pop().unwrap());
        HandshakeMessage::Done.send_to(&back, None).unwrap();
        expect(&answer, HandshakeMessage::Done).unwrap();
        drop(monitor);
        assert_eq!(refusal(request(&connection, &clean_up)).0, ErrorKind::Busy);
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
        send(HandshakeMessage::failed(Failure::Refused("no seals".into())));
        assert_eq!(
            refusal(HandshakeMessage::Done),
            (ErrorKind::Refused, "no seals".into())
        );
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
