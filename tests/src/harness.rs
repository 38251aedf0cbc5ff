//! A factory host of its own for each test: a root directory, a cgroup, a range of uids, and the real
//! binaries. Dropped, it ends what it started, by pid, and removes what it made.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, Once, OnceLock};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;
use nix::unistd::Pid;
use protocol::{Received, Reply, Request, Seqpacket, WorkerId, config, wire};

use crate::tracer::sys::landlock_version;

/// How long a test waits for what should come at once, before it fails.
///
/// A machine may be busy, and ext4 makes files slowly for minutes after many were removed (`recently_deleted` in
/// `fs/ext4/ialloc.c`), which hostile jobs and their deletion do. What `tests/machine` builds, for machines that are
/// emulated, waits longer.
pub const TEST_TIMEOUT: Duration = Duration::from_secs(match option_env!("TESTBED_EMULATED") {
    Some(_) => 900,
    None => 300,
});

/// Between two attempts of [`until`].
pub const PAUSE: Duration = Duration::from_millis(5);

/// Ask until there is what is wanted: not all that another process does can be waited for. Between two attempts the
/// processor is that process's.
///
/// # Panics
///
/// With what is there instead, after [`TEST_TIMEOUT`].
#[track_caller]
pub fn until<T>(ask: impl FnMut() -> Result<T, String>) -> T {
    until_every(PAUSE, ask)
}

/// The same with a longer pause, where an attempt costs something.
#[track_caller]
pub fn until_every<T>(pause: Duration, mut ask: impl FnMut() -> Result<T, String>) -> T {
    let end = Instant::now() + TEST_TIMEOUT;
    loop {
        match ask() {
            Ok(found) => return found,
            Err(instead) => assert!(Instant::now() < end, "{instead}"),
        }
        std::thread::sleep(pause);
    }
}

/// The same as [`until`] for what is true or not.
#[track_caller]
pub fn until_is(wanted: &str, mut is: impl FnMut() -> bool) {
    until(|| {
        is().then_some(())
            .ok_or_else(|| format!("it does not come: {wanted}"))
    });
}

/// The uid of the supervisor in tests: nobody's, outside every range in use.
pub const SUPERVISOR_UID: u32 = 0x6fff_fff0;

/// Where the factory's binaries are. They are built, once a process, unless the environment variable
/// `TESTBED_BINARIES` names a directory that has them: then nothing here needs cargo (see `tests/machine`).
pub fn binaries() -> &'static Path {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    PLACE.get_or_init(|| {
        assert!(
            nix::unistd::geteuid().is_root(),
            "this needs root: it makes users, namespaces and cgroups"
        );
        if let Some(place) = std::env::var_os("TESTBED_BINARIES") {
            let place = PathBuf::from(place);
            assert!(
                place.join("user-factory-helper").is_file(),
                "TESTBED_BINARIES is {place:?}, which has no user-factory-helper"
            );
            return open_to_all(place);
        }
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut build = Command::new(cargo);
        build.args(["build", "--quiet", "--workspace", "--bins"]);
        if !cfg!(debug_assertions) {
            // Benchmarks are built as what is released, and measure that.
            build.arg("--release");
        }
        build.current_dir(
            Path::new(env!("CARGO_MANIFEST_DIR"))
                .parent()
                .expect("the workspace"),
        );
        assert!(
            build.status().expect("cargo can be started").success(),
            "the factory does not build"
        );
        let exe = std::env::current_exe().expect("a test has a path");
        let place = exe
            .ancestors()
            .find(|dir| dir.join("user-factory-helper").is_file());
        open_to_all(place.expect("the binaries are above the test's own").to_owned())
    })
}

