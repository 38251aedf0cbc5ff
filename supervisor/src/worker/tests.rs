//! The life of one worker, as a table of transitions, and under random events.

use super::*;
use proptest::prelude::*;
use protocol::Exit;

const TIMEOUT: u64 = 300_000;
const POLICY: WorkerPolicy = WorkerPolicy {
    online_timeout: TIMEOUT,
    job_timeout: None,
    hold_on_failure: true,
    keep_processes: false,
};

fn error() -> CallError {
    CallError::temporary(crate::call_error::Peer::Server, "no disk")
}

fn worker(phase: Phase) -> Worker {
    Worker {
        id: WorkerId::from_bits(1),
        slot: "a".parse().unwrap(),
        target: TargetId::from_bits(2),
        job: None,
        bootstrap: Some("b".repeat(64).parse().unwrap()),
        phase,
        since: 0,
        waiting_since: 0,
        associated: true,
        hold: false,
        hold_since: None,
        gone: false,
        remakes: 0,
        failure: None,
        trouble: None,
        kill: Kill::default(),
    }
}

fn on_server(is_held: bool, must_recycle: bool, online: bool) -> ServerState {
    ServerState::Has {
        is_held,
        must_recycle,
        online,
        associated: true,
        bootstrap: None,
    }
}

fn seen(server: ServerState, host: HostState) -> Event {
    Event::Seen {
        server: Some(server),
        host: Some(host),
    }
}

const IDLE: (bool, bool, bool) = (false, false, false);
const STARTED: Phase = Phase::Running { online: false };
const ONLINE: Phase = Phase::Running { online: true };
const RESETTING: Phase = Phase::Resetting { confirmed: false };
const BROKEN: Phase = Phase::Broken {
    reported: false,
    lines_sent: 0,
};
const RUNNING: HostState = HostState::Has(State::Running);
const LOST: HostState = HostState::Has(State::Exited(Exit::Unknown));
const DIED: HostState = HostState::Has(State::Exited(Exit::Status(1)));

#[test]
fn a_job_that_takes_longer_than_the_slot_lets_it_fails_its_worker() {
    let policy = WorkerPolicy {
        job_timeout: Some(1000),
        ..POLICY
    };
    let poll = seen(on_server(false, false, true), RUNNING);
    // Where answers were lost, its agent is online before any answer about its start was received.
    for before in [
        STARTED,
        Phase::Reserved,
        Phase::Created,
        Phase::Resetting { confirmed: false },
    ] {
        let online = worker(before).step(poll.clone(), 500, &policy);
        assert_eq!(online.phase, ONLINE, "{before:?}");
        assert_eq!(
            online.step(poll.clone(), 1499, &policy).phase,
            ONLINE,
            "{before:?}"
        );
    }
    let online = worker(STARTED).step(poll.clone(), 500, &policy);
    let late = online.clone().step(poll.clone(), 1500, &policy);
    assert_eq!(late.phase, BROKEN);
    assert!(late.failure.unwrap().contains("job_timeout_seconds"));
    // Who holds it has time; what is to be recycled has ended.
    let held = online
        .clone()
        .step(seen(on_server(true, false, true), RUNNING), 9000, &policy);
    assert_eq!(held.phase, ONLINE);
    let recycled = online.step(seen(on_server(false, true, true), RUNNING), 9000, &policy);
    assert_eq!(recycled.phase, Phase::Destroying);
}

#[test]
fn the_processes_of_a_failed_worker_are_ended_before_the_failure_is_reported() {
    let limit = Some(1000);
    let policy = WorkerPolicy {
        job_timeout: limit,
        ..POLICY
    };
    let poll = seen(on_server(false, false, true), RUNNING);
    let late = worker(ONLINE).step(poll.clone(), 1500, &policy);
    assert_eq!((late.phase, late.next_action()), (BROKEN, Some(Action::HostKill)));
    let tells = |w: &Worker| matches!(w.next_action(), Some(Action::ReportFailure { .. }));
    assert!(tells(&late.clone().step(Event::Killed, 1501, &policy)));
    // What cannot be ended is reported first, and tried again while it is held, until the host shows none.
    let failed = late.step(Event::KillFailed(error()), 1501, &policy);
    assert!(tells(&failed));
    let held = failed.step(Event::FailureReported, 1502, &policy);
    assert_eq!(held.next_action(), Some(Action::HostKill));
    let poll = |host| seen(on_server(true, false, true), host);
    assert_eq!(
        held.clone().step(poll(RUNNING), 1503, &policy).next_action(),
        Some(Action::HostKill)
    );
    assert_eq!(held.step(poll(LOST), 1503, &policy).next_action(), None);
    // After a restart the list tells again what is to be done.
    let found = worker(BROKEN).step(poll(RUNNING), 5, &policy);
    assert_eq!(found.next_action(), Some(Action::HostKill));
}

