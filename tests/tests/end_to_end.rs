//! Jobs from the queue to the end, through the real binaries: the stand-in server, the supervisor as an
//! unprivileged user, the helper as root, the reference agent in its sandbox. Needs root.

#[path = "end_to_end/alone.rs"]
mod alone;
#[path = "end_to_end/proxied.rs"]
mod proxied;

use nix::sys::signal::Signal;
use testbed::census::processes_of;
use testbed::harness::{PATIENCE, SUPERVISOR_UID};
use testbed::house::{House, ONE, TWO, lines};
use testbed::server::{Down, JobSpec, Ulid};

#[tokio::test(flavor = "multi_thread")]
async fn a_job_runs_streams_uploads_and_leaves_nothing() {
    let house = House::new(ONE).await;
    let mut spec = JobSpec::script(
        "linux",
        "cat /input/in.txt; echo $COLOUR; whoami; pwd; echo oops >&2; tr a-z A-Z < /input/in.txt > /work/out.txt",
    );
    spec.inputs = vec![("in.txt".into(), "words\n".into())];
    spec.output_rules = vec!["/work/*.txt".into()];
    let job = house.server.submit_job(spec).unwrap();
    let done = house.ended(job).await;
    assert_eq!(done.state(), "completed", "{:#?}", done.events);
    let user = format!("bmat-{}", done.worker.unwrap().to_string().to_lowercase());
    assert_eq!(lines(&done, "stdout"), ["words", "red", &user, "/work"]);
    // bash may warn of a locale that this host lacks before it.
    assert_eq!(lines(&done, "stderr").last().map(String::as_str), Some("oops"));
    assert_eq!(house.server.output(job, "/work/out.txt").unwrap(), "WORDS\n");
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_fails_is_failed_and_its_worker_recycled() {
    let house = House::new(ONE).await;
    let done = house.submit("exit 3");
    assert_eq!(house.ended(done).await.state(), "failed");
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_slots_run_two_jobs_at_once_and_a_third_waits() {
    let house = House::new(TWO).await;
    // Each waits for a word that only this test gives, by ending it.
    let jobs: Vec<Ulid> = (0..3)
        .map(|_| house.submit("echo running; while ! [ -e /work/stop ]; do read -t 1 < <(sleep 2); done"))
        .collect();
    house.printed(jobs[0], "running").await;
    house.printed(jobs[1], "running").await;
    assert!(house.server.job(jobs[2]).queued());
    house.server.cancel(jobs[0]).unwrap();
    house.printed(jobs[2], "running").await;
    for job in &jobs[1..] {
        house.server.cancel(*job).unwrap();
    }
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn conflicting_slots_take_turns() {
    let house = House::new(
        "[slots.a]\ntarget = \"TARGET\"\n[slots.b]\ntarget = \"TARGET\"\nconflicts_with_slots = [\"a\"]\n",
    )
    .await;
    let jobs: Vec<Ulid> = (0..4).map(|_| house.submit("echo once")).collect();
    let alive =
        |state: &testbed::server::State| state.workers.values().filter(|worker| !worker.deleted).count();
    // Looked at after every change: never two.
    let never_two = |state: &testbed::server::State| {
        assert!(
            alive(state) <= 1,
            "conflicting slots have workers at the same time"
        );
        jobs.iter().all(|job| state.jobs[job].complete()).then_some(())
    };
    house.server.wait_for(PATIENCE, never_two).await.unwrap();
    assert!(
        jobs.iter()
            .all(|job| house.server.job(*job).state() == "completed")
    );
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_job_is_ended_and_cleaned_up() {
    let house = House::new(ONE).await;
    let job = house.submit("echo running; sleep 1000");
    house.printed(job, "running").await;
    house.server.cancel(job).unwrap();
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_held_worker_stays_as_it_is_until_it_is_released() {
    let house = House::new(ONE).await;
    let job = house.submit("echo running; sleep 1000");
    house.printed(job, "running").await;
    let worker = house.server.job(job).worker.unwrap();
    house.server.hold(worker).unwrap();
    house.server.recycle(worker).unwrap();
    // Two looks of the factory later, it is all still there.
    let polls = house.server.requests("GET /0/factory/workers");
    house
        .server
        .wait_for(PATIENCE, |_| {
            (house.server.requests("GET /0/factory/workers") > polls + 2).then_some(())
        })
        .await
        .unwrap();
    assert!(
        !processes_of(&house.host.uids).is_empty(),
        "a held worker was touched"
    );
    house.server.release(worker).unwrap();
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_no_program_breaks_the_worker_with_the_reason_in_the_jobs_log() {
    let directory = tempfile::tempdir().unwrap();
    let agent = directory.path().join("agent");
    std::fs::write(&agent, b"\x7fthis is no program").unwrap();
    let house = House::with_agent(ONE, agent).await;
    let job = house.submit("echo never");
    let done = house.ended(job).await;
    assert_eq!(done.state(), "failed");
    let console = lines(&done, "console").join("\n");
    assert!(console.contains("Exec format error"), "{console}");
    // Held for a person; released, it goes.
    let held = house.server.worker(done.worker.unwrap());
    assert!(
        held.hold
            .is_some_and(|hold| hold.reason.contains("Exec format error"))
    );
    house.server.release(held.id).unwrap();
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_dies_at_start_breaks_the_worker_with_its_last_words() {
    let directory = tempfile::tempdir().unwrap();
    let agent = directory.path().join("agent");
    std::fs::write(&agent, "#!/bin/bash\necho my last words\nexit 9\n").unwrap();
    let house = House::with_agent(ONE, agent).await;
    let job = house.submit("echo never");
    let done = house.ended(job).await;
    assert_eq!(done.state(), "failed");
    assert!(
        lines(&done, "console").iter().any(|line| line == "my last words"),
        "{:#?}",
        done.events
    );
    let held = house.server.worker(done.worker.unwrap());
    assert!(
        held.hold
            .as_ref()
            .is_some_and(|hold| hold.reason.contains("status 9")),
        "{held:?}"
    );
    house.server.release(held.id).unwrap();
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_never_bootstraps_is_timed_out() {
    let directory = tempfile::tempdir().unwrap();
    let agent = directory.path().join("agent");
    std::fs::write(
        &agent,
        "#!/bin/bash\necho waiting for ever\nsleep 1000 & exit 0\n",
    )
    .unwrap();
    let house = House::with_agent(&format!("online_timeout_seconds = 5\n{ONE}"), agent).await;
    let job = house.submit("echo never");
    let done = house.ended(job).await;
    assert_eq!(done.state(), "failed");
    assert!(
        lines(&done, "console")
            .iter()
            .any(|line| line == "waiting for ever"),
        "{:#?}",
        done.events
    );
    house.server.release(done.worker.unwrap()).unwrap();
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_job_leaves_behind_goes_with_it() {
    let house = House::new(ONE).await;
    let job = house.submit(
        r#"(setsid nohup sleep 1000 >/dev/null 2>&1 &)
        mkdir -p dark/er; touch dark/er/file $'odd\nname'; chmod 0 dark/er dark
        touch /tmp/x /var/tmp/x "$HOME/x" /dev/shm/x /opt/buildomat/x
        ipcmk -M 1000; ipcmk -Q; ipcmk -S 1; touch /dev/mqueue/x; echo left"#,
    );
    let done = house.ended(job).await;
    assert_eq!(done.state(), "completed", "{:#?}", done.events);
    let uids = house.host.uids.clone();
    house.finish().await;
    // Once, on the whole disk.
    let (above, below) = (format!("+{}", uids.start() - 1), format!("-{}", uids.end() + 1));
    let find = std::process::Command::new("find")
        .args([
            "/", "-xdev", "-uid", &above, "-uid", &below, "-not", "-path", "/proc/*",
        ])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&find.stdout), "", "files are left");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_supervisor_killed_and_restarted_finds_its_job_again() {
    let mut house = House::new(ONE).await;
    let job = house.submit(
        "echo running; while ! [ -e /tmp/go ]; do read -t 1 < <(sleep 2); touch /tmp/go; done; echo done",
    );
    house.printed(job, "running").await;
    house.supervisor.signal(Signal::SIGKILL);
    house.supervisor.wait();
    house.supervisor = house.host.supervisor();
    assert_eq!(house.ended(job).await.state(), "completed");
    assert_eq!(house.server.workers().len(), 1);
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_supervisor_told_to_stop_leaves_the_running_job_alone() {
    let mut house = House::new(ONE).await;
    let job = house.submit("echo running; read -t 3 < <(sleep 4); echo done");
    house.printed(job, "running").await;
    house.supervisor.signal(Signal::SIGTERM);
    assert!(house.supervisor.wait().success());
    house.printed(job, "done").await;
    house.supervisor = house.host.supervisor();
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_helper_killed_and_restarted_changes_nothing_for_the_job() {
    let mut house = House::new(ONE).await;
    let job = house.submit("echo running; read -t 3 < <(sleep 4); echo done");
    house.printed(job, "running").await;
    house.helper.signal(Signal::SIGKILL);
    house.helper.wait();
    house.helper = house.host.helper();
    assert_eq!(house.ended(job).await.state(), "completed");
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_down_for_a_while_loses_nothing() {
    let house = House::new(ONE).await;
    let job = house.submit("echo running; read -t 2 < <(sleep 4); echo done");
    house.printed(job, "running").await;
    for down in [Down::Unavailable, Down::Closed] {
        for (state, line) in [(down, "server away"), (Down::No, "server back")] {
            let seen = house.supervisor.log.len();
            house.server.set_down(state);
            tokio::task::block_in_place(|| house.supervisor.log.wait_from(seen, &[line]));
        }
    }
    assert_eq!(house.ended(job).await.state(), "completed");
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_removed_while_its_worker_lives_is_still_cleaned_up() {
    let mut house = House::new(TWO).await;
    let job = house.submit("echo running; sleep 1000");
    house.printed(job, "running").await;
    let slot = house
        .server
        .worker(house.server.job(job).worker.unwrap())
        .private
        .unwrap();
    let slot = slot.split('@').next().unwrap();
    let target = house.server.job(job).target;
    let other = if slot == "a" { "b" } else { "a" };
    house.supervisor.signal(Signal::SIGTERM);
    house.supervisor.wait();
    house.host.configure(
        &house.server.url(),
        SUPERVISOR_UID,
        &format!("[slots.{other}]\ntarget = \"{target}\"\n"),
    );
    house.supervisor = house.host.supervisor();
    house.server.cancel(job).unwrap();
    house.finish().await;
}
