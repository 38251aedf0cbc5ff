//! Group C: getting up: privileges, other processes, the kernel's files, mounts.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::leftovers::{mount, own_namespaces, uid};
use crate::sys::{c, call, clone3, fork, wait_for_ever};
use crate::{Attempt, Report};

pub const ATTEMPTS: &[Attempt] = &[
    ("set-id-programs", set_id_programs),
    ("new-namespaces", new_namespaces),
    ("capable-calls", capable_calls),
    ("init", init),
    ("other-processes", other_processes),
    ("own-child", own_child),
    ("overwrite-programs", overwrite_programs),
    ("inheritance", inheritance),
    ("kernel-files", kernel_files),
    ("mount-calls", mount_calls),
    ("unmask", unmask),
    ("fresh-mounts", fresh_mounts),
    ("old-descriptors", old_descriptors),
    ("travelling-mount", travelling_mount),
    ("no-such-mount", no_such_mount),
];

const HERE: usize = libc::AT_FDCWD as usize;

const NAMESPACES: [(&str, libc::c_int); 8] = [
    ("user", libc::CLONE_NEWUSER),
    ("mount", libc::CLONE_NEWNS),
    ("pid", libc::CLONE_NEWPID),
    ("network", libc::CLONE_NEWNET),
    ("IPC", libc::CLONE_NEWIPC),
    ("UTS", libc::CLONE_NEWUTS),
    ("cgroup", libc::CLONE_NEWCGROUP),
    ("time", libc::CLONE_NEWTIME),
];

/// It must not work, and for this reason: any other would mean that the call got further than it should.
fn refused<T>(report: &mut Report, what: &str, result: io::Result<T>, errno: i32) {
    match result {
        Err(error) if error.raw_os_error() == Some(errno) => {
            report.print(format!("blocked: {what}: {error}"))
        }
        Err(error) => report.broken(format!("{what}: refused, but differently: {error}")),
        Ok(_) => report.broken(format!("{what}: it worked")),
    }
}

/// Do it in a child, which may change what it likes about itself, and which has to get to its end.
fn in_child(report: &mut Report, work: impl FnOnce(&mut Report)) {
    let mut own = Report::default();
    let child = fork(|| work(&mut own));
    match waitpid(Pid::from_raw(child), None) {
        Ok(WaitStatus::Exited(_, 0)) => {}
        other => report.broken(format!("the child did not get to its end: {other:?}")),
    }
}

/// The line of a process's status that begins with this.
fn status(name: &str) -> String {
    let text = fs::read_to_string("/proc/self/status").expect("the own status can be read");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_default().trim().to_owned()
}

fn unshare(flags: libc::c_int) -> io::Result<libc::c_long> {
    call(libc::SYS_unshare, [flags as usize, 0, 0, 0, 0, 0])
}

/// Root in a user namespace, with these namespaces besides.
fn become_root_with(flags: libc::c_int) -> io::Result<()> {
    own_namespaces()?;
    unshare(flags).map(drop)
}

fn set_id_programs(report: &mut Report, args: &[String]) {
    let (uid, gid) = (uid(), nix::unistd::getgid().as_raw());
    for (name, expected) in [
        ("NoNewPrivs", "1"),
        ("CapInh", "0000000000000000"),
        ("CapPrm", "0000000000000000"),
        ("CapEff", "0000000000000000"),
        ("CapBnd", "0000000000000000"),
        ("CapAmb", "0000000000000000"),
        ("Uid", &[uid.to_string().as_str(); 4].join("\t")),
        ("Gid", &[gid.to_string().as_str(); 4].join("\t")),
    ] {
        match status(name) {
            value if value == expected => report.print(format!("blocked: {name} is {value}")),
            value => report.broken(format!("{name} is {value}")),
        }
    }
    let mut programs: Vec<PathBuf> = [
        "su",
        "sudo",
        "mount",
        "umount",
        "ping",
        "newuidmap",
        "newgidmap",
        "pkexec",
        "fusermount3",
        "passwd",
        "chsh",
        "newgrp",
        "chage",
        "crontab",
    ]
    .iter()
    .flat_map(|name| ["/usr/bin", "/usr/sbin", "/bin"].map(|dir| Path::new(dir).join(name)))
    .filter(|path| path.exists())
    .collect();
    programs.extend(args.iter().map(PathBuf::from));
    for program in &programs {
        let mode = program.metadata().map_or(0, |meta| meta.mode());
        // The loader shows with which ids the kernel started the program, and does not if they are
        // another user's: it ignores such variables then.
        let output = Command::new(program)
            .arg("--help")
            .env("LD_SHOW_AUXV", "1")
            .stdin(Stdio::null())
            .output();
        let output = match output {
            Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
            Err(error) => {
                report.print(format!("blocked: {}: {error}", program.display()));
                continue;
            }
        };
        let value = |name: &str| -> Option<u32> {
            let line = output
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line?.trim().parse().ok()
        };
        let ids = ["AT_EUID", "AT_EGID", "AT_SECURE"].map(value);
        if ids == [Some(uid), Some(gid), Some(0)] {
            report.print(format!("started {} with mode {mode:o}", program.display()));
        } else {
            report.broken(format!("{} got {ids:?}", program.display()));
        }
    }
    for program in args {
        for (option, own) in [("-u", uid), ("-g", gid)] {
            match Command::new(program).arg(option).output() {
                Ok(output) if output.stdout == format!("{own}\n").into_bytes() => {
                    report.print(format!("ran {program} {option}"));
                }
                other => report.broken(format!("{program} {option}: {other:?}")),
            }
        }
    }
    let root = Command::new("su")
        .args(["-c", "true"])
        .stdin(Stdio::null())
        .output();
    if root.is_ok_and(|output| output.status.success()) {
        report.broken("su made us root");
    }
    for (what, number) in [
        ("setuid", libc::SYS_setuid),
        ("setgid", libc::SYS_setgid),
        ("setresuid", libc::SYS_setresuid),
        ("setresgid", libc::SYS_setresgid),
        ("setgroups", libc::SYS_setgroups),
    ] {
        refused(report, what, call(number, [0; 6]), libc::EPERM);
    }
}

