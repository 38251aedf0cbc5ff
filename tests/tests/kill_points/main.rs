//! kill -9 at every system call: of the helper, in each of its processes and of all at once, and of the
//! supervisor. After each, what was begun is repeated, or deleted at once; then the host is as it was.
//! Needs root.
//!
//! Each test kills at a part of the points that it finds: at the first of each system call, and at every so
//! many of all, beginning elsewhere each time. `KILL_POINTS=all` kills at every one.

mod bench;
mod helper;
mod monitor_requests;
mod supervisor;

/// Every how many of the points are killed at; and where to begin.
struct Sample {
    step: usize,
    offset: usize,
}

impl Sample {
    fn of(step: usize) -> Sample {
        if std::env::var("KILL_POINTS").is_ok_and(|value| value == "all") {
            return Sample { step: 1, offset: 0 };
        }
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let offset = now.expect("the clock is past 1970").subsec_nanos() as usize % step;
        Sample { step, offset }
    }

    fn is_all(&self) -> bool {
        self.step == 1
    }

    fn has(&self, n: usize) -> bool {
        n % self.step == self.offset
    }
}
