//! System calls that no library offers to the well-behaved, and the only `unsafe` of this program.
#![allow(unsafe_code)]

use std::io;

/// A bare system call. Pointers among the arguments are the caller's to keep valid, or to make invalid on purpose.
pub fn call(number: libc::c_long, arguments: [usize; 6]) -> io::Result<libc::c_long> {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: it is not sound in general; this program attacks, and harms nobody but itself.
    match unsafe { libc::syscall(number, a, b, c, d, e, f) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

/// `clone3(2)` for a process that ends with SIGCHLD: with these flags, in the cgroup of this descriptor if there is one.
pub fn clone3(flags: u64, cgroup: Option<libc::c_int>) -> io::Result<libc::c_long> {
    // struct clone_args: flags, four pointers, the exit signal, stack, its size, tls, set_tid, its size, the cgroup.
    let mut arguments = [0u64; 11];
    arguments[4] = libc::SIGCHLD as u64;
    arguments[0] = flags;
    if let Some(cgroup) = cgroup {
        // CLONE_INTO_CGROUP
        arguments[0] |= 0x2_0000_0000;
        arguments[10] = cgroup as u64;
    }
    let address = arguments.as_ptr() as usize;
    call(libc::SYS_clone3, [address, size_of_val(&arguments), 0, 0, 0, 0])
}

/// A call that takes two paths, each after a descriptor, and flags: `linkat(2)`, `renameat2(2)`.
pub fn call_with_paths(
    number: libc::c_long,
    from: impl AsRef<std::ffi::OsStr>,
    to: impl AsRef<std::ffi::OsStr>,
    flags: u32,
) -> io::Result<()> {
    let here = libc::AT_FDCWD as usize;
    let (from, to) = (c(from), c(to));
    let [from, to] = [from.as_ptr() as usize, to.as_ptr() as usize];
    call(number, [here, from, here, to, flags as usize, 0]).map(drop)
}

/// `fork(2)`, which newer architectures have as `clone(2)` alone. Not the C library's: it would take locks that another
/// thread may have; this program has one thread.
pub fn fork_here() -> io::Result<libc::c_long> {
    call(libc::SYS_clone, [libc::SIGCHLD as usize, 0, 0, 0, 0, 0])
}

/// Fork; the child does `work` and ends. Returns the child's process id.
pub fn fork(work: impl FnOnce()) -> libc::pid_t {
    match fork_here() {
        Ok(0) => {
            work();
            std::process::exit(0)
        }
        Ok(pid) => pid as libc::pid_t,
        Err(error) => panic!("cannot fork: {error}"),
    }
}

/// A fault that the kernel takes note of (`show_unhandled_signals`).
pub fn read_nothing() {
    // SAFETY: it is not sound: it ends the process, which is what it is for.
    let _ = unsafe { std::ptr::read_volatile(std::ptr::without_provenance::<u8>(16)) };
}

/// A path for a system call; it must outlive the call.
pub fn c(path: impl AsRef<std::ffi::OsStr>) -> std::ffi::CString {
    use std::os::unix::ffi::OsStrExt;
    std::ffi::CString::new(path.as_ref().as_bytes()).expect("no path here has a NUL")
}

/// Wait for ever; for a process that is to be ended by others.
pub fn wait_for_ever() -> ! {
    loop {
        // Returns only after a signal with a handler, and there is none.
        let _ = call(libc::SYS_ppoll, [0; 6]);
    }
}

/// A call by number through the entry point of 32-bit programs, whose numbers are others; the first argument
/// is all that the attempts need.
#[cfg(target_arch = "x86_64")]
pub fn call_of_32_bits(number: u32, argument: u32) -> io::Result<u32> {
    let mut result = number;
    // SAFETY: no call that is made this way has a pointer. The compiler keeps rbx to itself, so it is lent and
    // given back; the kernel may clear r8 to r11 on this way in.
    unsafe {
        std::arch::asm!(
            "xchg {lent}, rbx",
            "int 0x80",
            "xchg {lent}, rbx",
            lent = inout(reg) u64::from(argument) => _,
            inout("eax") result,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    match result as i32 {
        error @ -4095..=-1 => Err(io::Error::from_raw_os_error(-error)),
        _ => Ok(result),
    }
}
