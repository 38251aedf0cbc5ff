//! What the commands print while the helper, or the server, cannot work, and what many of them at once print.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::faulty_proxy::Fault;
use testbed::harness::SUPERVISOR_UID;
use testbed::test_factory::{ONE, TWO};
use testbed::tracer::helper::{Connections, KillPlan, KillPoint, TracedKind, WatchPeriod, listener, watch};

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn the_status_says_that_the_helper_cannot_install_a_filter_and_what_to_do() {
    let factory = TestFactory::new(ONE).await;
    factory.wait_polls(3).await;
    assert_eq!(run_command(&factory, &["status"]).status, 0);
    // The next listener stops where it would install its filter, as one does that the kernel keeps there.
    let monitor = factory.helper.pid();
    let plan = KillPlan {
        kind: TracedKind::Listener,
        when: KillPoint::First(libc::SYS_seccomp),
        all: false,
        hangs: Some(Connections::GoOn),
    };
    let watcher = watch(monitor, WatchPeriod::OneConnection, Some(plan));
    kill(Pid::from_raw(listener(monitor) as i32), Signal::SIGKILL).unwrap();
    watcher.join().expect("the tracer does not fail");
    let problem = see(&factory, |status| {
        let helper = &status["helper"];
        let is_away = helper["reachable"] == false;
        helper["trouble"].as_str().filter(|_| is_away).map(str::to_owned)
    });
    let problem = problem.await;
    let parts = [
        "the helper says",
        "has accepted no connection for",
        "seccomp",
        "reboot the host",
    ];
    for part in parts {
        assert!(problem.contains(part), "{part} is not in {problem}");
    }
    let result = run_command(&factory, &["status"]);
    assert_eq!(result.status, 4, "{}{}", result.out, result.err);
    for part in parts {
        assert!(result.out.contains(part), "{part} is not in {}", result.out);
    }
    let stopped = listener(monitor);
    kill(Pid::from_raw(stopped as i32), Signal::SIGCONT).unwrap();
    see(&factory, |status| {
        (status["helper"]["reachable"] == true).then_some(())
    })
    .await;
    assert_eq!(run_command(&factory, &["status"]).status, 0);
    let job = factory.submit("echo served");
    factory.wait_completed(job).await;
    factory.finish().await;
}

/// Why no jobs are taken, once that is shown; the command then ends with 4, and no slot is shown as free.
async fn not_taken(factory: &TestFactory) -> String {
    let why = see(factory, |status| status["not_taken"].as_str().map(str::to_owned)).await;
    let result = run_command(factory, &["status"]);
    assert_eq!(result.status, 4, "{}{}", result.out, result.err);
    assert!(result.out.contains("not taken: "), "{}", result.out);
    assert!(!result.out.contains(" free "), "{}", result.out);
    why
}

