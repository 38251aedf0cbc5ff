//! Group D: memory and processor time, where the kernel can limit them. What would take all that the host has ends
//! at a few times the limit: if a limit is missing, the test says so, and the machine goes on.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, pipe2};

use crate::sys::{call, fork, wait_for_ever};
use crate::{Attempt, Report};

pub const ATTEMPTS: &[Attempt] = &[
    ("memory-bomb", memory_bomb),
    ("memory-hold", memory_hold),
    ("page-cache", page_cache),
    ("spin", spin),
];

const PIECE: usize = 1 << 16;

/// Something that holds memory as long as it is kept, and how much it is.
type HeldMemory = (Box<dyn std::any::Any>, usize);

fn anonymous() -> io::Result<HeldMemory> {
    // Not of one byte only, lest something find out that all pages are alike.
    let page: Vec<u8> = (0..PIECE).map(|n| (n / 4096 + n) as u8).collect();
    Ok((Box::new(page), PIECE))
}

fn in_shared_memory() -> io::Result<HeldMemory> {
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open("/dev/shm/bomb")?;
    file.write_all(&[1; PIECE])?;
    Ok((Box::new(()), PIECE))
}

fn in_a_memfd() -> io::Result<HeldMemory> {
    let fd = nix::sys::memfd::memfd_create("bomb", nix::sys::memfd::MFdFlags::empty())?;
    let mut file = File::from(fd);
    let piece = vec![1; 16 * PIECE];
    file.write_all(&piece)?;
    Ok((Box::new(file), piece.len()))
}

/// Write what nobody reads, until no more goes in.
pub fn filled(mut end: impl Write + AsFd) -> io::Result<usize> {
    fcntl(&end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let mut total = 0;
    loop {
        match end.write(&[1; 4096]) {
            Ok(n) => total += n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(total),
            Err(error) => return Err(error),
        }
    }
}

fn in_a_pipe() -> io::Result<HeldMemory> {
    let (out, into) = pipe2(OFlag::O_CLOEXEC)?;
    let into = File::from(into);
    let total = filled(&into)?;
    Ok((Box::new((out, into)), total))
}

fn in_a_socket() -> io::Result<HeldMemory> {
    let (out, into) = UnixStream::pair()?;
    let total = filled(&into)?;
    Ok((Box::new((out, into)), total))
}

/// Hold this much memory of the kind that the argument says. The error is why there was no more.
fn hold(kind: &str, bytes: u64) -> (Vec<HeldMemory>, u64, Option<io::Error>) {
    let one = match kind {
        "anonymous" => anonymous,
        "shared-memory" => in_shared_memory,
        "memfd" => in_a_memfd,
        "pipes" => in_a_pipe,
        "sockets" => in_a_socket,
        other => panic!("no such memory: {other:?}"),
    };
    let (mut all, mut total) = (Vec::new(), 0);
    while total < bytes {
        match one() {
            Ok(held) => {
                total += held.1 as u64;
                all.push(held);
            }
            Err(error) => return (all, total, Some(error)),
        }
    }
    (all, total, None)
}

fn parse_args(args: &[String]) -> (&str, u64) {
    (&args[0], args[1].parse().expect("the test gives a number"))
}

/// The arguments: a kind of memory, and the slot's limit, which there is no going far beyond.
fn memory_bomb(report: &mut Report, args: &[String]) {
    let (kind, limit) = parse_args(args);
    let bomb = fork(|| {
        raise_open_files();
        let (_all, total, error) = hold(kind, 4 * limit);
        match error {
            None => println!("BROKEN: {kind}: {total} bytes were there to be had"),
            Some(error) => println!("blocked: {kind}: {total} bytes, then {error}"),
        }
    });
    match waitpid(Pid::from_raw(bomb), None).expect("it is our child") {
        WaitStatus::Signaled(_, signal, _) => report.print(format!("blocked: {kind}: ended by {signal}")),
        other => report.print(format!("{other:?}")),
    }
}

/// As many as a process of the slot may have: the soft limit is lower.
pub fn raise_open_files() {
    let mut limit = [0u64; 2];
    let get = [
        0,
        libc::RLIMIT_NOFILE as usize,
        0,
        limit.as_mut_ptr() as usize,
        0,
        0,
    ];
    call(libc::SYS_prlimit64, get).expect("a process can ask");
    let raised = [std::hint::black_box(limit)[1]; 2];
    let set = [0, libc::RLIMIT_NOFILE as usize, raised.as_ptr() as usize, 0, 0, 0];
    call(libc::SYS_prlimit64, set).expect("up to the hard limit");
}

/// The arguments: a kind of memory, and how much of it is to be had.
fn memory_hold(report: &mut Report, args: &[String]) {
    let (kind, bytes) = parse_args(args);
    let (_all, total, error) = hold(kind, bytes);
    match error {
        None => report.print(format!("done: {kind}: {total} bytes")),
        Some(error) => report.broken(format!("{kind}: {total} bytes should be there: {error}")),
    }
}

/// Write and read again a file of four times the slot's limit: it fits, for page cache makes room.
fn page_cache(report: &mut Report, args: &[String]) {
    let (_, limit) = parse_args(args);
    let work = || -> io::Result<u64> {
        let mut file = OpenOptions::new()
            .create_new(true)
            .read(true)
            .write(true)
            .open("/work/large")?;
        let piece = vec![1; 16 * PIECE];
        for _ in 0..4 * limit / piece.len() as u64 {
            file.write_all(&piece)?;
        }
        file.rewind()?;
        let mut seen = 0;
        let mut buffer = piece;
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(seen),
                n => seen += n as u64,
            }
        }
    };
    match work() {
        Ok(seen) if seen == 4 * limit => report.print(format!("done: {seen} bytes")),
        other => report.broken(format!("a large file should work: {other:?}")),
    }
}

/// The arguments: processes, which do nothing but that as fast as they can.
fn spin(report: &mut Report, args: &[String]) {
    for _ in 0..args[0].parse().expect("the test gives a number") {
        fork(|| {
            loop {
                std::hint::spin_loop();
            }
        });
    }
    report.print("ready");
    wait_for_ever();
}
