//! Group A: leaving something behind.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::sys::{c, call, clone3, fork, fork_here, wait_for_ever};
use crate::{Attempt, Report};

pub const ATTEMPTS: &[Attempt] = &[
    ("daemons", daemons),
    ("fork-bomb", fork_bomb),
    ("hard-to-kill", hard_to_kill),
    ("cgroups", cgroups),
    ("files-everywhere", files_everywhere),
    ("system-v", system_v),
    ("posix-ipc", posix_ipc),
    ("keys", keys),
    ("services", services),
    ("nodes", nodes),
    ("listener", listener),
    ("connect-to-other-job", connect_to_other_job),
    ("user-namespace", user_namespace),
    ("watches-and-locks", watches_and_locks),
    ("crash", crash),
    ("listen", listen),
    ("accounting", accounting),
];

pub fn uid() -> u32 {
    nix::unistd::getuid().as_raw()
}

/// What every job may write, its home first.
pub fn own_places() -> Vec<PathBuf> {
    let home = std::env::var("HOME").expect("a job has a home");
    let mut places = vec![PathBuf::from(home)];
    places.extend(
        [
            "/work",
            "/tmp",
            "/var/tmp",
            "/input",
            "/opt/buildomat",
            "/run/buildomat",
            "/dev/shm",
        ]
        .map(PathBuf::from),
    );
    places
}

/// Nothing but SIGKILL and SIGSTOP gets through to this process from here on.
pub fn ignore_every_signal() {
    for signal in 1..=64 {
        // The kernel's sigaction: SIG_IGN, no flags, no restorer, an empty mask.
        let action = [libc::SIG_IGN, 0, 0, 0];
        let _ = call(
            libc::SYS_rt_sigaction,
            [signal, action.as_ptr() as usize, 0, 8, 0, 0],
        );
    }
    SigSet::all().thread_block().expect("a mask can be set");
}

/// A process of nobody's: its parent is gone, and it has a session of its own.
pub fn daemon(work: impl FnOnce()) {
    let parent = fork(|| {
        nix::unistd::setsid().expect("a child can make a session");
        fork(work);
    });
    waitpid(Pid::from_raw(parent), None).expect("it is our child");
}

fn daemons(report: &mut Report, _: &[String]) {
    for number in 0..5 {
        daemon(|| {
            ignore_every_signal();
            report.print(format!("daemon {number} is running"));
            wait_for_ever();
        });
    }
}

/// Let this program, and nobody else, feel what it does: no more processes than these.
fn at_most(processes: u64) {
    let limit = [processes, processes];
    let arguments = [0, libc::RLIMIT_NPROC as usize, limit.as_ptr() as usize, 0, 0, 0];
    call(libc::SYS_prlimit64, arguments).expect("a limit can be lowered");
}

fn fork_bomb(report: &mut Report, args: &[String]) {
    at_most(args.get(1).map_or(400, |most| most.parse().expect("a number")));
    match args[0].as_str() {
        // Each has as many children as it gets, and so have they.
        "grow" => {
            let mut first = true;
            loop {
                match fork_here() {
                    Ok(0) => first = false,
                    Ok(_) => {}
                    Err(_) if first => {
                        report.print("ready");
                        first = false;
                    }
                    Err(_) => {}
                }
            }
        }
        // None runs for long: a killer that reads the list of processes first kills what has ended.
        "relay" => {
            for number in 0..20 {
                fork(|| {
                    let mut generation = 0u64;
                    loop {
                        match fork_here() {
                            Ok(0) => generation += 1,
                            Ok(_) => std::process::exit(0),
                            Err(_) => std::thread::yield_now(),
                        }
                        if number == 0 && generation == 500 {
                            println!("ready");
                        }
                    }
                });
            }
            wait_for_ever();
        }
        other => report.broken(format!("no such bomb: {other}")),
    }
}

