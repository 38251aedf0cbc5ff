//! The bytes of the kernel's socket diagnosis for Unix sockets (`sock_diag(7)`, `linux/unix_diag.h`): a request for
//! all of them, and what each packet of the answer says. Pure: `sockets` sends and receives.

use anyhow::{Context, Result};

/// `linux/netlink.h`, `linux/sock_diag.h` and `linux/unix_diag.h`.
const NLMSG_HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_DUMP: u16 = 0x300;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const UDIAG_SHOW_NAME: u32 = 0x01;
const UDIAG_SHOW_UID: u32 = 0x40;
const UNIX_DIAG_MSG: usize = 16;
const ATTRIBUTE_HEADER: usize = 4;
const UNIX_DIAG_NAME: u16 = 0;
const UNIX_DIAG_UID: u16 = 7;
/// The two upper bits of an attribute's type are flags.
const ATTRIBUTE_TYPE: u16 = 0x3fff;
/// `net/tcp_states.h`.
const ESTABLISHED: u8 = 1;

/// One Unix socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket<'a> {
    /// Its owner, where the kernel says it (Linux 5.3).
    pub uid: Option<u32>,
    /// What it is bound to, without the zero at the end; empty if it is bound to nothing.
    pub name: &'a [u8],
    /// A stream that has been accepted or has been connected: nobody can connect to it.
    pub is_connected_stream: bool,
}

/// One message of an answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Message<'a> {
    Socket(Socket<'a>),
    /// There is no more.
    Done,
    /// The kernel refuses, with this errno.
    Error(i32),
}

/// Of which states sockets are asked for.
pub const ANY_STATE: u32 = u32::MAX;
pub const NO_STATE: u32 = 0;

