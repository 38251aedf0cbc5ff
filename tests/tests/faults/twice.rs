//! Row 81: two where there should be one, and a supervisor and a helper that disagree.

use std::process::Command;

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn row_81_a_second_supervisor_is_refused_and_the_first_does_not_notice() {
    let factory = TestFactory::new(ONE).await;
    let job = factory.start_blocking_job().await;
    let asked = |factory: &TestFactory| factory.server.requests("POST /0/factory/worker");
    let before = asked(&factory);
    let parts = ["another supervisor works in", "stop it before you start this one"];
    refused(&mut factory.host.supervisor_command(), &parts);
    assert_eq!(asked(&factory), before);
    factory.release();
    factory.wait_completed(job).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_81_a_second_helper_is_refused_and_the_first_does_not_notice() {
    let mut factory = TestFactory::new(ONE).await;
    let job = factory.start_blocking_job().await;
    let parts = ["another helper serves", "stop that one first"];
    refused(&mut factory.host.helper_command(), &parts);
    // With sockets and cgroups of its own it would take the first one's workers for dead.
    let mut elsewhere = TestHost::new();
    elsewhere.uids = factory.host.uids.clone();
    elsewhere.configure(
        &factory.url(),
        SUPERVISOR_UID,
        &format!("[slots.a]\ntarget = \"{}\"\n", factory.target),
    );
    let state = |host: &TestHost| host.root.join(protocol::config::STATE_DIR);
    let mount = |words: &[&Path]| {
        let status = Command::new(words[0]).args(&words[1..]).status();
        assert!(status.unwrap().success(), "{words:?}");
    };
    let (from, to) = (state(&factory.host), state(&elsewhere));
    mount(&["mount".as_ref(), "--bind".as_ref(), &from, &to]);
    let second = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        refused(
            &mut elsewhere.helper_command(),
            &["another helper works in", "stop that one first"],
        );
    }));
    mount(&["umount".as_ref(), &to]);
    second.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    // The lock is the monitor's alone: whatever else of it runs does not keep the next one away.
    factory.end_helper(Signal::SIGKILL);
    factory.helper = factory.host.start_helper();
    factory.release();
    factory.wait_completed(job).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_81_a_slot_that_the_helper_does_not_know_is_refused_with_the_reason() {
    let mut factory = TestFactory::new(TWO).await;
    factory.end_supervisor(Signal::SIGTERM);
    let config = factory.host.root.join(protocol::config::CONFIG_PATH);
    let other = fs::read_to_string(&config)
        .unwrap()
        .replace("[slots.a]", "[slots.x]");
    let path = factory.shared().join("other.toml");
    fs::write(&path, other).unwrap();
    let mut command = factory.host.supervisor_command();
    factory.supervisor = Running::start(command.arg("--config").arg(&path));
    // Both are leased; the one in the slot that both know runs, and the other waits.
    let jobs = [factory.submit("echo one"), factory.submit("echo two")];
    let sentence = "slot x is not in the configuration: add it or use another";
    let parts = ["WARN cannot create user, will try again", sentence];
    factory.wait_for_log(&parts);
    factory
        .wait_for_state(|state| jobs.iter().any(|job| state.jobs[job].is_complete()).then_some(()))
        .await;
    factory.wait_polls(3).await;
    once(&factory.supervisor.log, 0, &parts);
    // The operator corrects it: the worker gets a slot that there is.
    factory.end_supervisor(Signal::SIGTERM);
    factory.supervisor = factory.host.start_supervisor();
    for job in jobs {
        factory.wait_completed(job).await;
    }
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_81_a_supervisor_of_another_user_is_refused_with_the_reason() {
    let mut factory = TestFactory::new(ONE).await;
    factory.end_supervisor(Signal::SIGTERM);
    let slots = format!("[slots.a]\ntarget = \"{}\"\n", factory.target);
    factory.host.configure(&factory.url(), SUPERVISOR_UID + 1, &slots);
    factory.end_helper(Signal::SIGTERM);
    factory.helper = factory.host.start_helper();
    factory.supervisor = factory.host.start_supervisor();
    let parts = ["ERROR helper unreachable", "run the supervisor as the user"];
    factory.wait_for_log(&parts);
    factory.wait_polls(3).await;
    once(&factory.supervisor.log, 0, &parts);
    factory.host.configure(&factory.url(), SUPERVISOR_UID, &slots);
    factory.end_helper(Signal::SIGTERM);
    factory.helper = factory.host.start_helper();
    let job = factory.submit("echo served");
    factory.wait_completed(job).await;
    factory.finish().await;
}
