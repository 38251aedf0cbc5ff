//! What no job may do.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixStream};
use std::path::Path;
use std::time::Duration;

use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType};
use nix::unistd::{Gid, Uid};
use supervisor::selftest::Outcome;
use supervisor::selftest::calls::{NEVER, NOT_FOR_FILES, OF_NAMESPACES, SystemCall, UNAVAILABLE};
use supervisor::selftest::expected::{Expected, nodes};

use crate::Table;
use crate::sys::call;

const CALLS: &str = "calls that have led out of sandboxes are refused";
const HOST: &str = "a job cannot change the host";
const PRIVILEGE: &str = "a job gets no privilege";
const HIDDEN: &str = "the factory's files, homes and what factory.hide names are hidden";
const OTHERS: &str = "a job sees, traces and signals no process but its own";
const SERVICES: &str = "a job speaks to no service of the host";

/// How a call is refused, by the filter or for want of a privilege.
const REFUSALS: [i32; 4] = [libc::EPERM, libc::ENOSYS, libc::EACCES, libc::EOPNOTSUPP];

pub fn all(table: &Table, expected: &Expected) {
    privilege(table);
    for calls in [NEVER, UNAVAILABLE, NOT_FOR_FILES] {
        refused(table, calls);
    }
    host_files(table);
    hidden(table, expected);
    processes(table, expected);
    services(table, expected);
    sockets(table, expected);
    devices(table, expected);
}

fn status_field(name: &str) -> String {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    field.unwrap_or_default().trim().to_owned()
}

fn privilege(table: &Table) {
    for set in ["CapPrm", "CapEff", "CapInh", "CapAmb"] {
        let seen = status_field(set);
        table.must_be(
            PRIVILEGE,
            &format!("{set} of its processes"),
            &seen,
            !seen.is_empty() && seen.bytes().all(|b| b == b'0'),
        );
    }
    let seen = status_field("NoNewPrivs");
    table.must_be(PRIVILEGE, "no_new_privs", &seen, seen == "1");
    let seen = status_field("Seccomp");
    table.must_be(CALLS, "a filter of system calls", &seen, seen == "2");
    table.must_fail(PRIVILEGE, "setuid(0)", nix::unistd::setuid(Uid::from_raw(0)));
    table.must_fail(PRIVILEGE, "setgid(0)", nix::unistd::setgid(Gid::from_raw(0)));
    table.must_fail(
        PRIVILEGE,
        "setgroups(0)",
        nix::unistd::setgroups(&[Gid::from_raw(0)]),
    );
    let own = Path::new("/work/selftest");
    let chown = fs::write(own, "x").and_then(|()| std::os::unix::fs::chown(own, Some(0), None));
    table.must_fail(PRIVILEGE, "chown(2) of a file to root", chown);
    let _ = fs::remove_file(own);
    let node = path(Path::new("/work/selftest-node"));
    let mode = (libc::S_IFBLK | 0o600) as usize;
    // The first disk, by the kernel's admin-guide/devices.rst.
    let made = call(
        libc::SYS_mknodat,
        [
            libc::AT_FDCWD as usize,
            node.as_ptr() as usize,
            mode,
            8 << 8,
            0,
            0,
        ],
    );
    table.must_fail(PRIVILEGE, "mknod(2) of a disk", made);
    let _ = fs::remove_file("/work/selftest-node");
    let nice = call(
        libc::SYS_setpriority,
        [libc::PRIO_PROCESS as usize, 0, -5_isize as usize, 0, 0, 0],
    );
    table.must_fail(PRIVILEGE, "setpriority(2) to nice -5", nice);
    let name = b"selftest";
    let named = call(
        libc::SYS_sethostname,
        [name.as_ptr() as usize, name.len(), 0, 0, 0, 0],
    );
    table.must_fail(HOST, "sethostname(2)", named);
}

fn path(path: &Path) -> std::ffi::CString {
    std::ffi::CString::new(path.as_os_str().as_bytes()).expect("no path here has a NUL")
}

/// Where one of these works, the probe itself is another afterwards: so they come last.
pub fn namespaces(table: &Table, expected: &Expected) {
    if !expected.allows_user_namespaces {
        refused(table, OF_NAMESPACES);
    }
}

fn refused(table: &Table, calls: &[SystemCall]) {
    for (name, number, arguments) in calls {
        let (seen, is_refused) = match call(*number, *arguments) {
            Ok(_) => ("it worked".to_owned(), false),
            Err(error) => (
                error.to_string(),
                error
                    .raw_os_error()
                    .is_some_and(|errno| REFUSALS.contains(&errno)),
            ),
        };
        table.must_be(CALLS, name, seen, is_refused);
    }
}

