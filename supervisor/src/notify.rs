//! A word to systemd, where it is there to hear it (`sd_notify(3)`).

use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

/// The factory serves.
pub fn ready() {
    say("READY=1");
}

/// The promise to be heard of again and again, where systemd wants one (`sd_watchdog_enabled(3)`). Whoever keeps it
/// must be what would hang: the loop itself, not a thread beside it.
#[derive(Debug, Default)]
pub struct Watchdog {
    /// How often to say it; none where nobody waits for it.
    every: Option<Duration>,
    said: Option<Instant>,
}

impl Watchdog {
    /// What the unit asks of this process.
    pub fn of_the_unit() -> Self {
        let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
        // Without a pid it is meant for whoever has the variables.
        let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        Self::within(
            number("WATCHDOG_USEC")
                .filter(|_| ours)
                .map(Duration::from_micros),
        )
    }

    /// Half of the time that is allowed: one word may come late.
    fn within(limit: Option<Duration>) -> Self {
        Self {
            every: limit.filter(|limit| !limit.is_zero()).map(|limit| limit / 2),
            said: None,
        }
    }

    /// Say that the loop turns, unless that was said a moment ago. Returns when it wants to be called again.
    pub fn alive(&mut self) -> Option<Duration> {
        let every = self.every?;
        let left = self
            .said
            .map_or(Duration::ZERO, |said| every.saturating_sub(said.elapsed()));
        if !left.is_zero() {
            return Some(left);
        }
        say("WATCHDOG=1");
        self.said = Some(Instant::now());
        Some(every)
    }
}

fn say(text: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let sent = UnixDatagram::unbound().and_then(|socket| socket.send_to(text.as_bytes(), path));
    if let Err(error) = sent {
        tracing::warn!("cannot tell systemd {text}: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_said_at_once_and_then_twice_in_the_time_allowed() {
        let mut watchdog = Watchdog::within(Some(Duration::from_secs(3600)));
        let half = Duration::from_secs(1800);
        assert_eq!(watchdog.alive(), Some(half));
        let again = watchdog.alive().unwrap();
        assert!(again <= half && again > half / 2, "{again:?}");
    }

    #[test]
    fn where_nobody_waits_for_it_nothing_is_said() {
        assert_eq!(Watchdog::within(None).alive(), None);
        assert_eq!(Watchdog::within(Some(Duration::ZERO)).alive(), None);
    }
}
