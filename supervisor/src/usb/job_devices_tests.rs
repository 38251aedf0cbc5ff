//! What the logs of jobs say of devices that come and go.

use proptest::prelude::*;
use protocol::TargetId;
use protocol::config::Config;

use super::super::tests::config;
use super::*;
use crate::worker::Kill;

const GRACE: &str = "usb.board = { port = \"1-2\", grace_seconds = 30 }";

fn device(port: &str, ids: &str, serial: &str) -> UsbDevice {
    let (vendor, product) = ids.split_once(':').unwrap();
    let link = format!("../../../devices/pci0000:00/0000:00:14.0/usb1/{port}");
    let read = |name: &str| {
        let text = match name {
            "idVendor" => vendor,
            "idProduct" => product,
            "bDeviceClass" => "00",
            "busnum" => "1",
            "devnum" => "12",
            "serial" if !serial.is_empty() => serial,
            _ => return None,
        };
        Some(format!("{text}\n"))
    };
    UsbDevice::of(port.parse().unwrap(), &link, read).unwrap()
}

fn worker(id: u128, slot: &str, phase: Phase) -> Worker {
    Worker {
        id: WorkerId::from_bits(id),
        slot: slot.parse().unwrap(),
        target: TargetId::from_bits(2),
        job: "01HZX3N8Q4J5K6M7P8R9S0T1V3".to_owned().try_into().ok(),
        bootstrap: None,
        phase,
        since: 0,
        waiting_since: 0,
        associated: true,
        hold: false,
        hold_since: None,
        gone: false,
        remakes: 0,
        failure: None,
        trouble: None,
        kill: Kill::default(),
    }
}

const ONLINE: Phase = Phase::Running { online: true };

/// A host: its time in seconds, its workers, its slots and what is plugged in.
struct Bench {
    job_devices: JobDevices,
    at: f64,
    workers: Vec<Worker>,
    config: Config,
    devices: Vec<UsbDevice>,
    unread: Unread,
}

impl Bench {
    /// A job runs in slot a, which has these entries; nothing is plugged in.
    fn with(usb: &str) -> Bench {
        Bench {
            job_devices: JobDevices::default(),
            at: 1_000_000.0,
            workers: vec![worker(1, "a", ONLINE)],
            config: config(&[("a", usb)]),
            devices: Vec::new(),
            unread: Unread::default(),
        }
    }

    fn plug(&mut self, port: &str, ids: &str, serial: &str) {
        self.devices.push(device(port, ids, serial));
    }

    fn unplug(&mut self, port: &str) {
        self.devices.retain(|device| device.port.as_str() != port);
    }

    fn lines(&mut self) -> Vec<LogLine> {
        self.job_devices.update(
            (self.at * 1000.0) as u64,
            self.workers.iter(),
            &self.config.slots,
            &self.devices,
            &self.unread,
        )
    }

    /// So many seconds pass, and devices are read every half second: what is said, with the time since now.
    fn pass(&mut self, seconds: f64) -> Vec<String> {
        let (began, mut said) = (self.at, Vec::new());
        loop {
            for line in self.lines() {
                let at = self.at - began;
                said.push(format!("{at}: {}", line.text));
            }
            if self.at - began >= seconds {
                return said;
            }
            self.at += 0.5;
        }
    }
}

const NOTHING: [&str; 0] = [];

#[test]
fn a_device_that_is_unplugged_for_its_grace_is_named_once_each_time_and_named_when_it_is_back() {
    let mut bench = Bench::with(GRACE);
    bench.plug("1-2", "0483:374b", "A");
    assert_eq!(bench.pass(100.0), NOTHING);
    for _ in 0..2 {
        bench.unplug("1-2");
        assert_eq!(
            bench.pass(41.0),
            ["30: usb.board (port 1-2) has been unplugged for 30 s"]
        );
        bench.plug("1-2", "0483:374b", "A");
        assert_eq!(bench.pass(100.0), ["0: usb.board (port 1-2) is back after 41 s"]);
    }
    bench.unplug("1-2");
    bench.at += 0.25;
    let lines = bench.lines();
    assert_eq!(lines, []);
    // The loop was held up.
    bench.at += 90.0;
    let lines = bench.lines();
    let line = LogLine {
        level: Level::Warn,
        worker: Some(WorkerId::from_bits(1)),
        slot: Some("a".parse().unwrap()),
        job: bench.workers[0].job.clone(),
        text: "usb.board (port 1-2) has been unplugged for 90 s".into(),
    };
    assert_eq!(lines, [line]);
}

