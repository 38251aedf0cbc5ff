//! The helper's state directory.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use protocol::config::{RUN_DIR, STATE_DIR};
use protocol::{Reply, Request, State, WorkerId};
use testbed::harness::{Client, TestHost, sealed_memfd, worker_id};
use testbed::sample::Sample;
use testbed::service_manager::Service;
use testbed::small_disk::SmallDisk;
use testbed::test_helper::{create, install, list, wait_for_line};
use testbed::tracer::Event;
use testbed::tracer::helper::{WatchPeriod, watch_with};
use testbed::tracer::recorder::{Change, Recorder};
use testbed::tracer::replay::{Disk, Files, Replay, put};
use testbed::worker_snapshot::WorkerSnapshot;

const SLOTS: &str = r#"
[slots.a]
target = "01HZX3N8Q4J5K6M7P8R9S0T1V2"
writable = ["/srv/of-the-job"]
[slots.b]
target = "01HZX3N8Q4J5K6M7P8R9S0T1V2"
"#;

/// It leaves something in each of its places, but nothing that a path could not name.
const AGENT: &[u8] = b"#!/bin/bash
for place in $HOME /input /work /tmp /var/tmp /opt/buildomat /run/buildomat /srv/of-the-job; do
    mkdir -p $place/one/two; echo x > $place/one/two/file; ln -s /etc $place/link; chmod 0 $place/one/two
done
echo ready
sleep 1000 &
exit 0
";

pub struct PowerLossTest {
    /// Before the host, whose directory it is mounted in: the fields go in this order.
    _disk: SmallDisk,
    pub host: TestHost,
    pub helper: Service,
    clean: WorkerSnapshot,
}

impl PowerLossTest {
    pub fn new() -> PowerLossTest {
        let host = TestHost::new();
        host.configure("http://127.0.0.1:9", 0, SLOTS);
        let disk = SmallDisk::in_memory(&host);
        disk.limit("nr_inodes=0,size=1g");
        let helper = Service::new(&mut host.helper_command());
        let mut test = PowerLossTest {
            _disk: disk,
            clean: WorkerSnapshot::take(&host),
            host,
            helper,
        };
        test.start();
        test.clean = WorkerSnapshot::take(&test.host);
        test
    }

    pub fn start(&mut self) {
        self.helper.start();
        self.host.wait_for_helper();
    }

    fn state_dir(&self) -> std::path::PathBuf {
        self.host.root.join(STATE_DIR)
    }

    /// What the helper writes while it serves one connection; and how much of it, when a worker's first process was
    /// told to start the agent.
    fn record(&self, ask: impl FnOnce(&Client)) -> (Vec<Change>, Option<usize>) {
        let recorder = Arc::new(Mutex::new((Recorder::new(&self.state_dir()), None)));
        let tap = recorder.clone();
        let monitor = Pid::from_raw(self.helper.pid() as i32);
        // Those that the monitor has made meanwhile, and whether a worker's first process is one of them.
        let mut of_monitor = BTreeSet::new();
        let mut is_launched = false;
        let watcher = watch_with(
            self.helper.pid(),
            WatchPeriod::OneConnection,
            None,
            move |pid, event| {
                let (recorder, started_at) = &mut *tap.lock().unwrap();
                recorder.on(pid, event);
                match event {
                    Event::Forked { parent, by } if *parent == monitor => {
                        of_monitor.insert(pid);
                        is_launched |= by.number == libc::SYS_clone3;
                    }
                    // The session's next message after that is `Go`.
                    Event::Enter(call)
                        if call.number == libc::SYS_sendmsg && is_launched && !of_monitor.contains(&pid) =>
                    {
                        started_at.get_or_insert(recorder.changes.len());
                    }
                    _ => {}
                }
            },
        );
        ask(&Client::new(&self.host));
        watcher.join().expect("the tracer does not fail");
        let (recorder, started_at) = &mut *recorder.lock().unwrap();
        (std::mem::take(&mut recorder.changes), *started_at)
    }