#[test]
fn a_slot_may_keep_the_processes_of_a_failed_worker_and_an_operator_may_end_them_all_the_same() {
    let policy = WorkerPolicy {
        job_timeout: Some(1000),
        keep_processes: true,
        ..POLICY
    };
    let poll = seen(on_server(true, false, true), RUNNING);
    let late = worker(ONLINE).step(seen(on_server(false, false, true), RUNNING), 1500, &policy);
    assert!(matches!(late.next_action(), Some(Action::ReportFailure { .. })));
    let held = late
        .step(Event::FailureReported, 1501, &policy)
        .step(poll.clone(), 1502, &policy);
    assert_eq!(held.next_action(), None);
    let asked = held.step(Event::Kill("they asked".into()), 1503, &policy);
    assert_eq!(
        asked.clone().step(poll, 1504, &policy).next_action(),
        Some(Action::HostKill)
    );
    assert!(
        !asked.failure.unwrap().contains("they asked"),
        "it had failed before"
    );
}

#[test]
fn a_job_that_stalls_at_its_memory_limit_is_failed_and_ended() {
    let failed = worker(ONLINE).step(Event::MemoryStalled, 6, &POLICY);
    assert_eq!(failed.phase, BROKEN);
    assert!(
        failed.failure.as_ref().unwrap().contains("limits.memory"),
        "{failed:?}"
    );
    // Its processes are ended first: the console is complete then.
    assert_eq!(failed.next_action(), Some(Action::HostKill));
    let keeps = WorkerPolicy {
        keep_processes: true,
        ..POLICY
    };
    let kept = worker(ONLINE).step(Event::MemoryStalled, 6, &keeps);
    assert!(matches!(kept.next_action(), Some(Action::ReportFailure { .. })));
    // It has failed already, or is held.
    assert_eq!(failed.clone().step(Event::MemoryStalled, 8, &POLICY), failed);
    let held = worker(ONLINE).step(seen(on_server(true, false, true), RUNNING), 5, &POLICY);
    assert_eq!(held.clone().step(Event::MemoryStalled, 6, &POLICY), held);
    for phase in [
        Phase::Reserved,
        Phase::Created,
        STARTED,
        RESETTING,
        Phase::Destroying,
        Phase::Destroyed,
    ] {
        let other = worker(phase);
        assert_eq!(other.clone().step(Event::MemoryStalled, 6, &POLICY), other);
    }
}

#[test]
fn an_operator_ends_the_processes_of_any_worker_which_fails_its_job() {
    for phase in [Phase::Reserved, Phase::Created, STARTED, ONLINE, RESETTING] {
        let killed = worker(phase).step(Event::Kill("they asked".into()), 6, &POLICY);
        assert_eq!(
            (killed.phase, killed.next_action()),
            (BROKEN, Some(Action::HostKill))
        );
        assert_eq!(killed.failure.as_deref(), Some("they asked"));
    }
    for phase in [Phase::Destroying, Phase::Destroyed] {
        let ending = worker(phase);
        assert_eq!(
            ending.clone().step(Event::Kill("they asked".into()), 6, &POLICY),
            ending
        );
    }
}

#[test]
fn what_is_not_to_be_held_goes_once_the_server_knows() {
    let policy = WorkerPolicy {
        hold_on_failure: false,
        ..POLICY
    };
    let told = worker(BROKEN).step(Event::FailureReported, 5, &policy);
    assert_eq!(told.phase, Phase::Destroying);
}

#[test]
fn the_operator_may_destroy_a_held_worker() {
    for phase in [
        Phase::Reserved,
        Phase::Created,
        STARTED,
        ONLINE,
        RESETTING,
        BROKEN,
        Phase::Destroying,
    ] {
        let held = worker(phase).step(seen(on_server(true, false, false), RUNNING), 5, &POLICY);
        assert_eq!(held.step(Event::Destroy, 6, &POLICY).phase, Phase::Destroying);
    }
    assert_eq!(
        worker(Phase::Destroyed).step(Event::Destroy, 6, &POLICY).phase,
        Phase::Destroyed
    );
}

#[test]
fn since_when_it_waits_for_an_operator_is_remembered() {
    let poll = |hold| seen(on_server(hold, false, true), RUNNING);
    let held = worker(ONLINE)
        .step(poll(true), 7, &POLICY)
        .step(poll(true), 9, &POLICY);
    assert_eq!(held.waits_since(), Some(7));
    assert_eq!(held.step(poll(false), 11, &POLICY).waits_since(), None);
    assert_eq!(
        worker(BROKEN)
            .step(Event::FailureReported, 5, &POLICY)
            .waits_since(),
        Some(5)
    );
}

