//! What can be known before anything starts.

use std::os::unix::net::UnixDatagram;

use nix::sys::signal::Signal;
use testbed::harness::{SUPERVISOR_UID, TestHost};
use testbed::test_factory::ONE;

use super::*;

pub fn config_of(factory: &TestFactory) -> String {
    let path = factory.host.root.join(protocol::config::CONFIG_PATH);
    path.to_str().expect("a test's path is ASCII").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_online_asks_the_server_for_its_agent_and_the_helper() {
    let mut factory = TestFactory::new(ONE).await;
    answering(&factory).await;
    let path = config_of(&factory);
    let result = run_command(&factory, &["check", &path, "--online"]);
    for part in [
        "slot a",
        "host kernel",
        "host cgroup v2",
        "host core_pattern",
        "host user quotas",
        "takes the token",
        "downloaded and unpacked",
        "it serves the supervisor that runs",
    ] {
        assert!(result.out.contains(part), "{part}: {}", result.out);
    }
    assert_eq!(result.status, 0, "{}", result.err);
    // The supervisor's user asks the helper itself.
    let mut command = command(&factory, &["check", &path, "--online"]);
    let result: CommandOutput = tokio::task::block_in_place(|| {
        command
            .uid(SUPERVISOR_UID)
            .gid(SUPERVISOR_UID)
            .output()
            .unwrap()
            .into()
    });
    assert_eq!(result.status, 0, "{}{}", result.out, result.err);
    assert!(result.out.contains("it serves, with 0 workers"), "{}", result.out);
    let result = run_command(&factory, &["check", &path, "--all", "--no-files"]);
    assert_eq!(result.status, 0, "{}{}", result.out, result.err);
    for part in ["takes the token", "all checks passed", "nothing is left"] {
        assert!(result.out.contains(part), "{part}: {}", result.out);
    }
    let status = json(&factory, &["status"]);
    assert!(
        status["selftest"]["failure"].is_null() && status["selftest"]["at"].is_string(),
        "{status}"
    );
    // A wrong token is named.
    factory.host.write_token("not-the-token");
    factory.end_helper(Signal::SIGTERM);
    let result = run_command(&factory, &["check", &path, "--online"]);
    assert!(
        result.status == 1 && result.out.contains("online server: FAILED") && result.out.contains("401"),
        "{}",
        result.out
    );
    factory.helper = factory.host.start_helper();
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn status_shows_the_helpers_state_though_an_idle_helper_is_not_polled() {
    let mut factory = TestFactory::new(ONE).await;
    answering(&factory).await;
    factory.wait_polls(3).await;
    factory.end_helper(Signal::SIGKILL);
    // Nobody needs it, so nobody has noticed; the first status request does.
    factory.wait_polls(3).await;
    assert_eq!(factory.supervisor.log.count(&["helper unreachable"]), 0);
    let status = json(&factory, &["status"]);
    assert_eq!(status["helper"]["reachable"], false, "{status:#}");
    factory.wait_for_log(&["ERROR helper unreachable", "start the helper"]);
    factory.helper = factory.host.start_helper();
    answering(&factory).await;
    factory.finish().await;
}

/// Write a configuration with another line in the place of one.
fn configure(host: &TestHost, line: &str, other: &str, slots: &str) {
    host.configure("http://127.0.0.1:1", SUPERVISOR_UID, slots);
    let path = host.root.join(protocol::config::CONFIG_PATH);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(line), "{text}");
    std::fs::write(&path, text.replace(line, other)).unwrap();
}

/// The helper starts with the configuration and `check` says so; or both say this.
fn assert_both_report(host: &TestHost, expected: Option<&str>) {
    let path = host.root.join(protocol::config::CONFIG_PATH);
    let slots = std::fs::read_to_string(&path).unwrap();
    let mut check = Command::new(binaries().join("user-factory"));
    check.arg("check").arg("--root").arg(&host.root).arg(&path);
    let result: CommandOutput = check.output().unwrap().into();
    let mut helper = Running::start(&mut host.helper_command());
    match expected {
        None => {
            helper.log.wait(&["serving"]);
            helper.signal(Signal::SIGTERM);
            helper.wait();
            assert_eq!(result.status, 0, "{slots}: {}", result.out);
            assert!(result.out.contains("helper: it would start"), "{}", result.out);
        }
        Some(part) => {
            helper.log.wait(&["ERROR", part]);
            assert_eq!(helper.wait().code(), Some(1));
            assert_eq!(result.status, 1, "{slots}: {}", result.out);
            assert!(result.out.contains(part), "{part}: {}", result.out);
        }
    }
}

#[test]
fn check_says_what_the_helper_says_at_its_start() {
    let host = TestHost::new();
    host.write_token("x");
    let slot = "[slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n";
    let number = format!("user = {SUPERVISOR_UID}");
    configure(&host, &number, &format!("user = \"{SUPERVISOR_UID}\""), slot);
    assert_both_report(&host, None);
    for (user, key, part) in [
        (
            "\"no-such-user\"",
            "",
            "the user no-such-user is not in /etc/passwd: make it",
        ),
        (
            "1",
            "add_to_groups = [\"root\"]",
            "a job must not be in group root, which is root's: remove it",
        ),
        (
            "1",
            "add_to_groups = [\"no-such\"]",
            "the group no-such is not in /etc/group: make it",
        ),
        // This the helper alone finds, when it makes what jobs see.
        (
            "1",
            "writable = [\"/usr/bin/env\"]",
            "/usr/bin/env is not a directory on this host: choose",
        ),
    ] {
        let slots = format!("{slot}{key}\n");
        configure(&host, &number, &format!("user = {user}"), &slots);
        assert_both_report(&host, Some(part));
    }
}

#[test]
fn a_supervisor_that_cannot_make_its_directory_says_who_makes_it_and_how() {
    let host = TestHost::new();
    host.write_token("x");
    let slots = ONE.replace("TARGET", "01HZX3N8Q4J5K6M7P8R9S0T1V2");
    host.configure("http://127.0.0.1:1", SUPERVISOR_UID, &slots);
    let state = host.root.join(protocol::config::STATE_DIR).join("supervisor");
    std::fs::remove_dir(&state).unwrap();
    let refused: CommandOutput = host.supervisor_command().output().unwrap().into();
    let command = format!(
        "install -d -o {SUPERVISOR_UID} -g {SUPERVISOR_UID} -m 0700 {}",
        state.display()
    );
    assert!(
        refused.status == 1 && refused.err.contains(&command),
        "{}",
        refused.err
    );
    // Done as it says, it starts.
    assert!(
        Command::new("sh")
            .args(["-c", &command])
            .status()
            .unwrap()
            .success()
    );
    let mut supervisor = host.start_supervisor();
    supervisor.log.wait(&["supervisor started"]);
    supervisor.signal(Signal::SIGTERM);
    supervisor.wait();
}

/// The uids that jobs have unless the configuration says otherwise.
fn configure_default_range(host: &TestHost) {
    let slots = ONE.replace("TARGET", "01HZX3N8Q4J5K6M7P8R9S0T1V2");
    let range = format!("uid_range = \"{}-{}\"", host.uids.start(), host.uids.end());
    configure(host, &range, "", &slots);
}

#[test]
fn a_supervisor_whose_uid_a_job_could_get_is_refused() {
    let host = TestHost::new();
    host.write_token("x");
    let slots = ONE.replace("TARGET", "01HZX3N8Q4J5K6M7P8R9S0T1V2");
    for uid in [*host.uids.start(), *host.uids.end()] {
        host.configure("http://127.0.0.1:1", uid, &slots);
        assert_both_report(
            &host,
            Some(&format!(
                "factory.user has the id {uid}, which is in factory.uid_range"
            )),
        );
    }
    host.configure("http://127.0.0.1:1", 0, &slots);
    let config = host.root.join(protocol::config::CONFIG_PATH);
    let output = Command::new(binaries().join("user-factory"))
        .arg("check")
        .arg("--root")
        .arg(&host.root)
        .arg(&config)
        .output()
        .unwrap();
    let result: CommandOutput = output.into();
    assert!(
        result.status == 1 && result.out.contains("factory.user is root"),
        "{}{}",
        result.out,
        result.err
    );
}

#[test]
fn a_range_of_which_a_process_has_a_uid_is_refused_with_the_alternative() {
    let host = TestHost::new();
    host.write_token("x");
    let slots = ONE.replace("TARGET", "01HZX3N8Q4J5K6M7P8R9S0T1V2");
    host.configure("http://127.0.0.1:1", SUPERVISOR_UID, &slots);
    assert_both_report(&host, None);
    let uid = *host.uids.end();
    let mut other = Command::new("sleep").arg("1000").uid(uid).spawn().unwrap();
    assert_both_report(
        &host,
        Some(&format!("a process of this host runs as uid {uid} of it")),
    );
    other.kill().unwrap();
    other.wait().unwrap();
    assert_both_report(&host, None);
}

#[test]
fn systemd_is_told_that_the_helper_is_ready_when_a_command_can_be_run_and_not_before() {
    let host = TestHost::new();
    host.write_token("x");
    let slots = ONE.replace("TARGET", "01HZX3N8Q4J5K6M7P8R9S0T1V2");
    let place = host.root.join("notify");
    let systemd = UnixDatagram::bind(&place).unwrap();
    systemd.set_read_timeout(Some(TEST_TIMEOUT)).unwrap();
    let start = || Running::start(host.helper_command().env("NOTIFY_SOCKET", &place));
    host.configure("http://127.0.0.1:1", SUPERVISOR_UID, &slots);
    let config = host.root.join(protocol::config::CONFIG_PATH);
    let good = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, format!("{good}no_such_key = 1\n")).unwrap();
    assert!(!start().wait().success(), "the configuration is refused");
    systemd.set_nonblocking(true).unwrap();
    let mut message = [0; 64];
    assert!(systemd.recv(&mut message).is_err(), "it was never ready");
    systemd.set_nonblocking(false).unwrap();
    std::fs::write(&config, good).unwrap();
    let helper = start();
    let length = systemd.recv(&mut message).expect("systemd is told");
    assert_eq!(&message[..length], b"READY=1");
    let mut run = Command::new(binaries().join("user-factory"));
    run.arg("run").arg("--root").arg(&host.root).args(["--", "true"]);
    let result: CommandOutput = run.output().unwrap().into();
    assert_eq!(result.status, 0, "{}", result.err);
    drop(helper);
}

