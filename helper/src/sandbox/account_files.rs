//! The files that a job sees in `/etc` in place of the host's.

use nix::unistd::Gid;
use protocol::config::{Config, GroupName, Slot};
use protocol::{Uid, UserName};

use crate::host::accounts::{Accounts, LAST_OF_THE_SYSTEM};
use crate::sandbox::network;

/// The files that a job sees in `/etc` in place of the host's, by their names: the system's accounts with its own,
/// the slot's groups, and where it has not the host's network, the hosts that it reaches.
pub fn files(
    accounts: &Accounts,
    name: &UserName,
    uid: Uid,
    groups: &[(GroupName, Gid)],
    config: &Config,
    slot: &Slot,
) -> Vec<(&'static str, String)> {
    let passwd = format!(
        "{}{name}:x:{uid}:{uid}:buildomat worker:/home/{name}:/bin/bash\n",
        accounts.passwd
    );
    let mut group = String::new();
    for line in accounts.group.lines() {
        group += line;
        if groups
            .iter()
            .any(|(own, _)| line.split(':').next() == Some(own.as_str()))
        {
            // The members are the last field, which may be empty (`group(5)`), or missing.
            group += match line.matches(':').count() {
                ..3 => ":",
                _ if line.ends_with(':') => "",
                _ => ",",
            };
            group += &name.to_string();
        }
        group += "\n";
    }
    group += &format!("{name}:x:{uid}:\n");
    let more = groups.iter().filter(|(_, gid)| gid.as_raw() > LAST_OF_THE_SYSTEM);
    for (own, gid) in more {
        group += &format!("{own}:x:{gid}:{name}\n");
    }
    let mut files = vec![("passwd", passwd), ("group", group)];
    if let Some(egress) = &slot.egress {
        let own = nix::unistd::gethostname().unwrap_or_default();
        files.push(("hosts", network::hosts(&config.general.baseurl, egress, &own)));
    }
    files
}

#[cfg(test)]
mod tests {
    use std::fs;

    use protocol::WorkerId;

    use super::*;
    use crate::host::tests::host;
    use crate::host::users::groups;

    fn configured(slot: &str) -> Config {
        let head = "[general]\nbaseurl = \"http://127.0.0.1\"\n[factory]\ntoken_file = \"/t\"\n\
                    [slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n";
        Config::parse(&format!("{head}{slot}\n")).unwrap()
    }

    #[test]
    fn a_job_sees_the_systems_accounts_its_own_and_its_groups_but_no_persons() {
        let root = tempfile::tempdir().unwrap();
        let host = host(root.path());
        let line = |name: &str, id: u32| format!("{name}:x:{id}:{id}:\n");
        let system = line("root", 0) + &line("last", 999) + &line("nobody", 65_534);
        let people = line("first", 1000) + &line("other", 65_533);
        for file in ["passwd", "group"] {
            fs::write(
                root.path().join("etc").join(file),
                format!("broken\n{people}{system}short:x:998\n"),
            )
            .unwrap();
        }
        let config = configured("add_to_groups = [\"first\", \"last\", \"short\"]");
        let slot = config.slots.values().next().unwrap();
        let (name, uid) = (
            UserName::from(WorkerId::from_bits(7)),
            Uid::try_from(2_000_000).unwrap(),
        );
        let groups = groups(&host, &slot.add_to_groups).unwrap();
        let files = files(&host.accounts().unwrap(), &name, uid, &groups, &config, slot);
        let own = format!("{name}:x:{uid}:{uid}:buildomat worker:/home/{name}:/bin/bash\n");
        let with_member = system.replace("last:x:999:999:", &format!("last:x:999:999:{name}"));
        let expected = [
            ("passwd", format!("{system}short:x:998\n{own}")),
            (
                "group",
                format!("{with_member}short:x:998:{name}\n{name}:x:{uid}:\nfirst:x:1000:{name}\n"),
            ),
        ];
        assert_eq!(files, expected);
    }
}