fn new_namespaces(report: &mut Report, _: &[String]) {
    let orphan = |result: io::Result<libc::c_long>| {
        if let Ok(0) = result {
            std::process::exit(0);
        }
        result
    };
    for (name, flag) in NAMESPACES {
        for (name, flag) in [
            (name.to_owned(), flag),
            (format!("user and {name}"), flag | libc::CLONE_NEWUSER),
        ] {
            // clone(2) has its signal where the time namespace's bit is, and takes no upper half.
            for upper in [0, 1usize << 32] {
                let flags = (flag & !libc::CLONE_NEWTIME | libc::SIGCHLD) as usize | upper;
                if flag != libc::CLONE_NEWTIME {
                    let result = orphan(call(libc::SYS_clone, [flags, 0, 0, 0, 0, 0]));
                    refused(report, &format!("clone: {name} {upper:x}"), result, libc::EPERM);
                }
                let result = call(libc::SYS_unshare, [flag as usize | upper, 0, 0, 0, 0, 0]);
                refused(report, &format!("unshare: {name} {upper:x}"), result, libc::EPERM);
            }
            let result = orphan(clone3(flag as u64, None));
            refused(report, &format!("clone3: {name}"), result, libc::ENOSYS);
        }
    }
    for entry in fs::read_dir("/proc/self/ns").expect("it can be listed").flatten() {
        if let Ok(namespace) = File::open(entry.path()) {
            let result = call(libc::SYS_setns, [namespace.as_raw_fd() as usize, 0, 0, 0, 0, 0]);
            refused(
                report,
                &format!("setns: {}", entry.path().display()),
                result,
                libc::EPERM,
            );
        }
    }
    // It is not that nothing works.
    in_child(report, |_| {});
}

/// Calls that no job gets, with arguments that make none of them do anything even if it were let through.
fn never_calls(report: &mut Report, place: &str) {
    let empty = c("");
    let empty = empty.as_ptr() as usize;
    let none = usize::MAX;
    for (name, number, arguments) in [
        ("bpf", libc::SYS_bpf, [0; 6]),
        ("perf_event_open", libc::SYS_perf_event_open, [0; 6]),
        ("init_module", libc::SYS_init_module, [0, 0, empty, 0, 0, 0]),
        ("finit_module", libc::SYS_finit_module, [none, empty, 0, 0, 0, 0]),
        ("delete_module", libc::SYS_delete_module, [empty, 0, 0, 0, 0, 0]),
        // For its own memory alone, which an ordinary user may handle.
        ("userfaultfd", libc::SYS_userfaultfd, [1, 0, 0, 0, 0, 0]),
        (
            "open_by_handle_at",
            libc::SYS_open_by_handle_at,
            [none, 0, 0, 0, 0, 0],
        ),
        ("kexec_load", libc::SYS_kexec_load, [0, 0, 0, none, 0, 0]),
        ("reboot", libc::SYS_reboot, [0; 6]),
        ("swapon", libc::SYS_swapon, [empty, 0, 0, 0, 0, 0]),
        ("acct", libc::SYS_acct, [empty, 0, 0, 0, 0, 0]),
        ("syslog", libc::SYS_syslog, [9, 0, 0, 0, 0, 0]),
        ("fanotify_init", libc::SYS_fanotify_init, [0; 6]),
        ("settimeofday", libc::SYS_settimeofday, [0; 6]),
    ] {
        refused(
            report,
            &format!("{name} {place}"),
            call(number, arguments),
            libc::EPERM,
        );
    }
    for (name, number) in [
        ("keyctl", libc::SYS_keyctl),
        ("add_key", libc::SYS_add_key),
        ("request_key", libc::SYS_request_key),
        ("io_uring_setup", libc::SYS_io_uring_setup),
        ("io_setup", libc::SYS_io_setup),
    ] {
        let what = format!("{name} {place}");
        refused(report, &what, call(number, [0; 6]), libc::ENOSYS);
    }
}

fn capable_calls(report: &mut Report, _: &[String]) {
    never_calls(report, "outside");
    in_child(report, |report| {
        report.must_work("unshare", unshare(libc::CLONE_NEWUSER));
        if status("CapEff").trim_start_matches('0').len() < 8 {
            report.broken(format!("not all capabilities: {}", status("CapEff")));
        }
        never_calls(report, "in a user namespace");
    });
    in_child(report, |report| {
        let all = NAMESPACES.iter().skip(2).fold(0, |all, (_, flag)| all | flag);
        report.must_work("root of all namespaces", become_root_with(all));
        in_child(report, |report| {
            never_calls(report, "as root of all namespaces");
            never_files(report, 1, "as root of all namespaces");
        });
    });
}

