//! Group C: getting out and across: sockets, devices, other jobs, secrets.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, mkfifo};

use crate::calls::refused;
use crate::leftovers::own_places;
use crate::sys::{c, call, fork, wait_for_ever};
use crate::{Attempt, Report};

pub const ATTEMPTS: &[Attempt] = &[
    ("sockets", sockets),
    ("devices", devices),
    ("terminal", terminal),
    ("signals", signals),
    ("kill-all", kill_all),
    ("keep-secret", keep_secret),
    ("seek", seek),
    ("fifos", fifos),
];

/// A Unix address as the kernel reads it: a name that begins with a NUL is abstract.
fn address(name: &[u8]) -> Vec<u8> {
    let mut bytes = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    bytes.extend(name);
    bytes
}

fn socket(kind: i32) -> usize {
    let arguments = [libc::AF_UNIX as usize, kind as usize, 0, 0, 0, 0];
    call(libc::SYS_socket, arguments).expect("a job can make Unix sockets") as usize
}

fn connect(kind: i32, name: &[u8]) -> io::Result<()> {
    let (fd, address) = (socket(kind), address(name));
    let arguments = [fd, address.as_ptr() as usize, address.len(), 0, 0, 0];
    let result = call(libc::SYS_connect, arguments).map(drop);
    let _ = call(libc::SYS_close, [fd, 0, 0, 0, 0, 0]);
    result
}

fn send_to(name: &[u8]) -> io::Result<()> {
    let (fd, address) = (socket(libc::SOCK_DGRAM), address(name));
    let text = "x";
    let arguments = [
        fd,
        text.as_ptr() as usize,
        1,
        0,
        address.as_ptr() as usize,
        address.len(),
    ];
    let result = call(libc::SYS_sendto, arguments).map(drop);
    let _ = call(libc::SYS_close, [fd, 0, 0, 0, 0, 0]);
    result
}

const KINDS: [(&str, i32); 3] = [
    ("stream", libc::SOCK_STREAM),
    ("datagram", libc::SOCK_DGRAM),
    ("seqpacket", libc::SOCK_SEQPACKET),
];

/// The arguments are paths, and `KIND@NAME` for abstract names at which a process listens; `KIND@NAME@elsewhere`, where
/// that is in another network namespace, so that the name is not even known.
fn sockets(report: &mut Report, args: &[String]) {
    let usual = [
        "/run/docker.sock",
        "/run/containerd/containerd.sock",
        "/run/dbus/system_bus_socket",
        "/run/systemd/private",
        "/run/systemd/journal/socket",
        "/run/systemd/journal/stdout",
        "/run/systemd/notify",
        "/run/udev/control",
        "/run/snapd.socket",
        "/run/user/0/bus",
        "/dev/log",
    ];
    let given = args.iter().map(String::as_str).filter(|arg| arg.starts_with('/'));
    for path in usual.into_iter().chain(given) {
        let shortcut = path.replace("/run/", "/var/run/");
        for path in [
            path,
            &shortcut,
            &format!("/proc/1/root{path}"),
            &format!("/dev/..{path}"),
        ] {
            // Nobody may listen on a host's usual ones; the file's being there would be enough.
            report.must_fail(format!("there is {path}"), fs::symlink_metadata(path));
            for (name, kind) in KINDS {
                report.must_fail(format!("{name} to {path}"), connect(kind, path.as_bytes()));
            }
            report.must_fail(format!("a datagram to {path}"), send_to(path.as_bytes()));
        }
    }
    for (name, kind) in KINDS {
        let own = format!("\0user-factory-test-own-{name}-{}", std::process::id());
        // That it works at all: among its own, a job may use abstract names.
        let (fd, bytes) = (socket(kind), address(own.as_bytes()));
        let arguments = [fd, bytes.as_ptr() as usize, bytes.len(), 0, 0, 0];
        call(libc::SYS_bind, arguments).expect("a job can bind a name");
        let _ = call(libc::SYS_listen, [fd, 5, 0, 0, 0, 0]);
        if let Err(error) = connect(kind, own.as_bytes()) {
            report.broken(format!("{name}: not even its own can be reached: {error}"));
        }
    }
    for arg in args {
        let Some((name, place)) = arg.split_once('@') else {
            continue;
        };
        let (place, expected) = match place.strip_suffix("@elsewhere") {
            Some(place) => (place, libc::ECONNREFUSED),
            None => (place, libc::EPERM),
        };
        let place = format!("\0{place}");
        let kind = KINDS
            .iter()
            .find(|(other, _)| *other == name)
            .expect("the test knows the kinds")
            .1;
        refused(
            report,
            format!("abstract {name}"),
            connect(kind, place.as_bytes()),
            expected,
        );
        if name == "datagram" {
            refused(
                report,
                "an abstract datagram",
                send_to(place.as_bytes()),
                expected,
            );
        }
    }
}

