//! Group H, what the job's filter of system calls keeps from it: BPF programs, objects of file systems, line
//! disciplines, protocols, the scheduling of pid 1.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use crate::calls::refused;
use crate::leftovers::own_namespaces;
use crate::sys::{call, fork};
use crate::{Attempt, Report};

pub const ATTEMPTS: &[Attempt] = &[
    ("socket-programs", socket_programs),
    ("seccomp-programs", seccomp_programs),
    ("file-system-objects", file_system_objects),
    ("asynchronous-contexts", asynchronous_contexts),
    ("line-disciplines", line_disciplines),
    ("protocols", protocols),
    ("memory-policy", memory_policy),
    ("pid-1", pid_1),
];

/// A `struct sock_fprog` of one step, `BPF_RET | BPF_K` with this value. The step must outlive it.
fn program(step: &[u32; 2]) -> [usize; 2] {
    [1, step.as_ptr() as usize]
}

const fn answer(value: u32) -> [u32; 2] {
    [libc::BPF_RET, value]
}

fn set_option(fd: usize, option: i32, value: &[usize; 2], length: usize) -> io::Result<libc::c_long> {
    let address = value.as_ptr() as usize;
    let level = libc::SOL_SOCKET as usize;
    call(
        libc::SYS_setsockopt,
        [fd, level, option as usize, address, length, 0],
    )
}

/// One program on one socket: thousands of them are for no machine that anybody needs.
fn socket_programs(report: &mut Report, _: &[String]) {
    let (from, to) = (
        UdpSocket::bind("127.0.0.1:0").expect("anybody may have some port"),
        UdpSocket::bind("127.0.0.1:0").expect("anybody may have some port"),
    );
    let fd = to.as_raw_fd() as usize;
    // It drops every packet, if it is there.
    let nothing = answer(0);
    let filter = program(&nothing);
    let detach = |report: &mut Report| {
        // What is said to be there must go like what is.
        let gone = set_option(fd, libc::SO_DETACH_FILTER, &[0; 2], 4);
        report.must_work("detaching", gone);
    };
    let attached = set_option(fd, libc::SO_ATTACH_FILTER, &filter, 16);
    report.must_work("attaching a program to a socket", attached);
    let address = to.local_addr().expect("it is bound");
    from.send_to(b"x", address).expect("it is sent");
    to.set_read_timeout(Some(Duration::from_secs(5)))
        .expect("it takes a time");
    match to.recv(&mut [0; 8]) {
        Ok(1) => report.print("blocked: the program was not attached"),
        other => report.broken(format!("a program of the job's drops packets: {other:?}")),
    }
    detach(report);
    detach(report);
    let mut length = [16u32];
    let mut steps = [0u64; 2];
    let arguments = [
        fd,
        libc::SOL_SOCKET as usize,
        libc::SO_GET_FILTER as usize,
        steps.as_mut_ptr() as usize,
        length.as_mut_ptr() as usize,
        0,
    ];
    match call(libc::SYS_getsockopt, arguments) {
        Ok(_) if length == [0] => {}
        other => report.broken(format!("there is a program: {other:?}, {length:?}")),
    }
    let reuse = set_option(fd, libc::SO_REUSEPORT, &[1, 0], 4);
    report.must_work("other options", reuse);
    for (name, option, length) in [
        ("SO_ATTACH_BPF", libc::SO_ATTACH_BPF, 4),
        ("SO_ATTACH_REUSEPORT_CBPF", libc::SO_ATTACH_REUSEPORT_CBPF, 16),
        ("SO_ATTACH_REUSEPORT_EBPF", libc::SO_ATTACH_REUSEPORT_EBPF, 4),
    ] {
        for upper in [0, 1usize << 32] {
            let option = option as usize | upper;
            let arguments = [
                fd,
                libc::SOL_SOCKET as usize | upper,
                option,
                filter.as_ptr() as usize,
                length,
                0,
            ];
            let result = call(libc::SYS_setsockopt, arguments);
            refused(report, name, result, libc::ENOPROTOOPT);
        }
    }
}