/// `ptrace(2)` and its relatives, on a process that is not this one's to touch. What refuses them is `errno`.
fn never_trace(report: &mut Report, pid: usize, errno: i32) {
    for (name, request) in [("attach", libc::PTRACE_ATTACH), ("seize", libc::PTRACE_SEIZE)] {
        let result = call(libc::SYS_ptrace, [request as usize, pid, 0, 0, 0, 0]);
        refused(report, &format!("{name} to {pid}"), result, errno);
    }
    let own = [0u64; 8];
    let local = [own.as_ptr() as usize, size_of_val(&own)];
    for (name, number) in [
        ("read", libc::SYS_process_vm_readv),
        ("write", libc::SYS_process_vm_writev),
    ] {
        // What would be written is where nothing is mapped.
        let remote = [if name == "read" { local[0] } else { 0x1000 }, 8];
        let arguments = [pid, local.as_ptr() as usize, 1, remote.as_ptr() as usize, 1, 0];
        refused(report, &format!("{name} {pid}"), call(number, arguments), errno);
    }
    match call(libc::SYS_pidfd_open, [pid, 0, 0, 0, 0, 0]) {
        Ok(handle) => {
            if errno == libc::ESRCH {
                report.broken(format!("{pid} is visible"));
            }
            for number in 0..10 {
                let result = call(libc::SYS_pidfd_getfd, [handle as usize, number, 0, 0, 0, 0]);
                report.must_fail(format!("descriptor {number} of {pid}"), result);
            }
        }
        Err(error) => refused::<()>(report, &format!("a handle of {pid}"), Err(error), errno),
    }
}

/// What `/proc` has of a process, for reading, writing and following.
fn never_files(report: &mut Report, pid: usize, place: &str) {
    let dir = PathBuf::from(format!("/proc/{pid}"));
    for part in [
        "mem",
        "environ",
        "maps",
        "smaps",
        "pagemap",
        "auxv",
        "io",
        "syscall",
        "stack",
        "personality",
        "exe",
        "task/1/mem",
        "task/1/environ",
        "task/1/maps",
    ] {
        let path = dir.join(part);
        let read = File::open(&path).and_then(|mut file| io::Read::read(&mut file, &mut [0; 16]));
        report.must_fail(format!("read {} {place}", path.display()), read);
    }
    for part in ["fd", "fdinfo", "map_files", "task/1/fd", "root", "cwd"] {
        let path = dir.join(part);
        report.must_fail(format!("list {} {place}", path.display()), fs::read_dir(&path));
    }
    for part in ["exe", "root", "cwd", "fd/0", "ns/mnt", "ns/user", "task/1/root"] {
        let path = dir.join(part);
        report.must_fail(format!("follow {} {place}", path.display()), fs::read_link(&path));
        report.must_fail(format!("look at {} {place}", path.display()), path.metadata());
    }
    for part in [
        "mem",
        "oom_score_adj",
        "comm",
        "clear_refs",
        "coredump_filter",
        "uid_map",
        "setgroups",
        "loginuid",
    ] {
        let path = dir.join(part);
        let open = OpenOptions::new().write(true).open(&path);
        report.must_fail(format!("open {} {place}", path.display()), open);
    }
    for part in ASKS_LATER {
        let path = dir.join(part);
        let write = OpenOptions::new()
            .write(true)
            .open(&path)
            .and_then(|mut file| io::Write::write(&mut file, b"0"));
        report.must_fail(format!("write {} {place}", path.display()), write);
    }
}

/// Files of another process that everybody may open for writing: the kernel looks at the writer only when he
/// writes, and so has the test to write. No module takes 0 for an attribute, and a slack of 0 is the usual one.
const ASKS_LATER: [&str; 8] = [
    "timerslack_ns",
    "attr/current",
    "attr/exec",
    "attr/fscreate",
    "attr/keycreate",
    "attr/sockcreate",
    "attr/apparmor/current",
    "attr/apparmor/exec",
];

fn init(report: &mut Report, args: &[String]) {
    let name = fs::read_to_string("/proc/1/comm").unwrap_or_default();
    report.print(format!("pid 1 is {}", name.trim()));
    never_trace(report, 1, libc::EPERM);
    never_files(report, 1, "");
    if args[0] == "as-root-too" {
        in_child(report, |report| {
            report.must_work("namespaces", own_namespaces());
            never_trace(report, 1, libc::EPERM);
            never_files(report, 1, "as root of a namespace");
        });
    }
}

fn other_processes(report: &mut Report, args: &[String]) {
    let own = std::process::id().to_string();
    let listed: BTreeSet<String> = fs::read_dir("/proc")
        .expect("/proc can be listed")
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
        .collect();
    if listed != BTreeSet::from(["1".to_owned(), own]) {
        report.broken(format!("/proc lists {listed:?}"));
    }
    for arg in args {
        let pid: usize = arg.parse().expect("a process id");
        refused(
            report,
            &format!("/proc/{pid}"),
            fs::metadata(format!("/proc/{pid}")),
            libc::ENOENT,
        );
        never_files(report, pid, "");
        never_trace(report, pid, libc::ESRCH);
        // Signal 0 asks, and does nothing.
        let result = kill(Pid::from_raw(pid as i32), None).map_err(io::Error::from);
        refused(report, &format!("signal {pid}"), result, libc::ESRCH);
    }
}

/// To be traced.
fn wait_for_ever_in_child() {
    wait_for_ever()
}