fn devices(report: &mut Report, _: &[String]) {
    let expected = BTreeSet::from(
        [
            "null", "zero", "full", "random", "urandom", "tty", "ptmx", "fd", "stdin", "stdout", "stderr",
            "pts", "shm", "mqueue",
        ]
        .map(str::to_owned),
    );
    let names = |dir: &str| -> BTreeSet<String> {
        let all = fs::read_dir(dir).expect("a job has a /dev").flatten();
        all.map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect()
    };
    if names("/dev") != expected {
        report.broken(format!("/dev has {:?}", names("/dev")));
    }
    for (dir, expected) in [
        ("/dev/pts", vec!["ptmx"]),
        ("/dev/shm", vec![]),
        ("/dev/mqueue", vec![]),
    ] {
        if !names(dir).iter().eq(expected.iter()) {
            report.broken(format!("{dir} has {:?}", names(dir)));
        }
    }
    for name in [
        "mem",
        "kmsg",
        "sda",
        "vda",
        "loop-control",
        "loop0",
        "fuse",
        "net/tun",
        "kvm",
        "vhost-net",
        "vhost-vsock",
        "uinput",
        "snapshot",
        "port",
        "console",
        "tty0",
        "tty1",
        "dri",
        "input",
        "mapper/control",
        "bus/usb",
        "autofs",
        "hwrng",
        "rtc0",
        "watchdog",
        "userfaultfd",
        "disk",
    ] {
        let path = Path::new("/dev").join(name);
        report.must_fail(format!("there is {name}"), path.symlink_metadata());
        report.must_fail(format!("opening {name}"), File::open(&path));
    }
    let mut places = own_places();
    places.push("/dev".into());
    for (name, kind, major, minor) in [
        ("mem", libc::S_IFCHR, 1, 1),
        ("port", libc::S_IFCHR, 1, 4),
        ("kmsg", libc::S_IFCHR, 1, 11),
        ("tty0", libc::S_IFCHR, 4, 0),
        ("loop-control", libc::S_IFCHR, 10, 237),
        ("fuse", libc::S_IFCHR, 10, 229),
        ("tun", libc::S_IFCHR, 10, 200),
        ("kvm", libc::S_IFCHR, 10, 232),
        ("vhost-net", libc::S_IFCHR, 10, 238),
        ("uinput", libc::S_IFCHR, 10, 223),
        ("snapshot", libc::S_IFCHR, 10, 231),
        ("sda", libc::S_IFBLK, 8, 0),
        ("loop0", libc::S_IFBLK, 7, 0),
        ("vda", libc::S_IFBLK, 254, 0),
        ("null", libc::S_IFCHR, 1, 3),
    ] {
        for place in &places {
            let path = c(place.join(format!("node-{name}")));
            let device = libc::makedev(major, minor) as usize;
            let arguments = [
                libc::AT_FDCWD as usize,
                path.as_ptr() as usize,
                (kind | 0o666) as usize,
                device,
                0,
                0,
            ];
            let made = call(libc::SYS_mknodat, arguments);
            report.must_fail(format!("a node {name} in {}", place.display()), made);
        }
    }
    report.must_fail("a file in /dev", fs::write("/dev/sda", "x"));
    report.must_fail("a link in /dev", symlink("/proc/kcore", "/dev/mem"));
    report.must_fail("none of /dev/tty", fs::remove_file("/dev/tty"));
}

fn terminal(report: &mut Report, _: &[String]) {
    let stat = fs::read_to_string("/proc/self/stat").expect("/proc is mounted");
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    // tty_nr is the fifth after the name: proc_pid_stat(5).
    if after_name.split_whitespace().nth(4) != Some("0") {
        report.broken(format!("it has a controlling terminal: {stat}"));
    }
    report.must_fail("its terminal", File::open("/dev/tty"));
    let child = fork(|| {
        let mut report = Report::default();
        let _master = typing(&mut report);
        println!("typing is over");
        // Not after the terminal is gone: that ends the leader of its session.
        std::process::exit(i32::from(report.broken));
    });
    if !matches!(waitpid(Pid::from_raw(child), None), Ok(WaitStatus::Exited(_, 0))) {
        report.broken("typing");
    }
}