/// One program of this process's own, or none. The argument: `allowed` or `refused`.
fn seccomp_programs(report: &mut Report, args: &[String]) {
    let all = answer(libc::SECCOMP_RET_ALLOW);
    let filter = program(&all);
    let address = filter.as_ptr() as usize;
    let mode = libc::SECCOMP_MODE_FILTER as usize;
    let option = libc::PR_SET_SECCOMP as usize;
    for (name, number, arguments) in [
        (
            "seccomp",
            libc::SYS_seccomp,
            [libc::SECCOMP_SET_MODE_FILTER as usize, 0, address, 0, 0, 0],
        ),
        ("prctl", libc::SYS_prctl, [option, mode, address, 0, 0, 0]),
    ] {
        let result = call(number, arguments);
        if args[0] == "allowed" {
            report.must_work(name, result);
        } else {
            refused(report, name, result, libc::EINVAL);
        }
    }
    let now = call(libc::SYS_prctl, [libc::PR_GET_SECCOMP as usize, 0, 0, 0, 0, 0]);
    if now.as_ref().ok() != Some(&2) {
        report.broken(format!("the mode is {now:?}"));
    }
}

fn ioctl(file: &File, request: usize, argument: usize) -> io::Result<libc::c_long> {
    let fd = file.as_raw_fd() as usize;
    call(libc::SYS_ioctl, [fd, request, argument, 0, 0, 0])
}

/// `linux/fscrypt.h`, `linux/fsverity.h`, `linux/btrfs.h`, `linux/fs.h`.
const OF_FILE_SYSTEMS: [(&str, usize); 18] = [
    ("FS_IOC_SET_ENCRYPTION_POLICY", 0x800c_6613),
    ("FS_IOC_GET_ENCRYPTION_PWSALT", 0x4010_6614),
    ("FS_IOC_GET_ENCRYPTION_POLICY", 0x400c_6615),
    ("FS_IOC_REMOVE_ENCRYPTION_KEY", 0xc040_6618),
    ("FS_IOC_REMOVE_ENCRYPTION_KEY_ALL_USERS", 0xc040_6619),
    ("FS_IOC_GET_ENCRYPTION_KEY_STATUS", 0xc080_661a),
    ("FS_IOC_ENABLE_VERITY", 0x4080_6685),
    ("FS_IOC_SETVERSION", 0x4008_7602),
    ("EXT4_IOC_MOVE_EXT", 0xc028_660f),
    ("FIFREEZE", 0xc004_5877),
    ("FITRIM", 0xc018_5879),
    ("FS_IOC_SHUTDOWN", 0x8004_587d),
    ("FS_IOC_SETFSLABEL", 0x4100_9432),
    ("BTRFS_IOC_SNAP_CREATE_V2", 0x5000_9417),
    ("BTRFS_IOC_SUBVOL_CREATE", 0x5000_940e),
    ("BTRFS_IOC_SUBVOL_SETFLAGS", 0x4008_941a),
    ("BTRFS_IOC_DEFRAG", 0x5000_9402),
    ("BTRFS_IOC_SYNC", 0x0000_9408),
];
const FS_IOC_ADD_ENCRYPTION_KEY: usize = 0xc050_6617;

/// Objects of a file system that outlive the job, and requests that it answers for as long as it takes. In `/work`, and
/// through a directory that the job can only read.
fn file_system_objects(report: &mut Report, _: &[String]) {
    fs::write("/work/file", [b'x'; 8192]).expect("its own places are writable");
    let writable = OpenOptions::new().read(true).write(true).open("/work/file");
    let writable = writable.expect("it is the job's own");
    for path in ["/work", "/work/file", "/", "/usr"] {
        let file = if path == "/work/file" {
            writable.try_clone().expect("there is room for one")
        } else {
            File::open(path).expect("a job can open its directories")
        };
        for (name, request) in OF_FILE_SYSTEMS {
            for upper in [0, 1 << 32] {
                // No memory there: a request that is let through fails otherwise, or works.
                let result = ioctl(&file, request | upper, 1);
                refused(report, format!("{name} at {path}"), result, libc::ENOTTY);
            }
        }
        // struct fscrypt_add_key_arg: a specifier that says identifier, the size of the key, and the key.
        let mut key = [0u32; 20 + 16];
        key[0] = 2;
        key[10] = 64;
        key[20..].fill(0x6b65_7921);
        let result = ioctl(&file, FS_IOC_ADD_ENCRYPTION_KEY, key.as_mut_ptr() as usize);
        refused(report, format!("a key for {path}"), result, libc::ENOTTY);
    }
    // What programs ask of files goes on.
    let mut flags = [0u64; 2];
    let result = ioctl(&writable, 0x8008_6601, flags.as_mut_ptr() as usize);
    report.must_work("FS_IOC_GETFLAGS", result);
    let mut attributes = [0u32; 7];
    let result = ioctl(&writable, 0x801c_581f, attributes.as_mut_ptr() as usize);
    report.must_work("FS_IOC_FSGETXATTR", result);
    let mut size = [0u32];
    report.must_work("FIGETBSZ", ioctl(&writable, 2, size.as_mut_ptr() as usize));
    // struct fiemap with room for one extent, of the whole file.
    let mut map = [0u64; 4 + 7];
    map[1] = u64::MAX;
    map[3] = 1;
    let result = ioctl(&writable, 0xc020_660b, map.as_mut_ptr() as usize);
    report.must_work("FS_IOC_FIEMAP", result);
}

