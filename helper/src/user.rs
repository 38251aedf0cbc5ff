//! Users: who they are to the host (`/run/userdb`) and to the job (`/etc/passwd` and `/etc/group` of
//! its own). The host's files are read line by line, without NSS: no module is loaded into this process.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Gid, Pid, setgroups, setresgid, setresuid, symlinkat};
use protocol::config::{Config, GroupName, Network, Slot, UidRange, User};
use protocol::{Uid, UserName};

use crate::host::{Host, open_file, remove_file, write_atomically};
use crate::worker::Worker;
use crate::{network, sys};

/// The most that the host's passwd or group file may have, in bytes.
const MAX_FILE: u64 = 64 << 20;

fn read_etc(host: &Host, name: &str) -> Result<String> {
    let file: File =
        open_file(&host.etc, name, OFlag::O_RDONLY).with_context(|| format!("cannot open /etc/{name}"))?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE)
        .read_to_end(&mut bytes)
        .with_context(|| format!("cannot read /etc/{name}"))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The number in the third field of the line that begins with `name:` (`passwd(5)`, `group(5)`).
fn number_of(file: &str, name: &str) -> Option<u32> {
    let line = file.lines().find(|line| line.split(':').next() == Some(name))?;
    line.split(':').nth(2)?.parse().ok()
}

/// The uid of the supervisor, the only one that the helper serves.
pub fn supervisor(host: &Host, user: &User) -> Result<u32> {
    match user {
        User::Number(uid) => Ok(*uid),
        User::Name(name) => number_of(&read_etc(host, "passwd")?, name).with_context(|| {
            format!(
                "the supervisor's user {name} is not in /etc/passwd: add it, or name another as factory.user"
            )
        }),
    }
}

/// Refuse a range of which an ordinary user of the host may take uids: with `newuidmap(1)` they could become a
/// job's user (`subuid(5)`, `subgid(5)`).
pub fn nobody_else_has(host: &Host, range: UidRange) -> Result<()> {
    for name in ["subuid", "subgid"] {
        let file = match read_etc(host, name) {
            Err(error) if error.downcast_ref() == Some(&Errno::ENOENT) => continue,
            file => file?,
        };
        if let Some(line) = delegation_within(&file, range) {
            anyhow::bail!(
                "/etc/{name} gives away ids of factory.uid_range ({line:?}): remove that line, or choose another range"
            );
        }
    }
    Ok(())
}

/// The first line (`name:first:count`) that has an id of the range.
fn delegation_within(file: &str, range: UidRange) -> Option<&str> {
    file.lines().find(|line| {
        let mut numbers = line.split(':').skip(1).map(str::parse::<u64>);
        let (Some(Ok(first)), Some(Ok(count))) = (numbers.next(), numbers.next()) else {
            return false;
        };
        first <= range.last.get().into() && u64::from(range.first.get()) < first.saturating_add(count)
    })
}

/// The gids of the slot's groups.
pub fn groups(host: &Host, names: &BTreeSet<GroupName>) -> Result<Vec<Gid>> {
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let file = read_etc(host, "group")?;
    let gid = |name: &GroupName| {
        let gid = number_of(&file, name.as_str()).with_context(|| {
            format!("group {name} is not in /etc/group: add it, or remove it from add_to_groups")
        })?;
        ensure!(
            gid != 0,
            "a job must not be in group {name}, which is root's: remove it from add_to_groups"
        );
        Ok(Gid::from_raw(gid))
    };
    names.iter().map(gid).collect()
}

/// Is this uid a line's of the host's `/etc/passwd`, or this gid one of `/etc/group`?
pub fn is_known_to_the_host(host: &Host, uid: Uid) -> Result<bool> {
    let number = uid.to_string();
    let has = |file: &str| file.lines().any(|line| line.split(':').nth(2) == Some(&number));
    Ok(has(&read_etc(host, "passwd")?) || has(&read_etc(host, "group")?))
}

