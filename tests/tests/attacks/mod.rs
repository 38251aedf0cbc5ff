//! Attacks, made for real: by a hostile job from inside its sandbox, by a hostile client at the helper's
//! socket, by other users of the host. Each test asserts that the attempt failed and that nothing was left;
//! its name begins with its row in docs/evidence/attacks.md. Needs root.

mod calls;
mod canaries;
mod cleanup;
mod connections;
mod controllers;
mod descriptors;
mod egress_proxy;
mod escalation;
mod exhaustion;
mod isolation;
mod kernel_objects;
mod leftovers;
mod neighbours;
mod network_list;
mod network_load;
mod packets;
mod programs;
mod quotas;
mod rootfs;
mod shells;
mod status_page;
mod supervisor;
mod swapper;
mod tokens;

use protocol::{Request, VERSION};

/// The first request of a connection, as the supervisor sends it.
const HELLO: Request = Request::Hello { version: VERSION };
/// A user of the host who has nothing to do with the factory.
const SOMEBODY: u32 = 0x6fff_0001;
/// What the test's own program finds in its environment when it is to be another user.
const SOCKET: &str = "USER_FACTORY_TEST_SOCKET";
