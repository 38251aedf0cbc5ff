//! Jobs that stand still at their memory limit.
//!
//! Between `memory.high` and `memory.max` the kernel frees a job's page cache, and makes its processes wait. A process
//! whose program is in that page cache then reads its next instructions from the disk again and again: it takes no more
//! memory, so that the kernel does not end it either (`mem_cgroup_handle_over_high` in mm/memcontrol.c). Here it is
//! seen, and the core fails the job.

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
/// The least `full avg10` of a job that stands still, in percent, as systemd-oomd's (`DefaultMemoryPressureLimit=` in
/// oomd.conf(5)). On an emulated host it rose to 60 within 15 s, and to 92 within a minute. A job in which every second
/// process can go on is below it.
const MIN_PRESSURE: f64 = 60.0;
/// A job with less free swap than this, in bytes, counts as one without any.
const SWAP_SLACK: u64 = 4 << 20;

/// Tell the core of every job that stands still at its limit, until the queue is closed. `noted` is the file in which the
/// helper says where the workers' cgroups are.
pub async fn watch(noted: PathBuf, queue: CommandQueue) {
    let mut stalls = Stalls::default();
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let now = ticks.tick().await;
        for worker in stalls.update(now, stalled(&noted)) {
            if queue.send(Command::Input(Input::MemoryStalled(worker))).is_err() {
                return;
            }
        }
    }
}

/// Since when each worker has been seen to stand still, without a break.
#[derive(Debug, Default)]
struct Stalls(BTreeMap<WorkerId, Instant>);

impl Stalls {
    /// These stand still now. Returns those that have for too long.
    fn update(&mut self, now: Instant, stalled: impl IntoIterator<Item = WorkerId>) -> Vec<WorkerId> {
        let since = |worker| (worker, self.0.get(&worker).copied().unwrap_or(now));
        self.0 = stalled.into_iter().map(since).collect();
        let is_over = |since: &Instant| now.duration_since(*since) >= Duration::from_secs(MAX_STALL_SECONDS);
        let over = self.0.iter().filter(|(_, since)| is_over(since));
        over.map(|(worker, _)| *worker).collect()
    }
}

/// The workers that stand still. Where cgroup v2 has no memory controller, and where the kernel does not account for
/// pressure (`psi=0`), there are none.
fn stalled(noted: &Path) -> Vec<WorkerId> {
    let cgroups = fs::read_to_string(noted).unwrap_or_default();
    let entries = fs::read_dir(cgroups).into_iter().flatten().flatten();
    let stalled = entries.filter_map(|entry| {
        let worker = entry.file_name().to_str()?.parse().ok()?;
        let read = |name: &str| fs::read_to_string(entry.path().join(name)).ok();
        let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
        // "max" where the slot has no limits.memory.
        let (high, current) = (number("memory.high")?, number("memory.current")?);
        // A kernel without swap has no such file.
        let has_swap = match (read("memory.swap.max"), number("memory.swap.current")) {
            (Some(max), Some(used)) => max.trim().parse().is_ok_and(|max: u64| max >= used + SWAP_SLACK),
            _ => false,
        };
        let is_stalled = is_stalled(high, current, &read("memory.stat")?, &read("memory.pressure")?);
        (is_stalled && !has_swap).then_some(worker)
    });
    stalled.collect()
}

