//! Rows 97 to 99: what the kernel counts for the whole host, or for nobody. A job takes as much of one kind as it gets, and
//! holds it, while the test looks at what is left for others.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::SigSet;
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, pipe2};

use crate::memory::{filled, raise_open_files};
use crate::sys::{c, call, fork, fork_here, wait_for_ever};
use crate::{Attempt, Report};

pub const ATTEMPTS: &[Attempt] = &[("hold", hold)];

/// What is held for as long as the process runs.
type HeldDescriptors = Vec<OwnedFd>;

/// Take one, the `number`th of this process, and say how much it is.
type Take = fn(&mut HeldDescriptors, u64) -> io::Result<u64>;

const KINDS: &[(&str, Take)] = &[
    ("pipes", pipe),
    ("socket-buffers", socket_buffer),
    ("tcp-buffers", tcp_buffer),
    ("signals", signal),
    ("timers", timer),
    ("locks", lock),
    ("epoll-watches", epoll_watch),
    ("inotify-instances", inotify_instance),
    ("inotify-watches", inotify_watch),
    ("queues", queue),
    ("shared-memory", shared_memory),
    ("semaphores", semaphores),
    ("leases", lease),
    ("locked-memory", locked_memory),
    ("mounts", mount),
    ("terminals", terminal),
    ("namespaces", namespace),
    ("processes", process),
    ("files", file),
    ("missing-names", missing_name),
    ("huge-pages", huge_page),
    ("tcp-ports", tcp_port),
    ("udp-ports", udp_port),
    ("abstract-names", abstract_name),
    ("connections", connection),
    ("crashes", crash),
];

/// The arguments: a kind, how many processes take of it, and how much each takes at most. Or `locks-of-the-host`, and
/// files.
fn hold(report: &mut Report, args: &[String]) {
    let kind = args[0].as_str();
    if kind == "locks-of-the-host" {
        lock_files_of_the_host(report, &args[1..]);
    }
    let (_, take) = KINDS
        .iter()
        .find(|(name, _)| *name == kind)
        .expect("the test names a kind");
    let [processes, each] = [1, 2].map(|n| args[n].parse::<u64>().expect("the test gives a number"));
    raise_open_files();
    let (mut total, mut reasons) = (0, BTreeMap::<i32, u64>::new());
    for _ in 0..processes {
        let (mut here, mut there) = UnixStream::pair().expect("a socket pair");
        if fork_here().map_or_else(|_| true, |pid| pid != 0) {
            drop(there);
        } else {
            drop(here);
            let (taken, _kept, why) = take_all(*take, each);
            let answer = [taken, u64::from(why.unsigned_abs())].map(u64::to_le_bytes);
            there.write_all(answer.as_flattened()).expect("the parent reads");
            wait_for_ever();
        }
        let mut answer = [0; 16];
        if here.read_exact(&mut answer).is_err() {
            *reasons.entry(libc::EAGAIN).or_default() += 1;
            break;
        }
        let [taken, why] = [&answer[..8], &answer[8..]]
            .map(|part| u64::from_le_bytes(part.try_into().expect("eight bytes")));
        total += taken;
        *reasons.entry(why as i32).or_default() += 1;
    }
    let reasons = reasons.iter().map(|(why, count)| match why {
        0 => format!("{count} took all that they wanted"),
        why => format!("{count}: {}", io::Error::from_raw_os_error(*why)),
    });
    report.print(format!(
        "taken {total} {kind}; {}",
        reasons.collect::<Vec<_>>().join("; ")
    ));
    report.print("ready");
    wait_for_ever();
}

fn take_all(take: Take, each: u64) -> (u64, HeldDescriptors, i32) {
    let (mut taken, mut kept) = (0, Vec::new());
    for number in 0..each {
        match take(&mut kept, number) {
            Ok(amount) => taken += amount,
            Err(error) => return (taken, kept, error.raw_os_error().unwrap_or(-1)),
        }
    }
    (taken, kept, 0)
}

/// Bytes. As large as a pipe may be, and as many as there may be of them.
fn pipe(kept: &mut HeldDescriptors, _: u64) -> io::Result<u64> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
    let _ = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(1 << 20));
    let size = fcntl(&writer, FcntlArg::F_GETPIPE_SZ)?;
    kept.extend([reader, writer]);
    Ok(size as u64)
}

