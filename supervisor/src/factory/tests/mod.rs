//! The core in a small world: promises one by one, then all of them under random faults.

mod world;

use proptest::prelude::*;
use protocol::{Exit, State};

use super::*;
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
    assert_eq!((world.done.len(), world.failed.len()), (6, 0));
}

#[test]
fn an_idle_factory_asks_three_things_a_round() {
    let mut world = World::new();
    world.run(|w| w.counts.get("lease") == Some(&50));
    assert!(
        world.now >= 49_000,
        "the rounds are a second apart: {}",
        world.now
    );
    assert!(
        world.counts["workers"] <= 51 && world.counts["list"] <= 51,
        "{:?}",
        world.counts
    );
}

#[test]
fn nothing_is_leased_before_both_have_answered_nor_while_the_helper_is_away() {
    let mut world = World::new();
    world.helper_up = false;
    world.submit(1, '2');
    for n in 0..100 {
        world.step(n);
    }
    assert_eq!(world.counts.get("lease"), None);
    world.helper_up = true;
    world.run(World::is_empty);
    world.helper_up = false;
    for n in 0..10 {
        world.step(n);
    }
    world.submit(2, '2');
    for n in 0..100 {
        world.step(n);
    }
    assert_eq!(world.queue.len(), 1);
    assert!(world.said.iter().any(|s| s.starts_with("helper away")));
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
            (world.jobs_of.len(), world.done.len(), world.lose),
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
    world
        .server
        .values_mut()
        .for_each(|w| (w.hold, w.recycle) = (true, false));
    world.reboot();
    for n in 0..3000 {
        world.step(n);
    }
    assert_eq!(
        (phase(&world), world.host.len()),
        (Some(Phase::Running { online: true }), 1)
    );
    world.release();
    world.run(World::is_empty);
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
        (world.done.len(), world.failed.len(), world.jobs_of.len()),
        (1, 0, 1)
    );
}

#[test]
fn a_failed_start_is_told_and_the_slot_rests() {
    let mut world = World::new();
    world.start_fails = Some("the group plugdev does not exist");
    world.submit(1, '3');
    world.run(|w| matches!(phase(w), Some(Phase::Broken { told: true, .. })));
    assert!(world.failed.contains(&job(1)));
    world.start_fails = None;
    world.release();
    world.run(World::is_empty);
    world.submit(2, '3');
    let before = world.now;
    world.run(World::is_empty);
    assert!(
        world.done.contains(&job(2)) && world.now - before >= 10_000,
        "it did not rest"
    );
}

#[test]
fn an_older_server_learns_of_a_failure_by_the_deletion() {
    let mut world = World::new();
    (world.old_server, world.start_fails) = (true, Some("no"));
    world.submit(1, '3');
    world.run(World::is_empty);
    assert!(world.failed.contains(&job(1)) && world.said.iter().any(|s| s.contains("too old")));
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
    let stray = WorkerId::from_bits(5);
    world
        .host
        .insert(stray, ("b".parse().unwrap(), State::Exited(Exit::Unknown)));
    world.host.retain(|_, (slot, _)| slot.as_str() != "a");
    world.disk.clear();
    world.crash(false);
    world.run(World::is_empty);
    assert!(world.said.iter().any(|s| s.contains("nobody's worker")));
    assert_eq!(world.done.len() + world.failed.len(), 2);
}

#[test]
fn a_draining_or_stopped_factory_takes_nothing() {
    let mut world = World::new();
    world.tell(Input::Drain(true));
    world.submit(1, '2');
    for n in 0..100 {
        world.step(n);
    }
    assert!(world.queue.len() == 1 && world.counts["lease"] > 10);
    world.tell(Input::Drain(false));
    world.run(|w| !w.disk.is_empty());
    world.tell(Input::Stop);
    while !world.pending.is_empty() {
        world.step(0);
    }
    assert!(world.core.is_idle() && world.core.next_deadline().is_none());
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    Server(bool),
    Helper(bool),
    Lose(usize),
    Crash(bool),
    Reboot,
    Release,
    Agents,
    Cancel,
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        any::<bool>().prop_map(Fault::Server),
        any::<bool>().prop_map(Fault::Helper),
        (0usize..7).prop_map(Fault::Lose),
        any::<bool>().prop_map(Fault::Crash),
        Just(Fault::Reboot),
        Just(Fault::Release),
        Just(Fault::Agents),
        Just(Fault::Agents),
        Just(Fault::Agents),
        Just(Fault::Cancel),
    ]
}

proptest! {
    #[test]
    fn whatever_goes_wrong_every_job_ends_and_nothing_is_left(
        jobs in proptest::collection::vec(any::<bool>(), 1..6),
        script in proptest::collection::vec((fault(), proptest::collection::vec(any::<usize>(), 0..25)), 0..25),
    ) {
        let mut world = World::new();
        for (n, target) in jobs.iter().enumerate() {
            world.submit(n as u128, if *target { '2' } else { '3' });
        }
        for (fault, steps) in script {
            match fault {
                Fault::Server(up) => world.server_up = up,
                Fault::Helper(up) => world.helper_up = up,
                Fault::Lose(n) => {
                    let kinds = ["make", "associate", "create user", "install agent", "lease", "workers", "delete on the server"];
                    world.lose = Some(kinds[n]);
                }
                Fault::Crash(happened) => world.crash(happened),
                Fault::Reboot => world.reboot(),
                Fault::Release => world.release(),
                Fault::Agents => world.agents_work(),
                Fault::Cancel => world.server.values_mut().take(1).for_each(|w| w.recycle = !w.hold),
            }
            for which in steps { world.step(which); }
        }
        (world.server_up, world.helper_up, world.lose) = (true, true, None);
        for _ in 0..20 {
            world.release();
            for n in 0..200 {
                world.step(n);
                world.agents_work();
            }
        }
        world.release();
        world.run(World::is_empty);
        for n in 0..jobs.len() {
            let job = job(n as u128);
            prop_assert!(world.done.contains(&job) != world.failed.contains(&job), "job {} is done or failed", n);
        }
    }
}
