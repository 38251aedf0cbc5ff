//! Human-readable names of system calls.

use std::borrow::Cow;

macro_rules! names {
    ($($(#[$attribute:meta])? $number:ident $name:literal)*) => {
        &[$($(#[$attribute])? (libc::$number, $name)),*]
    };
}

/// What our programs call, more or less.
const NAMES: &[(libc::c_long, &str)] = names!(
    SYS_accept4 "accept4"
    SYS_bind "bind"
    SYS_brk "brk"
    SYS_capget "capget"
    SYS_capset "capset"
    SYS_chdir "chdir"
    SYS_clock_gettime "clock_gettime"
    SYS_clock_nanosleep "clock_nanosleep"
    SYS_clone "clone"
    SYS_clone3 "clone3"
    SYS_close "close"
    SYS_close_range "close_range"
    SYS_connect "connect"
    SYS_dup "dup"
    SYS_dup3 "dup3"
    SYS_epoll_create1 "epoll_create1"
    SYS_epoll_ctl "epoll_ctl"
    SYS_epoll_pwait "epoll_pwait"
    SYS_eventfd2 "eventfd2"
    SYS_execve "execve"
    SYS_exit "exit"
    SYS_exit_group "exit_group"
    SYS_faccessat "faccessat"
    SYS_faccessat2 "faccessat2"
    SYS_fadvise64 "fadvise64"
    SYS_fchdir "fchdir"
    SYS_fchmod "fchmod"
    SYS_fchmodat "fchmodat"
    SYS_fchownat "fchownat"
    SYS_fcntl "fcntl"
    SYS_fdatasync "fdatasync"
    SYS_flock "flock"
    SYS_fstat "fstat"
    SYS_fsync "fsync"
    SYS_ftruncate "ftruncate"
    SYS_futex "futex"
    SYS_getcwd "getcwd"
    SYS_getdents64 "getdents64"
    SYS_getegid "getegid"
    SYS_geteuid "geteuid"
    SYS_getgid "getgid"
    SYS_getpid "getpid"
    SYS_getppid "getppid"
    SYS_getrandom "getrandom"
    SYS_getrusage "getrusage"
    SYS_getsockname "getsockname"
    SYS_getsockopt "getsockopt"
    SYS_gettid "gettid"
    SYS_getuid "getuid"
    SYS_inotify_add_watch "inotify_add_watch"
    SYS_inotify_init1 "inotify_init1"
    SYS_inotify_rm_watch "inotify_rm_watch"
    SYS_ioctl "ioctl"
    SYS_kill "kill"
    SYS_landlock_create_ruleset "landlock_create_ruleset"
    SYS_landlock_restrict_self "landlock_restrict_self"
    SYS_linkat "linkat"
    SYS_listen "listen"
    SYS_lseek "lseek"
    SYS_madvise "madvise"
    SYS_membarrier "membarrier"
    SYS_memfd_create "memfd_create"
    SYS_mkdirat "mkdirat"
    SYS_mknodat "mknodat"
    SYS_mmap "mmap"
    SYS_mount "mount"
    SYS_mount_setattr "mount_setattr"
    SYS_move_mount "move_mount"
    SYS_mprotect "mprotect"
    SYS_mremap "mremap"
    SYS_munmap "munmap"
    SYS_newfstatat "newfstatat"
    SYS_open_tree "open_tree"
    SYS_openat "openat"
    SYS_openat2 "openat2"
    SYS_pipe2 "pipe2"
    SYS_pivot_root "pivot_root"
    SYS_ppoll "ppoll"
    SYS_prctl "prctl"
    SYS_pread64 "pread64"
    SYS_prlimit64 "prlimit64"
    SYS_pselect6 "pselect6"
    SYS_pwrite64 "pwrite64"
    SYS_quotactl_fd "quotactl_fd"
    SYS_read "read"
    SYS_readlinkat "readlinkat"
    SYS_readv "readv"
    SYS_recvfrom "recvfrom"
    SYS_recvmsg "recvmsg"
    #[cfg(not(target_arch = "riscv64"))] SYS_renameat "renameat"
    SYS_renameat2 "renameat2"
    SYS_restart_syscall "restart_syscall"
    SYS_rseq "rseq"
    SYS_rt_sigaction "rt_sigaction"
    SYS_rt_sigprocmask "rt_sigprocmask"
    SYS_rt_sigreturn "rt_sigreturn"
    SYS_sched_getaffinity "sched_getaffinity"
    SYS_sched_yield "sched_yield"
    SYS_seccomp "seccomp"
    SYS_sendmsg "sendmsg"
    SYS_sendto "sendto"
    SYS_set_robust_list "set_robust_list"
    SYS_set_tid_address "set_tid_address"
    SYS_setgroups "setgroups"
    SYS_sethostname "sethostname"
    SYS_setns "setns"
    SYS_setpgid "setpgid"
    SYS_setresgid "setresgid"
    SYS_setresuid "setresuid"
    SYS_setsid "setsid"
    SYS_setsockopt "setsockopt"
    SYS_shutdown "shutdown"
    SYS_sigaltstack "sigaltstack"
    SYS_signalfd4 "signalfd4"
    SYS_socket "socket"
    SYS_socketpair "socketpair"
    SYS_statx "statx"
    SYS_symlinkat "symlinkat"
    SYS_sysinfo "sysinfo"
    SYS_tgkill "tgkill"
    SYS_umask "umask"
    SYS_umount2 "umount2"
    SYS_uname "uname"
    SYS_unlinkat "unlinkat"
    SYS_unshare "unshare"
    SYS_wait4 "wait4"
    SYS_write "write"
    SYS_writev "writev"
);

/// What newer architectures no longer have.
#[cfg(target_arch = "x86_64")]
const OLD_NAMES: &[(libc::c_long, &str)] = names!(
    SYS_access "access"
    SYS_arch_prctl "arch_prctl"
    SYS_chmod "chmod"
    SYS_chown "chown"
    SYS_creat "creat"
    SYS_dup2 "dup2"
    SYS_epoll_wait "epoll_wait"
    SYS_fork "fork"
    SYS_link "link"
    SYS_lstat "lstat"
    SYS_mkdir "mkdir"
    SYS_open "open"
    SYS_poll "poll"
    SYS_readlink "readlink"
    SYS_rename "rename"
    SYS_rmdir "rmdir"
    SYS_stat "stat"
    SYS_symlink "symlink"
    SYS_unlink "unlink"
    SYS_vfork "vfork"
);
#[cfg(not(target_arch = "x86_64"))]
const OLD_NAMES: &[(libc::c_long, &str)] = &[];

/// The name of a call, or its number.
pub fn name(number: i64) -> Cow<'static, str> {
    let found = NAMES.iter().chain(OLD_NAMES).find(|(other, _)| *other == number);
    found.map_or_else(|| format!("call {number}").into(), |(_, name)| (*name).into())
}

/// What gives a file another name.
pub const RENAMES: &[libc::c_long] = &[
    #[cfg(not(target_arch = "riscv64"))]
    libc::SYS_renameat,
    libc::SYS_renameat2,
];

/// The calls of the kind that waits for one of several descriptors.
pub const WAITS: &[libc::c_long] = &[
    libc::SYS_ppoll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
];

/// What a program's memory is asked for with: how often hangs on what there was before, and nobody else sees it.
pub const MEMORY: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_madvise,
];