#[test]
fn the_usual_life() {
    let mut w = Worker {
        associated: false,
        ..worker(Phase::Reserved)
    };
    let events = [
        (Event::Associated, "associate"),
        (Event::UserCreated, "create user"),
        (Event::AgentStarted, "install agent"),
        (seen(on_server(false, false, true), RUNNING), ""),
        (seen(on_server(false, true, true), RUNNING), ""),
        (Event::HostClean, "delete on the host"),
    ];
    for (event, action) in events {
        assert_eq!(
            w.next_action().map_or("", |action| action.name()),
            action,
            "before {event:?}"
        );
        w = w.step(event, 5, &POLICY);
    }
    assert_eq!(w.next_action(), Some(Action::ServerDelete { gone: false }));
}

#[test]
fn what_a_poll_does_to_each_phase() {
    let gone = ServerState::Gone;
    let v = |(hold, recycle, online)| on_server(hold, recycle, online);
    let (online, recycle, held) = ((false, false, true), (false, true, false), (true, false, true));
    for (phase, server, host, after) in [
        (Phase::Reserved, v(recycle), HostState::Absent, Phase::Destroying),
        (Phase::Created, v(recycle), RUNNING, Phase::Destroying),
        (BROKEN, v(recycle), DIED, Phase::Destroying),
        (RESETTING, gone.clone(), LOST, Phase::Destroying),
        (ONLINE, gone, RUNNING, Phase::Destroying),
        (Phase::Destroyed, v(IDLE), HostState::Absent, Phase::Destroyed),
        (STARTED, v(IDLE), RUNNING, STARTED),
        (STARTED, v(online), RUNNING, ONLINE),
        (STARTED, v(IDLE), LOST, RESETTING),
        (STARTED, v(IDLE), HostState::Absent, RESETTING),
        (STARTED, v(IDLE), HostState::Has(State::Created), Phase::Created),
        (STARTED, v(IDLE), DIED, BROKEN),
        (STARTED, v(online), LOST, BROKEN),
        (ONLINE, v(online), DIED, BROKEN),
        (ONLINE, v(online), HostState::Absent, BROKEN),
        (ONLINE, v(held), DIED, ONLINE),
        (Phase::Created, v(IDLE), HostState::Absent, RESETTING),
        (Phase::Created, v(online), RUNNING, ONLINE),
        (RESETTING, v(online), LOST, BROKEN),
        (RESETTING, v(IDLE), LOST, Phase::Resetting { confirmed: true }),
    ] {
        let new = worker(phase).step(seen(server.clone(), host), 5, &POLICY);
        assert_eq!(new.phase, after, "{phase:?} {server:?} {host:?}");
        assert_eq!(
            new.failure.is_some(),
            after == BROKEN && phase != BROKEN,
            "{phase:?} {server:?} {host:?}"
        );
    }
}

#[test]
fn a_server_that_has_forgotten_the_agent_gets_another_after_a_while() {
    let idle = || seen(on_server(false, false, false), RUNNING);
    let doubted = worker(ONLINE).step(idle(), 1_000, &POLICY);
    assert_eq!((doubted.phase, doubted.next_action()), (RESETTING, None));
    // It was only a list of yesterday's: the job goes on.
    let remembered = doubted
        .clone()
        .step(seen(on_server(false, false, true), RUNNING), 2_000, &POLICY);
    assert_eq!(remembered.phase, ONLINE);
    let waiting = doubted.step(idle(), FORGOTTEN_MS, &POLICY);
    assert_eq!(waiting.next_action(), None);
    let again = waiting.step(idle(), 1_000 + FORGOTTEN_MS, &POLICY);
    assert_eq!(again.next_action(), Some(Action::HostDelete));
    let again = again.step(Event::HostClean, 2 * TIMEOUT, &POLICY);
    let again = again.step(
        seen(on_server(false, false, false), HostState::Absent),
        2 * TIMEOUT,
        &POLICY,
    );
    assert_eq!((again.phase, again.failure), (Phase::Reserved, None));
}

