//! Group A: leaving something behind.

use crate::Attempt;

pub const ATTEMPTS: &[Attempt] = &[];