fn hard_to_kill(report: &mut Report, _: &[String]) {
    let stopped = |pid, flag| {
        waitpid(Pid::from_raw(pid), Some(flag)).expect("it is our child");
    };
    let this = || Pid::from_raw(std::process::id() as i32);
    let sleeper = fork(|| {
        let _ = kill(this(), Signal::SIGSTOP);
        wait_for_ever();
    });
    stopped(sleeper, WaitPidFlag::WUNTRACED);
    // Its parent waits in the kernel for an exec that does not come. A copied address space is enough for that.
    fork(|| {
        let flags = libc::CLONE_VFORK | libc::SIGCHLD;
        if let Ok(0) = call(libc::SYS_clone, [flags as usize, 0, 0, 0, 0, 0]) {
            println!("in vfork");
            wait_for_ever();
        }
    });
    let traced = fork(|| {
        call(libc::SYS_ptrace, [libc::PTRACE_TRACEME as usize, 0, 0, 0, 0, 0])
            .expect("own parents may trace");
        let _ = kill(this(), Signal::SIGSTOP);
        wait_for_ever();
    });
    stopped(traced, WaitPidFlag::WUNTRACED);
    // A traced process that stops once more on its way out.
    let options = libc::PTRACE_O_TRACEEXIT as usize;
    call(
        libc::SYS_ptrace,
        [
            libc::PTRACE_SETOPTIONS as usize,
            traced as usize,
            0,
            options,
            0,
            0,
        ],
    )
    .expect("it is stopped");
    report.print("ready");
    ignore_every_signal();
    wait_for_ever();
}

/// Everything below `dir` that can be seen, but what is another kernel file system's.
fn walk(dir: &Path, visit: &mut impl FnMut(&Path, &fs::Metadata)) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if let Ok(meta) = path.symlink_metadata() {
            visit(&path, &meta);
            if meta.is_dir() && path != Path::new("/proc") {
                walk(&path, visit);
            }
        }
    }
}

/// A process that ends at once, in the cgroup of this directory or else in the caller's own (`clone3(2)`).
fn clone_into(cgroup: Option<&File>) -> io::Result<libc::c_long> {
    let result = clone3(0, cgroup.map(AsRawFd::as_raw_fd));
    if matches!(result, Ok(0)) {
        std::process::exit(0);
    }
    result
}

/// Everything that could move this job to one of the cgroups that are mounted here, or end or stop them.
fn other_cgroups(report: &mut Report, mount: &str, clone3_works: bool) {
    let (mut tried, mut cloned) = (0, 0);
    let mut visit = |path: &Path, meta: &fs::Metadata| {
        let name = path.file_name().unwrap_or_default();
        if meta.is_dir() {
            report.must_fail(path.display(), fs::create_dir(path.join("of-the-job")));
            if let Ok(dir) = File::open(path) {
                let result = clone_into(Some(&dir));
                let is_absent = matches!(&result, Err(error) if error.raw_os_error() == Some(libc::ENOSYS));
                if is_absent == clone3_works {
                    report.broken(format!("clone3(2) was not as expected: {result:?}"));
                }
                // Version 1 has no such file, and no such clone.
                cloned += u32::from(path.join("cgroup.controllers").exists());
                report.must_fail(format!("clone into {}", path.display()), result);
            }
            tried += 1;
        } else if [
            "cgroup.procs",
            "cgroup.threads",
            "tasks",
            "cgroup.kill",
            "cgroup.freeze",
        ]
        .iter()
        .any(|other| *other == name)
        {
            report.must_fail(path.display(), fs::write(path, "0"));
            tried += 1;
        }
    };
    let top = Path::new(mount);
    visit(top, &top.metadata().expect("it is mounted"));
    walk(top, &mut visit);
    report.print(format!("tried {tried} in {mount}"));
    if cloned == 0 {
        report.broken(format!("no cgroup could be opened in {mount}"));
    }
}

fn cgroups(report: &mut Report, args: &[String]) {
    let clone3_works = args[0] == "clone3";
    if clone3_works {
        report.must_work("clone3", clone_into(None));
    } else {
        report.must_fail("clone3", clone_into(None));
    }
    other_cgroups(report, "/sys/fs/cgroup", clone3_works);
    report.must_fail("mount cgroup2", mount("none", "/tmp", "cgroup2", 0));
    if clone3_works {
        // As root of a user namespace, which may mount the cgroups of its own cgroup namespace.
        report.must_work("namespaces", own_namespaces());
        let flags = libc::CLONE_NEWCGROUP as usize;
        report.must_work(
            "a cgroup namespace",
            call(libc::SYS_unshare, [flags, 0, 0, 0, 0, 0]),
        );
        other_cgroups(report, "/sys/fs/cgroup", clone3_works);
        match mount("none", "/tmp", "cgroup2", 0) {
            Ok(()) => other_cgroups(report, "/tmp", clone3_works),
            Err(error) => report.print(format!("blocked: cgroup2 in a namespace: {error}")),
        }
    }
    report.print("ready");
    wait_for_ever();
}