#[test]
fn a_device_that_comes_back_within_its_grace_is_not_named_and_the_time_begins_anew() {
    let mut bench = Bench::with(GRACE);
    for _ in 0..200 {
        bench.plug("1-2", "0483:374b", "A");
        assert_eq!(bench.pass(0.5), NOTHING);
        bench.unplug("1-2");
        assert_eq!(bench.pass(29.5), NOTHING);
    }
    // Time moves by what is given alone.
    for _ in 0..1000 {
        assert_eq!(bench.lines(), []);
    }
}

#[test]
fn nothing_is_named_without_grace_seconds_or_before_the_device_was_there() {
    let mut bench = Bench::with(
        "usb.silent.port = \"1-2\"\n\
         usb.absent = { port = \"1-3\", grace_seconds = 1 }\n\
         usb.later = { serial = \"L\", required = false, grace_seconds = 2 }\n\
         usb.unclear = { vendor = \"0403\", grace_seconds = 1 }",
    );
    bench.plug("1-2", "0483:374b", "A");
    bench.plug("1-4", "0403:6001", "");
    bench.plug("1-5", "0403:6001", "");
    assert_eq!(bench.pass(10.0), NOTHING);
    bench.devices.clear();
    assert_eq!(bench.pass(100.0), NOTHING);
    bench.plug("1-6", "1366:0101", "L");
    assert_eq!(bench.pass(10.0), NOTHING);
    bench.unplug("1-6");
    assert_eq!(
        bench.pass(10.0),
        ["2: usb.later (port 1-6) has been unplugged for 2 s"]
    );
}

#[test]
fn whatever_is_at_the_port_is_the_device_and_the_same_device_elsewhere_is_not() {
    let other = "usb.other = { port = \"1-9\", required = false }";
    let mut bench = Bench::with(&format!(
        "usb.board = {{ serial = \"A\", grace_seconds = 5 }}\n{other}"
    ));
    bench.plug("1-2", "2e8a:000a", "A");
    assert_eq!(bench.pass(1.0), NOTHING);
    // Its bootloader has another serial number.
    bench.unplug("1-2");
    bench.plug("1-2", "2e8a:0003", "BOOT");
    assert_eq!(bench.pass(20.0), NOTHING);
    bench.unplug("1-2");
    bench.plug("1-3", "2e8a:000a", "A");
    assert_eq!(
        bench.pass(20.0),
        ["5: usb.board (port 1-2) has been unplugged for 5 s"]
    );
    bench.plug("1-2", "0000:0001", "");
    assert_eq!(bench.pass(20.0), ["0: usb.board (port 1-2) is back after 20 s"]);
}

#[test]
fn an_agent_that_starts_between_two_readings_has_what_was_there_before_it_started() {
    let entry = "usb.board = { serial = \"A\", grace_seconds = 1 }";
    let mut bench = Bench::with(entry);
    bench.workers.clear();
    bench.plug("1-2", "2e8a:000a", "A");
    let note = |bench: &mut Bench, phase| {
        let of = worker(1, "a", phase);
        let (slots, unread) = (&bench.config.slots, &bench.unread);
        bench.job_devices.note_worker(&of, slots, &bench.devices, unread);
        bench.workers = vec![of];
    };
    for phase in [Phase::Reserved, Phase::Created, Phase::Running { online: false }] {
        note(&mut bench, phase);
    }
    bench.unplug("1-2");
    assert_eq!(
        bench.pass(2.0),
        ["1: usb.board (port 1-2) has been unplugged for 1 s"]
    );
    note(&mut bench, Phase::Destroying);
    assert!(bench.job_devices.0.is_empty());
    // What waits for its device gets it where it is when the agent starts.
    bench.plug("1-2", "2e8a:000a", "A");
    note(&mut bench, Phase::Created);
    bench.unplug("1-2");
    assert_eq!(bench.pass(5.0), NOTHING);
    bench.plug("1-3", "2e8a:000a", "A");
    assert_eq!(bench.pass(5.0), NOTHING);
    note(&mut bench, ONLINE);
    assert_eq!(bench.pass(5.0), NOTHING);
    bench.unplug("1-3");
    assert_eq!(
        bench.pass(2.0),
        ["1: usb.board (port 1-3) has been unplugged for 1 s"]
    );
}

