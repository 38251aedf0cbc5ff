//! What can be known before anything starts.

use std::os::unix::process::CommandExt;

use nix::sys::signal::Signal;
use testbed::harness::SUPERVISOR_UID;
use testbed::house::ONE;

use super::*;

fn config_of(house: &House) -> String {
    let path = house.host.root.join(protocol::config::CONFIG_PATH);
    path.to_str().expect("a test's path is ASCII").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_online_asks_the_server_for_its_agent_and_the_helper() {
    let mut house = House::new(ONE).await;
    answering(&house).await;
    let path = config_of(&house);
    let said = say(&house, &["check", &path, "--online"]);
    for part in [
        "slot a",
        "host kernel",
        "host cgroup v2",
        "host core_pattern",
        "host user quotas",
        "takes the token",
        "downloaded and unpacked",
        "it serves, with 0 workers",
    ] {
        // Whom the helper serves, which is not who types this.
        let expected = !part.contains("it serves");
        assert_eq!(said.out.contains(part), expected, "{part}: {}", said.out);
    }
    assert!(said.out.contains("online helper: FAILED"), "{}", said.out);
    // As the supervisor's user, all of it is well.
    let mut command = command(&house, &["check", &path, "--online"]);
    let said: Said = tokio::task::block_in_place(|| {
        command
            .uid(SUPERVISOR_UID)
            .gid(SUPERVISOR_UID)
            .output()
            .unwrap()
            .into()
    });
    assert_eq!(said.status, 0, "{}{}", said.out, said.err);
    assert!(said.out.contains("it serves, with 0 workers"), "{}", said.out);
    // A wrong token is named.
    house.host.write_token("not-the-token");
    house.end_helper(Signal::SIGTERM);
    let said = say(&house, &["check", &path, "--online"]);
    assert!(
        said.status == 1 && said.out.contains("online server: FAILED") && said.out.contains("401"),
        "{}",
        said.out
    );
    house.helper = house.host.helper();
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_looks_is_told_how_the_helper_is_though_an_idle_one_is_left_alone() {
    let mut house = House::new(ONE).await;
    answering(&house).await;
    house.polls(3).await;
    house.end_helper(Signal::SIGKILL);
    // Nobody needs it, so nobody has noticed; the first look does.
    house.polls(3).await;
    assert_eq!(house.supervisor.log.count(&["helper away"]), 0);
    let status = json(&house, &["status"]);
    assert_eq!(status["helper"]["reachable"], false, "{status:#}");
    house.told(&["ERROR helper away", "start the helper"]);
    house.helper = house.host.helper();
    answering(&house).await;
    house.finish().await;
}
