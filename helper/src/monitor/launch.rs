//! Carrying out requests of sessions, in processes that the monitor makes for them. The monitor itself looks at nothing but
//! the request.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::SigSet;
use nix::unistd::alarm;
use protocol::{BootstrapToken, Received, Seqpacket, WorkerId};

use crate::host::Host;
use crate::host::directory::open_dir;
use crate::host::record::read_record_of;
use crate::log::warn;
use crate::monitor::rootfs::RootFs;
use crate::monitor_ipc::{Failure, HandshakeMessage, MonitorRequest};
use crate::unprivileged::{agent, become_user};
use crate::{sandbox, sys};

/// Launches that wait for the jobs' root file system, in the order in which they were asked for.
#[derive(Debug, Default)]
pub struct LaunchQueue(VecDeque<Launch>);

/// How long cleaning up after a worker may take.
const CLEAN_UP_SECONDS: u32 = 40;
/// More than sessions ask for at once.
const MAX_WAITING: usize = 512;

#[derive(Debug)]
struct Launch {
    worker: WorkerId,
    bootstrap: BootstrapToken,
    /// Who asked, and gets the answer.
    session: Seqpacket,
    asked: Instant,
}

/// Take the next request. What can be done now is done; a launch begins to wait.
pub fn take_request(host: &Host, queue: &mut LaunchQueue, requests: &Seqpacket) {
    let (bytes, answer) = match requests.recv(MonitorRequest::MAX) {
        Ok(Received::Packet {
            bytes,
            mut descriptors,
        }) => match descriptors.pop() {
            Some(answer) => (bytes, Seqpacket::from(answer)),
            None => return,
        },
        _ => return,
    };
    let outcome = match MonitorRequest::from_bytes(&bytes) {
        Some(MonitorRequest::Launch { worker, bootstrap }) => {
            return queue.push(Launch {
                worker,
                bootstrap,
                session: answer,
                asked: Instant::now(),
            });
        }
        Some(MonitorRequest::CopyAgent { worker }) => answer_later(host, &answer, &[], || {
            let uid = read_record_of(host, worker)?.uid;
            sys::close_all_but(&[answer.as_raw_fd()]).context("cannot close what is the monitor's")?;
            let proof = become_user(uid, &[])?;
            // Who deletes the worker finds this process from now on. Before, the session may have exited.
            is_waited_for(&answer)?;
            agent::receive(&proof, &answer)
        }),
        Some(MonitorRequest::CleanUp { worker }) => {
            answer_later(host, &answer, &host.descriptors_of_devices(), || {
                // Sooner than its session gives up: two would be at work otherwise.
                alarm::set(CLEAN_UP_SECONDS);
                let uid = read_record_of(host, worker)?.uid;
                Ok(sandbox::clean_up(host, worker, uid)?)
            })
        }
        None => Err(anyhow!("{} bytes are no request", bytes.len())),
    };
    if let Err(error) = outcome {
        refuse(&answer, error.into());
    }
}

impl LaunchQueue {
    fn push(&mut self, launch: Launch) {
        if self.0.len() >= MAX_WAITING {
            // Sessions that gave up have left theirs.
            self.0.retain(|other| is_waited_for(&other.session).is_ok());
        }
        if self.0.len() >= MAX_WAITING {
            let message = format!("{MAX_WAITING} workers wait to be started: repeat this later");
            return refuse(&launch.session, Failure::Busy(message));
        }
        self.0.push_back(launch);
    }

    /// Make the first processes of those that need not wait any longer.
    pub fn launch(&mut self, host: &Host, rootfs: &mut RootFs) {
        // A job sees the host as it was when its launch was asked for, or later.
        while let Some(next) = self.0.front() {
            match rootfs.prepare(host, next.asked) {
                Ok(true) => {
                    let launched = launch(host, rootfs, next);
                    let next = self.0.pop_front().expect("it was the first");
                    if let Err(error) = launched {
                        refuse(&next.session, error.into());
                    }
                }
                Ok(false) => return,
                Err(error) => return self.refuse_all(&format!("{error:#}")),
            }
        }
        rootfs.forget_stale();
    }

    /// There is no root file system for them now, for this reason.
    pub fn refuse_all(&mut self, reason: &str) {
        for launch in self.0.drain(..) {
            refuse(&launch.session, Failure::Busy(reason.to_owned()));
        }
    }
}

fn refuse(session: &Seqpacket, failure: Failure) {
    let reason = protocol::Error::from(failure);
    warn!("a request was not carried out: {reason}");
    // Who asked may be gone.
    let _ = HandshakeMessage::Failed(reason).send_to(session, None);
}

/// Does who asked still wait? It holds the worker's lock for as long as it runs. Once it has exited, the worker may be
/// another's.
fn is_waited_for(session: &Seqpacket) -> Result<()> {
    let mut events = [PollFd::new(session.as_fd(), PollFlags::empty())];
    poll(&mut events, PollTimeout::ZERO)?;
    ensure!(
        events[0].any() == Some(false),
        "the session that sent it has exited"
    );
    Ok(())
}

/// Make the worker's first process, in its cgroup and its namespaces from the first instruction.
fn launch(host: &Host, rootfs: &RootFs, launch: &Launch) -> Result<()> {
    let Launch {
        worker,
        bootstrap,
        session,
        ..
    } = launch;
    let cgroup = open_dir(&host.cgroups, worker.to_string()).context("the worker has no cgroup")?;
    // With the cgroup open: it is that of who asked, and not one in which another has its first process.
    is_waited_for(session)?;
    let first = || {
        let forgotten = forget_all_but(host, session, &[]).map_err(Failure::from);
        match forgotten.and_then(|()| sandbox::enter(host, *worker, bootstrap, session)) {
            Ok(job) => job.start(session),
            Err(error) => send_failure(session, error),
        }
    };
    rootfs
        .run_inside(|| sys::clone_sandboxed(cgroup.as_fd(), first))?
        .context("cannot make the worker's namespaces")?;
    Ok(())
}

/// Fork a process that does this work and answers. It has more descriptors than others where its work takes them.
fn answer_later(
    host: &Host,
    session: &Seqpacket,
    more: &[RawFd],
    work: impl FnOnce() -> Result<(), Failure>,
) -> Result<()> {
    is_waited_for(session)?;
    sys::fork(|| {
        let done = forget_all_but(host, session, more).map_err(Failure::from);
        match done.and_then(|()| work()) {
            Ok(()) => i32::from(HandshakeMessage::Done.send_to(session, None).is_err()),
            Err(failure) => send_failure(session, failure),
        }
    })
    .context("cannot fork")?;
    Ok(())
}

/// The listening socket, the lock, and the ways to mount namespaces are the monitor's alone.
fn forget_all_but(host: &Host, session: &Seqpacket, more: &[RawFd]) -> Result<()> {
    sys::close_all_but(&[&host.descriptors()[..], &[session.as_raw_fd()], more].concat())?;
    Ok(SigSet::empty().thread_set_mask()?)
}

fn send_failure(session: &Seqpacket, failure: impl Into<Failure>) -> i32 {
    let _ = HandshakeMessage::failed(failure).send_to(session, None);
    1
}
