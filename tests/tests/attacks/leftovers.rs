//! Group A: a hostile job; what it attempts is in `hostile-job`'s module of the same name.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::attacks::canaries::Canaries;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User};
use protocol::{Reply, Request, State, WorkerId};
use supervisor::residue::files;
use testbed::harness::{
    Client, Running, TestHost, assert_warned, create_shared_dir, has_scopes, tool, until_is, worker_id,
};
use testbed::host_snapshot::{HostSnapshot, files_anywhere, ipc_of, processes_of};
use testbed::small_disk::SmallDisk;
use testbed::test_helper::{
    SLOTS, TestHelper, attack, create, create_worker, read, start_attack, state, wait_for_line,
};

/// Start the attempt and let it get as far as it says with `line`; then it stays. Returns the console so far.
pub fn ongoing(client: &Client, worker: WorkerId, name: &str, args: &[&str], line: &str) -> String {
    let console = start_attack(client, worker, name, args);
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

fn pids(test: &TestHelper) -> Vec<i32> {
    let all = processes_of(&test.host.uids);
    let number = |line: &String| line.split(' ').next().unwrap().parse().unwrap();
    all.iter().map(number).collect()
}

/// The letter of each process's state, as `proc_pid_stat(5)` has it.
fn states(test: &TestHelper) -> BTreeSet<char> {
    let of = |pid: i32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("State:"))?;
        line.trim().chars().next()
    };
    pids(test).into_iter().filter_map(of).collect()
}

#[test]
fn row_01_a_daemon_that_ignores_every_signal_is_gone() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    let console = start_attack(&client, worker, "daemons", &[]);
    for number in 0..5 {
        wait_for_line(&console, &format!("daemon {number} is running"));
    }
    wait_for_line(&console, "attempt over");
    // The program has ended; what it left behind has not, and nothing but SIGKILL ends it.
    let daemons = pids(&test);
    for pid in &daemons {
        for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT] {
            kill(Pid::from_raw(*pid), signal).ok();
        }
    }
    let left = pids(&test);
    assert!(left.len() >= 5, "{left:?} of {daemons:?}");
    assert_eq!(state(&client, worker), State::Running);
    test.finish(&[worker]);
}

#[test]
fn row_02_fork_bombs_are_gone_also_one_that_is_faster_than_killing_each() {
    let test = TestHelper::new();
    let client = test.client();
    let (grow, relay) = (create_worker(&client, "a"), create_worker(&client, "c"));
    // The one that takes all processors comes last: where no controller limits them, little would begin beside it.
    ongoing(&client, relay, "fork-bomb", &["relay"], "ready");
    ongoing(&client, grow, "fork-bomb", &["grow"], "ready");
    // A process that ends at the moment makes room for one: both go on.
    until_is("more than 300 processes", || pids(&test).len() > 300);
    test.finish(&[grow, relay]);
}

#[test]
fn row_03_stopped_traced_and_vforking_processes_are_gone() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    let console = start_attack(&client, worker, "hard-to-kill", &[]);
    wait_for_line(&console, "ready");
    wait_for_line(&console, "in vfork");
    for state in ['T', 't', 'D'] {
        assert!(
            states(&test).contains(&state),
            "{:?}\n{}",
            states(&test),
            read(&console)
        );
    }
    test.finish(&[worker]);
}

#[test]
fn row_04_a_process_cannot_leave_its_cgroup() {
    let test = TestHelper::with(&with_user_namespaces());
    let client = test.client();
    let workers = [("a", "no clone3"), ("c", "clone3")].map(|(slot, how)| {
        let worker = create_worker(&client, slot);
        ongoing(&client, worker, "cgroups", &[how], "ready");
        worker
    });
    let own = workers.map(|worker| format!("{}/workers/{worker}", test.host.cgroup));
    let all = pids(&test);
    assert!(all.len() >= 4, "{all:?}");
    for pid in all {
        let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        let line = cgroups.lines().find(|line| line.starts_with("0::")).unwrap();
        assert!(own.iter().any(|own| line.ends_with(own)), "{cgroups}");
    }
    test.finish(&workers);
}

