//! What the helper reads of its own writing: a worker's record and its agent's end from the disk, which may be
//! spoiled, and the requests and handshake messages among its processes. Each is whole, or it is none.

#![no_main]

use helper::{HandshakeMessage, MonitorRequest, Record, parse_exit, print_exit};
use libfuzzer_sys::fuzz_target;
use protocol::{Error, Exit, wire};

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = str::from_utf8(data) {
        if let Some(record) = Record::parse(text) {
            assert_eq!(record.print(), text, "a record with another encoding");
        }
        let exit = parse_exit(text);
        if exit != Exit::Unknown {
            // The first line counts.
            let line = text.split_inclusive('\n').next().unwrap_or_default();
            assert_eq!(print_exit(exit), line, "an end with another encoding");
        }
    }
    if let Some(request) = MonitorRequest::from_bytes(data) {
        assert_eq!(request.to_bytes(), data, "a request with another encoding");
        assert!(data.len() <= MonitorRequest::MAX);
    }
    if let Ok(HandshakeMessage::Failed(error)) = wire::decode(data) {
        // Whatever its sender has made of it, what is forwarded is bounded and one line.
        let forwarded = Error::new(error.kind, error);
        assert!(forwarded.message().len() <= Error::MAX_MESSAGE);
        assert!(!forwarded.message().contains(char::is_control));
    }
});
