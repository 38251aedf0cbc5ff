//! A poll: both lists are asked for at the same instant, and they are acted on together once both have answered
//! (or failed). Nothing is decided from a list older than what is decided on.
//!
//! The helper is not asked while the factory is idle: the supervisor is its only client and it makes nothing on its own.
//! So where neither the database nor the server nor the helper's last list has a worker, and nothing is pending that
//! could make one, its next list is empty too, and an idle host is not woken once a second. It is asked again
//! before a job gets a slot, when the server lists a worker, for a status request, and now and then: then what an
//! operator does by a manual command on the host, and a helper that has stopped, are seen.

use std::collections::{BTreeMap, BTreeSet};

use protocol::{WorkerId, WorkerInfo};

use super::entry::{Entry, slots_of};
use super::{Factory, Level, Output, PeerState};
use crate::buildomat::ServerWorker;
use crate::call_error::{CallError, Peer};
use crate::reconcile::{Decision, ReconcileInput, reconcile};
use crate::worker::{Event, FORGOTTEN_MS, HostState, ServerState, Worker};

/// An idle helper is asked this often, for changes that no event announces.
const AT_LEAST_MS: u64 = 30 * 60_000;

/// When the next poll begins, and how far the present one is.
#[derive(Debug)]
pub(super) struct Poll {
    next_at: u64,
    open: Option<OpenPoll>,
    /// The helper answered in the last one.
    helper_answered: bool,
}

#[derive(Debug)]
struct OpenPoll {
    /// When the lists were asked for.
    input_number: u64,
    server_due: bool,
    host_due: bool,
    server: Option<Vec<ServerWorker>>,
    host: Option<Vec<WorkerInfo>>,
}

impl Poll {
    pub(super) fn new(now: u64) -> Self {
        Self {
            next_at: now,
            open: None,
            helper_answered: false,
        }
    }

    pub(super) fn helper_answered(&self) -> bool {
        self.helper_answered
    }

    pub(super) fn next(&self) -> Option<u64> {
        self.open.is_none().then_some(self.next_at)
    }

    /// The poll is not over before the helper has answered; if none is open, one is for the helper alone. False where
    /// it is being asked already.
    pub(super) fn ask_helper(&mut self, input_number: u64) -> bool {
        let open = self.open.get_or_insert(OpenPoll {
            input_number,
            server_due: false,
            host_due: false,
            server: None,
            host: None,
        });
        !std::mem::replace(&mut open.host_due, true)
    }

    pub(super) fn waits_for_helper(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.host_due)
    }
}

impl Factory {
    /// Is there no reason to ask the helper?
    pub(super) fn is_idle(&self, now: u64) -> bool {
        let answered_at = self.helper.answered_at;
        self.is_reconciled
            && !self.helper.is_unreachable
            && answered_at.is_some_and(|at| now.saturating_sub(at) < AT_LEAST_MS)
            && !self.entries.values().any(|entry| entry.is_present())
            && self.pending_workers.is_empty()
            && self.pending_lease.is_none()
    }

    /// Has the helper not been asked for longer than a poll interval, so that a status request should say
    /// [`Input::StatusRequested`] and wait while [`Factory::is_waiting_for_helper`]?
    ///
    /// [`Input::StatusRequested`]: super::Input::StatusRequested
    pub fn must_ask_helper(&self, now: u64) -> bool {
        let poll = self.config.factory.poll_seconds * 1000;
        let answered_at = self.helper.answered_at;
        !self.is_stopped && self.is_idle(now) && answered_at.is_none_or(|at| now.saturating_sub(at) >= poll)
    }

    /// The helper is to be asked, whatever the poll.
    pub(super) fn ask_helper(&mut self) {
        if self.poll.ask_helper(self.input_number) {
            self.out.push(Output::ListHost);
        }
    }

    /// Has the helper been asked, and not answered yet?
    pub fn is_waiting_for_helper(&self) -> bool {
        self.poll.waits_for_helper()
    }
}

impl Factory {
    pub(super) fn begin_poll(&mut self, now: u64) {
        if self.poll.open.is_some() || now < self.poll.next_at {
            return;
        }
        self.poll.next_at = now + self.config.factory.poll_seconds * 1000;
        let server_due = self.server.retry_at <= now;
        let host_due = self.helper.retry_at <= now && !self.is_idle(now);
        if server_due {
            self.out.push(Output::ListServer);
        }
        if host_due {
            self.out.push(Output::ListHost);
        }
        if server_due || host_due {
            self.poll.open = Some(OpenPoll {
                input_number: self.input_number,
                server_due,
                host_due,
                server: None,
                host: None,
            });
        }
    }

    pub(super) fn handle_server_list(&mut self, now: u64, result: Result<Vec<ServerWorker>, CallError>) {
        let list = self.note_answer(now, Peer::Server, result);
        let anybody = list.as_ref().is_some_and(|list| !list.is_empty());
        if let Some(open) = &mut self.poll.open {
            (open.server_due, open.server) = (false, list);
            if anybody && open.host.is_none() && self.is_idle(now) {
                self.ask_helper();
            }
        }
        self.end_poll(now);
    }

