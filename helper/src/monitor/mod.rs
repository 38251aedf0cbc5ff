//! The monitor: root with the capabilities that a sandbox takes. It builds the root file system of jobs (`rootfs`), starts
//! the listener (`listener`), carries out requests of sessions in processes that it makes for them (`launch`), and gives
//! jobs devices that are plugged in (`hotplug`). It reads nothing that the supervisor sends.

mod hotplug;
mod launch;
mod listener;
pub mod rootfs;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, getsockopt, listen, socket, sockopt,
};
use nix::sys::wait::WaitPidFlag;
use protocol::Seqpacket;
use protocol::config::{self, Config, UidRange, accounts};

use crate::host::directory::{check_only_root_writes, make_directories};
use crate::host::startup_check::check_host;
use crate::host::{Host, abilities, cgroup, users};
use crate::log::{error, info, warn};
use crate::sandbox::landlock;
use crate::{log, privileges, sys};
use hotplug::Hotplug;
use launch::LaunchQueue;
use listener::Listener;
use rootfs::{Event, RootFs};

const USAGE: &str = "usage: user-factory-helper [--root DIR] [--cgroup PATH [--apart]]

The root helper of the buildomat user factory; see the README.
  --root DIR     where etc/buildomat-user-factory/config.toml, run/ and var/lib/ are found [/]
  --cgroup PATH  the cgroup, below the cgroup v2 mount, in which to keep the workers' [its own]
  --apart        that cgroup is for them alone: do not move into it
";

const SEE_HELP: &str = "see user-factory-helper --help";

#[derive(Debug)]
struct Options {
    root: PathBuf,
    cgroup: Option<PathBuf>,
    apart: bool,
}

fn options() -> Result<Option<Options>> {
    let mut options = Options {
        root: "/".into(),
        cgroup: None,
        apart: false,
    };
    let mut arguments = std::env::args_os().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || {
            arguments
                .next()
                .map(PathBuf::from)
                .with_context(|| format!("{argument:?} wants a value: {SEE_HELP}"))
        };
        match argument.to_str() {
            Some("--root") => options.root = value()?,
            Some("--cgroup") => options.cgroup = Some(value()?),
            Some("--apart") => options.apart = true,
            Some("--help" | "-h") => return Ok(None),
            Some("--version") => {
                println!(
                    "user-factory-helper {}, protocol {}",
                    env!("CARGO_PKG_VERSION"),
                    protocol::VERSION
                );
                std::process::exit(0);
            }
            _ => bail!("{argument:?} is no option of the helper: {SEE_HELP}"),
        }
    }
    ensure!(
        options.root.is_absolute(),
        "--root must be an absolute path, not {}",
        options.root.display()
    );
    Ok(Some(options))
}

