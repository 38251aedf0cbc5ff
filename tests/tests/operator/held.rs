//! A worker that failed: how the operator learns of it, what they see, and how it goes.

use testbed::house::{ONE, lines};

use super::*;

/// An agent that fails before it comes online.
const BROKEN: &str = "#!/bin/bash\necho the last words; exit 9\n";

async fn broken_house(slots: &str) -> (House, testbed::server::Ulid) {
    let place = tempfile::tempdir().unwrap();
    let agent = place.path().join("agent");
    std::fs::write(&agent, BROKEN).unwrap();
    let house = House::with_agent(slots, agent).await;
    let job = house.submit("true");
    // The server reads it once, when it is asked for it.
    house.held_or_ended(job).await;
    (house, job)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_worker_is_seen_at_a_glance_understood_and_released() {
    let (house, job) = broken_house(ONE).await;
    house.held(job).await;
    see(&house, |status| {
        (status["workers"][0]["phase"] == "held").then_some(())
    })
    .await;
    let said = say(&house, &["status"]);
    assert_eq!(said.status, 4, "it waits for a person");
    let worker = worker_on(&house, "a").await;
    for part in [
        "broken",
        "waiting for a person",
        &*worker,
        "exited with status 9",
        "last problems",
    ] {
        assert!(said.out.contains(part), "{part}: {}", said.out);
    }
    let shown = done(&house, &["show", &worker]);
    for part in [
        "exited with status 9",
        "the last words",
        "held       for",
        "next       look into it",
        "broken",
    ] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    assert!(done(&house, &["logs", &worker]).contains("the last words"));
    // It is released where it is held: on the server.
    let id = house.server.job(job).worker.unwrap();
    house.server.release(id).unwrap();
    see(&house, |status| {
        status["workers"].as_array()?.is_empty().then_some(())
    })
    .await;
    assert_eq!(say(&house, &["show", &worker]).status, 1);
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn destroying_asks_once_and_takes_what_somebody_holds() {
    let house = House::new(ONE).await;
    let job = house.running().await;
    let worker = worker_on(&house, "a").await;
    let said = say(&house, &["destroy", &worker]);
    assert!(
        said.status == 1 && said.err.contains("--yes") && said.err.contains(&job.to_string()),
        "{}",
        said.err
    );
    house.polls(2).await;
    assert!(done(&house, &["workers"]).contains(&worker));
    done(&house, &["destroy", &worker, "--yes"]);
    let ended = house.ended(job).await;
    assert_eq!(ended.state(), "failed");
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_holds_nothing_is_free_again_by_itself_and_the_log_has_the_reason() {
    let (house, job) = broken_house("[slots.a]\ntarget = \"TARGET\"\nhold_on_failure = false\n").await;
    let ended = house.ended(job).await;
    assert_eq!(ended.state(), "failed");
    assert!(
        lines(&ended, "console")
            .iter()
            .any(|line| line == "the last words"),
        "{:#?}",
        ended.events
    );
    house.told(&["exited with status 9"]);
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_slots_scripts_examine_the_host_and_a_fault_keeps_the_worker() {
    let slots = "[slots.a]\ntarget = \"TARGET\"\npre_job_diagnostic_script = \"\"\"\necho before; whoami\n\"\"\"\n\
        post_job_diagnostic_script = \"echo after; false\"\n";
    let house = House::new(slots).await;
    let job = house.submit("echo the job");
    house.held(job).await;
    let ended = house.ended(job).await;
    assert_eq!(ended.state(), "completed");
    let worker = worker_on(&house, "a").await;
    // What they print goes to the worker's own log.
    let examined = house.server.worker(ended.worker.unwrap()).events;
    let examined = examined.iter().filter(|event| event.stream == "stdout");
    let examined: Vec<&str> = examined.map(|event| event.payload.as_str()).collect();
    assert_eq!(
        examined,
        ["before", &format!("bmat-{}", worker.to_lowercase()), "after"]
    );
    assert_eq!(lines(&ended, "stdout"), ["the job"]);
    see(&house, |status| (state_of(status, "a") == "held").then_some(())).await;
    assert_eq!(say(&house, &["status"]).status, 4);
    house.server.release(ended.worker.unwrap()).unwrap();
    house.finish().await;
}

/// A job that has outlasted its slot, and the pages of its worker from when no process of it is left.
async fn outlasted(slots: &str) -> (House, testbed::server::Ulid, String) {
    let house = House::new(&format!(
        "[slots.a]\ntarget = \"TARGET\"\njob_timeout_seconds = 10\n{slots}"
    ))
    .await;
    let job = house.running().await;
    house.held(job).await;
    let worker = worker_on(&house, "a").await;
    (house, job, worker)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_outlasts_its_slot_fails_and_has_no_process_when_it_is_held() {
    let (house, job, worker) = outlasted("").await;
    let shown = json(&house, &["show", &worker]);
    let failure = shown["worker"]["failure"].as_str().unwrap();
    assert!(failure.contains("job_timeout_seconds (10 s)"), "{failure}");
    assert_eq!(shown["processes"], serde_json::json!([]), "{shown:#}");
    assert_eq!(house.ended(job).await.state(), "failed");
    done(&house, &["destroy", &worker, "--yes"]);
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_keeps_the_processes_of_a_failed_worker_until_an_operator_ends_them() {
    let (house, _, worker) = outlasted("keep_processes = true\n").await;
    let shown = json(&house, &["show", &worker]);
    assert!(!shown["processes"].as_array().unwrap().is_empty(), "{shown:#}");
    done(&house, &["kill", &worker]);
    see(&house, |_| {
        let shown = json(&house, &["show", &worker]);
        shown["processes"].as_array()?.is_empty().then_some(())
    })
    .await;
    let failure = json(&house, &["show", &worker])["worker"]["failure"].to_string();
    assert!(
        failure.contains("job_timeout_seconds"),
        "the first reason stays: {failure}"
    );
    done(&house, &["destroy", &worker, "--yes"]);
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_an_operator_kills_keeps_its_files_and_the_job_is_told_who_did_it() {
    let house = House::new(ONE).await;
    let job = house.running().await;
    let worker = worker_on(&house, "a").await;
    done(&house, &["kill", &worker]);
    house.held(job).await;
    let reason = format!("an operator (uid {}) ended its processes", nix::unistd::getuid());
    let shown = json(&house, &["show", &worker]);
    assert!(
        shown["worker"]["failure"].as_str().unwrap().contains(&reason),
        "{shown:#}"
    );
    assert_eq!(shown["processes"], serde_json::json!([]), "{shown:#}");
    house.told(&["an operator ends a worker's processes", "uid 0"]);
    let files = house
        .host
        .root
        .join("var/lib/buildomat-user-factory/workers")
        .join(&worker)
        .join("fs/work");
    assert!(files.is_dir(), "its files stay");
    assert_eq!(house.ended(job).await.state(), "failed");
    let unknown = say(&house, &["kill", "01HZX3N8Q4J5W56M9W8969S0XP"]);
    assert!(
        unknown.status == 1 && unknown.err.contains("there is no worker"),
        "{}",
        unknown.err
    );
    done(&house, &["destroy", &worker, "--yes"]);
    house.finish().await;
}
