//! Row 78: the supervisor's database.

use std::os::unix::fs::{PermissionsExt, chown};

use testbed::small_disk::SmallDisk;

use super::*;

fn database(factory: &TestFactory) -> PathBuf {
    factory.state_dir().join("factory.db")
}

/// Start the supervisor again, and see that it knows the worker of `job`.
async fn find_again(factory: &mut TestFactory, job: Ulid) {
    factory.supervisor = factory.host.start_supervisor();
    let worker = worker_of(factory, job).to_string();
    factory.wait_for_log(&["worker adopted as online", &worker]);
    factory.wait_polls(2).await;
}

/// The job that ran through it all ends well, on its first worker, and so does the next.
async fn all_is_well(factory: TestFactory, job: Ulid) {
    assert_eq!(factory.server.workers().len(), 1, "the job was begun again");
    factory.release();
    factory.wait_completed(job).await;
    let next = factory.submit("echo next");
    factory.wait_completed(next).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_78_a_deleted_database_loses_no_running_job() {
    let mut factory = TestFactory::new(ONE).await;
    let job = factory.start_blocking_job().await;
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        factory.end_supervisor(signal);
        for entry in fs::read_dir(factory.state_dir()).unwrap().flatten() {
            if entry.file_name().to_string_lossy().starts_with("factory.db") {
                fs::remove_file(entry.path()).unwrap();
            }
        }
        find_again(&mut factory, job).await;
    }
    all_is_well(factory, job).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_78_a_damaged_database_is_set_aside_and_the_running_job_found_again() {
    let mut factory = TestFactory::new(ONE).await;
    let job = factory.start_blocking_job().await;
    type Damage = fn(&mut Vec<u8>);
    let damages: [(&str, Damage); 4] = [
        ("another content", |bytes| bytes.fill(b'x')),
        ("its second half lost", |bytes| bytes.truncate(bytes.len() / 2)),
        ("zeroes after the first page", |bytes| bytes[4096..].fill(0)),
        ("every 100th byte turned", |bytes| {
            bytes
                .iter_mut()
                .skip(100)
                .step_by(100)
                .for_each(|byte| *byte ^= 0xff);
        }),
    ];
    for (what, damage) in damages {
        // So it is all in the one file.
        assert!(factory.end_supervisor(Signal::SIGTERM).success());
        let path = database(&factory);
        let mut bytes = fs::read(&path).unwrap();
        damage(&mut bytes);
        fs::write(&path, bytes).unwrap();
        find_again(&mut factory, job).await;
        let parts = [
            "ERROR the database",
            "factory.db is damaged",
            "it was set aside as",
            "factory.db.damaged",
            "nothing else is to be done",
        ];
        once(&factory.supervisor.log, 0, &parts);
        assert!(path.with_extension("db.damaged").exists(), "{what}");
    }
    // A supervisor that is killed leaves a part of it in the log of changes, which is damaged here.
    factory.end_supervisor(Signal::SIGKILL);
    let log = factory.state_dir().join("factory.db-wal");
    let length = fs::metadata(&log).expect("there is one after a kill").len();
    fs::write(&log, vec![0x55; length as usize]).unwrap();
    factory.supervisor = factory.host.start_supervisor();
    factory.wait_polls(2).await;
    all_is_well(factory, job).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_78_a_database_that_cannot_be_written_is_refused_and_used_again_when_it_can() {
    let mut factory = TestFactory::new(ONE).await;
    let job = factory.start_blocking_job().await;
    factory.end_supervisor(Signal::SIGKILL);
    let state = factory.state_dir();
    let parts = [
        "factory.db",
        "let the supervisor's user write the directory and the files in it",
    ];
    let modes = |dir: u32, file: u32| {
        for entry in fs::read_dir(&state).unwrap().flatten() {
            if entry.file_type().unwrap().is_file() {
                fs::set_permissions(entry.path(), fs::Permissions::from_mode(file)).unwrap();
            }
        }
        fs::set_permissions(&state, fs::Permissions::from_mode(dir)).unwrap();
    };
    // The files alone; the lock is the first of them.
    modes(0o755, 0o444);
    refused(&mut factory.host.supervisor_command(), &["lock", parts[1]]);
    fs::set_permissions(state.join("lock"), fs::Permissions::from_mode(0o600)).unwrap();
    refused(&mut factory.host.supervisor_command(), &parts);
    // The directory alone, in which SQLite needs to make files.
    modes(0o755, 0o600);
    factory.supervisor = factory.host.start_supervisor();
    factory.wait_polls(1).await;
    assert!(factory.end_supervisor(Signal::SIGTERM).success());
    modes(0o555, 0o600);
    refused(&mut factory.host.supervisor_command(), &parts);
    // What the line says is what helps.
    modes(0o755, 0o600);
    factory.supervisor = factory.host.start_supervisor();
    factory.wait_polls(1).await;
    assert!(
        !state.join("factory.db.damaged").exists(),
        "it was taken for damaged"
    );
    all_is_well(factory, job).await;
}

const ROOM: &str = "size=256m,nr_inodes=1000";

/// The supervisor's directory on a small file system of its own.
fn small(host: &TestHost) -> Option<SmallDisk> {
    let place = host.root.join(protocol::config::STATE_DIR).join("supervisor");
    let disk = SmallDisk::in_memory_at(place.clone());
    disk.limit(ROOM);
    chown(&place, Some(SUPERVISOR_UID), Some(SUPERVISOR_UID)).unwrap();
    Some(disk)
}

/// A job that runs until this file of the shared directory is there; it runs when this returns.
async fn running_until(factory: &TestFactory, file: &str) -> Ulid {
    let path = factory.shared().join(file);
    let path = path.display();
    let job = factory.submit(&format!(
        "echo running; while ! [ -e {path} ]; do sleep 0.2; done; echo done"
    ));
    factory.wait_for_line(job, "running").await;
    job
}

async fn deleted(factory: &TestFactory, job: Ulid) {
    let worker = worker_of(factory, job);
    factory
        .wait_for_state(|state| state.workers[&worker].deleted.then_some(()))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_78_a_full_disk_takes_no_jobs_deletes_workers_and_forgets_nothing() {
    let mut factory = TestFactory::on(TWO, small).await;
    let (first, second) = (
        running_until(&factory, "first").await,
        running_until(&factory, "second").await,
    );
    let reserve = factory.state_dir().join("reserve");
    assert!(reserve.exists());
    let disk = factory.disk.take().unwrap();
    disk.fill();
    let low = [
        "ERROR the database may soon not be written",
        "no jobs are taken",
        "make room on the disk",
    ];
    factory.wait_for_log(&low);
    // With the room of the reserve, which may be given up already, what ends is written, and deleted.
    fs::write(factory.shared().join("first"), "").unwrap();
    factory.wait_completed(first).await;
    deleted(&factory, first).await;
    let next = factory.submit("echo next");
    factory.wait_polls(3).await;
    assert_eq!(factory.server.job(next).worker, None, "a job was taken");
    // Without it, it is deleted all the same.
    let _ = fs::remove_file(&reserve);
    disk.fill();
    fs::write(factory.shared().join("second"), "").unwrap();
    factory.wait_completed(second).await;
    let parts = [
        "ERROR the database cannot be written",
        "make room on the disk",
        "running jobs go on",
        "workers are deleted",
    ];
    deleted(&factory, second).await;
    factory.wait_polls(3).await;
    assert!(
        factory.supervisor.log.count(&parts) <= 1,
        "it is said again and again"
    );
    assert_eq!(factory.server.job(next).worker, None, "a job was taken");
    disk.limit(ROOM);
    factory.wait_for_log(&["the database can be written again"]);
    factory.wait_completed(next).await;

    // And at the start: with the reserve it starts, and without it says what to do.
    factory.wait_polls(2).await;
    factory.end_supervisor(Signal::SIGKILL);
    let remove_logs = |factory: &TestFactory| {
        for file in ["factory.db-wal", "factory.db-shm"] {
            let _ = fs::remove_file(factory.state_dir().join(file));
        }
    };
    assert!(reserve.exists(), "it was not made again");
    remove_logs(&factory);
    disk.fill();
    factory.supervisor = factory.host.start_supervisor();
    factory.wait_for_log(&[
        "ERROR the database may soon not be written",
        "is used up: make room on the disk",
    ]);
    factory.end_supervisor(Signal::SIGKILL);
    remove_logs(&factory);
    disk.fill();
    refused(
        &mut factory.host.supervisor_command(),
        &["factory.db", "make room on the disk"],
    );
    disk.limit(ROOM);
    factory.supervisor = factory.host.start_supervisor();
    let last = factory.submit("echo last");
    factory.wait_completed(last).await;
    factory.disk = Some(disk);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_78_a_database_of_a_newer_release_is_left_alone() {
    let mut factory = TestFactory::new(ONE).await;
    let job = factory.start_blocking_job().await;
    assert!(factory.end_supervisor(Signal::SIGTERM).success());
    // Where the header of the file has it (https://sqlite.org/fileformat2.html).
    let set = |version: u32| {
        let mut bytes = fs::read(database(&factory)).unwrap();
        let before = u32::from_be_bytes(bytes[60..64].try_into().unwrap());
        bytes[60..64].copy_from_slice(&version.to_be_bytes());
        fs::write(database(&factory), bytes).unwrap();
        before
    };
    let ours = set(99);
    let parts = [
        "factory.db",
        "it has version 99",
        "install the newer release again",
    ];
    refused(&mut factory.host.supervisor_command(), &parts);
    assert_eq!(set(ours), 99, "it was changed");
    factory.supervisor = factory.host.start_supervisor();
    factory.wait_polls(1).await;
    all_is_well(factory, job).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_78_a_file_system_that_is_read_only_is_refused_and_used_again_when_it_is_not() {
    let mut factory = TestFactory::on(ONE, small).await;
    let job = factory.start_blocking_job().await;
    factory.end_supervisor(Signal::SIGKILL);
    let disk = factory.disk.take().unwrap();
    disk.limit("ro");
    let parts = [
        "cannot open",
        "Read-only file system",
        "let the supervisor's user write",
    ];
    refused(&mut factory.host.supervisor_command(), &parts);
    disk.limit("rw");
    factory.disk = Some(disk);
    factory.supervisor = factory.host.start_supervisor();
    factory.wait_polls(1).await;
    all_is_well(factory, job).await;
}
