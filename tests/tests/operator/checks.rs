//! What can be known before anything starts, and what a log tells afterwards.

use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;

use nix::sys::signal::Signal;
use testbed::harness::SUPERVISOR_UID;
use testbed::house::ONE;

use super::*;

fn config_of(house: &House) -> String {
    let path = house.host.root.join(protocol::config::CONFIG_PATH);
    path.to_str().expect("a test's path is ASCII").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_online_asks_the_server_for_its_agent_and_the_helper() {
    let mut house = House::new(ONE).await;
    answering(&house).await;
    let path = config_of(&house);
    let said = say(&house, &["check", &path, "--online"]);
    for part in [
        "slot a",
        "host kernel",
        "host cgroup v2",
        "host user quotas",
        "takes the token",
        "downloaded and unpacked",
        "it serves, with 0 workers",
    ] {
        // Whom the helper serves, which is not who types this.
        let expected = !part.contains("it serves");
        assert_eq!(said.out.contains(part), expected, "{part}: {}", said.out);
    }
    assert!(said.out.contains("online helper: FAILED"), "{}", said.out);
    // As the supervisor's user, all of it is well.
    let mut command = command(&house, &["check", &path, "--online"]);
    let said: Said = tokio::task::block_in_place(|| {
        command
            .uid(SUPERVISOR_UID)
            .gid(SUPERVISOR_UID)
            .output()
            .unwrap()
            .into()
    });
    assert_eq!(said.status, 0, "{}{}", said.out, said.err);
    assert!(said.out.contains("it serves, with 0 workers"), "{}", said.out);
    // A wrong token is named.
    house.host.write_token("not-the-token");
    house.end_helper(Signal::SIGTERM);
    let said = say(&house, &["check", &path, "--online"]);
    assert!(
        said.status == 1 && said.out.contains("online server: FAILED") && said.out.contains("401"),
        "{}",
        said.out
    );
    house.helper = house.host.helper();
    house.finish().await;
}

/// Starts the supervisor as systemd does: with its standard error connected to a journal, here in `$1`.
const UNDER_SYSTEMD: &str = r#"
mount -t tmpfs none /run && mkdir -p /run/systemd/journal && mount --bind "$1" /run/systemd/journal || exit 99
shift
JOURNAL_STREAM=$(stat -L -c %d:%i /proc/self/fd/2) exec setpriv --reuid "$UID_OF" --regid "$UID_OF" --clear-groups "$@"
"#;

#[tokio::test(flavor = "multi_thread")]
async fn under_systemd_each_line_is_an_entry_of_the_journal_with_fields() {
    let mut house = House::new(ONE).await;
    answering(&house).await;
    house.end_supervisor(Signal::SIGTERM);
    // Its root directory must be seen where /run is another.
    assert!(!house.host.root.starts_with("/run"));
    let place = tempfile::tempdir().unwrap();
    std::fs::set_permissions(place.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let socket = place.path().join("socket");
    let journal = UnixDatagram::bind(&socket).unwrap();
    std::fs::set_permissions(&socket, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    journal.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut start = Command::new("unshare");
    start
        .args(["--mount", "sh", "-c", UNDER_SYSTEMD, "sh"])
        .arg(place.path());
    start
        .arg(binaries().join("user-factory"))
        .arg("serve")
        .arg("--root")
        .arg(&house.host.root);
    house.supervisor = Running::start(start.env("UID_OF", SUPERVISOR_UID.to_string()));
    let job = house.submit("true");
    house.completed(job).await;
    let end = std::time::Instant::now() + PATIENCE;
    let entry = loop {
        let mut bytes = vec![0; 64 << 10];
        let n = tokio::task::block_in_place(|| journal.recv(&mut bytes)).expect("an entry comes");
        let text = String::from_utf8_lossy(&bytes[..n]).into_owned();
        if text.contains("worker phase") && text.contains("online") {
            break text;
        }
        assert!(std::time::Instant::now() < end, "no worker comes online");
    };
    let worker = house.server.job(job).worker.unwrap().to_string();
    for part in [
        "SYSLOG_IDENTIFIER\n",
        "WORKER\n",
        &worker,
        "SLOT\n",
        "JOB\n",
        &job.to_string(),
        "PRIORITY=",
    ] {
        assert!(entry.contains(part), "{part:?}: {entry:?}");
    }
    house.finish().await;
}
