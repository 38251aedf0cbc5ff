//! The core in a small world: what it does, one rule a test. All rules together, and whatever can go wrong, are in
//! the simulation (`--test simulation`).

mod targets;
mod world;

use crate::control::status::time;
use protocol::{BootstrapToken, Exit, Target};
use testbed::model::Agent;

use super::*;
use crate::control::api::SlotState;
use world::{World, job};

fn phase(world: &World) -> Option<Phase> {
    world.disk.values().next().map(|w| w.phase)
}

#[test]
fn jobs_are_done_and_nothing_is_left() {
    let mut world = World::new();
    for n in 0..6 {
        world.submit(n, if n % 2 == 0 { '2' } else { '3' });
    }
    world.run(World::is_empty);
    assert_eq!((world.done().len(), world.failed().len()), (6, 0));
}

#[test]
fn an_idle_factory_asks_the_server_twice_a_poll_and_the_helper_never() {
    let mut world = World::new();
    world.run(|w| w.counts.get("lease") == Some(&50));
    assert!(world.now >= 49_000, "the polls are a second apart: {}", world.now);
    assert!(
        world.counts["workers"] <= 51 && world.counts["list"] == 1,
        "{:?}",
        world.counts
    );
    world.run(|w| w.counts["lease"] == 2000);
    assert_eq!(world.counts["list"], 2, "now and then it is asked all the same");
}

#[test]
fn a_factory_with_workers_asks_as_much_as_one_with_one() {
    for workers in [1, 2] {
        let mut world = World::new();
        for n in 0..workers {
            world.submit(n, if n == 0 { '2' } else { '3' });
        }
        let online = |w: &World| {
            w.disk
                .values()
                .filter(|w| w.phase == Phase::Running { online: true })
                .count()
        };
        world.run(|w| online(w) == workers as usize);
        let before = world.counts.clone();
        let mut polls = 0;
        while polls < 20 {
            world.step(0);
            polls = world.counts["lease"] - before["lease"];
        }
        for kind in ["workers", "list"] {
            let asked = world.counts[kind] - before[kind];
            assert!((19..=21).contains(&asked), "{kind} with {workers}: {asked}");
        }
        let others = |counts: &BTreeMap<&str, usize>| {
            counts
                .iter()
                .filter(|(kind, _)| !["workers", "list", "lease"].contains(kind))
                .map(|(_, n)| n)
                .sum::<usize>()
        };
        assert_eq!(others(&world.counts), others(&before));
    }
}

#[test]
fn nothing_is_leased_before_both_have_answered_and_nothing_is_made_while_the_helper_is_away() {
    let mut world = World::new();
    world.helper_up = false;
    world.submit(1, '2');
    for n in 0..100 {
        world.step(n);
    }
    assert_eq!(world.counts.get("lease"), None);
    world.helper_up = true;
    world.run(World::is_empty);
    // It is not noticed before the next job comes: that one's lease is lost, and no other.
    world.helper_up = false;
    world.logged.clear();
    for n in 0..10 {
        world.step(n);
    }
    world.submit(2, '2');
    world.submit(3, '3');
    let end = world.now + 100_000;
    while world.now < end {
        world.step(0);
    }
    assert_eq!(
        (world.queued(), world.server.leases.len(), world.counts["make"]),
        (2, 0, 1)
    );
    for part in ["helper unreachable", "will expire: the helper is unreachable"] {
        assert_eq!(
            world.logged.iter().filter(|s| s.contains(part)).count(),
            1,
            "{part}: {:?}",
            world.logged
        );
    }
    world.helper_up = true;
    world.run(World::is_empty);
}

#[test]
fn a_job_outlives_a_moment_without_a_helper_and_a_slot_with_an_orphan() {
    let mut world = World::new();
    world.run(|w| w.counts.get("lease") == Some(&10));
    world.helper_up = false;
    world.submit(1, '3');
    world.run(|w| w.logged.iter().any(|s| s.starts_with("helper unreachable")));
    world.helper_up = true;
    world.run(World::is_empty);
    assert_eq!(world.done().len(), 1);
    // One that the database and the server do not know.
    world.run(|w| w.core.is_idle(w.now));
    let orphan = WorkerId::from_bits(5);
    world.on_host(orphan, "c", Agent::Stays);
    world.submit(2, '3');
    world.run(|w| w.done().len() == 2 && w.is_empty());
    let deleted = world.logged.iter().position(|s| s.contains("orphaned worker"));
    assert!(deleted.is_some(), "{:?}", world.logged);
    assert!(
        !world.logged.iter().any(|s| s.contains("slot taken")),
        "{:?}",
        world.logged
    );
}

