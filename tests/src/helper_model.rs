//! The helper's contract as a program: what each request does to the workers of a host, and what it answers.
//! Read it beside the page of the `protocol` crate, which says the same in words.
//!
//! `--test host model::` asks the real helper and this the same, and compares; in `fuzz/` it stands beneath the real
//! dispatcher in place of a host, and the simulation of the supervisor has it as its host. For that it needs nothing
//! but the `protocol` crate.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use protocol::config::Config;
use protocol::{ErrorKind, Exit, SlotName, State, Uid, WorkerId, WorkerInfo};

/// What the contract takes from the configuration: the slots, and which of them conflict, as it is written there.
#[derive(Clone, Debug, Default)]
pub struct Configuration {
    /// By their names: what a slot has is none of the contract's affair.
    pub slots: BTreeSet<SlotName>,
    /// In the order in which the file names them; see [`Configuration::are_conflicting`].
    pub conflicts: BTreeSet<(SlotName, SlotName)>,
}

impl Configuration {
    /// Written on either side, it holds for both.
    pub fn are_conflicting(&self, one: &SlotName, other: &SlotName) -> bool {
        let written = |a: &SlotName, b: &SlotName| self.conflicts.contains(&(a.clone(), b.clone()));
        written(one, other) || written(other, one)
    }
}

/// What comes with `InstallAgent`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Agent {
    /// It runs until it is killed.
    Stays,
    /// It ends by itself.
    Ends(Exit),
    /// A sealed memfd in which there is no program.
    NoProgram,
    /// Anything else than a sealed memfd.
    Unsealed,
}

impl From<&Config> for Configuration {
    fn from(config: &Config) -> Configuration {
        let pairs = config.slots.iter().flat_map(|(name, slot)| {
            let others = slot.conflicts_with_slots.iter();
            others.map(|other| (name.clone(), other.clone()))
        });
        Configuration {
            slots: config.slots.keys().cloned().collect(),
            conflicts: pairs.collect(),
        }
    }
}

/// What a worker has of the host.
#[derive(Clone, Debug)]
pub struct Allocation {
    /// No other worker has it.
    pub slot: SlotName,
    /// Its gid is the same number.
    pub uid: Uid,
    /// As `List` tells it.
    pub state: State,
}

/// A host, its configuration, and its workers.
#[derive(Clone, Debug)]
pub struct Model {
    /// None while it does not parse.
    pub configuration: Option<Configuration>,
    pub(crate) uids: RangeInclusive<u32>,
    /// None is a worker whose record is damaged: nobody knows which slot it has.
    workers: BTreeMap<WorkerId, Option<Allocation>>,
}

impl Model {
    /// Without workers; `uids` is `factory.uid_range`.
    pub fn new(configuration: Configuration, uids: RangeInclusive<u32>) -> Model {
        Model {
            configuration: Some(configuration),
            uids,
            workers: BTreeMap::new(),
        }
    }

    /// `CreateUser`. Which of the free uids it gets is the host's affair: see [`Model::settle_for`].
    pub fn create_user(&mut self, worker: WorkerId, slot: &SlotName) -> Result<Uid, ErrorKind> {
        let configuration = self.configuration.clone().ok_or(ErrorKind::Busy)?;
        if !configuration.slots.contains(slot) {
            return Err(ErrorKind::NoSuchSlot);
        }
        match self.workers.get(&worker) {
            Some(Some(allocation)) if allocation.slot == *slot => return Ok(allocation.uid),
            Some(Some(_)) => return Err(ErrorKind::Refused),
            Some(None) => return Err(ErrorKind::Failed),
            None => {}
        }
        self.delete_damaged();
        let mut others = self.workers.values().flatten();
        if others.any(|other| other.slot == *slot || configuration.are_conflicting(&other.slot, slot))
            || self.workers.len() >= configuration.slots.len()
        {
            return Err(ErrorKind::SlotTaken);
        }
        let free = self.uids.clone().find(|uid| self.is_free(*uid));
        let uid = free.and_then(|uid| Uid::try_from(uid).ok());
        let uid = uid.ok_or(ErrorKind::Limit)?;
        let allocation = Allocation {
            slot: slot.clone(),
            uid,
            state: State::Created,
        };
        self.workers.insert(worker, Some(allocation));
        Ok(uid)
    }

