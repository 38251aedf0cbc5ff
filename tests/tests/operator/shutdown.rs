//! What the package's unit does while the host is being shut down: `drain --at-shutdown`.

use nix::sys::signal::Signal;
use testbed::harness::TEST_TIMEOUT;
use testbed::test_factory::ONE;

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_waits_for_the_job_that_runs_and_takes_no_other_before_the_next_start() {
    let mut factory = TestFactory::new(&format!("shutdown_wait_seconds = 900\n{ONE}")).await;
    let job = factory.start_blocking_job().await;
    let mut waiting = command(&factory, &["drain", "--at-shutdown"]);
    let mut waiting = waiting
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command is there");
    see(&factory, |status| {
        let why = status["not_taken"].as_str()?;
        why.contains("the host is being shut down").then_some(())
    })
    .await;
    let next = factory.submit("true");
    assert!(waiting.try_wait().unwrap().is_none(), "it waits for the job");
    factory.release();
    factory.wait_completed(job).await;
    let ended = tokio::task::block_in_place(|| waiting.wait_with_output().unwrap());
    let result: CommandOutput = ended.into();
    assert_eq!(result.status, 0, "{}", result.err);
    let line = format!("the shutdown of the host waits up to 900 s for a (job {job})");
    assert!(result.err.contains(&line), "{}", result.err);
    assert_eq!(factory.server.job(next).state(), "queued");
    assert_eq!(json(&factory, &["status"])["drains"], serde_json::json!([]));
    // After the reboot.
    factory.end_supervisor(Signal::SIGTERM);
    factory.supervisor = factory.host.start_supervisor();
    factory.wait_completed(next).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_waits_no_longer_than_it_may_and_says_whom_it_ends() {
    let factory = TestFactory::new(ONE).await;
    let job = factory.start_blocking_job().await;
    // Unless the key is set, it waits for nobody, and nothing changes.
    let result = run_command(&factory, &["drain", "--at-shutdown"]);
    assert_eq!((result.status, result.err.as_str()), (0, ""));
    assert!(json(&factory, &["status"])["not_taken"].is_null());
    factory.configure(&format!("shutdown_wait_seconds = 2\n{ONE}"));
    let began = std::time::Instant::now();
    let result = run_command(&factory, &["drain", "--at-shutdown"]);
    let line = format!("2 s are over: the shutdown of the host ends a (job {job})");
    assert!(result.status == 0 && result.err.contains(&line), "{}", result.err);
    assert!(began.elapsed().as_secs() >= 2 && began.elapsed() < TEST_TIMEOUT);
    assert_eq!(factory.server.job(job).state(), "running");
    factory.release();
    factory.wait_completed(job).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_does_not_wait_for_a_worker_that_is_kept_for_a_person() {
    let factory = TestFactory::new(&format!("shutdown_wait_seconds = 900\n{ONE}")).await;
    let job = factory.start_blocking_job().await;
    let worker = worker_on(&factory, "a").await;
    done(&factory, &["kill", &worker]);
    factory.wait_held(job).await;
    let result = run_command(&factory, &["drain", "--at-shutdown"]);
    assert_eq!((result.status, result.err.as_str()), (0, ""));
    done(&factory, &["destroy", &worker, "--yes"]);
    factory.finish().await;
}
