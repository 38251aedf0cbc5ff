//! All that is known of one worker id. An id has one entry, and the entry one state: owned, orphan or unknown. So no two collections can disagree about it.

use protocol::{SlotName, WorkerId, WorkerInfo};

use crate::backoff::Backoff;
use crate::call_error::Peer;
use crate::reconcile::ForeignReason;
use crate::worker::{Action, Worker};

/// One worker's id.
#[derive(Debug)]
pub struct Entry {
    /// What the worker is to this factory.
    pub state: State,
    /// The worker as the helper's last list shows it; none where that list lacks it.
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
    /// The worker as the database has it.
    pub worker: Worker,
    /// The calls to the server and the helper for it.
    pub calls: Calls,
    /// The number of the input at which it became known: a server list requested before does not show it.
    pub known: u64,
    /// Since when the server's lists do not show it, in milliseconds of the core's time; none while they do.
    pub missing_since: Option<u64>,
    /// When to renew its lease, in milliseconds of the core's time; none if it needs no renewal any more.
    pub renew_at: Option<u64>,
}

/// A worker without an owner, which is being deleted.
#[derive(Debug)]
pub struct Orphan {
    /// The slot that it occupies on the host.
    pub slot: Option<SlotName>,
    /// The action that deletes it: on the host, or on the server.
    pub action: Action,
    /// The calls to the server and the helper for it.
    pub calls: Calls,
    /// What was known of it before it was decided to delete it.
    pub unknown: Unknown,
}

/// What is known of a worker that the database does not have.
#[derive(Clone, Debug, Default)]
pub struct Unknown {
    /// What the server's last list says of it; none where that list lacks it.
    pub listed: Option<ListEntry>,
    /// Why it may belong to another host; none where nothing points to one.
    pub foreign: Option<ForeignInfo>,
    /// The operator wants it deleted.
    pub to_delete: bool,
    /// The number of the input at which it came to its end here: a list asked for before still shows it.
    pub ended: Option<u64>,
}

/// What the core notes of a worker that the server's last list has.
#[derive(Clone, Copy, Debug)]
pub struct ListEntry {
    /// The number of the input at which a list first showed it.
    pub input_number: u64,
    /// Since when it waits for a slot, in milliseconds of the core's time.
    pub since: u64,
}

/// A worker that may belong to another host.
#[derive(Clone, Debug)]
pub struct ForeignInfo {
    /// Its owner tag on the server; none where it has not been associated.
    pub private: Option<String>,
    /// Why it may belong to another host.
    pub why: ForeignReason,
    /// When that was first seen, in milliseconds of the core's time.
    pub since: u64,
    /// When the server last listed it, in milliseconds of the core's time.
    pub seen: u64,
}

/// The calls for one worker, one at a time.
#[derive(Debug, Default)]
pub struct Calls {
    /// The action whose call has no answer yet; none while no call is under way.
    pub action: Option<Action>,
    /// The pause after consecutive failures.
    pub backoff: Backoff,
    /// No call is made before this time (milliseconds of the core's), because a call to this peer failed.
    pub retry: Option<(u64, Peer)>,
    /// The number of the input at which the last call began or ended: a host list requested before is stale.
    pub touched: u64,
    /// Why the last call failed, in one sentence; empty after a success.
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
    /// The worker that this factory owns; none where it is an orphan or unknown.
    pub fn owned(&self) -> Option<&Owned> {
        match &self.state {
            State::Owned(owned) => Some(owned),
            State::Orphan(_) | State::Unknown(_) => None,
        }
    }

    /// [`Entry::owned`], mutable.
    pub fn owned_mut(&mut self) -> Option<&mut Owned> {
        match &mut self.state {
            State::Owned(owned) => Some(owned),
            State::Orphan(_) | State::Unknown(_) => None,
        }
    }

    /// The orphan that is being deleted; none where the worker has an owner, or is unknown.
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

    /// [`Entry::unknown`], mutable.
    pub fn unknown_mut(&mut self) -> Option<&mut Unknown> {
        match &mut self.state {
            State::Owned(_) => None,
            State::Orphan(orphan) => Some(&mut orphan.unknown),
            State::Unknown(unknown) => Some(unknown),
        }
    }

    /// Why it may belong to another host; none where it is owned, or nothing points to one.
    pub fn foreign(&self) -> Option<&ForeignInfo> {
        self.unknown()?.foreign.as_ref()
    }

    /// The calls for it; none where nothing is done about it.
    pub fn calls(&self) -> Option<&Calls> {
        match &self.state {
            State::Owned(owned) => Some(&owned.calls),
            State::Orphan(orphan) => Some(&orphan.calls),
            State::Unknown(_) => None,
        }
    }

    /// [`Entry::calls`], mutable.
    pub fn calls_mut(&mut self) -> Option<&mut Calls> {
        match &mut self.state {
            State::Owned(owned) => Some(&mut owned.calls),
            State::Orphan(orphan) => Some(&mut orphan.calls),
            State::Unknown(_) => None,
        }
    }

    /// Take the action whose call has no answer yet.
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
    /// The leased job.
    pub job: crate::buildomat::JobId,
    /// The slot, which is occupied from the lease on.
    pub slot: SlotName,
    /// The target of the lease and of the slot.
    pub target: protocol::TargetId,
    /// When it was leased, in milliseconds of the core's time.
    pub leased_at: u64,
    /// The number of the input at which its worker was first asked for.
    pub began: u64,
    /// Is the request to make the worker under way? Otherwise its answer was lost at `input_number`, and a list must
    /// show whether the worker was made.
    pub is_making: bool,
    /// The number of the input of the last request or answer.
    pub input_number: u64,
    /// The pause after consecutive failed requests.
    pub backoff: Backoff,
    /// No request is made before this time, in milliseconds of the core's.
    pub retry_at: u64,
}

/// The ids of this factory's workers, with their slots.
pub fn slots_of<'a>(
    entries: impl Iterator<Item = (&'a WorkerId, &'a Entry)>,
) -> impl Iterator<Item = (WorkerId, SlotName)> {
    entries.filter_map(|(id, entry)| Some((*id, entry.owned()?.worker.slot.clone())))
}
