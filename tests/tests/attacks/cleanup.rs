//! Group B: a hostile job; what it attempts is in `hostile-job`'s module of the same name.

use std::fs::{self, File, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::mount::{MsFlags, mount};
use nix::sys::inotify::AddWatchFlags;
use nix::sys::statvfs::statvfs;
use protocol::config::STATE_DIR;
use protocol::{Reply, Request, State};
use testbed::harness::{Client, SUPERVISOR_UID, TestHost, sealed_memfd, tool, until_is};
use testbed::host_snapshot::HostSnapshot;
use testbed::small_disk::{SmallDisk, small};
use testbed::test_helper::{
    SLOTS, TestHelper, attack, create_worker, install, read, run, start_attack, state, wait_for_line,
    wait_until, watch,
};

use crate::attacks::canaries::Canaries;
use crate::attacks::leftovers::{ongoing, with_user_namespaces};

/// How many entries a directory gets. A million, as docs/evidence/attacks.md has it, are for the night:
/// `.ci/nightly` sets `USER_FACTORY_TEST_ENTRIES`.
const ENTRIES: u32 = 100_000;

/// One job in slot `a` that stays until it is deleted.
fn once(name: &str, args: &[&str]) -> String {
    on(TestHelper::new(), name, args)
}

fn on(test: TestHelper, name: &str, args: &[&str]) -> String {
    let client = test.client();
    let worker = create_worker(&client, "a");
    let console = ongoing(&client, worker, name, args, "ready");
    test.finish(&[worker]);
    console
}

#[test]
fn row_17_directories_swapped_for_links_in_a_loop_lead_nowhere() {
    let canaries = Canaries::new();
    let before = canaries.state();
    for _ in 0..3 {
        let test = TestHelper::new();
        let client = test.client();
        let worker = create_worker(&client, "a");
        let args = canaries.args();
        let console = start_attack(&client, worker, "swap", &[args[0], args[1], "/etc"]);
        for number in 0..3 {
            wait_for_line(&console, &format!("swaps {number}"));
        }
        test.finish(&[worker]);
    }
    assert_eq!(canaries.state(), before);
}

#[test]
fn row_18_links_at_every_level_are_removed_and_what_they_lead_to_is_not() {
    let canaries = Canaries::new();
    let before = canaries.state();
    let file = canaries.open.join("file");
    once(
        "links",
        &[canaries.open.to_str().unwrap(), file.to_str().unwrap()],
    );
    assert_eq!(canaries.state(), before);
}

#[test]
fn row_19_no_mode_and_no_access_control_list_stops_the_deletion() {
    let console = once("modes", &[]);
    // On a host whose file systems have lists, at least one was set.
    assert!(
        console.contains("done: access list") || console.contains("not supported"),
        "{console}"
    );
}

#[test]
fn row_20_directories_far_deeper_than_a_path_can_be_are_removed() {
    // More than the helper goes down in one go (`DEEPEST`).
    once("deep", &["5000"]);
}

/// A directory deeper than the helper goes down in one go takes an empty one, for which there is no room.
#[test]
fn row_20_a_chain_of_directories_that_fills_the_disk_is_removed() {
    // Blocks are used up first, of which root has some more; and inodes, of which nobody has any more.
    for disk in [SmallDisk::ext4_with_reserve, |host: &TestHost| {
        SmallDisk::ext4(host, 6000)
    }] {
        let test = on_disk(disk);
        let client = test.client();
        let worker = create_worker(&client, "a");
        start_attack(&client, worker, "chain", &[]);
        // Not even the console has room then.
        let disk = || statvfs(&test.host.root.join(STATE_DIR)).unwrap();
        until_is("a full disk", || {
            disk().blocks_available().min(disk().files_available()) == 0
        });
        assert!(disk().files() - disk().files_free() > 5000);
        test.finish(&[worker]);
    }
}

#[test]
fn row_21_a_directory_of_very_many_entries_is_removed() {
    match std::env::var("USER_FACTORY_TEST_ENTRIES") {
        Ok(entries) => once("many", &[&entries]),
        // On ext4 of its own: after many files were removed, ext4 makes others slowly for minutes (`recently_deleted` in
        // `fs/ext4/ialloc.c`), and those would be the other tests'.
        Err(_) => on(
            on_disk(|host| SmallDisk::ext4(host, ENTRIES + ENTRIES / 10)),
            "many",
            &[&ENTRIES.to_string()],
        ),
    };
}

#[test]
fn row_22_names_of_every_kind_are_removed() {
    once("names", &[]);
}

#[test]
fn row_23_no_file_can_be_made_immutable() {
    once("flags", &[]);
}

#[test]
fn row_24_files_that_grow_are_removed() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    let console = start_attack(&client, worker, "grow", &[]);
    for number in 0..4 {
        wait_for_line(&console, &format!("grows {number}"));
    }
    test.finish(&[worker]);
}