fn host_files(table: &Table) {
    for place in [
        "/", "/etc", "/usr", "/usr/bin", "/var", "/var/lib", "/boot", "/home", "/opt", "/dev",
    ] {
        if !Path::new(place).is_dir() {
            continue;
        }
        let file = Path::new(place).join(".user-factory-selftest");
        let made = fs::File::create_new(&file);
        let _ = made.as_ref().map(|_| fs::remove_file(&file));
        table.must_fail(HOST, &format!("a new file in {place}"), made);
    }
    for file in [
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/modprobe",
        "/proc/sysrq-trigger",
        "/sys/kernel/uevent_helper",
        "/sys/power/state",
        "/etc/passwd",
        "/etc/ld.so.cache",
    ] {
        if Path::new(file).exists() {
            // It is opened, and nothing is written.
            table.must_fail(
                HOST,
                &format!("open {file} for writing"),
                fs::File::options().write(true).open(file),
            );
        }
    }
}

fn hidden(table: &Table, expected: &Expected) {
    for path in &expected.hidden {
        let tried = format!("read {}", path.display());
        match fs::symlink_metadata(path) {
            Ok(meta) if meta.is_dir() => {
                let entries = fs::read_dir(path).map(|entries| entries.flatten().count());
                let is_empty = !matches!(entries, Ok(1..));
                let seen = entries.map_or_else(
                    |error| error.to_string(),
                    |n| format!("a directory with {n} entries"),
                );
                table.must_be(HIDDEN, &tried, seen, is_empty);
            }
            Ok(_) => match fs::read(path) {
                Ok(bytes) => {
                    table.must_be(HIDDEN, &tried, format!("{} bytes", bytes.len()), bytes.is_empty())
                }
                Err(error) => table.must_be(HIDDEN, &tried, error.to_string(), true),
            },
            Err(error) => table.must_be(HIDDEN, &tried, error.to_string(), true),
        }
    }
    let own = std::env::var_os("HOME").unwrap_or_default();
    let homes = fs::read_dir("/home").into_iter().flatten().flatten();
    let others: Vec<String> = homes
        .filter(|home| home.path().as_os_str() != own)
        .map(|home| home.path().display().to_string())
        .collect();
    table.must_be(
        HIDDEN,
        "other homes in /home",
        format!("{} others", others.len()),
        others.is_empty(),
    );
}

fn processes(table: &Table, expected: &Expected) {
    let own = nix::unistd::getuid().as_raw();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids: Vec<u32> = entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    let uid_of = |pid: &u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.lines().find_map(|line| {
            line.strip_prefix("Uid:")?
                .split_whitespace()
                .next()?
                .parse::<u32>()
                .ok()
        })
    };
    let others = pids
        .iter()
        .filter(|pid| uid_of(pid).is_some_and(|uid| uid != own))
        .count();
    table.must_be(
        OTHERS,
        "/proc",
        format!("{} processes, {others} of other users", pids.len()),
        others == 0,
    );
    // The same number may be a process of its own.
    if others != 0 || !pids.contains(&expected.pid) {
        let pid = i32::try_from(expected.pid).unwrap_or(i32::MAX);
        let signalled = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), None);
        let is_unseen = signalled == Err(nix::errno::Errno::ESRCH);
        let seen = signalled.map_or_else(|errno| errno.to_string(), |()| "it worked".into());
        table.must_be(
            OTHERS,
            "kill(2) of a process outside, with signal 0",
            seen,
            is_unseen,
        );
    }
    let attached = call(libc::SYS_ptrace, [libc::PTRACE_ATTACH as usize, 1, 0, 0, 0, 0]);
    table.must_fail(OTHERS, "ptrace(2) of its pid 1", attached);
    for file in ["/proc/1/mem", "/proc/1/environ", "/proc/1/ns/mnt"] {
        table.must_fail(OTHERS, &format!("open {file}"), fs::File::open(file));
    }
}

