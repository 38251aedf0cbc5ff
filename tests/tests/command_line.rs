//! The two binaries at the command line, as an operator types them.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

use testbed::harness::{SUPERVISOR_UID, TestHost, binaries};

fn user_factory(arguments: &[&str]) -> Output {
    Command::new(binaries().join("user-factory"))
        .args(arguments)
        .output()
        .unwrap()
}

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

const SLOT: &str = "[slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n";

/// What `check` says of a configuration with these slots.
fn check(slots: &str) -> (bool, String) {
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", SUPERVISOR_UID, slots);
    host.write_token("a-token\n");
    let path = host.root.join(protocol::config::CONFIG_PATH);
    let output = user_factory(&["check", path.to_str().unwrap()]);
    (
        output.status.success(),
        text(&output).replace(path.to_str().unwrap(), "FILE"),
    )
}

#[test]
fn check_accepts_a_good_configuration_and_names_its_slots() {
    let (good, printed) = check(SLOT);
    assert!(good, "{printed}");
    assert!(
        printed.contains("\nslot a: target 01HZX3N8Q4J5K6M7P8R9S0T1V2"),
        "{printed}"
    );
}

#[test]
fn check_names_file_and_line_of_each_mistake() {
    for (slots, line, part) in [
        (format!("{SLOT}colour = \"red\"\n"), 10, "unknown field"),
        (format!("{SLOT}conflicts_with_slots = [\"a\"]\n"), 10, "itself"),
        (format!("{SLOT}conflicts_with_slots = [\"zz\"]\n"), 10, "zz"),
        (SLOT.replace("01HZ", "xxxx"), 9, "ULID"),
        (format!("{SLOT}writable = [\"relative\"]\n"), 10, "absolute"),
    ] {
        let (good, printed) = check(&slots);
        assert!(!good, "{slots} was accepted");
        assert!(
            printed.contains(&format!("FILE:{line}: ")) && printed.contains(part),
            "{slots}: {printed}"
        );
    }
    let (good, printed) = check(&format!("{SLOT}add_to_groups = [\"no-such-group\"]\n"));
    assert!(
        !good && printed.contains("FILE:") && printed.contains("no-such-group"),
        "{printed}"
    );
    let (good, printed) = check(&format!(
        "{SLOT}read_only = {{ \"/opt/x\" = \"/no/such/directory\" }}\n"
    ));
    assert!(
        !good && printed.contains("FILE:") && printed.contains("/no/such/directory"),
        "{printed}"
    );
}

#[test]
fn the_supervisor_refuses_to_run_as_root() {
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", SUPERVISOR_UID, SLOT);
    let output = user_factory(&["serve", "--root", host.root.to_str().unwrap()]);
    assert!(!output.status.success());
    assert!(text(&output).contains("root"), "{}", text(&output));
}

#[test]
fn a_token_that_others_can_read_is_refused() {
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", SUPERVISOR_UID, SLOT);
    host.write_token("a-secret-token");
    let token = host.root.join("token");
    std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o644)).unwrap();
    let mut command = Command::new(binaries().join("user-factory"));
    command
        .arg("serve")
        .arg("--root")
        .arg(&host.root)
        .uid(SUPERVISOR_UID)
        .gid(SUPERVISOR_UID);
    let output = command.output().unwrap();
    assert!(!output.status.success());
    assert!(
        text(&output).contains(token.to_str().unwrap()),
        "{}",
        text(&output)
    );
    assert!(!text(&output).contains("a-secret-token"));
}

#[test]
fn the_helper_refuses_to_run_as_anybody_else() {
    let mut command = Command::new(binaries().join("user-factory-helper"));
    let output = command
        .args(["--root", "/nonexistent"])
        .uid(SUPERVISOR_UID)
        .gid(SUPERVISOR_UID)
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(text(&output).contains("must run as root"), "{}", text(&output));
}

#[test]
fn a_missing_group_stops_the_helper_with_file_and_line() {
    let host = TestHost::new();
    host.configure(
        "http://127.0.0.1:9",
        0,
        &format!("{SLOT}add_to_groups = [\"no-such-group\"]\n"),
    );
    let mut command = Command::new(binaries().join("user-factory-helper"));
    let output = command
        .arg("--root")
        .arg(&host.root)
        .args(["--cgroup", &host.cgroup])
        .output()
        .unwrap();
    assert!(!output.status.success());
    let printed = text(&output);
    assert!(
        printed.contains("config.toml:8: slot a: the group no-such-group is not in /etc/group"),
        "{printed}"
    );
}

#[test]
fn every_command_ends_quietly_when_its_reader_has_gone() {
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", SUPERVISOR_UID, SLOT);
    host.write_token("a-token\n");
    let path = host.root.join(protocol::config::CONFIG_PATH);
    let (path, root) = (path.to_str().unwrap(), host.root.to_str().unwrap());
    for words in [
        &["check", path][..],
        &["check", "/no/such/file"],
        &["check", path, "--online", "--root", root],
        &["generate", "man"],
        &["generate", "bash"],
        &["status", "--root", root],
        &["devices", "--root", root],
        &["--help"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        let mut command = Command::new(binaries().join("user-factory"));
        command
            .args(words)
            .stdout(writer.try_clone().unwrap())
            .stderr(writer);
        drop(reader);
        let status = command.status().unwrap();
        // 101 is the status of a panic.
        assert!(status.code().is_some_and(|code| code < 5), "{words:?}: {status}");
    }
}

#[test]
fn serve_without_a_token_or_a_good_configuration_ends_with_78_which_the_unit_does_not_restart() {
    let host = TestHost::new();
    let serve = |part: &str| {
        let root = host.root.to_str().unwrap();
        let output = user_factory(&["serve", "--allow-root", "--root", root]);
        let printed = text(&output);
        assert_eq!(output.status.code(), Some(78), "{printed}");
        assert!(
            printed.starts_with("user-factory: ") && printed.contains(part),
            "{printed}"
        );
        printed
    };
    host.configure("http://127.0.0.1:9", SUPERVISOR_UID, SLOT);
    assert_eq!(serve("there is no token file ").lines().count(), 1);
    host.configure("http://127.0.0.1:9", SUPERVISOR_UID, "[slots.a]\n");
    serve("the configuration has mistakes");
    let unit = include_str!("../../packaging/systemd/buildomat-user-factory.service");
    for line in ["RestartPreventExitStatus=78", "SetCredential=token:\\n"] {
        assert!(unit.lines().any(|own| own == line), "the unit lacks {line}");
    }
}
