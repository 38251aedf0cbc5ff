//! Which calls have no answer yet, and since when: what the status shows of a server or a helper that does not answer.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// The calls of one client that are expected to take no longer than an instant, whatever a job is like.
#[derive(Debug, Default)]
pub struct PendingCalls(Mutex<(u64, BTreeMap<u64, Instant>)>);

/// One of them, until it is dropped.
#[derive(Debug)]
pub struct PendingCall<'a> {
    calls: &'a PendingCalls,
    number: u64,
}

impl PendingCalls {
    #[must_use]
    pub fn begin(&self) -> PendingCall<'_> {
        let mut calls = self.lock();
        calls.0 += 1;
        let number = calls.0;
        calls.1.insert(number, Instant::now());
        PendingCall { calls: self, number }
    }

    /// How long the oldest has had no answer.
    pub fn longest(&self) -> Option<Duration> {
        // Numbers are given in the order of time.
        self.lock().1.values().next().map(Instant::elapsed)
    }

    fn lock(&self) -> MutexGuard<'_, (u64, BTreeMap<u64, Instant>)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for PendingCall<'_> {
    fn drop(&mut self) {
        self.calls.lock().1.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_oldest_call_counts_until_it_has_its_answer() {
        let calls = PendingCalls::default();
        assert_eq!(calls.longest(), None);
        let first = calls.begin();
        tokio::time::advance(Duration::from_secs(3)).await;
        let second = calls.begin();
        tokio::time::advance(Duration::from_secs(3)).await;
        assert_eq!(calls.longest(), Some(Duration::from_secs(6)));
        drop(first);
        assert_eq!(calls.longest(), Some(Duration::from_secs(3)));
        drop(second);
        assert_eq!(calls.longest(), None);
    }
}