/// The supervisor is started from there as a user of its own.
fn open_to_all(place: PathBuf) -> PathBuf {
    let closed = |dir: &&Path| fs::metadata(dir).is_ok_and(|meta| meta.permissions().mode() & 0o001 == 0);
    if let Some(dir) = place.ancestors().find(closed) {
        panic!(
            "{} is closed to other users (mode {:o}), and tests start programs below it as users of their own: move the \
             checkout elsewhere, or type `chmod o+x {}`",
            dir.display(),
            fs::metadata(dir).expect("seen above").permissions().mode() & 0o7777,
            dir.display()
        );
    }
    place
}

/// The programs of the system that tests cannot do without, and the Debian packages that have them.
const TOOLS: [(&str, &str); 14] = [
    ("at", "at"),
    ("btrfs", "btrfs-progs"),
    ("busctl", "systemd"),
    ("crontab", "cron"),
    ("dbus-daemon", "dbus"),
    ("ip", "iproute2"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("mkfs.xfs", "xfsprogs"),
    ("nft", "nftables"),
    ("nsenter", "util-linux"),
    ("openssl", "openssl"),
    ("ps", "procps"),
    ("setpriv", "util-linux"),
    ("unshare", "util-linux"),
];

/// The path of a program that tests cannot do without.
///
/// # Panics
///
/// If the program is not in the table of those that tests need, or is not on this machine and could not be installed.
pub fn tool(program: &str) -> PathBuf {
    let named = TOOLS.iter().find(|(name, _)| *name == program);
    let (_, package) = named.unwrap_or_else(|| panic!("add {program}, and its package, to TOOLS"));
    install_tools();
    find_program(program).unwrap_or_else(|| {
        panic!("{program} is not here and apt-get could not install {package}: install it")
    })
}

/// Install what is missing of the programs that tests need, once in this process: one command must be enough to pass the
/// tests on a fresh machine. All at once, and before the first test looks at the host, since packages make users and
/// files of their own there.
pub fn install_tools() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| install(&TOOLS));
}

/// Install the packages of those programs that are not on this machine. What cannot be installed is left out.
pub fn install(programs: &[(&str, &str)]) {
    let missing = programs
        .iter()
        .filter(|(program, _)| find_program(program).is_none())
        .map(|(_, package)| *package);
    let missing: BTreeSet<&str> = missing.collect();
    if missing.is_empty() {
        return;
    }
    eprintln!("not on this machine, and installed now: {missing:?}");
    let apt = |words: &[&str]| {
        let mut command = Command::new("apt-get");
        command.args(words).env("DEBIAN_FRONTEND", "noninteractive");
        // Another test's process may be installing something at the same time.
        command.args(["--quiet", "--option", "DPkg::Lock::Timeout=300"]);
        let _ = command.stdout(Stdio::null()).status();
    };
    // An update that fails may still leave lists that are good enough.
    apt(&["update"]);
    let words = ["install", "--yes", "--no-install-recommends"];
    apt(&words.into_iter().chain(missing).collect::<Vec<_>>());
}

fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Not every root has them in its PATH.
    let more = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(more)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
}

/// Lines that a process prints, kept, and waited for.
#[derive(Clone, Debug, Default)]
pub struct Log(Arc<(Mutex<Lines>, Condvar)>);

#[derive(Debug, Default)]
struct Lines {
    lines: Vec<String>,
    /// No more will come.
    ended: bool,
}

