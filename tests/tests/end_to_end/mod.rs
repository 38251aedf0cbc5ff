//! Jobs from the queue to the end, through the real binaries: the fake server, the supervisor as an
//! unprivileged user, the helper as root, the fake agent in its sandbox. Needs root.

mod acceptance;
mod fleet;
mod own_network;
mod package_managers;
mod proxied;
mod steady;

use nix::sys::signal::Signal;
use testbed::harness::{SUPERVISOR_UID, TEST_TIMEOUT};
use testbed::host_snapshot::processes_of;
use testbed::server::{JobSpec, Ulid};
use testbed::test_factory::{ONE, TWO, TestFactory, lines};

#[tokio::test(flavor = "multi_thread")]
async fn a_job_runs_streams_uploads_and_leaves_nothing() {
    let factory = TestFactory::new(ONE).await;
    let mut spec = JobSpec::script(
        "linux",
        "cat /input/in.txt; echo $COLOUR; whoami; pwd; echo oops >&2; tr a-z A-Z < /input/in.txt > /work/out.txt",
    );
    spec.inputs = vec![("in.txt".into(), "words\n".into())];
    spec.output_rules = vec!["/work/*.txt".into()];
    let job = factory.server.submit_job(spec).unwrap();
    let done = factory.ended(job).await;
    assert_eq!(done.state(), "completed", "{:#?}", done.events);
    let user = format!("bmat-{}", done.worker.unwrap().to_string().to_lowercase());
    assert_eq!(lines(&done, "stdout"), ["words", "red", &user, "/work"]);
    // bash may warn of a locale that this host lacks before it.
    assert_eq!(lines(&done, "stderr").last().map(String::as_str), Some("oops"));
    assert_eq!(factory.server.output(job, "/work/out.txt").unwrap(), "WORDS\n");
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_slots_run_two_jobs_at_once_and_a_third_waits() {
    let factory = TestFactory::new(TWO).await;
    // Each waits for a word that only this test gives, by ending it.
    let jobs: Vec<Ulid> = (0..3)
        .map(|_| factory.submit("echo running; while ! [ -e /work/stop ]; do sleep 1; done"))
        .collect();
    factory.printed(jobs[0], "running").await;
    factory.printed(jobs[1], "running").await;
    factory.polls(2).await;
    assert!(factory.server.job(jobs[2]).queued());
    factory.server.cancel(jobs[0]).unwrap();
    factory.printed(jobs[2], "running").await;
    for job in &jobs[1..] {
        factory.server.cancel(*job).unwrap();
    }
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn conflicting_slots_take_turns() {
    let factory = TestFactory::new(
        "[slots.a]\ntarget = \"TARGET\"\n[slots.b]\ntarget = \"TARGET\"\nconflicts_with_slots = [\"a\"]\n",
    )
    .await;
    let jobs: Vec<Ulid> = (0..4).map(|_| factory.submit("echo once")).collect();
    let alive =
        |state: &testbed::server::State| state.workers.values().filter(|worker| !worker.deleted).count();
    // Looked at after every change: never two.
    let never_two = |state: &testbed::server::State| {
        assert!(
            alive(state) <= 1,
            "conflicting slots have workers at the same time"
        );
        jobs.iter().all(|job| state.jobs[job].complete()).then_some(())
    };
    factory.server.wait_for(TEST_TIMEOUT, never_two).await.unwrap();
    assert!(
        jobs.iter()
            .all(|job| factory.server.job(*job).state() == "completed")
    );
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_worker_stays_as_it_is_until_it_is_released() {
    let factory = TestFactory::new(ONE).await;
    let job = factory.submit("echo running; sleep 1000");
    factory.printed(job, "running").await;
    let worker = factory.server.job(job).worker.unwrap();
    factory.server.hold(worker).unwrap();
    factory.server.recycle(worker).unwrap();
    // Two polls later, it is all still there.
    let polls = factory.server.requests("GET /0/factory/workers");
    factory
        .server
        .wait_for(TEST_TIMEOUT, |_| {
            (factory.server.requests("GET /0/factory/workers") > polls + 2).then_some(())
        })
        .await
        .unwrap();
    assert!(
        !processes_of(&factory.host.uids).is_empty(),
        "a held worker was touched"
    );
    factory.server.release(worker).unwrap();
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_no_program_breaks_the_worker_with_the_reason_in_the_jobs_log() {
    let directory = tempfile::tempdir().unwrap();
    let agent = directory.path().join("agent");
    std::fs::write(&agent, b"\x7fthis is no program").unwrap();
    let factory = TestFactory::with_agent(ONE, agent).await;
    let job = factory.submit("echo never");
    let done = factory.ended(job).await;
    assert_eq!(done.state(), "failed");
    let console = lines(&done, "console").join("\n");
    assert!(console.contains("Exec format error"), "{console}");
    // Held for an operator; released, it is deleted.
    let held = factory.server.worker(done.worker.unwrap());
    assert!(
        held.hold
            .is_some_and(|hold| hold.reason.contains("Exec format error"))
    );
    factory.server.release(held.id).unwrap();
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_dies_at_start_breaks_the_worker_with_its_last_words() {
    let directory = tempfile::tempdir().unwrap();
    let agent = directory.path().join("agent");
    std::fs::write(&agent, "#!/bin/bash\necho my last words\nexit 9\n").unwrap();
    let factory = TestFactory::with_agent(ONE, agent).await;
    let job = factory.submit("echo never");
    let done = factory.ended(job).await;
    assert_eq!(done.state(), "failed");
    assert!(
        lines(&done, "console").iter().any(|line| line == "my last words"),
        "{:#?}",
        done.events
    );
    let held = factory.server.worker(done.worker.unwrap());
    assert!(
        held.hold
            .as_ref()
            .is_some_and(|hold| hold.reason.contains("status 9")),
        "{held:?}"
    );
    factory.server.release(held.id).unwrap();
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_never_bootstraps_is_timed_out() {
    let directory = tempfile::tempdir().unwrap();
    let agent = directory.path().join("agent");
    std::fs::write(
        &agent,
        "#!/bin/bash\necho waiting for ever\nsleep 1000 & exit 0\n",
    )
    .unwrap();
    let factory = TestFactory::with_agent(&format!("online_timeout_seconds = 5\n{ONE}"), agent).await;
    let job = factory.submit("echo never");
    let done = factory.ended(job).await;
    assert_eq!(done.state(), "failed");
    assert!(
        lines(&done, "console")
            .iter()
            .any(|line| line == "waiting for ever"),
        "{:#?}",
        done.events
    );
    factory.server.release(done.worker.unwrap()).unwrap();
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_job_leaves_behind_goes_with_it() {
    let factory = TestFactory::new(ONE).await;
    let job = factory.submit(
        r#"(setsid nohup sleep 1000 >/dev/null 2>&1 &)
        mkdir -p dark/er; touch dark/er/file $'odd\nname'; chmod 0 dark/er dark
        touch /tmp/x /var/tmp/x "$HOME/x" /dev/shm/x /opt/buildomat/x
        ipcmk -M 1000; ipcmk -Q; ipcmk -S 1; touch /dev/mqueue/x; echo left"#,
    );
    let done = factory.ended(job).await;
    assert_eq!(done.state(), "completed", "{:#?}", done.events);
    let uids = factory.host.uids.clone();
    factory.finish().await;
    // Once, on the whole disk.
    let (above, below) = (format!("+{}", uids.start() - 1), format!("-{}", uids.end() + 1));
    let find = std::process::Command::new("find")
        .args([
            "/", "-xdev", "-uid", &above, "-uid", &below, "-not", "-path", "/proc/*",
        ])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&find.stdout), "", "files are left");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_supervisor_told_to_stop_leaves_the_running_job_alone() {
    let mut factory = TestFactory::new(ONE).await;
    let job = factory.submit("echo running; sleep 3; echo done");
    factory.printed(job, "running").await;
    factory.supervisor.signal(Signal::SIGTERM);
    assert!(factory.supervisor.wait().success());
    factory.printed(job, "done").await;
    factory.supervisor = factory.host.supervisor();
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_removed_while_its_worker_lives_is_still_cleaned_up() {
    let mut factory = TestFactory::new(TWO).await;
    let job = factory.submit("echo running; sleep 1000");
    factory.printed(job, "running").await;
    let slot = factory
        .server
        .worker(factory.server.job(job).worker.unwrap())
        .private
        .unwrap();
    let slot = slot.split('@').next().unwrap();
    let target = factory.server.job(job).target;
    let other = if slot == "a" { "b" } else { "a" };
    factory.supervisor.signal(Signal::SIGTERM);
    factory.supervisor.wait();
    factory.host.configure(
        &factory.server.url(),
        SUPERVISOR_UID,
        &format!("[slots.{other}]\ntarget = \"{target}\"\n"),
    );
    factory.supervisor = factory.host.supervisor();
    factory.server.cancel(job).unwrap();
    factory.finish().await;
}