/// Bytes that nobody reads.
fn socket_buffer(kept: &mut HeldDescriptors, _: u64) -> io::Result<u64> {
    let (reader, writer) = UnixStream::pair()?;
    let size = filled(&writer)?;
    kept.extend([reader.into(), writer.into()]);
    Ok(size as u64)
}

/// The same, as far as both ends of a connection over loopback take them.
fn tcp_buffer(kept: &mut HeldDescriptors, _: u64) -> io::Result<u64> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let writer = std::net::TcpStream::connect(listener.local_addr()?)?;
    let (reader, _) = listener.accept()?;
    let size = filled(&writer)?;
    kept.extend([reader.into(), writer.into()]);
    Ok(size as u64)
}

fn signal(_: &mut HeldDescriptors, number: u64) -> io::Result<u64> {
    if number == 0 {
        SigSet::all().thread_block().expect("a mask can be set");
    }
    // The first of the real-time signals that are queued, each with a siginfo: its number, no error, SI_QUEUE.
    let signal = 40usize;
    let mut info = [0i32; 32];
    (info[0], info[2]) = (signal as i32, -1);
    let pid = std::process::id() as usize;
    call(
        libc::SYS_rt_sigqueueinfo,
        [pid, signal, info.as_ptr() as usize, 0, 0, 0],
    )?;
    Ok(1)
}

fn timer(_: &mut HeldDescriptors, _: u64) -> io::Result<u64> {
    let mut id = 0i32;
    let arguments = [libc::CLOCK_MONOTONIC as usize, 0, &raw mut id as usize, 0, 0, 0];
    call(libc::SYS_timer_create, arguments)?;
    Ok(1)
}

/// Bytes far from each other: neighbours would be one lock. Few in each file: the kernel walks all of a file's.
fn lock(kept: &mut HeldDescriptors, number: u64) -> io::Result<u64> {
    const EACH: u64 = 500;
    if number.is_multiple_of(EACH) {
        let path = format!("/work/locked-{}-{number}", std::process::id());
        kept.push(File::create(path)?.into());
    }
    let at = number * 2;
    let lock = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: at as i64,
        l_len: 1,
        l_pid: 0,
    };
    let arguments = [
        kept.last().expect("a file was just made").as_raw_fd() as usize,
        libc::F_SETLK as usize,
        &raw const lock as usize,
        0,
        0,
        0,
    ];
    call(libc::SYS_fcntl, arguments)?;
    Ok(1)
}

/// Each of a few files in each of many lists.
fn epoll_watch(kept: &mut HeldDescriptors, number: u64) -> io::Result<u64> {
    const FILES: u64 = 200;
    let create = || -> io::Result<OwnedFd> {
        let (fd, _) = UnixStream::pair()?;
        Ok(fd.into())
    };
    if number == 0 {
        for _ in 0..FILES {
            kept.push(create()?);
        }
    }
    // The list that is being filled; the full ones stay open.
    static LIST: AtomicUsize = AtomicUsize::new(0);
    if number.is_multiple_of(FILES) {
        let list = call(libc::SYS_epoll_create1, [0; 6])?;
        LIST.store(list as usize, Ordering::Relaxed);
    }
    // EPOLL_CTL_ADD of a struct epoll_event.
    let event = [0u32; 3];
    let epoll = LIST.load(Ordering::Relaxed);
    let file = kept[(number % FILES) as usize].as_raw_fd() as usize;
    let arguments = [epoll, 1, file, event.as_ptr() as usize, 0, 0];
    call(libc::SYS_epoll_ctl, arguments)?;
    Ok(1)
}

fn inotify_instance(kept: &mut HeldDescriptors, _: u64) -> io::Result<u64> {
    let instance = nix::sys::inotify::Inotify::init(nix::sys::inotify::InitFlags::empty())?;
    kept.push(instance.into());
    Ok(1)
}

/// POSIX's, of the usual size.
fn queue(_: &mut HeldDescriptors, number: u64) -> io::Result<u64> {
    let name = c(format!("held-{}-{number}", std::process::id()));
    let flags = (libc::O_CREAT | libc::O_EXCL | libc::O_RDWR) as usize;
    call(libc::SYS_mq_open, [name.as_ptr() as usize, flags, 0o600, 0, 0, 0])?;
    Ok(1)
}

