//! Rows 100 and 115: several hosts with one token, and a database that is an older one or comes from elsewhere.

use std::process::Command;

use testbed::census::Census;

use super::*;

/// A second host with the token and the slots of the first.
struct Second {
    supervisor: Running,
    _helper: Running,
    host: TestHost,
    before: Census,
}

impl Second {
    fn beside(house: &House) -> Second {
        Second::prepared(house, |_| ())
    }

    /// The same, with something done before its supervisor starts.
    fn prepared(house: &House, prepare: impl FnOnce(&TestHost)) -> Second {
        let host = TestHost::new();
        host.configure(&house.url(), SUPERVISOR_UID, &one(house));
        let token = fs::read_to_string(house.host.root.join("token")).unwrap();
        host.write_token(&token);
        let before = Census::take(&host);
        let helper = host.helper();
        prepare(&host);
        Second {
            supervisor: host.supervisor(),
            _helper: helper,
            host,
            before,
        }
    }
}

fn one(house: &House) -> String {
    ONE.replace("TARGET", &house.target.to_string())
}

/// Wait for a line of this supervisor's log.
fn told(supervisor: &Running, parts: &[&str]) -> String {
    tokio::task::block_in_place(|| supervisor.log.wait(parts))
}

/// A job that runs until this file of the shared directory is there.
fn submit_until(house: &House, file: &str) -> Ulid {
    let path = house.shared().join(file);
    let path = path.display();
    house.submit(&format!(
        "echo running; while ! [ -e {path} ]; do read -t 0.2 < <(sleep 1); done; echo done"
    ))
}

fn release(house: &House, file: &str) {
    fs::write(house.shared().join(file), "").unwrap();
}

const SHARED: [&str; 3] = [
    "ERROR",
    "another host uses this factory's token",
    "a token of its own",
];

/// This host says of that worker that it is another's, in every way that a person may look.
async fn is_shown(house: &House, host: &TestHost, supervisor: &Running, worker: Ulid) {
    let mark = house.server.worker(worker).private.expect("it is associated");
    told(supervisor, &SHARED);
    let (status, text) = command(host, &["status"]);
    assert_eq!(status, 4, "{text}");
    for part in [&mark, &worker.to_string(), "SLOT@", "user-factory destroy"] {
        assert!(text.contains(part), "no {part}:\n{text}");
    }
    once(&supervisor.log, 0, &SHARED);
}

