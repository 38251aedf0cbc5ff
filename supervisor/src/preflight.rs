//! What this host can do for its jobs, as far as an unprivileged process can see it: for `check`. The helper checks the
//! host again when it starts, and refuses what it must.

use std::fs;
use std::path::{Path, PathBuf};

use protocol::config::{Config, Limits, STATE_DIR, core_goes_to_a_socket};

use crate::config_check::NOT_IN_A_JOB;

/// One thing that the host has or lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// A few words: `cgroup controllers`.
    pub what: &'static str,
    /// How it is, for an operator.
    pub how: String,
    /// What its lack costs, and what would fix it. None where nothing is missing.
    pub cost: Option<String>,
    /// Without it, this configuration does not start.
    pub needed: bool,
}

/// What `/proc` and `/sys` say: all that the findings are made of.
#[derive(Clone, Debug, Default)]
pub struct HostFacts {
    /// `uname -r`.
    pub release: String,
    /// `/proc/self/mountinfo`.
    pub mounts: String,
    /// `cgroup.controllers` at the mount of cgroup v2.
    pub controllers: String,
    /// `/proc/pressure/memory`: empty where the kernel does not count memory pressure.
    pub pressure: String,
    /// `/sys/kernel/security/lsm`.
    pub modules: String,
    /// `/proc/sys/kernel/core_pattern`.
    pub core_pattern: String,
    /// The file that `/etc/resolv.conf` leads to.
    pub resolver: Option<PathBuf>,
    /// What other files of `/etc` lead to that programs read, where they are links.
    pub links: Vec<(&'static str, PathBuf)>,
    /// Is `/var/run` a directory, and not the usual link to `/run`?
    pub has_var_run: bool,
}

/// What ordinary programs read in `/etc`, besides `resolv.conf`.
const READ_BY_PROGRAMS: [&str; 4] = ["/etc/hosts", "/etc/hostname", "/etc/localtime", "/etc/ssl/certs"];

/// Of `/run`, what is each job's own.
const OWN_IN_RUN: [&str; 2] = ["/run/lock", "/run/user"];

/// Does a job find this file of the host? `with_run` says whether it is shown the directory in `/run` that it is in.
fn is_in_a_job(file: &Path, with_run: bool) -> bool {
    let is_below = |place: &&str| file.starts_with(place);
    match file.starts_with("/run") {
        true => with_run && file.parent() != Some(Path::new("/run")) && !OWN_IN_RUN.iter().any(is_below),
        false => !NOT_IN_A_JOB.iter().any(is_below),
    }
}

impl HostFacts {
    /// What cannot be read is empty.
    pub fn read() -> HostFacts {
        let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
        let mounts = read(Path::new("/proc/self/mountinfo"));
        let controllers = cgroup2(&mounts).map(|place| read(&Path::new(place).join("cgroup.controllers")));
        HostFacts {
            release: read(Path::new("/proc/sys/kernel/osrelease")).trim().to_owned(),
            controllers: controllers.unwrap_or_default(),
            pressure: read(Path::new("/proc/pressure/memory")),
            modules: read(Path::new("/sys/kernel/security/lsm")),
            core_pattern: read(Path::new("/proc/sys/kernel/core_pattern"))
                .trim_end()
                .to_owned(),
            resolver: Path::new("/etc/resolv.conf")
                .canonicalize()
                .ok()
                .filter(|file| file.is_file()),
            links: READ_BY_PROGRAMS
                .into_iter()
                .filter_map(|name| Some((name, Path::new(name).canonicalize().ok()?)))
                .filter(|(name, path)| path != Path::new(name))
                .collect(),
            has_var_run: Path::new("/var/run")
                .symlink_metadata()
                .is_ok_and(|meta| meta.is_dir()),
            mounts,
        }
    }
}

/// Where cgroup v2 is mounted (`proc_pid_mountinfo(5)`).
fn cgroup2(mounts: &str) -> Option<&str> {
    let line = mounts.lines().find(|line| line.contains(" - cgroup2 "))?;
    line.split(' ').nth(4)
}

/// The options of the mount that `path` is on: the mount's own and its file system's.
fn options_at<'a>(mounts: &'a str, path: &Path) -> Option<(&'a str, Vec<&'a str>)> {
    let on = mounts.lines().filter_map(|line| {
        let (mount, source) = line.split_once(" - ")?;
        let place = mount.split(' ').nth(4)?;
        path.starts_with(place).then_some((place.len(), mount, source))
    });
    // Of those above each other, the last counts.
    let (_, mount, source) = on.max_by_key(|(length, ..)| *length)?;
    let mut fields = source.split(' ');
    let (kind, options) = (fields.next()?, fields.nth(1).unwrap_or_default());
    let own = mount.split(' ').nth(5).unwrap_or_default();
    Some((kind, own.split(',').chain(options.split(',')).collect()))
}