#[test]
fn row_05_files_in_every_directory_are_refused_or_private_and_none_is_left_on_any_file_system() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
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
        "/run/lock",
        "/var/lock",
        "/run/screen",
        "/run/user",
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
    let uids = test.host.uids.clone();
    let workers = test.host.worker_dir(worker);
    // Files that are there are found.
    assert!(!files::below(&workers, &uids.clone().into(), |_| false).is_empty());
    test.finish(&[worker]);
    assert_eq!(files_anywhere(&uids), BTreeSet::new());
}

#[test]
fn row_05_no_file_of_the_host_is_changed_though_everybody_may_write_it() {
    let memory = create_shared_dir();
    let _disk = SmallDisk::in_memory_at(memory.path().to_owned());
    let places = ["/srv", "/var/lib", "/opt", "/usr/local"].map(Path::new);
    let canaries: Vec<Canaries> = places
        .into_iter()
        .chain([memory.path()])
        .map(Canaries::below)
        .collect();
    let before: Vec<_> = canaries.iter().map(Canaries::state).collect();
    // One of them is what the slots show elsewhere.
    let shown = canaries[0].open.display();
    let slots = with_user_namespaces().replace("\"/usr/share\"", &format!("\"{shown}\""));
    let test = TestHelper::with(&slots);
    let client = test.client();
    for (slot, how) in [("a", "alone"), ("c", "namespaces")] {
        let mut args = vec![how];
        args.extend(canaries.iter().map(|canaries| canaries.args()[1]));
        if slot == "a" {
            args.push("/opt/shown");
        }
        let worker = create_worker(&client, slot);
        attack(&client, worker, "host-files", &args);
        test.delete(&[worker]);
    }
    let after: Vec<_> = canaries.iter().map(Canaries::state).collect();
    assert_eq!(after, before);
    test.finish(&[]);
}

#[test]
fn row_06_system_v_objects_are_the_jobs_own_and_gone() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    ongoing(&client, worker, "system-v", &[], "ready");
    assert_eq!(ipc_of(&test.host.uids), BTreeSet::new(), "the host sees them");
    test.finish(&[worker]);
}

#[test]
fn row_07_posix_queues_and_semaphores_are_the_jobs_own_and_gone() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
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
    test.finish(&[worker]);
    assert!(!on_the_host().contains(&name));
}

#[test]
fn row_08_a_job_gets_no_key_that_could_outlive_it() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    attack(&client, worker, "keys", &[]);
    test.finish(&[worker]);
}

/// Commands that ask services of the host to do something. The first take what `order` has in it, or are asked of the
/// D-Bus at this address: an ordinary user outside of every job may do that on any host.
fn requests(order: &str, bus: &str) -> [Vec<Vec<String>>; 2] {
    let everybody = format!(
        "crontab {order}
         crontab -r
         at -f {order} now + 1 year
         batch
         dbus-send --bus={bus} --print-reply --dest=org.freedesktop.DBus / org.freedesktop.DBus.ListNames
         busctl --address={bus} list"
    );
    let of_systemd = "systemd-run --user true
         systemd-run true
         systemctl --user start default.target
         loginctl enable-linger
         busctl call org.freedesktop.systemd1 /org/freedesktop/systemd1 org.freedesktop.systemd1.Manager Reload
         dbus-send --system --print-reply --dest=org.freedesktop.DBus / org.freedesktop.DBus.ListNames
         dbus-send --session --print-reply --dest=org.freedesktop.DBus / org.freedesktop.DBus.ListNames";
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect();
    [&*everybody, of_systemd].map(|text| text.lines().map(words).collect())
}

