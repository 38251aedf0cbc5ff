//! Group F: row 71, secrets in the places where other users of the host look for them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use testbed::census::Census;
use testbed::harness::{PATIENCE, Running, SUPERVISOR_UID, TestHost, binaries, sealed};
use testbed::server::{JobSpec, Server, ServerOptions};
use testbed::stage::{Stage, created, install, run, token, wait_for_line};

/// A user of the host who has nothing to do with the factory.
const SOMEBODY: u32 = 0x6fff_0001;

/// What this user can read at `path`: nothing, if it may not.
fn read_as(uid: u32, path: &Path) -> Vec<u8> {
    let mut command = Command::new("cat");
    command
        .arg(path)
        .uid(uid)
        .gid(uid)
        .current_dir("/")
        .stderr(Stdio::null());
    command.output().expect("cat can be started").stdout
}

fn has(bytes: &[u8], secret: &str) -> bool {
    bytes
        .windows(secret.len())
        .any(|window| window == secret.as_bytes())
}

/// All processes but those of this test's own program.
fn processes() -> Vec<String> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let names = all.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names
        .filter(|name| name.bytes().all(|b| b.is_ascii_digit()))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn row_71_the_factorys_token_as_others_see_the_host() {
    let agent = Some(binaries().join("reference-agent"));
    let options = ServerOptions {
        agent,
        ..ServerOptions::default()
    };
    let server = Server::start(options).await.unwrap();
    let target = server.add_target("linux");
    let (_, token) = server.add_factory("here");
    let host = TestHost::new();
    host.configure(
        &server.url(),
        SUPERVISOR_UID,
        &format!("[slots.a]\ntarget = \"{target}\"\n"),
    );
    host.write_token(&token);
    let before = Census::take(&host);
    let helper = host.helper();
    // Everything that it would ever say.
    let mut command = Command::new(binaries().join("user-factory"));
    command
        .args(["serve", "--log-level", "trace", "--root"])
        .arg(&host.root);
    let supervisor = Running::start(command.uid(SUPERVISOR_UID).gid(SUPERVISOR_UID));

    let job = server
        .submit_job(JobSpec::script(
            "linux",
            "env; cat /proc/*/cmdline; echo looked; sleep 1000",
        ))
        .unwrap();
    let looked = |state: &testbed::server::State| {
        state.jobs[&job]
            .events
            .iter()
            .any(|event| event.payload.ends_with("looked"))
            .then_some(())
    };
    server
        .wait_for(PATIENCE, looked)
        .await
        .unwrap_or_else(|e| panic!("{e:#}\n{}", supervisor.log.text()));

    // The processes, as somebody else sees them.
    for pid in processes() {
        for file in ["cmdline", "environ", "comm", "status", "maps", "stack", "auxv"] {
            let path = Path::new("/proc").join(&pid).join(file);
            assert!(
                !has(&read_as(SOMEBODY, &path), &token),
                "the token is in {}",
                path.display()
            );
        }
    }
    // Its own environment and command line do not have it even for itself.
    let own = Path::new("/proc").join(supervisor.pid().to_string());
    for file in ["cmdline", "environ"] {
        assert!(
            !has(&fs::read(own.join(file)).unwrap(), &token),
            "the token is in {file}"
        );
    }
    for (reader, path) in [
        (SOMEBODY, host.root.join("token")),
        (*host.uids.start(), host.root.join("token")),
        (SOMEBODY, own.join("environ")),
        (SOMEBODY, own.join("mem")),
        (SOMEBODY, own.join("maps")),
    ] {
        assert!(
            read_as(reader, &path).is_empty(),
            "uid {reader} reads {}",
            path.display()
        );
    }
    // What the job itself has seen, and what both halves have printed, at their most talkative.
    let seen = format!("{:?}", server.events(job));
    for (what, text) in [
        ("job", seen),
        ("supervisor", supervisor.log.text()),
        ("helper", helper.log.text()),
    ] {
        assert!(!text.contains(&token), "the token is in what the {what} printed");
    }
    assert!(
        supervisor.log.text().contains("TRACE") || supervisor.log.text().contains("DEBUG"),
        "it said little"
    );
    // The supervisor's files are its own to read.
    let state = host.root.join(protocol::config::STATE_DIR).join("supervisor");
    for entry in fs::read_dir(&state).unwrap().flatten() {
        let meta = entry.metadata().unwrap();
        let content = read_as(SOMEBODY, &entry.path());
        assert!(!has(&content, &token), "{} has the token", entry.path().display());
        assert!(
            meta.uid() == SUPERVISOR_UID,
            "{} is somebody else's",
            entry.path().display()
        );
    }

    server.cancel(job).unwrap();
    let gone =
        |state: &testbed::server::State| state.workers.values().all(|worker| worker.deleted).then_some(());
    server
        .wait_for(PATIENCE, gone)
        .await
        .unwrap_or_else(|e| panic!("{e:#}\n{}", supervisor.log.text()));
    drop((supervisor, helper));
    before.assert_unchanged(&host);
}

/// A worker's bootstrap token is an argument of its agent, as the real one wants it, and good for one use. Users
/// of the host see it in the process list while `install` runs, unless `/proc` is mounted with `hidepid`; no job
/// and no log does.
#[test]
fn row_71_a_bootstrap_token_as_logs_and_other_jobs_see_it() {
    let stage = Stage::new();
    let client = stage.client();
    let script = b"#!/bin/bash\necho \"$*\" > $HOME/kept; echo ready; exec sleep 424242\n";
    let worker = created(&client, "a");
    let (_, console) = install(&client, worker, sealed(script));
    wait_for_line(&console.unwrap(), "ready");
    let other = created(&client, "c");
    let looks =
        "cat /proc/*/cmdline; ls /home/*/kept /proc/*/root/home/*/kept && echo 424242; ps -ef; echo looked";
    let (_, seen) = run(&client, other, looks);
    // All tokens of this test are the same, so what is looked for is the process beside it.
    assert!(
        seen.contains("looked") && !seen.contains("424242"),
        "another job is seen: {seen}"
    );
    let secret = token();
    let processes = testbed::census::processes_of(&stage.host.uids);
    let stays = processes.iter().filter(|process| process.ends_with("sleep"));
    assert_eq!(stays.clone().count(), 1, "{processes:?}");
    for process in stays {
        let pid = process.split(' ').next().unwrap();
        let of = |file: &str| read_as(SOMEBODY, &Path::new("/proc").join(pid).join(file));
        assert!(!of("stat").is_empty(), "nothing can be read at all");
        for file in ["environ", "maps", "mem", "root/etc/passwd", "cwd/etc/passwd"] {
            assert!(of(file).is_empty(), "{file} of process {pid} is open to others");
        }
    }
    assert!(
        !stage.helper.log.text().contains(secret.as_str()),
        "the token is in the log"
    );
    stage.finish(&[worker, other]);
}
