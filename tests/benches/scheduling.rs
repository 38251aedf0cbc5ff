//! What a pass over all slots and all workers costs, as both grow: the pure part in processor time, which is its time on
//! a quiet machine and little more on a busy one, and a poll of the real two processes in calls.
//!
//! `cargo bench -p testbed --bench scheduling`; needs root for the part `calls`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use protocol::config::Config;
use protocol::{SlotName, State, TargetId, Uid, WorkerId, WorkerInfo};
use supervisor::buildomat::ServerWorker;
use supervisor::factory::{Factory, Input, Output};
use supervisor::identity::{Identity, InstanceId};
use supervisor::reconcile::{ReconcileInput, adopted, reconcile};
use supervisor::schedule::SlotSchedule;
use supervisor::worker::{Phase, Worker};
use testbed::bench::{Group, Measurement, Options, Report};
use testbed::test_factory::{CALLS, TestFactory};

/// Targets that the slots belong to, in turn.
const TARGETS: usize = 16;
/// Each slot excludes so many before it and so many behind it.
const NEIGHBOURS: usize = 32;
/// Calls that take microseconds are measured so many at a time.
const AT_A_TIME: u32 = 16;

fn target(n: usize) -> TargetId {
    TargetId::from_bits(n as u128 % TARGETS as u128 + 1)
}

fn slot(n: usize) -> SlotName {
    format!("slot-{n:05}").parse().expect("a name")
}

/// A configuration of `count` slots.
fn configuration(count: usize, neighbours: usize) -> Config {
    let mut text = String::from("[general]\nbaseurl = \"http://h\"\n[factory]\ntoken_file = \"/t\"\n");
    for n in 0..count {
        let others: Vec<String> = (1..=neighbours)
            .map(|d| format!("\"{}\"", slot((n + d) % count)))
            .collect();
        text += &format!(
            "[slots.{}]\ntarget = \"{}\"\nconflicts_with_slots = [{}]\n",
            slot(n),
            target(n),
            others.join(", ")
        );
    }
    Config::parse(&text).unwrap_or_else(|mistakes| panic!("{mistakes:?}"))
}

fn here() -> Identity {
    Identity::new("here", InstanceId::parse("00000000").expect("eight digits"))
}

fn listed(n: usize) -> ServerWorker {
    ServerWorker {
        id: WorkerId::from_bits(n as u128 + 1),
        target: target(n),
        private: Some(here().owner_tag(&slot(n))),
        bootstrap: None,
        online: true,
        hold: false,
        recycle: false,
    }
}

fn on_host(n: usize) -> WorkerInfo {
    WorkerInfo {
        worker: WorkerId::from_bits(n as u128 + 1),
        slot: slot(n),
        uid: Uid::try_from(1_879_048_192 + n as u32).expect("in the range"),
        state: State::Running,
        disk: None,
    }
}

fn online(n: usize) -> Worker {
    adopted(&listed(n), slot(n), Phase::Running { online: true }, 0)
}

/// All that is asked of the schedule in a pass: what is free, for which targets, and a slot for a job of each.
fn pass(schedule: &SlotSchedule, used: &BTreeSet<SlotName>) -> usize {
    let free = schedule.free(used, []);
    let targets = free.targets();
    let picked = targets.iter().filter_map(|target| free.pick(*target)).count();
    free.slots().count() + picked
}

/// What this thread has had of the processors.
fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .expect("the kernel counts it")
        .into()
}

/// The ways of a group that differ in size, the largest first: ratios are against it.
fn growing<'a>(
    sizes: &'a [usize],
    what: &str,
    go: impl Fn(usize) -> Box<dyn FnMut() + 'a>,
) -> Vec<Measurement<'a>> {
    let way = |size: &usize| {
        let mut once = go(*size);
        let name: &str = Box::leak(format!("{size} {what}").into_boxed_str());
        let go = move || {
            let begin = processor_time();
            (0..AT_A_TIME).for_each(|_| once());
            (processor_time() - begin) / AT_A_TIME
        };
        (name, Box::new(go) as Box<dyn FnMut() -> _>)
    };
    sizes.iter().rev().map(way).collect()
}

/// What a doubling costs at most.
fn aim_at_linear(report: &Report, group: &Group) {
    for pair in group.ways.windows(2) {
        let ratio = pair[0].median() / pair[1].median();
        report.aim(&format!("{} in {}", pair[0].name, pair[1].name), ratio, 2.2);
    }
}

fn passes(options: &Options, report: &mut Report) {
    let sizes = options.size([1250, 2500, 5000, 10_000], [50, 100, 200, 400]);
    let all = [
        (
            "dense conflicts, as many used as can be",
            NEIGHBOURS,
            NEIGHBOURS + 1,
        ),
        ("each excludes two, every third used", 1, 3),
    ];
    for (title, neighbours, every) in all {
        let schedules: BTreeMap<usize, (SlotSchedule, BTreeSet<SlotName>)> = sizes
            .iter()
            .map(|size| {
                let used = (0..size - neighbours).step_by(every).map(slot).collect();
                (
                    *size,
                    (
                        SlotSchedule::of(&configuration(*size, neighbours), &BTreeMap::new()),
                        used,
                    ),
                )
            })
            .collect();
        let ways = growing(&sizes, "slots", |size| {
            let (schedule, used) = &schedules[&size];
            Box::new(|| {
                std::hint::black_box(pass(schedule, used));
            })
        });
        let title = format!("A pass over all slots: {title}");
        let group = Group::measure(&title, options.size(100, 5), ways);
        report.add(group);
        let group = report.groups.last().expect("just added");
        aim_at_linear(report, group);
        report.aim(
            &format!("{} in milliseconds", group.ways[0].name),
            group.ways[0].quantile(0.95) / 1e3,
            5.0,
        );
    }
}