fn own_child(report: &mut Report, _: &[String]) {
    let child = fork(wait_for_ever_in_child);
    let pid = child as usize;
    let attach = libc::PTRACE_ATTACH as usize;
    report.must_work("attach", call(libc::SYS_ptrace, [attach, pid, 0, 0, 0, 0]));
    waitpid(Pid::from_raw(child), None).expect("it stops");
    report.must_work("its memory", File::open(format!("/proc/{child}/mem")));
    let detach = libc::PTRACE_DETACH as usize;
    report.must_work("detach", call(libc::SYS_ptrace, [detach, pid, 0, 0, 0, 0]));
    kill(Pid::from_raw(child), Signal::SIGKILL).expect("it is our child");
    waitpid(Pid::from_raw(child), None).expect("it is our child");
    for command in [
        &["strace", "-f", "-o", "/work/trace", "true"][..],
        &[
            "gdb",
            "-nx",
            "-batch",
            "-ex",
            "run",
            "-ex",
            "info inferiors",
            "true",
        ],
    ] {
        let outcome = Command::new(command[0])
            .args(&command[1..])
            .stdin(Stdio::null())
            .output();
        match outcome {
            Err(error) => report.print(format!("absent: {}: {error}", command[0])),
            Ok(output) if output.status.success() => report.print(format!("ran {}", command[0])),
            Ok(output) => report.broken(format!("{command:?} should work: {output:?}")),
        }
    }
}

fn overwrite_programs(report: &mut Report, _: &[String]) {
    let agent = "/run/buildomat-agent";
    let other = "/run/buildomat/other";
    let mine = fs::write("/work/other", "#!/bin/true\n").and_then(|()| fs::write(other, "x"));
    report.must_work("files of our own", mine);
    for program in [agent, "/proc/self/exe", "/proc/1/exe"] {
        for (how, options) in [
            ("write", OpenOptions::new().write(true)),
            ("append to", OpenOptions::new().append(true)),
            ("read and write", OpenOptions::new().read(true).write(true)),
            ("truncate", OpenOptions::new().write(true).truncate(true)),
        ] {
            report.must_fail(format!("{how} {program}"), options.open(program));
        }
        let path = c(program);
        let path = path.as_ptr() as usize;
        report.must_fail(
            format!("truncate {program}"),
            call(libc::SYS_truncate, [path, 0, 0, 0, 0, 0]),
        );
        // That it runs refuses the above, too; this is asked of the permissions alone.
        let access = call(
            libc::SYS_faccessat,
            [libc::AT_FDCWD as usize, path, libc::W_OK as usize, 0, 0, 0],
        );
        report.must_fail(format!("permission for {program}"), access);
        for source in ["/work/other", other] {
            report.must_fail(format!("rename over {program}"), fs::rename(source, program));
            report.must_fail(format!("link over {program}"), fs::hard_link(source, program));
        }
        let modes = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        report.must_fail(
            format!("change the mode of {program}"),
            fs::set_permissions(program, modes),
        );
        report.must_fail(format!("remove {program}"), fs::remove_file(program));
    }
    for away in ["/run/away", "/run/buildomat/away", "/work/away"] {
        report.must_fail(format!("move it to {away}"), fs::rename(agent, away));
    }
    report.must_fail("a new directory beside it", fs::create_dir("/run/beside"));
    report.must_fail("move the directory", fs::rename("/run", "/work/run"));
    // An open descriptor, opened once more by its name.
    let own = File::open(agent).expect("the own program can be read");
    let again = format!("/proc/self/fd/{}", own.as_raw_fd());
    report.must_fail("by a descriptor", OpenOptions::new().write(true).open(again));
}

fn inheritance(report: &mut Report, _: &[String]) {
    for dir in ["/proc/self/fd", "/proc/self/fdinfo"] {
        let open: BTreeSet<RawFd> = fs::read_dir(dir)
            .expect("it can be listed")
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect();
        // 3 is the listing itself.
        if open != BTreeSet::from([0, 1, 2, 3]) {
            report.broken(format!("{dir} has {open:?}"));
        }
    }
    let link = |number: i32| {
        fs::read_link(format!("/proc/self/fd/{number}"))
            .expect("it is open")
            .display()
            .to_string()
    };
    let meta = |number: i32| fs::metadata(format!("/proc/self/fd/{number}")).expect("it is open");
    if link(0) != "/dev/null" || meta(0).rdev() != nix::sys::stat::makedev(1, 3) {
        report.broken(format!("0 is {}", link(0)));
    }
    if link(1) != link(2) || !meta(1).file_type().is_fifo() || !link(1).starts_with("pipe:") {
        report.broken(format!("1 and 2 are {} and {}", link(1), link(2)));
    }
    let info = |number: i32, name: &str| {
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{number}")).expect("it is open");
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name).map(str::to_owned));
        line.unwrap_or_default().trim().to_owned()
    };
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("it can be read");
    let ours = mounts
        .lines()
        .any(|line| line.starts_with(&format!("{} ", info(0, "mnt_id:"))));
    if !ours {
        report.broken("0 is on a mount that is not the job's");
    }
    for number in 0..3 {
        let arguments = [
            number,
            libc::TCGETS as usize,
            [0u8; 256].as_mut_ptr() as usize,
            0,
            0,
            0,
        ];
        refused(
            report,
            &format!("{number} as a terminal"),
            call(libc::SYS_ioctl, arguments),
            libc::ENOTTY,
        );
    }
    for number in [1, 2] {
        let flags = i32::from_str_radix(&info(number, "flags:"), 8).unwrap_or(-1);
        if flags & libc::O_ACCMODE != libc::O_WRONLY {
            report.broken(format!("{number} has the flags {flags:o}"));
        }
    }
    report.must_fail("a terminal", OpenOptions::new().read(true).open("/dev/tty"));
    for (name, path) in [("cwd", "/proc/self/cwd"), ("root", "/proc/self/root")] {
        match fs::read_link(path) {
            Ok(dir) if dir == Path::new("/") => report.print(format!("blocked: {name} is /")),
            other => report.broken(format!("{name} is {other:?}")),
        }
    }
    let names: BTreeSet<String> = std::env::vars_os()
        .map(|(name, _)| name.to_string_lossy().into_owned())
        .collect();
    if names != BTreeSet::from(["PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ"].map(str::to_owned)) {
        report.broken(format!("the environment has {names:?}"));
    }
    // The Rust library of this program itself ignores SIGPIPE, and the C library has every program that it
    // starts ignore the two signals that it keeps to itself.
    let ignored = 1u64 << (libc::SIGPIPE - 1) | 0b11 << 31;
    for (name, own) in [("SigBlk", 0), ("SigIgn", ignored), ("SigPnd", 0), ("ShdPnd", 0)] {
        match u64::from_str_radix(&status(name), 16) {
            Ok(mask) if mask & !own == 0 => {}
            other => report.broken(format!("{name} is {other:x?}")),
        }
    }
}

