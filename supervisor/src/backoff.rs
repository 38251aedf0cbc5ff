//! How long to wait before trying again: exponential, with jitter, capped. Pure; it never sleeps.

use crate::call_error::{CallError, Peer};

/// The longest wait that a server's `Retry-After` can cause, in milliseconds.
pub const MAX_RETRY_AFTER: u64 = 600_000;

/// The longest wait after calls that the server has failed, in milliseconds: it is shared by many.
pub const MAX_SERVER_WAIT: u64 = 60_000;

/// A small deterministic generator (splitmix64), so that the same seed gives the same factory.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The same seed draws the same numbers.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any of the 2^64 numbers.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Failures in a row of one thing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// The longest wait, in milliseconds. The helper is on this host and restarts in an instant.
    pub const fn cap(peer: Peer) -> u64 {
        match peer {
            Peer::Server => MAX_SERVER_WAIT,
            Peer::Helper | Peer::Database => 5_000,
        }
    }

    /// Note a failure: the wait before the next try, in milliseconds, between half and all of
    /// 500 ms · 2^failures or the cap.
    pub fn fail(&mut self, peer: Peer, rng: &mut Rng) -> u64 {
        let full = (500u64 << self.failures.min(16)).min(Self::cap(peer));
        self.failures = self.failures.saturating_add(1);
        full / 2 + rng.draw() % (full / 2 + 1)
    }

    /// The same after this failure, and no less than the server asks for, up to [`MAX_RETRY_AFTER`].
    pub fn fail_with(&mut self, error: &CallError, rng: &mut Rng) -> u64 {
        let asked = error.retry_after.unwrap_or(0).min(MAX_RETRY_AFTER);
        self.fail(error.peer, rng).max(asked)
    }

    /// The next failure is the first again.
    pub fn succeed(&mut self) {
        self.failures = 0;
    }

    /// Since the last success.
    pub fn failures(self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::{Backoff, Peer, Rng};
    use proptest::prelude::{any, prop_assert, proptest};

    proptest! {
        #[test]
        fn waits_grow_to_the_cap_and_never_beyond(seed in any::<u64>(), helper in any::<bool>()) {
            let peer = if helper { Peer::Helper } else { Peer::Server };
            let (mut backoff, mut rng) = (Backoff::default(), Rng::new(seed));
            for n in 0..100u32 {
                let wait = backoff.fail(peer, &mut rng);
                let full = (500u64 << n.min(16)).min(Backoff::cap(peer));
                prop_assert!((full / 2..=full).contains(&wait));
            }
            backoff.succeed();
            prop_assert!(backoff.fail(peer, &mut rng) <= 500);
        }
    }
}
