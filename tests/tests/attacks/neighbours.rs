//! Group F: other users of the host, and what an operator left open to them.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use protocol::config::{CONFIG_PATH, PROXY_DIR, RUN_DIR, STATE_DIR};
use protocol::{ErrorKind, Reply, Request, State};
use testbed::harness::{Client, Running, SUPERVISOR_UID, TestHost, binaries, sealed_memfd, worker_id};
use testbed::host_snapshot::HostSnapshot;
use testbed::test_helper::{SLOTS, TestHelper, create, create_worker, install, kind, state, wait_for_line};

use super::SOMEBODY;

fn host() -> TestHost {
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", 0, SLOTS);
    host
}

/// Start a helper that must refuse to serve, and return what it says.
fn refuses(host: &TestHost) -> String {
    let mut command = Command::new(binaries().join("user-factory-helper"));
    let mut helper = Running::start(
        command
            .arg("--root")
            .arg(&host.root)
            .args(["--cgroup", &host.cgroup]),
    );
    helper.log.wait(&["ERROR"]);
    assert!(!helper.wait().success());
    helper.log.text()
}

fn places(host: &TestHost) -> [PathBuf; 4] {
    let config = host.root.join(CONFIG_PATH);
    let config = config.parent().unwrap().to_owned();
    [
        host.root.join(RUN_DIR),
        host.root.join(STATE_DIR).join("workers"),
        host.userdb(),
        config,
    ]
}

#[test]
fn row_68_a_directory_that_others_can_write_is_refused() {
    for number in 0..4 {
        let host = host();
        let place = &places(&host)[number];
        fs::create_dir_all(place).unwrap();
        for (owner, mode) in [(SOMEBODY, 0o755), (0, 0o777), (0, 0o775)] {
            chown(place, Some(owner), Some(owner)).unwrap();
            fs::set_permissions(place, Permissions::from_mode(mode)).unwrap();
            let log = refuses(&host);
            assert!(
                log.contains("nobody else can write"),
                "{}: {log}",
                place.display()
            );
        }
    }
}

#[test]
fn row_68_a_symbolic_link_in_place_of_a_directory_is_refused() {
    for number in 0..4 {
        let host = host();
        let place = &places(&host)[number];
        let elsewhere = host.root.join("elsewhere");
        if place.exists() {
            fs::rename(place, &elsewhere).unwrap();
        } else {
            fs::create_dir(&elsewhere).unwrap();
            fs::create_dir_all(place.parent().unwrap()).unwrap();
        }
        fs::set_permissions(&elsewhere, Permissions::from_mode(0o711)).unwrap();
        let content = || fs::read_dir(&elsewhere).unwrap().count();
        let before = content();
        symlink(&elsewhere, place).unwrap();
        refuses(&host);
        let mode = fs::metadata(&elsewhere).unwrap().mode() & 0o7777;
        assert_eq!(
            (mode, content()),
            (0o711, before),
            "the helper followed {}",
            place.display()
        );
    }
}

#[test]
fn row_68_a_foreign_file_in_place_of_the_socket_is_replaced_or_refused() {
    let host = host();
    let run = host.root.join(RUN_DIR);
    fs::create_dir_all(&run).unwrap();
    let precious = host.root.join("precious");
    fs::write(&precious, "content").unwrap();
    symlink(&precious, host.socket()).unwrap();
    drop(host.start_helper());
    assert_eq!(fs::read_to_string(&precious).unwrap(), "content");
    fs::remove_file(host.socket()).unwrap();
    let squatter = std::os::unix::net::UnixListener::bind(host.socket()).unwrap();
    let helper = host.start_helper();
    assert_eq!(testbed::test_helper::list(&Client::new(&host)), []);
    drop((squatter, helper));
    fs::remove_file(host.socket()).unwrap();
    fs::create_dir(host.socket()).unwrap();
    assert!(refuses(&host).contains("cannot listen at"));
}

/// A process that runs as this user, until it is dropped.
struct UidHolder(std::process::Child);

