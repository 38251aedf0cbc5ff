//! Messages to bytes and back: bincode 2, little endian, variable-length integers, behind two functions.
//! A limit stands before every allocation, and a message must be the whole packet.
//!
//! | what | on the wire |
//! | --- | --- |
//! | which message, which kind of error, which state | its place in the `enum`, beginning with 0: a number |
//! | a number | up to 250: one byte. Else 251, 252 or 253, and its 2, 4 or 8 bytes, the lowest first; the fewest that do |
//! | a number of 8 bits in an [`Exit`](crate::Exit), a `bool` | one byte |
//! | a worker's id | 16 bytes, the highest first |
//! | a text, a list | its length as a number, and what is in it |
//! | an `Option` | 0, or 1 and what is in it |
//! | a message, a `struct`, a variant | its fields in the order in which they are declared, with nothing between or after |
//!
//! ```
//! use protocol::{Request, WorkerId, wire};
//!
//! let worker: WorkerId = "01HZX3N8Q4J5W56M9W8969S0XP".parse()?;
//! let create = Request::CreateUser { worker, slot: "s-1".parse()? };
//! let packet = wire::encode(&create)?;
//! assert_eq!(packet[0], 1); // the second of the requests
//! assert_eq!(packet[1..17], 0x018f_fa3a_a2e4_9178_5351_3c42_4c9c_83b6_u128.to_be_bytes());
//! assert_eq!(packet[17..], *b"\x03s-1");
//! assert_eq!(wire::decode::<Request>(&packet)?, create);
//!
//! // Cut, longer, or with something in it that is no slot's name, it is no request.
//! assert!(wire::decode::<Request>(&packet[..20]).is_err());
//! assert!(wire::decode::<Request>(&[&packet[..], b"!"].concat()).is_err());
//! assert!(wire::decode::<Request>(&[&packet[..18], b"../"].concat()).is_err());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::BadValue;

/// The longest request, in bytes.
pub const MAX_REQUEST: usize = 512;

/// The longest reply, in bytes: a full [`Reply::Listed`](crate::Reply::Listed) fits.
pub const MAX_REPLY: usize = 32 << 10;

const CONFIG: bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Varint,
    bincode::config::Limit<MAX_REPLY>,
> = bincode::config::standard().with_limit::<MAX_REPLY>();

/// A message's bytes.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, BadValue> {
    let bytes = bincode::serde::encode_to_vec(message, CONFIG).map_err(|e| BadValue(e.to_string()))?;
    if bytes.len() > MAX_REPLY {
        return Err(BadValue(format!(
            "a message of {} bytes is over the limit of {MAX_REPLY}",
            bytes.len()
        )));
    }
    Ok(bytes)
}

