//! Slots whose USB devices are absent.

use protocol::usb::UsbProblem;

use super::test_bed::{CONFIG, CoreTestBed, job};
use super::*;
use crate::control::api::{self, SlotState};
use crate::control::metrics::Metrics;
use crate::usb::{UsbAbsence, UsbAbsences};

/// Slots a and c have a device each; a and b exclude each other.
fn with_devices() -> CoreTestBed {
    let config = CONFIG.replace("[slots.b]", "usb.probe = { serial = \"0669FF\" }\n[slots.b]")
        + "usb.board.port = \"1-2\"\n";
    CoreTestBed::with(&config)
}

fn absent(bed: &CoreTestBed, slots: &[&str]) -> UsbAbsences {
    let absence = |slot: &&str| {
        let name: SlotName = slot.parse().unwrap();
        let usb = &bed.core.config().slots[&name].usb;
        let (entry, of) = usb.first_key_value().unwrap();
        let problem = UsbProblem::Absent(entry.clone(), of.clone());
        (name, UsbAbsence::Problem(problem, Vec::new()))
    };
    slots.iter().map(absence).collect()
}

fn see(bed: &mut CoreTestBed, slots: &[&str]) {
    let absences = absent(bed, slots);
    bed.send_input(Input::UsbAbsences(absences));
}

fn slot(bed: &CoreTestBed, name: &str) -> api::Slot {
    let slots = bed.status_input().slots();
    slots.into_iter().find(|slot| slot.name.as_str() == name).unwrap()
}

fn logged(bed: &CoreTestBed, part: &str) -> usize {
    bed.logged.iter().filter(|line| line.contains(part)).count()
}

fn pass(bed: &mut CoreTestBed, ms: u64) {
    let started_at = bed.now;
    bed.run(|w| w.now >= started_at + ms);
}

#[test]
fn a_slot_whose_device_is_absent_takes_no_job_and_others_do_until_it_is_back() {
    let mut bed = with_devices();
    see(&mut bed, &["c"]);
    bed.submit(1, '2');
    bed.submit(2, '3');
    pass(&mut bed, 60_000);
    assert_eq!(bed.done(), [job(1)].into(), "{:?}", bed.logged);
    let found = slot(&bed, "c");
    assert_eq!(
        (found.state, found.because.as_deref()),
        (SlotState::Absent, Some("usb.board (port 1-2)"))
    );
    assert_eq!(slot(&bed, "a").state, SlotState::Free);
    // A slot is drained by an operator, who may have unplugged the device.
    let c: SlotName = "c".parse().unwrap();
    bed.send_input(Input::Drain(Some(c.clone()), Some(Drain::default())));
    assert_eq!(slot(&bed, "c").state, SlotState::Draining);
    bed.send_input(Input::Drain(Some(c), None));
    see(&mut bed, &[]);
    bed.run(|w| w.done().len() == 2);
    assert_eq!(
        (
            logged(
                &bed,
                "slot c takes no jobs: usb.board (port 1-2) is absent: plug it in"
            ),
            logged(&bed, "the USB devices of slot c are plugged in again"),
        ),
        (1, 1),
        "{:?}",
        bed.logged
    );
    assert_eq!(logged(&bed, "slot a"), 0);
}

#[test]
fn a_lease_that_comes_when_its_device_is_gone_is_no_workers() {
    let mut bed = with_devices();
    see(&mut bed, &[]);
    bed.submit(1, '3');
    bed.run(|w| {
        w.pending
            .iter()
            .any(|output| matches!(output, Output::Lease(targets) if !targets.is_empty()))
    });
    see(&mut bed, &["c"]);
    pass(&mut bed, 60_000);
    assert_eq!(bed.made(), 0, "{:?}", bed.logged);
    see(&mut bed, &[]);
    bed.run(|w| w.done().len() == 1);
}

