//! Row 81: two where there should be one, and halves that disagree.

use std::process::Command;

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn row_81_a_second_supervisor_is_refused_and_the_first_does_not_notice() {
    let house = House::new(ONE).await;
    let job = house.running().await;
    let asked = |house: &House| house.server.requests("POST /0/factory/worker");
    let before = asked(&house);
    let say = ["another supervisor works in", "stop it before you start this one"];
    refused(&mut house.host.supervisor_command(), &say);
    assert_eq!(asked(&house), before);
    house.let_end();
    house.completed(job).await;
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_81_a_second_helper_is_refused_and_the_first_does_not_notice() {
    let mut house = House::new(ONE).await;
    let job = house.running().await;
    let say = ["another helper serves", "stop that one first"];
    refused(&mut house.host.helper_command(), &say);
    // With sockets and cgroups of its own it would take the first one's workers for dead.
    let mut elsewhere = TestHost::new();
    elsewhere.uids = house.host.uids.clone();
    elsewhere.configure(
        &house.url(),
        SUPERVISOR_UID,
        &format!("[slots.a]\ntarget = \"{}\"\n", house.target),
    );
    let state = |host: &TestHost| host.root.join(protocol::config::STATE_DIR);
    let mount = |words: &[&Path]| {
        let status = Command::new(words[0]).args(&words[1..]).status();
        assert!(status.unwrap().success(), "{words:?}");
    };
    let (from, to) = (state(&house.host), state(&elsewhere));
    mount(&["mount".as_ref(), "--bind".as_ref(), &from, &to]);
    let second = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        refused(
            &mut elsewhere.helper_command(),
            &["another helper works in", "stop that one first"],
        );
    }));
    mount(&["umount".as_ref(), &to]);
    second.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    // The lock is the daemon's alone: whatever else of it lives does not keep the next one away.
    house.end_helper(Signal::SIGKILL);
    house.helper = house.host.helper();
    house.let_end();
    house.completed(job).await;
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_81_a_supervisor_with_slots_that_the_helper_does_not_know_is_told_so() {
    let mut house = House::new(TWO).await;
    house.end_supervisor(Signal::SIGTERM);
    let config = house.host.root.join(protocol::config::CONFIG_PATH);
    let other = fs::read_to_string(&config)
        .unwrap()
        .replace("[slots.a]", "[slots.x]");
    let path = house.shared().join("other.toml");
    fs::write(&path, other).unwrap();
    let mut command = house.host.supervisor_command();
    house.supervisor = Running::start(command.arg("--config").arg(&path));
    // Both are leased; the one in the slot that both halves know runs, and the other waits.
    let jobs = [house.submit("echo one"), house.submit("echo two")];
    let sentence = "slot x is not in the configuration: add it or use another";
    let parts = ["WARN cannot create user, will try again", sentence];
    house.told(&parts);
    house
        .see(|state| jobs.iter().any(|job| state.jobs[job].complete()).then_some(()))
        .await;
    house.polls(3).await;
    once(&house.supervisor.log, 0, &parts);
    // The operator mends it: the worker gets a slot that there is.
    house.end_supervisor(Signal::SIGTERM);
    house.supervisor = house.host.supervisor();
    for job in jobs {
        house.completed(job).await;
    }
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_81_a_supervisor_of_another_user_is_told_so() {
    let mut house = House::new(ONE).await;
    house.end_supervisor(Signal::SIGTERM);
    let slots = format!("[slots.a]\ntarget = \"{}\"\n", house.target);
    house.host.configure(&house.url(), SUPERVISOR_UID + 1, &slots);
    house.end_helper(Signal::SIGTERM);
    house.helper = house.host.helper();
    house.supervisor = house.host.supervisor();
    let parts = ["ERROR helper away", "run the supervisor as the user"];
    house.told(&parts);
    house.polls(3).await;
    once(&house.supervisor.log, 0, &parts);
    house.host.configure(&house.url(), SUPERVISOR_UID, &slots);
    house.end_helper(Signal::SIGTERM);
    house.helper = house.host.helper();
    let job = house.submit("echo served");
    house.completed(job).await;
    house.finish().await;
}
