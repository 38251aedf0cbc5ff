//! What a hostile job costs the others: each attempt of `hostile-job` again and again in one slot, and beside it round
//! trips of `List`, and `CreateUser` to `Delete` of a worker in another slot.
//!
//!     cargo bench -p testbed --bench hostile
//!
//! The same is measured right before each attempt, without it: what is compared lies seconds apart, on the same host.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use protocol::{Reply, Request};
use testbed::bench::{Group, Options, Report, Way, time};
use testbed::harness::{TestHost, binaries, create_shared_dir, has_controller, sealed_memfd};
use testbed::test_helper::{TestHelper, create_worker, install, list, read, start_attack};

/// Between two `List` requests: a poll of many supervisors, so to speak.
const PAUSE: Duration = Duration::from_millis(5);

/// How long an attempt that stays is left alone before its worker is deleted, and the next one begins.
const STAYS: Duration = Duration::from_secs(1);

/// How far an attempt may get before its first round counts as begun.
const BEGINS: Duration = Duration::from_secs(20);

/// The attempts of a slot with few processes and files: what `scheduling` and `exhaust-limits` are told.
const PROCESSES: &str = "512";
const OPEN_FILES: &str = "1024";

/// An attempt: its name, the slot that it needs, its arguments, and the line after which all that it does is being
/// done.
struct Attempt {
    name: &'static str,
    slot: &'static str,
    args: Vec<String>,
    line: &'static str,
}

fn main() {
    let options = Options::from_args();
    let attacked = AttackedHost::new();
    let test = attacked.test();
    let attempts = attacked.attempts(&test);
    all_are_known(&test, &attempts);
    let mut report = Report::new("hostile");
    println!(
        "\n  {:<34} {:>9} {:>9} {:>9} {:>9} {:>7} {:>7}",
        "beside", "List", "p99", "base p99", "life", "ratio", "rounds"
    );
    let mut list_worst = Worst::default();
    let mut life_worst = Worst::default();
    for attempt in &attempts {
        let title = [&[attempt.name.to_owned()][..], &attempt.args].concat().join(" ");
        if !options.wants(&title) {
            continue;
        }
        let (ways, rounds) = beside(&test, attempt, &options);
        let [list, baseline_list, life, baseline_life] = &ways;
        let ratio = life.median() / baseline_life.median();
        let shown: String = title.chars().take(34).collect();
        println!(
            "  {shown:<34} {:>6.2} ms {:>6.2} ms {:>6.2} ms {:>6.1} ms {ratio:>7.2} {rounds:>7}",
            list.median() / 1e3,
            list.quantile(0.99) / 1e3,
            baseline_list.quantile(0.99) / 1e3,
            life.median() / 1e3,
        );
        list_worst.see(list.quantile(0.99) / 1e3, &shown);
        life_worst.see(ratio, &shown);
        report.groups.push(Group {
            title,
            ways: ways.map(thin).into(),
        });
    }
    println!();
    report.aim(
        &format!("List at the 99th percentile, in ms, beside {}", list_worst.title),
        list_worst.value,
        50.0,
    );
    report.aim(
        &format!("a life against the baseline, beside {}", life_worst.title),
        life_worst.value,
        2.0,
    );
    report.end(&options);
    test.finish(&[]);
}

#[derive(Default)]
struct Worst {
    value: f64,
    title: String,
}

impl Worst {
    fn see(&mut self, value: f64, title: &str) {
        if value > self.value {
            self.value = value;
            self.title = title.to_owned();
        }
    }
}

/// What is not run here, and why.
fn left_out(test: &TestHelper) -> Vec<(&'static str, &'static str)> {
    let mut all = vec![
        ("chain", "it fills the disk of the state directory"),
        ("fill", "it fills the disk of the state directory"),
        ("memory-hold", "it is an ordinary job"),
        ("page-cache", "it is an ordinary job"),
        ("programs", "it can stop a kernel"),
    ];
    if !has_controller("memory") {
        all.push(("memory-bomb", "this host cannot limit a job's memory"));
    }
    if !has_quotas(test) {
        all.push(("fill-quota", "this host cannot limit a job's disk"));
    }
    all
}

fn has_quotas(test: &TestHelper) -> bool {
    test.helper.log.count(&["NOT ENFORCED", "limits.disk"]) == 0
}

