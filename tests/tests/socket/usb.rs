//! A slot's USB devices: found by what tells them, and then the job's by their port, whatever comes and goes there.

use testbed::fake_usb::{FakeUsb, Plugged};

use super::*;

const FTDI: &str = "0403:6001";
const TTY: &str = "1-2:1.0/ttyUSB0/tty/ttyUSB0";

/// A host with these slots, each a line of its table's, and a helper.
fn with(usb: &FakeUsb, slots: &[(&str, &str)]) -> TestHelper {
    let host = TestHost::new();
    let slots: Vec<String> = slots
        .iter()
        .map(|(name, usb)| format!("[slots.{name}]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n{usb}\n"))
        .collect();
    host.configure("http://127.0.0.1:9", 0, &slots.concat());
    let before = HostSnapshot::of_unused(&host);
    let helper = helper_after(&host, &usb.mounts());
    TestHelper {
        disk: None,
        host,
        helper,
        before,
    }
}

/// Prints its variables, and its nodes each time that they change: `NAME:MODE:USER` of those below `/dev/slot`, and then
/// how many of the host's names it has.
fn agent(usb: &FakeUsb) -> String {
    format!(
        r#"#!/bin/bash
exec 2>&1
for argument; do case $argument in SLOT_USB_*) echo "variable: $argument" ;; esac; done
cd /dev
( last=
  while read -t 0.02 -u 9; [ $? -gt 128 ]; do
    now="$(find slot/* \( -type c -o -type b \) 2>&- | LC_ALL=C sort | xargs -r stat -c %n:%a:%U 2>&- | tr '\n' ' ')$(ls {} 2>&- | wc -l)"
    [ "$now" = "$last" ] || echo "devices: $now"
    last=$now
  done 9<> <(:) ) &
exit 0
"#,
        usb.dev().display()
    )
}

/// A running job: its worker, its user's name and its console.
struct Job {
    worker: WorkerId,
    user: String,
    console: File,
}

fn start_job(client: &Client, usb: &FakeUsb, slot: &str) -> Job {
    let worker = worker_id();
    let Reply::UserCreated { name: user, .. } = create(client, worker, slot) else {
        panic!()
    };
    let (reply, console) = install(client, worker, sealed_memfd(agent(usb).as_bytes()));
    assert_eq!(reply, Reply::AgentStarted);
    Job {
        worker,
        user: user.to_string(),
        console: console.unwrap(),
    }
}

impl Job {
    /// Its `/dev/slot` has these nodes, and its `/dev` as many of the host's names.
    fn wait(&self, nodes: &[&str], names: usize) {
        let nodes: String = nodes
            .iter()
            .map(|node| format!("slot/{node}:600:{} ", self.user))
            .collect();
        wait_for_line(&self.console, &format!("devices: {nodes}{names}"));
    }
}

/// The start of an agent in this slot is refused with this sentence; then the worker is deleted.
fn is_refused(client: &Client, slot: &str, why: &str) {
    let worker = create_worker(client, slot);
    let (reply, _) = install(client, worker, sealed_memfd(b"#!/bin/true\n"));
    let Reply::Error(error) = reply else {
        panic!("{reply:?}")
    };
    assert!(
        error.kind == ErrorKind::Busy && error.message().contains(why),
        "{error}"
    );
    assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
}

