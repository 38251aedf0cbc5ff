//! The log: one line an event on standard error, with the worker, slot and job that it is about as fields.

use tracing::Level;

/// Begin to log what is at least as urgent as `level`.
pub fn start(level: Level) {
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .init();
}
