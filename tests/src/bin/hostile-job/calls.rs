//! Group C: system calls, environment, groups, scheduling, raw sockets.

use crate::Attempt;

pub const ATTEMPTS: &[Attempt] = &[];