#[test]
fn two_equal_adapters_stay_with_their_slots_whatever_number_they_have() {
    let place = create_shared_dir();
    let usb = FakeUsb::new(place.path());
    let adapter = |serial, nodes| Plugged {
        ids: FTDI,
        serial,
        nodes,
    };
    usb.plug("1-2", adapter("LEFT", &[TTY]));
    usb.plug(
        "1-3",
        adapter(
            "RIGHT",
            &["1-3:1.0/ttyUSB1/tty/ttyUSB1", "1-3:1.1/x/hidraw/hidraw0"],
        ),
    );
    let mut test = with(
        &usb,
        &[
            ("a", "usb.uart.serial = \"left\""),
            ("b", "usb.uart.port = \"pci-0000:00:14.0-usb-0:3\""),
            ("c", ""),
        ],
    );
    let client = test.client();
    let left = start_job(&client, &usb, "a");
    let right = start_job(&client, &usb, "b");
    let none = start_job(&client, &usb, "c");
    left.wait(&["uart/tty0", "uart/usb"], 2);
    right.wait(&["uart/hidraw1", "uart/tty0", "uart/usb"], 3);
    none.wait(&[], 0);
    for (job, port, serial) in [(&left, "1-2", "LEFT"), (&right, "1-3", "RIGHT")] {
        let console = read(&job.console);
        for variable in [
            format!("PORT={port}"),
            format!("SERIAL={serial}"),
            "USB=/dev/slot/uart/usb".into(),
            "TTY=/dev/slot/uart/tty0".into(),
        ] {
            assert!(
                console.contains(&format!("variable: SLOT_USB_UART_{variable}\n")),
                "{console}"
            );
        }
    }
    // Both go, and come back in the other order, one of them as another kind of device: what is at the port is the job's.
    usb.unplug("1-2");
    left.wait(&[], 0);
    usb.unplug("1-3");
    right.wait(&[], 0);
    usb.plug("1-3", adapter("RIGHT", &["1-3:1.0/ttyUSB0/tty/ttyUSB0"]));
    right.wait(&["uart/tty0", "uart/usb"], 2);
    // And somebody plugs in what is nobody's.
    usb.plug("1-4", adapter("LEFT", &["1-4:1.0/ttyUSB2/tty/ttyUSB2"]));
    test.helper.signal(Signal::SIGKILL);
    test.helper.wait();
    usb.plug(
        "1-2",
        Plugged {
            ids: "2e8a:0003",
            serial: "BOOT",
            nodes: &["1-2:1.0/host0/block/sda", "1-2:1.0/host0/block/sda/sda1"],
        },
    );
    test.helper = helper_after(&test.host, &usb.mounts());
    left.wait(&["uart/block0", "uart/block0-part1", "uart/usb"], 3);
    for (job, other) in [(&left, "uart/hidraw1"), (&right, "uart/block0"), (&none, "uart")] {
        let console = read(&job.console);
        assert!(!console.contains(other), "{console}");
    }
    usb.unplug_all();
    test.finish(&[left.worker, right.worker, none.worker]);
}

#[test]
fn a_job_is_not_started_with_less_than_its_slot_names_nor_with_anothers() {
    let place = create_shared_dir();
    let usb = FakeUsb::new(place.path());
    let device = |ids, serial| Plugged {
        ids,
        serial,
        nodes: &[],
    };
    usb.plug("1-2", device(FTDI, "A"));
    let test = with(
        &usb,
        &[
            (
                "a",
                "usb.uart.serial = \"A\"\nusb.power = { serial = \"P\", required = false }",
            ),
            ("b", "usb.first.port = \"1-2\""),
            ("c", "usb.any.vendor = \"0403\""),
            ("d", "usb.none.serial = \"NONE\""),
        ],
    );
    let client = test.client();
    is_refused(&client, "d", "usb.none (serial NONE) is absent: plug it in");
    let job = start_job(&client, &usb, "a");
    job.wait(&["uart/usb"], 1);
    // It is there, and another job has it.
    is_refused(&client, "b", "usb.first (port 1-2) is absent");
    is_refused(&client, "c", "usb.any (vendor 0403) is absent");
    usb.plug("1-3", device(FTDI, "B"));
    let other = start_job(&client, &usb, "c");
    other.wait(&["any/usb"], 1);
    // What need not be there is the job's once it is, and not before it is clear which it is.
    usb.plug("1-4", device("1366:0101", "P"));
    job.wait(&["power/usb", "uart/usb"], 2);
    // What has not been reset keeps the slot.
    let (reply, _) = client.ask(&Request::Delete { worker: other.worker });
    let Reply::Error(error) = reply else {
        panic!("{reply:?}")
    };
    assert!(
        error
            .message()
            .contains("the USB device at port 1-3 does not stay there for a reset"),
        "{error}"
    );
    assert!(matches!(create(&client, worker_id(), "c"), Reply::Error(_)));
    usb.unplug("1-3");
    test.delete(&[other.worker]);
    usb.plug("1-3", device(FTDI, "B"));
    usb.plug("1-5", device(FTDI, "C"));
    is_refused(
        &client,
        "c",
        "usb.any (vendor 0403) may be any of the devices at ports 1-3 and 1-5: name its serial or its port",
    );
    assert!(!read(&job.console).contains("any/"));
    usb.unplug_all();
    test.finish(&[job.worker]);
}

