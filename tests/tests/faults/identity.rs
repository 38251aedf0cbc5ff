//! Rows 100 and 115: several hosts with one token, and a database that is an older one or comes from elsewhere.

use std::process::Command;

use testbed::host_snapshot::HostSnapshot;

use super::*;

/// A second host with the token and the slots of the first.
struct Second {
    supervisor: Running,
    _helper: Running,
    host: TestHost,
    before: HostSnapshot,
}

impl Second {
    fn beside(factory: &TestFactory) -> Second {
        Second::prepared(factory, |_| ())
    }

    /// The same, with something done before its supervisor starts.
    fn prepared(factory: &TestFactory, prepare: impl FnOnce(&TestHost)) -> Second {
        let host = TestHost::new();
        host.configure(&factory.url(), SUPERVISOR_UID, &one(factory));
        let token = fs::read_to_string(factory.host.root.join("token")).unwrap();
        host.write_token(&token);
        let before = HostSnapshot::of_unused(&host);
        let helper = host.start_helper();
        prepare(&host);
        Second {
            supervisor: host.start_supervisor(),
            _helper: helper,
            host,
            before,
        }
    }
}

fn one(factory: &TestFactory) -> String {
    ONE.replace("TARGET", &factory.target.to_string())
}

/// Wait for a line of this supervisor's log.
fn logged(supervisor: &Running, parts: &[&str]) -> String {
    tokio::task::block_in_place(|| supervisor.log.wait(parts))
}

/// A job that runs until this file of the shared directory is there.
fn submit_until(factory: &TestFactory, file: &str) -> Ulid {
    let path = factory.shared().join(file);
    let path = path.display();
    factory.submit(&format!(
        "echo running; while ! [ -e {path} ]; do sleep 0.2; done; echo done"
    ))
}

fn release(factory: &TestFactory, file: &str) {
    fs::write(factory.shared().join(file), "").unwrap();
}

const SHARED: [&str; 3] = [
    "ERROR",
    "another host uses this factory's token",
    "a token of its own",
];

/// This host says of that worker that it is another's, in every output.
async fn is_shown(factory: &TestFactory, host: &TestHost, supervisor: &Running, worker: Ulid) {
    let tag = factory.server.worker(worker).private.expect("it is associated");
    logged(supervisor, &SHARED);
    let (status, text) = command(host, &["status"]);
    assert_eq!(status, 4, "{text}");
    for part in [&tag, &worker.to_string(), "SLOT@", "user-factory destroy"] {
        assert!(text.contains(part), "no {part}:\n{text}");
    }
    once(&supervisor.log, 0, &SHARED);
}

