//! Emptying the directories that a job could write, as the job's user: root never walks them.

use std::cell::Cell;
use std::collections::VecDeque;
use std::ffi::{CStr, CString, OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use nix::dir::{Dir, OwningIter, Type};
use nix::errno::Errno;
use nix::fcntl::{RenameFlags, openat, renameat, renameat2};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{FchmodatFlags, Mode, fchmod, fchmodat, fstat, mkdirat};
use nix::sys::wait::WaitPidFlag;
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::host::directory::{DIRECTORY, remove_dir};
use crate::sys;
use crate::unprivileged::Unprivileged;

/// Open a directory of our own, whatever mode its owner has left it in.
fn open_own(parent: impl AsFd, name: &Path) -> nix::Result<OwnedFd> {
    let parent = parent.as_fd();
    let dir = match openat(parent, name, DIRECTORY, Mode::empty()) {
        Err(Errno::EACCES) => {
            fchmodat(parent, name, Mode::S_IRWXU, FchmodatFlags::FollowSymlink)?;
            openat(parent, name, DIRECTORY, Mode::empty())?
        }
        dir => dir?,
    };
    let stat = fstat(&dir)?;
    if stat.st_ino == sys::SUBVOLUME_TOP {
        // In a read-only subvolume not even a mode can be changed. A directory of another file system may have the same
        // number: there the request is unknown. What fails for another reason is told by the next change.
        let _ = sys::make_subvolume_writable(dir.as_fd());
    }
    if stat.st_mode & 0o700 != 0o700 {
        fchmod(&dir, Mode::S_IRWXU)?;
    }
    Ok(dir)
}

/// List the directory's entries, by a descriptor that shares its offset: nobody else reads by it.
fn entries(dir: &OwnedFd) -> Result<OwningIter> {
    Ok(Dir::from_fd(dir.try_clone()?)?.into_iter())
}

/// The number of files from which on a second process helps.
const MANY: usize = 1000;

/// The most names of directories that the second process remembers, whatever a job has left.
const MOST_OF_SECOND: usize = 1 << 14;

/// How often a directory may be gone back to since something was removed. Since Linux 6.6 btrfs lists no name that is newer than
/// the opening of the directory: where something renames after each opening, there is no end.
const MOST_IN_VAIN: usize = 1000;

/// How deep a directory is emptied where it is; what is deeper is moved first. The kernel keeps all directories above an
/// open one in memory, a kilobyte or so for each, which no limit of the job's counts.
pub const DEEPEST: usize = 4096;

/// The directory in `fs/` to which what is deeper than [`DEEPEST`] is moved, and the empty one in it with which it is
/// exchanged. Root makes both with the writable directories, writable to all: when a job has used up its quota or the disk, its
/// user can make none.
pub const DEEP: &str = "deep";
pub const DEEP_SPARE: &str = "deep/spare";

/// Where what is too deep is moved.
struct Deep {
    dir: OwnedFd,
    /// The name of the next one.
    next: u64,
}

impl Deep {
    /// None where root has not made it.
    fn open(fs: BorrowedFd<'_>) -> nix::Result<Option<Deep>> {
        match openat(fs, DEEP, DIRECTORY, Mode::empty()) {
            Err(Errno::ENOENT) => Ok(None),
            dir => Ok(Some(Deep { dir: dir?, next: 0 })),
        }
    }

    /// Move this directory here by an exchange with the empty one (`RENAME_EXCHANGE` in `rename(2)`), which comes back:
    /// nothing is made, for the job may have used up its quota.
    fn take(&mut self, parent: &OwnedFd, name: &OsStr) -> nix::Result<()> {
        renameat2(parent, name, &self.dir, "spare", RenameFlags::RENAME_EXCHANGE)?;
        // What an earlier attempt has left is in the way.
        while let Err(errno) = renameat(&self.dir, "spare", &self.dir, self.next.to_string().as_str()) {
            if !matches!(errno, Errno::ENOTEMPTY | Errno::EEXIST) {
                return Err(errno);
            }
            self.next += 1;
        }
        self.next += 1;
        match renameat(parent, name, &self.dir, "spare") {
            // The other process has removed it.
            Err(Errno::ENOENT) => mkdirat(&self.dir, "spare", Mode::S_IRWXU),
            back => back,
        }
    }
}

/// Empty the writable directories, as their owner. Each process of the two would do it alone: what one finds gone is no error.
pub fn empty_dirs(_proof: &Unprivileged, fs: BorrowedFd<'_>, dirs: &[&Path]) -> Result<()> {
    let mut second = None;
    let mut removed = 0;
    let mut count = || {
        removed += 1;
        if removed == MANY {
            // Without it, it takes longer.
            second = sys::fork(|| {
                dirs.iter().rev().for_each(|dir| drop(empty_from_end(fs, dir)));
                0
            })
            .ok();
        }
    };
    let emptied = empty_all(fs, dirs, DEEPEST, &mut count);
    if let Some(second) = second {
        let _ = kill(second, Signal::SIGKILL);
        sys::wait(Some(second), WaitPidFlag::empty())?;
    }
    emptied
}

/// Empty all of them, and then what was too deep.
fn empty_all(fs: BorrowedFd<'_>, dirs: &[&Path], deepest: usize, count: &mut dyn FnMut()) -> Result<()> {
    let mut deep = Deep::open(fs).context("cannot open the directory for what is too deep")?;
    // Where root has no room for it either, there is no bound.
    let deepest = if deep.is_some() { deepest } else { usize::MAX };
    for dir in dirs {
        empty(fs, dir, deepest, deep.as_mut(), count)
            .with_context(|| format!("cannot empty the writable directory {}", dir.display()))?;
    }
    let mut done = 0;
    while let Some(deep) = deep.as_mut().filter(|deep| done < deep.next) {
        let name = Path::new(DEEP).join(done.to_string());
        empty(fs, &name, deepest, Some(deep), count).context("cannot empty what was too deep")?;
        remove_dir(fs, &name).context("cannot remove what was too deep")?;
        done += 1;
    }
    Ok(())
}

/// Take directories from the other end, in the first directory that has several: the last so many of it. Where there is
/// none near the top, the first process is not to be held up.
fn empty_from_end(fs: BorrowedFd<'_>, dir: &Path) -> Result<()> {
    let mut own = open_own(fs, dir)?;
    for _ in 0..16 {
        let mut directories = VecDeque::new();
        for entry in entries(&own)? {
            let entry = entry?;
            if entry.file_type() == Some(Type::Directory) && !is_dot(entry.file_name()) {
                directories.push_back(name_of(entry.file_name()));
            }
            if directories.len() > MOST_OF_SECOND {
                directories.pop_front();
            }
        }
        if directories.len() == 1 {
            own = open_own(&own, Path::new(&directories[0]))?;
            continue;
        }
        for name in directories.iter().rev() {
            let _ = empty(own.as_fd(), Path::new(name), DEEPEST, None, &mut || ());
            let _ = remove_dir(&own, name);
        }
        break;
    }
    Ok(())
}

fn is_dot(name: &CStr) -> bool {
    name == c"." || name == c".."
}

fn name_of(name: &CStr) -> OsString {
    OsStr::from_bytes(name.to_bytes()).to_owned()
}

/// The subdirectories of a directory that are still to be removed.
struct PendingDir {
    /// The names of the subdirectories, the next one last.
    names: Vec<OsString>,
    /// Are these all entries that are left in the directory?
    is_all: bool,
}

impl PendingDir {
    /// The most names that are remembered at once, so far down: some 190,000 of all levels, and one of each that is deeper
    /// than [`DEEPEST`].
    fn most(depth: usize) -> usize {
        if depth > DEEPEST {
            1
        } else {
            1024 >> (depth / 64).min(6)
        }
    }

    /// The most bytes of names of non-directories that are collected before these are removed; and the bytes that each
    /// name counts besides its length.
    const FILES: usize = 8 << 20;
    const FILE: usize = 48;

    /// Remove everything but subdirectories, and collect the names of these.
    fn begin(own: &OwnedFd, depth: usize, count: &mut dyn FnMut()) -> Result<PendingDir> {
        let mut pending = PendingDir {
            names: Vec::new(),
            is_all: true,
        };
        let (mut files, mut bytes) = (Vec::new(), 0);
        for entry in entries(own)? {
            let entry = entry?;
            let name = entry.file_name();
            if is_dot(name) {
                continue;
            }
            if entry.file_type() == Some(Type::Directory) {
                pending.names.push(name_of(name));
            } else {
                files.push((entry.ino(), name.to_owned()));
                bytes += name.count_bytes() + Self::FILE;
            }
            if bytes >= Self::FILES {
                pending.remove(own, &mut files, count)?;
                bytes = 0;
            }
            if pending.names.len() >= Self::most(depth) {
                pending.is_all = false;
                break;
            }
        }
        pending.remove(own, &mut files, count)?;
        pending.names.reverse();
        Ok(pending)
    }

    /// Remove these files in the order of their inodes: in that of a listing, the kernel would visit each block of
    /// inodes many times.
    fn remove(
        &mut self,
        own: &OwnedFd,
        files: &mut Vec<(u64, CString)>,
        count: &mut dyn FnMut(),
    ) -> Result<()> {
        files.sort_unstable();
        for (_, name) in files.drain(..) {
            match unlinkat(own, &*name, UnlinkatFlags::NoRemoveDir) {
                Ok(()) => count(),
                Err(Errno::ENOENT) => {}
                // Not every file system says in a listing what is one.
                Err(Errno::EISDIR) => self.names.push(name_of(&name)),
                Err(errno) => bail!("cannot remove {name:?}: {errno}"),
            }
        }
        Ok(())
    }
}

/// A directory in which nothing is left to remove.
const DONE: PendingDir = PendingDir {
    names: Vec::new(),
    is_all: true,
};

/// A directory above the one that is being emptied: its remaining subdirectories, and the name of the one that was
/// entered.
struct ParentDir {
    pending: PendingDir,
    next: OsString,
}

/// Of the directories above the one that is being emptied, some are open, by their depth: the nearest always.
///
/// The way back up is not `..`: below a mount of a part of a file system, as ours is, the kernel climbs from there to
/// the mount's root each time (`path_connected` in `fs/namei.c`), and a job would have its worker's deletion take the
/// square of a depth. It is the names again, from the nearest that is open.
struct DirStack<D>(Vec<(usize, D)>);

impl<D> DirStack<D> {
    /// The number of directories that are left open on the way down, and the most that are open at any time.
    const DOWN: usize = 64;
    const MOST: usize = 256;

    /// On the way down: the one at `depth`, which is below all that are open, is left for one below it.
    fn leave(&mut self, depth: usize, dir: D) {
        self.push(depth, dir, Self::DOWN);
    }

    /// Beyond `most`, the one goes that leaves the smallest gap.
    fn push(&mut self, depth: usize, dir: D, most: usize) {
        self.0.push((depth, dir));
        if self.0.len() > most {
            let gap_without = |i: &usize| self.0[i + 1].0 - self.0[i - 1].0;
            let least = (1..self.0.len() - 1).min_by_key(gap_without);
            self.0.remove(least.expect("there are several"));
        }
    }

    /// The one at `depth` again. `step` leads from the one at a depth to the next below it. Of what is passed on the way
    /// some is held, so that every depth is stepped to a few times, however deep it is.
    fn back_to(&mut self, depth: usize, mut step: impl FnMut(&D, usize) -> nix::Result<D>) -> nix::Result<D> {
        let is_deeper = |(held, _): &mut (usize, D)| *held > depth;
        while self.0.pop_if(is_deeper).is_some() {}
        let (start, mut dir) = self.0.pop().expect("the topmost is held");
        let every = (depth - start).div_ceil(Self::DOWN / 2);
        for at in start..depth {
            let next = step(&dir, at);
            if next.is_err() || (at - start) % every == 0 {
                self.push(at, dir, Self::MOST);
            }
            dir = next?;
        }
        Ok(dir)
    }
}

/// Remove everything in the directory, as its owner, with at most 260 descriptors and no recursion, whatever the
/// names, modes, depth and number. What is deeper than `deepest` is moved to `deep`, or left if there is none. Where two
/// directories cannot be exchanged, it is emptied in its place.
fn empty(
    fs: BorrowedFd<'_>,
    dir: &Path,
    deepest: usize,
    mut deep: Option<&mut Deep>,
    count: &mut dyn FnMut(),
) -> Result<()> {
    let mut own = open_own(fs, dir)?;
    let mut pending = PendingDir::begin(&own, 0, count)?;
    let mut parents: Vec<ParentDir> = Vec::new();
    let mut stack = DirStack(Vec::new());
    let in_vain = Cell::new(0);
    let count = &mut || {
        in_vain.set(0);
        count();
    };
    let go_back = |name: &OsStr| {
        in_vain.set(in_vain.get() + 1);
        ensure!(
            in_vain.get() <= MOST_IN_VAIN,
            "nothing in {name:?} can be removed, and it is not empty: something renames in it, or its file system is damaged"
        );
        Ok(())
    };
    loop {
        if let Some(next) = pending.names.pop() {
            let inner = match open_own(&own, Path::new(&next)) {
                Err(Errno::ENOENT) => continue,
                // No job can make one: it takes requests of ioctl(2) that are refused to it.
                Err(Errno::EROFS) => bail!(
                    "cannot open {next:?}, which is closed to its owner and read-only: if it is a snapshot, make it \
                     writable (btrfs property set -ts PATH ro false), and repeat"
                ),
                inner => inner.with_context(|| format!("cannot open {next:?}"))?,
            };
            // Not before its mode lets it be moved.
            if parents.len() >= deepest {
                match deep.as_mut().map(|deep| deep.take(&own, &next)) {
                    None => return Ok(()),
                    Some(Ok(())) => {
                        count();
                        continue;
                    }
                    Some(Err(_)) => {}
                }
            }
            let content = PendingDir::begin(&inner, parents.len() + 1, count)?;
            stack.leave(parents.len(), own);
            parents.push(ParentDir { pending, next });
            (own, pending) = (inner, content);
        } else if !pending.is_all {
            go_back(parents.last().map_or(dir.as_os_str(), |parent| &parent.next))?;
            // Anew: its listing goes on where it was left.
            own = open_own(&own, Path::new("."))?;
            pending = PendingDir::begin(&own, parents.len(), count)?;
        } else {
            let Some(mut back) = parents.pop() else {
                return Ok(());
            };
            let step = |dir: &OwnedFd, at: usize| open_own(dir, Path::new(&parents[at].next));
            own = match stack.back_to(parents.len(), step) {
                // The other process has removed what is above, and so all of it.
                Err(Errno::ENOENT) => {
                    pending = DONE;
                    continue;
                }
                own => own.context("cannot go back up")?,
            };
            match unlinkat(&own, back.next.as_os_str(), UnlinkatFlags::RemoveDir) {
                Ok(()) => count(),
                Err(Errno::ENOENT) => {}
                // Not everything in it was listed.
                Err(Errno::ENOTEMPTY | Errno::EEXIST) => {
                    go_back(&back.next)?;
                    back.pending.names.push(back.next);
                }
                Err(errno) => bail!("cannot remove {:?}: {errno}", back.next),
            }
            pending = back.pending;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn what_is_too_deep_is_moved_and_nothing_is_made_for_it() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name);
        for name in ["deep/spare", "parent/one/in", "parent/two/in"] {
            std::fs::create_dir_all(at(name)).unwrap();
        }
        let list = |name: &str| {
            let entries = std::fs::read_dir(at(name)).unwrap();
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        let root = openat(nix::fcntl::AT_FDCWD, place.path(), DIRECTORY, Mode::empty()).unwrap();
        let parent = openat(&root, "parent", DIRECTORY, Mode::empty()).unwrap();
        let spare = std::fs::metadata(at("deep/spare")).unwrap().ino();
        let mut deep = Deep::open(root.as_fd()).unwrap().unwrap();
        for name in ["one", "two"] {
            deep.take(&parent, OsStr::new(name)).unwrap();
        }
        assert!(list("parent").is_empty());
        assert_eq!(list("deep"), ["0", "1", "spare"]);
        assert_eq!(list("deep/1"), ["in"]);
        assert_eq!(std::fs::metadata(at("deep/spare")).unwrap().ino(), spare);
    }

    /// A walk whose directories are their depths.
    struct Walk {
        stack: DirStack<usize>,
        at: usize,
        steps: usize,
    }

    impl Walk {
        fn down(&mut self, levels: usize) {
            for _ in 0..levels {
                self.stack.leave(self.at, self.at);
                self.at += 1;
                assert!(self.stack.0.len() <= DirStack::<usize>::MOST);
            }
        }

        fn up(&mut self, levels: usize) {
            for _ in 0..levels {
                self.at -= 1;
                let step = |dir: &usize, at: usize| {
                    assert_eq!(*dir, at);
                    self.steps += 1;
                    Ok(at + 1)
                };
                assert_eq!(self.stack.back_to(self.at, step), Ok(self.at));
            }
        }
    }

    /// Down so far, and up again, with a way aside of this length at each depth: the steps for each directory.
    fn steps(depth: usize, aside: usize) -> usize {
        let mut walk = Walk {
            stack: DirStack(Vec::new()),
            at: 0,
            steps: 0,
        };
        walk.down(depth);
        for _ in 0..depth {
            walk.up(1);
            walk.down(aside);
            walk.up(aside);
        }
        walk.steps.div_ceil(depth * (1 + aside))
    }

    /// Made as a job can make it: its upper end is put into a new directory, again and again.
    fn chain(dir: &Path, levels: usize) {
        let [new, top] = ["new", "top"].map(|name| dir.join(name));
        std::fs::create_dir_all(&top).unwrap();
        for _ in 1..levels {
            std::fs::create_dir(&new).unwrap();
            std::fs::rename(&top, new.join("top")).unwrap();
            std::fs::rename(&new, &top).unwrap();
        }
    }

    /// So far down, 16 names are listed at a time: their directory is gone back to more often than may be in vain.
    #[test]
    fn directories_without_number_that_are_too_deep_are_moved_and_removed() {
        let root = tempfile::tempdir_in("/dev/shm").unwrap();
        let work = root.path().join("work");
        chain(&work, 400);
        let last = work.join("top/".repeat(400));
        for number in 0..17 * MOST_IN_VAIN {
            std::fs::create_dir(last.join(number.to_string())).unwrap();
        }
        std::fs::create_dir_all(root.path().join(DEEP_SPARE)).unwrap();
        let fs = std::fs::File::open(root.path()).unwrap();
        empty_all(fs.as_fd(), &[Path::new("work")], 400, &mut || ()).unwrap();
        assert_eq!(std::fs::read_dir(&work).unwrap().count(), 0);
    }

    #[test]
    fn no_directory_is_emptied_deeper_than_the_bound_and_all_of_it_goes() {
        let root = tempfile::tempdir_in("/dev/shm").unwrap();
        let [work, deep] = ["work", DEEP].map(|name| root.path().join(name));
        chain(&work, 3 * DEEPEST);
        let fs = std::fs::File::open(root.path()).unwrap();
        empty(fs.as_fd(), Path::new("work"), DEEPEST, None, &mut || ()).unwrap();
        assert!(work.join("top/top").exists(), "it went deeper");
        std::fs::create_dir_all(root.path().join(DEEP_SPARE)).unwrap();
        // One that was cut off before has left this.
        std::fs::create_dir(deep.join("0")).unwrap();
        empty_all(
            fs.as_fd(),
            &["deep/0", "work"].map(Path::new),
            DEEPEST,
            &mut || (),
        )
        .unwrap();
        let left = |dir: &Path| std::fs::read_dir(dir).unwrap().map(|it| it.unwrap().file_name());
        assert_eq!(left(&work).count(), 0);
        assert_eq!(left(&deep).collect::<Vec<_>>(), ["spare"]);
    }

    #[test]
    fn all_levels_together_remember_a_bounded_number_of_names() {
        let all: usize = (0..=DEEPEST).map(PendingDir::most).sum();
        assert!(all < 190_000, "{all}");
        assert!((0..=DEEPEST).all(|depth| PendingDir::most(depth) > 0));
    }

    #[test]
    fn the_way_back_up_takes_few_steps_however_deep_and_branched_it_is() {
        assert_eq!(steps(64, 0), 0);
        for (depth, aside) in [
            (1_000, 0),
            (1_000_000, 0),
            (50_000, 1),
            (50_000, 20),
            (10_000, 200),
        ] {
            let steps = steps(depth, aside);
            assert!(steps <= 4, "{depth} deep, {aside} aside: {steps} steps for each");
        }
    }

    #[test]
    fn what_another_has_removed_on_the_way_loses_nothing_that_is_held() {
        let mut stack = DirStack(Vec::new());
        stack.leave(0, 0);
        let gone = stack.back_to(
            3,
            |dir, _| if *dir < 1 { Ok(dir + 1) } else { Err(Errno::ENOENT) },
        );
        assert_eq!(gone, Err(Errno::ENOENT));
        assert_eq!(stack.back_to(0, |_, _| unreachable!()), Ok(0));
    }
}
