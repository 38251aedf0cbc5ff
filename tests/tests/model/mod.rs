//! Random requests, asked of the real helper and of its contract as a program (`testbed::helper_model`), with the same
//! answers and the same `List` after each step. Several connections take turns; bursts ask at the same instant, and
//! some order of their requests must explain the answers. Between the requests the helper is killed, the
//! configuration changes, and records are damaged. Needs root.
//!
//! ```text
//! USER_FACTORY_TEST_MODEL=5000 cargo test -p testbed --test host model::    a night
//! SEED=17 cargo test -p testbed --test host model::                         the same scripts again
//! ```
//! A failure prints the shortest script found that still fails, and its seed.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::sync::Barrier;
use std::time::{Instant, SystemTime};

use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestRunner};
use protocol::{ErrorKind, Exit, MAX_LIST, Reply, Request, State, Uid, WorkerId, WorkerInfo};
use testbed::harness::{Client, PAUSE, Running, TEST_TIMEOUT, TestHost, memfd, sealed_memfd, worker_id};
use testbed::helper_model::{Agent, Configuration, Model};
use testbed::host_snapshot::HostSnapshot;
use testbed::test_helper::{slot, token};

const CLIENTS: usize = 3;
const WORKERS: usize = 6;
/// The last is in no configuration.
const SLOTS: [&str; 6] = ["a", "b", "c", "d", "e", "zz"];
/// Fewer than slots, so that they run out.
const UIDS: u32 = 3;

/// The configurations, by the names of their slots and the conflicts as they are written. Then one that is broken.
const CONFIGURATIONS: [(&str, &[(&str, &str)]); 3] = [
    ("abcde", &[("a", "b"), ("d", "b")]),
    ("cd", &[("d", "c")]),
    ("e", &[]),
];
const BROKEN: usize = CONFIGURATIONS.len();

#[derive(Clone, Debug)]
enum Step {
    /// This client asks.
    Ask(usize, ModelRequest),
    /// Each is asked on a connection of its own, all at the same instant.
    Burst(Vec<ModelRequest>),
    /// The helper is killed and started again.
    Restart,
    Configure(usize),
    Damage(usize),
}

/// A request, with the numbers of a worker and a slot.
#[derive(Clone, Copy, Debug)]
enum ModelRequest {
    Create(usize, usize),
    Install(usize, Agent),
    Attach(usize),
    Kill(usize),
    Delete(usize),
    List(Option<usize>),
}

/// A reply, without what the contract leaves open: sentences, and the disk in use.
#[derive(Clone, Debug, PartialEq, Eq)]
enum ModelReply {
    UserCreated(Uid),
    AgentStarted,
    Attached(State),
    Killed,
    Deleted,
    Listed(Vec<WorkerInfo>),
    Error(ErrorKind),
}

fn requests(agents: &'static [Agent]) -> impl Strategy<Value = ModelRequest> + Clone {
    let worker = 0..WORKERS;
    prop_oneof![
        6 => (worker.clone(), 0..SLOTS.len()).prop_map(|(worker, slot)| ModelRequest::Create(worker, slot)),
        4 => (worker.clone(), proptest::sample::select(agents))
            .prop_map(|(worker, agent)| ModelRequest::Install(worker, agent)),
        1 => worker.clone().prop_map(ModelRequest::Attach),
        2 => worker.clone().prop_map(ModelRequest::Kill),
        3 => worker.clone().prop_map(ModelRequest::Delete),
    ]
}

fn steps() -> impl Strategy<Value = Step> {
    const ALL: &[Agent] = &[
        Agent::Stays,
        Agent::Stays,
        Agent::Ends(Exit::Status(7)),
        Agent::NoProgram,
        Agent::Unsealed,
    ];
    let any = prop_oneof![
        16 => requests(ALL),
        1 => proptest::option::of(0..WORKERS).prop_map(ModelRequest::List),
    ];
    // In a burst nothing may change but by its requests, or no order of these explains it: no agent ends by itself,
    // and `List`, which takes no lock, is not asked.
    let burst = proptest::collection::vec(requests(&[Agent::Stays, Agent::Unsealed]), 2..=4);
    prop_oneof![
        40 => (0..CLIENTS, any).prop_map(|(client, request)| Step::Ask(client, request)),
        8 => burst.prop_map(Step::Burst),
        2 => Just(Step::Restart),
        4 => (0..=BROKEN).prop_map(Step::Configure),
        2 => (0..WORKERS).prop_map(Step::Damage),
    ]
}

