//! What the helper reads of its own writing: a worker's record and its agent's end from the disk, which may be
//! spoiled, and the requests and handshake messages among its processes. Each is whole, or it is none.

#![no_main]

use std::cell::OnceCell;

use helper::{HandshakeMessage, MonitorRequest, Record, parse_exit, print_exit};
use libfuzzer_sys::fuzz_target;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use protocol::{Exit, Received, Seqpacket};

thread_local! {
    static PAIR: OnceCell<(Seqpacket, Seqpacket)> = const { OnceCell::new() };
}

/// The message as the other end receives it.
fn received(message: &HandshakeMessage) -> Option<HandshakeMessage> {
    PAIR.with(|pair| {
        let (from, to) = pair.get_or_init(|| {
            let (a, b) = socketpair(
                AddressFamily::Unix,
                SockType::SeqPacket,
                None,
                SockFlag::SOCK_CLOEXEC,
            )
            .unwrap();
            (a.into(), b.into())
        });
        message.send_to(from).unwrap();
        match to.recv(HandshakeMessage::MAX).unwrap() {
            Received::Packet { bytes, .. } => HandshakeMessage::decode(&bytes),
            _ => None,
        }
    })
}

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = str::from_utf8(data) {
        if let Some(record) = Record::parse(text) {
            assert_eq!(record.print(), text, "a record with another spelling");
        }
        let exit = parse_exit(text);
        if exit != Exit::Unknown {
            // The first line counts.
            let line = text.split_inclusive('\n').next().unwrap_or_default();
            assert_eq!(print_exit(exit), line, "an end with another spelling");
        }
    }
    if let Some(request) = MonitorRequest::decode(data) {
        assert_eq!(request.encode(), data, "a request with another spelling");
        assert!(data.len() <= MonitorRequest::MAX);
    }
    if let Some(message) = HandshakeMessage::decode(data) {
        match (received(&message), &message) {
            // A sentence is cut where the packet ends.
            (Some(HandshakeMessage::Failed(received)), HandshakeMessage::Failed(sent))
            | (Some(HandshakeMessage::Busy(received)), HandshakeMessage::Busy(sent))
                if sent.len() >= HandshakeMessage::MAX =>
            {
                assert!(!received.is_empty());
            }
            (received, _) => assert_eq!(received.as_ref(), Some(&message)),
        }
    }
});
