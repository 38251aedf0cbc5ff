//! A network of a job's own, with nothing in it but itself and a way to what its slot names.
//!
//! The job's pid 1 listens where the job believes the buildomat server to be, and each of the slot's destinations. Each
//! connection that it accepts it passes to the supervisor, through a socket in a directory that the job cannot see, with the
//! name of the destination; the supervisor passes the bytes on. So the job has no interface, no route and no name service
//! that could lead anywhere else; TLS stays between the job and its server; and the helper needs no firewall rules.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, setsockopt, socket, sockopt,
};
use protocol::config::{BaseUrl, Egress, TO_SERVER};

use crate::sys;
use crate::unprivileged::proxy::ProxyListener;

/// Connections that wait at one address until pid 1 accepts them, as std's listeners have it.
const BACKLOG: i32 = 128;

/// The names of loopback that distributions have in their `/etc/hosts`.
const LOOPBACK4: &str = "localhost localhost.localdomain localhost4 localhost4.localdomain4";
const LOOPBACK6: &str =
    "localhost localhost.localdomain localhost6 localhost6.localdomain6 ip6-localhost ip6-loopback";

/// The job's `/etc/hosts`: the server, the slot's destinations, and the job's own host name as the host has it there, with
/// and without its domain.
pub fn hosts(baseurl: &BaseUrl, egress: &Egress, own: &OsStr) -> String {
    let server = baseurl.name_and_port().map(|(name, _)| name);
    let server = server.filter(|name| name.parse::<Ipv4Addr>().is_err());
    let mut hosts = format!(
        "127.0.0.1 {LOOPBACK4}{}\n::1 {LOOPBACK6}\n",
        server.map(|name| format!(" {name}")).unwrap_or_default()
    );
    let names = egress.names(baseurl);
    for (name, address) in &names {
        if Some(*name) != server {
            hosts += &format!("{address} {name}\n");
        }
    }
    let is_taken = |own: &str| names.iter().any(|(name, _)| own.eq_ignore_ascii_case(name));
    if let Some(own) = as_name(own)
        && !is_taken(own)
    {
        let short = own.split('.').next().filter(|short| !is_taken(short));
        hosts += &match short {
            Some(short) if !["", own].contains(&short) => format!("127.0.0.1 {own} {short}\n"),
            _ => format!("127.0.0.1 {own}\n"),
        };
    }
    hosts
}

/// The host's name, if it is a name. Who names the host is root, and may name it anything (`sethostname(2)`).
pub fn as_name(host: &OsStr) -> Option<&str> {
    let is_in_names = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
    host.to_str()
        .filter(|host| !host.is_empty() && host.bytes().all(is_in_names))
}

/// Leave the host's network for a new one, and listen in it.
pub fn enter(baseurl: &BaseUrl, egress: &Egress, proxy_dir: &OwnedFd) -> Result<ProxyListener> {
    let server = baseurl.address_in_job().context("the server has no name")?;
    unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
    let control = |family| socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None);
    let ipv4 = control(AddressFamily::Inet).context("cannot open a socket")?;
    sys::bring_up_loopback(ipv4.as_fd()).context("cannot bring up the job's loopback")?;
    let mut listeners = vec![(listen(server)?, TO_SERVER.to_owned())];
    let (mut aliases, mut has) = (0, BTreeSet::new());
    for (address, destination) in egress.listeners(baseurl) {
        let added = match address.ip() {
            ip if ip.is_loopback() || !has.insert(ip) => Ok(()),
            IpAddr::V4(ip) => {
                aliases += 1;
                sys::add_loopback_ipv4(ipv4.as_fd(), aliases, ip)
            }
            IpAddr::V6(ip) => control(AddressFamily::Inet6)
                .map_err(std::io::Error::from)
                .and_then(|ipv6| sys::add_loopback_ipv6(ipv6.as_fd(), ip)),
        };
        added.with_context(|| format!("cannot give the job's loopback the address of {destination}"))?;
        listeners.push((listen(address)?, destination));
    }
    Ok(ProxyListener {
        listeners,
        proxy_dir: proxy_dir.try_clone()?,
    })
}

fn listen(address: SocketAddr) -> Result<TcpListener> {
    let listen = || {
        let family = match address {
            SocketAddr::V4(_) => AddressFamily::Inet,
            SocketAddr::V6(_) => AddressFamily::Inet6,
        };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let listener = socket(family, SockType::Stream, flags, None)?;
        // The kernel takes an IPv6 address in a moment after it was added (`addrconf_dad_start` in net/ipv6/addrconf.c).
        setsockopt(&listener, sockopt::IpFreebind, &true)?;
        bind(listener.as_raw_fd(), &SockaddrStorage::from(address))?;
        nix::sys::socket::listen(&listener, Backlog::new(BACKLOG)?)?;
        nix::Result::Ok(listener.into())
    };
    listen().with_context(|| format!("cannot listen on {address} for the job"))
}

#[cfg(test)]
mod tests {
    use protocol::config::Config;

    use super::*;

    #[test]
    fn a_job_without_the_hosts_network_knows_the_server_its_destinations_and_its_own_name() {
        let text = |server: &str, network: &str, own: &str| {
            let config = Config::parse(&format!(
                "[general]\nbaseurl = \"{server}\"\n[factory]\ntoken_file = \"/t\"\n[slots.a]\n\
                 target = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\nnetwork = {network}\n"
            ))
            .unwrap();
            let egress = config.slots.values().next().unwrap().egress.as_ref().unwrap();
            hosts(&config.general.baseurl, egress, OsStr::new(own))
                .replace(LOOPBACK4, "LOOPBACK4")
                .replace(LOOPBACK6, "LOOPBACK6")
        };
        let none = "\"none\"";
        assert_eq!(
            text("https://b.example.com", none, "ci-1"),
            "127.0.0.1 LOOPBACK4 b.example.com\n::1 LOOPBACK6\n127.0.0.1 ci-1\n"
        );
        assert_eq!(
            text("http://127.0.0.1:80", none, "ci-1.example.com"),
            "127.0.0.1 LOOPBACK4\n::1 LOOPBACK6\n127.0.0.1 ci-1.example.com ci-1\n"
        );
        for odd in ["", "a b", "a\n10.0.0.1 x", "#"] {
            assert_eq!(
                text("http://127.0.0.1:80", none, odd),
                "127.0.0.1 LOOPBACK4\n::1 LOOPBACK6\n"
            );
        }
        let some = "{ allow = [\"b.example.com:22\", \"ci-1:80\", \"x.org:80\", \"x.org:443\", \"*.y.org:80\", \"10.0.0.1:80\"] }";
        assert_eq!(
            text("https://b.example.com", some, "CI-1"),
            "127.0.0.1 LOOPBACK4 b.example.com\n::1 LOOPBACK6\n127.64.0.3 ci-1\n127.64.0.4 x.org\n"
        );
    }
}
