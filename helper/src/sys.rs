//! Every unsafe line of the helper: the system calls that `nix` lacks, and what makes processes.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitStatus;

use libc::c_long;
use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::wait::WaitPidFlag;
use nix::unistd::Pid;

/// `linux/sched.h`; libc has it in a type that is too narrow.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Run `child` in a forked process, which ends with the status that it returns.
///
/// The helper is single-threaded, always: that is what makes going on after a fork without exec sound.
pub fn fork(child: impl FnOnce() -> i32) -> io::Result<Pid> {
    // SAFETY: the process has one thread, so the child's copy of every lock and of the heap is whole.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => run_and_exit(child),
        pid => Ok(Pid::from_raw(pid)),
    }
}

/// `struct clone_args` of `linux/sched.h`, which the C library's list has on 64-bit machines alone.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    /// `pidfd`, `child_tid` and `parent_tid`.
    places: [u64; 3],
    exit_signal: u64,
    /// `stack`, `stack_size` and `tls`, of a thread; `set_tid` and `set_tid_size`.
    others: [u64; 5],
    cgroup: u64,
}

/// Like [`fork`], with the child as pid 1 of a pid namespace of its own, in new mount, ipc and uts
/// namespaces, and in the cgroup from its first instruction (`clone(2)`).
pub fn clone_sandboxed(cgroup: BorrowedFd<'_>, child: impl FnOnce() -> i32) -> io::Result<Pid> {
    let namespaces = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    let args = CloneArgs {
        flags: namespaces as u64 | CLONE_INTO_CGROUP,
        exit_signal: libc::SIGCHLD as u64,
        cgroup: cgroup.as_raw_fd() as u64,
        ..CloneArgs::default()
    };
    // SAFETY: without CLONE_VM this is a fork, sound for the reason given there; args outlives the call.
    match unsafe { libc::syscall(libc::SYS_clone3, &args, size_of::<CloneArgs>()) } {
        -1 => Err(io::Error::last_os_error()),
        0 => run_and_exit(child),
        pid => Ok(Pid::from_raw(pid as i32)),
    }
}

fn run_and_exit(child: impl FnOnce() -> i32) -> ! {
    // A panic must not unwind into the frames that belong to the parent.
    let status = catch_unwind(AssertUnwindSafe(child)).unwrap_or(101);
    // SAFETY: _exit has no preconditions; it runs no handlers that belong to the parent either.
    unsafe { libc::_exit(status) }
}

