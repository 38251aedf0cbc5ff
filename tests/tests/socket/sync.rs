//! `ignore_sync`: what a job asks to have on the disk at once ends with the job, so it is not done.

use std::os::unix::process::CommandExt;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::*;

const TARGET: &str = "target = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"";

/// A descriptor that is not there shows whether the kernel was asked.
const ASK: &str = "python3 -c 'import os
try:
    os.fsync(999); print(\"ignored\")
except OSError as e: print(\"asked:\", e.strerror)'; exit 1";

#[test]
fn syncs_are_ignored_unless_the_slot_says_otherwise_or_has_a_disk_of_its_own() {
    let disk = format!("/dev/user-factory-test-{}-disk", std::process::id());
    mknod(&*disk, SFlag::S_IFBLK, Mode::S_IRUSR, makedev(7, 250)).unwrap();
    let slots = format!(
        "[slots.a]\n{TARGET}\n[slots.b]\n{TARGET}\nignore_sync = false\n[slots.c]\n{TARGET}\ndevices = [\"{disk}\"]\n"
    );
    let test = TestHelper::with(&slots);
    let client = test.client();
    let workers: Vec<WorkerId> = ["a", "b", "c"].map(|slot| create_worker(&client, slot)).into();
    let answers: Vec<String> = workers
        .iter()
        .map(|worker| run(&client, *worker, ASK).1)
        .collect();
    fs::remove_file(&disk).unwrap();
    assert_eq!(
        answers,
        [
            "ignored\n",
            "asked: Bad file descriptor\n",
            "asked: Bad file descriptor\n"
        ]
    );
    test.finish(&workers);
}

const WORK: &str = r#"
python3 - <<'P'
import os, shutil, sqlite3, subprocess, time
def timed(name, work):
    begin = time.monotonic(); work(); print(f"time {name} {time.monotonic() - begin:.6f}")
def sqlite():
    db = sqlite3.connect("loop.db", isolation_level=None)
    db.execute("create table t (a)")
    for i in range(300): db.execute("insert into t values (?)", (i,))
shutil.rmtree("tree", True)
os.makedirs("tree/DEBIAN"); os.makedirs("root/var/lib/dpkg/info"); os.makedirs("root/var/lib/dpkg/updates")
open("root/var/lib/dpkg/status", "w").close(); open("root/var/lib/dpkg/available", "w").close()
open("tree/DEBIAN/control", "w").write("Package: x\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example.com>\nDescription: x\n")
for d in range(30):
    os.makedirs(f"tree/opt/{d}")
    for f in range(50): open(f"tree/opt/{d}/{f}", "w").write("x" * 2000)
subprocess.run(["dpkg-deb", "-Znone", "-b", "tree", "x.deb"], check=True, stdout=subprocess.DEVNULL)
timed("sqlite", sqlite)
timed("unpack", lambda: subprocess.run(["dpkg", "--force-not-root", "--log=/dev/null", "--root", os.path.abspath("root"), "--unpack", "x.deb"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}))
P
"#;

/// Not a test of anything: it prints what ignoring is worth on this machine. `cargo test -p testbed --test
/// host -- --ignored --nocapture what_ignoring_syncs_is_worth`
#[test]
#[ignore = "a measurement, which takes a quiet machine"]
fn what_ignoring_syncs_is_worth() {
    const ROUNDS: usize = 7;
    let slots = format!("[slots.a]\n{TARGET}\n[slots.b]\n{TARGET}\nignore_sync = false\n");
    let test = TestHelper::with(&slots);
    let client = test.client();
    let mut times: std::collections::BTreeMap<(String, &str), Vec<f64>> = Default::default();
    for _ in 0..ROUNDS {
        for (who, slot) in [("ignored", Some("a")), ("done", Some("b")), ("host user", None)] {
            let output = match slot {
                Some(slot) => {
                    let worker = create_worker(&client, slot);
                    let (_, console) = run(&client, worker, &format!("cd /work; {WORK}\nexit 1"));
                    assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
                    console
                }
                None => {
                    let place = tempfile::tempdir_in(&test.host.root).unwrap();
                    let uid = *test.host.uids.end();
                    std::os::unix::fs::chown(place.path(), Some(uid), Some(uid)).unwrap();
                    let mut command = std::process::Command::new("bash");
                    command
                        .args(["-c", WORK])
                        .current_dir(place.path())
                        .uid(uid)
                        .gid(uid);
                    String::from_utf8(command.output().unwrap().stdout).unwrap()
                }
            };
            let mut found = 0;
            for line in output.lines().filter_map(|line| line.strip_prefix("time ")) {
                let (name, time) = line.split_once(' ').unwrap();
                times
                    .entry((name.into(), who))
                    .or_default()
                    .push(time.parse().unwrap());
                found += 1;
            }
            assert_eq!(found, 2, "{who}: {output}");
        }
    }
    for name in ["sqlite", "unpack"] {
        let median = |who| {
            let mut all = times[&(name.to_owned(), who)].clone();
            all.sort_by(f64::total_cmp);
            all[ROUNDS / 2]
        };
        let host = median("host user");
        println!(
            "{name}: ignored {:.2}, done {:.2} of an ordinary user's time on the host ({host:.3} s)",
            median("ignored") / host,
            median("done") / host
        );
    }
    test.finish(&[]);
}
