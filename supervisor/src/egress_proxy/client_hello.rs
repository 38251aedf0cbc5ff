//! The first message of a TLS connection, as far as it says which server it is for (RFC 8446, 4.1.2; RFC 6066, 3).
//!
//! A small and strict reader: what a server might understand in another way is refused. A server may ask for a second
//! such message (`HelloRetryRequest`), in which the name must be the same; that one is not looked at.

/// The longest message with its records, in bytes. Clients send some 300 to 2,000.
pub(super) const MAX: usize = 16 << 10;
/// The most records that it may come in. Clients use one.
const MAX_RECORDS: usize = 16;

const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const SERVER_NAME: u16 = 0;
const HOST_NAME: u8 = 0;
/// `encrypted_client_hello` (RFC 9849), and `encrypted_server_name` before it: the name that counts is not to be seen.
const ENCRYPTED: [u16; 2] = [0xfe0d, 0xffce];

#[derive(Debug, PartialEq, Eq)]
pub(super) enum ClientHello {
    /// So far it is one, and more has to come.
    Incomplete,
    /// It is for the server of this name; None where it names none.
    For(Option<String>),
}

/// Why it is not taken: what is wrong with it.
pub(super) type ParseError = &'static str;

const TRUNCATED: ParseError = "its ClientHello contradicts itself";

/// What these bytes begin with. Others may follow the message.
///
/// # Errors
/// Where this is not the beginning of one, or of one that hides the name.
pub(super) fn read(bytes: &[u8]) -> Result<ClientHello, ParseError> {
    match message(bytes)? {
        Some(message) => server_name(&message).map(ClientHello::For),
        None if bytes.len() < MAX => Ok(ClientHello::Incomplete),
        None => Err("its ClientHello is too long"),
    }
}

/// The message without its records and its own head; None where it is not whole.
fn message(bytes: &[u8]) -> Result<Option<Vec<u8>>, ParseError> {
    let (mut rest, mut fragments, mut length) = (bytes, Vec::new(), 0);
    // Type, version and length of a record (RFC 8446, 5.1).
    while let [kind, major, _, high, low, after @ ..] = rest {
        let size = usize::from(u16::from_be_bytes([*high, *low]));
        if (*kind, *major) != (HANDSHAKE, 3) || size == 0 {
            return Err("it does not begin with a ClientHello");
        }
        if fragments.len() == MAX_RECORDS {
            return Err("its ClientHello is in too many records");
        }
        let Some((fragment, after)) = after.split_at_checked(size) else {
            return Ok(None);
        };
        fragments.push(fragment);
        length += size;
        rest = after;
        // Type and length of the message (RFC 8446, 4).
        let mut head = fragments.iter().copied().flatten().copied();
        let (Some(kind), Some(a), Some(b), Some(c)) = (head.next(), head.next(), head.next(), head.next())
        else {
            continue;
        };
        let wanted = 4 + u32::from_be_bytes([0, a, b, c]) as usize;
        if kind != CLIENT_HELLO || wanted > MAX {
            return Err("it does not begin with a ClientHello of a usual length");
        }
        match length.cmp(&wanted) {
            std::cmp::Ordering::Less => {}
            std::cmp::Ordering::Equal => return Ok(Some(fragments.concat().split_off(4))),
            std::cmp::Ordering::Greater => return Err(TRUNCATED),
        }
    }
    // A beginning that can become no record is refused at once.
    match rest {
        [] | [HANDSHAKE] | [HANDSHAKE, 3, ..] => Ok(None),
        _ => Err("it does not begin with a ClientHello"),
    }
}

fn server_name(message: &[u8]) -> Result<Option<String>, ParseError> {
    let mut rest = Reader(message);
    // The version and the random bytes; a session; suites; compressions.
    rest.take(2 + 32)?;
    rest.vector8()?;
    rest.vector16()?;
    rest.vector8()?;
    if rest.0.is_empty() {
        return Ok(None);
    }
    let mut extensions = Reader(rest.vector16()?);
    rest.end()?;
    let mut name = None;
    while !extensions.0.is_empty() {
        let (kind, data) = (extensions.u16()?, extensions.vector16()?);
        if ENCRYPTED.contains(&kind) {
            return Err("its ClientHello hides the server's name");
        }
        if kind == SERVER_NAME && name.replace(host_name(data)?).is_some() {
            return Err("its ClientHello names servers twice");
        }
    }
    Ok(name)
}

/// A list of names, of which there must be one, of a host.
fn host_name(data: &[u8]) -> Result<String, ParseError> {
    let mut data = Reader(data);
    let mut list = Reader(data.vector16()?);
    data.end()?;
    let (kind, name) = (list.take(1)?[0], list.vector16()?);
    list.end()?;
    match std::str::from_utf8(name) {
        Ok(name) if kind == HOST_NAME && !name.is_empty() && name.bytes().all(|b| b.is_ascii_graphic()) => {
            Ok(name.to_ascii_lowercase())
        }
        _ => Err("its ClientHello has something else for the server's name"),
    }
}

