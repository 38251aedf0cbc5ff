//! `user-factory selftest`: all holds on this host; a sandbox that is taken away on purpose is missed.

use super::*;
use testbed::test_factory::ONE;

/// The attempts with this outcome, as "promise: tried".
fn with_outcome(report: &Value, outcome: &str) -> Vec<String> {
    let slots = report["slots"].as_array().expect("a list").iter();
    slots
        .flat_map(|slot| slot["attempts"].as_array().expect("a list"))
        .filter(|attempt| attempt["outcome"] == outcome)
        .map(|attempt| {
            format!(
                "{} [{}] {}",
                attempt["promise"], attempt["tried"], attempt["seen"]
            )
        })
        .collect()
}

fn selftest(factory: &TestFactory) -> (i32, Value) {
    let said = say(factory, &["selftest", "--json"]);
    let report = serde_json::from_str(&said.out).unwrap_or_else(|e| panic!("{e}: {}{}", said.out, said.err));
    (said.status, report)
}

#[tokio::test(flavor = "multi_thread")]
async fn all_that_is_tried_in_a_slot_holds() {
    let slots = format!(
        r#"{ONE}writable = ["/srv/own"]
read_only = {{ "/opt/shown" = "/usr/share" }}
add_to_groups = ["mail"]
devices = ["/dev/loop-control"]
limits.processes = 200
[slots.b]
target = "01HZX3N8Q4J5K6M7P8R9S0T1V2"
network = "none"
allow_user_namespaces = true
limits = {{ memory = "64M", disk = "128M", inodes = 100, best_effort = true }}
"#
    );
    let factory = TestFactory::new(&slots).await;
    answering(&factory).await;
    let (status, report) = selftest(&factory);
    assert_eq!(with_outcome(&report, "failed"), [""; 0]);
    assert_eq!((status, &report["ok"]), (0, &Value::Bool(true)));
    assert!(with_outcome(&report, "ok").len() >= 120, "{report}");
    for seen in [
        "/dev/loop-control",
        "until one is refused",
        "loopback address",
        "nothing is left",
    ] {
        let ok = with_outcome(&report, "ok").join("\n");
        assert!(ok.contains(seen), "{seen} is not among\n{ok}");
    }
    // The supervisor found no worker to delete, and the slot is as it was.
    let job = factory.submit("true");
    factory.completed(job).await;
    factory.finish().await;
}

/// Runs the probe as an ordinary user of the host, as if the sandbox were not there. A variable of the slot's, which may
/// be a secret, must not be among the arguments.
const WITHOUT_SANDBOX: &str = r#"#!/bin/sh
case "$*" in *red*) exit 9;; esac
IFS= read -r told
printf '%s\n' "$told" | setpriv --reuid=UID --regid=UID --clear-groups "${0%/*}/user-factory-probe" sandbox
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_that_is_not_there_is_seen() {
    use std::os::unix::fs::PermissionsExt;
    let factory = TestFactory::new(&format!("{ONE}network = \"none\"\n")).await;
    answering(&factory).await;
    let place = tempfile::tempdir().unwrap();
    std::fs::set_permissions(place.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    for program in ["user-factory", "user-factory-probe"] {
        std::fs::copy(binaries().join(program), place.path().join(program)).unwrap();
    }
    let manual = place.path().join("user-factory-manual");
    let uid = factory.host.uids.end().to_string();
    std::fs::write(&manual, WITHOUT_SANDBOX.replace("UID", &uid)).unwrap();
    std::fs::set_permissions(&manual, std::fs::Permissions::from_mode(0o755)).unwrap();
    let said: Said = tokio::task::block_in_place(|| {
        let mut command = Command::new(place.path().join("user-factory"));
        command
            .args(["selftest", "--json", "--root"])
            .arg(&factory.host.root);
        command.stdin(Stdio::null()).output().unwrap().into()
    });
    assert_eq!(said.status, 1, "{}{}", said.out, said.err);
    let report: Value = serde_json::from_str(&said.out).unwrap();
    let failed = with_outcome(&report, "failed").join("\n");
    for part in [
        "no_new_privs",
        "a filter of system calls",
        "SO_ATTACH_FILTER",
        "[\"unshare\"]",
        "processes, ",
        "kill(2) of a process outside",
        "connect to an abstract name of a process outside",
        "connect to the host's loopback address",
        "[\"network devices\"]",
        "device nodes in /dev beside the usual ones",
        "the job's user has a name",
        "COLOUR",
    ] {
        assert!(failed.contains(part), "{part} is not among\n{failed}");
    }
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_with_a_worker_is_left_alone_and_another_is_tried() {
    let two = format!("{ONE}[slots.b]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n");
    let factory = TestFactory::new(&two).await;
    let job = factory.running().await;
    let said = say(&factory, &["selftest", "--slot", "a"]);
    assert_eq!(said.status, 1);
    for part in ["slot a: nothing was tried", "has worker", "no slot is free"] {
        assert!(said.out.contains(part), "{part}: {}{}", said.out, said.err);
    }
    let said = say(&factory, &["selftest"]);
    assert_eq!(said.status, 0, "{}{}", said.out, said.err);
    for part in [
        "slot a: nothing was tried",
        "slot b\nRESULT",
        "all that was tried holds",
    ] {
        assert!(said.out.contains(part), "{part}: {}", said.out);
    }
    factory.release();
    factory.completed(job).await;
    factory.finish().await;
}
