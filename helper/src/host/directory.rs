//! Directories and files by the descriptor of the directory that they are in: never through a link, never above it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, openat2, renameat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::sys;

/// Refuse a directory that somebody but root could write or replace: itself and all above it. A sticky
/// directory (`/tmp`) above is fine, what root has in it is root's. What is not there is nobody's.
pub fn check_only_root_writes(path: &Path) -> Result<()> {
    for directory in path.ancestors() {
        let meta = match std::fs::symlink_metadata(directory) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            meta => meta.with_context(|| format!("cannot stat {}", directory.display()))?,
        };
        let open_to_others = meta.mode() & 0o022 != 0 && (meta.mode() & 0o1000 == 0 || directory == path);
        if !meta.is_dir() || meta.uid() != 0 || open_to_others {
            bail!(
                "{} must be a directory of root's, no link, that nobody else can write: mount a larger disk there, or chown root: and chmod go-w it",
                directory.display()
            );
        }
    }
    Ok(())
}

/// Make a directory that only root can write, and those above it that are not there.
pub fn make_directories(path: &Path, mode: u32) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    // Before, so that nothing is made or opened where somebody has put a link; and after, because in a
    // sticky directory somebody may have been quicker.
    check_only_root_writes(path)?;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .with_context(|| format!("cannot make the directory {}", path.display()))?;
    check_only_root_writes(path)
}

pub const DIRECTORY: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_CLOEXEC);

/// Open a directory as the root of a mount that is attached nowhere (`open_tree(2)`): by this descriptor nothing above
/// it can be reached, `..` ends there; and nothing is written where the mount is read-only. Sessions have these
/// descriptors, and may ignore modes.
pub fn open_detached(path: &Path, attributes: u64) -> Result<OwnedFd> {
    open_detached_without(path, attributes, 0)
}

/// The same, without these attributes of the mount that the host has there.
pub fn open_detached_without(path: &Path, attributes: u64, cleared: u64) -> Result<OwnedFd> {
    let describe = || format!("cannot open {} by itself", path.display());
    let mount = sys::clone_mount(AT_FDCWD, path, false).with_context(describe)?;
    sys::set_mount_attributes(mount.as_fd(), attributes, cleared).with_context(describe)?;
    // The first only names it: what is synced must be open.
    open_dir(mount, ".").with_context(describe)
}

/// What is at a path, to be mounted elsewhere and not to be read (`O_PATH`, open(2)), if no part of the path is a link:
/// whoever may rename a directory may put a link to another's in its place. With `O_DIRECTORY`, what is to be mounted there
/// when somebody enters it is mounted (`follow_automount` in the kernel's `fs/namei.c`).
pub fn name_without_links(path: &Path, kind: OFlag) -> nix::Result<OwnedFd> {
    let how = OpenHow::new().flags(kind | OFlag::O_PATH | OFlag::O_CLOEXEC);
    openat2(AT_FDCWD, path, how.resolve(ResolveFlag::RESOLVE_NO_SYMLINKS))
}

/// Open `name` below `parent`: never above it, and never through a link of any kind (`openat2(2)`).
fn open_below(parent: impl AsFd, name: &Path, flags: OFlag, mode: Mode) -> nix::Result<OwnedFd> {
    let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).mode(mode);
    let stay = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
    openat2(parent, name, how.resolve(stay))
}

/// Open the directory `name` in `parent`, not through a link.
pub fn open_dir(parent: impl AsFd, name: impl AsRef<Path>) -> nix::Result<OwnedFd> {
    open_below(parent, name.as_ref(), DIRECTORY, Mode::empty())
}

/// Open or make the file `name` in `parent`, not through a link; what is made is 0600.
pub fn open_file(parent: impl AsFd, name: impl AsRef<Path>, flags: OFlag) -> nix::Result<File> {
    let mode = if flags.contains(OFlag::O_CREAT) {
        Mode::S_IRUSR | Mode::S_IWUSR
    } else {
        Mode::empty()
    };
    Ok(File::from(open_below(parent, name.as_ref(), flags, mode)?))
}

/// The whole of a small file; none if it is not there.
pub fn read_small(parent: impl AsFd, name: impl AsRef<Path>) -> std::io::Result<Option<String>> {
    let file = match open_file(parent, name, OFlag::O_RDONLY) {
        Err(Errno::ENOENT) => return Ok(None),
        other => other?,
    };
    // Room for nearly all, so that it takes one call.
    let mut bytes = Vec::with_capacity(4096);
    file.take(64 << 10).read_to_end(&mut bytes)?;
    let text = String::from_utf8(bytes);
    Ok(Some(text.map_err(|error| {
        std::io::Error::new(std::io::ErrorKind::InvalidData, error)
    })?))
}