/// What the request does to the model, and what it should be answered.
fn ask_model(model: &mut Model, workers: &[WorkerId], request: ModelRequest) -> ModelReply {
    let answer = match request {
        ModelRequest::Create(worker, number) => model
            .create_user(workers[worker], &slot(SLOTS[number]))
            .map(ModelReply::UserCreated),
        ModelRequest::Install(worker, agent) => model
            .install_agent(workers[worker], agent)
            .map(|()| ModelReply::AgentStarted),
        ModelRequest::Attach(worker) => model.attach(workers[worker]).map(ModelReply::Attached),
        ModelRequest::Kill(worker) => model.kill(workers[worker]).map(|()| ModelReply::Killed),
        ModelRequest::Delete(worker) => {
            model.delete(workers[worker]);
            Ok(ModelReply::Deleted)
        }
        ModelRequest::List(after) => Ok(ModelReply::Listed(
            model.list(after.map(|after| workers[after]), MAX_LIST).0,
        )),
    };
    answer.unwrap_or_else(ModelReply::Error)
}

/// Ask the helper.
fn ask_helper(client: &Client, workers: &[WorkerId], request: ModelRequest) -> ModelReply {
    let message = match request {
        ModelRequest::Create(worker, number) => Request::CreateUser {
            worker: workers[worker],
            slot: slot(SLOTS[number]),
        },
        ModelRequest::Install(worker, _) => Request::InstallAgent {
            worker: workers[worker],
            bootstrap: token(),
        },
        ModelRequest::Attach(worker) => Request::Attach {
            worker: workers[worker],
        },
        ModelRequest::Kill(worker) => Request::Kill {
            worker: workers[worker],
        },
        ModelRequest::Delete(worker) => Request::Delete {
            worker: workers[worker],
        },
        ModelRequest::List(after) => Request::List {
            after: after.map(|after| workers[after]),
        },
    };
    let agent = match request {
        ModelRequest::Install(_, Agent::Stays) => Some(sealed_memfd(b"#!/bin/bash\nsleep 1000 & exit 0\n")),
        ModelRequest::Install(_, Agent::Ends(Exit::Status(status))) => {
            Some(sealed_memfd(format!("#!/bin/bash\nexit {status}\n").as_bytes()))
        }
        ModelRequest::Install(_, Agent::Ends(exit)) => panic!("no agent here ends so: {exit:?}"),
        ModelRequest::Install(_, Agent::NoProgram) => Some(sealed_memfd(b"\x7fNO PROGRAM")),
        ModelRequest::Install(_, Agent::Unsealed) => Some(memfd(b"#!/bin/true\n")),
        _ => None,
    };
    let (reply, descriptors) = client.ask_with(&message, agent.as_ref().map(AsFd::as_fd));
    assert_eq!(
        descriptors.len(),
        usize::from(reply.carries_descriptor()),
        "{reply:?}"
    );
    match reply {
        Reply::UserCreated { uid, .. } => ModelReply::UserCreated(uid),
        Reply::AgentStarted => ModelReply::AgentStarted,
        Reply::Attached { state } => ModelReply::Attached(state),
        Reply::Killed => ModelReply::Killed,
        Reply::Deleted => ModelReply::Deleted,
        Reply::Listed { workers, more: false } => {
            let workers = workers.into_iter();
            ModelReply::Listed(workers.map(|it| WorkerInfo { disk: None, ..it }).collect())
        }
        Reply::Error(error) => ModelReply::Error(error.kind),
        other => panic!("{request:?} was answered {other:?}"),
    }
}

/// Could the helper have answered this, where the model answers that? The model learns which uid it was.
fn agree(
    model: &mut Model,
    workers: &[WorkerId],
    request: ModelRequest,
    real: &ModelReply,
    should: &ModelReply,
) -> bool {
    match (request, real, should) {
        (ModelRequest::Create(worker, _), ModelReply::UserCreated(uid), ModelReply::UserCreated(_)) => {
            model.settle_for(workers[worker], *uid)
        }
        _ => real == should,
    }
}

/// The real thing.
struct ModelTest {
    host: TestHost,
    helper: Option<Running>,
    /// Each with whether the helper has been restarted since it connected.
    clients: Vec<(Client, bool)>,
    workers: Vec<WorkerId>,
    /// From before the helper's first worker. It takes a second, which is not spent once a script has failed.
    before: Option<HostSnapshot>,
}

impl ModelTest {
    fn new(has_failed: bool) -> ModelTest {
        let mut host = TestHost::new();
        host.uids = *host.uids.start()..=*host.uids.start() + UIDS - 1;
        configure(&host, 0);
        let before = (!has_failed).then(|| HostSnapshot::take(&host));
        let helper = Some(host.start_helper());
        ModelTest {
            clients: (0..CLIENTS).map(|_| (Client::new(&host), false)).collect(),
            workers: (0..WORKERS).map(|_| worker_id()).collect(),
            host,
            helper,
            before,
        }
    }

