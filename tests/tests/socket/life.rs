//! A worker's life: each request, in order, twice, and out of order.

use std::collections::BTreeMap;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};

use super::*;

#[test]
fn a_worker_lives_and_leaves_nothing() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = worker_id();
    let Reply::UserCreated { uid, name } = create(&client, worker, "a") else {
        panic!()
    };
    assert!(test.host.uids.contains(&uid.get()));
    assert_eq!(
        name.to_string(),
        format!("bmat-{}", worker.to_string().to_lowercase())
    );
    let record = fs::read_to_string(test.host.userdb().join(format!("{uid}.user"))).unwrap();
    assert!(record.contains(&format!("\"userName\":\"{name}\"")), "{record}");
    assert_eq!(list(&client)[0].state, State::Created);

    let script = "echo $*; id -un; (exec -a the-agent sleep 1000) & exit 0";
    let (reply, console) = install(
        &client,
        worker,
        sealed_memfd(format!("#!/bin/bash\n{script}").as_bytes()),
    );
    assert_eq!(reply, Reply::AgentStarted);
    let console = console.unwrap();
    wait_for_line(&console, &name.to_string());
    let Reply::UserCreated { uid, .. } = create(&client, worker, "a") else {
        panic!("the same again is answered the same")
    };
    let expected = format!(
        "install -e COLOUR=deep red -e XDG_RUNTIME_DIR=/run/user/{uid} --no-service --no-setuid --use-var-run \
         http://127.0.0.1:9 {}",
        token().as_str()
    );
    assert_eq!(read(&console).lines().next(), Some(&*expected));
    assert_eq!(state(&client, worker), State::Running);
    assert!(!processes_of(&test.host.uids).is_empty());

    assert_eq!(client.ask(&Request::Kill { worker }).0, Reply::Killed);
    assert!(
        processes_of(&test.host.uids).is_empty(),
        "a killed worker has processes"
    );
    assert_eq!(state(&client, worker), State::Exited(Exit::Unknown));
    test.finish(&[worker]);
}

/// A job cannot put one there: another user has.
#[test]
fn processes_of_its_user_in_no_cgroup_of_ours_are_ended_too() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    let uid = list(&client)[0].uid.get();
    let mut command = Command::new("cat");
    let mut process = command.uid(uid).gid(uid).stdin(Stdio::piped()).spawn().unwrap();
    // Whatever fails here, it ends with this.
    let input = process.stdin.take();
    // A killer waits until it is reaped.
    let reaped = std::thread::spawn(move || process.wait().unwrap());
    assert_eq!(client.ask(&Request::Kill { worker }).0, Reply::Killed);
    drop(input);
    assert_eq!(reaped.join().unwrap().signal(), Some(9));
    test.finish(&[worker]);
}

#[test]
fn a_repeated_request_has_no_second_effect() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = worker_id();
    let first = create(&client, worker, "a");
    assert_eq!(create(&client, worker, "a"), first);
    let agent = || sealed_memfd(b"#!/bin/bash\necho started; sleep 1000 & exit 0\n");
    for _ in 0..3 {
        let (reply, console) = install(&client, worker, agent());
        assert_eq!(reply, Reply::AgentStarted);
        wait_for_line(&console.unwrap(), "started");
    }
    assert_eq!(
        create(&client, worker, "a"),
        first,
        "the user is the same while the agent runs"
    );
    let console = client
        .ask(&Request::Attach { worker })
        .1
        .pop()
        .map(File::from)
        .unwrap();
    assert_eq!(read(&console).matches("started").count(), 1);
    for _ in 0..2 {
        assert_eq!(client.ask(&Request::Kill { worker }).0, Reply::Killed);
    }
    let (reply, _) = install(&client, worker, agent());
    assert_eq!(reply, Reply::AgentStarted);
    assert_eq!(
        state(&client, worker),
        State::Exited(Exit::Unknown),
        "an agent was started twice"
    );
    for _ in 0..2 {
        assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    }
    test.finish(&[]);
}

#[test]
fn slots_are_taken_once_and_conflict_both_ways() {
    let test = TestHelper::new();
    let client = test.client();
    assert_eq!(kind(create(&client, worker_id(), "zz")), ErrorKind::NoSuchSlot);
    let a = create_worker(&client, "a");
    assert_eq!(kind(create(&client, worker_id(), "a")), ErrorKind::SlotTaken);
    assert_eq!(kind(create(&client, worker_id(), "b")), ErrorKind::SlotTaken);
    assert_eq!(kind(create(&client, a, "c")), ErrorKind::Refused);
    let c = create_worker(&client, "c");
    assert_eq!(client.ask(&Request::Delete { worker: a }).0, Reply::Deleted);
    let b = create_worker(&client, "b");
    assert_eq!(kind(create(&client, worker_id(), "a")), ErrorKind::SlotTaken);
    let mut slots: Vec<_> = list(&client)
        .into_iter()
        .map(|info| info.slot.to_string())
        .collect();
    slots.sort();
    assert_eq!(slots, ["b", "c"]);
    test.finish(&[b, c]);
}

