//! Group C: system calls, environment, groups, scheduling, raw sockets; of group H, what the filter of system calls
//! refuses. What the hostile job attempts is in its modules of the same names.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use protocol::{Reply, Request};
use testbed::harness::{TestHost, create_shared_dir};
use testbed::host_snapshot::processes_of;
use testbed::small_disk::SmallDisk;
use testbed::test_helper::{TestHelper, attack, create_worker};

use crate::attacks::leftovers::{ongoing, with_user_namespaces};

const SLOT: &str = "[slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n";

#[test]
fn row_44_calls_that_burden_or_bypass_the_host_are_refused() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "c");
    attack(&client, worker, "calls", &[]);
    test.finish(&[worker]);
}

#[test]
fn row_44_a_slot_with_user_namespaces_refuses_all_other_calls() {
    let test = TestHelper::with(&with_user_namespaces());
    let client = test.client();
    let worker = create_worker(&client, "c");
    attack(&client, worker, "calls-in-user-namespace", &[]);
    test.finish(&[worker]);
}

#[test]
fn row_44_other_entry_points_are_closed() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "c");
    attack(&client, worker, "other-entry-points", &[]);
    test.finish(&[worker]);
}

#[test]
fn row_45_no_file_is_opened_by_its_handle() {
    let test = TestHelper::with(&with_user_namespaces());
    let client = test.client();
    for slot in ["a", "c"] {
        let worker = create_worker(&client, slot);
        attack(&client, worker, "file-handles", &[]);
        assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    }
    test.finish(&[]);
}

/// A process and all that have it for a parent, theirs included.
fn family(pid: u32) -> Vec<u32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let below = children
        .split_whitespace()
        .flat_map(|child| family(child.parse().unwrap()));
    [pid].into_iter().chain(below).collect()
}

#[test]
fn row_46_variables_of_a_job_reach_no_process_of_roots() {
    let variables = ["LD_PRELOAD", "LD_AUDIT", "BASH_ENV", "PATH"];
    let mut slots = SLOT.to_owned();
    for name in variables {
        slots += &format!("env.{name} = \"/work/hostile-{name}\"\n");
    }
    let test = TestHelper::with(&slots);
    let client = test.client();
    let worker = create_worker(&client, "a");
    let files = variables.map(|name| format!("/work/hostile-{name}"));
    let args = files.each_ref().map(String::as_str);
    ongoing(&client, worker, "environment", &args, "everything is in place");
    let all = family(test.helper.pid());
    // The monitor, a session and the worker's pid 1 at least; the last is not root's any more.
    assert!(all.len() >= 3, "{all:?}");
    let job = processes_of(&test.host.uids);
    assert!(
        all.iter()
            .any(|pid| job.iter().any(|line| line.starts_with(&format!("{pid} ")))),
        "the worker's pid 1 is not in {all:?}"
    );
    for pid in all {
        let exe = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
        if !exe.ends_with("user-factory-helper") {
            continue;
        }
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap();
        let maps = fs::read(format!("/proc/{pid}/maps")).unwrap();
        for (text, name) in [(environment, "environment"), (maps, "memory")] {
            // Without the text: it is the environment of the tests.
            let reached = String::from_utf8_lossy(&text).contains("/work/hostile-");
            assert!(!reached, "the {name} of process {pid}");
        }
    }
    // What those variables name would have left a file, had any process run it.
    let work = test.host.worker_dir(worker).join("fs/work");
    assert!(work.join("hostile-PATH").exists() && !work.join("it-was-run").exists());
    test.finish(&[worker]);
}

/// A file on the host that only this group may read.
fn file_of_group(directory: &Path, name: &str, gid: u32) -> PathBuf {
    let path = directory.join(name);
    fs::write(&path, "for members only\n").unwrap();
    chown(&path, Some(0), Some(gid)).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
    path
}