impl UidHolder {
    fn new(uid: u32) -> UidHolder {
        let mut command = Command::new("sleep");
        UidHolder(command.arg("1000").uid(uid).gid(uid).spawn().unwrap())
    }
}

impl Drop for UidHolder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn row_69_a_uid_in_use_on_the_host_is_not_given_to_a_job() {
    let mut host = host();
    let first = *host.uids.start();
    host.uids = first..=first + 3;
    host.configure("http://127.0.0.1:9", 0, SLOTS);
    let _helper = host.start_helper();
    let client = Client::new(&host);
    let holders = [UidHolder::new(first), UidHolder::new(first + 1)];
    let record = host.userdb().join(format!("{}.user", first + 2));
    fs::write(&record, "{}").unwrap();
    for _ in 0..8 {
        let worker = worker_id();
        let Reply::UserCreated { uid, .. } = create(&client, worker, "a") else {
            panic!()
        };
        assert_eq!(uid.get(), first + 3, "this uid was in use");
        assert_eq!(kind(create(&client, worker_id(), "c")), ErrorKind::Limit);
        assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    }
    drop(holders);
    fs::remove_file(&record).unwrap();
    assert_eq!(fs::read_dir(host.userdb()).unwrap().count(), 0);
}

#[test]
fn row_69_files_at_a_users_record_go_and_what_they_link_to_stays() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = worker_id();
    // Only root can have left these: they go with the worker, and what they lead to stays.
    let name = format!("bmat-{}", worker.to_string().to_lowercase());
    let precious = test.host.root.join("precious");
    fs::write(&precious, "content").unwrap();
    symlink(&precious, test.host.userdb().join(format!("{name}.user"))).unwrap();
    symlink(&precious, test.host.userdb().join(format!("{name}.user.part"))).unwrap();
    let Reply::UserCreated { uid, .. } = create(&client, worker, "a") else {
        panic!()
    };
    let record = fs::read_to_string(test.host.userdb().join(format!("{name}.user"))).unwrap();
    assert!(record.contains(&format!("\"uid\":{uid}")), "{record}");
    assert_eq!(fs::read_to_string(&precious).unwrap(), "content");
    test.finish(&[worker]);
}

#[test]
fn row_70_a_configuration_that_others_could_write_is_refused_while_a_job_runs() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    let (_, console) = install(
        &client,
        worker,
        sealed_memfd(b"#!/bin/bash\necho here; exec sleep 1000\n"),
    );
    wait_for_line(&console.unwrap(), "here");
    let waiting = create_worker(&client, "c");
    let path = test.host.root.join(CONFIG_PATH);
    let good = fs::read_to_string(&path).unwrap();
    let evil = good.replace("[slots.c]", "[slots.c]\nadd_to_groups = [\"disk\"]");
    type Swap = fn(&Path, &str);
    let swaps: [(&str, Swap); 7] = [
        ("of another's", |path, evil| {
            fs::write(path, evil).unwrap();
            chown(path, Some(SOMEBODY), None).unwrap();
        }),
        ("of the supervisor's", |path, evil| {
            fs::write(path, evil).unwrap();
            chown(path, Some(SUPERVISOR_UID), None).unwrap();
        }),
        ("writable by a group", |path, evil| {
            fs::write(path, evil).unwrap();
            fs::set_permissions(path, Permissions::from_mode(0o664)).unwrap();
        }),
        ("writable by all", |path, evil| {
            fs::write(path, evil).unwrap();
            fs::set_permissions(path, Permissions::from_mode(0o646)).unwrap();
        }),
        ("a link", |path, evil| {
            let target = path.with_file_name("target.toml");
            fs::write(&target, evil).unwrap();
            symlink(target, path).unwrap();
        }),
        ("a FIFO", |path, _| {
            nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRUSR).unwrap()
        }),
        ("a directory", |path, _| fs::create_dir(path).unwrap()),
    ];
    for (what, swap) in swaps {
        let _ = fs::remove_file(&path);
        swap(&path, &evil);
        let client = test.client();
        assert_eq!(kind(create(&client, worker_id(), "c")), ErrorKind::Busy, "{what}");
        let (reply, _) = install(&client, waiting, sealed_memfd(b"#!/bin/true\n"));
        assert_eq!(kind(reply), ErrorKind::Busy, "{what}");
        assert_eq!(state(&client, waiting), State::Created, "{what}");
        assert_eq!(state(&client, worker), State::Running, "{what}");
    }
    // Nothing of this is needed to clean up.
    test.finish(&[worker, waiting]);
}

