//! The core in a small test bed: what it does, one rule a test. All rules together, and whatever can go wrong, are in
//! the simulation (`--test simulation`).

mod targets;
mod test_bed;
mod usb;

use crate::control::status::time;
use protocol::{BootstrapToken, Exit, Target};
use testbed::helper_model::Agent;

use super::*;
use crate::control::api::SlotState;
use test_bed::{CoreTestBed, job};

fn phase(bed: &CoreTestBed) -> Option<Phase> {
    bed.disk.values().next().map(|w| w.phase)
}

#[test]
fn jobs_are_done_and_nothing_is_left() {
    let mut bed = CoreTestBed::new();
    for n in 0..6 {
        bed.submit(n, if n % 2 == 0 { '2' } else { '3' });
    }
    bed.run(CoreTestBed::is_empty);
    assert_eq!((bed.done().len(), bed.failed().len()), (6, 0));
}

#[test]
fn an_idle_factory_asks_the_server_twice_a_poll_and_the_helper_never() {
    let mut bed = CoreTestBed::new();
    bed.run(|w| w.counts.get("lease") == Some(&50));
    assert!(bed.now >= 49_000, "the polls are a second apart: {}", bed.now);
    assert!(
        bed.counts["workers"] <= 51 && bed.counts["list"] == 1,
        "{:?}",
        bed.counts
    );
    bed.run(|w| w.counts["lease"] == 2000);
    assert_eq!(bed.counts["list"], 2, "now and then it is asked all the same");
}

#[test]
fn a_factory_with_workers_asks_as_much_as_one_with_one() {
    for workers in [1, 2] {
        let mut bed = CoreTestBed::new();
        for n in 0..workers {
            bed.submit(n, if n == 0 { '2' } else { '3' });
        }
        let online = |w: &CoreTestBed| {
            w.disk
                .values()
                .filter(|w| w.phase == Phase::Running { online: true })
                .count()
        };
        bed.run(|w| online(w) == workers as usize);
        let before = bed.counts.clone();
        let mut polls = 0;
        while polls < 20 {
            bed.step(0);
            polls = bed.counts["lease"] - before["lease"];
        }
        for kind in ["workers", "list"] {
            let asked = bed.counts[kind] - before[kind];
            assert!((19..=21).contains(&asked), "{kind} with {workers}: {asked}");
        }
        let others = |counts: &BTreeMap<&str, usize>| {
            counts
                .iter()
                .filter(|(kind, _)| !["workers", "list", "lease"].contains(kind))
                .map(|(_, n)| n)
                .sum::<usize>()
        };
        assert_eq!(others(&bed.counts), others(&before));
    }
}

#[test]
fn nothing_is_leased_before_both_have_answered_and_nothing_is_made_while_the_helper_is_away() {
    let mut bed = CoreTestBed::new();
    bed.helper_up = false;
    bed.submit(1, '2');
    for n in 0..100 {
        bed.step(n);
    }
    assert_eq!(bed.counts.get("lease"), None);
    bed.helper_up = true;
    bed.run(CoreTestBed::is_empty);
    // It is not noticed before the next job comes: that one's lease is lost, and no other.
    bed.helper_up = false;
    bed.logged.clear();
    for n in 0..10 {
        bed.step(n);
    }
    bed.submit(2, '2');
    bed.submit(3, '3');
    let end = bed.now + 100_000;
    while bed.now < end {
        bed.step(0);
    }
    assert_eq!(
        (bed.queued(), bed.server.leases.len(), bed.counts["make"]),
        (2, 0, 1)
    );
    for part in ["helper unreachable", "will expire: the helper is unreachable"] {
        assert_eq!(
            bed.logged.iter().filter(|s| s.contains(part)).count(),
            1,
            "{part}: {:?}",
            bed.logged
        );
    }
    bed.helper_up = true;
    bed.run(CoreTestBed::is_empty);
}

#[test]
fn a_job_outlives_a_moment_without_a_helper_and_a_slot_with_an_orphan() {
    let mut bed = CoreTestBed::new();
    bed.run(|w| w.counts.get("lease") == Some(&10));
    bed.helper_up = false;
    bed.submit(1, '3');
    bed.run(|w| w.logged.iter().any(|s| s.starts_with("helper unreachable")));
    bed.helper_up = true;
    bed.run(CoreTestBed::is_empty);
    assert_eq!(bed.done().len(), 1);
    // One that the database and the server do not know.
    bed.run(|w| w.core.is_idle(w.now));
    let orphan = WorkerId::from_bits(5);
    bed.on_host(orphan, "c", Agent::Stays);
    bed.submit(2, '3');
    bed.run(|w| w.done().len() == 2 && w.is_empty());
    let deleted = bed.logged.iter().position(|s| s.contains("orphaned worker"));
    assert!(deleted.is_some(), "{:?}", bed.logged);
    assert!(
        !bed.logged.iter().any(|s| s.contains("slot taken")),
        "{:?}",
        bed.logged
    );
}

