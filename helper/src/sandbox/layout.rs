//! Where the root file system of jobs has what only the sandbox may see. The monitor builds it (`monitor::rootfs`).

use std::path::Path;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

use crate::sandbox::paths::{JobPath, SourcePath};

/// Where the root file system keeps what only `sandbox` may see, and unmounts before the job begins.
pub const PRIVATE: &str = "/.buildomat-factory";

/// Of these overlayfs puts jobs' `/etc` together: what hides some of the host's, and the host's.
pub const ETC_LAYERS: [&str; 2] = ["/.buildomat-factory/etc/own", "/.buildomat-factory/etc/host"];

/// The directory of links whose texts are the directories of the host's `/run` that jobs see.
pub const RUN_DIRS: &str = "/.buildomat-factory/run-dirs";

/// The directory of the links of the host's `/run` that lead to these. Jobs have them as they are.
pub const LINKS: &str = "/.buildomat-factory/links";

/// What udev knows of devices: shown in slots that have some.
pub const UDEV_DATA: &str = "/run/udev/data";

/// By this file programs see that udev runs, and only then do they listen to its events.
pub const UDEV_CONTROL: &str = "/run/udev/control";

/// What jobs see of `source`: the place where `sandbox` finds it.
pub fn source_path(source: &SourcePath) -> JobPath {
    let name = source
        .display()
        .to_string()
        .replace('%', "%25")
        .replace('/', "%2f");
    JobPath::new(PRIVATE).join("sources").join(name)
}

/// The directories of the host's `/run` that ordinary programs read, for a job.
pub fn run_dirs() -> Result<Vec<SourcePath>> {
    let links = std::fs::read_dir(RUN_DIRS).context("cannot list the directories of the host's /run")?;
    let run_dirs = links.map(|link| std::fs::read_link(link?.path()).map(SourcePath::new));
    Ok(run_dirs.collect::<std::io::Result<_>>()?)
}

/// For a job: let the overlay of `/etc`, if it is one, forget what names there led to, or did not. It would not see that the
/// host has changed them (`overlayfs.rst`, "Changes to underlying filesystems").
pub fn refresh_etc() -> nix::Result<()> {
    if !Path::new(ETC_LAYERS[1]).exists() {
        return Ok(());
    }
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(None::<&str>, "/etc", None::<&str>, flags, None::<&str>)
}