#[test]
fn row_47_a_slots_group_reaches_what_the_slot_says_and_no_further() {
    let lines = fs::read_to_string("/etc/group").unwrap();
    let mut others = lines.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let gid: u32 = fields.get(2)?.parse().ok()?;
        (gid != 0).then(|| (fields[0].to_owned(), gid))
    });
    let (given, gid) = others.next().expect("the host has groups");
    let (_, other) = others.next().expect("the host has groups");
    let place = create_shared_dir();
    let closed = file_of_group(place.path(), "closed", other);
    let open = file_of_group(place.path(), "open", gid);
    let test = TestHelper::with(&format!("{SLOT}add_to_groups = [\"{given}\"]\n"));
    let client = test.client();
    let worker = create_worker(&client, "a");
    let args = [
        &gid.to_string(),
        "not",
        closed.to_str().unwrap(),
        open.to_str().unwrap(),
    ];
    attack(&client, worker, "groups", &args);
    test.finish(&[worker]);
}

#[test]
fn row_48_name_clock_priority_and_limits_stay_as_they_are() {
    let name = || fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    let before = name();
    let test = TestHelper::with(&format!(
        "{SLOT}limits.processes = 64\nlimits.open_files = 2048\n"
    ));
    let client = test.client();
    let worker = create_worker(&client, "a");
    attack(&client, worker, "scheduling", &["64", "2048"]);
    assert_eq!(name(), before);
    test.finish(&[worker]);
}

#[test]
fn row_49_raw_sockets_and_low_ports_are_refused() {
    let lowest = fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").unwrap();
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "c");
    let flags = || fs::read_to_string("/sys/class/net/lo/flags").unwrap();
    let before = flags();
    attack(&client, worker, "raw-sockets", &[lowest.trim(), "lo"]);
    assert_eq!(flags(), before);
    test.finish(&[worker]);
}

/// The attempt in slot `a`, which allows nothing, and in `c`, which allows user namespaces.
fn in_both(name: &str, args: [&[&str]; 2]) {
    let test = TestHelper::with(&with_user_namespaces());
    let client = test.client();
    let workers = ["a", "c"].map(|slot| create_worker(&client, slot));
    for (worker, args) in workers.into_iter().zip(args) {
        attack(&client, worker, name, args);
    }
    test.finish(&workers);
}

#[test]
fn row_86_no_socket_of_a_job_gets_a_bpf_program() {
    in_both("socket-programs", [&[], &[]]);
}

#[test]
fn row_86_a_job_has_no_seccomp_filter_of_its_own_unless_its_slot_allows_user_namespaces() {
    in_both("seccomp-programs", [&["refused"], &["allowed"]]);
}

#[test]
fn row_87_no_asynchronous_context_of_the_hosts_is_taken() {
    let taken = || fs::read_to_string("/proc/sys/fs/aio-nr").unwrap();
    let before = taken();
    in_both("asynchronous-contexts", [&[], &[]]);
    assert_eq!(taken(), before);
}

#[test]
fn row_88_no_key_policy_or_snapshot_is_left_in_a_file_system() {
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", 0, &with_user_namespaces());
    let disk = SmallDisk::ext4_with_encryption(&host);
    let test = TestHelper::on(host, Some(disk));
    let client = test.client();
    let workers = ["a", "c"].map(|slot| create_worker(&client, slot));
    for worker in workers {
        attack(&client, worker, "file-system-objects", &[]);
    }
    test.finish(&workers);
}

#[test]
fn row_90_no_flag_of_a_file_slows_its_deletion() {
    let test = TestHelper::with(&with_user_namespaces());
    let client = test.client();
    let workers = ["a", "c"].map(|slot| create_worker(&client, slot));
    for worker in workers {
        ongoing(&client, worker, "flags", &[], "ready");
    }
    test.finish(&workers);
}

#[test]
fn row_91_how_pid_1_runs_is_not_the_jobs_to_say() {
    in_both("pid-1", [&[], &[]]);
}

#[test]
fn row_95_no_line_discipline_is_set() {
    in_both("line-disciplines", [&[], &[]]);
}

#[test]
fn row_95_protocols_that_load_modules_are_not_there() {
    in_both("protocols", [&["refused"], &["allowed"]]);
}

#[test]
fn row_95_a_job_says_where_its_own_memory_is() {
    in_both("memory-policy", [&[], &[]]);
}
