//! What must hold, whatever happens. Everything is checked from outside: by the calls that arrive, and by what
//! the server and the host are then.

use protocol::{Error, ErrorKind, Request, SlotName, State, WorkerId};
use serde_json::Value;
use supervisor::buildomat::ServerWorker;
use supervisor::worker::{FORGOTTEN_MS, MAX_REMAKES};
use testbed::fake_server::Worker;

use crate::checks::Checks;
use crate::host::{HALF_MADE, Host};
use crate::plan::JOB_TIMEOUT_MS;
use crate::script::CallKind;
use crate::second::MARK;
use crate::server::{LEASE_MS, Server};
use crate::simulation::ONLINE_TIMEOUT_MS;

/// A supervisor that has nothing to write notices a full disk after this.
const DISK_CHECK_MS: u64 = 15_000;
/// The two lists of a poll may be so far apart.
const POLL_MS: u64 = 3_000;
/// Within this time, while no fault is active, the factory has noticed that a time is over.
const NOTICED_MS: u64 = 60_000;

impl Checks {
    /// A call is made: is it one too many, or about a worker that must be left alone?
    pub fn called(&mut self, now: u64, kind: CallKind, about: Option<WorkerId>) {
        if let Err(excess) = self.call_rates.called(now, kind, about) {
            self.fail(excess);
        }
        if kind == CallKind::Workers {
            self.lists += 1;
        }
        // In the same instant, it had been begun before.
        let begins = matches!(
            kind,
            CallKind::Make | CallKind::Associate | CallKind::CreateUser | CallKind::File | CallKind::Attach
        );
        if begins && self.unsaved_since.is_some_and(|since| since < now) {
            self.fail(format!("{kind:?} is begun while something is not saved"));
        }
        if kind == CallKind::File {
            (self.file_in_list, self.file_at) = (self.lists, now);
        }
        let Some(id) = about else {
            return;
        };
        let leased_at = self.leased_at.get(&id).filter(|_| kind == CallKind::Make);
        if leased_at.is_some_and(|at| *at + LEASE_MS < now) {
            self.fail(format!("a worker is asked for job {id}, whose lease has ended"));
        }
        let lists = self.lists;
        let acts = matches!(
            kind,
            CallKind::CreateUser | CallKind::Install | CallKind::HostDelete | CallKind::Delete
        );
        let Some(track) = self.tracks.get(&id).filter(|_| acts) else {
            return;
        };
        if kind == CallKind::CreateUser && track.deleted && !track.got_wrong_answer {
            self.fail(format!("{id} is made again after its end"));
            return;
        }
        // An installation that had begun before, and waited for the agent's file, goes on.
        let began =
            kind == CallKind::Install && track.seen_held.is_some_and(|seen| self.file_in_list <= seen + 1);
        if kind == CallKind::HostDelete && !track.ending && self.is_kept(track) == Some(true) {
            self.fail(format!("{id} has failed and is to be kept, and is deleted"));
            return;
        }
        let excused = track.ending || track.got_wrong_answer || began && now < self.file_at + 40_000;
        // The poll in which it was seen is over: the next has begun.
        if track.seen_held.is_some_and(|seen| seen < lists) && !excused {
            self.fail(format!("{id} is held, and not left as it is: {kind:?}"));
        }
    }

    pub fn asks_for_jobs(&mut self, now: u64, some: bool) {
        let closed = |since: u64| since + DISK_CHECK_MS < now;
        let unsaved = self.unsaved_since.is_some_and(|since| since < now);
        if some && (unsaved || self.disk_bad_since.is_some_and(closed)) {
            self.fail("jobs are asked for while nothing can be saved".into());
        }
        if some && self.others_listed.is_some_and(|since| since + POLL_MS < now) {
            self.fail("jobs are asked for while another host uses the token".into());
        }
        if some && self.draining_since.is_some_and(|since| since < now) {
            self.fail("jobs are asked for while draining".into());
        }
    }

