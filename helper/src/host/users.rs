//! Workers' users as the host knows them (`/run/userdb`), and what the configuration wants of the host's own users,
//! groups and ids.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::{Gid, symlinkat};
use protocol::config::USERDB_SLOT;
use protocol::config::{GroupName, UidRange, User, accounts};
use protocol::{SlotName, Uid, UserName};

use crate::host::accounts::read_whole;
use crate::host::directory::{open_file, read_small, remove_file, stat, write_atomically};
use crate::host::{Host, record};
use crate::sys;

fn read_etc(host: &Host, name: &str) -> Result<String> {
    let file = open_file(&host.etc, name, OFlag::O_RDONLY);
    let file = file.with_context(|| format!("cannot open /etc/{name}"))?;
    read_whole(&file).with_context(|| format!("cannot read /etc/{name}"))
}

/// The uid of the supervisor, the only one that the helper serves, and its gid.
pub fn supervisor(host: &Host, user: &User, range: UidRange) -> Result<(u32, u32)> {
    accounts::supervisor(&read_etc(host, "passwd")?, user, range).map_err(anyhow::Error::msg)
}

/// Refuse a range of ids that the host's files give to somebody.
pub fn check_id_overlap(host: &Host, range: UidRange) -> Result<()> {
    for name in accounts::FILES_OF_IDS {
        let file = match read_etc(host, name) {
            Err(error) if error.downcast_ref() == Some(&Errno::ENOENT) => continue,
            file => file?,
        };
        accounts::check_range(name, &file, range).map_err(anyhow::Error::msg)?;
    }
    Ok(())
}

/// Refuse a range of which a process has a uid that is no worker's. The kernel finds a user's processes by a table, so
/// the number of processes costs nothing.
pub fn check_no_process(host: &Host, range: UidRange) -> Result<()> {
    // The user records in /run may be lost while workers exist.
    let recorded: BTreeSet<u32> = record::list(host)?
        .workers
        .iter()
        .map(|(_, record)| record.uid.get())
        .collect();
    let is_workers =
        |uid| recorded.contains(&uid) || Uid::try_from(uid).is_ok_and(|uid| is_in_userdb(&host.userdb, uid));
    for uid in range.first.get()..=range.last.get() {
        if sys::has_process_of(uid)? && !is_workers(uid) {
            let how = format!("a process of this host runs as uid {uid} of it (ps -u {uid} shows it)");
            bail!("{}", accounts::describe_taken_range(range, &how));
        }
    }
    Ok(())
}

/// The slot's groups, with their gids.
pub fn groups(host: &Host, names: &BTreeSet<GroupName>) -> Result<Vec<(GroupName, Gid)>> {
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let file = read_etc(host, "group")?;
    let gid = |name: &GroupName| {
        let gid = accounts::gid(&file, name).map_err(anyhow::Error::msg)?;
        Ok((name.clone(), Gid::from_raw(gid)))
    };
    names.iter().map(gid).collect()
}

/// The records by which the host knows a user and its group (<https://systemd.io/USER_RECORD/>,
/// `nss-systemd(8)`): a file by name, and a link by number.
fn userdb_names(name: &UserName, uid: Uid) -> [(String, String); 2] {
    [
        (format!("{name}.user"), format!("{uid}.user")),
        (format!("{name}.group"), format!("{uid}.group")),
    ]
}

pub fn write_userdb(userdb: BorrowedFd<'_>, name: &UserName, uid: Uid, slot: &SlotName) -> Result<()> {
    let user = format!(
        "{{\"userName\":\"{name}\",\"uid\":{uid},\"gid\":{uid},\"realName\":\"buildomat worker\",\
         \"homeDirectory\":\"/home/{name}\",\"shell\":\"/usr/sbin/nologin\",\"locked\":true,\"disposition\":\"dynamic\",\
         \"{USERDB_SLOT}\":\"{slot}\"}}\n"
    );
    let group = format!("{{\"groupName\":\"{name}\",\"gid\":{uid},\"disposition\":\"dynamic\"}}\n");
    for ((file, link), text) in userdb_names(name, uid).into_iter().zip([user, group]) {
        write_atomically(userdb, &file, &text, 0o644)
            .with_context(|| format!("cannot write /run/userdb/{file}"))?;
        match symlinkat(file.as_str(), userdb, link.as_str()) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno).with_context(|| format!("cannot make /run/userdb/{link}")),
        }
    }
    Ok(())
}

/// The uid that a record here says: root alone has written it.
pub fn uid_in_userdb(userdb: BorrowedFd<'_>, name: &UserName) -> Result<Option<Uid>> {
    let text = read_small(userdb, format!("{name}.user"))?.unwrap_or_default();
    let number = text
        .split_once("\"uid\":")
        .and_then(|(_, rest)| rest.split(',').next());
    Ok(number.and_then(|number| Uid::try_from(number.parse::<u32>().ok()?).ok()))
}

/// What says the uid goes last.
pub fn remove_userdb(userdb: BorrowedFd<'_>, name: &UserName, uid: Uid) -> Result<()> {
    for (file, link) in userdb_names(name, uid).into_iter().rev() {
        for name in [format!("{file}.part"), link, file] {
            remove_file(userdb, &name).with_context(|| format!("cannot remove /run/userdb/{name}"))?;
        }
    }
    Ok(())
}

