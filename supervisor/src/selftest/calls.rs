//! System calls that no job may make, as attempts that harm nothing where they work: for the probe, and for the tests' own
//! hostile job, which asks for the errors of the filter as well.

use nix::libc;

/// A call: its name, its number and its arguments.
pub type SystemCall = (&'static str, libc::c_long, [usize; 6]);

/// Where no memory is.
pub const NOWHERE: usize = 1;
/// Every flag of a 32-bit argument, which no call takes.
pub const ALL_BITS: usize = 0xffff_ffff;
/// The descriptor -1.
pub const NO_FILE: usize = usize::MAX;

/// With arguments that are wrong, or that harm nothing: a call that gets as far as the kernel's own code is told of
/// that, by another error than the filter's, or is let through. Where the kernel looks at the privileges before
/// all else, both say the same.
pub const NEVER: &[SystemCall] = &[
    ("bpf", libc::SYS_bpf, [0, 0, 1 << 20, 0, 0, 0]),
    (
        "perf_event_open",
        libc::SYS_perf_event_open,
        [0, 0, 0, NO_FILE, ALL_BITS, 0],
    ),
    // Only faults of its own, which needs no privilege.
    ("userfaultfd", libc::SYS_userfaultfd, [1, 0, 0, 0, 0, 0]),
    (
        "kexec_load",
        libc::SYS_kexec_load,
        [0, ALL_BITS, NOWHERE, ALL_BITS, 0, 0],
    ),
    #[cfg(not(target_arch = "riscv64"))]
    (
        "kexec_file_load",
        libc::SYS_kexec_file_load,
        [NO_FILE, NO_FILE, 0, NOWHERE, ALL_BITS, 0],
    ),
    (
        "init_module",
        libc::SYS_init_module,
        [NOWHERE, 0, NOWHERE, 0, 0, 0],
    ),
    (
        "finit_module",
        libc::SYS_finit_module,
        [NO_FILE, NOWHERE, ALL_BITS, 0, 0, 0],
    ),
    ("delete_module", libc::SYS_delete_module, [NOWHERE, 0, 0, 0, 0, 0]),
    (
        "open_by_handle_at",
        libc::SYS_open_by_handle_at,
        [NO_FILE, NOWHERE, 0, 0, 0, 0],
    ),
    ("quotactl", libc::SYS_quotactl, [0xff, 0, 0, 0, 0, 0]),
    ("quotactl_fd", libc::SYS_quotactl_fd, [NO_FILE, 0xff, 0, 0, 0, 0]),
    ("swapon", libc::SYS_swapon, [NOWHERE, ALL_BITS, 0, 0, 0, 0]),
    ("swapoff", libc::SYS_swapoff, [NOWHERE, 0, 0, 0, 0, 0]),
    // Not its magic numbers.
    ("reboot", libc::SYS_reboot, [1, 2, 3, 0, 0, 0]),
    ("settimeofday", libc::SYS_settimeofday, [NOWHERE, 0, 0, 0, 0, 0]),
    (
        "clock_settime",
        libc::SYS_clock_settime,
        [9999, NOWHERE, 0, 0, 0, 0],
    ),
    (
        "clock_adjtime",
        libc::SYS_clock_adjtime,
        [9999, NOWHERE, 0, 0, 0, 0],
    ),
    // The size of the kernel's log.
    ("syslog", libc::SYS_syslog, [10, 0, 0, 0, 0, 0]),
    ("acct", libc::SYS_acct, [NOWHERE, 0, 0, 0, 0, 0]),
    // Of its own files, which needs no privilege.
    ("fanotify_init", libc::SYS_fanotify_init, [0x200, 0, 0, 0, 0, 0]),
    ("vhangup", libc::SYS_vhangup, [0; 6]),
    #[cfg(not(target_arch = "arm"))]
    (
        "migrate_pages",
        libc::SYS_migrate_pages,
        [1, 0, NOWHERE, NOWHERE, 0, 0],
    ),
    ("move_pages", libc::SYS_move_pages, [1, 0, 0, 0, 0, ALL_BITS]),
    #[cfg(target_arch = "x86_64")]
    ("iopl", libc::SYS_iopl, [9, 0, 0, 0, 0, 0]),
    #[cfg(target_arch = "x86_64")]
    ("ioperm", libc::SYS_ioperm, [1 << 20, 1, 1, 0, 0, 0]),
];

/// The same, of those that programs do without where the kernel has none.
pub const UNAVAILABLE: &[SystemCall] = &[
    (
        "io_uring_setup",
        libc::SYS_io_uring_setup,
        [1, NOWHERE, 0, 0, 0, 0],
    ),
    (
        "io_uring_enter",
        libc::SYS_io_uring_enter,
        [NO_FILE, 0, 0, 0, 0, 0],
    ),
    (
        "io_uring_register",
        libc::SYS_io_uring_register,
        [NO_FILE, 0, 0, 0, 0, 0],
    ),
    ("keyctl", libc::SYS_keyctl, [9999, 0, 0, 0, 0, 0]),
    ("add_key", libc::SYS_add_key, [NOWHERE, NOWHERE, 0, 0, 0, 0]),
    (
        "request_key",
        libc::SYS_request_key,
        [NOWHERE, NOWHERE, 0, 0, 0, 0],
    ),
    ("io_setup", libc::SYS_io_setup, [1, NOWHERE, 0, 0, 0, 0]),
    (
        "lookup_dcookie",
        libc::SYS_lookup_dcookie,
        [0, NOWHERE, 0, 0, 0, 0],
    ),
    ("nfsservctl", libc::SYS_nfsservctl, [0; 6]),
    // Reading its own table, which is empty.
    #[cfg(target_arch = "x86_64")]
    ("modify_ldt", libc::SYS_modify_ldt, [0, 0, 0, 0, 0, 0]),
];

/// The same, of those that do not work on every file.
pub const NOT_FOR_FILES: &[SystemCall] = &[
    (
        "name_to_handle_at",
        libc::SYS_name_to_handle_at,
        [NO_FILE, NOWHERE, NOWHERE, NOWHERE, ALL_BITS, 0],
    ),
    // Attributes that are none.
    (
        "file_setattr",
        469,
        [NO_FILE, NOWHERE, NOWHERE, NO_FILE, ALL_BITS, 0],
    ),
];

/// The same, of those that a slot may allow.
pub const OF_NAMESPACES: &[SystemCall] = &[
    ("mount", libc::SYS_mount, [NOWHERE, NOWHERE, NOWHERE, 0, 0, 0]),
    ("umount2", libc::SYS_umount2, [NOWHERE, ALL_BITS, 0, 0, 0, 0]),
    (
        "mount_setattr",
        libc::SYS_mount_setattr,
        [NO_FILE, NOWHERE, ALL_BITS, 0, 0, 0],
    ),
    (
        "open_tree",
        libc::SYS_open_tree,
        [NO_FILE, NOWHERE, ALL_BITS, 0, 0, 0],
    ),
    (
        "move_mount",
        libc::SYS_move_mount,
        [NO_FILE, NOWHERE, NO_FILE, NOWHERE, ALL_BITS, 0],
    ),
    ("fsopen", libc::SYS_fsopen, [NOWHERE, ALL_BITS, 0, 0, 0, 0]),
    ("fsconfig", libc::SYS_fsconfig, [NO_FILE, 0, 0, 0, 0, 0]),
    (
        "fsmount",
        libc::SYS_fsmount,
        [NO_FILE, ALL_BITS, ALL_BITS, 0, 0, 0],
    ),
    ("fspick", libc::SYS_fspick, [NO_FILE, NOWHERE, ALL_BITS, 0, 0, 0]),
    ("pivot_root", libc::SYS_pivot_root, [NOWHERE, NOWHERE, 0, 0, 0, 0]),
    ("chroot", libc::SYS_chroot, [NOWHERE, 0, 0, 0, 0, 0]),
    ("setns", libc::SYS_setns, [NO_FILE, 0, 0, 0, 0, 0]),
    (
        "sethostname",
        libc::SYS_sethostname,
        [NOWHERE, ALL_BITS, 0, 0, 0, 0],
    ),
    (
        "setdomainname",
        libc::SYS_setdomainname,
        [NOWHERE, ALL_BITS, 0, 0, 0, 0],
    ),
    (
        "unshare",
        libc::SYS_unshare,
        [libc::CLONE_NEWUSER as usize, 0, 0, 0, 0, 0],
    ),
    ("unshare of the time", libc::SYS_unshare, [0x80, 0, 0, 0, 0, 0]),
];