/// The program `user-factory-helper`.
pub fn main() -> ExitCode {
    let systemd_socket = sys::listening_socket_of_systemd();
    sys::reset_signals();
    log::start();
    let run = || match options()? {
        Some(options) => start(&options, systemd_socket),
        None => Ok(std::io::stdout().write_all(USAGE.as_bytes())?),
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Root's own things, in their order: refuse what is unsafe, find the host, listen, leave the host's
/// mounts, drop what is not needed, serve.
fn start(options: &Options, systemd_socket: Option<OwnedFd>) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the helper must run as root: start it with systemd or sudo"
    );
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    // Orphans become the children of this process.
    prctl::set_child_subreaper(true).context("cannot become the reaper of workers")?;
    let cgroups =
        cgroup::prepare(options.cgroup.as_deref(), options.apart).context("cannot prepare the cgroup")?;
    let host = Host::open(&options.root, &cgroups)?;
    let (config, _) = host.configuration()?;
    let (client, group) = check_host(&host, &config)?;
    for warning in abilities::check_all(&config, host.abilities)? {
        warn!("{warning}");
    }
    if let Some(warning) = abilities::check_cores() {
        warn!("{warning}");
    }
    for warning in landlock::warnings() {
        warn!("{warning}");
    }
    let run_dir = options.root.join(config::RUN_DIR);
    for place in [config::PROXY_DIR, config::CONTROL_DIR] {
        std::os::unix::fs::chown(options.root.join(place), Some(client), None)
            .with_context(|| format!("cannot give {place} to the supervisor"))?;
    }
    // Other users of the host must not connect where jobs do: what they would send costs the supervisor time.
    let closed = options.root.join(config::PROXY_DIR);
    let closed = closed.parent().expect("PROXY_DIR has a directory");
    std::os::unix::fs::chown(closed, Some(0), Some(group))
        .and_then(|()| std::fs::set_permissions(closed, std::fs::Permissions::from_mode(0o710)))
        .with_context(|| format!("cannot open {} to the supervisor's group", closed.display()))?;
    let _only_one = lock_out_others(&run_dir, &options.root.join(config::STATE_DIR).join("workers"))?;
    // Another helper's workers are named as such above.
    users::check_no_process(&host, config.factory.uid_range)?;
    let _reserved = reserve(&options.root, config.factory.uid_range)?;
    // For the manual program.
    std::fs::write(
        options.root.join(config::CGROUP_FILE),
        cgroups.as_os_str().as_bytes(),
    )
    .context("cannot write down where the workers' cgroups are")?;
    let socket = match systemd_socket {
        Some(socket) => {
            check_socket(&socket).context("the socket that systemd passed cannot be used")?;
            socket
        }
        None => listen_at(&options.root.join(config::HELPER_SOCKET), client)?,
    };
    if !rootfs::sockets::have_owners()? {
        warn!(
            "jobs' sockets are not told from the host's, and too many of them keep jobs from starting: load the module unix_diag"
        );
    }
    // `user-factory run` works from now on (`sd_notify(3)`). Later the host's mounts are left, where systemd's socket is.
    if let Some(systemd) = std::env::var_os("NOTIFY_SOCKET") {
        let sent = UnixDatagram::unbound().and_then(|socket| socket.send_to(b"READY=1", systemd));
        sent.context("cannot tell systemd that the helper is ready")?;
    }
    let rootfs = RootFs::new(&host)?;
    privileges::ProcessKind::Monitor.drop_others()?;
    serve(&host, &config, rootfs, socket, client)
}

/// All of a file.
const LOCK: libc::flock = libc::flock {
    l_type: libc::F_WRLCK as i16,
    l_whence: libc::SEEK_SET as i16,
    l_start: 0,
    l_len: 0,
    l_pid: 0,
};

/// Lock a file, if nobody else has: a lock of the process (`F_SETLK`, `fcntl(2)`), not of the open file. A child that
/// outlives the monitor by a moment, with its parent's files still open, must not keep the next monitor out.
fn lock(path: &Path) -> Result<Option<File>> {
    let mut options = File::options();
    let file = options
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    match fcntl(&file, FcntlArg::F_SETLK(&LOCK)) {
        Ok(_) => Ok(Some(file)),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(None),
        Err(errno) => Err(errno).with_context(|| format!("cannot lock {}", path.display())),
    }
}

/// Has another process locked this file, in whichever way?
fn is_locked(path: &Path) -> bool {
    let mut lock = LOCK;
    File::open(path).is_ok_and(|file| fcntl(&file, FcntlArg::F_GETLK(&mut lock)).is_ok())
        && lock.l_type != libc::F_UNLCK as i16
}

/// Two helpers on one state directory would each be right and together wrong. The directory of the workers is locked,
/// too: the two may have a `/run` each.
fn lock_out_others(run_dir: &Path, workers: &Path) -> Result<[File; 2]> {
    let only = |name: &str, what: &str, place: &Path| {
        lock(&place.join(name))?
            .with_context(|| format!("another helper {what} {}: stop that one first", place.display()))
    };
    // The second is the file by which workers wait for each other, with a lock of another kind.
    Ok([
        only("helper.lock", "serves", run_dir)?,
        only(".lock", "works in", workers)?,
    ])
}

