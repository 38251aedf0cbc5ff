//! What must survive a crash: the workers, and a short history of their phases, in one SQLite database.
//!
//! A call that has returned is on the disk. Nothing here decides anything.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use nix::fcntl::{Flock, FlockArg};
use protocol::{BootstrapToken, WorkerId};
use rusqlite::{Connection, Row, params};

use crate::view::JobId;
use crate::worker::{Phase, Worker};

/// Each brings the schema from its number to the next. Never change one that was released.
const MIGRATIONS: [&str; 1] = ["
    CREATE TABLE workers (
        id TEXT PRIMARY KEY NOT NULL,
        slot TEXT NOT NULL,
        target TEXT NOT NULL,
        job TEXT,
        bootstrap TEXT,
        phase TEXT NOT NULL,
        lines_sent INTEGER NOT NULL,
        since INTEGER NOT NULL,
        waiting_since INTEGER NOT NULL,
        associated INTEGER NOT NULL,
        hold INTEGER NOT NULL,
        gone INTEGER NOT NULL,
        remakes INTEGER NOT NULL,
        failure TEXT,
        trouble TEXT
    ) STRICT;
    CREATE TABLE events (
        n INTEGER PRIMARY KEY,
        at INTEGER NOT NULL,
        worker TEXT NOT NULL,
        slot TEXT NOT NULL,
        job TEXT,
        phase TEXT NOT NULL,
        note TEXT
    ) STRICT;
"];

/// So many lines of history are kept.
const MAX_EVENTS: i64 = 10_000;

/// The database, and the lock that keeps a second supervisor away.
#[derive(Debug)]
pub struct Store {
    db: Connection,
    _lock: Flock<File>,
}

impl Store {
    /// Open, or make, the store in `dir`.
    ///
    /// # Errors
    /// One sentence with what to do: another supervisor runs, the disk is full, the database is damaged or
    /// of a newer release.
    pub fn open(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("cannot make the directory {}", dir.display()))?;
        let lock_path = dir.join("lock");
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path);
        let lock = lock.with_context(|| format!("cannot open {}", lock_path.display()))?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|(_, _)| {
            anyhow!(
                "another supervisor works in {}: stop it before you start this one",
                dir.display()
            )
        })?;
        let path = dir.join("factory.db");
        // SQLite would make it with the mode of the umask; it holds bootstrap tokens. Its side files follow it.
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path);
        drop(file.with_context(|| format!("cannot open the database {}", path.display()))?);
        let db = open_db(&path).with_context(|| {
            format!(
                "the database {} cannot be used: check the disk; if the file is damaged, move it away, and the \
                 workers are found again on the server and the host",
                path.display()
            )
        })?;
        Ok(Self { db, _lock: lock })
    }

    /// # Errors
    /// Where a row makes no sense.
    pub fn workers(&self) -> Result<Vec<Worker>> {
        let mut query = self.db.prepare("SELECT * FROM workers ORDER BY id")?;
        let mut rows = query.query([])?;
        let mut workers = Vec::new();
        while let Some(row) = rows.next()? {
            workers.push(worker_of(row).context(
                "a worker in the database makes no sense: move the database away, and start again",
            )?);
        }
        Ok(workers)
    }

    /// Remember a worker as it is now.
    pub fn save(&mut self, w: &Worker) -> Result<()> {
        let lines_sent = if let Phase::Broken { lines_sent, .. } = w.phase {
            lines_sent
        } else {
            0
        };
        let id = w.id.to_string();
        let job = w.job.clone().map(String::from);
        let phase = w.phase.name();
        let change = self.db.transaction()?;
        let old: Option<String> = change
            .query_row("SELECT phase FROM workers WHERE id = ?1", [&id], |row| row.get(0))
            .map(Some)
            .or_else(|e| {
                if e == rusqlite::Error::QueryReturnedNoRows {
                    Ok(None)
                } else {
                    Err(e)
                }
            })?;
        change.execute(
            "INSERT OR REPLACE INTO workers (id, slot, target, job, bootstrap, phase, lines_sent, since,
                waiting_since, associated, hold, gone, remakes, failure, trouble)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)",
            params![
                id,
                w.slot.as_str(),
                w.target.to_string(),
                job,
                w.bootstrap.as_ref().map(BootstrapToken::as_str),
                phase,
                lines_sent,
                i64::try_from(w.since)?,
                i64::try_from(w.waiting_since)?,
                w.associated,
                w.hold,
                w.gone,
                w.remakes,
                w.failure,
                w.trouble,
            ],
        )?;
        if old.as_deref() != Some(phase) {
            change.execute(
                "INSERT INTO events (at, worker, slot, job, phase, note) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                params![
                    i64::try_from(w.since)?,
                    id,
                    w.slot.as_str(),
                    job,
                    phase,
                    w.failure
                ],
            )?;
            change.execute(
                "DELETE FROM events WHERE n <= (SELECT max(n) FROM events) - ?1",
                [MAX_EVENTS],
            )?;
        }
        change.commit()?;
        Ok(())
    }

    /// Forget a worker.
    pub fn remove(&mut self, worker: WorkerId) -> Result<()> {
        self.db
            .execute("DELETE FROM workers WHERE id = ?1", [worker.to_string()])?;
        Ok(())
    }
}

