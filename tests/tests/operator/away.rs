//! What a person is told while the helper, or the server, cannot work, and what many people at once are told.

use std::os::unix::process::CommandExt;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::harness::SUPERVISOR_UID;
use testbed::house::{ONE, TWO};
use testbed::proxy::Fault;
use testbed::tracer::service::{Connections, Kind, Plan, Span, When, listener, watch};

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn the_status_says_that_the_helper_cannot_install_a_filter_and_what_to_do() {
    let house = House::new(ONE).await;
    house.polls(3).await;
    assert_eq!(say(&house, &["status"]).status, 0);
    // The next listener stops where it would install its filter, as one does that the kernel keeps there.
    let daemon = house.helper.pid();
    let plan = Plan {
        kind: Kind::Listener,
        when: When::First(libc::SYS_seccomp),
        all: false,
        hangs: Some(Connections::GoOn),
    };
    let watcher = watch(daemon, Span::OneConnection, Some(plan));
    kill(Pid::from_raw(listener(daemon) as i32), Signal::SIGKILL).unwrap();
    watcher.join().expect("the tracer has no trouble");
    let trouble = see(&house, |status| {
        let helper = &status["helper"];
        let is_away = helper["reachable"] == false;
        helper["trouble"].as_str().filter(|_| is_away).map(str::to_owned)
    });
    let trouble = trouble.await;
    let parts = [
        "the helper says",
        "has accepted no connection for",
        "seccomp",
        "reboot the host",
    ];
    for part in parts {
        assert!(trouble.contains(part), "{part} is not in {trouble}");
    }
    let said = say(&house, &["status"]);
    assert_eq!(said.status, 4, "{}{}", said.out, said.err);
    for part in parts {
        assert!(said.out.contains(part), "{part} is not in {}", said.out);
    }
    let stopped = listener(daemon);
    kill(Pid::from_raw(stopped as i32), Signal::SIGCONT).unwrap();
    see(&house, |status| {
        (status["helper"]["reachable"] == true).then_some(())
    })
    .await;
    assert_eq!(say(&house, &["status"]).status, 0);
    let job = house.submit("echo served");
    house.completed(job).await;
    house.finish().await;
}

/// Why no jobs are taken, once that is shown; the command then ends with 4, and no slot is shown as free.
async fn not_taken(house: &House) -> String {
    let why = see(house, |status| status["not_taken"].as_str().map(str::to_owned)).await;
    let said = say(house, &["status"]);
    assert_eq!(said.status, 4, "{}{}", said.out, said.err);
    assert!(said.out.contains("not taken: "), "{}", said.out);
    assert!(!said.out.contains(" free "), "{}", said.out);
    why
}

async fn taken(house: &House) {
    see(house, |status| status["not_taken"].is_null().then_some(())).await;
    assert_eq!(say(house, &["status"]).status, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_helper_that_does_not_answer_is_shown_and_no_job_is_leased_meanwhile() {
    let house = House::new(TWO).await;
    house.polls(3).await;
    // Lists are answered by sessions; it is the monitor that makes a user.
    house.helper.signal(Signal::SIGSTOP);
    let first = house.submit("echo first");
    assert_eq!(not_taken(&house).await, "the helper is not answering");
    let status = json(&house, &["status"]);
    assert!(status["helper"]["unanswered_since"].is_string(), "{status}");
    assert_eq!(status["helper"]["reachable"], true, "{status}");
    let said = say(&house, &["status"]);
    assert!(said.out.contains("has not answered for"), "{}", said.out);
    let second = house.submit("echo second");
    house.polls(2).await;
    assert_eq!(house.server.job(second).state(), "queued");
    house.helper.signal(Signal::SIGCONT);
    taken(&house).await;
    house.completed(first).await;
    house.completed(second).await;
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_108_a_server_that_answers_no_question_for_a_job_is_asked_seldom_and_shown() {
    let house = House::behind_a_proxy(ONE).await;
    house.polls(3).await;
    let proxy = house.proxy.as_ref().expect("the house was built behind one");
    for (status, part) in [
        ("500 Internal Server Error", "answered 500"),
        ("429 Too Many Requests", "answered 429"),
    ] {
        let fault = Fault::answer(status, "application/json", "{\"message\": \"not now\"}");
        let seen = house.supervisor.log.len();
        proxy.set("/0/factory/lease", fault);
        let why = not_taken(&house).await;
        assert!(why.contains(part) && why.contains("not now"), "{why}");
        assert!(why.contains("the next question is at"), "{why}");
        house.told_from(seen, &["cannot ask for jobs", part]);
        assert_eq!(house.supervisor.log.count_from(seen, &["server away"]), 0);
        let job = house.submit("echo later");
        proxy.heal();
        house.completed(job).await;
        taken(&house).await;
    }
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn resuming_one_slot_while_all_are_drained_says_that_it_changes_nothing_yet() {
    let house = House::new(TWO).await;
    answering(&house).await;
    done(&house, &["drain"]);
    done(&house, &["drain", "a"]);
    let said = say(&house, &["resume", "a"]);
    assert_eq!(said.status, 0, "{}", said.err);
    assert!(
        said.err
            .contains("slot a takes no jobs before `user-factory resume`"),
        "{}",
        said.err
    );
    done(&house, &["resume"]);
    done(&house, &["drain", "a"]);
    assert_eq!(say(&house, &["resume", "a"]).err, "");
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_114_a_hundred_orders_at_once_from_several_users_are_each_answered_and_logged() {
    let house = House::new(TWO).await;
    let job = house.running().await;
    let worker = online(&house).await;
    let unknown = "01HZX3N8Q4J5K6M7P8R9S0T1V2";
    let orders: [(&[&str], i32); 8] = [
        (&["drain"], 0),
        (&["resume"], 0),
        (&["drain", "b"], 0),
        (&["resume", "b"], 0),
        (&["reload"], 0),
        (&["status", "--json"], 0),
        (&["show", &worker], 0),
        (&["destroy", unknown, "--yes"], 1),
    ];
    let seen = house.supervisor.log.len();
    let started: Vec<_> = (0..104usize)
        .map(|number| {
            let (words, wanted) = orders[number % orders.len()];
            let mut command = command(&house, words);
            // Root, the supervisor's own user, and another of its group.
            if number % 3 > 0 {
                command.gid(SUPERVISOR_UID);
                command.uid(SUPERVISOR_UID + (number % 3 - 1) as u32);
            }
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            (words, wanted, command.spawn().expect("the command is there"))
        })
        .collect();
    for (words, wanted, child) in started {
        let said = Said::from(tokio::task::block_in_place(|| child.wait_with_output()).unwrap());
        // A status may find the factory drained, but a person is wanted by none of it.
        assert_eq!(said.status, wanted, "{words:?}: {}{}", said.out, said.err);
    }
    let log = &house.supervisor.log;
    let reloads = log.count_from(seen, &["configuration loaded again"]);
    assert_eq!(reloads, 13, "{}", log.text_from(seen));
    assert!(
        log.count_from(
            seen,
            &[
                "configuration loaded again",
                &format!("uid {}", SUPERVISOR_UID + 1)
            ]
        ) > 0
    );
    done(&house, &["resume"]);
    done(&house, &["resume", "b"]);
    let second = house.submit("echo second");
    house.completed(second).await;
    house.let_end();
    house.completed(job).await;
    house.finish().await;
}
