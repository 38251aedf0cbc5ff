//! cgroup v2: each worker in one of its own, which is how all its processes are found and ended.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use protocol::WorkerId;

use crate::host::directory::{make_dir, make_directories, open_dir, open_file, remove_dir};

/// The most bytes of the mount table that are read.
const MAX_MOUNT_TABLE: u64 = 64 << 20;

/// The mount point of cgroup v2 in a `mountinfo` (`proc_pid_mountinfo(5)`), with the cgroup that is mounted there.
fn find_mount(mountinfo: &str) -> Option<(PathBuf, PathBuf)> {
    mountinfo.lines().find_map(|line| {
        let (mount, source) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, place) = (fields.next()?, fields.next()?);
        source
            .starts_with("cgroup2 ")
            .then(|| (place.into(), root.into()))
    })
}

/// Find the helper's own part of the hierarchy, move the helper into its `daemon/`, and make its `workers/`.
///
/// `wanted` is a cgroup's path below the mount; without it, the one that this process was started in. `apart`: it is
/// for the workers alone, and the helper stays where it is. Its unit is such a one: systemd can start no process in
/// a cgroup that limits its children, so a helper could not be restarted while its own has jobs below it.
pub fn prepare(wanted: Option<&Path>, apart: bool) -> Result<PathBuf> {
    let mut mountinfo = Vec::new();
    File::open("/proc/self/mountinfo")
        .and_then(|file| file.take(MAX_MOUNT_TABLE).read_to_end(&mut mountinfo))
        .context("cannot read /proc/self/mountinfo: mount /proc (mount -t proc none /proc)")?;
    // Who may mount, as users may by fusermount3, may do it at any name.
    let Some((mount, root)) = find_mount(&String::from_utf8_lossy(&mountinfo)) else {
        bail!("no cgroup v2 hierarchy is mounted: mount one (mount -t cgroup2 none /sys/fs/cgroup)");
    };
    let own = std::fs::read_to_string("/proc/self/cgroup").context("cannot read /proc/self/cgroup")?;
    let own = own
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .unwrap_or("/");
    let own = Path::new(own).strip_prefix(&root).unwrap_or(Path::new(own));
    let below = |path: &Path| mount.join(path.strip_prefix("/").unwrap_or(path));
    let base = match wanted {
        Some(path) => below(path),
        // A restarted helper may find itself where an earlier one has moved.
        None if own.ends_with("daemon") => below(own.parent().expect("it ends with a name")),
        None if own.as_os_str().is_empty() || own == Path::new("/") => {
            below(Path::new("buildomat-user-factory"))
        }
        None => below(own),
    };
    let workers = base.join("workers");
    make_directories(&workers, 0o755)?;
    let meta = std::fs::metadata(&workers)?;
    ensure!(
        meta.uid() == 0,
        "{} must be root's: choose another cgroup with --cgroup",
        workers.display()
    );
    ensure!(
        workers.join("cgroup.kill").exists(),
        "{} has no cgroup.kill: use Linux 5.14 or newer",
        workers.display()
    );
    if !apart {
        let daemon = base.join("daemon");
        make_directories(&daemon, 0o755)?;
        std::fs::write(daemon.join("cgroup.procs"), "0")
            .with_context(|| format!("cannot move into {}", daemon.display()))?;
    }
    // Limits take their controllers; which of them there are, `abilities` sees.
    for controller in ["+memory", "+cpu", "+pids"] {
        for level in [&base, &workers] {
            let _ = std::fs::write(level.join("cgroup.subtree_control"), controller);
        }
    }
    Ok(workers)
}

/// The cgroup, beside the worker's own, of what an operator starts in a worker with the manual program: the worker's
/// state does not depend on it.
pub fn manual_name(worker: WorkerId) -> String {
    format!("{worker}-manual")
}

/// A new cgroup for a worker that has no process. A used one is not used again: since Linux 6.18 a
/// process cloned into a cgroup that was ever killed is killed too.
pub fn create(cgroups: impl AsFd, name: &str) -> nix::Result<OwnedFd> {
    remove_dir(cgroups.as_fd(), name)?;
    make_dir(cgroups.as_fd(), name, 0o755)?;
    open_dir(cgroups, name)
}

/// Does any process of the worker exist?
pub fn is_populated(cgroups: impl AsFd, worker: WorkerId) -> io::Result<bool> {
    let events = format!("{worker}/cgroup.events");
    match open_file(cgroups, events, OFlag::O_RDONLY).map_err(io::Error::from) {
        Err(error) if is_removed(&error) => Ok(false),
        events => has_processes(&events?),
    }
}