/// Every attempt that there is, is run here or left out with a reason.
fn all_are_known(test: &TestHelper, attempts: &[Attempt]) {
    let mut list = Command::new(binaries().join("hostile-job"));
    let output = list.arg("--list").output().expect("the program was built");
    let text = String::from_utf8(output.stdout).expect("names");
    let there: BTreeSet<&str> = text.lines().collect();
    let left_out = left_out(test);
    let named = attempts.iter().map(|attempt| attempt.name);
    let known: BTreeSet<&str> = named.chain(left_out.iter().map(|(name, _)| *name)).collect();
    assert_eq!(
        known, there,
        "an attempt is missing in tests/benches/hostile.rs, or is gone"
    );
    for (name, reason) in left_out {
        println!("not here: {name}: {reason}");
    }
}

/// One in about a hundred, from the fastest to the slowest: enough for the quantiles that are looked at.
fn thin(way: Way) -> Way {
    let wanted = way.samples.len().min(101);
    let samples = (0..wanted).map(|n| way.quantile(n as f64 / (wanted - 1).max(1) as f64));
    Way {
        samples: samples.collect(),
        ..way
    }
}

/// The host that the attempts are made on: what their arguments name.
struct AttackedHost {
    place: tempfile::TempDir,
    sleeper: Child,
    group: (String, u32),
    /// At an abstract name, which no job reaches.
    _listener: UnixListener,
}

fn name_of_the_listener() -> String {
    format!("user-factory-bench-{}", std::process::id())
}

impl Drop for AttackedHost {
    fn drop(&mut self) {
        let _ = self.sleeper.kill();
        let _ = self.sleeper.wait();
    }
}

