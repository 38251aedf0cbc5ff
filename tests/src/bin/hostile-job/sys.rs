//! System calls that no library offers to the well-behaved, and the only `unsafe` of this program.
#![allow(unsafe_code)]

use std::io;

/// A bare system call. Pointers among the arguments are the caller's to keep valid, or to make invalid on purpose.
pub fn call(number: libc::c_long, arguments: [usize; 6]) -> io::Result<libc::c_long> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: it is not sound in general; this program attacks, and harms nobody but itself.
    match unsafe { libc::syscall(number, a, b, c, d, e, f) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}