#[test]
fn a_port_is_remembered_when_serial_numbers_are_known() {
    let mut bench = Bench::with("usb.board = { serial = \"A\", grace_seconds = 1 }");
    bench.unread.is_reading = true;
    // The other one's serial number is not known yet, and turns out to be the same.
    bench.plug("1-2", "0403:6001", "A");
    bench.plug("1-3", "0403:6001", "");
    assert_eq!(bench.pass(0.0), NOTHING);
    bench.unread.is_reading = false;
    bench.unplug("1-3");
    bench.plug("1-3", "0403:6001", "A");
    assert_eq!(bench.pass(1.0), NOTHING);
    bench.unplug("1-2");
    assert_eq!(bench.pass(1.0), NOTHING);
    bench.unplug("1-3");
    assert_eq!(
        bench.pass(2.0),
        ["1: usb.board (port 1-3) has been unplugged for 1 s"]
    );
}

#[test]
fn a_device_is_one_workers_alone_and_each_job_is_told_of_its_own() {
    let mut bench = Bench::with("");
    let any = "usb.any = { vendor = \"0403\", required = false, grace_seconds = 1 }";
    bench.config = config(&[
        ("a", "usb.uart = { serial = \"A\", grace_seconds = 3 }"),
        ("b", any),
    ]);
    bench.workers = vec![
        worker(1, "a", ONLINE),
        worker(2, "b", Phase::Running { online: false }),
    ];
    bench.plug("1-2", "0403:6001", "A");
    assert_eq!(bench.pass(5.0), NOTHING);
    bench.plug("1-3", "0403:6001", "B");
    assert_eq!(bench.pass(5.0), NOTHING);
    bench.devices.clear();
    assert_eq!(
        bench.pass(5.0),
        [
            "1: usb.any (port 1-3) has been unplugged for 1 s",
            "3: usb.uart (port 1-2) has been unplugged for 3 s"
        ]
    );
    bench.plug("1-2", "0403:6001", "A");
    let lines = bench.lines();
    assert_eq!(
        (lines.len(), lines[0].worker, lines[0].level),
        (1, Some(WorkerId::from_bits(1)), Level::Info)
    );
}

#[test]
fn a_worker_that_ends_while_its_device_is_unplugged_is_forgotten() {
    for phase in [
        Phase::Broken {
            reported: false,
            lines_sent: 0,
        },
        Phase::Resetting { confirmed: true },
        Phase::Destroying,
        Phase::Reserved,
    ] {
        for seconds in [10.0, 40.0] {
            let mut bench = Bench::with(GRACE);
            bench.plug("1-2", "0483:374b", "A");
            assert_eq!(bench.pass(1.0), NOTHING);
            bench.unplug("1-2");
            assert_eq!(bench.pass(seconds).len(), usize::from(seconds > 30.0));
            bench.workers[0].phase = phase;
            assert_eq!(bench.pass(100.0), NOTHING, "{phase:?}");
            assert!(bench.job_devices.0.is_empty());
            bench.plug("1-2", "0483:374b", "A");
            assert_eq!(bench.pass(100.0), NOTHING, "{phase:?}");
            // The next one in the slot.
            bench.workers = vec![worker(3, "a", ONLINE)];
            assert_eq!(bench.pass(1.0), NOTHING);
            bench.unplug("1-2");
            assert_eq!(bench.pass(30.0).len(), 1);
        }
    }
}

