//! What a job of a slot may expect, as the probe is told it: from the configuration, and from this host.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use nix::libc;
use protocol::SlotName;
use protocol::config::{CONFIG_PATH, Config, HELPER_SOCKET, STATE_DIR, SocketFamily, accounts};
use serde::{Deserialize, Serialize};

use crate::settings::Places;

/// Where services of a host listen, as a rule.
const SERVICES: [&str; 12] = [
    "/run/dbus/system_bus_socket",
    "/run/systemd/private",
    "/run/systemd/journal/stdout",
    "/run/systemd/journal/socket",
    "/run/systemd/io.systemd.Manager",
    "/run/udev/control",
    "/run/docker.sock",
    "/run/containerd/containerd.sock",
    "/run/podman/podman.sock",
    "/run/snapd.socket",
    "/run/libvirt/libvirt-sock",
    "/run/nscd/socket",
];

/// What the probe is told of its slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expected {
    /// `general.baseurl`.
    pub baseurl: String,
    /// `general.proxy`, by which a job with the host's network reaches the server.
    pub proxy: Option<String>,
    /// Its jobs have not the host's network.
    pub has_own_network: bool,
    /// Names and gids.
    pub groups: BTreeMap<String, u32>,
    /// `slots.NAME.env`.
    pub env: BTreeMap<String, String>,
    /// Device nodes that are on the host, and that the slot names.
    pub devices: BTreeSet<PathBuf>,
    /// `slots.NAME.writable`, as paths in the job.
    pub writable: BTreeSet<PathBuf>,
    /// The keys of `slots.NAME.read_only`: paths in the job.
    pub read_only: BTreeSet<PathBuf>,
    /// Files and directories of the host that no job may read.
    pub hidden: BTreeSet<PathBuf>,
    /// Sockets of services that no job may connect to.
    pub sockets: BTreeSet<PathBuf>,
    /// `slots.NAME.allow_user_namespaces`.
    pub allows_user_namespaces: bool,
    /// Families of sockets beside the usual ones: `AF_CAN` and its like, by number.
    pub socket_families: BTreeSet<i32>,
    /// `limits.open_files`.
    pub open_files: u64,
    /// `limits.processes`.
    pub processes: u64,
    /// `limits.disk`, in bytes.
    pub disk: Option<u64>,
    /// `limits.inodes`.
    pub inodes: Option<u64>,
    /// The process id of a process outside, which listens at `port` and at `abstract_name`.
    pub pid: u32,
    /// The port of its listener at 127.0.0.1.
    pub port: u16,
    /// The network namespace of that process, as `/proc/PID/ns/net` leads to it (`namespaces(7)`).
    pub network_namespace: PathBuf,
    /// The abstract name of its Unix listener (`unix(7)`), without the leading NUL.
    pub abstract_name: String,
}

impl Expected {
    /// What the probe must find in this slot. `outside` is the process that listens.
    pub fn of(config: &Config, slot: &SlotName, root: &Path, outside: &ProbeListeners) -> Expected {
        let its = &config.slots[slot];
        let groups = fs::read_to_string("/etc/group").unwrap_or_default();
        let group = |name| Some((name, accounts::gid(&groups, name).ok()?));
        let places = Places::below(root);
        let hidden = [
            config.factory.token_file.as_path().to_owned(),
            root.join(CONFIG_PATH),
            root.join(STATE_DIR),
            places.state,
            "/root".into(),
            "/etc/shadow".into(),
        ];
        let of_the_operator = config.factory.hide.iter().map(|path| path.as_path().to_owned());
        let shown: Vec<PathBuf> = its
            .read_only
            .values()
            .map(|path| path.as_path().to_owned())
            .collect();
        let is_shown = |path: &PathBuf| shown.iter().any(|shown| shown.starts_with(path));
        let own = [root.join(HELPER_SOCKET), Places::below(root).control_socket()];
        Expected {
            baseurl: config.general.baseurl.to_string(),
            proxy: config.general.proxy.as_ref().map(ToString::to_string),
            has_own_network: its.egress.is_some(),
            groups: its
                .add_to_groups
                .iter()
                .filter_map(group)
                .map(|(name, gid)| (name.to_string(), gid))
                .collect(),
            env: its
                .env
                .iter()
                .map(|(name, value)| (name.to_string(), value.to_string()))
                .collect(),
            devices: nodes(Path::new("/dev"))
                .into_iter()
                .filter(|node| {
                    let below = node.strip_prefix("/dev").expect("it is below");
                    its.devices.iter().any(|pattern| pattern.matches(below))
                })
                .collect(),
            writable: its
                .writable
                .iter()
                .map(|path| path.as_path().to_owned())
                .collect(),
            read_only: its
                .read_only
                .keys()
                .map(|path| path.as_path().to_owned())
                .collect(),
            hidden: hidden
                .into_iter()
                .chain(of_the_operator)
                .filter(|path| path.exists() && !is_shown(path))
                .collect(),
            sockets: SERVICES
                .iter()
                .map(PathBuf::from)
                .chain(own)
                .filter(|path| path.exists())
                .collect(),
            allows_user_namespaces: its.allow_user_namespaces,
            socket_families: its.socket_families.iter().map(|family| number(*family)).collect(),
            open_files: its.limits.open_files,
            processes: its.limits.processes,
            disk: its.limits.disk,
            inodes: its.limits.inodes,
            pid: std::process::id(),
            port: outside.port,
            network_namespace: fs::read_link("/proc/self/ns/net").unwrap_or_default(),
            abstract_name: outside.abstract_name.clone(),
        }
    }
}

fn number(family: SocketFamily) -> i32 {
    match family {
        SocketFamily::Bluetooth => libc::AF_BLUETOOTH,
        SocketFamily::Can => libc::AF_CAN,
        SocketFamily::Vsock => libc::AF_VSOCK,
    }
}

/// Where this process listens while the probe runs.
#[derive(Clone, Debug)]
pub struct ProbeListeners {
    /// At 127.0.0.1.
    pub port: u16,
    /// Without the leading NUL.
    pub abstract_name: String,
}

/// The device nodes below a directory; links are not followed.
pub fn nodes(directory: &Path) -> BTreeSet<PathBuf> {
    use std::os::unix::fs::FileTypeExt;
    let mut found = BTreeSet::new();
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => directories.push(entry.path()),
                Ok(kind) if kind.is_char_device() || kind.is_block_device() => {
                    found.insert(entry.path());
                }
                _ => {}
            }
        }
    }
    found
}
