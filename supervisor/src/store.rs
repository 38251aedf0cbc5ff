//! What must survive a crash: the workers, and a short history of their phases, in one SQLite database.
//!
//! A call that has returned is on the disk. Nothing here decides anything.

mod damage;
mod history;
mod reserve;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result, anyhow};
use nix::fcntl::{Flock, FlockArg};
use protocol::{BootstrapToken, SlotName, WorkerId};
use rusqlite::{Connection, Row, params};

use crate::buildomat::JobId;
use crate::factory::drain::{Drain, Drains};
use crate::worker::{Kill, Phase, Worker};
pub use damage::SaveError;
pub use history::{History, PhaseChange};
pub use reserve::RESERVE_BYTES;

use damage::DatabaseError;
use reserve::Reserve;

/// What must survive a crash, as the driver writes it.
pub trait Storage {
    /// Remember a worker as it is now.
    ///
    /// # Errors
    /// Why it cannot be saved, and what to do. Nothing of the change is saved then.
    fn save(&mut self, worker: &Worker) -> std::result::Result<(), SaveError>;

    /// Forget a worker.
    ///
    /// # Errors
    /// Those of [`Storage::save`].
    fn remove(&mut self, worker: WorkerId) -> std::result::Result<(), SaveError>;

    /// Remember that no jobs are taken, on this slot or on all; or that they are again.
    ///
    /// # Errors
    /// Those of [`Storage::save`].
    fn save_drain(
        &mut self,
        slot: Option<&SlotName>,
        drain: Option<&Drain>,
    ) -> std::result::Result<(), SaveError>;

    /// Is there a file system that can be written, with room for what is to be saved next? Makes the room if it can.
    ///
    /// # Errors
    /// Why there is none, and what to do.
    fn check(&mut self) -> std::result::Result<(), SaveError>;

    /// Has room been given up since this was asked last?
    fn has_released_reserve(&mut self) -> bool;
}

/// Each brings the schema from its number to the next. Never change one that was released.
const MIGRATIONS: [&str; 3] = [
    "
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
",
    "
    ALTER TABLE workers ADD COLUMN hold_since INTEGER;
    CREATE TABLE drained (
        -- Empty: all slots.
        slot TEXT PRIMARY KEY NOT NULL
    ) STRICT;
",
    "
    ALTER TABLE drained ADD COLUMN reason TEXT;
    ALTER TABLE drained ADD COLUMN until INTEGER;
",
];

/// The most lines of history that are kept.
const MAX_EVENTS: i64 = 10_000;

/// The database, and the lock that keeps a second supervisor away.
#[derive(Debug)]
pub struct Store {
    db: Connection,
    lock: Flock<File>,
    dir: PathBuf,
    reserve: Reserve,
    reserve_released: bool,
}

