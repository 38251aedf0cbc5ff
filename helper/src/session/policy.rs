//! The decisions, pure: may this worker have this slot, and which uid does it get?

use std::collections::BTreeSet;

use protocol::config::{Config, UidRange};
use protocol::{Error, ErrorKind, SlotName, Uid, WorkerId};

use crate::host::no_such_slot;
use crate::host::record::Allocation;

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

/// May `worker`, which has no record yet, take `slot`?
pub fn may_take(
    config: &Config,
    allocations: &[Allocation],
    worker: WorkerId,
    slot: &SlotName,
) -> Result<(), SlotError> {
    if !config.slots.contains_key(slot) {
        return Err(SlotError::NoSuchSlot(slot.clone()));
    }
    for other in allocations.iter().filter(|other| other.worker != worker) {
        if other.slot == *slot {
            let message = format!("slot {slot} has worker {}: delete that one first", other.worker);
            return Err(SlotError::SlotTaken(message));
        }
        if config.conflict(&other.slot, slot) {
            let message = format!(
                "slot {slot} conflicts with {}, which has worker {}: delete that one first",
                other.slot, other.worker
            );
            return Err(SlotError::SlotTaken(message));
        }
    }
    // Only workers whose slots have left the configuration can bring the count here.
    if allocations.len() >= config.slots.len() {
        let message = format!(
            "{} workers exist, as many as there are slots: delete those of removed slots first",
            allocations.len()
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

    fn allocation(worker: u128, slot: &str) -> Allocation {
        let uid = Uid::try_from(2_000_000 + worker as u32).unwrap();
        Allocation {
            worker: WorkerId::from_bits(worker),
            slot: slot.parse().unwrap(),
            uid,
        }
    }

    #[test]
    fn a_slot_is_for_one_worker_and_conflicts_work_both_ways() {
        let config = config();
        let take = |allocations: &[Allocation], worker: u128, slot: &str| {
            may_take(
                &config,
                allocations,
                WorkerId::from_bits(worker),
                &slot.parse().unwrap(),
            )
            .map_err(|e| Error::from(e).kind)
        };
        assert_eq!(take(&[], 1, "a"), Ok(()));
        assert_eq!(take(&[], 1, "zz"), Err(ErrorKind::NoSuchSlot));
        assert_eq!(take(&[allocation(2, "a")], 1, "a"), Err(ErrorKind::SlotTaken));
        assert_eq!(take(&[allocation(2, "b")], 1, "a"), Err(ErrorKind::SlotTaken));
        assert_eq!(take(&[allocation(2, "a")], 1, "b"), Err(ErrorKind::SlotTaken));
        assert_eq!(take(&[allocation(2, "a")], 1, "c"), Ok(()));
        let gone = [allocation(2, "x"), allocation(3, "y"), allocation(4, "z")];
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
