//! USB devices that are plugged in, unplugged and shown. They are files in a directory that has the place of
//! `/sys/bus` for one program alone, in a mount namespace of its own.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use testbed::fake_usb::{FakeUsb, Plugged};
use testbed::harness::{Running, SUPERVISOR_UID, TestHost, create_shared_dir, tool};
use testbed::test_factory::lines;

use super::*;

const SLOTS: &str = "[slots.a]\ntarget = \"TARGET\"\nusb.probe = { serial = \"0669FF\" }\n\
    [slots.b]\ntarget = \"TARGET\"\n";
/// The controller of the bus that the devices are on.
const CONTROLLER: &str = "devices/pci0000:00/0000:00:14.0";

/// The root of the devices of a host.
struct Devices(PathBuf);

impl Devices {
    /// None yet.
    fn of(host: &TestHost) -> Devices {
        let root = host.root.join("sys");
        fs::create_dir_all(root.join(protocol::usb::USB_DEVICES)).unwrap();
        Devices(root)
    }

    fn place(&self, port: &str) -> PathBuf {
        self.0.join(CONTROLLER).join("usb1").join(port)
    }

    fn link(&self, port: &str) -> PathBuf {
        self.0.join(protocol::usb::USB_DEVICES).join(port)
    }

    fn plug(&self, port: &str, ids: &str, serial: &str) {
        let place = self.place(port);
        fs::create_dir_all(place.join(format!("{port}:1.0/tty/ttyACM7"))).unwrap();
        let (vendor, product) = ids.split_once(':').unwrap();
        for (name, text) in [
            ("idVendor", vendor),
            ("idProduct", product),
            ("bDeviceClass", "00"),
            ("busnum", "1"),
            ("devnum", "7"),
            ("serial", serial),
            ("product", "a\u{1b}[2Jb"),
        ] {
            fs::write(place.join(name), format!("{text}\n")).unwrap();
        }
        let uevent = place.join(format!("{port}:1.0/tty/ttyACM7/uevent"));
        fs::write(uevent, "MAJOR=166\nMINOR=7\nDEVNAME=ttyACM7\n").unwrap();
        symlink(place, self.link(port)).unwrap();
    }

    fn unplug(&self, port: &str) {
        fs::remove_file(self.link(port)).unwrap();
        fs::remove_dir_all(self.place(port)).unwrap();
    }

    /// The same command, for which these are the host's devices.
    fn shown_to(&self, command: &Command) -> Command {
        let mut with = Command::new(tool("unshare"));
        with.args(["--mount", "--propagation", "private", "bash", "-c"]);
        with.arg("mount --bind \"$0\" /sys/bus && exec \"$@\"");
        with.arg(self.0.join("bus"));
        with.arg(command.get_program()).args(command.get_args());
        with.stdin(Stdio::null());
        with
    }

    fn run(&self, factory: &TestFactory, args: &[&str]) -> CommandOutput {
        let mut command = self.shown_to(&command(factory, args));
        tokio::task::block_in_place(|| command.output().expect("the command is there").into())
    }
}

/// A command of root's that becomes the supervisor.
fn as_supervisor(factory: &TestFactory) -> Command {
    let plain = factory.host.supervisor_command();
    let uid = SUPERVISOR_UID.to_string();
    let mut command = Command::new("setpriv");
    command.args(["--reuid", &uid, "--regid", &uid, "--clear-groups", "--"]);
    command.arg(plain.get_program()).args(plain.get_args());
    command
}

/// A factory whose supervisor has these devices.
async fn with_devices(slots: &str) -> (TestFactory, Devices) {
    let mut factory = TestFactory::new(slots).await;
    let devices = Devices::of(&factory.host);
    factory.end_supervisor(Signal::SIGTERM);
    factory.supervisor = Running::start(&mut devices.shown_to(&as_supervisor(&factory)));
    answering(&factory).await;
    (factory, devices)
}

