//! Who may have how many of this process's file descriptors. What jobs and other clients can make many has a bound of
//! its own, so that leasing, the helper's socket and the database always have theirs.

use nix::libc::rlim_t;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// For all that is not below: the database, the helper, the buildomat server, agents.
const OTHERS: rlim_t = 256;
/// Connections to the control socket: each may have the helper's socket and a console, too.
pub const CONTROL_CONNECTIONS: usize = 128;
const OF_CONTROL: rlim_t = 3 * CONTROL_CONNECTIONS as rlim_t;
/// Connections to `factory.status_address`.
pub const STATUS_CONNECTIONS: usize = 64;
/// What the egress proxy has refused or is done with, and has not closed yet.
pub const MAX_PENDING_CLOSES: usize = 256;
/// Each connection through the egress proxy has the client's, the job's and the server's socket.
const OF_PROXIED: rlim_t = 3;
/// More connections through the egress proxy are of no use: it raises the limit for no more.
const MAX_PROXIED: rlim_t = 64 << 10;

/// How many connections there may be through the egress proxy, within this limit of open files.
fn proxied_within(limit: rlim_t) -> usize {
    let taken = OTHERS + OF_CONTROL + STATUS_CONNECTIONS as rlim_t + MAX_PENDING_CLOSES as rlim_t;
    let left = limit.saturating_sub(taken) / OF_PROXIED;
    usize::try_from(left.clamp(1, MAX_PROXIED)).unwrap_or(1)
}

/// Raise the limit of open files as far as it is ours to raise (`getrlimit(2)`), and say how many connections there may be
/// through the egress proxy.
pub fn proxied_connections() -> usize {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return proxied_within(0);
    };
    match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => proxied_within(hard),
        Err(_) => proxied_within(soft),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_egress_proxy_gets_what_the_others_leave() {
        for (limit, connections) in [
            (0, 1),
            (960, 1),
            (1024, 21),
            (8192, 2410),
            (rlim_t::MAX, 64 << 10),
        ] {
            assert_eq!(proxied_within(limit), connections, "{limit}");
        }
    }
}
