//! Which slots may take a job now. Pure: slots in, slots out.

use std::collections::BTreeSet;

use protocol::config::Config;
use protocol::{SlotName, TargetId};

/// The slots that are neither used, nor excluded by a used one (in either direction), nor resting. A used slot
/// that has left the configuration counts as one of those that are there: the helper has no more workers than
/// slots.
pub fn available(config: &Config, used: &BTreeSet<SlotName>, resting: &BTreeSet<SlotName>) -> Vec<SlotName> {
    if used.len() >= config.slots.len() {
        return Vec::new();
    }
    let free = |slot: &SlotName| {
        !used.contains(slot)
            && !resting.contains(slot)
            && !used.iter().any(|other| config.conflict(slot, other))
    };
    config.slots.keys().filter(|slot| free(slot)).cloned().collect()
}

/// The targets to ask jobs for.
pub fn targets(config: &Config, available: &[SlotName]) -> BTreeSet<TargetId> {
    available
        .iter()
        .filter_map(|slot| config.slots.get(slot))
        .map(|slot| slot.target)
        .collect()
}

/// The slot for a job of this target.
pub fn pick(config: &Config, available: &[SlotName], target: TargetId) -> Option<SlotName> {
    available
        .iter()
        .find(|slot| config.slots.get(slot).is_some_and(|s| s.target == target))
        .cloned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config(conflicts: &[(usize, usize)], targets: &[u128]) -> Config {
        let mut text = String::from("[general]\nbaseurl = \"http://h\"\n[factory]\ntoken_file = \"/t\"\n");
        for (i, target) in targets.iter().enumerate() {
            let with: Vec<String> = conflicts
                .iter()
                .filter(|(a, b)| *a == i && a != b)
                .map(|(_, b)| format!("\"s{b}\""))
                .collect();
            text += &format!(
                "[slots.s{i}]\ntarget = \"{}\"\nconflicts_with_slots = [{}]\n",
                TargetId::from_bits(*target),
                with.join(", ")
            );
        }
        Config::parse(&text).unwrap()
    }

    #[test]
    fn a_conflict_excludes_in_both_directions() {
        let config = config(&[(0, 1)], &[7, 7, 8]);
        let names: Vec<SlotName> = config.slots.keys().cloned().collect();
        let none = BTreeSet::new();
        for used in 0..2 {
            let free = available(&config, &[names[used].clone()].into(), &none);
            assert_eq!(free, [names[2].clone()]);
        }
        assert_eq!(available(&config, &none, &[names[1].clone()].into()).len(), 2);
        assert_eq!(
            pick(&config, &names, TargetId::from_bits(8)),
            Some(names[2].clone())
        );
        assert_eq!(pick(&config, &names, TargetId::from_bits(9)), None);
        assert_eq!(targets(&config, &names).len(), 2);
    }

    #[test]
    fn a_used_slot_that_has_left_counts_as_one_of_those_that_are_there() {
        let config = config(&[], &[7, 7]);
        let none = BTreeSet::new();
        let gone: SlotName = "gone".parse().unwrap();
        let mut used = BTreeSet::from([gone]);
        assert_eq!(available(&config, &used, &none).len(), 2);
        used.insert(config.slots.keys().next().unwrap().clone());
        assert_eq!(available(&config, &used, &none), []);
    }

    proptest! {
        #[test]
        fn picking_until_nothing_is_left_never_uses_conflicting_slots(
            conflicts in proptest::collection::vec((0usize..6, 0usize..6), 0..12),
            wanted in proptest::collection::vec(0u128..3, 0..12),
        ) {
            let config = config(&conflicts, &[0, 1, 2, 0, 1, 2]);
            let mut used = BTreeSet::new();
            for target in wanted {
                let free = available(&config, &used, &BTreeSet::new());
                if let Some(slot) = pick(&config, &free, TargetId::from_bits(target)) {
                    prop_assert_eq!(config.slots[&slot].target, TargetId::from_bits(target));
                    prop_assert!(used.insert(slot));
                }
            }
            for a in &used {
                prop_assert!(!used.iter().any(|b| config.conflict(a, b)));
            }
        }
    }
}