/// The files by which systemd-nspawn gives containers blocks of 65536 ids, of those blocks that this range has ids of.
fn container_blocks(root: &Path, range: UidRange) -> impl Iterator<Item = PathBuf> {
    const BLOCK: u32 = 0x1_0000;
    /// systemd's `CONTAINER_UID_BASE_MIN` and `CONTAINER_UID_BASE_MAX`.
    const CONTAINERS: std::ops::RangeInclusive<u32> = 0x8_0000..=0x6fff_0000;
    let directory = root.join(CONTAINER_IDS);
    (range.first.get() & !(BLOCK - 1)..=range.last.get())
        .step_by(BLOCK as usize)
        .filter(|block| CONTAINERS.contains(block))
        .map(move |block| directory.join(block.to_string()))
}

const CONTAINER_IDS: &str = "run/systemd/nspawn-uid";

fn describe_container(range: UidRange, path: &Path) -> String {
    let how = format!(
        "systemd-nspawn has given ids of it to a container ({})",
        path.display()
    );
    accounts::describe_taken_range(range, &how)
}

/// Reserve the range against systemd-nspawn. It locks a block's file by `F_OFD_SETLK`, which keeps out `F_SETLK` and the
/// other way round; and unlinks the file before it gives up the lock (`uid_shift_pick` in systemd's `nspawn.c`). The
/// files stay locked for as long as they are open.
fn reserve(root: &Path, range: UidRange) -> Result<Vec<File>> {
    let mut locks = Vec::new();
    for path in container_blocks(root, range) {
        make_directories(&root.join(CONTAINER_IDS), 0o755)?;
        let file = loop {
            match lock(&path)? {
                Some(file) if file.metadata()?.nlink() == 0 => {}
                file => break file,
            }
        };
        locks.push(file.with_context(|| describe_container(range, &path))?);
    }
    Ok(locks)
}

/// Refuse a range of which a container has ids. A helper that serves has reserved its own range: then it is not known.
pub fn check_no_container(root: &Path, range: UidRange) -> Result<()> {
    let serves = is_locked(&root.join(config::RUN_DIR).join("helper.lock"));
    match container_blocks(root, range).find(|path| is_locked(path)) {
        Some(path) if !serves => bail!("{}", describe_container(range, &path)),
        _ => Ok(()),
    }
}

fn listen_at(path: &Path, client: u32) -> Result<OwnedFd> {
    let describe = || format!("cannot listen at {}", path.display());
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(describe);
        }
        _ => {}
    }
    let fd = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        None,
    )?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?).with_context(describe)?;
    // Nobody can connect before listen(2), so nobody sees the wider mode in between.
    std::os::unix::fs::chown(path, Some(client), Some(0)).with_context(describe)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).with_context(describe)?;
    listen(&fd, Backlog::new(128)?).with_context(describe)?;
    Ok(fd)
}

/// It must be of the right kind, and closed to other users; who connects is checked again each time.
fn check_socket(socket: &OwnedFd) -> Result<()> {
    let kind = getsockopt(socket, sockopt::SockType)?;
    ensure!(
        kind == SockType::SeqPacket && getsockopt(socket, sockopt::AcceptConn)?,
        "it is not a listening SOCK_SEQPACKET socket: use ListenSequentialPacket="
    );
    let address: UnixAddr = nix::sys::socket::getsockname(socket.as_raw_fd())?;
    let path = address.path().context("it has no path: give it one")?;
    let mode = std::fs::symlink_metadata(path)?.permissions().mode();
    ensure!(
        mode & 0o007 == 0,
        "{} is open to everybody: set SocketMode=0660",
        path.display()
    );
    check_only_root_writes(path.parent().context("it is in no directory")?)
}

