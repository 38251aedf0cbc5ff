//! All that is known of one worker id. An id has one entry, and the entry one state: owned, orphan or unknown. So no two collections can disagree about it.

use protocol::{SlotName, WorkerId, WorkerInfo};

use crate::backoff::Backoff;
use crate::call_error::Peer;
use crate::reconcile::ForeignReason;
use crate::worker::{Action, Worker};

/// One worker's id.
#[derive(Debug)]
pub struct Entry {
    /// What it is to this factory.
    pub state: State,
    /// The helper's last list has it.
    pub on_host: Option<WorkerInfo>,
}

/// What a worker is to this factory.
#[derive(Debug)]
pub enum State {
    /// The database has it.
    Owned(Box<Owned>),
    /// The server or the host has it, and it has no owner: it is being deleted.
    Orphan(Box<Orphan>),
    /// The server or the host has it, or had it until a moment ago; nothing is done about it.
    Unknown(Unknown),
}

/// A worker of this factory.
#[derive(Debug)]
pub struct Owned {
    /// As it is saved.
    pub worker: Worker,
    /// To the server and the helper.
    pub calls: Calls,
    /// When it became known: a server list asked for before does not show it.
    pub known: u64,
    /// Since when the server's lists do not show it.
    pub missing_since: Option<u64>,
    /// When to renew its lease; None when it needs no more.
    pub renew_at: Option<u64>,
}

/// A worker without an owner, which is being deleted.
#[derive(Debug)]
pub struct Orphan {
    /// The slot that it occupies on the host.
    pub slot: Option<SlotName>,
    /// How it is deleted.
    pub action: Action,
    /// To the server and the helper.
    pub calls: Calls,
    /// As before it was decided to delete it.
    pub unknown: Unknown,
}

/// What is known of a worker that the database does not have.
#[derive(Clone, Debug, Default)]
pub struct Unknown {
    /// None where the server's last list lacks it.
    pub listed: Option<Listed>,
    /// None where nothing points to another host.
    pub foreign: Option<Foreign>,
    /// The operator wants it deleted.
    pub to_delete: bool,
    /// The number of the input at which it came to its end here: a list asked for before still shows it.
    pub ended: Option<u64>,
}

/// The server's last list has it.
#[derive(Clone, Copy, Debug)]
pub struct Listed {
    /// The number of the input at which a list first showed it.
    pub input_number: u64,
    /// From when on it waits for a slot.
    pub since: u64,
}

/// It may be another host's worker.
#[derive(Clone, Debug)]
pub struct Foreign {
    /// Its owner tag on the server; none where it has not been associated.
    pub private: Option<String>,
    /// What makes it another host's, or may.
    pub why: ForeignReason,
    /// When that was first seen, in milliseconds of the core's time.
    pub since: u64,
    /// When it was last listed.
    pub seen: u64,
}

/// The calls for one worker, one at a time.
#[derive(Debug, Default)]
pub struct Calls {
    /// The one that has no answer yet.
    pub action: Option<Action>,
    /// Failures in a row.
    pub backoff: Backoff,
    /// Not before this time, and because of this peer.
    pub retry: Option<(u64, Peer)>,
    /// The number of the input at which the last one began or ended: a host list asked for before is stale.
    pub touched: u64,
    /// One sentence; empty after a success.
    pub last_error: String,
}

impl Calls {
    /// Does a host list that was requested at this input show what the last call has done?
    pub fn is_settled(&self, input_number: u64) -> bool {
        self.action.is_none() && self.touched < input_number
    }
}

impl Default for Entry {
    fn default() -> Self {
        Self {
            state: State::Unknown(Unknown::default()),
            on_host: None,
        }
    }
}

impl Entry {
    /// None where it is an orphan or unknown.
    pub fn owned(&self) -> Option<&Owned> {
        match &self.state {
            State::Owned(owned) => Some(owned),
            State::Orphan(_) | State::Unknown(_) => None,
        }
    }

    /// The same, to change it.
    pub fn owned_mut(&mut self) -> Option<&mut Owned> {
        match &mut self.state {
            State::Owned(owned) => Some(owned),
            State::Orphan(_) | State::Unknown(_) => None,
        }
    }

    /// None where it has an owner, or is unknown.
    pub fn orphan(&self) -> Option<&Orphan> {
        match &self.state {
            State::Orphan(orphan) => Some(orphan),
            State::Owned(_) | State::Unknown(_) => None,
        }
    }

    /// What is known of it, where the database does not have it.
    pub fn unknown(&self) -> Option<&Unknown> {
        match &self.state {
            State::Owned(_) => None,
            State::Orphan(orphan) => Some(&orphan.unknown),
            State::Unknown(unknown) => Some(unknown),
        }
    }