#[test]
fn row_09_no_service_of_the_host_takes_a_request() {
    for program in ["crontab", "at", "dbus-daemon", "busctl"] {
        tool(program);
    }
    let place = create_shared_dir();
    let order = place.path().join("order");
    fs::write(&order, "0 0 1 1 * true\n").unwrap();
    // A bus for everybody, in /run, as the host's is.
    let run = tempfile::tempdir_in("/run").unwrap();
    fs::set_permissions(run.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let bus = format!("unix:path={}", run.path().join("bus").display());
    let rules = "<policy context=\"default\"><allow user=\"*\"/><allow send_destination=\"*\"/><allow receive_sender=\"*\"/></policy>";
    let config = format!("<busconfig><listen>{bus}</listen><auth>EXTERNAL</auth>{rules}</busconfig>");
    fs::write(run.path().join("config"), config).unwrap();
    let mut daemon = Command::new("dbus-daemon");
    daemon.args(["--nofork", "--print-address"]).stderr(Stdio::null());
    daemon.arg(format!("--config-file={}", run.path().join("config").display()));
    let daemon = Running::start_logging_stdout(&mut daemon);
    daemon.log.wait(&["unix:path="]);

    // An ordinary user, whom Debian's cron and at do not turn away as they do most of the system's own.
    let user = User::from_name("_apt").unwrap().expect("Debian has this user");
    let ask = |words: &[String]| {
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdin(File::open(&order).unwrap());
        command
            .uid(user.uid.as_raw())
            .gid(user.gid.as_raw())
            .current_dir("/");
        command.output().unwrap()
    };
    let [everybody, of_systemd] = requests(order.to_str().unwrap(), &bus);
    for words in &everybody {
        let output = ask(words);
        assert!(output.status.success(), "the host refuses {words:?}: {output:?}");
    }
    let queue = String::from_utf8(ask(&["atq".to_owned()]).stdout).unwrap();
    for job in queue.lines().filter_map(|line| line.split_whitespace().next()) {
        ask(&["atrm".to_owned(), job.to_owned()]);
    }

    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    let [everybody, _] = requests("/work/order", &bus);
    let all: Vec<String> = everybody
        .iter()
        .chain(&of_systemd)
        .map(|words| words.join("\u{1f}"))
        .collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    attack(&client, worker, "services", &all);
    test.finish(&[worker]);
}

#[test]
fn row_10_sockets_fifos_and_whiteouts_are_gone_and_devices_refused() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    ongoing(&client, worker, "nodes", &[], "ready");
    let work = test.host.worker_dir(worker).join("fs/work");
    let kind = |name: &str| work.join(name).symlink_metadata().unwrap().file_type();
    assert!(kind("socket").is_socket() && kind("fifo").is_fifo() && kind("whiteout").is_char_device());
    test.finish(&[worker]);
}

#[test]
fn row_11_no_descriptor_can_be_handed_to_another_job() {
    let slot =
        |name| format!("[slots.{name}]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\nnetwork = \"none\"\n");
    let test = TestHelper::with(&format!("{SLOTS}{}{}", slot("alone"), slot("remote")));
    let client = test.client();
    let mut workers = Vec::new();
    for [one, other] in [["a", "c"], ["alone", "remote"]] {
        if one == "a" && !has_scopes() {
            assert_warned(
                &test.helper,
                "abstract sockets and signals are not kept within jobs",
            );
            continue;
        }
        let holder = worker_id();
        let Reply::UserCreated { uid, .. } = create(&client, holder, one) else {
            panic!()
        };
        let other = create_worker(&client, other);
        // The snapshot knows a Unix socket's owner by this name alone.
        let name = format!("uid-{uid}-listener");
        ongoing(&client, holder, "listener", &[&name], "ready");
        attack(&client, other, "connect-to-other-job", &[&name]);
        workers.extend([holder, other]);
    }
    test.finish(&workers);
}

#[test]
fn row_12_user_namespaces_are_refused_unless_the_slot_allows_them_and_then_leave_nothing() {
    let test = TestHelper::with(&with_user_namespaces());
    let client = test.client();
    let (refused, allowed) = (create_worker(&client, "a"), create_worker(&client, "c"));
    ongoing(&client, allowed, "user-namespace", &["allowed"], "ready");
    let bound = test.host.worker_dir(allowed).join("fs/work/bound");
    assert_eq!(
        fs::read_dir(&bound).unwrap().count(),
        0,
        "its mounts are not its own"
    );
    attack(&client, refused, "user-namespace", &["refused"]);
    test.finish(&[refused, allowed]);
}