/// What is left of a message.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], ParseError> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(TRUNCATED)?;
        self.0 = rest;
        Ok(taken)
    }

    fn u16(&mut self) -> Result<u16, ParseError> {
        let two = self.take(2)?;
        Ok(u16::from_be_bytes([two[0], two[1]]))
    }

    /// A vector with its length in one byte before it.
    fn vector8(&mut self) -> Result<&'a [u8], ParseError> {
        let length = self.take(1)?[0];
        self.take(length.into())
    }

    /// The same with a length of two bytes.
    fn vector16(&mut self) -> Result<&'a [u8], ParseError> {
        let length = self.u16()?;
        self.take(length.into())
    }

    fn end(&self) -> Result<(), ParseError> {
        if self.0.is_empty() { Ok(()) } else { Err(TRUNCATED) }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    fn vector8(bytes: &[u8]) -> Vec<u8> {
        [&[bytes.len() as u8], bytes].concat()
    }

    fn vector16(bytes: &[u8]) -> Vec<u8> {
        [&(bytes.len() as u16).to_be_bytes(), bytes].concat()
    }

    fn extension(kind: u16, data: &[u8]) -> Vec<u8> {
        [&kind.to_be_bytes()[..], &vector16(data)].concat()
    }

    fn named(name: &str) -> Vec<u8> {
        let name = [&[HOST_NAME][..], &vector16(name.as_bytes())].concat();
        extension(SERVER_NAME, &vector16(&name))
    }

    fn records(message: &[u8], size: usize) -> Vec<u8> {
        let record = |part: &[u8]| [&[HANDSHAKE, 3, 1][..], &vector16(part)].concat();
        message.chunks(size).flat_map(record).collect()
    }

    fn whole(extensions: &[Vec<u8>]) -> Vec<u8> {
        let body = [
            &[3, 3][..],
            &[7; 32],
            &vector8(&[9; 32]),
            &vector16(&[0x13, 1, 0x13, 2]),
            &vector8(&[0]),
            &vector16(&extensions.concat()),
        ]
        .concat();
        let length = (body.len() as u32).to_be_bytes();
        [&[CLIENT_HELLO][..], &length[1..], &body].concat()
    }

    /// A client's first bytes, for a server of this name.
    pub(in super::super) fn client_hello(name: &str) -> Vec<u8> {
        records(
            &whole(&[
                extension(43, &[2, 3, 4]),
                named(name),
                extension(10, &[0, 2, 0, 29]),
            ]),
            MAX,
        )
    }

    fn for_name(name: &str) -> Result<ClientHello, ParseError> {
        Ok(ClientHello::For(Some(name.into())))
    }

    #[test]
    fn the_name_is_returned_when_the_message_is_whole_and_not_before() {
        let bytes = client_hello("Build.Example");
        for length in 0..bytes.len() {
            assert_eq!(read(&bytes[..length]), Ok(ClientHello::Incomplete), "{length}");
        }
        assert_eq!(read(&bytes), for_name("build.example"));
        // What follows it is the server's affair.
        assert_eq!(read(&[&bytes[..], b"more"].concat()), for_name("build.example"));
        let none = records(&whole(&[extension(43, &[2, 3, 4])]), MAX);
        assert_eq!(read(&none), Ok(ClientHello::For(None)));
    }

    #[test]
    fn a_message_in_a_few_records_is_one_message() {
        let message = whole(&[named("a.example")]);
        let bytes = records(&message, message.len() / 10 + 1);
        assert_eq!(read(&bytes), for_name("a.example"));
        assert_eq!(read(&bytes[..bytes.len() - 1]), Ok(ClientHello::Incomplete));
        let refused = read(&records(&message, 2));
        assert!(refused.unwrap_err().contains("too many records"));
    }

    #[test]
    fn what_another_reader_might_understand_in_another_way_is_refused() {
        let two = [named("a.example"), named("b.example")];
        let list = [vec![HOST_NAME], vector16(b"a"), vec![HOST_NAME], vector16(b"b")].concat();
        let mut longer = whole(&[named("a.example")]);
        longer.push(0);
        let mut trailing = whole(&[named("a.example")]);
        trailing.push(0);
        trailing[3] += 1;
        for (what, bytes) in [
            ("two extensions", records(&whole(&two), MAX)),
            (
                "two names",
                records(&whole(&[extension(SERVER_NAME, &vector16(&list))]), MAX),
            ),
            (
                "no name in the list",
                records(&whole(&[extension(SERVER_NAME, &vector16(&[]))]), MAX),
            ),
            ("an empty name", records(&whole(&[named("")]), MAX)),
            (
                "a name with a NUL",
                records(&whole(&[named("a.example\0.b.example")]), MAX),
            ),
            (
                "encrypted",
                records(&whole(&[named("a.example"), extension(0xfe0d, &[0; 9])]), MAX),
            ),
            (
                "encrypted, as it once was",
                records(&whole(&[extension(0xffce, &[])]), MAX),
            ),
            ("more in its record", records(&longer, MAX)),
            ("more in its body", records(&trailing, MAX)),
            ("plain HTTP", b"GET / HTTP/1.1\r\n".to_vec()),
            ("SSL 2", vec![0x80, 0x2e, 1, 0, 2]),
            ("another record", vec![23, 3, 3, 0, 1, 0]),
            ("another message", records(&[2, 0, 0, 0], MAX)),
            ("an empty record", vec![HANDSHAKE, 3, 1, 0, 0]),
            (
                "a message of gigabytes",
                records(&[CLIENT_HELLO, 0xff, 0xff, 0xff], MAX),
            ),
        ] {
            assert!(read(&bytes).is_err(), "{what}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_are_read_beyond_their_end(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = read(&bytes);
            let _ = server_name(&bytes);
        }

        #[test]
        fn a_message_with_a_changed_byte_is_for_one_name_at_most(at in 0_usize..200, byte: u8) {
            let mut bytes = client_hello("build.example");
            let at = at % bytes.len();
            bytes[at] = byte;
            // Whatever comes of it, there is an answer.
            if let Ok(ClientHello::For(Some(name))) = read(&bytes) {
                prop_assert!(!name.is_empty());
            }
        }
    }
}
