//! Notifications to systemd, where it wants them (`sd_notify(3)`).

use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

/// The factory serves.
pub fn notify_ready() {
    notify("READY=1");
}

/// The watchdog that systemd may want (`sd_watchdog_enabled(3)`). It must be fed by what would hang: the loop itself, not a
/// thread beside it.
#[derive(Debug, Default)]
pub struct Watchdog {
    /// How often to notify; none where systemd does not wait for it.
    every: Option<Duration>,
    last: Option<Instant>,
}

impl Watchdog {
    /// What the unit asks of this process.
    pub fn of_the_unit() -> Self {
        let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
        // Without a pid it is meant for every process that has the variables.
        let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        Self::within(
            number("WATCHDOG_USEC")
                .filter(|_| ours)
                .map(Duration::from_micros),
        )
    }

    /// Half of the time that is allowed: one notification may come late.
    fn within(limit: Option<Duration>) -> Self {
        Self {
            every: limit.filter(|limit| !limit.is_zero()).map(|limit| limit / 2),
            last: None,
        }
    }

    /// Notify that the loop runs, unless that was done a moment ago. Returns when it wants to be called again.
    pub fn notify_watchdog(&mut self) -> Option<Duration> {
        let every = self.every?;
        let left = self
            .last
            .map_or(Duration::ZERO, |last| every.saturating_sub(last.elapsed()));
        if !left.is_zero() {
            return Some(left);
        }
        notify("WATCHDOG=1");
        self.last = Some(Instant::now());
        Some(every)
    }
}

fn notify(text: &str) {
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
    fn it_notifies_at_once_and_then_twice_in_the_time_allowed() {
        let mut watchdog = Watchdog::within(Some(Duration::from_secs(3600)));
        let half = Duration::from_secs(1800);
        assert_eq!(watchdog.notify_watchdog(), Some(half));
        let again = watchdog.notify_watchdog().unwrap();
        assert!(again <= half && again > half / 2, "{again:?}");
    }

    #[test]
    fn without_a_watchdog_nothing_is_sent() {
        assert_eq!(Watchdog::within(None).notify_watchdog(), None);
        assert_eq!(Watchdog::within(Some(Duration::ZERO)).notify_watchdog(), None);
    }
}