fn files_everywhere(report: &mut Report, args: &[String]) {
    let name = &args[0];
    let leave = |report: &mut Report, dir: &Path| {
        let file = dir.join(name);
        match OpenOptions::new().write(true).create_new(true).open(&file) {
            Ok(_) => report.print(format!("wrote {}", file.display())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error)
                if [libc::EACCES, libc::EROFS, libc::EPERM]
                    .map(Some)
                    .contains(&error.raw_os_error()) => {}
            Err(error) => report.print(format!("refused {}: {error}", file.display())),
        }
    };
    let mut directories = 0;
    for place in [
        "/",
        "/run/lock",
        "/var/lock",
        "/var/spool/cron",
        "/var/spool/cron/crontabs",
        "/var/mail",
        "/run/user",
        "/run/screen",
        "/var/crash",
        "/var/lib/systemd/coredump",
        "/dev",
        "/dev/mqueue",
        "/dev/pts",
    ] {
        report.must_fail_unless_private(place, name);
    }
    walk(Path::new("/"), &mut |path, meta| {
        if meta.is_dir() {
            directories += 1;
            leave(report, path);
        }
    });
    report.print(format!("tried {directories} directories"));
    report.print("ready");
    wait_for_ever();
}

impl Report {
    /// One place where any user of a usual host may write.
    fn must_fail_unless_private(&mut self, place: &str, name: &str) {
        match fs::write(Path::new(place).join(name), "") {
            Ok(()) => self.print(format!("wrote {place}/{name}")),
            Err(error) => self.print(format!("blocked: {place}: {error}")),
        }
    }

    /// This is harmless inside; if it does not work, the test shows nothing.
    pub fn must_work<T>(&mut self, what: &str, result: io::Result<T>) -> Option<T> {
        match result {
            Ok(value) => {
                self.print(format!("done: {what}"));
                Some(value)
            }
            Err(error) => {
                self.broken(format!("{what} should work: {error}"));
                None
            }
        }
    }
}

fn system_v(report: &mut Report, _: &[String]) {
    let key = uid() as usize;
    let create = libc::IPC_CREAT as usize | 0o666;
    for key in [key, libc::IPC_PRIVATE as usize] {
        let shm = report.must_work(
            "shared memory",
            call(libc::SYS_shmget, [key, 1 << 20, create, 0, 0, 0]),
        );
        if let Some(shm) = shm {
            report.must_work("attached", call(libc::SYS_shmat, [shm as usize, 0, 0, 0, 0, 0]));
        }
        report.must_work("semaphores", call(libc::SYS_semget, [key, 10, create, 0, 0, 0]));
        if let Some(queue) = report.must_work("queue", call(libc::SYS_msgget, [key, create, 0, 0, 0, 0])) {
            let message = [1u64, 2, 3];
            let arguments = [queue as usize, message.as_ptr() as usize, 16, 0, 0, 0];
            report.must_work("message", call(libc::SYS_msgsnd, arguments));
        }
    }
    report.print("ready");
    wait_for_ever();
}

fn posix_ipc(report: &mut Report, args: &[String]) {
    let name = c(&args[0]);
    let flags = (libc::O_CREAT | libc::O_RDWR) as usize;
    let queue = call(libc::SYS_mq_open, [name.as_ptr() as usize, flags, 0o666, 0, 0, 0]);
    report.must_work("queue", queue);
    // What sem_open(3) and shm_open(3) make.
    report.must_work(
        "semaphore",
        fs::write(format!("/dev/shm/sem.{}", args[0]), [0; 32]),
    );
    report.must_work("memory", fs::write(format!("/dev/shm/{}", args[0]), [1; 4096]));
    report.print("ready");
    wait_for_ever();
}

pub fn keys(report: &mut Report, _: &[String]) {
    let (kind, name) = (c("user"), c("left-by-a-job"));
    let (kind, name) = (kind.as_ptr() as usize, name.as_ptr() as usize);
    let payload = *b"secret";
    // keyctl(2): the thread's, process's, session's, user's and user session's keyrings are -1 to -5.
    for ring in 1..=5usize {
        let ring = ring.wrapping_neg();
        let arguments = [kind, name, payload.as_ptr() as usize, payload.len(), ring, 0];
        report.must_fail(
            format!("add_key {}", ring as isize),
            call(libc::SYS_add_key, arguments),
        );
        // KEYCTL_GET_KEYRING_ID, and make it.
        let arguments = [0, ring, 1, 0, 0, 0];
        report.must_fail("the keyring's id", call(libc::SYS_keyctl, arguments));
        report.must_fail(
            "request_key",
            call(libc::SYS_request_key, [kind, name, 0, ring, 0, 0]),
        );
    }
    // KEYCTL_JOIN_SESSION_KEYRING and KEYCTL_GET_PERSISTENT.
    report.must_fail("a session keyring", call(libc::SYS_keyctl, [1, name, 0, 0, 0, 0]));
    let arguments = [22, uid() as usize, 2usize.wrapping_neg(), 0, 0, 0];
    report.must_fail("the persistent keyring", call(libc::SYS_keyctl, arguments));
}

