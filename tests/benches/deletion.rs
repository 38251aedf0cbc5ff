//! Deleting what a job has left, by `Delete` over the helper's socket: against `rm -rf` and the best loop of two
//! threads. It is deleted as the job's user, by processes that trust no name and keep a bounded number of descriptors.
//!
//!     cargo bench -p testbed --bench deletion

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use protocol::Request;
use testbed::bench::{Group, Options, Report, c_program, time};
use testbed::harness::{Client, TestHost, sealed_memfd, worker_id};

fn main() {
    let options = Options::from_args();
    let host = TestHost::new();
    let slot = "[slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n";
    host.configure("http://127.0.0.1:1", 0, slot);
    let _helper = host.start_helper();
    let tools = tempfile::tempdir().expect("a directory");
    let directories = c_program(tools.path(), "directories", &["-O2", "-pthread"]);
    // On the same file system.
    let beside = host.root.join("beside");
    let mut report = Report::new("deletion");
    for (kind, title, large, small, rounds) in [
        ("many", "100,000 files in 1,000 directories", 100_000, 2_000, 3),
        ("deep", "A tree 5,000 deep", 5_000, 500, 7),
        ("flat", "300,000 files in one directory", 300_000, 3_000, 3),
    ] {
        if !options.wants(kind) {
            continue;
        }
        let size = options.size(large, small);
        let grow = |place: &Path, uid: u32| {
            let mut make = Command::new(&directories);
            make.args(["make", kind]).arg(place);
            make.args([size.to_string(), uid.to_string()]);
            assert!(make.status().expect("it was built").success());
            // What is still to be written is not what is measured.
            nix::unistd::syncfs(fs::File::open(place).expect("it was made")).expect("it is a disk");
        };
        let other = |command: &mut Command| -> Duration {
            fs::create_dir(&beside).expect("a directory of ours");
            grow(&beside, *host.uids.start());
            let took = time(|| assert!(command.status().expect("it can be started").success()));
            let _ = fs::remove_dir(&beside);
            took
        };
        let group = report.add(Group::measure(
            title,
            options.size(rounds, 1),
            vec![
                ("helper", Box::new(|| delete(&host, &grow))),
                (
                    "rm -rf",
                    Box::new(|| other(Command::new("rm").arg("-rf").arg(&beside))),
                ),
                (
                    "two threads",
                    Box::new(|| other(Command::new(&directories).arg("delete").arg(&beside))),
                ),
            ],
        ));
        let [rm, best] = ["rm -rf", "two threads"].map(|way| group.ratio("helper", way));
        report.aim(&format!("{title}: against rm -rf"), rm, 1.0);
        report.aim(&format!("{title}: against the best loop"), best, 1.15);
    }
    report.end(&options);
}

/// A worker whose job has left such a tree.
fn delete(host: &TestHost, grow: &dyn Fn(&Path, u32)) -> Duration {
    let client = Client::new(host);
    let worker = worker_id();
    let slot = "a".parse().expect("it is a name");
    let protocol::Reply::UserCreated { uid, .. } = client.ask(&Request::CreateUser { worker, slot }).0 else {
        panic!("no user was made")
    };
    let bootstrap = "abcdefgh01234567".parse().expect("it is a token");
    let agent = sealed_memfd(&fs::read("/bin/true").expect("every host has it"));
    let request = Request::InstallAgent { worker, bootstrap };
    client.ask_with(&request, Some(std::os::fd::AsFd::as_fd(&agent)));
    client.ask(&Request::Kill { worker });
    grow(&host.worker_dir(worker).join("fs/work"), uid.get());
    let took = time(|| {
        assert_eq!(
            client.ask(&Request::Delete { worker }).0,
            protocol::Reply::Deleted
        )
    });
    assert!(!host.worker_dir(worker).exists());
    took
}