#[test]
fn a_slot_takes_no_job_before_its_devices_have_been_seen_and_after_a_reload_that_changes_them() {
    let mut bed = with_devices();
    bed.submit(1, '3');
    pass(&mut bed, 30_000);
    assert_eq!((bed.made(), bed.logged.len()), (0, 0), "{:?}", bed.logged);
    assert_eq!(slot(&bed, "c").state, SlotState::Absent);
    assert_eq!(
        slot(&bed, "c").because.as_deref(),
        Some("its USB devices are being read")
    );
    see(&mut bed, &["a"]);
    bed.run(|w| w.done().len() == 1 && w.disk.is_empty());
    let free = |bed: &CoreTestBed| -> Vec<String> {
        let free = bed.core.available(bed.now);
        free.iter().map(ToString::to_string).collect()
    };
    assert_eq!(free(&bed), ["b", "c"]);
    // The same entries are what they were; new ones are not known; a slot without any is free.
    let mut config = bed.core.config().clone();
    bed.send_input(Input::Configure(Box::new(config.clone())));
    assert_eq!(free(&bed), ["b", "c"]);
    let slots: Vec<SlotName> = config.slots.keys().cloned().collect();
    let usb = config.slots[&slots[0]].usb.clone();
    config.slots.get_mut(&slots[2]).unwrap().usb = usb;
    bed.send_input(Input::Configure(Box::new(config.clone())));
    assert_eq!(free(&bed), ["b"]);
    see(&mut bed, &["c"]);
    for slot in config.slots.values_mut() {
        slot.usb.clear();
    }
    bed.send_input(Input::Configure(Box::new(config.clone())));
    assert_eq!(free(&bed), ["a", "b", "c"]);
    // What was read for the configuration before is of no slot that has left.
    let absences = bed.core.usb_absences().clone();
    assert_eq!(absences, UsbAbsences::new());
    let old = absent(&with_devices(), &["a", "c"]);
    config.slots.remove(&slots[2]);
    bed.send_input(Input::Configure(Box::new(config)));
    bed.send_input(Input::UsbAbsences(old));
    assert_eq!(bed.core.usb_absences().len(), 1);
}

#[test]
fn a_running_job_may_unplug_its_device_and_nothing_is_said_of_its_slot_and_those_it_excludes() {
    let mut bed = with_devices();
    see(&mut bed, &[]);
    bed.submit(1, '3');
    bed.agents_sleep = true;
    bed.run(|w| phase(w) == Some(Phase::Running { online: false }));
    see(&mut bed, &["c"]);
    pass(&mut bed, 20_000);
    assert_eq!(slot(&bed, "c").state, SlotState::Busy);
    assert_eq!(logged(&bed, "slot c"), 0, "{:?}", bed.logged);
    bed.agents_sleep = false;
    bed.run(|w| w.done().len() == 1 && w.disk.is_empty());
    bed.step(0);
    assert_eq!(slot(&bed, "c").state, SlotState::Absent);
    assert_eq!(logged(&bed, "slot c takes no jobs"), 1, "{:?}", bed.logged);
    // Of two that exclude each other, b has the job.
    see(&mut bed, &["a"]);
    pass(&mut bed, 20_000);
    assert_eq!(logged(&bed, "slot a takes no jobs"), 1);
    bed.logged.clear();
    bed.submit(2, '2');
    bed.agents_sleep = true;
    bed.run(|w| phase(w) == Some(Phase::Running { online: false }));
    assert_eq!(slot(&bed, "a").state, SlotState::Blocked);
    see(&mut bed, &[]);
    pass(&mut bed, 20_000);
    see(&mut bed, &["a"]);
    pass(&mut bed, 20_000);
    assert_eq!(logged(&bed, "slot a takes no jobs"), 0, "{:?}", bed.logged);
}

#[test]
fn a_bad_cable_fills_no_log() {
    let mut bed = with_devices();
    for _ in 0..60 {
        see(&mut bed, &["c"]);
        pass(&mut bed, 500);
        see(&mut bed, &[]);
        pass(&mut bed, 500);
    }
    let lines = logged(&bed, "slot c");
    assert!((2..=13).contains(&lines), "{lines}: {:?}", bed.logged);
    see(&mut bed, &["c"]);
    pass(&mut bed, 30_000);
    assert!(
        bed.logged.last().unwrap().contains("is absent"),
        "{:?}",
        bed.logged
    );
}

#[test]
fn an_absent_slot_is_a_state_of_its_own_for_metrics_and_for_operators() {
    let mut bed = with_devices();
    see(&mut bed, &["a", "c"]);
    let text = serde_json::to_string(&slot(&bed, "a")).unwrap();
    assert!(
        text.contains("\"state\":\"absent\",\"because\":\"usb.probe (serial 0669FF)\""),
        "{text}"
    );
    assert!(SlotState::Absent.needs_operator());
    let state = crate::control::state::StatusState::new(
        bed.now,
        "c".into(),
        "/".into(),
        String::new(),
        String::new(),
        Default::default(),
    );
    let text = Metrics::default().text(&state.status(&bed.status_input()), &BTreeMap::new());
    let line = "buildomat_user_factory_slots{state=\"absent\"} 2";
    assert!(text.lines().any(|own| own == line), "{text}");
    for state in SlotState::ALL {
        assert_eq!(serde_json::to_value(state).unwrap(), state.name());
    }
}