/// Files of the own process that its owner may open for writing, and what comes of it: nothing beyond the
/// process itself. Maps of ids take no word from who has no capabilities in the namespace above.
const OWN_FILES: [&str; 19] = [
    "attr",
    "autogroup",
    "clear_refs",
    "comm",
    "coredump_filter",
    "fail-nth",
    "gid_map",
    "loginuid",
    "make-it-fail",
    "mem",
    "oom_adj",
    "oom_score_adj",
    "projid_map",
    "sched",
    "sessionid",
    "setgroups",
    "timens_offsets",
    "timerslack_ns",
    "uid_map",
];

/// Files of the kernel that everybody may open for writing, because it looks at the writer when he writes:
/// the last process id of the namespace wants a capability, and a trigger for pressure exists as long as its
/// descriptor, and only tells its owner something.
const HARMLESS: [&str; 4] = [
    "/proc/sys/kernel/ns_last_pid",
    "/proc/pressure/cpu",
    "/proc/pressure/io",
    "/proc/pressure/memory",
];

/// Opening is all that is done to what can be opened.
fn try_to_open(report: &mut Report, dir: &Path, depth: u32, tried: &mut u64) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let Ok(kind) = entry.file_type() else { continue };
        if kind.is_dir() {
            let own = path == Path::new("/proc").join(std::process::id().to_string());
            if depth > 0 && !own {
                try_to_open(report, &path, depth - 1, tried);
            }
        } else if kind.is_file() && *tried < 500_000 {
            *tried += 1;
            let open = OpenOptions::new()
                .write(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                .open(&path);
            if open.is_err() {
                continue;
            }
            // `never_files` has a word to say about these.
            let of_pid_1 = ["/proc/1", "/proc/1/task/1"].iter().any(|dir| {
                path.strip_prefix(dir)
                    .is_ok_and(|part| ASKS_LATER.iter().any(|other| part == Path::new(other)))
            });
            if of_pid_1 {
                report.print(format!("opened {}, which takes nothing", path.display()));
            } else if HARMLESS.iter().any(|other| path == Path::new(other)) {
                report.print(format!("opened {}, which is harmless", path.display()));
            } else {
                report.broken(format!("{} can be opened for writing", path.display()));
            }
        }
    }
}

fn kernel_files(report: &mut Report, _: &[String]) {
    let mut places: Vec<PathBuf> = ["/proc", "/sys"].map(PathBuf::from).into();
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("it can be read");
    for line in mounts.lines() {
        let Some((before, after)) = line.split_once(" - ") else {
            continue;
        };
        let kernels = [
            "cgroup",
            "cgroup2",
            "proc",
            "sysfs",
            "debugfs",
            "tracefs",
            "securityfs",
            "configfs",
            "bpf",
            "pstore",
            "efivarfs",
            "selinuxfs",
            "binfmt_misc",
            "fusectl",
        ];
        let place = before.split(' ').nth(4).unwrap_or_default();
        if kernels.iter().any(|kind| after.split(' ').next() == Some(kind)) {
            report.print(format!("a file system of the kernel's at {place}"));
            if !places.iter().any(|other| Path::new(place).starts_with(other)) {
                places.push(place.into());
            }
        }
    }
    let mut tried = 0;
    for place in &places {
        let before = tried;
        try_to_open(report, place, 24, &mut tried);
        report.print(format!(
            "tried {} files below {}",
            tried - before,
            place.display()
        ));
    }
    if tried < 1000 {
        report.broken(format!("only {tried} files were found"));
    }
    never_files(report, 1, "");
    // It opens, and takes nothing: the log says who did what by it.
    report.must_fail("another's name in the log", fs::write("/proc/self/loginuid", "0"));
    // Each by its name: nobody has to list a directory to open what is in it.
    for path in [
        "/proc/sysrq-trigger",
        "/proc/kcore",
        "/proc/kmsg",
        "/proc/mtrr",
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/modprobe",
        "/proc/sys/kernel/hotplug",
        "/proc/sys/kernel/poweroff_cmd",
        "/proc/sys/kernel/hostname",
        "/proc/sys/vm/drop_caches",
        "/proc/sys/vm/overcommit_memory",
        "/proc/sys/fs/suid_dumpable",
        "/proc/sys/fs/binfmt_misc/register",
        "/proc/sys/fs/mqueue/queues_max",
        "/proc/sys/net/ipv4/ip_forward",
        "/proc/sys/net/core/somaxconn",
        "/sys/kernel/uevent_helper",
        "/sys/kernel/mm/transparent_hugepage/enabled",
        "/sys/power/state",
        "/sys/fs/cgroup/release_agent",
        "/sys/fs/cgroup/cgroup.procs",
        "/sys/fs/cgroup/cgroup.subtree_control",
        "/sys/kernel/security/apparmor/.load",
    ] {
        report.must_fail(path, OpenOptions::new().write(true).open(path));
    }
    for entry in fs::read_dir("/proc/self").expect("it can be listed").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let file = entry.file_type().is_ok_and(|kind| kind.is_file());
        let open = || OpenOptions::new().write(true).open(entry.path());
        if file && !OWN_FILES.contains(&name.as_str()) && open().is_ok() {
            report.broken(format!("nobody has looked at /proc/self/{name}"));
        }
    }
}

