//! A part of the points that a test could try, another one in each run.

use std::time::SystemTime;

/// Every so many of the points, from a chance one of the first on; all of them if the environment variable `POINTS` is
/// `all`.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Every how many of the points are tried.
    pub step: usize,
    /// The first that is.
    pub offset: usize,
}

impl Sample {
    /// One of `step` points.
    pub fn of(step: usize) -> Sample {
        if std::env::var("POINTS").is_ok_and(|value| value == "all") {
            return Sample { step: 1, offset: 0 };
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let offset = now.expect("the clock is past 1970").subsec_nanos() as usize % step;
        Sample { step, offset }
    }

    /// Every point is tried.
    pub fn is_all(&self) -> bool {
        self.step == 1
    }

    /// Is the `n`th point tried? The first is 0.
    pub fn has(&self, n: usize) -> bool {
        n % self.step == self.offset
    }
}
