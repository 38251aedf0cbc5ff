//! Is anything left on this host of a uid that the factory gives to workers, and that no worker has? Read as root, from
//! what the kernel and the host's services keep; nothing is changed.
//!
//! A named Unix socket is found as a file. One with an abstract name has no owner that the kernel tells, but a process
//! that holds it, and that is found.

pub mod files;
pub mod kernel;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use protocol::config::{CGROUP_FILE, STATE_DIR};
use protocol::{UserName, WorkerId};
use serde::Serialize;

use files::{Pace, Progress, SearchResult};

/// The uids (and gids) that are looked for.
#[derive(Clone, Debug)]
pub struct Uids {
    /// `factory.uid_range`.
    pub range: RangeInclusive<u32>,
    /// Those of existing workers.
    pub except: BTreeSet<u32>,
}

impl Uids {
    /// Is this id looked for?
    pub fn contains(&self, id: u32) -> bool {
        self.range.contains(&id) && !self.except.contains(&id)
    }

    /// Is this text one of them, in decimal?
    pub fn contains_text(&self, text: &str) -> bool {
        text.parse().is_ok_and(|id| self.contains(id))
    }
}

impl From<RangeInclusive<u32>> for Uids {
    /// All of the range.
    fn from(range: RangeInclusive<u32>) -> Uids {
        Uids {
            range,
            except: BTreeSet::new(),
        }
    }
}

/// What kind of thing is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ResidueKind {
    /// One of which any uid, gid or supplementary group is of the range.
    Process,
    /// Anything with a name in a file system whose owner or group is of the range: directories and devices, too.
    File,
    /// System V shared memory, semaphores and message queues (`sysvipc(7)`).
    Ipc,
    /// Keys and keyrings (`keyrings(7)`).
    Key,
    /// Named after the worker, below the helper's own.
    Cgroup,
    /// In the mount namespace of the program that looks, with a worker's name in its place or its source.
    Mount,
    /// The record or the account by which the host knows the user.
    User,
    /// What a service was told to do for the user: a crontab, a unit, mail.
    ServiceRequest,
    /// An Internet or packet socket.
    Socket,
    /// A limit or usage in a file system's user quota (`quotactl(2)`).
    Quota,
    /// A worker's directory without a user: its uid is not known.
    Worker,
}

impl ResidueKind {
    /// As the table has it; in JSON the words are joined by `_`.
    pub fn name(self) -> &'static str {
        match self {
            ResidueKind::Process => "process",
            ResidueKind::File => "file",
            ResidueKind::Ipc => "ipc",
            ResidueKind::Key => "key",
            ResidueKind::Cgroup => "cgroup",
            ResidueKind::Mount => "mount",
            ResidueKind::User => "user",
            ResidueKind::ServiceRequest => "service request",
            ResidueKind::Socket => "socket",
            ResidueKind::Quota => "quota",
            ResidueKind::Worker => "worker",
        }
    }
}

/// One thing that is left.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Residue {
    /// Residues are in the order of kinds.
    pub kind: ResidueKind,
    /// What names it: a path, a pid with its command, an id.
    pub what: String,
}

/// What was looked at, and what was found.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The first and the last uid of the range.
    pub uid_range: (u32, u32),
    /// Workers that exist, with the uid of each: what is theirs is not residue.
    pub workers: BTreeMap<String, Option<u32>>,
    /// All that is left.
    pub found: BTreeSet<Residue>,
    /// Files and directories that were looked at.
    pub files_seen: u64,
    /// Mounts and directories that were left out, and why.
    pub not_searched: BTreeMap<String, String>,
}

impl Report {
    /// Was nothing found? What was not searched does not count.
    pub fn is_clean(&self) -> bool {
        self.found.is_empty()
    }
}

/// The workers that exist, by their directories, each with the uid that its user record says.
///
/// # Errors
/// The state directory cannot be read.
pub fn existing_workers(root: &Path) -> io::Result<BTreeMap<WorkerId, Option<u32>>> {
    let entries = match fs::read_dir(root.join(STATE_DIR).join("workers")) {
        // The helper makes it at its first start.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        entries => entries?,
    };
    let mut found = BTreeMap::new();
    for entry in entries {
        let Some(id) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let record = root
            .join("run/userdb")
            .join(format!("{}.user", UserName::from(id)));
        let record: Option<serde_json::Value> = fs::read(record)
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok());
        let uid = record.and_then(|record| record["uid"].as_u64()?.try_into().ok());
        found.insert(id, uid);
    }
    Ok(found)
}