/// A request for all Unix sockets of the network namespace in one of these states, with their names and owners.
pub fn request(sequence: u32, states: u32) -> Vec<u8> {
    let header = |length: usize| {
        [
            &(length as u32).to_ne_bytes()[..],
            &SOCK_DIAG_BY_FAMILY.to_ne_bytes(),
            &(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes(),
            &sequence.to_ne_bytes(),
            &0u32.to_ne_bytes(),
        ]
        .concat()
    };
    let body = [
        &[libc::AF_UNIX as u8, 0, 0, 0][..],
        &states.to_ne_bytes(),
        // With any inode.
        &0u32.to_ne_bytes(),
        &(UDIAG_SHOW_NAME | UDIAG_SHOW_UID).to_ne_bytes(),
        &[0; 8],
    ]
    .concat();
    [header(NLMSG_HEADER + body.len()), body].concat()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Split off the first `length` bytes, and the padding to four that may follow them.
fn split(bytes: &[u8], length: usize) -> Option<(&[u8], &[u8])> {
    let first = bytes.get(..length)?;
    let rest = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((first, rest))
}

/// The messages of one packet that answers the request of this sequence number.
///
/// # Errors
/// The packet is not what the kernel's headers say.
pub fn parse(packet: &[u8], sequence: u32) -> Result<Vec<Message<'_>>> {
    let mut messages = Vec::new();
    let mut rest = packet;
    while !rest.is_empty() {
        let (message, more) = parse_one(rest, sequence).context(
            "the kernel's answer about Unix sockets is not understood: report this with `uname -r`",
        )?;
        messages.extend(message);
        rest = more;
    }
    Ok(messages)
}

fn parse_one(bytes: &[u8], sequence: u32) -> Option<(Option<Message<'_>>, &[u8])> {
    let length = u32_at(bytes, 0)? as usize;
    if length < NLMSG_HEADER {
        return None;
    }
    let (message, rest) = split(bytes, length)?;
    let body = &message[NLMSG_HEADER..];
    if u32_at(message, 8)? != sequence {
        return None;
    }
    let message = match u16_at(message, 4)? {
        NLMSG_DONE => Some(Message::Done),
        // The kernel's numbers are negative.
        NLMSG_ERROR => Some(Message::Error((u32_at(body, 0)? as i32).checked_neg()?)),
        SOCK_DIAG_BY_FAMILY => Some(Message::Socket(parse_socket(body)?)),
        // NLMSG_NOOP, and what later kernels may add.
        _ => None,
    };
    Some((message, rest))
}

fn parse_socket(body: &[u8]) -> Option<Socket<'_>> {
    let (fixed, mut attributes) = split(body, UNIX_DIAG_MSG)?;
    let (kind, state) = (i32::from(fixed[1]), fixed[2]);
    let mut socket = Socket {
        uid: None,
        name: &[],
        is_connected_stream: kind != libc::SOCK_DGRAM && state == ESTABLISHED,
    };
    while !attributes.is_empty() {
        let length = usize::from(u16_at(attributes, 0)?);
        let kind = u16_at(attributes, 2)? & ATTRIBUTE_TYPE;
        if length < ATTRIBUTE_HEADER {
            return None;
        }
        let (attribute, rest) = split(attributes, length)?;
        let value = &attribute[ATTRIBUTE_HEADER..];
        match kind {
            // An abstract name begins with a zero, and is none here.
            UNIX_DIAG_NAME => socket.name = value.split(|byte| *byte == 0).next()?,
            UNIX_DIAG_UID => socket.uid = Some(u32_at(value, 0)?),
            _ => {}
        }
        attributes = rest;
    }
    Some(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEQUENCE: u32 = 7;

    fn message(kind: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
        let length = (NLMSG_HEADER + body.len()) as u32;
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(2u16.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([9; 4]);
        bytes.extend(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = ((ATTRIBUTE_HEADER + value.len()) as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn socket(kind: i32, state: u8, attributes: &[Vec<u8>]) -> Vec<u8> {
        let mut body = vec![libc::AF_UNIX as u8, kind as u8, state, 0];
        body.extend([0xff; 12]);
        body.extend(attributes.concat());
        message(SOCK_DIAG_BY_FAMILY, SEQUENCE, &body)
    }

    fn one(bytes: &[u8]) -> Socket<'_> {
        match parse(bytes, SEQUENCE).unwrap()[..] {
            [Message::Socket(socket)] => socket,
            ref other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_request_is_as_long_as_it_says_and_has_what_the_kernel_reads() {
        let bytes = request(SEQUENCE, ANY_STATE);
        assert_eq!(bytes.len(), 40);
        assert_eq!(u32_at(&bytes, 0), Some(40));
        assert_eq!(u16_at(&bytes, 4), Some(20));
        assert_eq!(u16_at(&bytes, 6), Some(0x301));
        assert_eq!(u32_at(&bytes, 8), Some(SEQUENCE));
        assert_eq!(bytes[16..20], [1, 0, 0, 0]);
        assert_eq!(u32_at(&bytes, 20), Some(u32::MAX));
        assert_eq!(u32_at(&bytes, 28), Some(0x41));
    }

    #[test]
    fn a_name_ends_before_its_zero_and_an_abstract_one_is_none() {
        let uid = attribute(UNIX_DIAG_UID, &1234u32.to_ne_bytes());
        for (name, expected) in [
            (&b"/run/a\0"[..], &b"/run/a"[..]),
            (b"/run/ab", b"/run/ab"),
            (b"relative\0", b"relative"),
            (b"/with\nline and space\0", b"/with\nline and space"),
            (b"\0abstract", b""),
            (b"", b""),
        ] {
            let bytes = socket(libc::SOCK_STREAM, 10, &[attribute(0, name), uid.clone()]);
            let parsed = one(&bytes);
            assert_eq!((parsed.name, parsed.uid), (expected, Some(1234)), "{name:?}");
        }
        let none = socket(libc::SOCK_STREAM, 10, &[]);
        assert_eq!((one(&none).name, one(&none).uid), (&b""[..], None));
        // Flags of the type do not matter, nor do attributes that nobody asked for.
        let others = [
            attribute(5, &[1; 36]),
            attribute(0x8000, b"/x\0"),
            attribute(6, &[0]),
        ];
        assert_eq!(one(&socket(libc::SOCK_DGRAM, 7, &others)).name, b"/x");
    }

    #[test]
    fn a_stream_that_is_connected_is_told_from_what_can_be_connected_to() {
        for (kind, state, connected) in [
            (libc::SOCK_STREAM, 1, true),
            (libc::SOCK_SEQPACKET, 1, true),
            (libc::SOCK_DGRAM, 1, false),
            (libc::SOCK_STREAM, 10, false),
            (libc::SOCK_STREAM, 7, false),
        ] {
            let bytes = socket(kind, state, &[]);
            assert_eq!(one(&bytes).is_connected_stream, connected, "{kind} {state}");
        }
    }

    #[test]
    fn a_packet_has_several_messages_and_each_is_of_the_request() {
        let first = socket(libc::SOCK_STREAM, 10, &[attribute(0, b"/a\0")]);
        let done = message(NLMSG_DONE, SEQUENCE, &0u32.to_ne_bytes());
        let noop = message(1, SEQUENCE, b"");
        let error = message(NLMSG_ERROR, SEQUENCE, &(-libc::ENOENT).to_ne_bytes());
        let packet = [first.clone(), noop, error, done.clone()].concat();
        let parsed = parse(&packet, SEQUENCE).unwrap();
        assert_eq!(parsed.len(), 3);
        assert_eq!(parsed[1..], [Message::Error(libc::ENOENT), Message::Done]);
        assert_eq!(parse(&[], SEQUENCE).unwrap(), []);
        assert!(parse(&[first, done].concat(), SEQUENCE + 1).is_err());
    }

    #[test]
    fn whatever_is_cut_off_or_says_a_wrong_length_is_refused_and_never_read_beyond() {
        let attributes = [attribute(0, b"/run/a\0"), attribute(7, &[1, 0, 0, 0])];
        let packet = socket(libc::SOCK_STREAM, 10, &attributes);
        for cut in 1..packet.len() {
            assert!(parse(&packet[..cut], SEQUENCE).is_err(), "{cut}");
        }
        // Every byte, with every value: an error or an answer, and no panic.
        for at in 0..packet.len() {
            for value in 0..=255 {
                let mut spoiled = packet.clone();
                spoiled[at] = value;
                let _ = parse(&spoiled, SEQUENCE);
            }
        }
        for length in [0u32, 15, packet.len() as u32 + 1, u32::MAX] {
            let mut spoiled = packet.clone();
            spoiled[..4].copy_from_slice(&length.to_ne_bytes());
            assert!(parse(&spoiled, SEQUENCE).is_err(), "{length}");
        }
        for length in [0u16, 3, 60, u16::MAX] {
            let mut spoiled = packet.clone();
            spoiled[32..34].copy_from_slice(&length.to_ne_bytes());
            assert!(parse(&spoiled, SEQUENCE).is_err(), "{length}");
        }
        let short = socket(libc::SOCK_STREAM, 10, &[attribute(7, &[1, 0])]);
        assert!(parse(&short, SEQUENCE).is_err());
    }
}
