//! Rows 97 to 99: a job takes as much as it gets of what the kernel counts for the whole host, for each user, or for
//! nobody. What is bounded is tested here; what is not is measured by the scenario `held`, and written down in
//! docs/limits.md. What is attempted is in `hostile-job`'s `kernel_objects`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use nix::fcntl::{Flock, FlockArg};
use nix::unistd::{SysconfVar, sysconf};
use protocol::{Exit, Reply, Request, State, WorkerId};
use testbed::harness::{Client, PAUSE, TEST_TIMEOUT, binaries, create_shared_dir, is_booted_machine};
use testbed::test_helper::{TestHelper, attack, create_worker, list, read, run, start_attack, state};

use crate::attacks::controllers::{LIMIT, SLACK, number};
use crate::attacks::exhaustion::slots;
use crate::attacks::leftovers::ongoing;

/// What each process of a job may lock (`RLIMIT_MEMLOCK`); how many there are is limited, too.
const LOCKED: u64 = 8 << 20;

/// Let a new worker in this slot take of a kind: so many processes, so much each. What it got, and what it said.
fn take_objects(
    client: &Client,
    slot: &str,
    kind: &str,
    processes: u64,
    each: u64,
) -> (WorkerId, u64, String) {
    let worker = create_worker(client, slot);
    let args = [kind, &processes.to_string(), &each.to_string()];
    let console = ongoing(client, worker, "hold", &args, "ready");
    let (got, line) = amount(&console, kind);
    (worker, got, line)
}

fn amount(console: &str, kind: &str) -> (u64, String) {
    let line = console.lines().find(|line| line.starts_with("taken "));
    let line = line.unwrap_or_else(|| panic!("no count of {kind}:\n{console}"));
    let got = line.split(' ').nth(1).and_then(|word| word.parse().ok());
    (got.expect("it is a number"), line.to_owned())
}

/// The numbers of a file below `/proc/sys`.
fn settings(name: &str) -> Vec<u64> {
    let path = Path::new("/proc/sys").join(name);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
    let numbers = text.split_whitespace().map(str::parse);
    numbers
        .collect::<Result<_, _>>()
        .unwrap_or_else(|error| panic!("{path:?}: {error}"))
}

fn setting(name: &str) -> u64 {
    settings(name)[0]
}

#[test]
fn row_97_what_is_counted_for_each_user_or_job_leaves_the_neighbour_its_own() {
    let limits = "processes = 64\nopen_files = 2048";
    let text = slots(&[("a", limits), ("c", limits)]);
    let test = TestHelper::with(
        &text
            .replace("[slots.a]\n", "[slots.a]\nallow_user_namespaces = true\n")
            .replace("[slots.c]\n", "[slots.c]\nallow_user_namespaces = true\n"),
    );
    let client = test.client();
    // Beyond the soft limit a pipe has two pages at most.
    let page = sysconf(SysconfVar::PAGE_SIZE).unwrap().unwrap() as u64;
    let pipes = (setting("fs/pipe-user-pages-soft") + 4 * 200 * 2) * page;
    let instances = setting("fs/inotify/max_user_instances");
    for (kind, processes, each, most, neighbours, least) in [
        ("signals", 8, 20_000, 16_384, 1_000, 1_000),
        ("timers", 8, 20_000, 16_384, 1_000, 1_000),
        ("pipes", 4, 200, pipes, 10, 10 << 16),
        ("terminals", 8, 1_000, 128, 20, 20),
        ("inotify-instances", 8, 1_000, instances, 20, 20),
        ("queues", 4, 50, 10, 3, 3),
        ("shared-memory", 4, 5_000, 4_096, 100, 100),
        ("semaphores", 4, 33_000, 32_000, 100, 100),
        ("locked-memory", 8, 4_096, 8 * LOCKED, 100, 100 * page),
        ("processes", 4, 1_000, 64, 20, 20),
        ("namespaces", 4, 1_000, 64, 5, 5),
    ] {
        let (greedy, got, line) = take_objects(&client, "a", kind, processes, each);
        assert!((most / 4..=most).contains(&got), "{kind}: {line}; at most {most}");
        // Pipes are there without end, and small from then on.
        assert!(
            kind == "pipes" || !line.contains("took all that they wanted"),
            "{kind}: no end was met: {line}"
        );
        let (modest, got, line) = take_objects(&client, "c", kind, 1, neighbours);
        assert!(got >= least, "{kind}: the neighbour: {line}");
        test.delete(&[greedy, modest]);
    }
    test.finish(&[]);
}