/// Does any process live in the cgroup of this `cgroup.events`?
pub fn has_processes(mut events: &File) -> io::Result<bool> {
    let mut text = [0; 256];
    match events.rewind().and_then(|()| events.read(&mut text)) {
        Err(error) if is_removed(&error) => Ok(false),
        length => Ok(text[..length?]
            .split(|byte| *byte == b'\n')
            .any(|line| line == b"populated 1")),
    }
}

/// Does the error say that the cgroup has been removed? Files of it that are open then are no device any more
/// (`fs/kernfs/file.c`).
pub fn is_removed(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

/// Wait so long, or until this `cgroup.events` is another than [`has_processes`] has read.
pub fn wait(events: &File, time: Duration) -> nix::Result<()> {
    let mut events = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
    match ppoll(&mut events, Some(TimeSpec::from_duration(time)), None) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// End every process in the worker's cgroups, wait until they are gone, and remove them.
pub fn kill_and_remove(cgroups: impl AsFd, worker: WorkerId) -> Result<()> {
    kill_and_remove_one(cgroups.as_fd(), &manual_name(worker))?;
    kill_and_remove_one(cgroups, &worker.to_string())
}

/// The same of one cgroup.
pub fn kill_and_remove_one(cgroups: impl AsFd, name: &str) -> Result<()> {
    let cgroup = match open_dir(cgroups.as_fd(), name) {
        Err(Errno::ENOENT) => return Ok(()),
        cgroup => cgroup?,
    };
    let until = Instant::now() + KILL_TIMEOUT;
    loop {
        kill_processes(&cgroup, name)?;
        match remove_dir(cgroups.as_fd(), name) {
            // A first process that the monitor was just making, for a session that has died.
            Err(Errno::EBUSY) if Instant::now() < until => {}
            removed => {
                return removed.with_context(|| format!("cannot remove the cgroup {name}"));
            }
        }
    }
}

/// How long processes may take to end once they have the signal.
const KILL_TIMEOUT: Duration = Duration::from_secs(60);

/// End every process in this cgroup, and wait until they are gone. One that has been removed has none.
pub fn kill_processes(cgroup: &OwnedFd, name: &str) -> Result<()> {
    let events = match open_file(cgroup, "cgroup.events", OFlag::O_RDONLY) {
        Err(Errno::ENOENT) => return Ok(()),
        events => events?,
    };
    let until = Instant::now() + KILL_TIMEOUT;
    let mut pause = Duration::from_micros(100);
    while has_processes(&events)? {
        ensure!(
            Instant::now() < until,
            "processes of {name} still run a minute after SIGKILL: look for state D in ps, and repeat"
        );
        let kill = open_file(cgroup, "cgroup.kill", OFlag::O_WRONLY).map_err(io::Error::from);
        match kill.and_then(|mut kill| kill.write_all(b"1")) {
            Err(error) if is_removed(&error) => return Ok(()),
            written => written.context("cannot write cgroup.kill")?,
        }
        // The kernel wakes us when `populated` changes, but tells of a cgroup at most every 10 ms
        // (CGROUP_FILE_NOTIFY_MIN_INTV of kernel/cgroup/cgroup.c): so we ask again, ever more seldom.
        wait(&events, pause).context("cannot wait for cgroup.events")?;
        pause = (pause * 2).min(Duration::from_secs(1));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_is_found_wherever_it_is() {
        let info = "22 27 0:21 / /proc rw - proc proc rw\n\
                    38 31 0:35 / /cg/systemd rw - cgroup cgroup rw,name=systemd\n\
                    41 31 0:38 /sub /cg/unified rw,relatime shared:4 - cgroup2 cgroup2 rw\n";
        assert_eq!(find_mount(info), Some(("/cg/unified".into(), "/sub".into())));
        assert_eq!(find_mount("22 27 0:21 / /proc rw - proc proc rw\n"), None);
    }

    #[test]
    fn a_cgroup_that_is_removed_while_it_is_read_has_no_process() {
        let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let (mount, _) = find_mount(&mountinfo).expect("cgroup v2 is mounted");
        let base = mount.join(format!("user-factory-test-{}-removed", std::process::id()));
        std::fs::create_dir(&base).expect("this needs root: it makes a cgroup");
        let cgroups = OwnedFd::from(File::open(&base).unwrap());
        let worker = WorkerId::from_bits(1);
        let over = std::sync::atomic::AtomicBool::new(false);
        let seen = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(std::sync::atomic::Ordering::Relaxed) {
                    create(&cgroups, &worker.to_string()).unwrap();
                    kill_and_remove(&cgroups, worker).unwrap();
                }
            });
            let mut answers = (0..50_000).map(|_| is_populated(&cgroups, worker));
            let other = answers.find(|answer| !matches!(answer, Ok(false)));
            over.store(true, std::sync::atomic::Ordering::Relaxed);
            other
        });
        std::fs::remove_dir(&base).unwrap();
        assert!(seen.is_none(), "{seen:?}");
    }
}
