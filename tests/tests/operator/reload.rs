//! A configuration that changes while jobs run.

use nix::sys::signal::Signal;
use testbed::house::ONE;
use testbed::proxy::Fault;

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_is_for_new_workers_and_one_with_mistakes_changes_nothing_and_says_why() {
    let house = House::new(ONE).await;
    let job = house.running().await;
    // A mistake: nothing changes, the line is named, and the status says that file and factory differ.
    house.configure(&format!("{ONE}colour = \"red\"\n"));
    let said = say(&house, &["reload"]);
    assert!(
        said.status == 1 && said.err.contains("config.toml:") && said.err.contains("colour"),
        "{}",
        said.err
    );
    let status = say(&house, &["status"]);
    assert!(
        status.status == 4 && status.out.contains("not in use") && status.out.contains("colour"),
        "{}",
        status.out
    );
    assert_eq!(house.server.job(job).state(), "running");
    // Another slot, by SIGHUP.
    house.configure(&format!("{ONE}[slots.b]\ntarget = \"TARGET\"\n"));
    house.supervisor.signal(Signal::SIGHUP);
    see(&house, |status| {
        (status["slots"].as_array()?.len() == 2).then_some(())
    })
    .await;
    assert_eq!(say(&house, &["status"]).status, 0);
    let second = house.running().await;
    // The slot of the running job goes: its worker stays to its end.
    house.configure("[slots.b]\ntarget = \"TARGET\"\n");
    done(&house, &["reload"]);
    let status = json(&house, &["status"]);
    assert_eq!(
        (state_of(&status, "a"), state_of(&status, "b")),
        ("removed".into(), "busy".into())
    );
    house.let_end();
    house.completed(job).await;
    house.completed(second).await;
    see(&house, |status| {
        (status["slots"].as_array()?.len() == 1).then_some(())
    })
    .await;
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_104_a_file_that_changes_between_lease_and_start_fails_no_job() {
    let house = House::behind_a_proxy(ONE).await;
    let other = ONE.replace("slots.a", "slots.other");
    let proxy = house.proxy.as_ref().expect("the house was built behind one");
    // The start waits for the agent's program, while the slot gets another name.
    proxy.set("/file/agent", Fault::HangUp);
    let first = house.submit("echo first");
    see(&house, |status| {
        (status["workers"][0]["phase"] == "created").then_some(())
    })
    .await;
    house.configure(&other);
    let why = see(&house, |status| status["not_taken"].as_str().map(str::to_owned)).await;
    assert!(
        why.contains("slots of the configuration file have changed") && why.contains("user-factory reload"),
        "{why}"
    );
    assert_eq!(say(&house, &["status"]).status, 4);
    proxy.heal();
    let second = house.submit("echo second");
    // A mistake, an empty file, none: the worker waits, whatever the file is meanwhile.
    for text in ["colour = 1\n", "", ONE, &other] {
        house.configure(text);
        house.polls(2).await;
        assert_eq!(house.server.job(second).state(), "queued");
    }
    done(&house, &["reload"]);
    house.completed(first).await;
    house.completed(second).await;
    assert_eq!(say(&house, &["status"]).status, 0);
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_a_restart_can_change_is_named() {
    let house = House::new(ONE).await;
    answering(&house).await;
    let slots = ONE.replace("TARGET", &house.target.to_string());
    house
        .host
        .configure("http://127.0.0.1:9", testbed::harness::SUPERVISOR_UID, &slots);
    let said = say(&house, &["reload"]);
    assert!(
        said.status == 1 && said.err.contains("general.baseurl") && said.err.contains("restart"),
        "{}",
        said.err
    );
    house.finish().await;
}