    pub(super) fn handle_host_list(&mut self, now: u64, result: Result<Vec<WorkerInfo>, CallError>) {
        let list = self.note_answer(now, Peer::Helper, result);
        if let Some(list) = &list {
            for entry in self.entries.values_mut() {
                entry.on_host = None;
            }
            for info in list {
                let entry = self.entries.entry(info.worker).or_default();
                if entry.unknown().is_none_or(|unknown| unknown.ended.is_none()) {
                    entry.on_host = Some(info.clone());
                }
            }
        }
        if let Some(open) = &mut self.poll.open {
            (open.host_due, open.host) = (false, list);
        }
        self.end_poll(now);
    }

    /// Note that the server or the helper has answered, or not.
    fn note_answer<T>(&mut self, now: u64, peer: Peer, result: Result<T, CallError>) -> Option<T> {
        let state = match peer {
            Peer::Server => &mut self.server,
            Peer::Helper => &mut self.helper,
            // It is asked nothing.
            Peer::Database => return None,
        };
        match result {
            Ok(list) => {
                let first = state.answered_at.is_none() || state.is_unreachable;
                let fresh = PeerState {
                    answered_at: Some(now),
                    ..PeerState::since(if first { now } else { state.since })
                };
                let was = std::mem::replace(state, fresh);
                if was.is_unreachable {
                    self.came_back(now, peer, was.answered_at);
                }
                Some(list)
            }
            Err(error) => {
                let first = !std::mem::replace(&mut state.is_unreachable, true);
                if first {
                    state.since = now;
                }
                state.error = error.sentence.clone();
                state.retry_at = now + state.backoff.fail_with(&error, &mut self.rng);
                if first {
                    self.log(
                        Level::Error,
                        None,
                        format!("{peer} unreachable: {}", error.sentence),
                    );
                }
                None
            }
        }
    }

    /// Whatever waited for this side is tried at once.
    pub(super) fn retry_at_once(&mut self, peer: Peer) {
        for calls in self.entries.values_mut().filter_map(|entry| entry.calls_mut()) {
            calls.retry.take_if(|(_, because)| *because == peer);
        }
    }

    fn came_back(&mut self, now: u64, peer: Peer, answered_at: Option<u64>) {
        self.log(Level::Info, None, format!("{peer} back"));
        self.retry_at_once(peer);
        if peer == Peer::Server {
            self.targets.retry_at_once(now);
        }
        let Some(answered_at) = answered_at.filter(|_| peer == Peer::Server) else {
            return;
        };
        let ms = now.saturating_sub(answered_at);
        // Those that wait for a slot have not waited while the server was unreachable, either.
        for unknown in self.entries.values_mut().filter_map(|entry| entry.unknown_mut()) {
            if let Some(listed) = &mut unknown.listed {
                listed.since = now.min(listed.since + ms);
            }
        }
        let waiting = self.workers().filter(|w| w.phase.is_starting());
        let waiting: Vec<WorkerId> = waiting.map(|w| w.id).collect();
        for id in waiting {
            self.step(now, id, Event::Waited { ms });
        }
    }

    fn end_poll(&mut self, now: u64) {
        let Some(open) = self.poll.open.take_if(|open| !open.server_due && !open.host_due) else {
            return;
        };
        self.poll.helper_answered = open.host.is_some();
        self.update_workers(now, &open);
        if let Some(list) = &open.server {
            self.note_unknown(now, list);
            self.settle_pending_workers(now, open.input_number, list);
        }
        if let (Some(server), Some(host)) = (&open.server, &open.host) {
            self.compare(now, open.input_number, server, host);
            self.move_from_removed_slots(now, open.input_number, host);
            self.is_reconciled = true;
        }
        self.entries.retain(|_, entry| {
            if let Some(unknown) = entry.unknown_mut() {
                unknown
                    .ended
                    .take_if(|input_number| *input_number < open.input_number);
            }
            entry.is_known()
        });
        self.place_lease(now, open.host.is_some());
        if open.server.is_some() {
            self.ask_for_jobs(now);
        }
    }