    /// An answer has come back whole.
    pub fn answered(&mut self, now: u64, kind: CallKind, body: &[u8], lie: bool) {
        if kind == CallKind::Lease {
            let answer: Value = serde_json::from_slice(body).unwrap_or_default();
            if let Some(job) = answer["lease"]["job"].as_str().and_then(|job| job.parse().ok()) {
                self.call_rates.leased(now);
                self.leased_at.insert(job, now);
            }
        }
        if kind != CallKind::Workers {
            return;
        }
        if !lie {
            self.lied_since = None;
        } else if *self.lied_since.get_or_insert(now) + FORGOTTEN_MS <= now + POLL_MS {
            // For so long that it must be believed, once the other list of the poll is there.
            self.rolled_back();
        }
        let Ok(list) = serde_json::from_slice::<Vec<ServerWorker>>(body) else {
            return;
        };
        let others = |w: &ServerWorker| w.private.as_ref().is_some_and(|private| private.ends_with(MARK));
        let to_delete = |w: &ServerWorker| self.tracks.get(&w.id).is_some_and(|track| track.to_delete);
        if list.iter().any(|w| others(w) && !to_delete(w)) {
            self.others_listed.get_or_insert(now);
        } else {
            self.others_listed = None;
        }
        let lists = self.lists;
        for (id, track) in &mut self.tracks {
            match list.iter().find(|w| w.id == *id) {
                Some(w) if w.hold => drop(track.seen_held.get_or_insert(lists)),
                Some(w) => {
                    track.seen_held = None;
                    track.ending |= w.recycle;
                }
                None if !lie => {
                    track.seen_held = None;
                    track.ending = true;
                }
                None => {}
            }
        }
    }

    /// Two workers that were made under this configuration, and not while it changed.
    fn both_under_this_config(&self, a: WorkerId, b: WorkerId) -> bool {
        let under = |id| self.tracks.get(&id).is_some_and(|t| t.made_at > self.changed_at);
        under(a) && under(b) || self.changed_at == 0
    }

    fn exclude(&self, a: (WorkerId, &SlotName), b: (WorkerId, &SlotName)) -> bool {
        a.1 == b.1 || (self.config.are_conflicting(a.1, b.1) && self.both_under_this_config(a.0, b.0))
    }

    /// A worker gets a slot: nobody else may have anything in it, or in one that conflicts with it.
    pub fn associates(&mut self, id: WorkerId, slot: &str, live: bool, server: &Server, host: &Host) {
        if !live || self.track(id).got_wrong_answer {
            return;
        }
        let slot = slot_of(slot).expect("a slot's name");
        for (other, w) in host
            .workers()
            .filter(|(other, _)| *other != id && !host.is_untracked(*other))
        {
            if self.exclude((id, &slot), (other, &w.slot)) {
                self.failure.get_or_insert(format!(
                    "{id} gets slot {slot} while the host has {other} in {}",
                    w.slot
                ));
            }
        }
        for (other, w) in server
            .workers
            .iter()
            .filter(|(other, w)| **other != id && !w.deleted)
        {
            let private = w.private.as_ref().filter(|private| !private.ends_with(MARK));
            let Some(private) = private.and_then(|p| slot_of(p)) else {
                continue;
            };
            let left_alone = self
                .tracks
                .get(other)
                .is_none_or(|t| t.got_wrong_answer || t.forgotten);
            // The owner tag is set once: a worker whose slot was removed, or has another target now, moves to another.
            let is_elsewhere = host.get(*other).is_some_and(|h| h.slot != private);
            let slot_now = self.config.slots.get(&private);
            let is_moved =
                is_elsewhere || slot_now.is_none_or(|slot| slot.target.to_string() != w.target.to_string());
            if !left_alone && !is_moved && self.exclude((id, &slot), (*other, &private)) {
                self.failure.get_or_insert(format!(
                    "{id} gets slot {slot} while the server has {other} in {private}"
                ));
            }
        }
        if let Some((drained, since)) = &self.drained_slot
            && *drained == slot
        {
            let job = server.workers.get(&id).and_then(|w| w.job);
            if job.is_some_and(|job| server.leased_at.get(&job).is_some_and(|at| at > since))
                && !self.track(id).forgotten
            {
                self.fail(format!("{id} gets slot {slot}, which is drained"));
            }
        }
    }

