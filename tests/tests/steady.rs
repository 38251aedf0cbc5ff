//! What a factory asks of the server and of its helper while nothing changes. Needs root.

use testbed::house::{CALLS, House};

/// So many rounds are looked at; what falls on their edges makes the difference of one call.
const ROUNDS: u64 = 10;

#[tokio::test(flavor = "multi_thread")]
async fn a_round_asks_as_much_with_eight_workers_as_with_one_and_the_helper_nothing_with_none() {
    let slots: String = (0..8)
        .map(|n| format!("[slots.s{n}]\ntarget = \"TARGET\"\n"))
        .collect();
    let mut house = House::new(&slots).await;
    house.count_calls();
    for workers in [0, 1, 8] {
        for _ in house.server.workers().len()..workers {
            house.submit_waiting();
        }
        house.online(workers).await;
        let before = house.server.all_requests();
        let calls = house.calls_of_a_round(ROUNDS).await;
        let after = house.server.all_requests();
        for name in CALLS {
            let expected = if name == "list" && workers == 0 { 0.0 } else { 1.0 };
            let made = calls.get(name).copied().unwrap_or_default();
            assert!(
                (made - expected).abs() < 2.0 / ROUNDS as f64,
                "{workers} workers: {name} {made} times a round"
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
    house.let_end();
    house.finish().await;
}
