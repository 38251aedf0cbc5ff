//! `user-factory`: the supervisor's command line. Each command reads what it needs and calls the library;
//! nothing else belongs here.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use protocol::config::Mistake;
use supervisor::act::Hands;
use supervisor::agent::{self, AgentCache};
use supervisor::factory::Factory;
use supervisor::gate::Gate;
use supervisor::helper::Helper;
use supervisor::server::Server;
use supervisor::settings::{self, Places};
use supervisor::shell::{Clock, Shell};
use supervisor::store::Store;
use tokio::signal::unix::{SignalKind, signal};

/// Buildomat workers as ephemeral Unix users of this host.
#[derive(Debug, Parser)]
#[command(name = "user-factory", version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the factory (the unprivileged half; the helper must run beside it).
    Serve {
        /// The configuration file.
        #[arg(long, value_name = "PATH")]
        config: Option<PathBuf>,
        /// Look for everything below this directory.
        #[arg(long, value_name = "DIR", default_value = "/")]
        root: PathBuf,
        /// Run even as root. For tests alone.
        #[arg(long)]
        allow_root: bool,
        /// error, warn, info, debug or trace.
        #[arg(long, value_name = "LEVEL", default_value = "info")]
        log_level: tracing::Level,
    },
    /// Print every mistake of a configuration, or a summary of its slots.
    Check {
        /// The configuration file.
        config: PathBuf,
    },
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Check { config } => check(&config),
        Command::Serve {
            config,
            root,
            allow_root,
            log_level,
        } => match serve(config, &root, allow_root, log_level) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("user-factory: {error:#}");
                ExitCode::FAILURE
            }
        },
    }
}

fn check(path: &Path) -> ExitCode {
    let mistakes = match settings::load(path) {
        Ok(config) => {
            let groups = fs::read_to_string("/etc/group").unwrap_or_default();
            let mut mistakes = settings::check_host(&config, &groups);
            if let Err(error) = settings::token(config.factory.token_file.as_path()) {
                mistakes.insert(
                    0,
                    Mistake {
                        line: token_line(path),
                        message: format!("{error:#}"),
                    },
                );
            }
            if mistakes.is_empty() {
                print!("{}", settings::summary(&config));
                return ExitCode::SUCCESS;
            }
            mistakes
        }
        Err(mistakes) => mistakes,
    };
    print!("{}", settings::print(path, &mistakes));
    ExitCode::FAILURE
}

/// The line that names the token file.
fn token_line(path: &Path) -> usize {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .position(|line| line.trim_start().starts_with("token_file"))
        .map_or(1, |at| at + 1)
}

fn serve(config: Option<PathBuf>, root: &Path, allow_root: bool, log_level: tracing::Level) -> Result<()> {
    tracing_subscriber::fmt()
        .with_max_level(log_level)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .init();
    if nix::unistd::geteuid().is_root() && !allow_root {
        bail!("the supervisor must not be root: start it as the user of the configuration (factory.user)");
    }
    // The factory's token is in this process's memory: no core, and nobody of the same user looks in.
    nix::sys::prctl::set_dumpable(false).context("cannot close this process to others")?;
    let places = Places::below(root);
    let path = config.unwrap_or_else(|| places.config.clone());
    let config = settings::load(&path).map_err(|mistakes| {
        anyhow::anyhow!(
            "the configuration has mistakes:\n{}",
            settings::print(&path, &mistakes).trim_end()
        )
    })?;
    let token = settings::token(config.factory.token_file.as_path())?;
    let store = Store::open(&places.state)?;
    let clock = Clock::start();
    let workers = store.workers()?;
    let hands = Hands {
        server: Server::new(&config.general.baseurl, token)?,
        helper: Helper::new(places.helper),
        agent: AgentCache::new(places.state.join("agent"), agent::hints()),
    };
    tracing::info!(server = %config.general.baseurl, slots = config.slots.len(), workers = workers.len(), "supervisor started");
    let gate = Gate::wanted(&config, !workers.is_empty(), places.gate);
    // The seed spreads the retries of several factories; it is no secret.
    let seed = clock.now() ^ u64::from(std::process::id());
    let factory = Factory::new(config, workers, seed, clock.now());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let done = runtime.block_on(async {
        let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let stop = async move {
            tokio::select! {
                _ = term.recv() => {}
                _ = int.recv() => {}
            }
        };
        // It ends with the runtime: stopping does not wait for connections that may last as long as a job.
        gate.map(|gate| tokio::spawn(gate.serve()));
        Shell {
            factory,
            store,
            hands: Arc::new(hands),
            clock,
        }
        .run(stop)
        .await
    });
    // A blocked file operation must not hold up the end.
    runtime.shutdown_background();
    done
}
