//! Which sockets a job may make, and which of their options it may set. Pure.
//!
//! Family, type and protocol are checked together: the kernel loads a module for any combination that it does not know,
//! whoever asks (`net-pf-2-proto-132-type-1` and the like), and most of these modules are used by nobody.

use std::collections::BTreeMap;

use protocol::config::SocketFamily;

use super::program::{ALLOW, DONE, JobFilter, Steps, answer, argument, decide, errno, if_any};

/// What `socket(2)` says of a family that the kernel does not have; programs go on without it.
const NO_FAMILY: u32 = errno(libc::EAFNOSUPPORT);
/// The same of a protocol: Go's and others' Multipath TCP, audit and SCTP fall back on it.
const NO_PROTOCOL: u32 = errno(libc::EPROTONOSUPPORT);
/// What `setsockopt(2)` says of an option that the kernel does not have.
const NO_OPTION: u32 = errno(libc::ENOPROTOOPT);

/// The kernel's mask: above it are SOCK_NONBLOCK and SOCK_CLOEXEC.
const TYPE: u32 = 0xf;

/// Protocols of netlink that ordinary programs ask: addresses and routes, `ss`, SELinux, devices that come and go.
const NETLINK: [i32; 4] = [
    libc::NETLINK_ROUTE,
    libc::NETLINK_INET_DIAG,
    libc::NETLINK_SELINUX,
    libc::NETLINK_KOBJECT_UEVENT,
];

/// Those that load a module by any name or set up a firewall. In a network namespace of its own a job may need them:
/// container runtimes do.
const NETLINK_OF_NAMESPACES: [i32; 2] = [libc::NETLINK_NETFILTER, libc::NETLINK_GENERIC];

/// `linux/can.h`: raw frames, the broadcast manager, ISO-TP, J1939.
const CAN: [i32; 4] = [libc::CAN_RAW, libc::CAN_BCM, libc::CAN_ISOTP, libc::CAN_J1939];
/// `net/bluetooth/bluetooth.h`: L2CAP, HCI, SCO, RFCOMM, ISO.
const BLUETOOTH: [i32; 5] = [0, 1, 2, 3, 8];

fn any_of(protocols: &[i32]) -> Steps {
    let protocols: Vec<u32> = protocols.iter().map(|protocol| *protocol as u32).collect();
    if_any(2, &protocols, answer(ALLOW), answer(NO_PROTOCOL))
}

/// Of IPv4 or IPv6, the protocols of datagrams besides 0 and UDP: `ping` without privileges.
fn internet(echo: i32) -> Steps {
    let types = BTreeMap::from([
        (libc::SOCK_STREAM as u32, any_of(&[0, libc::IPPROTO_TCP])),
        (libc::SOCK_DGRAM as u32, any_of(&[0, libc::IPPROTO_UDP, echo])),
        // Any protocol is the same code, which asks for CAP_NET_RAW.
        (libc::SOCK_RAW as u32, answer(ALLOW)),
    ]);
    // SOCK_PACKET (10) among the others is AF_PACKET by another name.
    decide(argument(1), TYPE, types, answer(NO_PROTOCOL))
}

/// The rule for `socket(2)` and `socketpair(2)`.
pub(super) fn rule(slot: JobFilter<'_>) -> Steps {
    let netlink = if slot.allow_user_namespaces {
        [&NETLINK[..], &NETLINK_OF_NAMESPACES].concat()
    } else {
        NETLINK.into()
    };
    let mut families = BTreeMap::from([
        (libc::AF_UNIX as u32, answer(ALLOW)),
        (libc::AF_INET as u32, internet(libc::IPPROTO_ICMP)),
        (libc::AF_INET6 as u32, internet(libc::IPPROTO_ICMPV6)),
        (libc::AF_NETLINK as u32, any_of(&netlink)),
    ]);
    for family in slot.socket_families {
        let (number, protocols) = match family {
            SocketFamily::Bluetooth => (libc::AF_BLUETOOTH, &BLUETOOTH[..]),
            SocketFamily::Can => (libc::AF_CAN, &CAN[..]),
            SocketFamily::Vsock => (libc::AF_VSOCK, &[0][..]),
        };
        families.insert(number as u32, any_of(protocols));
    }
    decide(argument(0), u32::MAX, families, answer(NO_FAMILY))
}

/// The rule for `setsockopt(2)`: no BPF program on a socket. Thousands of them, freed at once, have stopped a kernel
/// (its work queue waited for itself), and no limit counts them.
///
/// Classic ones are answered as if they were attached, and detached. libudev, and so libusb, cannot start without one;
/// it looks at each message again itself.
pub(super) fn options() -> Steps {
    let options = BTreeMap::from([
        (libc::SO_ATTACH_FILTER as u32, answer(DONE)),
        (libc::SO_DETACH_FILTER as u32, answer(DONE)),
        (libc::SO_ATTACH_BPF as u32, answer(NO_OPTION)),
        (libc::SO_ATTACH_REUSEPORT_CBPF as u32, answer(NO_OPTION)),
        (libc::SO_ATTACH_REUSEPORT_EBPF as u32, answer(NO_OPTION)),
    ]);
    let of_sockets = decide(argument(2), u32::MAX, options, answer(ALLOW));
    if_any(1, &[libc::SOL_SOCKET as u32], of_sockets, answer(ALLOW))
}
