//! What a process changes below a directory, in order, as its system calls tell.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::unistd::Pid;

use super::{Event, TracedCall};

/// One change, by the paths of its time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A regular file, empty.
    Make {
        /// Of the new file.
        path: PathBuf,
        /// What it was made with.
        attributes: Attributes,
    },
    /// A directory.
    MakeDir {
        /// Of the new directory.
        path: PathBuf,
        /// What it was made with.
        attributes: Attributes,
    },
    /// A symbolic link.
    Symlink {
        /// Of the new link.
        path: PathBuf,
        /// Its text.
        target: PathBuf,
    },
    /// `unlink` or `rmdir`.
    Remove {
        /// What is gone.
        path: PathBuf,
    },
    /// What was at the new path is gone.
    Rename {
        /// The old path.
        from: PathBuf,
        /// The new path.
        to: PathBuf,
    },
    /// One more name of a file.
    Link {
        /// The old name, which stays.
        from: PathBuf,
        /// The new name.
        to: PathBuf,
    },
    /// Bytes of a file.
    Write {
        /// Of the file.
        path: PathBuf,
        /// The first byte's offset.
        at: u64,
        /// As they were written.
        bytes: Vec<u8>,
    },
    /// A file's length.
    Cut {
        /// Of the file.
        path: PathBuf,
        /// In bytes, shorter or longer than before.
        length: u64,
    },
    /// A mode or an owner.
    Attributes {
        /// What has changed.
        path: PathBuf,
        /// As it is afterwards.
        attributes: Attributes,
    },
    /// What is at this path is on the disk from now on.
    Sync {
        /// A file, or a directory for its names.
        path: PathBuf,
    },
}

/// A node's mode and owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Attributes {
    /// Without the node's type.
    pub mode: u32,
    /// Of the owner.
    pub uid: u32,
    /// Of the group.
    pub gid: u32,
}

impl Attributes {
    pub(crate) fn of(meta: &fs::Metadata) -> Attributes {
        Attributes {
            mode: meta.mode() & 0o7777,
            uid: meta.uid(),
            gid: meta.gid(),
        }
    }
}

/// Records what the traced do below a directory.
#[derive(Debug)]
pub struct Recorder {
    below: PathBuf,
    pending_calls: HashMap<Pid, EnteredCall>,
    /// In the order in which they were done.
    pub changes: Vec<Change>,
}

/// A call that has been entered, with what only its beginning tells.
#[derive(Debug)]
enum EnteredCall {
    Open {
        path: PathBuf,
        was: Option<u64>,
        cuts: bool,
    },
    Write {
        path: PathBuf,
        at: u64,
    },
    Attributes {
        path: PathBuf,
    },
    MakeDir {
        path: PathBuf,
    },
    Other(Change),
}

impl Recorder {
    /// Nothing was seen yet; `below` is absolute.
    pub fn new(below: &Path) -> Recorder {
        Recorder {
            below: below.to_owned(),
            pending_calls: HashMap::new(),
            changes: Vec::new(),
        }
    }

    /// For each event that [`trace`](super::trace) tells, in its order.
    pub fn on(&mut self, pid: Pid, event: &Event) {
        match event {
            Event::Enter(call) => match begin(&self.below, pid, call) {
                Some(entered) => drop(self.pending_calls.insert(pid, entered)),
                None => drop(self.pending_calls.remove(&pid)),
            },
            Event::Leave(_, result) => {
                if let Some(entered) = self.pending_calls.remove(&pid).filter(|_| *result >= 0) {
                    let done = finish(entered, *result as u64);
                    let below = &self.below;
                    self.changes
                        .extend(done.into_iter().filter(|change| change.is_below(below)));
                }
            }
            _ => {}
        }
    }
}

/// A path among the arguments, as an absolute one of the host's.
fn path_at(below: &Path, pid: Pid, directory: u64, pointer: u64) -> Option<PathBuf> {
    let name = text_at(pid, pointer)?;
    if name.is_absolute() {
        return Some(name);
    }
    let base = match directory as i32 {
        libc::AT_FDCWD => fs::read_link(format!("/proc/{pid}/cwd")).ok()?,
        fd => path_of(below, pid, fd as u64)?,
    };
    let whole = base.join(name);
    // A directory may be named by itself: `.`, or nothing.
    Some(whole.components().collect())
}

