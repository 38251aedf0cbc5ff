//! Connecting a job to a destination: whether it may be, and to which of its addresses.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use protocol::config::{Destination, Egress, Host};
use tokio::net::{TcpStream, lookup_host};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::EgressProxy;
use super::route::is_local_address;
use super::upstream::{LOOKUP, Upstream, connect_within};
use crate::egress_records::JobEgress;

/// Why a job is not connected.
#[derive(Debug)]
pub(super) enum ConnectError {
    /// Its slot does not allow it.
    Refused {
        /// In a sentence for the job, which says nothing of the networks that the host is in.
        why: String,
        /// The address that is the reason, for the operator.
        at: Option<SocketAddr>,
    },
    /// It was tried.
    Failed(io::Error),
}

impl EgressProxy {
    /// Connect to where a job wants, if its slot allows it. What comes of it is recorded.
    pub(super) async fn connect(
        &self,
        uid: u32,
        job: &JobEgress,
        to: &Destination,
    ) -> Result<TcpStream, ConnectError> {
        let connected = self.try_connect(uid, job, to).await;
        let result = match &connected {
            Ok(server) => {
                self.records.record_use(job, to);
                // A list that allows the name alone would not be enough.
                if let Ok(at) = server.peer_addr()
                    && matches!(to.host, Host::Name(_))
                    && !self.has_http_proxy
                    && job.egress.allow.contains(&of_address(at))
                {
                    self.records.record_use(job, &of_address(at));
                }
                "connected"
            }
            Err(ConnectError::Refused { why, at }) => {
                if self.records.record_refusal(job, to) {
                    let at = at.map(tracing::field::display);
                    tracing::info!(worker = %job.worker, slot = %job.slot, at, "egress refused: {why}");
                    self.job_log.queue(job.worker, format!("egress refused: {why}"));
                }
                "refused"
            }
            Err(ConnectError::Failed(error)) => {
                tracing::debug!(worker = %job.worker, slot = %job.slot, "the egress proxy cannot reach {to} for a job: {error}");
                "failed"
            }
        };
        self.metrics.count_connection(&job.slot, result);
        connected
    }

    async fn try_connect(
        &self,
        uid: u32,
        job: &JobEgress,
        to: &Destination,
    ) -> Result<TcpStream, ConnectError> {
        let refused = |why: String| ConnectError::Refused { why, at: None };
        if !(job.egress.audit || allows(&job.egress, to)) {
            return Err(refused(format!("{to} is not in the slot's network.allow")));
        }
        let addresses = match &to.host {
            Host::Below(_) => return Err(refused(format!("{to} is no host"))),
            Host::Address(address) => vec![SocketAddr::new(*address, to.port)],
            // The proxy looks it up, so that its rules for addresses hold and not ours.
            Host::Name(name) if self.has_http_proxy => {
                let connected = self.upstream.connect_through_proxy(name, to.port).await;
                return connected.map_err(ConnectError::Failed);
            }
            Host::Name(name) => self
                .look_up(uid, name.clone(), to.port)
                .await
                .map_err(ConnectError::Failed)?,
        };
        // From here on, the addresses count and not the name: its next answer may be another.
        let addresses = reachable(&job.egress, to, addresses)?;
        let connected = match to.host {
            Host::Address(address) if self.has_http_proxy => {
                let address = address.to_string();
                self.upstream.connect_through_proxy(&address, to.port).await
            }
            _ => connect_within(addresses).await,
        };
        connected.map_err(ConnectError::Failed)
    }

    /// The addresses of a name. A worker has few look-ups at the same time, as each takes a thread until it ends, however
    /// long its name servers take.
    async fn look_up(&self, uid: u32, name: String, port: u16) -> io::Result<Vec<SocketAddr>> {
        let found = async {
            let turn = self.looking_up.of(uid).acquire_owned().await;
            let resolve = self.resolve.clone();
            let found = spawn_blocking(move || {
                let found = resolve(&name, port);
                drop(turn);
                found
            });
            found.await.map_err(io::Error::other)?
        };
        let too_slow = |_| io::Error::new(io::ErrorKind::TimedOut, "its name is not found in time");
        timeout(LOOKUP, found).await.map_err(too_slow)?
    }
}

