//! The log: one line an event, with the worker, slot and job that it is about as fields. Under systemd it goes to
//! the journal with these as fields of the journal's own (`journalctl WORKER=…`), elsewhere to standard error.

use std::fmt::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;

use nix::sys::stat::fstat;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// Begin to log what is at least as urgent as `level`.
pub fn start(level: Level) {
    let filter = LevelFilter::from_level(level);
    if is_the_journal(&std::io::stderr())
        && let Ok(journal) = Journal::new()
    {
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

/// The journal, in its own protocol (<https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>). The crate tracing-journald leaves an
/// event's fields out of the message, which is all that `journalctl` shows.
struct Journal(UnixDatagram);

impl Journal {
    const SOCKET: &str = "/run/systemd/journal/socket";

    fn new() -> std::io::Result<Journal> {
        let socket = UnixDatagram::unbound()?;
        // It takes an empty entry for none.
        socket.send_to(b"", Journal::SOCKET)?;
        Ok(Journal(socket))
    }
}

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        // A log that cannot be written stops nothing.
        let _ = self.0.send_to(&entry(event), Journal::SOCKET);
    }
}

fn entry(event: &Event<'_>) -> Vec<u8> {
    let metadata = event.metadata();
    let priority = match *metadata.level() {
        Level::ERROR => "3",
        Level::WARN => "4",
        Level::INFO => "6",
        Level::DEBUG | Level::TRACE => "7",
    };
    let mut entry = Entry::default();
    event.record(&mut entry);
    let message = entry.message + &entry.fields;
    let mut bytes = entry.bytes;
    put(&mut bytes, "MESSAGE", message.trim_start());
    put(&mut bytes, "PRIORITY", priority);
    put(&mut bytes, "SYSLOG_IDENTIFIER", "user-factory");
    put(&mut bytes, "TARGET", metadata.target());
    put(&mut bytes, "CODE_FILE", metadata.file().unwrap_or_default());
    put(
        &mut bytes,
        "CODE_LINE",
        &metadata.line().unwrap_or_default().to_string(),
    );
    bytes
}

/// With its length, so that it may have lines. So much of it that a datagram can hold every field that an event has
/// (`net.core.wmem_default` is 208 KiB).
fn put(bytes: &mut Vec<u8>, name: &str, value: &str) {
    const MOST: usize = 8192;
    let value = &value[..value.floor_char_boundary(MOST)];
    bytes.extend(name.as_bytes());
    bytes.push(b'\n');
    bytes.extend((value.len() as u64).to_le_bytes());
    bytes.extend(value.as_bytes());
    bytes.push(b'\n');
}

/// An event as it is being read.
#[derive(Default)]
struct Entry {
    message: String,
    /// ` name=value` each, in one line.
    fields: String,
    /// The fields, in the journal's protocol.
    bytes: Vec<u8>,
}

impl Entry {
    fn add(&mut self, field: &Field, value: &str, shown: &str) {
        let text = match field.name() {
            "message" => &mut self.message,
            name => {
                put(&mut self.bytes, &name.to_uppercase(), value);
                let _ = write!(self.fields, " {name}=");
                &mut self.fields
            }
        };
        text.push_str(&protocol::one_line(shown));
    }
}

impl Visit for Entry {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, value, &format!("{value:?}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let value = format!("{value:?}");
        self.add(field, &value, &value);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Keeps the entries.
    #[derive(Clone, Default)]
    struct CapturedEntries(Arc<Mutex<Vec<Vec<u8>>>>);

    impl<S: Subscriber> Layer<S> for CapturedEntries {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            self.0.lock().unwrap().push(entry(event));
        }
    }

    fn logged(log: impl FnOnce()) -> Vec<u8> {
        let kept = CapturedEntries::default();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(kept.clone()), log);
        let entry = kept.0.lock().unwrap().pop();
        entry.expect("one event was logged")
    }

    fn has(entry: &[u8], name: &str, value: &str) -> bool {
        let mut field = Vec::new();
        put(&mut field, name, value);
        entry.windows(field.len()).any(|window| window == field)
    }

    #[test]
    fn an_entry_has_the_fields_by_name_and_in_its_message() {
        let entry = logged(|| {
            tracing::warn!(worker = %"01J", slot = "a b", tries = 3, "worker phase");
        });
        for (name, value) in [
            ("MESSAGE", "worker phase worker=01J slot=\"a b\" tries=3"),
            ("WORKER", "01J"),
            ("SLOT", "a b"),
            ("TRIES", "3"),
            ("PRIORITY", "4"),
            ("SYSLOG_IDENTIFIER", "user-factory"),
            ("TARGET", module_path!()),
            ("CODE_FILE", file!()),
        ] {
            assert!(
                has(&entry, name, value),
                "{name}={value}: {}",
                entry.escape_ascii()
            );
        }
    }

    #[test]
    fn a_message_is_one_line_and_a_field_is_what_was_logged() {
        let entry = logged(|| tracing::error!(error = %"a\n\u{1b}[2J", "failed"));
        assert!(has(&entry, "MESSAGE", "failed error=a\\n\\u{1b}[2J"));
        assert!(has(&entry, "ERROR", "a\n\u{1b}[2J"));
    }

    #[test]
    fn an_entry_fits_in_a_datagram() {
        let long = "é".repeat(1 << 20);
        let entry = logged(|| tracing::info!(one = long, two = long, three = long, "{long}"));
        assert!(entry.len() < 40_000, "{}", entry.len());
    }
}
