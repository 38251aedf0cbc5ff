//! What the operator has drained: on which slots, why, and until when no jobs are taken.

use std::collections::BTreeMap;

use protocol::SlotName;

/// The drains, each with its slot; none is the key for a drain of all slots.
pub type Drains = BTreeMap<Option<SlotName>, Drain>;

/// An operator's drain: no jobs are taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drain {
    /// The operator's text, for whoever looks at the status.
    pub reason: Option<String>,
    /// When it ends, in milliseconds since 1970 by the host's clock; none where it lasts until it is resumed.
    pub until: Option<u64>,
}

/// When the next drain ends.
pub fn next_end(drains: &Drains) -> Option<u64> {
    drains.values().filter_map(|drain| drain.until).min()
}

/// What has come to its end by this time of the host's clock.
pub fn ended(drains: &Drains, wall: u64) -> Vec<Option<SlotName>> {
    let ended = drains
        .iter()
        .filter(|(_, drain)| drain.until.is_some_and(|end| end <= wall));
    ended.map(|(slot, _)| slot.clone()).collect()
}
