//! What each event makes of a worker: one match on (phase, event). It depends on its arguments alone.

use protocol::{Exit, State};

use crate::call_error::CallError;

use super::{
    Event, FORGOTTEN_MS, HostState, Kill, MAX_REMAKES, MAX_STALL_SECONDS, Phase, ServerState, Worker,
    WorkerPolicy,
};

impl Worker {
    /// What the worker is after `event`. `now` is in milliseconds since 1970.
    #[must_use]
    pub fn step(mut self, event: Event, now: u64, policy: &WorkerPolicy) -> Worker {
        match (self.phase, event) {
            (_, Event::Seen { server, host }) => {
                let mut seen = self.seen(server, host, now, policy);
                seen.see_processes(host, policy);
                return seen;
            }
            (_, Event::Waited { ms }) => {
                self.waiting_since = self.waiting_since.saturating_add(ms).min(now);
            }
            // True whatever has happened since.
            (_, Event::Associated) => self.associated = true,
            (_, Event::Killed) => self.kill = Kill::default(),
            (_, Event::KillFailed(_)) => self.kill.has_failed = true,
            (Phase::Broken { .. }, Event::Kill(_)) => {
                self.kill = Kill {
                    is_needed: true,
                    has_failed: false,
                    is_requested: true,
                }
            }
            (phase, Event::Kill(reason)) => {
                if !phase.is_ending() {
                    self.fail(reason, now);
                    self.kill = Kill {
                        is_needed: true,
                        has_failed: false,
                        is_requested: true,
                    };
                }
            }
            (Phase::Running { online: true }, Event::MemoryStalled) if !self.hold => {
                self.fail(
                    format!(
                        "the job stalled for {MAX_STALL_SECONDS} s because it needs more than the slot's \
                         limits.memory: reduce its memory, or raise the limit"
                    ),
                    now,
                );
                self.kill.is_needed = !policy.keep_processes;
            }
            (_, Event::MemoryStalled) => {}
            (Phase::Destroying | Phase::Destroyed, Event::Destroy) => {}
            (_, Event::Destroy) => self.enter(Phase::Destroying, now),
            (phase, Event::CallFailed(CallError { sentence, .. }) | Event::Blocked(sentence)) => {
                if phase.is_starting() {
                    self.trouble = Some(sentence);
                }
            }
            (_, Event::SlotChanged(slot)) => self.slot = slot,
            // Nobody knows how long no supervisor ran, nor what the clock has been through: waits begin anew.
            (_, Event::SupervisorStarted) => {
                (self.since, self.waiting_since) = (self.since.min(now), now);
            }
            // Who keeps the worker forgets it.
            (_, Event::ServerDeleted) => {}
            (Phase::Reserved, Event::UserCreated) => self.enter(Phase::Created, now),
            (Phase::Created, Event::AgentStarted) => self.enter(Phase::Running { online: false }, now),
            (Phase::Reserved | Phase::Created, Event::StartFailed(reason)) => self.fail(reason, now),
            (Phase::Reserved | Phase::Created, Event::HostLost) => {
                self.lose("its user is gone from the host", now)
            }
            (Phase::Reserved | Phase::Created, Event::SlotRemoved) => {
                self.lose("its slot was removed from the configuration", now)
            }
            (
                Phase::Broken {
                    reported: false,
                    lines_sent,
                },
                Event::LinesReported { lines, .. },
            ) => {
                self.phase = Phase::Broken {
                    reported: false,
                    lines_sent: lines.max(lines_sent),
                };
            }
            (
                Phase::Broken {
                    reported: false,
                    lines_sent,
                },
                Event::FailureReported,
            ) => {
                let held = Phase::Broken {
                    reported: true,
                    lines_sent,
                };
                self.enter(
                    if policy.hold_on_failure {
                        held
                    } else {
                        Phase::Destroying
                    },
                    now,
                );
            }
            (Phase::Broken { reported: false, .. }, Event::CannotReport(_)) => {
                self.enter(Phase::Destroying, now)
            }
            (Phase::Resetting { confirmed: true }, Event::HostClean) => {
                self.enter(Phase::Reserved, now);
                self.waiting_since = now;
            }
            (Phase::Destroying, Event::HostClean) => self.enter(Phase::Destroyed, now),
            // An answer that a recycling, a hold or a failure has overtaken: the new phase's own
            // action repeats, or undoes, what it was about.
            (
                _,
                Event::UserCreated
                | Event::AgentStarted
                | Event::StartFailed(_)
                | Event::HostLost
                | Event::SlotRemoved
                | Event::LinesReported { .. }
                | Event::FailureReported
                | Event::CannotReport(_)
                | Event::HostClean,
            ) => {}
        }
        self
    }