#[test]
fn a_worker_that_only_the_server_knows_comes_before_a_new_job_though_the_helper_was_not_asked() {
    let mut world = World::new();
    world.run(|w| w.core.is_idle(w.now) && w.counts.get("lease") == Some(&5));
    let lost = WorkerId::from_bits(5);
    let worker = ServerWorker {
        id: lost,
        target: "01HZX3N8Q4J5K6M7P8R9S0T1V3".parse().unwrap(),
        private: None,
        bootstrap: Some(BootstrapToken::try_from("t".repeat(64)).unwrap()),
        online: false,
        hold: false,
        recycle: false,
    };
    world.insert(&worker);
    let began = world.now;
    world.run(|w| !w.disk.is_empty());
    assert!(
        world.now >= began + 60_000,
        "another host may be about to take it"
    );
    assert!(world.disk.contains_key(&lost));
    world.run(World::is_empty);
    // The next waits for its slot, and then it comes before a new job.
    world.submit(1, '3');
    world.run(|w| phase(w) == Some(Phase::Running { online: true }));
    world.insert(&worker_of_others(5, '3', None));
    world.agents_sleep = true;
    let began = world.now;
    while world.now < began + 70_000 {
        world.step(0);
    }
    world.submit(2, '3');
    world.agents_sleep = false;
    world.run(|w| w.disk.contains_key(&lost));
    assert_eq!(world.queued(), 1);
    world.run(World::is_empty);
    assert_eq!(world.done().len(), 2);
}

fn worker_of_others(id: u128, target: char, private: Option<&str>) -> ServerWorker {
    ServerWorker {
        id: WorkerId::from_bits(id),
        target: format!("01HZX3N8Q4J5K6M7P8R9S0T1V{target}").parse().unwrap(),
        private: private.map(str::to_owned),
        bootstrap: Some(BootstrapToken::try_from("t".repeat(64)).unwrap()),
        online: private.is_some(),
        hold: false,
        recycle: false,
    }
}

const OTHER: Option<&str> = Some("c@here/11111111");

fn steps(world: &mut World, ms: u64) {
    let end = world.now + ms;
    while world.now < end {
        world.step(0);
    }
}

#[test]
fn another_hosts_worker_is_left_alone_and_no_jobs_are_taken_while_it_is_there() {
    let mut world = World::new();
    world.submit(1, '2');
    world.run(|w| phase(w) == Some(Phase::Running { online: true }));
    let others = worker_of_others(5, '3', OTHER);
    world.insert(&others);
    world.agents_sleep = true;
    steps(&mut world, 2_000);
    world.submit(2, '3');
    steps(&mut world, 700_000);
    assert_eq!(world.listed()[&others.id], others, "it was touched");
    assert_eq!((world.queued(), world.disk.len()), (1, 1));
    let logged = world
        .logged
        .iter()
        .filter(|s| s.contains("another host uses this factory's token"));
    assert_eq!(logged.count(), 1, "{:?}", world.logged);
    // Its own job goes on, to its end.
    world.agents_sleep = false;
    world.run(|w| w.done().contains(&job(1)) && w.disk.is_empty());
    let shown = &world.status_input().foreign_workers()[0];
    for part in [
        "c@here/11111111",
        "SLOT@here/00000000",
        "a token of its own",
        "--yes",
    ] {
        assert!(shown.text.contains(part), "{part}: {}", shown.text);
    }
    // The other host has done with it.
    world.server.workers.remove(&others.id);
    world.run(World::is_empty);
    assert!(world.done().contains(&job(2)));
    assert_eq!(world.status_input().foreign_workers().len(), 1, "it was a moment ago");
    steps(&mut world, 700_000);
    assert!(world.status_input().foreign_workers().is_empty());
}

#[test]
fn workers_of_others_that_a_server_lists_without_end_take_no_more_memory() {
    let mut world = World::new();
    world.run(|w| w.core.is_idle(w.now));
    for round in 0..20 {
        let others = (0..50).map(|n| worker_of_others(1000 * (round + 1) + n, '3', OTHER));
        world.server.workers.clear();
        others.for_each(|w| world.insert(&w));
        steps(&mut world, 2_000);
        assert!(world.status_input().not_taken().unwrap().contains("another host"));
    }
    assert_eq!(world.status_input().foreign_workers().len(), 100);
    // When they are gone, jobs are taken, and others are shown once these have had their time.
    world.server.workers.clear();
    world.submit(1, '2');
    world.run(|w| w.done().len() == 1);
    steps(&mut world, 700_000);
    assert!(world.status_input().foreign_workers().is_empty());
}

