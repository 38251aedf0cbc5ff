//! How many connections there may be: of one client, and of all clients together.

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

/// What is counted for each key: a uid, or an address.
type Counts<K> = Arc<Mutex<HashMap<K, usize>>>;

#[derive(Debug)]
pub struct ConnectionLimiter<K: Copy + Eq + Hash + Debug> {
    of_one: usize,
    of_all: usize,
    /// How many clients each have their share of all, whatever the others do.
    clients: usize,
    counts: Counts<K>,
}

/// One connection. Dropped, it counts no more.
#[derive(Debug)]
pub struct Permit<K: Copy + Eq + Hash + Debug> {
    key: K,
    counts: Counts<K>,
}

impl<K: Copy + Eq + Hash + Debug> ConnectionLimiter<K> {
    /// At most `of_one` connections of one client and `of_all` of all, where so many `clients` are expected: each has
    /// at least its share of all.
    pub fn new(of_one: usize, of_all: usize, clients: usize) -> Self {
        Self {
            of_one,
            of_all,
            clients,
            counts: Arc::default(),
        }
    }

    /// None where this client, or all together, have as many as they may.
    pub fn take(&self, key: K) -> Option<Permit<K>> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let others = counts.keys().filter(|other| **other != key).count();
        let share = self.of_all / self.clients.max(others + 1);
        let own = counts.get(&key).copied().unwrap_or(0);
        if own >= self.of_one.min(share.max(1)) || counts.values().sum::<usize>() >= self.of_all {
            return None;
        }
        counts.insert(key, own + 1);
        Some(Permit {
            key,
            counts: self.counts.clone(),
        })
    }
}

impl<K: Copy + Eq + Hash + Debug> Drop for Permit<K> {
    fn drop(&mut self) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        match counts.get_mut(&self.key) {
            Some(count) if *count > 1 => *count -= 1,
            // Callers come and go: nothing is kept of those without a connection.
            _ => {
                counts.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_few_for_one_and_for_all_and_count_until_they_are_dropped() {
        let limiter = ConnectionLimiter::new(2, 3, 1);
        let first = limiter.take(7).unwrap();
        let second = limiter.take(7).unwrap();
        assert!(limiter.take(7).is_none());
        let other = limiter.take(8).unwrap();
        assert!(limiter.take(9).is_none());
        drop(first);
        assert!(limiter.take(9).is_some());
        drop((second, other));
        assert!(limiter.counts.lock().unwrap().is_empty());
    }

    #[test]
    fn a_caller_has_its_share_whatever_the_others_take() {
        let limiter = ConnectionLimiter::new(64, 40, 4);
        let mut permits = Vec::new();
        for client in 0..4 {
            let before = permits.len();
            permits.extend(std::iter::from_fn(|| limiter.take(client)));
            assert_eq!(permits.len() - before, 10, "client {client}");
        }
    }
}
