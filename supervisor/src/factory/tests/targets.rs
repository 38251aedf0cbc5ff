//! Slots whose target is a name.

use protocol::config::Config;
use protocol::{SlotName, TargetId};

use super::test_bed::{self, CoreTestBed};
use super::{Input, Output, Phase, phase};
use crate::buildomat::ServerTarget;
use crate::control::api::{self, SlotState};

/// The configuration of all test beds, with a name for the target of slot c.
fn config(name: &str) -> String {
    test_bed::CONFIG.replace("01HZX3N8Q4J5K6M7P8R9S0T1V3", name)
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

fn named(targets: &[ServerTarget]) -> CoreTestBed {
    let mut bed = CoreTestBed::with(&config("hubris"));
    bed.targets = Some(targets.to_vec());
    bed
}

fn slot(bed: &CoreTestBed) -> api::Slot {
    let slots = bed.status_input().slots();
    slots.into_iter().find(|slot| slot.name.as_str() == "c").unwrap()
}

fn asked(bed: &CoreTestBed) -> usize {
    bed.counts.get("targets").copied().unwrap_or(0)
}

fn pass(bed: &mut CoreTestBed, ms: u64) {
    let end = bed.now + ms;
    bed.run(|w| w.now >= end);
}

fn reload(bed: &mut CoreTestBed, config: &str) {
    bed.send_input(Input::Configure(Box::new(Config::parse(config).unwrap())));
}

#[test]
fn a_name_is_looked_up_once_and_its_jobs_are_done() {
    let mut bed = named(&[target('2', "linux"), target('3', "hubris")]);
    assert_eq!((slot(&bed).state, slot(&bed).target), (SlotState::Closed, None));
    assert!(slot(&bed).because.unwrap().contains("being looked up"));
    bed.submit(1, '3');
    bed.run(|w| w.done().len() == 1);
    pass(&mut bed, 3_600_000);
    let found = slot(&bed);
    assert_eq!((found.state, found.target), (SlotState::Free, Some(id('3'))));
    assert_eq!(found.target_name.unwrap().as_str(), "hubris");
    assert_eq!(asked(&bed), 1);
}

#[test]
fn a_configuration_of_ids_asks_for_no_targets() {
    let mut bed = CoreTestBed::new();
    bed.targets = Some(vec![target('9', "hubris")]);
    bed.submit(1, '3');
    bed.run(CoreTestBed::is_empty);
    assert_eq!((asked(&bed), bed.done().len()), (0, 1));
}

#[test]
fn a_server_that_has_no_call_for_it_keeps_that_slot_closed_and_the_sentence_says_what_to_do() {
    let mut bed = CoreTestBed::with(&config("hubris"));
    bed.submit(1, '3');
    bed.submit(2, '2');
    bed.run(|w| w.done().len() == 1);
    pass(&mut bed, 3_600_000);
    assert_eq!((bed.done().len(), bed.queued()), (1, 1));
    let because = slot(&bed).because.unwrap();
    for part in [
        "slots.c.target = \"hubris\"",
        "/0/factory/targets",
        "write the target's id",
    ] {
        assert!(because.contains(part), "{because}");
    }
    assert_eq!(slot(&bed).state, SlotState::Closed);
    assert!((10..200).contains(&asked(&bed)), "{}", asked(&bed));
    let logged = bed
        .logged
        .iter()
        .filter(|line| line.contains("write the target's id"));
    assert_eq!(logged.count(), 1, "{:#?}", bed.logged);
    // The server is updated.
    bed.targets = Some(vec![target('3', "hubris")]);
    bed.run(|w| w.done().len() == 2);
}

#[test]
fn an_unknown_name_is_told_with_those_that_there_are_and_taken_once_the_server_has_it() {
    let many: Vec<ServerTarget> = (0..12).map(|n| target('2', &format!("t{n}"))).collect();
    let mut bed = named(&many);
    bed.submit(1, '3');
    pass(&mut bed, 600_000);
    let because = slot(&bed).because.unwrap();
    for part in ["\"hubris\"", "\"t0\"", "\"t9\"", "2 more", "correct the name"] {
        assert!(because.contains(part), "{because}");
    }
    assert!(!because.contains("t10"), "{because}");
    let logged = bed.logged.iter().filter(|line| line.contains("correct the name"));
    assert_eq!(logged.count(), 1, "{:#?}", bed.logged);
    bed.targets = Some(vec![target('3', "hubris")]);
    bed.run(|w| w.done().len() == 1);
}

#[test]
fn a_server_that_is_away_at_the_start_is_asked_again_and_no_job_is_taken_before() {
    let mut bed = named(&[target('3', "hubris")]);
    bed.submit(1, '3');
    bed.targets_fail = true;
    pass(&mut bed, 600_000);
    assert!(slot(&bed).because.unwrap().contains("too busy"));
    assert_eq!(bed.queued(), 1);
    bed.targets_fail = false;
    bed.run(|w| w.done().len() == 1);
    // Unreachable: it is asked as soon as it is back.
    let mut bed = named(&[target('3', "hubris")]);
    bed.server_up = false;
    pass(&mut bed, 3_600_000);
    bed.server_up = true;
    bed.run(|w| w.logged.iter().any(|line| line.contains("server back")));
    let back = bed.now;
    bed.run(|w| slot(w).state == SlotState::Free);
    assert!(bed.now < back + 2_000, "{} {back}", bed.now);
}

#[test]
fn a_name_that_moves_to_another_target_is_followed_by_a_reload_alone() {
    let mut bed = named(&[target('3', "hubris")]);
    let with_another = config("hubris").replacen("01HZX3N8Q4J5K6M7P8R9S0T1V2", "unknown", 1);
    reload(&mut bed, &with_another);
    pass(&mut bed, 10_000);
    assert_eq!(slot(&bed).target, Some(id('3')));
    bed.targets = Some(vec![target('4', "hubris")]);
    // It is asked all the time, since it does not have the other name.
    let before = asked(&bed);
    pass(&mut bed, 600_000);
    assert!(asked(&bed) > before);
    assert_eq!(slot(&bed).target, Some(id('3')));
    // While the answer is not there, a reload changes nothing.
    bed.targets_fail = true;
    reload(&mut bed, &config("hubris"));
    pass(&mut bed, 600_000);
    assert_eq!(
        (slot(&bed).state, slot(&bed).target),
        (SlotState::Free, Some(id('3')))
    );
    bed.targets_fail = false;
    bed.run(|w| slot(w).target == Some(id('4')));
    // And one that the server has lost stands for nothing from then on.
    bed.targets = Some(Vec::new());
    reload(&mut bed, &config("hubris"));
    bed.run(|w| slot(w).target.is_none());
    assert!(slot(&bed).because.unwrap().contains("has no targets"));
}

#[test]
fn an_answer_to_a_request_from_before_the_reload_is_requested_again() {
    let mut bed = named(&[target('3', "hubris")]);
    bed.send_input(Input::Tick);
    reload(&mut bed, &config("hubris"));
    bed.pending.retain(|output| *output != Output::ListTargets);
    bed.send_input(Input::TargetsListed(Ok(Some(vec![target('3', "hubris")]))));
    // That was the answer to the first request; the name has moved since.
    bed.targets = Some(vec![target('4', "hubris")]);
    bed.run(|w| slot(w).target == Some(id('4')));
}

#[test]
fn a_worker_of_the_previous_run_does_not_lose_its_slot_before_the_target_is_looked_up() {
    let mut bed = named(&[target('3', "hubris")]);
    bed.submit(1, '3');
    while phase(&bed) != Some(Phase::Reserved) {
        bed.step(0);
    }
    bed.targets_fail = true;
    bed.crash(false);
    bed.run(|w| w.done().len() == 1);
    assert!(
        bed.failed().is_empty() && slot(&bed).target.is_none(),
        "{:?}",
        bed.logged
    );
    let name: SlotName = "c".parse().unwrap();
    assert!(!bed.core.available(bed.now).contains(&name));
}