/// Files that services of the host look for, and these commands, which ask them.
fn services(report: &mut Report, commands: &[String]) {
    let user = std::env::var("USER").unwrap_or_default();
    let unit = "[Service]\nExecStart=/bin/true\n";
    for (path, content) in [
        (format!("/var/spool/cron/crontabs/{user}"), "* * * * * true\n"),
        (format!("/var/spool/cron/{user}"), "* * * * * true\n"),
        (format!("/var/spool/cron/atjobs/{user}"), "true\n"),
        (format!("/etc/cron.d/{user}"), "* * * * * root true\n"),
        (format!("/etc/cron.daily/{user}"), "true\n"),
        (format!("/var/lib/systemd/linger/{user}"), ""),
        (format!("/etc/systemd/system/{user}.service"), unit),
        (format!("/run/systemd/system/{user}.service"), unit),
        (format!("/etc/systemd/user/{user}.service"), unit),
        (format!("/etc/profile.d/{user}.sh"), "true\n"),
        (format!("/etc/udev/rules.d/{user}.rules"), ""),
        (format!("/usr/share/dbus-1/services/{user}.service"), unit),
    ] {
        report.must_fail(&path, fs::write(&path, content));
    }
    // What they are to do, for those that read it.
    fs::write("/work/order", "0 0 1 1 * true\n").expect("/work is writable");
    for command in commands {
        let command: Vec<&str> = command.split('\u{1f}').collect();
        let outcome = Command::new(command[0])
            .args(&command[1..])
            .stdin(File::open("/work/order").expect("it was written"))
            .output();
        match outcome {
            Err(error) => report.broken(format!("{command:?} cannot be tried: {error}")),
            Ok(output) if output.status.success() => report.broken(format!("{command:?} worked")),
            Ok(output) => {
                let why = String::from_utf8_lossy(&output.stderr);
                report.print(format!("blocked: {command:?}: {}: {}", output.status, why.trim()));
            }
        }
    }
}

fn nodes(report: &mut Report, _: &[String]) {
    let device = |path: &Path, kind: u32, major, minor| {
        let path = c(path);
        let number = nix::sys::stat::makedev(major, minor) as usize;
        let arguments = [
            libc::AT_FDCWD as usize,
            path.as_ptr() as usize,
            (kind | 0o666) as usize,
            number,
            0,
            0,
        ];
        call(libc::SYS_mknodat, arguments)
    };
    for place in own_places() {
        let at = |name: &str| place.join(name);
        let shown = place.display();
        let socket = UnixListener::bind(at("socket"));
        // One that is listened at while it is deleted.
        std::mem::forget(report.must_work(&format!("socket in {shown}"), socket));
        report.must_work(
            &format!("FIFO in {shown}"),
            device(&at("fifo"), libc::S_IFIFO, 0, 0),
        );
        // The kernel lets everybody make it: overlayfs's sign that a name is gone.
        let whiteout = device(&at("whiteout"), libc::S_IFCHR, 0, 0);
        if report
            .must_work(&format!("whiteout in {shown}"), whiteout)
            .is_some()
        {
            let meta = at("whiteout").symlink_metadata().expect("it was made");
            if !meta.file_type().is_char_device() || meta.rdev() != 0 {
                report.broken("the whiteout is none");
            }
            report.must_fail("opening a whiteout", File::open(at("whiteout")));
        }
        for (kind, major, minor) in [
            (libc::S_IFCHR, 1, 1),
            (libc::S_IFCHR, 1, 3),
            (libc::S_IFCHR, 5, 1),
            (libc::S_IFBLK, 8, 0),
            (libc::S_IFBLK, 7, 0),
            (libc::S_IFBLK, 0, 0),
        ] {
            let what = format!("node {kind:o} {major}:{minor} in {shown}");
            report.must_fail(what, device(&at("node"), kind, major, minor));
        }
    }
    report.print("ready");
    wait_for_ever();
}

fn abstract_name(name: &str) -> SocketAddr {
    SocketAddr::from_abstract_name(name).expect("a short name")
}

