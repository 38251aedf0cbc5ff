//! Group C: system calls, environment, groups, scheduling, raw sockets.

use std::fmt::Display;
use std::fs;
use std::io;
use std::mem::size_of_val;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, getgid, getgroups};

use supervisor::selftest::calls::{
    ALL_BITS, NEVER, NO_FILE, NOT_FOR_FILES, NOWHERE, OF_NAMESPACES, SystemCall, UNAVAILABLE,
};

use crate::leftovers::{own_namespaces, uid};
use crate::sys::{c, call, fork, wait_for_ever};
use crate::{Attempt, Report};

pub const ATTEMPTS: &[Attempt] = &[
    ("calls", calls),
    ("calls-in-user-namespace", calls_in_user_namespace),
    ("other-entry-points", other_entry_points),
    ("file-handles", file_handles),
    ("environment", environment),
    ("groups", groups),
    ("scheduling", scheduling),
    ("raw-sockets", raw_sockets),
];

/// It must fail, and for this reason: another one comes from beyond the sandbox.
pub fn refused<T>(report: &mut Report, what: impl Display, result: io::Result<T>, reason: i32) {
    match result {
        Err(error) if error.raw_os_error() == Some(reason) => report.must_fail::<T, _>(what, Err(error)),
        Err(error) => report.broken(format!("{what}: it got past the filter, and then: {error}")),
        Ok(_) => report.broken(format!("{what}: it worked")),
    }
}

fn try_all(report: &mut Report, all: &[SystemCall], reason: i32) {
    for (name, number, arguments) in all {
        refused(report, name, call(*number, *arguments), reason);
    }
}

/// What no slot allows.
fn try_never(report: &mut Report) {
    try_all(report, NEVER, libc::EPERM);
    try_all(report, UNAVAILABLE, libc::ENOSYS);
    try_all(report, NOT_FOR_FILES, libc::EOPNOTSUPP);
}

fn calls(report: &mut Report, _: &[String]) {
    try_never(report);
    try_all(report, OF_NAMESPACES, libc::EPERM);
    refused(
        report,
        "clone3",
        call(libc::SYS_clone3, [NOWHERE, 0, 0, 0, 0, 0]),
        libc::ENOSYS,
    );
    // Far above what any kernel has, and just above what was weighed.
    for number in [470, 471, 500, 4000] {
        let result = call(number, [NO_FILE, NOWHERE, NOWHERE, ALL_BITS, ALL_BITS, 0]);
        refused(report, format!("call {number}"), result, libc::ENOSYS);
    }
    families(report);
}

fn families(report: &mut Report) {
    let allowed = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];
    for family in (0..64).filter(|family| !allowed.contains(family)) {
        for kind in [
            libc::SOCK_STREAM,
            libc::SOCK_DGRAM,
            libc::SOCK_RAW,
            libc::SOCK_SEQPACKET,
        ] {
            for number in [libc::SYS_socket, libc::SYS_socketpair] {
                // The upper half of an argument is nothing to the kernel; a filter could fall for it.
                for upper in [0, 1 << 32] {
                    let arguments = [family as usize | upper, kind as usize, 0, NOWHERE, 0, 0];
                    let result = call(number, arguments);
                    if result.as_ref().map_err(io::Error::raw_os_error) != Err(Some(libc::EAFNOSUPPORT)) {
                        report.broken(format!("a socket of family {family}, type {kind}: {result:?}"));
                    }
                }
            }
        }
    }
}

fn calls_in_user_namespace(report: &mut Report, _: &[String]) {
    if let Err(error) = own_namespaces() {
        report.broken(format!(
            "the slot allows user namespaces, and there is none: {error}"
        ));
    }
    try_never(report);
    families(report);
    other_entry_points(report, &[]);
}

/// The numbers of `unistd_32.h`, and those of x32, which are the usual ones with a bit more.
#[cfg(target_arch = "x86_64")]
fn other_entry_points(report: &mut Report, _: &[String]) {
    use crate::sys::call_of_32_bits;
    for (name, number, argument) in [
        ("getpid", 20, 0),
        ("unshare", 310, libc::CLONE_NEWUSER as u32),
        ("userfaultfd", 374, 1),
        ("modify_ldt", 123, 0),
        ("keyctl", 288, 9999),
        ("iopl", 110, 9),
    ] {
        let result = call_of_32_bits(number, argument);
        refused(report, format!("{name} by int 0x80"), result, libc::ENOSYS);
    }
    const X32: libc::c_long = 0x4000_0000;
    for (name, number, arguments) in [NEVER, UNAVAILABLE, NOT_FOR_FILES, OF_NAMESPACES].concat() {
        let result = call(number | X32, arguments);
        refused(report, format!("{name} of x32"), result, libc::ENOSYS);
    }
    refused(
        report,
        "getpid of x32",
        call(libc::SYS_getpid | X32, [0; 6]),
        libc::ENOSYS,
    );
}

