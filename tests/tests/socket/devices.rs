//! A slot's devices, real nodes of the host's `/dev` that come and go while a job runs.

use std::os::unix::fs::MetadataExt;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::*;

/// A node in the host's `/dev` under a name that nothing else has: unplugged when dropped.
struct Node(std::path::PathBuf);

impl Node {
    fn plug(name: &str, minor: u64) -> Node {
        let path = std::path::Path::new("/dev").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mode = Mode::from_bits_truncate(0o640);
        mknod(&path, SFlag::S_IFCHR, mode, makedev(1, minor)).unwrap();
        Node(path)
    }

    /// A link as udev makes one: in a directory of such links, to the node's name of the moment.
    fn link(name: &str, to: &str) -> Node {
        let path = std::path::Path::new("/dev").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(format!("../{to}"), &path).unwrap();
        Node(path)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
        let _ = fs::remove_dir(self.0.parent().unwrap());
    }
}

/// Prints the job's devices, each time that they change: `NAME:MODE:USER:MINOR`.
const AGENT: &str = r#"#!/bin/bash
exec 2>&1
cd /dev
( last=
  while read -t 0.02 -u 9; [ $? -gt 128 ]; do
    now=$(find * -path 'user-factory-test*' -type c | LC_ALL=C sort | xargs -r stat -c %n:%a:%U:%T 2>&- | tr '\n' ' ')
    [ "$now" = "$last" ] || echo "devices: $now"
    last=$now
  done 9<> <(:) ) &
exit 0
"#;

#[test]
fn devices_come_and_go_while_a_job_runs_and_the_hosts_nodes_stay_as_they_are() {
    let name = format!("user-factory-test-{}", std::process::id());
    let first = Node::plug(&format!("{name}-tty0"), 3);
    let slots = format!(
        "[slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\ndevices = [\"/dev/{name}-tty*\", \"/dev/{name}-bus\"]\n\
         [slots.c]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n"
    );
    // A directory that is named must be there, if only empty; the last node in it takes it away.
    fs::create_dir(format!("/dev/{name}-bus")).unwrap();
    let mut test = TestHelper::with(&slots);
    let client = test.client();
    let worker = worker_id();
    let Reply::UserCreated { name: user, .. } = create(&client, worker, "a") else {
        panic!()
    };
    let (reply, console) = install(&client, worker, sealed_memfd(AGENT.as_bytes()));
    assert_eq!(reply, Reply::AgentStarted);
    let console = console.unwrap();
    let seen = |nodes: &[(&str, u64)]| {
        let nodes = nodes
            .iter()
            .map(|(node, minor)| format!("{name}-{node}:600:{user}:{minor} "));
        wait_for_line(&console, &format!("devices: {}", nodes.collect::<String>()));
    };
    seen(&[("tty0", 3)]);
    let second = Node::plug(&format!("{name}-tty1"), 5);
    seen(&[("tty0", 3), ("tty1", 5)]);
    // A bus grows a directory, and with it a device.
    let deep = Node::plug(&format!("{name}-bus/001"), 7);
    seen(&[("bus/001", 7), ("tty0", 3), ("tty1", 5)]);
    drop(first);
    seen(&[("bus/001", 7), ("tty1", 5)]);
    // A new helper goes on where the old one was.
    test.helper.signal(Signal::SIGKILL);
    test.helper.wait();
    let again = Node::plug(&format!("{name}-tty2"), 8);
    test.helper = test.host.start_helper();
    seen(&[("bus/001", 7), ("tty1", 5), ("tty2", 8)]);
    let client = test.client();

    let meta = fs::metadata(&second.0).unwrap();
    assert_eq!(
        (meta.uid(), meta.mode() & 0o777),
        (0, 0o640),
        "the host's node was touched"
    );
    // Nobody else's job has them.
    let other = create_worker(&client, "c");
    let (_, seen_by_other) = run(&client, other, "ls /dev; exit 1");
    assert!(!seen_by_other.contains("user-factory-test"), "{seen_by_other}");
    test.finish(&[worker, other]);
    drop((again, deep));
}

