//! The configuration and the token, read once at the start. A mistake is said with its place, and with
//! what to do; nothing is guessed.

use std::fs;
use std::path::{Path, PathBuf};

use protocol::config::{
    CGROUP_FILE, CONFIG_PATH, CONTROL_DIR, CONTROL_SOCKET, Config, Egress, HELPER_SOCKET, Limits, Mistake,
    PROXY_DIR, STATE_DIR, Slot,
};

use crate::config_check;

/// Where everything is below a root directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// The configuration file.
    pub config: PathBuf,
    /// The helper's socket.
    pub helper: PathBuf,
    /// The directory of the egress proxy's socket.
    pub egress_proxy: PathBuf,
    /// Where the helper's records of the workers' users are.
    pub userdb: PathBuf,
    /// The directory of the control socket.
    pub control: PathBuf,
    /// Where the helper says where the workers' cgroups are.
    pub cgroups: PathBuf,
    /// The supervisor's state directory.
    pub state: PathBuf,
    /// The machine's id, `machine-id(5)`.
    pub machine_id: PathBuf,
}

impl Places {
    /// `/` unless a test has its own.
    pub fn below(root: &Path) -> Self {
        Self {
            config: root.join(CONFIG_PATH),
            helper: root.join(HELPER_SOCKET),
            egress_proxy: root.join(PROXY_DIR),
            userdb: root.join("run/userdb"),
            control: root.join(CONTROL_DIR),
            cgroups: root.join(CGROUP_FILE),
            state: root.join(STATE_DIR).join("supervisor"),
            machine_id: root.join("etc/machine-id"),
        }
    }

    /// The control socket.
    pub fn control_socket(&self) -> PathBuf {
        self.control.join(CONTROL_SOCKET)
    }
}

/// The keys that differ and that a running supervisor cannot change, if there are any.
pub fn needs_restart(old: &Config, new: &Config) -> Option<String> {
    let (a, b) = (&old.factory, &new.factory);
    let changed = [
        ("general.baseurl", old.general.baseurl != new.general.baseurl),
        ("general.proxy", old.general.proxy != new.general.proxy),
        ("factory.user", a.user != b.user),
        ("factory.uid_range", a.uid_range != b.uid_range),
        ("factory.status_address", a.status_address != b.status_address),
        ("factory.status_names", a.status_names != b.status_names),
    ];
    let names: Vec<&str> = changed
        .iter()
        .filter(|(_, changed)| *changed)
        .map(|(key, _)| *key)
        .collect();
    (!names.is_empty()).then(|| names.join(", "))
}

/// The configuration at `path`, or all its mistakes: those of the text, and a server that the token must not be sent to.
///
/// # Errors
/// The mistakes, in the order of their lines.
pub fn load(path: &Path) -> Result<Config, Vec<Mistake>> {
    config_check::parse(&read(path)?)
}

/// The text of the configuration at `path`.
///
/// # Errors
/// One mistake, on the first line: why it cannot be read.
pub fn read(path: &Path) -> Result<String, Vec<Mistake>> {
    fs::read_to_string(path).map_err(|e| {
        vec![Mistake {
            line: 1,
            message: format!("the file cannot be read: {e}; check its path and mode"),
        }]
    })
}

/// `FILE:LINE: sentence`, one a line.
pub fn print(path: &Path, mistakes: &[Mistake]) -> String {
    mistakes
        .iter()
        .map(|m| format!("{}:{}: {}\n", path.display(), m.line, m.message))
        .collect()
}

/// The slots, for an operator who has just written them.
pub fn summary(config: &Config) -> String {
    let slots = config.slots.iter().map(|(name, slot)| {
        let list = |what: &str, items: Vec<String>| {
            if items.is_empty() {
                String::new()
            } else {
                format!("; {what} {}", items.join(" "))
            }
        };
        format!(
            "slot {name}: target {}{}{}{}{}{}{}\n",
            slot.target,
            list(
                "groups",
                slot.add_to_groups.iter().map(ToString::to_string).collect()
            ),
            list("devices", slot.devices.iter().map(ToString::to_string).collect()),
            list(
                "usb",
                slot.usb
                    .iter()
                    .map(|(name, entry)| format!("{name} ({entry})"))
                    .collect()
            ),
            list(
                "never beside",
                slot.conflicts_with_slots
                    .iter()
                    .map(ToString::to_string)
                    .collect()
            ),
            list("with", rights(slot)),
            list("limits", limits(&slot.limits)),
        )
    });
    format!("server {}\n{}", config.general.baseurl, slots.collect::<String>())
}

