//! Slots whose USB devices are absent take no job. A slot is absent from when it is configured until its devices have been
//! seen.

use std::collections::BTreeSet;

use protocol::SlotName;
use protocol::config::Config;

use super::{Factory, Level, LogLine, Output};
use crate::usb::{UsbAbsence, UsbAbsences};

/// The log says of a slot at most once in this time, in milliseconds, that it is absent or back: a bad cable fills no log.
const LOG_MS: u64 = 10_000;

/// What the log has last said of a slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct LoggedAbsence {
    is_absent: bool,
    at: u64,
}

impl Factory {
    /// Slots whose entries are not those of the configuration `old` have not been seen yet.
    pub(super) fn expect_usb(&mut self, old: Option<&Config>) {
        let slots = &self.config.slots;
        self.usb_absences.retain(|name, _| slots.contains_key(name));
        self.usb_logged.retain(|name, _| slots.contains_key(name));
        for (name, slot) in slots {
            let before = old.and_then(|old| old.slots.get(name)).map(|slot| &slot.usb);
            if slot.usb.is_empty() {
                self.usb_absences.remove(name);
            } else if before != Some(&slot.usb) {
                self.usb_absences.insert(name.clone(), UsbAbsence::NotRead);
            }
        }
    }

    /// What has been read, of the configuration in use.
    pub(super) fn note_usb(&mut self, mut absences: UsbAbsences) {
        absences.retain(|name, _| self.config.slots.contains_key(name));
        self.usb_absences = absences;
    }

    /// Say which slots are absent, and which are back. Nothing is said of a slot that could take no job anyhow, since it or
    /// one that excludes it has a worker: a job resets its devices as often as it wants.
    pub(super) fn log_absences(&mut self, now: u64) {
        if self.usb_absences.is_empty() && self.usb_logged.is_empty() {
            return;
        }
        let taken = self.taken();
        let excluded = self.schedule.excluded(&taken);
        let mut lines = Vec::new();
        for (slot, absence) in &self.usb_absences {
            let UsbAbsence::Problem(..) = absence else {
                continue;
            };
            let logged = self.usb_logged.get(slot);
            let is_known = logged.is_some_and(|logged| logged.is_absent || now < logged.at + LOG_MS);
            if !is_known && !taken.contains(slot) && !excluded.contains_key(slot) {
                let text = format!("slot {slot} takes no jobs: {}", absence.sentence());
                lines.push((Level::Warn, slot.clone(), text));
            }
        }
        let logged = self.usb_logged.iter();
        let back: BTreeSet<SlotName> = logged
            .filter(|(slot, logged)| !self.usb_absences.contains_key(*slot) && now >= logged.at + LOG_MS)
            .map(|(slot, _)| slot.clone())
            .collect();
        for slot in back {
            // Of one that has been back for long, nothing is remembered.
            if self.usb_logged.get(&slot).is_some_and(|logged| logged.is_absent) {
                let text = format!("the USB devices of slot {slot} are plugged in again: it takes jobs");
                lines.push((Level::Info, slot, text));
            } else {
                self.usb_logged.remove(&slot);
            }
        }
        for (level, slot, text) in lines {
            let is_absent = level == Level::Warn;
            self.usb_logged
                .insert(slot.clone(), LoggedAbsence { is_absent, at: now });
            self.out.push(Output::Log(LogLine {
                level,
                worker: None,
                slot: Some(slot),
                job: None,
                text,
            }));
        }
    }

    /// The slots that take no job since their USB devices are absent, and why.
    pub(crate) fn usb_absences(&self) -> &UsbAbsences {
        &self.usb_absences
    }
}