/// Every worker of this server has been deleted by the host that made it.
async fn all_deleted(factory: &TestFactory) {
    factory
        .wait_for_state(|state| state.workers.values().all(|worker| worker.deleted).then_some(()))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_100_two_hosts_with_one_token_end_no_job_of_each_other_and_both_say_so() {
    let factory = TestFactory::new(ONE).await;
    let first = submit_until(&factory, "first");
    factory.wait_for_line(first, "running").await;
    let second = Second::beside(&factory);
    let worker = worker_of(&factory, first);
    is_shown(&factory, &second.host, &second.supervisor, worker).await;
    // A job that the second could take waits.
    let next = submit_until(&factory, "second");
    factory.wait_polls(6).await;
    assert_eq!(factory.server.job(next).worker, None, "a job was taken");
    assert!(!factory.server.worker(worker).deleted && !factory.server.job(first).is_complete());
    // Once the first has nothing, the second takes it; and then it is the first that leaves it alone.
    assert_eq!(command(&factory.host, &["drain"]).0, 0);
    release(&factory, "first");
    factory.wait_completed(first).await;
    factory.wait_for_line(next, "running").await;
    assert_eq!(command(&factory.host, &["resume"]).0, 0);
    let worker = worker_of(&factory, next);
    is_shown(&factory, &factory.host, &factory.supervisor, worker).await;
    let tags = [first, next].map(|job| factory.server.worker(worker_of(&factory, job)).private.unwrap());
    let ids = tags
        .each_ref()
        .map(|tag| tag.split_once('/').expect("an instance id").1);
    assert_ne!(ids[0], ids[1], "{tags:?}");
    let last = factory.submit("echo last");
    factory.wait_polls(6).await;
    assert_eq!(factory.server.job(last).worker, None, "a job was taken");
    release(&factory, "second");
    factory.wait_completed(next).await;
    factory.wait_completed(last).await;
    all_deleted(&factory).await;
    second.before.assert_unchanged(&second.host);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_100_a_worker_of_a_host_that_is_gone_is_deleted_by_the_operator_alone() {
    let mut factory = TestFactory::new(ONE).await;
    let job = factory.start_blocking_job().await;
    let worker = worker_of(&factory, job);
    factory.end_supervisor(Signal::SIGKILL);
    let second = Second::beside(&factory);
    is_shown(&factory, &second.host, &second.supervisor, worker).await;
    let id = worker.to_string();
    let (status, text) = command(&second.host, &["destroy", &id]);
    assert!(
        status == 1 && text.contains("another host uses") && text.contains("add --yes"),
        "{text}"
    );
    factory.wait_polls(3).await;
    assert!(!factory.server.worker(worker).deleted);
    let (status, text) = command(&second.host, &["destroy", &id, "--yes"]);
    assert_eq!(status, 0, "{text}");
    factory
        .wait_for_state(|state| state.workers[&worker].deleted.then_some(()))
        .await;
    assert_eq!(factory.wait_for_end(job).await.state(), "failed");
    let next = factory.submit("echo next");
    factory.wait_completed(next).await;
    all_deleted(&factory).await;
    let (status, text) = command(&second.host, &["status", "--json"]);
    assert!(status == 0 && text.contains("\"foreign\": []"), "{text}");
    second.before.assert_unchanged(&second.host);
    // The host was not gone: it finds that its worker is.
    factory.supervisor = factory.host.start_supervisor();
    factory.wait_for_log(&["worker forgotten", &id]);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_115_a_state_directory_that_was_copied_to_another_machine_ends_no_job() {
    let mut factory = TestFactory::new(ONE).await;
    let job = factory.start_blocking_job().await;
    let worker = worker_of(&factory, job);
    let from = factory.state_dir();
    let second = Second::prepared(&factory, |host| {
        let to = host.root.join(protocol::config::STATE_DIR);
        let status = Command::new("cp").arg("-a").args([&from, &to]).status();
        assert!(status.unwrap().success());
    });
    logged(
        &second.supervisor,
        &["ERROR", "comes from another machine", "1 were in the database"],
    );
    is_shown(&factory, &second.host, &second.supervisor, worker).await;
    factory.wait_polls(6).await;
    assert!(!factory.server.worker(worker).deleted && !factory.server.job(job).is_complete());
    // The first is what it was, also after a restart.
    factory.end_supervisor(Signal::SIGTERM);
    factory.supervisor = factory.host.start_supervisor();
    factory.wait_polls(2).await;
    factory.release();
    factory.wait_completed(job).await;
    all_deleted(&factory).await;
    second.before.assert_unchanged(&second.host);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_115_a_database_of_yesterday_loses_no_job() {
    let mut factory = TestFactory::new(TWO).await;
    let yesterday = submit_until(&factory, "yesterday");
    factory.wait_for_line(yesterday, "running").await;
    factory.wait_polls(2).await;
    assert!(factory.end_supervisor(Signal::SIGTERM).success());
    let (path, backup) = (
        factory.state_dir().join("factory.db"),
        factory.shared().join("backup"),
    );
    fs::copy(&path, &backup).unwrap();
    factory.supervisor = factory.host.start_supervisor();
    release(&factory, "yesterday");
    factory.wait_completed(yesterday).await;
    let job = factory.start_blocking_job().await;
    let worker = worker_of(&factory, job).to_string();
    factory.wait_polls(2).await;
    assert!(factory.end_supervisor(Signal::SIGTERM).success());
    // Its content, not its owner.
    fs::write(&path, fs::read(&backup).unwrap()).unwrap();
    factory.supervisor = factory.host.start_supervisor();
    factory.wait_for_log(&["worker adopted as online", &worker]);
    let next = factory.submit("echo next");
    factory.wait_completed(next).await;
    factory.release();
    factory.wait_completed(job).await;
    let (status, text) = command(&factory.host, &["status"]);
    assert_eq!(status, 0, "{text}");
    factory.finish().await;
}
