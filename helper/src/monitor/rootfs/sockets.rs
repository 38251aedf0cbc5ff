//! The paths that sockets of the host are bound to. The kernel lists all sockets of the network namespace, those of
//! jobs among them; these are left out by their owner, before anything is done with what a job chose.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use protocol::config::UidRange;

use super::unix_diag::{self, Message};

/// The most paths that are looked at. Each is resolved, and may become a mount of every job's.
const MAX_PATHS: usize = 1 << 15;
/// The most bytes of `/proc/net/unix` that are read.
const MAX_TABLE: u64 = 64 << 20;
/// The kernel puts at most 32 KiB into one packet of an answer.
const PACKET: usize = 64 << 10;
/// The list is asked for at most so many times.
const ROUNDS: usize = 5;

type Paths = BTreeSet<PathBuf>;

/// The paths that sockets are bound to, but for sockets whose owner is in `jobs`.
///
/// The kernel gives its list in parts, and finds its place again by counting: where sockets are closed meanwhile, it
/// passes over others. So it is asked again, until it says nothing new.
///
/// # Errors
/// There are more than are looked at, or the kernel does not list its sockets.
pub fn paths(jobs: UidRange) -> Result<Paths> {
    let diagnosis = open()?;
    let mut all = Paths::new();
    for round in 0..ROUNDS {
        let before = all.len();
        match &diagnosis {
            Some(diagnosis) => collect(diagnosis, jobs, &mut all)?,
            None => collect_table(&mut all)?,
        }
        if round > 0 && all.len() == before {
            break;
        }
    }
    Ok(all)
}

/// Does the kernel say who owns a socket?
///
/// # Errors
/// It says neither yes nor no.
pub fn have_owners() -> Result<bool> {
    Ok(open()?.is_some())
}

/// A socket for the kernel's diagnosis of Unix sockets; none if it has no such thing (the module `unix_diag`, which it
/// loads when it is asked).
fn open() -> Result<Option<OwnedFd>> {
    let describe = || "cannot ask the kernel for its Unix sockets";
    let opened = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    );
    let diagnosis = match opened {
        Err(Errno::EPROTONOSUPPORT | Errno::EAFNOSUPPORT) => return Ok(None),
        opened => opened.with_context(describe)?,
    };
    match dump(&diagnosis, unix_diag::NO_STATE, |_| Ok(())) {
        Err(error) if error.downcast_ref() == Some(&Errno::ENOENT) => Ok(None),
        dumped => dumped.with_context(describe).map(|()| Some(diagnosis)),
    }
}

/// Ask for the sockets in these states, and pass each to the callback.
fn dump(
    diagnosis: &OwnedFd,
    states: u32,
    mut each: impl FnMut(unix_diag::Socket<'_>) -> Result<()>,
) -> Result<()> {
    const SEQUENCE: u32 = 1;
    let request = unix_diag::request(SEQUENCE, states);
    send(diagnosis.as_raw_fd(), &request, MsgFlags::empty())?;
    let mut packet = vec![0; PACKET];
    loop {
        let length = match recv(diagnosis.as_raw_fd(), &mut packet, MsgFlags::MSG_TRUNC) {
            Err(Errno::EINTR) => continue,
            length => length?,
        };
        let bytes = packet.get(..length).context("the kernel's answer is too long")?;
        ensure!(!bytes.is_empty(), "the kernel's answer is empty");
        for message in unix_diag::parse(bytes, SEQUENCE)? {
            match message {
                Message::Socket(socket) => each(socket)?,
                Message::Done => return Ok(()),
                Message::Error(number) => bail!(Errno::from_raw(number)),
            }
        }
    }
}

fn collect(diagnosis: &OwnedFd, jobs: UidRange, all: &mut Paths) -> Result<()> {
    dump(diagnosis, unix_diag::ANY_STATE, |socket| {
        let is_a_jobs = socket.uid.is_some_and(|uid| jobs.contains(uid));
        if is_a_jobs || socket.is_connected_stream || !socket.name.starts_with(b"/") {
            return Ok(());
        }
        add(all, socket.name)
    })
    .context("cannot list the host's Unix sockets")
}

fn add(all: &mut Paths, name: &[u8]) -> Result<()> {
    all.insert(Path::new(OsStr::from_bytes(name)).to_owned());
    ensure!(
        all.len() <= MAX_PATHS,
        "more than {MAX_PATHS} sockets of this host are bound to paths: find whose they are (ss -xa), and end them"
    );
    Ok(())
}

/// The same from `/proc/net/unix`, which does not say whose a socket is.
fn collect_table(all: &mut Paths) -> Result<()> {
    let describe = || "cannot read /proc/net/unix: load the module unix_diag, or mount /proc whole";
    let table = File::open("/proc/net/unix").with_context(describe)?;
    for line in BufReader::new(table.take(MAX_TABLE)).split(b'\n') {
        let line = line.with_context(describe)?;
        if let Some(at) = line.windows(2).position(|pair| pair == b" /") {
            add(all, &line[at + 1..])
                .context("the kernel does not say which sockets are jobs': load the module unix_diag")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use super::*;

    fn range(first: u32, last: u32) -> UidRange {
        UidRange {
            first: first.try_into().unwrap(),
            last: last.try_into().unwrap(),
        }
    }

    /// Uids of nobody here.
    fn others() -> UidRange {
        range(2_031_616, 2_097_151)
    }

    #[test]
    fn what_can_be_connected_to_by_a_path_is_listed_and_nothing_else() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name);
        let _stream = UnixListener::bind(at("stream")).unwrap();
        let _datagram = UnixDatagram::bind(at("with\nline")).unwrap();
        let connected = UnixStream::connect(at("stream")).unwrap();
        let (_one, _two) = UnixStream::pair().unwrap();
        let found: Vec<_> = paths(others())
            .unwrap()
            .into_iter()
            .filter(|path| path.starts_with(place.path()))
            .collect();
        assert_eq!(found, [at("stream"), at("with\nline")]);
        drop(connected);
    }

    #[test]
    fn sockets_of_jobs_are_left_out_by_their_owner() {
        let place = tempfile::tempdir().unwrap();
        std::fs::set_permissions(place.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let path = place.path().join("socket");
        // Root is in no range: it makes the socket as somebody else.
        let owner = match nix::unistd::geteuid().as_raw() {
            0 => 2_031_700,
            own => own,
        };
        let made = std::thread::spawn({
            let path = path.clone();
            move || {
                nix::unistd::setfsuid(owner.into());
                UnixListener::bind(path).unwrap()
            }
        });
        let _listener = made.join().unwrap();
        let diagnosis = open().unwrap().expect("this kernel has unix_diag");
        let lists = |jobs| {
            let mut all = Paths::new();
            collect(&diagnosis, jobs, &mut all).unwrap();
            all.contains(&path)
        };
        assert!(lists(range(owner + 1, owner + 2)));
        assert!(!lists(range(owner, owner + 1)));
        let mut table = Paths::new();
        collect_table(&mut table).unwrap();
        assert!(table.contains(&path));
    }

    #[test]
    fn more_paths_than_are_resolved_are_an_error_and_the_same_path_counts_once() {
        let mut all = Paths::new();
        for number in 0..MAX_PATHS {
            add(&mut all, format!("/{number}").as_bytes()).unwrap();
        }
        add(&mut all, b"/0").unwrap();
        let error = add(&mut all, b"/one more").unwrap_err().to_string();
        assert!(
            error.contains("more than 32768 sockets") && error.contains("ss -xa"),
            "{error}"
        );
    }
}
