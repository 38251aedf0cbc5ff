//! What user quotas cost a job, and a worker's life. That they hold, `attacks` shows.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::time::Duration;

use testbed::small_disk::SmallDisk;

use super::*;

/// Programs in C, so that the kernel is what is measured. Times are in microseconds.
const WORK: &str = r#"
cd /work; mkdir many; head -c 2000000 /dev/zero >/tmp/in
timed() { local name=$1 begin=${EPOCHREALTIME/./}; shift; "$@"; echo "$name: $((${EPOCHREALTIME/./} - begin))"; }
timed "20,000 files written" split -a 4 -b 100 /tmp/in many/
timed "20,000 files unlinked" rm -r many
timed "a file of 64 MiB written" dd if=/dev/zero of=large bs=1M count=64 status=none
timed "a file of 64 MiB unlinked" rm large
"#;

/// Make a worker, let it run this to its end, and delete it. Returns what it printed: by a connection, for which
/// this waits without taking any of the processors' time.
fn worker_runs(test: &TestHelper, slot: &str, script: &str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let client = test.client();
    let worker = create_worker(&client, slot);
    let script = format!("#!/bin/bash\nexec >/dev/tcp/127.0.0.1/{port}\n{script}\nexit 1\n");
    let (reply, _) = install(&client, worker, sealed_memfd(script.as_bytes()));
    assert_eq!(reply, Reply::AgentStarted);
    let (mut connection, _) = listener.accept().unwrap();
    connection
        .set_read_timeout(Some(Duration::from_secs(900)))
        .unwrap();
    let mut text = String::new();
    connection.read_to_string(&mut text).expect("the job ends");
    test.delete(&[worker]);
    text
}

const LIFE: &str = "a worker made, started, ended, deleted";

/// Not a test of anything: it prints what quotas cost on this machine. `MACHINE_COUNT=1 tests/machine/run tests host
/// --ignored --nocapture what_quotas_cost`, or `cargo test -p testbed --test host -- ` and the same on a machine
/// that has quotas and is quiet: a busy one costs more than they do.
#[test]
#[ignore = "a measurement, which takes a quiet machine with quotas"]
fn what_quotas_cost() {
    const ROUNDS: usize = 5;
    const LIVES: u32 = 10;
    let target = "target = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"";
    let slots = format!(
        "[slots.a]\n{target}\n[slots.b]\n{target}\nlimits.disk = \"512M\"\nlimits.inodes = 50000\nlimits.best_effort = true\n"
    );
    let test = |quotas| {
        let host = TestHost::new();
        host.configure("http://127.0.0.1:9", 0, &slots);
        let disk = SmallDisk::roomy(&host, quotas);
        TestHelper::on(host, Some(disk))
    };
    let (with, without) = (test(true), test(false));
    let all = [
        ("no quotas", &without, "a"),
        ("counted", &with, "a"),
        ("limited", &with, "b"),
    ];
    let mut times: BTreeMap<String, BTreeMap<&str, Vec<f64>>> = BTreeMap::new();
    for _ in 0..ROUNDS {
        for (who, test, slot) in all {
            let mut note = |what: &str, time: f64| {
                times
                    .entry(what.into())
                    .or_default()
                    .entry(who)
                    .or_default()
                    .push(time);
            };
            let text = worker_runs(test, slot, WORK);
            let lines: Vec<_> = text.lines().filter_map(|line| line.split_once(": ")).collect();
            assert_eq!(lines.len(), 4, "{who}: {text}");
            for (what, time) in lines {
                note(what, time.parse().unwrap());
            }
            test.disk.as_ref().unwrap().sync();
            let begin = Instant::now();
            for _ in 0..LIVES {
                worker_runs(test, slot, "");
            }
            note(LIFE, begin.elapsed().as_secs_f64() * 1e6 / f64::from(LIVES));
            test.disk.as_ref().unwrap().sync();
        }
    }
    for (what, by_whom) in times {
        let median = |who| {
            let mut all = by_whom[who].clone();
            all.sort_by(f64::total_cmp);
            all[ROUNDS / 2]
        };
        let base = median("no quotas");
        println!(
            "{what}: counted {:.2}, limited {:.2} of the same without quotas ({:.1} ms)",
            median("counted") / base,
            median("limited") / base,
            base / 1000.0
        );
    }
    with.finish(&[]);
    without.finish(&[]);
}