/// Major and minor of a kernel's release.
fn version(release: &str) -> (u32, u32) {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Does a slot limit this?
type LimitPredicate = fn(&Limits) -> bool;

/// What this host has for this configuration; the state directory is below `root`.
pub fn findings(facts: &HostFacts, config: &Config, root: &Path) -> Vec<Finding> {
    let kernel = version(&facts.release);
    let strict = |wanted: LimitPredicate| {
        config
            .slots
            .values()
            .any(|slot| wanted(&slot.limits) && !slot.limits.best_effort)
    };
    let finding = |what, how: &str, good: bool, needed: bool, cost: &str| Finding {
        what,
        how: how.to_owned(),
        cost: (!good).then(|| cost.to_owned()),
        needed: needed && !good,
    };
    let mut found = vec![finding(
        "kernel",
        &facts.release,
        kernel >= (5, 14),
        true,
        "cgroup.kill needs Linux 5.14: without it no job's processes can be ended for sure; install a newer kernel",
    )];
    let mount = cgroup2(&facts.mounts);
    found.push(finding(
        "cgroup v2",
        mount.unwrap_or("not mounted"),
        mount.is_some(),
        true,
        "the helper finds and ends a job's processes by it; mount one (mount -t cgroup2 none /sys/fs/cgroup)",
    ));
    let has = |name: &str| facts.controllers.split_whitespace().any(|other| other == name);
    let controllers: [(&str, &str, &str, LimitPredicate); 3] = [
        (
            "memory",
            "controller memory",
            "limits.memory and limits.swap are not enforced",
            |limits| limits.memory.is_some() || limits.swap.is_some(),
        ),
        ("cpu", "controller cpu", "limits.cpus is not enforced", |limits| {
            limits.cpus.is_some()
        }),
        (
            "pids",
            "controller pids",
            "limits.processes is enforced for each user by the kernel's rlimit alone",
            |_| false,
        ),
    ];
    for (name, what, cost, wanted) in controllers {
        let how = if has(name) { "there" } else { "not there" };
        let cost =
            format!("{cost}; boot with cgroup v2 alone (systemd.unified_cgroup_hierarchy=1) and delegate it");
        found.push(finding(what, how, has(name), strict(wanted), &cost));
    }
    if has("memory") && config.slots.values().any(|slot| slot.limits.memory.is_some()) {
        let is_counted = !facts.pressure.is_empty();
        found.push(finding(
            "memory pressure",
            if is_counted { "counted" } else { "not counted" },
            is_counted,
            false,
            "a job that stalls at its limits.memory is not failed for that; boot with psi=1",
        ));
    }
    let landlock = facts.modules.split([',', '\n']).any(|name| name == "landlock");
    let scopes = landlock && kernel >= (6, 12);
    found.push(finding(
        "Landlock scopes",
        if scopes { "there" } else if facts.modules.is_empty() { "unknown: /sys/kernel/security cannot be read" } else { "not there" },
        scopes || facts.modules.is_empty(),
        false,
        "a job of a slot with network = \"host\" can reach abstract sockets of the host; to prevent it needs Linux 6.12 with lsm=…,landlock",
    ));
    let is_socket = core_goes_to_a_socket(&facts.core_pattern);
    let how = match facts.core_pattern.as_str() {
        "" => "unknown: /proc/sys/kernel/core_pattern is empty or cannot be read",
        pattern => pattern,
    };
    found.push(finding(
        "core_pattern",
        how,
        !is_socket,
        false,
        "jobs leave cores: a socket gets the whole core of every process, whatever its limit; set kernel.core_pattern to a file's name or a pipe",
    ));
    let state = root.join(STATE_DIR);
    let quotas = options_at(&facts.mounts, &state).is_some_and(|(_, options)| {
        options.iter().any(|option| {
            ["usrquota", "uquota", "quota", "usrjquota"]
                .contains(&option.split('=').next().unwrap_or_default())
        })
    });
    let kind = options_at(&facts.mounts, &state).map_or("unknown", |(kind, _)| kind);
    let remedy = match kind {
        "btrfs" | "overlay" => format!(
            "{kind} has no user quotas: mount an ext4 or XFS that has them at the state directory, as docs/deploying.md says"
        ),
        _ => "turn user quotas on as docs/deploying.md says".to_owned(),
    };
    found.push(finding(
        "user quotas",
        &format!(
            "{} on {} ({kind})",
            if quotas { "enabled" } else { "not enabled" },
            state.display()
        ),
        quotas,
        strict(|limits| limits.disk.is_some() || limits.inodes.is_some()),
        &format!("limits.disk and limits.inodes are not enforced, and a job can fill the disk; {remedy}"),
    ));
    if config.slots.values().any(|slot| slot.egress.is_none()) {
        let seen_by_jobs = facts.resolver.as_deref().filter(|file| is_in_a_job(file, true));
        found.push(finding(
            "resolv.conf",
            &match &facts.resolver {
                Some(file) => file.display().to_string(),
                None => "leads to no file".to_owned(),
            },
            seen_by_jobs.is_some(),
            false,
            "jobs with the host's network resolve no names; let /etc/resolv.conf be a file, or lead to one that is in a directory of /run",
        ));
    }
    for (name, path) in &facts.links {
        if !is_in_a_job(path, *name == "/etc/hosts") {
            found.push(finding(
                name,
                &path.display().to_string(),
                false,
                false,
                "jobs do not find what it leads to; let it be a file, or lead to one outside of /run and of the paths that are a job's own",
            ));
        }
    }
    if facts.has_var_run {
        found.push(finding(
            "/var/run",
            "a directory of its own",
            false,
            true,
            "buildomat's agent uses it as /run, and cannot in a job; move what is in it to /run, and make it a link to /run",
        ));
    }
    if config.slots.values().any(|slot| slot.egress.is_some()) {
        found.push(finding(
            "slots without the host's network",
            "a network namespace for each of its jobs",
            true,
            false,
            "",
        ));
    }
    found
}

/// A line for each finding, the costs below it.
pub fn print(findings: &[Finding]) -> String {
    let line = |f: &Finding| match &f.cost {
        None => format!("host {}: {}\n", f.what, f.how),
        Some(cost) => {
            let mark = if f.needed {
                "MISSING, and this configuration needs it"
            } else {
                "missing"
            };
            format!("host {}: {} ({mark}): {cost}\n", f.what, f.how)
        }
    };
    findings.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n\
        41 31 0:38 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n\
        50 27 7:0 / /var/lib/buildomat-user-factory rw - xfs /dev/loop0 rw,attr2,usrquota\n";

    fn config(limits: &str) -> Config {
        let head = "[general]\nbaseurl = \"http://h\"\n[factory]\ntoken_file = \"/t\"\n[slots.a]\n";
        Config::parse(&format!(
            "{head}target = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n{limits}\n"
        ))
        .unwrap()
    }

    fn missing(facts: &HostFacts, limits: &str, root: &str) -> Vec<(&'static str, bool)> {
        let all = findings(facts, &config(limits), Path::new(root));
        all.into_iter()
            .filter(|f| f.cost.is_some())
            .map(|f| (f.what, f.needed))
            .collect()
    }

    #[test]
    fn a_host_that_has_everything_lacks_nothing() {
        let facts = HostFacts {
            release: "6.12.0-1-amd64".into(),
            mounts: MOUNTS.into(),
            controllers: "cpuset cpu io memory pids\n".into(),
            pressure: "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n".into(),
            modules: "lockdown,capability,landlock,yama".into(),
            core_pattern: "core".into(),
            resolver: Some("/run/systemd/resolve/stub-resolv.conf".into()),
            links: vec![("/etc/localtime", "/usr/share/zoneinfo/UTC".into())],
            has_var_run: false,
        };
        assert_eq!(
            missing(&facts, "limits.memory = \"1G\"\nlimits.disk = \"1G\"", "/"),
            []
        );
        // Below another root it is on another file system.
        assert_eq!(
            missing(&facts, "limits.disk = \"1G\"", "/srv"),
            [("user quotas", true)]
        );
        // Red Hat's kernels, for example, count it only if they are told to.
        let without_pressure = HostFacts {
            pressure: String::new(),
            ..facts.clone()
        };
        assert_eq!(
            missing(&without_pressure, "limits.memory = \"1G\"", "/"),
            [("memory pressure", false)]
        );
        assert_eq!(missing(&without_pressure, "limits.cpus = 1", "/"), []);
        let old = HostFacts {
            release: "5.10.0".into(),
            ..facts
        };
        assert_eq!(
            missing(&old, "", "/"),
            [("kernel", true), ("Landlock scopes", false)]
        );
    }

    #[test]
    fn quotas_are_turned_on_where_the_file_system_has_them_and_nowhere_else() {
        for (kind, options, wanted) in [
            ("ext4", "rw,usrquota", None),
            ("xfs", "rw,uquota", None),
            ("ext4", "rw", Some("turn user quotas on")),
            ("xfs", "rw,attr2", Some("turn user quotas on")),
            (
                "btrfs",
                "rw,ssd,subvolid=5",
                Some("btrfs has no user quotas: mount an ext4 or XFS"),
            ),
            (
                "overlay",
                "rw,lowerdir=/a",
                Some("overlay has no user quotas: mount an ext4 or XFS"),
            ),
        ] {
            let facts = HostFacts {
                mounts: format!("27 1 254:0 / / rw,relatime - {kind} /dev/vda {options}\n"),
                ..HostFacts::default()
            };
            let all = findings(&facts, &config(""), Path::new("/"));
            let cost = all.into_iter().find(|f| f.what == "user quotas").unwrap().cost;
            match wanted {
                None => assert_eq!(cost, None, "{kind}"),
                Some(wanted) => assert!(cost.as_ref().unwrap().contains(wanted), "{kind}: {cost:?}"),
            }
        }
    }

    #[test]
    fn a_socket_that_gets_whole_cores_is_reported() {
        for (pattern, is_missing) in [
            ("core", false),
            ("|/usr/lib/systemd/systemd-coredump %P", false),
            ("@/run/cores.sock", true),
            ("@@/run/cores.sock", true),
            ("", false),
        ] {
            let facts = HostFacts {
                core_pattern: pattern.into(),
                ..HostFacts::default()
            };
            let reported = missing(&facts, "", "/").contains(&("core_pattern", false));
            assert_eq!(reported, is_missing, "{pattern:?}");
        }
    }

    #[test]
    fn a_host_on_which_jobs_could_resolve_no_names_is_reported() {
        for (resolver, network, is_missing) in [
            (Some("/etc/resolv.conf"), "host", false),
            (Some("/run/NetworkManager/resolv.conf"), "host", false),
            (Some("/run/resolv.conf"), "host", true),
            (Some("/run/lock/resolv.conf"), "host", true),
            (Some("/root/resolv.conf"), "host", true),
            (None, "host", true),
            (None, "none", false),
        ] {
            let facts = HostFacts {
                resolver: resolver.map(PathBuf::from),
                ..HostFacts::default()
            };
            let reported = missing(&facts, &format!("network = {network:?}"), "/");
            assert_eq!(
                reported.contains(&("resolv.conf", false)),
                is_missing,
                "{resolver:?}"
            );
        }
    }

    #[test]
    fn links_of_etc_that_lead_nowhere_in_a_job_are_reported() {
        let links = vec![
            ("/etc/hosts", "/run/hosts.d/hosts".into()),
            ("/etc/hostname", "/run/names/hostname".into()),
            ("/etc/localtime", "/usr/share/zoneinfo/UTC".into()),
            ("/etc/ssl/certs", "/root/certs".into()),
        ];
        let facts = HostFacts {
            links,
            has_var_run: true,
            ..HostFacts::default()
        };
        let reported = missing(&facts, "", "/");
        let of_files: Vec<_> = reported
            .into_iter()
            .filter(|(what, _)| what.starts_with('/'))
            .collect();
        assert_eq!(
            of_files,
            [
                ("/etc/hostname", false),
                ("/etc/ssl/certs", false),
                ("/var/run", true)
            ]
        );
    }

    #[test]
    fn what_is_missing_is_needed_by_who_asks_for_it_without_best_effort() {
        let bare = HostFacts {
            release: "6.1.0".into(),
            modules: "capability\n".into(),
            ..HostFacts::default()
        };
        let needed = |limits: &str| -> Vec<&str> {
            missing(&bare, limits, "/")
                .into_iter()
                .filter(|(_, needed)| *needed)
                .map(|(what, _)| what)
                .collect()
        };
        assert_eq!(needed(""), ["cgroup v2"]);
        assert_eq!(needed("limits.cpus = 1"), ["cgroup v2", "controller cpu"]);
        assert_eq!(
            needed("limits.cpus = 1\nlimits.best_effort = true"),
            ["cgroup v2"]
        );
        assert_eq!(
            needed("limits.inodes = 1000\nlimits.swap = 0"),
            ["cgroup v2", "controller memory", "user quotas"]
        );
    }
}