#[test]
fn a_worker_that_only_the_server_knows_comes_before_a_new_job_though_the_helper_was_not_asked() {
    let mut bed = CoreTestBed::new();
    bed.run(|w| w.core.is_idle(w.now) && w.counts.get("lease") == Some(&5));
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
    bed.insert(&worker);
    let began = bed.now;
    bed.run(|w| !w.disk.is_empty());
    assert!(bed.now >= began + 60_000, "another host may be about to take it");
    assert!(bed.disk.contains_key(&lost));
    bed.run(CoreTestBed::is_empty);
    // The next waits for its slot, and then it comes before a new job.
    bed.submit(1, '3');
    bed.run(|w| phase(w) == Some(Phase::Running { online: true }));
    bed.insert(&worker_of_others(5, '3', None));
    bed.agents_sleep = true;
    let began = bed.now;
    while bed.now < began + 70_000 {
        bed.step(0);
    }
    bed.submit(2, '3');
    bed.agents_sleep = false;
    bed.run(|w| w.disk.contains_key(&lost));
    assert_eq!(bed.queued(), 1);
    bed.run(CoreTestBed::is_empty);
    assert_eq!(bed.done().len(), 2);
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

fn steps(bed: &mut CoreTestBed, ms: u64) {
    let end = bed.now + ms;
    while bed.now < end {
        bed.step(0);
    }
}

#[test]
fn another_hosts_worker_is_left_alone_and_no_jobs_are_taken_while_it_is_there() {
    let mut bed = CoreTestBed::new();
    bed.submit(1, '2');
    bed.run(|w| phase(w) == Some(Phase::Running { online: true }));
    let others = worker_of_others(5, '3', OTHER);
    bed.insert(&others);
    bed.agents_sleep = true;
    steps(&mut bed, 2_000);
    bed.submit(2, '3');
    steps(&mut bed, 700_000);
    assert_eq!(bed.listed()[&others.id], others, "it was touched");
    assert_eq!((bed.queued(), bed.disk.len()), (1, 1));
    let logged = bed
        .logged
        .iter()
        .filter(|s| s.contains("another host uses this factory's token"));
    assert_eq!(logged.count(), 1, "{:?}", bed.logged);
    // Its own job goes on, to its end.
    bed.agents_sleep = false;
    bed.run(|w| w.done().contains(&job(1)) && w.disk.is_empty());
    let shown = &bed.status_input().foreign_workers()[0];
    for part in [
        "c@here/11111111",
        "SLOT@here/00000000",
        "a token of its own",
        "--yes",
    ] {
        assert!(shown.text.contains(part), "{part}: {}", shown.text);
    }
    // The other host has done with it.
    bed.server.workers.remove(&others.id);
    bed.run(CoreTestBed::is_empty);
    assert!(bed.done().contains(&job(2)));
    assert_eq!(
        bed.status_input().foreign_workers().len(),
        1,
        "it was a moment ago"
    );
    steps(&mut bed, 700_000);
    assert!(bed.status_input().foreign_workers().is_empty());
}

#[test]
fn workers_of_others_that_a_server_lists_without_end_take_no_more_memory() {
    let mut bed = CoreTestBed::new();
    bed.run(|w| w.core.is_idle(w.now));
    for round in 0..20 {
        let others = (0..50).map(|n| worker_of_others(1000 * (round + 1) + n, '3', OTHER));
        bed.server.workers.clear();
        others.for_each(|w| bed.insert(&w));
        steps(&mut bed, 2_000);
        assert!(bed.status_input().not_taken().unwrap().contains("another host"));
    }
    assert_eq!(bed.status_input().foreign_workers().len(), 100);
    // When they are gone, jobs are taken, and others are shown once these have had their time.
    bed.server.workers.clear();
    bed.submit(1, '2');
    bed.run(|w| w.done().len() == 1);
    steps(&mut bed, 700_000);
    assert!(bed.status_input().foreign_workers().is_empty());
}

#[test]
fn the_operator_deletes_another_hosts_worker_by_its_name() {
    let mut bed = CoreTestBed::new();
    let others = worker_of_others(5, '3', OTHER);
    bed.insert(&others);
    bed.agents_sleep = true;
    bed.send_input(Input::Destroy(others.id));
    steps(&mut bed, 5_000);
    assert!(bed.listed().contains_key(&others.id), "it was not known yet");
    assert!(bed.core.may_be_foreign(others.id));
    bed.send_input(Input::Destroy(others.id));
    bed.run(|w| w.listed().is_empty());
    assert!(bed.status_input().foreign_workers().is_empty());
    // The same of one of which this host has a copy.
    bed.insert(&others);
    bed.on_host(others.id, "c", Agent::Ends(Exit::Unknown));
    steps(&mut bed, 5_000);
    assert!(bed.host.get(others.id).is_some() && bed.disk.is_empty());
    bed.send_input(Input::Destroy(others.id));
    bed.run(CoreTestBed::is_empty);
}

#[test]
fn a_worker_that_another_host_was_first_to_claim_is_let_go() {
    for known in [true, false] {
        let mut bed = CoreTestBed::new();
        bed.submit(1, '3');
        if !known {
            bed.lose = Some("make");
        }
        bed.run(|w| w.counts.get("make") == Some(&1));
        let id = *bed.listed().keys().next().unwrap();
        assert_eq!(bed.disk.contains_key(&id), known);
        bed.pending
            .retain(|output| !matches!(output, Output::CarryOut(..)));
        // It was without an owner for a moment, and it is the other's now.
        let w = bed.server.workers.get_mut(&id).unwrap();
        w.private = OTHER.map(str::to_owned);
        bed.core
            .entries
            .values_mut()
            .for_each(|entry| drop(entry.take_call()));
        bed.refuses_workers = true;
        bed.agents_sleep = true;
        steps(&mut bed, 100_000);
        assert!(
            bed.disk.is_empty() && bed.host.workers().next().is_none(),
            "{known}"
        );
        assert_eq!(bed.listed()[&id].private.as_deref(), OTHER, "{known}");
        assert!(bed.failed().is_empty(), "{known}");
    }
}

#[test]
fn a_lost_answer_does_not_make_another_hosts_new_worker_this_ones() {
    let mut bed = CoreTestBed::new();
    bed.submit(1, '3');
    bed.lose = Some("make");
    bed.run(|w| w.counts.get("make") == Some(&1) && w.lose.is_none());
    // The request was lost, not the answer; and another host makes one in this instant.
    let id = *bed.listed().keys().next().unwrap();
    let job_of = bed.server.workers.remove(&id).unwrap().job.unwrap();
    bed.server.jobs.get_mut(&job_of).unwrap().worker = None;
    bed.insert(&worker_of_others(5, '3', None));
    steps(&mut bed, 5_000);
    assert!(bed.disk.is_empty(), "it was taken for this one's");
    let other = bed.server.workers.get_mut(&WorkerId::from_bits(5)).unwrap();
    other.private = OTHER.map(str::to_owned);
    bed.run(|w| w.made() == 1);
    assert_eq!(bed.listed()[&WorkerId::from_bits(5)].private.as_deref(), OTHER);
}

#[test]
fn what_runs_here_is_this_hosts_also_when_its_instance_id_was_lost() {
    let mut bed = CoreTestBed::new();
    bed.submit(1, '3');
    bed.run(|w| phase(w) == Some(Phase::Running { online: true }));
    let renamed = |w: &mut CoreTestBed| {
        for worker in w.server.workers.values_mut() {
            worker.private = OTHER.map(str::to_owned);
        }
    };
    renamed(&mut bed);
    bed.agents_sleep = true;
    steps(&mut bed, 100_000);
    bed.disk.clear();
    bed.crash(false);
    steps(&mut bed, 100_000);
    assert_eq!(phase(&bed), Some(Phase::Running { online: true }));
    bed.agents_sleep = false;
    bed.run(CoreTestBed::is_empty);
    assert!(bed.done().contains(&job(1)));
}

#[test]
fn a_slot_is_free_as_soon_as_its_worker_has_come_to_its_end() {
    let mut bed = CoreTestBed::new();
    bed.submit(1, '3');
    bed.run(|w| !w.disk.is_empty());
    assert_eq!(bed.core.available(bed.now).len(), 2);
    bed.run(|w| w.disk.is_empty());
    assert_eq!(bed.core.available(bed.now).len(), 3);
}

#[test]
fn a_status_request_has_the_helper_asked_once_a_poll_interval() {
    let mut bed = CoreTestBed::new();
    bed.run(|w| w.core.is_idle(w.now));
    let lists = bed.counts["list"];
    for _ in 0..5 {
        bed.now += 2_000;
        assert!(bed.core.must_ask_helper(bed.now));
        bed.send_input(Input::StatusRequested);
        assert!(bed.core.is_waiting_for_helper());
        bed.send_input(Input::StatusRequested);
        while bed.core.is_waiting_for_helper() {
            bed.step(0);
        }
        assert!(!bed.core.must_ask_helper(bed.now));
        bed.send_input(Input::StatusRequested);
    }
    assert_eq!(bed.counts["list"], lists + 5);
    bed.helper_up = false;
    bed.now += 2_000;
    bed.send_input(Input::StatusRequested);
    while bed.core.is_waiting_for_helper() {
        bed.step(0);
    }
    assert!(bed.logged.iter().any(|s| s.starts_with("helper unreachable")));
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
        let mut bed = CoreTestBed::new();
        bed.submit(1, '2');
        bed.lose = Some(lose);
        bed.run(CoreTestBed::is_empty);
        assert_eq!((bed.made(), bed.done().len(), bed.lose), (1, 1, None), "{lose}");
    }
}

