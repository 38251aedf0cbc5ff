//! Group C: getting out, up, or across.

use crate::Attempt;

pub const ATTEMPTS: &[Attempt] = &[];
