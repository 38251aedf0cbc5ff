//! Files of users on all local file systems: a walk over the whole host, at a bounded speed.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::Uids;

/// How many directory entries are looked at in a second, at most.
#[derive(Clone, Copy, Debug)]
pub struct Pace(pub u32);

/// How far the walk has come.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// Entries that were looked at.
    pub seen: u64,
    /// The directory that is next.
    pub place: &'a Path,
}

/// What a walk has found.
#[derive(Debug, Default)]
pub struct SearchResult {
    /// Files and directories whose owner or group is looked for.
    pub found: BTreeSet<PathBuf>,
    /// Entries that were looked at.
    pub seen: u64,
    /// Mounts of file systems that are not local, files and directories that cannot be read, and why.
    pub not_searched: BTreeMap<PathBuf, String>,
}

/// One line of `/proc/self/mountinfo` (`proc_pid_mountinfo(5)`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// `major:minor`.
    pub device: String,
    /// The directory of the file system that is mounted.
    pub root: PathBuf,
    /// Where it is mounted.
    pub place: PathBuf,
    /// The file system's type: `ext4`.
    pub kind: String,
    /// The device, or what the file system says instead.
    pub source: PathBuf,
}

/// The kernel's own tables: nobody leaves a file there, and they change while they are read.
const TABLES: [&str; 15] = [
    "autofs",
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "efivarfs",
    "nsfs",
    "proc",
    "pstore",
    "securityfs",
    "sysfs",
    "tracefs",
];

/// File systems of other hosts, by name; those of FUSE (but for block devices) may be.
const REMOTE: [&str; 10] = [
    "9p",
    "afs",
    "ceph",
    "cifs",
    "glusterfs",
    "lustre",
    "nfs",
    "nfs4",
    "smb3",
    "smbfs",
];

impl Mount {
    fn is_table(&self) -> bool {
        TABLES.contains(&&*self.kind)
    }

    fn is_remote(&self) -> bool {
        REMOTE.contains(&&*self.kind) || self.kind == "fuse" || self.kind.starts_with("fuse.")
    }
}

/// The mounts of this namespace.
///
/// # Errors
/// `/proc` cannot be read.
pub fn mount_table() -> io::Result<Vec<Mount>> {
    Ok(parse_mounts(&fs::read("/proc/self/mountinfo")?))
}

fn parse_mounts(table: &[u8]) -> Vec<Mount> {
    let mount = |line: &[u8]| {
        let words: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
        let dash = words.iter().position(|word| *word == b"-")?;
        let text = |word: &[u8]| String::from_utf8_lossy(word).into_owned();
        Some(Mount {
            device: text(words.get(2)?),
            root: unescape(words.get(3)?),
            place: unescape(words.get(4)?),
            kind: text(words.get(dash + 1)?),
            source: unescape(words.get(dash + 2)?),
        })
    };
    table.split(|byte| *byte == b'\n').filter_map(mount).collect()
}

/// A space, a tab, a newline and a backslash are written as three octal digits behind a backslash.
fn unescape(word: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(word.len());
    let mut rest = word;
    while let [first, after @ ..] = rest {
        let octal = after
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(octal.unwrap_or(*first));
        rest = if octal.is_some() { &after[3..] } else { after };
    }
    OsString::from_vec(bytes).into()
}

/// Which mounts are walked over: of several of one file system those that show different parts of it.
fn chosen(mounts: &[Mount]) -> Vec<&Mount> {
    let mut local: Vec<&Mount> = mounts
        .iter()
        .filter(|mount| !mount.is_table() && !mount.is_remote())
        .collect();
    local.sort_by_key(|mount| mount.root.components().count());
    let mut chosen: Vec<&Mount> = Vec::new();
    for mount in local {
        let shows = |other: &&Mount| other.device == mount.device && mount.root.starts_with(&other.root);
        if !chosen.iter().any(shows) {
            chosen.push(mount);
        }
    }
    chosen
}