/// Listen at an abstract name for other jobs.
fn listener(report: &mut Report, args: &[String]) {
    let listener = UnixListener::bind_addr(&abstract_name(&args[0]));
    let listener = report.must_work("listening", listener);
    let datagrams = UnixDatagram::bind_addr(&abstract_name(&format!("{}-datagrams", args[0])));
    let datagrams = report.must_work("datagrams", datagrams);
    // It can be reached: this job itself connects.
    report.must_work("own listener", UnixStream::connect_addr(&abstract_name(&args[0])));
    report.print("ready");
    std::mem::forget((listener, datagrams));
    wait_for_ever();
}

/// Connect to another job's listener. Over that connection, any descriptor could be handed over.
fn connect_to_other_job(report: &mut Report, args: &[String]) {
    report.must_fail("connecting", UnixStream::connect_addr(&abstract_name(&args[0])));
    let socket = UnixDatagram::unbound().expect("a socket can be made");
    let address = abstract_name(&format!("{}-datagrams", args[0]));
    report.must_fail("sending", socket.send_to_addr(b"x", &address));
    report.must_fail("connecting for datagrams", socket.connect_addr(&address));
}

pub fn mount(source: &str, place: &str, kind: &str, flags: libc::c_ulong) -> io::Result<()> {
    let (source, place, kind) = (c(source), c(place), c(kind));
    let [source, place, kind] = [&source, &place, &kind].map(|text| text.as_ptr() as usize);
    call(libc::SYS_mount, [source, place, kind, flags as usize, 0, 0]).map(drop)
}

/// Become root of a user namespace and owner of a mount namespace.
pub fn own_namespaces() -> io::Result<()> {
    let (uid, gid) = (uid(), nix::unistd::getgid());
    let flags = libc::CLONE_NEWUSER | libc::CLONE_NEWNS;
    call(libc::SYS_unshare, [flags as usize, 0, 0, 0, 0, 0])?;
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("0 {gid} 1"))
}

fn user_namespace(report: &mut Report, args: &[String]) {
    if args[0] == "refused" {
        let child = |result: io::Result<libc::c_long>| {
            if let Ok(0) = result {
                std::process::exit(0);
            }
            result
        };
        for (name, flag) in [
            ("user", libc::CLONE_NEWUSER),
            ("user and mount", libc::CLONE_NEWUSER | libc::CLONE_NEWNS),
        ] {
            let flags = (flag | libc::SIGCHLD) as usize;
            let result = child(call(libc::SYS_clone, [flags, 0, 0, 0, 0, 0]));
            report.must_fail(format!("clone with a {name} namespace"), result);
            let result = child(clone3(flag as u64, None));
            report.must_fail(format!("clone3 with a {name} namespace"), result);
            // Last: it would change this process.
            let result = call(libc::SYS_unshare, [flag as usize, 0, 0, 0, 0, 0]);
            match &result {
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => {}
                other => report.broken(format!("unshare of a {name} namespace: {other:?}")),
            }
        }
        report.must_fail("a tmpfs", mount("none", "/tmp", "tmpfs", 0));
        report.must_fail("a bind mount", mount("/work", "/tmp", "none", libc::MS_BIND));
        report.must_fail(
            "/dev/fuse",
            OpenOptions::new().read(true).write(true).open("/dev/fuse"),
        );
        return;
    }
    fs::create_dir_all("/work/bound").expect("/work is writable");
    report.must_work("namespaces", own_namespaces());
    report.must_work("a tmpfs", mount("none", "/tmp", "tmpfs", 0));
    report.must_work("a file in it", fs::write("/tmp/file", "x"));
    report.must_work(
        "a bind mount",
        mount("/tmp", "/work/bound", "none", libc::MS_BIND),
    );
    report.must_work("the file, seen there", fs::read("/work/bound/file"));
    match OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Err(error) => report.print(format!("blocked: /dev/fuse: {error}")),
        Ok(_) => report.broken("/dev/fuse is not the slot's"),
    }
    report.print("ready");
    wait_for_ever();
}

