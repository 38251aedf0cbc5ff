//! Group F: row 71, secrets in the places where other users of the host look for them.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;
use testbed::certificates::{Certificates, EXPIRED, VALID};
use testbed::fake_server::{JobSpec, Server, ServerOptions};
use testbed::harness::{
    Running, SUPERVISOR_UID, TEST_TIMEOUT, TestHost, binaries, sealed_memfd, tool, until,
};
use testbed::host_snapshot::HostSnapshot;
use testbed::test_factory::{ONE, TestFactory};
use testbed::test_helper::{TestHelper, create_worker, install, run, token, wait_for_line};

use super::SOMEBODY;

/// What this user can read at these paths, one after the other: nothing, if it may not.
fn read_as<P: AsRef<OsStr>>(uid: u32, paths: impl IntoIterator<Item = P>) -> Vec<u8> {
    let mut command = Command::new("cat");
    command
        .args(paths)
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

fn processes() -> Vec<String> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let names = all.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names
        .filter(|name| name.bytes().all(|b| b.is_ascii_digit()))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn row_71_the_factorys_token_is_nowhere_that_others_can_read() {
    let agent = Some(binaries().join("fake-agent"));
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
    let before = HostSnapshot::take(&host);
    let helper = host.start_helper();
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
    let looked = |state: &testbed::fake_server::State| {
        state.jobs[&job]
            .events
            .iter()
            .any(|event| event.payload.ends_with("looked"))
            .then_some(())
    };
    server
        .wait_for(TEST_TIMEOUT, looked)
        .await
        .unwrap_or_else(|e| panic!("{e:#}\n{}", supervisor.log.text()));

    // The processes, as another user sees them.
    let files = ["cmdline", "environ", "comm", "status", "maps", "stack", "auxv"];
    for file in files {
        let of_all = processes().into_iter().map(|pid| format!("/proc/{pid}/{file}"));
        assert!(
            !has(&read_as(SOMEBODY, of_all), &token),
            "the token is in {file} of a process"
        );
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
            read_as(reader, [&path]).is_empty(),
            "uid {reader} reads {}",
            path.display()
        );
    }
    // What the job itself has seen, and what supervisor and helper have printed, at their most verbose.
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
        let content = read_as(SOMEBODY, [entry.path()]);
        assert!(!has(&content, &token), "{} has the token", entry.path().display());
        assert!(
            meta.uid() == SUPERVISOR_UID,
            "{} is another user's",
            entry.path().display()
        );
    }

    server.cancel(job).unwrap();
    let gone = |state: &testbed::fake_server::State| {
        state.workers.values().all(|worker| worker.deleted).then_some(())
    };
    server
        .wait_for(TEST_TIMEOUT, gone)
        .await
        .unwrap_or_else(|e| panic!("{e:#}\n{}", supervisor.log.text()));
    drop((supervisor, helper));
    before.assert_unchanged(&host);
}

/// A worker's bootstrap token is an argument of its agent, as the real one wants it, and good for one use. Users
/// of the host see it in the process list while `install` runs, unless `/proc` is mounted with `hidepid`; no job
/// and no log does.
#[test]
fn row_71_a_bootstrap_token_is_in_no_log_and_no_other_jobs_sight() {
    let test = TestHelper::new();
    let client = test.client();
    let script = b"#!/bin/bash\necho \"$*\" > $HOME/kept; echo ready; exec sleep 424242\n";
    let worker = create_worker(&client, "a");
    let (_, console) = install(&client, worker, sealed_memfd(script));
    wait_for_line(&console.unwrap(), "ready");
    let other = create_worker(&client, "c");
    let looks =
        "cat /proc/*/cmdline; ls /home/*/kept /proc/*/root/home/*/kept && echo 424242; ps -ef; echo looked";
    let (_, seen) = run(&client, other, looks);
    // All tokens of this test are the same, so what is looked for is the process beside it.
    assert!(
        seen.contains("looked") && !seen.contains("424242"),
        "another job is seen: {seen}"
    );
    let secret = token();
    let processes = testbed::host_snapshot::processes_of(&test.host.uids);
    let stays = processes.iter().filter(|process| process.ends_with("sleep"));
    assert_eq!(stays.clone().count(), 1, "{processes:?}");
    for process in stays {
        let pid = process.split(' ').next().unwrap();
        let of = |file: &str| read_as(SOMEBODY, [Path::new("/proc").join(pid).join(file)]);
        assert!(!of("stat").is_empty(), "nothing can be read at all");
        for file in ["environ", "maps", "mem", "root/etc/passwd", "cwd/etc/passwd"] {
            assert!(of(file).is_empty(), "{file} of process {pid} is open to others");
        }
    }
    assert!(
        !test.helper.log.text().contains(secret.as_str()),
        "the token is in the log"
    );
    test.finish(&[worker, other]);
}