#[test]
#[ignore = "needs the memory controller: tests/machine/run limits"]
fn row_97_what_the_kernel_keeps_for_a_job_is_memory_of_the_jobs() {
    let test = TestHelper::with(&slots(&[("a", &format!("memory = {LIMIT}")), ("c", "")]));
    let client = test.client();
    for (kind, processes, each) in [
        ("files", 16, 100_000),
        ("missing-names", 1, 400_000),
        ("epoll-watches", 8, 100_000),
        ("timers", 1, 20_000),
        ("socket-buffers", 8, 1_000),
        ("tcp-buffers", 8, 1_000),
        ("pipes", 8, 1_000),
    ] {
        let worker = create_worker(&client, "a");
        let args = [kind, &processes.to_string(), &each.to_string()];
        let console = start_attack(&client, worker, "hold", &args);
        // It may have all, its processes may be ended for it, the first one too, or it may wait at the limit for ever.
        let begin = Instant::now();
        let how = loop {
            if read(&console).lines().any(|line| line == "ready") {
                break "had all";
            }
            if state(&client, worker) != State::Running {
                break "was ended";
            }
            if number(&test, worker, "memory.current") + SLACK >= number(&test, worker, "memory.high") {
                break "is at its limit";
            }
            assert!(begin.elapsed() < TEST_TIMEOUT, "{kind}: {}", read(&console));
            std::thread::sleep(PAUSE);
        };
        let neighbour = create_worker(&client, "c");
        attack(&client, neighbour, "take-a-little", &[]);
        let peak = number(&test, worker, "memory.peak");
        println!(
            "{kind}: it {how}, {peak} bytes at most; {}",
            read(&console).trim()
        );
        assert!(peak <= LIMIT + SLACK, "{kind}: {peak}");
        test.delete(&[worker, neighbour]);
    }
    test.finish(&[]);
}

#[test]
fn row_98_without_the_hosts_network_names_and_ports_are_the_jobs_own() {
    let text = slots(&[("a", ""), ("c", "")]).replace("]\ntarget", "]\nnetwork = \"none\"\ntarget");
    let test = TestHelper::with(&text);
    let client = test.client();
    // First and last (ip_sysctl.rst).
    let range = settings("net/ipv4/ip_local_port_range");
    let ports = range[1] - range[0] + 1;
    for (kind, all, wanted) in [
        ("abstract-names", 1_000, 1_000),
        ("tcp-ports", ports, 100),
        ("udp-ports", ports, 100),
    ] {
        // Two processes: one may not have so many files open.
        let (first, had, line) = take_objects(&client, "a", kind, 2, all);
        assert_eq!(had, all, "{kind}: {line}");
        let (second, got, other) = take_objects(&client, "c", kind, 1, wanted);
        assert_eq!(got, wanted, "{kind}: {other}, while another job: {line}");
        // Nor are they the host's.
        TcpListener::bind("127.0.0.1:0").expect("the host has ports");
        test.delete(&[first, second]);
    }
    test.finish(&[]);
}

