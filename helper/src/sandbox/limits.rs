//! The settings that enforce what a job may use at most.

use std::io::Write;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result};
use libc::rlim_t;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{SysconfVar, sysconf};
use protocol::config::{Limits, Slot};

use crate::host::abilities::Abilities;
use crate::host::directory::open_file;
use crate::sys;

/// What to write into which file of the worker's cgroup (the kernel's cgroup-v2 documentation), with pages of so many bytes.
fn cgroup_settings(limits: &Limits, nice: u8, host: Abilities, page: u32) -> Vec<(&'static str, String)> {
    let mut settings = Vec::new();
    if host.can_limit_pids {
        settings.push(("pids.max", limits.processes.to_string()));
    }
    if host.can_limit_memory {
        if let Some(memory) = limits.memory {
            settings.push(("memory.high", throttle_from(memory, page).to_string()));
            settings.push(("memory.max", memory.to_string()));
        }
        // Memory that is limited must not go on in swap, unless the operator has said how far.
        if let Some(swap) = limits.swap.or(limits.memory.map(|_| 0)) {
            settings.push(("memory.swap.max", swap.to_string()));
        }
    }
    if let (true, Some(cpus)) = (host.can_limit_cpu, limits.cpus) {
        // Of each 100 ms, in microseconds.
        let quota = u64::from(cpus.thousandths()) * 100;
        settings.push(("cpu.max", format!("{quota} 100000")));
    }
    if host.can_limit_cpu && nice > 0 {
        // Between cgroups the nice values of processes count for nothing.
        settings.push(("cpu.weight.nice", nice.to_string()));
    }
    settings
}

/// `memory.high` for a `memory.max`, in bytes: from here on a job waits until what it wrote is on the disk. At the limit
/// itself the kernel ends a process at once if all that it finds to give up is dirty or being written.
///
/// The kernel (`calculate_high_delay` in mm/memcontrol.c) delays each 64 pages that are charged above H by 64 s × (what is
/// over H / H)². To fill a step of S bytes so takes a writer 64 s × S³ / (3 × H² × 64 pages), if nothing is given up
/// meanwhile. That is the time that a file system and its disk have, and the time that it takes to end a job that really
/// wants too much. With pages of 4 KiB, 50 × limit^⅔ makes it about 10 s, whatever the limit: 6.5 MiB of 48 MiB, 50 MiB of
/// 1 GiB. On aarch64 a page may have 16 or 64 KiB. A step of a few batches, which the smallest limits have then, takes less:
/// the kernel delays each batch by 2 s at most.
fn throttle_from(limit: u64, page: u32) -> u64 {
    let step = 50.0 * (limit as f64).cbrt().powi(2) * f64::from(page / 4096).cbrt();
    limit - step as u64
}

/// Limit a worker's new cgroup.
pub fn limit_cgroup(cgroup: &OwnedFd, slot: &Slot, host: Abilities) -> Result<()> {
    let page = sysconf(SysconfVar::PAGE_SIZE)?.context("the size of a page is unknown")?;
    for (name, value) in cgroup_settings(&slot.limits, slot.nice, host, u32::try_from(page)?) {
        let mut file = match open_file(cgroup, name, OFlag::O_WRONLY) {
            // A kernel without swap has nothing to keep a job from.
            Err(Errno::ENOENT) if name == "memory.swap.max" && slot.limits.swap.is_none() => continue,
            file => file.with_context(|| format!("cannot open the worker's {name}"))?,
        };
        file.write_all(value.as_bytes())
            .with_context(|| format!("cannot set the worker's {name} to {value}"))?;
    }
    Ok(())
}