/// The supervisor with this credential, as systemd passes one.
fn with_credential(host: &TestHost, token: &str) -> Running {
    let directory = host.root.join("credentials");
    let credential = directory.join("token");
    fs::create_dir_all(&directory).unwrap();
    fs::write(&credential, token).unwrap();
    fs::set_permissions(&credential, fs::Permissions::from_mode(0o400)).unwrap();
    chown(&credential, Some(SUPERVISOR_UID), None).unwrap();
    Running::start(host.supervisor_command().env("CREDENTIALS_DIRECTORY", directory))
}

/// What `user-factory` says, and whether it was done.
fn command(host: &TestHost, words: &[&str]) -> (bool, String) {
    let mut command = Command::new(binaries().join("user-factory"));
    let output = command
        .args(words)
        .arg("--root")
        .arg(&host.root)
        .output()
        .unwrap();
    let printed = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(printed).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn row_106_check_says_which_of_two_tokens_is_used_and_two_that_differ_are_refused() {
    let mut factory = TestFactory::new(ONE).await;
    let (host, file) = (&factory.host, factory.host.root.join("token"));
    let token = fs::read_to_string(&file).unwrap();
    let config = host
        .root
        .join(protocol::config::CONFIG_PATH)
        .display()
        .to_string();
    let shown = |place: &str| {
        let (_, printed) = command(host, &["status"]);
        assert!(printed.contains(&format!("token    of {place}")), "{printed}");
    };
    factory.wait_for_log(&["INFO supervisor started", "token=the file "]);
    factory.wait_for_log(&["INFO control socket open"]);
    shown("the file ");
    let (_, printed) = command(host, &["check", &config]);
    assert!(
        printed.contains(&format!("token of the file {}", file.display())),
        "{printed}"
    );

    // The same in both: the credential, and it is said.
    factory.end_supervisor(Signal::SIGTERM);
    factory.supervisor = with_credential(&factory.host, &token);
    factory.wait_for_log(&["INFO supervisor started", "token=the credential "]);
    factory
        .wait_completed(factory.submit("echo with a credential"))
        .await;
    let host = &factory.host;
    let shown = |place: &str| {
        let (_, printed) = command(host, &["status"]);
        assert!(printed.contains(&format!("token    of {place}")), "{printed}");
    };
    shown("the credential ");
    // A new one in the file alone is not silently left aside.
    host.write_token("another-token");
    let (done, printed) = command(host, &["reload"]);
    assert!(!done && printed.contains("hold different tokens"), "{printed}");
    factory.wait_completed(factory.submit("echo as before")).await;

    // What systemd has passed to the unit is what `check` looks at.
    let of_the_unit = host.root.join("run/credentials/buildomat-user-factory.service");
    fs::create_dir_all(&of_the_unit).unwrap();
    fs::write(of_the_unit.join("token"), &token).unwrap();
    fs::set_permissions(of_the_unit.join("token"), fs::Permissions::from_mode(0o400)).unwrap();
    let (done, printed) = command(host, &["check", &config]);
    assert!(
        !done && printed.contains("config.toml:5: ") && printed.contains("hold different tokens"),
        "{printed}"
    );
    fs::remove_dir_all(host.root.join("run/credentials")).unwrap();

    factory.end_supervisor(Signal::SIGTERM);
    let mut refuses = with_credential(&factory.host, &token);
    assert!(!refuses.wait().success());
    // Its end may be known before its last words.
    refuses.log.wait(&["hold different tokens"]);
    let text = refuses.log.text();
    assert_eq!(text.matches("hold different tokens").count(), 1, "{text}");
    assert!(
        !text.contains(&token) && !text.contains("another-token"),
        "{text}"
    );
    // The right one in the file, and it is taken without a restart.
    factory.host.write_token("wrong-token");
    factory.supervisor = factory.host.start_supervisor();
    factory.wait_for_log(&["refused with 401"]);
    factory.host.write_token(&token);
    let (done, printed) = command(&factory.host, &["reload"]);
    assert!(done, "{printed}");
    factory.wait_for_log(&["a new token is in use, of the file "]);
    factory.wait_for_log(&["server back"]);
    factory
        .wait_completed(factory.submit("echo with the new one"))
        .await;
    fs::remove_dir_all(factory.host.root.join("credentials")).unwrap();
    factory.finish().await;
}

const SLOT: &str = "[slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n";

#[test]
fn row_107_a_proxy_in_the_environment_is_not_used_and_one_in_the_configuration_is() {
    let host = TestHost::new();
    let proxy = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", proxy.local_addr().unwrap());
    host.write_token("the-token");
    host.configure("http://127.0.0.1:9", SUPERVISOR_UID, SLOT);
    let config = host.root.join(protocol::config::CONFIG_PATH);
    let check = || {
        let mut command = Command::new(binaries().join("user-factory"));
        command.arg("check").arg(&config).arg("--online");
        command.arg("--root").arg(&host.root);
        for name in ["http_proxy", "https_proxy", "all_proxy"] {
            command.env(name, &address).env(name.to_uppercase(), &address);
        }
        command.env_remove("no_proxy").env_remove("NO_PROXY");
        command
    };
    let output = check().output().unwrap();
    assert!(!output.status.success());
    proxy.set_nonblocking(true).unwrap();
    assert!(proxy.accept().is_err(), "the environment's proxy was asked");
    // It may be trusted, where the configuration says so.
    let text = fs::read_to_string(&config).unwrap();
    let text = text.replacen("[factory]", &format!("proxy = \"{address}\"\n[factory]"), 1);
    fs::write(&config, &text).unwrap();
    let _check = Running::start_logging_stdout(&mut check());
    let accept = || {
        proxy
            .accept()
            .map_err(|error| format!("the proxy is not asked: {error}"))
    };
    let (stream, _) = until(accept);
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(TEST_TIMEOUT)).unwrap();
    let mut head = BufReader::new(stream).lines().map_while(Result::ok);
    let first = head.next().unwrap();
    assert!(first.starts_with("GET http://127.0.0.1:9/"), "{first}");
    // Unencrypted, it takes a key to let it see the token.
    fs::write(&config, text.replace("allow_http = true", "allow_http = false")).unwrap();
    let output = check().output().unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(
        !output.status.success() && printed.contains("would see the factory's token"),
        "{printed}"
    );
}