    fn seen(
        mut self,
        server: Option<ServerState>,
        host: Option<HostState>,
        now: u64,
        policy: &WorkerPolicy,
    ) -> Worker {
        let (is_held, must_recycle, online) = match server {
            None => return self,
            Some(ServerState::Gone) => {
                self.gone = true;
                (false, true, false)
            }
            Some(ServerState::Has {
                is_held,
                must_recycle,
                online,
                associated,
                bootstrap,
            }) => {
                self.gone = false;
                // The server may have forgotten it. A list as fresh as the host's is not from before the call.
                if host.is_some() {
                    self.associated = associated;
                }
                self.bootstrap = bootstrap.or(self.bootstrap);
                (is_held, must_recycle, online)
            }
        };
        if self.hold && !is_held {
            self.waiting_since = now;
        }
        if self.hold != is_held {
            self.hold_since = is_held.then_some(now);
        }
        self.hold = is_held;
        if self.phase.is_ending() {
            return self;
        }
        if must_recycle {
            self.enter(Phase::Destroying, now);
            return self;
        }
        if online && self.phase == (Phase::Running { online: false }) {
            self.enter(Phase::Running { online: true }, now);
        }
        if is_held {
            return self;
        }
        match (self.phase, host) {
            // The server has forgotten what it knew of it: here too, that it failed.
            (Phase::Broken { reported: true, .. }, Some(_))
                if now.saturating_sub(self.since) >= FORGOTTEN_MS =>
            {
                self.enter(
                    Phase::Broken {
                        reported: false,
                        lines_sent: 0,
                    },
                    now,
                );
            }
            // And here, its agent, which will not be let in again; as the server sees it, the job has not begun.
            (Phase::Running { online: true }, Some(_)) if !online => {
                self.lose("the server has forgotten its agent", now);
            }
            (Phase::Resetting { confirmed: false }, Some(HostState::Has(State::Running))) if online => {
                self.enter(Phase::Running { online: true }, now);
            }
            (Phase::Resetting { confirmed: false }, Some(HostState::Has(State::Running)))
                if now.saturating_sub(self.since) < FORGOTTEN_MS => {}
            // The operator's limit explains it: no hint to look further is needed.
            (Phase::Running { online: true }, Some(HostState::Has(State::Exited(exit @ Exit::TimedOut)))) => {
                self.fail(describe_exit(exit), now);
            }
            (Phase::Running { online: true }, Some(HostState::Has(State::Exited(exit)))) => {
                self.fail(format!("{} before its job was done", describe_exit(exit)), now);
            }
            (Phase::Running { online: true }, Some(HostState::Absent)) => {
                self.fail(
                    "the worker disappeared from the host before its job was done".into(),
                    now,
                );
            }
            (Phase::Running { online: false }, Some(HostState::Has(State::Exited(Exit::Unknown)))) => {
                self.lose(
                    "the agent was killed, or lost in a reboot, before it came online",
                    now,
                );
            }
            (Phase::Running { online: false }, Some(HostState::Has(State::Exited(exit)))) => {
                // One that does not know an option ends so, and its output names the option.
                let hint = match exit {
                    Exit::Status(_) => {
                        ": where its output refuses --no-service, --no-setuid or --use-var-run, name an agent that \
                         knows them in factory.agent"
                    }
                    _ => "",
                };
                let how = describe_exit(exit);
                self.fail(format!("{how} before it came online{hint}"), now);
            }
            (Phase::Running { online: false } | Phase::Created, Some(HostState::Absent)) if !online => {
                self.lose("its user is gone from the host", now);
            }
            // The helper was cut off before the agent was started: it is asked again.
            (Phase::Running { online: false }, Some(HostState::Has(State::Created))) => {
                self.enter(Phase::Created, now)
            }
            // Started by a run that could not note it.
            (Phase::Reserved | Phase::Created, Some(HostState::Has(State::Running))) if online => {
                self.enter(Phase::Running { online: true }, now);
            }
            // The bootstrap token is used up, and the agent that used it is gone: another one would be refused.
            (Phase::Resetting { .. }, _)
            | (Phase::Reserved, Some(_))
            | (Phase::Created, Some(HostState::Absent))
                if online =>
            {
                self.fail(
                    "the worker was lost on the host after its agent had come online".into(),
                    now,
                );
            }
            // A host's list that is fresh came with a server's list that is: both are newer than the loss.
            (Phase::Resetting { confirmed: false }, Some(_)) => {
                self.phase = Phase::Resetting { confirmed: true }
            }
            _ => {}
        }
        let over = policy
            .job_timeout
            .filter(|limit| now.saturating_sub(self.waiting_since) >= *limit);
        if let (Phase::Running { online: true }, Some(limit)) = (self.phase, over) {
            self.fail(
                format!(
                    "the job was not done after the slot's job_timeout_seconds ({} s)",
                    limit / 1000
                ),
                now,
            );
        }
        if self.phase.is_starting()
            && !online
            && now.saturating_sub(self.waiting_since) >= policy.online_timeout
        {
            let problem = self
                .trouble
                .as_ref()
                .map(|t| format!("; the last problem was: {t}"))
                .unwrap_or_default();
            self.fail(
                format!(
                    "the agent did not come online within {} s{problem}",
                    policy.online_timeout / 1000
                ),
                now,
            );
        }
        self
    }