/// Everything that is left, for the factory below `root`. `files` says how fast to go through the file systems; without
/// it they are not searched.
///
/// # Errors
/// What the kernel or the factory keeps cannot be read.
pub fn find(
    root: &Path,
    range: RangeInclusive<u32>,
    files: Option<Pace>,
    mut progress: impl FnMut(Progress<'_>),
) -> io::Result<Report> {
    let uids_but = |workers: &BTreeMap<WorkerId, Option<u32>>| Uids {
        except: workers.values().flatten().copied().collect(),
        range: range.clone(),
    };
    let searched = match files {
        Some(pace) => files::search(&uids_but(&existing_workers(root)?), pace, &mut progress)?,
        None => SearchResult::default(),
    };
    let mut reads = 0;
    // Workers come and go between two reads: what one read alone has found was on its way.
    let (workers, mut found) = loop {
        let workers = existing_workers(root)?;
        let found = in_tables(root, &uids_but(&workers), &workers)?;
        reads += 1;
        if found.is_empty() || reads == MAX_READS {
            break (workers, found);
        }
        std::thread::sleep(BETWEEN_READS);
    };
    let uids = uids_but(&workers);
    let files = searched
        .found
        .into_iter()
        .filter(|path| files::is_owned(path, &uids));
    found.extend(files.map(|path| Residue {
        kind: ResidueKind::File,
        what: path.display().to_string(),
    }));
    Ok(Report {
        uid_range: (*range.start(), *range.end()),
        workers: workers
            .into_iter()
            .map(|(id, uid)| (id.to_string(), uid))
            .collect(),
        found,
        files_seen: searched.seen,
        // Text, for JSON has no other names.
        not_searched: searched
            .not_searched
            .into_iter()
            .map(|(place, why)| (place.display().to_string(), why))
            .collect(),
    })
}

const MAX_READS: u32 = 3;
const BETWEEN_READS: Duration = Duration::from_millis(300);

/// What is left beside files.
fn in_tables(
    root: &Path,
    uids: &Uids,
    workers: &BTreeMap<WorkerId, Option<u32>>,
) -> io::Result<BTreeSet<Residue>> {
    let mut found = BTreeSet::new();
    let mut note = |kind, all: BTreeSet<String>| {
        found.extend(all.into_iter().map(|what| Residue { kind, what }));
    };
    let is_left = |text: &str| is_of_no_worker(text, workers);
    note(ResidueKind::Process, kernel::processes(uids));
    note(ResidueKind::Ipc, kernel::ipc(uids));
    note(ResidueKind::Key, kernel::keys(uids));
    note(ResidueKind::Socket, kernel::sockets(uids));
    note(ResidueKind::Quota, kernel::quotas(uids));
    note(ResidueKind::User, kernel::accounts(&root.join("etc"), uids));
    note(ResidueKind::User, names_in(&root.join("run/userdb"), is_left)?);
    note(
        ResidueKind::ServiceRequest,
        kernel::service_requests(uids, is_left),
    );
    note(ResidueKind::Mount, kernel::mounts(is_left));
    if let Ok(cgroups) = fs::read_to_string(root.join(CGROUP_FILE)) {
        let is_left = |name: &str| {
            let id = name.get(..26).and_then(|id| id.parse::<WorkerId>().ok());
            id.is_some_and(|id| !workers.contains_key(&id))
        };
        note(ResidueKind::Cgroup, names_in(cgroups.as_ref(), is_left)?);
    }
    let without_user = workers.iter().filter(|(_, uid)| uid.is_none());
    let directories =
        without_user.map(|(id, _)| format!("{id}: its directory is there, its user record is not"));
    note(ResidueKind::Worker, directories.collect());
    Ok(found)
}

/// Does this text have the user name of a worker, and of none that exists?
fn is_of_no_worker(text: &str, existing_workers: &BTreeMap<WorkerId, Option<u32>>) -> bool {
    let names = text
        .match_indices("bmat-")
        .map(|(at, _)| &text[at + "bmat-".len()..]);
    names
        .filter_map(|rest| rest.get(..26)?.to_ascii_uppercase().parse::<WorkerId>().ok())
        .any(|id| !existing_workers.contains_key(&id))
}

/// The paths of a directory's entries of which this is true. A directory that is not there has none.
fn names_in(directory: &Path, is_left: impl Fn(&str) -> bool) -> io::Result<BTreeSet<String>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        entries => entries?,
    };
    let mut found = BTreeSet::new();
    for entry in entries {
        let entry = entry?;
        if is_left(&entry.file_name().to_string_lossy()) {
            found.insert(entry.path().display().to_string());
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_of_a_worker_that_exists_is_not_left_and_another_is() {
        let id: WorkerId = "01HZX3N8Q4J5K6M7P8R9S0T1V2".parse().unwrap();
        let existing_workers = BTreeMap::from([(id, Some(7))]);
        for (text, is_left) in [
            ("/home/bmat-01hzx3n8q4j5k6m7p8r9s0t1v2", false),
            ("/home/bmat-01hzx3n8q4j5k6m7p8r9s0t1v3/work", true),
            (
                "bmat-01hzx3n8q4j5k6m7p8r9s0t1v2 bmat-01hzx3n8q4j5k6m7p8r9s0t1v3.user",
                true,
            ),
            ("bmat-", false),
            ("bmat-ü1hzx3n8q4j5k6m7p8r9s0t1v3", false),
            ("bmat-operators-own-name-of-something", false),
        ] {
            assert_eq!(is_of_no_worker(text, &existing_workers), is_left, "{text}");
        }
    }

    #[test]
    fn uids_are_those_of_the_range_that_no_worker_has() {
        let uids = Uids {
            range: 10..=20,
            except: BTreeSet::from([12]),
        };
        let found: Vec<u32> = (8..23).filter(|id| uids.contains(*id)).collect();
        assert_eq!(found, [10, 11, 13, 14, 15, 16, 17, 18, 19, 20]);
        assert!(uids.contains_text("13") && !uids.contains_text("12") && !uids.contains_text("x"));
    }
}
