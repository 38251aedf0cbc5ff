//! A worker's directory: `record`, `started`, `exit`, `console.log`, and `fs/`, which has its writable directories. The
//! directory and the record are the only memory that the helper has of a worker.
//!
//! What a crash leaves: a directory without a record is a worker that was never made, or is all but
//! deleted; nothing else of it exists, because the record is the first thing written and the last removed.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, readlinkat};
use nix::unistd::{fsync, symlinkat};
use protocol::{Error, ErrorKind, Exit, SlotName, State, Uid, UserName, WorkerId, WorkerInfo};

use crate::host::directory::{
    make_dir, names, open_dir, open_file, read_small, remove_dir, remove_file, stat,
};
use crate::host::{Host, cgroup, quota};
use crate::monitor_ipc::{Failure, from};

/// What the record says. It is kept as what a symbolic link leads to: a link is there or not, never half of it, one sync
/// of its directory keeps it, and one call reads it. Shorter than 60 bytes, as this is, ext4 keeps it in the inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The slot that it was made for, also when the configuration has lost it.
    pub slot: SlotName,
    /// Its uid and gid.
    pub uid: Uid,
    /// Seconds since 1970.
    pub created: u64,
}

impl Record {
    /// Made now, by the host's clock; 1970 where that is before it.
    pub fn new(slot: SlotName, uid: Uid) -> Self {
        let created = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |age| age.as_secs());
        Self { slot, uid, created }
    }

    /// The text of the link: at most 59 bytes.
    pub fn print(&self) -> String {
        format!("{} {} {}.", self.slot, self.uid, self.created)
    }

    /// Only what `print` writes: a number that was cut off is another number.
    pub fn parse(text: &str) -> Option<Record> {
        let mut words = text.strip_suffix('.')?.split(' ');
        let slot = words.next()?.parse().ok()?;
        let uid = Uid::try_from(words.next()?.parse::<u32>().ok()?).ok()?;
        let created = words.next()?.parse().ok()?;
        let record = Record { slot, uid, created };
        (record.print() == text).then_some(record)
    }
}

pub const CONSOLE: &str = "console.log";
/// The file in which the end of the agent is written down: by pid 1, or by the worker's `timer`.
pub const EXIT: &str = "exit";
/// The console's last line where that is the end of the run time.
pub const TIMED_OUT: &str = "\n[the agent has run as long as the slot lets it]\n";

/// What a worker's directory says of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordState {
    /// It was never made, or is all but deleted.
    Nothing,
    Record(Record),
    /// The disk, or somebody, has spoiled the record. The worker is lost: its slot is not known, and its uid only
    /// by what it owns.
    Damaged,
}

/// A worker's directory, locked: nobody else touches the worker while this is alive.
#[derive(Debug)]
pub struct Worker {
    pub id: WorkerId,
    lock: Flock<File>,
    pub record_state: RecordState,
}

impl Worker {
    /// Lock the worker's directory, after whoever has it. None if there is none.
    pub fn find(host: &Host, id: WorkerId) -> Result<Option<Worker>> {
        loop {
            let dir = match open_dir(&host.workers, id.to_string()) {
                Err(Errno::ENOENT) => return Ok(None),
                dir => dir.with_context(|| format!("cannot open the directory of worker {id}"))?,
            };
            let lock = Flock::lock(File::from(dir), FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
            // Deleted, perhaps made anew, while we waited? Then this is not the directory any more.
            let locked = nix::sys::stat::fstat(&*lock)?;
            let now = stat(&host.workers, id.to_string()).map(|now| (now.st_dev, now.st_ino));
            if now == Ok((locked.st_dev, locked.st_ino)) {
                return Ok(Some(Worker {
                    id,
                    record_state: read_record(&*lock, id)?,
                    lock,
                }));
            }
        }
    }

    /// [`Worker::find`], making the directory if there is none.
    pub fn find_or_make(host: &Host, id: WorkerId) -> Result<Worker> {
        loop {
            make_dir(&host.workers, id.to_string(), 0o700)
                .with_context(|| format!("cannot make the directory of worker {id}"))?;
            if let Some(worker) = Worker::find(host, id)? {
                return Ok(worker);
            }
        }
    }

    /// The worker, if it was made: with a record.
    pub fn existing(host: &Host, id: WorkerId) -> Result<(Worker, Record), WorkerError> {
        let worker = Worker::find(host, id)?.ok_or(WorkerError::NoSuchWorker(id))?;
        match worker.record_state.clone() {
            RecordState::Record(record) => Ok((worker, record)),
            RecordState::Nothing => Err(WorkerError::NoSuchWorker(id)),
            RecordState::Damaged => Err(damaged_record_error(id).into()),
        }
    }

    pub fn dir(&self) -> std::os::fd::BorrowedFd<'_> {
        self.lock.as_fd()
    }