/// Every worker of this server has been seen to its end by whoever made it.
async fn all_deleted(house: &House) {
    house
        .see(|state| state.workers.values().all(|worker| worker.deleted).then_some(()))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_100_two_hosts_with_one_token_end_no_job_of_each_other_and_both_say_so() {
    let house = House::new(ONE).await;
    let first = submit_until(&house, "first");
    house.printed(first, "running").await;
    let second = Second::beside(&house);
    let worker = worker_of(&house, first);
    is_shown(&house, &second.host, &second.supervisor, worker).await;
    // A job that the second could take waits.
    let next = submit_until(&house, "second");
    house.polls(6).await;
    assert_eq!(house.server.job(next).worker, None, "a job was taken");
    assert!(!house.server.worker(worker).deleted && !house.server.job(first).complete());
    // Once the first has nothing, the second takes it; and then it is the first that leaves it alone.
    assert_eq!(command(&house.host, &["drain"]).0, 0);
    release(&house, "first");
    house.completed(first).await;
    house.printed(next, "running").await;
    assert_eq!(command(&house.host, &["resume"]).0, 0);
    let worker = worker_of(&house, next);
    is_shown(&house, &house.host, &house.supervisor, worker).await;
    let marks = [first, next].map(|job| house.server.worker(worker_of(&house, job)).private.unwrap());
    let ids = marks
        .each_ref()
        .map(|mark| mark.split_once('/').expect("an instance id").1);
    assert_ne!(ids[0], ids[1], "{marks:?}");
    let last = house.submit("echo last");
    house.polls(6).await;
    assert_eq!(house.server.job(last).worker, None, "a job was taken");
    release(&house, "second");
    house.completed(next).await;
    house.completed(last).await;
    all_deleted(&house).await;
    second.before.assert_unchanged(&second.host);
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_100_a_worker_of_a_host_that_is_gone_is_deleted_by_the_operator_alone() {
    let mut house = House::new(ONE).await;
    let job = house.running().await;
    let worker = worker_of(&house, job);
    house.end_supervisor(Signal::SIGKILL);
    let second = Second::beside(&house);
    is_shown(&house, &second.host, &second.supervisor, worker).await;
    let id = worker.to_string();
    let (status, text) = command(&second.host, &["destroy", &id]);
    assert!(
        status == 1 && text.contains("another host uses") && text.contains("add --yes"),
        "{text}"
    );
    house.polls(3).await;
    assert!(!house.server.worker(worker).deleted);
    let (status, text) = command(&second.host, &["destroy", &id, "--yes"]);
    assert_eq!(status, 0, "{text}");
    house
        .see(|state| state.workers[&worker].deleted.then_some(()))
        .await;
    assert_eq!(house.ended(job).await.state(), "failed");
    let next = house.submit("echo next");
    house.completed(next).await;
    all_deleted(&house).await;
    let (status, text) = command(&second.host, &["status", "--json"]);
    assert!(status == 0 && text.contains("\"foreign\": []"), "{text}");
    second.before.assert_unchanged(&second.host);
    // The host was not gone: it finds that its worker is.
    house.supervisor = house.host.supervisor();
    house.told(&["worker forgotten", &id]);
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_115_a_state_directory_that_was_copied_to_another_machine_ends_no_job() {
    let mut house = House::new(ONE).await;
    let job = house.running().await;
    let worker = worker_of(&house, job);
    let from = house.state_dir();
    let second = Second::prepared(&house, |host| {
        let to = host.root.join(protocol::config::STATE_DIR);
        let status = Command::new("cp").arg("-a").args([&from, &to]).status();
        assert!(status.unwrap().success());
    });
    told(
        &second.supervisor,
        &["ERROR", "comes from another machine", "1 were in the database"],
    );
    is_shown(&house, &second.host, &second.supervisor, worker).await;
    house.polls(6).await;
    assert!(!house.server.worker(worker).deleted && !house.server.job(job).complete());
    // The first is what it was, also after a restart.
    house.end_supervisor(Signal::SIGTERM);
    house.supervisor = house.host.supervisor();
    house.polls(2).await;
    house.let_end();
    house.completed(job).await;
    all_deleted(&house).await;
    second.before.assert_unchanged(&second.host);
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_115_a_database_of_yesterday_loses_no_job() {
    let mut house = House::new(TWO).await;
    let yesterday = submit_until(&house, "yesterday");
    house.printed(yesterday, "running").await;
    house.polls(2).await;
    assert!(house.end_supervisor(Signal::SIGTERM).success());
    let (path, backup) = (
        house.state_dir().join("factory.db"),
        house.shared().join("backup"),
    );
    fs::copy(&path, &backup).unwrap();
    house.supervisor = house.host.supervisor();
    release(&house, "yesterday");
    house.completed(yesterday).await;
    let job = house.running().await;
    let worker = worker_of(&house, job).to_string();
    house.polls(2).await;
    assert!(house.end_supervisor(Signal::SIGTERM).success());
    // Its content, not its owner.
    fs::write(&path, fs::read(&backup).unwrap()).unwrap();
    house.supervisor = house.host.supervisor();
    house.told(&["worker taken on as online", &worker]);
    let next = house.submit("echo next");
    house.completed(next).await;
    house.let_end();
    house.completed(job).await;
    let (status, text) = command(&house.host, &["status"]);
    assert_eq!(status, 0, "{text}");
    house.finish().await;
}
