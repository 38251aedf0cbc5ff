//! The manual commands, as root: a command as a job would run it, and a look into a worker.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;
use testbed::test_factory::ONE;

use super::*;

/// Type a command at a terminal (`script(1)` makes one), and return all that is on it afterwards.
fn at_a_terminal(factory: &TestFactory, args: &str, typed: &str) -> String {
    let program = binaries().join("user-factory");
    let command = format!("{} {args} ", program.display())
        .replace(" ROOT ", &format!(" --root {} ", factory.host.root.display()));
    let mut script = Command::new("script");
    script
        .args(["-qec", &command, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut script = script.spawn().expect("script is there");
    // It stays open: at its end, script would not wait for the rest.
    let mut keyboard = script.stdin.take().unwrap();
    keyboard.write_all(typed.as_bytes()).unwrap();
    let output = tokio::task::block_in_place(|| script.wait_with_output().unwrap());
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_runs_as_a_job_would_and_leaves_nothing() {
    let factory = TestFactory::new("[slots.a]\ntarget = \"TARGET\"\nlimits.open_files = 100\n").await;
    answering(&factory).await;
    let probe = "whoami; pwd; ulimit -Hn; ls /home | wc -l; ls /proc | grep -c '^[0-9]'; touch /work/x /tmp/y; (setsid sleep 1000 &) ; exit 7";
    let result = run_command(&factory, &["run", "--", "bash", "-c", probe]);
    assert_eq!(result.status, 7, "{}", result.err);
    let lines: Vec<&str> = result.out.lines().collect();
    assert!(
        lines[0].starts_with("bmat-01") && lines[0].len() == 31,
        "{lines:?}"
    );
    assert_eq!(&lines[1..4], ["/work", "100", "1"], "{lines:?}");
    assert!(lines[4].parse::<u32>().unwrap() < 8, "{lines:?}");
    let result = run_command(&factory, &["run", "--slot", "zz", "--", "true"]);
    result.failed(1, &["slot zz is not in the configuration"]);
    let result = run_command(&factory, &["run", "--", "/no/such/command"]);
    result.failed(1, &["/no/such/command"]);
    let result = run_command_as_nobody(&factory, &["run", "--", "true"]);
    result.failed(1, &["needs root"]);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn at_a_terminal_a_command_has_one_of_its_own() {
    let factory = TestFactory::new(ONE).await;
    answering(&factory).await;
    let seen = at_a_terminal(
        &factory,
        "run ROOT -- bash -i",
        "tty\nsleep 100 &\nkill %1; wait; echo left=$?\nexit 5\n",
    );
    for part in ["/dev/pts/0", "[1]", "left="] {
        assert!(seen.contains(part), "{part}: {seen}");
    }
    for part in ["no job control", "cannot set terminal"] {
        assert!(!seen.contains(part), "{part}: {seen}");
    }
    factory.finish().await;
}

/// sshd and others refuse a terminal that is not of group 5, `tty`.
#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_has_the_owner_and_group_that_programs_expect() {
    let factory = TestFactory::new(ONE).await;
    answering(&factory).await;
    let probe = "import os, pty\n_, terminal = pty.openpty()\nf = os.fstat(terminal)\nprint(f.st_uid == os.getuid(), f.st_gid, oct(f.st_mode & 0o777))";
    let result = run_command(&factory, &["run", "--", "/usr/bin/python3", "-c", probe]);
    assert_eq!(result.out.trim(), "True 5 0o620", "{}", result.err);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manual_command_gets_nothing_of_the_operators_terminal() {
    let factory = TestFactory::new(ONE).await;
    answering(&factory).await;
    // What a name of the sandbox's own is found for is not the operator's.
    for (streams, part) in [
        ("< /dev/null", "1=/dev/pts/0 2=/dev/pts/0 fds=0,1,2,"),
        ("< /dev/null 2> /dev/null", "1=/dev/pts/0 2=/dev/null fds=0,1,2,"),
    ] {
        let probe = r#"echo 1=$(readlink /proc/$$/fd/1) 2=$(readlink /proc/$$/fd/2) fds=$(ls /proc/$$/fd | tr "\n" ,)"#;
        let seen = at_a_terminal(&factory, &format!("run ROOT -- bash -c '{probe}' {streams}"), "");
        assert!(seen.contains(part), "{streams}: {seen}");
    }
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_in_manual_use_is_taken_and_a_job_waits_for_it() {
    let factory = TestFactory::new(ONE).await;
    answering(&factory).await;
    let script = "echo inside; while ! [ -e RELEASE ]; do sleep 0.1; done; exit 0";
    let script = script.replace("RELEASE", &factory.shared().join("release").display().to_string());
    let mut manual =
        Running::start_logging_stdout(&mut command(&factory, &["run", "--", "bash", "-c", &script]));
    tokio::task::block_in_place(|| manual.log.wait(&["inside"]));
    let job = factory.submit("echo now");
    factory.wait_polls(4).await;
    assert_eq!(factory.server.job(job).state(), "queued");
    factory.release();
    assert!(tokio::task::block_in_place(|| manual.wait()).success());
    factory.wait_completed(job).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_killed_is_cleaned_up_by_the_factory_and_one_that_is_interrupted_by_itself() {
    let factory = TestFactory::new(ONE).await;
    answering(&factory).await;
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let mut manual = Running::start_logging_stdout(&mut command(
            &factory,
            &["run", "--", "bash", "-c", "echo inside; sleep 1000"],
        ));
        tokio::task::block_in_place(|| manual.log.wait(&["inside"]));
        manual.signal(signal);
        tokio::task::block_in_place(|| manual.wait());
        let job = factory.submit("true");
        factory.wait_completed(job).await;
        see(&factory, |status| (state_of(status, "a") == "free").then_some(())).await;
    }
    factory.finish().await;
}

/// An agent that leaves a file and fails.
const BROKEN: &str = "#!/bin/bash\necho evidence > /work/left; (setsid sleep 1000 &); exit 9\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_held_worker_is_entered_though_its_processes_are_gone() {
    let place = tempfile::tempdir().unwrap();
    let agent = place.path().join("agent");
    std::fs::write(&agent, BROKEN).unwrap();
    let factory = TestFactory::with_agent(ONE, agent).await;
    let job = factory.submit("true");
    factory.wait_held(job).await;
    let worker = worker_on(&factory, "a").await;
    let script = place.path().join("script");
    std::fs::write(&script, "whoami; cat left; echo mine > mark; exit 4\n").unwrap();
    let result: CommandOutput = tokio::task::block_in_place(|| {
        let mut shell = command(&factory, &["shell", &worker]);
        shell
            .stdin(std::fs::File::open(&script).unwrap())
            .output()
            .unwrap()
            .into()
    });
    assert_eq!(
        (result.status, result.out.lines().collect::<Vec<_>>()),
        (4, vec![&*format!("bmat-{}", worker.to_lowercase()), "evidence"]),
        "{}",
        result.err
    );
    // It is as it was: held, and as its agent left it.
    assert!(
        json(&factory, &["show", &worker])["worker"]["failure"]
            .as_str()
            .unwrap()
            .contains("status 9")
    );
    let seen = at_a_terminal(
        &factory,
        &format!("shell ROOT {worker}"),
        "cat /work/mark; tty; exit\n",
    );
    assert!(seen.contains("mine") && seen.contains("/dev/pts/0"), "{seen}");
    let result = run_command(&factory, &["shell", "01HZX3N8Q4J5K6M7P8R9S0T1V2"]);
    result.failed(1, &["does not exist"]);
    factory
        .server
        .release(factory.server.job(job).worker.unwrap())
        .unwrap();
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shell_ends_with_its_worker() {
    let factory = TestFactory::new(ONE).await;
    let job = factory.start_blocking_job().await;
    let worker = online(&factory).await;
    let mut shell = command(&factory, &["shell", &worker]);
    let (reader, mut writer) = std::io::pipe().unwrap();
    let mut shell = Running::start_logging_stdout_with(&mut shell, reader.into());
    writer.write_all(b"echo inside; sleep 1000\n").unwrap();
    tokio::task::block_in_place(|| shell.log.wait(&["inside"]));
    // The job goes on meanwhile, and is done as ever.
    factory.release();
    factory.wait_completed(job).await;
    let status = tokio::task::block_in_place(|| shell.wait());
    assert_eq!(status.code(), Some(128 + 9));
    drop(writer);
    factory.finish().await;
}

/// What a task prints and what a manual command prints, of the same script.
async fn task_and_command(factory: &TestFactory, script: &str) -> (String, String) {
    // The manual command first: the slot is free then.
    let result = run_command(factory, &["run", "--", "bash", "-c", script]);
    assert_eq!(result.status, 0, "{}", result.err);
    let job = factory.submit(script);
    let ended = factory.wait_for_end(job).await;
    let mut task = testbed::test_factory::lines(&ended, "stdout").join("\n");
    task.push('\n');
    (task, result.out)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manual_command_has_a_tasks_environment_and_directory() {
    let factory =
        TestFactory::new("[slots.a]\ntarget = \"TARGET\"\nenv.ONE_OF_TWO = \"a b=c\"\nenv.TZ = \"CET\"\nadd_to_groups = [\"tty\"]\n")
            .await;
    answering(&factory).await;
    // Both have a user of their own, and the task has a job.
    let script = "env | sed \"s/$USER/USER/; s/$UID/UID/\" | grep -v '^BUILDOMAT_.*_ID=\\|^_=\\|^SHLVL=' | sort; pwd; umask; ulimit -Hn; id -Gn $USER | sed s/$USER/USER/";
    let (task, command) = task_and_command(&factory, script).await;
    assert_eq!(task, command);
    for variable in [
        "ONE_OF_TWO=a b=c",
        "TZ=CET",
        "HOME=/home/USER",
        "XDG_RUNTIME_DIR=/run/user/UID",
        "USER tty",
    ] {
        assert!(
            command.lines().any(|line| line == variable),
            "{variable}: {command}"
        );
    }
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manual_command_can_reopen_its_streams() {
    let factory = TestFactory::new(ONE).await;
    answering(&factory).await;
    let place = tempfile::tempdir().unwrap();
    let (input, output) = (place.path().join("input"), place.path().join("output"));
    // A file of root's that the job's user may not open, and pipes of root's.
    std::fs::write(&input, "typed\n").unwrap();
    std::fs::set_permissions(&input, std::fs::Permissions::from_mode(0o600)).unwrap();
    let script = "cat /dev/stdin >/dev/stdout && echo to errors >/dev/stderr";
    let mut piped = command(&factory, &["run", "--", "bash", "-c", script]);
    piped.stdin(std::fs::File::open(&input).unwrap());
    let result: CommandOutput = tokio::task::block_in_place(|| piped.output().unwrap().into());
    assert_eq!(
        (result.status, &*result.out, &*result.err),
        (0, "typed\n", "to errors\n")
    );
    // Two streams that are one file keep their order.
    let script = "for i in $(seq 200); do echo out $i >/dev/stdout; echo err $i >/dev/stderr; done";
    let expected: String = (1..=200).map(|i| format!("out {i}\nerr {i}\n")).collect();
    let mut filed = command(&factory, &["run", "--", "bash", "-c", script]);
    let file = std::fs::File::create(&output).unwrap();
    filed
        .stdin(Stdio::null())
        .stdout(file.try_clone().unwrap())
        .stderr(file);
    assert!(tokio::task::block_in_place(|| filed.status().unwrap()).success());
    assert_eq!(std::fs::read_to_string(&output).unwrap(), expected);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manual_command_waits_for_streams_that_do_not_block() {
    let factory = TestFactory::new(ONE).await;
    answering(&factory).await;
    let (mut output, writer) = std::io::pipe().unwrap();
    let (reader, mut input) = std::io::pipe().unwrap();
    for end in [reader.as_fd(), writer.as_fd()] {
        fcntl(end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    }
    let mut run = command(
        &factory,
        &["run", "--", "bash", "-c", "echo begun; read last; seq $last"],
    );
    run.stdin(reader).stdout(writer);
    let mut child = run.spawn().unwrap();
    // It has ends of the pipes.
    drop(run);
    let printed = tokio::task::block_in_place(|| {
        let mut begun = [0; 6];
        output.read_exact(&mut begun).unwrap();
        assert_eq!(&begun, b"begun\n");
        input.write_all(b"200000\n").unwrap();
        drop(input);
        let mut printed = String::new();
        output.read_to_string(&mut printed).unwrap();
        printed
    });
    assert!(child.wait().unwrap().success());
    assert_eq!(printed.lines().count(), 200_000);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_of_its_own_knows_its_name_and_has_the_hosts_settings() {
    let factory = TestFactory::new("[slots.a]\ntarget = \"TARGET\"\nnetwork = \"none\"\n").await;
    answering(&factory).await;
    let job = "getent hosts \"$(hostname)\" && hostname -f && cd /proc/sys/net && \
               cat ipv4/ping_group_range ipv4/ip_unprivileged_port_start ipv4/ip_local_port_range \
               ipv4/ip_local_reserved_ports core/somaxconn unix/max_dgram_qlen ipv4/tcp_keepalive_time \
               ipv4/tcp_keepalive_intvl ipv4/tcp_keepalive_probes ipv6/bindv6only; \
               /usr/bin/python3 -c 'import socket; ping = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 1); \
               ping.sendto(bytes([8, 0, 0, 0, 0, 0, 0, 0]), (\"localhost4\", 0)); print(len(ping.recv(99)))'";
    let run = command(&factory, &["run", "--", "bash", "-c", job]);
    // A host with values that no kernel begins with.
    let host = "cd /proc/sys/net && echo 0 2147483647 >ipv4/ping_group_range && \
                echo 80 >ipv4/ip_unprivileged_port_start && echo 20000 60000 >ipv4/ip_local_port_range && \
                echo 30000-30002 >ipv4/ip_local_reserved_ports && echo 100 >core/somaxconn && \
                echo 200 >unix/max_dgram_qlen && echo 600 >ipv4/tcp_keepalive_time && \
                echo 60 >ipv4/tcp_keepalive_intvl && echo 5 >ipv4/tcp_keepalive_probes && \
                echo 1 >ipv6/bindv6only && cd / && exec \"$@\"";
    let mut unshare = Command::new("unshare");
    unshare
        .args(["--net", "sh", "-c", host, "sh"])
        .arg(run.get_program())
        .args(run.get_args())
        .stdin(Stdio::null());
    let result: CommandOutput = tokio::task::block_in_place(|| unshare.output().unwrap().into());
    assert_eq!(result.status, 0, "{}{}", result.out, result.err);
    let own = nix::unistd::gethostname().unwrap().into_string().unwrap();
    let lines: Vec<Vec<&str>> = result
        .out
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    let expected = [
        &["127.0.0.1", &own][..],
        &[&own],
        &["0", "2147483647"],
        &["80"],
        &["20000", "60000"],
        &["30000-30002"],
        &["100"],
        &["200"],
        &["600"],
        &["60"],
        &["5"],
        &["1"],
        // It is answered.
        &["8"],
    ];
    assert_eq!(lines, expected, "{}", result.err);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shared_memory_is_executable_and_the_root_says_how_much_room_there_is() {
    let factory = TestFactory::new(ONE).await;
    answering(&factory).await;
    let script = "cp /bin/true /dev/shm/ && /dev/shm/true && df --output=avail -B1M / /work | tail -n +2; \
                  touch /x 2>/dev/null && echo writable; \
                  findmnt -no OPTIONS / | tr , '\\n' | grep -x 'ro\\|nosuid\\|nodev'";
    let (task, command) = task_and_command(&factory, script).await;
    for result in [task, command] {
        let lines: Vec<&str> = result.lines().collect();
        let room: Vec<i64> = lines[..2]
            .iter()
            .map(|line| line.trim().parse().unwrap())
            .collect();
        assert!((room[0] - room[1]).abs() < 1024, "{result}");
        assert_eq!(lines[2..], ["ro", "nosuid", "nodev"], "{result}");
    }
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_has_the_families_of_sockets_that_it_names() {
    let factory = TestFactory::new(&format!(
        "{ONE}\n[slots.b]\ntarget = \"TARGET\"\nsocket_families = [\"AF_VSOCK\"]\n"
    ))
    .await;
    answering(&factory).await;
    let open = "import socket\nfor family in socket.AF_VSOCK, socket.AF_PACKET:\n try: socket.socket(family, socket.SOCK_STREAM); print('open')\n except OSError as error: print(error.errno)";
    for (slot, expected) in [("a", "97\n97\n"), ("b", "open\n97\n")] {
        let result = run_command(
            &factory,
            &["run", "--slot", slot, "--", "/usr/bin/python3", "-c", open],
        );
        assert_eq!(
            (result.status, &*result.out),
            (0, expected),
            "{slot}: {}",
            result.err
        );
    }
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manual_command_without_a_network_reaches_the_server_and_nobody_else() {
    let factory = TestFactory::new(&format!("{ONE}network = \"none\"\n")).await;
    answering(&factory).await;
    let server = factory.url();
    let ask = "import sys, urllib.request, urllib.error
try:
    print(urllib.request.urlopen(sys.argv[1]).status)
except urllib.error.HTTPError as error:
    print('answered', error.code)
except OSError as error:
    print('not reached')";
    let elsewhere = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let elsewhere = format!("http://{}/", elsewhere.local_addr().unwrap());
    for (url, part) in [(server, "answered"), (elsewhere, "not reached")] {
        let result = run_command(&factory, &["run", "--", "/usr/bin/python3", "-c", ask, &url]);
        assert!(result.out.contains(part), "{url}: {}{}", result.out, result.err);
    }
    factory.finish().await;
}