#[test]
fn row_99_the_helper_waits_for_no_lock_that_a_job_can_take() {
    // A job has a passwd and a group of its own; the host's are seen where a slot shows them.
    let slot =
        |name: &str, lines: &str| format!("[slots.{name}]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n{lines}");
    let shows = slot("a", "read_only = { \"/opt/etc\" = \"/etc\" }\n");
    let test = TestHelper::with(&(shows + &slot("c", "")));
    let client = test.client();
    let place = create_shared_dir();
    let file = place.path().join("file");
    fs::write(&file, "of the host").unwrap();
    // All that the helper opens and a job can see; and the host's own file.
    let mut files: Vec<String> = [
        "/opt/etc",
        "/opt/etc/passwd",
        "/opt/etc/group",
        "/opt/etc/subuid",
        "/opt/etc/subgid",
        "/etc/passwd",
        "/etc/group",
        "/etc/subuid",
        "/etc/subgid",
        "/etc/hosts",
        "/etc",
        "/",
        "/dev",
        "/proc",
        "/usr/bin/env",
    ]
    .map(str::to_owned)
    .into();
    files.push(file.display().to_string());
    files.push(test.host.root.display().to_string());
    files.push(binaries().join("user-factory-helper").display().to_string());
    let holder = create_worker(&client, "a");
    let args: Vec<&str> = ["locks-of-the-host"]
        .into_iter()
        .chain(files.iter().map(String::as_str))
        .collect();
    let console = ongoing(&client, holder, "hold", &args, "ready");
    for taken in ["/opt/etc/passwd", "/opt/etc/group", &file.display().to_string()] {
        assert!(console.contains(&format!("lock of {taken}: Ok(0)")), "{console}");
    }
    // Not promised: who waits for the lock of a file that jobs can read, waits as long as the job holds it.
    let lock = || Flock::lock(File::open(&file).unwrap(), FlockArg::LockExclusiveNonblock).is_ok();
    assert!(!lock());
    // What the helper does goes on.
    let next = create_worker(&client, "c");
    let (ended, text) = run(&client, next, "exit 7");
    assert_eq!(ended, State::Exited(Exit::Status(7)), "{text}");
    assert_eq!(client.ask(&Request::Delete { worker: holder }).0, Reply::Deleted);
    assert!(lock(), "the lock is held by nobody any more");
    test.finish(&[next]);
}

/// The host's own counts, before and while a job holds what it got.
fn counts() -> BTreeMap<&'static str, String> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_else(|error| error.to_string());
    let line = |path: &str, starts: &[&str]| {
        let text = read(path);
        let found = text
            .lines()
            .filter(|line| starts.iter().any(|start| line.starts_with(start)));
        found.collect::<Vec<_>>().join(", ").replace('\t', " ")
    };
    BTreeMap::from([
        (
            "fs.file-nr",
            read("/proc/sys/fs/file-nr").trim().replace('\t', " "),
        ),
        (
            "fs.dentry-state",
            read("/proc/sys/fs/dentry-state").trim().replace('\t', " "),
        ),
        ("kernel.pty.nr", read("/proc/sys/kernel/pty/nr").trim().to_owned()),
        ("sockstat", line("/proc/net/sockstat", &["TCP", "UDP:"])),
        (
            "meminfo",
            line(
                "/proc/meminfo",
                &["MemAvailable", "Slab", "HugePages_Free", "SwapFree"],
            ),
        ),
        ("locks", read("/proc/locks").lines().count().to_string()),
        (
            "conntrack",
            read("/proc/sys/net/netfilter/nf_conntrack_count")
                .trim()
                .to_owned(),
        ),
        ("loadavg", read("/proc/loadavg").trim().to_owned()),
        (
            "cgroups",
            line("/sys/fs/cgroup/cgroup.stat", &["nr_dying_descendants "]),
        ),
        ("kernel's log, in lines", {
            let output = Command::new("dmesg").output().expect("every host has dmesg");
            String::from_utf8_lossy(&output.stdout)
                .lines()
                .count()
                .to_string()
        }),
    ])
}

