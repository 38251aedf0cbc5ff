//! Group D: starving the host. What would go on for ever has an end here: if a limit is missing, the test says
//! so, and the machine goes on.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::statvfs::statvfs;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::leftovers::{daemon, ignore_every_signal, keys};
use crate::sys::{c, call, fork, fork_here, wait_for_ever};
use crate::{Attempt, Report};

pub const ATTEMPTS: &[Attempt] = &[
    ("shared-memory", shared_memory),
    ("exhaust-limits", exhaust_limits),
    ("take-a-little", take_a_little),
    ("fill-quota", fill_quota),
    ("write-much", write_much),
    ("print-much", print_much),
    ("never-end", never_end),
    ("bind-sockets", bind_sockets),
];

fn number(arg: &str) -> u64 {
    arg.parse().expect("the test gives a number")
}

/// Take things until there are no more, at most `end` of them; they are returned, and the reason.
fn take<T>(end: u64, mut one: impl FnMut(u64) -> io::Result<T>) -> (Vec<T>, Option<io::Error>) {
    let mut taken = Vec::new();
    for count in 0..end {
        match one(count) {
            Ok(thing) => taken.push(thing),
            Err(error) => return (taken, Some(error)),
        }
    }
    (taken, None)
}

/// There must have been an end, for this reason, after at least `least` and at most `most`.
fn bounded(
    report: &mut Report,
    what: &str,
    count: u64,
    (least, most): (u64, u64),
    error: &Option<io::Error>,
    reasons: &[i32],
) {
    let why = error.as_ref().and_then(io::Error::raw_os_error);
    let line = format!("{what}: {count}, then {error:?}");
    if (least..=most).contains(&count) && why.is_some_and(|why| reasons.contains(&why)) {
        report.print(format!("blocked: {line}"));
    } else {
        report.broken(line);
    }
}

fn shared_memory(report: &mut Report, args: &[String]) {
    let limit = number(&args[0]);
    let size = statvfs("/dev/shm").expect("a job has it");
    let bytes = size.blocks() * size.fragment_size();
    if bytes != limit {
        report.broken(format!("/dev/shm has {bytes} bytes"));
    }
    let mut file = File::create("/dev/shm/all").expect("a job may write there");
    let piece = vec![1; 1 << 16];
    let (written, error) = take(2 * (limit >> 16), |_| file.write_all(&piece));
    let written = (written.len() as u64) << 16;
    bounded(
        report,
        "shared memory",
        written,
        (limit / 2, limit),
        &error,
        &[libc::ENOSPC],
    );
}

/// A child that does this for ever.
fn child(work: impl FnOnce()) -> io::Result<i32> {
    match fork_here()? {
        0 => {
            work();
            wait_for_ever()
        }
        pid => Ok(pid as i32),
    }
}

fn reap(children: Vec<i32>) {
    for pid in children {
        let pid = Pid::from_raw(pid);
        kill(pid, Signal::SIGKILL).expect("it is our child");
        waitpid(pid, None).expect("it is our child");
    }
}

fn watch(_: u64) -> io::Result<i64> {
    call(libc::SYS_inotify_init1, [0; 6])
}

fn terminal(_: u64) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/ptmx")
}

fn queue(count: u64) -> io::Result<i64> {
    let name = c(format!("queue-{count}"));
    let flags = (libc::O_CREAT | libc::O_RDWR) as usize;
    call(libc::SYS_mq_open, [name.as_ptr() as usize, flags, 0o600, 0, 0, 0])
}

