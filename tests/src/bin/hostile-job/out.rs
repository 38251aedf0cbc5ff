//! Group C: getting out and across: sockets, devices, other jobs, secrets.

use crate::Attempt;

pub const ATTEMPTS: &[Attempt] = &[];
