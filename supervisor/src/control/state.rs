//! What the status shows beside the core's state: since when the supervisor runs, with which configuration, and the
//! last warnings and errors. And the commands that an operator can give.

use std::collections::VecDeque;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use protocol::config::Config;
use protocol::{SlotName, WorkerId};
use tokio::sync::{mpsc, oneshot};

use super::api::{self, Status};
use super::listener::StatusPage;
use super::metrics::Metrics;
use super::status::{StatusInput, time};
use crate::egress_records::EgressRecords;
use crate::factory::drain::Drain;
use crate::factory::{Input, Level, LogLine};
use crate::token::TokenStore;
use crate::{config_check, settings};

/// The most warnings and errors that are kept.
const MAX_PROBLEMS: usize = 50;

/// What the loop is told or asked from outside, and where the answer goes. An error is one sentence.
#[derive(Debug)]
pub enum Command {
    /// An input for the core, forwarded unchanged.
    Input(Input),
    /// The whole status, which changes nothing.
    Status(oneshot::Sender<Status>),
    /// Take no new jobs, on this slot or on all; or take them again.
    Drain {
        /// The slot to drain; none for all slots.
        slot: Option<SlotName>,
        /// The new drain; none to take jobs again.
        drain: Option<Drain>,
        /// Who drains, for the log.
        by: Operator,
        /// Gets Ok once the drain is on the disk.
        answer: ReplySender,
    },
    /// Delete a worker, held or not; its job fails.
    Destroy {
        /// The worker to delete. Refused where the factory knows no such worker.
        worker: WorkerId,
        /// Who deletes it, for the log.
        by: Operator,
        /// Gets Ok once the deletion has begun, not when it is done.
        answer: ReplySender,
    },
    /// End a worker's processes, and keep its files.
    Kill {
        /// The worker. Refused where the factory does not own it.
        worker: WorkerId,
        /// Who ends them, for the log.
        by: Operator,
        /// Gets Ok once the command is accepted.
        answer: ReplySender,
    },
    /// The host is being shut down.
    HostStops {
        /// Who announces it, for the log.
        by: Operator,
        /// Gets its answer at once.
        answer: ReplySender,
    },
    /// A self-test of all slots has come to its end: what did not hold.
    SelfTested {
        /// Which check failed, in a sentence; none where every slot passed.
        failure: Option<String>,
        /// Who ran it, for the log.
        by: Operator,
        /// Always gets Ok, whatever the result.
        answer: ReplySender,
    },
    /// Read the configuration again. `refused`: why the helper would not start with it.
    Reload {
        /// Who reloads, for the log.
        by: Operator,
        /// Why the helper refuses it, in a sentence of the helper's; then the old configuration stays in use.
        refused: Option<String>,
        /// Gets Ok once the new configuration is in use.
        answer: ReplySender,
    },
}

/// Who gives a command: it is logged with each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    /// At the control socket: the uid that the kernel gives for the peer (`SO_PEERCRED`, unix(7)).
    Uid(u32),
    /// SIGHUP.
    Signal,
}

impl fmt::Display for Operator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Operator::Uid(uid) => write!(f, "uid {uid}"),
            Operator::Signal => f.write_str("SIGHUP"),
        }
    }
}

/// The commands that the loop has not taken yet.
pub type CommandQueue = mpsc::UnboundedSender<Command>;

/// Where an answer goes.
pub type ReplySender = oneshot::Sender<Result<(), String>>;

/// What the status shows besides the core.
#[derive(Debug)]
pub struct StatusState {
    started: u64,
    config: PathBuf,
    /// Where the factory's files are.
    root: PathBuf,
    loaded: u64,
    refused: Option<String>,
    server: String,
    helper: String,
    /// The last problems with their times in milliseconds; their time stamps are made when they are shown.
    problems: VecDeque<(u64, api::Problem)>,
    /// The metrics, shared with the server that prints them.
    pub metrics: Arc<Metrics>,
    /// What jobs have connected to, shared with the egress proxy.
    pub egress: Arc<EgressRecords>,
    /// The status page's listener; none without `factory.status_address`.
    pub page: Option<Arc<StatusPage>>,
    /// The tokens, for where the token in use was read; none in a simulation.
    pub tokens: Option<TokenStore>,
}