/// The arguments: the slot's processes and open files, the watches that the host lets a user have.
fn exhaust_limits(report: &mut Report, args: &[String]) {
    let [processes, files, watches] = [0, 1, 2].map(|n| number(&args[n]));

    let raised = [files + 1; 2];
    let arguments = [0, libc::RLIMIT_NOFILE as usize, raised.as_ptr() as usize, 0, 0, 0];
    report.must_fail("more open files", call(libc::SYS_prlimit64, arguments));
    let raised = [processes + 1; 2];
    let arguments = [0, libc::RLIMIT_NPROC as usize, raised.as_ptr() as usize, 0, 0, 0];
    report.must_fail("more processes", call(libc::SYS_prlimit64, arguments));

    let again = &[libc::EAGAIN];
    let range = (processes / 2, processes);
    // In a child, with which its threads end.
    let threads = fork(|| {
        let park = || {
            std::thread::Builder::new()
                .stack_size(1 << 16)
                .spawn(|| wait_for_ever())
        };
        let (all, error) = take(20 * processes, |_| park());
        let mut own = Report::default();
        bounded(&mut own, "threads", all.len() as u64, range, &error, again);
    });
    waitpid(Pid::from_raw(threads), None).expect("it is our child");

    let (all, error) = take(20 * files, |_| File::open("/dev/null"));
    bounded(
        report,
        "open files",
        all.len() as u64,
        (files / 2, files),
        &error,
        &[libc::EMFILE],
    );
    drop(all);

    let most = watches.min(files);
    let (all, error) = take(20 * files, watch);
    bounded(
        report,
        "inotify",
        all.len() as u64,
        (1, most),
        &error,
        &[libc::EMFILE],
    );
    for fd in all {
        call(libc::SYS_close, [fd as usize, 0, 0, 0, 0, 0]).expect("it is ours");
    }

    // RLIMIT_MSGQUEUE is 800 KiB, and a queue of the usual size takes 80 KiB at least.
    let (all, error) = take(300, queue);
    bounded(
        report,
        "queues",
        all.len() as u64,
        (1, 10),
        &error,
        &[libc::EMFILE, libc::ENOMEM, libc::ENOSPC],
    );

    let waiting = fork(|| {
        let mut own = Report::default();
        SigSet::all().thread_block().expect("a mask can be set");
        let signal = 40usize;
        // A siginfo of 128 bytes: the signal's number, no error, SI_QUEUE.
        let mut info = [0i32; 32];
        (info[0], info[2]) = (signal as i32, -1);
        let pid = std::process::id() as usize;
        let arguments = [pid, signal, info.as_ptr() as usize, 0, 0, 0];
        let (all, error) = take(50_000, |_| call(libc::SYS_rt_sigqueueinfo, arguments));
        bounded(&mut own, "signals", all.len() as u64, (1, 16_384), &error, again);
    });
    waitpid(Pid::from_raw(waiting), None).expect("it is our child");

    keys(report, &[]);

    // One process has not enough descriptors for all terminals. These children keep what they got, and the
    // watches and files, while the neighbour works.
    let (mut total, mut last) = (0, None);
    for _ in 0..16 {
        let (mut here, mut there) = UnixStream::pair().expect("a socket pair");
        child(|| {
            let (terminals, error) = take(files, terminal);
            let why = error.as_ref().and_then(io::Error::raw_os_error).unwrap_or(0);
            let counts = [terminals.len() as u32, why as u32].map(u32::to_le_bytes);
            there.write_all(counts.as_flattened()).expect("the parent reads");
            let _rest = (take(files, watch), take(files, |_| File::open("/dev/null")));
            wait_for_ever();
        })
        .expect("there may be more processes");
        drop(there);
        let mut counts = [0; 8];
        here.read_exact(&mut counts).expect("the child writes");
        let [count, why] =
            [&counts[..4], &counts[4..]].map(|half| u32::from_le_bytes(half.try_into().expect("four bytes")));
        total += u64::from(count);
        last = Some(io::Error::from_raw_os_error(why as i32));
    }
    bounded(report, "terminals", total, (128, 128), &last, &[libc::ENOSPC]);

    let (all, error) = take(20 * processes, |_| child(|| ()));
    // Some are there already: the terminals' holders, this one, pid 1.
    bounded(report, "processes", all.len() as u64 + 18, range, &error, again);
    report.print("ready");
    wait_for_ever();
}

