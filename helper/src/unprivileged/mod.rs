//! What runs as a job's user, without privileges: pid 1 of a worker (`init`), the process that receives an agent (`agent`),
//! the one that empties the directories that a job could write (`remove`), and the one that resets its USB devices (`usb_reset`). Their entry points take an [`Unprivileged`],
//! which only [`become_user`] makes.

pub mod agent;
pub mod init;
mod proof;
pub mod proxy;
pub mod remove;
pub mod usb_reset;

pub use proof::{Unprivileged, become_user};

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitPidFlag;
use nix::unistd::Pid;
use protocol::Uid;

use crate::sys;

/// The most children that are reaped, or connections that are forwarded, in one iteration: a flood of one kind must not
/// keep pid 1 from all else.
pub const MAX_PER_ITERATION: usize = 64;

/// Do this in a process that has become the user, and has these descriptors alone.
pub fn run_as_user(uid: Uid, fds: &[RawFd], run: impl FnOnce(&Unprivileged) -> Result<bool>) -> Result<bool> {
    /// The status of a process that has answered `false`.
    const FALSE: i32 = 2;
    let (errors, to_parent) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    let child = sys::fork(|| {
        let work = || {
            sys::close_all_but(&[fds, &[to_parent.as_raw_fd()]].concat())?;
            run(&become_user(uid, &[])?)
        };
        match work() {
            Ok(true) => 0,
            Ok(false) => FALSE,
            Err(error) => {
                let _ = nix::unistd::write(&to_parent, format!("{error:#}").as_bytes());
                1
            }
        }
    })?;
    drop(to_parent);
    let mut message = String::new();
    File::from(errors).read_to_string(&mut message).ok();
    match sys::wait(Some(child), WaitPidFlag::empty())? {
        Some((_, ended)) if ended.success() => Ok(true),
        Some((_, ended)) if ended.code() == Some(FALSE) => Ok(false),
        Some((_, ended)) if message.is_empty() => {
            bail!("a process that worked as uid {uid} has ended ({ended})")
        }
        _ => bail!("{message}"),
    }
}

/// End every process of the user, those included that no cgroup of ours knows, and wait until the last is reaped.
pub fn kill_all(uid: Uid) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(60);
    let mut pause = Duration::from_micros(20);
    while sys::has_process_of(uid.get())? {
        ensure!(
            Instant::now() < end,
            "processes of uid {uid} still run a minute after SIGKILL: look for them in ps, and repeat"
        );
        // Most often those of its cgroup, dead, and about to be reaped by a parent who cannot tell us.
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(10));
        if pause > Duration::from_millis(1) {
            // It reaches all of the user's but the process itself (kill(2)); whom it found, it does not tell.
            run_as_user(uid, &[], |_| {
                let _ = nix::sys::signal::kill(Pid::from_raw(-1), Signal::SIGKILL);
                Ok(true)
            })?;
        }
    }
    Ok(())
}
