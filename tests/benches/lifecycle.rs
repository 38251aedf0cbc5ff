//! A worker's whole life: create, install a 2 MB agent, its first instruction, kill, delete. Through the helper's
//! socket, with the whole sandbox; against the bare system calls, bubblewrap, the obvious script, crun and podman.
//!
//!     cargo bench -p testbed --bench lifecycle
//!
//! Each way is a process of its own, in a mount namespace of its own, with its own `/etc`: for each line that it
//! reads it makes one life and prints the microseconds. So they can take turns, each on a host of its own.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use protocol::{Reply, Request, WorkerId};
use testbed::bench::{Group, Measurement, Options, Report, c_program, time};
use testbed::harness::{Client, TestHost, binaries, install, sealed_memfd, worker_id};

/// Slots of every configuration here: enough for the workers that are alive beside the measured one.
const SLOTS: usize = 66;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1).map(String::as_str) {
        Some("process") => process(&args[2], &args[3..]),
        _ => compare(&Options::from_args()),
    }
}

/// The comparisons.
fn compare(options: &Options) {
    binaries();
    let tools = Tools::new();
    let mut report = Report::new("lifecycle");
    let rounds = options.size(200, 3);
    if options.wants("ways") {
        let mut ways: Vec<Measurement<'_>> = vec![
            go("helper", tools.start("helper", &[])),
            go(
                "helper, a connection for each request",
                tools.start("helper", &["--connect"]),
            ),
            go("bare system calls", tools.start("bare", &[])),
            go("bubblewrap", tools.start("bubblewrap", &[])),
        ];
        for (engine, works) in [("crun", tools.works("crun")), ("podman", tools.works("podman"))] {
            match works {
                true => ways.push(go(engine, tools.start(engine, &[]))),
                false => println!("{engine} is not here, or does not run here: left out"),
            }
        }
        let group = report.add(Group::measure("A worker's whole life", rounds, ways));
        let [bare, bubblewrap] = ["bare system calls", "bubblewrap"].map(|way| group.ratio("helper", way));
        report.aim("against the bare system calls", bare, 2.0);
        report.aim("against bubblewrap", bubblewrap, 0.8);
    }
    if options.wants("script") {
        let ways = vec![
            go("helper", tools.start("helper", &[])),
            go("useradd, mount, pkill, userdel", tools.start("script", &[])),
        ];
        let group = report.add(Group::measure("Against the obvious script", rounds.min(30), ways));
        let ratio = group.ratio("helper", "useradd, mount, pkill, userdel");
        report.aim("against the script", ratio, 1.0 / 40.0);
    }
    for (part, title, key, sizes, base) in [
        ("mounts", "Mounts of the host", "--mounts", [20, 500, 2000], 20),
        (
            "passwd",
            "Lines of /etc/passwd",
            "--passwd",
            [50, 5_000, 50_000],
            50,
        ),
        ("alive", "Other workers alive", "--alive", [1, 8, 64], 1),
    ] {
        if !options.wants(part) {
            continue;
        }
        let names = sizes.map(|size| size.to_string());
        let ways = names
            .iter()
            .map(|size| go(size, tools.start("helper", &[key, size])));
        let mut ways: Vec<Measurement<'_>> = ways.collect();
        if part == "mounts" {
            ways.push(go(
                "2000 that jobs see",
                tools.start("helper", &[key, "2000", "--seen"]),
            ));
        }
        let group = report.add(Group::measure(title, rounds, ways));
        let ratio = group.ratio(&sizes[2].to_string(), &base.to_string());
        report.aim(&format!("{title}: {} against {base}", sizes[2]), ratio, 1.1);
    }
    report.end(options);
}

fn go(name: &str, mut process: MeasuredProcess) -> Measurement<'_> {
    (name, Box::new(move || process.life()))
}

