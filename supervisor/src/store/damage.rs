//! A database that cannot be used: one that is damaged is set aside, and a new one is begun; all else is
//! a problem of the host, which the operator has to end: the error says how.
//!
//! Setting aside is safe because the database is not the only source: the server has every worker with its token, owner
//! tag and holds, the host has every worker with its slot and state, and `reconcile` adopts what both have, ends what
//! is over, and shows the rest to an operator. What is lost is which job a worker was made for (a lease that is not
//! renewed any more: the job is tied to its worker by then), how often it was remade (it may be remade three times
//! more), and how much of a failure was reported (it is found again on the host, and reported from the first line).

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rusqlite::ErrorCode;

/// Why the database cannot be used.
#[derive(Debug)]
pub enum DatabaseError {
    /// The database is damaged: it does not contain what was written.
    Damaged(String),
    /// The database is intact, but cannot be used now: why, and what to do.
    Unavailable(String),
}

impl From<rusqlite::Error> for DatabaseError {
    fn from(error: rusqlite::Error) -> Self {
        if is_damage(&error) {
            DatabaseError::Damaged(error.to_string())
        } else {
            DatabaseError::Unavailable(format!("{error}: {}", remedy(&error)))
        }
    }
}

impl DatabaseError {
    /// The error of reading: one that is neither the disk's nor another program's is one of the content.
    pub fn content(error: anyhow::Error) -> Self {
        match error.downcast::<rusqlite::Error>() {
            Ok(error) if is_the_hosts(&error) => error.into(),
            Ok(error) => DatabaseError::Damaged(error.to_string()),
            Err(error) => DatabaseError::Damaged(format!("{error:#}")),
        }
    }
}

fn is_damage(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase)
    )
}

fn is_the_hosts(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(
            ErrorCode::DiskFull
                | ErrorCode::SystemIoFailure
                | ErrorCode::ReadOnly
                | ErrorCode::CannotOpen
                | ErrorCode::PermissionDenied
                | ErrorCode::DatabaseBusy
                | ErrorCode::DatabaseLocked
                | ErrorCode::OutOfMemory
        )
    )
}

/// What an operator can do about the error.
fn remedy(error: &rusqlite::Error) -> &'static str {
    match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => "make room on the disk",
        Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => {
            "let the supervisor's user write the directory and the files in it; if the file system has become \
             read-only by itself, look for its errors in the kernel's log"
        }
        Some(ErrorCode::CannotOpen) => {
            "let the supervisor's user write the directory and the files in it, and make room on the disk"
        }
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => "end the program that has it open",
        // A full disk can look like this, too.
        Some(ErrorCode::SystemIoFailure) => "make room on the disk; look for its errors in the kernel's log",
        _ if is_damage(error) => "start the supervisor again, which sets a damaged database aside",
        _ => "look for the reason in the kernel's log",
    }
}

/// A change that was not written.
#[derive(Debug)]
pub struct SaveError {
    /// Can it be written later, once the problem of the host is solved?
    pub is_temporary: bool,
    /// May the disk be full?
    pub lacks_room: bool,
    sentence: String,
}

impl SaveError {
    /// A problem that ends once the operator does what the sentence says.
    pub fn temporary(sentence: String) -> Self {
        SaveError {
            is_temporary: true,
            lacks_room: false,
            sentence,
        }
    }
}

impl From<anyhow::Error> for SaveError {
    fn from(error: anyhow::Error) -> Self {
        let of_database = error.downcast_ref::<rusqlite::Error>();
        SaveError {
            is_temporary: of_database.is_some_and(is_the_hosts),
            lacks_room: of_database
                .and_then(rusqlite::Error::sqlite_error_code)
                .is_some_and(|code| matches!(code, ErrorCode::DiskFull | ErrorCode::SystemIoFailure)),
            sentence: of_database.map_or_else(|| format!("{error:#}"), |e| format!("{e}: {}", remedy(e))),
        }
    }
}

impl std::fmt::Display for SaveError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.sentence)
    }
}

impl std::error::Error for SaveError {}

/// The most damaged databases that are kept; the next one replaces the last of them, so that the first stays.
const MOST_ASIDE: u32 = 9;

/// Rename the database so that it can be examined: to the first of `.damaged`,
/// `.damaged-2` … `.damaged-9` that is not there.
///
/// The database is renamed first: a crash then leaves a log without a database, which SQLite removes; the other way
/// round it would leave a database without its log, which might be taken for a good old one.
pub fn set_aside(path: &Path) -> Result<PathBuf> {
    let with = |path: &Path, end: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(end);
        PathBuf::from(name)
    };
    let names = (1..=MOST_ASIDE).map(|n| match n {
        1 => with(path, ".damaged"),
        n => with(path, &format!(".damaged-{n}")),
    });
    let is_free = |name: &PathBuf| fs::symlink_metadata(name).is_err();
    let last = with(path, &format!(".damaged-{MOST_ASIDE}"));
    let aside = names.into_iter().find(is_free).unwrap_or(last);
    let describe = || format!("cannot set the damaged database {} aside", path.display());
    let gone = |result: std::io::Result<()>| match result {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    };
    gone(fs::remove_file(with(&aside, "-wal"))).with_context(describe)?;
    fs::rename(path, &aside).with_context(describe)?;
    gone(fs::rename(with(path, "-wal"), with(&aside, "-wal"))).with_context(describe)?;
    gone(fs::remove_file(with(path, "-shm"))).with_context(describe)?;
    let directory = path.parent().unwrap_or(Path::new("/"));
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .with_context(describe)?;
    Ok(aside)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_damaged_database_overwrites_no_earlier_one_and_their_number_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("factory.db");
        for n in 1..=12 {
            fs::write(&path, n.to_string()).unwrap();
            fs::write(dir.path().join("factory.db-wal"), n.to_string()).unwrap();
            let aside = set_aside(&path).unwrap();
            assert_eq!(fs::read_to_string(&aside).unwrap(), n.to_string());
        }
        let content = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        assert_eq!(content("factory.db.damaged"), "1");
        assert_eq!(content("factory.db.damaged-wal"), "1");
        assert_eq!(content("factory.db.damaged-2"), "2");
        assert_eq!(content("factory.db.damaged-9"), "12");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 18);
    }
}
