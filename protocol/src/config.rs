//! The configuration: one root-owned file, read by both halves.
//!
//! Parsing is pure. What can be known from the text alone is refused here, each mistake with its line;
//! what depends on the host (do these groups and directories exist?) is asked by who can see it.
//!
//! ```
//! let text = r#"
//! [general]
//! baseurl = "https://buildomat.example.com"
//! [factory]
//! token_file = "/etc/buildomat-user-factory/token"
//! [slots.bench-1]
//! target = "01HZX3N8Q4J5K6M7P8R9S0T1V2"
//! add_to_groups = ["plugdev"]
//! "#;
//! let config = protocol::config::Config::parse(text).unwrap();
//! assert_eq!(config.slots.len(), 1);
//!
//! let mistakes = protocol::config::Config::parse(&text.replace("plugdev", "../x")).unwrap_err();
//! assert_eq!(mistakes[0].line, 8);
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Deserializer, de};
use toml::Spanned;

use crate::{SlotName, TargetId, Uid};

/// The configuration's place below the root directory.
pub const CONFIG_PATH: &str = "etc/buildomat-user-factory/config.toml";
/// The directory of the sockets, below the root directory.
pub const RUN_DIR: &str = "run/buildomat-user-factory";
/// The helper's socket, below the root directory.
pub const HELPER_SOCKET: &str = "run/buildomat-user-factory/helper.sock";
/// The directory of all lasting state, below the root directory.
pub const STATE_DIR: &str = "var/lib/buildomat-user-factory";

/// The trees that every job may write, besides its home directory; each begins empty and ends with the job.
pub const PRIVATE_TREES: [&str; 5] = ["/input", "/work", "/tmp", "/var/tmp", "/opt/buildomat"];

/// A configuration without mistakes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub general: General,
    pub factory: Factory,
    pub slots: BTreeMap<SlotName, Slot>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct General {
    /// Where the buildomat server is: `http://` or `https://`, without a query.
    pub baseurl: BaseUrl,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Factory {
    /// The file with the factory's token; only the supervisor may be able to read it.
    pub token_file: HostPath,
    /// The user that the supervisor runs as: the helper serves nobody else. A name or a number.
    #[serde(default)]
    pub user: User,
    /// The uids (and gids) that workers get.
    #[serde(default)]
    pub uid_range: UidRange,
    /// Seconds between two looks at the server, 1 to 60.
    #[serde(default = "one", deserialize_with = "within::<_, 1, 60>")]
    pub poll_seconds: u64,
    /// Seconds after which a worker whose agent has not come online is failed, 5 to 86400.
    #[serde(default = "five_minutes", deserialize_with = "within::<_, 5, 86400>")]
    pub online_timeout_seconds: u64,
    /// Directories of the host that no job sees, besides those that none ever sees. Each must exist; one that
    /// leads through a link hides what it leads to.
    #[serde(default)]
    pub hide: BTreeSet<HostPath>,
}

/// What one slot's jobs get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The target whose jobs it takes.
    pub target: TargetId,
    /// Groups of the host's `/etc/group` that the job's user is in.
    pub add_to_groups: BTreeSet<GroupName>,
    /// Slots that must be free while this one is busy. It works in both directions.
    pub conflicts_with_slots: BTreeSet<SlotName>,
    /// Variables in the environment of the agent's tasks.
    pub env: BTreeMap<EnvName, EnvValue>,
    /// Directories of the host (values) that the job sees, read-only, at another place (keys).
    pub read_only: BTreeMap<HostPath, HostPath>,
    /// Device nodes of the host that the job may use.
    pub devices: BTreeSet<HostPath>,
    /// More private writable places: empty at the start, gone at the end.
    pub writable: BTreeSet<HostPath>,
    /// The line on which the slot begins, for messages.
    pub line: usize,
}

/// One mistake in the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// Beginning with 1.
    pub line: usize,
    pub message: String,
}

impl Config {
    /// Do these slots exclude each other? It is enough that one of them says so.
    pub fn conflict(&self, a: &SlotName, b: &SlotName) -> bool {
        let says = |x: &SlotName, y: &SlotName| {
            self.slots
                .get(x)
                .is_some_and(|slot| slot.conflicts_with_slots.contains(y))
        };
        says(a, b) || says(b, a)
    }