    fn restart(&mut self) {
        self.helper = None;
        self.helper = Some(self.host.start_helper());
        for (_, is_old) in &mut self.clients {
            *is_old = true;
        }
    }

    /// What a client does: where its connection is of a helper that is no more, and that is said, ask on a new one.
    fn ask(&mut self, client: usize, request: ModelRequest) -> ModelReply {
        let (connection, is_old) = &mut self.clients[client];
        let answer = ask_helper(connection, &self.workers, request);
        if !*is_old || answer != ModelReply::Error(ErrorKind::Busy) {
            return answer;
        }
        (*connection, *is_old) = (Client::new(&self.host), false);
        ask_helper(connection, &self.workers, request)
    }

    /// All at the same instant.
    fn burst(&self, requests: &[ModelRequest]) -> Vec<ModelReply> {
        let clients: Vec<Client> = requests.iter().map(|_| Client::new(&self.host)).collect();
        let barrier = Barrier::new(requests.len());
        std::thread::scope(|scope| {
            let ask = |(request, client)| {
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    ask_helper(client, &self.workers, request)
                })
            };
            let asked: Vec<_> = requests.iter().copied().zip(&clients).map(ask).collect();
            let joined = asked.into_iter().map(|thread| thread.join());
            joined.map(|answer| answer.expect("it was answered")).collect()
        })
    }

    /// What is listed, once every agent that should end by itself has done so.
    fn list(&mut self, model: &Model) -> Vec<WorkerInfo> {
        let begin = Instant::now();
        loop {
            let ModelReply::Listed(real) = self.ask(0, ModelRequest::List(None)) else {
                panic!("List is always answered");
            };
            let ends = |it: &WorkerInfo| {
                let should = model.get(it.worker).map(|it| it.state);
                matches!(should, Some(State::Exited(exit)) if exit != Exit::Unknown)
            };
            let is_ending = |it: &WorkerInfo| it.state == State::Running && ends(it);
            if !real.iter().any(is_ending) {
                return real;
            }
            assert!(begin.elapsed() < TEST_TIMEOUT, "an agent does not end: {real:?}");
            std::thread::sleep(PAUSE);
        }
    }
}

fn configure(host: &TestHost, number: usize) {
    let mut text = String::new();
    match CONFIGURATIONS.get(number) {
        Some((slots, conflicts)) => {
            for name in slots.chars().map(String::from) {
                let written = conflicts.iter().filter(|(one, _)| *one == name);
                let others: Vec<&str> = written.map(|(_, other)| *other).collect();
                writeln!(
                    text,
                    "[slots.{name}]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\nconflicts_with_slots = {others:?}"
                )
                .unwrap();
            }
        }
        None => text.push_str("[slots.a\n"),
    }
    host.configure("http://127.0.0.1:9", 0, &text);
}

fn configuration(number: usize) -> Option<Configuration> {
    let (slots, conflicts) = CONFIGURATIONS.get(number)?;
    Some(Configuration {
        slots: slots.chars().map(|name| slot(&name.to_string())).collect(),
        conflicts: conflicts
            .iter()
            .map(|(one, other)| (slot(one), slot(other)))
            .collect(),
    })
}

/// Every order of these.
fn orders(of: usize) -> Vec<Vec<usize>> {
    let mut all = vec![Vec::new()];
    for next in 0..of {
        let longer = |order: Vec<usize>| {
            (0..=order.len()).map(move |at| {
                let mut order = order.clone();
                order.insert(at, next);
                order
            })
        };
        all = all.into_iter().flat_map(longer).collect();
    }
    all
}