#[test]
fn a_held_worker_is_left_as_it_is_until_released() {
    let mut bed = CoreTestBed::new();
    bed.submit(1, '2');
    bed.run(|w| phase(w) == Some(Phase::Running { online: true }));
    for id in bed.listed().into_keys() {
        bed.server.hold(id, "an operator looks").unwrap();
    }
    bed.reboot();
    for n in 0..3000 {
        bed.step(n);
    }
    assert_eq!(
        (phase(&bed), bed.host.workers().count()),
        (Some(Phase::Running { online: true }), 1)
    );
    bed.release();
    bed.run(CoreTestBed::is_empty);
}

#[test]
fn a_job_that_stalls_at_its_memory_limit_fails_and_its_slot_works_again() {
    let mut bed = CoreTestBed::new();
    bed.submit(1, '2');
    bed.run(|w| phase(w) == Some(Phase::Running { online: true }));
    bed.agents_sleep = true;
    let worker = *bed.listed().keys().next().unwrap();
    // One of `user-factory run`, which the core does not know.
    bed.send_input(Input::MemoryStalled(WorkerId::from_bits(7)));
    bed.send_input(Input::MemoryStalled(worker));
    bed.run(|w| matches!(phase(w), Some(Phase::Broken { reported: true, .. })));
    assert!(bed.failed().contains(&job(1)));
    bed.agents_sleep = false;
    bed.submit(2, '2');
    bed.release();
    bed.run(CoreTestBed::is_empty);
    assert!(bed.done().contains(&job(2)));
}

