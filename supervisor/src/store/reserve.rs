//! Room on the disk that is kept for the database: a file of a few MiB, which is given up when a change cannot be
//! written for lack of room. It is made again when there is room for two.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::posix_fallocate;
use nix::libc::off_t;
use nix::sys::statvfs::statvfs;

/// More than the database's log of changes ever has (1,000 pages of 4 KiB, `wal_autocheckpoint`), and the database
/// itself, whose history is bounded.
pub const RESERVE_BYTES: u64 = 8 << 20;

/// The file `reserve` in the state directory.
#[derive(Debug)]
pub struct Reserve {
    path: PathBuf,
}

impl Reserve {
    /// In this state directory. Nothing is made yet.
    pub fn new(dir: &Path) -> Self {
        Self {
            path: dir.join("reserve"),
        }
    }

    /// Make the file, unless it is there, and see that there is room besides.
    ///
    /// # Errors
    /// One sentence: there is no room, or the file system cannot be written.
    pub fn keep(&self) -> Result<(), String> {
        let describe = |error: &dyn std::fmt::Display| {
            format!("the reserve {} cannot be made: {error}", self.path.display())
        };
        let free = self.free().map_err(|error| describe(&error))?;
        let is_there = self.path.exists();
        let needed = if is_there {
            RESERVE_BYTES
        } else {
            2 * RESERVE_BYTES
        };
        if free < needed {
            let kept = if is_there { "is left" } else { "is used up" };
            return Err(format!(
                "the file system of {} has {} MiB left, and the reserve of {} MiB for the database {kept}: make room on \
                 the disk, at least {} MiB",
                self.dir().display(),
                free >> 20,
                RESERVE_BYTES >> 20,
                needed >> 20
            ));
        }
        if is_there {
            return Ok(());
        }
        self.make().map_err(|error| describe(&error))
    }

    fn inode(&self) -> PathBuf {
        self.path.with_extension("inode")
    }

    fn dir(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }

    /// Bytes that others than root may still write.
    fn free(&self) -> nix::Result<u64> {
        let disk = statvfs(self.dir())?;
        Ok(disk.blocks_available() as u64 * disk.fragment_size() as u64)
    }

    /// Whole, or not at all.
    fn make(&self) -> io::Result<()> {
        let part = self.path.with_extension("part");
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let made = options.open(&part).and_then(|file: File| {
            posix_fallocate(&file, 0, RESERVE_BYTES as off_t)?;
            file.sync_all()?;
            // A file of its own for the log of changes and for its index: an inode for each.
            File::create(self.inode())?;
            fs::rename(&part, &self.path)
        });
        if made.is_err() {
            let _ = fs::remove_file(&part);
        }
        made
    }

    /// Give the room up where there is none besides. False where that would not help.
    pub fn release_if_needed(&self) -> bool {
        self.free().is_ok_and(|free| free < RESERVE_BYTES) && self.release()
    }

    /// Give the room up. False where there was none.
    pub fn release(&self) -> bool {
        let _ = fs::remove_file(self.inode());
        fs::remove_file(&self.path).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn it_takes_real_room_and_gives_it_up_once() {
        let dir = tempfile::tempdir().unwrap();
        let reserve = Reserve::new(dir.path());
        assert!(!reserve.release());
        for _ in 0..2 {
            reserve.keep().unwrap();
            let file = fs::metadata(dir.path().join("reserve")).unwrap();
            assert!(file.blocks() * 512 >= RESERVE_BYTES, "{file:?}");
            assert_eq!(file.mode() & 0o777, 0o600);
        }
        assert!(reserve.release() && !reserve.release());
        let gone = Reserve::new(&dir.path().join("gone"));
        assert!(gone.keep().unwrap_err().contains("cannot be made"));
    }
}
