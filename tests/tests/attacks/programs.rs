//! Row 86: thousands of programs in the kernel, freed at once. On Linux 6.18 no filter could be installed any more
//! afterwards, on the whole host. It can stop a kernel, so nothing here does anything outside of the machine that
//! `tests/machine/run programs` boots. What is attempted is in `hostile-job`'s `programs`.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use protocol::{Exit, Reply, Request, State};
use testbed::harness::{binaries, is_booted_machine, put_program};
use testbed::test_helper::{
    TestHelper, attack_program, create_worker, list, read, run, start_attack, wait_for_line,
};

/// Two hundred processes; sockets in each, or filters as far as the kernel lets one process go.
const PROCESSES: &str = "200";
const EACH: &str = "64";
const LENGTH: &str = "1000";

/// How long a kernel may take for what takes milliseconds.
const HANGS: Duration = Duration::from_secs(120);

const SLOTS: &str = r#"
[slots.a]
target = "01HZX3N8Q4J5K6M7P8R9S0T1V2"
[slots.b]
target = "01HZX3N8Q4J5K6M7P8R9S0T1V2"
allow_user_namespaces = true
[slots.c]
target = "01HZX3N8Q4J5K6M7P8R9S0T1V2"
"#;

fn only_in_the_booted_machine() {
    assert!(
        is_booted_machine(),
        "this can stop the kernel, and is not tried here: use tests/machine/run programs"
    );
}

/// Workers of the kernel that are freeing a program.
fn freeing() -> usize {
    let all = fs::read_dir("/proc").expect("/proc is mounted").flatten();
    all.filter(|entry| {
        let stack = fs::read_to_string(entry.path().join("stack")).unwrap_or_default();
        stack.contains("bpf_prog_free_deferred")
    })
    .count()
}

/// Let the job have the programs that it gets, delete it, and see whether all that installs a filter still works.
fn deleted_with_its_programs(slot: &str, kind: &str) -> String {
    let test = TestHelper::with(SLOTS);
    let client = test.client();
    let worker = create_worker(&client, slot);
    let console = start_attack(&client, worker, "programs", &[kind, PROCESSES, EACH, LENGTH]);
    wait_for_line(&console, "ready");
    let text = read(&console);
    assert!(!text.contains("BROKEN"), "{text}");
    let begin = Instant::now();
    assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    let deleted = begin.elapsed();

    // The next connection, a manual command, a new worker: each installs a filter of its own.
    let client = test.client();
    assert_eq!(list(&client), []);
    let mut manual = Command::new(binaries().join("user-factory"));
    manual.args(["run", "--root"]).arg(&test.host.root);
    let output = manual.args(["--slot", "c", "--", "true"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let next = create_worker(&client, "c");
    let (state, console) = run(&client, next, "exit 7");
    assert_eq!(state, State::Exited(Exit::Status(7)), "{console}");
    println!(
        "{kind} in slot {slot}: {}; deleted in {deleted:.1?}, all else works {:.1?} after that; {} workers of the kernel at it",
        text.lines()
            .find(|line| line.starts_with("had "))
            .unwrap_or_default(),
        begin.elapsed() - deleted,
        freeing(),
    );
    test.finish(&[next]);
    text
}

#[test]
#[ignore = "it can stop a kernel: tests/machine/run programs"]
fn row_86_a_job_gets_no_program_by_the_thousand_either() {
    only_in_the_booted_machine();
    for (slot, kind) in [
        ("a", "socket-filter"),
        ("a", "reuseport"),
        ("a", "seccomp"),
        ("b", "socket-filter"),
        ("b", "reuseport"),
    ] {
        let text = deleted_with_its_programs(slot, kind);
        assert!(text.contains("had 0 programs"), "{text}");
    }
}

#[test]
#[ignore = "it can stop a kernel: tests/machine/run programs"]
fn row_86_filters_of_a_slot_with_user_namespaces_freed_at_once() {
    only_in_the_booted_machine();
    let text = deleted_with_its_programs("b", "seccomp");
    assert!(!text.contains("had 0 programs"), "{text}");
}

/// Outside of a job nothing is refused: what this kernel does with so many. Nothing is promised of it, and after this
/// the machine is good for nothing.
#[test]
#[ignore = "it can stop a kernel, which the scenario `programs` measures"]
fn what_the_kernel_does_outside_of_a_job() {
    only_in_the_booted_machine();
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let limit = fs::read_to_string("/proc/sys/net/core/bpf_jit_limit").unwrap();
    println!(
        "Linux {}, net.core.bpf_jit_limit = {}",
        release.trim(),
        limit.trim()
    );
    let place = tempfile::tempdir().unwrap();
    for (kind, each, length) in [
        ("seccomp", "64", "1000"),
        ("socket-filter", "64", "1000"),
        ("reuseport", "64", "1000"),
        ("socket-filter", "200", "1000"),
    ] {
        let path = place.path().join("program");
        let program = attack_program("programs", &[kind, PROCESSES, each, length]);
        let (own, number) = (std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&program));
        put_program(Path::new(&format!("/proc/{own}/fd/{number}")), &path, 0o755);
        let mut attacker = Command::new(&path);
        let mut attacker = attacker.process_group(0).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(attacker.stdout.take().unwrap()).lines();
        let had: Vec<String> = lines
            .map_while(Result::ok)
            .take_while(|line| line != "ready")
            .collect();
        killpg(Pid::from_raw(attacker.id() as i32), Signal::SIGKILL).unwrap();
        attacker.wait().unwrap();
        let begin = Instant::now();
        // systemd installs a filter for this, as for most of its services.
        let mut unit = Command::new("systemd-run");
        unit.args([
            "--wait",
            "--collect",
            "--quiet",
            "--property=SystemCallFilter=~reboot",
        ]);
        let mut unit = unit
            .args(["--property=NoNewPrivileges=yes", "true"])
            .spawn()
            .unwrap();
        let mut most = 0;
        let ended = loop {
            most = most.max(freeing());
            match unit.try_wait().unwrap() {
                Some(status) => break status.success(),
                None if begin.elapsed() > HANGS => break false,
                None => std::thread::yield_now(),
            }
        };
        println!(
            "{kind}, {length} instructions: {}; all freed at once; a unit with a filter {} after {:.1?}; at most {most} workers of the kernel at it",
            had.concat(),
            if ended { "ran" } else { "HANGS" },
            begin.elapsed(),
        );
        if !ended {
            return;
        }
    }
}
