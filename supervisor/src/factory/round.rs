//! A round: both lists are asked for at the same instant, and what they say together is acted on once
//! both have answered (or failed). It must never decide anything from a list older than what it decides on.
//! The helper's is left out where there is no reason to ask (`quiet`), and asked for later where one comes up.

use std::collections::{BTreeMap, BTreeSet};

use protocol::{WorkerId, WorkerInfo};

use super::{Factory, Level, Output, Partner, Runtime, Stranger};
use crate::reconcile::{Decision, Question, reconcile};
use crate::view::{ServerWorker, Side, Trouble};
use crate::worker::{Event, FORGOTTEN_MS, OnHost, OnServer};

/// The rounds: when the next begins, and how far the present one is.
#[derive(Debug)]
pub(super) struct Round {
    next_at: u64,
    open: Option<Open>,
    /// The helper was heard in the last one.
    heard_the_host: bool,
}

#[derive(Debug)]
struct Open {
    /// When the lists were asked for.
    turn: u64,
    server_due: bool,
    host_due: bool,
    server: Option<Vec<ServerWorker>>,
    host: Option<Vec<WorkerInfo>>,
}

impl Round {
    pub(super) fn new(now: u64) -> Self {
        Self {
            next_at: now,
            open: None,
            heard_the_host: false,
        }
    }

    pub(super) fn heard_the_host(&self) -> bool {
        self.heard_the_host
    }

    pub(super) fn next(&self) -> Option<u64> {
        self.open.is_none().then_some(self.next_at)
    }

    /// The round is not over before the helper has answered; if none is open, one is for the helper alone. False where
    /// it is being asked already.
    pub(super) fn ask_the_host(&mut self, turn: u64) -> bool {
        let open = self.open.get_or_insert(Open {
            turn,
            server_due: false,
            host_due: false,
            server: None,
            host: None,
        });
        !std::mem::replace(&mut open.host_due, true)
    }

    pub(super) fn waits_for_the_host(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.host_due)
    }
}

impl Factory {
    pub(super) fn begin_round(&mut self, now: u64) {
        if self.round.open.is_some() || now < self.round.next_at {
            return;
        }
        self.round.next_at = now + self.config.factory.poll_seconds * 1000;
        let server_due = self.server.retry_at <= now;
        let host_due = self.helper.retry_at <= now && !self.is_quiet(now);
        if server_due {
            self.out.push(Output::ListServer);
        }
        if host_due {
            self.out.push(Output::ListHost);
        }
        if server_due || host_due {
            self.round.open = Some(Open {
                turn: self.turn,
                server_due,
                host_due,
                server: None,
                host: None,
            });
        }
    }

    pub(super) fn server_listed(&mut self, now: u64, result: Result<Vec<ServerWorker>, Trouble>) {
        let list = self.heard(now, Side::Server, result);
        let anybody = list.as_ref().is_some_and(|list| !list.is_empty());
        if let Some(open) = &mut self.round.open {
            (open.server_due, open.server) = (false, list);
            if anybody && open.host.is_none() && self.is_quiet(now) {
                self.ask_the_host();
            }
        }
        self.end_round(now);
    }

    pub(super) fn host_listed(&mut self, now: u64, result: Result<Vec<WorkerInfo>, Trouble>) {
        let list = self.heard(now, Side::Helper, result);
        if let Some(list) = &list {
            let there = list.iter().filter(|info| !self.ended.contains_key(&info.worker));
            self.on_host = there.map(|info| (info.worker, info.clone())).collect();
        }
        if let Some(open) = &mut self.round.open {
            (open.host_due, open.host) = (false, list);
        }
        self.end_round(now);
    }