impl AttackedHost {
    fn new() -> AttackedHost {
        let place = create_shared_dir();
        let groups = fs::read_to_string("/etc/group").expect("the host has groups");
        let mut groups = groups.lines().filter_map(|line| {
            let fields: Vec<&str> = line.split(':').collect();
            let gid: u32 = fields.get(2)?.parse().ok()?;
            (gid != 0).then(|| (fields[0].to_owned(), gid))
        });
        let group = groups.next().expect("the host has a group besides root's");
        let (_, other) = groups.next().expect("and another one");
        for (name, mode, gid) in [
            ("file", 0o644, 0),
            ("open", 0o640, group.1),
            ("closed", 0o640, other),
            ("hidden/secret", 0o644, 0),
            ("seen", 0o644, 0),
            ("canary/file", 0o644, 0),
            ("writable/file", 0o666, 0),
            ("writable/below/file", 0o666, 0),
        ] {
            let path = place.path().join(name);
            fs::create_dir_all(path.parent().expect("it is in a directory")).expect("a directory of ours");
            fs::write(&path, "of the host").expect("a directory of ours");
            chown(&path, Some(0), Some(gid)).expect("it is ours");
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("it is ours");
        }
        for name in ["writable/below", "writable"] {
            let open = fs::Permissions::from_mode(0o777);
            fs::set_permissions(place.path().join(name), open).expect("it is ours");
        }
        let fifo = place.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::empty()).expect("a directory of ours");
        fs::set_permissions(&fifo, fs::Permissions::from_mode(0o666)).expect("it is ours");
        let sleeper = Command::new("sleep").arg("1000000").stdin(Stdio::null()).spawn();
        let name = SocketAddr::from_abstract_name(name_of_the_listener()).expect("it is short");
        AttackedHost {
            _listener: UnixListener::bind_addr(&name).expect("the name is ours"),
            place,
            sleeper: sleeper.expect("every host has sleep"),
            group,
        }
    }

    fn test(&self) -> TestHelper {
        let place = self.place.path().display();
        let slot = |name: &str, lines: &str| {
            format!(
                "[slots.{name}]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n{lines}\
                 limits.processes = {PROCESSES}\nlimits.open_files = {OPEN_FILES}\n"
            )
        };
        let variables = VARIABLES.map(|name| format!("env.{name} = \"/work/hostile-{name}\"\n"));
        let slots = [
            slot("plain", &format!("add_to_groups = [\"{}\"]\n", self.group.0)),
            // Where a slot writes below /srv, each entry there is a mount, which `unmask` tries to change.
            slot(
                "namespaces",
                "allow_user_namespaces = true\nwritable = [\"/srv/of-the-job\"]\n",
            ),
            slot("variables", &variables.concat()),
            slot("memory", "limits.memory = \"64M\"\nlimits.best_effort = true\n"),
            slot(
                "quota",
                "limits.disk = \"8M\"\nlimits.inodes = 300\nlimits.best_effort = true\n",
            ),
            slot("neighbour", ""),
        ];
        // The operator's part ends with the factory's section.
        let slots = format!("hide = [\"{place}/hidden\"]\n{}", slots.concat());
        let host = TestHost::new();
        host.configure("http://127.0.0.1:9", 0, &slots);
        TestHelper::on(host, None)
    }

    /// Each attempt, with what its arguments name on this host.
    fn attempts(&self, test: &TestHelper) -> Vec<Attempt> {
        let own = |name: &str| self.place.path().join(name).display().to_string();
        let (canary, file, here) = (
            own("canary"),
            own("file"),
            self.place.path().display().to_string(),
        );
        let pids = [self.sleeper.id(), test.helper.pid()].map(|pid| pid.to_string());
        let watches =
            fs::read_to_string("/proc/sys/fs/inotify/max_user_instances").expect("it is a file of /proc");
        let lowest = fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").expect("as above");
        let variables = VARIABLES.map(|name| format!("/work/hostile-{name}"));
        let socket = test.host.socket().display().to_string();
        let listener = format!("stream@{}", name_of_the_listener());
        let nobody = format!("user-factory-bench-{}-nobody", std::process::id());
        // It reads what the host has, where a short word would be found.
        let of_nobody = testbed::fake_server::secret();
        let mut all: Vec<Attempt> = Vec::new();
        let mut add = |slot, name, args: &[&str], line| {
            let args = args.iter().map(|arg| (*arg).to_owned()).collect();
            all.push(Attempt {
                name,
                slot,
                args,
                line,
            });
        };
        let (plain, namespaces, over, ready) = ("plain", "namespaces", "attempt over", "ready");

        add(plain, "daemons", &[], over);
        add(plain, "fork-bomb", &["grow"], ready);
        add(plain, "fork-bomb", &["relay"], ready);
        add(plain, "hard-to-kill", &[], ready);
        add(plain, "cgroups", &["refused"], ready);
        add(namespaces, "cgroups", &["clone3"], ready);
        add(plain, "files-everywhere", &[&nobody], ready);
        add(plain, "system-v", &[], ready);
        add(plain, "posix-ipc", &[&nobody], ready);
        add(plain, "keys", &[], over);
        add(plain, "services", &[], over);
        add(plain, "nodes", &[], ready);
        add(plain, "listener", &[&nobody], ready);
        add(plain, "connect-to-other-job", &[&nobody], over);
        add(plain, "user-namespace", &["refused"], over);
        add(namespaces, "user-namespace", &["allowed"], ready);
        add(plain, "watches-and-locks", &[&file], ready);
        add(plain, "crash", &[], over);
        add(plain, "listen", &[], over);
        add(plain, "accounting", &[], over);

        add(plain, "mixed-leftovers", &[], ready);

        add(plain, "swap", &[&canary, "/etc"], "swaps 1");
        add(plain, "links", &[&canary, &file], ready);
        add(plain, "modes", &[], ready);
        add(plain, "deep", &["2000"], ready);
        add(plain, "many", &["20000"], ready);
        add(plain, "names", &[], ready);
        add(plain, "flags", &[], ready);
        add(plain, "grow", &[], "grows 3");
        add(plain, "mount-inside", &["refused", &own("writable")], over);
        add(namespaces, "mount-inside", &["allowed", &own("writable")], ready);
        add(plain, "set-id", &[&self.group.1.to_string()], ready);
        add(plain, "recreate", &[], "recreates 3");
        add(plain, "replace", &[], ready);

        add(plain, "calls", &[], over);
        add(namespaces, "calls-in-user-namespace", &[], over);
        add(plain, "other-entry-points", &[], over);
        add(plain, "file-handles", &[], over);
        add(
            "variables",
            "environment",
            &variables.each_ref().map(String::as_str),
            "everything is in place",
        );
        let group = self.group.1.to_string();
        add(
            plain,
            "groups",
            &[&group, "not", &own("closed"), &own("open")],
            over,
        );
        add(plain, "socket-programs", &[], over);
        add(plain, "seccomp-programs", &["refused"], over);
        add(namespaces, "seccomp-programs", &["allowed"], over);
        add(plain, "file-system-objects", &[], over);
        add(plain, "asynchronous-contexts", &[], over);
        add(plain, "line-disciplines", &[], over);
        add(plain, "protocols", &["refused"], over);
        add(namespaces, "protocols", &["allowed"], over);
        add(plain, "memory-policy", &[], over);
        add(plain, "pid-1", &[], over);
        add(plain, "fifos", &[&own("fifo")], over);
        add(plain, "host-files", &["alone", &own("writable")], over);
        add(namespaces, "host-files", &["namespaces", &own("writable")], over);
        add("memory", "scheduling", &[PROCESSES, OPEN_FILES], over);
        add(plain, "raw-sockets", &[lowest.trim(), "lo"], over);

        add(plain, "sockets", &[&socket, &listener], over);
        add(plain, "devices", &[], over);
        add(plain, "terminal", &[], over);
        add(plain, "signals", &[&pids[0], &pids[1]], over);
        add(plain, "kill-all", &[], over);
        add(plain, "keep-secret", &[&nobody], ready);
        add(plain, "seek", &[&of_nobody, &own("none")], over);

        add(plain, "set-id-programs", &[], over);
        add(plain, "new-namespaces", &[], over);
        add(namespaces, "capable-calls", &[], over);
        add(plain, "init", &["as-it-is"], over);
        add(namespaces, "init", &["as-root-too"], over);
        add(plain, "other-processes", &[&pids[0], &pids[1]], over);
        add(plain, "own-child", &[], over);
        add(plain, "overwrite-programs", &[], over);
        add("memory", "inheritance", &[], over);
        add(plain, "kernel-files", &[], over);
        add(plain, "mount-calls", &[], over);
        add(namespaces, "unmask", &[&here], over);
        add(namespaces, "fresh-mounts", &[&here], over);
        add(namespaces, "old-descriptors", &[&here], over);
        add(namespaces, "travelling-mount", &[&nobody], ready);
        add(plain, "no-such-mount", &[&nobody], over);

        add("memory", "shared-memory", &[&(64 << 20).to_string()], over);
        add(
            plain,
            "exhaust-limits",
            &[PROCESSES, OPEN_FILES, watches.trim()],
            ready,
        );
        add(plain, "take-a-little", &[], over);
        if has_quotas(test) {
            add("quota", "fill-quota", &[&(8 << 20).to_string(), "300"], ready);
        }
        add(plain, "write-much", &["64", "1000"], over);
        for output in ["no-newline", "escapes", "nuls"] {
            add(plain, "print-much", &[output], over);
        }
        for output in ["idle", "noisy"] {
            add(plain, "never-end", &[output], ready);
        }
        if has_controller("memory") {
            for kind in ["anonymous", "shared-memory", "memfd", "pipes", "sockets"] {
                add("memory", "memory-bomb", &[kind, &(64 << 20).to_string()], over);
            }
        }
        add(plain, "spin", &["4"], ready);
        add(plain, "bind-sockets", &["6000"], "bound");
        for (kind, processes, each) in [
            ("pipes", "4", "200"),
            ("socket-buffers", "2", "200"),
            ("tcp-buffers", "2", "20"),
            ("signals", "4", "20000"),
            ("timers", "4", "20000"),
            ("locks", "2", "20000"),
            ("epoll-watches", "2", "20000"),
            ("inotify-watches", "1", "5000"),
            ("terminals", "4", "100"),
            ("processes", "4", "400"),
            ("files", "4", "2000"),
            ("missing-names", "1", "100000"),
            ("udp-ports", "1", "500"),
            ("abstract-names", "1", "1000"),
            ("crashes", "1", "200"),
        ] {
            add(plain, "hold", &[kind, processes, each], ready);
        }
        all
    }
}

