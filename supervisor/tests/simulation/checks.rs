//! What is remembered of each worker, and of the supervisor, to check by. The checks are in `invariants`.

use std::collections::BTreeMap;

use protocol::config::Config;
use protocol::{Exit, SlotName, WorkerId};

use crate::call_rates::CallRates;
use crate::host::Host;
use crate::server::Server;

/// A new configuration is everybody's after this.
const RELOAD_MS: u64 = 15_000;
/// Within this time, while no fault is active, a worker is deleted on the host.
const DELETED_MS: u64 = 120_000;

/// What the simulation knows of a worker.
#[derive(Clone, Debug, Default)]
pub struct Track {
    pub made_at: u64,
    /// How long its agent had to come online, with nothing in its way.
    pub had_ms: u64,
    /// The helper could not make it, or start its agent.
    pub start_failed: bool,
    /// Its agent ended in a way that tells something, or did not do what agents do.
    pub misbehaved: bool,
    /// Its job never ends by itself.
    pub hangs: bool,
    /// How often it was lost without anybody's fault.
    pub lost: u32,
    /// Since when its agent is online.
    pub online_at: Option<u64>,
    /// The server has lied about it, or forgotten something of it: any end is right.
    pub got_wrong_answer: bool,
    /// Its state was in a database that was lost.
    pub forgotten: bool,
    /// The server, asked to fail it, would not.
    pub cannot_tell: bool,
    /// Its failure was reported to the server.
    pub failure_reported: Option<FailureReport>,
    pub held_since: Option<u64>,
    /// The supervisor has seen that it is held, in this list of its.
    pub seen_held: Option<u64>,
    /// The supervisor knows that the server has deleted it.
    pub deleted: bool,
    /// Its end had begun before it was held.
    pub ending: bool,
    /// Since when the server wants it gone.
    pub recycled_since: Option<u64>,
    /// Since when the supervisor shows that it may be another host's.
    pub foreign_since: Option<u64>,
    /// An operator wants it deleted.
    pub to_delete: bool,
}

/// When the failure of a worker was reported to the server, and whether its slot keeps such workers for inspection.
/// None: the server never had its slot.
#[derive(Clone, Copy, Debug)]
pub struct FailureReport {
    pub at: u64,
    pub keeps: Option<bool>,
}

#[derive(Debug)]
pub struct Checks {
    pub tracks: BTreeMap<WorkerId, Track>,
    /// For how long the processes of each worker have gone on since the server was told that it failed, with nothing in the
    /// way of ending them.
    pub goes_on_ms: BTreeMap<WorkerId, u64>,
    /// For how long each job has gone on, in a slot that limits that, with nothing in the way of ending it.
    pub job_ms: BTreeMap<WorkerId, u64>,
    /// The configuration that the supervisor has, and the time since which it is everybody's.
    pub config: Config,
    pub changed_at: u64,
    pub call_rates: CallRates,
    pub draining_since: Option<u64>,
    pub drained_slot: Option<(SlotName, u64)>,
    /// How many lists of the server this run of the supervisor has asked for.
    pub lists: u64,
    pub lied_since: Option<u64>,
    /// When a job was last leased, as far as the supervisor knows.
    pub leased_at: BTreeMap<WorkerId, u64>,
    /// Since when the server's lists show the first supervisor a worker of another host.
    pub others_listed: Option<u64>,
    /// When the agent's file was last asked for: in which list of the server, and at what time.
    pub file_in_list: u64,
    pub file_at: u64,
    /// Since when there is no room on the disk, or little.
    pub disk_bad_since: Option<u64>,
    /// When a change was first not written, of those that are not written yet.
    pub unsaved_since: Option<u64>,
    pub failure: Option<String>,
}

