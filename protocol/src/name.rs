//! Names and numbers that cannot hold a bad value: each parses at the edge, once.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a text is not a name of its kind, or a packet not a message: one sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadValue(pub(crate) String);

impl fmt::Display for BadValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadValue {}

/// `text` for a message to an operator: what could disturb a terminal or a log is escaped.
fn quoted(text: &str) -> String {
    let short: String = text.chars().take(64).collect();
    format!("{short:?}")
}

const CROCKFORD: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";

/// A ULID as buildomat writes it: 26 characters of upper-case Crockford base 32, of which the first
/// is at most 7, for 128 bits (<https://github.com/ulid/spec>). Nothing else parses: neither lower
/// case nor the look-alikes I, L, O and U.
fn parse_ulid(text: &str) -> Option<u128> {
    let bytes = text.as_bytes();
    if bytes.len() != 26 || bytes[0] > b'7' {
        return None;
    }
    bytes.iter().try_fold(0, |value: u128, byte| {
        let digit = CROCKFORD.iter().position(|c| c == byte)?;
        Some(value << 5 | digit as u128)
    })
}

fn print_ulid(value: u128) -> String {
    (0..26)
        .rev()
        .map(|i| char::from(CROCKFORD[(value >> (5 * i)) as usize & 31]))
        .collect()
}

