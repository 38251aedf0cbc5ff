//! Privileges, as root sees them from outside: what each kind of process may still do, and what it holds.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use testbed::tracer::helper::{children, listener};

use super::*;

/// `capability.h`'s numbers: CHOWN, DAC_OVERRIDE, FOWNER, SETGID, SETUID.
const OF_SESSIONS: [u32; 5] = [0, 1, 3, 6, 7];
/// SETPCAP, NET_BIND_SERVICE, NET_ADMIN, SYS_CHROOT, SYS_ADMIN, MKNOD.
const OF_THE_MONITOR: [u32; 6] = [8, 10, 12, 18, 21, 27];

/// A line of `proc_pid_status(5)`.
fn status(pid: u32, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process is running");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name}:\n{text}"))
        .trim()
        .to_owned()
}

fn assert_privileges(who: &str, pid: u32, capabilities: &[u32], filters: u32) {
    let mask = capabilities.iter().fold(0u64, |mask, bit| mask | 1 << bit);
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(status(pid, set), format!("{mask:016x}"), "{who}'s {set}");
    }
    for set in ["CapInh", "CapAmb"] {
        assert_eq!(status(pid, set), "0".repeat(16), "{who}'s {set}");
    }
    assert_eq!(status(pid, "NoNewPrivs"), "1", "{who}");
    assert_eq!(status(pid, "Seccomp"), "2", "{who}");
    assert_eq!(status(pid, "Seccomp_filters"), filters.to_string(), "{who}");
}

fn descriptor(pid: u32, number: u32) -> String {
    fs::read_link(format!("/proc/{pid}/fd/{number}"))
        .map_or_else(|error| error.to_string(), |to| to.to_string_lossy().into_owned())
}

#[test]
fn each_process_keeps_what_its_work_takes_and_no_more() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    let program = sealed_memfd(b"#!/bin/bash\necho here\nread -r < <(sleep infinity)\n");
    let (reply, console) = install(&client, worker, program);
    assert_eq!(reply, Reply::AgentStarted);
    wait_for_line(&console.unwrap(), "here");

    let monitor = test.helper.pid();
    let listener = listener(monitor);
    let (first, sessions) = (children(monitor), children(listener));
    // The builder of what jobs see is a child, too, for a moment.
    let cgroup = |pid: &u32| fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let is_workers = |pid: &u32| cgroup(pid).contains(&worker.to_string());
    let first: Vec<u32> = first.into_iter().filter(is_workers).collect();
    assert!(first.len() == 1 && sessions.len() == 1, "{first:?} {sessions:?}");
    let (first, session) = (first[0], sessions[0]);

    assert_privileges(
        "the monitor",
        monitor,
        &[&OF_SESSIONS[..], &OF_THE_MONITOR].concat(),
        1,
    );
    assert_privileges("the listener", listener, &OF_SESSIONS, 2);
    assert_privileges("a session", session, &OF_SESSIONS, 2);
    assert_privileges("pid 1", first, &[], 2);
    let agent = children(first)[0];
    assert_privileges("the agent", agent, &[], 2);

    // A session may ignore modes, but not what its descriptors are of: these mounts are read-only, and have no parent.
    let configuration = test.host.root.join(protocol::config::CONFIG_PATH);
    for place in [
        Path::new("/etc"),
        Path::new("/dev"),
        Path::new("/sys"),
        configuration.parent().unwrap(),
    ] {
        let wanted = fs::metadata(place).unwrap();
        let is_it = |meta: fs::Metadata| (meta.dev(), meta.ino()) == (wanted.dev(), wanted.ino());
        let held = fs::read_dir(format!("/proc/{session}/fd")).unwrap().flatten();
        let held: Vec<_> = held
            .map(|entry| entry.path())
            .filter(|path| fs::metadata(path).is_ok_and(is_it))
            .collect();
        let [held] = &held[..] else {
            panic!("{held:?} are {}", place.display())
        };
        let written = fs::write(held.join("user-factory-test"), "");
        let _ = fs::remove_file(place.join("user-factory-test"));
        let error = written.expect_err("through a session's descriptor");
        assert_eq!(
            error.raw_os_error(),
            Some(libc::EROFS),
            "{}: {error}",
            place.display()
        );
    }

    let all = fs::read_dir(format!("/proc/{session}/fd")).unwrap().flatten();
    let directories: Vec<_> = all
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect();
    assert_eq!(directories.len(), 9, "{directories:?}");
    for held in directories {
        let (here, above) = (
            fs::metadata(&held).unwrap(),
            fs::metadata(held.join("..")).unwrap(),
        );
        assert_eq!(
            (here.dev(), here.ino()),
            (above.dev(), above.ino()),
            "{held:?} leads up"
        );
    }

    // Who was accepted cannot accept, and nobody but the listener receives signals by descriptor.
    let sockets = |pid: u32| {
        let numbers = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        let numbers = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let mut all: Vec<String> = numbers
            .filter(|number| *number > 2)
            .map(|number| descriptor(pid, number))
            .collect();
        all.retain(|to| !to.starts_with('/'));
        all.sort();
        all
    };
    let (of_listener, of_session) = (sockets(listener), sockets(session));
    assert_eq!(
        of_listener.len(),
        3,
        "the socket, the way to the monitor, signals: {of_listener:?}"
    );
    assert_eq!(
        of_session.len(),
        2,
        "its peer, the way to the monitor: {of_session:?}"
    );
    assert_eq!(of_session.iter().filter(|to| of_listener.contains(to)).count(), 1);

    // Nothing of the helper's own is held by a job's first process.
    for number in 0..3 {
        assert_eq!(
            descriptor(first, number),
            "/dev/null",
            "pid 1's descriptor {number}"
        );
    }
    // What the sandbox was made from has been lifted off.
    let mounts = fs::read_to_string(format!("/proc/{agent}/mountinfo")).unwrap();
    let places: Vec<&str> = mounts.lines().filter_map(|line| line.split(' ').nth(4)).collect();
    assert!(places.contains(&"/work"), "{places:?}");
    assert!(
        !places.iter().any(|place| place.starts_with("/.buildomat")),
        "{places:?}"
    );
    test.finish(&[worker]);
}
