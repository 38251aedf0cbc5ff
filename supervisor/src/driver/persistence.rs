//! What the core wants saved, on its way to the disk. A change that cannot be written is kept and tried again; until
//! all of them are written, nothing new is begun but what deletes workers, and that makes room.

use std::time::Duration;

use anyhow::{Context, Result};
use protocol::WorkerId;
use tokio::time::Instant;

use crate::store::{SaveError, Storage};
use crate::worker::Worker;

/// How soon, and how late at most, a change is written again that could not be.
const FIRST_WAIT: Duration = Duration::from_millis(500);
const LAST_WAIT: Duration = Duration::from_secs(8);
/// How often it is checked whether changes could be written.
const CHECK: Duration = Duration::from_secs(10);

/// The newest state of a worker that the disk does not have; none for one that is to be forgotten.
#[derive(Debug)]
struct Change {
    id: WorkerId,
    worker: Option<Box<Worker>>,
}

/// The store, and what it lacks.
#[derive(Debug)]
pub struct Persistence<S> {
    store: S,
    /// One for each worker, in the order of their first change.
    unsaved: Vec<Change>,
    /// Why the last change was not written.
    unwritten: Option<String>,
    /// Why the next may not be written.
    risk: Option<String>,
    wait: Duration,
    next: Instant,
}

impl<S: Storage> Persistence<S> {
    /// Nothing is unsaved.
    pub fn new(store: S) -> Self {
        Self {
            store,
            unsaved: Vec::new(),
            unwritten: None,
            risk: None,
            wait: FIRST_WAIT,
            next: Instant::now(),
        }
    }

    pub(super) fn store(&mut self) -> &mut S {
        &mut self.store
    }

    /// Does the disk lack something?
    pub(super) fn is_behind(&self) -> bool {
        !self.unsaved.is_empty()
    }

    /// Why no jobs may be taken, if so.
    pub(super) fn problem(&self) -> Option<&String> {
        self.unwritten.as_ref().or(self.risk.as_ref())
    }

    /// How long until [`Persistence::retry`] has something to do.
    pub(super) fn due_in(&self) -> Duration {
        self.next.saturating_duration_since(Instant::now())
    }

    /// Save a worker; at once, if nothing is in the way.
    ///
    /// # Errors
    /// Where the database cannot be written, and waiting would not help.
    pub(super) fn save(&mut self, worker: &Worker) -> Result<()> {
        self.change(worker.id, Some(Box::new(worker.clone())))
    }

    /// Forget a worker; at once, if nothing is in the way.
    ///
    /// # Errors
    /// Those of [`Self::save`].
    pub(super) fn remove(&mut self, worker: WorkerId) -> Result<()> {
        self.change(worker, None)
    }

    fn change(&mut self, id: WorkerId, worker: Option<Box<Worker>>) -> Result<()> {
        match self.unsaved.iter_mut().find(|change| change.id == id) {
            Some(change) => change.worker = worker,
            None => self.unsaved.push(Change { id, worker }),
        }
        // What is tried again is tried when its time has come.
        if self.unwritten.is_none() {
            self.write()?;
        }
        Ok(())
    }

    /// If it is time to: write what is to be written, and see whether more could be.
    ///
    /// # Errors
    /// Those of [`Self::save`].
    pub(super) fn retry(&mut self) -> Result<()> {
        if !self.due_in().is_zero() {
            return Ok(());
        }
        self.write()?;
        if self.unwritten.is_none() {
            self.risk = self.store.check().err().map(|risk| risk.to_string());
            self.next = Instant::now() + if self.risk.is_some() { LAST_WAIT } else { CHECK };
        }
        Ok(())
    }

    fn write(&mut self) -> Result<()> {
        match self.write_all() {
            Ok(()) => {
                let was_behind = self.unwritten.take().is_some();
                self.wait = FIRST_WAIT;
                if was_behind || self.store.has_released_reserve() {
                    self.next = Instant::now();
                }
                Ok(())
            }
            Err(error) if error.is_temporary => {
                self.unwritten = Some(error.to_string());
                self.next = Instant::now() + self.wait;
                self.wait = (self.wait * 2).min(LAST_WAIT);
                Ok(())
            }
            Err(error) => Err(error).context("the database cannot be written"),
        }
    }

    fn write_all(&mut self) -> Result<(), SaveError> {
        while let Some(change) = self.unsaved.first() {
            match &change.worker {
                Some(worker) => self.store.save(worker)?,
                None => self.store.remove(change.id)?,
            }
            self.unsaved.remove(0);
        }
        Ok(())
    }

    /// The last chance to write.
    ///
    /// # Errors
    /// Where something is lost for the next run: it is found again on the server and on the host.
    pub(super) fn finish(&mut self) -> Result<()> {
        self.write_all()
            .context("stopped while the database could not be written")
    }
}