impl Log {
    /// Keep what comes out of this, from a thread of its own, until it ends.
    pub fn follow(&self, stream: impl std::io::Read + Send + 'static) {
        let log = self.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                log.0.0.lock().unwrap().lines.push(line);
                log.0.1.notify_all();
            }
            log.0.0.lock().unwrap().ended = true;
            log.0.1.notify_all();
        });
    }

    /// Wait for a line, from `from` on, that has all of `parts`.
    pub fn wait_from(&self, from: usize, parts: &[&str]) -> String {
        self.wait_for(1, from, parts)
    }

    /// Wait for so many lines (at least one), from `from` on, that have all of `parts`; there may be no more of them.
    /// What a process has written is not here at once: a thread reads it.
    pub fn wait_for_exactly(&self, count: usize, from: usize, parts: &[&str]) {
        self.wait_for(count, from, parts);
        assert_eq!(self.count_from(from, parts), count, "{parts:?}:\n{}", self.text());
    }

    /// Wait for so many lines, at least one; the last of them.
    fn wait_for(&self, count: usize, from: usize, parts: &[&str]) -> String {
        let matches = |line: &&String| parts.iter().all(|part| line.contains(part));
        let end = Instant::now() + TEST_TIMEOUT;
        let mut log = self.0.0.lock().unwrap();
        loop {
            if let Some(line) = log.lines.iter().skip(from).filter(matches).nth(count - 1) {
                return line.clone();
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || log.ended {
                let all = log.lines.join("\n");
                // Not with the lock held: others want to print the log, too.
                drop(log);
                panic!("{count} lines with {parts:?} did not come:\n{all}");
            }
            log = self.0.1.wait_timeout(log, left).unwrap().0;
        }
    }

    /// Wait for a line that has all of `parts`, the first lines included.
    pub fn wait(&self, parts: &[&str]) -> String {
        self.wait_from(0, parts)
    }

    /// How many lines, from `from` on, have all of `parts`.
    pub fn count_from(&self, from: usize, parts: &[&str]) -> usize {
        let matches = |line: &&String| parts.iter().all(|part| line.contains(part));
        let log = self.0.0.lock().unwrap();
        log.lines.iter().skip(from).filter(matches).count()
    }

    /// How many lines have all of `parts`.
    pub fn count(&self, parts: &[&str]) -> usize {
        self.count_from(0, parts)
    }

    /// How many lines have come so far.
    pub fn len(&self) -> usize {
        self.0.0.lock().unwrap().lines.len()
    }

    /// No line yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All lines so far.
    pub fn text(&self) -> String {
        self.text_from(0)
    }

    /// From this line on.
    pub fn text_from(&self, from: usize) -> String {
        self.0.0.lock().unwrap().lines[from..].join("\n")
    }
}

/// A started binary of the factory.
#[derive(Debug)]
pub struct Running {
    child: Child,
    /// Kept until the value is dropped, which prints it where the test has failed.
    pub log: Log,
}

impl Running {
    /// Its standard error is the log.
    pub fn start(command: &mut Command) -> Running {
        let command = command.stdin(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the binary can be started");
        let log = Log::default();
        log.follow(child.stderr.take().expect("it was piped"));
        Running { child, log }
    }

    /// What it prints on its standard output is the log.
    pub fn start_logging_stdout(command: &mut Command) -> Running {
        Running::start_logging_stdout_with(command, Stdio::null())
    }

    /// The same, with this to read.
    pub fn start_logging_stdout_with(command: &mut Command, input: Stdio) -> Running {
        let command = command.stdin(input).stdout(Stdio::piped());
        let mut child = command.spawn().expect("the binary can be started");
        let log = Log::default();
        log.follow(child.stdout.take().expect("it was piped"));
        Running { child, log }
    }

    /// Panics where the process was waited for and is gone.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("it is our child");
    }