fn open_tree(place: &str, flags: libc::c_int) -> io::Result<RawFd> {
    let place = c(place);
    let flags = flags as usize | libc::OPEN_TREE_CLONE as usize;
    call(
        libc::SYS_open_tree,
        [HERE, place.as_ptr() as usize, flags, 0, 0, 0],
    )
    .map(|number| number as RawFd)
}

fn move_mount(from: &str, to: &str) -> io::Result<libc::c_long> {
    let (from, to) = (c(from), c(to));
    let arguments = [HERE, from.as_ptr() as usize, HERE, to.as_ptr() as usize, 0, 0];
    call(libc::SYS_move_mount, arguments)
}

fn umount(place: &str, flags: libc::c_int) -> io::Result<libc::c_long> {
    let place = c(place);
    call(
        libc::SYS_umount2,
        [place.as_ptr() as usize, flags as usize, 0, 0, 0, 0],
    )
}

/// Clear these attributes of a mount, and of those below it if `flags` say so.
fn clear_attributes(place: &str, clear: u64, flags: libc::c_int) -> io::Result<libc::c_long> {
    let place = c(place);
    // struct mount_attr: set, clear, propagation, user namespace.
    let attributes = [0, clear, 0, 0u64];
    let arguments = [
        HERE,
        place.as_ptr() as usize,
        flags as usize,
        attributes.as_ptr() as usize,
        size_of_val(&attributes),
        0,
    ];
    call(libc::SYS_mount_setattr, arguments)
}

fn pivot_root(new: &str, old: &str) -> io::Result<libc::c_long> {
    let (new, old) = (c(new), c(old));
    call(
        libc::SYS_pivot_root,
        [new.as_ptr() as usize, old.as_ptr() as usize, 0, 0, 0, 0],
    )
}

fn chroot(place: &str) -> io::Result<libc::c_long> {
    let place = c(place);
    call(libc::SYS_chroot, [place.as_ptr() as usize, 0, 0, 0, 0, 0])
}

fn mount_calls(report: &mut Report, _: &[String]) {
    let eperm = libc::EPERM;
    for place in ["/", "/etc", "/usr", "/work", "/proc", "/etc/passwd"] {
        let remount = libc::MS_REMOUNT | libc::MS_BIND;
        refused(report, "remount", mount("none", place, "none", remount), eperm);
        refused(
            report,
            "remount all",
            mount("none", place, "none", libc::MS_REMOUNT),
            eperm,
        );
        let shared = libc::MS_SHARED | libc::MS_REC;
        refused(report, "share", mount("none", place, "none", shared), eperm);
        refused(report, "umount", umount(place, 0), eperm);
        refused(report, "detach", umount(place, libc::MNT_DETACH), eperm);
        refused(report, "move", move_mount(place, "/tmp"), eperm);
        refused(report, "open_tree", open_tree(place, 0), eperm);
        refused(
            report,
            "open_tree of all",
            open_tree(place, libc::AT_RECURSIVE),
            eperm,
        );
        refused(
            report,
            "mount_setattr",
            clear_attributes(place, libc::MOUNT_ATTR_RDONLY, libc::AT_RECURSIVE),
            eperm,
        );
        refused(report, "pivot_root", pivot_root(place, place), eperm);
        refused(report, "chroot", chroot(place), eperm);
    }
    let (kind, root) = (c("tmpfs"), c("/"));
    let (kind, root) = (kind.as_ptr() as usize, root.as_ptr() as usize);
    for (name, number, arguments) in [
        ("fsopen", libc::SYS_fsopen, [kind, 0, 0, 0, 0, 0]),
        ("fspick", libc::SYS_fspick, [HERE, root, 0, 0, 0, 0]),
        ("fsmount", libc::SYS_fsmount, [usize::MAX, 0, 0, 0, 0, 0]),
        ("fsconfig", libc::SYS_fsconfig, [usize::MAX, 0, 0, 0, 0, 0]),
    ] {
        refused(report, name, call(number, arguments), eperm);
    }
    report.must_fail("the root's name", File::create("/of-the-job"));
}

/// What the host hides must not be seen here, though everybody on the host may read it.
fn stays_hidden(report: &mut Report, hidden: &Path, what: &str) {
    report.must_fail(
        format!("read the hidden file {what}"),
        fs::read(hidden.join("secret")),
    );
    report.must_fail(format!("list what is hidden {what}"), fs::read_dir(hidden));
}

