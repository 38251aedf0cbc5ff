//! Sysctls of the host's network namespace that a job's own gets, too.

use std::path::Path;

use anyhow::{Context, Result};

/// What a new network namespace has of its own with the kernel's defaults, and programs of users notice: who may
/// `ping`, from which port on everybody may listen, which ports are taken by themselves, how many connections and
/// datagrams wait, how soon a dead connection is noticed. In an order in which the kernel takes each.
const SYSCTLS: [&str; 10] = [
    "ipv4/ping_group_range",
    "ipv4/ip_unprivileged_port_start",
    "ipv4/ip_local_port_range",
    "ipv4/ip_local_reserved_ports",
    "ipv4/tcp_keepalive_time",
    "ipv4/tcp_keepalive_intvl",
    "ipv4/tcp_keepalive_probes",
    "ipv6/bindv6only",
    "core/somaxconn",
    "unix/max_dgram_qlen",
];

/// The sysctls of the network namespace that this process is in, those that its kernel has.
#[derive(Debug)]
pub struct NetworkSysctls(Vec<(&'static str, String)>);

impl NetworkSysctls {
    pub fn read() -> Result<NetworkSysctls> {
        let mut sysctls = Vec::new();
        for name in SYSCTLS {
            let path = Path::new("/proc/sys/net").join(name);
            match std::fs::read_to_string(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                value => sysctls.push((
                    name,
                    value.with_context(|| format!("cannot read {}", path.display()))?,
                )),
            }
        }
        Ok(NetworkSysctls(sysctls))
    }

    /// Give them to the network namespace of this process, which the `/proc` that is mounted must belong to.
    pub fn write(&self) -> Result<()> {
        for (name, value) in &self.0 {
            let path = Path::new("/proc/sys/net").join(name);
            std::fs::write(&path, value)
                .with_context(|| format!("cannot write {:?} to {}", value.trim_end(), path.display()))?;
        }
        Ok(())
    }
}
