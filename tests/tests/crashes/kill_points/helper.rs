//! The helper, killed at each system call of each of its processes.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Mutex;

use nix::sys::signal::Signal;
use protocol::{Reply, Request, State, WorkerId};
use testbed::harness::Client;
use testbed::host_snapshot::HostSnapshot;
use testbed::sample::Sample;
use testbed::test_helper::{list, wait_until};
use testbed::tracer::calls::{MEMORY, name};
use testbed::tracer::helper::{KINDS, KillPlan, KillPoint, TraceResult, TracedKind};

use crate::crashes::kill_points::restartable_helper::{
    Operation, RestartableHelper, ask, ask_with, is_success, prepare, request, state_of,
};

/// What is done after a kill.
#[derive(Clone, Copy, Debug)]
enum After {
    /// The same once more, to its success; then `Delete`.
    Repeat,
    Delete,
}

/// The points at which to kill, in their forms.
fn plans(seen: &TraceResult, sample: &Sample) -> Vec<(KillPlan, After)> {
    let mut plans = Vec::new();
    // One alone, or all that is the service's with it: two forms at a time, each with one of these ends.
    let forms = [
        [(false, After::Repeat), (true, After::Delete)],
        [(true, After::Repeat), (false, After::Delete)],
    ];
    for (kind, calls) in &seen.calls {
        let mut names = BTreeSet::new();
        for (n, number) in calls.iter().enumerate() {
            let two = forms[(n + sample.offset) % 2];
            let some = if sample.is_all() { &two[..] } else { &two[..1] };
            let mut take = |when, forms: &[(bool, After)]| {
                for (all, after) in forms {
                    let (kind, all) = (*kind, *all);
                    let plan = KillPlan {
                        kind,
                        when,
                        all,
                        hangs: None,
                    };
                    plans.push((plan, *after));
                }
            };
            // By its name: the nth is not the same in every run.
            if names.insert(*number) {
                take(KillPoint::First(*number), some);
            }
            if sample.has(n) {
                take(KillPoint::Nth(n), some);
            }
        }
    }
    plans
}

/// What is still to be killed, and what has been.
struct Kills {
    plans: VecDeque<(KillPlan, After)>,
    /// Those that have found nothing to kill, once: no two runs are quite the same.
    again: VecDeque<(KillPlan, After)>,
    killed: usize,
    missed: usize,
    covered: BTreeSet<(TracedKind, i64)>,
}

/// A helper whose first worker found the root file system not yet built: all others find it.
fn helper_with_root(slot: &str) -> RestartableHelper {
    let test = RestartableHelper::new();
    let first = prepare(&test, Operation::Delete, slot);
    assert_eq!(
        ask(&test.host, &request(Operation::Delete, first, slot)),
        Some(Reply::Deleted)
    );
    test
}

/// Kill at the points of `operation` on a worker in this slot, in two helpers at a time.
fn kill_at_every_step_of(operation: Operation, slot: &str) {
    let mut test = helper_with_root(slot);
    let snapshot = HostSnapshot::take(&test.host);
    let sample = Sample::of(61);
    let undisturbed = |test: &RestartableHelper| {
        let worker = prepare(test, operation, slot);
        let (reply, mut seen) = test.under_the_tracer(&request(operation, worker, slot), None);
        assert!(reply.as_ref().is_some_and(is_success), "{reply:?}");
        end(test, worker, "an operation that nobody disturbed");
        // What differs with the slot's network; the others are killed in the other slot.
        let differs = |kind: &TracedKind| matches!(kind, TracedKind::FirstProcess | TracedKind::Agent);
        if slot == "alone" && !sample.is_all() {
            seen.calls.retain(|kind, _| differs(kind));
        }
        seen
    };
    let mut runs: Vec<TraceResult> = (0..3).map(|_| undisturbed(&test)).collect();
    // The points of a build could not be found again: see `is_of_a_build`.
    let has_build = |seen: &TraceResult| seen.calls.contains_key(&TracedKind::Builder);
    while runs.len() < 20 && runs.iter().all(has_build) {
        runs.push(undisturbed(&test));
    }
    let plans = VecDeque::from(plans(shortest(&runs), &sample));
    let kills = Mutex::new(Kills {
        plans,
        again: VecDeque::new(),
        killed: 0,
        missed: 0,
        covered: BTreeSet::new(),
    });
    std::thread::scope(|scope| {
        scope.spawn(|| kill_at_each(&kills, &mut helper_with_root(slot), operation, slot));
        kill_at_each(&kills, &mut test, operation, slot);
    });
    let mut kills = kills.into_inner().expect("no thread has panicked");
    // What a busy machine made it do at first, and not any more, could not be found again.
    runs.extend((0..2).map(|_| undisturbed(&test)));
    snapshot.assert_unchanged(&test.host);
    if operation == Operation::Install {
        // They may have been missed.
        kills
            .covered
            .extend(runs.iter().flat_map(all_calls).filter(is_of_a_build));
    }
    report(
        &format!("{operation:?} in {slot}"),
        &runs,
        &kills.covered,
        kills.killed,
        kills.missed,
        &sample,
    );
}