/// One step with the real helper and in the model, and where they differ.
fn take(test: &mut ModelTest, model: &mut Model, step: &Step) -> Result<(), String> {
    match step {
        Step::Ask(client, request) => {
            let real = test.ask(*client, *request);
            let should = ask_model(model, &test.workers, *request);
            if !agree(model, &test.workers, *request, &real, &should) {
                return Err(format!("the helper answers {real:?}, the model {should:?}"));
            }
            Ok(())
        }
        Step::Burst(requests) => {
            let real = test.burst(requests);
            let listed = test.list(model);
            let all_there = orders(requests.len());
            // As one more, in its place: what a request for a slot does before it takes one, or finds that none is
            // to be had.
            let looks_for_slot = |(request, answer): (&ModelRequest, &ModelReply)| {
                matches!(request, ModelRequest::Create(..))
                    && matches!(
                        answer,
                        ModelReply::UserCreated(_)
                            | ModelReply::Error(ErrorKind::SlotTaken | ErrorKind::Limit)
                    )
            };
            let deletes_damaged = requests.iter().zip(&real).any(looks_for_slot);
            let with_deletion = deletes_damaged.then(|| orders(requests.len() + 1));
            let all = all_there.into_iter().chain(with_deletion.into_iter().flatten());
            let mut explained = all.filter_map(|order| {
                let mut model = model.clone();
                let agrees = order.iter().all(|at| {
                    let Some(request) = requests.get(*at) else {
                        model.delete_damaged();
                        return true;
                    };
                    let should = ask_model(&mut model, &test.workers, *request);
                    agree(&mut model, &test.workers, *request, &real[*at], &should)
                });
                (agrees && model.list(None, MAX_LIST).0 == listed).then_some(model)
            });
            *model = explained.next().ok_or_else(|| {
                format!(
                    "no order of these requests explains the answers {real:?} and then the list {listed:?}"
                )
            })?;
            Ok(())
        }
        Step::Restart => {
            // With a broken one it does not start.
            if model.configuration.is_none() {
                configure(&test.host, 0);
                model.configuration = configuration(0);
            }
            test.restart();
            Ok(())
        }
        Step::Configure(number) => {
            configure(&test.host, *number);
            model.configuration = configuration(*number);
            Ok(())
        }
        Step::Damage(worker) => {
            let worker = test.workers[*worker];
            let record = test.host.worker_dir(worker).join("record");
            if record.is_symlink() {
                fs::remove_file(&record).unwrap();
                symlink("a 187", record).unwrap();
            }
            model.damage(worker);
            Ok(())
        }
    }
}

/// The steps, and after each the same list in both, in which nobody shares what is for one. In the end the host is
/// as it was.
fn play(test: &mut ModelTest, steps: &[Step]) -> Result<(), String> {
    test.workers.fill_with(worker_id);
    configure(&test.host, 0);
    let mut model = Model::new(configuration(0).unwrap(), test.host.uids.clone());
    for (number, step) in steps.iter().enumerate() {
        let describe = |what: String| format!("step {number}, {step:?}: {what}");
        take(test, &mut model, step).map_err(describe)?;
        let (real, should) = (test.list(&model), model.list(None, MAX_LIST).0);
        if real != should {
            return Err(describe(format!(
                "the helper lists {real:?}, the model {should:?}"
            )));
        }
        let slots: BTreeSet<_> = real.iter().map(|it| &it.slot).collect();
        let uids: BTreeSet<_> = real.iter().map(|it| it.uid).collect();
        if slots.len() != real.len() || uids.len() != real.len() {
            return Err(describe(format!("a slot or a uid is shared: {real:?}")));
        }
    }
    // Whatever happened, each can be deleted, and nothing is left.
    for worker in 0..WORKERS {
        model.delete(test.workers[worker]);
        let answer = test.ask(0, ModelRequest::Delete(worker));
        if answer != ModelReply::Deleted {
            return Err(format!(
                "worker {worker} cannot be deleted in the end: {answer:?}"
            ));
        }
    }
    let left = test.list(&model);
    if !left.is_empty() {
        return Err(format!("deleted workers are listed: {left:?}"));
    }
    let known = fs::read_dir(test.host.userdb()).expect("the helper has made it");
    match known.flatten().next() {
        None => Ok(()),
        Some(left) => Err(format!("the host still knows {:?}", left.file_name())),
    }
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} must be a number")))
}

#[test]
fn the_helper_does_what_its_model_does() {
    let clock = || {
        SystemTime::UNIX_EPOCH
            .elapsed()
            .map_or(0, |age| age.as_micros() as u64)
    };
    let seed = number("SEED").unwrap_or_else(clock);
    let mut runner = TestRunner::new(Config {
        cases: number("USER_FACTORY_TEST_MODEL").map_or(40, |cases| cases as u32),
        rng_seed: RngSeed::Fixed(seed),
        max_shrink_iters: 200,
        failure_persistence: None,
        ..Config::default()
    });
    // One for all scripts, until one fails in it.
    let (test, has_failed) = (Cell::new(None), Cell::new(false));
    let result = runner.run(&proptest::collection::vec(steps(), 1..60), |steps| {
        let mut here = test.take().unwrap_or_else(|| ModelTest::new(has_failed.get()));
        has_failed.set(true);
        play(&mut here, &steps).map_err(TestCaseError::fail)?;
        has_failed.set(false);
        test.set(Some(here));
        Ok(())
    });
    if let Err(failure) = result {
        panic!("SEED={seed}: {failure}");
    }
    let test = test.take().expect("no script failed");
    test.before.expect("it was taken").assert_unchanged(&test.host);
}
