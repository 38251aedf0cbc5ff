//! Devices of running jobs that are unplugged for longer than their entries' `grace_seconds`. Pure: time moves only through
//! `now`.
//!
//! The helper decides when a job starts which port an entry means, and does not say so. Here the same functions decide by
//! what was last read until the agent was started. From then on any device at that port is the job's: a board may change
//! into its bootloader.

use std::collections::{BTreeMap, BTreeSet};

use protocol::config::{Slot, UsbName};
use protocol::usb::{UsbDevice, UsbPort, resolve};
use protocol::{SlotName, WorkerId};

use super::Unread;
use crate::factory::{Level, LogLine};
use crate::worker::{Phase, Worker};

/// The most times that devices of one worker are logged as unplugged: a bad cable fills no log, nor does a job that unplugs
/// its device.
const MAX_TIMES: u32 = 64;

/// The devices of the jobs that run. Nothing is known of those of the supervisor's previous run.
#[derive(Debug, Default)]
pub struct JobDevices(BTreeMap<WorkerId, WorkerDevices>);

#[derive(Debug, Default)]
struct WorkerDevices {
    devices: BTreeMap<UsbName, JobDevice>,
    /// How many times one of them was logged as unplugged.
    times: u32,
}

#[derive(Debug)]
struct JobDevice {
    port: UsbPort,
    unplugged: Option<Unplugged>,
}

#[derive(Debug)]
struct Unplugged {
    /// In milliseconds.
    since: u64,
    is_logged: bool,
}

impl JobDevices {
    /// A worker has changed: its agent may have been started between two readings. The rest is as in
    /// [`JobDevices::update`].
    pub fn note_worker(
        &mut self,
        worker: &Worker,
        slots: &BTreeMap<SlotName, Slot>,
        devices: &[UsbDevice],
        unread: &Unread,
    ) {
        match slot_with_devices(worker, slots) {
            Some(slot) => self.find(worker, slot, devices, unread),
            None => drop(self.0.remove(&worker.id)),
        }
    }

    /// What was read at `now`, in milliseconds: the devices, and the strings that are not known yet. Returns lines for the
    /// logs of the workers' jobs: at most two for each time that a device is unplugged for its `grace_seconds`.
    ///
    /// An entry that is no longer in the configuration is forgotten, as is a worker whose agent no longer runs.
    pub fn update<'a>(
        &mut self,
        now: u64,
        workers: impl Iterator<Item = &'a Worker>,
        slots: &BTreeMap<SlotName, Slot>,
        devices: &[UsbDevice],
        unread: &Unread,
    ) -> Vec<LogLine> {
        let running: BTreeMap<WorkerId, (&Worker, &Slot)> = workers
            .filter_map(|worker| Some((worker.id, (worker, slot_with_devices(worker, slots)?))))
            .collect();
        self.0.retain(|id, _| running.contains_key(id));
        let mut lines = Vec::new();
        for (id, (worker, slot)) in running {
            self.find(worker, slot, devices, unread);
            let of_worker = self.0.entry(id).or_default();
            for (level, text) in of_worker.update(now, slot, devices) {
                lines.push(LogLine {
                    level,
                    worker: Some(id),
                    slot: Some(worker.slot.clone()),
                    job: worker.job.clone(),
                    text,
                });
            }
        }
        lines
    }

    /// Remember the ports of a worker's devices that are plugged in for the first time. Those of other workers are not its.
    /// Until its agent has been started, no port is its for good.
    fn find(&mut self, worker: &Worker, slot: &Slot, devices: &[UsbDevice], unread: &Unread) {
        let (id, is_started) = (worker.id, worker.phase != Phase::Created);
        let of_worker = self.0.entry(id).or_default();
        of_worker
            .devices
            .retain(|name, _| is_started && slot.usb.contains_key(name));
        if of_worker.devices.len() == slot.usb.len() {
            return;
        }
        let others = self.0.iter().filter(|(other, _)| **other != id);
        let taken: BTreeSet<&UsbPort> = others
            .flat_map(|(_, other)| other.devices.values().map(|device| &device.port))
            .collect();
        let free = devices.iter().filter(|device| !taken.contains(&device.port));
        let free: Vec<UsbDevice> = free.cloned().collect();
        let of_worker = self.0.entry(id).or_default();
        for (name, entry) in &slot.usb {
            // Of two devices with one serial number, the second may not be read yet.
            let is_early = entry.serial.is_some() && unread.is_reading;
            if is_early || of_worker.devices.contains_key(name) {
                continue;
            }
            if let Ok(Some(device)) = resolve(name, entry, &free) {
                let port = device.port.clone();
                let unplugged = None;
                of_worker
                    .devices
                    .insert(name.clone(), JobDevice { port, unplugged });
            }
        }
    }
}

/// The slot of a worker whose agent runs or is being started, if it has USB devices.
fn slot_with_devices<'a>(worker: &Worker, slots: &'a BTreeMap<SlotName, Slot>) -> Option<&'a Slot> {
    let may_run = matches!(worker.phase, Phase::Created | Phase::Running { .. });
    slots
        .get(&worker.slot)
        .filter(|slot| may_run && !slot.usb.is_empty())
}

impl WorkerDevices {
    fn update(&mut self, now: u64, slot: &Slot, plugged_in: &[UsbDevice]) -> Vec<(Level, String)> {
        let mut lines = Vec::new();
        for (name, JobDevice { port, unplugged }) in &mut self.devices {
            let grace = slot.usb.get(name).and_then(|entry| entry.grace_seconds);
            let grace = grace.map(|grace| u64::from(grace.get()));
            let seconds = |since: u64| now.saturating_sub(since) / 1000;
            if plugged_in.iter().any(|device| device.port == *port) {
                if let Some(before) = unplugged.take()
                    && before.is_logged
                    && grace.is_some()
                {
                    let after = seconds(before.since);
                    let text = format!("usb.{name} (port {port}) is back after {after} s");
                    lines.push((Level::Info, text));
                }
                continue;
            }
            let unplugged = unplugged.get_or_insert(Unplugged {
                since: now,
                is_logged: false,
            });
            let so_long = seconds(unplugged.since);
            let is_over = grace.is_some_and(|grace| so_long >= grace);
            if is_over && !unplugged.is_logged && self.times < MAX_TIMES {
                unplugged.is_logged = true;
                self.times += 1;
                let mut text = format!("usb.{name} (port {port}) has been unplugged for {so_long} s");
                if self.times == MAX_TIMES {
                    text += "; later times are not logged for this job";
                }
                lines.push((Level::Warn, text));
            }
        }
        lines
    }
}

#[cfg(test)]
#[path = "job_devices_tests.rs"]
mod tests;