#[test]
fn a_failure_that_the_server_has_forgotten_is_reported_again_after_a_while() {
    let told = worker(BROKEN).step(Event::FailureReported, 1_000, &POLICY);
    let forgotten = || seen(on_server(false, false, false), DIED);
    let soon = told.clone().step(forgotten(), FORGOTTEN_MS, &POLICY);
    assert_eq!(soon.next_action(), None);
    let held = told.step(
        seen(on_server(true, false, false), DIED),
        9 * FORGOTTEN_MS,
        &POLICY,
    );
    assert_eq!(held.next_action(), None);
    let again = held.step(forgotten(), 9 * FORGOTTEN_MS, &POLICY);
    assert_eq!(again.phase, BROKEN);
}

#[test]
fn a_slot_that_the_server_has_forgotten_is_associated_again() {
    let forgotten = ServerState::Has {
        is_held: false,
        must_recycle: false,
        online: false,
        associated: false,
        bootstrap: None,
    };
    for (phase, host) in [(Phase::Reserved, HostState::Absent), (STARTED, RUNNING)] {
        let w = worker(phase).step(seen(forgotten.clone(), host), 5, &POLICY);
        assert_eq!(w.next_action().map(|action| action.name()), Some("associate"));
    }
}

#[test]
fn an_agent_that_has_used_up_its_time_is_failed_with_the_limits_name() {
    let timed_out = HostState::Has(State::Exited(Exit::TimedOut));
    for (phase, sentence) in [
        (
            ONLINE,
            "the agent was ended at the slot's limits.run_time_seconds",
        ),
        (
            STARTED,
            "the agent was ended at the slot's limits.run_time_seconds before it came online",
        ),
    ] {
        let online = phase == ONLINE;
        let held = worker(phase).step(seen(on_server(true, false, online), timed_out), 5, &POLICY);
        assert_eq!(held.phase, phase);
        let failed = held.step(seen(on_server(false, false, online), timed_out), 5, &POLICY);
        assert_eq!(failed.phase, BROKEN);
        assert_eq!(failed.failure.as_deref(), Some(sentence));
    }
    // Its job was done before: there is nothing to fail.
    let done = worker(ONLINE).step(seen(on_server(false, true, true), timed_out), 5, &POLICY);
    assert_eq!((done.phase, done.failure), (Phase::Destroying, None));
}

#[test]
fn exits_are_described() {
    for (exit, words) in [
        (Exit::Status(3), "status 3"),
        (Exit::Signal(9), "signal 9"),
        (Exit::NotStarted, "not be started"),
        (Exit::TimedOut, "run_time_seconds"),
        (Exit::Unknown, "killed"),
    ] {
        let sentence = life::describe_exit(exit);
        assert!(sentence.contains(words), "{sentence}");
    }
}

#[test]
fn a_worker_of_which_one_list_is_missing_does_not_change() {
    for phase in [Phase::Reserved, Phase::Created, STARTED, ONLINE, BROKEN] {
        let event = Event::Seen {
            server: None,
            host: Some(HostState::Absent),
        };
        assert_eq!(worker(phase).step(event, TIMEOUT * 9, &POLICY), worker(phase));
        let event = Event::Seen {
            server: Some(on_server(false, false, phase == ONLINE)),
            host: None,
        };
        assert_eq!(worker(phase).step(event, 5, &POLICY), worker(phase));
    }
}

#[test]
fn time_runs_out_once_and_not_while_held_or_while_the_server_is_away() {
    let poll = |hold| seen(on_server(hold, false, false), RUNNING);
    let w = worker(STARTED).step(poll(false), TIMEOUT - 1, &POLICY);
    assert_eq!(w.phase, STARTED);
    let late = w
        .clone()
        .step(Event::Blocked("no disk".into()), TIMEOUT, &POLICY)
        .step(poll(false), TIMEOUT, &POLICY);
    assert_eq!(late.phase, BROKEN);
    assert_eq!(
        late.failure.as_deref(),
        Some("the agent did not come online within 300 s; the last problem was: no disk")
    );

    let held = w
        .clone()
        .step(poll(true), TIMEOUT, &POLICY)
        .step(poll(true), 5 * TIMEOUT, &POLICY);
    assert_eq!((held.phase, held.next_action()), (STARTED, None));
    let released = held
        .step(poll(false), 5 * TIMEOUT, &POLICY)
        .step(poll(false), 6 * TIMEOUT - 1, &POLICY);
    assert_eq!(released.phase, STARTED);
    assert_eq!(released.step(poll(false), 6 * TIMEOUT, &POLICY).phase, BROKEN);

    let waited = w.step(Event::Waited { ms: 1000 }, TIMEOUT + 500, &POLICY);
    assert_eq!(
        waited.clone().step(poll(false), TIMEOUT + 999, &POLICY).phase,
        STARTED
    );
    assert_eq!(waited.step(poll(false), TIMEOUT + 1000, &POLICY).phase, BROKEN);
}