fn watches_and_locks(report: &mut Report, args: &[String]) {
    let host_file = File::open(&args[0]).expect("the job can see the host's file");
    let watches = call(libc::SYS_inotify_init1, [0; 6]);
    if let Some(watches) = report.must_work("inotify", watches) {
        for place in ["/etc", "/usr", "/work", &args[0]] {
            let path = c(place);
            let all = libc::IN_ALL_EVENTS as usize;
            let arguments = [watches as usize, path.as_ptr() as usize, all, 0, 0, 0];
            report.must_work(
                &format!("watch {place}"),
                call(libc::SYS_inotify_add_watch, arguments),
            );
        }
    }
    for _ in 0..50 {
        let terminal = OpenOptions::new().read(true).write(true).open("/dev/ptmx");
        std::mem::forget(report.must_work("terminal", terminal));
    }
    let lock = libc::LOCK_EX | libc::LOCK_NB;
    let arguments = [host_file.as_raw_fd() as usize, lock as usize, 0, 0, 0, 0];
    report.must_work("lock", call(libc::SYS_flock, arguments));
    let lease = [
        host_file.as_raw_fd() as usize,
        libc::F_SETLEASE as usize,
        libc::F_RDLCK as usize,
        0,
        0,
        0,
    ];
    report.must_fail("lease", call(libc::SYS_fcntl, lease));
    report.print("ready");
    wait_for_ever();
}

fn core_limit() -> [u64; 2] {
    let mut now = [7u64; 2];
    let address = now.as_mut_ptr() as usize;
    call(
        libc::SYS_prlimit64,
        [0, libc::RLIMIT_CORE as usize, 0, address, 0, 0],
    )
    .expect("a limit can be read");
    now
}

fn crash(report: &mut Report, _: &[String]) {
    let files = || -> Vec<_> {
        fs::read_dir("/work")
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .collect()
    };
    // Other attempts of the same job may have left theirs.
    let before = files();
    let attempts = [
        None,
        Some([0, 1]),
        Some([0, 0]),
        Some([u64::MAX, u64::MAX]),
        Some([1 << 30, 1 << 30]),
    ];
    for attempt in attempts {
        for signal in [Signal::SIGSEGV, Signal::SIGABRT, Signal::SIGQUIT] {
            let pid = fork(|| {
                if let Some(limit) = attempt {
                    let address = limit.as_ptr() as usize;
                    let core = libc::RLIMIT_CORE as usize;
                    let _ = call(libc::SYS_prlimit64, [0, core, address, 0, 0, 0]);
                    let _ = call(libc::SYS_setrlimit, [core, address, 0, 0, 0, 0]);
                }
                // 1 alone stops files, which have to be larger, and pipes, for which 1 is a special case.
                if core_limit() != [1, 1] {
                    println!("BROKEN: after {attempt:?} the limit is {:?}", core_limit());
                    std::process::exit(9);
                }
                let _ = std::env::set_current_dir("/work");
                // Rust's own handler of SIGSEGV takes the first, and puts the kernel's default back.
                loop {
                    let _ = kill(Pid::from_raw(std::process::id() as i32), signal);
                }
            });
            match waitpid(Pid::from_raw(pid), None) {
                Ok(WaitStatus::Signaled(_, by, false)) if by == signal => report.print("blocked: no core"),
                other => report.broken(format!("{attempt:?} {signal}: {other:?}")),
            }
        }
    }
    for path in files() {
        if !before.contains(&path) {
            report.broken(format!("{} is there", path.display()));
        }
    }
}

fn listen(report: &mut Report, _: &[String]) {
    daemon(|| {
        ignore_every_signal();
        for address in ["127.0.0.1:0", "0.0.0.0:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else {
                println!("absent: {address}");
                continue;
            };
            println!("listens {}", listener.local_addr().expect("it is bound"));
            std::mem::forget(listener);
        }
        report.print("ready");
        wait_for_ever();
    });
}

fn accounting(report: &mut Report, _: &[String]) {
    for path in [
        "/run/utmp",
        "/var/run/utmp",
        "/var/log/wtmp",
        "/var/log/btmp",
        "/var/log/lastlog",
        "/var/log/faillog",
        "/var/log/tallylog",
    ] {
        let file = OpenOptions::new().append(true).create(true).open(path);
        report.must_fail(path, file);
    }
    // Programs that write such records for those who start them, on a terminal of the job's own.
    for command in [
        ["script", "-qec", "true", "/dev/null"],
        ["su", "-", "root", "-c=true"],
        ["login", "-f", "root", "true"],
        ["logger", "-p", "auth.notice", "a login"],
    ] {
        let outcome = Command::new(command[0])
            .args(&command[1..])
            .stdin(Stdio::null())
            .output();
        match outcome {
            Err(error) => report.print(format!("absent: {}: {error}", command[0])),
            Ok(output) => report.print(format!("{command:?}: {}", output.status)),
        }
    }
}
