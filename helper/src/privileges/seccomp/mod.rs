//! Which system calls are let through, as programs for the kernel (`seccomp(2)`). Pure: `sys` installs them.
//!
//! There are three. [`monitor`] refuses what neither the helper nor any job ever needs; whatever the monitor
//! starts inherits it. [`session`] allows a process that reads what the supervisor sends just what its
//! requests take. [`job`] is that of a job: like those of container engines it lets ordinary
//! software work, and refuses what has led out of sandboxes or burdens the host.

mod ioctl;
mod program;
mod socket_rules;

use std::collections::BTreeMap;

use libc::c_long;
#[cfg(target_arch = "arm")]
use libc::{
    SYS_arm_sync_file_range as SYS_sync_file_range, SYS_fstatat64 as SYS_newfstatat, SYS_mmap2 as SYS_mmap,
};
#[cfg(not(target_arch = "arm"))]
use libc::{SYS_migrate_pages, SYS_mmap, SYS_newfstatat, SYS_sync_file_range};

use crate::sys;
pub use program::JobFilter;
use program::{
    ABSENT, ALLOW, DONE, LAST, REFUSED, Steps, SyscallRules, answer, argument, decide, errno, if_any,
    if_bits, if_null,
};

/// What an operator does where the kernel has not installed a filter in time (row 86 of `docs/evidence/attacks.md`).
pub const LATE_FILTER_HINT: &str = "Look for kernel workers in bpf_prog_free_deferred, in /proc/PID/stack; if there are any, \
                           reboot the host";

/// The last system call that was weighed for the lists below: `file_setattr` of Linux 6.17. A later one does
/// not exist for a job, until somebody has looked at it. Every architecture has the same numbers from 424 on.
const LAST_REVIEWED: c_long = 469;

// Newer than the C library's list.
const OPEN_TREE_ATTR: c_long = 467;
const FILE_SETATTR: c_long = 469;

// What 32-bit Arm has besides, by the numbers of its `arch/arm/tools/syscall.tbl` and `uapi/asm/unistd.h`.
const IS_ARM: bool = cfg!(target_arch = "arm");
#[cfg(target_arch = "arm")]
#[allow(non_upper_case_globals)]
const SYS_migrate_pages: c_long = 400;
/// `clock_settime64`, `clock_adjtime64`.
const NEVER_32: &[c_long] = if IS_ARM { &[404, 405] } else { &[] };
/// `_llseek`, `fstat64`, `setgroups32`, `setresuid32`, `setresgid32`, `fcntl64`, `clock_gettime64`, `clock_nanosleep_time64`,
/// `ppoll_time64`, `futex_time64`.
const SESSION_32: &[c_long] = if IS_ARM {
    &[140, 197, 206, 208, 210, 221, 403, 407, 414, 422]
} else {
    &[]
};
/// The processor's own, after all others: `cacheflush`, `set_tls`, `get_tls`.
const OF_PROCESSOR: &[c_long] = if IS_ARM {
    &[0xf_0002, 0xf_0005, 0xf_0006]
} else {
    &[]
};

/// For no job, whatever its slot says, and the helper needs none of them: refused with EPERM, which the man page of
/// each names.
const NEVER: &[c_long] = &[
    // Programs and handlers in the kernel, and what reads other processes through it.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_fanotify_init,
    // Files by handle: past every mount and directory permission.
    libc::SYS_open_by_handle_at,
    // The machine.
    libc::SYS_kexec_load,
    #[cfg(not(target_arch = "riscv64"))]
    libc::SYS_kexec_file_load,
    // The same, which the C library's list lacks there.
    #[cfg(target_arch = "riscv64")]
    294,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_syslog,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_quotactl,
    libc::SYS_vhangup,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
];

/// The same, but they do not exist (ENOSYS): programs try these calls, and do without where the kernel has none.
const UNAVAILABLE: &[c_long] = &[
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // The host has room for `fs.aio-max-nr` events of all users together, which four contexts can take.
    libc::SYS_io_setup,
    // Keys outlive processes, and are counted for the whole host.
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    // Segments of 16- and 32-bit programs, whose entry points are closed.
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
    // No longer in any new kernel.
    libc::SYS_lookup_dcookie,
    libc::SYS_nfsservctl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_uselib,
    #[cfg(target_arch = "x86_64")]
    libc::SYS__sysctl,
];

/// The same, but not for this file (EOPNOTSUPP): a handle's name is no use to who may not open by it.
const WITHOUT_HANDLES: &[c_long] = &[libc::SYS_name_to_handle_at];

/// Attributes of files, as the file system's own requests of `ioctl(2)` set them: no file system has them. They make
/// unlinking slow, or impossible.
const ATTRIBUTES: &[c_long] = &[FILE_SETATTR];

/// What belongs to namespaces: the helper needs most of it, a job only if its slot allows user namespaces.
const OF_NAMESPACES: &[c_long] = &[
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_mount_setattr,
    libc::SYS_open_tree,
    OPEN_TREE_ATTR,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_setns,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
];

const NEW_NAMESPACES: u32 = (libc::CLONE_NEWUSER
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP) as u32;
/// `linux/sched.h`; `clone(2)` has its signal in this bit.
const CLONE_NEWTIME: u32 = 0x80;

/// `linux/ioprio.h`: what the second argument of `ioprio_set(2)` is: a process, a process group, a user.
const IOPRIO_WHO: [u32; 3] = [1, 2, 3];

/// Writing to disk at once what ends with the job: answered as if it were done.
const SYNC: &[c_long] = &[
    libc::SYS_sync,
    libc::SYS_syncfs,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    SYS_sync_file_range,
];

