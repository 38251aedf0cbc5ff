//! What a factory asks of the server and of its helper while nothing changes. Needs root.

use testbed::test_factory::{CALLS, TestFactory};

/// So many polls are counted; what falls on their edges makes the difference of one call.
const POLLS: u64 = 10;

#[tokio::test(flavor = "multi_thread")]
async fn a_poll_makes_as_many_calls_with_eight_workers_as_with_one_and_none_to_the_helper_with_none() {
    let slots: String = (0..8)
        .map(|n| format!("[slots.s{n}]\ntarget = \"TARGET\"\n"))
        .collect();
    let mut factory = TestFactory::new(&slots).await;
    factory.restart_with_call_log();
    for workers in [0, 1, 8] {
        for _ in factory.server.workers().len()..workers {
            factory.submit_blocking();
        }
        factory.wait_online(workers).await;
        let before = factory.server.all_requests();
        let calls = factory.calls_per_poll(POLLS).await;
        let after = factory.server.all_requests();
        for name in CALLS {
            let expected = if name == "list" && workers == 0 { 0.0 } else { 1.0 };
            let made = calls.get(name).copied().unwrap_or_default();
            assert!(
                (made - expected).abs() < 2.0 / POLLS as f64,
                "{workers} workers: {name} {made} times a poll"
            );
        }
        let others: Vec<_> = calls
            .keys()
            .filter(|name| !CALLS.contains(&name.as_str()))
            .collect();
        assert!(others.is_empty(), "{workers} workers: {others:?}");
        // The same at the other end: nothing of the factory's but these two.
        let grown = after
            .iter()
            .filter(|(route, count)| before.get(*route) != Some(count));
        let grown: Vec<_> = grown
            .map(|(route, _)| route.as_str())
            .filter(|route| route.contains("/factory/"))
            .collect();
        assert_eq!(
            grown,
            ["GET /0/factory/workers", "POST /0/factory/lease"],
            "{workers} workers"
        );
    }
    factory.release();
    factory.finish().await;
}
