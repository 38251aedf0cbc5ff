//! Mount namespaces.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, pivot_root};

pub fn own_namespace() -> std::io::Result<File> {
    File::open("/proc/self/ns/mnt")
}

/// Nothing that is mounted in this namespace reaches the host. What is mounted there still appears here, at the host's
/// own paths: in a private mount, what is to be mounted when somebody enters it (autofs) is refused with `EPERM` since
/// Linux 6.19 (`autofs_d_automount` in `fs/autofs/root.c`). Copies of mounts are made private one by one.
pub fn make_mounts_slave() -> nix::Result<()> {
    let flags = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
}

/// Make the mount at `new_root` the root, and let the host's go (`pivot_root(2)`).
pub fn become_root(new_root: &Path) -> Result<()> {
    chdir(new_root)?;
    pivot_root(".", ".").context("cannot enter the new root")?;
    umount2(".", MntFlags::MNT_DETACH).context("cannot leave the host's root")?;
    Ok(chdir("/")?)
}
