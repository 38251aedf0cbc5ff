//! A worker's writable directories: those below its `fs/` that its job may write, made by root, emptied by a process that
//! has become the job's user. Root itself never walks them.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat};
use nix::unistd::{Gid, fchownat};
use protocol::config::{HostPath, PRIVATE_DIRS, Slot};
use protocol::{Uid, UserName};

use crate::host::directory::{kind, make_dir, names, open_dir, remove_dir, remove_file, stat};
use crate::sandbox::paths::JobPath;
use crate::unprivileged::remove::{DEEP, DEEP_SPARE, empty_dirs};
use crate::unprivileged::run_as_user;

/// One of them: its path below `fs/`, where the job sees it, and its mode.
#[derive(Debug, PartialEq, Eq)]
pub struct WritableDir {
    pub below_fs: String,
    pub place: JobPath,
    mode: u32,
}

/// The writable directories of a job in `slot`.
///
/// `home/`, `run/` and `run/user/` stay root's, with the job's own directories inside: so the first two can be mounted as
/// `/home` and `/run`, which are the same for nobody else.
pub fn of(user: &UserName, uid: Uid, slot: &Slot) -> Vec<WritableDir> {
    let inside = |below_fs: String, mode| WritableDir {
        place: JobPath::new("/").join(&below_fs),
        below_fs,
        mode,
    };
    let mut dirs = vec![
        inside(format!("home/{user}"), 0o755),
        inside("run/buildomat".into(), 0o755),
        inside("run/lock".into(), 0o1777),
        inside("run/screen".into(), 0o1777),
        inside(format!("run/user/{uid}"), 0o700),
    ];
    let slots = slot.writable.iter().map(HostPath::as_path).enumerate();
    let slots = slots.map(|(i, place)| (format!("writable-{i}"), place));
    let all = PRIVATE_DIRS
        .iter()
        .map(|place| (place[1..].replace('/', "-"), Path::new(place)));
    dirs.extend(all.chain(slots).map(|(below_fs, place)| WritableDir {
        below_fs,
        mode: if place.ends_with("tmp") { 0o1777 } else { 0o755 },
        place: JobPath::new(place),
    }));
    dirs
}

/// What is mounted where for these: `/home` and `/run` with all that is in them.
pub fn mounted(dirs: &[WritableDir]) -> impl Iterator<Item = (&str, JobPath)> {
    let whole = |dir: &&WritableDir| !dir.below_fs.contains('/');
    let inside = [("home", JobPath::new("/home")), ("run", JobPath::new("/run"))];
    let whole = dirs
        .iter()
        .filter(whole)
        .map(|dir| (dir.below_fs.as_str(), dir.place.clone()));
    inside.into_iter().chain(whole)
}

/// Make them in the worker's directory. What is there already stays.
pub fn make(worker: BorrowedFd<'_>, uid: Uid, dirs: &[WritableDir]) -> Result<()> {
    make_dir(worker, "fs", 0o755).context("cannot make the worker's fs")?;
    let fs = open_dir(worker, "fs")?;
    make_deep(&fs).context("cannot make the directory for what is too deep")?;
    let (owner, group) = (nix::unistd::Uid::from_raw(uid.get()), Gid::from_raw(uid.get()));
    for dir in dirs {
        let describe = || format!("cannot make the writable directory {}", dir.below_fs);
        for (end, _) in dir.below_fs.match_indices('/') {
            make_dir(&fs, &dir.below_fs[..end], 0o755).with_context(describe)?;
        }
        let path = dir.below_fs.as_str();
        make_dir(&fs, path, dir.mode).with_context(describe)?;
        if dir.mode != 0o755 {
            // The umask has taken some of it.
            let mode = Mode::from_bits_truncate(dir.mode);
            fchmodat(&fs, path, mode, FchmodatFlags::FollowSymlink).with_context(describe)?;
        }
        fchownat(&fs, path, Some(owner), Some(group), AtFlags::AT_SYMLINK_NOFOLLOW).with_context(describe)?;
    }
    Ok(())
}

/// All directories below `fs/` but those in writable ones, with their owners, each after those that are in it. What else is there
/// is in the way, and removed. A job makes nothing in a directory of root's, so there are few, and not deep.
fn found(fs: &OwnedFd) -> Result<Vec<(PathBuf, u32)>> {
    fn list(directory: &OwnedFd, path: &Path, all: &mut Vec<(PathBuf, u32)>) -> Result<()> {
        for name in names(directory.as_fd())? {
            let stat = stat(directory, &name)?;
            if kind(&stat) != SFlag::S_IFDIR {
                remove_file(directory, &name)?;
                continue;
            }
            let path = path.join(&name);
            if stat.st_uid == 0 {
                list(&open_dir(directory, &name)?, &path, all)?;
            }
            all.push((path, stat.st_uid));
        }
        Ok(())
    }
    let mut all = Vec::new();
    list(fs, Path::new(""), &mut all)?;
    Ok(all)
}

/// Whose the writable directories are, by the owner that root has given them: their job cannot give them away (`chown(2)`).
pub fn owner(worker: BorrowedFd<'_>) -> Result<Option<Uid>> {
    let fs = match open_dir(worker, "fs") {
        Err(Errno::ENOENT) => return Ok(None),
        fs => fs?,
    };
    let owners = found(&fs)?.into_iter().map(|(_, owner)| owner);
    Ok(owners.filter_map(|owner| Uid::try_from(owner).ok()).next())
}

/// For what is too deep, open to all.
fn make_deep(fs: &OwnedFd) -> nix::Result<()> {
    for name in [DEEP, DEEP_SPARE] {
        make_dir(fs, name, 0o777)?;
        // The umask has taken some of it.
        fchmodat(
            fs,
            name,
            Mode::from_bits_truncate(0o777),
            FchmodatFlags::FollowSymlink,
        )?;
    }
    Ok(())
}

/// Remove `fs/` and all in it. The user has no process any more but the one that works here.
pub fn remove(worker: BorrowedFd<'_>, uid: Option<Uid>) -> Result<()> {
    let fs = match open_dir(worker, "fs") {
        Err(Errno::ENOENT) => return Ok(()),
        fs => fs?,
    };
    let dirs = found(&fs)?;
    let [deep, spare] = [DEEP, DEEP_SPARE].map(Path::new);
    // One that is still root's was made and not yet given away when that was cut off: nobody has written to it,
    // and the job's user could not open it.
    let given: Vec<&Path> = dirs
        .iter()
        .filter(|(_, owner)| uid.is_some_and(|uid| uid.get() == *owner))
        .map(|(path, _)| path.as_path())
        .collect();
    if let Some(uid) = uid.filter(|_| !given.is_empty()) {
        if !dirs.iter().any(|(path, _)| path == spare) {
            // A deletion was cut off while another had its name. Where the disk is full, this one goes on without it.
            let _ = make_deep(&fs);
        }
        run_as_user(uid, &[fs.as_raw_fd()], |proof| {
            empty_dirs(proof, fs.as_fd(), &given)?;
            Ok(true)
        })?;
    }
    // Both may be newer than the list.
    let listed = dirs.iter().map(|(path, _)| path.as_path());
    for path in std::iter::once(spare).chain(listed).chain([deep]) {
        remove_dir(&fs, path)
            .with_context(|| format!("cannot remove the writable directory {}", path.display()))?;
    }
    remove_dir(worker, "fs").context("cannot remove the worker's fs")
}
