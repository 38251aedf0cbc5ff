//! A word to systemd, where it is there to hear it (`sd_notify(3)`).

use std::os::unix::net::UnixDatagram;

/// The factory serves.
pub fn ready() {
    say("READY=1");
}

fn say(text: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let sent = UnixDatagram::unbound().and_then(|socket| socket.send_to(text.as_bytes(), path));
    if let Err(error) = sent {
        tracing::warn!("cannot tell systemd {text}: {error}");
    }
}