/// Has the host's userdb a record with this uid?
pub fn is_in_userdb(userdb: impl AsFd, uid: Uid) -> bool {
    stat(userdb, format!("{uid}.user")).is_ok()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use protocol::WorkerId;
    use protocol::config::Config;

    use super::*;
    use crate::host::tests::host;

    fn range() -> UidRange {
        UidRange {
            first: Uid::try_from(2_000_000).unwrap(),
            last: Uid::try_from(2_000_009).unwrap(),
        }
    }

    fn configured(slot: &str) -> Config {
        let head = "[general]\nbaseurl = \"http://127.0.0.1\"\n[factory]\ntoken_file = \"/t\"\n\
                    [slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n";
        Config::parse(&format!("{head}{slot}\n")).unwrap()
    }

    #[test]
    fn groups_are_the_hosts_and_never_roots() {
        let root = tempfile::tempdir().unwrap();
        let host = host(root.path());
        let of = |names: &[&str]| {
            let config = configured(&format!("add_to_groups = {names:?}"));
            groups(&host, &config.slots.values().next().unwrap().add_to_groups)
        };
        assert_eq!(of(&[]).unwrap(), []);
        assert!(of(&["plugdev"]).is_err(), "without /etc/group");
        fs::write(
            root.path().join("etc/group"),
            "wheel:x:0:\nplugdev:x:46:\ndialout:x:20:\n",
        )
        .unwrap();
        let found = of(&["plugdev", "dialout"]).unwrap();
        let found: Vec<_> = found
            .iter()
            .map(|(name, gid)| (name.as_str(), gid.as_raw()))
            .collect();
        assert_eq!(found, [("dialout", 20), ("plugdev", 46)]);
        assert!(format!("{:#}", of(&["plugdev", "kvm"]).unwrap_err()).contains("group kvm is not"));
        assert!(format!("{:#}", of(&["plugdev", "wheel"]).unwrap_err()).contains("wheel, which is root's"));
    }

    #[test]
    fn a_range_of_which_somebody_else_may_take_uids_is_refused() {
        for name in ["subuid", "subgid"] {
            let root = tempfile::tempdir().unwrap();
            let (host, path) = (host(root.path()), root.path().join("etc").join(name));
            check_id_overlap(&host, range()).unwrap();
            fs::write(&path, "a:100000:65536\n").unwrap();
            check_id_overlap(&host, range()).unwrap();
            fs::write(&path, "a:100000:65536\nb:2000009:1\n").unwrap();
            let error = format!("{:#}", check_id_overlap(&host, range()).unwrap_err());
            assert!(
                error.contains(&format!("/etc/{name} ")) && error.contains("b:2000009:1"),
                "{error}"
            );
            // What cannot be read may say anything.
            fs::remove_file(&path).unwrap();
            fs::create_dir(&path).unwrap();
            assert!(check_id_overlap(&host, range()).is_err());
        }
    }

    #[test]
    fn an_id_is_known_to_the_host_as_a_users_or_as_a_groups() {
        let root = tempfile::tempdir().unwrap();
        let host = host(root.path());
        let uid = range().first;
        assert!(host.accounts().is_err(), "nothing can be said without the files");
        for (passwd, group, known) in [
            ("a:x:1:2000000:", "a:x:200000:2000000", false),
            ("a:x:1:1:\nb:x:2000000:1:", "a:x:1:", true),
            ("a:x:1:1:", "a:x:3000000:\nbroken\nb:x:2000000:", true),
        ] {
            fs::write(root.path().join("etc/passwd"), passwd).unwrap();
            fs::write(root.path().join("etc/group"), group).unwrap();
            assert_eq!(host.accounts().unwrap().has(uid), known, "{passwd} {group}");
        }
    }

    #[test]
    fn users_are_known_by_name_and_number_until_they_are_removed() {
        let root = tempfile::tempdir().unwrap();
        let (host, uid) = (host(root.path()), range().first);
        let name = UserName::from(WorkerId::from_bits(7));
        assert!(!is_in_userdb(&host.userdb, uid));
        for _ in 0..2 {
            write_userdb(host.userdb.as_fd(), &name, uid, &"a".parse().unwrap()).unwrap();
            assert!(is_in_userdb(&host.userdb, uid));
        }
        let read = |file: String| fs::read_to_string(root.path().join("userdb").join(file)).unwrap();
        let user = read(format!("{uid}.user"));
        assert_eq!(user, read(format!("{name}.user")));
        assert!(user.contains("\"buildomatSlot\":\"a\"}"));
        assert!(user.contains(&format!("\"userName\":\"{name}\",\"uid\":{uid},\"gid\":{uid},")));
        assert!(read(format!("{uid}.group")).contains(&format!("\"groupName\":\"{name}\",\"gid\":{uid},")));
        for _ in 0..2 {
            remove_userdb(host.userdb.as_fd(), &name, uid).unwrap();
            assert!(
                crate::host::directory::names(host.userdb.as_fd())
                    .unwrap()
                    .is_empty()
            );
        }
    }
}