/// Close every descriptor above standard error but these.
pub fn close_all_but(keep: &[RawFd]) -> io::Result<()> {
    let mut keep: Vec<u32> = keep.iter().map(|fd| *fd as u32).filter(|fd| *fd > 2).collect();
    keep.sort_unstable();
    let mut first = 3;
    for fd in keep.into_iter().chain([u32::MAX]) {
        if first < fd {
            // SAFETY: only a forked child calls this, on its way to forget all that its parent had
            // open: it touches no owner of a closed descriptor again, and never returns to drop one.
            if unsafe { libc::syscall(libc::SYS_close_range, first, fd - 1, 0) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        first = fd.saturating_add(1);
    }
    Ok(())
}

/// Reset a USB device (`USBDEVFS_RESET` in the kernel's `driver-api/usb/usb.rst`).
pub fn reset_usb_device(device: &OwnedFd) -> nix::Result<()> {
    // `_IO('U', 20)` of `linux/usbdevice_fs.h`.
    const USBDEVFS_RESET: libc::Ioctl = 0x5514;
    // SAFETY: the request has no argument.
    Errno::result(unsafe { libc::ioctl(device.as_raw_fd(), USBDEVFS_RESET) }).map(drop)
}

/// Descriptor 3, if systemd passed this process exactly that one listening socket (`sd_listen_fds(3)`).
pub fn listening_socket_of_systemd() -> Option<OwnedFd> {
    let variable = |name: &str| std::env::var(name).ok()?.parse::<u32>().ok();
    if variable("LISTEN_PID") != Some(std::process::id()) || variable("LISTEN_FDS") != Some(1) {
        return None;
    }
    // SAFETY: systemd has opened descriptor 3 for this process, and main asks once, before opening any.
    Some(unsafe { OwnedFd::from_raw_fd(3) })
}

/// A system call's result without a value.
fn done(result: c_long) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// A detached copy of the mount at `path` from `at`, which is `at` itself where the path is empty, with all below it if
/// `recursive` (`open_tree(2)`). A link is not followed.
pub fn clone_mount(at: BorrowedFd<'_>, path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let deep = if recursive { libc::AT_RECURSIVE as u32 } else { 0 };
    let last = (libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW) as u32;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | deep | last;
    // SAFETY: path is a C string that outlives the call; a result that is not -1 is a new descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, at.as_raw_fd(), path.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above, and nobody else knows the descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

pub const READ_ONLY: u64 = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
pub const WRITABLE: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
pub const DEVICES: u64 = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;

/// Set and clear attributes (`MOUNT_ATTR_*`) of a detached mount, and of all below it, and make it private.
pub fn set_mount_attributes(mount: BorrowedFd<'_>, set: u64, clear: u64) -> io::Result<()> {
    let attr = libc::mount_attr {
        attr_set: set,
        attr_clr: clear,
        propagation: libc::MS_PRIVATE as u64,
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    // SAFETY: the path is the empty C string, attr is of the size that is said, both outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &attr,
            size_of_val(&attr),
        )
    };
    done(result)
}

/// Attach a detached mount at `place` (`move_mount(2)`).
pub fn attach_mount(mount: BorrowedFd<'_>, place: &Path) -> io::Result<()> {
    let place = c_path(place)?;
    let empty: &CStr = c"";
    // SAFETY: both are C strings that outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            empty.as_ptr(),
            libc::AT_FDCWD,
            place.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    done(result)
}

/// Set `no_new_privs` for good: no exec gains privileges from now on; and nobody of the same uid may look
/// into this process or trace it (`PR_SET_DUMPABLE`).
pub fn set_no_new_privs_and_undumpable() -> io::Result<()> {
    prctl::set_no_new_privs()?;
    Ok(prctl::set_dumpable(false)?)
}

/// A child that has ended, and how: this one, or any (`waitpid(2)`). None if none has, where `flags` say not to wait.
///
/// nix's own reaps a child that was ended by a real-time signal, and fails without saying which it was.
pub fn wait(child: Option<Pid>, flags: WaitPidFlag) -> nix::Result<Option<(Pid, ExitStatus)>> {
    let (child, mut status) = (child.map_or(-1, Pid::as_raw), 0);
    // SAFETY: the kernel writes to an integer that outlives the call.
    let ended = Errno::result(unsafe { libc::waitpid(child, &raw mut status, flags.bits()) })?;
    Ok((ended != 0).then(|| (Pid::from_raw(ended), ExitStatus::from_raw(status))))
}

/// Answer every signal as the kernel does by default, but for `SIGPIPE`, which Rust ignores for itself and gives
/// back to each program that it starts. Who started the helper may have had it ignore some (`nohup(1)`, a shell's
/// `&`), and what is ignored stays so in every program that is started.
pub fn reset_signals() {
    for number in (1..=libc::SIGRTMAX()).filter(|number| *number != libc::SIGPIPE) {
        // SAFETY: no handler is set. For SIGKILL, SIGSTOP and the C library's own it fails, and changes nothing.
        unsafe { libc::signal(number, libc::SIG_DFL) };
    }
}

/// Has the user any process, be it one that waits to be reaped? The kernel finds those of a real uid, and says ESRCH
/// where there is none (`getpriority(2)`): so there is no walk over `/proc`, and no process that hides.
pub fn has_process_of(uid: u32) -> io::Result<bool> {
    // SAFETY: this call takes integers. The kernel's answer is never negative for a process that is there.
    if unsafe { libc::syscall(libc::SYS_getpriority, libc::PRIO_USER, uid) } >= 0 {
        return Ok(true);
    }
    match io::Error::last_os_error() {
        none if none.raw_os_error() == Some(libc::ESRCH) => Ok(false),
        error => Err(error),
    }
}

/// Give this process, and all that it will start, at least this nice value, 0 to 19 (`setpriority(2)`). One that is higher
/// already stays: lowering it takes a capability.
pub fn raise_nice(nice: u8) -> io::Result<()> {
    // SAFETY: both calls take integers. The kernel's answer to the first is 20 less the nice value.
    done(unsafe {
        let now = 20 - libc::syscall(libc::SYS_getpriority, libc::PRIO_PROCESS, 0);
        libc::syscall(libc::SYS_setpriority, libc::PRIO_PROCESS, 0, now.max(nice.into()))
    })
}

/// Put a filter of system calls before this process and all that it will start, for good (`seccomp(2)`).
pub fn filter_system_calls(program: &[libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(io::Error::other)?,
        // The kernel only reads it; the C type knows no const.
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: program says its own length, and it and the steps that it points to outlive the call.
    done(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &program) })
}

/// `struct landlock_ruleset_attr` of `linux/landlock.h`, as of Linux 6.12. A kernel that knows less of it takes it as long
/// as what it does not know is zero.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LandlockRuleset {
    pub handled_access_fs: u64,
    pub handled_access_net: u64,
    pub scoped: u64,
}