/// Limit this process, and all that it will start (`getrlimit(2)`).
pub fn limit_process(slot: &Slot) -> Result<()> {
    let (processes, files) = (slot.limits.processes, slot.limits.open_files);
    sys::raise_nice(slot.nice).context("cannot set the job's nice value")?;
    #[rustfmt::skip]
    let all = [
        (Resource::RLIMIT_NPROC, "processes", processes, processes),
        (Resource::RLIMIT_NOFILE, "open files", files.min(1024), files),
        // Not 0: a pipe in core_pattern ignores that, and stops at 1 (core(5)).
        (Resource::RLIMIT_CORE, "core size", 1, 1),
        (Resource::RLIMIT_MEMLOCK, "locked memory", 8 << 20, 8 << 20),
        (Resource::RLIMIT_MSGQUEUE, "message queues", 819_200, 819_200),
        (Resource::RLIMIT_SIGPENDING, "pending signals", 16_384, 16_384),
        (Resource::RLIMIT_RTPRIO, "real-time priority", 0, 0),
        (Resource::RLIMIT_NICE, "nice", 0, 0),
    ];
    for (resource, name, soft, hard) in all {
        // "At most" is kept where the helper itself may have less.
        let most = getrlimit(resource)?.1;
        let [soft, hard] = [soft, hard].map(|limit: u64| limit.min(most as u64) as rlim_t);
        setrlimit(resource, soft, hard).with_context(|| format!("cannot limit the job's {name}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::abilities::tests::{ALL, NOTHING, limits, slot};

    #[test]
    fn cgroups_get_the_kernels_words() {
        assert_eq!(cgroup_settings(&Limits::default(), 19, NOTHING, 4096), []);
        assert_eq!(
            cgroup_settings(
                &limits("memory = \"1G\"\ncpus = 0.5\nprocesses = 100"),
                5,
                ALL,
                4096
            ),
            [
                ("pids.max", "100".to_owned()),
                ("memory.high", "1021313024".into()),
                ("memory.max", "1073741824".into()),
                ("memory.swap.max", "0".into()),
                ("cpu.max", "50000 100000".into()),
                ("cpu.weight.nice", "5".into())
            ]
        );
        let swap = limits("memory = \"1G\"\nswap = \"2G\"");
        assert!(cgroup_settings(&swap, 0, ALL, 4096).contains(&("memory.swap.max", "2147483648".into())));
    }

    #[test]
    fn the_time_to_the_limit_is_the_same_for_every_limit() {
        let limits = [16 << 20, 48 << 20, 1 << 30, 20 << 30, 1 << 40];
        let pages = [4096, 16384, 65536];
        for (limit, page) in limits.iter().flat_map(|limit| pages.map(|page| (*limit, page))) {
            let high = throttle_from(limit, page) as f64;
            // The kernel's delay for each batch of 64 pages, summed up to the limit.
            let batch = 64.0 * f64::from(page);
            let delay = |n: u64| (64.0 * (n as f64 * batch / high).powi(2)).min(2.0);
            let batches = ((limit as f64 - high) / batch) as u64;
            let seconds: f64 = (1..=batches).map(delay).sum();
            // Of few batches, which the smallest limits have, each counts for much.
            let least = if batches < 10 { 2.0 } else { 8.0 };
            assert!((least..20.0).contains(&seconds), "{limit}, {page}: {seconds} s");
        }
    }

    #[test]
    fn a_cgroup_gets_its_settings_and_only_swap_that_no_kernel_has_may_be_missing() {
        let root = tempfile::tempdir().unwrap();
        let cgroup = crate::host::directory::tests::open_path(root.path()).unwrap();
        let set = |text: &str, can| limit_cgroup(&cgroup, &slot(text), can);
        let text = "memory = \"1G\"\nprocesses = 100";
        assert!(set(text, ALL).is_err(), "nothing is there");
        for name in ["pids.max", "memory.high", "memory.max"] {
            std::fs::write(root.path().join(name), "").unwrap();
        }
        set(text, ALL).unwrap();
        let read = |name: &str| std::fs::read_to_string(root.path().join(name)).unwrap();
        assert_eq!(
            (read("pids.max"), read("memory.max")),
            ("100".into(), "1073741824".into())
        );
        let error = set("memory = \"1G\"\nswap = 0", ALL).unwrap_err();
        assert!(error.to_string().contains("memory.swap.max"), "{error}");
        assert!(set("cpus = 1", ALL).is_err(), "cpu.max is not there");
    }
}