/// What the listener and its sessions call: see each module for where. Collected by tracing the tests, and read.
const SESSION: &[c_long] = &[
    // A session's connection: then it has no socket that listens, and cannot make one.
    libc::SYS_accept4,
    // Packets, and messages of the monitor and of a worker's first process. What receives is without a descriptor.
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_alarm,
    libc::SYS_setitimer,
    libc::SYS_setsockopt,
    libc::SYS_socketpair,
    // Files, always by descriptor.
    libc::SYS_openat2,
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_lseek,
    libc::SYS_fstat,
    SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_getdents64,
    libc::SYS_fcntl,
    libc::SYS_flock,
    libc::SYS_fsync,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_symlinkat,
    libc::SYS_readlinkat,
    #[cfg(not(target_arch = "riscv64"))]
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_pipe2,
    libc::SYS_ppoll,
    // Processes that become a job's user: to delete what it wrote, to end and count its processes.
    libc::SYS_clone,
    libc::SYS_wait4,
    libc::SYS_kill,
    libc::SYS_getpriority,
    libc::SYS_setgroups,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_prctl,
    libc::SYS_exit_group,
    // How much a job's user has on disk: without CAP_SYS_ADMIN any process may query that about itself.
    libc::SYS_quotactl_fd,
    // The C library and Rust's.
    libc::SYS_brk,
    SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_set_robust_list,
];

/// What the monitor's filter and a job's refuse alike. They have to: of two filters with an error each, the kernel
/// answers with that of the one that was installed last, but one filter's error goes before the other's permission.
fn never() -> SyscallRules {
    let mut rules = SyscallRules::default();
    rules.each(NEVER, REFUSED);
    rules.each(NEVER_32, REFUSED);
    rules.each(UNAVAILABLE, ABSENT);
    rules.each(WITHOUT_HANDLES, errno(libc::EOPNOTSUPP));
    rules
}

/// For the monitor, and by inheritance for all.
pub fn monitor() -> Steps {
    never().program(LAST, ALLOW)
}

const SET_ID: u32 = libc::S_ISUID | libc::S_ISGID;

/// For the listener, and by inheritance for its sessions.
pub fn session() -> Steps {
    let mut rules = SyscallRules::default();
    let only = |n, value| if_any(n, &[value], answer(ALLOW), answer(REFUSED));
    // Of these calls, not what makes a namespace, loads a module, or leaves a program in the kernel.
    rules.rule(libc::SYS_clone, if_bits(0, NEW_NAMESPACES, REFUSED, ALLOW));
    // And no socket that can send to another than its pair.
    let kind = (libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC) as u32;
    let pair = if_any(0, &[libc::AF_UNIX as u32], only(1, kind), answer(REFUSED));
    rules.rule(libc::SYS_socketpair, pair);
    rules.rule(libc::SYS_setsockopt, socket_rules::options());
    rules.rule(libc::SYS_prctl, prctl_without_filters());
    // Nothing that runs as root for whoever starts it. What else makes a file with such a mode cannot fill it: without
    // CAP_FSETID, writing takes the mode away (capabilities(7)).
    rules.rule(libc::SYS_fchmod, if_bits(1, SET_ID, REFUSED, ALLOW));
    rules.rule(libc::SYS_fchmodat, if_bits(2, SET_ID, REFUSED, ALLOW));
    rules.each(SESSION, ALLOW);
    rules.each(SESSION_32, ALLOW);
    rules.each(OF_PROCESSOR, ALLOW);
    // The deletion's one request: to make a btrfs subvolume of the job's writable.
    rules.rule(libc::SYS_ioctl, only(1, sys::SET_SUBVOLUME_FLAGS));
    // The listener's one query: who is at the other end of a new connection.
    rules.rule(libc::SYS_getsockopt, only(2, libc::SO_PEERCRED as u32));
    rules.program(LAST, REFUSED)
}

/// For a job.
pub fn job(slot: JobFilter<'_>) -> Steps {
    let mut rules = never();
    rules.each(OF_PROCESSOR, ALLOW);
    rules.each(&[libc::SYS_quotactl_fd], REFUSED);
    rules.each(ATTRIBUTES, errno(libc::EOPNOTSUPP));
    if !slot.allow_user_namespaces {
        rules.each(OF_NAMESPACES, REFUSED);
        // Its flags are in memory, where a filter cannot look; C libraries then use clone(2).
        rules.each(&[libc::SYS_clone3], ABSENT);
        rules.rule(libc::SYS_clone, if_bits(0, NEW_NAMESPACES, REFUSED, ALLOW));
        let new = NEW_NAMESPACES | CLONE_NEWTIME;
        rules.rule(libc::SYS_unshare, if_bits(0, new, REFUSED, ALLOW));
        refuse_filters(&mut rules);
    }
    for call in [libc::SYS_socket, libc::SYS_socketpair] {
        rules.rule(call, socket_rules::rule(slot));
    }
    rules.rule(libc::SYS_setsockopt, socket_rules::options());
    rules.rule(libc::SYS_ioctl, ioctl::rule(slot));
    for call in [libc::SYS_move_pages, SYS_migrate_pages] {
        // The caller's own memory is process 0's.
        rules.rule(call, if_any(0, &[0], answer(ALLOW), answer(REFUSED)));
    }
    keep_limits(&mut rules);
    keep_pid_1(&mut rules);
    if slot.ignore_sync {
        rules.each(SYNC, DONE);
        // Asynchronous ones do nothing but check the address, which some programs use them for.
        rules.rule(libc::SYS_msync, if_bits(2, libc::MS_SYNC as u32, DONE, ALLOW));
    }
    rules.program(LAST_REVIEWED as u32, ALLOW)
}

/// A job's own filters are BPF programs in the kernel, and no limit counts them: those of many processes, freed at
/// once, are what stops a kernel (see `socket_rules::options`). It is told what a kernel without them says.
fn refuse_filters(rules: &mut SyscallRules) {
    rules.rule(libc::SYS_seccomp, invalid_if(0, libc::SECCOMP_SET_MODE_FILTER));
    rules.rule(libc::SYS_prctl, prctl_without_filters());
}

