//! A packet from the other end, whichever end that is: it is one message in its canonical encoding, or none.

#![no_main]

use std::fmt::Debug;

use libfuzzer_sys::fuzz_target;
use protocol::wire::{MAX_REPLY, MAX_REQUEST, decode, encode};
use protocol::{Reply, Request};
use serde::Serialize;
use serde::de::DeserializeOwned;

fn read<T: Debug + PartialEq + Serialize + DeserializeOwned>(packet: &[u8], limit: usize) -> Option<T> {
    let message: T = match decode(packet) {
        Ok(message) => message,
        Err(why) => {
            // It goes to the log.
            let sentence = why.to_string();
            assert!(!sentence.is_empty() && sentence.len() < 1024, "{sentence}");
            assert!(!sentence.contains(char::is_control), "{sentence:?}");
            return None;
        }
    };
    assert_eq!(
        encode(&message).unwrap(),
        packet,
        "{message:?} has another encoding"
    );
    assert!(packet.len() <= limit, "{message:?} is longer than any packet");
    Some(message)
}

fuzz_target!(|packet: &[u8]| {
    if let Some(request) = read::<Request>(packet, MAX_REQUEST) {
        assert!(!format!("{request:?}").contains(char::is_control));
    }
    if let Some(Reply::Listed { workers, .. }) = read::<Reply>(packet, MAX_REPLY) {
        for worker in workers {
            assert!(worker.uid.get() >= 1000 && !worker.slot.as_str().contains(['/', '.']));
        }
    }
});