/// In a session of its own, with a new terminal as its controlling one: there any user may type without the
/// filter, if the kernel has not been told to forbid it to all (`dev.tty.legacy_tiocsti`).
fn typing(report: &mut Report) -> File {
    let ioctl = |file: &File, request: usize, argument: usize| {
        let fd = file.as_raw_fd() as usize;
        call(libc::SYS_ioctl, [fd, request, argument, 0, 0, 0])
    };
    nix::unistd::setsid().expect("a child can make a session");
    let open = |path: &str| OpenOptions::new().read(true).write(true).open(path);
    let master = open("/dev/ptmx").expect("a job can have terminals");
    let mut number = [0i32];
    ioctl(&master, libc::TIOCSPTLCK as usize, number.as_ptr() as usize).expect("it can be unlocked");
    ioctl(&master, libc::TIOCGPTN as usize, number.as_mut_ptr() as usize).expect("it has a number");
    let terminal = open(&format!("/dev/pts/{}", number[0])).expect("it is there");
    ioctl(&terminal, libc::TIOCSCTTY as usize, 0).expect("it has no other");
    let through = File::open("/dev/tty").expect("now it has one");
    for file in [&terminal, &master, &through] {
        for request in [libc::TIOCSTI as usize, libc::TIOCLINUX as usize] {
            for bits in [0, 1 << 32, 1 << 63, 0xffff_ffff << 32] {
                // A letter; for the console's call, the request to paste what is selected.
                for byte in [b"x", b"\x03"] {
                    let result = ioctl(file, request | bits, byte.as_ptr() as usize);
                    refused(report, format!("{:#x}", request | bits), result, libc::EPERM);
                }
            }
        }
    }
    master
}

/// Arguments: numbers of the host's processes.
fn signals(report: &mut Report, args: &[String]) {
    for arg in args {
        let pid: usize = arg.parse().expect("the test gives numbers");
        report.must_fail(format!("there is {pid}"), fs::metadata(format!("/proc/{pid}")));
        for signal in [0, libc::SIGCONT, libc::SIGURG, libc::SIGKILL] {
            let signal = signal as usize;
            for (name, number, arguments) in [
                ("kill", libc::SYS_kill, [pid, signal, 0]),
                ("kill of a group", libc::SYS_kill, [pid.wrapping_neg(), signal, 0]),
                ("tkill", libc::SYS_tkill, [pid, signal, 0]),
                ("tgkill", libc::SYS_tgkill, [pid, pid, signal]),
            ] {
                let [a, b, c] = arguments;
                let result = call(number, [a, b, c, 0, 0, 0]);
                refused(report, format!("{name} {pid} {signal}"), result, libc::ESRCH);
            }
        }
        // By the number of a thread, too: PIDFD_THREAD.
        for flags in [0, libc::O_EXCL as usize] {
            let opened = call(libc::SYS_pidfd_open, [pid, flags, 0, 0, 0, 0]);
            report.must_fail(format!("pidfd_open {pid} {flags}"), opened);
        }
        let mut space = [0u64; 128];
        let space = space.as_mut_ptr() as usize;
        for (name, number, arguments) in [
            ("getpriority", libc::SYS_getpriority, [0, pid, 0, 0]),
            ("getpgid", libc::SYS_getpgid, [pid, 0, 0, 0]),
            (
                "sched_getaffinity",
                libc::SYS_sched_getaffinity,
                [pid, 1024, space, 0],
            ),
            ("prlimit", libc::SYS_prlimit64, [pid, 7, 0, space]),
            ("ptrace", libc::SYS_ptrace, [0x4206, pid, 0, 0]),
        ] {
            let [a, b, c, d] = arguments;
            let result = call(number, [a, b, c, d, 0, 0]);
            report.must_fail(format!("{name} {pid}"), result);
        }
        // A signal by way of a pipe's owner.
        let (reader, _writer) = io::pipe().expect("a job can make pipes");
        let arguments = [reader.as_raw_fd() as usize, libc::F_SETOWN as usize, pid, 0, 0, 0];
        report.must_fail(format!("owner {pid}"), call(libc::SYS_fcntl, arguments));
    }
}

/// To all that it can reach, but for the sender.
fn kill_all(_: &mut Report, _: &[String]) {
    fork(|| {
        nix::unistd::setsid().expect("a child can make a session");
        let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
        wait_for_ever();
    });
    wait_for_ever();
}

/// Arguments: what nobody else is to see.
fn keep_secret(report: &mut Report, args: &[String]) {
    let secret = &args[0];
    for place in own_places() {
        let file = place.join(secret);
        fs::write(&file, secret).expect("its own places are writable");
        use std::os::unix::fs::PermissionsExt;
        // It does its worst: everybody may read it.
        for path in [&file, &place] {
            let all = fs::Permissions::from_mode(0o777);
            let _ = fs::set_permissions(path, all);
        }
    }
    report.print("ready");
    wait_for_ever();
}