/// The numbers of 32-bit Arm (`arch/arm/tools/syscall.tbl`), which only a program of that architecture can use. It ends by
/// SIGILL where its call does not exist, and by SIGSEGV where anything else was answered.
#[cfg(target_arch = "aarch64")]
fn other_entry_points(report: &mut Report, _: &[String]) {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    use std::os::unix::process::ExitStatusExt;
    for (name, number, argument) in [
        ("getpid", 20, 0),
        ("unshare", 337, libc::CLONE_NEWUSER as u32),
        ("userfaultfd", 388, 1),
        ("keyctl", 311, 9999),
        ("bpf", 386, 0),
        // ARM_NR_cacheflush, of the calls that are no architecture's but Arm's.
        ("cacheflush", 0xf_0002, 0),
    ] {
        let path = format!("/work/arm-{name}");
        let mut options = fs::File::options();
        let file = options.write(true).create_new(true).mode(0o755).open(&path);
        let written = file.and_then(|mut file| file.write_all(&arm_program(number, argument)));
        if let Err(error) = written {
            report.broken(format!("{path}: {error}"));
            continue;
        }
        let what = format!("{name} of 32-bit Arm");
        match Command::new(&path).status() {
            // A kernel without such programs (ENOEXEC, execve(2)).
            Err(error) => refused(report, what, Err::<(), _>(error), libc::ENOEXEC),
            Ok(status) if status.signal() == Some(libc::SIGILL) => {
                let absent = io::Error::from_raw_os_error(libc::ENOSYS);
                report.must_fail::<(), _>(what, Err(absent));
            }
            Ok(status) => report.broken(format!("{what}: it was answered: {status}")),
        }
    }
}

