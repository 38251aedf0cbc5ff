//! The crate's one unsafe place.
#![allow(unsafe_code)]

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Take over descriptors that `recvmsg(2)` has just put into this process.
pub(crate) fn adopt(received: Vec<RawFd>) -> Vec<OwnedFd> {
    // SAFETY: the kernel made these numbers for this `recvmsg` call alone, they are open, and nobody
    // else in the process knows them: `received` is consumed here.
    received
        .into_iter()
        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
        .collect()
}
