//! Running the real supervisor in a simulation: each run of the supervisor is a `Driver` from the store, and its crash
//! is the end of its future, wherever that is.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use supervisor::agent_cache::AgentCache;
use supervisor::buildomat::BuildomatClient;
use supervisor::control::api::Status;
use supervisor::control::state::{Command, StatusState};
use supervisor::driver::{Clock, Driver, Persistence};
use supervisor::executor::Executor;
use supervisor::factory::Factory;
use supervisor::free_resources::ResourceCheck;
use supervisor::helper_client::HelperClient;
use supervisor::identity::{Identity, InstanceId};
use supervisor::job_log::JobLog;
use supervisor::store::Store;
use supervisor::usb::UsbMonitor;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::disk::{SimulatedFile, SimulatedStore};
use crate::net::{Shared, Wire};
use crate::report::Report;
use crate::script::{Item, Script};
use crate::second::SECOND;
use crate::simulation::Simulation;
use crate::trace::{Crash, Log, Trace};

/// How a simulation has ended.
#[derive(Debug)]
pub struct Outcome {
    pub failure: Option<String>,
    pub trace: Trace,
    pub report: Report,
}

/// Let a script happen, to its end or to the first thing that must not be.
pub fn simulate(script: &Script, keep_trace: bool) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    runtime.block_on(run(script, keep_trace))
}

/// A place for the store where syncing costs nothing.
fn directory() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let made = if memory.is_dir() {
        tempfile::tempdir_in(memory)
    } else {
        tempfile::tempdir()
    };
    made.expect("a temporary directory")
}

async fn run(script: &Script, keep_trace: bool) -> Outcome {
    let dir = directory();
    let agent = dir.path().join("agent");
    std::fs::create_dir(&agent).expect("a directory");
    std::fs::write(agent.join("agent"), "the agent's program").expect("written");
    let tag = r#"{"path":"/file/agent.gz","etag":"1","modified":null}"#;
    std::fs::write(agent.join("agent.tag"), tag).expect("written");

    let began = Instant::now();
    let trace = Trace::new(keep_trace);
    let log = Log {
        trace: trace.clone(),
        began,
    };
    let _guard = tracing::subscriber::set_default(log);
    let shared = Shared::new(Simulation::new(script, trace.clone()));
    let mut run: Option<SupervisorRun> = None;
    let mut second: Option<SupervisorRun> = None;
    let mut spins = (began, 0);
    // Time passes before each event, and tokio's paused clock stands still while a blocking task runs: so what the
    // supervisors do in threads is done before the next event, whatever the threads' turn.
    let mut last = began;
    let mut asked: Option<oneshot::Receiver<Status>> = None;
    loop {
        if shared.simulation().checks.failure().is_some() {
            break;
        }
        let at = began + Duration::from_millis(shared.simulation().next_at().min(1 << 50));
        let at = at.max(last + Duration::from_millis(1));
        // A task that runs on while no time passes is caught.
        let now = Instant::now();
        spins = if spins.0 == now {
            (now, spins.1 + 1)
        } else {
            (now, 0)
        };
        if spins.1 > 100_000 {
            shared
                .simulation()
                .checks
                .fail("the supervisor is busy without end".into());
        }
        let end = tokio::select! {
            biased;
            end = ended(&mut run) => Some(end),
            end = ended(&mut second) => {
                second = None;
                let mut simulation = shared.simulation();
                match end {
                    End::Stopped => simulation.second_ended(1_000),
                    End::Crashed(down) => simulation.second_ended(down),
                    End::Failed(why) => simulation.checks.fail(format!("the second supervisor ended by itself: {why}")),
                }
                None
            }
            Ok(status) = answer(&mut asked) => {
                shared.simulation().status_answered(&status);
                None
            }
            () = shared.changed.notified() => None,
            () = tokio::time::sleep_until(at) => {
                last = Instant::now();
                shared.simulation().step(began.elapsed().as_millis() as u64);
                None
            }
        };
        if let Some(end) = end {
            run = None;
            let mut simulation = shared.simulation();
            match end {
                End::Stopped => {
                    let down = simulation.stop_for;
                    simulation.ended(down);
                }
                End::Crashed(down) => {
                    simulation.report.count(&Item::CrashAfterSaves(0, down));
                    simulation.ended(down);
                }
                End::Failed(why) => simulation
                    .checks
                    .fail(format!("the supervisor ended by itself: {why}")),
            }
        }
        let requests = std::mem::take(&mut shared.simulation().requests);
        if let Some(run) = &run {
            for input in requests.inputs {
                let _ = run.operator.send(Command::Input(input));
            }
            if requests.status {
                let (answer, answered) = oneshot::channel();
                let _ = run.operator.send(Command::Status(answer));
                asked = Some(answered);
            }
        }
        if let Some(down) = requests.crash
            && run.take().is_some()
        {
            shared.simulation().ended(down);
        }
        if requests.lose_database {
            for name in ["factory.db", "factory.db-wal", "factory.db-shm"] {
                let _ = std::fs::remove_file(dir.path().join("store").join(name));
            }
        }
        if requests.start {
            run = Some(SupervisorRun::begin(&shared, dir.path(), script.seed, false));
        }
        let requests = std::mem::take(&mut shared.simulation().second.requests);
        if requests.start {
            second = Some(SupervisorRun::begin(&shared, dir.path(), script.seed, true));
        }
        if let Some(second) = &second {
            for input in requests.inputs {
                let _ = second.operator.send(Command::Input(input));
            }
        }
        if let Some(down) = requests.crash
            && second.take().is_some()
        {
            shared.simulation().second_ended(down);
        }
        if shared.simulation().finished {
            break;
        }
    }
    drop((run, second));
    let mut simulation = shared.simulation();
    if simulation.checks.failure().is_none() && script.settles {
        // The last poll may be missing.
        let left = Store::open(&dir.path().join("store")).and_then(|store| store.workers());
        match left {
            Ok(left) if left.is_empty() => {}
            left => simulation
                .checks
                .fail(format!("the store is not empty: {left:?}")),
        }
    }
    let mut report = std::mem::take(&mut simulation.report);
    report.simulations = 1;
    report.starts = simulation.run;
    report.simulated_ms = simulation.now;
    report.lives = simulation.server.workers.values().filter(|w| w.deleted).count() as u64;
    report.done = simulation
        .server
        .jobs
        .values()
        .filter(|job| job.progress == testbed::fake_server::Progress::Completed)
        .count() as u64;
    Outcome {
        failure: simulation.checks.failure().cloned(),
        trace,
        report,
    }
}