/// Segments of System V's, of a page each, that are never attached: only a limit of their number counts them.
fn shared_memory(_: &mut HeldDescriptors, _: u64) -> io::Result<u64> {
    call(
        libc::SYS_shmget,
        [0, 4096, (libc::IPC_CREAT | 0o600) as usize, 0, 0, 0],
    )?;
    Ok(1)
}

/// Sets of one semaphore.
fn semaphores(_: &mut HeldDescriptors, _: u64) -> io::Result<u64> {
    call(
        libc::SYS_semget,
        [0, 1, (libc::IPC_CREAT | 0o600) as usize, 0, 0, 0],
    )?;
    Ok(1)
}

/// On files of its own.
fn lease(kept: &mut HeldDescriptors, number: u64) -> io::Result<u64> {
    let file = File::create(format!("/work/leased-{}-{number}", std::process::id()))?;
    set_lease(&file, libc::F_WRLCK)?;
    kept.push(file.into());
    Ok(1)
}

fn set_lease(file: &File, kind: libc::c_int) -> io::Result<()> {
    let fd = file.as_raw_fd() as usize;
    let arguments = [fd, libc::F_SETLEASE as usize, kind as usize, 0, 0, 0];
    call(libc::SYS_fcntl, arguments).map(drop)
}

/// Bytes, a page each.
fn locked_memory(_: &mut HeldDescriptors, _: u64) -> io::Result<u64> {
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?.expect("Linux has pages") as usize;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let protection = (libc::PROT_READ | libc::PROT_WRITE) as usize;
    let address = call(
        libc::SYS_mmap,
        [0, page, protection, flags as usize, usize::MAX, 0],
    )?;
    call(libc::SYS_mlock, [address as usize, page, 0, 0, 0, 0])?;
    Ok(page as u64)
}

/// In a mount namespace of its own.
fn mount(_: &mut HeldDescriptors, number: u64) -> io::Result<u64> {
    if number == 0 {
        let flags = libc::CLONE_NEWUSER | libc::CLONE_NEWNS;
        call(libc::SYS_unshare, [flags as usize, 0, 0, 0, 0, 0])?;
    }
    let (place, kind) = (c("/work"), c("tmpfs"));
    let pointers = [place.as_ptr() as usize, kind.as_ptr() as usize];
    call(libc::SYS_mount, [pointers[1], pointers[0], pointers[1], 0, 0, 0])?;
    Ok(1)
}

/// One directory each: a second watch of the same is the first.
fn inotify_watch(kept: &mut HeldDescriptors, number: u64) -> io::Result<u64> {
    if number == 0 {
        kept.push(
            nix::sys::inotify::Inotify::init(nix::sys::inotify::InitFlags::empty()).map(OwnedFd::from)?,
        );
    }
    let path = format!("/work/watched-{}-{number}", std::process::id());
    fs::create_dir(&path)?;
    let name = c(&path);
    let arguments = [
        kept[0].as_raw_fd() as usize,
        name.as_ptr() as usize,
        libc::IN_ALL_EVENTS as usize,
        0,
        0,
        0,
    ];
    call(libc::SYS_inotify_add_watch, arguments)?;
    Ok(1)
}

fn terminal(kept: &mut HeldDescriptors, _: u64) -> io::Result<u64> {
    kept.push(
        OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/ptmx")?
            .into(),
    );
    Ok(1)
}

fn child_with(flags: libc::c_int) -> io::Result<u64> {
    match call(libc::SYS_clone, [(flags | libc::SIGCHLD) as usize, 0, 0, 0, 0, 0])? {
        0 => wait_for_ever(),
        _ => Ok(1),
    }
}

fn namespace(_: &mut HeldDescriptors, _: u64) -> io::Result<u64> {
    child_with(libc::CLONE_NEWUSER | libc::CLONE_NEWNET | libc::CLONE_NEWIPC)
}

fn process(_: &mut HeldDescriptors, _: u64) -> io::Result<u64> {
    child_with(0)
}

fn file(kept: &mut HeldDescriptors, _: u64) -> io::Result<u64> {
    kept.push(File::open("/dev/null")?.into());
    Ok(1)
}

