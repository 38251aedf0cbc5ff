//! Jobs that stall at their memory limit.
//!
//! Between `memory.high` and `memory.max` the kernel frees a job's page cache, and makes its processes wait. A process
//! whose program is in that page cache then reads its next instructions from the disk again and again: it takes no more
//! memory, so that the kernel does not end it either (`mem_cgroup_handle_over_high` in mm/memcontrol.c). Here it is
//! seen, and the core fails the job. A job that still takes more is left to the kernel, which ends it at the limit.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use protocol::WorkerId;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::control::state::{Command, CommandQueue};
use crate::factory::Input;
use crate::worker::MAX_STALL_SECONDS;

const INTERVAL: Duration = Duration::from_secs(5);
/// The least `full avg10` of a job that stalls, in percent, as systemd-oomd's (`DefaultMemoryPressureLimit=` in
/// oomd.conf(5)). On an emulated host it rose to 60 within 15 s, and to 92 within a minute. A job in which every second
/// process can go on is below it.
const MIN_PRESSURE: f64 = 60.0;
/// A job with less free swap than this, in bytes, counts as one without any.
const SWAP_SLACK: u64 = 4 << 20;

/// Tell the core of every job that stalls at its limit, until the queue is closed. `noted` is the file in which the
/// helper says where the workers' cgroups are.
pub async fn watch(noted: PathBuf, queue: CommandQueue) {
    let mut stalls = Stalls::default();
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let now = ticks.tick().await;
        for worker in stalls.update(now, waiting(&noted)) {
            if queue.send(Command::Input(Input::MemoryStalled(worker))).is_err() {
                return;
            }
        }
    }
}

/// A job that waits for memory above `memory.high`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct MemoryStall {
    /// What the kernel cannot free, in bytes.
    unreclaimable_bytes: u64,
    /// If it takes so many bytes more, it does not stall.
    progress: u64,
}

/// Since when each worker has stalled without a break, and how many bytes the kernel could not free then.
#[derive(Debug, Default)]
struct Stalls(BTreeMap<WorkerId, (Instant, u64)>);

impl Stalls {
    /// These wait now. Returns those that have stalled for too long.
    fn update(&mut self, now: Instant, waiting: BTreeMap<WorkerId, MemoryStall>) -> Vec<WorkerId> {
        let stall = |(worker, is): (WorkerId, MemoryStall)| {
            let before = self
                .0
                .get(&worker)
                .filter(|(_, bytes)| is.unreclaimable_bytes < bytes + is.progress);
            (worker, before.copied().unwrap_or((now, is.unreclaimable_bytes)))
        };
        self.0 = waiting.into_iter().map(stall).collect();
        let is_over = |since: &Instant| now.duration_since(*since) >= Duration::from_secs(MAX_STALL_SECONDS);
        let over = self.0.iter().filter(|(_, (since, _))| is_over(since));
        over.map(|(worker, _)| *worker).collect()
    }
}

/// The workers that wait. Where cgroup v2 has no memory controller, and where the kernel does not account for pressure
/// (`psi=0`), there are none.
fn waiting(noted: &Path) -> BTreeMap<WorkerId, MemoryStall> {
    let cgroups = fs::read_to_string(noted).unwrap_or_default();
    let entries = fs::read_dir(cgroups).into_iter().flatten().flatten();
    let all = entries.filter_map(|entry| {
        let worker = entry.file_name().to_str()?.parse().ok()?;
        Some((worker, waiting_in(&entry.path())?))
    });
    all.collect()
}

/// The job of this cgroup, if it waits. The files are described in the kernel's cgroup-v2 documentation.
fn waiting_in(cgroup: &Path) -> Option<MemoryStall> {
    let read = |name: &str| fs::read_to_string(cgroup.join(name)).ok();
    let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
    // "max" where the slot has no limits.memory.
    let (high, max) = (number("memory.high")?, number("memory.max")?);
    let unreclaimable_bytes = number("memory.current")?.saturating_sub(can_be_freed(&read("memory.stat")?));
    // A kernel without swap has no such file.
    let swap = number("memory.swap.max").zip(number("memory.swap.current"));
    let has_swap = swap.is_some_and(|(max, used)| max >= used + SWAP_SLACK);
    let waits =
        unreclaimable_bytes >= high && !has_swap && pressure(&read("memory.pressure")?)? >= MIN_PRESSURE;
    waits.then_some(MemoryStall {
        unreclaimable_bytes,
        progress: max.saturating_sub(high) / 8,
    })
}

/// The page cache, and what else the kernel frees, in bytes, as `memory.stat` has it.
fn can_be_freed(stat: &str) -> u64 {
    let fields = stat.lines().filter_map(|line| line.split_once(' '));
    let counts = fields.filter(|(key, _)| ["active_file", "inactive_file", "slab_reclaimable"].contains(key));
    counts.filter_map(|(_, value)| value.parse::<u64>().ok()).sum()
}

