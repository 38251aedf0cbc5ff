//! Servers that lack something: what the factory does then, and what an operator reads.

use std::os::unix::fs::PermissionsExt;

use nix::sys::signal::Signal;
use testbed::faulty_proxy::Fault;
use testbed::harness::create_shared_dir;
use testbed::test_factory::ONE;

use super::checks::config_of;
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
    let dir = create_shared_dir();
    let factory = TestFactory::with_agent(ONE, old_agent(dir.path())).await;
    factory.server.with(|state| state.no_fail = true);
    let job = factory.submit("true");
    let ended = factory.wait_for_end(job).await;
    assert_eq!(ended.state(), "failed");
    let mut events = ended.events.iter();
    assert!(
        events.any(|event| event.payload.contains("no-service")),
        "{:#?}",
        ended.events
    );
    factory.wait_for_log(&["ERROR", "too old to be told", "deleted instead", &job.to_string()]);
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
    let dir = create_shared_dir();
    let factory = TestFactory::with_agent(ONE, old_agent(dir.path())).await;
    let job = factory.submit("true");
    factory.wait_held(job).await;
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
    let result = run_command(&factory, &["reload"]);
    result.failed(1, &["No such file"]);
    std::fs::copy(binaries().join("fake-agent"), &agent).unwrap();
    std::fs::set_permissions(&agent, std::fs::Permissions::from_mode(0o755)).unwrap();
    done(&factory, &["reload"]);
    let second = factory.submit("true");
    factory.wait_completed(second).await;
    factory.finish().await;
}

/// A slot whose target is the name that jobs ask for.
const NAMED: &str = "[slots.a]\ntarget = \"linux\"\n";

async fn because(factory: &TestFactory, part: &str) -> String {
    see(factory, |status| {
        let because = status["slots"][0]["because"].as_str()?;
        because.contains(part).then(|| because.to_owned())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_is_named_where_the_server_lists_its_targets_and_a_wrong_name_is_told() {
    let mut factory = TestFactory::new(NAMED).await;
    let job = factory.submit("echo named");
    factory.wait_completed(job).await;
    let status = json(&factory, &["status"]);
    let slot = &status["slots"][0];
    assert_eq!(slot["target"], factory.target.to_string());
    assert_eq!(slot["target_name"], "linux");
    let result = run_command(&factory, &["check", &config_of(&factory), "--online"]);
    assert_eq!(result.status, 0, "{}{}", result.out, result.err);
    let found = format!("online targets: \"linux\" is {}", factory.target);
    assert!(result.out.contains(&found), "{}", result.out);
    // A name that the server does not have.
    factory.configure(&NAMED.replace("linux", "linus"));
    let result = run_command(&factory, &["check", &config_of(&factory), "--online"]);
    let wrong = "slots.a.target = \"linus\" is no target of the server, which has \"linux\"";
    assert!(result.status == 1 && result.out.contains(wrong), "{}", result.out);
    done(&factory, &["reload"]);
    because(&factory, wrong).await;
    factory.wait_for_log(&["WARN", "no jobs are taken in this slot", "linus"]);
    let status = run_command(&factory, &["status"]);
    assert!(status.status == 4 && status.out.contains(wrong), "{}", status.out);
    let job = factory.submit("echo corrected");
    factory.configure(NAMED);
    done(&factory, &["reload"]);
    factory.wait_completed(job).await;
    // The server has no such call: by now the name stands for nothing, not even after a restart.
    factory.server.with(|state| state.no_targets = true);
    factory.end_supervisor(Signal::SIGTERM);
    factory.supervisor = factory.host.start_supervisor();
    let sentence = because(&factory, "write the target's id").await;
    assert!(sentence.contains("slots.a.target = \"linux\""), "{sentence}");
    let result = run_command(&factory, &["check", &config_of(&factory), "--online"]);
    assert!(
        result.status == 1 && result.out.contains(&sentence),
        "{}",
        result.out
    );
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_is_looked_up_once_the_server_is_there_and_no_job_is_taken_before() {
    let factory = TestFactory::behind_a_proxy(NAMED).await;
    let proxy = factory.proxy.as_ref().expect("the factory was built behind one");
    let job = factory.submit("true");
    factory.wait_completed(job).await;
    let other = NAMED.replace("slots.a", "slots.b");
    proxy.set("/0/factory/targets", Fault::Close);
    factory.configure(&format!("{NAMED}{}", other.replace("linux", "arm")));
    done(&factory, &["reload"]);
    // The slot that was there keeps its target, the new one waits.
    see(&factory, |status| {
        let because = status["slots"][1]["because"].as_str()?;
        because.contains("not looked up on the server yet").then_some(())
    })
    .await;
    see(&factory, |status| (state_of(status, "a") == "free").then_some(())).await;
    let job = factory.submit("true");
    factory.wait_completed(job).await;
    factory.server.add_target("arm");
    proxy.clear_fault();
    see(&factory, |status| (state_of(status, "b") == "free").then_some(())).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_and_consoles_are_logged_by_servers_that_check_streams_and_by_those_that_do_not() {
    for checks in [true, false] {
        let factory = TestFactory::new(ONE).await;
        factory.server.with(|state| state.checks_streams = checks);
        let job = factory.submit("echo out; echo err >&2");
        factory.wait_completed(job).await;
        let events = factory.server.job(job).events;
        for (stream, text) in [("stdout", "out"), ("stderr", "err")] {
            assert!(
                events.iter().any(|e| e.stream == stream && e.payload == text),
                "{checks}: {events:#?}"
            );
        }
        factory.finish().await;
        // The console of a start that fails is told by the factory, not by the agent.
        let dir = create_shared_dir();
        let factory = TestFactory::with_agent(ONE, old_agent(dir.path())).await;
        factory.server.with(|state| state.checks_streams = checks);
        let job = factory.submit("true");
        factory.wait_held(job).await;
        let events = factory.server.job(job).events;
        assert!(
            events
                .iter()
                .any(|e| e.stream == "console" && e.payload.contains("no-service")),
            "{checks}: {events:#?}"
        );
        let worker = worker_on(&factory, "a").await;
        done(&factory, &["destroy", &worker, "--yes"]);
        factory.finish().await;
    }
}