#[test]
fn a_reboot_before_the_job_began_fails_nothing() {
    let mut bed = CoreTestBed::new();
    bed.submit(1, '2');
    while phase(&bed) != Some(Phase::Running { online: false }) {
        bed.step(0);
    }
    bed.reboot();
    while bed.disk.values().all(|w| w.remakes == 0) {
        bed.step(0);
    }
    bed.run(CoreTestBed::is_empty);
    assert_eq!((bed.done().len(), bed.failed().len(), bed.made()), (1, 0, 1));
}

#[test]
fn a_failed_start_is_reported_and_the_slot_cools_down() {
    let mut bed = CoreTestBed::new();
    bed.start_fails = Some("the group plugdev does not exist");
    bed.submit(1, '3');
    bed.run(|w| matches!(phase(w), Some(Phase::Broken { reported: true, .. })));
    assert!(bed.failed().contains(&job(1)));
    bed.start_fails = None;
    bed.release();
    bed.run(CoreTestBed::is_empty);
    bed.submit(2, '3');
    let before = bed.now;
    bed.run(CoreTestBed::is_empty);
    assert!(
        bed.done().contains(&job(2)) && bed.now - before >= 10_000,
        "it did not cool down"
    );
}

#[test]
fn an_older_server_learns_of_a_failure_by_the_deletion() {
    let mut bed = CoreTestBed::new();
    (bed.server.no_fail, bed.start_fails) = (true, Some("no"));
    bed.submit(1, '3');
    bed.run(CoreTestBed::is_empty);
    assert!(bed.failed().contains(&job(1)) && bed.logged.iter().any(|s| s.contains("too old")));
}

#[test]
fn an_agent_that_stays_away_fails_in_time_and_a_server_outage_does_not_count() {
    let mut bed = CoreTestBed::new();
    bed.submit(1, '2');
    while phase(&bed) != Some(Phase::Running { online: false }) {
        bed.step(0);
    }
    let began = bed.now;
    bed.server_up = false;
    while bed.now < began + 600_000 {
        bed.step(0);
    }
    bed.server_up = true;
    while phase(&bed) == Some(Phase::Running { online: false }) {
        bed.step(0);
    }
    assert!(matches!(phase(&bed), Some(Phase::Broken { .. })));
    assert!(
        bed.now >= began + 890_000 && bed.now < began + 1_000_000,
        "{}",
        bed.now - began
    );
}