/// Kill this helper at one point after the other, until none is left.
fn kill_at_each(kills: &Mutex<Kills>, test: &mut RestartableHelper, operation: Operation, slot: &str) {
    let lock = || kills.lock().expect("no thread has panicked");
    let next = || {
        let mut kills = lock();
        let plan = kills.plans.pop_front().map(|plan| (plan, true));
        plan.or_else(|| kills.again.pop_front().map(|plan| (plan, false)))
    };
    while let Some(((plan, after), is_first)) = next() {
        let worker = prepare(test, operation, slot);
        let (_, seen) = test.under_the_tracer(&request(operation, worker, slot), Some(plan));
        let Some(at) = seen.killed else {
            match is_first {
                true => lock().again.push_back((plan, after)),
                false => lock().missed += 1,
            }
            end(test, worker, "an operation that ended before it was to be killed");
            continue;
        };
        let what = format!("{operation:?} in {slot}, killed: {at}, then {after:?}");
        let killed = {
            let mut kills = lock();
            kills.killed += 1;
            kills.covered.insert((at.kind, at.number));
            kills.killed
        };
        if killed % 200 == 0 {
            println!("{what}: {killed} so far");
        }
        if at.service {
            test.restart();
        }
        if let After::Repeat = after {
            repeat(test, operation, worker, slot, &what);
        }
        end(test, worker, &what);
    }
}

/// The same request again must succeed, and an agent is started once.
fn repeat(test: &RestartableHelper, operation: Operation, worker: WorkerId, slot: &str, what: &str) {
    let before = state_of(test, worker);
    let reply = ask_with(&test.host, &request(operation, worker, slot));
    let (reply, mut descriptors) =
        reply.unwrap_or_else(|| panic!("after {what}: the helper closed the connection"));
    assert!(is_success(&reply), "after {what}: {reply:?}");
    if operation == Operation::Install {
        let console = descriptors.pop().expect("a console comes").into();
        let client = Client::new(&test.host);
        if before == Some(State::Created) {
            wait_until(&client, worker, |state| state == State::Running);
            testbed::test_helper::wait_for_line(&console, "ready");
        }
        let text = testbed::test_helper::read(&console);
        assert!(
            text.matches("ready").count() <= 1,
            "after {what}: an agent was started twice"
        );
    }
}

fn end(test: &RestartableHelper, worker: WorkerId, what: &str) {
    let was_one = state_of(test, worker).is_some();
    let reply = ask(&test.host, &Request::Delete { worker });
    assert_eq!(reply, Some(Reply::Deleted), "after {what}");
    assert_eq!(list(&Client::new(&test.host)), [], "after {what}");
    test.assert_clean(was_one, what);
}

/// What happens on the host meanwhile, a mount above all, makes the monitor do more: none of it is in the shortest run.
fn shortest(runs: &[TraceResult]) -> &TraceResult {
    let calls = |seen: &&TraceResult| seen.calls.values().map(Vec::len).sum::<usize>();
    runs.iter().min_by_key(calls).expect("there are runs")
}

/// Which calls each of the processes makes.
fn all_calls(seen: &TraceResult) -> BTreeSet<(TracedKind, i64)> {
    let of = |(kind, calls): (&TracedKind, &Vec<i64>)| calls.iter().map(|n| (*kind, *n)).collect::<Vec<_>>();
    seen.calls.iter().flat_map(of).collect()
}

/// The jobs' root file system is only built again where mounts of the host have changed since, as tests beside this one
/// change them: an installation may make these calls in every run that is looked at, and not in the one that is to be
/// killed. After it, devices are looked for. The start builds it in every run, and the other operations in none.
fn is_of_a_build((kind, number): &(TracedKind, i64)) -> bool {
    const OF_THE_MONITOR: [i64; 8] = [
        libc::SYS_socketpair,
        libc::SYS_inotify_init1,
        libc::SYS_clone,
        libc::SYS_lseek,
        libc::SYS_chdir,
        libc::SYS_fchdir,
        libc::SYS_getdents64,
        libc::SYS_inotify_add_watch,
    ];
    matches!(kind, TracedKind::Builder | TracedKind::DeviceRefresh)
        || *kind == TracedKind::Monitor && OF_THE_MONITOR.contains(number)
}

