//! The log: one line an event, to standard error. Under systemd each line begins with its priority (`sd-daemon(3)`),
//! elsewhere with the time.

use std::fmt;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::time::{Duration, UNIX_EPOCH};

use nix::sys::stat::fstat;

/// Does a line begin with its priority? Nothing is logged before this is known.
static IS_JOURNAL: OnceLock<bool> = OnceLock::new();

/// Its number (`sd-daemon(3)`), and its name as it is logged.
pub type Level = (u8, &'static str);

/// Begin to log.
pub fn start() {
    // Has systemd connected it to the journal (`systemd.exec(5)`)?
    let journal = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    let is_journal = fstat(std::io::stderr().as_fd())
        .is_ok_and(|stat| journal == format!("{}:{}", stat.st_dev, stat.st_ino));
    let _ = IS_JOURNAL.set(is_journal);
}

pub fn write(level: Level, event: fmt::Arguments<'_>) {
    let Some(is_journal) = IS_JOURNAL.get() else {
        return;
    };
    let now = UNIX_EPOCH.elapsed().unwrap_or_default();
    let line = line(*is_journal, now, level, &event.to_string());
    // In one call, so that processes do not mix their lines. A log that cannot be written stops nothing.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// `now` is the time since 1970. An event with line breaks, or what a terminal would obey, is still one line.
fn line(is_journal: bool, now: Duration, (priority, level): Level, event: &str) -> String {
    let mut line = match is_journal {
        true => format!("<{priority}>"),
        false => {
            let (date, seconds) = (date(now.as_secs() / 86400), now.as_secs() % 86400);
            let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
            format!(
                "{date}T{hour:02}:{minute:02}:{second:02}.{:06}Z ",
                now.subsec_micros()
            )
        }
    };
    line += level;
    line.push(' ');
    line += &protocol::one_line(event);
    line.push('\n');
    line
}

/// The date, in the Gregorian calendar, of a day that is counted from 1970-01-01. Years are counted from March, so that
/// the day of a leap year is the last, and in periods of 400 years, which have 146,097 days each.
fn date(day: u64) -> String {
    let day = day + 719_468;
    let (period, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (year, month) = match month {
        0..10 => (year, month + 3),
        _ => (year + 1, month - 9),
    };
    format!("{:04}-{month:02}-{day:02}", period * 400 + year)
}

macro_rules! info {
    ($($event:tt)*) => { $crate::log::write((6, " INFO"), format_args!($($event)*)) };
}

macro_rules! warning {
    ($($event:tt)*) => { $crate::log::write((4, " WARN"), format_args!($($event)*)) };
}

macro_rules! error {
    ($($event:tt)*) => { $crate::log::write((3, "ERROR"), format_args!($($event)*)) };
}

pub(crate) use {error, info, warning as warn};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_time_or_the_priority() {
        let now = Duration::from_micros(1_795_858_509_000_042);
        assert_eq!(
            line(false, now, (4, " WARN"), "no slot"),
            "2026-11-28T09:35:09.000042Z  WARN no slot\n"
        );
        for (level, expected) in [
            ((6, " INFO"), "<6> INFO x\n"),
            ((4, " WARN"), "<4> WARN x\n"),
            ((3, "ERROR"), "<3>ERROR x\n"),
        ] {
            assert_eq!(line(true, now, level, "x"), expected);
        }
    }

    #[test]
    fn an_event_is_one_line() {
        let event = "a\n<0>b\u{1b}[2Jé";
        let line = line(true, Duration::ZERO, (6, " INFO"), event);
        assert_eq!(line, "<6> INFO a\\n<0>b\\u{1b}[2Jé\n");
    }

    #[test]
    fn dates_follow_the_calendar() {
        for (day, expected) in [
            (0, "1970-01-01"),
            (59, "1970-03-01"),
            (11_016, "2000-02-29"),
            (11_017, "2000-03-01"),
            (20_785, "2026-11-28"),
            (21_243, "2028-02-29"),
            (47_540, "2100-02-28"),
            (47_541, "2100-03-01"),
        ] {
            assert_eq!(date(day), expected);
        }
        // Each day is one after the day before it.
        let length = |year: u64, month: u64| match month {
            2 if year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400)) => 29,
            2 => 28,
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        };
        let (mut year, mut month, mut day) = (1970, 1, 1);
        for count in 0..200_000 {
            assert_eq!(date(count), format!("{year:04}-{month:02}-{day:02}"));
            day += 1;
            if day > length(year, month) {
                (month, day) = (month + 1, 1);
            }
            if month > 12 {
                (year, month) = (year + 1, 1);
            }
        }
    }
}
