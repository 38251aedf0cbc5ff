//! Resetting a USB device that was a job's.

use std::os::fd::BorrowedFd;
use std::path::Path;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::Unprivileged;
use crate::sys;

/// Reset the device of this node (`USBDEVFS_RESET`), if `is_same` says after the node was opened that it is the device that is meant.
/// Returns false where it is not, or has gone.
pub fn reset(
    _: &Unprivileged,
    nodes: BorrowedFd<'_>,
    node: &Path,
    is_same: impl Fn() -> bool,
) -> Result<bool> {
    let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let device = match openat(nodes, node, flags, Mode::empty()) {
        Err(Errno::ENODEV | Errno::ENXIO) => return Ok(false),
        device => device.context("cannot open a USB device")?,
    };
    if !is_same() {
        return Ok(false);
    }
    match sys::reset_usb_device(&device) {
        Ok(()) => Ok(true),
        Err(Errno::ENODEV) => Ok(false),
        Err(errno) => Err(errno).context("cannot reset a USB device"),
    }
}