#[test]
fn a_configuration_that_is_read_again_counts_from_then_on() {
    let mut bench = Bench::with("usb.board.port = \"1-2\"");
    bench.plug("1-2", "0483:374b", "A");
    assert_eq!(bench.pass(1.0), NOTHING);
    bench.unplug("1-2");
    assert_eq!(bench.pass(40.0), NOTHING);
    // The port is known, whatever the entry's name stands for meanwhile.
    let other = "usb.board = { serial = \"X\", grace_seconds = 30 }";
    bench.config = config(&[("a", other)]);
    assert_eq!(
        bench.pass(10.0),
        ["0: usb.board (port 1-2) has been unplugged for 40 s"]
    );
    bench.config = config(&[("a", "usb.board.port = \"1-2\"")]);
    bench.plug("1-2", "0483:374b", "A");
    assert_eq!(bench.pass(10.0), NOTHING);
    // An entry, or a slot, that has left the configuration is forgotten.
    for gone in [
        config(&[("a", "")]),
        config(&[("a", "usb.other.port = \"1-9\"")]),
        config(&[("b", GRACE)]),
    ] {
        bench.config = config(&[("a", GRACE)]);
        assert_eq!(bench.pass(1.0), NOTHING);
        bench.unplug("1-2");
        assert_eq!(bench.pass(30.0).len(), 1);
        bench.config = gone;
        assert_eq!(bench.pass(10.0), NOTHING);
        bench.config = config(&[("a", GRACE)]);
        assert_eq!(bench.pass(100.0), NOTHING);
        bench.plug("1-2", "0483:374b", "A");
        assert_eq!(bench.pass(1.0), NOTHING);
    }
}

#[test]
fn a_bad_cable_fills_no_log() {
    let mut bench = Bench::with("usb.board = { port = \"1-2\", grace_seconds = 1 }");
    let mut said = Vec::new();
    for _ in 0..1000 {
        bench.plug("1-2", "0483:374b", "A");
        said.extend(bench.pass(0.5));
        bench.unplug("1-2");
        said.extend(bench.pass(1.0));
    }
    let times = MAX_TIMES as usize;
    assert_eq!(said.len(), 2 * times);
    let last = "1: usb.board (port 1-2) has been unplugged for 1 s; later times are not logged for this job";
    assert_eq!(
        said[2 * times - 2..],
        [last, "0: usb.board (port 1-2) is back after 1 s"]
    );
    assert_eq!(said.iter().filter(|line| line.contains("later")).count(), 1);
}

proptest! {
    #[test]
    fn whatever_comes_and_goes_unplugged_and_back_alternate_and_are_a_grace_apart(
        steps in proptest::collection::vec((any::<bool>(), 0u64..4000), 1..200),
        grace in 1u64..6,
    ) {
        let mut bench = Bench::with(&format!("usb.board = {{ port = \"1-2\", grace_seconds = {grace} }}"));
        bench.plug("1-2", "0483:374b", "A");
        bench.lines();
        let (mut unplugged_at, mut last, mut is_unplugged) = (None, None, false);
        for (is_there, ms) in steps {
            bench.at += ms as f64 / 1000.0;
            bench.devices.clear();
            if is_there {
                bench.plug("1-2", "0483:374b", "A");
                unplugged_at = None;
            } else {
                unplugged_at = unplugged_at.or(Some(bench.at));
            }
            let lines = bench.lines();
            prop_assert!(lines.len() <= 1);
            for line in lines {
                let is_new = line.text.contains("has been unplugged");
                prop_assert_eq!(is_new, !is_unplugged);
                prop_assert_eq!(is_new, !is_there);
                is_unplugged = is_new;
                if is_new {
                    let away = bench.at - unplugged_at.unwrap();
                    prop_assert!(away + 0.002 >= grace as f64, "{}", away);
                    prop_assert!(last.is_none_or(|last| bench.at - last + 0.002 >= grace as f64));
                    last = Some(bench.at);
                }
            }
        }
    }
}
