//! Slots whose target is a name.

use protocol::config::Config;
use protocol::{SlotName, TargetId};

use super::world::{self, World};
use super::{Input, Output, Phase, phase};
use crate::buildomat::ServerTarget;
use crate::control::api::{self, SlotState};

/// The configuration of all worlds, with a name for the target of slot c.
fn config(name: &str) -> String {
    world::CONFIG.replace("01HZX3N8Q4J5K6M7P8R9S0T1V3", name)
}

fn id(end: char) -> TargetId {
    format!("01HZX3N8Q4J5K6M7P8R9S0T1V{end}").parse().unwrap()
}

fn target(end: char, name: &str) -> ServerTarget {
    ServerTarget {
        id: id(end),
        name: name.into(),
    }
}

fn named(targets: &[ServerTarget]) -> World {
    let mut world = World::with(&config("hubris"));
    world.targets = Some(targets.to_vec());
    world
}

fn slot(world: &World) -> api::Slot {
    let slots = world.status_input().slots();
    slots.into_iter().find(|slot| slot.name.as_str() == "c").unwrap()
}

fn asked(world: &World) -> usize {
    world.counts.get("targets").copied().unwrap_or(0)
}

fn pass(world: &mut World, ms: u64) {
    let end = world.now + ms;
    world.run(|w| w.now >= end);
}

fn reload(world: &mut World, config: &str) {
    world.send_input(Input::Configure(Box::new(Config::parse(config).unwrap())));
}

#[test]
fn a_name_is_looked_up_once_and_its_jobs_are_done() {
    let mut world = named(&[target('2', "linux"), target('3', "hubris")]);
    assert_eq!(
        (slot(&world).state, slot(&world).target),
        (SlotState::Closed, None)
    );
    assert!(slot(&world).because.unwrap().contains("being looked up"));
    world.submit(1, '3');
    world.run(|w| w.done().len() == 1);
    pass(&mut world, 3_600_000);
    let found = slot(&world);
    assert_eq!((found.state, found.target), (SlotState::Free, Some(id('3'))));
    assert_eq!(found.target_name.unwrap().as_str(), "hubris");
    assert_eq!(asked(&world), 1);
}

#[test]
fn a_configuration_of_ids_asks_for_no_targets() {
    let mut world = World::new();
    world.targets = Some(vec![target('9', "hubris")]);
    world.submit(1, '3');
    world.run(World::is_empty);
    assert_eq!((asked(&world), world.done().len()), (0, 1));
}

#[test]
fn a_server_that_has_no_call_for_it_keeps_that_slot_closed_and_the_sentence_says_what_to_do() {
    let mut world = World::with(&config("hubris"));
    world.submit(1, '3');
    world.submit(2, '2');
    world.run(|w| w.done().len() == 1);
    pass(&mut world, 3_600_000);
    assert_eq!((world.done().len(), world.queued()), (1, 1));
    let because = slot(&world).because.unwrap();
    for part in [
        "slots.c.target = \"hubris\"",
        "/0/factory/targets",
        "write the target's id",
    ] {
        assert!(because.contains(part), "{because}");
    }
    assert_eq!(slot(&world).state, SlotState::Closed);
    assert!((10..200).contains(&asked(&world)), "{}", asked(&world));
    let logged = world
        .logged
        .iter()
        .filter(|line| line.contains("write the target's id"));
    assert_eq!(logged.count(), 1, "{:#?}", world.logged);
    // The server is updated.
    world.targets = Some(vec![target('3', "hubris")]);
    world.run(|w| w.done().len() == 2);
}

