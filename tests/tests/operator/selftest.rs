//! `user-factory selftest`: all holds on this host; a sandbox that is taken away on purpose is missed.

use nix::sys::signal::Signal;

use super::*;
use testbed::harness::put_program;
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
    let result = run_command(factory, &["selftest", "--json"]);
    let report =
        serde_json::from_str(&result.out).unwrap_or_else(|e| panic!("{e}: {}{}", result.out, result.err));
    (result.status, report)
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
network = {{ allow = ["one.test:443", "*.test:80"] }}
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
        "the network namespace",
        "nothing is left",
    ] {
        let ok = with_outcome(&report, "ok").join("\n");
        assert!(ok.contains(seen), "{seen} is not among\n{ok}");
    }
    // The supervisor found no worker to delete, and the slot is as it was.
    let job = factory.submit("true");
    factory.wait_completed(job).await;
    factory.finish().await;
}

/// Runs the probe as an ordinary user of the host, as if the sandbox were not there. A variable of the slot's, which may
/// be a secret, must not be among the arguments.
const WITHOUT_SANDBOX: &str = r#"#!/bin/sh
case "$*" in *red*) exit 9;; esac
IFS= read -r told
printf '%s\n' "$told" | setpriv --reuid=UID --regid=UID --clear-groups "${0%/*}/user-factory-probe" sandbox
"#;

/// `user-factory selftest`, with that in place of the sandbox.
fn without_sandbox(factory: &TestFactory) -> CommandOutput {
    use std::os::unix::fs::PermissionsExt;
    let place = tempfile::tempdir().unwrap();
    std::fs::set_permissions(place.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    for program in ["user-factory", "user-factory-probe"] {
        put_program(&binaries().join(program), &place.path().join(program), 0o755);
    }
    let uid = factory.host.uid_of_no_worker().to_string();
    let text = place.path().join("text");
    std::fs::write(&text, WITHOUT_SANDBOX.replace("UID", &uid)).unwrap();
    put_program(&text, &place.path().join("user-factory-manual"), 0o755);
    tokio::task::block_in_place(|| {
        let mut command = Command::new(place.path().join("user-factory"));
        command
            .args(["selftest", "--json", "--root"])
            .arg(&factory.host.root);
        command.stdin(Stdio::null()).output().unwrap().into()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_that_is_not_there_is_seen() {
    let factory = TestFactory::new(&format!("{ONE}network = \"none\"\n")).await;
    answering(&factory).await;
    let result = without_sandbox(&factory);
    assert_eq!(result.status, 1, "{}{}", result.out, result.err);
    let report: Value = serde_json::from_str(&result.out).unwrap();
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
    let job = factory.start_blocking_job().await;
    let result = run_command(&factory, &["selftest", "--slot", "a"]);
    assert_eq!(result.status, 1);
    for part in ["slot a: nothing was tried", "has worker", "no slot is free"] {
        assert!(result.out.contains(part), "{part}: {}{}", result.out, result.err);
    }
    let result = run_command(&factory, &["selftest"]);
    assert_eq!(result.status, 0, "{}{}", result.out, result.err);
    for part in ["slot a: nothing was tried", "slot b\nRESULT", "all checks passed"] {
        assert!(result.out.contains(part), "{part}: {}", result.out);
    }
    factory.release();
    factory.wait_completed(job).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_job_is_taken_after_a_start_before_the_self_test_has_passed() {
    let mut factory = TestFactory::new(&format!("selftest_at_start = true\n{ONE}")).await;
    answering(&factory).await;
    let not_taken = |why: &'static str| {
        move |status: &Value| {
            let told = status["not_taken"].as_str()?.starts_with(why);
            (told && status["waits_for_selftest"] == true).then_some(())
        }
    };
    see(&factory, not_taken("the self-test has not been done")).await;
    let job = factory.submit_blocking();
    // One slot's says nothing of the others.
    done(&factory, &["selftest", "--slot", "a"]);
    see(&factory, not_taken("the self-test has not been done")).await;
    let result = without_sandbox(&factory);
    assert_eq!(result.status, 1, "{}{}", result.out, result.err);
    see(&factory, not_taken("the self-test has failed")).await;
    let result = run_command(&factory, &["status"]);
    assert!(
        result.status == 4
            && result.out.contains("selftest failed")
            && result.out.contains("in slot a it does not hold that"),
        "{}{}",
        result.out,
        result.err
    );
    assert_eq!(metric(&factory, "selftest_failed"), Some("1".into()));
    factory.wait_polls(2).await;
    assert_eq!(factory.server.job(job).state(), "queued");
    // As the unit does it.
    let table = done(&factory, &["selftest", "--at-start"]);
    assert!(table.contains("all checks passed"), "{table}");
    assert_eq!(metric(&factory, "selftest_failed"), Some("0".into()));
    online(&factory).await;
    assert_eq!(
        done(&factory, &["selftest", "--at-start"]),
        "",
        "it was asked for once"
    );

    // The next run asks again, and no slot is free before the job has ended.
    factory.end_supervisor(Signal::SIGTERM);
    factory.supervisor = factory.host.start_supervisor();
    see(&factory, not_taken("the self-test has not been done")).await;
    let next = factory.submit("true");
    let mut waiting = command(&factory, &["selftest", "--at-start"]).spawn().unwrap();
    factory.wait_polls(2).await;
    assert!(waiting.try_wait().unwrap().is_none(), "no slot was free");
    factory.release();
    factory.wait_completed(job).await;
    factory.wait_completed(next).await;
    let status = tokio::task::block_in_place(|| waiting.wait().unwrap());
    assert!(status.success(), "{status}");
    factory.finish().await;
}