    /// A worker that has failed keeps no processes beside a slot that waits for an operator, unless the slot says so.
    fn see_processes(&mut self, host: Option<HostState>, policy: &WorkerPolicy) {
        match (self.phase, host) {
            (_, None) => {}
            (Phase::Broken { .. }, Some(HostState::Has(State::Running))) => {
                self.kill.is_needed = self.kill.is_requested || !policy.keep_processes;
            }
            _ => self.kill.is_needed = false,
        }
    }

    fn enter(&mut self, phase: Phase, now: u64) {
        // From here on it is its job that takes time, wherever it came from.
        if phase == (Phase::Running { online: true }) {
            self.waiting_since = now;
        }
        self.phase = phase;
        self.since = now;
        self.trouble = None;
    }

    fn fail(&mut self, reason: String, now: u64) {
        self.enter(
            Phase::Broken {
                reported: false,
                lines_sent: 0,
            },
            now,
        );
        self.failure = Some(reason);
    }

    /// The job has not begun, so it need not fail: the same worker is made once more.
    fn lose(&mut self, how: &str, now: u64) {
        if self.remakes >= MAX_REMAKES {
            self.fail(format!("{how}, for the {}th time", self.remakes + 1), now);
        } else {
            self.remakes += 1;
            // The time that it was alive in, and hung or was lost, is not the next one's.
            self.waiting_since = now;
            self.enter(Phase::Resetting { confirmed: false }, now);
        }
    }
}

/// How an agent ended, as the beginning of a sentence.
pub(super) fn describe_exit(exit: Exit) -> String {
    match exit {
        Exit::Status(status) => format!("the agent exited with status {status}"),
        Exit::Signal(signal) => format!("the agent was ended by signal {signal}"),
        Exit::NotStarted => "the agent could not be started".into(),
        Exit::TimedOut => "the agent was ended at the slot's limits.run_time_seconds".into(),
        Exit::Unknown => "the agent was killed, or lost in a reboot".into(),
    }
}