/// Arguments: the secret backwards, so that this program's own file has it nowhere; then paths that must not be
/// there. What can be read is searched, wherever it is.
fn seek(report: &mut Report, args: &[String]) {
    let secret: String = args[0].chars().rev().collect();
    for path in &args[1..] {
        for prefix in [
            "",
            "/proc/1/root",
            "/proc/self/root",
            "/proc/self/cwd/..",
            "/dev/shm/../..",
        ] {
            let path = PathBuf::from(format!("{prefix}{path}"));
            report.must_fail(path.display(), fs::read(&path).map(drop));
            report.must_fail(path.display(), fs::read_dir(&path));
            for name in ["marker", &*secret] {
                report.must_fail(path.join(name).display(), fs::read(path.join(name)));
            }
        }
    }
    let mut seen = 0;
    // Not what every host has of its distribution: it is large, and nothing of the factory's.
    for place in [
        "/home",
        "/root",
        "/run",
        "/srv",
        "/opt",
        "/input",
        "/work",
        "/tmp",
        "/var/tmp",
        "/var/lib/buildomat-user-factory",
        "/etc/buildomat-user-factory",
        "/dev",
    ] {
        search(report, Path::new(place), &secret, 0, &mut seen);
    }
    for entry in fs::read_dir("/proc").expect("/proc is mounted").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        // Every process's root is this one's, if it can be seen at all.
        for place in [
            "root/home",
            "root/work",
            "root/tmp",
            "root/var/tmp",
            "fd",
            "map_files",
        ] {
            search(report, &entry.path().join(place), &secret, 0, &mut seen);
        }
        for file in ["environ", "cmdline", "mountinfo", "maps"] {
            look_into(report, &entry.path().join(file), &secret, u64::MAX);
        }
    }
    report.print(format!("{seen} files were read"));
}

/// Small files: those that the test has written are.
fn look_into(report: &mut Report, path: &Path, secret: &str, most: u64) -> bool {
    let small = path
        .symlink_metadata()
        .is_ok_and(|meta| meta.is_file() && meta.len() <= most);
    let Ok(content) = (if small { fs::read(path) } else { return false }) else {
        return false;
    };
    if content
        .windows(secret.len())
        .any(|window| window == secret.as_bytes())
    {
        report.broken(format!("the secret is in {}", path.display()));
    }
    true
}

fn search(report: &mut Report, dir: &Path, secret: &str, depth: u32, seen: &mut u64) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_name().to_string_lossy().contains(secret) {
            report.broken(format!("the secret is {}", path.display()));
        }
        let Ok(kind) = entry.file_type() else {
            continue;
        };
        if kind.is_dir() && depth < 12 {
            search(report, &path, secret, depth + 1, seen);
        } else if kind.is_file() && look_into(report, &path, secret, 4096) {
            *seen += 1;
        }
    }
}

/// The arguments are FIFOs of the host that their modes let everybody write to, each with a reader.
fn fifos(report: &mut Report, args: &[String]) {
    let nonblock = libc::O_NONBLOCK;
    let write = |report: &mut Report, name: &str, path: &str, options: &OpenOptions| {
        let written = options
            .open(path)
            .and_then(|mut fifo| fifo.write_all(b"from the job"));
        report.must_fail(format!("{name} {path}"), written);
    };
    for arg in args {
        let only = OpenOptions::new().write(true).custom_flags(nonblock).clone();
        let both = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(nonblock)
            .clone();
        let made = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(nonblock)
            .clone();
        for (name, options) in [("write", &only), ("read and write", &both), ("create", &made)] {
            write(report, name, arg, options);
            write(report, name, &format!("/proc/self/root{arg}"), options);
        }
        // By a descriptor that was opened for less.
        for flags in [libc::O_PATH, libc::O_RDONLY] {
            let held = OpenOptions::new()
                .read(true)
                .custom_flags(flags | nonblock)
                .open(arg);
            let held = held.expect("its mode lets everybody read it");
            let path = format!("/proc/self/fd/{}", held.as_raw_fd());
            write(report, "write by descriptor", &path, &only);
        }
        report.must_fail(format!("link {arg}"), fs::hard_link(arg, "/work/fifo"));
        report.must_fail(format!("rename {arg}"), fs::rename(arg, "/work/fifo"));
    }
    // That it works at all: with its own, a job does what it likes, in each of its places.
    for place in own_places() {
        let own = place.join("own-fifo");
        let made = mkfifo(&own, Mode::S_IRUSR | Mode::S_IWUSR).map_err(io::Error::from);
        let written = made.and_then(|()| {
            let both = OpenOptions::new()
                .read(true)
                .write(true)
                .open(&own)?
                .write_all(b"x");
            fs::remove_file(&own).and(both)
        });
        if let Err(error) = written {
            report.broken(format!(
                "not even its own {} can be written: {error}",
                own.display()
            ));
        }
    }
}