    /// The power is back: no process, no cgroup, nothing below `/run`, and on the disk this.
    fn boot(&mut self, files: &Files) {
        self.helper.signal(Signal::SIGKILL);
        self.helper.wait_for_end();
        for place in [RUN_DIR, "run/userdb"] {
            fs::remove_dir_all(self.host.root.join(place)).expect("the last helper made it");
        }
        let state = self.state_dir();
        for entry in fs::read_dir(&state).unwrap().flatten() {
            let _ = fs::remove_dir_all(entry.path());
        }
        put(files, &state);
        self.start();
    }

    /// The worker goes, and its slot can be had again.
    pub fn end(&self, worker: WorkerId, what: &str) {
        let client = Client::new(&self.host);
        assert_eq!(
            client.ask(&Request::Delete { worker }).0,
            Reply::Deleted,
            "{what}"
        );
        assert_eq!(list(&client), [], "{what}");
        assert_eq!(
            WorkerSnapshot::take(&self.host),
            self.clean,
            "{what}: something is left"
        );
        let next = worker_id();
        let reply = create(&client, next, "a");
        assert!(matches!(reply, Reply::UserCreated { .. }), "{what}: {reply:?}");
        assert_eq!(
            client.ask(&Request::Delete { worker: next }).0,
            Reply::Deleted,
            "{what}"
        );
    }

    /// Another slot is not held up.
    pub fn assert_other_slot_works(&self, what: &str) {
        let client = Client::new(&self.host);
        let other = worker_id();
        let reply = create(&client, other, "b");
        assert!(matches!(reply, Reply::UserCreated { .. }), "{what}: {reply:?}");
        assert_eq!(
            client.ask(&Request::Delete { worker: other }).0,
            Reply::Deleted,
            "{what}"
        );
    }
}

/// Is it below what a job may write?
fn is_the_jobs(change: &Change) -> bool {
    let mut parts = change.path().iter().skip_while(|part| *part != "fs");
    parts.next().is_some() && parts.count() > 2
}

/// Boot with each of these, and see the worker end. `started_from`: from this cut on, its agent may run.
fn boot_with_each(test: &mut PowerLossTest, replay: &Replay, worker: WorkerId, started_from: usize) {
    let mut seen: BTreeSet<(Files, bool)> = BTreeSet::new();
    let (mut cuts, mut boots, mut listed) = (0, 0, 0);
    let sample = Sample::of(4);
    for cut in 0..replay.cuts() {
        let before = cut.checked_sub(1).map(|last| &replay.changes[last]);
        // Of the many files of a job, some.
        if before.is_some_and(is_the_jobs) && cut % 7 != 0 {
            continue;
        }
        cuts += 1;
        let mut all = vec![("in order", replay.in_order(cut))];
        let worst = replay.at_worst(cut, |change| !is_the_jobs(change));
        let worst = worst.into_iter().filter(|_| sample.has(cut));
        all.extend(worst.map(|files| ("at worst", files)));
        for (how, files) in all {
            // The same disk may be right before the start, and wrong after it.
            if !seen.insert((files.clone(), cut >= started_from)) {
                continue;
            }
            boots += 1;
            let what = format!("the power goes after {before:?}, step {cut}, {how}");
            let from = test.helper.log.len();
            test.boot(&files);
            let workers = list(&Client::new(&test.host));
            assert!(workers.len() <= 1, "{what}: {workers:?}");
            let log = test.helper.log.text_from(from);
            assert!(!log.contains("damaged"), "{what}: a record is damaged");
            // A disk that reorders a deletion may keep files of a worker that nobody knows; they are nobody's.
            let has_files = files.keys().any(|path| path.iter().any(|part| part == "fs"));
            assert!(
                !workers.is_empty() || !has_files || how != "in order",
                "{what}: its slot is free, and its files are there"
            );
            for info in &workers {
                listed += 1;
                assert_eq!((info.worker, info.slot.as_str()), (worker, "a"), "{what}");
                assert!(test.host.uids.contains(&info.uid.get()), "{what}");
                let started = info.state != State::Created;
                assert!(info.state != State::Running, "{what}");
                // Deleting is not synced: a disk that reorders it may have lost the mark before the rest.
                let may_be_older = cut < started_from || (started_from == 0 && how != "in order");
                assert!(
                    started || may_be_older,
                    "{what}: its agent would be started twice"
                );
            }
            test.assert_other_slot_works(&what);
            test.end(worker, &what);
        }
    }
    println!(
        "{} writes, cut at {cuts} points: {boots} different disks booted with, {listed} with a worker",
        replay.changes.len()
    );
    assert!(cuts > 20 && boots >= cuts && listed > 10, "that is too few");
}