fn prctl_without_filters() -> Steps {
    let mode = invalid_if(1, libc::SECCOMP_MODE_FILTER);
    if_any(0, &[libc::PR_SET_SECCOMP as u32], mode, answer(ALLOW))
}

fn invalid_if(n: u32, value: u32) -> Steps {
    if_any(n, &[value], answer(errno(libc::EINVAL)), answer(ALLOW))
}

/// The limit of cores is 1: it stops a pipe in `core_pattern` too, which 0 does not (`core(5)`). A job that sets it is
/// told that it did, for no core is what it gets; reading it works. A filter cannot fill in what the limit was: who
/// sets the limit and asks for the old one in the same call is refused. So is setting any limit of pid 1.
fn keep_limits(rules: &mut SyscallRules) {
    let core = [libc::RLIMIT_CORE];
    let set = if_any(0, &core, answer(DONE), answer(ALLOW));
    rules.rule(libc::SYS_setrlimit, set);
    let set_core = if_null(3, answer(DONE), answer(REFUSED));
    let set = if_any(1, &core, set_core, refuse_if_any(0, &[1]));
    rules.rule(libc::SYS_prlimit64, if_null(2, answer(ALLOW), set));
}

/// Pid 1 has the job's uid, and keeps the job's limits: nobody else says how it is scheduled. It is in process group
/// 1, which processes of the job may be in too (their own is 0), and is meant by whatever is said of all processes of a
/// user.
fn keep_pid_1(rules: &mut SyscallRules) {
    for call in [
        libc::SYS_sched_setscheduler,
        libc::SYS_sched_setparam,
        libc::SYS_sched_setattr,
        libc::SYS_sched_setaffinity,
    ] {
        rules.rule(call, refuse_if_any(0, &[1]));
    }
    let priorities = [libc::PRIO_PROCESS, libc::PRIO_PGRP, libc::PRIO_USER];
    for (call, [process, group, user]) in [
        (libc::SYS_setpriority, priorities),
        (libc::SYS_ioprio_set, IOPRIO_WHO),
    ] {
        let priority = BTreeMap::from([
            (process, refuse_if_any(1, &[1])),
            (group, refuse_if_any(1, &[0, 1])),
            (user, answer(REFUSED)),
        ]);
        rules.rule(call, decide(argument(0), u32::MAX, priority, answer(ALLOW)));
    }
}

