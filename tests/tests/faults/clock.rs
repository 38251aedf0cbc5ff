//! Row 76: the clock is years off, in either direction. The machine's own is never set: each binary gets a wall clock
//! of its own from a preloaded library.

use std::process::Command;

use super::*;

const YEAR: i64 = 365 * 24 * 3600;

/// A wall clock for binaries, which can be set.
struct Clock {
    place: tempfile::TempDir,
}

impl Clock {
    fn new() -> Clock {
        // Where the supervisor may read it, and its loader finds it.
        let place = tempfile::Builder::new()
            .prefix("user-factory-test-")
            .tempdir()
            .unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(place.path(), open).unwrap();
        let source = place.path().join("clock.c");
        fs::write(&source, include_str!("../../src/clock.c")).unwrap();
        let mut gcc = Command::new("gcc");
        gcc.args(["-shared", "-fPIC", "-O1", "-o"]);
        gcc.arg(place.path().join("clock.so")).arg(&source);
        assert!(gcc.status().expect("gcc is there").success());
        let clock = Clock { place };
        clock.set(0);
        clock
    }

    fn set(&self, years: i64) {
        let (part, whole) = (self.place.path().join("part"), self.place.path().join("off"));
        fs::write(&part, format!("{}\n", years * YEAR)).unwrap();
        fs::rename(part, whole).unwrap();
    }

    fn start(&self, mut command: Command) -> Running {
        command.env("LD_PRELOAD", self.place.path().join("clock.so"));
        Running::start(command.env("CLOCK_OFF", self.place.path().join("off")))
    }

    fn restart_supervisor(&self, factory: &mut TestFactory) {
        factory.end_supervisor(Signal::SIGTERM);
        factory.supervisor = self.start(factory.host.supervisor_command());
        factory.wait_for_log(&["supervisor started"]);
    }

    fn restart_helper(&self, factory: &mut TestFactory) {
        factory.end_helper(Signal::SIGTERM);
        factory.helper = self.start(factory.host.helper_command());
        factory.helper.log.wait(&["serving"]);
    }
}

/// The year in which the binary believes to be, as its log has it.
fn year(log: &Log) -> i64 {
    let line = log.wait(&[""]);
    line[..4].parse().expect("a line begins with its time")
}

#[tokio::test(flavor = "multi_thread")]
async fn row_76_a_clock_that_is_years_off_after_a_restart_changes_nothing_for_a_running_job() {
    let clock = Clock::new();
    let mut factory = TestFactory::new(TWO).await;
    let now = year(&factory.supervisor.log);
    let job = factory.start_blocking_job().await;
    for years in [20, -20, 0] {
        clock.set(years);
        clock.restart_supervisor(&mut factory);
        clock.restart_helper(&mut factory);
        assert!(
            (year(&factory.supervisor.log) - now - years).abs() <= 1,
            "the clock is not off"
        );
        assert!(
            (year(&factory.helper.log) - now - years).abs() <= 1,
            "the clock is not off"
        );
        factory.wait_polls(2).await;
        let other = factory.submit("echo beside");
        factory.wait_completed(other).await;
    }
    factory.release();
    factory.wait_completed(job).await;
    factory.finish().await;
}

/// What `status` shows: by how many years its clock is off, and that nothing is older than the test.
fn shown(factory: &TestFactory, years: i64) {
    let mut command = Command::new(binaries().join("user-factory"));
    command
        .arg("status")
        .arg("--json")
        .arg("--root")
        .arg(&factory.host.root);
    let output = command.output().unwrap();
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let time = |value: &serde_json::Value| -> jiff::Timestamp { value.as_str().unwrap().parse().unwrap() };
    let now = time(&status["now"]);
    let off = now.duration_since(jiff::Timestamp::now()).as_secs() - years * YEAR;
    assert!(off.abs() < 100, "{off} s from what was set\n{status:#}");
    let workers = status["workers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|worker| &worker["since"]);
    let others = [
        &status["started"],
        &status["configuration"]["loaded"],
        &status["server"]["since"],
        &status["status_page"]["since"],
    ];
    for since in workers.chain(others) {
        let age = now.duration_since(time(since)).as_secs();
        assert!((0..200).contains(&age), "{since} is {age} s old\n{status:#}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn row_76_a_clock_that_jumps_while_the_factory_runs_changes_nothing() {
    let clock = Clock::new();
    let mut factory = TestFactory::new(&format!("status_address = \"127.0.0.1:0\"\n{TWO}")).await;
    clock.restart_supervisor(&mut factory);
    clock.restart_helper(&mut factory);
    let job = factory.start_blocking_job().await;
    for years in [20, -20, 20, 0] {
        clock.set(years);
        factory.wait_polls(2).await;
        shown(&factory, years);
        let other = factory.submit("echo beside");
        factory.wait_completed(other).await;
    }
    factory.release();
    factory.wait_completed(job).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_76_a_worker_that_is_starting_is_not_failed_by_a_clock_that_jumps_across_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let agent = directory.path().join("agent");
    fs::write(
        &agent,
        "#!/bin/bash\necho waiting for ever\nsleep 1000 & exit 0\n",
    )
    .unwrap();
    let clock = Clock::new();
    let slots = format!("online_timeout_seconds = 20\n{ONE}");
    let mut factory = TestFactory::with_agent(&slots, agent).await;
    let job = factory.submit("echo never");
    factory.wait_for_log(&["worker phase", "phase=\"running\""]);
    for years in [20, -20, 20] {
        clock.set(years);
        clock.restart_supervisor(&mut factory);
        factory.wait_polls(3).await;
        assert!(
            !factory.server.job(job).is_complete(),
            "the worker's time was up at once"
        );
    }
    // It is failed in the end: a clock that was set back holds nothing off for years.
    clock.set(-20);
    clock.restart_supervisor(&mut factory);
    let ended = factory.wait_for_end(job).await;
    assert_eq!(ended.state(), "failed");
    let console = lines(&ended, "console");
    assert!(
        console.iter().any(|line| line == "waiting for ever"),
        "{console:?}"
    );
    let held = factory.wait_held(job).await;
    let reason = held.hold.unwrap().reason;
    assert!(reason.contains("did not come online within 20 s"), "{reason}");
    factory.server.release(held.id).unwrap();
    factory.finish().await;
}