/// The message that `packet` is, all of it, in its canonical encoding: a number that takes more bytes than it needs is
/// refused, like a packet that goes on after the message.
pub fn decode<T: Serialize + DeserializeOwned>(packet: &[u8]) -> Result<T, BadValue> {
    let (message, used) =
        bincode::serde::decode_from_slice(packet, CONFIG).map_err(|e| BadValue(e.to_string()))?;
    if used != packet.len() {
        return Err(BadValue(format!(
            "{} bytes are left over after the message",
            packet.len() - used
        )));
    }
    if encode(&message)? != packet {
        return Err(BadValue(
            "the message is not in its canonical encoding: its numbers are longer than need be".into(),
        ));
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::*;
    use proptest::prelude::*;

    const WORKER: &str = "01HZX3N8Q4J5W56M9W8969S0XP";
    const WORKER_BYTES: &str = "018ffa3aa2e4917853513c424c9c83b6";

    fn requests() -> Vec<(Request, &'static str)> {
        let worker = WORKER.parse().unwrap();
        vec![
            (Request::Hello { version: 2 }, "0002"),
            (
                Request::CreateUser {
                    worker,
                    slot: "s-1".parse().unwrap(),
                },
                "01<id>03732d31",
            ),
            (
                Request::InstallAgent {
                    worker,
                    bootstrap: "abcdefgh01234567".parse().unwrap(),
                },
                "02<id>1061626364656667683031323334353637",
            ),
            (Request::Attach { worker }, "03<id>"),
            (Request::Kill { worker }, "04<id>"),
            (Request::Delete { worker }, "05<id>"),
            (Request::List { after: None }, "0600"),
            (Request::List { after: Some(worker) }, "0601<id>"),
            (Request::Check, "07"),
        ]
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    #[test]
    fn the_bytes_of_each_request_are_fixed() {
        for (request, golden) in requests() {
            let bytes = encode(&request).unwrap();
            assert_eq!(hex(&bytes), golden.replace("<id>", WORKER_BYTES), "{request:?}");
            assert!(bytes.len() <= MAX_REQUEST);
            assert_eq!(decode::<Request>(&bytes).unwrap(), request);
        }
    }

    #[test]
    fn cut_or_padded_packets_do_not_decode() {
        for (request, _) in requests() {
            let mut bytes = encode(&request).unwrap();
            for len in 0..bytes.len() {
                assert!(
                    decode::<Request>(&bytes[..len]).is_err(),
                    "{request:?} cut to {len}"
                );
            }
            bytes.push(0);
            assert!(decode::<Request>(&bytes).is_err(), "{request:?} with a byte more");
        }
    }

    #[test]
    fn a_message_is_as_long_as_the_limit_or_shorter() {
        // Three bytes say how long the text is.
        let longest = "x".repeat(MAX_REPLY - 3);
        assert_eq!(encode(&longest).unwrap().len(), MAX_REPLY);
        let error = encode(&(longest + "x")).unwrap_err().to_string();
        assert!(
            error.contains("32769 bytes is over the limit of 32768"),
            "{error}"
        );
        let error = decode::<Request>(&[0, 3, 0]).unwrap_err().to_string();
        assert!(error.starts_with("1 bytes are left over"), "{error}");
    }

    #[test]
    fn a_message_has_one_encoding() {
        // 125 fits into a byte; 251 says that two bytes follow.
        assert!(decode::<Request>(&[0, 125]).is_ok());
        assert!(decode::<Request>(&[0, 251, 125, 0]).is_err());
        // A list of no workers, whose number takes nine bytes.
        assert!(decode::<Reply>(&[7, 0, 0]).is_ok());
        assert!(decode::<Reply>(&[7, 253, 0, 0, 0, 0, 0, 0, 0, 0, 0]).is_err());
    }

    #[test]
    fn the_longest_list_fits_into_a_reply() {
        let info = WorkerInfo {
            worker: WorkerId::from_bits(u128::MAX),
            slot: "a".repeat(32).parse().unwrap(),
            uid: Uid::try_from(i32::MAX as u32).unwrap(),
            state: State::Exited(Exit::Signal(255)),
            disk: Some(u64::MAX),
        };
        let reply = Reply::Listed {
            workers: vec![info; MAX_LIST],
            more: true,
        };
        assert!(encode(&reply).is_ok());
        let error = Reply::Error(Error::new(ErrorKind::Failed, "é\n".repeat(9999)));
        assert!(encode(&error).unwrap().len() < MAX_REPLY);
    }

    proptest! {
        #[test]
        fn random_packets_never_panic_and_never_mean_two_things(packet: Vec<u8>) {
            if let Ok(request) = decode::<Request>(&packet) {
                prop_assert_eq!(encode(&request).unwrap(), &packet[..]);
            }
            if let Ok(reply) = decode::<Reply>(&packet) {
                prop_assert_eq!(encode(&reply).unwrap(), packet);
            }
        }

        #[test]
        fn flipped_bits_never_panic(which in 0usize..8, bit in 0usize..2048) {
            let mut bytes = encode(&requests()[which].0).unwrap();
            let at = bit % (bytes.len() * 8);
            bytes[at / 8] ^= 1 << (at % 8);
            let _ = decode::<Request>(&bytes);
        }
    }
}