/// What every job does, while another one takes all that it gets.
fn take_a_little(report: &mut Report, _: &[String]) {
    let (children, error) = take(100, |_| child(|| ()));
    let mut missing = |what: &str, error: Option<io::Error>| match error {
        Some(error) => report.broken(format!("{what} should work: {error}")),
        None => report.print(format!("done: {what}")),
    };
    missing("processes", error);
    missing("files", take(400, |_| File::open("/dev/null")).1);
    missing("terminals", take(20, terminal).1);
    missing("watches", take(20, watch).1);
    missing("queues", take(3, queue).1);
    reap(children);
}

/// Where the job's files go to the disk: each directory a project of its own.
fn project_dirs() -> [PathBuf; 3] {
    let home = std::env::var("HOME").expect("a job has a home");
    [PathBuf::from(home), "/work".into(), "/tmp".into()]
}

/// FS_IOC_FSSETXATTR of linux/fs.h.
fn other_project(file: &File) -> io::Result<libc::c_long> {
    // A struct fsxattr, whose fourth field is the project.
    let attributes = [0u32, 0, 0, 77, 0, 0, 0];
    let fd = std::os::fd::AsRawFd::as_raw_fd(file) as usize;
    let arguments = [fd, 0x401c_5820, attributes.as_ptr() as usize, 0, 0, 0];
    call(libc::SYS_ioctl, arguments)
}

/// The arguments: the slot's bytes and files on disk.
fn fill_quota(report: &mut Report, args: &[String]) {
    let [bytes, inodes] = [0, 1].map(|n| number(&args[n]));
    let quota = &[libc::EDQUOT];
    let dirs = project_dirs();
    let dir = |count: u64| &dirs[(count % 3) as usize];
    let made = |count: u64| dir(count).join(format!("file-{count}"));

    let (all, error) = take(4 * inodes, |count| File::create(made(count)).map(drop));
    bounded(
        report,
        "files",
        all.len() as u64,
        (inodes / 2, inodes),
        &error,
        quota,
    );
    for (what, result) in [
        ("a directory", fs::create_dir("/work/dir")),
        ("a link", symlink("/", "/work/link")),
        ("a socket", UnixListener::bind("/tmp/socket").map(drop)),
    ] {
        report.must_fail(what, result);
    }
    for count in 0..all.len() as u64 {
        fs::remove_file(made(count)).expect("it was made");
    }

    let mut files = dirs
        .each_ref()
        .map(|dir| File::create(dir.join("blocks")).expect("there is room"));
    // The owner of a file may count it in another project, and so leave a quota of projects: not without the request.
    for file in &files {
        report.must_fail("a project of its own", other_project(file));
    }
    let piece = vec![1; 1 << 16];
    let pieces = bytes >> 16;
    let (all, error) = take(4 * pieces, |count| files[(count % 3) as usize].write_all(&piece));
    bounded(
        report,
        "pieces",
        all.len() as u64,
        (pieces / 2, pieces),
        &error,
        quota,
    );
    for file in &files {
        report.must_fail("allocated", nix::fcntl::posix_fallocate(file, 0, bytes as i64));
    }
    // Nobody else's files to be, and no other limit.
    let path = c("/work/blocks");
    report.must_fail(
        "given away",
        call(
            libc::SYS_fchownat,
            [libc::AT_FDCWD as usize, path.as_ptr() as usize, 0, 0, 0, 0],
        ),
    );
    let work = File::open("/work").expect("it is the job's");
    let limits = [0u64; 9];
    let arguments = [
        std::os::fd::AsRawFd::as_raw_fd(&work) as usize,
        // Q_SETQUOTA for users
        0x8000_0800,
        crate::leftovers::uid() as usize,
        limits.as_ptr() as usize,
        0,
        0,
    ];
    report.must_fail("another quota", call(libc::SYS_quotactl_fd, arguments));
    for count in 0..1000 {
        report.print(format!("line {count} with a full quota"));
    }
    report.print("ready");
    wait_for_ever();
}