    /// # Errors
    /// Every mistake that can be told from the text: the first only where it is not even TOML of this form.
    pub fn parse(text: &str) -> Result<Config, Vec<Mistake>> {
        let line_of = |offset: usize| 1 + text.bytes().take(offset).filter(|b| *b == b'\n').count();
        let raw: RawConfig = toml::from_str(text).map_err(|error| {
            let message = error.message().trim().replace('\n', " ");
            vec![Mistake {
                line: error.span().map_or(1, |span| line_of(span.start)),
                message,
            }]
        })?;
        let mut mistakes = Vec::new();
        let names: BTreeSet<SlotName> = raw.slots.keys().map(|name| name.get_ref().clone()).collect();
        if names.is_empty() {
            mistakes.push(Mistake {
                line: 1,
                message: "there is no slot: add a table [slots.NAME]".into(),
            });
        }
        let mut slots = BTreeMap::new();
        for (name, slot) in raw.slots {
            let mut note = |offset: usize, message: String| {
                mistakes.push(Mistake {
                    line: line_of(offset),
                    message: format!("slot {}: {message}", name.get_ref()),
                });
            };
            for other in &slot.conflicts_with_slots {
                if other.get_ref() == name.get_ref() {
                    note(
                        other.span().start,
                        "it conflicts with itself: remove it from conflicts_with_slots".into(),
                    );
                } else if !names.contains(other.get_ref()) {
                    note(
                        other.span().start,
                        format!(
                            "conflicts_with_slots names {}, which is no slot: define it or remove it",
                            other.get_ref()
                        ),
                    );
                }
            }
            let mut places: Vec<&HostPath> = Vec::new();
            for place in slot.writable.iter().chain(slot.read_only.keys()) {
                if let Err(why) = place.get_ref().may_be_a_place_in_the_job() {
                    note(place.span().start, format!("{} {why}", place.get_ref()));
                }
                if places
                    .iter()
                    .any(|p| p.0.starts_with(&place.get_ref().0) || place.get_ref().0.starts_with(&p.0))
                {
                    note(
                        place.span().start,
                        format!(
                            "{} is within, or holds, another place of writable or read_only: choose places apart",
                            place.get_ref()
                        ),
                    );
                }
                places.push(place.get_ref());
            }
            for device in &slot.devices {
                if !device.get_ref().0.starts_with("/dev") || device.get_ref().0 == Path::new("/dev") {
                    note(
                        device.span().start,
                        format!("{} is not below /dev: name a device node", device.get_ref()),
                    );
                }
            }
            let line = line_of(name.span().start);
            slots.insert(name.into_inner(), slot.check(line));
        }
        if mistakes.is_empty() {
            Ok(Config {
                general: raw.general,
                factory: raw.factory,
                slots,
            })
        } else {
            mistakes.sort_by_key(|mistake| mistake.line);
            Err(mistakes)
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    general: General,
    factory: Factory,
    #[serde(default)]
    slots: BTreeMap<Spanned<SlotName>, RawSlot>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSlot {
    target: TargetId,
    #[serde(default)]
    add_to_groups: BTreeSet<GroupName>,
    #[serde(default)]
    conflicts_with_slots: Vec<Spanned<SlotName>>,
    #[serde(default)]
    env: BTreeMap<EnvName, EnvValue>,
    #[serde(default)]
    read_only: BTreeMap<Spanned<HostPath>, HostPath>,
    #[serde(default)]
    devices: Vec<Spanned<HostPath>>,
    #[serde(default)]
    writable: Vec<Spanned<HostPath>>,
}

impl RawSlot {
    fn check(self, line: usize) -> Slot {
        Slot {
            target: self.target,
            add_to_groups: self.add_to_groups,
            conflicts_with_slots: self
                .conflicts_with_slots
                .into_iter()
                .map(Spanned::into_inner)
                .collect(),
            env: self.env,
            read_only: self
                .read_only
                .into_iter()
                .map(|(place, source)| (place.into_inner(), source))
                .collect(),
            devices: self.devices.into_iter().map(Spanned::into_inner).collect(),
            writable: self.writable.into_iter().map(Spanned::into_inner).collect(),
            line,
        }
    }
}

/// A text with a rule, refused at its own place in the file.
macro_rules! checked {
    ($(#[$doc:meta])* $name:ident, $rule:expr, $expected:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                let text = String::deserialize(from)?;
                let rule: fn(&str) -> bool = $rule;
                if rule(&text) { Ok(Self(text)) } else { Err(de::Error::custom(format!(concat!("{:?} is not ", $expected), text))) }
            }
        }
    };
}

checked!(
    /// The server's address, without a slash at the end.
    BaseUrl,
    |url| {
        let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
        rest.is_some_and(|rest| {
            !rest.is_empty()
                && !rest.starts_with('/')
                && !rest.ends_with('/')
                && rest.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~:/[]".contains(&b))
        })
    },
    "a server's address: write https://HOST[:PORT][/PATH], without user, query and slash at the end"
);

checked!(
    /// A group's name (`groupadd(8)`).
    GroupName,
    |name| {
        (1..=32).contains(&name.len())
            && !name.starts_with('-')
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
    },
    "a group's name: use 1 to 32 letters, digits, - and _"
);

checked!(
    /// An environment variable's name (POSIX: letters, digits and underscores, not beginning with a digit).
    EnvName,
    |name| {
        (1..=128).contains(&name.len())
            && !name.as_bytes()[0].is_ascii_digit()
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    },
    "a variable's name: use letters, digits and _, not beginning with a digit"
);

checked!(
    /// An environment variable's value: at most 32 KiB, no NUL.
    EnvValue,
    |value| value.len() <= 32 << 10 && !value.contains('\0'),
    "a variable's value: at most 32768 bytes, without NUL"
);

/// An absolute path without `.`, `..`, doubled slashes and control characters; not `/` itself.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPath(PathBuf);

impl HostPath {
    pub fn as_path(&self) -> &Path {
        &self.0
    }

    /// May something be mounted here in a job's view?
    fn may_be_a_place_in_the_job(&self) -> Result<(), String> {
        let taken = [
            "/proc", "/sys", "/dev", "/run", "/var/run", "/home", "/root", "/etc",
        ];
        match PRIVATE_TREES
            .iter()
            .chain(&taken)
            .find(|top| self.0.starts_with(top))
        {
            Some(top) => Err(format!(
                "is below {top}, which the job has of its own: choose another place"
            )),
            None => Ok(()),
        }
    }
}

impl fmt::Display for HostPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

impl<'de> Deserialize<'de> for HostPath {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let path = PathBuf::from(&text);
        let plain = text.len() < 1024
            && !text.chars().any(char::is_control)
            && path.is_absolute()
            && path
                .components()
                .skip(1)
                .all(|c| matches!(c, Component::Normal(_)))
            && path.components().count() > 1
            && path.components().collect::<PathBuf>().as_os_str() == path.as_os_str();
        if plain {
            Ok(Self(path))
        } else {
            Err(de::Error::custom(format!(
                "{text:?} is not an absolute path in its plain form, such as \"/opt/rust\""
            )))
        }
    }
}

/// The supervisor's user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum User {
    Name(String),
    Number(u32),
}