#[test]
fn of_many_simultaneous_requests_for_a_slot_one_succeeds() {
    let test = TestHelper::new();
    let winners: Vec<WorkerId> = std::thread::scope(|scope| {
        let tries: Vec<_> = (0..16)
            .map(|i| {
                let test = &test;
                scope.spawn(move || {
                    let worker = worker_id();
                    let reply = create(&test.client(), worker, if i % 2 == 0 { "a" } else { "b" });
                    matches!(reply, Reply::UserCreated { .. }).then_some(worker)
                })
            })
            .collect();
        tries
            .into_iter()
            .filter_map(|thread| thread.join().unwrap())
            .collect()
    });
    assert_eq!(winners.len(), 1);
    test.finish(&winners);
}

#[test]
fn requests_about_unknown_workers_are_refused_and_deleting_them_succeeds() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = worker_id();
    assert_eq!(
        kind(client.ask(&Request::Attach { worker }).0),
        ErrorKind::NoSuchWorker
    );
    assert_eq!(
        kind(client.ask(&Request::Kill { worker }).0),
        ErrorKind::NoSuchWorker
    );
    assert_eq!(
        kind(install(&client, worker, sealed_memfd(b"x")).0),
        ErrorKind::NoSuchWorker
    );
    assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    test.finish(&[]);
}

#[test]
fn a_job_sees_what_the_design_says_and_no_more() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    let secret = test.host.root.join("etc/buildomat-user-factory");
    let script = format!(
        r#"exec 2>&1
        for place in "$HOME" /input /work /tmp /var/tmp /opt/buildomat /var/run/buildomat /dev/shm /srv/of-the-job; do
            [ -z "$(ls -A $place)" ] && touch "$place/new" && echo "private $place"
        done
        for place in / /usr /etc /opt /home /run /dev /sys /root /opt/shown; do
            touch "$place/new" 2>/dev/null && echo "WRITABLE $place"
        done
        for hidden in {secret} /root/.cargo /run/systemd/private /run/dbus /.buildomat-factory/workers; do
            [ -e "$hidden" ] && echo "SEEN $hidden"
        done
        [ -d /opt/shown/doc ] && echo "shown"
        ls /home | wc -l
        grep -E '^(Cap|NoNewPrivs)' /proc/self/status | tr -d '\t' | tr '\n' ' '; echo
        ls /proc/self/fd | wc -l
        stat -c %a /dev/null
        getent passwd "$(id -u)" | cut -d: -f6; echo "$HOME"
        ls -d /proc/[0-9]* | wc -l
        mount -t tmpfs none /tmp; [ $? -ne 0 ] && echo "no mount"
        exit 3"#,
        secret = secret.display()
    );
    let (state, console) = run(&client, worker, &script);
    assert_eq!(state, State::Exited(Exit::Status(3)));
    assert_eq!(console.matches("private ").count(), 9, "{console}");
    assert!(
        !console.contains("WRITABLE") && !console.contains("SEEN"),
        "{console}"
    );
    assert!(console.contains("\nshown\n1\n"), "{console}");
    let none = "0".repeat(16);
    let status = format!(
        "CapInh:{none} CapPrm:{none} CapEff:{none} CapBnd:{none} CapAmb:{none} NoNewPrivs:1 \n4\n666\n"
    );
    assert!(console.contains(&status), "{console}");
    let home = format!("/home/bmat-{}\n", worker.to_string().to_lowercase());
    assert!(console.contains(&home.repeat(2)), "{console}");
    assert!(console.contains("no mount"), "{console}");
    test.finish(&[worker]);
}

#[test]
fn how_an_agent_ended_is_reported() {
    let test = TestHelper::new();
    let client = test.client();
    for (script, exit) in [
        ("exit 0", Exit::Unknown),
        ("exit 7", Exit::Status(7)),
        ("kill -9 $$", Exit::Signal(9)),
        ("(read -t 0.1 < <(:); exit 5) & exit 0", Exit::Status(5)),
        ("(exec bash -c 'kill -11 $$') & exit 0", Exit::Signal(11)),
        ("kill -34 $$", Exit::Signal(34)),
    ] {
        let worker = create_worker(&client, "c");
        let (state, console) = run(&client, worker, script);
        // An agent that `install` did not leave behind may have ended before anybody could look.
        let quick = matches!(state, State::Exited(Exit::Unknown | Exit::Status(0)));
        assert!(
            state == State::Exited(exit) || (script.ends_with("exit 0") && quick),
            "{script}: {state:?}\n{console}"
        );
        assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    }
    test.finish(&[]);
}