/// A way of making a life, waiting to be told to.
struct MeasuredProcess {
    child: Child,
    input: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl MeasuredProcess {
    fn new(command: &mut Command) -> MeasuredProcess {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("the way can be started");
        MeasuredProcess {
            input: child.stdin.take().expect("it was piped"),
            answers: BufReader::new(child.stdout.take().expect("it was piped")),
            child,
        }
    }

    fn life(&mut self) -> Duration {
        self.input.write_all(b"\n").expect("the way waits");
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("it answers");
        let microseconds: f64 = line.trim().parse().expect("the way made a life: see above");
        Duration::from_secs_f64(microseconds / 1e6)
    }
}

impl Drop for MeasuredProcess {
    fn drop(&mut self) {
        // At the end of its input it cleans up.
        let (reading, writing) = std::io::pipe().expect("a pipe");
        drop(reading);
        self.input = ChildStdin::from(std::os::fd::OwnedFd::from(writing));
        let _ = self.child.wait();
    }
}

/// What the ways need, made once.
struct Tools {
    place: tempfile::TempDir,
}

impl Tools {
    fn new() -> Tools {
        install(&[("bwrap", "bubblewrap")]);
        let place = tempfile::Builder::new()
            .prefix("user-factory-bench-")
            .tempdir_in("/srv");
        let place = place.expect("a directory in /srv, which jobs see");
        let open = fs::Permissions::from_mode(0o755);
        fs::set_permissions(place.path(), open).expect("it is ours");
        c_program(place.path(), "bare", &["-O2"]);
        c_program(place.path(), "agent", &["-static"]);
        Tools { place }
    }

    fn start(&self, way: &str, arguments: &[&str]) -> MeasuredProcess {
        MeasuredProcess::new(&mut self.command(way, arguments))
    }

    fn command(&self, way: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private"]);
        command.arg(std::env::current_exe().expect("a benchmark has a path"));
        command
            .arg("process")
            .arg(way)
            .arg(self.place.path())
            .args(arguments);
        command
    }

    /// Is this engine here, and does it run something?
    fn works(&self, engine: &str) -> bool {
        let tried = Command::new(engine)
            .arg("--version")
            .stdout(Stdio::null())
            .status();
        if !tried.is_ok_and(|status| status.success()) {
            return false;
        }
        let mut process = MeasuredProcess::new(self.command(engine, &["--try"]).stderr(Stdio::null()));
        let mut line = String::new();
        process
            .answers
            .read_line(&mut line)
            .is_ok_and(|_| line.trim() == "works")
    }
}

/// One way, on a host of its own: the mount namespace that it was started in.
fn process(way: &str, arguments: &[String]) {
    let place = PathBuf::from(&arguments[0]);
    let number = |key: &str| {
        let at = arguments.iter().position(|argument| argument == key)?;
        arguments[at + 1].parse::<usize>().ok()
    };
    let own = tempfile::Builder::new()
        .prefix("user-factory-bench-")
        .tempdir()
        .expect("a directory");
    own_etc(own.path(), number("--passwd"));
    own_mounts(
        number("--mounts"),
        arguments.iter().any(|argument| argument == "--seen"),
    );
    let started = FirstOpen::new(&place);
    let lives: Box<dyn FnMut() -> Duration> = match way {
        "helper" => {
            let connect = arguments.iter().any(|argument| argument == "--connect");
            let mut factory = BenchHelper::new(&place, &started, number("--alive").unwrap_or(0));
            Box::new(move || factory.life(&started, connect))
        }
        "bare" => return bare(&place, own.path(), &started),
        "bubblewrap" => {
            let base = own.path().to_owned();
            Box::new(move || bubblewrap(&place, &base, &started))
        }
        "script" => {
            let base = own.path().to_owned();
            Box::new(move || script(&place, &base, &started))
        }
        "crun" => {
            let bundle = crun_bundle(&place, own.path(), &started);
            Box::new(move || crun(&bundle, &started))
        }
        "podman" => Box::new(move || podman(&place, &started)),
        other => panic!("{other} is no way"),
    };
    serve(lives, arguments.iter().any(|argument| argument == "--try"));
}

fn serve(mut life: impl FnMut() -> Duration, only_try: bool) {
    if only_try {
        life();
        println!("works");
        return;
    }
    for _ in std::io::stdin().lock().lines() {
        println!("{:.3}", life().as_secs_f64() * 1e6);
    }
}

/// An `/etc` that this process may change, with a passwd file of so many lines.
fn own_etc(own: &Path, lines: Option<usize>) {
    let etc = own.join("etc");
    run(Command::new("cp").args(["-a", "/etc"]).arg(&etc));
    if let Some(lines) = lines {
        let passwd = etc.join("passwd");
        let text = fs::read_to_string(&passwd).expect("the copy can be read");
        let mut all: Vec<String> = text.lines().take(lines).map(str::to_owned).collect();
        let person = |n: usize| {
            format!(
                "person{n}:x:{}:100:Person {n}:/home/person{n}:/bin/bash",
                100_000 + n
            )
        };
        all.extend((all.len()..lines).map(person));
        fs::write(passwd, all.join("\n") + "\n").expect("the copy can be written");
    }
    run(Command::new("mount").arg("--bind").arg(&etc).arg("/etc"));
}

/// Mounts of the host, until it has so many: in a directory that root alone can enter, as those of container engines
/// are, or where every job sees them.
fn own_mounts(wanted: Option<usize>, seen: bool) {
    let Some(wanted) = wanted else { return };
    let mode = if seen { "mode=755" } else { "mode=710" };
    run(Command::new("mount").args(["-t", "tmpfs", "-o", mode, "none", "/mnt"]));
    let table = fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
    for n in table.lines().count()..wanted {
        let place = PathBuf::from(format!("/mnt/{n}"));
        fs::create_dir(&place).expect("a tmpfs of ours");
        let none = None::<&str>;
        nix::mount::mount(
            Some("none"),
            &place,
            Some("tmpfs"),
            nix::mount::MsFlags::empty(),
            none,
        )
        .expect("root may mount");
    }
}

fn run(command: &mut Command) {
    let status = command.stdout(Stdio::null()).status();
    assert!(
        status.as_ref().is_ok_and(|status| status.success()),
        "{command:?}: {status:?}"
    );
}

/// A file that each agent opens as soon as it runs. A job may read what its modes let everybody read, and write to no
/// place of the host that all the ways have.
struct FirstOpen {
    path: PathBuf,
    opens: Inotify,
}

impl FirstOpen {
    fn new(place: &Path) -> FirstOpen {
        let path = place.join(format!("started-{}", std::process::id()));
        fs::write(&path, "").expect("a directory of ours");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("it is ours");
        let opens = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).expect("inotify");
        opens
            .add_watch(&path, AddWatchFlags::IN_OPEN)
            .expect("it can be watched");
        FirstOpen { path, opens }
    }

