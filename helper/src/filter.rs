//! Which system calls are let through, as programs for the kernel (`seccomp(2)`). Pure: `sys` installs them.
//!
//! There are three. [`daemon`] refuses what neither the helper nor any job ever needs; whatever the daemon
//! starts inherits it. [`connection`] allows a process that reads what the supervisor sends just what its
//! requests take. [`job`] is the wall around a job: like those of container engines it lets ordinary
//! software work, and refuses what has led out of sandboxes or burdens the host.

use std::collections::BTreeMap;

use libc::{c_long, sock_filter};

/// `linux/audit.h`: what the kernel says of a call that was made by this architecture's own entry point.
#[cfg(target_arch = "x86_64")]
const NATIVE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const NATIVE: u32 = 0xc000_00b7;

/// The last system call that was weighed for the lists below: `file_setattr` of Linux 6.17. A later one does
/// not exist for a job, until somebody has looked at it. Every architecture has the same numbers from 424 on.
const LAST_REVIEWED: c_long = 469;

// Newer than the C library's list.
const OPEN_TREE_ATTR: c_long = 467;

/// For no job, whatever its slot says; and the helper needs none of them.
const NEVER: &[c_long] = &[
    // Programs and handlers in the kernel, and what reads other processes through it.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_lookup_dcookie,
    libc::SYS_fanotify_init,
    // Keys outlive processes, and are counted for the whole host.
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    // Files by handle: past every mount and directory permission.
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    // The machine.
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
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
    libc::SYS_nfsservctl,
    libc::SYS_vhangup,
    // The memory of the whole machine, and of other processes' pages.
    libc::SYS_mbind,
    libc::SYS_set_mempolicy,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    // Segments of 16- and 32-bit programs, whose entry points are closed.
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_uselib,
    #[cfg(target_arch = "x86_64")]
    libc::SYS__sysctl,
];

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

/// Socket families that builds and tests use. The others are where the kernel's forgotten modules live.
const FAMILIES: [u32; 4] = [
    libc::AF_UNIX as u32,
    libc::AF_INET as u32,
    libc::AF_INET6 as u32,
    libc::AF_NETLINK as u32,
];

/// Writing to disk at once what ends with the job: answered as if it were done.
const SYNC: &[c_long] = &[
    libc::SYS_sync,
    libc::SYS_syncfs,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
];

/// What the processes of connections call: see each module for where. Collected by tracing the tests, and read.
const CONNECTION: &[c_long] = &[
    // Packets, and the daemon's and the child's words.
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_setsockopt,
    libc::SYS_socketpair,
    // Files, always by descriptor.
    libc::SYS_openat2,
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_sendfile,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_getdents64,
    libc::SYS_fcntl,
    libc::SYS_flock,
    libc::SYS_fsync,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_symlinkat,
    libc::SYS_readlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_pipe2,
    libc::SYS_ppoll,
    // Processes that become a job's user: to delete its trees, to end and count its processes.
    libc::SYS_clone,
    libc::SYS_wait4,
    libc::SYS_kill,
    libc::SYS_getpriority,
    libc::SYS_setgroups,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_capget,
    libc::SYS_prctl,
    libc::SYS_exit_group,
    // How much a job's user has on disk: without CAP_SYS_ADMIN it is a question that one may ask about oneself.
    libc::SYS_quotactl_fd,
    // The C library and Rust's.
    libc::SYS_brk,
    libc::SYS_mmap,
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

/// What the slot decides about a job's filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    pub allow_user_namespaces: bool,
    pub ignore_sync: bool,
}

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;

const fn errno(number: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | number as u32
}

/// Said to the caller instead of doing the call.
const DONE: u32 = errno(0);
const REFUSED: u32 = errno(libc::EPERM);
const ABSENT: u32 = errno(libc::ENOSYS);

// Offsets in `struct seccomp_data`; the machines that this is built for are little-endian.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
/// The kernel takes no more than the lower half of the arguments that are looked at here, so neither do we:
/// a filter that compares all 64 bits is got round by setting one of the upper ones.
const fn argument(n: u32) -> u32 {
    16 + 8 * n
}

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const IS: u32 = libc::BPF_JMP | libc::BPF_JEQ;
const HAS_BIT: u32 = libc::BPF_JMP | libc::BPF_JSET;
const IS_AT_LEAST: u32 = libc::BPF_JMP | libc::BPF_JGE;
const SKIP: u32 = libc::BPF_JMP | libc::BPF_JA;
const ANSWER: u32 = libc::BPF_RET;