/// The helper has the workers' directory as a mount that is attached nowhere: a path in it begins there.
fn path_of(below: &Path, pid: Pid, fd: u64) -> Option<PathBuf> {
    let link = format!("/proc/{pid}/fd/{}", fd as i32);
    let path = fs::read_link(&link).ok()?;
    let here = below.join("workers").join(path.strip_prefix("/").ok()?);
    let identity = |meta: fs::Metadata| (meta.dev(), meta.ino());
    let same = fs::symlink_metadata(&here).ok().map(identity) == Some(identity(fs::metadata(link).ok()?));
    Some(if same { here } else { path })
}

fn text_at(pid: Pid, pointer: u64) -> Option<PathBuf> {
    let mut bytes = vec![0; 4096];
    let memory = File::open(format!("/proc/{pid}/mem")).ok()?;
    // A string near the end of a mapping is read short.
    let n = memory.read_at(&mut bytes, pointer).ok()?;
    let end = bytes[..n].iter().position(|b| *b == 0)?;
    Some(PathBuf::from(OsStr::from_bytes(&bytes[..end])))
}

fn number_at(pid: Pid, pointer: u64) -> Option<u64> {
    let mut bytes = [0; 8];
    let memory = File::open(format!("/proc/{pid}/mem")).ok()?;
    memory.read_exact_at(&mut bytes, pointer).ok()?;
    Some(u64::from_ne_bytes(bytes))
}

/// Where the next write goes.
fn position(pid: Pid, fd: u64) -> Option<u64> {
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", fd as i32)).ok()?;
    let field = |name: &str| {
        Some(
            info.lines()
                .find_map(|line| line.strip_prefix(name))?
                .trim()
                .to_owned(),
        )
    };
    let flags = i32::from_str_radix(&field("flags:")?, 8).ok()?;
    if flags & libc::O_APPEND != 0 {
        return Some(fs::metadata(format!("/proc/{pid}/fd/{}", fd as i32)).ok()?.len());
    }
    field("pos:")?.parse().ok()
}

#[cfg(target_arch = "x86_64")]
const OLD: [libc::c_long; 6] = [
    libc::SYS_mkdir,
    libc::SYS_unlink,
    libc::SYS_rmdir,
    libc::SYS_rename,
    libc::SYS_chmod,
    libc::SYS_link,
];
#[cfg(not(target_arch = "x86_64"))]
const OLD: [libc::c_long; 6] = [-1, -2, -3, -4, -5, -6];