    /// The helper says no: to who comes to a slot that somebody has, if it is the schedule's doing, that is wrong.
    pub fn refused(&mut self, request: &Request, about: Option<WorkerId>, error: &Error, host: &Host) {
        let Some(id) = about else {
            return;
        };
        match (error.kind, request) {
            (ErrorKind::SlotTaken, Request::CreateUser { slot, .. }) => {
                let untracked = host.workers().any(|(id, _)| host.is_untracked(id));
                let track = self.track(id).clone();
                let settled = track.made_at > self.changed_at || self.changed_at == 0;
                if settled && !untracked && !track.got_wrong_answer && !track.forgotten {
                    self.fail(format!("{id} is to get slot {slot}, but: {error}"));
                }
                self.track(id).start_failed = true;
            }
            (ErrorKind::Failed, _) if error.message() == HALF_MADE && !self.track(id).got_wrong_answer => {
                self.fail(format!("{id} is half made, and its agent is started"));
            }
            (ErrorKind::Failed, _) => self.start_failed(id),
            _ => {}
        }
    }

    /// An agent is started twice in no worker.
    pub fn agent_started(&mut self, id: WorkerId, server: &Server) {
        if server
            .workers
            .get(&id)
            .is_some_and(|w| w.is_online() && !w.deleted)
        {
            self.fail(format!(
                "a second agent is started in {id}, whose first was online"
            ));
        }
    }

    /// The host must be clean, and no job may fail that nobody has said anything about.
    pub fn deletes(&mut self, id: WorkerId, live: bool, server: &Server, host: &Host) {
        if !live {
            return;
        }
        if host.is_known(id) {
            self.fail(format!(
                "{id} is deleted on the server while the host still has it"
            ));
        }
        let Some(w) = with_open_job(server, id) else {
            return;
        };
        let track = self.track(id).clone();
        let slot_gone = w.private.as_ref().is_some_and(|p| {
            slot_of(p).is_some_and(|slot| !self.config.slots.contains_key::<SlotName>(&slot))
        });
        let no_slot = !self
            .config
            .slots
            .values()
            .any(|slot| slot.target.to_string() == w.target.to_string());
        let began_and_lost = track.online_at.is_some() && track.forgotten;
        // It waited for a slot that others had, as long as it may.
        let without_slot = track.forgotten || w.private.is_none();
        let expired = without_slot && Self::had_its_time(track.had_ms);
        let excused = track.to_delete
            || track.got_wrong_answer
            || track.cannot_tell
            || began_and_lost
            || slot_gone
            || no_slot
            || expired;
        if !excused {
            self.fail(format!(
                "{id} is deleted on the server, which fails a job that nobody said anything about: {track:?}"
            ));
        }
    }

    /// A job whose worker was lost before it began is not failed, and none without a reason.
    pub fn fails(&mut self, now: u64, id: WorkerId, reason: &str, server: &Server) {
        if with_open_job(server, id).is_none() {
            return;
        }
        let track = self.track(id).clone();
        if track.got_wrong_answer || track.start_failed || track.misbehaved {
            return;
        }
        if reason.contains("job_timeout_seconds") {
            if track.online_at.is_none_or(|at| now < at + JOB_TIMEOUT_MS) {
                self.fail(format!("{id} is failed before its job's time is over: {reason}"));
            }
        } else if reason.contains("did not come online") {
            if !Self::had_its_time(track.had_ms) {
                self.fail(format!(
                    "{id} is failed, though it had only {} ms: {reason}",
                    track.had_ms
                ));
            }
        } else if track.online_at.is_none() && track.lost <= MAX_REMAKES {
            self.fail(format!("{id} is failed, though its job had not begun: {reason}"));
        } else if track.lost == 0 && !(track.hangs && track.forgotten) {
            // A run of the supervisor may have ended the processes for the job's time, and its database, which said so,
            // was lost.
            self.fail(format!(
                "{id} is failed, though nothing was wrong with it: {reason}"
            ));
        }
    }