#[test]
fn a_forgotten_database_is_rebuilt_from_the_server_and_the_host() {
    let mut bed = CoreTestBed::new();
    bed.submit(1, '2');
    bed.submit(2, '3');
    bed.run(|w| {
        w.disk.len() == 2
            && w.disk
                .values()
                .all(|w| w.phase == Phase::Running { online: true })
    });
    let orphan = WorkerId::from_bits(5);
    let in_a = bed.host.workers().find(|(_, w)| w.slot.as_str() == "a");
    bed.host.delete(in_a.unwrap().0);
    bed.on_host(orphan, "b", Agent::Ends(Exit::Unknown));
    bed.disk.clear();
    bed.crash(false);
    // What is lost on the host as well may be a copy's of this host: only the operator can know.
    bed.run(|w| w.host.workers().next().is_none() && w.disk.is_empty());
    assert!(bed.logged.iter().any(|s| s.contains("orphaned worker")));
    let lost = bed.status_input().foreign_workers();
    assert!(lost.len() == 1 && lost[0].text.contains("neither the database nor the host has it"));
    bed.send_input(Input::Destroy(lost[0].id));
    bed.run(CoreTestBed::is_empty);
    assert_eq!(bed.done().len() + bed.failed().len(), 2);
}

#[test]
fn a_draining_or_stopped_factory_takes_nothing() {
    let mut bed = CoreTestBed::new();
    bed.send_input(Input::Drain(None, Some(Drain::default())));
    bed.submit(1, '2');
    for n in 0..100 {
        bed.step(n);
    }
    assert!(bed.queued() == 1 && bed.counts["lease"] > 10);
    bed.send_input(Input::Drain(None, None));
    bed.run(|w| !w.disk.is_empty());
    bed.send_input(Input::Stop);
    while !bed.pending.is_empty() {
        bed.step(0);
    }
    assert!(bed.core.has_no_pending_calls() && bed.core.next_deadline().is_none());
}

#[test]
fn a_worker_that_was_there_before_is_not_taken_for_the_one_of_a_lost_answer() {
    let mut bed = CoreTestBed::new();
    bed.submit(1, '3');
    bed.run(CoreTestBed::is_empty);
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
    bed.insert(&held);
    bed.server.hold(evidence, "made held").unwrap();
    for n in 0..10 {
        bed.step(n);
    }
    bed.submit(2, '3');
    bed.lose = Some("make");
    bed.run(|w| w.done().contains(&job(2)) && w.disk.is_empty());
    assert_eq!(bed.lose, None);
    let kept = &bed.listed()[&evidence];
    assert!(kept.hold && kept.private.is_none());
}

#[test]
fn jobs_that_can_have_no_worker_are_not_all_asked_for() {
    let mut bed = CoreTestBed::new();
    bed.refuses_workers = true;
    for n in 0..500 {
        bed.submit(n, '2');
    }
    let end = bed.now + 60_000;
    while bed.now < end {
        bed.step(0);
    }
    assert!(bed.counts["make"] <= 10, "{:?}", bed.counts);
    let logged = bed.logged.iter().filter(|s| s.contains("no worker for job"));
    assert_eq!(logged.count(), 1);
}

#[test]
fn jobs_that_come_unasked_get_no_worker_while_the_server_refuses_to_make_one() {
    let mut bed = CoreTestBed::new();
    bed.refuses_workers = true;
    bed.submit(1, '3');
    bed.run(|w| w.counts.get("make") == Some(&1));
    let target = "01HZX3N8Q4J5K6M7P8R9S0T1V3".parse().unwrap();
    let end = bed.now + 60_000;
    let mut n = 100;
    while bed.now < end {
        // Whatever is asked for, there is a job in the answer.
        n += 1;
        let lease = Lease { target, job: job(n) };
        bed.send_input(Input::Leased(Ok(Some(lease))));
        bed.step(0);
    }
    assert!(bed.counts["make"] <= 10, "{n} jobs: {:?}", bed.counts);
}

#[test]
fn a_drained_slot_takes_nothing_and_the_others_do() {
    let mut bed = CoreTestBed::new();
    let slot: SlotName = "c".parse().unwrap();
    bed.send_input(Input::Drain(Some(slot.clone()), Some(Drain::default())));
    bed.submit(1, '2');
    bed.submit(2, '3');
    bed.run(|w| w.done().contains(&job(1)));
    assert_eq!(bed.queued(), 1);
    bed.send_input(Input::Drain(Some(slot), None));
    bed.run(CoreTestBed::is_empty);
}

