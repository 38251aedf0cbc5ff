//! What a job can reach: the host's network, or destinations that the slot names.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::de::value::MapAccessDeserializer;
use serde::{Deserialize, Deserializer, de};

use super::value::{BaseUrl, is_host_name, text};

/// The most destinations of a slot. Each takes a descriptor of the job's pid 1.
pub const MAX_DESTINATIONS: usize = 64;
/// Where the HTTP proxy of a job with [`Egress`] listens, in its network namespace.
pub const HTTP_PROXY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 64, 0, 1)), 3128);
/// The name of a connection to the buildomat server, in the packet that brings it to [`PROXY_SOCKET`](super::PROXY_SOCKET).
pub const TO_SERVER: &str = "c";
/// That of a connection to [`HTTP_PROXY`]. All others are named by their [`Destination`].
pub const TO_HTTP_PROXY: &str = "proxy";
/// The longest such name, in bytes: that of a host, `:` and a port.
pub const MAX_CONNECTION_NAME: usize = 253 + 6;

/// What a job without the host's network can reach: the buildomat server, and what is named here. It has a network
/// namespace of its own, in which its pid 1 passes connections to the supervisor's egress proxy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Egress {
    /// At most [`MAX_DESTINATIONS`].
    #[serde(default, deserialize_with = "destinations")]
    pub allow: BTreeSet<Destination>,
    /// Does the HTTP proxy connect to other hosts as well, and record them?
    #[serde(default)]
    pub audit: bool,
}

/// A host, or all below a domain, and a TCP port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Destination {
    /// The host.
    pub host: Host,
    /// 1 to 65535.
    pub port: u16,
}

/// Whom a [`Destination`] names.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Host {
    /// A name in DNS or in the host's `/etc/hosts`, in lower case.
    Name(String),
    /// `*.DOMAIN`: every name that has labels before this domain, in lower case, but not the domain itself.
    Below(String),
    /// An address.
    Address(IpAddr),
}

impl Egress {
    /// Has a job an HTTP proxy? It has none where there is nobody to reach by it.
    pub fn has_http_proxy(&self) -> bool {
        self.audit || !self.allow.is_empty()
    }

    /// The names that a job resolves, each with its address in the job's network namespace: one of 127.64.0.0/16, or the
    /// server's if it is the server's name.
    pub fn names(&self, server: &BaseUrl) -> Vec<(&str, IpAddr)> {
        let names: BTreeSet<&str> = self
            .allow
            .iter()
            .filter_map(|destination| match &destination.host {
                Host::Name(name) => Some(name.as_str()),
                _ => None,
            })
            .collect();
        let is_server = |name| {
            let (own, _) = server.name_and_port()?;
            let address = server.address_in_job().filter(|_| own.eq_ignore_ascii_case(name));
            address.map(|address| address.ip())
        };
        // After the HTTP proxy's. There are at most MAX_DESTINATIONS.
        (2u8..)
            .zip(names)
            .map(|(last, name)| {
                (
                    name,
                    is_server(name).unwrap_or(Ipv4Addr::new(127, 64, 0, last).into()),
                )
            })
            .collect()
    }

    /// Where the job's pid 1 listens besides the server's port, each with the name of its connections.
    pub fn listeners(&self, server: &BaseUrl) -> Vec<(SocketAddr, String)> {
        let names = self.names(server);
        let proxy = self
            .has_http_proxy()
            .then(|| (HTTP_PROXY, TO_HTTP_PROXY.to_owned()));
        let address = |destination: &Destination| match &destination.host {
            Host::Name(name) => names.iter().find(|(own, _)| own == name).map(|(_, ip)| *ip),
            Host::Below(_) => None,
            Host::Address(address) => Some(*address),
        };
        let server = server.name_and_port();
        let server = server.map(|(name, port)| format!("{name}:{port}").to_ascii_lowercase());
        let destinations = self
            .allow
            .iter()
            // The server itself is reached as such.
            .filter(|destination| Some(destination.to_string()) != server)
            .filter_map(|destination| {
                let address = SocketAddr::new(address(destination)?, destination.port);
                Some((address, destination.to_string()))
            });
        proxy.into_iter().chain(destinations).collect()
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let port = self.port;
        match &self.host {
            Host::Name(name) => write!(f, "{name}:{port}"),
            Host::Below(domain) => write!(f, "*.{domain}:{port}"),
            Host::Address(address) => SocketAddr::new(*address, port).fmt(f),
        }
    }
}

