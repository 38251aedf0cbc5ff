//! Directories of the host that no job and no deletion may change.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use testbed::harness::{create_shared_dir, place_in};

/// One directory that only root may write, and one that everybody may write with all that is in it: there, a deletion
/// that is led astray as the job's user does harm.
#[derive(Debug)]
pub struct Canaries {
    _place: Option<TempDir>,
    top: PathBuf,
    pub closed: PathBuf,
    pub open: PathBuf,
}

/// What `stat(2)` says of a file, but for the time of reading it, and its content.
pub type Seen = BTreeMap<PathBuf, ([u64; 6], [i64; 4], Vec<u8>)>;

impl Canaries {
    pub fn new() -> Canaries {
        Canaries::in_place(create_shared_dir())
    }

    /// In a new directory below another one of the host's.
    pub fn below(dir: &Path) -> Canaries {
        Canaries::in_place(place_in(dir))
    }

    fn in_place(place: TempDir) -> Canaries {
        let canaries = Canaries::at(place.path());
        Canaries {
            _place: Some(place),
            ..canaries
        }
    }

    /// In this directory, which another removes.
    pub fn at(top: &Path) -> Canaries {
        let make = |name: &str, of_directories, of_files| {
            let dir = top.join(name);
            fs::create_dir_all(dir.join("below")).expect("root can write there");
            let set = |path: &str, mode| {
                fs::set_permissions(dir.join(path), Permissions::from_mode(mode)).expect("it is root's");
            };
            // With the names of what is deleted beside them.
            for file in ["file", "below/file", "0", "inner"] {
                fs::write(dir.join(file), "of the host").expect("root can write there");
                set(file, of_files);
            }
            for path in ["below", ""] {
                set(path, of_directories);
            }
            dir
        };
        let (closed, open) = (make("closed", 0o755, 0o644), make("open", 0o777, 0o666));
        Canaries {
            _place: None,
            top: top.to_owned(),
            closed,
            open,
        }
    }

    /// Their paths.
    pub fn args(&self) -> [&str; 2] {
        [&self.closed, &self.open].map(|path| path.to_str().expect("the path is ASCII"))
    }

    /// All that there is in both.
    pub fn state(&self) -> Seen {
        let mut seen = Seen::new();
        collect(&self.top, &mut seen);
        seen
    }
}

/// A change of an attribute or an access control list changes the fourth time.
fn collect(path: &Path, seen: &mut Seen) {
    let meta = path.symlink_metadata().expect("it is there");
    let numbers = [
        meta.mode().into(),
        meta.uid().into(),
        meta.gid().into(),
        meta.nlink(),
        meta.ino(),
        meta.size(),
    ];
    let times = [meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec()];
    let content = if meta.is_file() {
        fs::read(path).expect("root can read it")
    } else {
        Vec::new()
    };
    seen.insert(path.to_owned(), (numbers, times, content));
    if meta.is_dir() {
        for entry in fs::read_dir(path).expect("root can read it") {
            collect(&entry.expect("root can read it").path(), seen);
        }
    }
}
