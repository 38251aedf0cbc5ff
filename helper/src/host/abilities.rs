//! Which limits of slots this host can enforce.

use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result, bail};
use protocol::SlotName;
use protocol::config::{Config, Limits, core_goes_to_a_socket};

use crate::host::directory::read_small;
use crate::sys;

/// What the host can limit besides what every Linux can (`getrlimit(2)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abilities {
    pub can_limit_memory: bool,
    pub can_limit_cpu: bool,
    pub can_limit_pids: bool,
    pub has_user_quotas: bool,
}

impl Abilities {
    pub fn of(workers: &OwnedFd, cgroups: &OwnedFd) -> Result<Abilities> {
        let controllers = read_small(cgroups, "cgroup.subtree_control")
            .context("cannot read cgroup.subtree_control")?
            .unwrap_or_default();
        let has = |name: &str| controllers.split_whitespace().any(|other| other == name);
        Ok(Abilities {
            can_limit_memory: has("memory"),
            can_limit_cpu: has("cpu"),
            can_limit_pids: has("pids"),
            has_user_quotas: sys::enforces_user_quotas(workers.as_fd()),
        })
    }
}

/// The limits of these that the host cannot enforce: each with its key, and what would let it.
fn unenforceable(limits: &Limits, host: Abilities) -> Vec<(&'static str, &'static str)> {
    let delegate =
        "delegate the cgroup v2 controller of that name to the helper (Delegate=yes), away from cgroup v1";
    let quota = "let the state directory be on ext4 or XFS with user quotas (see docs/deploying.md)";
    [
        ("memory", limits.memory.is_some(), host.can_limit_memory, delegate),
        ("swap", limits.swap.is_some(), host.can_limit_memory, delegate),
        ("cpus", limits.cpus.is_some(), host.can_limit_cpu, delegate),
        ("disk", limits.disk.is_some(), host.has_user_quotas, quota),
        ("inodes", limits.inodes.is_some(), host.has_user_quotas, quota),
    ]
    .into_iter()
    .filter_map(|(key, is_set, can, remedy)| (is_set && !can).then_some((key, remedy)))
    .collect()
}

/// Refuse limits that would only be written down; where the operator settles for that, the warnings.
pub fn check(slot: &SlotName, limits: &Limits, host: Abilities) -> Result<Vec<String>> {
    let missing = unenforceable(limits, host);
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
    bail!(
        "slot {slot}: limits.{key} cannot be enforced on this host: {remedy}, or set limits.best_effort = true"
    )
}

/// The same for all slots.
pub fn check_all(config: &Config, host: Abilities) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    for (name, slot) in &config.slots {
        let checked = check(name, &slot.limits, host);
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

#[cfg(test)]
pub mod tests {
    use protocol::config::Slot;

    use super::*;

    pub const NOTHING: Abilities = Abilities {
        can_limit_memory: false,
        can_limit_cpu: false,
        can_limit_pids: false,
        has_user_quotas: false,
    };
    pub const ALL: Abilities = Abilities {
        can_limit_memory: true,
        can_limit_cpu: true,
        can_limit_pids: true,
        has_user_quotas: true,
    };

    pub fn limits(text: &str) -> Limits {
        slot(text).limits
    }

    pub fn slot(limits: &str) -> Slot {
        let head = "[general]\nbaseurl = \"http://b\"\n[factory]\ntoken_file = \"/t\"\n[slots.a]\n\
                    target = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n[slots.a.limits]\n";
        let mut config = Config::parse(&format!("{head}{limits}")).unwrap();
        config.slots.pop_first().unwrap().1
    }

    #[test]
    fn a_limit_is_enforced_or_refused_or_warned_about() {
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
                error.to_string().contains(&format!("limits.{name} cannot")),
                "{error}"
            );
            let warnings = check(&slot, &limits(&format!("{key}\nbest_effort = true")), NOTHING).unwrap();
            assert_eq!(warnings.len(), 1);
            assert!(warnings[0].contains(name));
            assert!(check(&slot, &limits(key), ALL).unwrap().is_empty());
        }
        assert!(check(&slot, &Limits::default(), NOTHING).unwrap().is_empty());
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
    fn a_host_can_do_what_its_controllers_say() {
        let root = tempfile::tempdir().unwrap();
        let place = crate::host::directory::tests::open_path(root.path()).unwrap();
        let can = |controllers: &str| {
            std::fs::write(root.path().join("cgroup.subtree_control"), controllers).unwrap();
            let host = Abilities::of(&place, &place).unwrap();
            (host.can_limit_memory, host.can_limit_cpu, host.can_limit_pids)
        };
        assert_eq!(can(""), (false, false, false));
        assert_eq!(can("cpuset memory pids\n"), (true, false, true));
        assert_eq!(can("cpu\n"), (false, true, false));
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
}