/// The arguments: a directory of the host that everybody can see, and has `hidden/secret` and `seen` in it.
fn unmask(report: &mut Report, args: &[String]) {
    let tree = args[0].clone();
    let hidden = format!("{tree}/hidden");
    let above = Path::new(&tree)
        .parent()
        .expect("it is below /")
        .display()
        .to_string();
    report.must_work("what is not hidden", fs::read(format!("{tree}/seen")));
    stays_hidden(report, Path::new(&hidden), "at first");
    for dir in ["/work/copy", "/work/other", "/work/upper", "/work/scratch"] {
        fs::create_dir_all(dir).expect("/work is writable");
    }
    in_child(report, |report| {
        report.must_work("namespaces", own_namespaces());
        let seen = format!("{tree}/seen");
        let all = [
            "/etc/passwd",
            "/etc/group",
            "/proc",
            "/dev",
            "/",
            "/etc",
            "/usr",
            "/sys",
            &seen,
        ];
        for place in &all {
            let remount = libc::MS_REMOUNT | libc::MS_BIND;
            // Without "read-only", without "no set-user-id", without both.
            for flags in [
                remount | libc::MS_NOSUID | libc::MS_NODEV,
                remount | libc::MS_RDONLY | libc::MS_NODEV,
                remount,
                libc::MS_REMOUNT,
            ] {
                let what = format!("remount {place} with {flags:x}");
                report.must_fail(what, mount("none", place, "none", flags));
            }
            for flags in [0, libc::AT_RECURSIVE] {
                // /proc is writable, as far as a mount's flags go.
                let clear = [libc::MOUNT_ATTR_RDONLY, libc::MOUNT_ATTR_NOSUID];
                for clear in clear.iter().skip(usize::from(*place == "/proc")) {
                    let what = format!("clear {clear:x} of {place}");
                    refused(report, &what, clear_attributes(place, *clear, flags), libc::EPERM);
                }
            }
        }
        for place in &all[1..] {
            if *place == "/" {
                continue;
            }
            for flags in [0, libc::MNT_DETACH] {
                let what = format!("umount {place} with {flags}");
                refused(report, &what, umount(place, flags), libc::EINVAL);
            }
            refused(
                report,
                &format!("move {place}"),
                move_mount(place, "/work/other"),
                libc::EINVAL,
            );
        }
        report.must_fail("make what is hidden", fs::create_dir(&hidden));
        for place in ["/", &above, &tree] {
            let bind = mount(place, "/work/copy", "none", libc::MS_BIND);
            refused(
                report,
                &format!("{place} without what is mounted there"),
                bind,
                libc::EINVAL,
            );
            refused(
                report,
                &format!("a tree of {place} without the rest"),
                open_tree(place, 0),
                libc::EINVAL,
            );
            let (none, at, kind) = (c("none"), c("/work/other"), c("overlay"));
            for options in [
                format!("lowerdir={place}:/work/scratch"),
                format!("lowerdir={place},upperdir=/work/upper,workdir=/work/scratch"),
            ] {
                let options = c(options);
                let [none, at, kind, options] =
                    [&none, &at, &kind, &options].map(|text| text.as_ptr() as usize);
                let result = call(libc::SYS_mount, [none, at, kind, 0, options, 0]);
                report.must_fail(format!("an overlay of {place}"), result);
            }
        }
        // With all that is mounted below, it works, and shows no more.
        let bind = libc::MS_BIND | libc::MS_REC;
        report.must_work("a copy of all", mount("/", "/work/copy", "none", bind));
        let copied = format!("/work/copy{tree}");
        report.must_work("the copy", fs::read(format!("{copied}/seen")));
        let hidden_copy = format!("{copied}/hidden");
        stays_hidden(report, Path::new(&hidden_copy), "in a copy");
        for flags in [0, libc::MNT_DETACH] {
            let what = format!("umount the copy of what is seen with {flags}");
            refused(
                report,
                &what,
                umount(&format!("{copied}/seen"), flags),
                libc::EINVAL,
            );
        }
        // A mount over what it is in can go again; it stays hidden.
        report.must_work("a mount over it", mount("none", &tree, "tmpfs", 0));
        report.must_work("and off", umount(&tree, 0));
        stays_hidden(report, Path::new(&hidden), "after a mount over it");
        // Detached, and looked at through a descriptor from before.
        let dir = File::open(&copied).expect("it can be opened");
        report.must_work("detach the copy", umount("/work/copy", libc::MNT_DETACH));
        let by_descriptor = format!("/proc/self/fd/{}/hidden", dir.as_raw_fd());
        stays_hidden(report, Path::new(&by_descriptor), "in a detached copy");
        // A tree that was never attached.
        if let Some(detached) = report.must_work("a tree", open_tree("/", libc::AT_RECURSIVE)) {
            let place = format!("/proc/self/fd/{detached}{hidden}");
            stays_hidden(report, Path::new(&place), "in a tree");
        }
        // The copy becomes the root, and the old one goes.
        report.must_work("a copy again", mount("/", "/work/copy", "none", bind));
        if report
            .must_work("a new root", pivot_root("/work/copy", "/work/copy"))
            .is_some()
        {
            std::env::set_current_dir("/").expect("there is a root");
            report.must_work("the old root goes", umount("/", libc::MNT_DETACH));
            stays_hidden(report, Path::new(&hidden), "below a new root");
            refused(report, "umount there", umount(&seen, 0), libc::EINVAL);
        }
    });
    in_child(report, |report| {
        report.must_work("namespaces", own_namespaces());
        let inode = |path: &str| {
            let meta = fs::metadata(path).expect("it is there");
            (meta.dev(), meta.ino())
        };
        let root = inode("/");
        let above_all = File::open("/").expect("the root can be listed");
        report.must_work("chroot", chroot("/work/copy"));
        let arguments = [above_all.as_raw_fd() as usize, 0, 0, 0, 0, 0];
        report.must_work("out again", call(libc::SYS_fchdir, arguments));
        for _ in 0..100 {
            std::env::set_current_dir("..").expect("there is a parent");
        }
        report.must_work("chroot there", chroot("."));
        if inode("/") != root || inode(".") != root {
            report.broken("above the root there is something");
        }
        for place in ["/.buildomat-factory", "/root", "/.buildomat-factory/workers"] {
            report.must_fail(format!("list {place}"), fs::read_dir(place));
        }
        stays_hidden(report, Path::new(&hidden), "from above");
    });
}