impl Store {
    /// Open, or make, the store in `dir`.
    ///
    /// # Errors
    /// One sentence with what to do: another supervisor runs, the disk is full or read-only, the database is of a
    /// newer release. A damaged one is set aside: see `damage`.
    pub fn open(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| cannot_make(dir))?;
        let lock = open_file(&dir.join("lock"))?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|(_, _)| {
            anyhow!(
                "another supervisor works in {}: stop it before you start this one",
                dir.display()
            )
        })?;
        let path = dir.join("factory.db");
        let reserve = Reserve::new(dir);
        let db = match open_db(&path)? {
            Err(DatabaseError::Damaged(how)) => {
                let aside = damage::set_aside(&path)?;
                tracing::error!(
                    "the database {} is damaged ({how}): it was set aside as {}, and the workers are found again on \
                     the server and the host; check the disk, nothing else is to be done",
                    path.display(),
                    aside.display()
                );
                open_db(&path)?
            }
            // Without room nothing can be deleted, not even what has taken it.
            Err(DatabaseError::Unavailable(_)) if reserve.release_if_needed() => open_db(&path)?,
            opened => opened,
        };
        let db = db.map_err(|error| {
            let (DatabaseError::Damaged(why) | DatabaseError::Unavailable(why)) = error;
            anyhow!("the database {} cannot be used: {why}", path.display())
        })?;
        Ok(Self {
            db,
            lock,
            dir: dir.to_owned(),
            reserve,
            reserve_released: false,
        })
    }

    /// # Errors
    /// Where a row makes no sense.
    pub fn workers(&self) -> Result<Vec<Worker>> {
        workers_in(&self.db)
    }

    fn write(&mut self, w: &Worker) -> Result<()> {
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
            .prepare_cached("SELECT phase FROM workers WHERE id = ?1")?
            .query_row([&id], |row| row.get(0))
            .map(Some)
            .or_else(|e| {
                if e == rusqlite::Error::QueryReturnedNoRows {
                    Ok(None)
                } else {
                    Err(e)
                }
            })?;
        let mut save = change.prepare_cached(
            "INSERT OR REPLACE INTO workers (id, slot, target, job, bootstrap, phase, lines_sent, since,
                waiting_since, associated, hold, gone, remakes, failure, trouble, hold_since)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16)",
        )?;
        save.execute(params![
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
            w.hold_since.map(i64::try_from).transpose()?,
        ])?;
        if old.as_deref() != Some(phase) {
            let mut note = change.prepare_cached(
                "INSERT INTO events (at, worker, slot, job, phase, note) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            )?;
            note.execute(params![
                i64::try_from(w.since)?,
                id,
                w.slot.as_str(),
                job,
                phase,
                w.failure
            ])?;
            change
                .prepare_cached("DELETE FROM events WHERE n <= (SELECT max(n) FROM events) - ?1")?
                .execute([MAX_EVENTS])?;
        }
        drop(save);
        change.commit()?;
        tracing::debug!(worker = id, phase, "saved");
        Ok(())
    }

    /// Forget all workers. Returns how many there were.
    ///
    /// # Errors
    /// Those of [`Storage::save`].
    pub fn forget_all(&mut self) -> std::result::Result<usize, SaveError> {
        let removed = self.db.execute("DELETE FROM workers", []);
        Ok(removed.map_err(anyhow::Error::from)?)
    }

    /// What was drained when the previous run ended.
    ///
    /// # Errors
    /// Where the database cannot be read.
    pub fn drained(&self) -> Result<Drains> {
        let mut query = self.db.prepare("SELECT slot, reason, until FROM drained")?;
        let mut rows = query.query([])?;
        let mut drains = Drains::new();
        while let Some(row) = rows.next()? {
            let until: Option<i64> = row.get(2)?;
            let drain = Drain {
                reason: row.get(1)?,
                until: until.and_then(|at| u64::try_from(at).ok()),
            };
            let slot: String = row.get(0)?;
            // A slot that is no name any more cannot take a job anyway.
            match slot.parse() {
                Ok(slot) => drop(drains.insert(Some(slot), drain)),
                Err(_) if slot.is_empty() => drop(drains.insert(None, drain)),
                Err(_) => {}
            }
        }
        Ok(drains)
    }

    /// Write; where room is missing, once more with what is kept for that.
    fn with_room(&mut self, write: impl Fn(&mut Self) -> Result<()>) -> std::result::Result<(), SaveError> {
        let error = match write(self).map_err(SaveError::from) {
            Err(error) if error.lacks_room => error,
            written => return written,
        };
        if !self.reserve.release() {
            return Err(error);
        }
        self.reserve_released = true;
        Ok(write(self)?)
    }
}

impl Storage for Store {
    fn save(&mut self, worker: &Worker) -> std::result::Result<(), SaveError> {
        self.with_room(|store| store.write(worker))
    }

    fn remove(&mut self, worker: WorkerId) -> std::result::Result<(), SaveError> {
        let id = worker.to_string();
        self.with_room(|store| {
            store
                .db
                .prepare_cached("DELETE FROM workers WHERE id = ?1")?
                .execute([&id])?;
            Ok(())
        })?;
        tracing::debug!(%worker, "removed");
        Ok(())
    }

    fn save_drain(
        &mut self,
        slot: Option<&SlotName>,
        drain: Option<&Drain>,
    ) -> std::result::Result<(), SaveError> {
        let slot = slot.map_or("", SlotName::as_str);
        self.with_room(|store| {
            match drain {
                Some(Drain { reason, until }) => store.db.execute(
                    "INSERT OR REPLACE INTO drained (slot, reason, until) VALUES (?1, ?2, ?3)",
                    params![slot, reason, until.map(i64::try_from).transpose()?],
                )?,
                None => store.db.execute("DELETE FROM drained WHERE slot = ?1", [slot])?,
            };
            Ok(())
        })
    }

    fn check(&mut self) -> std::result::Result<(), SaveError> {
        // A file system that has become read-only says so at the next change.
        self.lock.set_modified(SystemTime::now()).map_err(|error| {
            let dir = self.dir.display();
            SaveError::temporary(format!(
                "nothing can be written in {dir}: {error}: look for the file system's errors in the kernel's log"
            ))
        })?;
        self.reserve.keep().map_err(SaveError::temporary)
    }

