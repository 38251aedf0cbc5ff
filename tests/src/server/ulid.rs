//! ULIDs and random secrets, as the server hands them out. Nothing here knows what an id stands for.

use std::fmt;
use std::io::Read;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";

/// 48 bits of milliseconds, 80 of chance; printed as 26 characters of upper-case Crockford base32.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ulid(u128);

impl Ulid {
    pub fn generate(now: jiff::Timestamp) -> Ulid {
        let ms = u128::try_from(now.as_millisecond()).unwrap_or(0) & ((1 << 48) - 1);
        let mut chance = [0; 16];
        chance[6..].copy_from_slice(&random::<10>());
        Ulid((ms << 80) | u128::from_be_bytes(chance))
    }

    /// The smallest id after this one: keeps ids of one millisecond in the order of their making.
    pub fn next(self) -> Ulid {
        Ulid(self.0 + 1)
    }
}

/// A token of 64 letters and digits.
pub fn secret() -> String {
    random::<64>()
        .iter()
        .map(|b| char::from(ALPHABET[usize::from(b % 32)]))
        .collect()
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut bytes))
        .expect("/dev/urandom must be readable");
    bytes
}

impl fmt::Display for Ulid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (0..26).rev().try_for_each(|i| {
            fmt::Write::write_char(f, char::from(ALPHABET[(self.0 >> (5 * i)) as usize & 31]))
        })
    }
}

impl fmt::Debug for Ulid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[derive(Debug, PartialEq, Eq)]
pub struct NotAUlid;

impl fmt::Display for NotAUlid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a ULID: 26 characters of upper-case Crockford base32 are wanted")
    }
}

impl std::error::Error for NotAUlid {}

impl FromStr for Ulid {
    type Err = NotAUlid;

    fn from_str(s: &str) -> Result<Ulid, NotAUlid> {
        // 26 characters hold 130 bits, so the first may not go past 7.
        if s.len() != 26 || s.as_bytes()[0] > b'7' {
            return Err(NotAUlid);
        }
        s.bytes()
            .try_fold(0u128, |n, b| {
                let digit = ALPHABET.iter().position(|a| *a == b).ok_or(NotAUlid)?;
                Ok(n << 5 | digit as u128)
            })
            .map(Ulid)
    }
}

impl Serialize for Ulid {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Ulid {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Ulid, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ulid_survives_print_and_parse() {
        let id = Ulid::generate(jiff::Timestamp::now());
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(id.to_string().len(), 26);
    }

    #[test]
    fn only_upper_case_crockford_is_a_ulid() {
        for bad in [
            "",
            "01H",
            "81HZZZZZZZZZZZZZZZZZZZZZZZ",
            "01hzzzzzzzzzzzzzzzzzzzzzzz",
            "01HZZZZZZZZZZZZZZZZZZZZZZU",
        ] {
            assert_eq!(bad.parse::<Ulid>(), Err(NotAUlid), "{bad}");
        }
    }

    #[test]
    fn a_secret_is_64_letters_and_digits() {
        let s = secret();
        assert!(s.len() == 64 && s.bytes().all(|b| b.is_ascii_alphanumeric()));
        assert_ne!(s, secret());
    }
}