#[test]
fn the_operator_deletes_another_hosts_worker_by_its_name() {
    let mut world = World::new();
    let others = worker_of_others(5, '3', OTHER);
    world.insert(&others);
    world.agents_sleep = true;
    world.send_input(Input::Destroy(others.id));
    steps(&mut world, 5_000);
    assert!(world.listed().contains_key(&others.id), "it was not known yet");
    assert!(world.core.may_be_foreign(others.id));
    world.send_input(Input::Destroy(others.id));
    world.run(|w| w.listed().is_empty());
    assert!(world.status_input().foreign_workers().is_empty());
    // The same of one of which this host has a copy.
    world.insert(&others);
    world.on_host(others.id, "c", Agent::Ends(Exit::Unknown));
    steps(&mut world, 5_000);
    assert!(world.host.get(others.id).is_some() && world.disk.is_empty());
    world.send_input(Input::Destroy(others.id));
    world.run(World::is_empty);
}

#[test]
fn a_worker_that_another_host_was_first_to_claim_is_let_go() {
    for known in [true, false] {
        let mut world = World::new();
        world.submit(1, '3');
        if !known {
            world.lose = Some("make");
        }
        world.run(|w| w.counts.get("make") == Some(&1));
        let id = *world.listed().keys().next().unwrap();
        assert_eq!(world.disk.contains_key(&id), known);
        world
            .pending
            .retain(|output| !matches!(output, Output::CarryOut(..)));
        // It was without an owner for a moment, and it is the other's now.
        let w = world.server.workers.get_mut(&id).unwrap();
        w.private = OTHER.map(str::to_owned);
        world
            .core
            .entries
            .values_mut()
            .for_each(|entry| drop(entry.take_call()));
        world.refuses_workers = true;
        world.agents_sleep = true;
        steps(&mut world, 100_000);
        assert!(
            world.disk.is_empty() && world.host.workers().next().is_none(),
            "{known}"
        );
        assert_eq!(world.listed()[&id].private.as_deref(), OTHER, "{known}");
        assert!(world.failed().is_empty(), "{known}");
    }
}

#[test]
fn a_lost_answer_does_not_make_another_hosts_new_worker_this_ones() {
    let mut world = World::new();
    world.submit(1, '3');
    world.lose = Some("make");
    world.run(|w| w.counts.get("make") == Some(&1) && w.lose.is_none());
    // The request was lost, not the answer; and another host makes one in this instant.
    let id = *world.listed().keys().next().unwrap();
    let job_of = world.server.workers.remove(&id).unwrap().job.unwrap();
    world.server.jobs.get_mut(&job_of).unwrap().worker = None;
    world.insert(&worker_of_others(5, '3', None));
    steps(&mut world, 5_000);
    assert!(world.disk.is_empty(), "it was taken for this one's");
    let other = world.server.workers.get_mut(&WorkerId::from_bits(5)).unwrap();
    other.private = OTHER.map(str::to_owned);
    world.run(|w| w.made() == 1);
    assert_eq!(world.listed()[&WorkerId::from_bits(5)].private.as_deref(), OTHER);
}

#[test]
fn what_runs_here_is_this_hosts_also_when_its_instance_id_was_lost() {
    let mut world = World::new();
    world.submit(1, '3');
    world.run(|w| phase(w) == Some(Phase::Running { online: true }));
    let renamed = |w: &mut World| {
        for worker in w.server.workers.values_mut() {
            worker.private = OTHER.map(str::to_owned);
        }
    };
    renamed(&mut world);
    world.agents_sleep = true;
    steps(&mut world, 100_000);
    world.disk.clear();
    world.crash(false);
    steps(&mut world, 100_000);
    assert_eq!(phase(&world), Some(Phase::Running { online: true }));
    world.agents_sleep = false;
    world.run(World::is_empty);
    assert!(world.done().contains(&job(1)));
}

#[test]
fn a_slot_is_free_as_soon_as_its_worker_has_come_to_its_end() {
    let mut world = World::new();
    world.submit(1, '3');
    world.run(|w| !w.disk.is_empty());
    assert_eq!(world.core.available(world.now).len(), 2);
    world.run(|w| w.disk.is_empty());
    assert_eq!(world.core.available(world.now).len(), 3);
}

#[test]
fn a_status_request_has_the_helper_asked_once_a_poll_interval() {
    let mut world = World::new();
    world.run(|w| w.core.is_idle(w.now));
    let lists = world.counts["list"];
    for _ in 0..5 {
        world.now += 2_000;
        assert!(world.core.must_ask_helper(world.now));
        world.send_input(Input::StatusRequested);
        assert!(world.core.is_waiting_for_helper());
        world.send_input(Input::StatusRequested);
        while world.core.is_waiting_for_helper() {
            world.step(0);
        }
        assert!(!world.core.must_ask_helper(world.now));
        world.send_input(Input::StatusRequested);
    }
    assert_eq!(world.counts["list"], lists + 5);
    world.helper_up = false;
    world.now += 2_000;
    world.send_input(Input::StatusRequested);
    while world.core.is_waiting_for_helper() {
        world.step(0);
    }
    assert!(world.logged.iter().any(|s| s.starts_with("helper unreachable")));
}

