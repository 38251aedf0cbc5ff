//! What a job may use at most: which limits this host can enforce, and the settings that enforce them.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{ROOT, seteuid};
use protocol::config::{Config, Limits, core_goes_to_a_socket};
use protocol::{Error, ErrorKind, SlotName, Uid};

use crate::host::{Host, open_file, read_small};
use crate::sys;

/// What the host can limit besides what every Linux can (`getrlimit(2)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abilities {
    memory: bool,
    cpu: bool,
    pids: bool,
    quotas: bool,
}

impl Abilities {
    pub fn of(workers: &OwnedFd, cgroups: &OwnedFd) -> Result<Abilities> {
        let controllers = read_small(cgroups, "cgroup.subtree_control")
            .context("cannot read cgroup.subtree_control")?
            .unwrap_or_default();
        let has = |name: &str| controllers.split_whitespace().any(|other| other == name);
        Ok(Abilities {
            memory: has("memory"),
            cpu: has("cpu"),
            pids: has("pids"),
            quotas: sys::enforces_user_quotas(workers.as_fd()),
        })
    }

    pub fn has_quotas(self) -> bool {
        self.quotas
    }
}

/// The limits of these that the host cannot enforce: each with its key, and what would let it.
fn unenforceable(limits: &Limits, can: Abilities) -> Vec<(&'static str, &'static str)> {
    let delegate =
        "delegate the cgroup v2 controller of that name to the helper (Delegate=yes), away from cgroup v1";
    let quota = "mount the file system of the state directory with user quotas (see the README)";
    [
        ("memory", limits.memory.is_some() && !can.memory, delegate),
        ("swap", limits.swap.is_some() && !can.memory, delegate),
        ("cpus", limits.cpus.is_some() && !can.cpu, delegate),
        ("disk", limits.disk.is_some() && !can.quotas, quota),
        ("inodes", limits.inodes.is_some() && !can.quotas, quota),
    ]
    .into_iter()
    .filter(|(_, missing, _)| *missing)
    .map(|(key, _, remedy)| (key, remedy))
    .collect()
}

/// Refuse limits that would only be written down; where the operator settles for that, the warnings.
pub fn check(slot: &SlotName, limits: &Limits, can: Abilities) -> Result<Vec<String>, Error> {
    let missing = unenforceable(limits, can);
    let Some((key, remedy)) = missing.first() else {
        return Ok(Vec::new());
    };
    if limits.best_effort {
        let warn = |(key, _): &(&str, _)| {
            format!(
                "NOT ENFORCED on this host: limits.{key} of slot {slot}, whose limits.best_effort is true"
            )
        };
        return Ok(missing.iter().map(warn).collect());
    }
    Err(Error::new(
        ErrorKind::Busy,
        format!(
            "slot {slot}: limits.{key} cannot be enforced on this host: {remedy}, or set limits.best_effort = true"
        ),
    ))
}

/// The same for all slots.
pub fn check_all(config: &Config, can: Abilities) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    for (name, slot) in &config.slots {
        let checked = check(name, &slot.limits, can);
        warnings.extend(checked.with_context(|| format!("{}:{}", protocol::config::CONFIG_PATH, slot.line))?);
    }
    Ok(warnings)
}

/// What to warn of where this is `/proc/sys/kernel/core_pattern`.
fn core_warning(core_pattern: &str) -> Option<String> {
    core_goes_to_a_socket(core_pattern).then(|| {
        format!(
            "NOT ENFORCED on this host: that jobs leave no core. kernel.core_pattern is {:?}, a socket, which gets the \
             whole core of every process whatever its limit is (core(5)): set it to a file's name or to a pipe",
            core_pattern.trim_end()
        )
    })
}

/// Warn where jobs leave cores in spite of their limit of one byte.
pub fn check_cores() -> Option<String> {
    match std::fs::read_to_string("/proc/sys/kernel/core_pattern") {
        Ok(core_pattern) => core_warning(&core_pattern),
        // A kernel that writes no cores.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => Some(format!(
            "cannot read /proc/sys/kernel/core_pattern: {error}. If it names a socket, that gets whole cores of jobs"
        )),
    }
}

