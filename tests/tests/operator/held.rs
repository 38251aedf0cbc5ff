//! A worker that failed: how the operator learns of it, what they see, and how it goes.

use testbed::test_factory::{ONE, lines};

use super::*;

/// An agent that fails before it comes online.
const BROKEN: &str = "#!/bin/bash\necho the last words; exit 9\n";

async fn factory_with_broken_worker(slots: &str) -> (TestFactory, testbed::fake_server::Ulid) {
    let place = tempfile::tempdir().unwrap();
    let agent = place.path().join("agent");
    std::fs::write(&agent, BROKEN).unwrap();
    let factory = TestFactory::with_agent(slots, agent).await;
    let job = factory.submit("true");
    // The server reads it once, when it is asked for it.
    factory.wait_held_or_ended(job).await;
    (factory, job)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_worker_is_seen_at_a_glance_understood_and_released() {
    let (factory, job) = factory_with_broken_worker(ONE).await;
    let hold = factory.wait_held(job).await.hold.unwrap();
    assert!(hold.reason.contains("status 9"), "{}", hold.reason);
    see(&factory, |status| {
        (status["workers"][0]["phase"] == "held").then_some(())
    })
    .await;
    let result = run_command(&factory, &["status"]);
    assert_eq!(result.status, 4, "it waits for an operator");
    let worker = worker_on(&factory, "a").await;
    for part in [
        "broken",
        "waiting for an operator",
        &*worker,
        "exited with status 9",
        "last problems",
    ] {
        assert!(result.out.contains(part), "{part}: {}", result.out);
    }
    let shown = done(&factory, &["show", &worker]);
    for part in [
        "exited with status 9",
        "the last words",
        "held       for",
        "next       look into it",
        "broken",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    assert!(done(&factory, &["logs", &worker]).contains("the last words"));
    // It is released where it is held: on the server.
    let id = factory.server.job(job).worker.unwrap();
    factory.server.release(id).unwrap();
    see(&factory, |status| {
        status["workers"].as_array()?.is_empty().then_some(())
    })
    .await;
    assert_eq!(run_command(&factory, &["show", &worker]).status, 1);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn destroy_asks_for_confirmation_and_takes_held_workers() {
    let factory = TestFactory::new(ONE).await;
    let job = factory.start_blocking_job().await;
    let worker = worker_on(&factory, "a").await;
    let result = run_command(&factory, &["destroy", &worker]);
    result.failed(1, &["--yes", &job.to_string()]);
    factory.wait_polls(2).await;
    assert!(done(&factory, &["workers"]).contains(&worker));
    done(&factory, &["destroy", &worker, "--yes"]);
    let ended = factory.wait_for_end(job).await;
    assert_eq!(ended.state(), "failed");
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_holds_nothing_is_free_again_by_itself_and_the_log_has_the_reason() {
    let (factory, job) =
        factory_with_broken_worker("[slots.a]\ntarget = \"TARGET\"\nhold_on_failure = false\n").await;
    let ended = factory.wait_for_end(job).await;
    assert_eq!(ended.state(), "failed");
    assert!(
        lines(&ended, "console")
            .iter()
            .any(|line| line == "the last words"),
        "{:#?}",
        ended.events
    );
    factory.wait_for_log(&["exited with status 9"]);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_slots_scripts_examine_the_host_and_a_fault_keeps_the_worker() {
    let slots = "[slots.a]\ntarget = \"TARGET\"\npre_job_diagnostic_script = \"\"\"\necho before; whoami\n\"\"\"\n\
        post_job_diagnostic_script = \"echo after; false\"\n";
    let factory = TestFactory::new(slots).await;
    let job = factory.submit("echo the job");
    factory.wait_held(job).await;
    let ended = factory.wait_for_end(job).await;
    assert_eq!(ended.state(), "completed");
    let worker = worker_on(&factory, "a").await;
    // What they print goes to the worker's own log.
    let examined = factory.server.worker(ended.worker.unwrap()).events;
    let examined = examined.iter().filter(|event| event.stream == "stdout");
    let examined: Vec<&str> = examined.map(|event| event.payload.as_str()).collect();
    assert_eq!(
        examined,
        ["before", &format!("bmat-{}", worker.to_lowercase()), "after"]
    );
    assert_eq!(lines(&ended, "stdout"), ["the job"]);
    see(&factory, |status| (state_of(status, "a") == "held").then_some(())).await;
    assert_eq!(run_command(&factory, &["status"]).status, 4);
    factory.server.release(ended.worker.unwrap()).unwrap();
    factory.finish().await;
}

/// A job that has outlasted its slot, and the pages of its worker from when no process of it is left.
async fn outlasted(slots: &str) -> (TestFactory, testbed::fake_server::Ulid, String) {
    let factory = TestFactory::new(&format!(
        "[slots.a]\ntarget = \"TARGET\"\njob_timeout_seconds = 10\n{slots}"
    ))
    .await;
    let job = factory.start_blocking_job().await;
    factory.wait_held(job).await;
    let worker = worker_on(&factory, "a").await;
    (factory, job, worker)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_outlasts_its_slot_fails_and_has_no_process_when_it_is_held() {
    let (factory, job, worker) = outlasted("").await;
    let shown = json(&factory, &["show", &worker]);
    let failure = shown["worker"]["failure"].as_str().unwrap();
    assert!(failure.contains("job_timeout_seconds (10 s)"), "{failure}");
    assert_eq!(shown["processes"], serde_json::json!([]), "{shown:#}");
    assert_eq!(factory.wait_for_end(job).await.state(), "failed");
    done(&factory, &["destroy", &worker, "--yes"]);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_keeps_the_processes_of_a_failed_worker_until_an_operator_ends_them() {
    let (factory, _, worker) = outlasted("keep_processes = true\n").await;
    let shown = json(&factory, &["show", &worker]);
    assert!(!shown["processes"].as_array().unwrap().is_empty(), "{shown:#}");
    done(&factory, &["kill", &worker]);
    see(&factory, |_| {
        let shown = json(&factory, &["show", &worker]);
        shown["processes"].as_array()?.is_empty().then_some(())
    })
    .await;
    let failure = json(&factory, &["show", &worker])["worker"]["failure"].to_string();
    assert!(
        failure.contains("job_timeout_seconds"),
        "the first reason stays: {failure}"
    );
    done(&factory, &["destroy", &worker, "--yes"]);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_an_operator_kills_keeps_its_files_and_the_jobs_log_says_who_did_it() {
    let factory = TestFactory::new(ONE).await;
    let job = factory.start_blocking_job().await;
    let worker = worker_on(&factory, "a").await;
    done(&factory, &["kill", &worker]);
    factory.wait_held(job).await;
    let reason = format!("an operator (uid {}) ended its processes", nix::unistd::getuid());
    let shown = json(&factory, &["show", &worker]);
    assert!(
        shown["worker"]["failure"].as_str().unwrap().contains(&reason),
        "{shown:#}"
    );
    assert_eq!(shown["processes"], serde_json::json!([]), "{shown:#}");
    factory.wait_for_log(&["an operator ends a worker's processes", "uid 0"]);
    let files = factory
        .host
        .root
        .join("var/lib/buildomat-user-factory/workers")
        .join(&worker)
        .join("fs/work");
    assert!(files.is_dir(), "its files stay");
    assert_eq!(factory.wait_for_end(job).await.state(), "failed");
    let unknown = run_command(&factory, &["kill", "01HZX3N8Q4J5W56M9W8969S0XP"]);
    assert!(
        unknown.status == 1 && unknown.err.contains("there is no worker"),
        "{}",
        unknown.err
    );
    done(&factory, &["destroy", &worker, "--yes"]);
    factory.finish().await;
}