    /// As this process's pid namespace numbers it.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Wait for its end, and fail where it does not come: a test must not hang on what it is there to find.
    pub fn wait(&mut self) -> std::process::ExitStatus {
        until(|| {
            let ended = self.child.try_wait().expect("it is our child");
            ended.ok_or_else(|| format!("process {} does not end", self.child.id()))
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- log of process {}\n{}", self.child.id(), self.log.text());
        }
    }
}

/// A host for one test.
#[derive(Debug)]
pub struct TestHost {
    /// Stands for `/` of the factory; removed when it is dropped.
    pub root: PathBuf,
    /// From the root of the cgroup file system, with a slash in front.
    pub cgroup: String,
    /// Those of its workers: no other test has them.
    pub uids: std::ops::RangeInclusive<u32>,
    _range: Flock<fs::File>,
}

/// The first uid of all tests.
const FIRST_UID: u32 = 0x7000_0000;

/// One file for each range of uids, which a test has locked.
pub(crate) const LOCKS: &str = "/run/user-factory-test";

/// A range of 64 uids, by its first, that no other test of this machine has for as long as the lock is held.
fn take_range(start: u32) -> (Flock<fs::File>, u32) {
    let locks = Path::new(LOCKS);
    fs::create_dir_all(locks).expect("root can write /run");
    let take = |number: u32| {
        let file = fs::File::create(locks.join(number.to_string())).expect("root can write /run");
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).ok()?;
        Some((lock, FIRST_UID + number * 64))
    };
    let mut numbers = (0..1000).map(|number| (start % 1000 + number) % 1000);
    numbers.find_map(take).expect("no thousand tests run at once")
}

impl TestHost {
    /// Of the name of its directory.
    pub const PREFIX: &str = "user-factory-test-";

    /// With the factory's directories and no configuration; see [`TestHost::configure`].
    pub fn new() -> TestHost {
        TestHost::below(&std::env::temp_dir())
    }

    /// The same in a directory below this one.
    pub fn below(directory: &Path) -> TestHost {
        binaries();
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        let directory = tempfile::Builder::new()
            .prefix(TestHost::PREFIX)
            .tempdir_in(directory)
            .expect("a directory");
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        // Dropped, it would be removed by calls of a function within itself: too many for a hostile job's trees.
        let root = directory.keep().canonicalize().unwrap();
        fs::create_dir_all(root.join(config::CONFIG_PATH).parent().unwrap()).unwrap();
        let state = root.join(config::STATE_DIR).join("supervisor");
        fs::create_dir_all(&state).unwrap();
        chown(&state, Some(SUPERVISOR_UID), Some(SUPERVISOR_UID)).unwrap();
        // A machine of its own, as its supervisor sees it.
        let machine = format!("{:016x}{pid:08x}{number:08x}\n", 0x7e57_u64);
        fs::write(root.join("etc/machine-id"), machine).unwrap();
        let (range, first) = take_range(pid.wrapping_mul(97).wrapping_add(number));
        let cgroup = format!("{}/user-factory-test-{pid}-{number}", parent_cgroup());
        TestHost {
            root,
            cgroup,
            uids: first..=first + 63,
            _range: range,
        }
    }

    /// An address of loopback that no other test of this machine has: a port of it is taken by nobody else.
    pub fn loopback(&self) -> std::net::Ipv4Addr {
        let number = ((self.uids.start() - FIRST_UID) / 64) as u16;
        let [high, low] = (number + 1).to_be_bytes();
        [127, 77, high, low].into()
    }

    /// Write the configuration: the general part for `baseurl` and `user`, then `slots`.
    pub fn configure(&self, baseurl: &str, user: u32, slots: &str) {
        let text = format!(
            "[general]\nbaseurl = \"{baseurl}\"\nallow_http = true\n[factory]\ntoken_file = \"{}\"\nuser = {user}\nuid_range = \"{}-{}\"\n{slots}",
            self.root.join("token").display(),
            self.uids.start(),
            self.uids.end(),
        );
        // As an editor does it: the file is replaced, never half-written.
        let part = self.root.join("config.part");
        fs::write(&part, text).unwrap();
        fs::set_permissions(&part, fs::Permissions::from_mode(0o644)).unwrap();
        fs::rename(part, self.root.join(config::CONFIG_PATH)).unwrap();
    }

    /// Readable by root alone, where [`TestHost::configure`] says that it is.
    pub fn write_token(&self, token: &str) {
        let path = self.root.join("token");
        fs::write(&path, token).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        chown(&path, Some(SUPERVISOR_UID), Some(SUPERVISOR_UID)).unwrap();
    }