#[test]
fn a_lost_answer_makes_no_second_worker() {
    for lose in [
        "make",
        "associate",
        "create user",
        "install agent",
        "delete on the host",
        "delete on the server",
    ] {
        let mut world = World::new();
        world.submit(1, '2');
        world.lose = Some(lose);
        world.run(World::is_empty);
        assert_eq!(
            (world.made(), world.done().len(), world.lose),
            (1, 1, None),
            "{lose}"
        );
    }
}

#[test]
fn a_held_worker_is_left_as_it_is_until_released() {
    let mut world = World::new();
    world.submit(1, '2');
    world.run(|w| phase(w) == Some(Phase::Running { online: true }));
    for id in world.listed().into_keys() {
        world.server.hold(id, "an operator looks").unwrap();
    }
    world.reboot();
    for n in 0..3000 {
        world.step(n);
    }
    assert_eq!(
        (phase(&world), world.host.workers().count()),
        (Some(Phase::Running { online: true }), 1)
    );
    world.release();
    world.run(World::is_empty);
}

#[test]
fn a_job_that_stalls_at_its_memory_limit_fails_and_its_slot_works_again() {
    let mut world = World::new();
    world.submit(1, '2');
    world.run(|w| phase(w) == Some(Phase::Running { online: true }));
    world.agents_sleep = true;
    let worker = *world.listed().keys().next().unwrap();
    // One of `user-factory run`, which the core does not know.
    world.send_input(Input::MemoryStalled(WorkerId::from_bits(7)));
    world.send_input(Input::MemoryStalled(worker));
    world.run(|w| matches!(phase(w), Some(Phase::Broken { reported: true, .. })));
    assert!(world.failed().contains(&job(1)));
    world.agents_sleep = false;
    world.submit(2, '2');
    world.release();
    world.run(World::is_empty);
    assert!(world.done().contains(&job(2)));
}

#[test]
fn a_reboot_before_the_job_began_fails_nothing() {
    let mut world = World::new();
    world.submit(1, '2');
    while phase(&world) != Some(Phase::Running { online: false }) {
        world.step(0);
    }
    world.reboot();
    while world.disk.values().all(|w| w.remakes == 0) {
        world.step(0);
    }
    world.run(World::is_empty);
    assert_eq!(
        (world.done().len(), world.failed().len(), world.made()),
        (1, 0, 1)
    );
}

#[test]
fn a_failed_start_is_reported_and_the_slot_cools_down() {
    let mut world = World::new();
    world.start_fails = Some("the group plugdev does not exist");
    world.submit(1, '3');
    world.run(|w| matches!(phase(w), Some(Phase::Broken { reported: true, .. })));
    assert!(world.failed().contains(&job(1)));
    world.start_fails = None;
    world.release();
    world.run(World::is_empty);
    world.submit(2, '3');
    let before = world.now;
    world.run(World::is_empty);
    assert!(
        world.done().contains(&job(2)) && world.now - before >= 10_000,
        "it did not cool down"
    );
}

#[test]
fn an_older_server_learns_of_a_failure_by_the_deletion() {
    let mut world = World::new();
    (world.server.no_fail, world.start_fails) = (true, Some("no"));
    world.submit(1, '3');
    world.run(World::is_empty);
    assert!(world.failed().contains(&job(1)) && world.logged.iter().any(|s| s.contains("too old")));
}

#[test]
fn an_agent_that_stays_away_fails_in_time_and_a_server_outage_does_not_count() {
    let mut world = World::new();
    world.submit(1, '2');
    while phase(&world) != Some(Phase::Running { online: false }) {
        world.step(0);
    }
    let began = world.now;
    world.server_up = false;
    while world.now < began + 600_000 {
        world.step(0);
    }
    world.server_up = true;
    while phase(&world) == Some(Phase::Running { online: false }) {
        world.step(0);
    }
    assert!(matches!(phase(&world), Some(Phase::Broken { .. })));
    assert!(
        world.now >= began + 890_000 && world.now < began + 1_000_000,
        "{}",
        world.now - began
    );
}