impl std::str::FromStr for Destination {
    type Err = String;

    fn from_str(text: &str) -> Result<Destination, String> {
        let no = |why: &str| {
            let short: String = text.chars().take(200).collect();
            Err(format!("{short:?} is no destination: {why}"))
        };
        if text.contains("://") {
            return no("write HOST:PORT, without a scheme such as https://");
        }
        if text.contains('/') {
            return no("write HOST:PORT, without a path");
        }
        let (host, port) = match text.rsplit_once(':') {
            // The colon of an IPv6 address without a port.
            Some((host, _)) if host.contains(':') && !host.ends_with(']') => {
                return no("write an IPv6 address in brackets, and its port: [2001:db8::1]:443");
            }
            Some(parts) => parts,
            None => return no("its port is missing: write HOST:PORT, as in example.com:443"),
        };
        let port = match port.parse() {
            Ok(number) if number != 0 && port.bytes().all(|b| b.is_ascii_digit()) => number,
            _ => return no("its port must be a number from 1 to 65535"),
        };
        let in_brackets = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let address = match in_brackets {
            Some(inner) => inner.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
            None => host.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
        };
        let host = match (address, host.strip_prefix("*.")) {
            (Some(address), _) => match address {
                IpAddr::V4(v4) if v4.octets().starts_with(&[127, 64]) => {
                    return no("a job's own network has the names of its slot at 127.64.0.0/16");
                }
                address if !may_be_connected_to(address) => {
                    return no("nobody can connect to that address");
                }
                address => Host::Address(address),
            },
            (None, Some(domain)) if is_name(domain) => Host::Below(domain.to_ascii_lowercase()),
            (None, None) if host.eq_ignore_ascii_case("localhost") => {
                return no("localhost is the job itself: write a name or an address of the host");
            }
            (None, None) if is_name(host) => Host::Name(host.to_ascii_lowercase()),
            _ if host.contains('*') => {
                return no("a wildcard must be the whole first label, as in *.example.com:443");
            }
            _ if !host.is_ascii() => {
                return no("write a name that has other letters as DNS has it: xn--bcher-kva.example:443");
            }
            _ => return no("write a host's name or address, and its port: example.com:443"),
        };
        Ok(Destination { host, port })
    }
}

/// Not "this network", multicast and broadcast; of IPv6 neither link-local addresses, which need an interface, nor IPv4's
/// in its form.
fn may_be_connected_to(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(ip) => ip.octets()[0] != 0 && !ip.is_multicast() && !ip.is_broadcast(),
        IpAddr::V6(ip) => {
            let is_special = ip.is_unspecified() || ip.is_multicast() || ip.is_unicast_link_local();
            !is_special && ip.to_ipv4_mapped().is_none()
        }
    }
}

/// A name that is no address: the last label has a letter (RFC 3696, 2).
fn is_name(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or_default();
    is_host_name(name) && !last.bytes().all(|b| b.is_ascii_digit())
}

impl<'de> Deserialize<'de> for Destination {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        text(from, str::parse)
    }
}

fn destinations<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeSet<Destination>, D::Error> {
    let all = BTreeSet::deserialize(from)?;
    match all.len() {
        ..=MAX_DESTINATIONS => Ok(all),
        n => Err(de::Error::custom(format!(
            "{n} destinations are too many: write at most {MAX_DESTINATIONS}, some of them as *.DOMAIN:PORT"
        ))),
    }
}