    /// The same, to change it.
    pub fn unknown_mut(&mut self) -> Option<&mut Unknown> {
        match &mut self.state {
            State::Owned(_) => None,
            State::Orphan(orphan) => Some(&mut orphan.unknown),
            State::Unknown(unknown) => Some(unknown),
        }
    }

    /// None where it is owned, or nothing points to another host.
    pub fn foreign(&self) -> Option<&Foreign> {
        self.unknown()?.foreign.as_ref()
    }

    /// None where nothing is done about it.
    pub fn calls(&self) -> Option<&Calls> {
        match &self.state {
            State::Owned(owned) => Some(&owned.calls),
            State::Orphan(orphan) => Some(&orphan.calls),
            State::Unknown(_) => None,
        }
    }

    /// The same, to change it.
    pub fn calls_mut(&mut self) -> Option<&mut Calls> {
        match &mut self.state {
            State::Owned(owned) => Some(&mut owned.calls),
            State::Orphan(orphan) => Some(&mut orphan.calls),
            State::Unknown(_) => None,
        }
    }

    /// The call that has no answer yet, taken from it.
    pub fn take_call(&mut self) -> Option<Action> {
        self.calls_mut()?.action.take()
    }

    /// The slot that it occupies.
    pub fn slot(&self) -> Option<&SlotName> {
        let on_host = self.on_host.as_ref().map(|info| &info.slot);
        match &self.state {
            State::Owned(owned) => Some(&owned.worker.slot),
            State::Orphan(orphan) => orphan.slot.as_ref().or(on_host),
            State::Unknown(_) => on_host,
        }
    }

    /// Does the database, the server or the host have it, as far as is known?
    pub fn is_present(&self) -> bool {
        match &self.state {
            State::Owned(_) | State::Orphan(_) => true,
            State::Unknown(unknown) => unknown.listed.is_some() || self.on_host.is_some(),
        }
    }

    /// Is anything known of it?
    pub fn is_known(&self) -> bool {
        self.is_present()
            || self
                .unknown()
                .is_some_and(|unknown| unknown.foreign.is_some() || unknown.ended.is_some())
    }

    /// The id is this factory's from now on. What is under way for it is seen to its end.
    pub fn adopt(&mut self, worker: Worker, input_number: u64, renew_at: Option<u64>) {
        let calls = Calls {
            action: self.take_call(),
            touched: input_number,
            ..Calls::default()
        };
        self.state = State::Owned(Box::new(Owned {
            worker,
            calls,
            known: input_number,
            missing_since: None,
            renew_at,
        }));
    }

    /// It has no owner, and is deleted in this way. True where that is news.
    pub fn mark_orphan(&mut self, slot: Option<SlotName>, action: Action) -> bool {
        match &mut self.state {
            State::Orphan(orphan) => {
                (orphan.slot, orphan.action) = (slot, action);
                false
            }
            State::Owned(_) | State::Unknown(_) => {
                let unknown = self.unknown().cloned().unwrap_or_default();
                self.state = State::Orphan(Box::new(Orphan {
                    slot,
                    action,
                    calls: Calls::default(),
                    unknown: Unknown {
                        ended: None,
                        ..unknown
                    },
                }));
                true
            }
        }
    }

    /// It is no longer owned, nor to be deleted.
    pub fn release(&mut self) {
        self.state = State::Unknown(self.unknown().cloned().unwrap_or_default());
    }

    /// It has come to its end at this input: on the host, and on the server if it was there.
    pub fn end(&mut self, input_number: u64) {
        let listed = self.unknown().and_then(|unknown| unknown.listed);
        self.on_host = None;
        self.state = State::Unknown(Unknown {
            listed,
            ended: Some(input_number),
            ..Unknown::default()
        });
    }
}

/// A job that was leased and has no worker yet.
#[derive(Clone, Debug)]
pub struct PendingWorker {
    /// The leased one.
    pub job: crate::buildomat::JobId,
    /// It is taken from the lease on.
    pub slot: SlotName,
    /// The lease's, which is the slot's.
    pub target: protocol::TargetId,
    /// In milliseconds of the core's time.
    pub leased_at: u64,
    /// The number of the input at which its worker was first asked for.
    pub began: u64,
    /// The request is under way; otherwise, its answer was lost at `input_number`, and a list must show
    /// whether the worker was made.
    pub making: bool,
    /// The number of the input of the last request or answer.
    pub input_number: u64,
    /// Failed requests in a row.
    pub backoff: Backoff,
    /// Not before this time, in milliseconds of the core's.
    pub retry_at: u64,
}

/// The ids of this factory's workers, with their slots.
pub fn slots_of<'a>(
    entries: impl Iterator<Item = (&'a WorkerId, &'a Entry)>,
) -> impl Iterator<Item = (WorkerId, SlotName)> {
    entries.filter_map(|(id, entry)| Some((*id, entry.owned()?.worker.slot.clone())))
}