    /// Let each worker see what both sides say of it.
    fn update_workers(&mut self, now: u64, open: &OpenPoll) {
        let server: Option<BTreeMap<WorkerId, ServerState>> = open
            .server
            .as_ref()
            .map(|list| list.iter().map(|w| (w.id, w.into())).collect());
        let host: Option<BTreeMap<WorkerId, HostState>> = open
            .host
            .as_ref()
            .map(|list| list.iter().map(|i| (i.worker, HostState::Has(i.state))).collect());
        let list = open.server.as_deref().unwrap_or_default();
        let others = list.iter().filter(|w| self.has_another_owner(w));
        let others: BTreeSet<WorkerId> = others.map(|w| w.id).collect();
        let ids: Vec<WorkerId> = self.workers().map(|w| w.id).collect();
        for id in ids {
            if others.contains(&id) && !self.runs_here(id, host.as_ref()) {
                self.leave_to_owner(id, host.is_some(), open.input_number);
                continue;
            }
            let Some(owned) = self.entries.get_mut(&id).and_then(|entry| entry.owned_mut()) else {
                continue;
            };
            // A worker that is newer than the list is not gone; one that is being changed is not absent.
            let (listed, settled) = (
                owned.known < open.input_number,
                owned.calls.is_settled(open.input_number),
            );
            let existed = !owned.worker.phase.is_ending();
            let on_server = server.as_ref().and_then(|list| match list.get(&id) {
                None if !listed => None,
                None => {
                    let since = *owned.missing_since.get_or_insert(now);
                    let believed = !existed || now.saturating_sub(since) >= FORGOTTEN_MS;
                    believed.then_some(ServerState::Gone)
                }
                found => {
                    owned.missing_since = None;
                    found.cloned()
                }
            });
            let on_host = host
                .as_ref()
                .filter(|_| settled)
                .map(|list| *list.get(&id).unwrap_or(&HostState::Absent));
            let gone = on_server == Some(ServerState::Gone);
            self.step(
                now,
                id,
                Event::Seen {
                    server: on_server,
                    host: on_host,
                },
            );
            if gone && existed {
                let text = "the server no longer has the worker".to_owned();
                self.log(Level::Info, Some(id), text);
            }
        }
    }

    /// Adopt or delete what the database does not have.
    fn compare(&mut self, now: u64, input_number: u64, server: &[ServerWorker], host: &[WorkerInfo]) {
        self.expire_foreign(now);
        let pending_slots: BTreeSet<_> = self.pending_workers.iter().map(|p| p.slot.clone()).collect();
        let (mut ended, mut to_delete, mut unknown_for) = (BTreeSet::new(), BTreeSet::new(), BTreeMap::new());
        let unknown = self
            .entries
            .iter()
            .filter_map(|(id, entry)| Some((*id, entry.unknown()?)));
        for (id, unknown) in unknown {
            ended.extend(unknown.ended.filter(|end| *end >= input_number).map(|_| id));
            to_delete.extend(unknown.to_delete.then_some(id));
            unknown_for.extend(
                unknown
                    .listed
                    .map(|listed| (id, now.saturating_sub(listed.since))),
            );
        }
        let decisions = reconcile(&ReconcileInput {
            schedule: &self.schedule,
            identity: &self.identity,
            known: &slots_of(self.entries.iter()).collect(),
            server,
            host,
            pending_slots: &pending_slots,
            ended: &ended,
            unknown_for: &unknown_for,
            online_timeout: self.config.factory.online_timeout_seconds * 1000,
            to_delete: &to_delete,
            foreign_seen: self.foreign_seen,
            is_making: self
                .pending_workers
                .iter()
                .any(|p| p.is_making || p.input_number >= input_number),
            now,
        });
        let orphans = self.entries.iter().filter(|(_, entry)| entry.orphan().is_some());
        let mut before: BTreeSet<WorkerId> = orphans.map(|(id, _)| *id).collect();
        self.reserved_targets.clear();
        self.reserved_slots.clear();
        for decision in decisions {
            match decision {
                Decision::Wait { slot: Some(slot), .. } => drop(self.reserved_slots.insert(slot)),
                Decision::Wait { target, slot: None } => drop(self.reserved_targets.insert(target)),
                Decision::Adopt(worker) => self.adopt(worker),
                Decision::Delete { worker, slot, action } => {
                    before.remove(&worker);
                    let text = format!("orphaned worker: {}", action.name());
                    if self.entries.entry(worker).or_default().mark_orphan(slot, action) {
                        self.log(Level::Warn, Some(worker), text);
                    }
                }
                Decision::Report { worker, why } => {
                    let private = server.iter().find(|w| w.id == worker);
                    let private = private.and_then(|w| w.private.clone());
                    self.report(now, worker, private, why);
                }
            }
        }
        // What is under way is seen to its end; the rest was no orphan after all, or has ended by itself.
        for id in before {
            let entry = self.entries.get_mut(&id);
            let idle =
                |entry: &&mut Entry| entry.orphan().is_some_and(|orphan| orphan.calls.action.is_none());
            if let Some(entry) = entry.filter(idle) {
                entry.release();
            }
        }
    }

    /// A worker that exists becomes this factory's.
    pub(super) fn adopt(&mut self, worker: Worker) {
        let id = worker.id;
        let text = format!("worker adopted as {}", worker.phase.name());
        let renew_at = (worker.phase.is_starting() && worker.job.is_some()).then_some(worker.since);
        self.out.push(Output::Save(worker.clone()));
        let entry = self.entries.entry(id).or_default();
        entry.adopt(worker, self.input_number, renew_at);
        self.log(Level::Info, Some(id), text);
    }
}
