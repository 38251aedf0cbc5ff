//! Which slots may take a job now. Pure: slots in, slots out.
//!
//! There may be thousands of slots, which exclude each other in any number, and this is asked at every poll and every
//! lease. So conflicts are kept by number, and a name is looked up once for each used slot.

use std::collections::{BTreeMap, BTreeSet};

use protocol::config::Config;
use protocol::{SlotName, Target, TargetId, TargetName};

/// The slots of one configuration, by number: the order is that of their names.
#[derive(Debug)]
pub struct SlotSchedule {
    names: Vec<SlotName>,
    /// None for a name that is not looked up yet.
    targets: Vec<Option<TargetId>>,
    /// The others that each excludes, whichever of the two says so.
    conflicts: Vec<Vec<u32>>,
    of_target: BTreeMap<TargetId, Vec<u32>>,
}

impl SlotSchedule {
    /// Conflicts that only one of two slots names are both's. `ids` are those of the targets that the configuration has by
    /// name: a slot whose target has none takes no job.
    pub fn of(config: &Config, ids: &BTreeMap<TargetName, TargetId>) -> SlotSchedule {
        let names: Vec<SlotName> = config.slots.keys().cloned().collect();
        let targets = config.slots.values().map(|slot| match &slot.target {
            Target::Id(id) => Some(*id),
            Target::Name(name) => ids.get(name).copied(),
        });
        let targets: Vec<Option<TargetId>> = targets.collect();
        let mut schedule = SlotSchedule {
            conflicts: vec![Vec::new(); names.len()],
            of_target: BTreeMap::new(),
            names,
            targets,
        };
        for (number, slot) in (0..).zip(config.slots.values()) {
            if let Some(target) = schedule.targets[number as usize] {
                schedule.of_target.entry(target).or_default().push(number);
            }
            for name in &slot.conflicts_with_slots {
                let Some(other) = schedule.number(name) else {
                    continue;
                };
                schedule.conflicts[number as usize].push(other);
                schedule.conflicts[other as usize].push(number);
            }
        }
        for others in &mut schedule.conflicts {
            others.sort_unstable();
            others.dedup();
            others.shrink_to_fit();
        }
        schedule
    }

    /// The id of this slot's target: none for a slot that is not there, or whose target is not looked up yet.
    pub fn target(&self, slot: &SlotName) -> Option<TargetId> {
        self.targets[self.number(slot)? as usize]
    }

    /// Is this slot there, and its target this one, as far as that is known?
    pub fn may_have(&self, slot: &SlotName, target: TargetId) -> bool {
        let number = self.number(slot);
        number.is_some_and(|number| self.targets[number as usize].is_none_or(|of| of == target))
    }

    /// Is there a slot whose target is not looked up yet?
    pub fn has_unresolved(&self) -> bool {
        self.targets.contains(&None)
    }

    fn number(&self, name: &SlotName) -> Option<u32> {
        let at = self.names.binary_search(name).ok()?;
        u32::try_from(at).ok()
    }

    /// The slots that are neither used, nor excluded by a used one (in either direction), nor in `excluded` (cooling down,
    /// drained or absent), and whose target is looked up. A used slot that has left the configuration counts as one of those
    /// that are there: the helper has no more workers than slots.
    pub fn free<'a>(
        &self,
        used: &'a BTreeSet<SlotName>,
        excluded: impl IntoIterator<Item = &'a SlotName>,
    ) -> FreeSlots<'_> {
        let mut free = FreeSlots {
            schedule: self,
            closed: self.targets.iter().map(Option::is_none).collect(),
            used: 0,
        };
        for slot in used {
            free.take(slot);
        }
        for number in excluded.into_iter().filter_map(|slot| self.number(slot)) {
            free.closed[number as usize] = true;
        }
        free
    }

    /// For each slot that a used one excludes, the first of those.
    pub fn excluded<'a>(&'a self, used: &'a BTreeSet<SlotName>) -> BTreeMap<&'a SlotName, &'a SlotName> {
        let mut excluded = BTreeMap::new();
        for slot in used {
            for other in self.number(slot).map_or(&[][..], |n| &self.conflicts[n as usize]) {
                excluded.entry(&self.names[*other as usize]).or_insert(slot);
            }
        }
        excluded
    }

    /// Are there as many workers as slots? The helper makes no more then, also in a slot that has none.
    pub fn is_full(&self, used: &BTreeSet<SlotName>) -> bool {
        self.has_no_room(used.len())
    }

    fn has_no_room(&self, used: usize) -> bool {
        used >= self.names.len()
    }
}

/// The slots that may take a job, until one is taken.
#[derive(Clone, Debug)]
pub struct FreeSlots<'a> {
    schedule: &'a SlotSchedule,
    /// By number.
    closed: Vec<bool>,
    used: usize,
}