impl StatusState {
    /// At the start: the configuration from `config` is in use, and the helper's socket is `helper`.
    pub fn new(
        now: u64,
        config: PathBuf,
        root: PathBuf,
        server: String,
        helper: String,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
            started: now,
            config,
            root,
            loaded: now,
            refused: None,
            server,
            helper,
            problems: VecDeque::new(),
            metrics,
            egress: Arc::default(),
            page: None,
            tokens: None,
        }
    }

    /// Keep a warning or an error of the core.
    pub fn note(&mut self, now: u64, line: &LogLine) {
        if line.level != Level::Info {
            self.keep(now, line.worker, line.slot.clone(), line.text.clone());
        }
    }

    /// Keep an error of the loop's own.
    pub fn note_problem(&mut self, now: u64, text: String) {
        self.keep(now, None, None, text);
    }

    fn keep(&mut self, now: u64, worker: Option<WorkerId>, slot: Option<SlotName>, text: String) {
        if self.problems.len() == MAX_PROBLEMS {
            self.problems.pop_front();
        }
        let problem = api::Problem {
            at: time(now),
            worker,
            slot,
            text,
        };
        self.problems.push_back((now, problem));
    }

    /// All of the status.
    pub fn status(&self, input: &StatusInput<'_>) -> Status {
        let problems = self.problems.iter().map(|(at, problem)| api::Problem {
            at: input.time(*at),
            ..problem.clone()
        });
        let now = input.time(input.now);
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            protocol: protocol::VERSION,
            now,
            started: input.time(self.started),
            configuration: api::Configuration {
                path: self.config.display().to_string(),
                loaded: input.time(self.loaded),
                refused: self.refused.clone(),
                token: self.tokens.as_ref().map(|tokens| tokens.source().to_string()),
            },
            server: input.server(self.server.clone()),
            helper: input.helper(self.helper.clone()),
            status_page: self.page.as_ref().map(|page| page.shown(now)),
            draining: input.factory.is_draining(),
            drains: input.drains(),
            slots: input.slots(),
            workers: input.workers(),
            storage: input.factory.storage_problem().cloned(),
            shortage: input.factory.shortage().map(str::to_owned),
            selftest: input.factory.selftest().map(|last| api::SelfTest {
                at: input.time(last.at),
                failure: last.failure.clone(),
            }),
            waits_for_selftest: input.factory.waits_for_selftest(),
            not_taken: input.not_taken(),
            identity: input.factory.identity().to_string(),
            foreign: input.foreign_workers(),
            troubles: problems.collect(),
        }
    }

    /// The configuration as it is in the file now.
    ///
    /// # Errors
    /// Every mistake that `check` finds, with its line, or the keys that only a restart can change; then nothing has changed.
    pub fn reload(&mut self, now: u64, old: &Config, refused: Option<String>) -> Result<Config, String> {
        let loaded = config_check::load(&self.config, &self.root)
            .map_err(|mistakes| settings::print(&self.config, &mistakes).trim_end().to_owned())
            .and_then(|new| match settings::needs_restart(old, &new) {
                Some(keys) => Err(format!(
                    "{}: {keys} cannot change while the supervisor runs: restart it, running jobs go on",
                    self.config.display()
                )),
                None => refused.map_or(Ok(new), |why| Err(format!("the helper refuses it: {why}"))),
            })
            .and_then(
                |new| match self.tokens.as_ref().map(|tokens| tokens.reload(&new)) {
                    Some(Err(error)) => Err(format!("{error:#}")),
                    _ => Ok(new),
                },
            );
        match &loaded {
            Ok(_) => (self.loaded, self.refused) = (now, None),
            Err(why) => {
                self.metrics.count_refused_reload();
                self.refused = Some(why.clone());
            }
        }
        loaded
    }
}
