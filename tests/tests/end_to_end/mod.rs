//! Jobs from the queue to the end, through the real binaries: the fake server, the supervisor as an
//! unprivileged user, the helper as root, the fake agent in its sandbox. Needs root.

mod acceptance;
mod fleet;
mod own_network;
mod package_managers;
mod proxied;
mod steady;

use nix::sys::signal::Signal;
use testbed::fake_server::JobSpec;
use testbed::harness::TEST_TIMEOUT;
use testbed::host_snapshot::processes_of;
use testbed::test_factory::{ONE, TestFactory, lines};

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
    let done = factory.wait_for_end(job).await;
    assert_eq!(done.state(), "completed", "{:#?}", done.events);
    let user = format!("bmat-{}", done.worker.unwrap().to_string().to_lowercase());
    assert_eq!(lines(&done, "stdout"), ["words", "red", &user, "/work"]);
    // bash may warn of a locale that this host lacks before it.
    assert_eq!(lines(&done, "stderr").last().map(String::as_str), Some("oops"));
    assert_eq!(factory.server.output(job, "/work/out.txt").unwrap(), "WORDS\n");
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_worker_stays_as_it_is_until_it_is_released() {
    let factory = TestFactory::new(ONE).await;
    let job = factory.submit("echo running; sleep 1000");
    factory.wait_for_line(job, "running").await;
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
async fn a_supervisor_told_to_stop_leaves_the_running_job_alone() {
    let mut factory = TestFactory::new(ONE).await;
    let job = factory.submit("echo running; sleep 3; echo done");
    factory.wait_for_line(job, "running").await;
    factory.supervisor.signal(Signal::SIGTERM);
    assert!(factory.supervisor.wait().success());
    factory.wait_for_line(job, "done").await;
    factory.supervisor = factory.host.start_supervisor();
    factory.finish().await;
}