/// How many it takes is known from the kernel's source; one is enough to see that there are none.
fn asynchronous_contexts(report: &mut Report, _: &[String]) {
    let mut context = [0usize];
    for events in [1, 65_536] {
        let result = call(
            libc::SYS_io_setup,
            [events, context.as_mut_ptr() as usize, 0, 0, 0, 0],
        );
        refused(report, format!("a context of {events}"), result, libc::ENOSYS);
    }
}

fn line_disciplines(report: &mut Report, _: &[String]) {
    let open = |path: &str| {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open(path);
        file.expect("a job can have terminals")
    };
    let master = open("/dev/ptmx");
    let mut number = [0i32];
    let result = ioctl(&master, libc::TIOCSPTLCK as usize, number.as_ptr() as usize);
    report.must_work("unlocking", result);
    let result = ioctl(&master, libc::TIOCGPTN as usize, number.as_mut_ptr() as usize);
    report.must_work("the number", result);
    let terminal = open(&format!("/dev/pts/{}", number[0]));
    let now = |file: &File| {
        let mut now = [-1i32];
        ioctl(file, libc::TIOCGETD as usize, now.as_mut_ptr() as usize).map(|_| now[0])
    };
    for file in [&master, &terminal] {
        // N_SLIP, N_MOUSE, N_PPP, N_HCI, N_GSM0710, N_CAIF, N_NULL and what there may be.
        for discipline in 0..31i32 {
            for upper in [0, 1 << 32] {
                let word = [discipline];
                let result = ioctl(file, libc::TIOCSETD as usize | upper, word.as_ptr() as usize);
                refused(
                    report,
                    format!("line discipline {discipline}"),
                    result,
                    libc::EPERM,
                );
            }
        }
        report.must_work("the discipline", now(file));
        let result = ioctl(file, libc::TIOCCONS as usize, 0);
        refused(report, "the console's output", result, libc::EPERM);
    }
    if !matches!(now(&terminal), Ok(0)) {
        report.broken(format!("the discipline is {:?}", now(&terminal)));
    }
    let mut size = [0u16; 4];
    let result = ioctl(&terminal, libc::TIOCGWINSZ as usize, size.as_mut_ptr() as usize);
    report.must_work("the window's size", result);
}

/// SOCK_PACKET: what was AF_PACKET once, and still is.
const OLD_PACKETS: i32 = 10;

fn socket(family: i32, kind: i32, protocol: i32) -> io::Result<libc::c_long> {
    let words = [family, kind, protocol].map(|word| word as usize);
    call(libc::SYS_socket, [words[0], words[1], words[2], 0, 0, 0])
}

