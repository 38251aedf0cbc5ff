//! What the kernel says of a stopped process in a union.
#![allow(unsafe_code)]

use nix::sys::ptrace;
use nix::unistd::Pid;

use super::Call;

/// Where in a call a process has stopped.
pub enum At {
    Entry(Call),
    Exit(i64),
}

/// `linux/ptrace.h`
const ENTRY: u8 = 1;
const EXIT: u8 = 2;

/// None where it stopped at no call, or is gone.
pub fn stopped_at(pid: Pid) -> Option<At> {
    let info = ptrace::syscall_info(pid).ok()?;
    match info.op {
        ENTRY => {
            // SAFETY: op says that this is the field that the kernel has filled in.
            let entry = unsafe { info.u.entry };
            Some(At::Entry(Call {
                number: entry.nr as i64,
                arguments: entry.args,
            }))
        }
        EXIT => {
            // SAFETY: as above.
            let exit = unsafe { info.u.exit };
            Some(At::Exit(exit.sval))
        }
        _ => None,
    }
}