fn reconciling(options: &Options, report: &mut Report) {
    let sizes = options.size([125, 250, 500, 1000], [5, 10, 20, 40]);
    let largest = *sizes.last().expect("there are some");
    let config = configuration(largest, 1);
    let schedule = SlotSchedule::of(&config, &BTreeMap::new());
    let none = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    // Every second slot, so that there is room for the others' conflicts.
    let known: BTreeMap<usize, BTreeMap<WorkerId, SlotName>> = sizes
        .iter()
        .map(|size| (*size, (0..*size).map(|n| (listed(n).id, slot(n))).collect()))
        .collect();
    let server: Vec<ServerWorker> = (0..largest).map(listed).collect();
    let lost: Vec<ServerWorker> = (0..largest)
        .map(|n| ServerWorker {
            online: false,
            private: None,
            ..listed(n)
        })
        .collect();
    let host: Vec<WorkerInfo> = (0..largest).map(on_host).collect();
    let (nobody, identity) = (BTreeMap::new(), here());
    // Long enough for each that has no owner.
    let unknown_for: BTreeMap<WorkerId, u64> = (0..largest).map(|n| (listed(n).id, 600_000)).collect();
    let kinds: [(&str, bool, &[ServerWorker], bool); 3] = [
        ("all are known", true, &server, true),
        ("none is known: all are taken on", false, &server, true),
        (
            "on the server alone: each is given a slot, or waits",
            false,
            &lost,
            false,
        ),
    ];
    for (title, is_known, server, is_here) in kinds {
        let ways = growing(&sizes, "workers", |size| {
            let input = ReconcileInput {
                schedule: &schedule,
                known: if is_known { &known[&size] } else { &nobody },
                server: &server[..size],
                host: if is_here { &host[..size] } else { &[] },
                pending_slots: &none.0,
                ended: &none.1,
                identity: &identity,
                unknown_for: &unknown_for,
                online_timeout: 300_000,
                to_delete: &none.2,
                foreign_seen: false,
                is_making: false,
                now: 0,
            };
            Box::new(move || drop(std::hint::black_box(reconcile(&input))))
        });
        let group = Group::measure(&format!("Reconcile: {title}"), options.size(50, 5), ways);
        report.add(group);
        aim_at_linear(report, report.groups.last().expect("just added"));
    }
    let ways = growing(&sizes, "workers online", |size| {
        let workers: Vec<Worker> = (0..size).map(online).collect();
        let mut factory = Factory::new(here(), config.clone(), workers, 1, 0);
        let mut now = 0;
        let (server, host) = (&server[..size], &host[..size]);
        Box::new(move || {
            now += 1000;
            poll(&mut factory, now, server, host);
        })
    });
    report.add(Group::measure(
        "A whole poll of the core, without its calls",
        options.size(50, 5),
        ways,
    ));
    aim_at_linear(report, report.groups.last().expect("just added"));
}

/// One poll: both are asked, both answer, no job is there.
fn poll(factory: &mut Factory, now: u64, server: &[ServerWorker], host: &[WorkerInfo]) {
    let mut asked = factory.handle(now, Input::Tick);
    let mut calls = 0;
    while let Some(output) = asked.pop() {
        let answer = match output {
            Output::ListServer => Input::ServerListed(Ok(server.to_vec())),
            Output::ListHost => Input::HostListed(Ok(host.to_vec())),
            Output::Lease(_) => Input::Leased(Ok(None)),
            Output::Save(_) => continue,
            other => panic!("a poll in which nothing happens asks for {other:?}"),
        };
        calls += 1;
        asked.extend(factory.handle(now, answer));
    }
    assert_eq!(calls, 3, "calls of a poll");
}

/// With so many workers alive: what a poll asks.
async fn calls(options: &Options, report: &Report) {
    println!("\nCalls of a poll, with jobs running");
    let alive = options.size([1, 8, 64], [1, 2, 4]);
    let slots: String = (0..alive[2])
        .map(|n| format!("[slots.s{n}]\ntarget = \"TARGET\"\n"))
        .collect();
    let mut factory = TestFactory::new(&slots).await;
    factory.restart_with_call_log();
    let (mut running, mut first) = (0, None);
    for wanted in alive {
        for _ in running..wanted {
            factory.submit_blocking();
        }
        running = wanted;
        factory.wait_online(running).await;
        let calls = factory.calls_per_poll(options.size(20, 5)).await;
        let shown = CALLS
            .iter()
            .map(|name| format!("{name} {:.2}", calls.get(*name).unwrap_or(&0.0)));
        println!("  {wanted:>3} workers: {}", shown.collect::<Vec<_>>().join(", "));
        let all: f64 = calls.values().sum();
        let first = *first.get_or_insert(all);
        report.aim(
            &format!(
                "all calls of a poll with {wanted} workers, in those with {}",
                alive[0]
            ),
            all / first,
            1.1,
        );
    }
    factory.release();
    factory.finish().await;
}

fn main() {
    let options = Options::from_args();
    let mut report = Report::new("scheduling");
    if options.wants("pass") {
        passes(&options, &mut report);
    }
    if options.wants("reconcile") {
        reconciling(&options, &mut report);
    }
    if options.wants("calls") {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(calls(&options, &report));
    }
    report.end(&options);
}
