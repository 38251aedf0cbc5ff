//! The supervisor's database.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, mpsc};

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use protocol::config::STATE_DIR;
use supervisor::store::Store;
use supervisor::worker::Worker;
use testbed::fake_server::{JobSpec, Server, ServerOptions, State};
use testbed::harness::{SUPERVISOR_UID, TEST_TIMEOUT, TestHost, binaries};
use testbed::service_manager::Service;
use testbed::tracer::recorder::{Change, Recorder};
use testbed::tracer::replay::{Disk, Files, Replay, put};
use testbed::tracer::{Event, TraceAction, trace, wait_until_stopped};

/// What a supervisor writes below its directory, from its first start to the end of its first job.
async fn record(host: &TestHost) -> Vec<Change> {
    let options = ServerOptions {
        agent: Some(binaries().join("fake-agent")),
        ..ServerOptions::default()
    };
    let server = Server::start(options).await.unwrap();
    let target = server.add_target("linux");
    let (_, token) = server.add_factory("here");
    let slots = format!("[slots.a]\ntarget = \"{target}\"\n");
    host.configure(&server.url(), SUPERVISOR_UID, &slots);
    host.write_token(&token);
    let _helper = host.start_helper();
    let job = server.submit_job(JobSpec::script("linux", "echo once")).unwrap();
    let mut supervisor = Service::of_user(SUPERVISOR_UID, &mut host.supervisor_command());
    let pid = supervisor.start_stopped();
    wait_until_stopped(pid);
    let recorder = Arc::new(Mutex::new(Recorder::new(
        &host.root.join(STATE_DIR).join("supervisor"),
    )));
    let (tap, (ready, attached)) = (recorder.clone(), mpsc::channel());
    let tracer = std::thread::spawn(move || {
        let attached = || {
            let _ = ready.send(());
        };
        trace(
            Pid::from_raw(pid as i32),
            &[],
            attached,
            |thread, event: Event| {
                tap.lock().unwrap().on(thread, &event);
                TraceAction::GoOn
            },
        );
    });
    attached.recv().unwrap();
    let over = |state: &State| {
        let gone = state.workers.values().all(|worker| worker.deleted);
        (state.jobs[&job].is_complete() && gone).then_some(())
    };
    server.wait_for(TEST_TIMEOUT, over).await.unwrap();
    supervisor.log.wait(&["worker forgotten"]);
    supervisor.signal(Signal::SIGKILL);
    tracer.join().expect("the tracer does not fail");
    supervisor.wait_for_end();
    std::mem::take(&mut recorder.lock().unwrap().changes)
}

/// What a new supervisor would find on this disk.
fn workers_on(files: &Files) -> Result<Vec<Worker>, String> {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory");
    let mut database = files.clone();
    // The index of the log is shared memory of the living (SQLite's documentation of its write-ahead log): what a
    // disk keeps of it by chance is a matter of pages, and no write.
    database.retain(|path, _| !path.starts_with("agent") && !path.ends_with("factory.db-shm"));
    put(&database, dir.path());
    let store = Store::open(dir.path()).map_err(|error| format!("{error:#}"))?;
    store.workers().map_err(|error| format!("{error:#}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn power_loss_at_any_write_of_the_supervisor_leaves_its_workers_as_they_were_at_some_moment() {
    let host = TestHost::new();
    let root = host.root.join(STATE_DIR).join("supervisor");
    let base = Disk::copy(&root);
    let changes = record(&host).await;
    let is_the_agents = |change: &Change| change.path().starts_with(root.join("agent"));
    let changes: Vec<Change> = changes
        .into_iter()
        .filter(|change| !is_the_agents(change))
        .collect();
    let replay = Replay::new(base, &root, &changes);
    assert_eq!(
        replay.changes.len(),
        changes.len(),
        "every recorded change makes sense"
    );
    // What each moment has, in order, and since when it is sure to last.
    let mut moments: Vec<Vec<Worker>> = Vec::new();
    let mut lasting = 0;
    let mut seen: BTreeSet<Files> = BTreeSet::new();
    let mut opened = 0;
    for cut in 0..replay.cuts() {
        let before = cut.checked_sub(1).map(|last| &replay.changes[last]);
        let what = || format!("the power goes after step {cut}, {}", describe(before));
        let now = workers_on(&replay.in_order(cut)).unwrap_or_else(|e| panic!("{}: {e}", what()));
        if moments.last() != Some(&now) {
            // What was saved is synced before anything else is begun.
            assert!(
                lasting + 1 >= moments.len(),
                "{}: the last save was not synced",
                what()
            );
            moments.push(now);
        }
        if matches!(before, Some(Change::Sync { path }) if !path.is_dir()) {
            lasting = moments.len() - 1;
        }
        for files in replay.at_worst(cut, |_| true) {
            if !seen.insert(files.clone()) {
                continue;
            }
            opened += 1;
            let found = workers_on(&files).unwrap_or_else(|e| panic!("{}, at worst: {e}", what()));
            assert!(
                moments[lasting..].contains(&found),
                "{}, at worst: what was synced is lost\nfound {found:#?}",
                what()
            );
        }
    }
    println!(
        "{} writes, cut at each: {opened} different databases opened, with {} different contents",
        changes.len(),
        moments.len()
    );
    assert!(changes.len() > 50 && moments.len() > 5, "that is too few");
}

fn describe(change: Option<&Change>) -> String {
    match change {
        Some(Change::Write { path, at, bytes }) => {
            format!("{} bytes at {at} of {}", bytes.len(), path.display())
        }
        other => format!("{other:?}"),
    }
}