#[test]
fn a_forgotten_database_is_rebuilt_from_the_server_and_the_host() {
    let mut world = World::new();
    world.submit(1, '2');
    world.submit(2, '3');
    world.run(|w| {
        w.disk.len() == 2
            && w.disk
                .values()
                .all(|w| w.phase == Phase::Running { online: true })
    });
    let orphan = WorkerId::from_bits(5);
    let in_a = world.host.workers().find(|(_, w)| w.slot.as_str() == "a");
    world.host.delete(in_a.unwrap().0);
    world.on_host(orphan, "b", Agent::Ends(Exit::Unknown));
    world.disk.clear();
    world.crash(false);
    // What is lost on the host as well may be a copy's of this host: only the operator can know.
    world.run(|w| w.host.workers().next().is_none() && w.disk.is_empty());
    assert!(world.logged.iter().any(|s| s.contains("orphaned worker")));
    let lost = world.status_input().foreign_workers();
    assert!(lost.len() == 1 && lost[0].text.contains("neither the database nor the host has it"));
    world.send_input(Input::Destroy(lost[0].id));
    world.run(World::is_empty);
    assert_eq!(world.done().len() + world.failed().len(), 2);
}

#[test]
fn a_draining_or_stopped_factory_takes_nothing() {
    let mut world = World::new();
    world.send_input(Input::Drain(None, Some(Drain::default())));
    world.submit(1, '2');
    for n in 0..100 {
        world.step(n);
    }
    assert!(world.queued() == 1 && world.counts["lease"] > 10);
    world.send_input(Input::Drain(None, None));
    world.run(|w| !w.disk.is_empty());
    world.send_input(Input::Stop);
    while !world.pending.is_empty() {
        world.step(0);
    }
    assert!(world.core.has_no_pending_calls() && world.core.next_deadline().is_none());
}

#[test]
fn a_worker_that_was_there_before_is_not_taken_for_the_one_of_a_lost_answer() {
    let mut world = World::new();
    world.submit(1, '3');
    world.run(World::is_empty);
    // Made held, and forgotten with the database: the same target, and no slot.
    let evidence = WorkerId::from_bits(5);
    let held = ServerWorker {
        id: evidence,
        target: "01HZX3N8Q4J5K6M7P8R9S0T1V3".parse().unwrap(),
        private: None,
        bootstrap: None,
        online: false,
        hold: true,
        recycle: false,
    };
    world.insert(&held);
    world.server.hold(evidence, "made held").unwrap();
    for n in 0..10 {
        world.step(n);
    }
    world.submit(2, '3');
    world.lose = Some("make");
    world.run(|w| w.done().contains(&job(2)) && w.disk.is_empty());
    assert_eq!(world.lose, None);
    let kept = &world.listed()[&evidence];
    assert!(kept.hold && kept.private.is_none());
}

#[test]
fn jobs_that_can_have_no_worker_are_not_all_asked_for() {
    let mut world = World::new();
    world.refuses_workers = true;
    for n in 0..500 {
        world.submit(n, '2');
    }
    let end = world.now + 60_000;
    while world.now < end {
        world.step(0);
    }
    assert!(world.counts["make"] <= 10, "{:?}", world.counts);
    let logged = world.logged.iter().filter(|s| s.contains("no worker for job"));
    assert_eq!(logged.count(), 1);
}

#[test]
fn jobs_that_come_unasked_get_no_worker_while_the_server_refuses_to_make_one() {
    let mut world = World::new();
    world.refuses_workers = true;
    world.submit(1, '3');
    world.run(|w| w.counts.get("make") == Some(&1));
    let target = "01HZX3N8Q4J5K6M7P8R9S0T1V3".parse().unwrap();
    let end = world.now + 60_000;
    let mut n = 100;
    while world.now < end {
        // Whatever is asked for, there is a job in the answer.
        n += 1;
        let lease = Lease { target, job: job(n) };
        world.send_input(Input::Leased(Ok(Some(lease))));
        world.step(0);
    }
    assert!(world.counts["make"] <= 10, "{n} jobs: {:?}", world.counts);
}

#[test]
fn a_drained_slot_takes_nothing_and_the_others_do() {
    let mut world = World::new();
    let slot: SlotName = "c".parse().unwrap();
    world.send_input(Input::Drain(Some(slot.clone()), Some(Drain::default())));
    world.submit(1, '2');
    world.submit(2, '3');
    world.run(|w| w.done().contains(&job(1)));
    assert_eq!(world.queued(), 1);
    world.send_input(Input::Drain(Some(slot), None));
    world.run(World::is_empty);
}