    /// Wait until a helper that is being started answers.
    pub fn wait_for_helper(&self) {
        let hello = Request::Hello {
            version: protocol::VERSION,
        };
        let hello = wire::encode(&hello).expect("a request can be encoded");
        until_is("a helper that answers", || {
            Seqpacket::connect(&self.socket(), false).is_ok_and(|socket| {
                socket.send(&hello, None).is_ok()
                    && matches!(socket.recv(wire::MAX_REPLY), Ok(Received::Packet { .. }))
            })
        });
    }

    /// What starts the helper.
    pub fn helper_command(&self) -> Command {
        let mut command = Command::new(binaries().join("user-factory-helper"));
        command.arg("--root").arg(&self.root);
        command.args(["--cgroup", &self.cgroup]);
        command
    }

    /// Start the helper and wait until it serves.
    pub fn start_helper(&self) -> Running {
        let helper = Running::start(&mut self.helper_command());
        helper.log.wait(&["serving"]);
        helper
    }

    /// What starts the supervisor, as an unprivileged user.
    pub fn supervisor_command(&self) -> Command {
        let mut command = Command::new(binaries().join("user-factory"));
        command.arg("serve").arg("--root").arg(&self.root);
        command.uid(SUPERVISOR_UID).gid(SUPERVISOR_UID);
        command
    }

    /// With the user [`SUPERVISOR_UID`]; returns without waiting for its first poll.
    pub fn start_supervisor(&self) -> Running {
        Running::start(&mut self.supervisor_command())
    }

    /// The same, for which the host's `/etc/hosts` has these lines more, and nobody else: it is in a mount namespace of its
    /// own.
    pub fn start_supervisor_with_hosts(&self, lines: &str) -> Running {
        let hosts = self.root.join("etc/hosts.test");
        let of_the_host = fs::read_to_string("/etc/hosts").unwrap_or_default();
        fs::write(&hosts, format!("{of_the_host}\n{lines}")).unwrap();
        let plain = self.supervisor_command();
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "bash", "-c"]);
        command.arg("mount --bind \"$0\" /etc/hosts && exec setpriv \"--reuid=$1\" \"--regid=$1\" --clear-groups -- \"${@:2}\"");
        command.arg(hosts).arg(SUPERVISOR_UID.to_string());
        command.arg(plain.get_program()).args(plain.get_args());
        Running::start(&mut command)
    }

    /// The helper's.
    pub fn socket(&self) -> PathBuf {
        self.root.join(config::HELPER_SOCKET)
    }

    /// It need not exist.
    pub fn worker_dir(&self, worker: WorkerId) -> PathBuf {
        self.root
            .join(config::STATE_DIR)
            .join("workers")
            .join(worker.to_string())
    }

    /// A uid of the range that no worker has now. Workers get theirs at random.
    pub fn uid_of_no_worker(&self) -> u32 {
        let is_free = |uid: &u32| !self.userdb().join(format!("{uid}.user")).exists();
        self.uids.clone().find(is_free).expect("one is free")
    }

    /// Where the host knows its workers' users from.
    pub fn userdb(&self) -> PathBuf {
        self.root.join("run/userdb")
    }

    /// The directory of the helper's cgroup.
    pub fn cgroup_dir(&self) -> PathBuf {
        cgroup2_mount().join(self.cgroup.trim_start_matches('/'))
    }
}