#[test]
fn an_unknown_name_is_told_with_those_that_there_are_and_taken_once_the_server_has_it() {
    let many: Vec<ServerTarget> = (0..12).map(|n| target('2', &format!("t{n}"))).collect();
    let mut world = named(&many);
    world.submit(1, '3');
    pass(&mut world, 600_000);
    let because = slot(&world).because.unwrap();
    for part in ["\"hubris\"", "\"t0\"", "\"t9\"", "2 more", "correct the name"] {
        assert!(because.contains(part), "{because}");
    }
    assert!(!because.contains("t10"), "{because}");
    let logged = world.logged.iter().filter(|line| line.contains("correct the name"));
    assert_eq!(logged.count(), 1, "{:#?}", world.logged);
    world.targets = Some(vec![target('3', "hubris")]);
    world.run(|w| w.done().len() == 1);
}

#[test]
fn a_server_that_is_away_at_the_start_is_asked_again_and_no_job_is_taken_before() {
    let mut world = named(&[target('3', "hubris")]);
    world.submit(1, '3');
    world.targets_fail = true;
    pass(&mut world, 600_000);
    assert!(slot(&world).because.unwrap().contains("too busy"));
    assert_eq!(world.queued(), 1);
    world.targets_fail = false;
    world.run(|w| w.done().len() == 1);
    // Unreachable: it is asked as soon as it is back.
    let mut world = named(&[target('3', "hubris")]);
    world.server_up = false;
    pass(&mut world, 3_600_000);
    world.server_up = true;
    world.run(|w| w.logged.iter().any(|line| line.contains("server back")));
    let back = world.now;
    world.run(|w| slot(w).state == SlotState::Free);
    assert!(world.now < back + 2_000, "{} {back}", world.now);
}

#[test]
fn a_name_that_moves_to_another_target_is_followed_by_a_reload_alone() {
    let mut world = named(&[target('3', "hubris")]);
    let with_another = config("hubris").replacen("01HZX3N8Q4J5K6M7P8R9S0T1V2", "unknown", 1);
    reload(&mut world, &with_another);
    pass(&mut world, 10_000);
    assert_eq!(slot(&world).target, Some(id('3')));
    world.targets = Some(vec![target('4', "hubris")]);
    // It is asked all the time, since it does not have the other name.
    let before = asked(&world);
    pass(&mut world, 600_000);
    assert!(asked(&world) > before);
    assert_eq!(slot(&world).target, Some(id('3')));
    // While the answer is not there, a reload changes nothing.
    world.targets_fail = true;
    reload(&mut world, &config("hubris"));
    pass(&mut world, 600_000);
    assert_eq!(
        (slot(&world).state, slot(&world).target),
        (SlotState::Free, Some(id('3')))
    );
    world.targets_fail = false;
    world.run(|w| slot(w).target == Some(id('4')));
    // And one that the server has lost stands for nothing from then on.
    world.targets = Some(Vec::new());
    reload(&mut world, &config("hubris"));
    world.run(|w| slot(w).target.is_none());
    assert!(slot(&world).because.unwrap().contains("has no targets"));
}

#[test]
fn an_answer_to_a_request_from_before_the_reload_is_requested_again() {
    let mut world = named(&[target('3', "hubris")]);
    world.send_input(Input::Tick);
    reload(&mut world, &config("hubris"));
    world.pending.retain(|output| *output != Output::ListTargets);
    world.send_input(Input::TargetsListed(Ok(Some(vec![target('3', "hubris")]))));
    // That was the answer to the first request; the name has moved since.
    world.targets = Some(vec![target('4', "hubris")]);
    world.run(|w| slot(w).target == Some(id('4')));
}

#[test]
fn a_worker_of_the_previous_run_does_not_lose_its_slot_before_the_target_is_looked_up() {
    let mut world = named(&[target('3', "hubris")]);
    world.submit(1, '3');
    while phase(&world) != Some(Phase::Reserved) {
        world.step(0);
    }
    world.targets_fail = true;
    world.crash(false);
    world.run(|w| w.done().len() == 1);
    assert!(
        world.failed().is_empty() && slot(&world).target.is_none(),
        "{:?}",
        world.logged
    );
    let name: SlotName = "c".parse().unwrap();
    assert!(!world.core.available(world.now).contains(&name));
}
