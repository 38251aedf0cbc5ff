//! The log: one line an event, with the worker, slot and job that it is about as fields. Under systemd it goes to
//! the journal with these as fields of the journal's own (`journalctl WORKER=…`), elsewhere to standard error.

use std::os::fd::AsFd;

use nix::sys::stat::fstat;
use tracing::Level;
use tracing::level_filters::LevelFilter;
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Begin to log what is at least as urgent as `level`.
pub fn start(level: Level) {
    let filter = LevelFilter::from_level(level);
    if is_the_journal(&std::io::stderr())
        && let Ok(journal) = tracing_journald::layer()
    {
        let journal = journal
            .with_field_prefix(None)
            .with_priority_mappings(PriorityMappings {
                info: Priority::Informational,
                debug: Priority::Debug,
                ..PriorityMappings::new()
            })
            .with_syslog_identifier("user-factory".into());
        return tracing_subscriber::registry().with(journal).with(filter).init();
    }
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false);
    tracing_subscriber::registry().with(lines).with(filter).init();
}

/// Has systemd connected this stream to the journal (`$JOURNAL_STREAM`, `systemd.exec(5)`)?
fn is_the_journal(stream: &impl AsFd) -> bool {
    let told = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    let Ok(stat) = fstat(stream) else {
        return false;
    };
    told == format!("{}:{}", stat.st_dev, stat.st_ino)
}