/// What one job can have of what nothing of ours bounds, and what is then left: printed, for docs/limits.md.
#[test]
#[ignore = "it takes what the whole host has, which the scenario `held` measures"]
fn what_one_job_leaves_to_the_host() {
    assert!(
        is_booted_machine(),
        "this takes what the whole host has: use tests/machine/run held"
    );
    fs::write("/proc/sys/vm/nr_hugepages", "16").unwrap();
    for name in [
        "fs/file-max",
        "fs/pipe-user-pages-soft",
        "fs/epoll/max_user_watches",
        "fs/inotify/max_user_watches",
        "fs/inotify/max_user_instances",
        "kernel/pid_max",
        "kernel/threads-max",
        "kernel/pty/max",
        "kernel/pty/reserve",
        "user/max_user_namespaces",
        "net/ipv4/tcp_mem",
        "net/ipv4/ip_local_port_range",
        "net/netfilter/nf_conntrack_max",
        "vm/nr_hugepages",
    ] {
        let text = fs::read_to_string(Path::new("/proc/sys").join(name));
        println!(
            "{name} = {}",
            text.unwrap_or_else(|error| error.to_string())
                .trim()
                .replace('\t', " ")
        );
    }
    let text = slots(&[("a", ""), ("c", "")]).replace("]\ntarget", "]\nallow_user_namespaces = true\ntarget");
    let test = TestHelper::with(&text);
    for (kind, processes, each, neighbours) in [
        ("pipes", 4, 1_000, 10),
        ("socket-buffers", 4, 500, 10),
        ("tcp-buffers", 4, 200, 10),
        ("signals", 4, 20_000, 100),
        ("timers", 4, 20_000, 100),
        ("locks", 4, 30_000, 100),
        ("leases", 4, 30_000, 100),
        ("locked-memory", 16, 4_096, 100),
        ("shared-memory", 4, 2_000, 100),
        ("semaphores", 4, 20_000, 100),
        ("queues", 4, 50, 3),
        ("epoll-watches", 4, 300_000, 1_000),
        ("inotify-instances", 4, 200, 10),
        ("inotify-watches", 2, 40_000, 100),
        ("terminals", 4, 2_000, 10),
        ("namespaces", 4, 500, 5),
        ("processes", 4, 20_000, 10),
        ("files", 4, 200_000, 100),
        ("missing-names", 2, 200_000, 10),
        ("mounts", 1, 5_000, 10),
        ("huge-pages", 1, 100, 1),
        ("tcp-ports", 2, 40_000, 10),
        ("udp-ports", 2, 40_000, 10),
        ("abstract-names", 1, 1_000, 1_000),
        ("connections", 2, 200_000, 10),
        ("crashes", 1, 500, 1),
    ] {
        let client = test.client();
        let before = counts();
        let (greedy, _, line) = take_objects(&client, "a", kind, processes, each);
        let during = counts();
        let (modest, _, other) = take_objects(&client, "c", kind, 1, neighbours);
        println!("\n{kind}\n  the job:       {line}\n  its neighbour: {other}");
        for (name, now) in &during {
            if before[name] != *now {
                println!("  {name}: {} before, {now} now", before[name]);
            }
        }
        let ports = TcpListener::bind("127.0.0.1:0").map(drop);
        let terminal = File::options().read(true).write(true).open("/dev/ptmx").map(drop);
        let start = Command::new("true").status().map(drop);
        let nobodys = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "true"])
            .status();
        println!(
            "  the host: a port {ports:?}, a terminal {terminal:?}, a process {start:?}, an ordinary user's {nobodys:?}"
        );
        test.delete(&[greedy, modest]);
        let after = counts();
        println!(
            "  after Delete: {}",
            ["fs.dentry-state", "cgroups", "meminfo"]
                .map(|name| after[name].clone())
                .join("; ")
        );
        assert_eq!(list(&test.client()), []);
    }
    test.finish(&[]);
}
