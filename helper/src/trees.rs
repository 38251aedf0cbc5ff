//! A worker's trees: the directories below its `fs/` that its job may write, made by root, emptied by
//! a process that has become the job's user. Root itself never walks them.

use std::ffi::{CStr, OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::dir::{Dir, Entry, OwningIter, Type};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmod, fchmodat, fstat};
use nix::sys::wait::waitpid;
use nix::unistd::{Gid, UnlinkatFlags, fchownat, unlinkat};
use protocol::config::{PRIVATE_TREES, Slot};
use protocol::{Uid, UserName};

use crate::host::{kind, look, make_dir, names, open_dir, remove_dir, remove_file};
use crate::{sys, user};

/// One tree: its path below `fs/`, where the job sees it, and its mode.
#[derive(Debug, PartialEq, Eq)]
pub struct Tree {
    pub below_fs: String,
    pub place: PathBuf,
    mode: u32,
}

/// The writable trees of a job in `slot`.
///
/// `home/` and `run/` stay root's, with the job's own directory inside: so they can be mounted as
/// `/home` and `/run`, which are the same for nobody else.
pub fn of(user: &UserName, slot: &Slot) -> Vec<Tree> {
    let tree = |below_fs: String, place: PathBuf, mode| Tree {
        below_fs,
        place,
        mode,
    };
    let mut trees = vec![
        tree(format!("home/{user}"), "/home".into(), 0o755),
        tree("run/buildomat".into(), "/run".into(), 0o755),
    ];
    for place in PRIVATE_TREES {
        let mode = if place.ends_with("/tmp") { 0o1777 } else { 0o755 };
        trees.push(tree(place[1..].replace('/', "-"), place.into(), mode));
    }
    for (i, place) in slot.writable.iter().enumerate() {
        trees.push(tree(format!("writable-{i}"), place.as_path().to_owned(), 0o755));
    }
    trees
}

