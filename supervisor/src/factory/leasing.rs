//! From a lease to a worker: asking for jobs, keeping leases alive, and making workers on the server.
//!
//! Making a worker is the one call that is not idempotent: where its answer is lost, a later list shows whether the
//! worker was made.

use std::collections::BTreeSet;

use protocol::{SlotName, TargetId, WorkerId, WorkerInfo};

use super::entry::PendingWorker;
use super::{Factory, Level, Output, RENEW_MS};
use crate::backoff::Backoff;
use crate::buildomat::{JobId, LEASE_MS, Lease, ServerWorker};
use crate::call_error::{CallError, Peer};
use crate::reconcile::adopted;
use crate::schedule::FreeSlots;
use crate::worker::{Event, Phase};

/// A worker is made for a lease at most this long after the lease began, in milliseconds: not for one that is about to
/// end.
const USABLE_LEASE_MS: u64 = LEASE_MS - 10_000;
/// A worker whose making was not answered is looked at for so long before it is taken for it: another host with the
/// same token would have associated one of its own by then.
const CLAIM_MS: u64 = 10_000;

impl Factory {
    /// The slots that may take a job now.
    pub fn available(&self, now: u64) -> Vec<SlotName> {
        self.free(now).slots().cloned().collect()
    }

    fn free(&self, now: u64) -> FreeSlots<'_> {
        self.free_beside(now, &self.taken())
    }

    fn free_beside(&self, now: u64, used: &BTreeSet<SlotName>) -> FreeSlots<'_> {
        let cooling_down = self.cooldowns.iter().filter(|(_, cooldown)| cooldown.until > now);
        let drained = self.drains.keys().flatten();
        let closed = drained.chain(self.usb_absences.keys());
        let excluded = cooling_down.map(|(slot, _)| slot).chain(closed);
        self.schedule.free(used, excluded)
    }

    /// The used slots, and those for which a worker waits.
    pub(crate) fn taken(&self) -> BTreeSet<SlotName> {
        &self.used() | &self.reserved_slots
    }

    /// Slots for which a worker that was lost waits.
    pub(crate) fn reserved_slots(&self) -> &BTreeSet<SlotName> {
        &self.reserved_slots
    }

    /// The slots that have a worker, or a job that is to get one, or a worker that only the helper's list shows.
    pub fn used(&self) -> BTreeSet<SlotName> {
        let mut used: BTreeSet<SlotName> = self.entries.values().filter_map(|e| e.slot().cloned()).collect();
        used.extend(self.pending_workers.iter().map(|p| p.slot.clone()));
        used
    }

    /// Ask for a job. With no slot free this still shows the server that the factory is running.
    pub(super) fn ask_for_jobs(&mut self, now: u64) {
        let failed = self.lease_failed.as_ref();
        let waits = failed.is_some_and(|failure| failure.retry_at > now);
        if self.is_leasing || waits || self.is_stopped || !self.is_reconciled {
            return;
        }
        let closed = self.not_asked_for().is_some() || now < self.no_jobs_until;
        let mut targets = if closed {
            BTreeSet::new()
        } else {
            self.free(now).targets()
        };
        targets.retain(|target| !self.reserved_targets.contains(target));
        self.is_leasing = true;
        self.out.push(Output::Lease(targets));
    }

    pub(super) fn leased(&mut self, now: u64, result: Result<Option<Lease>, CallError>) {
        self.is_leasing = false;
        let lease = match result {
            Ok(lease) => lease,
            Err(error) => return self.lease_failed(now, error),
        };
        if self.lease_failed.take().is_some() {
            self.log(
                Level::Info,
                None,
                "the server answers again whether there is a job".into(),
            );
        }
        let Some(lease) = lease else {
            self.last_lease_error.clear();
            return;
        };
        if let Some(pending) = self.pending_workers.iter_mut().find(|p| p.job == lease.job) {
            // The server has forgotten the first lease; one worker is enough.
            pending.leased_at = now;
            return;
        }
        if let Some((_, leased_at)) = self
            .pending_lease
            .as_mut()
            .filter(|(other, _)| other.job == lease.job)
        {
            *leased_at = now;
            return;
        }
        if self.is_idle(now) && !self.poll.helper_answered() && !self.is_stopped {
            // The helper may have become unreachable since it was last asked, or an operator may use the slot by a
            // manual command.
            self.pending_lease = Some((lease, now));
            return self.ask_helper();
        }
        self.begin_job(now, lease, now);
    }

    fn lease_failed(&mut self, now: u64, error: CallError) {
        let mut failure = self.lease_failed.take().unwrap_or_default();
        failure.retry_at = now + failure.backoff.fail_with(&error, &mut self.rng);
        if failure.sentence != error.sentence {
            let text = format!("cannot ask for jobs: {}", error.sentence);
            self.log(Level::Warn, None, text);
            failure.sentence = error.sentence;
        }
        self.lease_failed = Some(failure);
    }

    /// Begin the job for which the helper was asked, once it has answered and a slot is free; or leave it to others, with
    /// the end of its lease.
    pub(super) fn place_lease(&mut self, now: u64, helper_answered: bool) {
        let Some((lease, leased_at)) = self.pending_lease.take() else {
            return;
        };
        let free = helper_answered && self.free(now).pick(lease.target).is_some();
        if now >= leased_at + USABLE_LEASE_MS {
            let why = if helper_answered {
                "no slot for it is free"
            } else {
                "the helper is unreachable"
            };
            let text = format!("the lease of job {} will expire: {why}", lease.job);
            self.log(Level::Warn, None, text);
        } else if free {
            self.begin_job(now, lease, leased_at);
        } else {
            self.pending_lease = Some((lease, leased_at));
        }
    }

    fn begin_job(&mut self, now: u64, lease: Lease, leased_at: u64) {
        if now < self.no_jobs_until {
            // A server may give a job that it was not asked for, or was asked for before it refused a worker. Its lease
            // expires; that the server makes no worker is logged already.
            return;
        }
        let slot = self.free(now).pick(lease.target).cloned();
        let Some(slot) = slot.filter(|_| {
            !self.is_stopped && !self.is_draining() && self.file_differs.is_none() && self.storage.is_none()
        }) else {
            let error = format!("a job of target {} finds no slot", lease.target);
            if self.last_lease_error != error {
                let text = format!("{error}: the lease of job {} will expire", lease.job);
                self.log(Level::Warn, None, text);
                self.last_lease_error = error;
            }
            return;
        };
        let pending = PendingWorker {
            job: lease.job.clone(),
            slot,
            target: lease.target,
            leased_at,
            began: self.input_number,
            is_making: true,
            input_number: self.input_number,
            backoff: Backoff::default(),
            retry_at: now,
        };
        self.pending_workers.push(pending);
        self.out.push(Output::MakeWorker {
            target: lease.target,
            job: lease.job,
        });
        if !self.free(now).is_empty() {
            self.ask_for_jobs(now);
        }
    }

    pub(super) fn worker_made(&mut self, now: u64, job: &JobId, result: Result<ServerWorker, CallError>) {
        let Some(at) = self
            .pending_workers
            .iter()
            .position(|p| p.job == *job && p.is_making)
        else {
            return;
        };
        match result {
            Ok(worker) => {
                let pending = self.pending_workers.remove(at);
                (self.no_jobs, self.no_jobs_until) = (Backoff::default(), 0);
                self.last_make_error.clear();
                self.keep(now, pending, &worker);
            }
            Err(error) => {
                if self.last_make_error != error.sentence {
                    let text = format!("no worker for job {job}: {}", error.sentence);
                    self.log(Level::Warn, None, text);
                    self.last_make_error.clone_from(&error.sentence);
                }
                if error.refused {
                    self.pending_workers.remove(at);
                    self.take_no_jobs_for_a_while(now);
                } else {
                    let pending = &mut self.pending_workers[at];
                    (pending.is_making, pending.input_number) = (false, self.input_number);
                    pending.retry_at = now + pending.backoff.fail_with(&error, &mut self.rng);
                }
            }
        }
    }

    /// There may be any number of jobs for which no worker can be made: they are not all asked for at once.
    fn take_no_jobs_for_a_while(&mut self, now: u64) {
        self.no_jobs_until = now + self.no_jobs.fail(Peer::Server, &mut self.rng);
    }

    fn keep(&mut self, now: u64, pending: PendingWorker, worker: &ServerWorker) {
        // A worker that this factory knows already has its slot.
        if self.owned(worker.id).is_some() {
            return;
        }
        let mut slot = pending.slot;
        if !self.has_slot_for(&slot, worker.target) {
            // The configuration has changed since. Without a slot it is an unknown worker, which may wait for one.
            match self.free(now).pick(worker.target).cloned() {
                Some(other) => slot = other,
                None => return,
            }
        }
        let mut worker = adopted(worker, slot, Phase::Reserved, now);
        worker.job = Some(pending.job);
        self.adopt(worker);
    }

    /// Is this slot in the configuration, for this target? One whose target is not looked up yet may be.
    fn has_slot_for(&self, slot: &SlotName, target: TargetId) -> bool {
        self.schedule.may_have(slot, target)
    }

    /// A worker that has not started its agent, and whose slot is no longer in the configuration, gets another slot of
    /// its target, or waits for one. `host` was requested at this input: what was done since is not in it.
    pub(super) fn move_from_removed_slots(&mut self, now: u64, input_number: u64, host: &[WorkerInfo]) {
        let gone = self.entries.values().filter_map(|entry| entry.owned());
        let gone = gone.filter(|owned| {
            let w = &owned.worker;
            owned.calls.is_settled(input_number)
                && w.phase.is_unstarted()
                && !w.hold
                && !self.has_slot_for(&w.slot, w.target)
        });
        let gone: Vec<(WorkerId, SlotName, TargetId)> = gone
            .map(|owned| (owned.worker.id, owned.worker.slot.clone(), owned.worker.target))
            .collect();
        for (id, slot, target) in gone {
            let text = format!("slot {slot} is no longer in the configuration");
            // The host has nothing in it: it must not count beside the slot that the worker gets.
            let mut used = self.taken();
            used.remove(&slot);
            if host.iter().any(|info| info.worker == id) {
                self.step(now, id, Event::SlotRemoved);
            } else if let Some(slot) = self.free_beside(now, &used).pick(target).cloned() {
                let text = format!("{text}: the worker gets slot {slot}");
                self.step(now, id, Event::SlotChanged(slot));
                self.log(Level::Info, Some(id), text);
            } else {
                self.step(now, id, Event::Blocked(format!("{text}, and no other is free")));
            }
        }
    }

    /// Was the worker of a lost answer made? Found in a newer list, it is kept; otherwise it is made
    /// again while the lease lasts.
    pub(super) fn settle_pending_workers(&mut self, now: u64, input_number: u64, list: &[ServerWorker]) {
        for pending in std::mem::take(&mut self.pending_workers) {
            if pending.is_making || pending.input_number >= input_number {
                self.pending_workers.push(pending);
                continue;
            }
            // One that was listed before it was asked for is another, however similar.
            let found = list.iter().filter_map(|w| {
                let unknown = self.entries.get(&w.id)?.unknown()?;
                let listed = unknown
                    .listed
                    .filter(|listed| listed.input_number > pending.began)?;
                let fits = w.target == pending.target
                    && w.private.is_none()
                    && !(w.online || w.recycle)
                    && unknown.ended.is_none();
                fits.then_some((w, listed.since))
            });
            let found = found.min_by_key(|(_, since)| *since);
            if let Some((found, since)) = found {
                if now.saturating_sub(since) >= CLAIM_MS || found.hold {
                    self.keep(now, pending, found);
                } else {
                    self.pending_workers.push(pending);
                }
            } else if now >= pending.leased_at + USABLE_LEASE_MS {
                self.take_no_jobs_for_a_while(now);
            } else if now >= pending.retry_at && !self.is_stopped {
                let (target, job) = (pending.target, pending.job.clone());
                self.pending_workers.push(PendingWorker {
                    is_making: true,
                    input_number: self.input_number,
                    ..pending
                });
                self.out.push(Output::MakeWorker { target, job });
            } else {
                self.pending_workers.push(pending);
            }
        }
    }

    pub(super) fn renew_leases(&mut self, now: u64) {
        for (id, entry) in &mut self.entries {
            let Some(owned) = entry
                .owned_mut()
                .filter(|o| o.renew_at.is_some_and(|at| at <= now))
            else {
                continue;
            };
            owned.renew_at = None;
            if let Some(job) = owned.worker.job.clone() {
                self.out.push(Output::Renew { worker: *id, job });
            }
        }
    }

    pub(super) fn renewed(&mut self, now: u64, id: WorkerId, result: Result<bool, CallError>) {
        let owned = self.entries.get_mut(&id).and_then(|entry| entry.owned_mut());
        if let Some(owned) = owned.filter(|owned| owned.worker.phase.is_starting()) {
            // False: the job is tied to the worker by now, and there is nothing to renew.
            owned.renew_at = (result != Ok(false)).then_some(now + RENEW_MS);
        }
    }
}
