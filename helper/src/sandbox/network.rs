//! A network of a job's own, with nothing in it but itself and a way to the buildomat server.
//!
//! The job's pid 1 listens where the job believes the server to be. Each connection that it accepts it hands
//! to the supervisor, through a socket in a directory that the job cannot see; the supervisor passes the
//! bytes on. So the job has no interface, no route and no name service that could lead anywhere else; TLS
//! stays between agent and server; and the helper needs neither firewall rules nor addresses.

use std::ffi::OsStr;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use protocol::config::BaseUrl;

use crate::sys;
use crate::unprivileged::proxy::ProxyListener;

/// The job's `/etc/hosts`: the server and the job's own host name are here, as the host has its own there.
pub fn hosts(baseurl: &BaseUrl, own: &OsStr) -> String {
    let server = match baseurl.name_and_port() {
        Some((name, _)) if name.parse::<Ipv4Addr>().is_err() => format!(" {name}"),
        _ => String::new(),
    };
    let mut hosts = format!("127.0.0.1 localhost{server}\n::1 localhost\n");
    // Who names the host is root, and may name it anything (`sethostname(2)`).
    match own.to_str() {
        Some(own)
            if !own.is_empty()
                && own
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)) =>
        {
            hosts += &format!("127.0.0.1 {own}\n");
        }
        _ => {}
    }
    hosts
}

/// Leave the host's network for a new one, and listen in it.
pub fn enter(baseurl: &BaseUrl, proxy_dir: &OwnedFd) -> Result<ProxyListener> {
    let (name, port) = baseurl.name_and_port().context("the server has no name")?;
    unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
    let control = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .context("cannot open a socket")?;
    sys::bring_up_loopback(control.as_fd()).context("cannot bring up the job's loopback")?;
    let address = name.parse().unwrap_or(Ipv4Addr::LOCALHOST);
    let listener = TcpListener::bind((address, port))
        .with_context(|| format!("cannot listen on {address}:{port} for the job"))?;
    listener.set_nonblocking(true)?;
    Ok(ProxyListener {
        listener,
        proxy_dir: proxy_dir.try_clone()?,
    })
}

#[cfg(test)]
mod tests {
    use protocol::config::Config;

    use super::*;

    #[test]
    fn a_job_without_a_network_knows_the_server_and_its_own_name() {
        let text = |server: &str, own: &str| {
            let config = Config::parse(&format!(
                "[general]\nbaseurl = \"{server}\"\n[factory]\ntoken_file = \"/t\"\n[slots.a]\n\
                 target = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n"
            ));
            hosts(&config.unwrap().general.baseurl, OsStr::new(own))
        };
        assert_eq!(
            text("https://b.example.com", "ci-1"),
            "127.0.0.1 localhost b.example.com\n::1 localhost\n127.0.0.1 ci-1\n"
        );
        assert_eq!(
            text("http://127.0.0.1:80", "ci-1.example.com"),
            "127.0.0.1 localhost\n::1 localhost\n127.0.0.1 ci-1.example.com\n"
        );
        for odd in ["", "a b", "a\n10.0.0.1 x", "#"] {
            assert_eq!(
                text("http://127.0.0.1:80", odd),
                "127.0.0.1 localhost\n::1 localhost\n"
            );
        }
    }
}