impl Checks {
    pub fn new(config: Config) -> Self {
        Self {
            tracks: BTreeMap::new(),
            goes_on_ms: BTreeMap::new(),
            job_ms: BTreeMap::new(),
            config,
            changed_at: 0,
            call_rates: CallRates::default(),
            draining_since: None,
            drained_slot: None,
            lists: 0,
            lied_since: None,
            leased_at: BTreeMap::new(),
            others_listed: None,
            file_in_list: 0,
            file_at: 0,
            disk_bad_since: None,
            unsaved_since: None,
            failure: None,
        }
    }

    pub fn failure(&self) -> Option<&String> {
        self.failure.as_ref()
    }

    /// The first failure counts.
    pub fn fail(&mut self, what: String) {
        self.failure.get_or_insert(what);
    }

    pub fn track(&mut self, id: WorkerId) -> &mut Track {
        self.tracks.entry(id).or_default()
    }

    pub fn note_made(&mut self, now: u64, id: WorkerId) {
        self.track(id).made_at = now;
    }

    pub fn foreign(&mut self, id: WorkerId) {
        self.track(id).got_wrong_answer = true;
    }

    pub fn note_online(&mut self, now: u64, id: WorkerId) {
        self.track(id).online_at = Some(now);
    }

    pub fn misbehaves(&mut self, id: WorkerId) {
        self.track(id).misbehaved = true;
    }

    pub fn note_hang(&mut self, id: WorkerId) {
        self.track(id).hangs = true;
    }

    pub fn start_failed(&mut self, id: WorkerId) {
        self.track(id).start_failed = true;
    }

    pub fn deleted(&mut self, id: WorkerId) {
        self.track(id).deleted = true;
    }

    pub fn failure_reported(&mut self, now: u64, id: WorkerId, slot: Option<&SlotName>) {
        let slot = slot.map(|slot| self.config.slots.get(slot));
        // Where the slot was removed, it is kept.
        let keeps = slot.map(|slot| slot.is_none_or(|slot| slot.hold_on_failure));
        let track = self.track(id);
        track.failure_reported = Some(FailureReport { at: now, keeps });
        track.ending |= keeps != Some(true);
    }

    /// Must this failed worker be kept? None: nobody can say.
    pub fn is_kept(&self, track: &Track) -> Option<bool> {
        let failure_reported = track.failure_reported?;
        let excused = track.got_wrong_answer || track.forgotten || track.cannot_tell || track.to_delete;
        // The slot's rules may be others by now.
        let settled = self.changed_at == 0 || self.changed_at < failure_reported.at;
        failure_reported.keeps.filter(|_| settled && !excused)
    }

    /// The server would not take its failure.
    pub fn cannot_tell(&mut self, id: WorkerId) {
        let track = self.track(id);
        (track.cannot_tell, track.ending) = (true, true);
    }

    pub fn ended(&mut self, id: WorkerId, exit: Exit) {
        let track = self.track(id);
        track.lost += 1;
        track.misbehaved |= exit != Exit::Unknown;
    }

    pub fn rebooted(&mut self, host: &Host) {
        for (id, _) in host.workers() {
            self.track(id).lost += 1;
        }
    }

    pub fn removed(&mut self, id: WorkerId, live: bool) {
        let track = self.track(id);
        track.had_ms = 0;
        // Deleted by a request of an earlier run, that arrived late.
        track.got_wrong_answer |= !live;
    }

    pub fn database_lost(&mut self) {
        for track in self.tracks.values_mut() {
            (track.forgotten, track.seen_held) = (true, None);
        }
    }

    pub fn rolled_back(&mut self) {
        for track in self.tracks.values_mut() {
            track.got_wrong_answer = true;
        }
    }

    pub fn started(&mut self, now: u64, config: Config) {
        self.call_rates.started(now);
        self.config = config;
        self.lists = 0;
        (self.draining_since, self.drained_slot) = (None, None);
    }

