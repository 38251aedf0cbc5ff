//! The numbers, and the page, as those see them who have no shell on the host.

use testbed::test_factory::ONE;

use super::*;

/// `GET` on an address of this host; the body.
async fn get(address: &str, path: &str) -> (u16, String) {
    let answer = reqwest::get(format!("http://{address}{path}")).await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

/// The value of one line of the metrics.
fn value(text: &str, name: &str) -> f64 {
    let line = text
        .lines()
        .find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')));
    let line = line.unwrap_or_else(|| panic!("no {name} in\n{text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// A factory with a status page, at an address of its own.
async fn with_page(slots: &str) -> (TestFactory, String) {
    let mut factory = TestFactory::new(slots).await;
    let address = format!("{}:8080", factory.host.loopback());
    let path = factory.host.root.join(protocol::config::CONFIG_PATH);
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(
        &path,
        text.replace(
            "[factory]\n",
            &format!("[factory]\nstatus_address = \"{address}\"\n"),
        ),
    )
    .unwrap();
    factory.end_supervisor(nix::sys::signal::Signal::SIGTERM);
    factory.supervisor = factory.host.start_supervisor();
    answering(&factory).await;
    (factory, address)
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_follow_a_job_and_a_held_worker() {
    let (factory, address) = with_page(ONE).await;
    let job = factory.start_blocking_job().await;
    online(&factory).await;
    let (status, text) = get(&address, "/metrics").await;
    assert_eq!(status, 200);
    let name = |rest: &str| format!("buildomat_user_factory_{rest}");
    assert!(text.ends_with("# EOF\n"));
    assert_eq!(value(&text, &name("slots{state=\"busy\"}")), 1.0);
    assert_eq!(value(&text, &name("workers{phase=\"online\"}")), 1.0);
    assert_eq!(value(&text, &name("leases_total")), 1.0);
    assert_eq!(value(&text, &name("reachable{partner=\"server\"}")), 1.0);
    assert_eq!(
        value(
            &text,
            &name("calls_total{partner=\"helper\",call=\"create_user\",outcome=\"ok\"}")
        ),
        1.0
    );
    assert_eq!(
        value(&text, &name("phase_seconds_count{phase=\"reserved\"}")),
        1.0
    );
    assert!(value(&text, &name("slot_memory_bytes{slot=\"a\"}")) > 100_000.0);
    let id = factory.server.job(job).worker.unwrap();
    factory.server.hold(id).unwrap();
    see(&factory, |status| (state_of(status, "a") == "held").then_some(())).await;
    let (_, text) = get(&address, "/metrics").await;
    let held = text
        .lines()
        .find(|line| line.starts_with(&name("held_seconds{")))
        .unwrap_or_else(|| panic!("{text}"));
    assert!(
        held.contains("slot=\"a\"") && held.contains(&id.to_string()),
        "{held}"
    );
    factory.release();
    factory.wait_completed(job).await;
    factory.server.release(id).unwrap();
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_token_and_a_server_that_is_away_can_be_told_apart() {
    let (factory, address) = with_page(ONE).await;
    let set = |token: &str| {
        factory.server.with(|state| {
            let factory = state.factories.values_mut().next().expect("there is one");
            std::mem::replace(&mut factory.token, token.to_owned())
        })
    };
    let right = set("another-token");
    let unauthorised =
        "buildomat_user_factory_calls_total{partner=\"server\",call=\"workers\",outcome=\"unauthorised\"}";
    let end = std::time::Instant::now() + TEST_TIMEOUT;
    loop {
        let (_, text) = get(&address, "/metrics").await;
        let reachable = value(&text, "buildomat_user_factory_reachable{partner=\"server\"}");
        if text.contains(unauthorised) && reachable == 0.0 {
            break;
        }
        assert!(std::time::Instant::now() < end, "{text}");
        tokio::time::sleep(PAUSE).await;
    }
    assert_eq!(run_command(&factory, &["status"]).status, 4);
    set(&right);
    answering(&factory).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_shows_and_changes_nothing() {
    let (factory, address) = with_page(ONE).await;
    let (status, page) = get(&address, "/").await;
    assert!(
        status == 200 && page.contains("/v1/status") && !page.contains("http://"),
        "{page}"
    );
    let (status, body) = get(&address, "/v1/status").await;
    assert_eq!(status, 200);
    let seen: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(state_of(&seen, "a"), "free");
    let http = reqwest::Client::new();
    for path in ["/v1/drain", "/v1/reload", "/v1/slots/a/drain"] {
        let answer = http.post(format!("http://{address}{path}")).send().await.unwrap();
        assert_eq!(answer.status(), 404, "{path}");
    }
    assert_eq!(json(&factory, &["status"])["draining"], false);
    factory.finish().await;
}

/// Every name of a number of ours in a text.
fn names_in(text: &str) -> std::collections::BTreeSet<String> {
    let prefix = "buildomat_user_factory_";
    let found = text.match_indices(prefix).map(|(at, _)| {
        let rest = &text[at..];
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        rest[..end.unwrap_or(rest.len())].to_owned()
    });
    found.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn alerts_and_dashboard_use_no_number_that_is_not_there() {
    let (factory, address) = with_page(ONE).await;
    let job = factory.start_blocking_job().await;
    online(&factory).await;
    factory
        .server
        .hold(factory.server.job(job).worker.unwrap())
        .unwrap();
    see(&factory, |status| (state_of(status, "a") == "held").then_some(())).await;
    done(&factory, &["drain"]);
    let (_, text) = get(&address, "/metrics").await;
    let mut there = names_in(&text);
    // It takes a host with quotas; `attacks`' row 54 sees what this is made of.
    there.insert("buildomat_user_factory_slot_disk_bytes".into());
    for file in ["alerts.yml", "dashboard.json"] {
        let used = names_in(&testbed::sources::read(format!("packaging/monitoring/{file}")));
        assert!(used.len() > 4, "{file} uses {used:?}");
        for name in used {
            assert!(
                there.contains(&name),
                "{file} uses {name}, which is not in\n{text}"
            );
        }
    }
    factory.release();
    factory.wait_completed(job).await;
    factory
        .server
        .release(factory.server.job(job).worker.unwrap())
        .unwrap();
    factory.finish().await;
}
