//! Group B: making the clean-up fail, or turning it against the host.

use crate::Attempt;

pub const ATTEMPTS: &[Attempt] = &[];
