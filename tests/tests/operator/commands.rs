//! Row 109: commands, while the supervisor does not answer.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use testbed::test_factory::ONE;

use super::*;

/// No command takes longer than this to say that nobody answers.
const AT_MOST: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread")]
async fn row_109_every_command_ends_with_3_while_the_supervisor_is_stopped() {
    let factory = TestFactory::new(ONE).await;
    factory.start_blocking_job().await;
    let worker = online(&factory).await;
    let start = |args: &[&str]| {
        let mut command = command(&factory, args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        (args.join(" "), command.spawn().expect("the command is there"))
    };
    // One that has begun, and has nothing more to print.
    let mut started = vec![start(&["logs", "-f", &worker])];
    factory.wait_polls(2).await;
    factory.supervisor.signal(Signal::SIGSTOP);
    let began = Instant::now();
    let all: [&[&str]; 12] = [
        &["status"],
        &["status", "--json"],
        &["workers"],
        &["show", &worker],
        &["logs", &worker],
        &["logs", "-f", &worker],
        &["resume"],
        &["resume", "a"],
        &["drain", "a", "--wait"],
        &["kill", &worker],
        &["destroy", &worker],
        &["reload"],
    ];
    started.extend(all.iter().map(|args| start(args)));
    for (args, child) in started {
        let result = CommandOutput::from(tokio::task::block_in_place(|| child.wait_with_output()).unwrap());
        assert_eq!(result.status, 3, "{args}: {}{}", result.out, result.err);
        assert!(
            result.err.contains("did not answer within"),
            "{args}: {}",
            result.err
        );
        assert!(began.elapsed() < AT_MOST, "{args}: {:?}", began.elapsed());
    }
    factory.supervisor.signal(Signal::SIGCONT);
    // What was asked for may be done when it goes on, or not: who asked has gone. It serves again.
    assert_eq!(run_command(&factory, &["kill", &worker]).status, 0);
    let held = see(&factory, |status| status["workers"][0]["hold"].as_str().map(drop));
    held.await;
    assert_eq!(run_command(&factory, &["destroy", &worker, "--yes"]).status, 0);
    assert_eq!(run_command(&factory, &["resume", "a"]).status, 0);
    let job = factory.submit("echo next");
    factory.wait_completed(job).await;
    factory.finish().await;
}