/// What differs from the defaults, as it is written in the file.
fn rights(slot: &Slot) -> Vec<String> {
    let rights = [
        (slot.allow_user_namespaces, "allow_user_namespaces=true"),
        (!slot.ignore_sync, "ignore_sync=false"),
    ];
    let rights = rights.into_iter().filter(|(differs, _)| *differs);
    let rights = rights.map(|(_, words)| words.to_owned());
    slot.egress.iter().map(network).chain(rights).collect()
}

/// A network of the job's own.
fn network(egress: &Egress) -> String {
    let allowed: Vec<String> = egress.allow.iter().map(ToString::to_string).collect();
    let allowed = allowed.join(" ");
    match (egress.allow.is_empty(), egress.audit) {
        (true, false) => "network=none".into(),
        (true, true) => "network.audit=true".into(),
        (false, false) => format!("network.allow={allowed}"),
        (false, true) => format!("network.audit=true network.allow={allowed}"),
    }
}

/// The same of the limits.
fn limits(limits: &Limits) -> Vec<String> {
    let usual = Limits::default();
    let changed = |now: u64, usual: u64| (now != usual).then_some(now);
    let cpus = limits.cpus.map(|cpus| f64::from(cpus.thousandths()) / 1000.0);
    let values = [
        ("memory", limits.memory.map(size)),
        ("swap", limits.swap.map(size)),
        ("cpus", cpus.map(|cpus| cpus.to_string())),
        (
            "processes",
            changed(limits.processes, usual.processes).map(|n| n.to_string()),
        ),
        (
            "open_files",
            changed(limits.open_files, usual.open_files).map(|n| n.to_string()),
        ),
        ("disk", limits.disk.map(size)),
        ("inodes", limits.inodes.map(|n| n.to_string())),
        ("console", changed(limits.console, usual.console).map(size)),
        ("run_time_seconds", limits.run_time_seconds.map(|n| n.to_string())),
        ("best_effort", limits.best_effort.then(|| "true".to_owned())),
    ];
    values
        .into_iter()
        .filter_map(|(key, value)| Some(format!("{key}={}", value?)))
        .collect()
}

/// A number of bytes as an operator would write it: with the largest unit that leaves it whole.
pub fn size(bytes: u64) -> String {
    [(40, 'T'), (30, 'G'), (20, 'M'), (10, 'K')]
        .into_iter()
        .find(|(shift, _)| bytes != 0 && bytes.trailing_zeros() >= *shift)
        .map_or_else(
            || bytes.to_string(),
            |(shift, unit)| format!("{}{unit}", bytes >> shift),
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_names_what_is_not_as_usual_on_one_line_a_slot() {
        let config = Config::parse(
            "[general]\nbaseurl = \"http://h\"\n[factory]\ntoken_file = \"/t\"\n[slots.a]\n\
             target = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\nnetwork = \"none\"\nignore_sync = false\n\
             allow_user_namespaces = true\ndevices = [\"/dev/ttyACM*\"]\nusb.probe.serial = \"A\"\n[slots.a.limits]\nmemory = \"8G\"\nswap = 0\n\
             cpus = 2.5\nprocesses = 100\nopen_files = 4096\ndisk = \"1536M\"\ninodes = 1000\nconsole = \"64K\"\n\
             run_time_seconds = 60\nbest_effort = true\n[slots.b]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n\
             network = \"host\"\nlimits.processes = 16384\n",
        )
        .unwrap();
        assert_eq!(
            summary(&config),
            "server http://h\n\
             slot a: target 01HZX3N8Q4J5K6M7P8R9S0T1V2; devices /dev/ttyACM*; usb probe (serial A); \
             with network=none allow_user_namespaces=true ignore_sync=false; \
             limits memory=8G swap=0 cpus=2.5 processes=100 open_files=4096 disk=1536M inodes=1000 \
             console=64K run_time_seconds=60 best_effort=true\n\
             slot b: target 01HZX3N8Q4J5K6M7P8R9S0T1V2\n"
        );
    }
}