/// Fresh mounts of the kernel's own file systems, as root of namespaces of all kinds.
fn fresh_mounts(report: &mut Report, args: &[String]) {
    let hidden = PathBuf::from(&args[0]).join("hidden");
    for dir in ["/work/proc", "/work/sys", "/work/cgroup", "/work/devpts"] {
        fs::create_dir_all(dir).expect("/work is writable");
    }
    in_child(report, |report| {
        report.must_work("namespaces", own_namespaces());
        // It would show the processes of a namespace that is not its own.
        report.must_fail(
            "proc of the job's namespace",
            mount("none", "/work/proc", "proc", 0),
        );
        let all = libc::CLONE_NEWPID | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWCGROUP;
        report.must_work("more namespaces", unshare(all));
        in_child(report, |report| {
            let proc = mount("none", "/work/proc", "proc", 0);
            if report.must_work("proc", proc).is_some() {
                let pids = fs::read_dir("/work/proc").expect("it can be listed").flatten();
                let pids: Vec<_> = pids
                    .map(|entry| entry.file_name().to_string_lossy().into_owned())
                    .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
                    .collect();
                if pids != ["1"] {
                    report.broken(format!("the new /proc shows {pids:?}"));
                }
                let through = format!("/work/proc/1/root{}", hidden.display());
                stays_hidden(report, Path::new(&through), "through the new /proc");
                for path in ["sysrq-trigger", "sys/kernel/core_pattern", "sys/vm/drop_caches"] {
                    let path = Path::new("/work/proc").join(path);
                    let open = OpenOptions::new().write(true).open(&path);
                    report.must_fail(path.display(), open);
                }
            }
            match mount("none", "/work/sys", "sysfs", 0) {
                Err(error) => report.print(format!("blocked: sysfs: {error}")),
                Ok(()) => report.broken("a sysfs that can be written"),
            }
            for (kind, place) in [("sysfs", "/work/sys"), ("cgroup2", "/work/cgroup")] {
                match mount(
                    "none",
                    place,
                    kind,
                    libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
                ) {
                    Err(error) => report.print(format!("blocked: {kind}: {error}")),
                    Ok(()) => {
                        let mut tried = 0;
                        try_to_open(report, Path::new(place), 24, &mut tried);
                        report.print(format!("tried {tried} files of a new {kind}"));
                    }
                }
            }
            for kind in [
                "ext4",
                "xfs",
                "btrfs",
                "squashfs",
                "debugfs",
                "tracefs",
                "securityfs",
                "configfs",
                "devtmpfs",
                "cgroup",
                "nfsd",
                "binder",
                "9p",
                "virtiofs",
            ] {
                report.must_fail(kind, mount("none", "/work/devpts", kind, 0));
            }
        });
    });
}

/// A directory, opened in a mount namespace that ends: what masked a path there must not come off.
fn old_descriptors(report: &mut Report, args: &[String]) {
    const KEPT: i32 = 100;
    let tree = &args[0];
    // One table of descriptors for both.
    let flags = (libc::CLONE_FILES | libc::SIGCHLD) as usize;
    let child = match call(libc::SYS_clone, [flags, 0, 0, 0, 0, 0]) {
        Ok(0) => {
            let opened = own_namespaces().and_then(|()| File::open(tree));
            let kept = opened.and_then(|dir| {
                call(
                    libc::SYS_dup3,
                    [dir.as_raw_fd() as usize, KEPT as usize, 0, 0, 0, 0],
                )
            });
            std::process::exit(i32::from(kept.is_err()))
        }
        Ok(pid) => pid as i32,
        Err(error) => return report.broken(format!("clone: {error}")),
    };
    match waitpid(Pid::from_raw(child), None) {
        Ok(WaitStatus::Exited(_, 0)) => {}
        other => return report.broken(format!("the child: {other:?}")),
    }
    let kept = format!("/proc/self/fd/{KEPT}");
    report.must_work("what is not hidden", fs::read(format!("{kept}/seen")));
    stays_hidden(
        report,
        &Path::new(&kept).join("hidden"),
        "by a descriptor of a namespace that is gone",
    );
}

/// The argument is the new mount's source, by which the test knows it.
fn travelling_mount(report: &mut Report, args: &[String]) {
    report.must_work("namespaces", own_namespaces());
    let shared = libc::MS_SHARED | libc::MS_REC;
    report.must_work("share everything", mount("none", "/", "none", shared));
    for place in ["/tmp", "/work", "/srv/of-the-job", "/dev/shm", "/usr"] {
        report.must_work("a tmpfs", mount(&args[0], place, "tmpfs", 0));
    }
    report.must_work("a file in it", fs::write("/tmp/file", "x"));
    let own = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if own.matches(args[0].as_str()).count() < 5 {
        report.broken("the mounts are not there");
    }
    report.print("ready");
    wait_for_ever();
}

fn no_such_mount(report: &mut Report, args: &[String]) {
    let own = fs::read_to_string("/proc/self/mountinfo").expect("it can be read");
    if own.contains(&args[0]) {
        report.broken("another job's mount is here");
    }
    report.must_fail("its file", fs::read("/tmp/file"));
}