/// A server with a certificate for this name, valid in this time. It prints what it is sent.
fn tls_server(certificates: &Certificates, name: &str, time: [&str; 2]) -> (Running, String) {
    certificates.issue(&[name], time);
    let mut command = Command::new(tool("openssl"));
    command
        .args("s_server -accept localhost:0 -cert s.pem -key s.key".split(' '))
        .current_dir(certificates.directory())
        .stderr(Stdio::null());
    // It ends where there is nothing more to read.
    let server = Running::start_logging_stdout_with(&mut command, Stdio::piped());
    let line = server.log.wait(&["ACCEPT "]);
    let (_, port) = line.rsplit_once(':').unwrap();
    let url = format!("https://localhost:{port}");
    (server, url)
}

#[test]
fn row_113_only_a_server_with_a_certificate_that_is_trusted_and_names_it_gets_the_token() {
    let host = TestHost::new();
    let certificates = Certificates::new();
    let check = |url: &str, authority: Option<&str>| {
        host.configure(url, SUPERVISOR_UID, SLOT);
        host.write_token("the-token");
        let mut command = Command::new(binaries().join("user-factory"));
        command
            .arg("check")
            .arg(host.root.join(protocol::config::CONFIG_PATH))
            .arg("--online")
            .arg("--root")
            .arg(&host.root)
            .env_remove("SSL_CERT_FILE")
            .env_remove("SSL_CERT_DIR");
        if let Some(name) = authority {
            command.env("SSL_CERT_FILE", certificates.path(name));
        }
        command
    };
    for (what, name, time, authority, why) in [
        ("untrusted", "localhost", VALID, None, "UnknownIssuer"),
        (
            "another name",
            "ci.example.com",
            VALID,
            Some("ca.pem"),
            "not valid for name",
        ),
        (
            "expired",
            "localhost",
            EXPIRED,
            Some("ca.pem"),
            "certificate expired",
        ),
    ] {
        let (server, url) = tls_server(&certificates, name, time);
        let output = check(&url, authority).output().unwrap();
        let printed = String::from_utf8(output.stdout).unwrap();
        assert!(
            !output.status.success() && printed.contains("invalid peer certificate") && printed.contains(why),
            "{what}: {printed}"
        );
        assert!(!server.log.text().contains("the-token"), "{what}");
    }
    // A private authority is one that SSL_CERT_FILE names; this server never answers.
    let (server, url) = tls_server(&certificates, "localhost", VALID);
    let _check = Running::start_logging_stdout(&mut check(&url, Some("ca.pem")));
    server.log.wait(&["authorization: Bearer the-token"]);
}
