//! Group C: getting up: privileges, other processes, the kernel's files, mounts.

use crate::Attempt;

pub const ATTEMPTS: &[Attempt] = &[];