/// What the kernel cannot free, in bytes, is above `memory.high`, and the processes wait for memory. The files are
/// described in the kernel's cgroup-v2 documentation.
fn is_stalled(high: u64, current: u64, stat: &str, pressure: &str) -> bool {
    let bytes = |name: &str| {
        let mut lines = stat.lines().filter_map(|line| line.split_once(' '));
        let value = lines.find(|(key, _)| *key == name).map(|(_, value)| value);
        value.and_then(|value| value.parse().ok()).unwrap_or(0)
    };
    let can_be_freed: u64 = ["active_file", "inactive_file", "slab_reclaimable"]
        .map(bytes)
        .iter()
        .sum();
    let pressure = || {
        let line = pressure
            .lines()
            .find_map(|line| line.strip_prefix("full avg10="))?;
        line.split(' ').next()?.parse::<f64>().ok()
    };
    current.saturating_sub(can_be_freed) >= high
        && pressure().is_some_and(|percent: f64| percent >= MIN_PRESSURE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::sync::mpsc;

    const WORKERS: [&str; 2] = ["01HZX3N8Q4J5K6M7P8R9S0T1V2", "01HZX3N8Q4J5K6M7P8R9S0T1V3"];
    const STAT: &str =
        "anon 61000000\nfile 900000\nactive_file 500000\ninactive_file 300000\nslab_reclaimable 200000\n";

    fn pressure(full: &str) -> String {
        format!(
            "some avg10=99.00 avg60=9.00 avg300=1.00 total=7\nfull avg10={full} avg60=9.00 avg300=1.00 total=7\n"
        )
    }

    #[test]
    fn a_job_stands_still_where_the_rest_is_too_much_and_all_wait() {
        let still = |high, current, full| is_stalled(high, current, STAT, &pressure(full));
        assert!(still(61_000_000, 62_000_000, "60.00"));
        assert!(still(61_000_000, 64_000_000, "99.10"));
        // The kernel has more to free.
        assert!(!still(61_000_001, 62_000_000, "99.10"));
        // A process runs.
        assert!(!still(61_000_000, 64_000_000, "59.99"));
        assert!(!is_stalled(61_000_000, 64_000_000, STAT, ""));
        assert!(!is_stalled(61_000_000, 64_000_000, STAT, "full avg10=\n"));
        // All of it is the kernel's own, or a file in memory.
        assert!(is_stalled(61_000_000, 61_000_000, "", &pressure("70.00")));
    }

    #[tokio::test(start_paused = true)]
    async fn the_core_is_told_of_a_job_that_stands_still_without_a_break() {
        let dir = tempfile::tempdir().unwrap();
        let noted = dir.path().join("helper.cgroup");
        let cgroups = dir.path().join("workers");
        let put = |worker: &str, high: &str, full: &str| {
            let cgroup = cgroups.join(worker);
            fs::create_dir_all(&cgroup).unwrap();
            fs::write(cgroup.join("memory.high"), high).unwrap();
            fs::write(cgroup.join("memory.current"), "64000000\n").unwrap();
            fs::write(cgroup.join("memory.stat"), STAT).unwrap();
            fs::write(cgroup.join("memory.pressure"), pressure(full)).unwrap();
        };
        let (queue, mut commands) = mpsc::unbounded_channel();
        // The helper has not made it yet.
        let watch = tokio::spawn(watch(noted.clone(), queue));
        // Between two looks.
        tokio::time::sleep(Duration::from_secs(61)).await;
        fs::write(&noted, cgroups.to_str().unwrap()).unwrap();
        put(WORKERS[0], "61000000\n", "99.00");
        put(WORKERS[1], "max\n", "99.00");
        fs::create_dir_all(cgroups.join("helper")).unwrap();
        tokio::time::sleep(Duration::from_secs(MAX_STALL_SECONDS - 5)).await;
        put(WORKERS[0], "61000000\n", "10.00");
        tokio::time::sleep(Duration::from_secs(5)).await;
        put(WORKERS[0], "61000000\n", "99.00");
        tokio::time::sleep(Duration::from_secs(MAX_STALL_SECONDS)).await;
        assert!(commands.is_empty(), "it ran in between");
        tokio::time::sleep(Duration::from_secs(5)).await;
        let told = commands.recv().await.unwrap();
        let Command::Input(Input::MemoryStalled(worker)) = told else {
            panic!("{told:?}");
        };
        assert_eq!(worker.to_string(), WORKERS[0]);
        assert!(commands.is_empty(), "the other has no limit");
        // It has swap left, and then none.
        let swap =
            |used: &str| fs::write(cgroups.join(WORKERS[0]).join("memory.swap.current"), used).unwrap();
        fs::write(cgroups.join(WORKERS[0]).join("memory.swap.max"), "64000000\n").unwrap();
        swap("9000000\n");
        tokio::time::sleep(Duration::from_secs(2 * MAX_STALL_SECONDS)).await;
        assert!(commands.is_empty(), "it has swap left");
        swap("63000000\n");
        tokio::time::sleep(Duration::from_secs(MAX_STALL_SECONDS + 5)).await;
        assert!(!commands.is_empty());
        drop(commands);
        watch.await.unwrap();
    }
}