/// The argument: `allowed` where netlink may set up what is a namespace's own.
fn protocols(report: &mut Report, args: &[String]) {
    let (stream, datagram, packets) = (libc::SOCK_STREAM, libc::SOCK_DGRAM, libc::SOCK_SEQPACKET);
    for family in [libc::AF_INET, libc::AF_INET6] {
        for (name, kind, protocol) in [
            ("SCTP", stream, libc::IPPROTO_SCTP),
            ("SCTP", packets, libc::IPPROTO_SCTP),
            ("SCTP", packets, 0),
            ("L2TP", datagram, 115),
            ("DCCP", libc::SOCK_DCCP, libc::IPPROTO_DCCP),
            ("SMC", stream, 256),
            ("MPTCP", stream, libc::IPPROTO_MPTCP),
            ("UDP-Lite", datagram, libc::IPPROTO_UDPLITE),
            ("a stream of UDP", stream, libc::IPPROTO_UDP),
            ("packets of the link", OLD_PACKETS, 0x300),
            ("reliable datagrams", libc::SOCK_RDM, 0),
        ] {
            for flags in [0, libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK] {
                let result = socket(family, kind | flags, protocol);
                refused(
                    report,
                    format!("{name} of {family}"),
                    result,
                    libc::EPROTONOSUPPORT,
                );
            }
            let words = [family, kind, protocol].map(|word| word as usize | 1 << 32);
            let mut pair = [0i32; 2];
            let pair = pair.as_mut_ptr() as usize;
            let result = call(libc::SYS_socketpair, [words[0], words[1], words[2], pair, 0, 0]);
            refused(report, format!("a pair of {name}"), result, libc::EPROTONOSUPPORT);
        }
        for (name, kind, protocol) in [
            ("TCP", stream, 0),
            ("TCP", stream, libc::IPPROTO_TCP),
            ("UDP", datagram, libc::IPPROTO_UDP),
        ] {
            match socket(family, kind | libc::SOCK_CLOEXEC, protocol) {
                // A host without IPv6.
                Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
                result => drop(report.must_work(&format!("{name} of {family}"), result)),
            }
        }
    }
    let usual = [
        libc::NETLINK_ROUTE,
        libc::NETLINK_SOCK_DIAG,
        libc::NETLINK_SELINUX,
        libc::NETLINK_KOBJECT_UEVENT,
    ];
    let of_namespaces = [libc::NETLINK_NETFILTER, libc::NETLINK_GENERIC];
    let allowed = args[0] == "allowed";
    for protocol in 0..40 {
        let result = socket(libc::AF_NETLINK, libc::SOCK_RAW, protocol);
        if usual.contains(&protocol) || allowed && of_namespaces.contains(&protocol) {
            // A kernel without SELinux has no such protocol.
            if protocol != libc::NETLINK_SELINUX {
                report.must_work(&format!("netlink {protocol}"), result);
            }
        } else {
            refused(
                report,
                format!("netlink {protocol}"),
                result,
                libc::EPROTONOSUPPORT,
            );
        }
    }
    if allowed {
        let child = fork(|| {
            let mut report = Report::default();
            own_namespaces().expect("the slot allows user namespaces");
            let packet = socket(libc::AF_INET, OLD_PACKETS, 0x300);
            refused(&mut report, "packets of the link", packet, libc::EPROTONOSUPPORT);
            std::process::exit(i32::from(report.broken));
        });
        let ended = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(child), None);
        if !matches!(ended, Ok(nix::sys::wait::WaitStatus::Exited(_, 0))) {
            report.broken(format!("in namespaces of its own: {ended:?}"));
        }
    }
}

/// What numactl, databases and the JVM set for their own memory works; other processes' memory is not moved.
fn memory_policy(report: &mut Report, _: &[String]) {
    let memory = vec![1u8; 1 << 20];
    // Pages have 64 KiB at most.
    let address = (memory.as_ptr() as usize).next_multiple_of(64 << 10);
    let (length, node) = (64 << 10, [1u64]);
    let mask = node.as_ptr() as usize;
    // MPOL_BIND to node 0; MPOL_DEFAULT.
    let bind = call(libc::SYS_mbind, [address, length, 2, mask, 64, 0]);
    let set = call(libc::SYS_set_mempolicy, [1, mask, 64, 0, 0, 0]);
    let mut mode = [-1i32];
    let get = call(
        libc::SYS_get_mempolicy,
        [mode.as_mut_ptr() as usize, 0, 0, 0, 0, 0],
    );
    let pages = [address];
    let mut states = [0i32];
    let moved = call(
        libc::SYS_move_pages,
        [0, 1, pages.as_ptr() as usize, 0, states.as_mut_ptr() as usize, 0],
    );
    for (name, result) in [
        ("mbind", bind),
        ("set_mempolicy", set),
        ("get_mempolicy", get),
        ("where a page is", moved),
    ] {
        match result {
            // A kernel without NUMA.
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {}
            result => drop(report.must_work(name, result)),
        }
    }
    drop(memory);
}

