//! What jobs connect to without the host's network: which destinations their slots allow, and which they have used or were
//! refused. It is shared by the driver, which knows the configuration, the egress proxy and the control API.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use protocol::config::{Config, Destination, Egress};
use protocol::{SlotName, WorkerId};
use serde::{Deserialize, Serialize};

use crate::control::api::{DestinationUse, EgressReport};

/// The file in the supervisor's state directory in which slots' records survive its end.
const FILE: &str = "egress.json";
/// How often it is written, if anything has changed.
const SAVE_INTERVAL: Duration = Duration::from_secs(10);
/// Destinations that are kept for each worker and slot, used ones and refused ones each. A job can name any number.
const MAX_DESTINATIONS: usize = 256;
/// Workers that are kept, in the order in which they were made.
const MAX_WORKERS: usize = 16_384;
/// What no job has used for so long is forgotten.
const MAX_AGE: SignedDuration = SignedDuration::from_hours(30 * 24);

/// Shared by all who ask.
#[derive(Debug, Default)]
pub struct EgressRecords(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Slots whose jobs have not the host's network.
    slots: BTreeMap<SlotName, Arc<Egress>>,
    workers: BTreeMap<WorkerId, (SlotName, Record)>,
    recent: BTreeMap<SlotName, Record>,
    is_changed: bool,
}

/// By destinations.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    #[serde(default)]
    used: BTreeMap<String, Use>,
    #[serde(default)]
    refused: BTreeMap<String, Use>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Use {
    connections: u64,
    last: Timestamp,
}

/// The slot of a worker's job, and what it may reach.
#[derive(Clone, Debug)]
pub struct JobEgress {
    /// The worker.
    pub worker: WorkerId,
    /// Its slot.
    pub slot: SlotName,
    /// As the configuration has it now.
    pub egress: Arc<Egress>,
}

impl EgressRecords {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This configuration is in use from now on, also for jobs that run.
    pub fn configure(&self, config: &Config) {
        let slots = config.slots.iter().filter_map(|(name, slot)| {
            let egress = slot.egress.as_ref()?;
            Some((name.clone(), Arc::new(egress.clone())))
        });
        self.lock().slots = slots.collect();
    }

    /// This worker is forgotten.
    pub fn forget(&self, worker: WorkerId) {
        self.lock().workers.remove(&worker);
    }

    /// None where the slot is no longer in the configuration, or has the host's network by now.
    pub fn of_job(&self, worker: WorkerId, slot: &SlotName) -> Option<JobEgress> {
        let egress = self.lock().slots.get(slot)?.clone();
        Some(JobEgress {
            worker,
            slot: slot.clone(),
            egress,
        })
    }

    /// A job has connected to this destination.
    pub fn record_use(&self, job: &JobEgress, to: &Destination) {
        self.note(job, to, |record| &mut record.used);
    }

    /// A job was not connected to this destination. True the first time, and never once there are too many to be told.
    pub fn record_refusal(&self, job: &JobEgress, to: &Destination) -> bool {
        self.note(job, to, |record| &mut record.refused)
    }

    fn note(
        &self,
        job: &JobEgress,
        to: &Destination,
        of: fn(&mut Record) -> &mut BTreeMap<String, Use>,
    ) -> bool {
        let (now, to) = (Timestamp::now(), to.to_string());
        let mut inner = self.lock();
        inner.is_changed = true;
        let recent = of(inner.recent.entry(job.slot.clone()).or_default());
        if recent.len() >= MAX_DESTINATIONS && !recent.contains_key(&to) {
            let oldest = recent.iter().min_by_key(|(_, use_)| use_.last);
            let oldest = oldest.map(|(name, _)| name.clone()).unwrap_or_default();
            recent.remove(&oldest);
        }
        count(recent, &to, now);
        let (_, record) = inner
            .workers
            .entry(job.worker)
            .or_insert_with(|| (job.slot.clone(), Record::default()));
        let is_first = count(of(record), &to, now);
        // Those of `user-factory run` are forgotten by nobody else.
        if inner.workers.len() > MAX_WORKERS {
            inner.workers.pop_first();
        }
        is_first
    }

