//! System calls that no library offers to the well-behaved, and the only `unsafe` of this program, which is a job's.
#![allow(unsafe_code)]

use std::io;

use nix::libc;

/// A bare system call. Pointers among the arguments are the caller's to keep valid, or to make invalid on purpose.
pub fn call(number: libc::c_long, arguments: [usize; 6]) -> io::Result<libc::c_long> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: each caller passes numbers, a path that outlives the call, or an address at which no memory is.
    match unsafe { libc::syscall(number, a, b, c, d, e, f) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}