/// The kernel remembers that there is no such name.
fn missing_name(_: &mut HeldDescriptors, number: u64) -> io::Result<u64> {
    let path = format!("/work/missing-{}-{number}", std::process::id());
    match Path::new(&path).symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(1),
        other => Err(io::Error::other(format!("{other:?}"))),
    }
}

fn huge_page(_: &mut HeldDescriptors, _: u64) -> io::Result<u64> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_POPULATE;
    let protection = (libc::PROT_READ | libc::PROT_WRITE) as usize;
    let nowhere = usize::MAX;
    call(
        libc::SYS_mmap,
        [0, 2 << 20, protection, flags as usize, nowhere, 0],
    )?;
    Ok(1)
}

fn tcp_port(kept: &mut HeldDescriptors, number: u64) -> io::Result<u64> {
    port(kept, number, |port| {
        TcpListener::bind(("0.0.0.0", port)).map(OwnedFd::from)
    })
}

fn udp_port(kept: &mut HeldDescriptors, number: u64) -> io::Result<u64> {
    port(kept, number, |port| {
        UdpSocket::bind(("0.0.0.0", port)).map(OwnedFd::from)
    })
}

/// Of those that the kernel gives to programs that name none, `ip_local_port_range`: each by its number, because the kernel
/// tries port after port for port 0, which takes minutes for all of them. One that is taken already counts nothing.
fn port(
    kept: &mut HeldDescriptors,
    number: u64,
    bind: impl Fn(u16) -> io::Result<OwnedFd>,
) -> io::Result<u64> {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
    let ends: Vec<u64> = range.split_whitespace().flat_map(str::parse).collect();
    let port = ends[0] + number;
    if port > ends[1] {
        return Err(io::Error::from_raw_os_error(libc::EADDRNOTAVAIL));
    }
    match bind(port as u16) {
        Ok(socket) => kept.push(socket),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => return Ok(0),
        Err(error) => return Err(error),
    }
    Ok(1)
}

/// The same names in every job.
fn abstract_name(kept: &mut HeldDescriptors, number: u64) -> io::Result<u64> {
    let name = SocketAddr::from_abstract_name(format!("user-factory-held-{number}"))?;
    kept.push(UnixListener::bind_addr(&name)?.into());
    Ok(1)
}

/// A line each in the kernel's table of connections, where it has one: each is to another port, and is not answered.
fn connection(kept: &mut HeldDescriptors, number: u64) -> io::Result<u64> {
    if number == 0 {
        kept.push(UdpSocket::bind("127.0.0.1:0")?.into());
    }
    let socket = UdpSocket::from(kept[0].try_clone()?);
    let port = 1024 + number % 60_000;
    let address = format!("127.{}.{}.1:{port}", std::process::id() % 250, number / 60_000);
    match socket.send_to(b"x", address) {
        // Nobody listens there, which is what the last one was told.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(1),
        sent => sent.map(|_| 1),
    }
}

fn crash(_: &mut HeldDescriptors, _: u64) -> io::Result<u64> {
    let pid = fork(|| {
        let action = [libc::SIG_DFL, 0, 0, 0];
        let segv = libc::SIGSEGV as usize;
        let _ = call(
            libc::SYS_rt_sigaction,
            [segv, action.as_ptr() as usize, 0, 8, 0, 0],
        );
        crate::sys::read_nothing();
    });
    waitpid(Pid::from_raw(pid), None)?;
    Ok(1)
}

/// Row 99: exclusive locks on all these, which the job can only read, and shared ones by `fcntl`.
fn lock_files_of_the_host(report: &mut Report, files: &[String]) -> ! {
    let mut kept = Vec::new();
    for path in files {
        let Ok(file) = File::open(path) else {
            report.print(format!("not seen: {path}"));
            continue;
        };
        let fd = file.as_raw_fd() as usize;
        let operation = (libc::LOCK_EX | libc::LOCK_NB) as usize;
        let lock = call(libc::SYS_flock, [fd, operation, 0, 0, 0, 0]);
        report.print(format!("lock of {path}: {lock:?}"));
        // A process that opens a file with a lease waits for its holder, as long as fs.lease-break-time says.
        report.must_fail(format!("a lease of {path}"), set_lease(&file, libc::F_RDLCK));
        kept.push(file);
    }
    report.print("ready");
    wait_for_ever()
}
