//! What a configuration wants of the host's accounts: pure, over the text of `/etc/passwd` and its like, so that the
//! helper and `user-factory check` refuse the same in the same words. Name services such as LDAP are not asked.

use super::value::{GroupName, UidRange, User};

/// Uid and gid of the supervisor (`passwd(5)`): of a number that is nobody's, the same number.
///
/// # Errors
/// The name is not there, or a job could get its uid.
pub fn supervisor(passwd: &str, user: &User, range: UidRange) -> Result<(u32, u32), String> {
    let (uid, gid) = find_supervisor(passwd, user)?;
    match [uid, gid].into_iter().find(|id| range.contains(*id)) {
        Some(id) => Err(format!(
            "factory.user has the id {id}, which is in factory.uid_range {range}: name a user or a range such that no job is the supervisor"
        )),
        None => Ok((uid, gid)),
    }
}

fn find_supervisor(passwd: &str, user: &User) -> Result<(u32, u32), String> {
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
            "the group {name} is not in /etc/group: make it with groupadd, or copy its line from /usr/lib/group, or remove it from add_to_groups"
        )),
        Some(0) => Err(format!(
            "a job must not be in group {name}, which is root's: remove it from add_to_groups"
        )),
        Some(gid) => Ok(gid),
    }
}

/// The files of `/etc` that give ids to somebody.
pub const FILES_OF_IDS: [&str; 4] = ["subuid", "subgid", "passwd", "group"];

/// Refuse a range of which this file, one of [`FILES_OF_IDS`], gives an id to somebody: by `subuid(5)` and `subgid(5)` an
/// ordinary user could become a job's user with `newuidmap(1)`.
///
/// # Errors
/// A sentence with the line.
pub fn check_range(name: &str, file: &str, range: UidRange) -> Result<(), String> {
    let numbers = |line: &str| -> Vec<u64> {
        let fields = line.split(':').skip(1).map(str::parse);
        fields.filter_map(Result::ok).collect()
    };
    let is_taken = |line: &&str| match (name, &numbers(line)[..]) {
        ("subuid" | "subgid", [first, count, ..]) => {
            *first <= range.last.get().into() && u64::from(range.first.get()) < first.saturating_add(*count)
        }
        ("passwd", [uid, gid, ..]) => [uid, gid].iter().any(|id| is_within(**id, range)),
        ("group", [gid, ..]) => is_within(*gid, range),
        _ => false,
    };
    match file.lines().find(is_taken) {
        Some(line) => Err(describe_taken_range(
            range,
            &format!("/etc/{name} gives away ids of it ({line:?})"),
        )),
        None => Ok(()),
    }
}

fn is_within(id: u64, range: UidRange) -> bool {
    u32::try_from(id).is_ok_and(|id| range.contains(id))
}

/// Why a range cannot be used, and what can.
pub fn describe_taken_range(range: UidRange, how: &str) -> String {
    let other = match range.last.get() < 1 << 21 {
        true => {
            "or set factory.uid_range = \"1879048192-1879113727\", whose ids do not fit into archives of the formats ustar and cpio"
        }
        false => "or set factory.uid_range to ids that nobody has",
    };
    format!("factory.uid_range {range} cannot be used, because {how}: take them away there, {other}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Uid;

    #[test]
    fn the_supervisors_uid_is_what_the_configuration_or_the_host_says() {
        let passwd = "factor:x:5:5::/:/x\nfactory:x:6:7::/:/x\n";
        let name = |name: &str| User::Name(name.into());
        let range = UidRange {
            first: Uid::try_from(2_000_000).unwrap(),
            last: Uid::try_from(2_000_009).unwrap(),
        };
        let found = |passwd: &str, user: User| supervisor(passwd, &user, range);
        assert_eq!(found(passwd, name("factory")), Ok((6, 7)));
        assert_eq!(found(passwd, User::Number(6)), Ok((6, 7)));
        assert_eq!(found(passwd, User::Number(9)), Ok((9, 9)));
        assert!(found(passwd, name("nobody")).is_err());
        assert!(found("", name("factory")).is_err());
        // Also where the host has no such user, or its group alone is there.
        for (passwd, user) in [
            ("", User::Number(2_000_000)),
            ("factory:x:2000009:5::/:/x\n", name("factory")),
            ("factory:x:5:2000003::/:/x\n", name("factory")),
        ] {
            let why = found(passwd, user).unwrap_err();
            assert!(why.contains("no job is the supervisor"), "{why}");
        }
        assert_eq!(found("", User::Number(2_000_010)), Ok((2_000_010, 2_000_010)));
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

    fn range(first: u32, last: u32) -> UidRange {
        let end = |uid| Uid::try_from(uid).unwrap();
        UidRange {
            first: end(first),
            last: end(last),
        }
    }

    #[test]
    fn an_id_of_the_range_that_a_file_gives_to_somebody_is_found() {
        for (file, line, is_taken) in [
            ("subuid", "a:2000000:1", true),
            ("subgid", "a:2000009:65536", true),
            ("subuid", "a:1999999:2", true),
            ("subuid", "a:0:4294967295", true),
            // As LXD writes it.
            ("subuid", "root:1000000:1000000000", true),
            // As podman wants it.
            ("subuid", "containers:2147483647:2147483648", false),
            ("subuid", "a:1999999:1", false),
            ("subgid", "a:2000010:65536", false),
            ("subuid", "a:2000000:0", false),
            ("subuid", "# a:b:c", false),
            ("subuid", "", false),
            ("passwd", "a:x:2000000:100::/:/x", true),
            ("passwd", "a:x:100:2000009::/:/x", true),
            ("passwd", "a:x:1999999:2000010:2000005:/:/x", false),
            ("group", "a:x:2000005:", true),
            ("group", "a:x:5:2000005", false),
            ("group", "a:x:4296967301:", false),
        ] {
            let text = format!("b:x:100000:65536\n{line}\n");
            let checked = check_range(file, &text, range(2_000_000, 2_000_009));
            assert_eq!(checked.is_err(), is_taken, "{file} {line}: {checked:?}");
            if let Err(sentence) = checked {
                assert!(
                    sentence.contains(&format!("/etc/{file} ")) && sentence.contains(line),
                    "{sentence}"
                );
            }
        }
    }

    #[test]
    fn a_range_for_every_archive_has_an_alternative_with_its_price() {
        let sentence = describe_taken_range(UidRange::default(), "x");
        assert!(
            sentence.contains("2031616-2097151 cannot") && sentence.contains("1879048192-1879113727"),
            "{sentence}"
        );
        assert!(sentence.contains("ustar"), "{sentence}");
        let sentence = describe_taken_range(range(1_879_048_192, 1_879_113_727), "x");
        assert!(!sentence.contains("ustar"), "{sentence}");
    }
}
