//! The supervisor, killed before each of its writes and requests, in the course of one job; then started again.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::chown;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::sys::signal::Signal;
use protocol::config::STATE_DIR;
use testbed::fake_server::{JobSpec, LEASE, Server, ServerOptions, State, Ulid};
use testbed::harness::{SUPERVISOR_UID, TEST_TIMEOUT, TestHost, binaries};
use testbed::sample::Sample;
use testbed::service_manager::Service;
use testbed::test_factory::lines;
use testbed::tracer::outward::{OutwardCalls, watch};
use testbed::tracer::wait_until_stopped;
use testbed::worker_snapshot::WorkerSnapshot;

/// How a job goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum JobCourse {
    /// To its end.
    Done,
    /// Its agent is no program: the worker is held, and an operator releases it.
    NoStart,
    /// It runs, and is cancelled.
    Cancelled,
}

/// A server, a helper, and a supervisor that may be gone at any time.
struct RestartableFactory {
    course: JobCourse,
    server: Server,
    _helper: Service,
    supervisor: Service,
    before: WorkerSnapshot,
    host: TestHost,
    _agent: tempfile::TempDir,
}

impl RestartableFactory {
    async fn new(course: JobCourse) -> RestartableFactory {
        let directory = tempfile::tempdir().unwrap();
        let agent = match course {
            JobCourse::NoStart => {
                let path = directory.path().join("agent");
                fs::write(&path, b"\x7fthis is no program").unwrap();
                path
            }
            _ => binaries().join("fake-agent"),
        };
        let options = ServerOptions {
            agent: Some(agent),
            ..ServerOptions::default()
        };
        let server = Server::start(options).await.unwrap();
        let target = server.add_target("linux");
        let (_, token) = server.add_factory("here");
        let host = TestHost::new();
        // A worker without a mark is waited for no longer than an agent.
        let slots = format!("online_timeout_seconds = 30\n[slots.a]\ntarget = \"{target}\"\n");
        host.configure(&server.url(), SUPERVISOR_UID, &slots);
        host.write_token(&token);
        let mut helper = Service::new(&mut host.helper_command());
        helper.start();
        helper.log.wait(&["serving"]);
        RestartableFactory {
            course,
            server,
            _helper: helper,
            supervisor: Service::of_user(SUPERVISOR_UID, &mut host.supervisor_command()),
            before: WorkerSnapshot::take(&host),
            host,
            _agent: directory,
        }
    }

    fn state_dir(&self) -> PathBuf {
        self.host.root.join(STATE_DIR).join("supervisor")
    }

    /// One job, with a supervisor that begins with nothing, and is killed before this call.
    async fn run_job(&mut self, end_before: Option<usize>) -> OutwardCalls {
        let state = self.state_dir();
        fs::remove_dir_all(&state).unwrap();
        fs::create_dir(&state).unwrap();
        chown(&state, Some(SUPERVISOR_UID), Some(SUPERVISOR_UID)).unwrap();
        let script = match self.course {
            JobCourse::Cancelled => "echo once; sleep 1000",
            _ => "echo once",
        };
        let job = self.server.submit_job(JobSpec::script("linux", script)).unwrap();
        let pid = self.supervisor.start_stopped();
        wait_until_stopped(pid);
        let watcher = watch(pid, &state, end_before);
        let (end, mut ended) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || end.send(watcher.join()));
        let RestartableFactory {
            server, supervisor, ..
        } = self;
        let ended_job = to_its_end(server, self.course, job);
        let mut ended_job = std::pin::pin!(ended_job);
        let (seen, released) = tokio::select! {
            released = &mut ended_job => {
                supervisor.signal(Signal::SIGKILL);
                (ended.await, released)
            }
            seen = &mut ended => {
                supervisor.wait_for_end();
                // A lease that nobody knows of any more ends by itself.
                server.advance(LEASE + Duration::from_secs(1));
                supervisor.start();
                let released = ended_job.await;
                supervisor.signal(Signal::SIGKILL);
                (seen, released)
            }
        };
        let seen = seen.unwrap().expect("the tracer does not fail");
        supervisor.wait_for_end();
        let what = format!(
            "{:?}, killed before {:?}",
            self.course,
            seen.killed.then(|| seen.calls.last())
        );
        let job = server.job(job);
        let wanted = match self.course {
            JobCourse::Done => "completed",
            JobCourse::NoStart | JobCourse::Cancelled => "failed",
        };
        assert_eq!(job.state(), wanted, "{what}: {:#?}", job.events);
        let count = |text: &str| {
            job.events
                .iter()
                .filter(|event| event.payload.contains(text))
                .count()
        };
        let (ran, exec_errors) = (count("once"), count("Exec format error"));
        match self.course {
            JobCourse::NoStart => assert!(exec_errors >= 1 && ran == 0, "{what}: {:#?}", job.events),
            _ => assert_eq!(ran, 1, "{what}: {:#?}", job.events),
        }
        // A supervisor that was killed before it had the helper's answer knows less.
        if self.course == JobCourse::NoStart && !seen.killed {
            let has_reason = |text: &String| text.contains("Exec format error");
            let console = lines(&job, "console");
            assert!(console.iter().any(has_reason), "{what}: {console:?}");
            assert_eq!(released.len(), 1, "{what}");
            assert!(released.iter().all(has_reason), "{what}: {released:?}");
        }
        assert_eq!(
            WorkerSnapshot::take(&self.host),
            self.before,
            "{what}: something is left"
        );
        seen
    }
}