/// What slots may set for a process to be led astray by.
const VARIABLES: [&str; 4] = ["LD_PRELOAD", "LD_AUDIT", "BASH_ENV", "PATH"];

/// Sets it when it goes, also in a panic: what is measured has failed, and nothing beside it must go on for ever.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// `List` and lives beside the attempt, and `List` and lives right before it; and how often the attempt was made.
fn beside(test: &TestHelper, attempt: &Attempt, options: &Options) -> ([Way; 4], usize) {
    let lives = options.size(20, 2);
    let [baseline_list, baseline_life] = measure(test, lives, options.size(1, 0));
    let (over, rounds) = (AtomicBool::new(false), AtomicUsize::new(0));
    let [list, life] = std::thread::scope(|scope| {
        let attacker = scope.spawn(|| attack_again_and_again(test, attempt, &over, &rounds));
        let end = StopOnDrop(&over);
        wait_for_first(&rounds, &attacker);
        let measured = measure(test, lives, options.size(4, 0));
        drop(end);
        attacker.join().expect("the attempt can be made");
        measured
    });
    (
        [
            way("List", list),
            way("List, baseline", baseline_list),
            way("life", life),
            way("life, baseline", baseline_life),
        ],
        rounds.load(Ordering::Relaxed),
    )
}

fn way(name: &str, samples: Vec<Duration>) -> Way {
    let in_tenths = |sample: Duration| (sample.as_secs_f64() * 1e7).round() / 10.0;
    let mut samples: Vec<f64> = samples.into_iter().map(in_tenths).collect();
    samples.sort_by(f64::total_cmp);
    Way {
        name: name.to_owned(),
        samples,
    }
}

