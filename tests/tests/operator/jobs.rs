//! Watching a job run, finding out how one ended, draining for a kernel update, and bringing the host back.

use nix::sys::signal::Signal;
use testbed::harness::place;
use testbed::house::{ONE, TWO};

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_factory_that_is_well_says_so_on_one_screen() {
    let house = House::new(
        "[slots.a]\ntarget = \"TARGET\"\nconflicts_with_slots = [\"b\"]\n[slots.b]\ntarget = \"TARGET\"\n",
    )
    .await;
    answering(&house).await;
    let text = done(&house, &["status"]);
    for part in [
        "server",
        &house.url(),
        "reachable for",
        "helper",
        "SLOT",
        "free",
        "jobs     taken",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains('\x1b'), "colours are for terminals: {text:?}");
    let job = house.running().await;
    let text = done(&house, &["status"]);
    assert!(
        text.contains(&job.to_string()) && text.contains("busy") && text.contains("blocked"),
        "{text}"
    );
    assert!(
        text.contains("conflicts with a") || text.contains("conflicts with b"),
        "{text}"
    );
    house.let_end();
    house.completed(job).await;
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_watched_while_it_runs() {
    let house = House::new(ONE).await;
    let job = house.running().await;
    let worker = online(&house).await;
    let list = done(&house, &["workers"]);
    for part in [
        &*worker,
        "online",
        &job.to_string(),
        &format!("bmat-{}", worker.to_lowercase()),
    ] {
        assert!(list.contains(part), "{part}: {list}");
    }
    let shown = json(&house, &["show", &worker]);
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
    let text = done(&house, &["show", &worker]);
    for part in ["phase      online for", "NAME", "its job runs"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    house.let_end();
    house.completed(job).await;
    house.finish().await;
}

/// An agent that says something each time a file of the host changes.
const TALKER: &str = "#!/bin/bash\necho begun; printf '\\033[31mred\\n'; while ! [ -e DOOR ]; do read -t 0.1 < <(sleep 1); done; echo over; exit 3\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_console_is_followed_to_its_end_and_its_escapes_are_only_for_files() {
    let place = place();
    let (agent, door) = (place.path().join("agent"), place.path().join("door"));
    std::fs::write(&agent, TALKER.replace("DOOR", &door.display().to_string())).unwrap();
    let house = House::with_agent(ONE, agent).await;
    house.submit("true");
    let worker = worker_on(&house, "a").await;
    see(&house, |status| {
        (status["workers"][0]["phase"] == "running").then_some(())
    })
    .await;
    tokio::task::block_in_place(|| {
        let mut following = Running::printing(&mut command(&house, &["logs", "-f", &worker]));
        following.log.wait(&["\x1b[31mred"]);
        std::fs::write(&door, "").unwrap();
        following.log.wait(&["over"]);
        assert!(following.wait().success());
    });
    assert!(done(&house, &["logs", &worker]).contains("begun\n"));
    // On a terminal, which script(1) makes, the escape is shown and not obeyed.
    let words = format!(
        "{} logs {worker} --root {}",
        binaries().join("user-factory").display(),
        house.host.root.display()
    );
    let script = Command::new("script")
        .args(["-qec", &words, "/dev/null"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let seen = String::from_utf8_lossy(&script.stdout);
    assert!(
        seen.contains("\\u{1b}[31mred") && !seen.contains("\x1b[31mred"),
        "{seen:?}"
    );
    see(&house, |status| (state_of(status, "a") == "broken").then_some(())).await;
    done(&house, &["destroy", &worker, "--yes"]);
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn draining_waits_for_what_runs_takes_nothing_new_and_is_undone() {
    let mut house = House::new(TWO).await;
    let job = house.running().await;
    let mut drain = Running::start(&mut command(&house, &["drain", "--wait"]));
    tokio::task::block_in_place(|| drain.log.wait(&["waiting for", &job.to_string()]));
    let second = house.submit("true");
    house.polls(3).await;
    assert_eq!(house.server.job(second).state(), "queued");
    assert!(done(&house, &["status"]).contains("draining"));
    house.let_end();
    house.completed(job).await;
    assert!(tokio::task::block_in_place(|| drain.wait()).success());
    assert_eq!(json(&house, &["workers"]).as_array().unwrap().len(), 0);
    // The kernel update: both halves end, and come back.
    house.end_helper(Signal::SIGTERM);
    house.end_supervisor(Signal::SIGTERM);
    assert_eq!(say(&house, &["status"]).status, 3);
    house.helper = house.host.helper();
    house.supervisor = house.host.supervisor();
    see(&house, |status| (status["draining"] == true).then_some(())).await;
    house.polls(3).await;
    assert_eq!(house.server.job(second).state(), "queued");
    done(&house, &["resume"]);
    house.completed(second).await;
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_slot_is_drained_and_the_other_goes_on() {
    let house = House::new(TWO).await;
    answering(&house).await;
    done(&house, &["drain", "a"]);
    see(&house, |status| {
        (state_of(status, "a") == "draining").then_some(())
    })
    .await;
    let jobs: Vec<_> = (0..2).map(|_| house.submit_waiting()).collect();
    house.printed(jobs[0], "running").await;
    house.polls(3).await;
    let status = json(&house, &["status"]);
    assert_eq!(
        (state_of(&status, "a"), state_of(&status, "b")),
        ("draining".into(), "busy".into())
    );
    done(&house, &["resume", "a"]);
    house.printed(jobs[1], "running").await;
    house.let_end();
    for job in jobs {
        house.completed(job).await;
    }
    let said = say(&house, &["drain", "zz"]);
    assert!(
        said.status == 1 && said.err.contains("no slot zz"),
        "{}",
        said.err
    );
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_factory_the_command_says_whom_it_cannot_ask_and_ends_with_3() {
    let mut house = House::new(ONE).await;
    answering(&house).await;
    house.end_supervisor(Signal::SIGTERM);
    for words in [
        &["status"][..],
        &["workers"],
        &["drain"],
        &["reload"],
        &["show", "01HZX3N8Q4J5K6M7P8R9S0T1V2"],
    ] {
        let said = say(&house, words);
        assert_eq!(said.status, 3, "{words:?}");
        assert!(
            said.err.contains("control.sock") && said.err.contains("user-factory serve"),
            "{}",
            said.err
        );
    }
    assert_eq!(say(&house, &["show", "nonsense"]).status, 2);
    assert_eq!(say(&house, &["colour"]).status, 2);
    house.supervisor = house.host.supervisor();
    answering(&house).await;
    let said = say(&house, &["show", "01HZX3N8Q4J5K6M7P8R9S0T1V2"]);
    assert!(
        said.status == 1 && said.err.contains("no worker 01HZX3N8Q4J5K6M7P8R9S0T1V2"),
        "{}",
        said.err
    );
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_control_socket_is_for_its_user_its_group_and_root_alone() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::os::unix::process::CommandExt;
    let house = House::new(ONE).await;
    answering(&house).await;
    let meta = std::fs::metadata(socket(&house)).unwrap();
    assert_eq!(
        (meta.uid(), meta.permissions().mode() & 0o777),
        (testbed::harness::SUPERVISOR_UID, 0o660)
    );
    let said: Said = command(&house, &["status"])
        .uid(65_534)
        .gid(65_534)
        .output()
        .unwrap()
        .into();
    assert!(
        said.status == 3 && said.err.contains("ermission denied"),
        "{}",
        said.err
    );
    house.finish().await;
}
