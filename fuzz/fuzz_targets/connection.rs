//! A connection to the helper: packets and descriptors, well formed and not, over a real socket to the real
//! dispatcher, with the contract's model in place of a host. Exact answers up to the packet at which the helper must
//! close the connection, none before the greeting, and no descriptor left.

#![no_main]

use conversation::{Conversation, check_conversation};
use libfuzzer_sys::fuzz_target;

#[path = "../../helper/tests/dispatcher/conversation.rs"]
mod conversation;

fuzz_target!(|bytes: &[u8]| check_conversation(&Conversation::from(bytes)));
