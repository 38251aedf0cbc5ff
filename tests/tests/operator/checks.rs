//! What can be known before anything starts.

use std::os::unix::process::CommandExt;

use nix::sys::signal::Signal;
use testbed::harness::{SUPERVISOR_UID, TestHost};
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

/// The helper starts with this configuration and `check` says so; or both say this.
fn both_say(host: &TestHost, user: &str, slots: &str, expected: Option<&str>) {
    host.configure("http://127.0.0.1:1", SUPERVISOR_UID, slots);
    let path = host.root.join(protocol::config::CONFIG_PATH);
    let text = std::fs::read_to_string(&path).unwrap();
    let text = text.replace(&format!("user = {SUPERVISOR_UID}"), &format!("user = {user}"));
    std::fs::write(&path, text).unwrap();
    let mut check = Command::new(binaries().join("user-factory"));
    check.arg("check").arg("--root").arg(&host.root).arg(&path);
    let said: Said = check.output().unwrap().into();
    let mut helper = Running::start(&mut host.helper_command());
    match expected {
        None => {
            helper.log.wait(&["serving"]);
            helper.signal(Signal::SIGTERM);
            helper.wait();
            assert_eq!(said.status, 0, "{slots}: {}", said.out);
            assert!(said.out.contains("helper: it would start"), "{}", said.out);
        }
        Some(part) => {
            helper.log.wait(&["ERROR", part]);
            assert_eq!(helper.wait().code(), Some(1));
            assert_eq!(said.status, 1, "{slots}: {}", said.out);
            assert!(said.out.contains(part), "{part}: {}", said.out);
        }
    }
}

#[test]
fn check_says_what_the_helper_says_at_its_start() {
    let host = TestHost::new();
    host.write_token("x");
    let slot = "[slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n";
    both_say(&host, &format!("\"{SUPERVISOR_UID}\""), slot, None);
    for (user, key, part) in [
        (
            "\"no-such-user\"",
            "",
            "the user no-such-user is not in /etc/passwd: make it",
        ),
        (
            "1",
            "add_to_groups = [\"root\"]",
            "a job must not be in group root, which is root's: remove it",
        ),
        (
            "1",
            "add_to_groups = [\"no-such\"]",
            "the group no-such is not in /etc/group: make it",
        ),
        // This the helper alone finds, when it makes what jobs see.
        (
            "1",
            "writable = [\"/usr/bin/env\"]",
            "/usr/bin/env is not a directory on this host: choose",
        ),
    ] {
        both_say(&host, user, &format!("{slot}{key}\n"), Some(part));
    }
}

#[test]
fn a_supervisor_that_cannot_make_its_directory_says_who_makes_it_and_how() {
    let host = TestHost::new();
    host.write_token("x");
    let slots = ONE.replace("TARGET", "01HZX3N8Q4J5K6M7P8R9S0T1V2");
    host.configure("http://127.0.0.1:1", SUPERVISOR_UID, &slots);
    let state = host.root.join(protocol::config::STATE_DIR).join("supervisor");
    std::fs::remove_dir(&state).unwrap();
    let refused: Said = host.supervisor_command().output().unwrap().into();
    let command = format!(
        "install -d -o {SUPERVISOR_UID} -g {SUPERVISOR_UID} -m 0700 {}",
        state.display()
    );
    assert!(
        refused.status == 1 && refused.err.contains(&command),
        "{}",
        refused.err
    );
    // Done as it says, it starts.
    assert!(
        Command::new("sh")
            .args(["-c", &command])
            .status()
            .unwrap()
            .success()
    );
    let mut supervisor = host.supervisor();
    supervisor.log.wait(&["supervisor started"]);
    supervisor.signal(Signal::SIGTERM);
    supervisor.wait();
}