    /// What a worker's job has used, and what it was refused. None where that is nothing.
    pub fn of_worker(&self, worker: WorkerId) -> Option<EgressReport> {
        let inner = self.lock();
        inner.workers.get(&worker).map(|(_, record)| record.report())
    }

    /// The same of the jobs of a slot in the last 30 days. None where it has the host's network.
    pub fn of_slot(&self, slot: &SlotName) -> Option<EgressReport> {
        let inner = self.lock();
        let record = inner.recent.get(slot).cloned().unwrap_or_default();
        inner.slots.get(slot).map(|_| record.report())
    }

    /// With what was saved in `dir`. What cannot be read is lost, which is logged: it is needed for no job.
    pub fn open(dir: &Path) -> EgressRecords {
        let path = dir.join(FILE);
        let read = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::from),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeMap::new()),
            Err(error) => Err(error),
        };
        let recent = read.unwrap_or_else(|error| {
            tracing::warn!(
                "{} cannot be read, and is begun anew: {error}; `user-factory egress` shows what jobs use from now on",
                path.display()
            );
            BTreeMap::new()
        });
        EgressRecords(Mutex::new(Inner {
            recent,
            ..Inner::default()
        }))
    }

    /// Save what has changed in `dir`, again and again.
    pub async fn save_in(self: Arc<Self>, dir: PathBuf) {
        let mut is_told = false;
        loop {
            tokio::time::sleep(SAVE_INTERVAL).await;
            let (records, dir) = (self.clone(), dir.clone());
            let saved = tokio::task::spawn_blocking(move || records.save(&dir)).await;
            match saved.map_err(io::Error::other).and_then(|saved| saved) {
                Ok(()) => is_told = false,
                Err(error) if !is_told => {
                    is_told = true;
                    tracing::warn!("{FILE} cannot be written: {error}; it is tried again");
                }
                Err(_) => {}
            }
        }
    }

    fn save(&self, dir: &Path) -> io::Result<()> {
        let text = {
            let mut inner = self.lock();
            inner.forget_before(Timestamp::now() - MAX_AGE);
            if !std::mem::take(&mut inner.is_changed) {
                return Ok(());
            }
            serde_json::to_vec(&inner.recent)?
        };
        let saved = write_atomically(dir, &text);
        if saved.is_err() {
            self.lock().is_changed = true;
        }
        saved
    }
}

/// Under a name of its own first, which the next one takes that was cut off.
fn write_atomically(dir: &Path, text: &[u8]) -> io::Result<()> {
    let new = dir.join(format!("{FILE}.new"));
    fs::write(&new, text)?;
    fs::rename(&new, dir.join(FILE))
}

impl Inner {
    fn forget_before(&mut self, oldest: Timestamp) {
        for record in self.recent.values_mut() {
            record.used.retain(|_, used| used.last >= oldest);
            record.refused.retain(|_, refused| refused.last >= oldest);
        }
        self.recent.retain(|_, record| *record != Record::default());
    }
}

/// True for the first of this destination. Where there are too many, no more are kept.
fn count(uses: &mut BTreeMap<String, Use>, to: &str, now: Timestamp) -> bool {
    if let Some(known) = uses.get_mut(to) {
        (known.connections, known.last) = (known.connections + 1, now);
        return false;
    }
    if uses.len() >= MAX_DESTINATIONS {
        return false;
    }
    let first = Use {
        connections: 1,
        last: now,
    };
    uses.insert(to.to_owned(), first);
    true
}