    fn has_released_reserve(&mut self) -> bool {
        std::mem::take(&mut self.reserve_released)
    }
}

/// Why the supervisor has no directory, and who makes it.
fn cannot_make(dir: &Path) -> String {
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    format!(
        "cannot make the directory {dir}: root must make it for the supervisor's user (install -d -o {uid} -g {gid} -m 0700 \
         {dir}); where the package's unit starts the supervisor, systemd does",
        dir = dir.display()
    )
}

/// Open, or make, a file that is the supervisor's alone.
fn open_file(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600);
    options.open(path).with_context(|| {
        format!(
            "cannot open {}: let the supervisor's user write the directory and the files in it, and make room on \
             the disk",
            path.display()
        )
    })
}

fn workers_in(db: &Connection) -> Result<Vec<Worker>> {
    let mut query = db.prepare("SELECT * FROM workers ORDER BY id")?;
    let mut rows = query.query([])?;
    let mut workers = Vec::new();
    while let Some(row) = rows.next()? {
        workers.push(worker_of(row).context("a worker in the database makes no sense")?);
    }
    Ok(workers)
}

/// Open, or make, the database. The outer error is the file's, the inner the content's.
fn open_db(path: &Path) -> Result<std::result::Result<Connection, DatabaseError>> {
    // SQLite would make it with the mode of the umask; it holds bootstrap tokens. Its side files follow it.
    drop(open_file(path)?);
    Ok(prepare(path))
}

fn prepare(path: &Path) -> std::result::Result<Connection, DatabaseError> {
    let mut db = Connection::open(path)?;
    db.busy_timeout(std::time::Duration::from_secs(5))?;
    db.pragma_update(None, "journal_mode", "WAL")?;
    db.pragma_update(None, "synchronous", "FULL")?;
    db.pragma_update(None, "foreign_keys", true)?;
    // The whole of it, indices too: there is never much in it.
    let check: String = db.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
    if check != "ok" {
        // Its text has lines.
        return Err(DatabaseError::Damaged(
            check.split_whitespace().collect::<Vec<_>>().join(" "),
        ));
    }
    let version: i64 = db.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let version = usize::try_from(version).map_err(|e| DatabaseError::content(e.into()))?;
    if version > MIGRATIONS.len() {
        return Err(DatabaseError::Unavailable(format!(
            "it has version {version}, this supervisor knows {}: install the newer release again",
            MIGRATIONS.len()
        )));
    }
    for (number, migration) in MIGRATIONS.iter().enumerate().skip(version) {
        let change = db.transaction()?;
        // What makes no sense to a migration is not what one of ours has left.
        change
            .execute_batch(migration)
            .map_err(|e| DatabaseError::content(e.into()))?;
        change.pragma_update(None, "user_version", number as u32 + 1)?;
        change.commit()?;
    }
    workers_in(&db).map_err(DatabaseError::content)?;
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
        hold_since: row
            .get::<_, Option<i64>>("hold_since")?
            .and_then(|at| u64::try_from(at).ok()),
        gone: row.get("gone")?,
        remakes: row.get("remakes")?,
        failure: row.get("failure")?,
        trouble: row.get("trouble")?,
        kill: Kill::default(),
    })
}