/// Write the files of root's that the job sees as its own: the host's `/etc/passwd` and `/etc/group` with its own
/// line, and where it has no network, `/etc/hosts`.
pub fn write_files_for_the_job(
    host: &Host,
    worker: &Worker,
    uid: Uid,
    config: &Config,
    slot: &Slot,
) -> Result<()> {
    let with = |mut file: String, line: String| {
        if !file.is_empty() && !file.ends_with('\n') {
            file.push('\n');
        }
        file + &line
    };
    let name = worker.user();
    let passwd = with(
        read_etc(host, "passwd")?,
        format!("{name}:x:{uid}:{uid}:buildomat worker:/home/{name}:/bin/bash\n"),
    );
    let group = with(read_etc(host, "group")?, format!("{name}:x:{uid}:\n"));
    let hosts = match slot.network {
        Network::Host => None,
        Network::None => network::hosts(&config.general.baseurl),
    };
    for (name, text) in [("passwd", Some(passwd)), ("group", Some(group)), ("hosts", hosts)] {
        if let Some(text) = text {
            write_atomically(worker.dir(), name, &text, 0o644)
                .with_context(|| format!("cannot write the job's {name}"))?;
        }
    }
    Ok(())
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

pub fn remove_userdb(userdb: BorrowedFd<'_>, name: &UserName, uid: Uid) -> Result<()> {
    for (file, link) in userdb_names(name, uid) {
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
    for set in [
        caps::CapSet::Effective,
        caps::CapSet::Permitted,
        caps::CapSet::Inheritable,
        caps::CapSet::Ambient,
    ] {
        let left = caps::read(None, set).map_err(|e| anyhow::anyhow!("cannot read the capabilities: {e}"))?;
        ensure!(
            left.is_empty(),
            "capabilities are left after becoming uid {uid}: {left:?}"
        );
    }
    sys::no_new_privs_and_undumpable().context("cannot set no_new_privs")
}

/// Is there no process of this uid, not even one that waits to be reaped? With `kill`, each that there
/// is gets SIGKILL first.
///
/// The kernel counts the processes of each user, so it is asked, by a process that has become the user
/// and may have one child, if nobody else is there (`RLIMIT_NPROC`, `getrlimit(2)`): no walk over
/// `/proc`, and no process that hides.
pub fn has_no_process(uid: Uid, kill: bool) -> Result<bool> {
    let ask = || -> Result<bool> {
        become_user(uid, &[])?;
        if kill {
            // It reaches all of the user's but this process (kill(2)); whom it found, it does not tell.
            let _ = nix::sys::signal::kill(Pid::from_raw(-1), Signal::SIGKILL);
        }
        setrlimit(Resource::RLIMIT_NPROC, 2, 2)?;
        match sys::fork(|| 0) {
            Ok(child) => Ok(waitpid(child, None).is_ok()),
            Err(error) if error.raw_os_error() == Some(Errno::EAGAIN as i32) => Ok(false),
            Err(error) => Err(error.into()),
        }
    };
    let child = sys::fork(|| match ask() {
        Ok(true) => 0,
        Ok(false) => 1,
        Err(_) => 2,
    })?;
    match waitpid(child, None)? {
        WaitStatus::Exited(_, 0) => Ok(true),
        WaitStatus::Exited(_, 1) => Ok(false),
        other => anyhow::bail!("cannot ask for the processes of uid {uid}: {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_from_the_right_line_and_field() {
        let file = "root:x:0:0:root:/root:/bin/bash\nplug:x:9:\nplugdev:x:46:a,b\nbroken\n";
        assert_eq!(number_of(file, "plugdev"), Some(46));
        assert_eq!(number_of(file, "plugde"), None);
        assert_eq!(number_of(file, "broken"), None);
        assert_eq!(number_of(file, ""), None);
    }

    #[test]
    fn a_delegation_of_any_uid_of_the_range_is_found() {
        let uid = |n| Uid::try_from(n).unwrap();
        let range = UidRange {
            first: uid(2_000_000),
            last: uid(2_000_009),
        };
        for (line, found) in [
            ("a:2000000:1", true),
            ("a:2000009:65536", true),
            ("a:1999999:2", true),
            ("a:0:4294967295", true),
            ("a:1999999:1", false),
            ("a:2000010:65536", false),
            ("a:2000000:0", false),
            ("# a:b:c", false),
            ("", false),
        ] {
            let file = format!("b:100000:65536\n{line}\n");
            assert_eq!(delegation_within(&file, range), found.then_some(line), "{line}");
        }
    }
}