fn open_db(path: &Path) -> Result<Connection> {
    let mut db = Connection::open(path)?;
    db.busy_timeout(std::time::Duration::from_secs(5))?;
    db.pragma_update(None, "journal_mode", "WAL")?;
    db.pragma_update(None, "synchronous", "FULL")?;
    db.pragma_update(None, "foreign_keys", true)?;
    let check: String = db.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    if check != "ok" {
        bail!("it is damaged ({check})");
    }
    let version: u32 = db.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let version = version as usize;
    if version > MIGRATIONS.len() {
        bail!(
            "it has version {version}, this supervisor knows {}: install the newer release again",
            MIGRATIONS.len()
        );
    }
    for (number, migration) in MIGRATIONS.iter().enumerate().skip(version) {
        let change = db.transaction()?;
        change.execute_batch(migration)?;
        change.pragma_update(None, "user_version", u32::try_from(number + 1)?)?;
        change.commit()?;
    }
    Ok(db)
}

fn worker_of(row: &Row<'_>) -> Result<Worker> {
    let text = |name: &str| row.get::<_, String>(name);
    let number = |name: &str| anyhow::Ok(u64::try_from(row.get::<_, i64>(name)?)?);
    let phase = phase_of(&text("phase")?, row.get("lines_sent")?)?;
    let job = row
        .get::<_, Option<String>>("job")?
        .map(JobId::try_from)
        .transpose();
    let bootstrap = row
        .get::<_, Option<String>>("bootstrap")?
        .map(BootstrapToken::try_from)
        .transpose()?;
    Ok(Worker {
        id: text("id")?.parse()?,
        slot: text("slot")?.parse()?,
        target: text("target")?.parse()?,
        job: job.map_err(|e| anyhow!(e))?,
        bootstrap,
        phase,
        since: number("since")?,
        waiting_since: number("waiting_since")?,
        associated: row.get("associated")?,
        hold: row.get("hold")?,
        gone: row.get("gone")?,
        remakes: row.get("remakes")?,
        failure: row.get("failure")?,
        trouble: row.get("trouble")?,
    })
}

fn phase_of(name: &str, lines_sent: u32) -> Result<Phase> {
    let all = [
        Phase::Reserved,
        Phase::Created,
        Phase::Running { online: false },
        Phase::Running { online: true },
        Phase::Clearing { confirmed: false },
        Phase::Broken {
            told: false,
            lines_sent,
        },
        Phase::Broken {
            told: true,
            lines_sent,
        },
        Phase::Destroying,
        Phase::Destroyed,
    ];
    all.into_iter()
        .find(|phase| phase.name() == name)
        .ok_or_else(|| anyhow!("{name:?} is no phase"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn worker(phase: Phase) -> Worker {
        Worker {
            id: WorkerId::from_bits(7),
            slot: "bench-1".parse().unwrap(),
            target: protocol::TargetId::from_bits(8),
            job: Some(JobId::try_from("01HZX3N8Q4J5K6M7P8R9S0T1V2".to_owned()).unwrap()),
            bootstrap: Some("a".repeat(64).parse().unwrap()),
            phase,
            since: 5,
            waiting_since: 4,
            associated: true,
            hold: true,
            gone: false,
            remakes: 2,
            failure: Some("it broke".into()),
            trouble: None,
        }
    }

    #[test]
    fn what_was_saved_is_there_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        for phase in [
            Phase::Reserved,
            Phase::Created,
            Phase::Running { online: true },
            Phase::Broken {
                told: false,
                lines_sent: 12,
            },
            Phase::Broken {
                told: true,
                lines_sent: 13,
            },
            Phase::Clearing { confirmed: false },
            Phase::Destroying,
            Phase::Destroyed,
        ] {
            Store::open(dir.path()).unwrap().save(&worker(phase)).unwrap();
            assert_eq!(
                Store::open(dir.path()).unwrap().workers().unwrap(),
                [worker(phase)]
            );
        }
        let mut store = Store::open(dir.path()).unwrap();
        store.remove(WorkerId::from_bits(7)).unwrap();
        assert!(store.workers().unwrap().is_empty());
        let mode = fs::metadata(dir.path().join("factory.db"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn two_supervisors_cannot_share_it() {
        let dir = tempfile::tempdir().unwrap();
        let _first = Store::open(dir.path()).unwrap();
        let error = Store::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("another supervisor"), "{error}");
    }

    #[test]
    fn damage_and_a_newer_schema_are_said_plainly() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(
            dir.path().join("factory.db"),
            "this is not a database, it is a sentence".repeat(200),
        )
        .unwrap();
        let error = format!("{:#}", Store::open(dir.path()).unwrap_err());
        assert!(error.contains("move it away"), "{error}");
        fs::remove_file(dir.path().join("factory.db")).unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.db.pragma_update(None, "user_version", 99).unwrap();
        drop(store);
        let error = format!("{:#}", Store::open(dir.path()).unwrap_err());
        assert!(error.contains("newer release"), "{error}");
    }
}