/// `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
struct LandlockPathBeneath {
    allowed_access: u64,
    parent_fd: i32,
}

/// The version of this kernel's Landlock interface; less than 1 if it has none (`landlock_create_ruleset(2)`).
pub fn landlock_version() -> c_long {
    // SAFETY: with this flag (LANDLOCK_CREATE_RULESET_VERSION) no attributes are read.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0usize, 0usize, 1) }
}

pub fn landlock_create_ruleset(ruleset: &LandlockRuleset) -> io::Result<OwnedFd> {
    let size = size_of_val(ruleset);
    // SAFETY: the struct is of the size that is said, and outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, ruleset, size, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a result that is not negative is a new descriptor, which nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Allow this access to `place` and to all beneath it (`LANDLOCK_RULE_PATH_BENEATH`).
pub fn landlock_allow_beneath(ruleset: BorrowedFd<'_>, place: BorrowedFd<'_>, access: u64) -> io::Result<()> {
    let rule = LandlockPathBeneath {
        allowed_access: access,
        parent_fd: place.as_raw_fd(),
    };
    // SAFETY: the kernel reads one such struct, which outlives the call.
    done(unsafe { libc::syscall(libc::SYS_landlock_add_rule, ruleset.as_raw_fd(), 1, &rule, 0) })
}

/// Keep this process, and all that it will start, to the ruleset, for good. It takes `no_new_privs`.
pub fn landlock_restrict_self(ruleset: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: this call takes a descriptor and an integer.
    done(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0) })
}

/// What requests about the interface of this name are made with (`netdevice(7)`), otherwise empty.
fn interface_request(name: &str) -> libc::ifreq {
    // SAFETY: all bytes zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // A zero stays behind it.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

/// Bring up `lo` of this process's network namespace (`netdevice(7)`): the kernel then gives it 127.0.0.1.
pub fn bring_up_loopback(socket: BorrowedFd<'_>) -> io::Result<()> {
    let mut request = interface_request("lo");
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads an ifreq, which outlives the call.
    done(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) }.into())
}

/// Give `lo` of this process's network namespace one more IPv4 address, as its alias of this number, from 1. Its net is
/// then made as small as it is: at first the kernel takes the net of the address's class, and all of a net of `lo` is this
/// host (`netdevice(7)`; `fib_add_ifaddr` in the kernel's net/ipv4/fib_frontend.c).
pub fn add_loopback_ipv4(socket: BorrowedFd<'_>, alias: u8, address: Ipv4Addr) -> io::Result<()> {
    let mut request = interface_request(&format!("lo:{alias}"));
    for (set, value) in [
        (libc::SIOCSIFADDR, address),
        (libc::SIOCSIFNETMASK, Ipv4Addr::BROADCAST),
    ] {
        let mut port_and_address = [0; 14];
        for (to, from) in port_and_address[2..].iter_mut().zip(value.octets()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_addr = libc::sockaddr {
            sa_family: libc::AF_INET as libc::sa_family_t,
            sa_data: port_and_address,
        };
        // SAFETY: each of both reads an ifreq, which outlives the call.
        done(unsafe { libc::ioctl(socket.as_raw_fd(), set, &request) }.into())?;
    }
    Ok(())
}

/// The same for IPv6, which knows no aliases. The socket must be IPv6's.
pub fn add_loopback_ipv6(socket: BorrowedFd<'_>, address: Ipv6Addr) -> io::Result<()> {
    let request = libc::in6_ifreq {
        ifr6_addr: libc::in6_addr {
            s6_addr: address.octets(),
        },
        ifr6_prefixlen: 128,
        // `lo` of every network namespace (`loopback_net_init` in the kernel's drivers/net/loopback.c).
        ifr6_ifindex: 1,
    };
    // SAFETY: SIOCSIFADDR of an IPv6 socket reads an in6_ifreq, which outlives the call.
    done(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFADDR, &request) }.into())
}

