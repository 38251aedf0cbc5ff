//! Group C: getting up: privileges, other processes, the kernel's files, mounts. What the hostile job attempts is in its module of the same name.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::Signal;
use protocol::{Reply, Request};
use testbed::harness::{Running, create_shared_dir, put_program};
use testbed::host_snapshot::processes_of;
use testbed::test_helper::{TestHelper, attack, create_worker};

use crate::attacks::leftovers::{ongoing, with_user_namespaces};

/// In it a directory that the configuration hides, with a file that everybody could read. And the slots.
fn with_hidden(place: &Path) -> String {
    let hidden = place.join("hidden");
    fs::create_dir(&hidden).unwrap();
    for (path, mode) in [
        (&hidden, 0o755),
        (&place.join("seen"), 0o644),
        (&hidden.join("secret"), 0o644),
    ] {
        if !path.is_dir() {
            fs::write(path, "x").unwrap();
        }
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }
    // It follows on the section that the operator's part ends with.
    format!("hide = [{hidden:?}]\n{}", with_user_namespaces())
}

/// One attempt in one job, and nothing is left of it.
fn try_once(test: TestHelper, slot: &str, name: &str, args: &[&str]) -> String {
    let client = test.client();
    let worker = create_worker(&client, slot);
    let console = attack(&client, worker, name, args);
    test.finish(&[worker]);
    console
}

#[test]
fn row_30_a_set_user_id_program_of_the_hosts_gives_no_privilege() {
    let place = create_shared_dir();
    let copies: Vec<PathBuf> = [0o4755, 0o2755, 0o6755]
        .iter()
        .map(|mode| {
            let copy = place.path().join(format!("id-{mode:o}"));
            put_program(Path::new("/usr/bin/id"), &copy, *mode);
            copy
        })
        .collect();
    let args: Vec<&str> = copies.iter().map(|path| path.to_str().unwrap()).collect();
    let console = try_once(TestHelper::new(), "a", "set-id-programs", &args);
    for copy in &copies {
        let ran = format!("ran {} -u", copy.display());
        assert!(console.contains(&ran), "{console}");
    }
    let with_the_bit = |line: &&str| line.starts_with("started ") && line.contains("mode 1047");
    let count = console.lines().filter(with_the_bit).count();
    assert!(count >= 3, "there are set-user-id programs here:\n{console}");
}

#[test]
fn row_31_no_namespace_can_be_made_in_any_way() {
    try_once(TestHelper::new(), "a", "new-namespaces", &[]);
}

#[test]
fn row_31_where_user_namespaces_are_allowed_their_root_gets_no_dangerous_call() {
    try_once(
        TestHelper::with(&with_user_namespaces()),
        "c",
        "capable-calls",
        &[],
    );
}

#[test]
fn row_32_pid_1_of_its_own_namespace_cannot_be_traced_or_read_and_no_descriptor_of_it_copied() {
    try_once(TestHelper::new(), "a", "init", &["as-it-is"]);
    try_once(
        TestHelper::with(&with_user_namespaces()),
        "c",
        "init",
        &["as-root-too"],
    );
}

#[test]
fn row_32_processes_of_the_host_and_of_other_jobs_are_not_even_visible() {
    let test = TestHelper::new();
    let client = test.client();
    let (other, worker) = (create_worker(&client, "a"), create_worker(&client, "c"));
    ongoing(&client, other, "system-v", &[], "ready");
    let mut outside = vec![std::process::id().to_string(), test.helper.pid().to_string()];
    let others = processes_of(&test.host.uids);
    assert!(others.len() >= 2, "{others:?}");
    outside.extend(
        others
            .iter()
            .map(|line| line.split(' ').next().unwrap().to_owned()),
    );
    let args: Vec<&str> = outside.iter().map(String::as_str).collect();
    attack(&client, worker, "other-processes", &args);
    test.finish(&[other, worker]);
}

#[test]
fn row_32_a_job_can_trace_its_own_child() {
    let console = try_once(TestHelper::new(), "a", "own-child", &[]);
    assert!(console.contains("done: detach"), "{console}");
}

#[test]
fn row_33_no_program_that_runs_can_be_overwritten_or_replaced() {
    try_once(TestHelper::new(), "a", "overwrite-programs", &[]);
}

#[test]
fn row_34_the_first_program_inherits_three_descriptors_and_six_variables() {
    let mut test = TestHelper::new();
    // As from a shell's background, or under nohup(1): what is ignored is inherited, too.
    test.helper.signal(Signal::SIGTERM);
    assert!(test.helper.wait().success());
    let plain = test.host.helper_command();
    let mut ignoring = Command::new("sh");
    ignoring.args(["-c", "trap '' HUP INT QUIT USR1; exec \"$@\"", "sh"]);
    test.helper = Running::start(ignoring.arg(plain.get_program()).args(plain.get_args()));
    test.helper.log.wait(&["serving"]);
    try_once(test, "a", "inheritance", &[]);
}

#[test]
fn row_35_no_file_of_the_kernels_opens_for_writing() {
    let console = try_once(TestHelper::new(), "a", "kernel-files", &[]);
    assert!(console.contains("blocked: /proc/sysrq-trigger"), "{console}");
}

#[test]
fn row_36_calls_on_mounts_and_roots_are_refused() {
    try_once(TestHelper::new(), "a", "mount-calls", &[]);
}

#[test]
fn row_36_root_of_a_user_namespace_removes_no_mask_and_makes_nothing_writable() {
    let place = create_shared_dir();
    let test = TestHelper::with(&with_hidden(place.path()));
    try_once(test, "c", "unmask", &[place.path().to_str().unwrap()]);
}

#[test]
fn row_36_fresh_mounts_of_the_kernels_show_nothing_hidden_and_write_nothing() {
    let place = create_shared_dir();
    let test = TestHelper::with(&with_hidden(place.path()));
    try_once(test, "c", "fresh-mounts", &[place.path().to_str().unwrap()]);
}

#[test]
fn row_36_a_directory_opened_in_a_namespace_that_is_gone_is_still_masked() {
    let place = create_shared_dir();
    let test = TestHelper::with(&with_hidden(place.path()));
    try_once(test, "c", "old-descriptors", &[place.path().to_str().unwrap()]);
}

#[test]
fn row_37_a_mount_made_inside_reaches_neither_the_host_nor_another_job() {
    let test = TestHelper::with(&with_user_namespaces());
    let client = test.client();
    let (worker, earlier) = (create_worker(&client, "c"), create_worker(&client, "a"));
    ongoing(&client, earlier, "system-v", &[], "ready");
    let name = format!("travels-{worker}");
    ongoing(&client, worker, "travelling-mount", &[&name], "ready");
    let mut namespaces = BTreeSet::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        // A process may end meanwhile, and is then of no interest.
        if let Ok(mounts) = fs::read_to_string(entry.path().join("mountinfo"))
            && mounts.contains(&name)
            && let Ok(namespace) = fs::read_link(entry.path().join("ns/mnt"))
        {
            namespaces.insert((namespace, entry.file_name()));
        }
    }
    assert_eq!(namespaces.len(), 1, "in one process alone: {namespaces:?}");
    assert!(
        !fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .contains(&name)
    );
    let deleted = client.ask(&Request::Delete { worker: earlier }).0;
    assert_eq!(deleted, Reply::Deleted);
    let later = create_worker(&client, "a");
    attack(&client, later, "no-such-mount", &[&name]);
    test.finish(&[worker, later]);
}