/// Does the list name it, or a domain that it is in? Names are compared as [`Destination`] writes them, so without regard to
/// case.
fn allows(egress: &Egress, to: &Destination) -> bool {
    let is_below = |listed: &Destination| match (&listed.host, &to.host) {
        (Host::Below(domain), Host::Name(name)) => {
            let labels = name.strip_suffix(domain.as_str());
            listed.port == to.port && labels.is_some_and(|labels| labels.ends_with('.'))
        }
        _ => false,
    };
    egress.allow.contains(to) || egress.allow.iter().any(is_below)
}

fn of_address(at: SocketAddr) -> Destination {
    let (host, port) = (Host::Address(at.ip()), at.port());
    Destination { host, port }
}

/// Those of a destination's addresses to which a job may be connected.
///
/// # Errors
/// Where there are others alone.
fn reachable(
    egress: &Egress,
    to: &Destination,
    addresses: Vec<SocketAddr>,
) -> Result<Vec<SocketAddr>, ConnectError> {
    let mut reachable = Vec::new();
    let (mut not_public, mut failed) = (None, None);
    for at in addresses {
        let ip = at.ip();
        if egress.allow.contains(&of_address(at)) {
            reachable.push(at);
            continue;
        }
        match is_public(ip).then(|| is_local_address(ip)) {
            Some(Ok(false)) => reachable.push(at),
            Some(Err(error)) => failed = Some(error),
            Some(Ok(true)) | None => not_public = not_public.or(Some(at)),
        }
    }
    let is_loopback = matches!(to.host, Host::Address(address) if address.is_loopback());
    match (not_public, failed) {
        _ if !reachable.is_empty() => Ok(reachable),
        (Some(at), _) if is_loopback => Err(ConnectError::Refused {
            why: format!(
                "{to} of the host is not in the slot's network.allow; a server of the job's own is reached without the proxy (no_proxy)"
            ),
            at: Some(at),
        }),
        (Some(at), _) => Err(ConnectError::Refused {
            why: format!(
                "{to} is at an address that is not public: the slot's network.allow must have that address, too"
            ),
            at: Some(at),
        }),
        (None, Some(error)) => Err(ConnectError::Failed(error)),
        (None, None) => Ok(reachable),
    }
}

/// Would a job of a slot with this network be connected to one of its destinations now? For `check --online`.
///
/// # Errors
/// Why not, in a sentence.
pub async fn try_destination(
    egress: &Egress,
    to: &Destination,
    http_proxy: Option<(&str, u16)>,
) -> Result<(), String> {
    let host = match &to.host {
        Host::Name(name) => name.clone(),
        Host::Address(address) => address.to_string(),
        Host::Below(_) => return Ok(()),
    };
    let cannot = |error: io::Error| format!("cannot connect to {to}: {error}");
    if let Some((proxy, port)) = http_proxy {
        let upstream = Upstream::new(host, to.port).through(proxy.to_owned(), port);
        return upstream.connect().await.map(drop).map_err(cannot);
    }
    let addresses = timeout(LOOKUP, lookup_host((host.as_str(), to.port))).await;
    let addresses = addresses.map_err(|_| format!("the name of {to} is not found in time"))?;
    let addresses = addresses.map_err(|error| format!("the name of {to} is not found: {error}"))?;
    let addresses = reachable(egress, to, addresses.collect()).map_err(|why| match why {
        ConnectError::Refused { why, at: Some(at) } => format!("{why} (\"{at}\")"),
        ConnectError::Refused { why, at: None } => why,
        ConnectError::Failed(error) => cannot(error),
    })?;
    connect_within(addresses).await.map(drop).map_err(cannot)
}

/// Networks that are not public (IANA's special-purpose address registries, RFC 6890; multicast, RFC 5771): with the length
/// of their prefixes.
const NOT_PUBLIC: [(Ipv4Addr, u32); 17] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    // Services that tell a cloud's machines their secrets are at 169.254.169.254 …
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    // … and one at an address that is Microsoft's.
    (Ipv4Addr::new(168, 63, 129, 16), 32),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    (Ipv4Addr::new(192, 0, 2, 0), 24),
    (Ipv4Addr::new(192, 88, 99, 0), 24),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    (Ipv4Addr::new(198, 18, 0, 0), 15),
    (Ipv4Addr::new(198, 51, 100, 0), 24),
    (Ipv4Addr::new(203, 0, 113, 0), 24),
    (Ipv4Addr::new(224, 0, 0, 0), 4),
    (Ipv4Addr::new(240, 0, 0, 0), 4),
    (Ipv4Addr::new(255, 255, 255, 255), 32),
];
/// The same of IPv6, within 2000::/3: of the rest, nothing is public but what has an IPv4 address in it.
const NOT_PUBLIC_IPV6: [(Ipv6Addr, u32); 4] = [
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23),
    (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32),
    (Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16),
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20),
];