#[test]
fn a_removed_slot_keeps_its_worker_to_the_end_and_takes_no_other() {
    let mut world = World::new();
    world.submit(1, '3');
    world.run(|w| phase(w) == Some(Phase::Running { online: true }));
    let (rest, _) = world::CONFIG.split_once("[slots.c]").unwrap();
    let rest = rest.replace("conflicts_with_slots = [\"b\"]", "");
    world.send_input(Input::Configure(Box::new(Config::parse(&rest).unwrap())));
    // Three slots were, two are: with the worker of the third, only one more may come.
    for n in 2..5 {
        world.submit(n, '2');
    }
    world.submit(5, '3');
    world.run(|w| w.core.workers().count() == 2);
    let slots = world.status_input().slots();
    let [blocked] = &slots
        .iter()
        .filter(|slot| slot.state == SlotState::Blocked)
        .collect::<Vec<_>>()[..]
    else {
        panic!("one slot has no worker, and may take none: {slots:?}");
    };
    let because = blocked.because.as_deref();
    assert_eq!(
        because,
        Some("there are as many workers as slots, one in c, which was removed")
    );
    world.run(|w| w.done().len() == 4);
    assert!(world.done().contains(&job(1)) && world.failed().is_empty());
    assert_eq!(world.queued(), 1);
    world.send_input(Input::Configure(Box::new(Config::parse(world::CONFIG).unwrap())));
    world.run(World::is_empty);
}

#[test]
fn a_restart_gives_every_agent_its_whole_time() {
    let mut world = World::new();
    world.submit(1, '2');
    while phase(&world) != Some(Phase::Created) {
        world.step(0);
    }
    // As after a night without a supervisor, or with a clock that has jumped.
    world.now += 365 * 86_400_000;
    world.crash(true);
    world.run(World::is_empty);
    assert_eq!((world.done().len(), world.failed().len()), (1, 0));
}

#[test]
fn a_list_of_another_server_ends_no_job() {
    let mut world = World::new();
    world.submit(1, '2');
    world.run(|w| phase(w) == Some(Phase::Running { online: true }));
    let ours = std::mem::take(&mut world.server.workers);
    let until = world.counts["workers"] + 3;
    while world.counts["workers"] < until {
        world.step(0);
    }
    world.server.workers = ours;
    world.run(World::is_empty);
    assert_eq!((world.done().len(), world.failed().len()), (1, 0));
}

#[test]
fn a_lease_request_that_fails_is_repeated_ever_more_slowly_and_no_sooner_than_the_server_says() {
    let mut world = World::new();
    world.run(|w| w.counts.contains_key("lease"));
    assert_eq!(world.status_input().not_taken(), None);
    world.lease_fails = Some(CallError::passing(Peer::Server, "it answered 500"));
    let begun = (world.now, world.counts["lease"]);
    world.run(|w| w.now >= begun.0 + 3_600_000);
    let asked = world.counts["lease"] - begun.1;
    // Between half a minute and a minute each, after the first few.
    assert!((60..=140).contains(&asked), "{asked} lease requests in an hour");
    let shown = world.status_input().not_taken().unwrap();
    assert!(shown.contains("it answered 500"), "{shown}");
    let slots = world.status_input().slots();
    assert!(
        slots.iter().all(|slot| slot.state == SlotState::Closed),
        "{slots:?}"
    );
    let logged = world.logged.iter().filter(|line| line.contains("it answered 500"));
    assert_eq!(logged.count(), 1);

    world.lease_fails = Some(CallError {
        retry_after: Some(300_000),
        ..CallError::passing(Peer::Server, "it answered 429")
    });
    let next = world.counts["lease"] + 1;
    world.run(|w| w.counts["lease"] == next && w.core.has_no_pending_calls());
    let answered = world.now;
    world.run(|w| w.counts["lease"] > next);
    assert!((300_000..310_000).contains(&(world.now - answered)));

    world.lease_fails = None;
    world.submit(1, '2');
    world.run(|w| w.done().len() == 1);
    assert_eq!(world.status_input().not_taken(), None);
    assert!(world.now < answered + 1_400_000);
}

#[test]
fn a_server_cannot_have_the_factory_wait_for_days() {
    let mut world = World::new();
    world.lease_fails = Some(CallError {
        retry_after: Some(u64::MAX),
        ..CallError::passing(Peer::Server, "it answered 503")
    });
    world.run(|w| w.counts.contains_key("lease"));
    world.run(|w| w.status_input().not_taken().is_some());
    let begun = world.now;
    world.lease_fails = None;
    world.submit(1, '2');
    world.run(|w| w.done().len() == 1);
    assert!(world.now - begun < 700_000);
}