#[test]
fn a_process_that_a_real_time_signal_ends_ends_no_job() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "c");
    // Its parent is pid 1 by then, which has no other name of the signal than its number.
    let script = "(bash -c 'echo $$ > /tmp/pid; kill -34 $$' &)
        until [ -s /tmp/pid ] && ! [ -e /proc/$(cat /tmp/pid) ]; do read -t 0.01 < <(:); done
        echo alive; exit 7";
    let (state, console) = run(&client, worker, script);
    assert_eq!((state, &*console), (State::Exited(Exit::Status(7)), "alive\n"));
    test.finish(&[worker]);
}

#[test]
fn what_cannot_be_read_of_one_worker_is_unknown_and_the_others_are_listed() {
    let test = TestHelper::new();
    let client = test.client();
    let [damaged, other] = ["a", "c"].map(|slot| {
        let worker = create_worker(&client, slot);
        assert_eq!(run(&client, worker, "exit 7").0, State::Exited(Exit::Status(7)));
        worker
    });
    // As a disk leaves it that has lost a block.
    fs::write(test.host.worker_dir(damaged).join("exit"), [0xff; 64]).unwrap();
    let states: BTreeMap<WorkerId, State> = list(&client)
        .into_iter()
        .map(|info| (info.worker, info.state))
        .collect();
    let expected = [(damaged, Exit::Unknown), (other, Exit::Status(7))];
    assert_eq!(
        states,
        expected
            .map(|(worker, exit)| (worker, State::Exited(exit)))
            .into()
    );
    test.finish(&[damaged, other]);
}

#[test]
fn an_agent_that_is_no_program_fails_with_the_kernels_reason() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    let Reply::Error(error) = install(&client, worker, sealed_memfd(b"\x7fNOT A PROGRAM")).0 else {
        panic!()
    };
    assert_eq!(error.kind, ErrorKind::Failed);
    assert!(
        error.message().contains("Exec format error"),
        "{}",
        error.message()
    );
    let (reply, mut console) = client.ask(&Request::Attach { worker });
    wait_until(&client, worker, |state| state == State::Exited(Exit::NotStarted));
    assert!(matches!(reply, Reply::Attached { .. }));
    assert!(read(&File::from(console.pop().unwrap())).contains("Exec format error"));
    test.finish(&[worker]);
}

#[test]
fn a_job_gets_its_slots_groups_and_devices() {
    let host = TestHost::new();
    let groups = fs::read_to_string("/etc/group").unwrap();
    let fields = groups.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let group = fields
        .clone()
        .find(|fields| fields[2] != "0")
        .expect("the host has a group besides root's");
    let slots = format!(
        "[slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\nadd_to_groups = [\"{}\"]\ndevices = [\"/dev/console\", \"/dev/null\"]\n",
        group[0]
    );
    host.configure("http://127.0.0.1:9", 0, &slots);
    let before = HostSnapshot::take(&host);
    let _helper = host.start_helper();
    let client = Client::new(&host);
    let worker = create_worker(&client, "a");
    let (_, console) = run(
        &client,
        worker,
        "id -G; stat -c '%t:%T %a %u' /dev/console; id -u; exit 1",
    );
    let lines: Vec<&str> = console.lines().collect();
    let uid = lines[2];
    assert_eq!(lines[0], format!("{uid} {}", group[2]), "{console}");
    assert_eq!(lines[1], format!("5:1 600 {uid}"), "{console}");
    assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    before.assert_unchanged(&host);
}

