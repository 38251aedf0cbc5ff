//! Why a call was not carried out, for the core: whom it was to, one sentence, and whether a repetition can help.

use std::fmt;

/// What a call is made to: the buildomat server, the helper, or the supervisor's own database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Peer {
    Server,
    Helper,
    Database,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Peer::Server => "server",
            Peer::Helper => "helper",
            Peer::Database => "database",
        })
    }
}

/// Why a call was not carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallError {
    pub peer: Peer,
    /// The peer understood and refused: a repetition does not help.
    pub refused: bool,
    /// The server answered 401: the token may be wrong.
    pub unauthorised: bool,
    /// What the server asks to wait before the next call, in milliseconds (`Retry-After`, RFC 9110).
    pub retry_after: Option<u64>,
    /// One sentence for the operator.
    pub sentence: String,
}

impl CallError {
    pub fn temporary(peer: Peer, sentence: impl fmt::Display) -> Self {
        Self {
            peer,
            refused: false,
            unauthorised: false,
            retry_after: None,
            sentence: sentence.to_string(),
        }
    }

    pub fn refused(peer: Peer, sentence: impl fmt::Display) -> Self {
        Self {
            peer,
            refused: true,
            unauthorised: false,
            retry_after: None,
            sentence: sentence.to_string(),
        }
    }
}