#[test]
fn probes_that_slots_name_by_udevs_links_stay_with_their_slots_when_they_change_places() {
    let name = format!("user-factory-test-{}", std::process::id());
    let by_id = format!("{name}-by-id");
    let slots = [("a", "left"), ("c", "right")].map(|(slot, probe)| {
        format!(
            "[slots.{slot}]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\ndevices = [\"/dev/{by_id}/{probe}\"]\n"
        )
    });
    // The kernel numbers names as devices come. The left probe has minor number 3, the right one 5.
    let plug = |left: &str, right: &str| {
        [("left", 3, left), ("right", 5, right)].map(|(probe, minor, node)| {
            let plugged = Node::plug(&format!("{name}-{node}"), minor);
            (
                plugged,
                Node::link(&format!("{by_id}/{probe}"), &format!("{name}-{node}")),
            )
        })
    };
    let plugged = plug("probe0", "probe1");
    let test = TestHelper::with(&slots.concat());
    let client = test.client();
    let jobs = [("a", "left", 3), ("c", "right", 5)].map(|(slot, probe, minor)| {
        let worker = worker_id();
        let Reply::UserCreated { name: user, .. } = create(&client, worker, slot) else {
            panic!()
        };
        let (reply, console) = install(&client, worker, sealed_memfd(AGENT.as_bytes()));
        assert_eq!(reply, Reply::AgentStarted);
        let device = move |name: &str| format!("{name}:600:{user}:{minor} ");
        (worker, console.unwrap(), format!("{by_id}/{probe}"), device)
    });
    let seen = |left: &str, right: &str| {
        for ((_, console, link, device), node) in jobs.iter().zip([left, right]) {
            let devices = device(link) + &device(&format!("{name}-{node}"));
            wait_for_line(console, &format!("devices: {devices}"));
        }
    };
    seen("probe0", "probe1");
    drop(plugged);
    for (_, console, ..) in &jobs {
        wait_for_line(console, "devices: ");
    }
    let plugged = plug("probe1", "probe0");
    seen("probe1", "probe0");
    for ((_, console, ..), other) in jobs.iter().zip([":5 ", ":3 "]) {
        let seen = read(console);
        assert!(!seen.contains(other), "a job has seen the other's probe: {seen}");
    }
    test.finish(&jobs.map(|(worker, ..)| worker));
    drop(plugged);
}

#[test]
fn a_device_that_is_not_there_fails_the_start_with_a_sentence() {
    let slots =
        "[slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\ndevices = [\"/dev/user-factory-no-such\"]\n";
    let test = TestHelper::with(slots);
    let client = test.client();
    let worker = create_worker(&client, "a");
    let (reply, _) = install(&client, worker, sealed_memfd(b"#!/bin/true\n"));
    let Reply::Error(error) = reply else { panic!() };
    assert!(
        error
            .message()
            .contains("device /dev/user-factory-no-such is not there: plug it in"),
        "{error}"
    );
    test.finish(&[worker]);
}

#[test]
fn devices_that_come_and_go_do_not_hold_up_the_end_of_a_worker() {
    let name = format!("user-factory-test-{}-flood", std::process::id());
    let slots =
        format!("[slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\ndevices = [\"/dev/{name}-*\"]\n");
    let test = TestHelper::with(&slots);
    let client = test.client();
    let good = |reply: &Reply| !matches!(reply, Reply::Error(_));
    let over = std::sync::atomic::AtomicBool::new(false);
    let replies: Vec<Reply> = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                let _nodes: Vec<Node> = (0..20).map(|n| Node::plug(&format!("{name}-{n}"), 3)).collect();
            }
        });
        let mut replies = Vec::new();
        // Not one more after the first that fails: nobody would stop the flood.
        while replies.len() < 45 && replies.iter().all(good) {
            let worker = worker_id();
            replies.push(create(&client, worker, "a"));
            let agent = sealed_memfd(b"#!/bin/bash\nsleep 1000 & exit 0\n");
            replies.push(install(&client, worker, agent).0);
            replies.push(client.ask(&Request::Delete { worker }).0);
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        replies
    });
    assert!(replies.iter().all(good), "{replies:?}");
    test.finish(&[]);
}