impl Default for User {
    fn default() -> Self {
        User::Name("buildomat-factory".into())
    }
}

impl<'de> Deserialize<'de> for User {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected a user's name or number")]
        enum Raw {
            Number(u32),
            Name(GroupName),
        }
        Ok(match Raw::deserialize(from)? {
            Raw::Number(uid) => User::Number(uid),
            Raw::Name(name) => User::Name(name.0),
        })
    }
}

/// The uids that workers get, both ends included; written `"1879048192-1879113727"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UidRange {
    pub first: Uid,
    pub last: Uid,
}

impl UidRange {
    pub fn len(self) -> u32 {
        self.last.get() - self.first.get() + 1
    }

    /// Never: a range has at least one uid.
    pub fn is_empty(self) -> bool {
        false
    }

    pub fn contains(self, uid: u32) -> bool {
        (self.first.get()..=self.last.get()).contains(&uid)
    }
}

impl Default for UidRange {
    fn default() -> Self {
        // 0x7000_0000..=0x7000_ffff: unused in systemd's table of uid ranges (UIDS-GIDS.md), below 2^31,
        // above what containers and subordinate uids use.
        let end = |uid| Uid::try_from(uid).expect("a uid of the default range");
        UidRange {
            first: end(0x7000_0000),
            last: end(0x7000_ffff),
        }
    }
}

