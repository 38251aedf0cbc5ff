//! Row 80: the configuration changes, for the worse too, while workers exist.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn row_80_a_slot_that_is_renamed_keeps_its_worker_until_the_job_ends() {
    let mut factory = TestFactory::new(TWO).await;
    let jobs = [
        factory.start_blocking_job().await,
        factory.start_blocking_job().await,
    ];
    let next = factory.submit("echo next");
    factory.wait_polls(2).await;
    assert!(
        factory.server.job(next).is_queued(),
        "a third job is taken where two slots are"
    );
    let renamed = slot_of(&factory, jobs[0]);
    let slots = TWO.replace(&format!("[slots.{renamed}]"), "[slots.new-name]");
    factory.configure(&slots);
    // The helper follows at once; the supervisor has read it at its start.
    factory.wait_polls(2).await;
    assert_eq!(factory.end_supervisor(Signal::SIGTERM).code(), Some(0));
    factory.supervisor = factory.host.start_supervisor();
    factory.wait_polls(2).await;
    // Three slots' names, and never more workers than slots.
    factory.wait_polls(3).await;
    assert!(
        factory.server.job(next).is_queued(),
        "a third worker where two slots are"
    );
    assert_eq!(slot_of(&factory, jobs[0]), renamed);
    factory.release();
    for job in jobs {
        factory.wait_completed(job).await;
    }
    factory.wait_completed(next).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_80_a_configuration_made_invalid_fails_no_job_and_works_again_when_it_is_fixed() {
    let mut factory = TestFactory::new(TWO).await;
    let job = factory.start_blocking_job().await;
    factory.configure(&format!("{TWO}colour = \"blue\"\n"));
    let next = factory.submit("echo next");
    // As many lines as there are before the slots, and theirs.
    let parts = ["WARN no jobs are taken: ", "config.toml:12: unknown field"];
    factory.wait_for_log(&parts);
    factory.wait_polls(3).await;
    once(&factory.supervisor.log, 0, &parts);
    assert_eq!(factory.server.job(next).state(), "queued");
    // A supervisor that is started now says so, too, and leaves the job alone.
    factory.end_supervisor(Signal::SIGTERM);
    refused(
        &mut factory.host.supervisor_command(),
        &["config.toml:12: unknown field"],
    );
    factory.end_helper(Signal::SIGTERM);
    refused(
        &mut factory.host.helper_command(),
        &["ERROR", "config.toml:12: unknown field"],
    );
    factory.configure(TWO);
    factory.helper = factory.host.start_helper();
    factory.supervisor = factory.host.start_supervisor();
    factory.wait_completed(next).await;
    factory.release();
    factory.wait_completed(job).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_80_a_job_whose_slot_is_made_invalid_is_still_ended_and_deleted() {
    let factory = TestFactory::new(TWO).await;
    let job = factory.start_blocking_job().await;
    factory.configure("[slots.a]\ncolour = 1\n");
    factory.server.cancel(job).unwrap();
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_105_a_configuration_that_the_helper_would_refuse_is_refused_at_reload_and_harms_no_job() {
    // A file system without quotas.
    let factory = TestFactory::on(ONE, storage::small).await;
    let job = factory.start_blocking_job().await;
    factory.configure(&format!("{ONE}limits.disk = \"10M\"\n"));
    let (status, text) = command(&factory.host, &["reload"]);
    assert!(
        status == 1 && text.contains("the helper refuses it") && text.contains("limits.disk"),
        "{text}"
    );
    let (status, text) = command(&factory.host, &["status"]);
    assert!(status == 4 && text.contains("the helper refuses it"), "{text}");
    factory.release();
    factory.wait_completed(job).await;
    let next = factory.submit("echo next");
    factory.wait_polls(3).await;
    assert_eq!(factory.server.job(next).state(), "queued");
    factory.configure(ONE);
    factory.wait_completed(next).await;
    factory.finish().await;
}