#[test]
fn what_is_plugged_into_a_jobs_own_hub_is_nobody_elses() {
    let place = create_shared_dir();
    let usb = FakeUsb::new(place.path());
    let device = |serial| Plugged {
        ids: FTDI,
        serial,
        nodes: &[],
    };
    usb.plug("1-2", device("A"));
    let test = with(
        &usb,
        &[
            ("a", "usb.board.port = \"1-2\""),
            ("b", "usb.uart.serial = \"B\""),
            ("c", "usb.uart.serial = \"C\""),
        ],
    );
    let client = test.client();
    let job = start_job(&client, &usb, "a");
    job.wait(&["board/usb"], 1);
    // Its board turns into a hub, with a device that says that it is B's.
    usb.unplug("1-2");
    usb.plug("1-2", device("A"));
    usb.make_hub("1-2");
    usb.plug("1-2.1", device("B"));
    job.wait(&[], 0);
    is_refused(&client, "b", "usb.uart (serial B) is absent");
    usb.plug("1-3.1", device("B"));
    let other = start_job(&client, &usb, "b");
    other.wait(&["uart/usb"], 1);
    // Where its hub was, there is a board now: nobody else's as long as the hub may come back.
    usb.unplug("1-3.1");
    usb.plug("1-3", device("C"));
    is_refused(&client, "c", "usb.uart (serial C) is absent");
    usb.unplug_all();
    test.finish(&[job.worker, other.worker]);
}

#[test]
fn a_start_that_waits_for_a_device_keeps_no_other() {
    let place = create_shared_dir();
    let usb = FakeUsb::new(place.path());
    usb.plug(
        "1-2",
        Plugged {
            ids: FTDI,
            serial: "A",
            nodes: &[],
        },
    );
    let test = with(
        &usb,
        &[
            ("a", "usb.first.serial = \"A\"\nusb.then.serial = \"B\""),
            ("b", "usb.uart.port = \"1-2\""),
        ],
    );
    let client = test.client();
    let waiting = create_worker(&client, "a");
    let (reply, _) = install(&client, waiting, sealed_memfd(b"#!/bin/true\n"));
    assert_eq!(kind(reply), ErrorKind::Busy);
    let job = start_job(&client, &usb, "b");
    job.wait(&["uart/usb"], 1);
    usb.unplug_all();
    test.finish(&[waiting, job.worker]);
}

#[test]
fn a_device_that_has_gone_is_taken_from_its_job_whatever_the_configuration_says() {
    let place = create_shared_dir();
    let usb = FakeUsb::new(place.path());
    let plug = || {
        usb.plug(
            "1-2",
            Plugged {
                ids: FTDI,
                serial: "A",
                nodes: &[TTY],
            },
        );
    };
    plug();
    let test = with(&usb, &[("a", "usb.uart.serial = \"A\""), ("b", "")]);
    let client = test.client();
    let job = start_job(&client, &usb, "a");
    job.wait(&["uart/tty0", "uart/usb"], 2);
    // Without the slot, and then without sense.
    let target = "target = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n";
    for slots in [
        format!("[slots.b]\n{target}usb.other.serial = \"C\"\n"),
        "[slots".to_owned(),
    ] {
        test.host.configure("http://127.0.0.1:9", 0, &slots);
        usb.unplug("1-2");
        job.wait(&[], 0);
        plug();
        job.wait(&["uart/tty0", "uart/usb"], 2);
    }
    usb.unplug_all();
    test.finish(&[job.worker]);
}

#[test]
fn of_two_jobs_that_start_at_once_one_gets_the_device() {
    let place = create_shared_dir();
    let usb = FakeUsb::new(place.path());
    let test = with(
        &usb,
        &[("a", "usb.x.serial = \"A\""), ("b", "usb.x.port = \"1-2\"")],
    );
    let client = test.client();
    for _ in 0..4 {
        usb.plug(
            "1-2",
            Plugged {
                ids: FTDI,
                serial: "A",
                nodes: &[TTY],
            },
        );
        let workers = ["a", "b"].map(|slot| create_worker(&client, slot));
        let replies = std::thread::scope(|scope| {
            let starts = workers.map(|worker| {
                let test = &test;
                scope.spawn(move || install(&test.client(), worker, sealed_memfd(b"#!/bin/sleep\n")).0)
            });
            starts.map(|start| start.join().unwrap())
        });
        let started = replies
            .iter()
            .filter(|reply| **reply == Reply::AgentStarted)
            .count();
        assert_eq!(started, 1, "{replies:?}");
        usb.unplug("1-2");
        test.delete(&workers);
    }
    test.finish(&[]);
}
