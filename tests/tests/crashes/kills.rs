//! Row 73: supervisor and helper killed at random moments, under a load of jobs. The kills at every system call are
//! elsewhere; here everything is under way at the same time.

use nix::sys::signal::Signal;
use supervisor::backoff::Rng;
use testbed::fake_server::{State, Ulid};
use testbed::harness::Log;
use testbed::test_factory::{TestFactory, lines};

/// Nights set `USER_FACTORY_TEST_KILLS`; `USER_FACTORY_TEST_SEED` repeats the choices of a run, though not what the
/// machine makes of them.
const KILLS: u64 = 25;

/// More slots than processors, two in conflict.
const SLOTS: &str = r#"
[slots.a]
target = "TARGET"
conflicts_with_slots = ["b"]
[slots.b]
target = "TARGET"
[slots.c]
target = "TARGET"
[slots.d]
target = "TARGET"
"#;

/// Some work, and a daemon that is left behind.
const JOB: &str = "for i in 1 2 3; do echo $i; sleep 0.2; done; \
                   (setsid nohup sleep 1000 >/dev/null 2>&1 &); echo end";

fn number(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|text| text.parse().expect("a number"))
}

/// No slot has two live workers, and conflicting ones have one between them.
fn slots_are_shared_by_nobody(state: &State) {
    let live = state.workers.values().filter(|worker| !worker.deleted);
    let mut slots: Vec<&str> = live
        .filter_map(|worker| worker.private.as_deref()?.split('@').next())
        .map(|slot| if slot == "b" { "a" } else { slot })
        .collect();
    slots.sort_unstable();
    let all = slots.len();
    slots.dedup();
    assert_eq!(
        all,
        slots.len(),
        "a slot, or a pair of conflicting ones, has two workers: {slots:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn row_73_supervisor_and_helper_killed_at_random_moments_lose_no_job_and_leave_nothing() {
    let kills = number("USER_FACTORY_TEST_KILLS").unwrap_or(KILLS);
    let seed = number("USER_FACTORY_TEST_SEED").unwrap_or_else(|| {
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
        now.as_nanos() as u64
    });
    println!("USER_FACTORY_TEST_SEED={seed} USER_FACTORY_TEST_KILLS={kills}");
    let mut random = Rng::new(seed);
    let mut factory = TestFactory::new(SLOTS).await;
    let requests = |factory: &TestFactory| factory.server.all_requests().values().sum::<u64>();
    let mut jobs: Vec<Ulid> = Vec::new();
    let mut logs: Vec<Log> = Vec::new();
    for _ in 0..kills {
        // There is always something to begin.
        let waiting = jobs
            .iter()
            .filter(|job| factory.server.job(**job).is_queued())
            .count();
        for _ in waiting..3 {
            jobs.push(factory.submit(JOB));
        }
        // Somewhere within the next few requests, and a little after one.
        let until = requests(&factory) + 1 + random.draw() % 25;
        factory
            .wait_for_state(|state| {
                slots_are_shared_by_nobody(state);
                (requests(&factory) >= until).then_some(())
            })
            .await;
        for _ in 0..random.draw() % 20_000 {
            std::hint::spin_loop();
        }
        let (helper, supervisor) = [(true, false), (false, true), (true, true)][(random.draw() % 3) as usize];
        if helper {
            factory.helper.signal(Signal::SIGKILL);
        }
        if supervisor {
            factory.supervisor.signal(Signal::SIGKILL);
        }
        if helper {
            factory.helper.wait();
            logs.push(factory.helper.log.clone());
            factory.helper = factory.host.start_helper();
        }
        if supervisor {
            factory.supervisor.wait();
            logs.push(factory.supervisor.log.clone());
            factory.supervisor = factory.host.start_supervisor();
        }
    }
    let all_end = |state: &State| {
        slots_are_shared_by_nobody(state);
        jobs.iter().all(|job| state.jobs[job].is_complete()).then_some(())
    };
    factory.wait_for_state(all_end).await;
    logs.extend([factory.helper.log.clone(), factory.supervisor.log.clone()]);
    let failed: Vec<_> = jobs.iter().map(|job| factory.server.job(*job)).collect();
    let failed: Vec<_> = failed.iter().filter(|job| job.state() != "completed").collect();
    let text = || {
        logs.iter()
            .map(Log::text)
            .collect::<Vec<_>>()
            .join("\n--- the next run\n")
    };
    assert!(failed.is_empty(), "seed {seed}: {failed:#?}\n{}", text());
    // A worker that was remade has printed nothing twice: one that began was never begun again.
    for job in &jobs {
        let printed = lines(&factory.server.job(*job), "stdout");
        assert_eq!(printed, ["1", "2", "3", "end"], "seed {seed}: job {job}");
    }
    println!(
        "{} jobs, {} workers, {kills} kills",
        jobs.len(),
        factory.server.workers().len()
    );
    factory.finish().await;
}