#[test]
fn a_removed_slot_keeps_its_worker_to_the_end_and_takes_no_other() {
    let mut bed = CoreTestBed::new();
    bed.submit(1, '3');
    bed.run(|w| phase(w) == Some(Phase::Running { online: true }));
    let (rest, _) = test_bed::CONFIG.split_once("[slots.c]").unwrap();
    let rest = rest.replace("conflicts_with_slots = [\"b\"]", "");
    bed.send_input(Input::Configure(Box::new(Config::parse(&rest).unwrap())));
    // Three slots were, two are: with the worker of the third, only one more may come.
    for n in 2..5 {
        bed.submit(n, '2');
    }
    bed.submit(5, '3');
    bed.run(|w| w.core.workers().count() == 2);
    let slots = bed.status_input().slots();
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
    bed.run(|w| w.done().len() == 4);
    assert!(bed.done().contains(&job(1)) && bed.failed().is_empty());
    assert_eq!(bed.queued(), 1);
    bed.send_input(Input::Configure(Box::new(
        Config::parse(test_bed::CONFIG).unwrap(),
    )));
    bed.run(CoreTestBed::is_empty);
}

#[test]
fn a_restart_gives_every_agent_its_whole_time() {
    let mut bed = CoreTestBed::new();
    bed.submit(1, '2');
    while phase(&bed) != Some(Phase::Created) {
        bed.step(0);
    }
    // As after a night without a supervisor, or with a clock that has jumped.
    bed.now += 365 * 86_400_000;
    bed.crash(true);
    bed.run(CoreTestBed::is_empty);
    assert_eq!((bed.done().len(), bed.failed().len()), (1, 0));
}

#[test]
fn a_list_of_another_server_ends_no_job() {
    let mut bed = CoreTestBed::new();
    bed.submit(1, '2');
    bed.run(|w| phase(w) == Some(Phase::Running { online: true }));
    let ours = std::mem::take(&mut bed.server.workers);
    let until = bed.counts["workers"] + 3;
    while bed.counts["workers"] < until {
        bed.step(0);
    }
    bed.server.workers = ours;
    bed.run(CoreTestBed::is_empty);
    assert_eq!((bed.done().len(), bed.failed().len()), (1, 0));
}

#[test]
fn a_lease_request_that_fails_is_repeated_ever_more_slowly_and_no_sooner_than_the_server_says() {
    let mut bed = CoreTestBed::new();
    bed.run(|w| w.counts.contains_key("lease"));
    assert_eq!(bed.status_input().not_taken(), None);
    bed.lease_fails = Some(CallError::temporary(Peer::Server, "it answered 500"));
    let (started_at, leases) = (bed.now, bed.counts["lease"]);
    bed.run(|w| w.now >= started_at + 3_600_000);
    let asked = bed.counts["lease"] - leases;
    // Between half a minute and a minute each, after the first few.
    assert!((60..=140).contains(&asked), "{asked} lease requests in an hour");
    let shown = bed.status_input().not_taken().unwrap();
    assert!(shown.contains("it answered 500"), "{shown}");
    let slots = bed.status_input().slots();
    assert!(
        slots.iter().all(|slot| slot.state == SlotState::Closed),
        "{slots:?}"
    );
    let logged = bed.logged.iter().filter(|line| line.contains("it answered 500"));
    assert_eq!(logged.count(), 1);

    bed.lease_fails = Some(CallError {
        retry_after: Some(300_000),
        ..CallError::temporary(Peer::Server, "it answered 429")
    });
    let next = bed.counts["lease"] + 1;
    bed.run(|w| w.counts["lease"] == next && w.core.has_no_pending_calls());
    let answered = bed.now;
    bed.run(|w| w.counts["lease"] > next);
    assert!((300_000..310_000).contains(&(bed.now - answered)));

    bed.lease_fails = None;
    bed.submit(1, '2');
    bed.run(|w| w.done().len() == 1);
    assert_eq!(bed.status_input().not_taken(), None);
    assert!(bed.now < answered + 1_400_000);
}

#[test]
fn a_server_cannot_have_the_factory_wait_for_days() {
    let mut bed = CoreTestBed::new();
    bed.lease_fails = Some(CallError {
        retry_after: Some(u64::MAX),
        ..CallError::temporary(Peer::Server, "it answered 503")
    });
    bed.run(|w| w.counts.contains_key("lease"));
    bed.run(|w| w.status_input().not_taken().is_some());
    let started_at = bed.now;
    bed.lease_fails = None;
    bed.submit(1, '2');
    bed.run(|w| w.done().len() == 1);
    assert!(bed.now - started_at < 700_000);
}