/// What to write into which file of the worker's cgroup (the kernel's cgroup-v2 documentation).
fn cgroup_settings(limits: &Limits, can: Abilities) -> Vec<(&'static str, String)> {
    let mut settings = Vec::new();
    if can.pids {
        settings.push(("pids.max", limits.processes.to_string()));
    }
    if can.memory {
        if let Some(memory) = limits.memory {
            // Just below the limit a job waits until what it wrote is on the disk. At the limit itself Linux 6.12
            // may end it for that, having found only dirty pages to give away. A wider step would slow down for
            // minutes what is to be ended.
            let high = memory - (2 << 20);
            settings.push(("memory.high", high.to_string()));
            settings.push(("memory.max", memory.to_string()));
        }
        // Memory that is limited must not go on in swap, unless the operator has said how far.
        if let Some(swap) = limits.swap.or(limits.memory.map(|_| 0)) {
            settings.push(("memory.swap.max", swap.to_string()));
        }
    }
    if let (true, Some(cpus)) = (can.cpu, limits.cpus) {
        // Of each 100 ms, in microseconds.
        let quota = u64::from(cpus.thousandths()) * 100;
        settings.push(("cpu.max", format!("{quota} 100000")));
    }
    settings
}

/// Limit a worker's new cgroup.
pub fn of_cgroup(cgroup: &OwnedFd, limits: &Limits, can: Abilities) -> Result<()> {
    for (name, value) in cgroup_settings(limits, can) {
        let mut file = match open_file(cgroup, name, OFlag::O_WRONLY) {
            // A kernel without swap has nothing to keep a job from.
            Err(Errno::ENOENT) if name == "memory.swap.max" && limits.swap.is_none() => continue,
            file => file.with_context(|| format!("cannot open the worker's {name}"))?,
        };
        file.write_all(value.as_bytes())
            .with_context(|| format!("cannot set the worker's {name} to {value}"))?;
    }
    Ok(())
}

/// What the worker's user may have on disk, where the host counts it: also nothing more than what is said
/// here of an earlier worker with the same uid.
pub fn of_disk(host: &Host, uid: Uid, disk: Option<u64>, inodes: Option<u64>) -> Result<()> {
    if host.abilities.quotas {
        let kib = disk.unwrap_or(0).div_ceil(1024);
        sys::set_user_quota(host.workers.as_fd(), uid.get(), kib, inodes.unwrap_or(0))
            .with_context(|| format!("cannot set the disk quota of uid {uid}"))?;
    }
    Ok(())
}

/// How many bytes on disk are the user's, where the host counts them. A process that is root in name alone may
/// ask that as the user itself (`quotactl(2)`): no process of a job can touch it for its effective uid, which
/// is all that changes.
pub fn disk_used(host: &Host, uid: Uid) -> Result<Option<u64>> {
    if !host.abilities.quotas {
        return Ok(None);
    }
    seteuid(uid.get().into())?;
    let used = sys::bytes_of_user(host.workers.as_fd(), uid.get());
    seteuid(ROOT).context("cannot become root again")?;
    Ok(match used {
        // XFS keeps nothing of a user who has nothing.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Some(0),
        used => used.ok(),
    })
}