#[test]
fn row_25_mounts_inside_a_directory_are_refused_or_the_jobs_own_and_nothing_below_them_is_touched() {
    let (test, canaries) = (TestHelper::with(&with_user_namespaces()), Canaries::new());
    let before = canaries.state();
    let client = test.client();
    let (refused, allowed) = (create_worker(&client, "a"), create_worker(&client, "c"));
    let open = canaries.args()[1];
    attack(&client, refused, "mount-inside", &["refused", open]);
    ongoing(&client, allowed, "mount-inside", &["allowed", open], "ready");
    let count = || ["/etc", "/usr"].map(|dir| fs::read_dir(dir).unwrap().count());
    let names = count();
    test.finish(&[refused, allowed]);
    assert_eq!(count(), names);
    assert_eq!(canaries.state(), before);
}

#[test]
fn row_25_what_root_has_mounted_inside_a_directory_is_left_as_it_is() {
    let (test, canaries) = (TestHelper::new(), Canaries::new());
    let before = canaries.state();
    let client = test.client();
    let worker = create_worker(&client, "a");
    run(
        &client,
        worker,
        "mkdir -p /work/one/two /tmp/one; echo x >/tmp/file; echo x >/work/one/file",
    );
    for place in ["work/one/two", "work/one/file", "tmp/one", "tmp/file"] {
        let place = test.host.worker_dir(worker).join("fs").join(place);
        let source = if place.is_dir() {
            canaries.open.clone()
        } else {
            canaries.open.join("file")
        };
        mount(
            Some(&source),
            &place,
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .unwrap();
    }
    test.finish(&[worker]);
    assert_eq!(canaries.state(), before);
}

#[test]
fn row_26_set_id_files_and_file_capabilities_are_inert_and_gone() {
    let groups = fs::read_to_string("/etc/group").unwrap();
    let fields = groups.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let group = fields
        .clone()
        .find(|fields| fields[2] != "0")
        .expect("the host has a group besides root's");
    let grouped = format!("add_to_groups = [\"{}\"]\n", group[0]);
    let slots = with_user_namespaces().replace("[slots.c]\n", &format!("[slots.c]\n{grouped}"));
    let slots = slots.replace("[slots.a]\n", &format!("[slots.a]\n{grouped}"));
    let test = TestHelper::with(&slots);
    let client = test.client();
    let (plain, with_namespaces) = (create_worker(&client, "a"), create_worker(&client, "c"));
    for worker in [plain, with_namespaces] {
        ongoing(&client, worker, "set-id", &[group[2]], "ready");
        let program = test.host.worker_dir(worker).join("fs/work/id");
        let mode = fs::metadata(&program).expect("root sees it").mode();
        assert_eq!(mode & 0o6000, 0o6000, "{mode:o}");
        // Another user of the host, outside of every sandbox, does not get at it.
        let mut command = Command::new(program);
        let outcome = command.uid(SUPERVISOR_UID).gid(SUPERVISOR_UID).status();
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::PermissionDenied);
    }
    test.finish(&[plain, with_namespaces]);
}