    /// Wait for an agent's first instruction.
    fn wait(&self) {
        let mut event = [PollFd::new(self.opens.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut event, PollTimeout::from(10_000u16)).expect("it can be polled");
        assert!(ready > 0, "no agent started within ten seconds");
        self.opens.read_events().expect("there is one");
    }
}

impl Drop for FirstOpen {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// The helper on a host of its own, and a client.
struct BenchHelper {
    client: Client,
    helper: testbed::harness::Running,
    agent: std::os::fd::OwnedFd,
    others: Vec<WorkerId>,
    host: TestHost,
}

impl BenchHelper {
    fn new(place: &Path, started: &FirstOpen, alive: usize) -> BenchHelper {
        let mut host = TestHost::new();
        // More than a test has, and not among theirs.
        let first = 0x7010_0000 + std::process::id() % 1000 * 256;
        host.uids = first..=first + 255;
        // As everywhere: /run is in memory.
        let run_dir = host.root.join("run");
        fs::create_dir_all(&run_dir).expect("a directory of ours");
        run(Command::new("mount")
            .args(["-t", "tmpfs", "-o", "mode=755", "none"])
            .arg(&run_dir));
        let slot = |n: usize| {
            let started = started.path.display();
            format!("[slots.s{n}]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\nenv.STARTED = \"{started}\"\n")
        };
        host.configure("http://127.0.0.1:1", 0, &(0..SLOTS).map(slot).collect::<String>());
        let helper = host.start_helper();
        let agent = sealed_memfd(&fs::read(place.join("agent")).expect("it was built"));
        let mut factory = BenchHelper {
            client: Client::new(&host),
            helper,
            agent,
            others: Vec::new(),
            host,
        };
        for n in 1..=alive {
            let other = factory.start(&factory.client, n);
            started.wait();
            factory.others.push(other);
        }
        factory
    }

    fn start(&self, client: &Client, slot: usize) -> WorkerId {
        let worker = worker_id();
        let slot = format!("s{slot}").parse().expect("it is a name");
        let reply = client.ask(&Request::CreateUser { worker, slot }).0;
        assert!(matches!(reply, Reply::UserCreated { .. }), "{reply:?}");
        self.install(client, worker);
        worker
    }

    fn install(&self, client: &Client, worker: WorkerId) {
        let bootstrap = "abcdefgh01234567".parse().expect("it is a token");
        let request = Request::InstallAgent { worker, bootstrap };
        let agent = self.agent.as_fd();
        let reply = client.ask_with(&request, Some(agent)).0;
        assert_eq!(reply, Reply::AgentStarted);
    }