/// What `words` come to when a user does them.
fn as_user(uid: u32, words: &[&str]) -> bool {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]).uid(uid).gid(uid).current_dir("/");
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.status().expect("it can be started").success()
}

#[test]
fn row_72_no_user_writes_to_the_factorys_directories() {
    let host = host();
    host.configure("http://127.0.0.1:9", SUPERVISOR_UID, SLOTS);
    let before = HostSnapshot::take(&host);
    let helper = host.start_helper();
    let root = host.root.display().to_string();
    let (run, state) = (format!("{root}/{RUN_DIR}"), format!("{root}/{STATE_DIR}"));
    let (proxy_dir, socket) = (format!("{root}/{PROXY_DIR}"), host.socket().display().to_string());
    let config = format!("{root}/{CONFIG_PATH}");
    let userdb = host.userdb().display().to_string();
    fs::write(host.userdb().join("witness.user"), "{}").unwrap();
    let witness = format!("{userdb}/witness.user");
    for uid in [SOMEBODY, *host.uids.start(), SUPERVISOR_UID] {
        for directory in [
            &run,
            &state,
            &userdb,
            &root,
            &format!("{root}/etc/buildomat-user-factory"),
        ] {
            let file = format!("{directory}/new");
            assert!(!as_user(uid, &["touch", &file]), "uid {uid} writes {file}");
            assert!(!as_user(uid, &["mkdir", &file]), "uid {uid} makes {file}");
            assert!(
                !as_user(uid, &["ln", "-s", "/etc/passwd", &file]),
                "uid {uid} links {file}"
            );
            assert!(
                !as_user(uid, &["mv", directory, &format!("{directory}.old")]),
                "uid {uid} moves {directory}"
            );
        }
        for file in [&socket, &config, &witness, &format!("{run}/helper.lock")] {
            assert!(!as_user(uid, &["rm", "-f", file]), "uid {uid} removes {file}");
            assert!(
                !as_user(uid, &["mv", "-f", file, "/tmp/"]),
                "uid {uid} moves {file}"
            );
            // The socket is the supervisor's own file. It may open it to all; the helper asks who comes.
            let own = uid == SUPERVISOR_UID && *file == socket;
            assert!(
                own || !as_user(uid, &["chmod", "777", file]),
                "uid {uid} opens {file}"
            );
        }
        assert!(
            !as_user(uid, &["ls", &format!("{state}/workers")]),
            "uid {uid} sees the workers"
        );
        assert!(
            !as_user(uid, &["sh", "-c", &format!("exec 9<>{run}/helper.lock")]),
            "uid {uid} could lock"
        );
    }
    // Jobs' connections to the server pass through a socket that only the supervisor can put there.
    assert!(!as_user(
        SOMEBODY,
        &["touch", &format!("{proxy_dir}/server.sock")]
    ));
    assert!(!as_user(SOMEBODY, &["ls", &proxy_dir]));
    // A lock for reading is enough to be in the way of one for writing.
    assert!(!as_user(
        SOMEBODY,
        &[
            "flock",
            "--shared",
            "--nonblock",
            &format!("{run}/helper.lock"),
            "true"
        ]
    ));
    drop(helper);
    // What it gave to the supervisor is no reason for the next helper to refuse.
    drop(host.start_helper());
    fs::remove_file(&witness).unwrap();
    before.assert_unchanged(&host);
}