/// Say at how many points was killed, and fail if it was not as it should be.
fn report(
    what: &str,
    runs: &[TraceResult],
    covered: &BTreeSet<(TracedKind, i64)>,
    killed: usize,
    missed: usize,
    sample: &Sample,
) {
    let counts: Vec<String> = KINDS
        .iter()
        .filter_map(|kind| shortest(runs).calls.get(kind).map(|calls| (kind, calls.len())))
        .map(|(kind, n)| format!("{kind:?} {n}"))
        .collect();
    println!(
        "{what}: killed {killed} times, at every {}th call from {} on and at the first of each; \
         system calls: {}; {missed} missed",
        sample.step,
        sample.offset,
        counts.join(", ")
    );
    // What is called in one run and not in another need not be found again.
    let always = runs.iter().map(all_calls).reduce(|one, other| &one & &other);
    let left: Vec<String> = (&always.expect("there are runs") - covered)
        .iter()
        // How often one process waits for another is the machine's affair.
        .filter(|(_, number)| !MEMORY.contains(number) && *number != libc::SYS_clock_nanosleep)
        // Only who lets go of an old root file system receives: there is one where mounts of the host have changed meanwhile.
        .filter(|call| **call != (TracedKind::Builder, libc::SYS_recvmsg))
        .map(|(kind, number)| format!("{kind:?} {}", name(*number)))
        .collect();
    assert!(left.is_empty(), "{what}: never killed at {left:?}");
    assert!(killed >= 25, "{what}: killed {killed} times, that is too few");
    assert!(
        missed <= killed,
        "{what}: {missed} of {killed} points were missed"
    );
}

#[test]
fn a_helper_cut_off_anywhere_at_its_start_can_be_started_again_and_loses_nothing() {
    let mut test = RestartableHelper::new();
    let snapshot = HostSnapshot::take(&test.host);
    let running = prepare(&test, Operation::Delete, "rich");
    let created = prepare(&test, Operation::Install, "plain");
    let before = list(&Client::new(&test.host));
    let mut undisturbed = || {
        test.helper.signal(Signal::SIGKILL);
        test.helper.wait_for_end();
        test.start_under_the_tracer(None)
    };
    let mut runs: Vec<TraceResult> = (0..3).map(|_| undisturbed()).collect();
    let sample = Sample::of(61);
    let (mut killed, mut missed) = (0, 0);
    let mut covered: BTreeSet<(TracedKind, i64)> = BTreeSet::new();
    // There is nobody but the monitor and its listener yet, and nothing to repeat but the start: the other forms are the same.
    let mut plans = plans(shortest(&runs), &sample);
    plans.dedup_by(|one, other| one.0.when == other.0.when && one.0.kind == other.0.kind);
    for (plan, _) in plans {
        test.helper.signal(Signal::SIGKILL);
        test.helper.wait_for_end();
        let Some(at) = test.start_under_the_tracer(Some(plan)).killed else {
            missed += 1;
            continue;
        };
        killed += 1;
        covered.insert((at.kind, at.number));
        if at.service {
            test.restart();
        } else {
            // The monitor starts another listener.
            test.host.wait_for_helper();
        }
        let now = list(&Client::new(&test.host));
        assert_eq!(now, before, "after the start, killed: {at}");
    }
    assert_eq!(before.len(), 2);
    assert!(before.iter().any(|info| info.state == State::Running));
    // And one that nobody killed.
    test.helper.signal(Signal::SIGKILL);
    test.helper.wait_for_end();
    runs.push(test.start_under_the_tracer(None));
    for worker in [running, created] {
        let reply = ask(&test.host, &Request::Delete { worker });
        assert_eq!(reply, Some(Reply::Deleted));
    }
    test.assert_clean(true, "all starts");
    snapshot.assert_unchanged(&test.host);
    report("the start", &runs, &covered, killed, missed, &sample);
}

#[test]
fn create_user_cut_off_anywhere_can_be_repeated_and_deleted() {
    kill_at_every_step_of(Operation::Create, "rich");
}

#[test]
fn install_agent_cut_off_anywhere_can_be_repeated_and_deleted() {
    kill_at_every_step_of(Operation::Install, "rich");
}

#[test]
fn install_agent_without_a_network_cut_off_anywhere_can_be_repeated_and_deleted() {
    kill_at_every_step_of(Operation::Install, "alone");
}

#[test]
fn kill_cut_off_anywhere_can_be_repeated_and_deleted() {
    kill_at_every_step_of(Operation::Kill, "rich");
}

#[test]
fn delete_cut_off_anywhere_gets_to_its_end_when_repeated() {
    kill_at_every_step_of(Operation::Delete, "rich");
}
