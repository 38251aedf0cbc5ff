//! A worker's trees: the directories below its `fs/` that its job may write, made by root, emptied by
//! a process that has become the job's user. Root itself never walks them.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::AtFlags;
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat};
use nix::unistd::{Gid, fchownat};
use protocol::config::{HostPath, PRIVATE_TREES, Slot};
use protocol::{Uid, UserName};

use crate::host::directory::{kind, make_dir, names, open_dir, remove_dir, remove_file, stat};
use crate::unprivileged::as_user;
use crate::unprivileged::remove::empty_dirs;

/// One tree: its path below `fs/`, where the job sees it, and its mode.
#[derive(Debug, PartialEq, Eq)]
pub struct WritableDir {
    pub below_fs: String,
    pub place: PathBuf,
    mode: u32,
}

/// The writable trees of a job in `slot`.
///
/// `home/`, `run/` and `run/user/` stay root's, with the job's own directories inside: so the first two can be mounted as
/// `/home` and `/run`, which are the same for nobody else.
pub fn of(user: &UserName, uid: Uid, slot: &Slot) -> Vec<WritableDir> {
    let inside = |below_fs: String, mode| WritableDir {
        place: Path::new("/").join(&below_fs),
        below_fs,
        mode,
    };
    let mut trees = vec![
        inside(format!("home/{user}"), 0o755),
        inside("run/buildomat".into(), 0o755),
        inside("run/lock".into(), 0o1777),
        inside("run/screen".into(), 0o1777),
        inside(format!("run/user/{uid}"), 0o700),
    ];
    let slots = slot.writable.iter().map(HostPath::as_path).enumerate();
    let slots = slots.map(|(i, place)| (format!("writable-{i}"), place));
    let all = PRIVATE_TREES
        .iter()
        .map(|place| (place[1..].replace('/', "-"), Path::new(place)));
    trees.extend(all.chain(slots).map(|(below_fs, place)| WritableDir {
        below_fs,
        mode: if place.ends_with("tmp") { 0o1777 } else { 0o755 },
        place: place.to_owned(),
    }));
    trees
}

/// What is mounted where for these trees: `/home` and `/run` with all that is in them.
pub fn mounted(trees: &[WritableDir]) -> impl Iterator<Item = (&str, &Path)> {
    let whole = |tree: &&WritableDir| !tree.below_fs.contains('/');
    let inside = [("home", Path::new("/home")), ("run", Path::new("/run"))];
    let whole = trees
        .iter()
        .filter(whole)
        .map(|tree| (tree.below_fs.as_str(), tree.place.as_path()));
    inside.into_iter().chain(whole)
}

/// Make the trees in the worker's directory. What is there already stays.
pub fn make(worker: BorrowedFd<'_>, uid: Uid, trees: &[WritableDir]) -> Result<()> {
    make_dir(worker, "fs", 0o755).context("cannot make the worker's fs")?;
    let fs = open_dir(worker, "fs")?;
    let (owner, group) = (nix::unistd::Uid::from_raw(uid.get()), Gid::from_raw(uid.get()));
    for tree in trees {
        let describe = || format!("cannot make the tree {}", tree.below_fs);
        for (end, _) in tree.below_fs.match_indices('/') {
            make_dir(&fs, &tree.below_fs[..end], 0o755).with_context(describe)?;
        }
        let path = tree.below_fs.as_str();
        make_dir(&fs, path, tree.mode).with_context(describe)?;
        if tree.mode != 0o755 {
            // The umask has taken some of it.
            let mode = Mode::from_bits_truncate(tree.mode);
            fchmodat(&fs, path, mode, FchmodatFlags::FollowSymlink).with_context(describe)?;
        }
        fchownat(&fs, path, Some(owner), Some(group), AtFlags::AT_SYMLINK_NOFOLLOW).with_context(describe)?;
    }
    Ok(())
}

/// All directories below `fs/` but those in trees, with their owners, each after those that are in it. What else is there
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

/// Whose the trees are, by the owner that root has given them: their job cannot give them away (`chown(2)`).
pub fn owner(worker: BorrowedFd<'_>) -> Result<Option<Uid>> {
    let fs = match open_dir(worker, "fs") {
        Err(Errno::ENOENT) => return Ok(None),
        fs => fs?,
    };
    let owners = found(&fs)?.into_iter().map(|(_, owner)| owner);
    Ok(owners.filter_map(|owner| Uid::try_from(owner).ok()).next())
}

/// Remove `fs/` and all in it. The user has no process any more but the one that works here.
pub fn remove(worker: BorrowedFd<'_>, uid: Option<Uid>) -> Result<()> {
    let fs = match open_dir(worker, "fs") {
        Err(Errno::ENOENT) => return Ok(()),
        fs => fs?,
    };
    let trees = found(&fs)?;
    // One that is still root's was made and not yet given away when that was cut off: nobody has written to it,
    // and the job's user could not open it.
    let given: Vec<&Path> = trees
        .iter()
        .filter(|(_, owner)| uid.is_some_and(|uid| uid.get() == *owner))
        .map(|(path, _)| path.as_path())
        .collect();
    if let Some(uid) = uid.filter(|_| !given.is_empty()) {
        as_user(uid, &[fs.as_raw_fd()], |proof| {
            empty_dirs(proof, fs.as_fd(), &given)
        })?;
    }
    for (path, _) in &trees {
        remove_dir(&fs, path).with_context(|| format!("cannot remove the tree {}", path.display()))?;
    }
    remove_dir(worker, "fs").context("cannot remove the worker's fs")
}
