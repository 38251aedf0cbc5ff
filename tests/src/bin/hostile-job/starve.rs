//! Group D: starving the host.

use crate::Attempt;

pub const ATTEMPTS: &[Attempt] = &[];
