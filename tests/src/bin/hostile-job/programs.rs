//! Row 86: very many programs in the kernel, that are all freed at once. It can stop a kernel, so it runs in the machine
//! that `tests/machine` boots and nowhere else.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::sys::{call, fork, wait_for_ever};
use crate::{Attempt, Report};

pub const ATTEMPTS: &[Attempt] = &[("programs", programs)];

/// `tests/machine/guest/install` makes it.
const BOOTED_MACHINE: &str = "/etc/user-factory-booted-machine";

/// The kernel's own error for a program that it has no memory left for (`bpf_jit_charge_modmem`).
const ENOTSUPP: i32 = 524;

/// struct sock_fprog: how many instructions there are, and where.
#[repr(C)]
struct Program {
    length: u16,
    steps: *const libc::sock_filter,
}

/// A program of so many instructions. It looks at something that differs from call to call, so that the kernel does not
/// try it out for every number there is (`seccomp_cache_prepare`), and lets everything through.
fn steps(length: usize) -> Vec<libc::sock_filter> {
    let step = |code: u32, k| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    };
    let mut all = vec![step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 16)];
    all.resize(length - 1, step(libc::BPF_LD | libc::BPF_IMM, 7));
    all.push(step(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW));
    all
}

fn attach(option: libc::c_int, program: &Program) -> io::Result<()> {
    let arguments = [libc::AF_INET as usize, libc::SOCK_DGRAM as usize, 0, 0, 0, 0];
    let socket = call(libc::SYS_socket, arguments)? as usize;
    let set = |option: libc::c_int, address: usize, size: usize| {
        let level = libc::SOL_SOCKET as usize;
        call(
            libc::SYS_setsockopt,
            [socket, level, option as usize, address, size, 0],
        )
    };
    let one = 1i32;
    set(libc::SO_REUSEPORT, &raw const one as usize, size_of_val(&one))?;
    let attached = set(option, &raw const *program as usize, size_of::<Program>());
    if attached.is_err() {
        call(libc::SYS_close, [socket, 0, 0, 0, 0, 0])?;
    }
    attached?;
    // It may have been answered without being done. Asked for it, the kernel says how long the socket's program is; of
    // sockets that share a port it says nothing.
    let mut length = 0u32;
    let address = &raw mut length as usize;
    let level = libc::SOL_SOCKET as usize;
    call(
        libc::SYS_getsockopt,
        [socket, level, libc::SO_GET_FILTER as usize, 0, address, 0],
    )?;
    if option == libc::SO_ATTACH_FILTER && length != u32::from(program.length) {
        return Err(io::Error::from_raw_os_error(libc::ENODATA));
    }
    Ok(())
}

/// SECCOMP_SET_MODE_FILTER of `seccomp(2)`.
fn install(program: &Program) -> io::Result<()> {
    let arguments = [1, 0, &raw const *program as usize, 0, 0, 0];
    call(libc::SYS_seccomp, arguments).map(drop)
}

/// The arguments: a kind of program, processes, programs in each, instructions in each program. They stay until the job
/// ends.
fn programs(report: &mut Report, args: &[String]) {
    if !Path::new(BOOTED_MACHINE).exists() {
        report.broken("this can stop the kernel, and is not tried here: use tests/machine/run programs");
        return;
    }
    let [processes, each, length] =
        [1, 2, 3].map(|n| args[n].parse::<usize>().expect("the test gives a number"));
    let steps = steps(length);
    let program = Program {
        length: length as u16,
        steps: steps.as_ptr(),
    };
    let one = |kind: &str| match kind {
        "socket-filter" => attach(libc::SO_ATTACH_FILTER, &program),
        "reuseport" => attach(libc::SO_ATTACH_REUSEPORT_CBPF, &program),
        "seccomp" => install(&program),
        other => panic!("no such program: {other:?}"),
    };
    // Only root outside of a job has not given up new privileges already.
    let _ = call(
        libc::SYS_prctl,
        [libc::PR_SET_NO_NEW_PRIVS as usize, 1, 0, 0, 0, 0],
    );
    let (mut total, mut reasons) = (0u64, std::collections::BTreeMap::<i32, usize>::new());
    for number in 0..processes {
        let (mut here, mut there) = UnixStream::pair().expect("a socket pair");
        fork(|| {
            let (mut count, mut why) = (0u32, 0);
            while (count as usize) < each {
                if let Err(error) = one(&args[0]) {
                    why = error.raw_os_error().unwrap_or(-1);
                    break;
                }
                count += 1;
            }
            let answer = [count, why as u32].map(u32::to_le_bytes);
            there.write_all(answer.as_flattened()).expect("the parent reads");
            wait_for_ever();
        });
        drop(there);
        let mut answer = [0; 8];
        here.read_exact(&mut answer).expect("the child writes");
        let [count, why] =
            [&answer[..4], &answer[4..]].map(|part| u32::from_le_bytes(part.try_into().expect("four bytes")));
        total += u64::from(count);
        *reasons.entry(why as i32).or_default() += 1;
        if why as i32 == ENOTSUPP {
            report.print(format!(
                "process {number} met the end of the kernel's memory for programs"
            ));
            break;
        }
    }
    report.print(format!("had {total} programs; ended by {reasons:?}"));
    report.print("ready");
    wait_for_ever();
}
