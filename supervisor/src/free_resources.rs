//! Is enough of the host free for another job? [`shortage`] decides; [`ResourceCheck`] reads what is free.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::statvfs::statvfs;
use protocol::config::{MinFree, STATE_DIR};
use tokio::time::Instant;

use crate::settings::size;

/// How long an answer is good for: that enough is free, and that it is not. The second is longer, so that what is free
/// now and then fills no log.
const ENOUGH: Duration = Duration::from_millis(500);
const SHORT: Duration = Duration::from_secs(5);

/// What is free. An error is why that cannot be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FreeResources {
    /// What is free on the file system of the jobs' directories.
    pub disk: Result<FreeDisk, String>,
    /// Free memory, in bytes.
    pub memory: Result<u64, String>,
}

/// What is free on one file system (`statvfs(3)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreeDisk {
    /// For users without privileges.
    pub bytes: u64,
    /// None where the file system has no fixed number of them (Btrfs).
    pub inodes: Option<u64>,
}

/// Why no job may be taken: all that is free less than it must be, in one sentence. None where enough is. `place` is where
/// the jobs' directories are.
pub fn shortage(min: &MinFree, free: &FreeResources, place: &Path) -> Option<String> {
    let place = place.display();
    let mut short = Vec::new();
    let mut unknown = Vec::new();
    if min.disk.is_some() || min.inodes.is_some() {
        match &free.disk {
            Ok(disk) => {
                if let Some(min) = min.disk.filter(|min| disk.bytes < *min) {
                    short.push(format!(
                        "{} on the file system of {place} (factory.min_free.disk is {})",
                        rounded(disk.bytes),
                        size(min)
                    ));
                }
                if let Some((min, inodes)) = min.inodes.zip(disk.inodes).filter(|(min, has)| has < min) {
                    short.push(format!(
                        "{inodes} inodes on the file system of {place} (factory.min_free.inodes is {min})"
                    ));
                }
            }
            Err(why) => unknown.push(format!("what is free on the file system of {place}: {why}")),
        }
    }
    if let Some(min) = min.memory {
        match &free.memory {
            Ok(free) if *free < min => short.push(format!(
                "{} of memory (factory.min_free.memory is {})",
                rounded(*free),
                size(min)
            )),
            Ok(_) => {}
            Err(why) => unknown.push(format!("how much memory is free: {why}")),
        }
    }
    let short = (!short.is_empty()).then(|| format!("too little is free: {}", short.join(", ")));
    let unknown = (!unknown.is_empty()).then(|| format!("it cannot be told {}", unknown.join(", nor ")));
    let all: Vec<String> = short.into_iter().chain(unknown).collect();
    (!all.is_empty()).then(|| all.join("; "))
}

/// A number of bytes, rounded down to whole MiB, or to KiB where there is less than one.
fn rounded(bytes: u64) -> String {
    match bytes >> 20 {
        0 => format!("{}K", bytes >> 10),
        mib => format!("{mib}M"),
    }
}

/// What is free on this host, read no more often than is of use.
#[derive(Debug)]
pub struct ResourceCheck {
    state: PathBuf,
    /// When what was asked for, and the answer.
    last: Option<(Instant, MinFree, Option<String>)>,
}

impl ResourceCheck {
    /// The factory's files are below `root`.
    pub fn new(root: &Path) -> ResourceCheck {
        ResourceCheck {
            state: root.join(STATE_DIR),
            last: None,
        }
    }

    /// Why no job may be taken, as of a moment ago.
    pub fn shortage(&mut self, min: &MinFree) -> Option<String> {
        if *min == MinFree::default() {
            self.last = None;
            return None;
        }
        if let Some((at, of, answer)) = &self.last {
            let good_for = if answer.is_some() { SHORT } else { ENOUGH };
            if of == min && at.elapsed() < good_for {
                return answer.clone();
            }
        }
        let place = self.state.join("workers");
        let free = FreeResources {
            disk: free_disk(&place, &self.state),
            memory: available_memory(),
        };
        let answer = shortage(min, &free, &place);
        self.last = Some((Instant::now(), *min, answer.clone()));
        answer
    }
}