/// What is to be done next, from outside the factory.
enum Next {
    Release(Ulid, String),
    Cancel,
    Nothing,
}

/// Let the job run, and wait until the server knows no worker any more. Returns why workers were held.
async fn to_its_end(server: &Server, course: JobCourse, job: Ulid) -> BTreeSet<String> {
    let mut released = BTreeSet::new();
    let mut cancelled = false;
    loop {
        let next = |state: &State| {
            let alive = || state.workers.values().filter(|worker| !worker.deleted);
            let (it, cancel) = (&state.jobs[&job], course == JobCourse::Cancelled && !cancelled);
            if let Some(held) = alive().find(|worker| worker.hold.is_some()) {
                assert_eq!(course, JobCourse::NoStart, "{held:?} is held");
                return Some(Next::Release(held.id, held.hold.clone()?.reason));
            }
            if cancel && it.events.iter().any(|event| event.payload == "once") {
                return Some(Next::Cancel);
            }
            (it.is_complete() && alive().count() == 0).then_some(Next::Nothing)
        };
        // A whole job, of several at once.
        match server.wait_for(3 * TEST_TIMEOUT, next).await.unwrap() {
            Next::Release(worker, reason) => {
                server.release(worker).unwrap();
                released.insert(reason);
            }
            Next::Cancel => {
                server.cancel(job).unwrap();
                cancelled = true;
            }
            Next::Nothing => return released,
        }
    }
}

/// So many factories at a time: nearly all of a job is waiting.
const AT_A_TIME: usize = 6;

async fn kill_before_each(course: JobCourse) {
    let mut factory = RestartableFactory::new(course).await;
    let seen = factory.run_job(None).await;
    assert!(!seen.killed);
    let sample = Sample::of(seen.calls.len().div_ceil(16));
    let points: Vec<usize> = (0..seen.calls.len()).filter(|n| sample.has(*n)).collect();
    let total = points.len();
    let points = Arc::new(Mutex::new(points));
    let mut factories = tokio::task::JoinSet::new();
    for _ in 0..AT_A_TIME {
        let points = points.clone();
        factories.spawn(async move {
            let (mut factory, mut killed) = (RestartableFactory::new(course).await, Vec::new());
            while let Some(n) = { points.lock().unwrap().pop() } {
                let seen = factory.run_job(Some(n)).await;
                killed.extend(seen.killed.then(|| seen.calls.last().cloned()).flatten());
            }
            killed
        });
    }
    let killed: Vec<String> = factories.join_all().await.concat();
    let names: BTreeSet<&String> = killed.iter().collect();
    println!(
        "{course:?}: killed {} times of {total}; {} writes and requests; before {names:?}",
        killed.len(),
        seen.calls.len()
    );
    assert!(seen.calls.len() > 50, "that is too few: {:?}", seen.calls);
    assert!(killed.len() * 5 >= total * 4, "too many points were missed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_supervisor_killed_at_any_write_or_request_brings_its_job_to_one_end() {
    kill_before_each(JobCourse::Done).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_supervisor_killed_at_any_write_or_request_fails_a_job_that_cannot_start() {
    kill_before_each(JobCourse::NoStart).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_supervisor_killed_at_any_write_or_request_cleans_up_a_cancelled_job() {
    kill_before_each(JobCourse::Cancelled).await;
}