    pub fn supervisor_ended(&mut self) {
        (self.unsaved_since, self.others_listed) = (None, None);
        // What its last list has said, it may not have taken in.
        let lists = self.lists;
        for track in self.tracks.values_mut() {
            if track.seen_held.is_some_and(|seen| seen >= lists) {
                track.seen_held = None;
            } else if track.seen_held.is_some() {
                // Saved: the next run knows.
                track.seen_held = Some(0);
            }
        }
        (self.draining_since, self.drained_slot) = (None, None);
    }

    pub fn config_changed(&mut self, now: u64) {
        self.changed_at = now + RELOAD_MS;
    }

    pub fn reloaded(&mut self, now: u64, config: Config) {
        self.config = config;
        self.changed_at = self.changed_at.max(now + RELOAD_MS);
    }

    pub fn drained(&mut self, now: u64, is_running: bool) {
        if is_running {
            self.draining_since.get_or_insert(now);
        }
    }

    pub fn undrained(&mut self) {
        self.draining_since = None;
    }

    pub fn slot_drained(&mut self, now: u64, slot: SlotName, is_running: bool) {
        self.drained_slot = is_running.then_some((slot, now));
    }

    pub fn slot_undrained(&mut self) {
        self.drained_slot = None;
    }

    pub fn held_since(&mut self, id: WorkerId, now: u64) -> u64 {
        *self.track(id).held_since.get_or_insert(now)
    }

    pub fn foreign_since(&mut self, id: WorkerId, now: u64) -> u64 {
        *self.track(id).foreign_since.get_or_insert(now)
    }

    pub fn deletion_requested(&mut self, id: WorkerId) {
        let track = self.track(id);
        (track.to_delete, track.ending) = (true, true);
    }

    pub fn disk_is_bad(&mut self, now: u64) {
        self.disk_bad_since.get_or_insert(now);
    }

    pub fn disk_is_fine(&mut self) {
        self.disk_bad_since = None;
    }

    /// A change was written, or not.
    pub fn note_persist(&mut self, now: u64, is_persisted: bool) {
        if is_persisted {
            (self.unsaved_since, self.others_listed) = (None, None);
        } else {
            self.unsaved_since.get_or_insert(now);
        }
    }

    /// While no fault is active a worker that the server wants gone is gone, whatever the supervisor can save.
    pub fn recycled(&mut self, now: u64, undisturbed_since: Option<u64>, server: &Server, host: &Host) {
        for (id, w) in server.workers.iter().filter(|(_, w)| !w.deleted) {
            let track = self.tracks.get(id).cloned().unwrap_or_default();
            let is_let_go = self.is_kept(&track) == Some(false);
            let track = self.tracks.entry(*id).or_default();
            if !w.must_recycle() && !is_let_go {
                track.recycled_since = None;
                continue;
            }
            let since = *track.recycled_since.get_or_insert(now);
            let undisturbed =
                undisturbed_since.is_some_and(|undisturbed| undisturbed.max(since) + DELETED_MS <= now);
            if undisturbed && host.get(*id).is_some() && !track.got_wrong_answer {
                let text = format!(
                    "{id} is to be deleted for {} s, and the host has it",
                    (now - since) / 1_000
                );
                self.failure.get_or_insert(text);
            }
        }
    }

    /// A second has passed. `can_ask`: the supervisor runs, and can ask the server.
    pub fn note_second(&mut self, server: &Server, can_ask: bool) {
        for (id, w) in server.workers.iter().filter(|(_, w)| !w.deleted) {
            let track = self.tracks.entry(*id).or_default();
            if w.hold.is_none() {
                track.held_since = None;
                if can_ask && !w.is_online() {
                    track.had_ms += 1_000;
                }
            }
        }
    }

    pub fn after_step(&mut self, host: &Host) {
        let live: Vec<_> = host.workers().collect();
        for (n, (a, x)) in live.iter().enumerate() {
            if let Some((b, _)) = live[..n].iter().find(|(_, y)| y.slot == x.slot) {
                self.failure
                    .get_or_insert(format!("two workers in slot {}: {a} and {b}", x.slot));
            }
        }
    }
}
