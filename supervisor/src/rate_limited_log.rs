//! Warnings that a client can cause: one a minute, so that no client fills the log.

use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_secs(60);

/// When the last one was logged, and how many were not since.
#[derive(Debug, Default)]
pub struct RateLimitedLog(Mutex<(Option<Instant>, u64)>);

impl RateLimitedLog {
    pub fn warn(&self, what: fmt::Arguments<'_>) {
        match self.left_out(Instant::now()) {
            Some(0) => tracing::warn!("{what}"),
            Some(left_out) => tracing::warn!(left_out, "{what}"),
            None => tracing::debug!("{what}"),
        }
    }

    /// If it is time for the next one: how many were left out before it.
    fn left_out(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (last, left_out) = &mut *state;
        if last.is_some_and(|last| now.saturating_duration_since(last) < PAUSE) {
            *left_out += 1;
            return None;
        }
        *last = Some(now);
        Some(std::mem::take(left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_a_minute_is_logged_and_the_others_are_counted() {
        let (log, now) = (RateLimitedLog::default(), Instant::now());
        assert_eq!(log.left_out(now), Some(0));
        assert_eq!(log.left_out(now), None);
        assert_eq!(log.left_out(now + PAUSE - Duration::from_millis(1)), None);
        assert_eq!(log.left_out(now + PAUSE), Some(2));
        assert_eq!(log.left_out(now + 2 * PAUSE), Some(0));
    }
}
