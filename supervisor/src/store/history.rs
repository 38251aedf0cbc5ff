//! Reading what the store has written of each worker's phases, beside it.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use protocol::WorkerId;
use rusqlite::{Connection, OpenFlags};

/// A worker has entered a phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PhaseChange {
    /// In milliseconds since 1970.
    pub at: u64,
    /// Its name, as the status shows it.
    pub phase: String,
    /// Why, where the phase does not say it.
    pub note: Option<String>,
}

/// The phases of workers, to be read beside the store that writes them.
#[derive(Debug)]
pub struct History(Mutex<Connection>);

impl History {
    /// # Errors
    /// Where there is no store in `dir` that can be read.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("factory.db");
        let db = Connection::open_with_flags(
            &path,
            OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX,
        );
        let db = db.with_context(|| format!("cannot read the database {}", path.display()))?;
        db.busy_timeout(std::time::Duration::from_secs(1))?;
        Ok(Self(Mutex::new(db)))
    }

    /// The last phases of a worker, the oldest first.
    ///
    /// # Errors
    /// Where the database cannot be read.
    pub fn of(&self, worker: WorkerId) -> Result<Vec<PhaseChange>> {
        let db = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut query =
            db.prepare("SELECT at, phase, note FROM events WHERE worker = ?1 ORDER BY n DESC LIMIT 100")?;
        let rows = query.query_map([worker.to_string()], |row| {
            let at: i64 = row.get(0)?;
            Ok(PhaseChange {
                at: u64::try_from(at).unwrap_or(0),
                phase: row.get(1)?,
                note: row.get(2)?,
            })
        })?;
        let mut steps = rows.collect::<rusqlite::Result<Vec<PhaseChange>>>()?;
        steps.reverse();
        Ok(steps)
    }
}
