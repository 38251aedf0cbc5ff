//! Mount namespaces.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, pivot_root};

pub fn own_namespace() -> std::io::Result<File> {
    File::open("/proc/self/ns/mnt")
}

/// Nothing that is mounted in this namespace may reach the host, and nothing that is mounted there may appear here
/// later, when it would be writable.
pub fn make_private() -> nix::Result<()> {
    let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
}

/// Make the mount at `new_root` the root, and let the host's go (`pivot_root(2)`).
pub fn become_root(new_root: &Path) -> Result<()> {
    chdir(new_root)?;
    pivot_root(".", ".").context("cannot enter the new root")?;
    umount2(".", MntFlags::MNT_DETACH).context("cannot leave the host's root")?;
    Ok(chdir("/")?)
}
