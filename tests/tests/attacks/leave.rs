//! Group A: a hostile job; what it attempts is in `hostile-job`'s module of the same name.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protocol::{Reply, State, WorkerId};
use testbed::census::{Census, files_anywhere, ipc_of, processes_of};
use testbed::harness::{Client, Running, TestHost, place, tool, worker_id};
use testbed::stage::{
    SLOTS, Stage, attack, create, created, read, start_attack, state, wait_for_line, wait_until,
};

/// Start the attempt and let it get as far as it says with `line`; then it stays. Returns the console so far.
pub fn ongoing(client: &Client, worker: WorkerId, name: &str, words: &[&str], line: &str) -> String {
    let console = start_attack(client, worker, name, words);
    wait_for_line(&console, line);
    let console = read(&console);
    assert!(!console.contains("BROKEN"), "{name}:\n{console}");
    assert_eq!(state(client, worker), State::Running, "{console}");
    console
}

/// The slots, in which jobs may make user namespaces.
pub fn with_user_namespaces() -> String {
    SLOTS.replace("[slots.c]", "[slots.c]\nallow_user_namespaces = true")
}

fn pids(stage: &Stage) -> Vec<i32> {
    let all = processes_of(&stage.host.uids);
    let number = |line: &String| line.split(' ').next().unwrap().parse().unwrap();
    all.iter().map(number).collect()
}

/// The letter of each process's state, as `proc_pid_stat(5)` has it.
fn states(stage: &Stage) -> BTreeSet<char> {
    let of = |pid: i32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("State:"))?;
        line.trim().chars().next()
    };
    pids(stage).into_iter().filter_map(of).collect()
}

#[test]
fn row_01_a_daemon_that_ignores_every_signal_is_gone() {
    let stage = Stage::new();
    let client = stage.client();
    let worker = created(&client, "a");
    let console = start_attack(&client, worker, "daemons", &[]);
    for number in 0..5 {
        wait_for_line(&console, &format!("daemon {number} lives"));
    }
    wait_for_line(&console, "attempt over");
    // The program has ended; what it left behind has not, and nothing but SIGKILL ends it.
    let daemons = pids(&stage);
    for pid in &daemons {
        for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT] {
            kill(Pid::from_raw(*pid), signal).ok();
        }
    }
    let left = pids(&stage);
    assert!(left.len() >= 5, "{left:?} of {daemons:?}");
    assert_eq!(state(&client, worker), State::Running);
    stage.finish(&[worker]);
}

#[test]
fn row_02_fork_bombs_are_gone_also_one_that_is_faster_than_killing_each() {
    let stage = Stage::new();
    let client = stage.client();
    let (grow, relay) = (created(&client, "a"), created(&client, "c"));
    ongoing(&client, grow, "fork-bomb", &["grow"], "ready");
    ongoing(&client, relay, "fork-bomb", &["relay"], "ready");
    assert!(pids(&stage).len() > 300, "the bomb is none");
    stage.finish(&[grow, relay]);
}

#[test]
fn row_03_stopped_traced_and_vforking_processes_are_gone() {
    let stage = Stage::new();
    let client = stage.client();
    let worker = created(&client, "a");
    let console = start_attack(&client, worker, "hard-to-kill", &[]);
    wait_for_line(&console, "ready");
    wait_for_line(&console, "in vfork");
    for state in ['T', 't', 'D'] {
        assert!(
            states(&stage).contains(&state),
            "{:?}\n{}",
            states(&stage),
            read(&console)
        );
    }
    stage.finish(&[worker]);
}

#[test]
fn row_04_a_process_cannot_leave_its_cgroup() {
    let stage = Stage::new();
    let client = stage.client();
    let worker = created(&client, "a");
    ongoing(&client, worker, "cgroups", &[], "ready");
    let all = pids(&stage);
    assert!(all.len() >= 2, "{all:?}");
    for pid in all {
        let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        let own = format!("{}/workers/{worker}", stage.host.cgroup);
        let line = cgroups.lines().find(|line| line.starts_with("0::")).unwrap();
        assert!(line.ends_with(&own), "{cgroups}");
    }
    stage.finish(&[worker]);
}