impl Default for TestHost {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for TestHost {
    fn drop(&mut self) {
        let top = self.cgroup_dir();
        let _ = fs::write(top.join("cgroup.kill"), "1");
        let end = Instant::now() + TEST_TIMEOUT;
        let populated = || {
            fs::read_to_string(top.join("cgroup.events"))
                .unwrap_or_default()
                .contains("populated 1")
        };
        while populated() && Instant::now() < end {
            std::thread::sleep(PAUSE);
        }
        let workers = fs::read_dir(top.join("workers")).into_iter().flatten().flatten();
        let workers = workers
            .filter(|entry| entry.path().is_dir())
            .map(|entry| entry.path());
        for dir in workers.chain([top.join("workers"), top.join("daemon"), top.clone()]) {
            // A process that has just ended may keep its cgroup busy for an instant.
            while fs::remove_dir(&dir).is_err() && dir.exists() && Instant::now() < end {
                std::thread::sleep(PAUSE);
            }
        }
        let mut remove = Command::new("rm");
        let _ = remove.args(["-rf", "--one-file-system"]).arg(&self.root).status();
    }
}

/// Let this process have as many files open as root lets it. The soft limit of a service is 1024
/// (`DefaultLimitNOFILE=`, `systemd-system.conf(5)`).
///
/// # Panics
///
/// If the limit cannot be set: no process is refused its own hard limit (`setrlimit(2)`).
pub fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).expect("a process has limits");
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).expect("up to the hard limit");
}

/// A new directory that everybody on the host can see, jobs too: neither /tmp nor /run are the host's in there.
pub fn create_shared_dir() -> tempfile::TempDir {
    place_in(Path::new("/srv"))
}

/// The same below another directory that everybody can see.
pub fn place_in(dir: &Path) -> tempfile::TempDir {
    let place = tempfile::Builder::new()
        .prefix(TestHost::PREFIX)
        .tempdir_in(dir)
        .unwrap_or_else(|error| panic!("root can write {}: {error}", dir.display()));
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
    place
}

/// Copy a file to where it is to be run from, with this mode.
///
/// A process of its own writes it. What this one opens for writing, another test's child may have open too, from its fork
/// to its exec; and a file that somebody has open for writing cannot be run (`ETXTBSY`, `execve(2)`).
pub fn put_program(from: &Path, to: &Path, mode: u32) {
    let mut install = Command::new("install");
    let install = install.arg(format!("--mode={mode:o}")).args([from, to]).status();
    assert!(
        install.expect("every host has it").success(),
        "{} is not there",
        to.display()
    );
}

/// The cgroup, below the mount, that tests make theirs in: the root, or what `TESTBED_CGROUP` names. It should be one
/// that systemd has delegated, with controllers for its children and no process of its own.
fn parent_cgroup() -> String {
    std::env::var("TESTBED_CGROUP").unwrap_or_default()
}

/// Can a test's cgroup be limited in what the controller of that name counts?
pub fn has_controller(name: &str) -> bool {
    let parent = cgroup2_mount().join(parent_cgroup().trim_start_matches('/'));
    let all =
        fs::read_to_string(parent.join("cgroup.subtree_control")).expect("the parent of tests' cgroups");
    all.split_whitespace().any(|other| other == name)
}

/// Is this the machine that `tests/machine` boots? What can stop a kernel is tried there and nowhere else.
pub fn is_booted_machine() -> bool {
    let says = |file: &str, wanted: &str| {
        fs::read_to_string(file).is_ok_and(|text| text.trim_end_matches(['\n', '\0']) == wanted)
    };
    // A board of aarch64 that boots without firmware has a device tree, and no table of DMI.
    let is_qemu = says("/sys/class/dmi/id/sys_vendor", "QEMU")
        || says("/proc/device-tree/fw-cfg@9020000/compatible", "qemu,fw-cfg-mmio");
    is_qemu && Path::new("/etc/user-factory-booted-machine").exists()
}

/// Does the running kernel have Landlock's scopes (Linux 6.12), which keep abstract sockets within a job?
pub fn has_scopes() -> bool {
    landlock_version() >= 6
}

/// Does it have Landlock's right to refer (Linux 5.19), with which the helper keeps jobs from the host's FIFOs?
pub fn has_file_rules() -> bool {
    landlock_version() >= 2
}