#[test]
fn while_a_side_does_not_answer_that_is_shown_and_no_job_is_taken() {
    for peer in [Peer::Server, Peer::Helper] {
        let mut world = World::new();
        world.submit(1, '2');
        world.run(|w| phase(w) == Some(Phase::Running { online: true }));
        world.run(|w| w.core.has_no_pending_calls());
        let shown = |world: &World| match peer {
            Peer::Server => world.status_input().server(String::new()),
            _ => world.status_input().helper(String::new()),
        };
        assert_eq!(
            (shown(&world).unanswered_since, world.status_input().not_taken()),
            (None, None)
        );
        world.agents_sleep = true;
        world.send_input(Input::Unanswered(peer, Some(world.now)));
        assert_eq!(shown(&world).unanswered_since, Some(time(world.now)));
        assert_eq!(shown(&world).reachable, Some(true));
        assert_eq!(
            world.status_input().not_taken(),
            Some(format!("the {peer} is not answering"))
        );
        let slots = world.status_input().slots();
        let is_free = |slot: &crate::control::api::Slot| slot.state == SlotState::Free;
        assert!(!slots.iter().any(is_free), "{slots:?}");
        world.submit(2, '3');
        let begun = world.now;
        world.run(|w| w.now >= begun + 600_000);
        assert_eq!(world.queued(), 1);
        world.send_input(Input::Unanswered(peer, None));
        assert_eq!(
            (shown(&world).unanswered_since, world.status_input().not_taken()),
            (None, None)
        );
        world.agents_sleep = false;
        world.run(|w| w.done().len() == 2);
    }
}

#[test]
fn while_the_configuration_file_differs_no_job_is_taken_and_none_is_started_or_failed() {
    for phase_then in [Phase::Reserved, Phase::Created] {
        let mut world = World::new();
        world.submit(1, '2');
        while phase(&world) != Some(phase_then) {
            world.step(0);
        }
        world.send_input(Input::FileDiffers(Some("the file: reload".into())));
        // What was begun before comes to nothing, and is not begun again.
        world.helper_up = false;
        let begins =
            |output: &Output| matches!(output, Output::CarryOut(_, action) if action.needs_the_slot());
        while let Some(at) = world.pending.iter().position(begins) {
            world.step(at);
        }
        world.helper_up = true;
        world.submit(2, '3');
        let begun = world.now;
        world.run(|w| w.now >= begun + 3_600_000);
        assert!(world.status_input().not_taken().unwrap().contains("reload"));
        assert_eq!(world.queued() + world.server.leases.len(), 1);
        assert_eq!(phase(&world), Some(phase_then));
        world.send_input(Input::FileDiffers(None));
        world.run(|w| w.done().len() == 2);
        assert!(world.failed().is_empty());
    }
}

#[test]
fn a_worker_whose_slot_is_removed_before_its_agent_is_started_gets_another_slot() {
    for phase_then in [Phase::Reserved, Phase::Created] {
        for (settles_first, one_is_left) in [(true, false), (false, false), (true, true), (false, true)] {
            let mut world = World::new();
            world.submit(1, '2');
            while phase(&world) != Some(phase_then) {
                world.step(0);
            }
            while settles_first && !world.pending.is_empty() && phase(&world) == Some(phase_then) {
                world.helper_up = false;
                world.step(0);
            }
            world.helper_up = true;
            let slot = world.disk.values().next().unwrap().slot.clone();
            let mut left = Config::parse(world::CONFIG).unwrap();
            left.slots.remove(&slot);
            left.slots.retain(|name, _| !one_is_left || name.as_str() != "c");
            world.send_input(Input::Configure(Box::new(left)));
            world.run(|w| w.done().len() == 1);
            assert!(world.failed().is_empty(), "{phase_then:?} {:?}", world.logged);
            world.run(World::is_empty);
        }
    }
}

#[test]
fn a_worker_whose_slot_is_removed_waits_where_no_other_has_its_target_and_fails_with_the_reason() {
    for (comes_back, is_removed) in [(true, true), (false, true), (true, false), (false, false)] {
        let mut world = World::new();
        world.submit(1, '3');
        while phase(&world) != Some(Phase::Reserved) {
            world.step(0);
        }
        let all = Config::parse(world::CONFIG).unwrap();
        let mut left = all.clone();
        let slot = left.slots.iter_mut().find(|(name, _)| name.as_str() == "c");
        // For another target from now on, or removed.
        slot.unwrap().1.target = Target::Id(TargetId::from_bits(9));
        left.slots.retain(|name, _| !is_removed || name.as_str() != "c");
        world.send_input(Input::Configure(Box::new(left)));
        let begun = world.now;
        world.run(|w| w.now >= begun + 60_000);
        assert_eq!(phase(&world), Some(Phase::Reserved));
        if comes_back {
            world.send_input(Input::Configure(Box::new(all)));
            world.run(|w| w.done().len() == 1);
        } else {
            world.run(|w| w.failed().len() == 1);
            let logged = world.disk.values().next().unwrap().failure.clone().unwrap();
            assert!(
                logged.contains("slot c is no longer in the configuration"),
                "{logged}"
            );
        }
    }
}

