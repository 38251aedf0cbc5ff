//! Servers that lack something: what the factory does then, and what an operator reads.

use std::os::unix::fs::PermissionsExt;

use testbed::harness::place;
use testbed::test_factory::ONE;

use super::*;

/// An agent of before the options.
const OLD_AGENT: &str = "#!/bin/bash\necho \"Unrecognized option: 'no-service'\"; exit 1\n";

fn old_agent(dir: &std::path::Path) -> PathBuf {
    let agent = dir.join("agent");
    std::fs::write(&agent, OLD_AGENT).unwrap();
    agent
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_be_told_of_a_failure_gets_the_worker_deleted_and_the_operator_is_told() {
    let dir = place();
    let factory = TestFactory::with_agent(ONE, old_agent(dir.path())).await;
    factory.server.with(|state| state.no_fail = true);
    let job = factory.submit("true");
    let ended = factory.ended(job).await;
    assert_eq!(ended.state(), "failed");
    let mut events = ended.events.iter();
    assert!(
        events.any(|event| event.payload.contains("no-service")),
        "{:#?}",
        ended.events
    );
    factory.logged(&["ERROR", "too old to be told", "deleted instead", &job.to_string()]);
    // The slot is not lost, and the failure is asked about once.
    see(&factory, |status| {
        (state_of(status, "a") == "resting").then_some(())
    })
    .await;
    assert_eq!(factory.server.requests("POST /0/factory/worker/{worker}/fail"), 1);
    let problems = json(&factory, &["status"])["troubles"].to_string();
    assert!(problems.contains("too old to be told"), "{problems}");
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_does_not_know_the_options_is_replaced_by_one_of_the_host() {
    let dir = place();
    let factory = TestFactory::with_agent(ONE, old_agent(dir.path())).await;
    let job = factory.submit("true");
    factory.held(job).await;
    let worker = worker_on(&factory, "a").await;
    let shown = done(&factory, &["show", &worker]);
    assert!(
        shown.contains("no-service") && shown.contains("name an agent that knows them in factory.agent"),
        "{shown}"
    );
    done(&factory, &["destroy", &worker, "--yes"]);
    let named = |path: &std::path::Path| factory.configure(&format!("agent = {path:?}\n{ONE}"));
    let agent = factory.shared().join("agent");
    named(&agent);
    let said = say(&factory, &["reload"]);
    said.failed(1, &["No such file"]);
    std::fs::copy(binaries().join("fake-agent"), &agent).unwrap();
    std::fs::set_permissions(&agent, std::fs::Permissions::from_mode(0o755)).unwrap();
    done(&factory, &["reload"]);
    let second = factory.submit("true");
    factory.completed(second).await;
    factory.finish().await;
}