/// Keep a listener running, carry out requests, follow devices. Nothing that the supervisor sends is ever read in this
/// process.
fn serve(host: &Host, config: &Config, mut rootfs: RootFs, socket: OwnedFd, client: u32) -> Result<()> {
    let mask = SigSet::from_iter([Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT]);
    mask.thread_block()?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    // First of all: while no monitor was there, devices may have gone.
    let mut hotplug = Hotplug::new().context("cannot watch /dev")?;
    hotplug.refresh(host);
    build_first(host, &mut rootfs)?;
    let (requests, for_sessions) = Seqpacket::pair()?;
    let mut listener = Listener::new(socket, client, for_sessions, Instant::now())?;
    let mut queue = LaunchQueue::default();
    loop {
        listener.tick(host, Instant::now());
        hotplug.tick(host);
        let (ready, listening) = {
            let mut events = vec![
                PollFd::new(signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(requests.as_fd(), PollFlags::POLLIN),
                PollFd::new(hotplug.events(), PollFlags::POLLIN),
            ];
            events.extend(listener.events());
            let listening = events.len();
            events.extend(rootfs.events());
            let due = [listener.due(), rootfs.due(), hotplug.due()];
            let due = due.into_iter().flatten().min();
            match poll(&mut events, until(due)) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("cannot wait for requests"),
            }
            (happened(&events), listening)
        };
        while let Some(signal) = signals.read_signal()? {
            if signal.ssi_signo != Signal::SIGCHLD as u32 {
                // Sessions go on to their end, and workers do not notice. The listener ends with this process.
                info!("stopping");
                return Ok(());
            }
        }
        reap(host, &mut listener, &mut hotplug);
        let built = match rootfs.on_events(&ready[listening..]) {
            Some(Event::Failed(reason) | Event::Lost(reason)) => {
                queue.refuse_all(&reason);
                false
            }
            event => event.is_some(),
        };
        // Not before: a launch is not refused for a builder that ended before it was asked for.
        if ready[1] {
            launch::take_request(host, &mut queue, &requests);
        }
        queue.launch(host, &mut rootfs);
        // The configuration of what was built may name other devices.
        if ready[2] || built {
            hotplug.refresh(host);
        }
        if ready[3..listening].contains(&true) && listener.on_event(Instant::now()) {
            info!("serving slots={} client={client}", config.slots.len());
        }
    }
}

/// Build the root file system once before anybody is served: a mistake in the configuration, or a host on which no job
/// can run, is refused at the start. Where a mount of the host's hangs, there may still be workers to delete.
fn build_first(host: &Host, rootfs: &mut RootFs) -> Result<()> {
    let started_at = Instant::now();
    while !rootfs.prepare(host, started_at)? {
        let ready = {
            let mut events = rootfs.events();
            match poll(&mut events, until(rootfs.due())) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno).context("cannot wait for the jobs' root file system"),
            }
            happened(&events)
        };
        match rootfs.on_events(&ready) {
            Some(Event::Failed(reason)) => bail!(reason),
            Some(Event::Lost(reason)) => {
                warn!("no job can be started: {reason}");
                break;
            }
            _ => {}
        }
    }
    Ok(())
}

fn happened(events: &[PollFd<'_>]) -> Vec<bool> {
    events.iter().map(|event| event.any() == Some(true)).collect()
}

/// How long to wait so that this time has come.
fn until(due: Option<Instant>) -> PollTimeout {
    due.map_or(PollTimeout::NONE, |due| {
        let left = due.saturating_duration_since(Instant::now()).as_millis() + 1;
        PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
    })
}

/// Collect the dead: a listener, who has looked for devices, workers' first processes, orphans.
fn reap(host: &Host, listener: &mut Listener, hotplug: &mut Hotplug) {
    while let Ok(Some((child, ended))) = sys::wait(None, WaitPidFlag::WNOHANG) {
        hotplug.handle_exit(child, ended, host);
        listener.handle_exit(child, ended, Instant::now());
    }
}
