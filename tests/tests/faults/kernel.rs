//! Row 83: cgroup v2 or `/proc` missing, elsewhere, or in pieces. The helper alone sees it so, in a mount namespace of
//! its own.

use std::process::Command;

use super::*;

/// The helper, in a mount namespace in which this script ran first; `$CGROUP` is where cgroup v2 is.
fn helper_after(factory: &TestFactory, script: &str) -> Command {
    let own = factory.host.helper_command();
    let mut command = Command::new(testbed::harness::tool("unshare"));
    command.args(["--mount", "--propagation", "private", "bash", "-euc"]);
    command.arg(format!("{script}\nexec \"$@\"")).arg("bash");
    command.arg(own.get_program()).args(own.get_args());
    command.env("CGROUP", testbed::harness::cgroup2_mount());
    command
}

/// With a job running, the helper is started again so, refuses with one line that has these parts, and harms nobody.
async fn refused_beside_a_job(factory: &mut TestFactory, script: &str, parts: &[&str]) {
    let job = factory.submit_blocking();
    factory.wait_for_line(job, "running").await;
    let before = processes(factory, job).len();
    let seen = factory.supervisor.log.len();
    factory.end_helper(Signal::SIGKILL);
    refused(&mut helper_after(factory, script), &[&["ERROR"], parts].concat());
    factory.wait_for_log_from(seen, &["helper unreachable", "start the helper"]);
    assert!(
        processes(factory, job).len() >= before.min(3),
        "the job was harmed"
    );
    factory.helper = factory.host.start_helper();
    factory.wait_for_log_from(seen, &["helper back"]);
    once(&factory.supervisor.log, seen, &["helper unreachable"]);
    factory.release();
    factory.wait_completed(job).await;
    factory.block_again();
}

#[tokio::test(flavor = "multi_thread")]
async fn row_83_without_cgroup_v2_the_helper_refuses_and_running_jobs_go_on() {
    let mut factory = TestFactory::new(ONE).await;
    let parts = [
        "no cgroup v2 hierarchy is mounted",
        "mount -t cgroup2 none /sys/fs/cgroup",
    ];
    refused_beside_a_job(&mut factory, "umount -l \"$CGROUP\"", &parts).await;
    // There, but not to be written.
    let parts = ["Read-only file system", "cgroup"];
    refused_beside_a_job(&mut factory, "mount -o remount,bind,ro \"$CGROUP\"", &parts).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_83_without_proc_the_helper_refuses_and_running_jobs_go_on() {
    let mut factory = TestFactory::new(ONE).await;
    let parts = ["/proc/self/mountinfo", "mount /proc"];
    refused_beside_a_job(&mut factory, "mount -t tmpfs none /proc", &parts).await;
    refused_beside_a_job(&mut factory, "umount -l /proc", &parts).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_83_without_the_pieces_of_proc_that_are_no_process_the_helper_serves() {
    let mut factory = TestFactory::new(ONE).await;
    factory.end_helper(Signal::SIGKILL);
    let pieces = "umount -l /proc; mount -t proc -o subset=pid none /proc";
    factory.helper = Running::start(&mut helper_after(&factory, pieces));
    factory.helper.log.wait(&["serving"]);
    let job = factory.submit("echo works");
    factory.wait_completed(job).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_83_cgroup_v2_mounted_elsewhere_is_found_with_the_workers_in_it() {
    let mut factory = TestFactory::new(TWO).await;
    let job = factory.start_blocking_job().await;
    factory.end_helper(Signal::SIGKILL);
    let elsewhere = "umount -l \"$CGROUP\"; mkdir -p /mnt; mount -t tmpfs none /mnt; mkdir /mnt/cg; \
                     mount -t cgroup2 none /mnt/cg";
    factory.helper = Running::start(&mut helper_after(&factory, elsewhere));
    factory.helper.log.wait(&["serving"]);
    let other = factory.submit("echo beside");
    factory.wait_completed(other).await;
    factory.release();
    factory.wait_completed(job).await;
    factory.finish().await;
}