#[test]
fn what_is_drained_changes_once_it_is_saved_and_not_before() {
    let mut world = World::new();
    let slot: Option<SlotName> = Some("a".parse().unwrap());
    let drain = Some(Drain::default());
    let core = &mut world.core;
    for slot in [None, slot] {
        let outputs = core.handle(1000, Input::Drain(slot.clone(), drain.clone()));
        assert!(outputs.contains(&Output::SaveDrain(slot.clone(), drain.clone())));
        assert!(core.drains().is_empty());
        core.handle(1000, Input::DrainSaved(slot.clone(), drain.clone()));
        assert!(core.drains().contains_key(&slot) && core.is_draining() == slot.is_none());
        core.handle(1000, Input::DrainSaved(slot, None));
        assert!(core.drains().is_empty() && !core.is_draining());
    }
}

#[test]
fn a_drain_with_an_end_ends_by_the_hosts_clock_and_says_why_until_then() {
    let mut world = World::new();
    let slot: Option<SlotName> = Some("c".parse().unwrap());
    let until = |at| {
        Some(Drain {
            reason: Some("a new kernel".into()),
            until: Some(at),
        })
    };
    world.send_input(Input::Drain(None, until(1_800_000_000_000)));
    world.send_input(Input::Drain(slot.clone(), until(1_800_000_000_001)));
    let why = world.status_input().not_taken().unwrap();
    assert!(
        why.contains("drained (a new kernel, until 2027-01-15T08:00:00Z)"),
        "{why}"
    );
    world.send_input(Input::WallClock(1_799_999_999_999));
    assert!(world.core.is_draining());
    // The core's own time is another.
    let outputs = world.core.handle(world.now, Input::WallClock(1_800_000_000_000));
    assert!(outputs.contains(&Output::SaveDrain(None, None)), "{outputs:?}");
    // It is over, whether that can be saved or not.
    assert!(!world.core.is_draining());
    let slots = world.status_input().slots();
    let c = slots.iter().find(|s| s.name.as_str() == "c").unwrap();
    assert_eq!(
        c.because.as_deref(),
        Some("a new kernel, until 2027-01-15T08:00:00.001Z")
    );
    world.send_input(Input::WallClock(u64::MAX));
    assert!(world.core.drains().is_empty());
    world.submit(1, '3');
    world.run(|w| w.done().len() == 1);
}

#[test]
fn no_job_is_asked_for_while_too_little_is_free_and_a_leased_one_begins() {
    let mut world = World::new();
    world.submit(1, '2');
    world.run(|w| !w.core.pending_workers().is_empty());
    world.send_input(Input::Shortage(Some("too little is free: 1M".into())));
    // The lease request that is under way is answered.
    let begun = world.now;
    world.run(|w| w.now >= begun + 5_000);
    world.submit(2, '3');
    world.run(|w| w.now >= begun + 60_000);
    assert_eq!(
        world.status_input().not_taken().as_deref(),
        Some("too little is free: 1M")
    );
    assert!(!world.done().contains(&job(2)), "{:?}", world.logged);
    assert!(world.done().contains(&job(1)), "{:?}", world.logged);
    // Another number is no other news.
    world.send_input(Input::Shortage(Some("too little is free: 2M".into())));
    world.send_input(Input::Shortage(None));
    world.run(|w| w.done().len() == 2);
    assert!(world.done().contains(&job(2)), "{:?}", world.logged);
    let logged = world.logged.iter().filter(|line| line.contains("free"));
    assert_eq!(logged.count(), 2, "{:?}", world.logged);
}

#[test]
fn no_job_is_asked_for_after_a_start_before_a_self_test_has_passed_where_that_is_configured() {
    let mut world = World::new();
    world.submit(1, '2');
    // One that is not asked for changes nothing, whatever it has found.
    world.send_input(Input::SelfTested(Some("x".into())));
    world.run(|w| w.done().len() == 1);
    let mut config = world.core.config().clone();
    config.factory.selftest_at_start = true;
    world.send_input(Input::Configure(Box::new(config.clone())));
    world.submit(2, '2');
    let begun = world.now;
    world.run(|w| w.now >= begun + 60_000);
    assert!(!world.done().contains(&job(2)), "{:?}", world.logged);
    let why = world.status_input().not_taken().unwrap();
    assert!(why.starts_with("the self-test has failed"), "{why}");
    world.send_input(Input::SelfTested(None));
    world.run(|w| w.done().len() == 2);
    // The next run knows nothing of it.
    let next = Factory::new(world.core.identity().clone(), config, Vec::new(), 1, 0);
    assert!(next.waits_for_selftest());
    let why = next.not_asked_for().unwrap();
    assert!(
        why.starts_with("the self-test has not been done since the start"),
        "{why}"
    );
}