    pub fn user(&self) -> UserName {
        self.id.into()
    }

    pub fn write_record(&mut self, record: Record) -> Result<()> {
        // Of an earlier worker that was all but deleted.
        remove_file(self.dir(), "started")?;
        symlinkat(record.print().as_str(), self.dir(), "record")
            .with_context(|| format!("cannot write the record of worker {}", self.id))?;
        self.record_state = RecordState::Record(record);
        Ok(())
    }

    /// Let the record outlive a power loss, and the mark of the start with it. Until something of a job's can be there it
    /// need not: a worker that is lost with it is made again.
    pub fn keep(&self) -> Result<()> {
        fsync(self.dir()).with_context(|| format!("cannot keep the record of worker {}", self.id))
    }

    /// Has its agent been started, or nearly so? From here on it is not started again.
    pub fn is_started(&self) -> Result<bool> {
        is_started(self.dir())
    }

    pub fn mark_started(&self) -> Result<()> {
        // A link is whole at once, and there is nothing in it to be written before.
        match symlinkat("record", self.dir(), "started") {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno).context("cannot mark the worker as started"),
        }
        self.keep()
    }

    pub fn state(&self, host: &Host) -> Result<State> {
        state(host, self.dir(), self.id)
    }

    /// The console for the supervisor: open for reading alone, and there from the start.
    pub fn console(&self) -> Result<File> {
        match open_file(self.dir(), CONSOLE, OFlag::O_RDONLY) {
            Err(Errno::ENOENT) => {
                open_file(self.dir(), CONSOLE, OFlag::O_WRONLY | OFlag::O_CREAT)?;
                Ok(open_file(self.dir(), CONSOLE, OFlag::O_RDONLY)?)
            }
            file => file.with_context(|| format!("cannot open the console of worker {}", self.id)),
        }
    }

    /// Remove the files in the directory but its record and the mark of the start: its writable directories are gone.
    pub fn remove_files(&self) -> Result<()> {
        // The supervisor may keep descriptors of it for ever, and nothing counts the blocks of a file without a name.
        // Nobody writes to it any more.
        match open_file(self.dir(), CONSOLE, OFlag::O_WRONLY | OFlag::O_TRUNC) {
            Ok(_) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(errno).with_context(|| self.cannot_remove()),
        }
        for name in names(self.dir())? {
            if name != "record" && name != "started" {
                remove_file(self.dir(), &name).with_context(|| self.cannot_remove())?;
            }
        }
        Ok(())
    }

    /// Remove the directory. The record goes last, but for the mark of the start: a worker that was started must
    /// never be seen without it.
    pub fn remove(self, host: &Host) -> Result<()> {
        for name in ["record", "started"] {
            remove_file(self.dir(), name).with_context(|| self.cannot_remove())?;
        }
        remove_dir(&host.workers, self.id.to_string()).with_context(|| self.cannot_remove())
    }

    fn cannot_remove(&self) -> String {
        format!("cannot remove the directory of worker {}", self.id)
    }
}

/// Why `Attach` or `Kill` was not done, and why nothing else is done with a worker that has no record.
#[derive(Debug)]
pub enum WorkerError {
    /// It was never made, or is deleted.
    NoSuchWorker(WorkerId),
    /// Its record is damaged, or the host could not do it.
    Host(Failure),
}

from!(WorkerError { Host(anyhow::Error) });

impl From<WorkerError> for Error {
    fn from(error: WorkerError) -> Error {
        match error {
            WorkerError::NoSuchWorker(id) => Error::new(
                ErrorKind::NoSuchWorker,
                format!("worker {id} does not exist on this host"),
            ),
            WorkerError::Host(failure) => failure.into(),
        }
    }
}

pub fn damaged_record_error(id: WorkerId) -> anyhow::Error {
    anyhow!("the record of worker {id} is damaged: delete the worker")
}

/// What is there but is no record is damage; what cannot be read is an error, and may be there the next time.
pub fn read_record(dir: impl AsFd, id: WorkerId) -> Result<RecordState> {
    read_record_at(dir, "record", id)
}

fn read_record_at(dir: impl AsFd, path: &str, id: WorkerId) -> Result<RecordState> {
    let record = match readlinkat(&dir, path) {
        Ok(text) => text.to_str().and_then(Record::parse),
        Err(Errno::ENOENT) => return Ok(RecordState::Nothing),
        // It is no link.
        Err(Errno::EINVAL) => None,
        Err(errno) => return Err(errno).with_context(|| format!("cannot read the record of worker {id}")),
    };
    Ok(record.map_or(RecordState::Damaged, RecordState::Record))
}