/// Make the directory `name` in `parent` unless it is there.
pub fn make_dir(parent: impl AsFd, name: impl AsRef<Path>, mode: u32) -> nix::Result<()> {
    match mkdirat(parent, name.as_ref(), Mode::from_bits_truncate(mode)) {
        Err(Errno::EEXIST) => Ok(()),
        other => other,
    }
}

/// Write a file so that whoever reads it sees all of it, also after a crash of ours. It is for what a power loss takes
/// with it anyway.
pub fn write_atomically(parent: BorrowedFd<'_>, name: &str, text: &str, mode: u32) -> std::io::Result<()> {
    let part = format!("{name}.part");
    remove_file(parent, &part)?;
    let mut file = open_file(parent, &part, OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL)?;
    file.write_all(text.as_bytes())?;
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode))?;
    Ok(renameat(parent, part.as_str(), parent, name)?)
}

/// Remove a file or link, if it is there.
pub fn remove_file(parent: impl AsFd, name: impl AsRef<Path>) -> nix::Result<()> {
    ignore_missing(unlinkat(parent, name.as_ref(), UnlinkatFlags::NoRemoveDir))
}

/// Remove an empty directory, if it is there.
pub fn remove_dir(parent: impl AsFd, name: impl AsRef<Path>) -> nix::Result<()> {
    ignore_missing(unlinkat(parent, name.as_ref(), UnlinkatFlags::RemoveDir))
}

fn ignore_missing(result: nix::Result<()>) -> nix::Result<()> {
    match result {
        Err(Errno::ENOENT) => Ok(()),
        other => other,
    }
}

/// What is at `name` in `parent`, itself, not what a link there points to.
pub fn stat(parent: impl AsFd, name: impl AsRef<Path>) -> nix::Result<FileStat> {
    fstatat(parent, name.as_ref(), AtFlags::AT_SYMLINK_NOFOLLOW)
}

pub fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

/// The names in a directory, `.` and `..` left out.
pub fn names(directory: BorrowedFd<'_>) -> nix::Result<Vec<std::ffi::OsString>> {
    names_of(directory, |_| true)
}

/// The names of the directories in a directory, on a file system that tells which these are (`d_type` in `readdir(3)`).
pub fn directories(directory: BorrowedFd<'_>) -> nix::Result<Vec<std::ffi::OsString>> {
    names_of(directory, |entry| {
        entry.file_type() == Some(nix::dir::Type::Directory)
    })
}

fn names_of(
    directory: BorrowedFd<'_>,
    is_wanted: fn(&nix::dir::Entry) -> bool,
) -> nix::Result<Vec<std::ffi::OsString>> {
    use std::os::unix::ffi::OsStrExt;
    // A descriptor of its own: reading moves the offset, which the copies of a descriptor share.
    let mut listing = nix::dir::Dir::from_fd(open_dir(directory, ".")?)?;
    let mut names = Vec::new();
    for entry in listing.iter() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." && is_wanted(&entry) {
            names.push(std::ffi::OsStr::from_bytes(name).to_owned());
        }
    }
    Ok(names)
}

