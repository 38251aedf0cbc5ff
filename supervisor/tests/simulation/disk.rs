//! The real store, on the first host's disk, which may be full.

use protocol::config::Config;
use protocol::{SlotName, WorkerId};
use supervisor::config_check::ConfigFile;
use supervisor::factory::drain::Drain;
use supervisor::store::{SaveError, Storage, Store};
use supervisor::worker::Worker;

use crate::net::Shared;
use crate::simulation::Disk;

#[derive(Debug)]
pub struct SimulatedStore {
    pub store: Store,
    /// None for one whose disk is always fine.
    pub shared: Option<Shared>,
}

impl SimulatedStore {
    fn may_write(&self) -> Result<(), SaveError> {
        let may = self
            .shared
            .as_ref()
            .is_none_or(|shared| shared.simulation().may_write());
        may.then_some(())
            .ok_or_else(|| SaveError::temporary("database or disk is full: make room".into()))
    }
}

impl Storage for SimulatedStore {
    fn save(&mut self, worker: &Worker) -> Result<(), SaveError> {
        self.may_write()?;
        self.store.save(worker)
    }

    fn remove(&mut self, worker: WorkerId) -> Result<(), SaveError> {
        self.may_write()?;
        self.store.remove(worker)
    }

    fn save_drain(&mut self, slot: Option<&SlotName>, drain: Option<&Drain>) -> Result<(), SaveError> {
        self.store.save_drain(slot, drain)
    }

    fn check(&mut self) -> Result<(), SaveError> {
        match self.shared.as_ref().map(|shared| shared.simulation().disk) {
            None | Some(Disk::Fine) => Ok(()),
            Some(Disk::Low | Disk::Full) => {
                Err(SaveError::temporary("little room is left: make room".into()))
            }
        }
    }

    fn has_released_reserve(&mut self) -> bool {
        false
    }
}

/// The configuration file of the first host; that of the second never changes.
#[derive(Debug)]
pub struct SimulatedFile {
    pub shared: Option<Shared>,
}

impl ConfigFile for SimulatedFile {
    fn difference(&mut self, in_use: &Config) -> Option<String> {
        let differs = |shared: &Shared| shared.simulation().file.as_ref() != Some(in_use);
        self.shared
            .as_ref()
            .is_some_and(differs)
            .then(|| "the file differs".into())
    }
}