async fn taken(factory: &TestFactory) {
    see(factory, |status| status["not_taken"].is_null().then_some(())).await;
    assert_eq!(run_command(factory, &["status"]).status, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_helper_that_does_not_answer_is_shown_and_no_job_is_leased_meanwhile() {
    let factory = TestFactory::new(TWO).await;
    factory.wait_polls(3).await;
    // Lists are answered by sessions; it is the monitor that makes a user.
    factory.helper.signal(Signal::SIGSTOP);
    let first = factory.submit("echo first");
    assert_eq!(not_taken(&factory).await, "the helper is not answering");
    let status = json(&factory, &["status"]);
    assert!(status["helper"]["unanswered_since"].is_string(), "{status}");
    assert_eq!(status["helper"]["reachable"], true, "{status}");
    let result = run_command(&factory, &["status"]);
    assert!(result.out.contains("has not answered for"), "{}", result.out);
    let second = factory.submit("echo second");
    factory.wait_polls(2).await;
    assert_eq!(factory.server.job(second).state(), "queued");
    factory.helper.signal(Signal::SIGCONT);
    taken(&factory).await;
    factory.wait_completed(first).await;
    factory.wait_completed(second).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_108_a_server_that_fails_every_call_about_a_job_is_called_seldom_and_shown() {
    let factory = TestFactory::behind_a_proxy(ONE).await;
    factory.wait_polls(3).await;
    let proxy = factory.proxy.as_ref().expect("the factory was built behind one");
    for (status, part) in [
        ("500 Internal Server Error", "answered 500"),
        ("429 Too Many Requests", "answered 429"),
    ] {
        let fault = Fault::answer(status, "application/json", "{\"message\": \"not now\"}");
        let seen = factory.supervisor.log.len();
        proxy.set("/0/factory/lease", fault);
        let why = not_taken(&factory).await;
        assert!(why.contains(part) && why.contains("not now"), "{why}");
        assert!(why.contains("the next lease request is at"), "{why}");
        factory.wait_for_log_from(seen, &["cannot ask for jobs", part]);
        assert_eq!(
            factory.supervisor.log.count_from(seen, &["server unreachable"]),
            0
        );
        let job = factory.submit("echo later");
        proxy.clear_fault();
        factory.wait_completed(job).await;
        taken(&factory).await;
    }
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn resuming_one_slot_while_all_are_drained_says_that_it_changes_nothing_yet() {
    let factory = TestFactory::new(TWO).await;
    answering(&factory).await;
    done(&factory, &["drain"]);
    done(&factory, &["drain", "a"]);
    let result = run_command(&factory, &["resume", "a"]);
    assert_eq!(result.status, 0, "{}", result.err);
    assert!(
        result
            .err
            .contains("slot a takes no jobs before `user-factory resume`"),
        "{}",
        result.err
    );
    done(&factory, &["resume"]);
    done(&factory, &["drain", "a"]);
    assert_eq!(run_command(&factory, &["resume", "a"]).err, "");
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_114_a_hundred_commands_at_once_from_several_users_are_each_answered_and_logged() {
    let factory = TestFactory::new(TWO).await;
    let job = factory.start_blocking_job().await;
    let worker = online(&factory).await;
    let unknown = "01HZX3N8Q4J5K6M7P8R9S0T1V2";
    let commands: [(&[&str], i32); 8] = [
        (&["drain"], 0),
        (&["resume"], 0),
        (&["drain", "b"], 0),
        (&["resume", "b"], 0),
        (&["reload"], 0),
        (&["status", "--json"], 0),
        (&["show", &worker], 0),
        (&["destroy", unknown, "--yes"], 1),
    ];
    let seen = factory.supervisor.log.len();
    let started: Vec<_> = (0..104usize)
        .map(|number| {
            let (args, wanted) = commands[number % commands.len()];
            let mut command = command(&factory, args);
            // Root, the supervisor's own user, and another of its group.
            if number % 3 > 0 {
                command.gid(SUPERVISOR_UID);
                command.uid(SUPERVISOR_UID + (number % 3 - 1) as u32);
            }
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            (args, wanted, command.spawn().expect("the command is there"))
        })
        .collect();
    for (args, wanted, child) in started {
        let result = CommandOutput::from(tokio::task::block_in_place(|| child.wait_with_output()).unwrap());
        // A status may find the factory drained, but none of it waits for an operator.
        assert_eq!(result.status, wanted, "{args:?}: {}{}", result.out, result.err);
    }
    let log = &factory.supervisor.log;
    let loaded = "configuration loaded again";
    let other = format!("uid {}", SUPERVISOR_UID + 1);
    tokio::task::block_in_place(|| {
        log.wait_for_exactly(13, seen, &[loaded]);
        log.wait_from(seen, &[loaded, &other]);
    });
    done(&factory, &["resume"]);
    done(&factory, &["resume", "b"]);
    let second = factory.submit("echo second");
    factory.wait_completed(second).await;
    factory.release();
    factory.wait_completed(job).await;
    factory.finish().await;
}