macro_rules! ulid_type {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(#[serde(with = "ulid_serde")] u128);

        impl $name {
            /// From its 128 bits: every value is valid.
            pub const fn from_bits(bits: u128) -> Self {
                Self(bits)
            }

            /// Its 128 bits. The low 80 are random.
            pub const fn to_bits(self) -> u128 {
                self.0
            }

            /// When it was made, in milliseconds since 1970, by the clock of who made it.
            pub const fn made_at(self) -> u64 {
                (self.0 >> 80) as u64
            }
        }

        impl FromStr for $name {
            type Err = BadValue;

            fn from_str(text: &str) -> Result<Self, BadValue> {
                parse_ulid(text).map(Self).ok_or_else(|| {
                    BadValue(format!("{} is not {}: a ULID has 26 characters of 0-9 and A-Z without I, L, O, U", quoted(text), $what))
                })
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&print_ulid(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

/// ULIDs are 16 bytes on the wire and 26 characters in a text (the configuration, JSON).
mod ulid_serde {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

    pub fn serialize<S: Serializer>(value: &u128, to: S) -> Result<S::Ok, S::Error> {
        if to.is_human_readable() {
            to.serialize_str(&super::print_ulid(*value))
        } else {
            value.to_be_bytes().serialize(to)
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u128, D::Error> {
        if !from.is_human_readable() {
            return <[u8; 16]>::deserialize(from).map(u128::from_be_bytes);
        }
        let text = String::deserialize(from)?;
        super::parse_ulid(&text).ok_or_else(|| {
            de::Error::custom(format!(
                "{} is not a ULID: 26 characters of 0-9 and A-Z without I, L, O, U",
                super::quoted(&text)
            ))
        })
    }
}

ulid_type!(
    /// A worker, as the buildomat server names it: a ULID. It also names the worker's user and directory.
    WorkerId,
    "a worker's id"
);
ulid_type!(
    /// A target (a kind of machine that jobs ask for), as the buildomat server names it: a ULID.
    TargetId,
    "a target's id"
);

macro_rules! text_type {
    ($(#[$doc:meta])* $name:ident, $rule:expr, $sentence:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The text, which keeps the type's rule.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = BadValue;

            fn try_from(text: String) -> Result<Self, BadValue> {
                let rule: fn(&str) -> bool = $rule;
                if rule(&text) { Ok(Self(text)) } else { Err(BadValue(format!($sentence, quoted(&text)))) }
            }
        }

        impl FromStr for $name {
            type Err = BadValue;

            fn from_str(text: &str) -> Result<Self, BadValue> {
                Self::try_from(text.to_owned())
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }
    };
}

text_type!(
    /// A slot's name in the configuration: 1 to 32 of `a-z A-Z 0-9 _ -`, the first a letter or digit.
    SlotName,
    |text| {
        (1..=32).contains(&text.len())
            && text.as_bytes()[0].is_ascii_alphanumeric()
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
    },
    "{} is not a slot's name: use 1 to 32 letters, digits, - and _, beginning with a letter or digit"
);

impl fmt::Display for SlotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SlotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

text_type!(
    /// A target's name on the buildomat server, which allows none that looks like a ULID: 1 to 128 bytes without control
    /// characters, and without white space at its ends.
    TargetName,
    |text| {
        (1..=128).contains(&text.len())
            && text.trim() == text
            && !text.contains(char::is_control)
            && !(text.len() == 26 && text.bytes().all(|b| b.is_ascii_alphanumeric()))
    },
    "{} is not a target: write its id, a ULID of 26 characters of 0-9 and A-Z without I, L, O, U, or its name on the server"
);

impl fmt::Display for TargetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TargetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// A target in the configuration: what parses as an id is one.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Target {
    /// Its id.
    Id(TargetId),
    /// Its name, which the supervisor looks up on the server.
    Name(TargetName),
}

impl TryFrom<String> for Target {
    type Error = BadValue;

    fn try_from(text: String) -> Result<Self, BadValue> {
        text.parse()
            .map(Self::Id)
            .or_else(|_| text.parse().map(Self::Name))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Id(id) => id.fmt(f),
            Target::Name(name) => name.fmt(f),
        }
    }
}

text_type!(
    /// The secret with which an agent introduces itself, once: 16 to 128 ASCII letters and digits (the
    /// server makes 64). It becomes an argument of a command, so nothing else is let through, and no
    /// formatting prints it.
    BootstrapToken,
    |text| (16..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric()),
    "a bootstrap token is 16 to 128 letters and digits{:.0}"
);

impl fmt::Debug for BootstrapToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BootstrapToken(…)")
    }
}

/// The name of a worker's user: `bmat-` and the worker's id in lower case, 31 characters, one below
/// the limit of `utmp(5)`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct UserName(WorkerId);

impl UserName {
    /// The worker whose user has this name: each name is of one worker.
    pub fn worker(&self) -> WorkerId {
        self.0
    }
}

impl From<WorkerId> for UserName {
    fn from(worker: WorkerId) -> Self {
        Self(worker)
    }
}

impl From<UserName> for String {
    fn from(name: UserName) -> String {
        name.to_string()
    }
}

impl TryFrom<String> for UserName {
    type Error = BadValue;

    fn try_from(text: String) -> Result<Self, BadValue> {
        let worker = text
            .strip_prefix("bmat-")
            .and_then(|id| id.to_ascii_uppercase().parse().ok());
        worker
            .map(Self)
            .filter(|name| name.to_string() == text)
            .ok_or_else(|| BadValue(format!("{} is not a worker's user", quoted(&text))))
    }
}

impl fmt::Display for UserName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "bmat-{}", self.0.to_string().to_ascii_lowercase())
    }
}

impl fmt::Debug for UserName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A worker's uid, which is its gid as well. Never root, never the kernel's "no id" values.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Uid(u32);

impl Uid {
    /// As system calls take it: 1048576 to 2147483647.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for Uid {
    type Error = BadValue;

    fn try_from(uid: u32) -> Result<Self, BadValue> {
        // Those below may be the host's users'; 2^31 and above trips signed code.
        if !(1 << 20..1 << 31).contains(&uid) {
            return Err(BadValue(format!(
                "{uid} cannot be a worker's uid: use 1048576 to 2147483647"
            )));
        }
        Ok(Self(uid))
    }
}

impl From<Uid> for u32 {
    fn from(uid: Uid) -> u32 {
        uid.0
    }
}

impl fmt::Display for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Debug for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A port, by the kernel's name of what is plugged into it: `1-2.3`. A root hub (`usb1`) has none.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct UsbPort(String);

impl UsbPort {
    /// The kernel's name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Is it this port, or one of a hub that is plugged in there?
    pub fn is_within(&self, other: &UsbPort) -> bool {
        let rest = self.0.strip_prefix(&other.0);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    }
}

impl fmt::Display for UsbPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for UsbPort {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<UsbPort, BadValue> {
        let is_number = |part: &str| {
            (1..=3).contains(&part.len())
                && part.bytes().all(|b| b.is_ascii_digit())
                && !part.starts_with('0')
        };
        let is_port = text.split_once('-').is_some_and(|(bus, ports)| {
            // Hubs are at most five deep (USB 2.0, 4.1.1), and the root hub's port comes first.
            is_number(bus) && ports.split('.').count() <= 6 && ports.split('.').all(is_number)
        });
        match is_port {
            true => Ok(UsbPort(text.to_owned())),
            false => Err(BadValue(format!("{text:?} is no USB port: write it as 1-2.3"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_buildomats_spelling_of_a_ulid_parses() {
        let good = "01HZX3N8Q4J5K6M7P8R9S0T1V2";
        assert_eq!(good.parse::<WorkerId>().unwrap().to_string(), good);
        let lower = good.to_lowercase();
        for bad in [
            "",
            "0",
            &good[1..],
            &lower,
            "81HZX3N8Q4J5K6M7P8R9S0T1V2",
            "01HZX3N8Q4J5K6M7P8R9S0T1VI",
            "../../../../../../../etc/p",
        ] {
            assert!(bad.parse::<WorkerId>().is_err(), "{bad:?} parsed");
        }
    }

    #[test]
    fn slot_names_cannot_be_paths_or_break_a_log() {
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "a.b",
            "a b",
            "a\n",
            "a\0",
            "-a",
            "_a",
            "ä",
            &"a".repeat(33),
        ] {
            assert!(bad.parse::<SlotName>().is_err(), "{bad:?} parsed");
        }
        for good in ["a", "hubris-1", "0_B", &"a".repeat(32)] {
            assert_eq!(good.parse::<SlotName>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn bootstrap_tokens_are_plain_words_and_stay_secret() {
        let token: BootstrapToken = "a".repeat(64).parse().unwrap();
        assert_eq!(format!("{token:?}"), "BootstrapToken(…)");
        for bad in [
            "",
            "short",
            "-aaaaaaaaaaaaaaaaaaaa",
            "aaaaaaaaaaaaaaaa aaaa",
            "aaaaaaaaaaaaaaaa\0",
            "aaaaaaaaaaaaaaaa;$(x)",
        ] {
            let error = bad.parse::<BootstrapToken>().unwrap_err().to_string();
            assert!(
                bad.is_empty() || !error.contains(bad),
                "the error repeats the secret"
            );
        }
    }

    #[test]
    fn uids_are_neither_the_hosts_nor_the_kernels_words_for_none() {
        for good in [1 << 20, 0x1f_ffff, (1 << 31) - 1] {
            let uid = Uid::try_from(good).unwrap();
            assert_eq!((uid.get(), u32::from(uid)), (good, good));
            assert_eq!(
                (uid.to_string(), format!("{uid:?}")),
                (good.to_string(), good.to_string())
            );
        }
        for bad in [
            0,
            1,
            1000,
            65_534,
            65_536,
            (1 << 20) - 1,
            1 << 31,
            (1 << 31) + 1,
            u32::MAX,
        ] {
            let error = Uid::try_from(bad).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{bad} cannot be")), "{error}");
        }
    }

    #[test]
    fn users_are_named_after_their_workers_and_nobody_else_is() {
        let worker: WorkerId = "01HZX3N8Q4J5K6M7P8R9S0T1V2".parse().unwrap();
        let user = UserName::from(worker);
        assert_eq!(user.worker(), worker);
        assert_eq!(String::from(user.clone()), "bmat-01hzx3n8q4j5k6m7p8r9s0t1v2");
        assert_eq!(format!("{user:?}"), user.to_string());
        for bad in [
            "root",
            "bmat-",
            "bmat-01HZX3N8Q4J5K6M7P8R9S0T1V2",
            "01hzx3n8q4j5k6m7p8r9s0t1v2",
        ] {
            let error = UserName::try_from(bad.to_owned()).unwrap_err().to_string();
            assert_eq!(error, format!("{bad:?} is not a worker's user"));
        }
    }

    #[test]
    fn ids_are_text_where_people_read_and_bytes_elsewhere() {
        let text = "01HZX3N8Q4J5K6M7P8R9S0T1V2";
        #[derive(Debug, PartialEq, Serialize, Deserialize)]
        struct Table {
            id: WorkerId,
            slot: SlotName,
        }
        let table: Table = toml::from_str(&format!("id = \"{text}\"\nslot = \"a\"")).unwrap();
        assert_eq!(
            (table.id, table.slot.to_string()),
            (text.parse().unwrap(), "a".into())
        );
        assert_eq!(format!("{:?} {:?}", table.id, table.slot), format!("{text} a"));
        let error = toml::from_str::<Table>("id = \"x\\u0007\"\nslot = \"a\"")
            .unwrap_err()
            .to_string();
        assert!(error.contains(r#""x\u{7}" is not a ULID"#), "{error}");
        let first = [0; 16].map(|_: u8| 0u8);
        assert_eq!(
            crate::wire::decode::<WorkerId>(&first).unwrap(),
            WorkerId::from_bits(0)
        );
        assert!("7ZZZZZZZZZZZZZZZZZZZZZZZZZ".parse::<WorkerId>().is_ok());
        assert!("80000000000000000000000000".parse::<WorkerId>().is_err());
    }

    proptest! {
        #[test]
        fn ulids_print_and_parse(bits: u128) {
            let id = WorkerId::from_bits(bits);
            prop_assert_eq!(id.to_string().parse::<WorkerId>().unwrap(), id);
            let user = UserName::from(id);
            prop_assert_eq!(user.to_string().len(), 31);
            prop_assert_eq!(UserName::try_from(user.to_string()).unwrap(), user);
        }

        #[test]
        fn what_parses_prints_the_same(text in "\\PC{0,40}") {
            if let Ok(id) = text.parse::<WorkerId>() { prop_assert_eq!(id.to_string(), text.clone()); }
            if let Ok(slot) = text.parse::<SlotName>() { prop_assert_eq!(slot.as_str(), text); }
        }
    }
}
