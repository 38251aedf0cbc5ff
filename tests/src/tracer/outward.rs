//! What a program does that others can see: it writes below a directory, or to a socket. And its end just before
//! one of these.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::calls::name;
use super::{Event, TraceAction, TracedCall, trace};

/// What was seen until the program's end, or until it was killed.
#[derive(Debug, Default)]
pub struct OutwardCalls {
    /// Each with the name of its call, and what it was done to.
    pub calls: Vec<String>,
    /// Before the last of these it was killed.
    pub killed: bool,
}

/// On a file by its descriptor, or on a socket.
const BY_DESCRIPTOR: &[libc::c_long] = &[
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_ftruncate,
    libc::SYS_connect,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendfile,
];

/// On names; there is nothing else that a supervisor gives a name.
const BY_NAME: &[libc::c_long] = &[
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    #[cfg(not(target_arch = "riscv64"))]
    libc::SYS_renameat,
    libc::SYS_renameat2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mkdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
];

/// So many of the same in a row are seen; further ones are not.
const MANY: usize = 4;

/// Watch a program that has stopped itself before it becomes what is to be watched, in a thread of its own. With
/// `end_before`, it is killed before that call, from 0.
pub fn watch(program: u32, below: &Path, end_before: Option<usize>) -> JoinHandle<OutwardCalls> {
    let (ready, attached) = mpsc::channel();
    let root = Pid::from_raw(program as i32);
    let below = below.to_owned();
    let thread = std::thread::spawn(move || {
        let mut seen = OutwardCalls::default();
        let mut has_started = false;
        trace(
            root,
            &[],
            || {
                let _ = ready.send(());
            },
            |thread, event| {
                has_started |= matches!(event, Event::Exec);
                let call = match event {
                    Event::Enter(call) if has_started => call,
                    _ => return TraceAction::GoOn,
                };
                let Some(what) = describe(thread, &call, &below) else {
                    return TraceAction::GoOn;
                };
                if is_one_of_many(&seen.calls, &what) {
                    return TraceAction::GoOn;
                }
                seen.calls.push(what);
                if end_before != Some(seen.calls.len() - 1) {
                    return TraceAction::GoOn;
                }
                seen.killed = true;
                let _ = kill(root, Signal::SIGKILL);
                TraceAction::End
            },
        );
        seen
    });
    // An error is the thread's panic: who joins it gets it.
    let _ = attached.recv();
    thread
}

/// A download is thousands of writes to one file, and each is like the last.
fn is_one_of_many(before: &[String], what: &str) -> bool {
    before.len() >= MANY && before[before.len() - MANY..].iter().all(|other| other == what)
}

fn describe(thread: Pid, call: &TracedCall, below: &Path) -> Option<String> {
    let name = name(call.number);
    if call.is_any_of(BY_NAME) {
        return Some(name.into_owned());
    }
    let makes = match call.number {
        libc::SYS_openat => call.arguments[2] as i32 & (libc::O_CREAT | libc::O_TRUNC) != 0,
        _ => false,
    };
    if makes {
        return Some(format!("{name} of a new file"));
    }
    if !call.is_any_of(BY_DESCRIPTOR) {
        return None;
    }
    let target: PathBuf = fs::read_link(format!("/proc/{thread}/fd/{}", call.arguments[0] as i32)).ok()?;
    if target.starts_with(below) {
        let file = target.file_name().unwrap_or_default();
        return Some(format!("{name} {}", file.display()));
    }
    let is_socket = target.to_string_lossy().starts_with("socket:");
    is_socket.then(|| format!("{name} to a socket"))
}
