//! Single values of the configuration, each refused at its own place in the file when it breaks its rule.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Deserializer, de};

use crate::Uid;

/// The directories that every job may write, besides its home; each begins empty and ends with the job.
pub const PRIVATE_DIRS: [&str; 5] = ["/input", "/work", "/tmp", "/var/tmp", "/opt/buildomat"];

/// A text that `rule` takes or refuses. It does so within the file's deserializer, which knows the place of what it reads:
/// in a list the item's, not the list's.
pub(super) fn text<'de, D: Deserializer<'de>, T>(
    from: D,
    rule: impl FnOnce(&str) -> Result<T, String>,
) -> Result<T, D::Error> {
    struct Visitor<F>(F);

    impl<T, F: FnOnce(&str) -> Result<T, String>> de::Visitor<'_> for Visitor<F> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a string")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
            (self.0)(text).map_err(E::custom)
        }
    }

    from.deserialize_str(Visitor(rule))
}

/// A URL without user and password, which may be secret; any other text as it is.
fn without_user(text: &str) -> String {
    match (text.find("://"), text.rfind('@')) {
        (Some(scheme), Some(at)) if scheme < at => format!("{}://…{}", &text[..scheme], &text[at..]),
        _ => text.to_owned(),
    }
}

/// A text with a rule, refused at its own place in the file.
macro_rules! checked {
    ($(#[$doc:meta])* $name:ident, $rule:expr, $expected:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// The text as the configuration has it, which keeps the type's rule.
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
                let rule: fn(&str) -> bool = $rule;
                text(from, |text| match rule(text) {
                    true => Ok(Self(text.to_owned())),
                    false => {
                        let short: String = without_user(text).chars().take(200).collect();
                        Err(format!(concat!("{:?} is not ", $expected), short))
                    }
                })
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

impl BaseUrl {
    /// The server's host and port for a job without the host's network: a name, or an address that every
    /// network namespace has for itself (127.0.0.0/8). None for other addresses, and where the port is no port.
    pub fn name_and_port(&self) -> Option<(&str, u16)> {
        let (rest, default) = match self.0.strip_prefix("https://") {
            Some(rest) => (rest, 443),
            None => (self.0.strip_prefix("http://")?, 80),
        };
        let authority = rest.split('/').next()?;
        if authority.starts_with('[') {
            return None;
        }
        let (host, port) = match authority.split_once(':') {
            Some((host, port)) => (host, port.parse().ok().filter(|port| *port != 0)?),
            None => (authority, default),
        };
        let elsewhere = host
            .parse::<Ipv4Addr>()
            .is_ok_and(|address| !address.is_loopback());
        (!host.is_empty() && !elsewhere).then_some((host, port))
    }

    /// Where a job without the host's network finds the server: at its address, or, by its name, at 127.0.0.1. None where
    /// there is no [`BaseUrl::name_and_port`].
    pub fn address_in_job(&self) -> Option<SocketAddr> {
        let (name, port) = self.name_and_port()?;
        let address = name.parse().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        Some(SocketAddr::new(address, port))
    }
}

checked!(
    /// A script for bash, of at most 64 KiB.
    Script,
    |text| !text.trim().is_empty() && text.len() <= 64 << 10 && !text.contains('\0'),
    "a script: write at most 64 KiB for bash"
);

checked!(
    /// An HTTP proxy's address.
    ProxyUrl,
    |url| split_proxy(url).is_some(),
    "a proxy: write http://HOST:PORT, without user and path"
);

/// Host and port of a proxy's address.
fn split_proxy(url: &str) -> Option<(&str, u16)> {
    let (host, port) = url.strip_prefix("http://")?.rsplit_once(':')?;
    let port = port.parse().ok().filter(|port| *port != 0)?;
    let host = match host.strip_prefix('[') {
        Some(rest) => rest
            .strip_suffix(']')
            .filter(|ip| ip.parse::<std::net::Ipv6Addr>().is_ok())?,
        None => Some(host).filter(|name| is_host_name(name))?,
    };
    Some((host, port))
}

impl ProxyUrl {
    /// An IPv6 address is without its brackets.
    pub fn host_and_port(&self) -> (&str, u16) {
        split_proxy(&self.0).expect("it was checked")
    }
}

pub(super) fn is_host_name(name: &str) -> bool {
    name.len() <= 253
        && name.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && label
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        })
}

checked!(
    /// The name of a host, as in DNS.
    HostName,
    is_host_name,
    "a host's name: write it without port, as in ci-1.example.com"
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

fn is_env_name(name: &str) -> bool {
    (1..=128).contains(&name.len())
        && !name.as_bytes()[0].is_ascii_digit()
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

checked!(
    /// An environment variable's name (POSIX: letters, digits and underscores, not beginning with a digit).
    EnvName,
    is_env_name,
    "a variable's name: use letters, digits and _, not beginning with a digit"
);

/// The variables that the helper sets for a worker's first program.
pub const HELPER_VARIABLES: [&str; 6] = ["PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ"];

checked!(
    /// The name of a variable of the agent.
    AgentEnvName,
    |name| is_env_name(name) && !HELPER_VARIABLES.contains(&name),
    "a variable's name for the agent: use letters, digits and _, not beginning with a digit, and none of PATH, HOME, USER, LOGNAME, LANG and TZ, which the helper sets"
);

checked!(
    /// An environment variable's value: at most 32 KiB, no NUL.
    EnvValue,
    |value| value.len() <= 32 << 10 && !value.contains('\0'),
    "a variable's value: at most 32768 bytes, without NUL"
);

/// An absolute path without `.`, `..`, doubled slashes and control characters; not `/` itself.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPath(pub(super) PathBuf);

impl HostPath {
    /// From the host's root, or a job's where the key says so.
    pub fn as_path(&self) -> &Path {
        &self.0
    }

    /// # Errors
    /// In a sentence.
    pub(super) fn parse(text: &str) -> Result<HostPath, String> {
        let path = PathBuf::from(text);
        let plain = text.len() < 1024
            && !text.chars().any(char::is_control)
            && path.is_absolute()
            && path
                .components()
                .skip(1)
                .all(|c| matches!(c, Component::Normal(_)))
            && path.components().count() > 1
            && path.components().collect::<PathBuf>().as_os_str() == path.as_os_str();
        match plain {
            true => Ok(Self(path)),
            false => Err(format!(
                "{text:?} is not an absolute path in its plain form, such as \"/opt/rust\""
            )),
        }
    }

    /// May something be mounted here for a job? Something of the host's, read-only, may be in its `/run`, beside
    /// what the job has there of its own.
    pub(super) fn check_path_in_job(&self, is_read_only: bool) -> Result<(), String> {
        let in_run = ["buildomat", "buildomat-agent", "lock", "screen", "user"]
            .map(|name| PathBuf::from("/run").join(name));
        let is_beside = is_read_only
            && self.0.starts_with("/run")
            && self.0.components().count() > 2
            && !in_run.iter().any(|own| self.0.starts_with(own));
        let taken = [
            "/proc", "/sys", "/dev", "/run", "/var/run", "/home", "/root", "/etc",
        ];
        match PRIVATE_DIRS
            .iter()
            .chain(&taken)
            .find(|top| self.0.starts_with(top) && !is_beside)
        {
            Some(top) => Err(format!(
                "is below {top}, which the job has of its own: choose another path"
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
        text(from, HostPath::parse)
    }
}

/// A family of sockets that a slot may have beyond those of every job (`address_families(7)`). Not here are those that
/// need a capability (`AF_PACKET`, `AF_XDP`), and those that ordinary software does without and that have led out of
/// sandboxes (`AF_ALG`, `AF_RDS`, `AF_TIPC` and others).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SocketFamily {
    /// `"AF_BLUETOOTH"`: the host's adapters and what is paired with them.
    Bluetooth,
    /// `"AF_CAN"`: all CAN interfaces of the host.
    Can,
    /// `"AF_VSOCK"`: the host's hypervisor and its virtual machines.
    Vsock,
}

impl<'de> Deserialize<'de> for SocketFamily {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        text(from, |text| match text {
            "AF_BLUETOOTH" => Ok(SocketFamily::Bluetooth),
            "AF_CAN" => Ok(SocketFamily::Can),
            "AF_VSOCK" => Ok(SocketFamily::Vsock),
            other => Err(format!(
                "{other:?} is no family of sockets that a slot may have beyond those of every job: AF_BLUETOOTH, AF_CAN and AF_VSOCK are"
            )),
        })
    }
}

/// The supervisor's user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum User {
    /// Looked up in `/etc/passwd` alone.
    Name(String),
    /// Any but 4294967295, which means "no id" to the kernel.
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
        let user = match Raw::deserialize(from)? {
            Raw::Number(uid) => User::Number(uid),
            // No user has such a name (`useradd(8)`).
            Raw::Name(name) if name.0.bytes().all(|b| b.is_ascii_digit()) => match name.0.parse() {
                Ok(uid) => User::Number(uid),
                Err(_) => return Err(de::Error::custom(format!("{name} is too large for a uid"))),
            },
            Raw::Name(name) => User::Name(name.0),
        };
        // It means "leave it as it is" to the kernel (`chown(2)`).
        match user {
            User::Number(u32::MAX) => Err(de::Error::custom("4294967295 is nobody's uid")),
            user => Ok(user),
        }
    }
}

/// The uids that workers get, both ends included; written `"2031616-2097151"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UidRange {
    /// At least 1048576.
    pub first: Uid,
    /// Not below `first`.
    pub last: Uid,
}

impl UidRange {
    /// How many uids it has: 1 to 1048576.
    pub fn len(self) -> u32 {
        self.last.get() - self.first.get() + 1
    }

    /// Never: a range has at least one uid.
    pub fn is_empty(self) -> bool {
        false
    }

    /// Any number may be asked about, also one that no worker can have.
    pub fn contains(self, uid: u32) -> bool {
        (self.first.get()..=self.last.get()).contains(&uid)
    }
}

impl fmt::Display for UidRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

impl Default for UidRange {
    fn default() -> Self {
        // The last block of 65536 ids that fit into archives of the formats ustar and cpio, which have room for 21 bits.
        // It is in the range that systemd keeps for containers (its UIDS-GIDS.md), so the helper reserves it there.
        let end = |uid| Uid::try_from(uid).expect("a uid of the default range");
        UidRange {
            first: end(0x1f_0000),
            last: end(0x1f_ffff),
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
