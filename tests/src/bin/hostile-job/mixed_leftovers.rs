//! A little of everything that groups A and B leave, at once: what every clean-up must cope with, wherever it is
//! cut off.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{Pid, mkfifo};

use crate::leftovers::{daemon, ignore_every_signal, own_places, uid};
use crate::sys::{c, call, fork, wait_for_ever};
use crate::{Attempt, Report};

pub const ATTEMPTS: &[Attempt] = &[("mixed-leftovers", mixed_leftovers)];

fn mixed_leftovers(report: &mut Report, _: &[String]) {
    let places = own_places();
    for place in &places {
        in_one_place(place).expect("its own places are writable");
    }
    deep().expect("/work is writable");
    interprocess();
    processes();
    for place in &places {
        let dark = place.join("dark");
        fs::create_dir_all(dark.join("er")).expect("its own places are writable");
        fs::write(dark.join("er/file"), "x").expect("its own places are writable");
        for path in [dark.join("er"), dark] {
            fs::set_permissions(path, Permissions::from_mode(0o0)).expect("they are its own");
        }
        // Not all can be closed: what is mounted here itself is root's in places.
        let _ = fs::set_permissions(place, Permissions::from_mode(0o0));
    }
    report.print("ready");
    wait_for_ever();
}

fn in_one_place(place: &Path) -> io::Result<()> {
    for name in [&b"-rf"[..], b"odd\nname", b"\xff\xfe", b" ", b"...", &[b'n'; 255]] {
        fs::write(place.join(std::ffi::OsStr::from_bytes(name)), "x")?;
    }
    std::mem::forget(UnixListener::bind(place.join("socket"))?);
    mkfifo(&place.join("fifo"), Mode::S_IRWXU)?;
    symlink("/etc", place.join("link"))?;
    fs::hard_link(place.join("-rf"), place.join("hard"))
}

/// Deeper than a path can be long.
fn deep() -> io::Result<()> {
    std::env::set_current_dir("/work")?;
    let name = "d".repeat(255);
    for _ in 0..18 {
        fs::create_dir(&name)?;
        fs::write("beside", "x")?;
        std::env::set_current_dir(&name)?;
    }
    std::env::set_current_dir("/")
}

/// Of System V and of POSIX.
fn interprocess() {
    let key = uid() as usize;
    let create = libc::IPC_CREAT as usize | 0o666;
    call(libc::SYS_shmget, [key, 1 << 16, create, 0, 0, 0]).expect("a job has shared memory");
    call(libc::SYS_semget, [key, 3, create, 0, 0, 0]).expect("a job has semaphores");
    call(libc::SYS_msgget, [key, create, 0, 0, 0, 0]).expect("a job has queues");
    let name = c("left");
    let flags = (libc::O_CREAT | libc::O_RDWR) as usize;
    // Not every kernel has these.
    let _ = call(libc::SYS_mq_open, [name.as_ptr() as usize, flags, 0o666, 0, 0, 0]);
}

fn processes() {
    for _ in 0..3 {
        daemon(|| {
            ignore_every_signal();
            wait_for_ever();
        });
    }
    let stopped = fork(|| {
        let _ = kill(Pid::from_raw(std::process::id() as i32), Signal::SIGSTOP);
        wait_for_ever();
    });
    waitpid(Pid::from_raw(stopped), Some(WaitPidFlag::WUNTRACED)).expect("it is our child");
}