impl FreeSlots<'_> {
    /// This slot is used from now on. It must not have been before.
    pub fn take(&mut self, slot: &SlotName) {
        self.used += 1;
        if let Some(number) = self.schedule.number(slot) {
            self.close(number as usize);
        }
    }

    fn close(&mut self, number: usize) {
        self.closed[number] = true;
        for other in &self.schedule.conflicts[number] {
            self.closed[*other as usize] = true;
        }
    }

    fn is_open(&self, number: u32) -> bool {
        !self.schedule.has_no_room(self.used) && !self.closed[number as usize]
    }

    /// All of them, in the order of names.
    pub fn slots(&self) -> impl Iterator<Item = &SlotName> {
        (0..)
            .zip(&self.schedule.names)
            .filter(|(number, _)| self.is_open(*number))
            .map(|(_, name)| name)
    }

    /// Is no slot free?
    pub fn is_empty(&self) -> bool {
        self.slots().next().is_none()
    }

    /// The targets to ask jobs for.
    pub fn targets(&self) -> BTreeSet<TargetId> {
        let of_target = self.schedule.of_target.iter();
        of_target
            .filter(|(_, slots)| slots.iter().any(|slot| self.is_open(*slot)))
            .map(|(target, _)| *target)
            .collect()
    }

    /// The slot for a job of this target.
    pub fn pick(&self, target: TargetId) -> Option<&SlotName> {
        let mut slots = self.schedule.of_target.get(&target)?.iter();
        slots
            .find(|slot| self.is_open(**slot))
            .map(|slot| &self.schedule.names[*slot as usize])
    }

    /// This slot, if it may take a job of this target.
    pub fn has(&self, name: &str, target: TargetId) -> Option<&SlotName> {
        let number = self
            .schedule
            .names
            .binary_search_by(|slot| slot.as_str().cmp(name))
            .ok()?;
        let open = self.schedule.targets[number] == Some(target) && self.is_open(u32::try_from(number).ok()?);
        open.then(|| &self.schedule.names[number])
    }
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

    fn names(free: &FreeSlots<'_>) -> Vec<SlotName> {
        free.slots().cloned().collect()
    }

    #[test]
    fn a_conflict_excludes_in_both_directions() {
        let config = config(&[(0, 1)], &[7, 7, 8]);
        let schedule = SlotSchedule::of(&config, &BTreeMap::new());
        let all: Vec<SlotName> = config.slots.keys().cloned().collect();
        let none = BTreeSet::new();
        for used in 0..2 {
            let used = [all[used].clone()].into();
            assert_eq!(names(&schedule.free(&used, [])), [all[2].clone()]);
            let excluded = schedule.excluded(&used);
            assert_eq!(excluded.values().collect::<Vec<_>>(), [&used.first().unwrap()]);
        }
        let free = schedule.free(&none, [&all[1]]);
        assert_eq!(names(&free), [all[0].clone(), all[2].clone()]);
        assert_eq!(free.targets().len(), 2);
        assert_eq!(free.pick(TargetId::from_bits(8)), Some(&all[2]));
        assert_eq!(free.pick(TargetId::from_bits(9)), None);
        assert_eq!(free.has("s0", TargetId::from_bits(7)), Some(&all[0]));
        for (name, target) in [("s0", 8), ("s1", 7), ("zz", 7)] {
            assert_eq!(free.has(name, TargetId::from_bits(target)), None, "{name}");
        }
    }

    #[test]
    fn a_used_slot_that_has_left_counts_as_one_of_those_that_are_there() {
        let config = config(&[], &[7, 7]);
        let schedule = SlotSchedule::of(&config, &BTreeMap::new());
        let gone: SlotName = "gone".parse().unwrap();
        let mut used = BTreeSet::from([gone]);
        assert_eq!(schedule.free(&used, []).slots().count(), 2);
        used.insert(config.slots.keys().next().unwrap().clone());
        let free = schedule.free(&used, []);
        assert!(free.is_empty() && free.targets().is_empty());
        assert_eq!(free.pick(TargetId::from_bits(7)), None);
    }

    proptest! {
        #[test]
        fn picking_until_nothing_is_left_never_uses_conflicting_slots(
            conflicts in proptest::collection::vec((0usize..6, 0usize..6), 0..12),
            wanted in proptest::collection::vec(0u128..3, 0..12),
        ) {
            let config = config(&conflicts, &[0, 1, 2, 0, 1, 2]);
            let schedule = SlotSchedule::of(&config, &BTreeMap::new());
            let mut used = BTreeSet::new();
            let mut taking = schedule.free(&used, []);
            for target in wanted {
                let free = schedule.free(&used, []);
                // What was taken one by one, and what was counted anew, is the same.
                prop_assert_eq!(names(&free), names(&taking));
                let free_by_name = config.slots.keys().filter(|slot| {
                    !used.contains(*slot) && !used.iter().any(|other| config.are_conflicting(slot, other))
                });
                prop_assert_eq!(names(&free), free_by_name.cloned().collect::<Vec<_>>());
                if let Some(slot) = free.pick(TargetId::from_bits(target)).cloned() {
                    prop_assert_eq!(&config.slots[&slot].target, &Target::Id(TargetId::from_bits(target)));
                    taking.take(&slot);
                    prop_assert!(used.insert(slot));
                }
            }
            for a in &used {
                prop_assert!(!used.iter().any(|b| config.are_conflicting(a, b)));
            }
        }
    }
}