#[test]
fn row_05_files_in_every_directory_are_refused_or_private_and_none_is_left_on_any_file_system() {
    let stage = Stage::new();
    let client = stage.client();
    let worker = created(&client, "a");
    let name = format!("left-by-{worker}");
    let console = ongoing(&client, worker, "files-everywhere", &[&name], "ready");
    let own = [
        "/home/bmat-",
        "/work",
        "/tmp",
        "/var/tmp",
        "/input",
        "/opt/buildomat",
        "/run/buildomat",
        "/dev/shm",
        "/dev/mqueue",
        "/srv/of-the-job",
    ];
    let written: Vec<&str> = console
        .lines()
        .filter_map(|line| line.strip_prefix("wrote "))
        .collect();
    assert!(written.len() >= own.len() - 2, "{console}");
    for file in written {
        assert!(own.iter().any(|place| file.starts_with(place)), "{file}");
        // The host has nothing at that path: what the job wrote is its own.
        assert!(!Path::new(file).exists(), "{file} is on the host");
    }
    let uids = stage.host.uids.clone();
    let workers = stage.host.worker_dir(worker);
    let meanwhile = files_anywhere(&uids);
    assert!(
        !meanwhile.is_empty() && meanwhile.iter().all(|path| path.starts_with(&workers)),
        "{meanwhile:?}"
    );
    stage.finish(&[worker]);
    assert_eq!(files_anywhere(&uids), BTreeSet::new());
}

#[test]
fn row_06_system_v_objects_are_the_jobs_own_and_gone() {
    let stage = Stage::new();
    let client = stage.client();
    let worker = created(&client, "a");
    ongoing(&client, worker, "system-v", &[], "ready");
    assert_eq!(ipc_of(&stage.host.uids), BTreeSet::new(), "the host sees them");
    stage.finish(&[worker]);
}