/// Limit this process, and all that it will start (`getrlimit(2)`).
pub fn of_process(limits: &Limits) -> Result<()> {
    for (resource, name, soft, hard) in [
        (
            Resource::RLIMIT_NPROC,
            "processes",
            limits.processes,
            limits.processes,
        ),
        (
            Resource::RLIMIT_NOFILE,
            "open files",
            limits.open_files.min(1024),
            limits.open_files,
        ),
        // Not 0: a pipe in core_pattern ignores that, and stops at 1 (core(5)).
        (Resource::RLIMIT_CORE, "core size", 1, 1),
        (Resource::RLIMIT_MEMLOCK, "locked memory", 8 << 20, 8 << 20),
        (Resource::RLIMIT_MSGQUEUE, "message queues", 819_200, 819_200),
        (Resource::RLIMIT_SIGPENDING, "pending signals", 16_384, 16_384),
        (Resource::RLIMIT_RTPRIO, "real-time priority", 0, 0),
        (Resource::RLIMIT_NICE, "nice", 0, 0),
    ] {
        // "At most" is kept where the helper itself may have less.
        let most = getrlimit(resource)?.1;
        setrlimit(resource, soft.min(most), hard.min(most))
            .with_context(|| format!("cannot limit the job's {name}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Abilities = Abilities {
        memory: false,
        cpu: false,
        pids: false,
        quotas: false,
    };
    const ALL: Abilities = Abilities {
        memory: true,
        cpu: true,
        pids: true,
        quotas: true,
    };

    fn limits(text: &str) -> Limits {
        let head = "[general]\nbaseurl = \"http://b\"\n[factory]\ntoken_file = \"/t\"\n[slots.a]\n\
                    target = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n[slots.a.limits]\n";
        let config = Config::parse(&format!("{head}{text}")).unwrap();
        config.slots.values().next().unwrap().limits
    }

    #[test]
    fn a_limit_is_enforced_or_refused_or_its_lack_is_loud() {
        let slot = "a".parse().unwrap();
        for key in [
            "memory = \"1G\"",
            "swap = 0",
            "cpus = 1",
            "disk = \"1G\"",
            "inodes = 1000",
        ] {
            let name = key.split(' ').next().unwrap();
            let error = check(&slot, &limits(key), NOTHING).unwrap_err();
            assert!(
                error.message().contains(&format!("limits.{name} cannot")),
                "{error}"
            );
            let warnings = check(&slot, &limits(&format!("{key}\nbest_effort = true")), NOTHING).unwrap();
            assert_eq!(warnings.len(), 1);
            assert!(warnings[0].contains(name));
            assert_eq!(check(&slot, &limits(key), ALL), Ok(vec![]));
        }
        assert_eq!(check(&slot, &Limits::default(), NOTHING), Ok(vec![]));
    }

    #[test]
    fn a_socket_for_cores_is_warned_about_with_its_name() {
        let warning = core_warning("@/run/cores.sock\n").unwrap();
        for part in ["\"@/run/cores.sock\"", "NOT ENFORCED", "set it to"] {
            assert!(warning.contains(part), "{warning}");
        }
        for harmless in ["core\n", "|/usr/lib/systemd/systemd-coredump %P\n"] {
            assert_eq!(core_warning(harmless), None);
        }
    }

    #[test]
    fn cgroups_get_the_kernels_words() {
        assert_eq!(cgroup_settings(&Limits::default(), NOTHING), []);
        assert_eq!(
            cgroup_settings(&limits("memory = \"1G\"\ncpus = 0.5\nprocesses = 100"), ALL),
            [
                ("pids.max", "100".to_owned()),
                ("memory.high", "1071644672".into()),
                ("memory.max", "1073741824".into()),
                ("memory.swap.max", "0".into()),
                ("cpu.max", "50000 100000".into())
            ]
        );
        let swap = limits("memory = \"1G\"\nswap = \"2G\"");
        assert!(cgroup_settings(&swap, ALL).contains(&("memory.swap.max", "2147483648".into())));
    }

    #[test]
    fn a_host_can_do_what_its_controllers_say() {
        let root = tempfile::tempdir().unwrap();
        let place = crate::host::tests::open_path(root.path()).unwrap();
        let can = |controllers: &str| {
            std::fs::write(root.path().join("cgroup.subtree_control"), controllers).unwrap();
            let Abilities {
                memory, cpu, pids, ..
            } = Abilities::of(&place, &place).unwrap();
            (memory, cpu, pids)
        };
        assert_eq!(can(""), (false, false, false));
        assert_eq!(can("cpuset memory pids\n"), (true, false, true));
        assert_eq!(can("cpu\n"), (false, true, false));
        assert!(ALL.has_quotas() && !NOTHING.has_quotas());
    }

    #[test]
    fn all_slots_are_checked_and_the_one_is_named() {
        let text = |limits: &str| {
            format!(
                "[general]\nbaseurl = \"http://b\"\n[factory]\ntoken_file = \"/t\"\n[slots.a]\n\
                 target = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n[slots.b]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n\
                 limits = {{ {limits} }}\n"
            )
        };
        let check = |limits: &str, can| check_all(&Config::parse(&text(limits)).unwrap(), can);
        assert_eq!(check("cpus = 1", ALL).unwrap(), Vec::<String>::new());
        let error = format!("{:#}", check("cpus = 1", NOTHING).unwrap_err());
        assert!(error.contains("config.toml:7: slot b: limits.cpus"), "{error}");
        let warnings = check("cpus = 1, memory = \"1G\", best_effort = true", NOTHING).unwrap();
        assert_eq!(warnings.len(), 2);
        assert!(warnings[1].contains("limits.cpus of slot b"));
    }

    #[test]
    fn a_cgroup_gets_its_settings_and_only_swap_that_no_kernel_has_may_be_missing() {
        let root = tempfile::tempdir().unwrap();
        let cgroup = crate::host::tests::open_path(root.path()).unwrap();
        let set = |text: &str, can| of_cgroup(&cgroup, &limits(text), can);
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