/// What is free in `place`, or in `above` while the helper has not made it. It takes no right but to search the directory
/// above.
fn free_disk(place: &Path, above: &Path) -> Result<FreeDisk, String> {
    let found = match statvfs(place) {
        Err(Errno::ENOENT) => statvfs(above),
        found => found,
    };
    let found = found.map_err(|error| error.to_string())?;
    Ok(FreeDisk {
        bytes: (found.blocks_available() as u64).saturating_mul(found.fragment_size() as u64),
        inodes: (found.files() != 0).then(|| found.files_available() as u64),
    })
}

fn available_memory() -> Result<u64, String> {
    let read = fs::read_to_string("/proc/meminfo");
    let parsed = read
        .and_then(|text| mem_available(&text).ok_or_else(|| io::Error::other("it has no line MemAvailable")));
    parsed.map_err(|error| {
        format!("/proc/meminfo: {error}: the supervisor's unit must not have ProcSubset=pid")
    })
}

/// Bytes, of the text of `/proc/meminfo`.
fn mem_available(meminfo: &str) -> Option<u64> {
    let mut lines = meminfo.lines();
    let rest = lines.find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = rest.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn min(disk: Option<u64>, inodes: Option<u64>, memory: Option<u64>) -> MinFree {
        MinFree { disk, inodes, memory }
    }

    fn free(bytes: u64, inodes: Option<u64>, memory: u64) -> FreeResources {
        FreeResources {
            disk: Ok(FreeDisk { bytes, inodes }),
            memory: Ok(memory),
        }
    }

    #[test]
    fn a_job_is_taken_only_while_as_much_is_free_as_is_asked_for() {
        let all = min(Some(10 * GIB), Some(1000), Some(GIB));
        let place = Path::new("/s/workers");
        for (min, free, parts) in [
            (MinFree::default(), free(0, Some(0), 0), &[][..]),
            (all, free(10 * GIB, Some(1000), GIB), &[]),
            (all, free(10 * GIB, None, GIB), &[]),
            (
                all,
                free(10 * GIB - 1, Some(1000), GIB),
                &["10239M on the file system of /s/workers (factory.min_free.disk is 10G)"],
            ),
            (
                all,
                free(10 * GIB, Some(999), GIB),
                &["999 inodes on the file system of /s/workers (factory.min_free.inodes is 1000)"],
            ),
            (
                all,
                free(10 * GIB, Some(1000), 5000),
                &["4K of memory (factory.min_free.memory is 1G)"],
            ),
            (
                all,
                free(0, Some(0), 0),
                &["too little is free: 0K on", ", 0 inodes on", ", 0K of memory"],
            ),
            (min(None, None, Some(GIB)), free(0, Some(0), GIB), &[]),
        ] {
            let found = shortage(&min, &free, place);
            assert_eq!(found.is_none(), parts.is_empty(), "{min:?} {free:?}: {found:?}");
            let found = found.unwrap_or_default();
            assert!(
                parts.iter().all(|part| found.contains(part)),
                "{parts:?}: {found}"
            );
        }
    }

    #[test]
    fn what_cannot_be_told_is_not_enough_where_it_is_asked_for() {
        let free = FreeResources {
            disk: Err("no disk".into()),
            memory: Err("no memory".into()),
        };
        let found = |min| shortage(&min, &free, Path::new("/s")).unwrap_or_default();
        assert_eq!(found(MinFree::default()), "");
        assert_eq!(
            found(min(Some(1), Some(1), Some(1))),
            "it cannot be told what is free on the file system of /s: no disk, nor how much memory is free: no memory"
        );
        assert!(!found(min(None, None, Some(1))).contains("disk"));
    }

    #[test]
    fn available_memory_is_the_kernels_line() {
        let text = "MemTotal:       16330332 kB\nMemFree:          100 kB\nMemAvailable:    8000000 kB\n";
        assert_eq!(mem_available(text), Some(8_000_000 * 1024));
        assert_eq!(mem_available("MemTotal: 1 kB\n"), None);
        assert_eq!(mem_available("MemAvailable: 1\n"), None);
        assert!(available_memory().unwrap() > 0);
    }

    #[test]
    fn a_directory_that_is_not_there_yet_has_what_is_free_above_it() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("workers");
        let found = free_disk(&missing, dir.path()).unwrap();
        assert!(found.bytes > 0);
        free_disk(&missing, &missing).unwrap_err();
    }
}