/// Others are allowed.
fn refuse_if_any(n: u32, values: &[u32]) -> Steps {
    if_any(n, values, answer(REFUSED), answer(ALLOW))
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use libc::sock_filter;
    use protocol::config::SocketFamily;

    use super::ioctl::LONG;
    use super::program::{ANSWER, ARCHITECTURE, HAS_BIT, IS_AT_LEAST, LOAD, MASK, NATIVE, NUMBER, SKIP};
    use super::*;

    /// What the kernel's interpreter would answer.
    fn run(program: &[sock_filter], architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let word = |offset: u32| match offset {
            NUMBER => number,
            ARCHITECTURE => architecture,
            _ => {
                let argument = arguments[(offset as usize - 16) / 8];
                (argument >> (offset % 8 * 8)) as u32
            }
        };
        let (mut at, mut loaded) = (0, 0);
        loop {
            let step = program[at];
            let jump = |met: bool| if met { step.jt } else { step.jf };
            at += 1;
            match u32::from(step.code) {
                LOAD => loaded = word(step.k),
                MASK => loaded &= step.k,
                HAS_BIT => at += usize::from(jump(loaded & step.k != 0)),
                IS_AT_LEAST => at += usize::from(jump(loaded >= step.k)),
                SKIP => at += step.k as usize,
                ANSWER => return step.k,
                other => panic!("no such step: {other}"),
            }
        }
    }

    const USUAL: JobFilter<'_> = JobFilter {
        allow_user_namespaces: false,
        socket_families: &[],
        has_devices: false,
        ignore_sync: true,
    };
    const WITH_DEVICES: JobFilter<'_> = JobFilter {
        has_devices: true,
        ..USUAL
    };
    const WITH_NAMESPACES: JobFilter<'_> = JobFilter {
        allow_user_namespaces: true,
        ..USUAL
    };
    const EVERYTHING: JobFilter<'_> = JobFilter {
        allow_user_namespaces: true,
        socket_families: &[],
        has_devices: true,
        ignore_sync: false,
    };
    /// With each family that a slot may have.
    const WITH_FAMILIES: JobFilter<'_> = JobFilter {
        socket_families: &[SocketFamily::Bluetooth, SocketFamily::Can, SocketFamily::Vsock],
        ..USUAL
    };
    const SLOTS: [JobFilter<'_>; 5] = [USUAL, WITH_DEVICES, WITH_NAMESPACES, EVERYTHING, WITH_FAMILIES];

    const NOT_THERE: u32 = errno(libc::ENOTTY);
    const NOT_SUPPORTED: u32 = errno(libc::EOPNOTSUPP);
    const NO_PROTOCOL: u32 = errno(libc::EPROTONOSUPPORT);
    const NO_OPTION: u32 = errno(libc::ENOPROTOOPT);
    const NO_FAMILY: u32 = errno(libc::EAFNOSUPPORT);
    const INVALID: u32 = errno(libc::EINVAL);

    /// Of `int` arguments, the kernel takes no part of this.
    const UPPER: u64 = 1 << 40;

    fn ask(slot: JobFilter<'_>, call: c_long, arguments: [u64; 6]) -> u32 {
        static PROGRAMS: LazyLock<[Steps; 5]> = LazyLock::new(|| SLOTS.map(job));
        let of_slot = SLOTS.iter().position(|other| *other == slot);
        let program = &PROGRAMS[of_slot.expect("it is one of the slots")];
        run(program, NATIVE, call as u32, arguments)
    }

    /// What is answered to these first arguments, each with and without an upper half.
    fn ask_both(slot: JobFilter<'_>, call: c_long, first: &[u64]) -> u32 {
        let mut arguments = [0; 6];
        arguments[..first.len()].copy_from_slice(first);
        let answer = ask(slot, call, arguments);
        for argument in &mut arguments[..first.len()] {
            *argument |= UPPER;
        }
        assert_eq!(ask(slot, call, arguments), answer, "{call} {first:x?}");
        answer
    }

    #[test]
    fn a_session_makes_no_namespace_loads_no_module_and_leaves_no_program_in_the_kernel() {
        let program = session();
        let ask = |call: c_long, first: &[u32]| {
            let mut arguments = [0; 6];
            for (argument, value) in arguments.iter_mut().zip(first) {
                *argument = u64::from(*value);
            }
            run(&program, NATIVE, call as u32, arguments)
        };
        let fork = libc::SIGCHLD as u32;
        assert_eq!(ask(libc::SYS_clone, &[fork]), ALLOW);
        for bit in (0..32)
            .map(|bit| 1 << bit)
            .filter(|bit| bit & NEW_NAMESPACES != 0)
        {
            assert_eq!(ask(libc::SYS_clone, &[fork | bit]), REFUSED, "{bit:#x}");
        }
        for family in 0..64 {
            let expected = if family == libc::AF_UNIX as u32 {
                ALLOW
            } else {
                REFUSED
            };
            let kind = (libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC) as u32;
            assert_eq!(ask(libc::SYS_socketpair, &[family, kind]), expected, "{family}");
        }
        for kind in [libc::SOCK_DGRAM, libc::SOCK_STREAM, libc::SOCK_RAW] {
            let kind = (kind | libc::SOCK_CLOEXEC) as u32;
            assert_eq!(ask(libc::SYS_socketpair, &[libc::AF_UNIX as u32, kind]), REFUSED);
        }
        let option = |option: i32| ask(libc::SYS_setsockopt, &[3, libc::SOL_SOCKET as u32, option as u32]);
        assert_eq!(option(libc::SO_RCVTIMEO), ALLOW);
        for program in [libc::SO_ATTACH_FILTER, libc::SO_ATTACH_BPF] {
            assert_ne!(option(program), ALLOW);
        }
        let prctl = |option: i32| ask(libc::SYS_prctl, &[option as u32, libc::SECCOMP_MODE_FILTER]);
        assert_eq!(prctl(libc::PR_CAPBSET_DROP), ALLOW);
        assert_eq!(prctl(libc::PR_SET_SECCOMP), INVALID);
        for operation in 0..4 {
            assert_eq!(ask(libc::SYS_seccomp, &[operation]), REFUSED, "{operation}");
        }
        for (mode, answer) in [
            (0o1777, ALLOW),
            (0o4755, REFUSED),
            (0o2755, REFUSED),
            (0o6000, REFUSED),
        ] {
            assert_eq!(ask(libc::SYS_fchmod, &[3, mode]), answer, "{mode:o}");
            assert_eq!(ask(libc::SYS_fchmodat, &[3, 0, mode]), answer, "{mode:o}");
        }
    }

    #[test]
    fn a_job_is_refused_what_the_lists_say_and_nothing_else() {
        // Those whose answer to zeroes is not what is said of the others.
        let with_arguments = [libc::SYS_socket, libc::SYS_socketpair, libc::SYS_ioctl];
        for call in (0..=LAST_REVIEWED).filter(|call| !with_arguments.contains(call)) {
            for slot in SLOTS {
                let never = [NEVER, NEVER_32, &[libc::SYS_quotactl_fd]].concat();
                let expected = if never.contains(&call) {
                    REFUSED
                } else if UNAVAILABLE.contains(&call) {
                    ABSENT
                } else if WITHOUT_HANDLES.contains(&call) || ATTRIBUTES.contains(&call) {
                    NOT_SUPPORTED
                } else if !slot.allow_user_namespaces && OF_NAMESPACES.contains(&call) {
                    REFUSED
                } else if !slot.allow_user_namespaces && call == libc::SYS_clone3 {
                    ABSENT
                } else if slot.ignore_sync && SYNC.contains(&call) {
                    DONE
                } else {
                    ALLOW
                };
                assert_eq!(ask(slot, call, [0; 6]), expected, "{call} {slot:?}");
            }
        }
        for call in [
            LAST_REVIEWED + 1,
            1000,
            0x4000_0000,
            0x4000_0000 + libc::SYS_bpf,
            -1,
        ] {
            assert_eq!(ask(USUAL, call, [0; 6]), ABSENT, "{call:#x}");
        }
    }

    #[test]
    fn a_slot_has_the_families_that_it_names_and_their_reviewed_protocols() {
        let one = [SocketFamily::Can];
        let can = job(JobFilter {
            socket_families: &one,
            ..USUAL
        });
        let open = |program: &Steps, family: i32, protocol: u64| {
            run(
                program,
                NATIVE,
                libc::SYS_socket as u32,
                [family as u64, 3, protocol, 0, 0, 0],
            )
        };
        for (family, protocols) in [
            (libc::AF_CAN, &[1, 2, 6, 7][..]),
            (libc::AF_BLUETOOTH, &[0, 1, 2, 3, 8]),
            (libc::AF_VSOCK, &[0]),
        ] {
            for protocol in 0..300 {
                let expected = if protocols.contains(&protocol) {
                    ALLOW
                } else {
                    NO_PROTOCOL
                };
                assert_eq!(
                    ask_both(WITH_FAMILIES, libc::SYS_socket, &[family as u64, 3, protocol]),
                    expected,
                    "{family} {protocol}"
                );
                let named = if family == libc::AF_CAN {
                    expected
                } else {
                    NO_FAMILY
                };
                assert_eq!(open(&can, family, protocol), named, "{family} {protocol}");
            }
        }
        for slot in SLOTS {
            for family in [libc::AF_PACKET, libc::AF_ALG, libc::AF_XDP, libc::AF_TIPC] {
                assert_eq!(
                    ask_both(slot, libc::SYS_socket, &[family as u64, 3, 0]),
                    NO_FAMILY
                );
            }
        }
    }

    /// The monitor's filter is in force for jobs as well: what it refuses, and a job's allows, is refused.
    #[test]
    fn the_monitors_filter_and_a_jobs_have_the_same_error_for_a_call() {
        let monitor = monitor();
        for call in 0..=LAST_REVIEWED {
            let action = run(&monitor, NATIVE, call as u32, [0; 6]);
            if action != ALLOW {
                for slot in SLOTS {
                    assert_eq!(ask(slot, call, [0; 6]), action, "{call} {slot:?}");
                }
            }
        }
        let call = libc::SYS_mbind as u32;
        assert_eq!(run(&monitor, NATIVE, call, [0; 6]), ALLOW);
    }

    #[test]
    fn other_entry_points_are_closed_in_every_program() {
        let i386 = 0x4000_0003;
        let jobs = SLOTS.map(job);
        for program in [monitor(), session()].iter().chain(&jobs) {
            for number in 0..500 {
                for other in [i386, NATIVE - 1, NATIVE + 1, 0, u32::MAX] {
                    assert_eq!(run(program, other, number, [0; 6]), ABSENT);
                }
            }
            assert!(program.len() < libc::BPF_MAXINSNS as usize, "{}", program.len());
        }
    }

    #[test]
    fn after_the_last_call_there_are_those_with_a_rule_alone() {
        for ruled in [501, 1000] {
            let mut rules = SyscallRules::default();
            rules.each(&[ruled], ALLOW);
            rules.each(&[100], REFUSED);
            let program = rules.program(500, ALLOW);
            for call in [99, 100, 500, 501, 502, 999, 1000, 1001, LAST] {
                let expected = match call {
                    100 => REFUSED,
                    ..=500 => ALLOW,
                    _ if call == ruled as u32 => ALLOW,
                    _ => ABSENT,
                };
                assert_eq!(run(&program, NATIVE, call, [0; 6]), expected, "{call}");
            }
        }
    }

    #[test]
    fn values_on_either_side_of_a_case_are_not_the_case() {
        let cases = [0, 1, 7, 0xffff_fffe, 0xffff_ffff];
        let tried = [
            0,
            1,
            2,
            6,
            7,
            8,
            0x7fff_ffff,
            0xffff_fffd,
            0xffff_fffe,
            0xffff_ffff,
        ];
        for few in 0..=cases.len() {
            let steps = cases[..few].iter().map(|value| (*value, answer(ALLOW)));
            let program = decide(argument(0), u32::MAX, steps.collect(), answer(REFUSED));
            for value in tried {
                let expected = if cases[..few].contains(&value) {
                    ALLOW
                } else {
                    REFUSED
                };
                let action = run(&program, NATIVE, 0, [u64::from(value), 0, 0, 0, 0, 0]);
                assert_eq!(action, expected, "{value:#x} of {few}");
            }
        }
    }

    #[test]
    fn new_namespaces_are_refused_by_their_flags() {
        for flag in [
            0x1000_0000,
            0x0002_0000,
            0x2000_0000,
            0x4000_0000,
            0x0800_0000,
            0x0400_0000,
            0x0200_0000,
        ] {
            for call in [libc::SYS_clone, libc::SYS_unshare] {
                assert_eq!(ask_both(USUAL, call, &[flag]), REFUSED, "{flag:#x}");
                assert_eq!(ask_both(WITH_NAMESPACES, call, &[flag]), ALLOW, "{flag:#x}");
            }
        }
        let thread = 0x003d_0f00;
        assert_eq!(ask_both(USUAL, libc::SYS_clone, &[thread]), ALLOW);
        assert_eq!(ask_both(USUAL, libc::SYS_unshare, &[0x80]), REFUSED);
        let files = libc::CLONE_FILES as u64;
        assert_eq!(ask_both(USUAL, libc::SYS_unshare, &[files]), ALLOW);
    }

    #[test]
    fn syncs_are_answered_as_done_where_the_slot_says_so() {
        let msync = |slot, flags: i32| ask(slot, libc::SYS_msync, [0, 0, flags as u64, 0, 0, 0]);
        assert_eq!(msync(USUAL, libc::MS_SYNC), DONE);
        assert_eq!(msync(USUAL, libc::MS_ASYNC), ALLOW);
        assert_eq!(msync(EVERYTHING, libc::MS_SYNC), ALLOW);
    }

    #[test]
    fn of_each_family_only_the_usual_types_and_protocols_are_allowed() {
        let (unix, ip, ip6) = (libc::AF_UNIX, libc::AF_INET, libc::AF_INET6);
        let netlink = libc::AF_NETLINK;
        let (stream, datagram, raw) = (libc::SOCK_STREAM, libc::SOCK_DGRAM, libc::SOCK_RAW);
        let protocols = [0, 1, 2, 6, 17, 33, 58, 115, 132, 136, 255, 256, 262];
        // Those of a slot's own have a test of their own.
        let is_named = |slot: JobFilter<'_>, family| {
            !slot.socket_families.is_empty()
                && [libc::AF_BLUETOOTH, libc::AF_CAN, libc::AF_VSOCK].contains(&family)
        };
        for slot in SLOTS {
            for family in (0..64).filter(|family| !is_named(slot, *family)) {
                for kind in 0..16 {
                    for protocol in protocols.into_iter().chain(0..24) {
                        let nothing_special = match (family, kind) {
                            (f, _) if f == unix => true,
                            (f, k) if [ip, ip6].contains(&f) && k == stream => [0, 6].contains(&protocol),
                            (f, k) if f == ip && k == datagram => [0, 17, 1].contains(&protocol),
                            (f, k) if f == ip6 && k == datagram => [0, 17, 58].contains(&protocol),
                            (f, k) if [ip, ip6].contains(&f) => k == raw,
                            (f, _) if f == netlink => {
                                [0, 4, 7, 15].contains(&protocol)
                                    || slot.allow_user_namespaces && [12, 16].contains(&protocol)
                            }
                            _ => false,
                        };
                        let expected = match nothing_special {
                            true => ALLOW,
                            false if [unix, ip, ip6, netlink].contains(&family) => NO_PROTOCOL,
                            false => NO_FAMILY,
                        };
                        for flags in [0, libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK] {
                            let words = [family, kind | flags, protocol].map(|word| word as u64);
                            for call in [libc::SYS_socket, libc::SYS_socketpair] {
                                assert_eq!(ask_both(slot, call, &words), expected, "{words:?}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn no_socket_gets_a_bpf_program() {
        for slot in SLOTS {
            for (option, expected) in [
                (libc::SO_ATTACH_FILTER, DONE),
                (libc::SO_DETACH_FILTER, DONE),
                (libc::SO_ATTACH_BPF, NO_OPTION),
                (libc::SO_ATTACH_REUSEPORT_CBPF, NO_OPTION),
                (libc::SO_ATTACH_REUSEPORT_EBPF, NO_OPTION),
                (libc::SO_LOCK_FILTER, ALLOW),
                (libc::SO_REUSEADDR, ALLOW),
                (libc::SO_RCVBUF, ALLOW),
            ] {
                let of = |level: i32| [3, level as u64, option as u64];
                let action = ask_both(slot, libc::SYS_setsockopt, &of(libc::SOL_SOCKET));
                assert_eq!(action, expected, "{option}");
                let action = ask_both(slot, libc::SYS_setsockopt, &of(libc::IPPROTO_IPV6));
                assert_eq!(action, ALLOW, "{option}");
            }
        }
    }

    #[test]
    fn without_user_namespaces_a_job_has_no_filter_of_its_own() {
        for slot in SLOTS {
            let filter = if slot.allow_user_namespaces {
                ALLOW
            } else {
                INVALID
            };
            let seccomp = |operation| ask_both(slot, libc::SYS_seccomp, &[operation]);
            // SECCOMP_SET_MODE_STRICT, _FILTER, _GET_ACTION_AVAIL, _GET_NOTIF_SIZES.
            assert_eq!([0, 1, 2, 3].map(seccomp), [ALLOW, filter, ALLOW, ALLOW]);
            let prctl = |option: i32, mode| ask_both(slot, libc::SYS_prctl, &[option as u64, mode]);
            // SECCOMP_MODE_STRICT and SECCOMP_MODE_FILTER.
            let (get, set) = (libc::PR_GET_SECCOMP, libc::PR_SET_SECCOMP);
            let action = [(get, 2), (set, 1), (set, 2), (set, 3), (libc::PR_SET_NAME, 2)];
            let action = action.map(|(option, mode)| prctl(option, mode));
            assert_eq!(action, [ALLOW, ALLOW, filter, ALLOW, ALLOW]);
        }
    }

    fn ioctl(slot: JobFilter<'_>, request: u64) -> u32 {
        ask_both(slot, libc::SYS_ioctl, &[3, request])
    }

    #[test]
    fn requests_that_any_job_may_make() {
        for (request, name) in [
            (0x5401, "TCGETS"),
            (0x5411, "TIOCOUTQ"),
            (0x5413, "TIOCGWINSZ"),
            (0x541b, "FIONREAD"),
            (0x5421, "FIONBIO"),
            (0x5451, "FIOCLEX"),
            (0x5452, "FIOASYNC"),
            (0x5460, "FIOQSIZE"),
            (0x802c_542a, "TCGETS2"),
            (0x402c_542b, "TCSETS2"),
            (0x8004_5430, "TIOCGPTN"),
            (0x4004_5431, "TIOCSPTLCK"),
            (0x5441, "TIOCGPTPEER"),
            (0x8901, "FIOSETOWN"),
            (0x8912, "SIOCGIFCONF"),
            (0x8914, "SIOCSIFFLAGS"),
            (0x8933, "SIOCGIFINDEX"),
            (0x8946, "SIOCETHTOOL"),
            (0x0002, "FIGETBSZ"),
            (u64::from(0x8000_6601 | LONG), "FS_IOC_GETFLAGS"),
            (0xc020_660b, "FS_IOC_FIEMAP"),
            (u64::from(0x8000_7601 | LONG), "FS_IOC_GETVERSION"),
            (0x801c_581f, "FS_IOC_FSGETXATTR"),
            (0x4004_9409, "FICLONE"),
            (0x4020_940d, "FICLONERANGE"),
            (0xc018_9436, "FIDEDUPERANGE"),
            (0x8011_1500, "FS_IOC_GETFSUUID"),
            (0xb701, "NS_GET_USERNS"),
            (0xff01, "PIDFD_GET_CGROUP_NAMESPACE"),
            (0x8004_5200, "RNDGETENTCNT"),
        ] {
            for slot in SLOTS {
                assert_eq!(ioctl(slot, request), ALLOW, "{name} {slot:?}");
            }
        }
    }

    #[test]
    fn requests_that_no_job_may_make() {
        for (request, expected, name) in [
            (0x5412, REFUSED, "TIOCSTI"),
            (0x541c, REFUSED, "TIOCLINUX"),
            (0x541d, REFUSED, "TIOCCONS"),
            (0x5423, REFUSED, "TIOCSETD"),
            (0x4010_54d5, REFUSED, "TUNATTACHFILTER"),
            (u64::from(0x4000_6602 | LONG), NOT_SUPPORTED, "FS_IOC_SETFLAGS"),
            (0x401c_5820, NOT_SUPPORTED, "FS_IOC_FSSETXATTR"),
            (0x4008_7602, NOT_THERE, "FS_IOC_SETVERSION"),
            (0x800c_6613, NOT_THERE, "FS_IOC_SET_ENCRYPTION_POLICY"),
            (0x4010_6614, NOT_THERE, "FS_IOC_GET_ENCRYPTION_PWSALT"),
            (0xc050_6617, NOT_THERE, "FS_IOC_ADD_ENCRYPTION_KEY"),
            (0xc040_6618, NOT_THERE, "FS_IOC_REMOVE_ENCRYPTION_KEY"),
            (0xc080_661a, NOT_THERE, "FS_IOC_GET_ENCRYPTION_KEY_STATUS"),
            (0x4080_6685, NOT_THERE, "FS_IOC_ENABLE_VERITY"),
            (0xc028_660f, NOT_THERE, "EXT4_IOC_MOVE_EXT"),
            (0xc004_5877, NOT_THERE, "FIFREEZE"),
            (0xc018_5879, NOT_THERE, "FITRIM"),
            (0x8004_587d, NOT_THERE, "FS_IOC_SHUTDOWN"),
            (0x4030_5828, NOT_THERE, "FS_IOC_RESVSP"),
            (0x5000_9401, NOT_THERE, "BTRFS_IOC_SNAP_CREATE"),
            (0x5000_9402, NOT_THERE, "BTRFS_IOC_DEFRAG"),
            (0x0000_9408, NOT_THERE, "BTRFS_IOC_SYNC"),
            (0x5000_940e, NOT_THERE, "BTRFS_IOC_SUBVOL_CREATE"),
            (0x5000_9417, NOT_THERE, "BTRFS_IOC_SNAP_CREATE_V2"),
            (0x5000_9418, NOT_THERE, "BTRFS_IOC_SUBVOL_CREATE_V2"),
            (0x4008_941a, NOT_THERE, "BTRFS_IOC_SUBVOL_SETFLAGS"),
            (0x4020_bc10, NOT_THERE, "BCH_IOCTL_SUBVOLUME_CREATE"),
            (0x5a23, NOT_THERE, "ZFS_IOC_SNAPSHOT"),
            (0x4008_8302, NOT_THERE, "ZFS_IOC_SETDOSFLAGS"),
            (0x0000_9360, NOT_THERE, "AUTOFS_IOC_READY"),
            (0xf501, NOT_THERE, "F2FS_IOC_START_ATOMIC_WRITE"),
            (0x8940, NOT_THERE, "SIOCGIFBR"),
            (0x8982, NOT_THERE, "SIOCGIFVLAN"),
            (0x89a0, NOT_THERE, "SIOCBRADDBR"),
        ] {
            for slot in SLOTS {
                assert_eq!(ioctl(slot, request), expected, "{name} {slot:?}");
            }
        }
    }

    #[test]
    fn requests_that_a_slot_has_for_its_devices() {
        for (request, without, name) in [
            (0x8004_550fu64, NOT_THERE, "USBDEVFS_SETINTERFACE"),
            (0xae00, NOT_THERE, "KVM_GET_API_VERSION"),
            (0x1268, NOT_THERE, "BLKSSZGET"),
            (0x2285, NOT_THERE, "SG_IO"),
            (0x400454ca, NOT_THERE, "TUNSETIFF"),
            (0x541e, ALLOW, "TIOCGSERIAL"),
            (0x545c, NOT_THERE, "TIOCMIWAIT"),
            (0x8068_5600, NOT_THERE, "VIDIOC_QUERYCAP"),
            (0x5605, NOT_THERE, "VT_RELDISP"),
            (0x4b3a, NOT_THERE, "KDSETMODE"),
            (0x8b01, NOT_THERE, "SIOCGIWNAME"),
            (0x7437, NOT_THERE, "a request of point-to-point links"),
        ] {
            for slot in SLOTS {
                let expected = if slot.has_devices { ALLOW } else { without };
                assert_eq!(ioctl(slot, request), expected, "{name} {slot:?}");
            }
        }
        for (request, name) in [
            (0x5606u64, "VT_ACTIVATE"),
            (0x5609, "VT_RESIZE"),
            (0x560b, "VT_LOCKSWITCH"),
            (0x4b72, "KDFONTOP"),
            (0x4b71, "PIO_CMAP"),
            (0x4b47, "KDSKBENT"),
            (0x4010_7447, "PPPIOCSPASS"),
        ] {
            for slot in SLOTS {
                let expected = if slot.has_devices { REFUSED } else { NOT_THERE };
                assert_eq!(ioctl(slot, request), expected, "{name} {slot:?}");
            }
        }
    }

    /// Each class, by what it lets through without and with devices.
    #[test]
    fn no_class_is_open_but_those_that_are_listed() {
        let open = |slot: JobFilter<'_>, byte: u64| {
            // Numbers that nobody has listed.
            let all = [0x7d, 0xee].map(|number| ioctl(slot, byte << 8 | number));
            all == [ALLOW; 2]
        };
        let file_systems = b"fXvrZ"
            .iter()
            .copied()
            .chain([0x15, 0x83, 0x89, 0x93, 0x94, 0x97, 0xbc, 0xcd, 0xcf, 0xf5, b'K']);
        let closed: Vec<u64> = file_systems.map(u64::from).collect();
        for byte in 0..=0xff {
            let namespaces = byte == 0xb7 || byte == 0xff;
            assert_eq!(open(USUAL, byte), namespaces, "{byte:#x}");
            let notifications = namespaces || byte == u64::from(b'!');
            assert_eq!(open(WITH_NAMESPACES, byte), notifications, "{byte:#x}");
            for slot in [WITH_DEVICES, EVERYTHING] {
                assert_eq!(open(slot, byte), !closed.contains(&byte), "{byte:#x}");
            }
        }
    }

    #[test]
    fn the_limit_of_cores_stays_and_no_call_leaves_memory_unwritten() {
        let core = u64::from(libc::RLIMIT_CORE);
        let prlimit =
            |pid, resource, new, old| ask(USUAL, libc::SYS_prlimit64, [pid, resource, new, old, 0, 0]);
        // A pointer may have its only bits in the upper half.
        for pointer in [0x1000, 1 << 32] {
            assert_eq!(prlimit(0, core, pointer, 0), DONE);
            assert_eq!(prlimit(0, core, 0, pointer), ALLOW);
            for new in [0x1000, 1 << 32] {
                assert_eq!(prlimit(0, core, new, pointer), REFUSED);
            }
            assert_eq!(prlimit(0, core + 1, pointer, 0), ALLOW);
            assert_eq!(prlimit(0, core + 1, pointer, pointer), ALLOW);
        }
        assert_eq!(ask_both(USUAL, libc::SYS_setrlimit, &[core]), DONE);
        assert_eq!(ask_both(USUAL, libc::SYS_setrlimit, &[core + 1]), ALLOW);
    }

    #[test]
    fn nobody_says_how_pid_1_is_scheduled_and_what_its_limits_are() {
        let files = u64::from(libc::RLIMIT_NOFILE);
        for slot in SLOTS {
            for call in [
                libc::SYS_sched_setscheduler,
                libc::SYS_sched_setparam,
                libc::SYS_sched_setattr,
                libc::SYS_sched_setaffinity,
            ] {
                let action = [0, 1, 2].map(|pid| ask_both(slot, call, &[pid]));
                assert_eq!(action, [ALLOW, REFUSED, ALLOW], "{call}");
            }
            for (call, first) in [(libc::SYS_setpriority, 0), (libc::SYS_ioprio_set, 1)] {
                let action = |which, who| ask_both(slot, call, &[which, who]);
                assert_eq!([0, 1, 2].map(|who| action(first, who)), [ALLOW, REFUSED, ALLOW]);
                assert_eq!(
                    [0, 1, 2].map(|who| action(first + 1, who)),
                    [REFUSED, REFUSED, ALLOW]
                );
                assert_eq!([0, 1, 2].map(|who| action(first + 2, who)), [REFUSED; 3]);
            }
            let prlimit = |pid, new| ask(slot, libc::SYS_prlimit64, [pid, files, new, 0, 0, 0]);
            assert_eq!([0, 1, 2].map(|pid| prlimit(pid, 0x1000)), [ALLOW, REFUSED, ALLOW]);
            assert_eq!(
                [0, 1, 2].map(|pid| prlimit(pid, 1 << 32)),
                [ALLOW, REFUSED, ALLOW]
            );
            assert_eq!(prlimit(1 | UPPER, 0x1000), REFUSED);
            assert_eq!(prlimit(1, 0), ALLOW);
        }
    }

    #[test]
    fn a_job_places_its_own_memory_and_no_other_processes() {
        for slot in SLOTS {
            for call in [
                libc::SYS_mbind,
                libc::SYS_set_mempolicy,
                libc::SYS_get_mempolicy,
                libc::SYS_set_mempolicy_home_node,
            ] {
                assert_eq!(ask_both(slot, call, &[0x1000, 1, 1]), ALLOW);
            }
            for call in [libc::SYS_move_pages, SYS_migrate_pages] {
                let action = [0, 1, 2].map(|pid| ask_both(slot, call, &[pid]));
                assert_eq!(action, [ALLOW, REFUSED, REFUSED]);
            }
        }
    }

    #[test]
    fn a_session_can_neither_mount_nor_start_programs_nor_reach_the_network() {
        for call in [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_mount,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_clone3,
            libc::SYS_socket,
            libc::SYS_bind,
            libc::SYS_listen,
            libc::SYS_connect,
            libc::SYS_ptrace,
            libc::SYS_bpf,
            libc::SYS_mknodat,
            libc::SYS_linkat,
        ] {
            assert_eq!(run(&session(), NATIVE, call as u32, [0; 6]), REFUSED, "{call}");
        }
    }

    /// With a descriptor of another process's directory it could change what is below.
    #[test]
    fn a_session_gets_no_descriptor_of_another_process() {
        for call in [
            libc::SYS_recvmsg,
            libc::SYS_recvmmsg,
            libc::SYS_pidfd_open,
            libc::SYS_pidfd_getfd,
            libc::SYS_io_uring_setup,
            libc::SYS_io_uring_enter,
            libc::SYS_io_uring_register,
            libc::SYS_open_by_handle_at,
            libc::SYS_seccomp,
        ] {
            assert_eq!(run(&session(), NATIVE, call as u32, [0; 6]), REFUSED, "{call}");
        }
        assert_eq!(run(&session(), NATIVE, libc::SYS_recvfrom as u32, [0; 6]), ALLOW);
    }

    #[test]
    fn a_session_may_ask_one_thing_of_a_socket() {
        for option in 0..256 {
            let asked = run(
                &session(),
                NATIVE,
                libc::SYS_getsockopt as u32,
                [3, libc::SOL_SOCKET as u64, option, 0, 0, 0],
            );
            let may = option == libc::SO_PEERCRED as u64;
            assert_eq!(asked, if may { ALLOW } else { REFUSED }, "{option}");
        }
    }

    #[test]
    fn a_session_may_make_one_request_of_ioctl() {
        let ask = |request: u64| {
            run(
                &session(),
                NATIVE,
                libc::SYS_ioctl as u32,
                [0, request, 0, 0, 0, 0],
            )
        };
        let allowed = u64::from(sys::SET_SUBVOLUME_FLAGS);
        assert_eq!(ask(allowed), ALLOW);
        for bit in 0..32 {
            assert_eq!(ask(allowed ^ 1 << bit), REFUSED, "{bit}");
        }
        // FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR, FS_IOC_ADD_ENCRYPTION_KEY, BTRFS_IOC_SNAP_CREATE_V2, BTRFS_IOC_SNAP_DESTROY.
        for request in [0, 0x4008_6602, 0x401c_5820, 0xc050_6617, 0x5000_9417, 0x5000_940f] {
            assert_eq!(ask(request), REFUSED, "{request:#x}");
        }
    }
}