#[test]
fn a_helper_and_systemd_nspawn_never_have_the_same_block_of_ids() {
    let host = TestHost::new();
    host.write_token("x");
    configure_default_range(&host);
    let place = host.root.join("run/systemd/nspawn-uid");
    std::fs::create_dir_all(&place).unwrap();
    // As systemd-nspawn locks a block, and gives it up.
    let path = place.join("2031616");
    let lock = || {
        let mut options = std::fs::File::options();
        let file = options
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .unwrap();
        let all_of_it = libc::flock {
            l_type: libc::F_WRLCK as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&all_of_it)).map(|_| file)
    };
    let containers = lock().unwrap();
    for part in [
        "systemd-nspawn has given ids of it",
        "uid_range = \"1879048192-1879113727\"",
        "ustar",
    ] {
        assert_both_report(&host, Some(part));
    }
    std::fs::remove_file(&path).unwrap();
    drop(containers);
    let mut helper = host.start_helper();
    // It has reserved the block itself.
    let config = host.root.join(protocol::config::CONFIG_PATH);
    let mut check = Command::new(binaries().join("user-factory"));
    check.arg("check").arg("--root").arg(&host.root).arg(config);
    let result: CommandOutput = check.output().unwrap().into();
    assert!(result.out.contains("helper: it would start"), "{}", result.out);
    assert_eq!(lock().err(), Some(nix::errno::Errno::EAGAIN));
    helper.signal(Signal::SIGTERM);
    helper.wait();
    lock().unwrap();
}
