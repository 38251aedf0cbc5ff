//! Row 80: the configuration changes, for the worse too, while workers live.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn row_80_a_slot_that_is_renamed_keeps_its_worker_until_the_job_ends() {
    let mut house = House::new(TWO).await;
    let jobs = [house.running().await, house.running().await];
    let renamed = slot_of(&house, jobs[0]);
    let slots = TWO.replace(&format!("[slots.{renamed}]"), "[slots.new-name]");
    house.configure(&slots);
    // The helper follows at once; the supervisor has read it at its start.
    house.polls(2).await;
    assert_eq!(house.end_supervisor(Signal::SIGTERM).code(), Some(0));
    house.supervisor = house.host.supervisor();
    house.polls(2).await;
    // Three slots' names, and never more workers than slots.
    let next = house.submit("echo next");
    house.polls(3).await;
    assert!(
        !house.server.job(next).complete(),
        "a third worker where two slots are"
    );
    assert_eq!(slot_of(&house, jobs[0]), renamed);
    house.let_end();
    for job in jobs {
        house.completed(job).await;
    }
    house.completed(next).await;
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_80_a_configuration_made_invalid_fails_no_job_and_works_again_when_it_is_mended() {
    let mut house = House::new(TWO).await;
    let job = house.running().await;
    house.configure(&format!("{TWO}colour = \"blue\"\n"));
    let next = house.submit("echo next");
    // As many lines as there are before the slots, and theirs.
    let parts = ["WARN no jobs are taken: ", "config.toml:12: unknown field"];
    house.told(&parts);
    house.polls(3).await;
    once(&house.supervisor.log, 0, &parts);
    assert_eq!(house.server.job(next).state(), "queued");
    // A supervisor that is started now says so, too, and leaves the job alone.
    house.end_supervisor(Signal::SIGTERM);
    refused(
        &mut house.host.supervisor_command(),
        &["config.toml:12: unknown field"],
    );
    house.end_helper(Signal::SIGTERM);
    refused(
        &mut house.host.helper_command(),
        &["ERROR", "config.toml:12: unknown field"],
    );
    house.configure(TWO);
    house.helper = house.host.helper();
    house.supervisor = house.host.supervisor();
    house.completed(next).await;
    house.let_end();
    house.completed(job).await;
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_80_a_job_whose_slot_is_made_invalid_is_still_ended_and_deleted() {
    let house = House::new(TWO).await;
    let job = house.running().await;
    house.configure("[slots.a]\ncolour = 1\n");
    house.server.cancel(job).unwrap();
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_105_a_configuration_that_the_helper_would_refuse_is_refused_at_reload_and_harms_no_job() {
    // A file system without quotas.
    let house = House::on(ONE, storage::small).await;
    let job = house.running().await;
    house.configure(&format!("{ONE}limits.disk = \"10M\"\n"));
    let (status, text) = command(&house.host, &["reload"]);
    assert!(
        status == 1 && text.contains("the helper refuses it") && text.contains("limits.disk"),
        "{text}"
    );
    let (status, text) = command(&house.host, &["status"]);
    assert!(status == 4 && text.contains("the helper refuses it"), "{text}");
    house.let_end();
    house.completed(job).await;
    let next = house.submit("echo next");
    house.polls(3).await;
    assert_eq!(house.server.job(next).state(), "queued");
    house.configure(ONE);
    house.completed(next).await;
    house.finish().await;
}