#[cfg(test)]
pub mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    pub fn open_path(path: &Path) -> nix::Result<OwnedFd> {
        nix::fcntl::open(path, DIRECTORY, Mode::empty())
    }

    #[test]
    fn a_directory_that_somebody_else_could_replace_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        fs::create_dir_all(at("a/b/c")).unwrap();
        let (a, b) = (at("a"), at("a/b"));
        let accepts = |name: &str| check_only_root_writes(&at(name)).is_ok();
        assert!(accepts("a/b") && accepts("a/b/c") && accepts("a/b/not/yet/there"));
        for mode in [0o775, 0o757, 0o777] {
            set_mode(&b, mode);
            assert!(
                !accepts("a/b") && !accepts("a/b/c") && !accepts("a/b/later"),
                "{mode:o}"
            );
            // Sticky, it is safe to have something in, but not to be.
            set_mode(&b, mode | 0o1000);
            assert!(!accepts("a/b") && accepts("a/b/c"), "sticky {mode:o}");
        }
        set_mode(&b, 0o755);
        chown(&a, Some(1), None).unwrap();
        assert!(!accepts("a") && !accepts("a/b") && !accepts("a/b/c"));
        chown(&a, Some(0), None).unwrap();
        fs::write(at("file"), "").unwrap();
        symlink(&a, at("link")).unwrap();
        assert!(!accepts("file") && !accepts("file/below") && !accepts("link") && !accepts("link/b"));
        // A stat that fails does not mean that nothing is there.
        assert!(!accepts(&"x".repeat(300)));

        make_directories(&at("a/new/er"), 0o711).unwrap();
        assert_eq!(fs::metadata(at("a/new/er")).unwrap().mode() & 0o777, 0o711);
        assert!(make_directories(&at("link/new"), 0o755).is_err());
        assert!(!at("a/new/new").exists() && !at("a/b/new").exists());
    }

    #[test]
    fn files_are_roots_alone_small_and_whole() {
        let root = tempfile::tempdir().unwrap();
        let here = open_path(root.path()).unwrap();
        let at = |name: &str| root.path().join(name);
        let mode = |name: &str| fs::symlink_metadata(at(name)).unwrap().mode() & 0o777;

        let made = open_file(&here, "made", OFlag::O_WRONLY | OFlag::O_CREAT).unwrap();
        assert_eq!(mode("made"), 0o600);
        make_dir(&here, "dir", 0o700).unwrap();
        make_dir(&here, "dir", 0o700).unwrap();
        assert!(make_dir(&here, "no/dir", 0o700).is_err());
        let dir = open_dir(&here, "dir").unwrap();
        // Nothing is left open for a program that is started.
        for fd in [made.as_fd(), dir.as_fd()] {
            let flags = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFD).unwrap();
            assert_eq!(flags, libc::FD_CLOEXEC);
        }

        assert_eq!(read_small(&here, "none").unwrap(), None);
        assert!(read_small(&here, "dir").is_err());
        fs::write(at("long"), "x".repeat(70_000)).unwrap();
        assert_eq!(read_small(&here, "long").unwrap().unwrap().len(), 64 << 10);

        // A crash has left a part, and somebody has put a link there: it is not written through.
        fs::write(at("kept"), "kept").unwrap();
        symlink("kept", at("new.part")).unwrap();
        for text in ["one", "two"] {
            write_atomically(here.as_fd(), "new", text, 0o640).unwrap();
            assert_eq!(read_small(&here, "new").unwrap().as_deref(), Some(text));
            assert_eq!(mode("new"), 0o640);
        }
        assert_eq!(fs::read_to_string(at("kept")).unwrap(), "kept");
        assert!(!at("new.part").exists());

        let mut found = names(here.as_fd()).unwrap();
        found.sort();
        assert_eq!(found, ["dir", "kept", "long", "made", "new"]);
        assert_eq!(kind(&stat(&here, "dir").unwrap()), SFlag::S_IFDIR);
        assert_eq!(kind(&stat(&here, "new").unwrap()), SFlag::S_IFREG);
        for _ in 0..2 {
            remove_file(&here, "new").unwrap();
            remove_dir(&here, "dir").unwrap();
        }
        assert!(!at("new").exists() && !at("dir").exists());
        assert!(remove_dir(&here, "kept").is_err() && remove_file(&here, "kept/x").is_err());
    }

    #[test]
    fn nothing_is_opened_through_a_link_or_above_its_parent() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        fs::write(dir.path().join("secret"), "x").unwrap();
        symlink("a", dir.path().join("link")).unwrap();
        symlink("../../secret", dir.path().join("a/b/link")).unwrap();
        let here = open_path(dir.path()).unwrap();
        let below = open_dir(&here, "a").unwrap();
        assert!(open_dir(&below, "b").is_ok());
        assert_eq!(open_dir(&here, "link").unwrap_err(), Errno::ENOTDIR);
        assert_eq!(open_dir(&here, "link/b").unwrap_err(), Errno::ELOOP);
        assert_eq!(open_dir(&below, "..").unwrap_err(), Errno::EXDEV);
        let read = |parent: &OwnedFd, name: &str| open_file(parent, name, OFlag::O_RDONLY).unwrap_err();
        assert_eq!(read(&below, "b/link"), Errno::ELOOP);
        assert_eq!(read(&below, "../secret"), Errno::EXDEV);
        assert_eq!(read(&below, "/etc/passwd"), Errno::EXDEV);
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
}