    /// `InstallAgent`. An agent is started once in a worker's life, however that went.
    pub fn install_agent(&mut self, worker: WorkerId, agent: Agent) -> Result<(), ErrorKind> {
        let configuration = self.configuration.clone();
        let allocation = self.existing(worker)?;
        if allocation.state != State::Created {
            return Ok(());
        }
        let configuration = configuration.ok_or(ErrorKind::Busy)?;
        if !configuration.slots.contains(&allocation.slot) {
            return Err(ErrorKind::NoSuchSlot);
        }
        if agent == Agent::Unsealed {
            return Err(ErrorKind::Refused);
        }
        allocation.state = match agent {
            Agent::Stays => State::Running,
            Agent::Ends(exit) => State::Exited(exit),
            Agent::NoProgram | Agent::Unsealed => State::Exited(Exit::NotStarted),
        };
        match agent {
            Agent::NoProgram => Err(ErrorKind::Failed),
            _ => Ok(()),
        }
    }

    /// `Attach`.
    pub fn attach(&mut self, worker: WorkerId) -> Result<State, ErrorKind> {
        Ok(self.existing(worker)?.state)
    }

    /// `Kill`.
    pub fn kill(&mut self, worker: WorkerId) -> Result<(), ErrorKind> {
        self.existing(worker)?;
        self.end(worker, Exit::Unknown);
        Ok(())
    }

    /// `Delete` gets to its end from every state, and only then the slot is free.
    pub fn delete(&mut self, worker: WorkerId) {
        self.workers.remove(&worker);
    }

    /// `List`: at most `page` workers, and whether there are more. How much each has on the disk is the host's affair.
    pub fn list(&self, after: Option<WorkerId>, page: usize) -> (Vec<WorkerInfo>, bool) {
        let info = |(worker, allocation): (WorkerId, &Allocation)| WorkerInfo {
            worker,
            slot: allocation.slot.clone(),
            uid: allocation.uid,
            state: allocation.state,
            disk: None,
        };
        let rest = self
            .workers()
            .filter(|(worker, _)| after.is_none_or(|after| *worker > after));
        let mut listed: Vec<WorkerInfo> = rest.take(page + 1).map(info).collect();
        let more = listed.len() > page;
        listed.truncate(page);
        (listed, more)
    }

    /// All whose record is whole.
    pub fn workers(&self) -> impl Iterator<Item = (WorkerId, &Allocation)> {
        self.workers
            .iter()
            .filter_map(|(id, allocation)| Some((*id, allocation.as_ref()?)))
    }

    /// None also where its record is damaged.
    pub fn get(&self, worker: WorkerId) -> Option<&Allocation> {
        self.workers.get(&worker)?.as_ref()
    }

    /// Its agent ends by itself, or with the host.
    pub fn end(&mut self, worker: WorkerId, exit: Exit) {
        if let Some(Some(allocation)) = self.workers.get_mut(&worker)
            && allocation.state == State::Running
        {
            allocation.state = State::Exited(exit);
        }
    }

    fn existing(&mut self, worker: WorkerId) -> Result<&mut Allocation, ErrorKind> {
        let allocation = self.workers.get_mut(&worker).ok_or(ErrorKind::NoSuchWorker)?;
        allocation.as_mut().ok_or(ErrorKind::Failed)
    }

    fn is_free(&self, uid: u32) -> bool {
        self.uids.contains(&uid)
            && self
                .workers
                .values()
                .flatten()
                .all(|other| other.uid.get() != uid)
    }

    /// The host has given the worker this uid. False if it could not have.
    pub fn settle_for(&mut self, worker: WorkerId, uid: Uid) -> bool {
        let free = self.is_free(uid.get());
        match self.workers.get_mut(&worker) {
            Some(Some(allocation)) if free || allocation.uid == uid => {
                allocation.uid = uid;
                true
            }
            _ => false,
        }
    }

    /// Those with a damaged record may have any slot, so `CreateUser` deletes them before it takes one. That is a step of
    /// its own: another request may come before the slot is taken.
    pub fn delete_damaged(&mut self) {
        self.workers.retain(|_, allocation| allocation.is_some());
    }

    /// Something outside the contract happens: the disk, or a root process, damages the worker's record.
    pub fn damage(&mut self, worker: WorkerId) {
        self.workers
            .entry(worker)
            .and_modify(|allocation| *allocation = None);
    }
}