async fn slot_is(factory: &TestFactory, state: &str) -> Duration {
    let began = Instant::now();
    see(factory, |status| (state_of(status, "a") == state).then_some(())).await;
    began.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_is_absent_until_its_device_is_plugged_in_and_another_one_takes_the_jobs() {
    let (factory, devices) = with_devices(SLOTS).await;
    slot_is(&factory, "absent").await;
    factory.wait_for_log(&["slot a takes no jobs: usb.probe (serial 0669FF) is absent: plug it in"]);
    let result = run_command(&factory, &["status"]);
    let line = result.out.lines().find(|line| line.starts_with("a "));
    assert_eq!(
        (
            result.status,
            line.unwrap_or_default()
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" ")
        ),
        (4, "a absent usb.probe (serial 0669FF)".into())
    );
    for _ in 0..2 {
        let job = factory.submit("true");
        factory.wait_completed(job).await;
        let worker = factory.server.job(job).worker.unwrap();
        let private = |state: &testbed::fake_server::State| state.workers[&worker].private.clone();
        let private = factory.wait_for_state(private).await;
        assert!(private.starts_with("b@"), "{private}");
    }
    devices.plug("1-2", "0483:374b", "0669ff");
    let took = slot_is(&factory, "free").await;
    assert!(took < Duration::from_secs(3), "{took:?}");
    done(&factory, &["status"]);
    devices.unplug("1-2");
    let took = slot_is(&factory, "absent").await;
    assert!(took < Duration::from_secs(3), "{took:?}");
    // Another device at the port, and one that the configuration names from now on.
    devices.plug("1-2", "0483:374b", "other");
    factory.configure(&SLOTS.replace("0669FF", "OTHER"));
    done(&factory, &["reload"]);
    slot_is(&factory, "free").await;
    factory.wait_for_log(&["the USB devices of slot a are plugged in again: it takes jobs"]);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_is_noticed_at_once_by_a_factory_that_polls_seldom_and_is_asked_nothing() {
    let (factory, devices) = with_devices(&format!("poll_seconds = 60\n{SLOTS}")).await;
    factory.wait_for_log(&["slot a takes no jobs"]);
    // The log has no second line of a slot before.
    std::thread::sleep(Duration::from_secs(11));
    let began = Instant::now();
    devices.plug("1-2", "0483:374b", "0669FF");
    factory.wait_for_log(&["the USB devices of slot a are plugged in again"]);
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_are_listed_and_checked_without_a_supervisor() {
    let mut factory = TestFactory::new(SLOTS).await;
    factory.end_supervisor(Signal::SIGTERM);
    let devices = Devices::of(&factory.host);
    let nothing = devices.run(&factory, &["devices"]);
    assert_eq!(
        (nothing.status, nothing.out.as_str()),
        (0, "no USB device is plugged in\n")
    );
    devices.plug("1-2", "0483:374b", "0669ff");
    devices.plug("1-3", "0403:6001", "A50285BI");
    let result = devices.run(&factory, &["devices"]);
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    let nodes = "/dev/bus/usb/001/007 /dev/ttyACM7";
    let lines: Vec<String> = result.out.lines().map(words).collect();
    assert_eq!(
        (result.status, result.err.as_str(), lines),
        (
            0,
            "",
            vec![
                "PORT ID SERIAL PRODUCT SLOTS NODES".into(),
                format!("pci-0000:00:14.0-usb-0:2 0483:374b 0669ff a\\u{{1b}}[2Jb a (usb.probe) {nodes}"),
                format!("pci-0000:00:14.0-usb-0:3 0403:6001 A50285BI a\\u{{1b}}[2Jb {nodes}"),
                String::new(),
                "lines for the configuration of a slot, with a name in place of NAME".into(),
                "usb.NAME = { serial = \"A50285BI\" } # 0403:6001 a\\u{1b}[2Jb".into(),
            ]
        )
    );
    let result = devices.run(&factory, &["devices", "--json"]);
    let listed: Value = serde_json::from_str(&result.out).unwrap();
    assert_eq!(
        (&listed[0]["entries"][0]["slot"], &listed[1]["serial"]),
        (&"a".into(), &"A50285BI".into()),
        "{listed:#}"
    );
    // What is told of a configuration is no failure.
    factory.configure(&format!("{SLOTS}usb.x.port = \"1-3\"\n"));
    let path = checks::config_of(&factory);
    devices.unplug("1-2");
    let result = devices.run(&factory, &["check", &path]);
    assert_eq!(result.status, 0, "{}{}", result.out, result.err);
    let warnings: Vec<&str> = result
        .out
        .lines()
        .filter_map(|line| line.strip_prefix(&path))
        .collect();
    assert_eq!(
        warnings,
        [
            ":10: warning: slot a: usb.probe (serial 0669FF) is absent: plug it in; the slot takes no jobs before",
            ":13: warning: slot b: usb.x has its port by the kernel's name 1-3, whose first number may be another after a reboot: write port = \"pci-0000:00:14.0-usb-0:3\"",
        ],
        "{}",
        result.out
    );
    // A slot that is absent is not tried, and has not failed.
    let result = devices.run(&factory, &["selftest", "--slot", "a"]);
    assert!(
        result
            .out
            .starts_with("slot a: nothing was tried: usb.probe (serial 0669FF) is absent: plug it in\n"),
        "{}{}",
        result.out,
        result.err
    );
    // A configuration that cannot be used.
    factory.configure("[slots.a]\n");
    let result = devices.run(&factory, &["devices"]);
    assert_eq!(result.status, 0);
    assert!(
        result.out.contains("A50285BI")
            && result
                .err
                .starts_with("user-factory: no slots are shown, since the configuration cannot be used:\n")
            && result.err.contains("config.toml:8: "),
        "{}{}",
        result.out,
        result.err
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watched_list_is_printed_anew_at_each_change() {
    let mut factory = TestFactory::new(SLOTS).await;
    factory.end_supervisor(Signal::SIGTERM);
    let devices = Devices::of(&factory.host);
    let mut watching = devices.shown_to(&command(&factory, &["devices", "--watch"]));
    let watching = Running::start_logging_stdout(&mut watching);
    watching.log.wait(&["no USB device is plugged in"]);
    devices.plug("1-3", "0403:6001", "A50285BI");
    watching.log.wait(&["usb.NAME = { serial = \"A50285BI\" }"]);
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(watching.log.count(&["PORT "]), 1, "{}", watching.log.text());
    devices.unplug("1-3");
    until(|| match watching.log.count(&["no USB device is plugged in"]) {
        2 => Ok(()),
        _ => Err(watching.log.text()),
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_job_is_told_of_a_device_that_is_unplugged_and_that_it_is_back() {
    let place = create_shared_dir();
    // Its nodes are there before the host is looked at.
    let usb = FakeUsb::new(place.path());
    let board = |ids| Plugged {
        ids,
        serial: "0669FF",
        nodes: &[],
    };
    usb.plug("1-2", board("2e8a:000a"));
    let slot = "[slots.a]\ntarget = \"TARGET\"\nusb.board = { serial = \"0669ff\", grace_seconds = 2 }\n\
        usb.silent.port = \"1-2\"\n";
    let mut factory = TestFactory::new(slot).await;
    factory.end_supervisor(Signal::SIGTERM);
    factory.end_helper(Signal::SIGTERM);
    let with_usb = |command: &Command| {
        let mut with = Command::new(tool("unshare"));
        with.args(["--mount", "--propagation", "private", "bash", "-ec"]);
        with.arg(format!("{}\nexec \"$@\"", usb.mounts())).arg("bash");
        with.arg(command.get_program()).args(command.get_args());
        Running::start(&mut with)
    };
    factory.helper = with_usb(&factory.host.helper_command());
    factory.helper.log.wait(&["serving"]);
    factory.supervisor = with_usb(&as_supervisor(&factory));
    let job = factory.start_blocking_job().await;
    let worker = factory.server.job(job).worker.unwrap().to_string();
    let told = |text: &'static str| {
        factory.wait_for_state(move |state| {
            let mut events = state.jobs[&job].events.iter();
            let event = events.find(|event| event.payload.starts_with(text))?;
            Some((event.stream.clone(), event.payload.clone()))
        })
    };
    for ids in ["2e8a:0003", "2e8a:000a"] {
        let from = factory.supervisor.log.len();
        usb.unplug("1-2");
        let line =
            factory.wait_for_log_from(from, &["usb.board (port 1-2) has been unplugged for ", &worker]);
        assert!(line.contains("slot=a "), "{line}");
        // It has become another device.
        usb.plug("1-2", board(ids));
        factory.wait_for_log_from(from, &["usb.board (port 1-2) is back after ", &worker]);
    }
    // Shorter than its time.
    usb.unplug("1-2");
    usb.plug("1-2", board("2e8a:000a"));
    for text in [
        "usb.board (port 1-2) has been unplugged for ",
        "usb.board (port 1-2) is back after ",
    ] {
        let (stream, line) = told(text).await;
        assert!(stream == "console" && line.ends_with(" s"), "{stream}: {line}");
    }
    factory.release();
    factory.wait_completed(job).await;
    let ended = factory.server.job(job);
    let lines = lines(&ended, "console");
    let about = lines.iter().filter(|line| line.starts_with("usb.board "));
    assert_eq!(about.count(), 4, "{lines:?}");
    assert!(!lines.iter().any(|line| line.contains("silent")), "{lines:?}");
    // It cannot be reset.
    usb.unplug("1-2");
    factory.finish().await;
}