    /// One worker. The supervisor makes a connection for each request; what that costs is seen by itself.
    fn life(&mut self, started: &FirstOpen, connect: bool) -> Duration {
        time(|| {
            let mut anew = || {
                if connect {
                    self.client = Client::new(&self.host);
                }
            };
            anew();
            let worker = worker_id();
            let slot = "s0".parse().expect("it is a name");
            let reply = self.client.ask(&Request::CreateUser { worker, slot }).0;
            assert!(matches!(reply, Reply::UserCreated { .. }), "{reply:?}");
            if connect {
                self.client = Client::new(&self.host);
            }
            self.install(&self.client, worker);
            started.wait();
            for (request, done) in [
                (Request::Kill { worker }, Reply::Killed),
                (Request::Delete { worker }, Reply::Deleted),
            ] {
                if connect {
                    self.client = Client::new(&self.host);
                }
                assert_eq!(self.client.ask(&request).0, done);
            }
        })
    }
}

impl Drop for BenchHelper {
    fn drop(&mut self) {
        for worker in std::mem::take(&mut self.others) {
            self.client.ask(&Request::Delete { worker });
        }
        self.helper.signal(nix::sys::signal::Signal::SIGTERM);
        self.helper.wait();
        run(Command::new("umount")
            .arg("--lazy")
            .arg(self.host.root.join("run")));
    }
}

/// The program of system calls, in place of this one's loop.
fn bare(place: &Path, own: &Path, started: &FirstOpen) {
    for name in ["state", "userdb"] {
        fs::create_dir(own.join(name)).expect("a directory of ours");
    }
    run(Command::new("mount")
        .args(["-t", "tmpfs", "none"])
        .arg(own.join("userdb")));
    let cgroups =
        testbed::harness::cgroup2_mount().join(format!("user-factory-bench-{}", std::process::id()));
    fs::create_dir(&cgroups).expect("root makes cgroups");
    let mut bare = Command::new(place.join("bare"));
    bare.args([
        own.join("state"),
        own.join("userdb"),
        cgroups.clone(),
        place.join("agent"),
        started.path.clone(),
    ]);
    run_through(&mut bare);
    fs::remove_dir(cgroups).expect("it left nothing");
    run(Command::new("umount").arg(own.join("userdb")));
}

/// With our standard streams.
fn run_through(command: &mut Command) {
    let status = command.status();
    assert!(
        status.as_ref().is_ok_and(|status| status.success()),
        "{command:?}: {status:?}"
    );
}

/// A comparable sandbox. It makes no user, and deletes nothing but what the next copy replaces.
fn bubblewrap(place: &Path, own: &Path, started: &FirstOpen) -> Duration {
    let writable = ["home", "input", "work", "tmp"].map(|name| own.join("writable").join(name));
    for dir in &writable {
        fs::create_dir_all(dir).expect("a directory of ours");
    }
    let agent = own.join("agent");
    time(|| {
        // As all the others, it installs the agent. The last one may still be ending: its file cannot be written to.
        let _ = fs::remove_file(&agent);
        fs::copy(place.join("agent"), &agent).expect("a directory of ours");
        let mut bwrap = Command::new("bwrap");
        bwrap.args([
            "--unshare-pid",
            "--unshare-ipc",
            "--unshare-uts",
            "--new-session",
            "--die-with-parent",
        ]);
        bwrap.args(["--cap-drop", "ALL"]);
        for path in ["/usr", "/etc", "/srv", "/var"] {
            bwrap.args(["--ro-bind", path, path]);
        }
        for (dir, at) in writable.iter().zip(["/home", "/input", "/work", "/tmp"]) {
            bwrap.arg("--bind").arg(dir).arg(at);
        }
        bwrap.args(["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/run"]);
        bwrap.arg("--ro-bind").arg(&agent).arg("/run/agent");
        bwrap.args(["--", "/run/agent", "install"]).arg(&started.path);
        let mut child = bwrap.spawn().expect("bubblewrap can be started");
        started.wait();
        child.kill().expect("it is our child");
        child.wait().expect("it is our child");
    })
}

/// What one writes first: the system's programs, one after the other.
const SCRIPT: &str = r#"
set -e
user=bench$$
groupadd "$user"
useradd --gid "$user" --no-create-home --home-dir /home/$user --shell /bin/bash "$user"
for dir in home input work tmp vartmp; do install -d -o "$user" -g "$user" "$BASE/fs/$dir"; done
install -m 755 "$AGENT" "$BASE/fs/agent"
unshare --mount --pid --ipc --uts --fork --kill-child bash -ec '
    mount --make-rprivate /
    mount --bind / /
    mount -o remount,bind,ro,nosuid /
    mount -t tmpfs none /mnt
    mkdir /mnt/input /mnt/work
    mount --bind "$BASE/fs/input" /mnt/input
    mount --bind "$BASE/fs/work" /mnt/work
    mount --bind "$BASE/fs/home" /home
    mount --bind "$BASE/fs/vartmp" /var/tmp
    mount --bind "$BASE/fs/tmp" /tmp
    mount -t proc proc /proc
    exec setpriv --reuid "$0" --regid "$0" --clear-groups --bounding-set=-all --no-new-privs "$1" install "$2"
' "$user" "$PLACE/agent" "$STARTED" &
read -r -t 10
pkill -KILL -u "$user" || true
wait || true
rm -rf "$BASE/fs"
userdel "$user" 2>/dev/null
groupdel "$user" 2>/dev/null || true
"#;

fn script(place: &Path, own: &Path, started: &FirstOpen) -> Duration {
    let mut bash = Command::new("bash");
    bash.args(["-c", SCRIPT])
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .stdout(Stdio::null());
    bash.env("BASE", own)
        .env("PLACE", place)
        .env("AGENT", place.join("agent"))
        .env("STARTED", &started.path);
    time(|| {
        let mut bash = bash.spawn().expect("bash can be started");
        started.wait();
        let mut input = bash.stdin.take().expect("it was piped");
        input.write_all(b"\n").expect("the script waits for a line");
        let status = bash.wait().expect("it is our child");
        assert!(status.success(), "the script ended with {status}");
    })
}

/// A bundle for crun, with the same sandbox.
fn crun_bundle(place: &Path, own: &Path, started: &FirstOpen) -> PathBuf {
    let bundle = own.join("bundle");
    let writable = |name: &str, at: &str| {
        let source = bundle.join(name);
        fs::create_dir_all(&source).expect("a directory of ours");
        serde_json::json!({"destination": at, "type": "bind", "source": source, "options": ["bind", "rw"]})
    };
    let host = |at: &str| serde_json::json!({"destination": at, "type": "bind", "source": at, "options": ["rbind", "ro", "nosuid"]});
    let mut mounts = vec![serde_json::json!({"destination": "/proc", "type": "proc", "source": "proc"})];
    mounts.extend(["/usr", "/etc", "/var", "/srv"].map(host));
    mounts.extend([
        writable("home", "/home"),
        writable("input", "/input"),
        writable("work", "/work"),
        writable("tmp", "/tmp"),
    ]);
    mounts.push(serde_json::json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}));
    let root = bundle.join("rootfs");
    fs::create_dir_all(&root).expect("a directory of ours");
    let config = serde_json::json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 1_900_000_001, "gid": 1_900_000_001},
            "args": [place.join("agent"), "install", started.path],
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
            "noNewPrivileges": true,
        },
        "root": {"path": root, "readonly": true},
        "mounts": mounts,
        "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}]},
    });
    fs::write(bundle.join("config.json"), config.to_string()).expect("a directory of ours");
    bundle
}