/// An executable file (`elf(5)`) of 32-bit Arm that makes this call.
#[cfg(target_arch = "aarch64")]
fn arm_program(number: u32, argument: u32) -> Vec<u8> {
    const BASE: u32 = 0x1_0000;
    const HEADERS: u32 = 52 + 32;
    // movw and movt, the two halves of a register.
    let load = |register: u32, value: u32| {
        [(0xe300_0000, value & 0xffff), (0xe340_0000, value >> 16)]
            .map(|(step, half)| step | register << 12 | (half & 0xf000) << 4 | half & 0xfff)
    };
    let mut steps = [load(7, number), load(0, argument), load(1, 0)].concat();
    steps.extend([
        0xef00_0000,                       // svc 0
        0xe370_0000 | libc::ENOSYS as u32, // cmn r0, #ENOSYS
        0x0a00_0000,                       // beq, over one step
        0xe591_1000,                       // ldr r1, [r1]
        0xe7f0_00f0,                       // udf 0
    ]);
    let length = HEADERS + 4 * steps.len() as u32;
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let half = |values: &[u16]| {
        values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    let word = |values: &[u32]| {
        values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    // ET_EXEC, EM_ARM; the entry, the program headers, none of sections, EABI version 5; one program header.
    file.extend(half(&[2, 40]));
    file.extend(word(&[1, BASE + HEADERS, 52, 0, 0x0500_0000]));
    file.extend(half(&[52, 32, 1, 40, 0, 0]));
    // PT_LOAD, of all of it, to be read and executed.
    file.extend(word(&[1, 0, BASE, BASE, length, length, 5, 0x1_0000]));
    file.extend(word(&steps));
    file
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn other_entry_points(_: &mut Report, _: &[String]) {}

/// What let containers read all of the host: the root of a file system has a number that everybody knows, so
/// its handle can be made up.
fn file_handles(report: &mut Report, _: &[String]) {
    for place in ["/", "/etc", "/usr", "/work", "/home"] {
        let directory = fs::File::open(place).expect("a job can open its directories");
        for root in [2u32, 64, 128, 256] {
            // struct file_handle with an inode's number and its generation, 0.
            let handle: [u32; 4] = [8, 1, root, 0];
            let address = handle.as_ptr() as usize;
            let flags = (libc::O_RDONLY | libc::O_DIRECTORY) as usize;
            // On the directory, on the working directory, and on the kernel's own root of nsfs.
            for on in [
                directory.as_raw_fd() as usize,
                libc::AT_FDCWD as usize,
                -10003isize as usize,
            ] {
                let arguments = [on, address, flags, 0, 0, 0];
                let what = format!("inode {root} of the file system at {place}");
                let opened = call(libc::SYS_open_by_handle_at, arguments);
                refused(report, &what, opened, libc::EPERM);
            }
        }
        // AT_EMPTY_PATH, AT_SYMLINK_FOLLOW, AT_HANDLE_FID, AT_HANDLE_MNT_ID_UNIQUE: any user may ask these.
        for flags in [0, 0x1000, 0x400, 0x200, 0x1] {
            let (mut handle, mut mount, name) = ([0u8; 136], 0i32, c(place));
            handle[0] = 128;
            let arguments = [
                NO_FILE,
                name.as_ptr() as usize,
                handle.as_mut_ptr() as usize,
                &raw mut mount as usize,
                flags,
                0,
            ];
            let named = call(libc::SYS_name_to_handle_at, arguments);
            refused(report, format!("the handle of {place}"), named, libc::EOPNOTSUPP);
        }
    }
}

/// Put in place what the slot's variables name, and stay, so that the test can look at root's processes.
fn environment(report: &mut Report, args: &[String]) {
    for path in args {
        let made = fs::write(path, "#!/bin/sh\ntouch /work/it-was-run\n");
        made.expect("a job can write to its own directories");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(path, mode).expect("the file is the job's own");
    }
    report.print("everything is in place");
    wait_for_ever()
}

/// Arguments: the groups that the job must be in besides its own; `not`; a file that only another group may read;
/// a file that the slot's group may read.
fn groups(report: &mut Report, args: &[String]) {
    let end = args
        .iter()
        .position(|arg| arg == "not")
        .expect("the test says not");
    let mut expected: Vec<u32> = args[..end]
        .iter()
        .map(|arg| arg.parse().expect("a gid"))
        .collect();
    let mut found: Vec<u32> = getgroups()
        .expect("nothing is wrong with it")
        .iter()
        .map(|gid| gid.as_raw())
        .collect();
    found.retain(|gid| *gid != getgid().as_raw());
    expected.sort_unstable();
    found.sort_unstable();
    if found != expected || getgid().as_raw() != uid() {
        report.broken(format!("groups {found:?} and {}, not {expected:?}", getgid()));
    }
    report.must_fail(&args[end + 1], fs::read(&args[end + 1]));
    if fs::read(&args[end + 2]).is_err() {
        report.broken("the slot's own group opens nothing, so that this attempt shows nothing");
    }
    for gid in [0u32, 1, 4, 6, 42, 65534] {
        let list = [gid];
        let one = gid as usize;
        let set = call(libc::SYS_setgroups, [1, list.as_ptr() as usize, 0, 0, 0, 0]);
        refused(report, format!("setgroups to {gid}"), set, libc::EPERM);
        refused(
            report,
            format!("setgid to {gid}"),
            call(libc::SYS_setgid, [one, 0, 0, 0, 0, 0]),
            libc::EPERM,
        );
        let set = call(libc::SYS_setresgid, [one, one, one, 0, 0, 0]);
        refused(report, format!("setresgid to {gid}"), set, libc::EPERM);
    }
    // Giving up a group opens what is closed to its members.
    refused(
        report,
        "leaving all groups",
        call(libc::SYS_setgroups, [0; 6]),
        libc::EPERM,
    );
    for program in [&["sg", "root", "-c", "id -g"][..], &["newgrp", "root"]] {
        let Ok(output) = Command::new(program[0]).args(&program[1..]).output() else {
            continue;
        };
        let output_text = String::from_utf8_lossy(&output.stdout);
        if output_text.trim() == "0" {
            report.broken(format!("{program:?} gives root's group"));
        }
    }
}

fn limit(resource: u32) -> (u64, u64) {
    let mut now = [0u64; 2];
    let arguments = [0, resource as usize, 0, now.as_mut_ptr() as usize, 0, 0];
    call(libc::SYS_prlimit64, arguments).expect("a job can read its limits");
    (now[0], now[1])
}

fn set_limit(resource: u32, to: u64) -> io::Result<libc::c_long> {
    let new = [to, to];
    call(
        libc::SYS_prlimit64,
        [0, resource as usize, new.as_ptr() as usize, 0, 0, 0],
    )
}

fn scheduling(report: &mut Report, args: &[String]) {
    for (number, name) in [
        (libc::SYS_sethostname, "host"),
        (libc::SYS_setdomainname, "domain"),
    ] {
        let text = c("taken-over");
        let result = call(number, [text.as_ptr() as usize, 10, 0, 0, 0, 0]);
        refused(report, format!("setting the {name} name"), result, libc::EPERM);
    }
    // A microsecond that there is not: it could not be set.
    let time = [0u64, u64::MAX];
    let result = call(libc::SYS_settimeofday, [time.as_ptr() as usize, 0, 0, 0, 0, 0]);
    refused(report, "setting the clock", result, libc::EPERM);

    // A child tries, so that a success would not slow the machine down for long.
    for (name, policy, priority) in [
        ("FIFO", libc::SCHED_FIFO, 1),
        ("RR", libc::SCHED_RR, 1),
        ("FIFO at 99", libc::SCHED_FIFO, 99),
    ] {
        let priority = [priority as u32];
        let arguments = [0, policy as usize, priority.as_ptr() as usize, 0, 0, 0];
        refused(
            report,
            name,
            call(libc::SYS_sched_setscheduler, arguments),
            libc::EPERM,
        );
    }
    // struct sched_attr: SCHED_DEADLINE, 1 ms of each 100.
    let (runtime, period) = (1_000_000u64, 100_000_000u64);
    let mut deadline = [0u64; 6];
    deadline[0] = size_of_val(&deadline) as u64 | 6 << 32;
    deadline[3..].copy_from_slice(&[runtime, period, period]);
    let result = call(
        libc::SYS_sched_setattr,
        [0, deadline.as_ptr() as usize, 0, 0, 0, 0],
    );
    refused(report, "SCHED_DEADLINE", result, libc::EPERM);
    let result = call(
        libc::SYS_setpriority,
        [libc::PRIO_PROCESS as usize, 0, -1i32 as usize, 0, 0, 0],
    );
    refused(report, "nice below zero", result, libc::EACCES);
    let (process, real_time) = (1, 1 << 13);
    let result = call(libc::SYS_ioprio_set, [process, 0, real_time, 0, 0, 0]);
    refused(report, "the disk's real-time class", result, libc::EPERM);

    let much = vec![0u8; 16 << 20];
    let result = call(libc::SYS_mlock, [much.as_ptr() as usize, much.len(), 0, 0, 0, 0]);
    refused(report, "locking 16 MiB", result, libc::ENOMEM);
    let result = call(libc::SYS_shmget, [0, 64 << 20, 0o4000 | 0o1000 | 0o600, 0, 0, 0]);
    report.must_fail("64 MiB of huge pages, which are locked", result);

    for (name, resource, most) in [
        ("NPROC", libc::RLIMIT_NPROC, args[0].parse().expect("a number")),
        ("NOFILE", libc::RLIMIT_NOFILE, args[1].parse().expect("a number")),
        ("MEMLOCK", libc::RLIMIT_MEMLOCK, 8 << 20),
        ("MSGQUEUE", libc::RLIMIT_MSGQUEUE, 819_200),
        ("SIGPENDING", libc::RLIMIT_SIGPENDING, 16_384),
        ("RTPRIO", libc::RLIMIT_RTPRIO, 0),
        ("NICE", libc::RLIMIT_NICE, 0),
    ] {
        let (soft, hard) = limit(resource);
        if soft > most || hard > most {
            report.broken(format!("RLIMIT_{name} is {soft} and {hard}, over {most}"));
        }
        refused(
            report,
            format!("more than RLIMIT_{name}"),
            set_limit(resource, hard + 1),
            libc::EPERM,
        );
        if limit(resource) != (soft, hard) {
            report.broken(format!("RLIMIT_{name} has changed"));
        }
    }
    core(report);
}

/// Setting the limit of cores is answered as if it were done; but no core comes.
fn core(report: &mut Report) {
    for to in [0, u64::MAX, 1 << 30] {
        if let Err(error) = set_limit(libc::RLIMIT_CORE, to) {
            report.broken(format!(
                "setting the limit of cores is not answered with success: {error}"
            ));
        }
        if limit(libc::RLIMIT_CORE) != (1, 1) {
            report.broken(format!("the limit of cores is {:?}", limit(libc::RLIMIT_CORE)));
        }
    }
    std::env::set_current_dir("/work").expect("a job has /work");
    let child = fork(|| {
        let abort = libc::SIGABRT as usize;
        let _ = call(libc::SYS_kill, [std::process::id() as usize, abort, 0, 0, 0, 0]);
        wait_for_ever();
    });
    match waitpid(Pid::from_raw(child), None) {
        Ok(WaitStatus::Signaled(_, _, false)) => {}
        other => report.broken(format!("the crash: {other:?}")),
    }
    let left: Vec<_> = fs::read_dir("/work").expect("it is there").flatten().collect();
    if !left.is_empty() {
        report.broken(format!("a core: {left:?}"));
    }
}

/// Arguments: the lowest port that anybody may have on this host, and the name of an interface.
fn raw_sockets(report: &mut Report, args: &[String]) {
    let open = |family: i32, kind: i32, protocol: i32| {
        call(
            libc::SYS_socket,
            [family as usize, kind as usize, protocol as usize, 0, 0, 0],
        )
    };
    for (name, family) in [("IPv4", libc::AF_INET), ("IPv6", libc::AF_INET6)] {
        for protocol in [
            libc::IPPROTO_ICMP,
            libc::IPPROTO_TCP,
            libc::IPPROTO_UDP,
            libc::IPPROTO_RAW,
            libc::IPPROTO_ICMPV6,
        ] {
            let result = open(family, libc::SOCK_RAW, protocol);
            refused(
                report,
                format!("a raw socket of {name}, protocol {protocol}"),
                result,
                libc::EPERM,
            );
        }
    }
    for kind in [libc::SOCK_RAW, libc::SOCK_DGRAM] {
        let every = i32::from((libc::ETH_P_ALL as u16).to_be());
        let result = open(libc::AF_PACKET, kind, every);
        refused(report, "a packet socket", result, libc::EAFNOSUPPORT);
    }
    let lowest: u16 = args[0].parse().expect("a port");
    for port in [1, 22, 80, 443, 1023].into_iter().filter(|port| *port < lowest) {
        for address in ["0.0.0.0", "127.0.0.1", "::", "::1"] {
            let at = (address, port);
            let taken = |error: &io::Error| {
                !matches!(
                    error.raw_os_error(),
                    Some(libc::EACCES | libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)
                )
            };
            match TcpListener::bind(at) {
                Err(error) if !taken(&error) => {}
                other => report.broken(format!("listening at {at:?}: {other:?}")),
            }
            match UdpSocket::bind(at) {
                Err(error) if !taken(&error) => {}
                other => report.broken(format!("datagrams at {at:?}: {other:?}")),
            }
        }
    }
    let socket = UdpSocket::bind("127.0.0.1:0").expect("anybody may have some port");
    let fd = socket.as_raw_fd() as usize;
    // struct ifreq: the interface's name, and flags.
    let mut request = [0u8; 40];
    request[..args[1].len()].copy_from_slice(args[1].as_bytes());
    let address = request.as_mut_ptr() as usize;
    call(libc::SYS_ioctl, [fd, 0x8913, address, 0, 0, 0]).expect("anybody may read an interface's flags");
    let flags = u16::from_ne_bytes([request[16], request[17]]) | libc::IFF_PROMISC as u16;
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    let result = call(libc::SYS_ioctl, [fd, 0x8914, address, 0, 0, 0]);
    refused(report, "listening to everybody's packets", result, libc::EPERM);
    for (name, level, option) in [
        ("SO_MARK", libc::SOL_SOCKET, libc::SO_MARK),
        ("SO_RCVBUFFORCE", libc::SOL_SOCKET, libc::SO_RCVBUFFORCE),
        ("IP_TRANSPARENT", libc::SOL_IP, libc::IP_TRANSPARENT),
    ] {
        let one = [1i32];
        let arguments = [fd, level as usize, option as usize, one.as_ptr() as usize, 4, 0];
        refused(report, name, call(libc::SYS_setsockopt, arguments), libc::EPERM);
    }
    new_interface(report);
}

/// Ask the kernel over netlink for a dummy interface: a process that may do that may set up the host's network.
fn new_interface(report: &mut Report) {
    let arguments = [libc::AF_NETLINK as usize, libc::SOCK_RAW as usize, 0, 0, 0, 0];
    let netlink = call(libc::SYS_socket, arguments).expect("programs ask for addresses this way") as usize;
    // struct nlmsghdr (length, RTM_NEWLINK, REQUEST | ACK), and an empty struct ifinfomsg.
    let mut message = [0u32; 8];
    message[0] = size_of_val(&message) as u32;
    message[1] = 16 | 0x5 << 16;
    let address = message.as_ptr() as usize;
    call(
        libc::SYS_sendto,
        [netlink, address, size_of_val(&message), 0, 0, 0],
    )
    .expect("netlink takes messages");
    let mut answer = [0u32; 64];
    let address = answer.as_mut_ptr() as usize;
    call(
        libc::SYS_recvfrom,
        [netlink, address, size_of_val(&answer), 0, 0, 0],
    )
    .expect("it answers");
    let error = -(answer[4] as i32);
    let result = if error == 0 {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(error))
    };
    refused(report, "setting up an interface", result, libc::EPERM);
}