fn services(table: &Table, expected: &Expected) {
    for path in &expected.sockets {
        table.must_fail(
            SERVICES,
            &format!("connect to {}", path.display()),
            UnixStream::connect(path),
        );
    }
    let address = UnixAddr::from_abstract_name(&expected.abstract_name).expect("the name is short");
    let tried = "connect to an abstract name of a process outside";
    match UnixStream::connect_addr(&address) {
        // Landlock keeps a job from it, by an ability that came with Linux 6.12 (landlock(7)).
        Ok(_) if !expected.has_own_network && kernel() < (6, 12) => {
            let seen = format!(
                "it worked: Linux {}.{} has no scope of Landlock for it; use 6.12 or newer, or network = \"none\"",
                kernel().0,
                kernel().1
            );
            table.report(SERVICES, tried, seen, Outcome::NotEnforced);
        }
        result => table.must_fail(SERVICES, tried, result),
    }
    let outside = SocketAddr::from((Ipv4Addr::LOCALHOST, expected.port));
    if expected.has_own_network {
        let rule = "a job without the host's network reaches the server, and what its slot names";
        table.must_fail(rule, "connect to the host's loopback address", connect(outside));
        // Two lines of headings (proc_net(5)).
        let devices = fs::read_to_string("/proc/net/dev").unwrap_or_default();
        let devices: Vec<&str> = devices
            .lines()
            .skip(2)
            .filter_map(|line| line.trim().split(':').next())
            .collect();
        table.must_be(rule, "network devices", devices.join(" "), devices == ["lo"]);
        // An address for documentation (RFC 5737), which leads nowhere.
        let anywhere = SocketAddr::from((Ipv4Addr::new(192, 0, 2, 1), 80));
        table.must_fail(rule, "connect to 192.0.2.1", connect(anywhere));
    } else {
        // What is reached through it is for a firewall to say.
        let own = fs::read_link("/proc/self/ns/net").unwrap_or_default();
        table.must_be(
            "network = \"host\": a job has the host's network",
            "the network namespace",
            own.display().to_string(),
            !own.as_os_str().is_empty() && own == expected.network_namespace,
        );
    }
}

fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    TcpStream::connect_timeout(&address, Duration::from_secs(10))
}

/// The kernel's version, its first two numbers.
fn kernel() -> (u32, u32) {
    let text = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = text
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

fn sockets(table: &Table, expected: &Expected) {
    let guarantee = "a job makes no sockets but those of the families that it may have";
    for (name, family) in [
        ("AF_PACKET", libc::AF_PACKET),
        ("AF_ALG", libc::AF_ALG),
        ("AF_VSOCK", libc::AF_VSOCK),
        ("AF_BLUETOOTH", libc::AF_BLUETOOTH),
        ("AF_CAN", libc::AF_CAN),
        ("AF_KEY", libc::AF_KEY),
        ("AF_RDS", libc::AF_RDS),
    ] {
        if !expected.socket_families.contains(&family) {
            let made = call(
                libc::SYS_socket,
                [family as usize, libc::SOCK_RAW as usize, 0, 0, 0, 0],
            );
            table.must_fail(guarantee, &format!("socket(2) of {name}"), made);
        }
    }
    let raw = call(
        libc::SYS_socket,
        [
            libc::AF_INET as usize,
            libc::SOCK_RAW as usize,
            libc::IPPROTO_TCP as usize,
            0,
            0,
            0,
        ],
    );
    table.must_fail(guarantee, "a raw socket of AF_INET", raw);
    let udp = nix::sys::socket::socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    );
    let udp = udp.expect("a job can make a socket");
    use std::os::fd::AsRawFd;
    // A program of no instruction, which the kernel itself refuses with EINVAL. To a job it is said to be attached, and
    // is not: libudev filters again itself.
    let program = [0_usize; 2];
    let attach = [
        udp.as_raw_fd() as usize,
        libc::SOL_SOCKET as usize,
        libc::SO_ATTACH_FILTER as usize,
        program.as_ptr() as usize,
        size_of_val(&program),
        0,
    ];
    let attached = call(libc::SYS_setsockopt, attach);
    let seen = attached
        .as_ref()
        .map_or_else(ToString::to_string, |_| "answered as if it were done".to_owned());
    table.must_be(CALLS, "SO_ATTACH_FILTER", seen, attached.is_ok());
}

/// What every job has in `/dev`; terminals are its own.
const USUAL: [&str; 7] = ["null", "zero", "full", "random", "urandom", "tty", "pts"];

fn devices(table: &Table, expected: &Expected) {
    let found = nodes(Path::new("/dev"));
    let other: Vec<String> = found
        .iter()
        .filter(|node| !expected.devices.contains(*node))
        .filter(|node| {
            let below = node.strip_prefix("/dev").expect("it is below");
            !USUAL.iter().any(|usual| below.starts_with(usual))
        })
        .map(|node| node.display().to_string())
        .collect();
    let seen = if other.is_empty() {
        "none".to_owned()
    } else {
        other.join(" ")
    };
    table.must_be(
        "a job has no device but its slot's",
        "device nodes in /dev beside the usual ones",
        seen,
        other.is_empty(),
    );
    for node in &expected.devices {
        // Opening one can reset a board: whether it may be opened is asked.
        let access = nix::unistd::access(
            node,
            nix::unistd::AccessFlags::R_OK | nix::unistd::AccessFlags::W_OK,
        );
        table.must_work(
            "the slot's devices are there",
            &format!("access(2) of {}", node.display()),
            access,
        );
    }
}
