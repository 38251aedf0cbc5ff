//! The decisions, pure: may this worker have this slot, and which uid does it get?

use std::collections::BTreeSet;

use protocol::config::{Config, UidRange};
use protocol::{Error, ErrorKind, SlotName, Uid, WorkerId};

use crate::host::no_such_slot;
use crate::host::record::Record;

/// Why a worker cannot have a slot.
#[derive(Debug, PartialEq, Eq)]
pub enum SlotError {
    /// The configuration, as the file is now, has no such slot.
    NoSuchSlot(SlotName),
    /// The slot is not free: which worker has it, and what to do.
    SlotTaken(String),
}

impl From<SlotError> for Error {
    fn from(error: SlotError) -> Error {
        match error {
            SlotError::NoSuchSlot(slot) => no_such_slot(&slot),
            SlotError::SlotTaken(sentence) => Error::new(ErrorKind::SlotTaken, sentence),
        }
    }
}

/// May `worker`, which has no record yet, take `slot`, where these workers have one?
pub fn may_take(
    config: &Config,
    workers: &[(WorkerId, Record)],
    worker: WorkerId,
    slot: &SlotName,
) -> Result<(), SlotError> {
    if !config.slots.contains_key(slot) {
        return Err(SlotError::NoSuchSlot(slot.clone()));
    }
    for (other, Record { slot: taken, .. }) in workers.iter().filter(|(other, _)| *other != worker) {
        if taken == slot {
            let message = format!("slot {slot} has worker {other}: delete that one first");
            return Err(SlotError::SlotTaken(message));
        }
        if config.are_conflicting(taken, slot) {
            let message = format!(
                "slot {slot} conflicts with {taken}, which has worker {other}: delete that one first"
            );
            return Err(SlotError::SlotTaken(message));
        }
    }
    // Only workers whose slots have left the configuration can bring the count here.
    if workers.len() >= config.slots.len() {
        let message = format!(
            "{} workers exist, as many as there are slots: delete those of removed slots first",
            workers.len()
        );
        return Err(SlotError::SlotTaken(message));
    }
    Ok(())
}

/// The uids of the range in the order in which to try them: all of them but those in use, from one that the random part of the
/// worker's id says, so that the next worker begins elsewhere.
pub fn candidates(range: UidRange, worker: WorkerId, used: &BTreeSet<u32>) -> impl Iterator<Item = Uid> {
    let (first, len) = (range.first.get(), range.len());
    let start = (worker.to_bits() % u128::from(len)) as u32;
    (0..len)
        .map(move |i| first + (start + i) % len)
        .filter(|uid| !used.contains(uid))
        .filter_map(|uid| Uid::try_from(uid).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let slot = |name: &str, rest: &str| {
            format!("[slots.{name}]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n{rest}\n")
        };
        let head = "[general]\nbaseurl = \"http://b\"\n[factory]\ntoken_file = \"/t\"\n";
        Config::parse(
            &(head.to_owned()
                + &slot("a", "conflicts_with_slots = [\"b\"]")
                + &slot("b", "")
                + &slot("c", "")),
        )
        .unwrap()
    }

    fn of(worker: u128, slot: &str) -> (WorkerId, Record) {
        let uid = Uid::try_from(2_000_000 + worker as u32).unwrap();
        let record = Record::new(slot.parse().unwrap(), uid);
        (WorkerId::from_bits(worker), record)
    }

    #[test]
    fn a_slot_is_for_one_worker_and_conflicts_work_both_ways() {
        let config = config();
        let take = |workers: &[(WorkerId, Record)], worker: u128, slot: &str| {
            let worker = WorkerId::from_bits(worker);
            may_take(&config, workers, worker, &slot.parse().unwrap()).map_err(|e| Error::from(e).kind)
        };
        assert_eq!(take(&[], 1, "a"), Ok(()));
        assert_eq!(take(&[], 1, "zz"), Err(ErrorKind::NoSuchSlot));
        assert_eq!(take(&[of(2, "a")], 1, "a"), Err(ErrorKind::SlotTaken));
        assert_eq!(take(&[of(2, "b")], 1, "a"), Err(ErrorKind::SlotTaken));
        assert_eq!(take(&[of(2, "a")], 1, "b"), Err(ErrorKind::SlotTaken));
        assert_eq!(take(&[of(2, "a")], 1, "c"), Ok(()));
        let gone = [of(2, "x"), of(3, "y"), of(4, "z")];
        assert_eq!(take(&gone, 1, "c"), Err(ErrorKind::SlotTaken));
    }

    #[test]
    fn every_free_uid_is_tried_once_and_no_used_one() {
        let first = Uid::try_from(2_000_000).unwrap();
        let range = UidRange {
            first,
            last: Uid::try_from(2_000_009).unwrap(),
        };
        let mut first = BTreeSet::new();
        for bits in 0..20 {
            let used = BTreeSet::from([2_000_003, 2_000_009]);
            let worker = WorkerId::from_bits(bits);
            let tried: Vec<u32> = candidates(range, worker, &used).map(Uid::get).collect();
            first.insert(tried[0]);
            let tried = BTreeSet::from_iter(tried);
            assert_eq!(tried.len(), 8);
            assert!(tried.is_disjoint(&used));
        }
        assert_eq!(first.len(), 8, "workers begin at different ones");
    }
}