/// What can be seen of how pid 1 runs.
fn state_of_pid_1() -> Vec<String> {
    let mut words = [0u64; 16];
    let address = words.as_mut_ptr() as usize;
    let files = libc::RLIMIT_NOFILE as usize;
    let queries = [
        ("priority", libc::SYS_getpriority, [0, 1, 0, 0, 0, 0]),
        ("scheduler", libc::SYS_sched_getscheduler, [1, 0, 0, 0, 0, 0]),
        ("disk", libc::SYS_ioprio_get, [1, 1, 0, 0, 0, 0]),
        (
            "processors",
            libc::SYS_sched_getaffinity,
            [1, 128, address, 0, 0, 0],
        ),
        ("files", libc::SYS_prlimit64, [1, files, 0, address, 0, 0]),
    ];
    let answers = queries.map(|(name, number, arguments)| {
        let answer = call(number, arguments);
        format!("{name}: {answer:?} {words:x?}")
    });
    answers.into()
}

/// Slow pid 1 down, or take from it what it needs: it has the job's uid, and keeps the job's time limit.
fn pid_1(report: &mut Report, _: &[String]) {
    let before = state_of_pid_1();
    let zero = [0u32; 16];
    let zero = zero.as_ptr() as usize;
    let one = [1u64; 16];
    let one = one.as_ptr() as usize;
    // struct sched_attr: its size, SCHED_IDLE.
    let attributes = [48u32, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let attributes = attributes.as_ptr() as usize;
    let idle = libc::SCHED_IDLE as usize;
    let idle_disk = 3 << 13;
    let (files, memory) = (libc::RLIMIT_NOFILE as usize, libc::RLIMIT_AS as usize);
    let limit = [3u64, 3];
    let limit = limit.as_ptr() as usize;
    for upper in [0, 1usize << 32] {
        let pid = 1 | upper;
        for (name, number, arguments) in [
            ("setpriority", libc::SYS_setpriority, [0, pid, 19, 0, 0, 0]),
            (
                "setpriority of its group",
                libc::SYS_setpriority,
                [1, pid, 19, 0, 0, 0],
            ),
            (
                "setpriority of one's group",
                libc::SYS_setpriority,
                [1, upper, 19, 0, 0, 0],
            ),
            (
                "setpriority of the user",
                libc::SYS_setpriority,
                [2, upper, 19, 0, 0, 0],
            ),
            ("ioprio_set", libc::SYS_ioprio_set, [1, pid, idle_disk, 0, 0, 0]),
            (
                "ioprio_set of its group",
                libc::SYS_ioprio_set,
                [2, pid, idle_disk, 0, 0, 0],
            ),
            (
                "ioprio_set of one's group",
                libc::SYS_ioprio_set,
                [2, upper, idle_disk, 0, 0, 0],
            ),
            (
                "ioprio_set of the user",
                libc::SYS_ioprio_set,
                [3, upper, idle_disk, 0, 0, 0],
            ),
            (
                "SCHED_IDLE",
                libc::SYS_sched_setscheduler,
                [pid, idle, zero, 0, 0, 0],
            ),
            (
                "sched_setparam",
                libc::SYS_sched_setparam,
                [pid, zero, 0, 0, 0, 0],
            ),
            (
                "sched_setattr",
                libc::SYS_sched_setattr,
                [pid, attributes, 0, 0, 0, 0],
            ),
            (
                "sched_setaffinity",
                libc::SYS_sched_setaffinity,
                [pid, 128, one, 0, 0, 0],
            ),
            (
                "the limit of files",
                libc::SYS_prlimit64,
                [pid, files, limit, 0, 0, 0],
            ),
            (
                "the limit of memory",
                libc::SYS_prlimit64,
                [pid, memory, limit, 0, 0, 0],
            ),
        ] {
            refused(report, name, call(number, arguments), libc::EPERM);
        }
    }
    let after = state_of_pid_1();
    if before != after {
        report.broken(format!("pid 1: {before:?}, and then {after:?}"));
    }
    // One's own is another matter.
    report.must_work("nice", call(libc::SYS_setpriority, [0, 0, 1, 0, 0, 0]));
    report.must_work(
        "SCHED_IDLE for oneself",
        call(libc::SYS_sched_setscheduler, [0, idle, zero, 0, 0, 0]),
    );
}