#[test]
fn while_a_side_does_not_answer_that_is_shown_and_no_job_is_taken() {
    for peer in [Peer::Server, Peer::Helper] {
        let mut bed = CoreTestBed::new();
        bed.submit(1, '2');
        bed.run(|w| phase(w) == Some(Phase::Running { online: true }));
        bed.run(|w| w.core.has_no_pending_calls());
        let shown = |bed: &CoreTestBed| match peer {
            Peer::Server => bed.status_input().server(String::new()),
            _ => bed.status_input().helper(String::new()),
        };
        assert_eq!(
            (shown(&bed).unanswered_since, bed.status_input().not_taken()),
            (None, None)
        );
        bed.agents_sleep = true;
        bed.send_input(Input::Unanswered(peer, Some(bed.now)));
        assert_eq!(shown(&bed).unanswered_since, Some(time(bed.now)));
        assert_eq!(shown(&bed).reachable, Some(true));
        assert_eq!(
            bed.status_input().not_taken(),
            Some(format!("the {peer} is not answering"))
        );
        let slots = bed.status_input().slots();
        let is_free = |slot: &crate::control::api::Slot| slot.state == SlotState::Free;
        assert!(!slots.iter().any(is_free), "{slots:?}");
        bed.submit(2, '3');
        let started_at = bed.now;
        bed.run(|w| w.now >= started_at + 600_000);
        assert_eq!(bed.queued(), 1);
        bed.send_input(Input::Unanswered(peer, None));
        assert_eq!(
            (shown(&bed).unanswered_since, bed.status_input().not_taken()),
            (None, None)
        );
        bed.agents_sleep = false;
        bed.run(|w| w.done().len() == 2);
    }
}

#[test]
fn while_the_configuration_file_differs_no_job_is_taken_and_none_is_started_or_failed() {
    for phase_then in [Phase::Reserved, Phase::Created] {
        let mut bed = CoreTestBed::new();
        bed.submit(1, '2');
        while phase(&bed) != Some(phase_then) {
            bed.step(0);
        }
        bed.send_input(Input::FileDiffers(Some("the file: reload".into())));
        // What was begun before comes to nothing, and is not begun again.
        bed.helper_up = false;
        let begins =
            |output: &Output| matches!(output, Output::CarryOut(_, action) if action.needs_the_slot());
        while let Some(at) = bed.pending.iter().position(begins) {
            bed.step(at);
        }
        bed.helper_up = true;
        bed.submit(2, '3');
        let started_at = bed.now;
        bed.run(|w| w.now >= started_at + 3_600_000);
        assert!(bed.status_input().not_taken().unwrap().contains("reload"));
        assert_eq!(bed.queued() + bed.server.leases.len(), 1);
        assert_eq!(phase(&bed), Some(phase_then));
        bed.send_input(Input::FileDiffers(None));
        bed.run(|w| w.done().len() == 2);
        assert!(bed.failed().is_empty());
    }
}

#[test]
fn a_worker_whose_slot_is_removed_before_its_agent_is_started_gets_another_slot() {
    for phase_then in [Phase::Reserved, Phase::Created] {
        for (settles_first, one_is_left) in [(true, false), (false, false), (true, true), (false, true)] {
            let mut bed = CoreTestBed::new();
            bed.submit(1, '2');
            while phase(&bed) != Some(phase_then) {
                bed.step(0);
            }
            while settles_first && !bed.pending.is_empty() && phase(&bed) == Some(phase_then) {
                bed.helper_up = false;
                bed.step(0);
            }
            bed.helper_up = true;
            let slot = bed.disk.values().next().unwrap().slot.clone();
            let mut left = Config::parse(test_bed::CONFIG).unwrap();
            left.slots.remove(&slot);
            left.slots.retain(|name, _| !one_is_left || name.as_str() != "c");
            bed.send_input(Input::Configure(Box::new(left)));
            bed.run(|w| w.done().len() == 1);
            assert!(bed.failed().is_empty(), "{phase_then:?} {:?}", bed.logged);
            bed.run(CoreTestBed::is_empty);
        }
    }
}

#[test]
fn a_worker_whose_slot_is_removed_waits_where_no_other_has_its_target_and_fails_with_the_reason() {
    for (comes_back, is_removed) in [(true, true), (false, true), (true, false), (false, false)] {
        let mut bed = CoreTestBed::new();
        bed.submit(1, '3');
        while phase(&bed) != Some(Phase::Reserved) {
            bed.step(0);
        }
        let all = Config::parse(test_bed::CONFIG).unwrap();
        let mut left = all.clone();
        let slot = left.slots.iter_mut().find(|(name, _)| name.as_str() == "c");
        // For another target from now on, or removed.
        slot.unwrap().1.target = Target::Id(TargetId::from_bits(9));
        left.slots.retain(|name, _| !is_removed || name.as_str() != "c");
        bed.send_input(Input::Configure(Box::new(left)));
        let started_at = bed.now;
        bed.run(|w| w.now >= started_at + 60_000);
        assert_eq!(phase(&bed), Some(Phase::Reserved));
        if comes_back {
            bed.send_input(Input::Configure(Box::new(all)));
            bed.run(|w| w.done().len() == 1);
        } else {
            bed.run(|w| w.failed().len() == 1);
            let logged = bed.disk.values().next().unwrap().failure.clone().unwrap();
            assert!(
                logged.contains("slot c is no longer in the configuration"),
                "{logged}"
            );
        }
    }
}

