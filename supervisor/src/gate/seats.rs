//! How many connections there may be: of one uid, and of all together. A seat is given back by dropping it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

#[derive(Debug)]
pub(super) struct Seats {
    of_one: usize,
    of_all: usize,
    taken: Arc<Mutex<HashMap<u32, usize>>>,
}

#[derive(Debug)]
pub(super) struct Seat {
    uid: u32,
    taken: Arc<Mutex<HashMap<u32, usize>>>,
}

impl Seats {
    pub(super) fn new(of_one: usize, of_all: usize) -> Seats {
        Seats {
            of_one,
            of_all,
            taken: Arc::default(),
        }
    }

    pub(super) fn take(&self, uid: u32) -> Option<Seat> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.values().sum::<usize>() >= self.of_all {
            return None;
        }
        let mine = taken.entry(uid).or_default();
        if *mine >= self.of_one {
            return None;
        }
        *mine += 1;
        Some(Seat {
            uid,
            taken: self.taken.clone(),
        })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        match taken.get_mut(&self.uid) {
            Some(mine) if *mine > 1 => *mine -= 1,
            // Uids come and go: nothing is kept of those that have left.
            _ => {
                taken.remove(&self.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seats_are_few_for_one_and_for_all_and_come_back() {
        let seats = Seats::new(2, 3);
        let first = seats.take(7).unwrap();
        let second = seats.take(7).unwrap();
        assert!(seats.take(7).is_none());
        let other = seats.take(8).unwrap();
        assert!(seats.take(9).is_none());
        drop(first);
        assert!(seats.take(9).is_some());
        drop((second, other));
        assert!(seats.taken.lock().unwrap().is_empty());
    }
}