#[test]
fn row_27_a_job_that_has_filled_the_disk_is_removed() {
    for (inodes, steps) in [
        // Room is short before names are, and the other way round.
        (4000, ["blocks", "inodes"]),
        (2000, ["inodes", "blocks"]),
    ] {
        for memory in [false, true] {
            let host = TestHost::new();
            host.configure("http://127.0.0.1:9", 0, SLOTS);
            let disk = if memory {
                let disk = SmallDisk::in_memory(&host);
                disk.limit(&format!("size={},nr_inodes={inodes}", small()));
                disk
            } else {
                SmallDisk::ext4(&host, inodes)
            };
            let _helper = host.start_helper();
            let client = Client::new(&host);
            let before = HostSnapshot::take(&host);
            let worker = create_worker(&client, "a");
            let console = start_attack(&client, worker, "fill", &steps);
            // On a full disk the console has no more lines: a mode that the job sets says when it is full.
            let sign = host.worker_dir(worker).join("fs/input");
            let is_full = || fs::metadata(&sign).unwrap().mode() & 0o777 == 0o700;
            assert!(
                watch(&sign, AddWatchFlags::IN_ATTRIB, is_full),
                "{:?}\n{}",
                statvfs(&sign),
                read(&console)
            );
            let disk_now = statvfs(&sign).unwrap();
            assert_eq!(disk_now.blocks_available(), 0, "{disk_now:?}");
            assert!(
                steps[0] == "blocks" || disk_now.files_available() == 0,
                "{disk_now:?}"
            );
            assert_eq!(state(&client, worker), State::Running, "{}", read(&console));
            let reply = client.ask(&Request::Delete { worker }).0;
            assert_eq!(reply, Reply::Deleted, "{steps:?}, in memory: {memory}");
            before.assert_unchanged(&host);
            drop(disk);
        }
    }
}

#[test]
fn row_28_daemons_that_make_files_anew_are_gone_with_the_files() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    let console = start_attack(&client, worker, "recreate", &[]);
    for number in 0..8 {
        wait_for_line(&console, &format!("recreates {number}"));
    }
    test.finish(&[worker]);
}

/// As root, from outside: no job is let make these.
fn btrfs(args: &[&str], paths: &[&Path]) {
    let mut command = Command::new(tool("btrfs"));
    let output = command.args(args).args(paths).output().expect("it is there");
    assert!(output.status.success(), "{args:?} {paths:?}: {output:?}");
}

fn snapshot(of: &Path, at: &Path) {
    btrfs(&["subvolume", "snapshot", "-r"], &[of, at]);
    // It is read-only indeed.
    let error = fs::write(at.join("more"), "x").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnlyFilesystem);
}

/// A directory of the worker's user, whose uid is that of the tree around it.
fn give(path: &Path, uid: u32) {
    for name in fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()) {
        if name.is_dir() {
            give(&name, uid);
        }
        lchown(&name, Some(uid), Some(uid)).unwrap();
    }
    lchown(path, Some(uid), Some(uid)).unwrap();
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// A host whose state directory is on a file system of its own.
fn on_disk(disk: fn(&TestHost) -> SmallDisk) -> TestHelper {
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", 0, SLOTS);
    fs::create_dir_all(host.root.join(STATE_DIR)).unwrap();
    let disk = disk(&host);
    TestHelper::on(host, Some(disk))
}

#[test]
fn row_89_subvolumes_and_read_only_snapshots_are_deleted() {
    let test = on_disk(SmallDisk::btrfs);
    let client = test.client();
    let worker = create_worker(&client, "a");
    run(&client, worker, "true");
    let fs_dir = test.host.worker_dir(worker).join("fs");
    let uid = fs::metadata(fs_dir.join("work")).unwrap().uid();
    for name in ["work", "tmp"] {
        let at = |path: &str| fs_dir.join(name).join(path);
        for path in ["one", "one/two"] {
            btrfs(&["subvolume", "create"], &[&at(path)]);
            fs::create_dir_all(at(path).join("closed/below")).unwrap();
            for file in ["file", "closed/file", "closed/below/file"] {
                fs::write(at(path).join(file), "x").unwrap();
            }
            for dir in ["closed/below", "closed"] {
                set_mode(&at(path).join(dir), 0o000);
            }
        }
        give(&at("one"), uid);
        // In a snapshot, the subvolumes below are empty directories.
        snapshot(&at("one"), &at("snapshot"));
        snapshot(&at("snapshot"), &at("of a snapshot"));
        // One in the other, both read-only, the upper one without the right to write in its mode.
        set_mode(&at("one"), 0o500);
        for path in ["one/two", "one"] {
            btrfs(
                &["property", "set", "-ts"],
                &[&at(path), "ro".as_ref(), "true".as_ref()],
            );
        }
    }
    test.delete(&[worker]);
    let next = create_worker(&client, "a");
    test.finish(&[next]);
}