type Steps = Vec<sock_filter>;

fn step(code: u32, value: u32) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k: value,
    }
}

/// If the loaded word meets the test, do `then`, which ends with an answer; otherwise what follows.
fn when(test: u32, value: u32, then: &[sock_filter]) -> Steps {
    let over = u8::try_from(then.len()).expect("a rule is short");
    let mut steps = vec![step(test, value)];
    steps[0].jf = over;
    steps.extend(then);
    steps
}

fn answer(what: u32) -> [sock_filter; 1] {
    [step(ANSWER, what)]
}

/// What is done about calls, by their number: steps that end with an answer. What was said first counts.
#[derive(Default)]
struct Rules(BTreeMap<u32, Steps>);

impl Rules {
    fn rule(&mut self, call: c_long, steps: Steps) {
        self.0.entry(call as u32).or_insert(steps);
    }

    fn each(&mut self, calls: &[c_long], what: u32) {
        for call in calls {
            self.rule(*call, answer(what).into());
        }
    }

    /// A rule on one argument: `tests` on its lower half, each with its answer, and `otherwise`.
    fn on_argument(&mut self, call: c_long, n: u32, tests: &[(u32, u32, u32)], otherwise: u32) {
        let mut steps = vec![step(LOAD, argument(n))];
        for (test, value, what) in tests {
            steps.extend(when(*test, *value, &answer(*what)));
        }
        steps.extend(answer(otherwise));
        self.rule(call, steps);
    }

    /// The program: `otherwise` for calls without a rule, and none at all after `last`.
    ///
    /// It searches by halves. The kernel runs each new program once for every number there is, to remember what needs
    /// no second look: with a comparison for each rule that took longer than a worker's namespaces.
    fn program(self, last: u32, otherwise: u32) -> Steps {
        // Each beginning of a range of numbers, and what is done about it.
        let mut ranges: Vec<(u32, Steps)> = Vec::new();
        let mut range = |at: u32, steps: Steps| match ranges.last() {
            Some((_, same)) if *same == steps => {}
            _ => ranges.push((at, steps)),
        };
        let mut next = 0;
        for (call, steps) in self.0 {
            if call > next {
                range(next, answer(otherwise).into());
            }
            range(call, steps);
            next = call + 1;
        }
        range(next, answer(otherwise).into());
        range(last + 1, answer(ABSENT).into());
        let mut steps = vec![step(LOAD, ARCHITECTURE)];
        // int 0x80 and the like. The test is turned round: what follows the answer is for our own.
        steps.push(sock_filter {
            jt: 1,
            ..step(IS, NATIVE)
        });
        steps.extend(answer(ABSENT));
        steps.push(step(LOAD, NUMBER));
        steps.extend(search(&ranges));
        steps
    }
}

/// Find the range that the loaded number is in.
fn search(ranges: &[(u32, Steps)]) -> Steps {
    if let [(_, steps)] = ranges {
        return steps.clone();
    }
    let (lower, upper) = ranges.split_at(ranges.len() / 2);
    let below = search(lower);
    let is_above = step(IS_AT_LEAST, upper[0].0);
    let mut steps = match u8::try_from(below.len()) {
        Ok(near) => vec![sock_filter { jt: near, ..is_above }],
        // Only SKIP reaches so far.
        Err(_) => vec![sock_filter { jf: 1, ..is_above }, step(SKIP, below.len() as u32)],
    };
    steps.extend(below);
    steps.extend(search(upper));
    steps
}

/// x32's numbers, on x86-64, begin after this one, far above all others.
const LAST: u32 = 0x3fff_ffff;

/// For the daemon, and by inheritance for all.
pub fn daemon() -> Steps {
    let mut rules = Rules::default();
    rules.each(NEVER, REFUSED);
    rules.program(LAST, ALLOW)
}

/// For a process that serves a connection.
pub fn connection() -> Steps {
    let mut rules = Rules::default();
    rules.each(CONNECTION, ALLOW);
    rules.program(LAST, REFUSED)
}