#[test]
fn what_is_drained_changes_once_it_is_saved_and_not_before() {
    let mut bed = CoreTestBed::new();
    let slot: Option<SlotName> = Some("a".parse().unwrap());
    let drain = Some(Drain::default());
    let core = &mut bed.core;
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
    let mut bed = CoreTestBed::new();
    let slot: Option<SlotName> = Some("c".parse().unwrap());
    let until = |at| {
        Some(Drain {
            reason: Some("a new kernel".into()),
            until: Some(at),
        })
    };
    bed.send_input(Input::Drain(None, until(1_800_000_000_000)));
    bed.send_input(Input::Drain(slot.clone(), until(1_800_000_000_001)));
    let why = bed.status_input().not_taken().unwrap();
    assert!(
        why.contains("drained (a new kernel, until 2027-01-15T08:00:00Z)"),
        "{why}"
    );
    bed.send_input(Input::WallClock(1_799_999_999_999));
    assert!(bed.core.is_draining());
    // The core's own time is another.
    let outputs = bed.core.handle(bed.now, Input::WallClock(1_800_000_000_000));
    assert!(outputs.contains(&Output::SaveDrain(None, None)), "{outputs:?}");
    // It is over, whether that can be saved or not.
    assert!(!bed.core.is_draining());
    let slots = bed.status_input().slots();
    let c = slots.iter().find(|s| s.name.as_str() == "c").unwrap();
    assert_eq!(
        c.because.as_deref(),
        Some("a new kernel, until 2027-01-15T08:00:00.001Z")
    );
    bed.send_input(Input::WallClock(u64::MAX));
    assert!(bed.core.drains().is_empty());
    bed.submit(1, '3');
    bed.run(|w| w.done().len() == 1);
}

#[test]
fn no_job_is_asked_for_while_too_little_is_free_and_a_leased_one_begins() {
    let mut bed = CoreTestBed::new();
    bed.submit(1, '2');
    bed.run(|w| !w.core.pending_workers().is_empty());
    bed.send_input(Input::Shortage(Some("too little is free: 1M".into())));
    // The lease request that is under way is answered.
    let started_at = bed.now;
    bed.run(|w| w.now >= started_at + 5_000);
    bed.submit(2, '3');
    bed.run(|w| w.now >= started_at + 60_000);
    assert_eq!(
        bed.status_input().not_taken().as_deref(),
        Some("too little is free: 1M")
    );
    assert!(!bed.done().contains(&job(2)), "{:?}", bed.logged);
    assert!(bed.done().contains(&job(1)), "{:?}", bed.logged);
    // Another number is no other news.
    bed.send_input(Input::Shortage(Some("too little is free: 2M".into())));
    bed.send_input(Input::Shortage(None));
    bed.run(|w| w.done().len() == 2);
    assert!(bed.done().contains(&job(2)), "{:?}", bed.logged);
    let logged = bed.logged.iter().filter(|line| line.contains("free"));
    assert_eq!(logged.count(), 2, "{:?}", bed.logged);
}

#[test]
fn no_job_is_asked_for_after_a_start_before_a_self_test_has_passed_where_that_is_configured() {
    let mut bed = CoreTestBed::new();
    bed.submit(1, '2');
    // One that is not asked for changes nothing, whatever it has found.
    bed.send_input(Input::SelfTested(Some("x".into())));
    bed.run(|w| w.done().len() == 1);
    let mut config = bed.core.config().clone();
    config.factory.selftest_at_start = true;
    bed.send_input(Input::Configure(Box::new(config.clone())));
    bed.submit(2, '2');
    let started_at = bed.now;
    bed.run(|w| w.now >= started_at + 60_000);
    assert!(!bed.done().contains(&job(2)), "{:?}", bed.logged);
    let why = bed.status_input().not_taken().unwrap();
    assert!(why.starts_with("the self-test has failed"), "{why}");
    bed.send_input(Input::SelfTested(None));
    bed.run(|w| w.done().len() == 2);
    // The next run knows nothing of it.
    let next = Factory::new(bed.core.identity().clone(), config, Vec::new(), 1, 0);
    assert!(next.waits_for_selftest());
    let why = next.not_asked_for().unwrap();
    assert!(
        why.starts_with("the self-test has not been done since the start"),
        "{why}"
    );
}
