//! Row 79: the server unreachable, slow, lying, or of yesterday.

use std::time::Duration;

use testbed::fake_server::{LEASE, Outage};
use testbed::faulty_proxy::{Fault, Proxy};

use super::*;

fn proxy(factory: &TestFactory) -> &Proxy {
    factory.proxy.as_ref().expect("the factory was built behind one")
}

/// Let the factory's requests meet this fault for a while, with a job running. One line tells, with these parts;
/// then all is well again.
async fn survived(factory: &TestFactory, fault: Fault, parts: &[&str]) {
    let seen = factory.supervisor.log.len();
    proxy(factory).set("/0/factory/", fault.clone());
    let parts = [
        &[
            "ERROR server unreachable: ",
            "the buildomat server",
            "if this goes on, ",
        ],
        parts,
    ]
    .concat();
    factory.wait_for_log_from(seen, &parts);
    if !matches!(fault, Fault::Refuse) {
        proxy(factory).wait_for_faults(3).await;
    }
    once(&factory.supervisor.log, seen, &["ERROR"]);
    proxy(factory).clear_fault();
    factory.wait_for_log_from(seen, &["server back"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn row_79_invalid_answers_are_logged_once_each_and_harm_no_job() {
    let factory = TestFactory::behind_a_proxy(ONE).await;
    let job = factory.start_blocking_job().await;
    let html = "<html><h1>It works!</h1></html>";
    let list = "[{\"id\": \"01HZX3N8Q4J5K6M7P8R9S0T1V2\", \"online\": tr";
    for (fault, parts) in [
        // Refused or reset: a request may be on its way.
        (Fault::Refuse, ["cannot be reached", ""]),
        (Fault::Close, ["cannot be reached", ""]),
        (
            Fault::Respond(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()),
            ["cannot be reached", ""],
        ),
        (
            Fault::answer("200 OK", "text/html", html),
            ["makes no sense", "baseurl"],
        ),
        (
            Fault::answer("502 Bad Gateway", "text/html", html),
            ["answered 502", "It works"],
        ),
        (
            Fault::answer(
                "500 Internal",
                "application/json",
                "{\"message\": \"no room\\u0007\"}",
            ),
            ["answered 500: no room:", "the server's log"],
        ),
        (Fault::answer("302 Found", "text/html", ""), ["answered 302", ""]),
        (
            Fault::answer("200 OK", "application/json", list),
            ["makes no sense", "EOF"],
        ),
        (
            Fault::answer("200 OK", "application/json", ""),
            ["makes no sense", "EOF"],
        ),
        (Fault::Half, ["makes no sense", ""]),
    ] {
        survived(&factory, fault, &parts).await;
    }
    assert_eq!(factory.server.workers().len(), 1);
    factory.release();
    factory.wait_completed(job).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_79_a_server_that_takes_connections_and_never_answers_is_given_up_in_time() {
    let factory = TestFactory::behind_a_proxy(ONE).await;
    let job = factory.start_blocking_job().await;
    proxy(&factory).set("/0/factory/", Fault::Hang);
    factory.release();
    // The job's own connections pass: it ends, and the factory is still waiting.
    factory.wait_completed(job).await;
    factory.wait_for_log(&["ERROR server unreachable", "cannot be reached", "timed out"]);
    proxy(&factory).clear_fault();
    factory.wait_for_log(&["server back"]);
    once(&factory.supervisor.log, 0, &["server unreachable"]);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_79_answers_a_byte_at_a_time_are_read_to_their_end() {
    let factory = TestFactory::behind_a_proxy(ONE).await;
    proxy(&factory).set("/0/factory/", Fault::Drip);
    let job = factory.submit("echo slowly");
    factory.wait_completed(job).await;
    let proxied = factory.server.workers().len();
    assert_eq!(proxied, 1);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_79_a_worker_whose_making_had_no_answer_is_found() {
    // A worker without a mark is waited for no longer than an agent.
    let slots = format!("online_timeout_seconds = 20\n{ONE}");
    let factory = TestFactory::behind_a_proxy(&slots).await;
    // The server makes it each time it is asked.
    proxy(&factory).set("POST /0/factory/worker ", Fault::Lose);
    let job = factory.submit("echo found");
    factory.wait_for_log(&["WARN no worker for job", &job.to_string(), "if this goes on"]);
    factory.wait_completed(job).await;
    assert_eq!(factory.server.workers().len(), 1, "it was made twice");
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_79_requests_that_arrive_twice_are_done_once() {
    let factory = TestFactory::behind_a_proxy(ONE).await;
    proxy(&factory).set("/0/factory/worker", Fault::Twice);
    let jobs = [factory.submit("echo once"), factory.submit("exit 3")];
    factory.wait_completed(jobs[0]).await;
    assert_eq!(factory.wait_for_end(jobs[1]).await.state(), "failed");
    assert_eq!(factory.server.workers().len(), 2);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_79_a_job_leased_in_an_answer_that_came_twice_is_leased_again_when_the_lease_ends() {
    let factory = TestFactory::behind_a_proxy(ONE).await;
    // Of two leases for one job the second is none.
    proxy(&factory).set("POST /0/factory/lease ", Fault::Twice);
    let job = factory.submit("echo later");
    factory
        .wait_for_state(|state| state.leases.contains_key(&job).then_some(()))
        .await;
    proxy(&factory).clear_fault();
    factory.wait_polls(2).await;
    assert!(factory.server.job(job).is_queued());
    factory.server.advance(LEASE + Duration::from_secs(1));
    factory.wait_completed(job).await;
    factory.finish().await;
}

/// Another id than any that this server gives.
const NOBODY: &str = "01HZX3N8Q4J5K6M7P8R9S0T1V2";

#[tokio::test(flavor = "multi_thread")]
async fn row_79_a_worker_made_under_another_id_is_found_under_its_own() {
    let factory = TestFactory::behind_a_proxy(ONE).await;
    let job = factory.submit("echo found");
    // The ids of a server share their first characters; the rest differs, so the answer is what is replaced.
    let body = format!(
        "{{\"id\":\"{NOBODY}\",\"private\":null,\"recycle\":false,\"bootstrap\":\"{}\",\"online\":false,\
         \"hold\":false,\"target\":\"{}\"}}",
        "x".repeat(64),
        factory.target
    );
    proxy(&factory).set(
        "POST /0/factory/worker ",
        Fault::answer("201 Created", "application/json", &body),
    );
    factory.wait_for_log(&["worker adopted as reserved", NOBODY]);
    proxy(&factory).clear_fault();
    factory.wait_for_log(&["the server no longer has the worker", NOBODY]);
    factory.wait_for_log(&["worker forgotten", NOBODY]);
    // The lease of the first attempt runs out.
    factory.server.advance(LEASE + Duration::from_secs(1));
    factory.wait_completed(job).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_79_a_token_that_is_replaced_is_named_and_works_again_when_it_is_right() {
    let factory = TestFactory::new(ONE).await;
    let job = factory.start_blocking_job().await;
    let set = |token: &str| {
        factory.server.with(|state| {
            let factory = state.factories.values_mut().next().expect("there is one");
            std::mem::replace(&mut factory.token, token.to_owned())
        })
    };
    let old = set("another-token");
    let parts = [
        "ERROR server unreachable",
        "refused with 401",
        "check the factory's token",
    ];
    factory.wait_for_log(&parts);
    factory.wait_polls(3).await;
    once(&factory.supervisor.log, 0, &parts);
    assert!(
        !factory.supervisor.log.text().contains(&old),
        "the token is in the log"
    );
    // Right again by itself; then replaced for good, and the new one written where the line says: that is enough.
    set(&old);
    factory.wait_for_log(&["server back"]);
    let seen = factory.supervisor.log.len();
    set("another-token");
    factory.wait_for_log_from(
        seen,
        &[
            "ERROR server unreachable",
            &factory.host.root.join("token").display().to_string(),
        ],
    );
    factory.host.write_token("another-token");
    factory.wait_for_log_from(seen, &["a new token is in use"]);
    factory.wait_for_log_from(seen, &["server back"]);
    factory.release();
    factory.wait_completed(job).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_79_a_server_that_is_away_for_a_day_gets_its_jobs_done_when_it_is_back() {
    let factory = TestFactory::new(TWO).await;
    let job = factory.start_blocking_job().await;
    let next = factory.submit_blocking();
    factory.wait_for_line(next, "running").await;
    let seen = factory.supervisor.log.len();
    factory.server.set_outage(Outage::Closed);
    factory.wait_for_log_from(seen, &["server unreachable"]);
    // Both are over their time by the server's own rule when it is back, and it wants their workers torn down.
    factory.server.advance(Duration::from_secs(24 * 3600));
    let later = factory.submit("echo later");
    factory.server.set_outage(Outage::None);
    factory.wait_for_log_from(seen, &["server back"]);
    once(&factory.supervisor.log, seen, &["server unreachable"]);
    for old in [job, next] {
        let done = factory.wait_for_end(old).await;
        assert_eq!(done.state(), "failed");
        assert!(
            lines(&done, "control")
                .iter()
                .any(|line| line.contains("job duration exceeds"))
        );
    }
    factory.wait_completed(later).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_79_a_server_rolled_back_to_before_a_job_began_has_it_run_again() {
    let factory = TestFactory::new(ONE).await;
    let job = factory.submit("echo once");
    // As it was before any worker: held, so that nothing is leased meanwhile.
    let yesterday = factory.server.with(|state| {
        let mut copy = state.clone();
        copy.leases.clear();
        copy
    });
    factory.wait_completed(job).await;
    let gone = factory.server.job(job).worker.unwrap();
    let other = factory.submit_blocking();
    factory.wait_for_line(other, "running").await;
    let lost = worker_of(&factory, other);
    factory.server.with(|state| *state = yesterday);
    factory.wait_for_log(&["the server no longer has the worker", &lost.to_string()]);
    factory.wait_for_log(&["worker forgotten", &lost.to_string()]);
    // The job is queued once more on that server, and is done once more.
    factory.wait_completed(job).await;
    assert!(factory.server.job(job).worker != Some(gone));
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_79_a_server_rolled_back_to_when_a_job_ran_is_told_that_its_worker_is_gone() {
    let factory = TestFactory::new(ONE).await;
    let job = factory.start_blocking_job().await;
    let worker = worker_of(&factory, job);
    let yesterday = factory.server.with(|state| state.clone());
    factory.release();
    factory.wait_completed(job).await;
    factory
        .wait_for_state(|state| state.workers[&worker].deleted.then_some(()))
        .await;
    factory.wait_for_log(&["worker forgotten", &worker.to_string()]);
    factory.server.with(|state| *state = yesterday);
    // There is no such worker on this host; it may be on one whose disk is a copy of this one's. An operator knows.
    let parts = ["as this host tags its own", &worker.to_string()];
    factory.wait_for_log(&parts);
    factory.wait_polls(3).await;
    once(&factory.supervisor.log, 0, &parts);
    let id = worker.to_string();
    let (status, text) = command(&factory.host, &["destroy", &id, "--yes"]);
    assert_eq!(status, 0, "{text}");
    assert_eq!(factory.wait_for_end(job).await.state(), "failed");
    let next = factory.submit("echo next");
    factory.wait_completed(next).await;
    factory.finish().await;
}