/// For a job.
pub fn job(slot: Job) -> Steps {
    let mut rules = Rules::default();
    rules.each(NEVER, REFUSED);
    rules.each(&[libc::SYS_quotactl_fd], REFUSED);
    if !slot.allow_user_namespaces {
        rules.each(OF_NAMESPACES, REFUSED);
        // Its flags are in memory, where a filter cannot look; C libraries then use clone(2).
        rules.each(&[libc::SYS_clone3], ABSENT);
        let new = [(HAS_BIT, NEW_NAMESPACES, REFUSED)];
        rules.on_argument(libc::SYS_clone, 0, &new, ALLOW);
        let new = [(HAS_BIT, NEW_NAMESPACES | CLONE_NEWTIME, REFUSED)];
        rules.on_argument(libc::SYS_unshare, 0, &new, ALLOW);
    }
    let families = FAMILIES.map(|family| (IS, family, ALLOW));
    for call in [libc::SYS_socket, libc::SYS_socketpair] {
        rules.on_argument(call, 0, &families, errno(libc::EAFNOSUPPORT));
    }
    // Typing on behalf of whoever sits at the terminal.
    let typing = [libc::TIOCSTI as u32, libc::TIOCLINUX as u32].map(|request| (IS, request, REFUSED));
    rules.on_argument(libc::SYS_ioctl, 1, &typing, ALLOW);
    keep_core_limit(&mut rules);
    if slot.ignore_sync {
        rules.each(SYNC, DONE);
        // Asynchronous ones do nothing but check the address, which some programs use them for.
        let at_once = [(HAS_BIT, libc::MS_SYNC as u32, DONE)];
        rules.on_argument(libc::SYS_msync, 2, &at_once, ALLOW);
    }
    rules.program(LAST_REVIEWED as u32, ALLOW)
}

/// The limit of cores is 1: it stops a pipe in `core_pattern` too, which 0 does not (`core(5)`). A job that
/// sets it is told that it did, for no core is what it gets; reading it works.
fn keep_core_limit(rules: &mut Rules) {
    let core = libc::RLIMIT_CORE;
    #[cfg(target_arch = "x86_64")]
    rules.on_argument(libc::SYS_setrlimit, 0, &[(IS, core, DONE)], ALLOW);
    // prlimit(2) sets where its third argument, a pointer, is not null: in either half.
    let mut set = vec![step(LOAD, argument(2))];
    set.extend(when(HAS_BIT, u32::MAX, &answer(DONE)));
    set.push(step(LOAD, argument(2) + 4));
    set.extend(when(HAS_BIT, u32::MAX, &answer(DONE)));
    set.extend(answer(ALLOW));
    let mut steps = vec![step(LOAD, argument(1))];
    steps.extend(when(IS, core, &set));
    steps.extend(answer(ALLOW));
    rules.rule(libc::SYS_prlimit64, steps);
}