fn begin(below: &Path, pid: Pid, call: &TracedCall) -> Option<EnteredCall> {
    let a = call.arguments;
    let here = libc::AT_FDCWD as u64;
    let fd = || path_of(below, pid, a[0]);
    let open = |path: PathBuf, flags: i32| {
        if flags & (libc::O_CREAT | libc::O_TRUNC) == 0 {
            return None;
        }
        let was = fs::symlink_metadata(&path).ok().map(|meta| meta.len());
        let cuts = flags & libc::O_TRUNC != 0;
        Some(EnteredCall::Open { path, was, cuts })
    };
    let attributes = |path| Some(EnteredCall::Attributes { path });
    let make_dir = |path| Some(EnteredCall::MakeDir { path });
    let remove = |path| Some(EnteredCall::Other(Change::Remove { path }));
    let rename = |from, to| Some(EnteredCall::Other(Change::Rename { from, to }));
    let link = |from, to| Some(EnteredCall::Other(Change::Link { from, to }));
    match call.number {
        libc::SYS_openat => open(path_at(below, pid, a[0], a[1])?, a[2] as i32),
        libc::SYS_openat2 => open(path_at(below, pid, a[0], a[1])?, number_at(pid, a[2])? as i32),
        libc::SYS_write | libc::SYS_writev => Some(EnteredCall::Write {
            path: fd()?,
            at: position(pid, a[0])?,
        }),
        libc::SYS_pwrite64 => Some(EnteredCall::Write {
            path: fd()?,
            at: a[3],
        }),
        libc::SYS_sendfile => Some(EnteredCall::Write {
            path: fd()?,
            at: position(pid, a[0])?,
        }),
        libc::SYS_copy_file_range => Some(EnteredCall::Write {
            path: path_of(below, pid, a[2])?,
            at: if a[3] == 0 {
                position(pid, a[2])?
            } else {
                number_at(pid, a[3])?
            },
        }),
        libc::SYS_ftruncate => Some(EnteredCall::Other(Change::Cut {
            path: fd()?,
            length: a[1],
        })),
        libc::SYS_fsync | libc::SYS_fdatasync => Some(EnteredCall::Other(Change::Sync { path: fd()? })),
        libc::SYS_fchmod | libc::SYS_fchown => attributes(fd()?),
        libc::SYS_fchmodat | libc::SYS_fchownat => attributes(path_at(below, pid, a[0], a[1])?),
        libc::SYS_mkdirat => make_dir(path_at(below, pid, a[0], a[1])?),
        libc::SYS_unlinkat => remove(path_at(below, pid, a[0], a[1])?),
        number if super::calls::RENAMES.contains(&number) => {
            rename(path_at(below, pid, a[0], a[1])?, path_at(below, pid, a[2], a[3])?)
        }
        libc::SYS_linkat => link(path_at(below, pid, a[0], a[1])?, path_at(below, pid, a[2], a[3])?),
        libc::SYS_symlinkat => Some(EnteredCall::Other(Change::Symlink {
            target: text_at(pid, a[0])?,
            path: path_at(below, pid, a[1], a[2])?,
        })),
        n if n == OLD[0] => make_dir(path_at(below, pid, here, a[0])?),
        n if n == OLD[1] || n == OLD[2] => remove(path_at(below, pid, here, a[0])?),
        n if n == OLD[3] => rename(path_at(below, pid, here, a[0])?, path_at(below, pid, here, a[1])?),
        n if n == OLD[4] => attributes(path_at(below, pid, here, a[0])?),
        n if n == OLD[5] => link(path_at(below, pid, here, a[0])?, path_at(below, pid, here, a[1])?),
        _ => None,
    }
}

/// The call has been done. Who made it is stopped still, so the disk shows what it did.
fn finish(entered: EnteredCall, result: u64) -> Vec<Change> {
    let attributes = |path: &Path| fs::symlink_metadata(path).ok().map(|meta| Attributes::of(&meta));
    match entered {
        EnteredCall::Open { path, was: None, .. } => {
            let attributes = attributes(&path);
            attributes
                .map(|attributes| Change::Make { path, attributes })
                .into_iter()
                .collect()
        }
        EnteredCall::Open {
            path,
            was: Some(1..),
            cuts: true,
        } => vec![Change::Cut { path, length: 0 }],
        EnteredCall::Open { .. } => Vec::new(),
        EnteredCall::Write { path, at } => {
            let mut bytes = vec![0; result as usize];
            let regular = fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_file());
            let read =
                regular && File::open(&path).is_ok_and(|file| file.read_exact_at(&mut bytes, at).is_ok());
            read.then_some(Change::Write { path, at, bytes })
                .into_iter()
                .collect()
        }
        EnteredCall::Attributes { path } => {
            let attributes = attributes(&path);
            attributes
                .map(|attributes| Change::Attributes { path, attributes })
                .into_iter()
                .collect()
        }
        EnteredCall::MakeDir { path } => {
            let attributes = attributes(&path);
            attributes
                .map(|attributes| Change::MakeDir { path, attributes })
                .into_iter()
                .collect()
        }
        EnteredCall::Other(change) => vec![change],
    }
}

impl Change {
    /// The new one, for a rename or a link.
    pub fn path(&self) -> &Path {
        match self {
            Change::Make { path, .. }
            | Change::MakeDir { path, .. }
            | Change::Symlink { path, .. }
            | Change::Remove { path }
            | Change::Rename { to: path, .. }
            | Change::Link { to: path, .. }
            | Change::Write { path, .. }
            | Change::Cut { path, .. }
            | Change::Attributes { path, .. }
            | Change::Sync { path } => path,
        }
    }

    fn is_below(&self, root: &Path) -> bool {
        self.path().starts_with(root)
    }
}