/// Make a terminal as large as another (`TIOCGWINSZ` and `TIOCSWINSZ`, `ioctl_tty(2)`).
pub fn copy_window_size(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCGWINSZ writes a winsize, which outlives the call.
    done(unsafe { libc::ioctl(from.as_raw_fd(), libc::TIOCGWINSZ, &mut size) }.into())?;
    // SAFETY: TIOCSWINSZ reads a winsize, which outlives the call.
    done(unsafe { libc::ioctl(to.as_raw_fd(), libc::TIOCSWINSZ, &size) }.into())
}

/// The inode number of a btrfs subvolume's top directory (`BTRFS_FIRST_FREE_OBJECTID` of `linux/btrfs_tree.h`).
pub const SUBVOLUME_TOP: libc::ino_t = 256;

/// `BTRFS_IOC_SUBVOL_SETFLAGS` of `linux/btrfs.h`.
pub const SET_SUBVOLUME_FLAGS: u32 = 0x4008_941a;

/// Clear the flags of the btrfs subvolume with this top directory, so that a read-only one can be written. It takes the
/// owner of the directory, and no capability. ENOTTY: the file system is another.
pub fn make_subvolume_writable(top: BorrowedFd<'_>) -> io::Result<()> {
    let flags = 0u64;
    // SAFETY: the request reads 8 bytes, which outlive the call.
    done(unsafe { libc::ioctl(top.as_raw_fd(), SET_SUBVOLUME_FLAGS as _, &flags) }.into())
}

/// `quotactl(2)`'s command, for user quotas (type 0).
const fn user_quota(command: u32) -> u32 {
    command << 8
}

/// `Q_SETQUOTA` or `Q_GETQUOTA`, for `uid` on the file system of `at`.
fn quota(at: BorrowedFd<'_>, command: i32, uid: u32, block: &mut libc::dqblk) -> io::Result<()> {
    let command = user_quota(command as u32 & 0xff_ffff);
    // SAFETY: either command reads or writes one dqblk, which outlives the call.
    done(unsafe { libc::syscall(libc::SYS_quotactl_fd, at.as_raw_fd(), command, uid, block) })
}

const NO_QUOTA: libc::dqblk = libc::dqblk {
    dqb_bhardlimit: 0,
    dqb_bsoftlimit: 0,
    dqb_curspace: 0,
    dqb_ihardlimit: 0,
    dqb_isoftlimit: 0,
    dqb_curinodes: 0,
    dqb_btime: 0,
    dqb_itime: 0,
    dqb_valid: 0,
};

/// Are limits of user quotas enforced on the file system of `at`?
pub fn enforces_user_quotas(at: BorrowedFd<'_>) -> bool {
    // Q_XGETQSTAT of linux/dqblk_xfs.h, which ext4 answers too; qs_flags is the second field of a struct
    // fs_quota_stat of 80 bytes, and FS_QUOTA_UDQ_ENFD its second bit.
    let mut stat = [0u16; 64];
    let command = user_quota(('X' as u32) << 8 | 5);
    // SAFETY: the kernel writes 80 bytes to stat, which has 128, and which outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_quotactl_fd,
            at.as_raw_fd(),
            command,
            0,
            stat.as_mut_ptr(),
        )
    };
    result == 0 && stat[1] & 2 != 0
}

/// Let `uid` have at most so many KiB and files on the file system of `at`; 0 is no limit.
pub fn set_user_quota(at: BorrowedFd<'_>, uid: u32, kib: u64, files: u64) -> io::Result<()> {
    let mut limits = libc::dqblk {
        dqb_bhardlimit: kib,
        dqb_ihardlimit: files,
        dqb_valid: libc::QIF_LIMITS,
        ..NO_QUOTA
    };
    quota(at, libc::Q_SETQUOTA, uid, &mut limits)
}

/// How many bytes of the file system of `at` belong to `uid`: for itself, or with CAP_SYS_ADMIN.
pub fn bytes_of_user(at: BorrowedFd<'_>, uid: u32) -> io::Result<u64> {
    let mut used = NO_QUOTA;
    quota(at, libc::Q_GETQUOTA, uid, &mut used)?;
    Ok(used.dqb_curspace)
}