/// So many lives of a neighbour, one after the other, for so many seconds at least; and round trips of `List` meanwhile.
fn measure(test: &TestHelper, lives: usize, seconds: u64) -> [Vec<Duration>; 2] {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let lists = scope.spawn(|| {
            let client = test.client();
            let mut lists = Vec::new();
            while !over.load(Ordering::Relaxed) || lists.is_empty() {
                lists.push(time(|| list(&client)));
                std::thread::sleep(PAUSE);
            }
            lists
        });
        let end = StopOnDrop(&over);
        let client = test.client();
        let agent = || sealed_memfd(b"#!/bin/sh\nexec sleep 1000000\n");
        let begin = Instant::now();
        let mut all = Vec::new();
        while all.len() < lives || begin.elapsed() < Duration::from_secs(seconds) {
            let agent = agent();
            all.push(time(|| {
                let worker = create_worker(&client, "neighbour");
                let (reply, _console) = install(&client, worker, agent);
                assert_eq!(reply, Reply::AgentStarted);
                assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
            }));
        }
        drop(end);
        [lists.join().expect("the helper answers"), all]
    })
}

/// Wait until the attempt is being made: the first round has come to its line, or is over.
fn wait_for_first(rounds: &AtomicUsize, attacker: &std::thread::ScopedJoinHandle<'_, ()>) {
    while rounds.load(Ordering::Relaxed) == 0 && !attacker.is_finished() {
        std::thread::sleep(PAUSE);
    }
}

/// Make the attempt in a new worker, let it come to its line and stay for a while, delete it, and begin anew.
fn attack_again_and_again(test: &TestHelper, attempt: &Attempt, over: &AtomicBool, rounds: &AtomicUsize) {
    let client = test.client();
    let args: Vec<&str> = attempt.args.iter().map(String::as_str).collect();
    while !over.load(Ordering::Relaxed) {
        let worker = create_worker(&client, attempt.slot);
        let console = start_attack(&client, worker, attempt.name, &args);
        let ended = |text: &str| text.contains("attempt over");
        let events = client.cgroups.join(worker.to_string()).join("cgroup.events");
        let alive = || fs::read_to_string(&events).is_ok_and(|text| text.contains("populated 1"));
        let begin = Instant::now();
        read_until(&console, |text| {
            let there = text.lines().any(|line| line == attempt.line) || ended(text);
            there || !alive() || begin.elapsed() > BEGINS
        });
        rounds.fetch_add(1, Ordering::Relaxed);
        let begin = Instant::now();
        let text = read_until(&console, |_| {
            !alive() || over.load(Ordering::Relaxed) || begin.elapsed() > STAYS
        });
        // It has failed, and it was made at all.
        let good = !text.contains("BROKEN") && !text.contains("panicked at");
        assert!(good, "{} {args:?}:\n{text}", attempt.name);
        assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    }
}

/// Read the console until it is as it is looked for: twenty times a second, for an attempt may print without end.
fn read_until(console: &File, mut found: impl FnMut(&str) -> bool) -> String {
    loop {
        let text = read(console);
        if found(&text) {
            return text;
        }
        std::thread::sleep(10 * PAUSE);
    }
}