fn crun(bundle: &Path, started: &FirstOpen) -> Duration {
    let name = format!("bench-{}", std::process::id());
    let state = bundle.join("state");
    let with = |args: &[&str]| {
        let mut crun = Command::new("crun");
        crun.arg("--root")
            .arg(&state)
            .arg("--cgroup-manager=disabled")
            .args(args);
        crun.stdin(Stdio::null()).stdout(Stdio::null());
        crun
    };
    time(|| {
        let mut start = with(&["run", "--detach", "--bundle"]);
        run_through(start.arg(bundle).arg(&name));
        started.wait();
        run_through(&mut with(&["delete", "--force", &name]));
    })
}

fn podman(place: &Path, started: &FirstOpen) -> Duration {
    let name = format!("bench-{}", std::process::id());
    let volume = format!("{0}:{0}:rw", place.display());
    time(|| {
        let mut start = Command::new("podman");
        start.args([
            "run",
            "--detach",
            "--name",
            &name,
            "--network=host",
            "--cgroups=disabled",
            "--volume",
            &volume,
        ]);
        start
            .args(["--rootfs", "/:O"])
            .arg(place.join("agent"))
            .arg("install")
            .arg(&started.path);
        run(start.stderr(Stdio::null()));
        started.wait();
        run(Command::new("podman")
            .args(["rm", "--force", "--time", "0", &name])
            .stderr(Stdio::null()));
    })
}
