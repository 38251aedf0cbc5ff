//! Row 102: the file system of the whole state directory is full, or has become read-only, while the server says
//! recycle.

use std::os::unix::fs::chown;
use std::process::Command;

use testbed::harness::{PAUSE, until_every};
use testbed::small_disk::SmallDisk;

use super::*;

/// The state directory, with workers and database, on ext4 of its own.
pub fn small(host: &TestHost) -> Option<SmallDisk> {
    let disk = SmallDisk::roomy(host, false);
    let place = host.root.join(protocol::config::STATE_DIR).join("supervisor");
    fs::create_dir(&place).unwrap();
    chown(&place, Some(SUPERVISOR_UID), Some(SUPERVISOR_UID)).unwrap();
    Some(disk)
}

/// Wait until `status` says this, as an operator sees it, and return what it prints.
fn status(factory: &TestFactory, exit: i32, parts: &[&str]) -> String {
    // Each query is a program that is started.
    until_every(50 * PAUSE, || {
        let (code, text) = command(&factory.host, &["status"]);
        if code == exit && parts.iter().all(|part| text.contains(part)) {
            return Ok(text);
        }
        let log = factory.supervisor.log.text();
        Err(format!(
            "status never ended with {exit} and {parts:?}:\n{text}\n{log}"
        ))
    })
}

const NO_JOBS: &str = "not taken: the supervisor's state cannot be saved";

#[tokio::test(flavor = "multi_thread")]
async fn row_102_a_job_that_fills_the_disk_is_deleted_when_the_server_says_so() {
    let factory = TestFactory::on(TWO, small).await;
    // It takes all that is given up, for as long as it runs.
    let hog =
        factory.submit("echo filling; while :; do cat /dev/zero >> /work/all 2>/dev/null; sleep 0.01; done");
    factory.wait_for_line(hog, "filling").await;
    let text = status(&factory, 4, &[NO_JOBS, "make room on the disk"]);
    let slot = if slot_of(&factory, hog) == "a" { "b " } else { "a " };
    let other = text
        .lines()
        .find(|line| line.starts_with(slot))
        .expect("its slot");
    assert!(
        other.contains("closed") && other.contains("cannot be saved"),
        "{text}"
    );
    let next = factory.submit("echo next");
    factory.wait_polls(3).await;
    assert_eq!(factory.server.job(next).worker, None, "a job was taken");
    let (_, metrics) = command(&factory.host, &["status", "--json"]);
    assert!(metrics.contains("\"storage\": \""), "{metrics}");
    let worker = worker_of(&factory, hog);
    factory.server.cancel(hog).unwrap();
    factory
        .wait_for_state(|state| state.workers[&worker].deleted.then_some(()))
        .await;
    factory.wait_completed(next).await;
    status(&factory, 0, &["taken"]);
    assert_eq!(factory.supervisor.log.count(&["panicked"]), 0);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_102_destroy_is_answered_and_done_while_the_disk_is_full() {
    let factory = TestFactory::on(ONE, small).await;
    let hog =
        factory.submit("echo filling; while :; do cat /dev/zero >> /work/all 2>/dev/null; sleep 0.01; done");
    factory.wait_for_line(hog, "filling").await;
    status(&factory, 4, &[NO_JOBS]);
    let worker = worker_of(&factory, hog);
    let began = std::time::Instant::now();
    let (code, text) = command(&factory.host, &["destroy", &worker.to_string(), "--yes"]);
    assert_eq!(code, 0, "{text}");
    assert!(began.elapsed().as_secs() < 25, "{:?}", began.elapsed());
    factory
        .wait_for_state(|state| state.workers[&worker].deleted.then_some(()))
        .await;
    let next = factory.submit("echo next");
    factory.wait_completed(next).await;
    status(&factory, 0, &["taken"]);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_102_a_file_system_that_becomes_read_only_is_reported_and_no_job_is_leased() {
    let mut factory = TestFactory::on(ONE, small).await;
    status(&factory, 0, &["taken"]);
    let place = factory.host.root.join(protocol::config::STATE_DIR);
    let mount = |words: &[&str]| {
        let status = Command::new(words[0]).args(&words[1..]).arg(&place).status();
        assert!(status.unwrap().success(), "{words:?}");
    };
    // As after an error of the device.
    mount(&["mount", "-o", "remount,abort"]);
    status(
        &factory,
        4,
        &[NO_JOBS, "Read-only file system", "the kernel's log"],
    );
    let job = factory.submit("echo done");
    factory.wait_polls(3).await;
    assert_eq!(factory.server.job(job).worker, None, "a job was taken");
    let (code, text) = command(&factory.host, &["drain"]);
    assert!(code == 1 && text.contains("it cannot be remembered"), "{text}");
    // It is fixed, and mounted again.
    factory.end_supervisor(Signal::SIGTERM);
    factory.end_helper(Signal::SIGTERM);
    mount(&["umount"]);
    // Another file: of the first, a mount namespace of a test beside this one may still have the broken file system mounted.
    let image = factory.host.root.join("fixed.img");
    fs::copy(factory.host.root.join("disk.img"), &image).unwrap();
    let _ = Command::new("e2fsck").arg("-fy").arg(&image).output().unwrap();
    mount(&["mount", "-o", "loop", image.to_str().unwrap()]);
    factory.helper = factory.host.start_helper();
    factory.supervisor = factory.host.start_supervisor();
    factory.wait_completed(job).await;
    status(&factory, 0, &["taken"]);
    factory.finish().await;
}