impl<'de> Deserialize<'de> for UidRange {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let range = text.split_once('-').and_then(|(first, last)| {
            let end = |text: &str| text.parse::<u32>().ok().and_then(|uid| Uid::try_from(uid).ok());
            Some(UidRange {
                first: end(first)?,
                last: end(last)?,
            })
        });
        // Ordinary users and subordinate ids live below 2^20; nobody must find a job's uid there.
        range.filter(|r| r.first <= r.last && r.first.get() >= 1 << 20 && r.len() <= 1 << 20).ok_or_else(|| {
            de::Error::custom(format!(
                "{text:?} is not a range of uids: write \"FIRST-LAST\" within 1048576-2147483647, at most 1048576 of them"
            ))
        })
    }
}

fn one() -> u64 {
    1
}

fn five_minutes() -> u64 {
    300
}

fn within<'de, D: Deserializer<'de>, const MIN: u64, const MAX: u64>(from: D) -> Result<u64, D::Error> {
    let value = u64::deserialize(from)?;
    if (MIN..=MAX).contains(&value) {
        Ok(value)
    } else {
        Err(de::Error::custom(format!(
            "{value} is out of range: use {MIN} to {MAX} seconds"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "[general]\nbaseurl = \"https://b.example.com\"\n[factory]\ntoken_file = \"/t\"\n";
    const SLOT: &str = "[slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n";

    fn mistakes(rest: &str) -> Vec<Mistake> {
        Config::parse(&format!("{HEAD}{rest}")).expect_err(rest)
    }

    #[test]
    fn a_whole_slot_parses() {
        let config = Config::parse(&format!(
            "{HEAD}{SLOT}add_to_groups = [\"plugdev\"]\nenv.A = \"1\"\nread_only = {{ \"/opt/rust\" = \"/root/.rustup\" }}\n\
             devices = [\"/dev/kvm\"]\nwritable = [\"/srv/cache\"]\nconflicts_with_slots = [\"b\"]\n{}",
            SLOT.replace(".a", ".b")
        ))
        .unwrap();
        let (a, b) = ("a".parse().unwrap(), "b".parse().unwrap());
        assert!(config.conflict(&a, &b) && config.conflict(&b, &a) && !config.conflict(&a, &a));
        assert_eq!(config.slots[&a].line, 5);
        assert_eq!(config.factory.uid_range.len(), 65536);
    }

    #[test]
    fn every_mistake_has_its_line_and_a_sentence() {
        for (text, line, part) in [
            (SLOT.replace("01HZX3N8Q4J5K6M7P8R9S0T1V2", "hubris"), 6, "ULID"),
            (format!("{SLOT}colour = \"red\"\n"), 7, "unknown field"),
            (format!("{SLOT}conflicts_with_slots = [\"a\"]\n"), 7, "itself"),
            (format!("{SLOT}\nconflicts_with_slots = [\n\"zz\"]\n"), 9, "zz"),
            (format!("{SLOT}writable = [\"/tmp/x\"]\n"), 7, "/tmp"),
            (format!("{SLOT}writable = [\"opt\"]\n"), 7, "absolute"),
            (format!("{SLOT}writable = [\"/opt/../etc\"]\n"), 7, "absolute"),
            (format!("{SLOT}devices = [\"/etc/passwd\"]\n"), 7, "/dev"),
            (format!("{SLOT}add_to_groups = [\"a b\"]\n"), 7, "group"),
            (format!("{SLOT}env.\"1A\" = \"x\"\n"), 7, "variable"),
            (
                format!("{SLOT}read_only = {{ \"/srv/a\" = \"/x\", \"/srv/a/b\" = \"/y\" }}\n"),
                7,
                "apart",
            ),
            ("[slots.\"..\"]\n".into(), 5, "slot's name"),
            (String::new(), 1, "no slot"),
            ("uid_range = \"0-10\"\n".to_owned() + SLOT, 5, "range of uids"),
            ("poll_seconds = 0\n".to_owned() + SLOT, 5, "1 to 60"),
            ("[slots\n".into(), 5, ""),
        ] {
            let found = mistakes(&text);
            assert!(found[0].message.contains(part), "{text}: {found:?}");
            assert_eq!(found[0].line, line, "{text}: {found:?}");
        }
    }

    #[test]
    fn addresses_that_could_be_options_or_carry_secrets_are_refused() {
        for bad in [
            "",
            "-x",
            "ftp://h",
            "https://",
            "https://h/",
            "https://u:p@h",
            "https://h?q",
            "https://h h",
        ] {
            let text = format!("{HEAD}{SLOT}").replace("https://b.example.com", bad);
            assert!(Config::parse(&text).is_err(), "{bad:?} parsed");
        }
    }
}
