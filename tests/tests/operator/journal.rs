//! What the journal gets under systemd. Here a socket stands in for the journal's, at its place, in a mount namespace
//! of the supervisor's own.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;

use nix::sys::signal::Signal;
use testbed::harness::SUPERVISOR_UID;
use testbed::test_factory::ONE;

use super::*;

/// Arguments: the journal's directory, the file that is standard error, the supervisor's uid, its command line.
const UNDER_A_JOURNAL: &str = r#"
mount -t tmpfs -o mode=755 none /run && mkdir -p /run/systemd/journal && mount --bind "$1" /run/systemd/journal &&
id=$3 && exec 2>"$2" && shift 3 && exec setpriv --reuid "$id" --regid "$id" --clear-groups -- "$@"
"#;

/// An entry in the journal's own format (<https://systemd.io/JOURNAL_NATIVE_PROTOCOL/>), as `NAME=value` each.
fn entry(journal: &UnixDatagram) -> Vec<String> {
    let mut packet = vec![0; 1 << 16];
    let n = journal.recv(&mut packet).expect("an entry comes in time");
    let mut rest = &packet[..n];
    let mut fields = Vec::new();
    while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
        let line = String::from_utf8_lossy(&rest[..end]).into_owned();
        rest = &rest[end + 1..];
        if line.contains('=') {
            fields.push(line);
        } else {
            // The name alone: its value comes with its length, and a line's end of its own.
            let (len, value) = rest.split_at(8);
            let len = u64::from_le_bytes(len.try_into().unwrap()) as usize;
            fields.push(format!("{line}={}", String::from_utf8_lossy(&value[..len])));
            rest = &value[len + 1..];
        }
    }
    fields
}

#[tokio::test(flavor = "multi_thread")]
async fn the_journal_gets_the_worker_the_slot_and_the_job_as_its_own_fields() {
    let mut factory = TestFactory::new(ONE).await;
    factory.end_supervisor(Signal::SIGTERM);
    let place = tempfile::tempdir().unwrap();
    fs::set_permissions(place.path(), Permissions::from_mode(0o755)).unwrap();
    let socket = place.path().join("socket");
    let journal = UnixDatagram::bind(&socket).unwrap();
    fs::set_permissions(&socket, Permissions::from_mode(0o666)).unwrap();
    journal.set_read_timeout(Some(TEST_TIMEOUT)).unwrap();
    let stderr = place.path().join("stderr");
    let meta = File::create(&stderr).unwrap().metadata().unwrap();

    let plain = factory.host.supervisor_command();
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", UNDER_A_JOURNAL, "sh"]);
    command
        .args([place.path(), &stderr])
        .arg(SUPERVISOR_UID.to_string());
    command.arg(plain.get_program()).args(plain.get_args());
    command.env("JOURNAL_STREAM", format!("{}:{}", meta.dev(), meta.ino()));
    factory.supervisor = Running::start(&mut command);

    let job = factory.submit("echo one");
    factory.wait_completed(job).await;
    let worker = factory.server.job(job).worker.unwrap();
    let wanted = [
        format!("WORKER={worker}"),
        "SLOT=a".to_owned(),
        format!("JOB={job}"),
        "PRIORITY=6".to_owned(),
        "SYSLOG_IDENTIFIER=user-factory".to_owned(),
    ];
    let found = tokio::task::block_in_place(|| {
        std::iter::repeat_with(|| entry(&journal))
            .find(|lines| wanted.iter().all(|line| lines.contains(line)))
    });
    let result = found.unwrap();
    // What `journalctl` shows an operator.
    let message = result.iter().find_map(|line| line.strip_prefix("MESSAGE="));
    for part in [
        format!("worker={worker}"),
        format!("job={job}"),
        "phase=".to_owned(),
    ] {
        assert!(message.is_some_and(|text| text.contains(&part)), "{result:?}");
    }
    assert_eq!(fs::read_to_string(&stderr).unwrap(), "", "it is printed twice");
    factory.finish().await;
}
