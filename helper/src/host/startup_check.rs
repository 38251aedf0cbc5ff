//! What is asked of a host, and of a configuration for it, before the helper starts with them.

use anyhow::{Context, Result};
use protocol::config::{self, Config};

use crate::host::{Host, abilities, filesystem, users};
use crate::log::warn;

/// Refuse a host, or a configuration for it, on which the helper does not start. Limits ([`abilities::check_all`]) and
/// processes ([`users::check_no_process`]) are looked at by themselves. Returns the supervisor's uid and gid.
pub fn check_host(host: &Host, config: &Config) -> Result<(u32, u32)> {
    if let Some(warning) = filesystem::check(&host.workers)? {
        warn!("{warning}");
    }
    check_accounts(host, config)?;
    users::supervisor(host, &config.factory.user, config.factory.uid_range)
}

/// Refuse a configuration that names ids and groups which the host does not have, or which are somebody else's.
fn check_accounts(host: &Host, config: &Config) -> Result<()> {
    users::check_id_overlap(host, config.factory.uid_range)?;
    for (name, slot) in &config.slots {
        users::groups(host, &slot.add_to_groups)
            .with_context(|| format!("{}:{}: slot {name}", config::CONFIG_PATH, slot.line))?;
    }
    Ok(())
}

/// For `Check`: the same, and the limits. The warnings are of limits that are not enforced.
pub fn check_configuration(host: &Host, config: &Config) -> Result<Vec<String>> {
    check_accounts(host, config)?;
    abilities::check_all(config, host.abilities)
}