impl Record {
    fn report(&self) -> EgressReport {
        let list = |uses: &BTreeMap<String, Use>| {
            let each = uses.iter().map(|(destination, use_)| DestinationUse {
                destination: destination.clone(),
                connections: use_.connections,
                last: use_.last,
            });
            each.collect()
        };
        EgressReport {
            used: list(&self.used),
            refused: list(&self.refused),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORKER: WorkerId = WorkerId::from_bits(7);

    fn records(dir: &Path, network: &str) -> EgressRecords {
        let config = Config::parse(&format!(
            "[general]\nbaseurl = \"http://b\"\n[factory]\ntoken_file = \"/t\"\n[slots.a]\n\
             target = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\nnetwork = {network}\n"
        ));
        let records = EgressRecords::open(dir);
        records.configure(&config.unwrap());
        records
    }

    fn slot() -> SlotName {
        "a".parse().unwrap()
    }

    fn names(uses: &[DestinationUse]) -> Vec<(&str, u64)> {
        uses.iter()
            .map(|each| (&*each.destination, each.connections))
            .collect()
    }

    #[test]
    fn a_slots_record_outlives_its_workers_and_the_supervisor() {
        let dir = tempfile::tempdir().unwrap();
        let (x, y): (Destination, Destination) =
            ("x.example:443".parse().unwrap(), "y.example:80".parse().unwrap());
        let before = records(dir.path(), "{ audit = true }");
        let job = before.of_job(WORKER, &slot()).unwrap();
        before.record_use(&job, &x);
        before.record_use(&job, &x);
        assert!(before.record_refusal(&job, &y));
        assert!(!before.record_refusal(&job, &y));
        let of_worker = before.of_worker(WORKER).unwrap();
        assert_eq!(names(&of_worker.used), [("x.example:443", 2)]);
        assert_eq!(names(&of_worker.refused), [("y.example:80", 2)]);
        before.forget(WORKER);
        assert_eq!(before.of_worker(WORKER), None);
        assert_eq!(before.of_slot(&slot()), Some(of_worker.clone()));
        before.save(dir.path()).unwrap();
        let after = records(dir.path(), "{ audit = true }");
        assert_eq!(after.of_slot(&slot()), Some(of_worker));
        assert_eq!(after.of_worker(WORKER), None);
        fs::write(dir.path().join(FILE), "no JSON").unwrap();
        let anew = records(dir.path(), "{ audit = true }");
        assert_eq!(anew.of_slot(&slot()), Some(EgressReport::default()));
    }

    #[test]
    fn a_slot_with_the_hosts_network_has_no_record() {
        let dir = tempfile::tempdir().unwrap();
        let records = records(dir.path(), "\"host\"");
        assert!(records.of_job(WORKER, &slot()).is_none() && records.of_worker(WORKER).is_none());
        assert_eq!(records.of_slot(&slot()), None);
    }

    #[test]
    fn a_job_that_names_any_number_of_hosts_fills_neither_memory_nor_its_log() {
        let dir = tempfile::tempdir().unwrap();
        let records = records(dir.path(), "{ allow = [\"x.example:1\"] }");
        let job = records.of_job(WORKER, &slot()).unwrap();
        let told =
            (0..10_000).filter(|n| records.record_refusal(&job, &format!("h{n}.test:443").parse().unwrap()));
        assert_eq!(told.count(), MAX_DESTINATIONS);
        assert_eq!(records.of_worker(WORKER).unwrap().refused.len(), MAX_DESTINATIONS);
        let of_slot = records.of_slot(&slot()).unwrap().refused;
        assert_eq!(of_slot.len(), MAX_DESTINATIONS);
        // The newest are kept.
        assert!(of_slot.iter().any(|each| each.destination == "h9999.test:443"));
    }

    #[test]
    fn what_no_job_has_used_for_a_month_is_forgotten() {
        let old = Use {
            connections: 1,
            last: Timestamp::now() - MAX_AGE - SignedDuration::from_mins(1),
        };
        let new = Use {
            connections: 1,
            last: Timestamp::now(),
        };
        let record = |uses: &[(&str, Use)]| Record {
            used: uses
                .iter()
                .map(|(name, use_)| ((*name).to_owned(), *use_))
                .collect(),
            refused: BTreeMap::new(),
        };
        let mut inner = Inner {
            recent: BTreeMap::from([
                (slot(), record(&[("old:1", old), ("new:1", new)])),
                ("b".parse().unwrap(), record(&[("old:1", old)])),
            ]),
            ..Inner::default()
        };
        inner.forget_before(Timestamp::now() - MAX_AGE);
        assert_eq!(
            inner.recent,
            BTreeMap::from([(slot(), record(&[("new:1", new)]))])
        );
    }
}