fn is_started(dir: impl AsFd) -> Result<bool> {
    match stat(dir, "started") {
        Ok(_) => Ok(true),
        Err(Errno::ENOENT) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

fn state(host: &Host, dir: impl AsFd, id: WorkerId) -> Result<State> {
    if !is_started(&dir)? {
        return Ok(State::Created);
    }
    if cgroup::is_populated(&host.cgroups, id)? {
        return Ok(State::Running);
    }
    // What cannot be read is unknown, and of this worker alone.
    let exit = read_small(dir, EXIT).ok().flatten().unwrap_or_default();
    Ok(State::Exited(parse_exit(&exit)))
}

/// The file [`EXIT`]: one line, or nothing for [`Exit::Unknown`].
pub fn print_exit(exit: Exit) -> String {
    match exit {
        Exit::Status(status) => format!("status {status}\n"),
        Exit::Signal(signal) => format!("signal {signal}\n"),
        Exit::NotStarted => "not-started\n".into(),
        Exit::TimedOut => "timed-out\n".into(),
        Exit::Unknown => String::new(),
    }
}

/// [`Exit::Unknown`] unless the first line is one of [`print_exit`]. Pid 1 and the timer may both have written one.
pub fn parse_exit(text: &str) -> Exit {
    let numbers = (0..=255).flat_map(|n| [Exit::Status(n), Exit::Signal(n)]);
    let mut exits = numbers.chain([Exit::NotStarted, Exit::TimedOut]);
    let exit = exits.find(|exit| text.starts_with(&print_exit(*exit)));
    exit.unwrap_or(Exit::Unknown)
}

/// The record, from the disk.
pub fn read_record_of(host: &Host, worker: WorkerId) -> Result<Record> {
    let dir = open_dir(&host.workers, worker.to_string())?;
    match read_record(&dir, worker)? {
        RecordState::Record(record) => Ok(record),
        _ => bail!("worker {worker} has no record"),
    }
}

/// All workers of this host.
#[derive(Debug, Default)]
pub struct Listing {
    /// Those that have a record, in the order of their ids.
    pub workers: Vec<(WorkerId, Record)>,
    pub damaged: Vec<WorkerId>,
}

/// Takes no lock: one that is being made or deleted at this moment is there or not.
pub fn list(host: &Host) -> Result<Listing> {
    let mut ids: Vec<WorkerId> = names(host.workers.as_fd())?
        .iter()
        .filter_map(|name| name.to_str()?.parse().ok())
        .collect();
    ids.sort_unstable();
    let mut found = Listing::default();
    for id in ids {
        match read_record_at(&host.workers, &format!("{id}/record"), id)? {
            RecordState::Nothing => {}
            RecordState::Record(record) => found.workers.push((id, record)),
            RecordState::Damaged => found.damaged.push(id),
        }
    }
    Ok(found)
}

/// None if it has been deleted meanwhile.
pub fn info(host: &Host, worker: WorkerId, record: Record) -> Result<Option<WorkerInfo>> {
    let dir = match open_dir(&host.workers, worker.to_string()) {
        Err(Errno::ENOENT) => return Ok(None),
        dir => dir?,
    };
    Ok(Some(WorkerInfo {
        worker,
        slot: record.slot,
        uid: record.uid,
        state: state(host, dir, worker)?,
        disk: quota::used(host, record.uid)?,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_survives_being_written_and_nothing_else_is_one() {
        let record = Record::new("a-1".parse().unwrap(), Uid::try_from(2_000_000).unwrap());
        let text = record.print();
        assert_eq!(Record::parse(&text), Some(record));
        for cut in 0..text.len() {
            assert_eq!(Record::parse(&text[..cut]), None, "{:?} parsed", &text[..cut]);
        }
        for bad in [
            "../x 2000000 1.",
            "a 0 1.",
            "a +2000000 1.",
            "a 2000000 01.",
            "a  2000000 1.",
            "a 2000000 1 more.",
            "a 2000000 1.\n",
        ] {
            assert_eq!(Record::parse(bad), None, "{bad:?} parsed");
        }
    }

    #[test]
    fn exits_survive_being_written_and_half_written_is_unknown() {
        for exit in [
            Exit::Status(0),
            Exit::Status(255),
            Exit::Signal(9),
            Exit::NotStarted,
            Exit::TimedOut,
            Exit::Unknown,
        ] {
            let text = print_exit(exit);
            assert_eq!(parse_exit(&text), exit);
            for cut in 0..text.len() {
                assert_eq!(parse_exit(&text[..cut]), Exit::Unknown);
            }
        }
        for bad in [
            "status 01\n",
            "status +1\n",
            "status 256\n",
            "timed-out\r\n",
            "\ntimed-out\n",
        ] {
            assert_eq!(parse_exit(bad), Exit::Unknown, "{bad:?}");
        }
        assert_eq!(parse_exit("timed-out\nstatus 1\n"), Exit::TimedOut);
    }
}