/// `full avg10` of `memory.pressure`, in percent.
fn pressure(text: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix("full avg10="))?;
    line.split(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc;

    const WORKERS: [&str; 2] = ["01HZX3N8Q4J5K6M7P8R9S0T1V2", "01HZX3N8Q4J5K6M7P8R9S0T1V3"];
    const STAT: &str =
        "anon 61000000\nfile 900000\nactive_file 500000\ninactive_file 300000\nslab_reclaimable 200000\n";

    fn pressure_of(full: &str) -> String {
        format!(
            "some avg10=99.00 avg60=9.00 avg300=1.00 total=7\nfull avg10={full} avg60=9.00 avg300=1.00 total=7\n"
        )
    }

    fn cgroup(at: &Path, high: &str, current: u64, full: &str) {
        fs::create_dir_all(at).unwrap();
        for (name, text) in [
            ("memory.high", high),
            ("memory.max", "69000000\n"),
            ("memory.current", &format!("{current}\n")),
            ("memory.stat", STAT),
            ("memory.pressure", &pressure_of(full)),
        ] {
            fs::write(at.join(name), text).unwrap();
        }
    }

    #[test]
    fn a_job_waits_where_what_cannot_be_freed_is_too_much_and_the_pressure_is_high() {
        let dir = tempfile::tempdir().unwrap();
        let waits = |high: &str, current, full: &str| {
            cgroup(dir.path(), high, current, full);
            waiting_in(dir.path()).map(|waiting| waiting.unreclaimable_bytes)
        };
        assert_eq!(waits("61000000\n", 62_000_000, "60.00"), Some(61_000_000));
        assert_eq!(waits("61000000\n", 64_000_000, "99.10"), Some(63_000_000));
        // The kernel has more to free.
        assert_eq!(waits("61000001\n", 62_000_000, "99.10"), None);
        // Its processes go on.
        assert_eq!(waits("61000000\n", 64_000_000, "59.99"), None);
        assert_eq!(waits("max\n", 64_000_000, "99.10"), None);
        assert!(waiting_in(&dir.path().join("gone")).is_none());
        for odd in ["", "full avg10=\n", "some avg10=99.00 avg60=99.00\n"] {
            assert_eq!(pressure(odd), None, "{odd:?}");
        }
        // All of it is the kernel's own, or a file in memory.
        assert_eq!(can_be_freed(""), 0);
        // It has swap left, and then none.
        cgroup(dir.path(), "61000000\n", 64_000_000, "99.00");
        fs::write(dir.path().join("memory.swap.max"), "64000000\n").unwrap();
        for (used, is_waiting) in [("9000000\n", false), ("63000000\n", true)] {
            fs::write(dir.path().join("memory.swap.current"), used).unwrap();
            assert_eq!(waiting_in(dir.path()).is_some(), is_waiting, "{used}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_core_is_told_of_a_job_that_stalls_without_a_break() {
        let dir = tempfile::tempdir().unwrap();
        let noted = dir.path().join("helper.cgroup");
        let cgroups = dir.path().join("workers");
        let put = |worker: &str, high: &str, current: u64, full: &str| {
            cgroup(&cgroups.join(worker), high, current, full);
        };
        let (queue, mut commands) = mpsc::unbounded_channel();
        // The helper has not made it yet.
        let watch = tokio::spawn(watch(noted.clone(), queue));
        // Between two reads of the cgroups.
        tokio::time::sleep(Duration::from_secs(61)).await;
        fs::write(&noted, cgroups.to_str().unwrap()).unwrap();
        put(WORKERS[0], "61000000\n", 64_000_000, "99.00");
        put(WORKERS[1], "max\n", 64_000_000, "99.00");
        fs::create_dir_all(cgroups.join("helper")).unwrap();
        let pass = |seconds| tokio::time::sleep(Duration::from_secs(seconds));
        pass(MAX_STALL_SECONDS - 5).await;
        put(WORKERS[0], "61000000\n", 64_000_000, "10.00");
        pass(5).await;
        put(WORKERS[0], "61000000\n", 64_000_000, "99.00");
        pass(MAX_STALL_SECONDS).await;
        assert!(commands.is_empty(), "it ran in between");
        // It takes more, an eighth of the step from `memory.high` to `memory.max`: the kernel will end it.
        put(WORKERS[0], "61000000\n", 65_000_000, "99.00");
        pass(MAX_STALL_SECONDS).await;
        assert!(commands.is_empty(), "it took more");
        // Less than that is no progress.
        put(WORKERS[0], "61000000\n", 65_999_999, "99.00");
        pass(5).await;
        let told = commands.recv().await.unwrap();
        let Command::Input(Input::MemoryStalled(worker)) = told else {
            panic!("{told:?}");
        };
        assert_eq!(worker.to_string(), WORKERS[0]);
        assert!(commands.is_empty(), "the other has no limit");
        drop(commands);
        watch.await.unwrap();
    }
}