/// The key `network`.
pub(super) fn network<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Egress>, D::Error> {
    struct Visitor;

    impl<'de> de::Visitor<'de> for Visitor {
        type Value = Option<Egress>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("\"host\", \"none\", or a table with allow or audit")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
            match text {
                "host" => Ok(None),
                "none" => Ok(Some(Egress::default())),
                other => Err(E::invalid_value(de::Unexpected::Str(other), &self)),
            }
        }

        fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
            Egress::deserialize(MapAccessDeserializer::new(map)).map(Some)
        }
    }

    from.deserialize_any(Visitor)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn egress(allow: &[&str]) -> Egress {
        Egress {
            allow: allow.iter().map(|text| text.parse().unwrap()).collect(),
            audit: false,
        }
    }

    fn server(url: &str) -> BaseUrl {
        toml::from_str::<std::collections::BTreeMap<String, BaseUrl>>(&format!("u = {url:?}")).unwrap()["u"]
            .clone()
    }

    #[test]
    fn a_destination_is_printed_as_it_is_written() {
        for text in [
            "artifacts.example.com:443",
            "*.mirror.example.org:80",
            "10.20.0.5:873",
            "[2001:db8::1]:65535",
            "build_host:1",
        ] {
            assert_eq!(text.parse::<Destination>().unwrap().to_string(), text);
        }
        let upper: Destination = "Example.COM:443".parse().unwrap();
        assert_eq!(upper.to_string(), "example.com:443");
    }

    #[test]
    fn what_is_no_destination_is_told_with_what_to_write() {
        for (text, part) in [
            ("example.com", "its port is missing"),
            ("bücher.example:443", "xn--bcher-kva"),
            ("example.com:", "from 1 to 65535"),
            ("example.com:0", "from 1 to 65535"),
            ("example.com:65536", "from 1 to 65535"),
            ("example.com:+1", "from 1 to 65535"),
            ("https://example.com:443", "without a scheme"),
            ("example.com:443/path", "without a path"),
            ("a.*.example.com:443", "the whole first label"),
            ("*example.com:443", "the whole first label"),
            ("*:443", "the whole first label"),
            ("*.10.0.0.1:443", "the whole first label"),
            ("2001:db8::1:443", "in brackets"),
            ("2001:db8::1", "in brackets"),
            ("[10.0.0.1]:443", "name or address"),
            ("10.0.0:443", "name or address"),
            ("a b:443", "name or address"),
            ("example.com.:443", "name or address"),
            (":443", "name or address"),
            ("user@example.com:443", "name or address"),
            ("localhost:80", "the job itself"),
            ("LOCALHOST:80", "the job itself"),
            ("0.0.0.0:80", "nobody can connect"),
            ("0.1.2.3:80", "nobody can connect"),
            ("255.255.255.255:80", "nobody can connect"),
            ("224.0.0.1:80", "nobody can connect"),
            ("[::]:80", "nobody can connect"),
            ("[ff02::1]:80", "nobody can connect"),
            ("[fe80::1]:80", "nobody can connect"),
            ("[::ffff:10.0.0.1]:80", "nobody can connect"),
            ("127.64.3.1:80", "127.64.0.0/16"),
        ] {
            let why = text.parse::<Destination>().unwrap_err();
            assert!(why.contains(part), "{text}: {why}");
        }
    }

    #[test]
    fn each_name_has_an_address_and_each_destination_a_listener() {
        let list = egress(&[
            "b.example.com:443",
            "a.example.com:80",
            "a.example.com:443",
            "*.example.org:80",
            "10.0.0.1:80",
            "ci.example.com:22",
            "ci.example.com:443",
        ]);
        let server = server("https://CI.example.com");
        let own = |last| IpAddr::from([127, 64, 0, last]);
        assert_eq!(
            list.names(&server),
            [
                ("a.example.com", own(2)),
                ("b.example.com", own(3)),
                ("ci.example.com", IpAddr::from([127, 0, 0, 1]))
            ]
        );
        let listeners = list.listeners(&server);
        let listeners: Vec<String> = listeners.iter().map(|(at, to)| format!("{at} {to}")).collect();
        assert_eq!(
            listeners,
            [
                "127.64.0.1:3128 proxy",
                "127.64.0.2:80 a.example.com:80",
                "127.64.0.2:443 a.example.com:443",
                "127.64.0.3:443 b.example.com:443",
                "127.0.0.1:22 ci.example.com:22",
                "10.0.0.1:80 10.0.0.1:80",
            ]
        );
        assert!(Egress::default().listeners(&server).is_empty());
    }
}