#[test]
fn row_07_posix_queues_and_semaphores_are_the_jobs_own_and_gone() {
    let stage = Stage::new();
    let client = stage.client();
    let worker = created(&client, "a");
    let name = format!("left-by-{worker}");
    ongoing(&client, worker, "posix-ipc", &[&name], "ready");
    let on_the_host = || {
        // In a mount namespace that ends with the command: a mount of the host's would concern other tests.
        let list = "mount -t mqueue none /mnt && ls /mnt /dev/shm";
        let output = Command::new("unshare")
            .args(["-m", "sh", "-c", list])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(!on_the_host().contains(&name));
    stage.finish(&[worker]);
    assert!(!on_the_host().contains(&name));
}

#[test]
fn row_08_a_job_gets_no_key_that_could_outlive_it() {
    let stage = Stage::new();
    let client = stage.client();
    let worker = created(&client, "a");
    attack(&client, worker, "keys", &[]);
    stage.finish(&[worker]);
}

#[test]
fn row_09_no_service_of_the_host_takes_an_order() {
    let stage = Stage::new();
    let client = stage.client();
    let worker = created(&client, "a");
    attack(&client, worker, "services", &[]);
    stage.finish(&[worker]);
}

#[test]
fn row_10_sockets_fifos_and_whiteouts_are_gone_and_devices_refused() {
    let stage = Stage::new();
    let client = stage.client();
    let worker = created(&client, "a");
    ongoing(&client, worker, "nodes", &[], "ready");
    let work = stage.host.worker_dir(worker).join("fs/work");
    let kind = |name: &str| work.join(name).symlink_metadata().unwrap().file_type();
    assert!(kind("socket").is_socket() && kind("fifo").is_fifo() && kind("whiteout").is_char_device());
    stage.finish(&[worker]);
}

#[test]
fn row_11_no_descriptor_can_be_handed_to_another_job() {
    let stage = Stage::new();
    let client = stage.client();
    let holder = worker_id();
    let Reply::UserCreated { uid, .. } = create(&client, holder, "a") else {
        panic!()
    };
    let other = created(&client, "c");
    // The census knows a Unix socket's owner by this name alone.
    let name = format!("uid-{uid}-door");
    ongoing(&client, holder, "door", &[&name], "ready");
    attack(&client, other, "knock", &[&name]);
    stage.finish(&[holder, other]);
}

#[test]
fn row_12_user_namespaces_are_refused_unless_the_slot_allows_them_and_then_leave_nothing() {
    let stage = Stage::with(&with_user_namespaces());
    let client = stage.client();
    let (refused, allowed) = (created(&client, "a"), created(&client, "c"));
    ongoing(&client, allowed, "user-namespace", &["allowed"], "ready");
    let bound = stage.host.worker_dir(allowed).join("fs/work/bound");
    assert_eq!(
        fs::read_dir(&bound).unwrap().count(),
        0,
        "its mounts are not its own"
    );
    attack(&client, refused, "user-namespace", &["refused"]);
    stage.finish(&[refused, allowed]);
}

#[test]
fn row_13_watches_terminals_and_a_lock_on_a_host_file_are_gone() {
    let place = place();
    let path = place.path().join("of-the-host");
    fs::write(&path, "x").unwrap();
    let stage = Stage::new();
    let client = stage.client();
    let worker = created(&client, "a");
    ongoing(
        &client,
        worker,
        "watches-and-locks",
        &[path.to_str().unwrap()],
        "ready",
    );
    let lock = || Flock::lock(File::open(&path).unwrap(), FlockArg::LockExclusiveNonblock);
    assert!(lock().is_err(), "the job has no lock");
    stage.finish(&[worker]);
    lock().expect("the lock is free again");
}

#[test]
fn row_14_no_crash_leaves_a_core_whatever_the_job_does_to_its_limit() {
    let stage = Stage::new();
    let client = stage.client();
    let worker = created(&client, "a");
    attack(&client, worker, "crash", &[]);
    stage.finish(&[worker]);
}

#[test]
fn row_15_a_port_that_an_escaped_daemon_listens_at_is_free_again() {
    let stage = Stage::new();
    let client = stage.client();
    let worker = created(&client, "a");
    let console = start_attack(&client, worker, "listen", &[]);
    wait_for_line(&console, "ready");
    wait_for_line(&console, "attempt over");
    let console = read(&console);
    let addresses: Vec<&str> = console
        .lines()
        .filter_map(|line| line.strip_prefix("listens "))
        .collect();
    assert!(addresses.len() >= 2, "{console}");
    for address in &addresses {
        TcpStream::connect(address).expect("the daemon listens");
    }
    assert_ne!(Census::take(&stage.host), stage.before);
    stage.finish(&[worker]);
    for address in addresses {
        TcpListener::bind(address).expect("the port is free");
    }
}

#[test]
fn row_16_no_record_of_a_login_is_written() {
    let records = || {
        [
            "/run/utmp",
            "/var/log/wtmp",
            "/var/log/btmp",
            "/var/log/lastlog",
            "/var/log/faillog",
        ]
        .map(|path| {
            let meta = fs::metadata(path).ok()?;
            // lastlog is sparse: a record of a huge uid shows in its length, not in its blocks.
            Some((meta.len(), meta.blocks(), meta.mtime(), meta.mtime_nsec()))
        })
    };
    let before = records();
    let stage = Stage::new();
    let client = stage.client();
    let worker = created(&client, "a");
    let console = attack(&client, worker, "accounting", &[]);
    wait_until(&client, worker, |state| state != State::Running);
    assert_eq!(records(), before, "{console}");
    stage.finish(&[worker]);
}

#[test]
fn row_93_a_socket_that_gets_whole_cores_is_warned_about_at_the_start() {
    // The helper alone sees this setting: it is the whole machine's, which has other work.
    for (pattern, warnings) in [("@/run/cores.sock", 1), ("|/usr/bin/true %P", 0), ("core", 0)] {
        let host = TestHost::new();
        host.configure("http://127.0.0.1:9", 0, SLOTS);
        let setting = host.root.join("core_pattern");
        std::fs::write(&setting, format!("{pattern}\n")).unwrap();
        let own = host.helper_command();
        let mut command = Command::new(tool("unshare", "util-linux"));
        command.args(["--mount", "--propagation", "private", "bash", "-euc"]);
        command.arg("mount --bind \"$0\" /proc/sys/kernel/core_pattern; exec \"$@\"");
        command.arg(&setting).arg(own.get_program()).args(own.get_args());
        let helper = Running::start(&mut command);
        helper.log.wait(&["serving"]);
        let told = [
            "WARN",
            "NOT ENFORCED",
            "core_pattern",
            pattern,
            "set it to a file",
        ];
        assert_eq!(helper.log.count(&told), warnings, "{}", helper.log.text());
    }
}