fn agent() -> std::os::fd::OwnedFd {
    sealed_memfd(AGENT)
}

#[test]
fn power_loss_while_a_worker_is_made_and_started_leaves_one_that_delete_removes() {
    let mut test = PowerLossTest::new();
    let root = test.state_dir();
    let base = Disk::copy(&root);
    let worker = worker_id();
    let (mut changes, _) = test.record(|client| {
        assert!(matches!(create(client, worker, "a"), Reply::UserCreated { .. }));
    });
    let mut console = None;
    let (installing, started_at) = test.record(|client| {
        let (reply, file) = install(client, worker, agent());
        assert_eq!(reply, Reply::AgentStarted);
        console = file;
    });
    let started = changes.len() + started_at.expect("the agent was started");
    changes.extend(installing);
    wait_for_line(&console.expect("it came with the reply"), "ready");
    test.end(worker, "nothing was cut off");
    let replay = Replay::new(base, &root, &changes);
    assert_eq!(replay.changes, changes, "every recorded change makes sense");
    boot_with_each(&mut test, &replay, worker, started);
}

#[test]
fn power_loss_while_a_worker_is_killed_and_deleted_leaves_one_that_delete_removes() {
    let mut test = PowerLossTest::new();
    let root = test.state_dir();
    let worker = worker_id();
    {
        let client = Client::new(&test.host);
        assert!(matches!(create(&client, worker, "a"), Reply::UserCreated { .. }));
        let (reply, console) = install(&client, worker, agent());
        assert_eq!(reply, Reply::AgentStarted);
        wait_for_line(&console.expect("it came with the reply"), "ready");
    }
    let base = Disk::copy(&root);
    let (mut changes, _) = test.record(|client| {
        assert_eq!(client.ask(&Request::Kill { worker }).0, Reply::Killed);
    });
    let deleting = test.record(|client| {
        assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    });
    changes.extend(deleting.0);
    test.end(worker, "nothing was cut off");
    let replay = Replay::new(base, &root, &changes);
    assert_eq!(
        replay.changes.len(),
        changes.len(),
        "every recorded change makes sense"
    );
    boot_with_each(&mut test, &replay, worker, 0);
}

#[test]
fn power_loss_at_the_helpers_first_start_does_not_keep_it_from_the_next() {
    let mut test = PowerLossTest::new();
    let root = test.state_dir();
    test.helper.signal(Signal::SIGKILL);
    test.helper.wait_for_end();
    fs::remove_dir_all(root.join("workers")).unwrap();
    let base = Disk::copy(&root);
    let recorder = Arc::new(Mutex::new(Recorder::new(&root)));
    let tap = recorder.clone();
    let pid = test.helper.start_stopped();
    testbed::tracer::wait_until_stopped(pid);
    let watcher = watch_with(pid, WatchPeriod::Start, None, move |pid, event| {
        tap.lock().unwrap().on(pid, event);
    });
    watcher.join().expect("the tracer does not fail");
    let changes = std::mem::take(&mut recorder.lock().unwrap().changes);
    let replay = Replay::new(base, &root, &changes);
    assert!(
        replay.cuts() >= 3,
        "the directory is made and closed: {changes:?}"
    );
    for cut in 0..replay.cuts() {
        let all = replay.at_worst(cut, |_: &Change| true);
        for files in [replay.in_order(cut)].iter().chain(&all) {
            test.boot(files);
            test.assert_other_slot_works("after the first start");
        }
    }
}

/// For paths of a worker's.
pub fn worker_file(test: &PowerLossTest, worker: WorkerId, name: impl AsRef<Path>) -> std::path::PathBuf {
    test.host.worker_dir(worker).join(name)
}
