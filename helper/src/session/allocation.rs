//! Taking a slot for a worker, and giving it back: what is written down first when a user is made, and what goes
//! last when it is deleted. Each can be cut off anywhere, and repeated.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg, OFlag};
use protocol::config::Config;
use protocol::{Error, ErrorKind, SlotName, Uid, UserName, WorkerId};

use crate::host::directory::open_file;
use crate::host::record::{self, Record, RecordState, Worker};
use crate::host::{Host, cgroup, misconfigured, users};
use crate::log::warn;
use crate::monitor_ipc::{Failure, from};
use crate::sandbox::{devices, usb, writable_dirs};
use crate::session::policy::{self, SlotError};
use crate::sys;
use crate::unprivileged::kill_all;

/// How the quota of a worker that has nothing on disk any more is forgotten.
pub type CleanUp<'a> = &'a dyn Fn(WorkerId, Uid) -> Result<(), Failure>;

/// Why `CreateUser` was not done.
#[derive(Debug)]
pub enum CreateUserError {
    /// The slot is not there, or not free.
    Slot(SlotError),
    /// The worker has another slot than the one that is asked for.
    HasOtherSlot {
        /// The worker of the request.
        worker: WorkerId,
        /// The slot in the worker's record.
        has: SlotName,
        /// The slot of the request.
        asked: SlotName,
    },
    /// Each uid of the range has a worker, a process or an account.
    NoFreeUid,
    /// The configuration has a mistake, or the slot names what the host lacks.
    Misconfigured(anyhow::Error),
    /// The host could not, for example because the disk is full.
    Host(Failure),
}

from!(CreateUserError { Slot(SlotError), Host(anyhow::Error) });

impl From<CreateUserError> for Error {
    fn from(error: CreateUserError) -> Error {
        match error {
            CreateUserError::Slot(error) => error.into(),
            CreateUserError::HasOtherSlot { worker, has, asked } => Error::new(
                ErrorKind::Refused,
                format!("worker {worker} has slot {has}, it cannot have {asked} as well"),
            ),
            CreateUserError::NoFreeUid => Error::new(
                ErrorKind::Limit,
                "every uid of factory.uid_range is in use: widen it",
            ),
            CreateUserError::Misconfigured(error) => misconfigured(error),
            CreateUserError::Host(failure) => failure.into(),
        }
    }
}

/// The worker's uid and name: made now, or before.
pub fn create_user(
    host: &Host,
    clean_up: CleanUp<'_>,
    id: WorkerId,
    slot: &SlotName,
) -> Result<(Uid, UserName), CreateUserError> {
    let (config, _) = host.configuration().map_err(CreateUserError::Misconfigured)?;
    let slot_config = config.slots.get(slot);
    let slot_config = slot_config.ok_or_else(|| SlotError::NoSuchSlot(slot.clone()))?;
    users::groups(host, &slot_config.add_to_groups).map_err(CreateUserError::Misconfigured)?;
    let mut worker = Worker::find_or_make(host, id)?;
    let record = match worker.record_state.clone() {
        RecordState::Record(record) if record.slot == *slot => record,
        RecordState::Record(Record { slot: has, .. }) => {
            let (worker, asked) = (id, slot.clone());
            return Err(CreateUserError::HasOtherSlot { worker, has, asked });
        }
        RecordState::Damaged => return Err(record::damaged_record_error(id).into()),
        RecordState::Nothing => match take_slot(host, clean_up, &config, &mut worker, slot) {
            Ok(record) => record,
            Err(error) => {
                // Nothing was made: leave nothing, not even the empty directory.
                let _ = worker.remove(host);
                return Err(error);
            }
        },
    };
    users::write_userdb(host.userdb.as_fd(), &worker.user(), record.uid, slot)?;
    Ok((record.uid, worker.user()))
}

/// The one moment in which workers wait for each other: who has what is looked up and written down
/// under a lock.
fn take_slot(
    host: &Host,
    clean_up: CleanUp<'_>,
    config: &Config,
    worker: &mut Worker,
    slot: &SlotName,
) -> Result<Record, CreateUserError> {
    let (_lock, all) = loop {
        let lock = lock_slots(host)?;
        let all = record::list(host)?;
        if all.damaged.is_empty() {
            break (lock, all);
        }
        // Their deletion takes the lock itself, in its end.
        drop(lock);
        // It may have this slot, or any other: none is given before nothing is left of it.
        for id in all.damaged {
            delete(host, clean_up, id).map_err(Error::from).with_context(|| {
                format!("no slot is free before worker {id}, whose record is damaged, is deleted")
            })?;
            warn!("deleted, because its record was damaged worker={id}");
        }
    };
    policy::may_take(config, &all.workers, worker.id, slot)?;
    let used: BTreeSet<u32> = all.workers.iter().map(|(_, record)| record.uid.get()).collect();
    let accounts = host.accounts()?;
    for uid in policy::candidates(config.factory.uid_range, worker.id, &used) {
        let is_known = users::is_in_userdb(&host.userdb, uid) || accounts.has(uid);
        if !is_known && !sys::has_process_of(uid.get()).context("cannot look for processes")? {
            let record = Record::new(slot.clone(), uid);
            worker.write_record(record.clone())?;
            return Ok(record);
        }
    }
    Err(CreateUserError::NoFreeUid)
}

fn lock_slots(host: &Host) -> Result<Flock<OwnedFd>> {
    let lock = open_file(&host.workers, ".lock", OFlag::O_RDWR | OFlag::O_CREAT)
        .context("cannot open the slots' lock")?;
    Flock::lock(OwnedFd::from(lock), FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .context("cannot lock the slots")
}

/// Remove every trace of the worker; its slot is free after that.
pub fn delete(host: &Host, clean_up: CleanUp<'_>, id: WorkerId) -> Result<(), Failure> {
    let Some(worker) = Worker::find(host, id)? else {
        return Ok(());
    };
    let (uid, is_recorded) = match &worker.record_state {
        RecordState::Record(record) => (Some(record.uid), true),
        // The owner of its writable directories tells, so they go last; or what the host was told, where it had none yet.
        _ => match writable_dirs::owner(worker.dir())? {
            None => (users::uid_in_userdb(host.userdb.as_fd(), &worker.user())?, false),
            owner => (owner, false),
        },
    };
    let forget = || {
        uid.map_or(Ok(()), |uid| {
            users::remove_userdb(host.userdb.as_fd(), &worker.user(), uid)
        })
    };
    cgroup::kill_and_remove(&host.cgroups, worker.id)?;
    uid.map_or(Ok(()), kill_all)?;
    if !is_recorded {
        forget()?;
    }
    writable_dirs::remove(worker.dir(), uid)?;
    if let Some(uid) = uid.filter(|_| is_recorded)
        && (host.abilities.has_user_quotas
            || usb::has_some(host, id).context("cannot look for the worker's USB devices")?)
    {
        clean_up(id, uid)?;
    }
    devices::remove(host, id)?;
    if is_recorded {
        forget()?;
    }
    worker.remove_files()?;
    // Its record goes before its directory: who sees the slot free must not see that one either.
    let _lock = lock_slots(host)?;
    Ok(worker.remove(host)?)
}