    /// Note that one of the partners has answered, or not.
    fn heard<T>(&mut self, now: u64, side: Side, result: Result<T, Trouble>) -> Option<T> {
        let partner = match side {
            Side::Server => &mut self.server,
            Side::Helper => &mut self.helper,
            // It is asked nothing.
            Side::Database => return None,
        };
        match result {
            Ok(list) => {
                let first = partner.answered_at.is_none() || partner.away;
                let fresh = Partner {
                    answered_at: Some(now),
                    ..Partner::since(if first { now } else { partner.since })
                };
                let was = std::mem::replace(partner, fresh);
                if was.away {
                    self.came_back(now, side, was.answered_at);
                }
                Some(list)
            }
            Err(trouble) => {
                let first = !std::mem::replace(&mut partner.away, true);
                if first {
                    partner.since = now;
                }
                partner.trouble = trouble.sentence.clone();
                partner.retry_at = now + partner.backoff.fail_with(&trouble, &mut self.rng);
                if first {
                    self.say(Level::Error, None, format!("{side} away: {}", trouble.sentence));
                }
                None
            }
        }
    }

    /// Whatever waited for this side is tried at once.
    pub(super) fn retry_at_once(&mut self, side: Side) {
        for runtime in self.runtimes.values_mut() {
            if runtime.retry.is_some_and(|(_, because)| because == side) {
                runtime.retry = None;
            }
        }
    }

    fn came_back(&mut self, now: u64, side: Side, answered_at: Option<u64>) {
        self.say(Level::Info, None, format!("{side} back"));
        self.retry_at_once(side);
        let Some(answered_at) = answered_at.filter(|_| side == Side::Server) else {
            return;
        };
        let ms = now.saturating_sub(answered_at);
        // Those that wait for a slot have not waited while the server was away, either.
        for stranger in self.strangers.values_mut() {
            stranger.since = now.min(stranger.since + ms);
        }
        let waiting: Vec<WorkerId> = self
            .workers
            .values()
            .filter(|w| w.phase.is_starting())
            .map(|w| w.id)
            .collect();
        for id in waiting {
            self.event(now, id, Event::Waited { ms });
        }
    }

    fn end_round(&mut self, now: u64) {
        let Some(open) = self.round.open.take_if(|open| !open.server_due && !open.host_due) else {
            return;
        };
        self.round.heard_the_host = open.host.is_some();
        self.show_each(now, &open);
        if let Some(list) = &open.server {
            self.meet_strangers(now, list);
            self.settle_promises(now, open.turn, list);
        }
        if let (Some(server), Some(host)) = (&open.server, &open.host) {
            self.compare(now, open.turn, server, host);
            self.move_from_removed_slots(now, open.turn, host);
            self.reconciled = true;
        }
        self.ended.retain(|_, turn| *turn >= open.turn);
        self.place(now, open.host.is_some());
        if open.server.is_some() {
            self.ask_for_jobs(now);
        }
    }

    /// Let each worker see what both sides say of it.
    fn show_each(&mut self, now: u64, open: &Open) {
        let server: Option<BTreeMap<WorkerId, OnServer>> = open
            .server
            .as_ref()
            .map(|list| list.iter().map(|w| (w.id, w.into())).collect());
        let host: Option<BTreeMap<WorkerId, OnHost>> = open
            .host
            .as_ref()
            .map(|list| list.iter().map(|i| (i.worker, OnHost::Has(i.state))).collect());
        let ids: Vec<WorkerId> = self.workers.keys().copied().collect();
        let others = self.with_other_owners(open.server.as_deref().unwrap_or_default());
        for id in ids {
            if others.contains(&id) && !self.runs_here(id, host.as_ref()) {
                self.let_go(id, host.is_some(), open.turn);
                continue;
            }
            let runtime = self.runtimes.entry(id).or_default();
            // A worker that is newer than the list is not gone; one that is being changed is not absent.
            let (listed, settled) = (
                runtime.known < open.turn,
                runtime.doing.is_none() && runtime.touched < open.turn,
            );
            let lived = self.workers.get(&id).is_some_and(|w| !w.phase.is_ending());
            let on_server = server.as_ref().and_then(|list| match list.get(&id) {
                None if !listed => None,
                None => {
                    let since = *runtime.missing_since.get_or_insert(now);
                    let believed = !lived || now.saturating_sub(since) >= FORGOTTEN_MS;
                    believed.then_some(OnServer::Gone)
                }
                view => {
                    runtime.missing_since = None;
                    view.cloned()
                }
            });
            let on_host = host
                .as_ref()
                .filter(|_| settled)
                .map(|list| *list.get(&id).unwrap_or(&OnHost::Absent));
            let gone = on_server == Some(OnServer::Gone);
            self.event(
                now,
                id,
                Event::Seen {
                    server: on_server,
                    host: on_host,
                },
            );
            if gone && lived {
                let text = "the server no longer has the worker".to_owned();
                self.say(Level::Info, Some(id), text);
            }
        }
    }