/// Files of which the owner or the group is one of these, on every local file system that is mounted.
///
/// # Errors
/// The mounts cannot be read.
pub fn search(uids: &Uids, pace: Pace, progress: &mut impl FnMut(Progress<'_>)) -> io::Result<SearchResult> {
    let mounts = mount_table()?;
    let places: BTreeSet<&Path> = mounts.iter().map(|mount| &*mount.place).collect();
    let mut walk = Walk::new(pace);
    let mut searched = SearchResult::default();
    for mount in chosen(&mounts) {
        // What is mounted below has its own turn: a subvolume of btrfs has another device, and is no mount.
        let is_mount = |path: &Path| places.contains(path);
        searched
            .found
            .extend(walk.below(&mount.place, uids, is_mount, progress));
    }
    searched.seen = walk.seen;
    searched.not_searched = walk.unread;
    let remote = mounts.into_iter().filter(Mount::is_remote);
    searched
        .not_searched
        .extend(remote.map(|mount| (mount.place, format!("{} is not local", mount.kind))));
    Ok(searched)
}

/// Files below this directory of which the owner or the group is one of these. `is_skipped` says which directories are
/// not entered.
pub fn below(directory: &Path, uids: &Uids, is_skipped: impl Fn(&Path) -> bool) -> BTreeSet<PathBuf> {
    Walk::new(Pace(u32::MAX)).below(directory, uids, is_skipped, &mut |_| ())
}

/// Is the file still there, and of one of these?
pub fn is_owned(path: &Path, uids: &Uids) -> bool {
    path.symlink_metadata()
        .is_ok_and(|meta| uids.contains(meta.uid()) || uids.contains(meta.gid()))
}

struct Walk {
    pace: Pace,
    started_at: Instant,
    last_printed: Instant,
    seen: u64,
    /// What could not be read, and why.
    unread: BTreeMap<PathBuf, String>,
}

impl Walk {
    fn new(pace: Pace) -> Walk {
        let started_at = Instant::now();
        Walk {
            pace,
            started_at,
            last_printed: started_at,
            seen: 0,
            unread: BTreeMap::new(),
        }
    }

    /// What others make and remove meanwhile does not disturb it.
    fn below(
        &mut self,
        top: &Path,
        uids: &Uids,
        is_skipped: impl Fn(&Path) -> bool,
        progress: &mut impl FnMut(Progress<'_>),
    ) -> BTreeSet<PathBuf> {
        let mut found = BTreeSet::new();
        let mut directories = vec![top.to_owned()];
        while let Some(directory) = directories.pop() {
            if self.last_printed.elapsed() >= Duration::from_secs(1) {
                self.last_printed = Instant::now();
                progress(Progress {
                    seen: self.seen,
                    place: &directory,
                });
            }
            let entries = match fs::read_dir(&directory) {
                Ok(entries) => entries,
                Err(error) => {
                    self.not_read(directory, &error);
                    continue;
                }
            };
            for entry in entries {
                let entry = match entry {
                    Ok(entry) => entry,
                    // The standard library's iterator ends after it.
                    Err(error) => {
                        self.not_read(directory.clone(), &error);
                        continue;
                    }
                };
                let path = entry.path();
                // Of the entry itself, not of what a link leads to.
                let meta = match entry.metadata() {
                    Ok(meta) => meta,
                    Err(error) => {
                        self.not_read(path, &error);
                        continue;
                    }
                };
                self.step();
                let is_entered = meta.is_dir() && !is_skipped(&path);
                if uids.contains(meta.uid()) || uids.contains(meta.gid()) {
                    found.insert(path.clone());
                }
                if is_entered {
                    directories.push(path);
                }
            }
        }
        found
    }

    /// One that has gone has nothing left, and is not reported.
    fn not_read(&mut self, path: PathBuf, error: &io::Error) {
        if error.kind() != io::ErrorKind::NotFound {
            self.unread.insert(path, error.to_string());
        }
    }

    /// One more; wait where they come faster than they may.
    fn step(&mut self) {
        self.seen += 1;
        if self.seen.is_multiple_of(256) {
            let due = Duration::from_secs_f64(self.seen as f64 / f64::from(self.pace.0));
            std::thread::sleep(due.saturating_sub(self.started_at.elapsed()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw
23 22 0:21 / /proc rw - proc proc rw
24 22 0:40 /@home /home rw shared:2 - btrfs /dev/sdb rw
25 22 0:40 /@srv /srv rw shared:3 - btrfs /dev/sdb rw
26 25 0:40 /@srv/a\\040b /mnt/a\\134b rw - btrfs /dev/sdb rw
27 22 8:1 /var/lib /mnt/lib rw - ext4 /dev/sda1 rw
28 22 0:50 / /mnt/far rw - nfs4 server:/export rw
29 22 0:51 / /mnt/ssh rw - fuse.sshfs host: rw
30 22 8:17 / /mnt/stick rw - fuseblk /dev/sdb1 rw
";

    #[test]
    fn each_part_of_a_local_file_system_is_walked_over_once() {
        let mounts = parse_mounts(MOUNTS.as_bytes());
        let places: BTreeSet<&Path> = chosen(&mounts).iter().map(|mount| &*mount.place).collect();
        let expected = ["/", "/home", "/srv", "/mnt/stick"].map(Path::new);
        assert_eq!(places, BTreeSet::from(expected));
        let remote: Vec<_> = mounts.iter().filter(|mount| mount.is_remote()).collect();
        assert_eq!(remote.len(), 2);
    }

    #[test]
    fn a_directory_that_cannot_be_read_is_told_and_one_that_has_gone_is_not() {
        let place = tempfile::tempdir().unwrap();
        let (gone, file) = (place.path().join("gone"), place.path().join("file"));
        fs::write(&file, "").unwrap();
        let uids = Uids::from(0..=u32::MAX);
        let mut walk = Walk::new(Pace(u32::MAX));
        for top in [&gone, &file] {
            walk.below(top, &uids, |_| false, &mut |_| ());
        }
        let unread: Vec<&PathBuf> = walk.unread.keys().collect();
        assert_eq!(unread, [&file]);
    }

    #[test]
    fn what_the_kernel_escapes_in_a_path_is_read() {
        let mounts = parse_mounts(MOUNTS.as_bytes());
        assert_eq!(mounts[4].root, Path::new("/@srv/a b"));
        assert_eq!(mounts[4].place, Path::new("/mnt/a\\b"));
        assert_eq!(unescape(b"/a\\04"), Path::new("/a\\04"));
    }
}
