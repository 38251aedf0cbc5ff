//! What the kernel says of a stopped process in a union, descriptors of other processes, and Landlock's version.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::ptrace;
use nix::unistd::Pid;

use super::TracedCall;

/// Where in a call a process has stopped.
pub enum SyscallStop {
    Entry(TracedCall),
    Exit(i64),
}

/// `linux/ptrace.h`
const ENTRY: u8 = 1;
const EXIT: u8 = 2;

/// A copy of another process's descriptor (`pidfd_getfd(2)`).
pub fn descriptor_of(pid: u32, number: u32) -> io::Result<OwnedFd> {
    let owned = |result: libc::c_long| {
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: what the two calls below return is a new descriptor, which nobody else knows.
        Ok(unsafe { OwnedFd::from_raw_fd(result as RawFd) })
    };
    // SAFETY: this call takes integers.
    let process = owned(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: this call takes descriptors and integers.
    owned(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) })
}

/// The version of Landlock's interface (`landlock_create_ruleset(2)`); -1 where the kernel has none.
pub fn landlock_version() -> i64 {
    const VERSION: libc::c_uint = 1;
    let none = std::ptr::null::<libc::c_void>();
    // SAFETY: with this flag the call takes no attributes, and returns a number.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0usize, VERSION) }
}

/// None where it stopped at no call, or is gone.
pub fn stopped_at(pid: Pid) -> Option<SyscallStop> {
    let info = ptrace::syscall_info(pid).ok()?;
    match info.op {
        ENTRY => {
            // SAFETY: op says that this is the field that the kernel has filled in.
            let entry = unsafe { info.u.entry };
            Some(SyscallStop::Entry(TracedCall {
                number: entry.nr as i64,
                arguments: entry.args,
            }))
        }
        EXIT => {
            // SAFETY: as above.
            let exit = unsafe { info.u.exit };
            Some(SyscallStop::Exit(exit.sval))
        }
        _ => None,
    }
}
