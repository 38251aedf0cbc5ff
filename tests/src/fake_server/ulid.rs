//! Ids and secrets, as the server hands them out.

use std::io::Read;

use jiff::Timestamp;
use supervisor::backoff::Rng;

/// Any of the server's ids: each is a ULID, and nothing here has to tell a job's from a worker's.
pub use protocol::WorkerId as Ulid;

/// Where ids and secrets come from: from one seed always the same ones.
#[derive(Clone, Debug)]
pub struct IdGenerator(Rng);

impl IdGenerator {
    /// The same ids and secrets each time, in the same order.
    pub fn of_seed(seed: u64) -> IdGenerator {
        IdGenerator(Rng::new(seed))
    }

    pub(crate) fn new() -> IdGenerator {
        let mut seed = [0; 8];
        std::fs::File::open("/dev/urandom")
            .and_then(|mut f| f.read_exact(&mut seed))
            .expect("/dev/urandom must be readable");
        IdGenerator::of_seed(u64::from_ne_bytes(seed))
    }

    /// The bits of an id made now: 48 of milliseconds, 80 random ones.
    pub fn id_bits(&mut self, now: Timestamp) -> u128 {
        let ms = u128::try_from(now.as_millisecond()).unwrap_or(0) & ((1 << 48) - 1);
        ms << 80 | u128::from(self.0.draw()) << 16 | u128::from(self.0.draw() as u16)
    }

    /// A token of 64 letters and digits.
    pub fn secret(&mut self) -> String {
        const LETTERS: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
        let letter = |_| char::from(LETTERS[self.0.draw() as usize % LETTERS.len()]);
        (0..64).map(letter).collect()
    }
}

impl Default for IdGenerator {
    fn default() -> IdGenerator {
        IdGenerator::new()
    }
}

/// An id of its own, in no server's order.
pub fn fresh_id() -> Ulid {
    Ulid::from_bits(IdGenerator::new().id_bits(Timestamp::now()))
}

/// A token of 64 letters and digits, from a seed of its own.
pub fn secret() -> String {
    IdGenerator::new().secret()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_64_letters_and_digits_and_a_seed_gives_it_again() {
        let s = secret();
        assert!(s.len() == 64 && s.bytes().all(|b| b.is_ascii_alphanumeric()));
        assert_ne!(s, secret());
        let [one, again] = [(); 2].map(|()| IdGenerator::of_seed(1).secret());
        assert_eq!(one, again);
    }
}