/// The running kernel does not keep what SECURITY.md guarantees for newer ones. The helper must have warned at its
/// start.
pub fn assert_warned(helper: &Running, warning: &str) {
    helper.log.wait(&["WARN", warning]);
    // Not by println!, whose output is shown of tests that fail alone.
    let _ = writeln!(std::io::stderr(), "not kept here (SECURITY.md): {warning}");
}

/// Where cgroup v2 is mounted here.
pub fn cgroup2_mount() -> PathBuf {
    let info = fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
    let line = info
        .lines()
        .find(|line| line.contains(" - cgroup2 "))
        .expect("cgroup v2 is mounted");
    line.split(' ')
        .nth(4)
        .expect("mountinfo has a fifth field")
        .into()
}

/// A client at the helper's socket, well-behaved or hostile.
#[derive(Debug)]
pub struct Client {
    /// For packets that the client itself would not send.
    pub socket: Seqpacket,
    /// Where its workers' cgroups are.
    pub cgroups: PathBuf,
}

impl Client {
    /// Connected, and past the greeting.
    pub fn new(host: &TestHost) -> Client {
        let client = Client::connect(host);
        assert_eq!(
            client
                .ask(&Request::Hello {
                    version: protocol::VERSION
                })
                .0,
            Reply::Welcome
        );
        client
    }

    /// Connected; nothing said.
    pub fn connect(host: &TestHost) -> Client {
        let socket = Seqpacket::connect(&host.socket(), false).expect("the helper listens");
        // A helper that does not answer fails the test, and does not hang it.
        let time = TimeVal::new(TEST_TIMEOUT.as_secs() as i64, 0);
        setsockopt(&socket, sockopt::ReceiveTimeout, &time).expect("a socket can have a time-out");
        let cgroups = host.cgroup_dir().join("workers");
        Client { socket, cgroups }
    }

    /// Send it, and wait for the reply with what it carries.
    pub fn ask(&self, request: &Request) -> (Reply, Vec<OwnedFd>) {
        self.ask_with(request, None)
    }

    /// The same, with a descriptor that travels with the request.
    pub fn ask_with(&self, request: &Request, descriptor: Option<BorrowedFd<'_>>) -> (Reply, Vec<OwnedFd>) {
        self.socket
            .send(&wire::encode(request).unwrap(), descriptor)
            .expect("the helper takes a packet");
        self.reply()
            .unwrap_or_else(|| panic!("the helper closed the connection at {request:?}"))
    }

    /// The next reply; none if the helper has closed the connection.
    pub fn reply(&self) -> Option<(Reply, Vec<OwnedFd>)> {
        match self.socket.recv(wire::MAX_REPLY) {
            Ok(Received::Packet { bytes, descriptors }) => {
                Some((wire::decode(&bytes).expect("a reply"), descriptors))
            }
            _ => None,
        }
    }
}

/// A program in a sealed memfd, as the supervisor hands it over.
pub fn sealed_memfd(program: &[u8]) -> OwnedFd {
    let fd = memfd(program);
    supervisor::agent_cache::seal(&fd).expect("a memfd can be sealed");
    fd
}

/// A program in a memfd without seals.
pub fn memfd(program: &[u8]) -> OwnedFd {
    let fd = memfd_create("agent", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).expect("a memfd");
    let mut file = fs::File::from(fd);
    file.write_all(program).expect("a memfd can be written");
    file.into()
}

/// A new worker's id.
pub fn worker_id() -> WorkerId {
    static COUNT: AtomicU32 = AtomicU32::new(1);
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_millis();
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    WorkerId::from_bits(
        (now & ((1 << 48) - 1)) << 80 | u128::from(std::process::id()) << 32 | u128::from(number),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "closed to other users (mode 700)")]
    fn a_checkout_that_others_cannot_enter_is_named_at_once() {
        let closed = tempfile::tempdir().unwrap();
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
        open_to_all(closed.path().join("target"));
    }
}
