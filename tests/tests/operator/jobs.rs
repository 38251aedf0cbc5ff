//! Watching a job run, finding out how one ended, draining for a kernel update, and bringing the host back.

use nix::sys::signal::Signal;
use testbed::harness::create_shared_dir;
use testbed::test_factory::{ONE, TWO};

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_healthy_factorys_status_fits_on_one_screen() {
    let factory = TestFactory::new(
        "[slots.a]\ntarget = \"TARGET\"\nconflicts_with_slots = [\"b\"]\n[slots.b]\ntarget = \"TARGET\"\n",
    )
    .await;
    answering(&factory).await;
    let text = done(&factory, &["status"]);
    for part in [
        "server",
        &factory.url(),
        "reachable for",
        "helper",
        "SLOT",
        "free",
        "jobs     taken",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains('\x1b'), "colours are for terminals: {text:?}");
    let job = factory.start_blocking_job().await;
    let text = done(&factory, &["status"]);
    assert!(
        text.contains(&job.to_string()) && text.contains("busy") && text.contains("blocked"),
        "{text}"
    );
    assert!(
        text.contains("conflicts with a") || text.contains("conflicts with b"),
        "{text}"
    );
    factory.release();
    factory.wait_completed(job).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_watched_while_it_runs() {
    let factory = TestFactory::new(ONE).await;
    let job = factory.start_blocking_job().await;
    let worker = online(&factory).await;
    let list = done(&factory, &["workers"]);
    for part in [
        &*worker,
        "online",
        &job.to_string(),
        &format!("bmat-{}", worker.to_lowercase()),
    ] {
        assert!(list.contains(part), "{part}: {list}");
    }
    let shown = json(&factory, &["show", &worker]);
    assert_eq!(shown["worker"]["phase"], "online");
    let phases: Vec<&str> = shown["history"]
        .as_array()
        .unwrap()
        .iter()
        .map(|step| step["phase"].as_str().unwrap())
        .collect();
    assert_eq!(phases, ["reserved", "created", "running", "online"]);
    let processes = shown["processes"].as_array().unwrap();
    assert!(processes.iter().any(|p| p["name"] == "bash"), "{shown:#}");
    assert!(shown["memory"].as_u64().unwrap() > 100_000, "{shown:#}");
    let text = done(&factory, &["show", &worker]);
    for part in ["phase      online for", "NAME", "its job runs"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    factory.release();
    factory.wait_completed(job).await;
    factory.finish().await;
}

/// An agent that says something each time a file of the host changes.
const TALKER: &str = "#!/bin/bash\necho begun; printf '\\033[31mred\\n'; while ! [ -e RELEASE ]; do sleep 0.1; done; echo over; exit 3\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_console_is_followed_to_its_end_and_its_escapes_are_only_for_files() {
    let place = create_shared_dir();
    let (agent, release) = (place.path().join("agent"), place.path().join("release"));
    std::fs::write(&agent, TALKER.replace("RELEASE", &release.display().to_string())).unwrap();
    let factory = TestFactory::with_agent(ONE, agent).await;
    factory.submit("true");
    let worker = worker_on(&factory, "a").await;
    see(&factory, |status| {
        (status["workers"][0]["phase"] == "running").then_some(())
    })
    .await;
    tokio::task::block_in_place(|| {
        let mut following = Running::start_logging_stdout(&mut command(&factory, &["logs", "-f", &worker]));
        following.log.wait(&["\x1b[31mred"]);
        std::fs::write(&release, "").unwrap();
        following.log.wait(&["over"]);
        assert!(following.wait().success());
    });
    assert!(done(&factory, &["logs", &worker]).contains("begun\n"));
    // On a terminal, which script(1) makes, the escape is shown and not obeyed.
    let typed = format!(
        "{} logs {worker} --root {}",
        binaries().join("user-factory").display(),
        factory.host.root.display()
    );
    let script = Command::new("script")
        .args(["-qec", &typed, "/dev/null"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let seen = String::from_utf8_lossy(&script.stdout);
    assert!(
        seen.contains("\\u{1b}[31mred") && !seen.contains("\x1b[31mred"),
        "{seen:?}"
    );
    see(&factory, |status| {
        (state_of(status, "a") == "broken").then_some(())
    })
    .await;
    done(&factory, &["destroy", &worker, "--yes"]);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_waits_for_what_runs_takes_nothing_new_and_is_undone() {
    let mut factory = TestFactory::new(TWO).await;
    let job = factory.start_blocking_job().await;
    let mut drain = Running::start(&mut command(&factory, &["drain", "--wait"]));
    tokio::task::block_in_place(|| drain.log.wait(&["waiting for", &job.to_string()]));
    let second = factory.submit("true");
    factory.wait_polls(3).await;
    assert_eq!(factory.server.job(second).state(), "queued");
    assert!(done(&factory, &["status"]).contains("draining"));
    factory.release();
    factory.wait_completed(job).await;
    assert!(tokio::task::block_in_place(|| drain.wait()).success());
    assert_eq!(json(&factory, &["workers"]).as_array().unwrap().len(), 0);
    // The kernel update: supervisor and helper end, and come back.
    factory.end_helper(Signal::SIGTERM);
    factory.end_supervisor(Signal::SIGTERM);
    assert_eq!(run_command(&factory, &["status"]).status, 3);
    factory.helper = factory.host.start_helper();
    factory.supervisor = factory.host.start_supervisor();
    see(&factory, |status| (status["draining"] == true).then_some(())).await;
    factory.wait_polls(3).await;
    assert_eq!(factory.server.job(second).state(), "queued");
    done(&factory, &["resume"]);
    factory.wait_completed(second).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_says_why_outlives_a_restart_and_ends_by_itself() {
    let mut factory = TestFactory::new(TWO).await;
    answering(&factory).await;
    // Long enough for a restart, on a busy machine too.
    done(&factory, &["drain", "--reason", "new kernel", "--until", "20s"]);
    done(
        &factory,
        &["drain", "b", "--reason", "new probe", "--until", "1h"],
    );
    factory.end_supervisor(Signal::SIGTERM);
    factory.supervisor = factory.host.start_supervisor();
    answering(&factory).await;
    let status = json(&factory, &["status"]);
    assert_eq!(status["draining"], true, "{status:#}");
    let drains = status["drains"].as_array().unwrap();
    let of = |slot: Option<&str>| {
        drains
            .iter()
            .find(|drain| drain["slot"].as_str() == slot)
            .unwrap()
    };
    assert_eq!(of(None)["reason"], "new kernel");
    assert_eq!(of(Some("b"))["reason"], "new probe");
    let why = status["not_taken"].as_str().unwrap();
    assert!(
        why.contains("drained (new kernel, until ") && why.contains(of(None)["until"].as_str().unwrap()),
        "{why}"
    );
    let text = done(&factory, &["status"]);
    assert!(
        text.contains("draining (new kernel, until ") && text.contains("new probe, until"),
        "{text}"
    );
    let jobs = [factory.submit_blocking(), factory.submit("true")];
    factory.wait_polls(2).await;
    assert_eq!(factory.server.job(jobs[0]).state(), "queued");
    // Its end comes, and that of slot b is far away.
    factory.wait_for_line(jobs[0], "running").await;
    factory.wait_for_log(&["the drain of all slots has come to its end"]);
    factory.wait_polls(2).await;
    assert_eq!(factory.server.job(jobs[1]).state(), "queued");
    let status = json(&factory, &["status"]);
    assert_eq!(
        (&status["draining"], state_of(&status, "b")),
        (&Value::Bool(false), "draining".into())
    );
    done(&factory, &["resume", "b"]);
    factory.wait_completed(jobs[1]).await;
    factory.release();
    factory.wait_completed(jobs[0]).await;
    for (args, status, part) in [
        (["drain", "--until", "yesterday"], 2, "no time and no duration"),
        (
            ["drain", "--until", "2020-01-01T00:00:00Z"],
            1,
            "has passed already",
        ),
        (["drain", "--reason", "two\nlines"], 1, "in one line"),
    ] {
        let result = run_command(&factory, &args);
        result.failed(status, &[part]);
    }
    assert_eq!(json(&factory, &["status"])["draining"], false);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_slot_is_drained_and_the_other_goes_on() {
    let factory = TestFactory::new(TWO).await;
    answering(&factory).await;
    done(&factory, &["drain", "a"]);
    see(&factory, |status| {
        (state_of(status, "a") == "draining").then_some(())
    })
    .await;
    let jobs: Vec<_> = (0..2).map(|_| factory.submit_blocking()).collect();
    factory.wait_for_line(jobs[0], "running").await;
    factory.wait_polls(3).await;
    let status = json(&factory, &["status"]);
    assert_eq!(
        (state_of(&status, "a"), state_of(&status, "b")),
        ("draining".into(), "busy".into())
    );
    done(&factory, &["resume", "a"]);
    factory.wait_for_line(jobs[1], "running").await;
    factory.release();
    for job in jobs {
        factory.wait_completed(job).await;
    }
    let result = run_command(&factory, &["drain", "zz"]);
    result.failed(1, &["no slot zz"]);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_without_a_supervisor_names_the_socket_and_exits_with_3() {
    let mut factory = TestFactory::new(ONE).await;
    answering(&factory).await;
    factory.end_supervisor(Signal::SIGTERM);
    for args in [
        &["status"][..],
        &["workers"],
        &["drain"],
        &["reload"],
        &["show", "01HZX3N8Q4J5K6M7P8R9S0T1V2"],
    ] {
        let result = run_command(&factory, args);
        assert_eq!(result.status, 3, "{args:?}");
        assert!(
            result.err.contains("control.sock") && result.err.contains("user-factory serve"),
            "{}",
            result.err
        );
    }
    assert_eq!(run_command(&factory, &["show", "nonsense"]).status, 2);
    assert_eq!(run_command(&factory, &["colour"]).status, 2);
    factory.supervisor = factory.host.start_supervisor();
    answering(&factory).await;
    let result = run_command(&factory, &["show", "01HZX3N8Q4J5K6M7P8R9S0T1V2"]);
    result.failed(1, &["no worker 01HZX3N8Q4J5K6M7P8R9S0T1V2"]);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_control_socket_is_for_its_user_its_group_and_root_alone() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let factory = TestFactory::new(ONE).await;
    answering(&factory).await;
    let meta = std::fs::metadata(socket(&factory)).unwrap();
    assert_eq!(
        (meta.uid(), meta.permissions().mode() & 0o777),
        (testbed::harness::SUPERVISOR_UID, 0o660)
    );
    let result = run_command_as_nobody(&factory, &["status"]);
    result.failed(3, &["ermission denied"]);
    factory.finish().await;
}