    /// A second has passed. No process of a failed worker goes on beside a slot that waits for an operator, unless the slot
    /// keeps them. `undisturbed`: the supervisor runs, and all that it calls answer.
    pub fn processes_end(&mut self, undisturbed: bool, server: &Server, host: &Host) {
        let limit = 60_000 + 2_000 * self.config.factory.poll_seconds;
        // What does not go on now begins again at 0.
        let before = std::mem::take(&mut self.goes_on_ms);
        for (id, w) in host.workers() {
            let Some(track) = self.tracks.get(&id) else {
                continue;
            };
            let is_held = server
                .workers
                .get(&id)
                .is_some_and(|w| w.hold.is_some() && !w.deleted);
            let slot = self.config.slots.get(&w.slot);
            let goes_on = w.state == State::Running
                && host.is_known(id)
                && slot.is_none_or(|slot| !slot.keep_processes);
            let excused = track.got_wrong_answer || track.forgotten;
            if undisturbed && track.failure_reported.is_some() && is_held && goes_on && !excused {
                let ms = before.get(&id).unwrap_or(&0) + 1_000;
                self.goes_on_ms.insert(id, ms);
            }
        }
        let found = self
            .goes_on_ms
            .iter()
            .find(|(_, ms)| **ms > limit)
            .map(|(id, _)| *id);
        if let Some(id) = found {
            self.fail(format!("{id} has failed, and its processes go on"));
        }
    }

    /// A second has passed. No job goes on for longer than its slot allows.
    pub fn jobs_end(&mut self, undisturbed: bool, server: &Server, host: &Host) {
        let settled = self.changed_at == 0;
        let before = std::mem::take(&mut self.job_ms);
        for (id, w) in host.workers() {
            let Some(track) = self.tracks.get(&id) else {
                continue;
            };
            let goes_on = server
                .workers
                .get(&id)
                .is_some_and(|w| w.is_online() && w.hold.is_none() && !w.is_finished());
            let slot = self.config.slots.get(&w.slot);
            let is_limited =
                w.state == State::Running && slot.is_some_and(|slot| slot.job_timeout_seconds.is_some());
            let excused = track.got_wrong_answer || track.forgotten || track.cannot_tell;
            if undisturbed && settled && goes_on && is_limited && !excused {
                let ms = before.get(&id).unwrap_or(&0) + 1_000;
                self.job_ms.insert(id, ms);
            }
        }
        let found = self
            .job_ms
            .iter()
            .find(|(_, ms)| **ms > JOB_TIMEOUT_MS + NOTICED_MS)
            .map(|(id, _)| *id);
        if let Some(id) = found {
            self.fail(format!(
                "the job of {id} goes on beyond its slot's job_timeout_seconds"
            ));
        }
    }

    /// Was it as good as all the time that an agent has?
    fn had_its_time(had_ms: u64) -> bool {
        had_ms * 10 >= ONLINE_TIMEOUT_MS * 8
    }
}

/// The slot in a worker's owner tag.
pub fn slot_of(private: &str) -> Option<SlotName> {
    private.split('@').next()?.parse().ok()
}

/// The server's worker, if its job would fail by what the supervisor does, and nobody else has ended it.
fn with_open_job(server: &Server, id: WorkerId) -> Option<&Worker> {
    let w = server.workers.get(&id)?;
    let job = server.jobs.get(&w.job?)?;
    (!w.deleted && !w.recycle_asked && !job.is_complete()).then_some(w)
}
