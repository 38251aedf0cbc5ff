//! `user-factory residue`: what is left on purpose, of a uid of the factory's that no worker has.

use std::os::unix::fs::chown;

use super::*;
use testbed::test_factory::ONE;

const NOBODYS: &str = "bmat-01hzx3n8q4j5k6m7p8r9s0t1v2";

/// What is found, without the files where `files` is false.
fn residue(factory: &TestFactory, files: bool) -> (i32, Value) {
    let how = if files {
        ["--files-per-second", "4000000000"].as_slice()
    } else {
        &["--no-files"]
    };
    let result = run_command(factory, &[&["residue", "--json"], how].concat());
    let report =
        serde_json::from_str(&result.out).unwrap_or_else(|e| panic!("{e}: {} {}", result.out, result.err));
    (result.status, report)
}

fn has(report: &Value, kind: &str, part: &str) -> bool {
    let found = report["found"].as_array().expect("a list of what is found");
    found
        .iter()
        .any(|left| left["kind"] == kind && left["what"].as_str().expect("a text").contains(part))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_of_a_uid_that_no_worker_has_is_found_and_of_one_that_has_is_not() {
    let factory = TestFactory::new(ONE).await;
    // The job's processes and files are an existing worker's.
    let job = factory.start_blocking_job().await;
    let worker = worker_on(&factory, "a").await;
    let (status, report) = residue(&factory, true);
    assert_eq!((status, &report["clean"]), (0, &Value::Bool(true)), "{report}");
    assert!(report["workers"][&worker].as_u64().is_some_and(|uid| {
        factory
            .host
            .uids
            .contains(&u32::try_from(uid).expect("it is a uid"))
    }));
    assert!(report["files_seen"].as_u64().is_some_and(|seen| seen > 1000));

    let uid = factory.host.uid_of_no_worker();
    let place = tempfile::Builder::new()
        .prefix("left of a job ")
        .tempfile_in("/var/tmp")
        .unwrap();
    chown(place.path(), Some(uid), Some(0)).unwrap();
    let file = place.path().to_str().unwrap().to_owned();
    let (status, report) = residue(&factory, true);
    assert!(status == 1 && has(&report, "file", &file), "{file}: {report}");
    drop(place);

    let by_user = |program: &str, args: &[&str]| {
        let mut command = Command::new(program);
        command.args(args).uid(uid).gid(uid);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.spawn().expect("it can be started")
    };
    // keyctl(2) joins a new session keyring, which ends with the process, and add_key(2) adds to it.
    let holds_a_key = "import ctypes, platform, sys
keyctl, add_key = {'x86_64': (250, 248), 'aarch64': (219, 217)}[platform.machine()]
call = ctypes.CDLL(None).syscall
assert call(keyctl, 1, None) > 0 and call(add_key, b'user', b'left', b'x', 1, -3) > 0
print('ready', flush=True)
sys.stdin.read()";
    let mut process = by_user("python3", &["-c", holds_a_key]);
    let mut ready = [0; 6];
    let stdout = process.stdout.as_mut().expect("it is piped");
    stdout.read_exact(&mut ready).unwrap();
    assert!(by_user("ipcmk", &["--shmem", "4096"]).wait().unwrap().success());
    let (status, report) = residue(&factory, false);
    assert_eq!(status, 1);
    assert!(
        has(&report, "process", &format!("{} python3", process.id())),
        "{report}"
    );
    assert!(has(&report, "key", &uid.to_string()), "{report}");
    assert!(has(&report, "ipc", "shm"), "{report}");
    drop(process.stdin.take());
    process.wait().unwrap();
    assert!(by_user("ipcrm", &["--all"]).wait().unwrap().success());

    let record = factory.host.userdb().join(format!("{NOBODYS}.user"));
    std::fs::write(&record, "{}").unwrap();
    let cgroup = factory
        .host
        .cgroup_dir()
        .join("workers/01HZX3N8Q4J5K6M7P8R9S0T1V2");
    std::fs::create_dir(&cgroup).unwrap();
    let (status, report) = residue(&factory, false);
    assert_eq!(status, 1);
    assert!(has(&report, "user", &format!("{NOBODYS}.user")), "{report}");
    assert!(has(&report, "cgroup", "01HZX3N8Q4J5K6M7P8R9S0T1V2"), "{report}");
    std::fs::remove_file(&record).unwrap();
    std::fs::remove_dir(&cgroup).unwrap();

    let place = factory.host.root.join(NOBODYS);
    std::fs::create_dir(&place).unwrap();
    // In a mount namespace of its own, in which other tests do not see it.
    let plain = command(&factory, &["residue", "--no-files"]);
    let mut mounted = Command::new("unshare");
    mounted.args(["--mount", "sh", "-c", "mount -t tmpfs none \"$0\" && exec \"$@\""]);
    mounted
        .arg(&place)
        .arg(plain.get_program())
        .args(plain.get_args());
    let result: CommandOutput = tokio::task::block_in_place(|| mounted.output().unwrap()).into();
    assert!(
        result.status == 1 && result.out.contains(NOBODYS),
        "{}{}",
        result.out,
        result.err
    );
    std::fs::remove_dir(&place).unwrap();

    let result = run_command(&factory, &["residue", "--no-files"]);
    assert!(
        result.status == 0 && result.out.ends_with("nothing is left\n"),
        "{}{}",
        result.out,
        result.err
    );
    factory.release();
    factory.wait_completed(job).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_root_is_told_what_is_left() {
    let factory = TestFactory::new(ONE).await;
    let mut command = command(&factory, &["residue"]);
    let result: CommandOutput =
        tokio::task::block_in_place(|| command.uid(65534).gid(65534).output().unwrap()).into();
    result.failed(1, &["needs root"]);
    factory.finish().await;
}