/// The arguments: MiB, and files.
fn write_much(report: &mut Report, args: &[String]) {
    let piece = vec![1; 1 << 20];
    let mut file = File::create("/work/much").expect("a job may write there");
    let (_, blocks) = take(number(&args[0]), |_| file.write_all(&piece));
    let made = |count| File::create(Path::new("/tmp").join(format!("file-{count}"))).map(drop);
    let (_, files) = take(number(&args[1]), made);
    for error in [blocks, files].into_iter().flatten() {
        report.broken(format!("writing should work: {error}"));
    }
}

/// 16 MiB of output of the kind that the argument says, and an exit status of its own.
fn print_much(_: &mut Report, args: &[String]) {
    let pattern: &[u8] = match args[0].as_str() {
        "no-newline" => b"x",
        "escapes" => b"\x1b[2J\x1b]0;title\x07\x1b[31m\x9b\xff",
        "nuls" => b"\0",
        other => panic!("no such output: {other:?}"),
    };
    let piece = pattern.repeat((1 << 20) / pattern.len() + 1);
    // Around the line buffer of the standard library.
    let mut output = File::from(nix::unistd::dup(io::stdout()).expect("a job has an output"));
    for _ in 0..16 {
        output.write_all(&piece).expect("it is read");
    }
    std::process::exit(7);
}

/// The arguments: `idle`, `noisy` (all of them print as fast as they can), or `threads` (two thousand that spin, beside
/// the noise); and the seconds after which they begin with that, none unless said.
fn never_end(report: &mut Report, args: &[String]) {
    const THREADS: usize = 500;
    let kind = args.first().map(String::as_str);
    let pause = args.get(1).map_or(0, |seconds| number(seconds));
    let pause = std::time::Duration::from_secs(pause);
    for process in 0..4 {
        daemon(|| {
            ignore_every_signal();
            if kind == Some("threads") {
                for _ in 0..THREADS {
                    let spin = move || {
                        // When all four have said that they begin.
                        std::thread::sleep(pause + std::time::Duration::from_secs(1));
                        loop {
                            std::hint::spin_loop();
                        }
                    };
                    let thread = std::thread::Builder::new().stack_size(1 << 16);
                    thread.spawn(spin).expect("the slot has room for threads");
                }
            }
            std::thread::sleep(pause);
            // The console may have nobody who copies it.
            fs::write(format!("/work/started-{process}"), "").expect("/work is writable");
            if kind != Some("idle") {
                loop {
                    let _ = nix::unistd::write(io::stdout(), &[b'y'; 4096]);
                }
            }
            wait_for_ever();
        });
    }
    ignore_every_signal();
    report.print("ready");
    wait_for_ever();
}

/// Bind so many sockets to paths that are long to resolve, and keep them.
fn bind_sockets(report: &mut Report, args: &[String]) {
    const EACH: u64 = 900;
    let count = number(&args[0]);
    fs::create_dir("/work/d").expect("a job may write there");
    let long = "d/../".repeat(16);
    for process in 0..count.div_ceil(EACH) {
        let (mut here, mut there) = UnixStream::pair().expect("a socket pair");
        child(|| {
            let bind = |n| UnixDatagram::bind(format!("/work/{long}{process}-{n}"));
            let sockets: Vec<_> = (0..EACH).map(|n| bind(n).expect("a job may bind")).collect();
            there.write_all(b"x").expect("the parent reads");
            std::mem::forget(sockets);
        })
        .expect("a job has processes");
        here.read_exact(&mut [0])
            .expect("the child says that it has bound them");
    }
    report.print("bound");
    wait_for_ever();
}