fn phase_of(name: &str, lines_sent: u32) -> Result<Phase> {
    let all = [
        Phase::Reserved,
        Phase::Created,
        Phase::Running { online: false },
        Phase::Running { online: true },
        Phase::Resetting { confirmed: false },
        Phase::Broken {
            reported: false,
            lines_sent,
        },
        Phase::Broken {
            reported: true,
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
            hold_since: Some(3),
            gone: false,
            remakes: 2,
            failure: Some("it broke".into()),
            trouble: None,
            kill: Kill::default(),
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
                reported: false,
                lines_sent: 12,
            },
            Phase::Broken {
                reported: true,
                lines_sent: 13,
            },
            Phase::Resetting { confirmed: false },
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
    fn what_was_drained_stays_so_until_it_is_resumed() {
        let dir = tempfile::tempdir().unwrap();
        let slot: SlotName = "a".parse().unwrap();
        let mut store = Store::open(dir.path()).unwrap();
        let update = Drain {
            reason: Some("a new kernel".into()),
            until: Some(1_800_000_000_000),
        };
        for drain in [Drain::default(), update.clone()] {
            store.save_drain(None, Some(&drain)).unwrap();
            store.save_drain(Some(&slot), Some(&Drain::default())).unwrap();
        }
        drop(store);
        let mut store = Store::open(dir.path()).unwrap();
        let one = (Some(slot), Drain::default());
        assert_eq!(store.drained().unwrap(), [(None, update), one.clone()].into());
        store.save_drain(None, None).unwrap();
        assert_eq!(store.drained().unwrap(), [one].into());
    }

    #[test]
    fn two_supervisors_cannot_share_it() {
        let dir = tempfile::tempdir().unwrap();
        let _first = Store::open(dir.path()).unwrap();
        let error = Store::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("another supervisor"), "{error}");
    }

    #[test]
    fn a_damaged_database_is_set_aside_and_a_new_one_begun() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("factory.db");
        let good = || {
            let _ = fs::remove_file(&path);
            let mut store = Store::open(dir.path()).unwrap();
            store.save(&worker(Phase::Created)).unwrap();
            store
        };
        let damages: [(&str, &dyn Fn()); 6] = [
            ("a sentence", &|| {
                drop(good());
                fs::write(&path, "this is not a database, it is a sentence".repeat(200)).unwrap();
            }),
            ("a piece", &|| {
                drop(good());
                let half = fs::metadata(&path).unwrap().len() / 2;
                File::options()
                    .write(true)
                    .open(&path)
                    .unwrap()
                    .set_len(half)
                    .unwrap();
            }),
            ("pages of another", &|| {
                drop(good());
                let mut bytes = fs::read(&path).unwrap();
                bytes[4096..].reverse();
                fs::write(&path, bytes).unwrap();
            }),
            ("no table", &|| {
                good().db.execute_batch("DROP TABLE workers").unwrap()
            }),
            ("no phase", &|| {
                good()
                    .db
                    .execute_batch("UPDATE workers SET phase = 'asleep'")
                    .unwrap();
            }),
            ("no migration's", &|| {
                good().db.pragma_update(None, "user_version", 0).unwrap();
            }),
        ];
        for (what, damage) in damages {
            damage();
            let mut store = Store::open(dir.path()).unwrap_or_else(|e| panic!("{what}: {e:#}"));
            assert!(store.workers().unwrap().is_empty(), "{what} is no damage");
            assert!(dir.path().join("factory.db.damaged").exists(), "{what}");
            store.save(&worker(Phase::Created)).unwrap();
            drop(store);
            let again = Store::open(dir.path()).unwrap();
            assert_eq!(again.workers().unwrap(), [worker(Phase::Created)], "{what}");
            fs::remove_file(dir.path().join("factory.db.damaged")).unwrap();
        }
    }

    /// With each migration, add a database of the schema before it, with a worker and an event, in `schemas`.
    #[test]
    fn every_earlier_schema_is_brought_to_this_one_with_all_that_is_in_it() {
        for version in 1..MIGRATIONS.len() {
            let dir = tempfile::tempdir().unwrap();
            let dump = format!("{}/src/store/schemas/{version}.sql", env!("CARGO_MANIFEST_DIR"));
            let dump = fs::read_to_string(&dump).unwrap_or_else(|e| panic!("{dump}: {e}"));
            Connection::open(dir.path().join("factory.db"))
                .unwrap()
                .execute_batch(&dump)
                .unwrap();
            let store = Store::open(dir.path()).unwrap();
            let broken = worker(Phase::Broken {
                reported: false,
                lines_sent: 12,
            });
            // Since when it is held was not known before schema 2.
            let hold_since = broken.hold_since.filter(|_| version >= 2);
            assert_eq!(
                store.workers().unwrap(),
                [Worker { hold_since, ..broken }],
                "{version}"
            );
            assert!(!dir.path().join("factory.db.damaged").exists(), "{version}");
            // No drain was saved before schema 2, and no end of one before schema 3.
            let drained = store.drained().unwrap();
            assert_eq!(drained.len(), usize::from(version >= 2), "{version}");
            assert!(drained.values().all(|drain| *drain == Drain::default()));
            drop(store);
            let history = History::open(dir.path()).unwrap();
            let steps = history.of(WorkerId::from_bits(7)).unwrap();
            assert_eq!(steps.len(), 1, "{version}");
            assert_eq!(steps[0].note.as_deref(), Some("it broke"));
        }
    }

    #[test]
    fn a_newer_schema_is_refused_and_not_changed() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path()).unwrap();
        store.save(&worker(Phase::Created)).unwrap();
        store.db.pragma_update(None, "user_version", 99).unwrap();
        drop(store);
        let error = format!("{:#}", Store::open(dir.path()).unwrap_err());
        assert!(error.contains("newer release"), "{error}");
        assert!(!dir.path().join("factory.db.damaged").exists());
    }
}