/// Is it an address of the Internet? This host may have one, too: see [`is_local_address`].
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(ip) => {
            let is_in = |(net, length): &(Ipv4Addr, u32)| {
                (u32::from(ip) ^ u32::from(*net)).leading_zeros() >= *length
            };
            !NOT_PUBLIC.iter().any(is_in)
        }
        IpAddr::V6(ip) => {
            let is_in = |(net, length): &(Ipv6Addr, u32)| {
                (u128::from(ip) ^ u128::from(*net)).leading_zeros() >= *length
            };
            let low = ip.to_bits() as u32;
            match ip.segments() {
                // An IPv4 address as an IPv6 one (RFC 4291, 2.5.5.2), and behind NAT64 (RFC 6052, 2.1).
                [0, 0, 0, 0, 0, 0xffff, _, _] | [0x64, 0xff9b, 0, 0, 0, 0, _, _] => {
                    is_public(Ipv4Addr::from_bits(low).into())
                }
                [0x2000..=0x3fff, ..] => !NOT_PUBLIC_IPV6.iter().any(is_in),
                _ => false,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_is_allowed_by_its_name_its_domain_or_its_address_and_only_at_its_port() {
        let allow = [
            "example.com:443",
            "*.example.org:80",
            "10.0.0.1:80",
            "[2001:db8::1]:80",
        ];
        let list = Egress {
            allow: allow.iter().map(|text| text.parse().unwrap()).collect(),
            audit: false,
        };
        for (to, is_allowed) in [
            ("example.com:443", true),
            ("EXAMPLE.com:443", true),
            ("example.com:80", false),
            ("www.example.com:443", false),
            ("a.example.org:80", true),
            ("a.B.example.org:80", true),
            ("a.example.org:443", false),
            ("example.org:80", false),
            ("badexample.org:80", false),
            ("a.example.org.evil.example:80", false),
            ("10.0.0.1:80", true),
            ("10.0.0.1:81", false),
            ("[2001:db8:0::1]:80", true),
            ("[2001:db8::2]:80", false),
        ] {
            assert_eq!(allows(&list, &to.parse().unwrap()), is_allowed, "{to}");
        }
    }

    #[test]
    fn an_address_is_public_if_it_is_in_no_registry_of_special_ones() {
        for (address, is_expected) in [
            ("8.8.8.8", true),
            ("1.0.0.1", true),
            ("11.0.0.0", true),
            ("100.63.255.255", true),
            ("100.128.0.0", true),
            ("172.15.255.255", true),
            ("172.32.0.0", true),
            ("192.0.1.0", true),
            ("168.63.129.15", true),
            ("223.255.255.255", true),
            ("0.0.0.0", false),
            ("10.255.255.255", false),
            ("100.64.0.0", false),
            ("100.100.100.200", false),
            ("127.0.0.1", false),
            ("127.255.255.255", false),
            ("168.63.129.16", false),
            ("169.254.169.254", false),
            ("172.16.0.1", false),
            ("172.31.255.255", false),
            ("192.0.0.192", false),
            ("192.0.2.1", false),
            ("192.168.1.1", false),
            ("198.19.255.255", false),
            ("203.0.113.7", false),
            ("224.0.0.1", false),
            ("240.0.0.1", false),
            ("255.255.255.255", false),
            ("2606:4700::1111", true),
            ("2a00:1450::1", true),
            ("2001:200::1", true),
            ("::", false),
            ("::1", false),
            ("::127.0.0.1", false),
            ("::ffff:8.8.8.8", true),
            ("::ffff:127.0.0.1", false),
            ("::ffff:10.0.0.1", false),
            ("64:ff9b::808:808", true),
            ("64:ff9b::a9fe:a9fe", false),
            ("64:ff9b:1::1", false),
            ("fc00::1", false),
            ("fd00:ec2::254", false),
            ("fe80::1", false),
            ("fec0::1", false),
            ("ff02::1", false),
            ("2001::1", false),
            ("2001:db8::1", false),
            ("2002:7f00:1::", false),
            ("3fff::1", false),
            ("4000::1", false),
        ] {
            assert_eq!(is_public(address.parse().unwrap()), is_expected, "{address}");
        }
    }
}
