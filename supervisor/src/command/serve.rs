//! `user-factory serve`: everything is read and opened, then the loop runs until it gets a signal.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use supervisor::agent_cache::{self, AgentCache};
use supervisor::buildomat::BuildomatClient;
use supervisor::config_check::FileOnDisk;
use supervisor::control::listener::{Names, StatusPage};
use supervisor::control::metrics::Metrics;
use supervisor::control::server::{ControlServer, StatusTurn, refused_by};
use supervisor::control::state::{Command, CommandQueue, Operator, StatusState};
use supervisor::descriptors;
use supervisor::driver::{Clock, Driver, Persistence};
use supervisor::egress_proxy::{EgressProxy, Reports};
use supervisor::egress_records::EgressRecords;
use supervisor::executor::Executor;
use supervisor::factory::{Factory, Input};
use supervisor::free_resources::ResourceCheck;
use supervisor::helper_client::HelperClient;
use supervisor::identity;
use supervisor::job_log::{self, JobLog};
use supervisor::log;
use supervisor::memory_stall;
use supervisor::notify::{Watchdog, notify_ready};
use supervisor::settings::{self, Places};
use supervisor::store::{History, Store};
use supervisor::token::{TokenPlaces, TokenStore};
use supervisor::usb::{self, UsbMonitor};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

/// Starting again would not help: an operator has to change the configuration or the token.
#[derive(Debug)]
pub struct ConfigurationError;

impl std::fmt::Display for ConfigurationError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("cannot serve until this is fixed")
    }
}

/// Serve until SIGTERM or SIGINT; SIGHUP reads the configuration again.
pub fn serve(
    config: Option<PathBuf>,
    root: &Path,
    allow_root: bool,
    log_level: tracing::Level,
) -> Result<()> {
    log::start(log_level);
    if nix::unistd::geteuid().is_root() && !allow_root {
        bail!("the supervisor must not be root: start it as the user of the configuration (factory.user)");
    }
    // The factory's token is in this process's memory: no core dump, and no other process of the same user reads it.
    nix::sys::prctl::set_dumpable(false).context("cannot close this process to others")?;
    let places = Places::below(root);
    let path = config.unwrap_or_else(|| places.config.clone());
    let config = settings::load(&path).map_err(|mistakes| {
        anyhow::anyhow!(
            "the configuration has mistakes:\n{}",
            settings::print(&path, &mistakes).trim_end()
        )
        .context(ConfigurationError)
    })?;
    let tokens = TokenStore::open(TokenPlaces::of_this_process(&config)).context(ConfigurationError)?;
    let mut store = Store::open(&places.state)?;
    let host = nix::unistd::gethostname().unwrap_or_default();
    let machine = identity::machine_id(&places.machine_id);
    let identity = identity::establish(
        &places.state,
        machine.as_deref(),
        &host.to_string_lossy(),
        &mut store,
    )?;
    let history = Arc::new(History::open(&places.state)?);
    let clock = Clock::start();
    let workers = store.workers()?;
    let helper_client = HelperClient::new(places.helper.clone());
    let executor = Executor {
        buildomat: BuildomatClient::new(&config.general, tokens.clone())?,
        helper_client: helper_client.clone(),
        agent: AgentCache::new(places.state.join("agent"), agent_cache::hints()),
        identity: identity.clone(),
    };
    tracing::info!(server = %config.general.baseurl, host = %identity, slots = config.slots.len(), workers = workers.len(), token = %tokens.source(), "supervisor started");
    let metrics = Arc::new(Metrics::default());
    let reports = Reports {
        records: Arc::new(EgressRecords::open(&places.state)),
        metrics: metrics.clone(),
        buildomat: executor.buildomat.clone(),
    };
    reports.records.configure(&config);
    let connections = descriptors::proxied_connections();
    let proxy = EgressProxy::from_config(
        &config,
        places.egress_proxy.clone(),
        places.userdb.clone(),
        connections,
        &reports,
    )
    .context("cannot start the egress proxy for jobs without the host's network")?;
    let page = config
        .factory
        .status_address
        .map(|address| Arc::new(StatusPage::new(address)));
    let names = Names::new(config.factory.status_names.iter().map(|name| name.as_str()));
    let file = Box::new(FileOnDisk::new(path.clone()));
    let mut status = StatusState::new(
        clock.now(),
        path,
        root.to_owned(),
        config.general.baseurl.to_string(),
        places.helper.display().to_string(),
        metrics.clone(),
    );
    status.page = page.clone();
    status.egress = reports.records.clone();
    status.tokens = Some(tokens);
    // The seed spreads the retries of several factories; it is no secret.
    let seed = clock.now() ^ u64::from(std::process::id());
    let factory = Factory::new(identity, config, workers, seed, clock.now()).with_drains(store.drained()?);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let done = runtime.block_on(async {
        let (queue, commands) = mpsc::unbounded_channel();
        listen_to_signals(queue.clone(), helper_client.clone())?;
        tokio::spawn(memory_stall::watch(places.cgroups.clone(), queue.clone()));
        let server = ControlServer {
            commands: queue,
            helper_client,
            history,
            metrics,
            cgroups: places.cgroups.clone(),
            egress: reports.records.clone(),
            status_turn: StatusTurn::default(),
        };
        if let Some(page) = page {
            tokio::spawn(server.clone().serve_page(page, names));
        }
        // They end with the runtime: stopping does not wait for connections that may last as long as a job.
        tokio::spawn(server.serve(places.control));
        proxy.map(|proxy| tokio::spawn(proxy.serve()));
        tokio::spawn(reports.records.save_in(places.state));
        let (job_log, lines) = JobLog::new();
        tokio::spawn(job_log::send_lines(executor.buildomat.clone(), lines));
        notify_ready();
        Driver {
            factory,
            persistence: Persistence::new(store),
            executor: Arc::new(executor),
            clock,
            status,
            file,
            resources: ResourceCheck::new(root),
            usb: UsbMonitor::new(usb::devices_directory()),
            job_log,
            watchdog: Watchdog::of_the_unit(),
            drain_command: None,
        }
        .run(commands)
        .await
    });
    // A blocked file operation must not hold up the end.
    runtime.shutdown_background();
    done
}

fn listen_to_signals(queue: CommandQueue, helper_client: HelperClient) -> Result<()> {
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::spawn(async move {
        loop {
            let command = tokio::select! {
                _ = term.recv() => Command::Input(Input::Stop),
                _ = int.recv() => Command::Input(Input::Stop),
                // The answer is in the log.
                _ = hangup.recv() => Command::Reload {
                    by: Operator::Signal,
                    refused: refused_by(&helper_client).await,
                    answer: oneshot::channel().0,
                },
            };
            let stop = matches!(command, Command::Input(_));
            // The loop may have ended by itself.
            if queue.send(command).is_err() || stop {
                return;
            }
        }
    });
    Ok(())
}
