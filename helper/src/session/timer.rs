//! The end of a worker's run time, from outside of its sandbox.
//!
//! Pid 1 of a sandbox has the job's uid: the job can starve it among thousands of threads, so it cannot be what enforces
//! `limits.run_time_seconds`. A worker with that limit has a *timer* process beside it, in the helper's cgroup, which the
//! job can neither see nor signal. It is no state of the monitor's and no task of the supervisor's, so the limit holds
//! also while they do not run: the package's units end no such process (`KillMode=process`).
//!
//! Pid 1 still ends a job in time, and then knows best how its agent ended. The timer waits [`GRACE`] longer.
//!
//! | cut off | what follows |
//! | --- | --- |
//! | before the timer is forked | the agent is not started: pid 1 gets no `Go` |
//! | between the timer and `Go` | pid 1 ends with the session, and the timer with the cgroup |
//! | the timer, by a signal of root's | pid 1 alone enforces the limit |

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::fcntl::OFlag;
use protocol::Exit;

use crate::host::cgroup;
use crate::host::directory::open_file;
use crate::host::record::{self, Worker};
use crate::log::warn;
use crate::{privileges, sys};

/// How much later than pid 1 the timer ends a job. A pid 1 that is not starved needs milliseconds.
const GRACE: Duration = Duration::from_secs(5);
/// Processes that are not gone yet are killed again after this time, then after twice as long each time, up to the second of these.
const AGAIN: Duration = Duration::from_millis(100);
const AGAIN_MOST: Duration = Duration::from_secs(10);

/// What a timer holds: open files of root's, and nothing else.
struct Timer {
    /// The worker's `cgroup.kill` and `cgroup.events` (the kernel's cgroup-v2 documentation).
    kill: File,
    events: File,
    /// Where the end of the agent is written down.
    exit: File,
    console: File,
}

/// Fork the timer of a worker whose first process is in its cgroup. `limit` is measured from now by a clock that does not
/// jump, and that stands still while the host is suspended (`CLOCK_MONOTONIC`, clock_gettime(2)).
pub fn start(worker: &Worker, cgroup: &OwnedFd, limit: Duration) -> Result<()> {
    let append = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_APPEND;
    let timer = Timer {
        kill: open_file(cgroup, "cgroup.kill", OFlag::O_WRONLY)?,
        events: open_file(cgroup, "cgroup.events", OFlag::O_RDONLY)?,
        exit: open_file(worker.dir(), record::EXIT, append)?,
        console: open_file(worker.dir(), record::CONSOLE, append)?,
    };
    let end = Instant::now() + limit + GRACE;
    sys::fork(|| {
        let keep = [&timer.kill, &timer.events, &timer.exit, &timer.console].map(AsRawFd::as_raw_fd);
        // What fails here must be seen, and must not take the limit away.
        let closed = sys::close_all_but(&keep).map_err(Into::into);
        // Each whatever has become of the other.
        if let Err(error) = closed.and(privileges::ProcessKind::Child.drop_others()) {
            warn!(
                "the timer of the run time keeps more than it needs: {error:#} worker={}",
                worker.id
            );
        }
        match timer.run(end) {
            // Nobody is left in it.
            Err(error) if cgroup::is_removed(&error) => 0,
            Err(error) => {
                warn!(
                    "the run time is not limited any more: {error} worker={}",
                    worker.id
                );
                1
            }
            Ok(()) => 0,
        }
    })
    .context("cannot fork the timer of the slot's run_time_seconds")?;
    Ok(())
}

impl Timer {
    /// Until the cgroup has no process: by itself, or killed at `end`.
    fn run(&self, end: Instant) -> std::io::Result<()> {
        while cgroup::has_processes(&self.events)? {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return self.kill_all();
            }
            cgroup::wait(&self.events, left)?;
        }
        Ok(())
    }

    fn kill_all(&self) -> std::io::Result<()> {
        // Before the processes end: nobody may see an end of which nothing is written. If pid 1 writes one after all, the
        // first line counts.
        if self.exit.metadata().is_ok_and(|meta| meta.len() == 0) {
            // A full disk, which the job may have filled, loses both lines. It must not keep the job alive.
            let _ = (&self.exit).write_all(record::print_exit(Exit::TimedOut).as_bytes());
            let _ = (&self.console).write_all(record::TIMED_OUT.as_bytes());
        }
        let mut again = AGAIN;
        while cgroup::has_processes(&self.events)? {
            (&self.kill).write_all(b"1")?;
            cgroup::wait(&self.events, again)?;
            again = (again * 2).min(AGAIN_MOST);
        }
        Ok(())
    }
}