/// Make the trees in the worker's directory. What is there already stays.
pub fn make(worker: BorrowedFd<'_>, uid: Uid, trees: &[Tree]) -> Result<()> {
    make_dir(worker, "fs", 0o755).context("cannot make the worker's fs")?;
    let fs = open_dir(worker, "fs")?;
    let (owner, group) = (nix::unistd::Uid::from_raw(uid.get()), Gid::from_raw(uid.get()));
    for tree in trees {
        let describe = || format!("cannot make the tree {}", tree.below_fs);
        if let Some((parent, _)) = tree.below_fs.split_once('/') {
            make_dir(&fs, parent, 0o755).with_context(describe)?;
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

/// All trees below `fs/`, with their owners. What else is there is in the way, and removed.
fn found(fs: &OwnedFd) -> Result<Vec<(PathBuf, u32)>> {
    let mut trees = Vec::new();
    let mut take = |path: PathBuf| -> Result<()> {
        let stat = look(fs, &path)?;
        if kind(&stat) != SFlag::S_IFDIR {
            return Ok(remove_file(fs, &path)?);
        }
        trees.push((path, stat.st_uid));
        Ok(())
    };
    for top in names(fs.as_fd())? {
        if top == "home" || top == "run" {
            let root_owned = open_dir(fs, &top)?;
            for name in names(root_owned.as_fd())? {
                take(Path::new(&top).join(name))?;
            }
        } else {
            take(top.into())?;
        }
    }
    Ok(trees)
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
        user::as_user(uid, &[fs.as_raw_fd()], || empty_all(fs.as_fd(), &given))?;
    }
    let all = trees.iter().map(|(path, _)| path.as_path());
    for path in all.chain([Path::new("home"), Path::new("run")]) {
        remove_dir(&fs, path).with_context(|| format!("cannot remove the tree {}", path.display()))?;
    }
    remove_dir(worker, "fs").context("cannot remove the worker's fs")
}

/// Open a directory of our own, whatever mode its owner has left it in.
fn open_own(parent: BorrowedFd<'_>, name: &Path) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let dir = match openat(parent, name, flags, Mode::empty()) {
        Err(Errno::EACCES) => {
            fchmodat(parent, name, Mode::S_IRWXU, FchmodatFlags::FollowSymlink)?;
            openat(parent, name, flags, Mode::empty())?
        }
        dir => dir?,
    };
    if fstat(&dir)?.st_mode & 0o700 != 0o700 {
        fchmod(&dir, Mode::S_IRWXU)?;
    }
    Ok(dir)
}

/// From so many files on, a second process helps.
const MANY: usize = 1000;

/// Empty the trees, as their owner. Each process of the two would do it alone: what one finds gone is no error.
fn empty_all(fs: BorrowedFd<'_>, trees: &[&Path]) -> Result<()> {
    let mut second = None;
    let mut removed = 0;
    let mut count = || {
        removed += 1;
        if removed == MANY {
            // Without it, it takes longer.
            second = sys::fork(|| {
                trees.iter().rev().for_each(|tree| drop(help(fs, tree)));
                0
            })
            .ok();
        }
    };
    let emptied = trees.iter().try_for_each(|tree| {
        empty(fs, tree, &mut count).with_context(|| format!("cannot empty the tree {}", tree.display()))
    });
    if let Some(second) = second {
        let _ = kill(second, Signal::SIGKILL);
        waitpid(second, None)?;
    }
    emptied
}

/// Take directories from the other end, in the first directory that has several.
fn help(fs: BorrowedFd<'_>, tree: &Path) -> Result<()> {
    let mut dir = open_own(fs, tree)?;
    loop {
        let mut directories = Vec::new();
        for entry in &mut listing(&dir)? {
            let entry = entry?;
            if entry.file_type() == Some(Type::Directory) && !is_dot(entry.file_name()) {
                directories.push(name_of(&entry));
            }
        }
        let Some(last) = directories.pop() else {
            return Ok(());
        };
        if directories.is_empty() {
            dir = open_own(dir.as_fd(), Path::new(&last))?;
            continue;
        }
        for name in std::iter::once(last).chain(directories.into_iter().rev()) {
            let _ = empty(dir.as_fd(), Path::new(&name), &mut || ());
            let _ = remove_dir(&dir, &name);
        }
        return Ok(());
    }
}

/// The entries of a directory, by a descriptor of their own: reading moves the offset, which copies share.
fn listing(dir: &OwnedFd) -> nix::Result<OwningIter> {
    Ok(Dir::from_fd(open_dir(dir, ".")?)?.into_iter())
}

fn is_dot(name: &CStr) -> bool {
    name == c"." || name == c".."
}

fn name_of(entry: &Entry) -> OsString {
    OsStr::from_bytes(entry.file_name().to_bytes()).to_owned()
}

/// Directories within a directory that are still to do.
struct Level {
    /// The next one last.
    names: Vec<OsString>,
    /// Are they all that is left in it?
    is_all: bool,
}

impl Level {
    /// So many are remembered at once.
    const MOST: usize = 1024;

    /// Remove what is no directory.
    fn begin(dir: &OwnedFd, count: &mut dyn FnMut()) -> Result<Level> {
        let mut names = Vec::new();
        let mut entries = listing(dir)?;
        let is_all = loop {
            let Some(entry) = entries.next().transpose()? else {
                break true;
            };
            if is_dot(entry.file_name()) {
                continue;
            }
            let mut is_directory = entry.file_type() == Some(Type::Directory);
            if !is_directory {
                match unlinkat(dir, entry.file_name(), UnlinkatFlags::NoRemoveDir) {
                    Ok(()) | Err(Errno::ENOENT) => count(),
                    // Not every file system says in a listing what is one.
                    Err(Errno::EISDIR) => is_directory = true,
                    Err(errno) => bail!("cannot remove {:?}: {errno}", entry.file_name()),
                }
            }
            if is_directory {
                names.push(name_of(&entry));
                if names.len() == Self::MOST {
                    break false;
                }
            }
        };
        names.reverse();
        Ok(Level { names, is_all })
    }
}

/// A directory above the one that is being emptied: which it is, and what of it is still to do.
struct Above {
    identity: (u64, u64),
    level: Level,
}

fn identity(dir: &OwnedFd) -> nix::Result<(u64, u64)> {
    let stat = fstat(dir)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Remove everything in the directory, as its owner, with three descriptors and no recursion, whatever the
/// names, modes, depth and number.
///
/// The way back up is `..`, checked against what was left there. It takes no room: moving what is too deep
/// somewhere else would, and on a full disk, or at the end of a quota, there is none.
fn empty(fs: BorrowedFd<'_>, tree: &Path, count: &mut dyn FnMut()) -> Result<()> {
    let mut dir = open_own(fs, tree)?;
    let mut level = Level::begin(&dir, count)?;
    let mut path: Vec<Above> = Vec::new();
    loop {
        let Some(name) = level.names.pop() else {
            if !level.is_all {
                level = Level::begin(&dir, count)?;
                continue;
            }
            // Empty now. Its parent, whose next entry it is, removes it.
            let Some(above) = path.pop() else {
                return Ok(());
            };
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let parent = openat(&dir, "..", flags, Mode::empty()).context("cannot go back up")?;
            ensure!(
                identity(&parent)? == above.identity,
                "a directory was moved while it was deleted: see which process does that, and repeat"
            );
            (dir, level) = (parent, above.level);
            continue;
        };
        match unlinkat(&dir, name.as_os_str(), UnlinkatFlags::RemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {
                count();
                continue;
            }
            Err(Errno::ENOTEMPTY | Errno::EEXIST) => {}
            Err(errno) => bail!("cannot remove {name:?}: {errno}"),
        }
        let inner = match open_own(dir.as_fd(), Path::new(&name)) {
            Err(Errno::ENOENT) => continue,
            inner => inner.with_context(|| format!("cannot open {name:?}"))?,
        };
        // Once more after its content: then rmdir succeeds.
        level.names.push(name);
        let content = Level::begin(&inner, count)?;
        let identity = identity(&dir)?;
        path.push(Above { identity, level });
        (dir, level) = (inner, content);
    }
}
