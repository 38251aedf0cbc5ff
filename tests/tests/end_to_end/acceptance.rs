//! The program that an operator runs against a server with a factory behind it.

use std::process::{Command, Output};

use testbed::harness::binaries;

use super::*;

/// Nearly all of a job is waiting.
const SLOTS: usize = 6;

fn acceptance(factory: &TestFactory, more: &[&str]) -> Output {
    let mut command = Command::new(binaries().join("acceptance"));
    command
        .args(["--server", &factory.server.url(), "--target", "linux"])
        .args(["--user-token", &factory.server.user_token()])
        .args(more);
    tokio::task::block_in_place(|| command.output().expect("the program is there"))
}

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_of_all_kinds_end_as_they_should() {
    let slots: String = (0..SLOTS)
        .map(|number| format!("[slots.s{number}]\ntarget = \"TARGET\"\n"))
        .collect();
    let factory = TestFactory::new(&slots).await;
    let output = acceptance(&factory, &["--at-once", &SLOTS.to_string()]);
    let printed = text(&output);
    assert_eq!(output.status.code(), Some(0), "{printed}");
    assert!(
        printed.lines().filter(|line| line.starts_with("ok ")).count() >= 29,
        "{printed}"
    );
    factory.finish().await;
}

/// No factory takes the target's jobs here.
#[tokio::test(flavor = "multi_thread")]
async fn jobs_that_do_not_end_are_told() {
    let factory = TestFactory::new("[slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n").await;
    let output = acceptance(&factory, &["--only", "a job that", "--timeout-seconds", "1"]);
    let printed = text(&output);
    assert_eq!(output.status.code(), Some(1), "{printed}");
    for part in [
        "FAILED",
        "a job that passes: job ",
        "is still \"queued\"",
        "5 kinds of jobs, 5 not as expected",
    ] {
        assert!(printed.contains(part), "{part}: {printed}");
    }
    factory.finish().await;
}