enum End {
    Stopped,
    Crashed(u64),
    Failed(String),
}

struct SupervisorRun {
    driver: Pin<Box<dyn Future<Output = anyhow::Result<()>>>>,
    operator: mpsc::UnboundedSender<Command>,
}

impl SupervisorRun {
    fn begin(shared: &Shared, dir: &Path, seed: u64, second: bool) -> Self {
        let simulation = shared.simulation();
        let wall = simulation.wall();
        let (config, number, place, instance) = if second {
            let run = simulation.second.run | SECOND;
            (simulation.second.config.clone(), run, "second", "11111111")
        } else {
            let config = simulation.file.clone().expect("it was there just now");
            (config, simulation.run, "store", "00000000")
        };
        drop(simulation);
        let store = Store::open(&dir.join(place)).expect("the store opens");
        let workers = store.workers().expect("the store reads");
        let identity = Identity::new("here", InstanceId::parse(instance).expect("eight digits"));
        let clock = Clock::at(wall);
        let wire = Arc::new(Wire {
            shared: shared.clone(),
            run: number,
        });
        let executor = Executor {
            buildomat: BuildomatClient::over(wire.clone()),
            helper_client: HelperClient::over(wire),
            agent: AgentCache::new(dir.join("agent"), Vec::new()),
            identity: identity.clone(),
        };
        let factory = Factory::new(identity, config, workers, seed ^ number, clock.now());
        let status = StatusState::new(
            clock.now(),
            "config.toml".into(),
            "/".into(),
            "server".into(),
            "helper".into(),
            Arc::default(),
        );
        let driver = Driver {
            factory,
            persistence: Persistence::new(SimulatedStore {
                store,
                shared: (!second).then(|| shared.clone()),
            }),
            executor: Arc::new(executor),
            clock,
            status,
            file: Box::new(SimulatedFile {
                shared: (!second).then(|| shared.clone()),
            }),
            resources: ResourceCheck::new(Path::new("/")),
            usb: UsbMonitor::new(dir.join("no-devices")),
            job_log: JobLog::new().0,
            watchdog: Default::default(),
            drain_command: None,
        };
        let (operator, commands) = mpsc::unbounded_channel();
        Self {
            driver: Box::pin(driver.run(commands)),
            operator,
        }
    }
}

/// The supervisor's answer to a status request; an error where it has died meanwhile.
async fn answer(asked: &mut Option<oneshot::Receiver<Status>>) -> Result<Status, oneshot::error::RecvError> {
    let Some(answer) = asked else {
        return std::future::pending().await;
    };
    let status = answer.await;
    *asked = None;
    status
}

/// When, and how, this run ends.
async fn ended(run: &mut Option<SupervisorRun>) -> End {
    let Some(run) = run else {
        return std::future::pending().await;
    };
    std::future::poll_fn(|context| poll(&mut run.driver, context)).await
}

fn poll(
    driver: &mut Pin<Box<dyn Future<Output = anyhow::Result<()>>>>,
    context: &mut Context<'_>,
) -> Poll<End> {
    match catch_unwind(AssertUnwindSafe(|| driver.as_mut().poll(context))) {
        Ok(Poll::Pending) => Poll::Pending,
        Ok(Poll::Ready(Ok(()))) => Poll::Ready(End::Stopped),
        Ok(Poll::Ready(Err(error))) if error.to_string().starts_with("stopped while") => {
            Poll::Ready(End::Stopped)
        }
        Ok(Poll::Ready(Err(error))) => Poll::Ready(End::Failed(format!("{error:#}"))),
        Err(panic) => Poll::Ready(match panic.downcast_ref::<Crash>() {
            Some(Crash(down)) => End::Crashed(*down),
            None => End::Failed("it panicked".into()),
        }),
    }
}
