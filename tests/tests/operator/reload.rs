//! A configuration that changes while jobs run.

use nix::sys::signal::Signal;
use testbed::faulty_proxy::Fault;
use testbed::test_factory::ONE;

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_is_for_new_workers_and_one_with_mistakes_changes_nothing_and_says_why() {
    let factory = TestFactory::new(ONE).await;
    let job = factory.start_blocking_job().await;
    // A mistake: nothing changes, the line is named, and the status says that file and factory differ.
    factory.configure(&format!("{ONE}colour = \"red\"\n"));
    let result = run_command(&factory, &["reload"]);
    result.failed(1, &["config.toml:", "colour"]);
    let status = run_command(&factory, &["status"]);
    assert!(
        status.status == 4 && status.out.contains("not in use") && status.out.contains("colour"),
        "{}",
        status.out
    );
    assert_eq!(factory.server.job(job).state(), "running");
    // Another slot, by SIGHUP.
    factory.configure(&format!("{ONE}[slots.b]\ntarget = \"TARGET\"\n"));
    factory.supervisor.signal(Signal::SIGHUP);
    see(&factory, |status| {
        (status["slots"].as_array()?.len() == 2).then_some(())
    })
    .await;
    assert_eq!(run_command(&factory, &["status"]).status, 0);
    let second = factory.start_blocking_job().await;
    // The slot of the running job goes: its worker stays to its end.
    factory.configure("[slots.b]\ntarget = \"TARGET\"\n");
    done(&factory, &["reload"]);
    let status = json(&factory, &["status"]);
    assert_eq!(
        (state_of(&status, "a"), state_of(&status, "b")),
        ("removed".into(), "busy".into())
    );
    factory.release();
    factory.wait_completed(job).await;
    factory.wait_completed(second).await;
    see(&factory, |status| {
        (status["slots"].as_array()?.len() == 1).then_some(())
    })
    .await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_104_a_file_that_changes_between_lease_and_start_fails_no_job() {
    let factory = TestFactory::behind_a_proxy(ONE).await;
    let other = ONE.replace("slots.a", "slots.other");
    let proxy = factory.proxy.as_ref().expect("the factory was built behind one");
    // The start waits for the agent's program, while the slot gets another name.
    proxy.set("/file/agent", Fault::Close);
    let first = factory.submit("echo first");
    see(&factory, |status| {
        (status["workers"][0]["phase"] == "created").then_some(())
    })
    .await;
    factory.configure(&other);
    // The server's refusals of the moment may be told first.
    let parts = [
        "slots of the configuration file have changed",
        "user-factory reload",
    ];
    see(&factory, |status| {
        let why = status["not_taken"].as_str()?;
        parts.iter().all(|part| why.contains(part)).then_some(())
    })
    .await;
    assert_eq!(run_command(&factory, &["status"]).status, 4);
    proxy.clear_fault();
    let second = factory.submit("echo second");
    // A mistake, an empty file: the worker waits, whatever the file is meanwhile. (With the one in use it would not.)
    for text in ["colour = 1\n", "", &other] {
        factory.configure(text);
        factory.wait_polls(2).await;
        assert_eq!(factory.server.job(second).state(), "queued");
    }
    done(&factory, &["reload"]);
    factory.wait_completed(first).await;
    factory.wait_completed(second).await;
    assert_eq!(run_command(&factory, &["status"]).status, 0);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_a_restart_can_change_is_named() {
    let factory = TestFactory::new(ONE).await;
    answering(&factory).await;
    let slots = ONE.replace("TARGET", &factory.target.to_string());
    factory
        .host
        .configure("http://127.0.0.1:9", testbed::harness::SUPERVISOR_UID, &slots);
    let result = run_command(&factory, &["reload"]);
    result.failed(1, &["general.baseurl", "restart"]);
    factory.finish().await;
}
