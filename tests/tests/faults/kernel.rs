//! Row 83: cgroup v2 or `/proc` missing, elsewhere, or in pieces. The helper alone sees it so, in a mount namespace of
//! its own.

use std::process::Command;

use super::*;

/// The helper, in a mount namespace in which this script ran first; `$CGROUP` is where cgroup v2 is.
fn helper_after(house: &House, script: &str) -> Command {
    let own = house.host.helper_command();
    let mut command = Command::new(testbed::harness::tool("unshare", "util-linux"));
    command.args(["--mount", "--propagation", "private", "bash", "-euc"]);
    command.arg(format!("{script}\nexec \"$@\"")).arg("bash");
    command.arg(own.get_program()).args(own.get_args());
    command.env("CGROUP", testbed::harness::cgroup2_mount());
    command
}

/// With a job running, the helper is started again so, refuses with one line that has these parts, and harms nobody.
async fn refused_beside_a_job(house: &mut House, script: &str, parts: &[&str]) {
    let job = house.submit_waiting();
    house.printed(job, "running").await;
    let before = processes(house, job).len();
    let seen = house.supervisor.log.len();
    house.end_helper(Signal::SIGKILL);
    refused(&mut helper_after(house, script), &[&["ERROR"], parts].concat());
    house.told_from(seen, &["helper away", "start the helper"]);
    assert!(processes(house, job).len() >= before.min(3), "the job was harmed");
    house.helper = house.host.helper();
    house.told_from(seen, &["helper back"]);
    once(&house.supervisor.log, seen, &["helper away"]);
    house.let_end();
    house.completed(job).await;
    house.shut();
}

#[tokio::test(flavor = "multi_thread")]
async fn row_83_without_cgroup_v2_the_helper_refuses_and_running_jobs_go_on() {
    let mut house = House::new(ONE).await;
    let say = [
        "no cgroup v2 hierarchy is mounted",
        "mount -t cgroup2 none /sys/fs/cgroup",
    ];
    refused_beside_a_job(&mut house, "umount -l \"$CGROUP\"", &say).await;
    // There, but not to be written.
    let say = ["Read-only file system", "cgroup"];
    refused_beside_a_job(&mut house, "mount -o remount,bind,ro \"$CGROUP\"", &say).await;
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_83_without_proc_the_helper_refuses_and_running_jobs_go_on() {
    let mut house = House::new(ONE).await;
    let say = ["/proc/self/mountinfo", "mount /proc"];
    refused_beside_a_job(&mut house, "mount -t tmpfs none /proc", &say).await;
    refused_beside_a_job(&mut house, "umount -l /proc", &say).await;
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_83_without_the_pieces_of_proc_that_are_no_process_the_helper_serves() {
    let mut house = House::new(ONE).await;
    house.end_helper(Signal::SIGKILL);
    let pieces = "umount -l /proc; mount -t proc -o subset=pid none /proc";
    house.helper = Running::start(&mut helper_after(&house, pieces));
    house.helper.log.wait(&["serving"]);
    let job = house.submit("echo works");
    house.completed(job).await;
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_83_cgroup_v2_mounted_elsewhere_is_found_with_the_workers_in_it() {
    let mut house = House::new(TWO).await;
    let job = house.running().await;
    house.end_helper(Signal::SIGKILL);
    let elsewhere = "umount -l \"$CGROUP\"; mkdir -p /mnt; mount -t tmpfs none /mnt; mkdir /mnt/cg; \
                     mount -t cgroup2 none /mnt/cg";
    house.helper = Running::start(&mut helper_after(&house, elsewhere));
    house.helper.log.wait(&["serving"]);
    let other = house.submit("echo beside");
    house.completed(other).await;
    house.let_end();
    house.completed(job).await;
    house.finish().await;
}