#[test]
fn row_89_a_snapshot_that_its_owner_cannot_open_is_named_and_deleted_once_it_is_writable() {
    let test = on_disk(SmallDisk::btrfs);
    let client = test.client();
    let worker = create_worker(&client, "a");
    run(&client, worker, "true");
    let work = test.host.worker_dir(worker).join("fs/work");
    let at = |name: &str| work.join(name);
    btrfs(&["subvolume", "create"], &[&at("one")]);
    give(&at("one"), fs::metadata(&work).unwrap().uid());
    set_mode(&at("one"), 0o000);
    snapshot(&at("one"), &at("snapshot"));
    let Reply::Error(error) = client.ask(&Request::Delete { worker }).0 else {
        panic!("a snapshot that nobody can open is deleted")
    };
    for part in [
        "the writable directory work",
        "\"snapshot\"",
        "btrfs property set",
    ] {
        assert!(error.message().contains(part), "{error}");
    }
    btrfs(
        &["property", "set", "-ts"],
        &[&at("snapshot"), "ro".as_ref(), "false".as_ref()],
    );
    test.finish(&[worker]);
}

#[test]
fn row_89_the_file_systems_that_the_helper_takes_are_those_on_which_all_is_deleted() {
    for disk in [
        |host: &TestHost| SmallDisk::ext4(host, 4000),
        SmallDisk::plain_xfs,
        SmallDisk::btrfs,
        SmallDisk::in_memory,
        SmallDisk::overlay,
    ] {
        let test = on_disk(disk);
        assert_eq!(
            test.helper.log.count(&["was not tested"]),
            0,
            "{}",
            test.helper.log.text()
        );
        let client = test.client();
        let worker = create_worker(&client, "a");
        ongoing(&client, worker, "mixed-leftovers", &[], "ready");
        test.finish(&[worker]);
    }
    let unknown = on_disk(SmallDisk::ramfs);
    unknown.helper.log.wait(&["was not tested", "0x858458f6"]);
    unknown.finish(&[]);
}

#[test]
fn row_96_descriptors_of_a_deleted_workers_console_hold_no_block() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    let (reply, console) = install(&client, worker, sealed_memfd(b"#!/bin/bash\nyes | head -c 4M\n"));
    assert_eq!(reply, Reply::AgentStarted);
    wait_until(&client, worker, |state| state != State::Running);
    let (reply, attached) = client.ask(&Request::Attach { worker });
    assert!(matches!(reply, Reply::Attached { .. }), "{reply:?}");
    let held: Vec<File> = console
        .into_iter()
        .chain(attached.into_iter().map(File::from))
        .collect();
    let sizes = || -> Vec<(u64, u64)> {
        let meta = held.iter().map(|console| console.metadata().unwrap());
        meta.map(|meta| (meta.len(), meta.blocks())).collect()
    };
    assert!(
        sizes()
            .iter()
            .all(|(bytes, blocks)| *bytes > 1 << 20 && *blocks > 0),
        "{:?}",
        sizes()
    );
    test.finish(&[worker]);
    assert_eq!(sizes(), [(0, 0); 2]);
}

#[test]
fn row_29_a_job_cannot_replace_its_own_top_directories() {
    once("replace", &["/srv/of-the-job", "/opt/shown"]);
}
