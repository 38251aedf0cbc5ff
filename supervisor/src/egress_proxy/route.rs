//! Which addresses are this host's own: the kernel's routing says so (`rtnetlink(7)`).
//!
//! What the two ends of a connection are called does not: to a second address of an interface, the kernel
//! connects from the first.

use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::libc::{
    AF_INET, AF_INET6, NLM_F_REQUEST, NLMSG_ERROR, RTA_DST, RTM_GETROUTE, RTM_NEWROUTE, RTN_UNICAST,
};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

/// No route, none to that host, and one that prohibits.
const NO_ROUTE: [io::ErrorKind; 3] = [
    io::ErrorKind::NetworkUnreachable,
    io::ErrorKind::HostUnreachable,
    io::ErrorKind::PermissionDenied,
];

/// `struct nlmsghdr` and `struct rtmsg`, in bytes.
const HEADERS: usize = 16 + 12;

/// Would what is sent to this address stay on this host? So it is with each address of its interfaces, and with networks
/// that are routed to itself. Where there is no route it goes nowhere, so it does not stay.
///
/// # Errors
/// Where the kernel does not say.
pub(super) fn is_local_address(address: IpAddr) -> io::Result<bool> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let protocol = SockProtocol::NetlinkRoute;
    let kernel = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
    send(kernel.as_raw_fd(), &request(address), MsgFlags::empty())?;
    // The kernel has answered before `send` returns.
    let mut answer = [0; 4096];
    let length = recv(kernel.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
    match kind_of_route(&answer[..length]) {
        Ok(kind) => Ok(kind != RTN_UNICAST),
        Err(error) if NO_ROUTE.contains(&error.kind()) => Ok(false),
        Err(error) => Err(error),
    }
}

fn request(address: IpAddr) -> Vec<u8> {
    // A socket of IPv6 connects to ::ffff:192.0.2.1 by IPv4 (RFC 4291, 2.5.5.2), whose table has it.
    let (family, bytes) = match address.to_canonical() {
        IpAddr::V4(ip) => (AF_INET, ip.octets().to_vec()),
        IpAddr::V6(ip) => (AF_INET6, ip.octets().to_vec()),
    };
    let attribute = 4 + bytes.len();
    let mut request = Vec::with_capacity(HEADERS + attribute);
    request.extend(((HEADERS + attribute) as u32).to_ne_bytes());
    request.extend(RTM_GETROUTE.to_ne_bytes());
    request.extend((NLM_F_REQUEST as u16).to_ne_bytes());
    // The number of the message, and whose it is.
    request.extend([0; 8]);
    request.extend([family as u8, (bytes.len() * 8) as u8]);
    request.extend([0; 10]);
    request.extend((attribute as u16).to_ne_bytes());
    request.extend(RTA_DST.to_ne_bytes());
    request.extend(bytes);
    request
}

/// `rtm_type` of an answer.
fn kind_of_route(answer: &[u8]) -> io::Result<u8> {
    let garbled = || {
        io::Error::new(
            io::ErrorKind::InvalidData,
            "the kernel's answer about a route is garbled",
        )
    };
    let head = answer.get(..HEADERS).ok_or_else(garbled)?;
    let kind = u16::from_ne_bytes([head[4], head[5]]);
    if kind == RTM_NEWROUTE {
        return Ok(head[16 + 7]);
    }
    if i32::from(kind) == NLMSG_ERROR {
        let errno = i32::from_ne_bytes([head[16], head[17], head[18], head[19]]);
        return Err(Errno::from_raw(-errno).into());
    }
    Err(garbled())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_loopback_interface_has_is_local() {
        for address in ["127.0.0.1", "127.9.9.9", "::ffff:127.0.0.1"] {
            assert!(is_local_address(address.parse().unwrap()).unwrap(), "{address}");
        }
    }

    #[test]
    fn an_error_of_the_kernels_is_said_and_an_answer_that_is_cut_off_is_refused() {
        let mut answer = [0; 36];
        answer[4..6].copy_from_slice(&(NLMSG_ERROR as u16).to_ne_bytes());
        answer[16..20].copy_from_slice(&(-(Errno::ENETUNREACH as i32)).to_ne_bytes());
        let error = kind_of_route(&answer).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NetworkUnreachable);
        let error = kind_of_route(&answer[..20]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
