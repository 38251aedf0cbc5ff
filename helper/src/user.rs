//! Users: who they are to the host (`/run/userdb`) and to the job (`/etc/passwd` and `/etc/group` of
//! its own). The host's files are read line by line, without NSS: no module is loaded into this process.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Gid, Pid, setgroups, setresgid, setresuid, symlinkat};
use protocol::config::{Config, GroupName, Network, Slot, UidRange, User, accounts};
use protocol::{Uid, UserName};

use crate::host::{Host, open_file, read_small, remove_file, write_atomically};
use crate::{network, sys};

/// The most that the host's passwd or group file may have, in bytes.
const MAX_FILE: u64 = 64 << 20;

fn read_etc(host: &Host, name: &str) -> Result<String> {
    let file = open_file(&host.etc, name, OFlag::O_RDONLY);
    let file = file.with_context(|| format!("cannot open /etc/{name}"))?;
    read_whole(&file).with_context(|| format!("cannot read /etc/{name}"))
}

fn read_whole(file: &File) -> Result<String> {
    let mut bytes = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The uid of the supervisor, the only one that the helper serves, and its gid.
pub fn supervisor(host: &Host, user: &User) -> Result<(u32, u32)> {
    accounts::supervisor(&read_etc(host, "passwd")?, user).map_err(anyhow::Error::msg)
}

/// Refuse a range of ids that the host's files give to somebody.
pub fn nobody_else_has(host: &Host, range: UidRange) -> Result<()> {
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
pub fn no_process_has(host: &Host, range: UidRange) -> Result<()> {
    for uid in range.first.get()..=range.last.get() {
        let is_workers = || Uid::try_from(uid).is_ok_and(|uid| is_in_userdb(&host.userdb, uid));
        if sys::has_process_of(uid)? && !is_workers() {
            let how = format!("a process of this host runs as uid {uid} of it (ps -u {uid} shows it)");
            bail!("{}", accounts::range_is_taken(range, &how));
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

/// Up to here ids are the system's (`login.defs(5)`), and so is this one, `nobody`'s.
const LAST_OF_THE_SYSTEM: u32 = 999;
const NOBODY: u32 = 65534;

/// What the host's `/etc/passwd` and `/etc/group` say that matters here.
#[derive(Debug)]
pub struct Accounts {
    /// All uids and gids, in order.
    ids: Vec<u32>,
    /// The lines of the system's own accounts. Those of people are not for jobs.
    passwd: String,
    group: String,
}

impl Accounts {
    pub fn read(passwd: &File, group: &File) -> Result<Accounts> {
        let mut accounts = Accounts {
            ids: Vec::new(),
            passwd: String::new(),
            group: String::new(),
        };
        for (file, kept) in [(passwd, &mut accounts.passwd), (group, &mut accounts.group)] {
            for line in read_whole(file)?.lines() {
                let Some(id) = line.split(':').nth(2).and_then(|id| id.parse().ok()) else {
                    continue;
                };
                accounts.ids.push(id);
                if id <= LAST_OF_THE_SYSTEM || id == NOBODY {
                    *kept += line;
                    *kept += "\n";
                }
            }
        }
        accounts.ids.sort_unstable();
        Ok(accounts)
    }

    /// Is this number a uid or gid of the host?
    pub fn has(&self, uid: Uid) -> bool {
        self.ids.binary_search(&uid.get()).is_ok()
    }

    /// The files that a job sees in `/etc` in place of the host's, by their names: the system's accounts with its own,
    /// the slot's groups, and where it has no network, who the server is.
    pub fn files_for_a_job(
        &self,
        name: &UserName,
        uid: Uid,
        groups: &[(GroupName, Gid)],
        config: &Config,
        slot: &Slot,
    ) -> Vec<(&'static str, String)> {
        let passwd = format!(
            "{}{name}:x:{uid}:{uid}:buildomat worker:/home/{name}:/bin/bash\n",
            self.passwd
        );
        let mut group = String::new();
        for line in self.group.lines() {
            group += line;
            if groups
                .iter()
                .any(|(own, _)| line.split(':').next() == Some(own.as_str()))
            {
                // The members are the last field, which may be empty (`group(5)`).
                group += if line.ends_with(':') { "" } else { "," };
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
        if slot.network == Network::None {
            let own = nix::unistd::gethostname().unwrap_or_default();
            files.push(("hosts", network::hosts(&config.general.baseurl, &own)));
        }
        files
    }
}

/// The records by which the host knows a user and its group (<https://systemd.io/USER_RECORD/>,
/// `nss-systemd(8)`): a file by name, and a link by number.
fn userdb_names(name: &UserName, uid: Uid) -> [(String, String); 2] {
    [
        (format!("{name}.user"), format!("{uid}.user")),
        (format!("{name}.group"), format!("{uid}.group")),
    ]
}

pub fn write_userdb(userdb: BorrowedFd<'_>, name: &UserName, uid: Uid) -> Result<()> {
    let user = format!(
        "{{\"userName\":\"{name}\",\"uid\":{uid},\"gid\":{uid},\"realName\":\"buildomat worker\",\
         \"homeDirectory\":\"/home/{name}\",\"shell\":\"/usr/sbin/nologin\",\"locked\":true,\"disposition\":\"dynamic\"}}\n"
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
    crate::host::look(userdb, format!("{uid}.user")).is_ok()
}

/// Become the user, for good: no group but its own and `groups`, and with the uid go all capabilities
/// (`capabilities(7)`). Only for a process that has been forked for this.
pub fn become_user(uid: Uid, groups: &[Gid]) -> Result<()> {
    let (user, group) = (nix::unistd::Uid::from_raw(uid.get()), Gid::from_raw(uid.get()));
    setgroups(groups).context("cannot set the groups")?;
    setresgid(group, group, group).context("cannot set the gid")?;
    setresuid(user, user, user).context("cannot set the uid")?;
    // With the permitted set the ambient one is empty, too (capabilities(7)).
    for set in [
        caps::CapSet::Effective,
        caps::CapSet::Permitted,
        caps::CapSet::Inheritable,
    ] {
        let left = caps::read(None, set).map_err(|e| anyhow::anyhow!("cannot read the capabilities: {e}"))?;
        ensure!(
            left.is_empty(),
            "capabilities are left after becoming uid {uid}: {left:?}"
        );
    }
    sys::no_new_privs_and_undumpable().context("cannot set no_new_privs")
}

/// Do this in a process that has become the user, and has these descriptors alone.
pub fn as_user(uid: Uid, keep: &[RawFd], work: impl FnOnce() -> Result<()>) -> Result<()> {
    let (errors, to_parent) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    let child = sys::fork(|| {
        let work = || {
            sys::close_all_but(&[keep, &[to_parent.as_raw_fd()]].concat())?;
            become_user(uid, &[])?;
            work()
        };
        let Err(error) = work() else { return 0 };
        let _ = nix::unistd::write(&to_parent, format!("{error:#}").as_bytes());
        1
    })?;
    drop(to_parent);
    let mut message = String::new();
    File::from(errors).read_to_string(&mut message).ok();
    match waitpid(child, None)? {
        WaitStatus::Exited(_, 0) => Ok(()),
        status if message.is_empty() => bail!("a process that worked as uid {uid} ended with {status:?}"),
        _ => bail!("{message}"),
    }
}

/// End every process of the user, those included that no cgroup of ours knows, and wait until the last is reaped.
pub fn end_all(uid: Uid) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(60);
    let mut patience = Duration::from_micros(20);
    while sys::has_process_of(uid.get())? {
        ensure!(
            Instant::now() < end,
            "processes of uid {uid} live a minute after SIGKILL: look for them in ps, and repeat"
        );
        // Most often those of its cgroup, dead, and about to be reaped by a parent who cannot tell us.
        std::thread::sleep(patience);
        patience = (patience * 2).min(Duration::from_millis(10));
        if patience > Duration::from_millis(1) {
            // It reaches all of the user's but the process itself (kill(2)); whom it found, it does not tell.
            as_user(uid, &[], || {
                let _ = nix::sys::signal::kill(Pid::from_raw(-1), Signal::SIGKILL);
                Ok(())
            })?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use protocol::WorkerId;

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
            nobody_else_has(&host, range()).unwrap();
            fs::write(&path, "a:100000:65536\n").unwrap();
            nobody_else_has(&host, range()).unwrap();
            fs::write(&path, "a:100000:65536\nb:2000009:1\n").unwrap();
            let error = format!("{:#}", nobody_else_has(&host, range()).unwrap_err());
            assert!(
                error.contains(&format!("/etc/{name} ")) && error.contains("b:2000009:1"),
                "{error}"
            );
            // What cannot be read may say anything.
            fs::remove_file(&path).unwrap();
            fs::create_dir(&path).unwrap();
            assert!(nobody_else_has(&host, range()).is_err());
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
            write_userdb(host.userdb.as_fd(), &name, uid).unwrap();
            assert!(is_in_userdb(&host.userdb, uid));
        }
        let read = |file: String| fs::read_to_string(root.path().join("userdb").join(file)).unwrap();
        let user = read(format!("{uid}.user"));
        assert_eq!(user, read(format!("{name}.user")));
        assert!(user.contains(&format!("\"userName\":\"{name}\",\"uid\":{uid},\"gid\":{uid},")));
        assert!(read(format!("{uid}.group")).contains(&format!("\"groupName\":\"{name}\",\"gid\":{uid},")));
        for _ in 0..2 {
            remove_userdb(host.userdb.as_fd(), &name, uid).unwrap();
            assert!(crate::host::names(host.userdb.as_fd()).unwrap().is_empty());
        }
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
                format!("broken\n{people}{system}"),
            )
            .unwrap();
        }
        let config = configured("add_to_groups = [\"first\", \"last\"]");
        let slot = config.slots.values().next().unwrap();
        let (name, uid) = (UserName::from(WorkerId::from_bits(7)), range().first);
        let groups = groups(&host, &slot.add_to_groups).unwrap();
        let files = host
            .accounts()
            .unwrap()
            .files_for_a_job(&name, uid, &groups, &config, slot);
        let own = format!("{name}:x:{uid}:{uid}:buildomat worker:/home/{name}:/bin/bash\n");
        let with_member = system.replace("last:x:999:999:", &format!("last:x:999:999:{name}"));
        let expected = [
            ("passwd", system.clone() + &own),
            (
                "group",
                with_member + &format!("{name}:x:{uid}:\nfirst:x:1000:{name}\n"),
            ),
        ];
        assert_eq!(files, expected);
    }
}