#[test]
fn what_is_hidden_is_hidden_also_where_a_slot_shows_what_is_around_it() {
    let place = create_shared_dir();
    let at = |name: &str| place.path().join(name).display().to_string();
    for name in ["shown", "secret", "alone", "deep/secret"] {
        fs::create_dir_all(at(name)).unwrap();
        fs::write(at(&format!("{name}/file")), format!("content of {name}\n")).unwrap();
    }
    std::os::unix::fs::symlink(place.path(), at("link")).unwrap();
    let host = TestHost::new();
    let own = host.root.join(protocol::config::STATE_DIR);
    let sources = [
        ("all", at("")),
        ("deep", at("link/deep")),
        // Shown to this slot and to no other, as its operator says.
        ("alone", at("alone")),
        ("own", own.display().to_string()),
        ("workers", own.join("workers").display().to_string()),
        ("around", host.root.display().to_string()),
    ];
    let sources =
        sources.map(|(name, source)| format!("\"/opt/{name}\" = {:?}", source.trim_end_matches('/')));
    let slots = SLOTS.replace(
        "[slots.c]",
        &format!("[slots.c]\nread_only = {{ {} }}", sources.join(", ")),
    );
    let hide = format!("hide = {:?}\n{slots}", ["secret", "alone", "deep/secret"].map(at));
    host.configure("http://127.0.0.1:9", 0, &hide);
    let _helper = host.start_helper();
    let client = Client::new(&host);
    let worker = create_worker(&client, "c");
    let script = format!(
        "cat {}/*/file; cd /opt; cat all/*/file all/deep/*/file deep/*/file alone/file; ls -A own workers; find around -name helper.sock; \
         find around -name supervisor; exit 1",
        place.path().display()
    );
    let (_, console) = run(&client, worker, &script);
    let shown = |text: &str| console.matches(text).count();
    assert_eq!(shown("content of shown"), 2, "{console}");
    assert_eq!(shown("content of alone"), 1, "{console}");
    for hidden in [
        "content of secret",
        "helper.sock",
        "supervisor",
        &worker.to_string(),
    ] {
        assert_eq!(shown(hidden), 0, "{hidden}: {console}");
    }
    assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
}

/// What the kernel has of waiting for a lock on this file: `proc_locks(5)`.
fn is_waited_for(file: &File) -> bool {
    let inode = format!(":{} ", file.metadata().unwrap().ino());
    let locks = fs::read_to_string("/proc/locks").unwrap();
    locks
        .lines()
        .any(|line| line.contains(" -> FLOCK ") && line.contains(&inode))
}

#[test]
fn a_slot_is_given_back_at_once_with_the_last_of_its_worker() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    let (state, _) = run(&client, worker, "exit 1");
    assert_eq!(state, State::Exited(Exit::Status(1)));
    let dir = test.host.worker_dir(worker);
    // A slot is taken under this lock.
    let lock = File::open(dir.parent().unwrap().join(".lock")).unwrap();
    let lock = Flock::lock(lock, FlockArg::LockExclusive).unwrap();
    std::thread::scope(|scope| {
        let deletion = scope.spawn(|| client.ask(&Request::Delete { worker }).0);
        while !is_waited_for(&lock) {
            assert!(
                !deletion.is_finished(),
                "the slot was given back without the lock"
            );
            std::thread::sleep(PAUSE);
        }
        let left: BTreeSet<_> = fs::read_dir(&dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        let marks = ["record", "started"].map(std::ffi::OsString::from);
        assert_eq!(left, BTreeSet::from(marks));
        drop(lock);
        assert_eq!(deletion.join().unwrap(), Reply::Deleted);
    });
    assert!(!dir.exists());
    test.finish(&[]);
}

#[test]
fn what_the_operator_hides_is_hidden_also_behind_a_link() {
    let place = create_shared_dir();
    let at = |name: &str| place.path().join(name).display().to_string();
    for name in ["shown", "plain", "real/secret"] {
        fs::create_dir_all(at(name)).unwrap();
        fs::write(at(&format!("{name}/file")), format!("content of {name}\n")).unwrap();
    }
    std::os::unix::fs::symlink(at("real"), at("link")).unwrap();
    let host = TestHost::new();
    let hide =
        |paths: &[String]| host.configure("http://127.0.0.1:9", 0, &format!("hide = {paths:?}\n{SLOTS}"));
    hide(&[at("plain"), at("link/secret")]);
    let _helper = host.start_helper();
    let client = Client::new(&host);
    let worker = create_worker(&client, "c");
    let script = format!("cat {0}/*/file {0}/*/*/file; exit 1", place.path().display());
    let (_, console) = run(&client, worker, &script);
    assert!(console.contains("content of shown"), "{console}");
    assert!(
        !console.contains("content of plain") && !console.contains("content of real"),
        "{console}"
    );
    assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);

    // What is not there cannot be hidden, and would be seen once it is: no job starts.
    hide(&[at("later")]);
    let client = Client::new(&host);
    let worker = create_worker(&client, "c");
    let Reply::Error(error) = install(&client, worker, sealed_memfd(b"#!/bin/true\n")).0 else {
        panic!()
    };
    assert!(
        error.message().contains("later, named in hide, cannot be hidden"),
        "{error}"
    );
    assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
}
