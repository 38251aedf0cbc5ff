//! The trace of a simulation, with the supervisor's own log lines in it.

use std::fmt::{Debug, Write};
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::time::Instant;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// The supervisor dies here, and stays down for so long.
#[derive(Clone, Copy, Debug)]
pub struct Crash(pub u64);

#[derive(Debug, Default)]
struct Inner {
    lines: Option<Vec<String>>,
    crash_after_saves: Option<(u64, u64)>,
    /// When the supervisor has warned, and of what.
    warnings: Vec<(u64, String)>,
}

#[derive(Clone, Debug, Default)]
pub struct Trace(Arc<Mutex<Inner>>);

impl Trace {
    pub fn new(keep: bool) -> Self {
        let trace = Self::default();
        trace.inner().lines = keep.then(Vec::new);
        trace
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().expect("no panic holds the trace")
    }

    pub fn note(&self, now: u64, line: impl FnOnce() -> String) {
        if let Some(lines) = &mut self.inner().lines {
            lines.push(format!("{:>7}.{:03}  {}", now / 1000, now % 1000, line()));
        }
    }

    pub fn is_kept(&self) -> bool {
        self.inner().lines.is_some()
    }

    pub fn lines(&self) -> Vec<String> {
        self.inner().lines.clone().unwrap_or_default()
    }

    pub fn warnings(&self) -> Vec<(u64, String)> {
        self.inner().warnings.clone()
    }

    pub fn crash_after_saves(&self, when: Option<(u64, u64)>) {
        self.inner().crash_after_saves = when;
    }

    /// The supervisor has written; this may be its last effect.
    fn saved(&self) {
        let mut inner = self.inner();
        let Some((left, down)) = inner.crash_after_saves.take() else {
            return;
        };
        if left > 1 {
            inner.crash_after_saves = Some((left - 1, down));
            return;
        }
        drop(inner);
        resume_unwind(Box::new(Crash(down)));
    }
}

/// Takes in what the supervisor logs.
#[derive(Debug)]
pub struct Log {
    pub trace: Trace,
    pub began: Instant,
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("supervisor") && *metadata.level() <= Level::DEBUG
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let level = *event.metadata().level();
        let warns = level <= Level::WARN;
        let is_shown = warns || self.trace.is_kept();
        let mut words = Words {
            has_fields: is_shown,
            ..Words::default()
        };
        let now = self.began.elapsed().as_millis() as u64;
        if level == Level::DEBUG || is_shown {
            event.record(&mut words);
        }
        self.trace
            .note(now, || format!("  log {level} {}{}", words.message, words.fields));
        if warns {
            let line = format!("{}{}", words.message, words.fields);
            self.trace.inner().warnings.push((now, line));
        }
        if level == Level::DEBUG && (words.message == "saved" || words.message == "removed") {
            self.trace.saved();
        }
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct Words {
    /// Otherwise the message is all that is wanted.
    has_fields: bool,
    message: String,
    fields: String,
}

impl Visit for Words {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let done = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else if self.has_fields {
            write!(self.fields, " {}={value:?}", field.name())
        } else {
            Ok(())
        };
        done.expect("a text takes more text");
    }
}
