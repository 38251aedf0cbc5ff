//! What a configuration wants of the host's accounts: pure, over the text of `/etc/passwd` and its like, so that the
//! helper and `user-factory check` refuse the same in the same words. Name services such as LDAP are not asked.

use super::{GroupName, UidRange, User};

/// Uid and gid of the supervisor (`passwd(5)`): of a number that is nobody's, the same number.
///
/// # Errors
/// The name is not there.
pub fn supervisor(passwd: &str, user: &User) -> Result<(u32, u32), String> {
    let mut users = passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let mut numbers = fields.skip(1).map(|number| number.parse::<u32>().ok());
        Some((name, numbers.next()??, numbers.next()??))
    });
    match user {
        User::Number(uid) => {
            let gid = users.find(|(_, number, _)| number == uid).map(|(_, _, gid)| gid);
            Ok((*uid, gid.unwrap_or(*uid)))
        }
        User::Name(name) => {
            let found = users.find(|(other, _, _)| other == name);
            found.map(|(_, uid, gid)| (uid, gid)).ok_or_else(|| {
                format!(
                    "the user {name} is not in /etc/passwd: make it with useradd --system, or name another as factory.user"
                )
            })
        }
    }
}

/// The gid of a slot's group (`group(5)`).
///
/// # Errors
/// The group is not there, or is root's.
pub fn gid(group: &str, name: &GroupName) -> Result<u32, String> {
    let of = |line: &str| -> Option<u32> { line.split(':').nth(2)?.parse().ok() };
    let line = group
        .lines()
        .find(|line| line.split(':').next() == Some(name.as_str()));
    match line.and_then(of) {
        None => Err(format!(
            "the group {name} is not in /etc/group: make it with groupadd, or remove it from add_to_groups"
        )),
        Some(0) => Err(format!(
            "a job must not be in group {name}, which is root's: remove it from add_to_groups"
        )),
        Some(gid) => Ok(gid),
    }
}

/// The first line (`name:first:count`) of `/etc/subuid` or `/etc/subgid` that gives away an id of the range
/// (`subuid(5)`): by `newuidmap(1)` somebody could become a job's user.
pub fn delegation(file: &str, range: UidRange) -> Option<&str> {
    file.lines().find(|line| {
        let mut numbers = line.split(':').skip(1).map(str::parse::<u64>);
        let (Some(Ok(first)), Some(Ok(count))) = (numbers.next(), numbers.next()) else {
            return false;
        };
        first <= range.last.get().into() && u64::from(range.first.get()) < first.saturating_add(count)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Uid;

    #[test]
    fn the_supervisors_uid_is_what_the_configuration_or_the_host_says() {
        let passwd = "factor:x:5:5::/:/x\nfactory:x:6:7::/:/x\n";
        let name = |name: &str| User::Name(name.into());
        assert_eq!(supervisor(passwd, &name("factory")), Ok((6, 7)));
        assert_eq!(supervisor(passwd, &User::Number(6)), Ok((6, 7)));
        assert_eq!(supervisor(passwd, &User::Number(9)), Ok((9, 9)));
        assert!(supervisor(passwd, &name("nobody")).is_err());
        assert!(supervisor("", &name("factory")).is_err());
    }

    #[test]
    fn groups_are_the_hosts_and_never_roots() {
        #[derive(serde::Deserialize)]
        struct One {
            group: GroupName,
        }
        let file = "wheel:x:0:\nplug:x:9:\nplugdev:x:46:a,b\nbroken\n";
        let find = |name: &str| {
            let one: One = toml::from_str(&format!("group = {name:?}")).unwrap();
            gid(file, &one.group)
        };
        assert_eq!(find("plugdev"), Ok(46));
        for (name, part) in [
            ("plugde", "group plugde is not"),
            ("broken", "broken is not"),
            ("wheel", "wheel, which is root's"),
        ] {
            assert!(find(name).unwrap_err().contains(part), "{name}");
        }
    }

    #[test]
    fn a_delegation_of_any_id_of_the_range_is_found() {
        let end = |uid| Uid::try_from(uid).unwrap();
        let range = UidRange {
            first: end(2_000_000),
            last: end(2_000_009),
        };
        for (line, found) in [
            ("a:2000000:1", true),
            ("a:2000009:65536", true),
            ("a:1999999:2", true),
            ("a:0:4294967295", true),
            // As LXD writes it.
            ("root:1000000:1000000000", true),
            ("a:1999999:1", false),
            ("a:2000010:65536", false),
            ("a:2000000:0", false),
            ("# a:b:c", false),
            ("", false),
        ] {
            let file = format!("b:100000:65536\n{line}\n");
            assert_eq!(delegation(&file, range), found.then_some(line), "{line}");
        }
    }
}