#[test]
fn a_lost_worker_is_made_again_three_times() {
    let mut w = worker(STARTED);
    for n in 1..=MAX_REMAKES {
        w = w.step(seen(on_server(false, false, false), LOST), 5, &POLICY);
        assert_eq!((w.phase, w.next_action(), w.remakes), (RESETTING, None, n));
        w = w.step(seen(on_server(false, false, false), LOST), 5, &POLICY);
        assert_eq!(w.next_action(), Some(Action::HostDelete));
        w = w.step(Event::HostClean, 5, &POLICY);
        assert_eq!(w.next_action().unwrap().name(), "create user");
        w = w
            .step(Event::UserCreated, 5, &POLICY)
            .step(Event::AgentStarted, 5, &POLICY);
    }
    w = w.step(seen(on_server(false, false, false), LOST), 5, &POLICY);
    assert_eq!(w.phase, BROKEN);
}

#[test]
fn a_failure_is_reported_even_when_held_and_goes_on_where_it_stopped() {
    let w = worker(Phase::Created).step(Event::StartFailed("no such group".into()), 5, &POLICY);
    let w = w.step(
        Event::LinesReported {
            lines: 3,
            error: error(),
        },
        5,
        &POLICY,
    );
    let w = w.step(seen(on_server(true, false, false), DIED), 5, &POLICY);
    assert_eq!(
        w.next_action(),
        Some(Action::ReportFailure {
            reason: "no such group".into(),
            lines_sent: 3
        })
    );
    let held = w.clone().step(Event::FailureReported, 5, &POLICY);
    assert_eq!(
        (held.phase, held.next_action()),
        (
            Phase::Broken {
                reported: true,
                lines_sent: 3
            },
            None
        )
    );
    assert_eq!(
        w.step(Event::CannotReport("old".into()), 5, &POLICY).phase,
        Phase::Destroying
    );
}

fn any_event() -> impl Strategy<Value = Event> {
    let host = prop_oneof![
        Just(HostState::Absent),
        Just(RUNNING),
        Just(LOST),
        Just(DIED),
        Just(HostState::Has(State::Exited(Exit::TimedOut))),
        Just(HostState::Has(State::Created))
    ];
    let server = prop_oneof![
        Just(ServerState::Gone),
        any::<(bool, bool, bool)>().prop_map(|(h, r, o)| on_server(h, r && !h, o))
    ];
    let poll = (proptest::option::of(server), proptest::option::of(host));
    prop_oneof![
        8 => poll.prop_map(|(server, host)| Event::Seen { server, host }),
        1 => Just(Event::Associated),
        1 => Just(Event::UserCreated),
        1 => Just(Event::AgentStarted),
        1 => Just(Event::FailureReported),
        1 => Just(Event::CannotReport("old".into())),
        1 => Just(Event::HostClean),
        1 => Just(Event::HostLost),
        1 => Just(Event::StartFailed("x".into())),
        1 => Just(Event::CallFailed(error())),
        1 => (0u64..TIMEOUT).prop_map(|ms| Event::Waited { ms }),
        1 => (0u32..300).prop_map(|lines| Event::LinesReported { lines, error: error() }),
    ]
}

proptest! {
    #[test]
    fn whatever_happens_ends_are_final_and_recycling_works(
        events in proptest::collection::vec((any_event(), 0u64..TIMEOUT), 0..60),
    ) {
        let (mut w, mut now) = (worker(Phase::Reserved), 0);
        for (event, pause) in events {
            now += pause / 8;
            let old = w.clone();
            w = w.step(event.clone(), now, &POLICY);
            let rank = |phase| match phase { Phase::Destroying => 1, Phase::Destroyed => 2, _ => 0 };
            prop_assert!(rank(w.phase) >= rank(old.phase), "{old:?} {event:?}");
            prop_assert!(w.remakes <= MAX_REMAKES);
            prop_assert!(
                old.phase != ONLINE || !w.phase.is_starting() || w.phase == RESETTING,
                "an agent is never started twice: {event:?}"
            );
            prop_assert_eq!((w.id, &w.slot), (old.id, &old.slot));
            if matches!(w.phase, Phase::Broken { .. }) { prop_assert!(w.failure.is_some()); }
            if old.phase == w.phase { prop_assert_eq!(old.since, w.since); }
        }
        // From everywhere: recycled, cleaned, forgotten.
        let ended = w
            .step(seen(on_server(false, true, false), HostState::Absent), now, &POLICY)
            .step(Event::HostClean, now, &POLICY);
        prop_assert_eq!(ended.phase, Phase::Destroyed);
    }
}