    /// Remember since when a list has shown those that the store does not know.
    fn meet_strangers(&mut self, now: u64, list: &[ServerWorker]) {
        let mut before = std::mem::take(&mut self.strangers);
        for w in list.iter().filter(|w| !self.workers.contains_key(&w.id)) {
            let new = Stranger {
                turn: self.turn,
                since: now,
            };
            let mut stranger = before.remove(&w.id).unwrap_or(new);
            // It waits for a person, not for a slot.
            if w.hold {
                stranger.since = now;
            }
            self.strangers.insert(w.id, stranger);
        }
    }

    /// Give an owner or an end to what the store does not know.
    fn compare(&mut self, now: u64, turn: u64, server: &[ServerWorker], host: &[WorkerInfo]) {
        self.foreign.retain(now, server);
        let promised: BTreeSet<_> = self.promises.iter().map(|p| p.slot.clone()).collect();
        let ended: BTreeSet<WorkerId> = self
            .ended
            .iter()
            .filter(|(_, end)| **end >= turn)
            .map(|(id, _)| *id)
            .collect();
        let strangers = self.strangers.iter();
        let unknown_for = strangers.map(|(id, s)| (*id, now.saturating_sub(s.since)));
        let decisions = reconcile(&Question {
            plan: &self.plan,
            identity: &self.identity,
            known: &self.workers,
            server,
            host,
            promised: &promised,
            ended: &ended,
            unknown_for: &unknown_for.collect(),
            online_timeout: self.config.factory.online_timeout_seconds * 1000,
            to_delete: self.foreign.to_delete(),
            others_seen: self.foreign.others_seen(),
            making: self.promises.iter().any(|p| p.making || p.turn >= turn),
            now,
        });
        let before = std::mem::take(&mut self.strays);
        self.awaited.clear();
        for decision in decisions {
            match decision {
                Decision::Wait(target) => drop(self.awaited.insert(target)),
                Decision::Adopt(worker) => self.adopt(worker),
                Decision::End { worker, slot, action } => {
                    if !before.contains_key(&worker) {
                        let text = format!("nobody's worker: {}", action.name());
                        self.say(Level::Warn, Some(worker), text);
                    }
                    self.strays.insert(worker, (slot, action));
                }
                Decision::Report { worker, why } => {
                    let private = server.iter().find(|w| w.id == worker);
                    let private = private.and_then(|w| w.private.clone());
                    self.report(now, worker, private, why);
                }
            }
        }
        // What is under way is seen to its end; the rest was no stray after all, or has ended by itself.
        for (id, stray) in before {
            let busy = self.runtimes.get(&id).is_some_and(|r| r.doing.is_some());
            if busy && !self.workers.contains_key(&id) {
                self.strays.entry(id).or_insert(stray);
            } else if !self.strays.contains_key(&id) && !self.workers.contains_key(&id) {
                self.runtimes.remove(&id);
            }
        }
    }

    /// A worker that exists becomes one of the store's.
    pub(super) fn adopt(&mut self, worker: crate::worker::Worker) {
        let id = worker.id;
        let text = format!("worker taken on as {}", worker.phase.name());
        let renew_at = (worker.phase.is_starting() && worker.job.is_some()).then_some(worker.since);
        let runtime = self.runtimes.entry(id).or_default();
        *runtime = Runtime {
            doing: runtime.doing.take(),
            touched: self.turn,
            known: self.turn,
            renew_at,
            ..Runtime::default()
        };
        self.strays.remove(&id);
        self.foreign.forget(id);
        self.out.push(Output::Save(worker.clone()));
        self.workers.insert(id, worker);
        self.say(Level::Info, Some(id), text);
    }
}
