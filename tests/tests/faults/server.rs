//! Row 79: the server away, slow, lying, or of yesterday.

use std::time::Duration;

use testbed::proxy::{Fault, Proxy};
use testbed::server::Down;

use super::*;

fn proxy(house: &House) -> &Proxy {
    house.proxy.as_ref().expect("the house was built behind one")
}

/// Let the factory's requests meet this fault for a while, with a job running. One line tells, with these parts;
/// then all is well again.
async fn survived(house: &House, fault: Fault, parts: &[&str]) {
    let seen = house.supervisor.log.len();
    proxy(house).set("/0/factory/", fault.clone());
    let parts = [
        &["ERROR server away: ", "the buildomat server", "if this goes on, "],
        parts,
    ]
    .concat();
    house.told_from(seen, &parts);
    if !matches!(fault, Fault::Refuse) {
        proxy(house).met(3).await;
    }
    once(&house.supervisor.log, seen, &["ERROR"]);
    proxy(house).heal();
    house.told_from(seen, &["server back"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn row_79_answers_that_make_no_sense_are_told_once_each_and_harm_no_job() {
    let house = House::behind_a_proxy(ONE).await;
    let job = house.running().await;
    let html = "<html><h1>It works!</h1></html>";
    let list = "[{\"id\": \"01HZX3N8Q4J5K6M7P8R9S0T1V2\", \"online\": tr";
    for (fault, parts) in [
        (Fault::Refuse, ["cannot be reached", "Connection refused"]),
        (Fault::HangUp, ["cannot be reached", ""]),
        (
            Fault::Say(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec()),
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
        survived(&house, fault, &parts).await;
    }
    assert_eq!(house.server.workers().len(), 1);
    house.let_end();
    house.completed(job).await;
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_79_a_server_that_takes_connections_and_never_answers_is_given_up_in_time() {
    let house = House::behind_a_proxy(ONE).await;
    let job = house.running().await;
    proxy(&house).set("/0/factory/", Fault::Hang);
    house.let_end();
    // The job's own connections pass: it ends, and the factory is still waiting.
    house.completed(job).await;
    house.told(&["ERROR server away", "cannot be reached", "timed out"]);
    proxy(&house).heal();
    house.told(&["server back"]);
    once(&house.supervisor.log, 0, &["server away"]);
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_79_answers_a_byte_at_a_time_are_read_to_their_end() {
    let house = House::behind_a_proxy(ONE).await;
    proxy(&house).set("/0/factory/", Fault::Drip);
    let job = house.submit("echo slowly");
    house.completed(job).await;
    let proxied = house.server.workers().len();
    assert_eq!(proxied, 1);
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_79_a_worker_whose_making_was_answered_with_silence_is_found() {
    let house = House::behind_a_proxy(ONE).await;
    // The server makes it each time it is asked.
    proxy(&house).set("POST /0/factory/worker ", Fault::Lose);
    let job = house.submit("echo found");
    house.told(&["WARN no worker for job", &job.to_string(), "if this goes on"]);
    house.completed(job).await;
    assert_eq!(house.server.workers().len(), 1, "it was made twice");
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_79_requests_that_arrive_twice_are_done_once() {
    let house = House::behind_a_proxy(ONE).await;
    proxy(&house).set("/0/factory/worker", Fault::Twice);
    let jobs = [house.submit("echo once"), house.submit("exit 3")];
    house.completed(jobs[0]).await;
    assert_eq!(house.ended(jobs[1]).await.state(), "failed");
    assert_eq!(house.server.workers().len(), 2);
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_79_a_job_leased_in_an_answer_that_came_twice_is_leased_again_when_the_lease_ends() {
    let house = House::behind_a_proxy(ONE).await;
    // Of two leases for one job the second is none.
    proxy(&house).set("POST /0/factory/lease ", Fault::Twice);
    let job = house.submit("echo later");
    house
        .see(|state| state.leases.contains_key(&job).then_some(()))
        .await;
    proxy(&house).heal();
    house.polls(2).await;
    assert!(house.server.job(job).queued());
    house.server.advance(Duration::from_secs(61));
    house.completed(job).await;
    house.finish().await;
}

/// Another id than any that this server gives.
const NOBODY: &str = "01HZX3N8Q4J5K6M7P8R9S0T1V2";

#[tokio::test(flavor = "multi_thread")]
async fn row_79_a_worker_made_under_another_id_is_found_under_its_own() {
    let house = House::behind_a_proxy(ONE).await;
    let job = house.submit("echo found");
    // The ids of a server share their first characters; the rest differs, so the answer is what is replaced.
    let body = format!(
        "{{\"id\":\"{NOBODY}\",\"private\":null,\"recycle\":false,\"bootstrap\":\"{}\",\"online\":false,\
         \"hold\":false,\"target\":\"{}\"}}",
        "x".repeat(64),
        house.target
    );
    proxy(&house).set(
        "POST /0/factory/worker ",
        Fault::answer("201 Created", "application/json", &body),
    );
    house.told(&["worker taken on as reserved", NOBODY]);
    proxy(&house).heal();
    house.told(&["the server no longer has the worker", NOBODY]);
    house.told(&["worker forgotten", NOBODY]);
    // The lease of the first attempt runs out.
    house.server.advance(Duration::from_secs(61));
    house.completed(job).await;
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_79_a_token_that_is_replaced_is_named_and_works_again_when_it_is_right() {
    let house = House::new(ONE).await;
    let job = house.running().await;
    let set = |token: &str| {
        house.server.with(|state| {
            let factory = state.factories.values_mut().next().expect("there is one");
            std::mem::replace(&mut factory.token, token.to_owned())
        })
    };
    let old = set("another-token");
    let parts = [
        "ERROR server away",
        "refused with 401",
        "check the factory's token",
    ];
    house.told(&parts);
    house.polls(3).await;
    once(&house.supervisor.log, 0, &parts);
    assert!(
        !house.supervisor.log.text().contains(&old),
        "the token is in the log"
    );
    // Right again by itself; then replaced for good, and the new one written where the line says: that is enough.
    set(&old);
    house.told(&["server back"]);
    let seen = house.supervisor.log.len();
    set("another-token");
    house.told_from(
        seen,
        &[
            "ERROR server away",
            &house.host.root.join("token").display().to_string(),
        ],
    );
    house.host.write_token("another-token");
    house.told_from(seen, &["a new token is in use"]);
    house.told_from(seen, &["server back"]);
    house.let_end();
    house.completed(job).await;
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_79_a_server_that_is_away_for_a_day_gets_its_jobs_done_when_it_is_back() {
    let house = House::new(TWO).await;
    let job = house.running().await;
    let next = house.submit_waiting();
    house.printed(next, "running").await;
    let seen = house.supervisor.log.len();
    house.server.set_down(Down::Closed);
    house.told_from(seen, &["server away"]);
    // Both are over their time by the server's own rule when it is back, and it wants their workers torn down.
    house.server.advance(Duration::from_secs(24 * 3600));
    let later = house.submit("echo later");
    house.server.set_down(Down::No);
    house.told_from(seen, &["server back"]);
    once(&house.supervisor.log, seen, &["server away"]);
    for old in [job, next] {
        let done = house.ended(old).await;
        assert_eq!(done.state(), "failed");
        assert!(
            lines(&done, "control")
                .iter()
                .any(|line| line.contains("job duration exceeds"))
        );
    }
    house.completed(later).await;
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_79_a_server_rolled_back_to_before_a_job_began_has_it_run_again() {
    let house = House::new(ONE).await;
    let job = house.submit("echo once");
    // As it was before any worker: held, so that nothing is leased meanwhile.
    let yesterday = house.server.with(|state| {
        let mut copy = state.clone();
        copy.leases.clear();
        copy
    });
    house.completed(job).await;
    let gone = house.server.job(job).worker.unwrap();
    let other = house.submit_waiting();
    house.printed(other, "running").await;
    let lost = worker_of(&house, other);
    house.server.with(|state| *state = yesterday);
    house.told(&["the server no longer has the worker", &lost.to_string()]);
    house.told(&["worker forgotten", &lost.to_string()]);
    // The job is queued once more on that server, and is done once more.
    house.completed(job).await;
    assert!(house.server.job(job).worker != Some(gone));
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_79_a_server_rolled_back_to_when_a_job_ran_is_told_that_its_worker_is_gone() {
    let house = House::new(ONE).await;
    let job = house.running().await;
    let worker = worker_of(&house, job);
    let yesterday = house.server.with(|state| state.clone());
    house.let_end();
    house.completed(job).await;
    house
        .see(|state| state.workers[&worker].deleted.then_some(()))
        .await;
    house.told(&["worker forgotten", &worker.to_string()]);
    house.server.with(|state| *state = yesterday);
    // There is no such worker on this host; it may be on one whose disk is a copy of this one's. A person knows.
    let parts = ["as this host marks its own", &worker.to_string()];
    house.told(&parts);
    house.polls(3).await;
    once(&house.supervisor.log, 0, &parts);
    let id = worker.to_string();
    let (status, text) = command(&house.host, &["destroy", &id, "--yes"]);
    assert_eq!(status, 0, "{text}");
    assert_eq!(house.ended(job).await.state(), "failed");
    let next = house.submit("echo next");
    house.completed(next).await;
    house.finish().await;
}