#[test]
fn row_13_watches_terminals_and_a_lock_on_a_host_file_are_gone() {
    let place = create_shared_dir();
    let path = place.path().join("of-the-host");
    fs::write(&path, "x").unwrap();
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    ongoing(
        &client,
        worker,
        "watches-and-locks",
        &[path.to_str().unwrap()],
        "ready",
    );
    let lock = || Flock::lock(File::open(&path).unwrap(), FlockArg::LockExclusiveNonblock);
    assert!(lock().is_err(), "the job has no lock");
    test.finish(&[worker]);
    lock().expect("the lock is free again");
}

#[test]
fn row_14_no_crash_leaves_a_core_whatever_the_job_does_to_its_limit() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    attack(&client, worker, "crash", &[]);
    test.finish(&[worker]);
}

#[test]
fn row_15_a_port_that_an_escaped_daemon_listens_at_is_free_again() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
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
    assert_ne!(HostSnapshot::take(&test.host), test.before);
    test.finish(&[worker]);
    for address in addresses {
        TcpListener::bind(address).expect("the port is free");
    }
}

/// Records of logins, which no job may write. Here they are copies that nobody else on the host writes, and everybody may.
const RECORDS: [&str; 4] = ["wtmp", "btmp", "lastlog", "faillog"];

#[test]
fn row_16_no_record_of_a_login_is_written() {
    let place = create_shared_dir();
    let copy = |name: &str| place.path().join(name);
    let mut script = "set -e; mount --make-rprivate /".to_owned();
    for name in RECORDS {
        fs::write(copy(name), "").unwrap();
        fs::set_permissions(copy(name), fs::Permissions::from_mode(0o666)).unwrap();
    }
    script += &format!("; mount --bind {} /var/log; exec \"$@\"", place.path().display());
    let stat = || {
        RECORDS.map(|name| {
            let meta = fs::metadata(copy(name)).unwrap();
            (
                meta.len(),
                meta.blocks(),
                meta.mtime(),
                meta.mtime_nsec(),
                meta.ctime(),
                meta.ctime_nsec(),
            )
        })
    };
    let before = stat();
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", 0, SLOTS);
    let snapshot = HostSnapshot::take(&host);
    // In a mount namespace in which these are the host's.
    let mut helper = Command::new(tool("unshare"));
    helper.args(["--mount", "sh", "-c", &script, "sh"]);
    let program = host.helper_command();
    helper.arg(program.get_program()).args(program.get_args());
    let helper = Running::start(&mut helper);
    helper.log.wait(&["serving"]);
    let client = Client::new(&host);
    let worker = create_worker(&client, "a");
    let console = attack(&client, worker, "accounting", &[]);
    for name in RECORDS {
        assert!(
            console.contains(&format!("blocked: /var/log/{name}: Read-only file system")),
            "{console}"
        );
    }
    assert_eq!(stat(), before, "{console}");
    assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    assert_eq!(stat(), before);
    snapshot.assert_unchanged(&host);
}

#[test]
fn row_93_a_socket_that_gets_whole_cores_is_warned_about_at_the_start() {
    // The helper alone sees this setting: it is the whole machine's, which has other work.
    for (pattern, warnings) in [("@/run/cores.sock", 1), ("|/usr/bin/true %P", 0), ("core", 0)] {
        let host = TestHost::new();
        host.configure("http://127.0.0.1:9", 0, SLOTS);
        let setting = host.root.join("core_pattern");
        fs::write(&setting, format!("{pattern}\n")).unwrap();
        let own = host.helper_command();
        let mut command = Command::new(tool("unshare"));
        command.args(["--mount", "--propagation", "private", "bash", "-euc"]);
        command.arg("mount --bind \"$0\" /proc/sys/kernel/core_pattern; exec \"$@\"");
        command.arg(&setting).arg(own.get_program()).args(own.get_args());
        let helper = Running::start(&mut command);
        helper.log.wait(&["serving"]);
        let logged = [
            "WARN",
            "NOT ENFORCED",
            "core_pattern",
            pattern,
            "set it to a file",
        ];
        assert_eq!(helper.log.count(&logged), warnings, "{}", helper.log.text());
    }
}