#[cfg(test)]
mod tests {
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
                IS => at += usize::from(jump(loaded == step.k)),
                HAS_BIT => at += usize::from(jump(loaded & step.k != 0)),
                IS_AT_LEAST => at += usize::from(jump(loaded >= step.k)),
                SKIP => at += step.k as usize,
                ANSWER => return step.k,
                other => panic!("no such step: {other}"),
            }
        }
    }

    const USUAL: Job = Job {
        allow_user_namespaces: false,
        ignore_sync: true,
    };

    fn ask(slot: Job, call: c_long, arguments: [u64; 6]) -> u32 {
        run(&job(slot), NATIVE, call as u32, arguments)
    }

    #[test]
    fn a_job_is_refused_what_the_lists_say_and_nothing_else() {
        let with_arguments = [
            libc::SYS_clone,
            libc::SYS_unshare,
            libc::SYS_socket,
            libc::SYS_socketpair,
            libc::SYS_ioctl,
            libc::SYS_prlimit64,
            libc::SYS_msync,
        ];
        for call in (0..=LAST_REVIEWED).filter(|call| !with_arguments.contains(call)) {
            let refused = NEVER.contains(&call) || call == libc::SYS_quotactl_fd;
            for (allow_user_namespaces, ignore_sync) in
                [(false, false), (false, true), (true, false), (true, true)]
            {
                let slot = Job {
                    allow_user_namespaces,
                    ignore_sync,
                };
                let expected = if refused || !allow_user_namespaces && OF_NAMESPACES.contains(&call) {
                    REFUSED
                } else if !allow_user_namespaces && call == libc::SYS_clone3 {
                    ABSENT
                } else if ignore_sync && SYNC.contains(&call) {
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
            0xffff_ffff,
        ] {
            assert_eq!(ask(USUAL, call, [0; 6]), ABSENT, "{call:#x}");
        }
    }

    #[test]
    fn other_entry_points_are_closed_in_every_program() {
        let i386 = 0x4000_0003;
        for program in [daemon(), connection(), job(USUAL)] {
            for number in 0..500 {
                assert_eq!(run(&program, i386, number, [0; 6]), ABSENT);
            }
            assert!(program.len() < libc::BPF_MAXINSNS as usize);
        }
    }

    #[test]
    fn arguments_are_looked_at_as_the_kernel_does() {
        let open = Job {
            allow_user_namespaces: true,
            ..USUAL
        };
        let upper = 1 << 40;
        let nth = |n: usize, value: u64| {
            let mut arguments = [0; 6];
            arguments[n] = value;
            arguments
        };
        for flag in [
            0x1000_0000u64,
            0x0002_0000,
            0x2000_0000,
            0x4000_0000,
            0x0800_0000,
            0x0400_0000,
            0x0200_0000,
        ] {
            for call in [libc::SYS_clone, libc::SYS_unshare] {
                assert_eq!(ask(USUAL, call, nth(0, flag | upper)), REFUSED, "{flag:#x}");
                assert_eq!(ask(open, call, nth(0, flag)), ALLOW, "{flag:#x}");
            }
        }
        let thread = 0x003d_0f00;
        assert_eq!(ask(USUAL, libc::SYS_clone, nth(0, thread)), ALLOW);
        assert_eq!(ask(USUAL, libc::SYS_unshare, nth(0, 0x80)), REFUSED);
        assert_eq!(
            ask(USUAL, libc::SYS_unshare, nth(0, libc::CLONE_FILES as u64)),
            ALLOW
        );
        for family in 0..64 {
            let allowed = FAMILIES.contains(&(family as u32));
            let expected = if allowed { ALLOW } else { errno(libc::EAFNOSUPPORT) };
            assert_eq!(ask(USUAL, libc::SYS_socket, nth(0, family)), expected);
            assert_eq!(ask(USUAL, libc::SYS_socketpair, nth(0, family | upper)), expected);
        }
        for request in [0x5412, 0x541c] {
            assert_eq!(ask(USUAL, libc::SYS_ioctl, nth(1, request)), REFUSED);
            assert_eq!(ask(USUAL, libc::SYS_ioctl, nth(1, request | upper)), REFUSED);
        }
        assert_eq!(ask(USUAL, libc::SYS_ioctl, nth(1, 0x5413)), ALLOW);
        let core = u64::from(libc::RLIMIT_CORE);
        for pointer in [0x1000, 1 << 32] {
            assert_eq!(ask(USUAL, libc::SYS_prlimit64, [0, core, pointer, 0, 0, 0]), DONE);
            assert_eq!(
                ask(USUAL, libc::SYS_prlimit64, [0, core + 1, pointer, 0, 0, 0]),
                ALLOW
            );
        }
        assert_eq!(ask(USUAL, libc::SYS_prlimit64, [0, core, 0, 0x1000, 0, 0]), ALLOW);
        assert_eq!(ask(USUAL, libc::SYS_msync, nth(2, libc::MS_SYNC as u64)), DONE);
        assert_eq!(ask(USUAL, libc::SYS_msync, nth(2, libc::MS_ASYNC as u64)), ALLOW);
    }

    #[test]
    fn a_connection_can_neither_mount_nor_start_programs_nor_reach_the_network() {
        for call in [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_mount,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_clone3,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_ptrace,
            libc::SYS_bpf,
            libc::SYS_mknodat,
            libc::SYS_linkat,
        ] {
            assert_eq!(run(&connection(), NATIVE, call as u32, [0; 6]), REFUSED, "{call}");
        }
    }
}
