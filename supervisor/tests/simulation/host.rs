//! The host and its helper: the test bed's model of the contract, and what is left where a request was cut off.

use std::collections::{BTreeMap, BTreeSet};

use protocol::config::{Config, UidRange};
use protocol::{Error, ErrorKind, Exit, Reply, Request, State, UserName, WorkerId};
use testbed::helper_model::{Agent, Allocation, Configuration, Model};

use crate::script::Extent;

/// So many workers are on a page of the list.
const PAGE: usize = 2;
/// Why no agent is started in a half-made worker. The sentence is the simulation's own: the helper's names the step
/// that failed, and the supervisor decides by the kind of an error alone.
pub const HALF_MADE: &str = "the worker is half made";

#[derive(Debug)]
pub struct Host {
    model: Model,
    /// Their users were made, or removed, only in part.
    half: BTreeSet<WorkerId>,
    /// Made by requests whose senders were gone by then: nobody can know of them before a list shows them.
    untracked: BTreeSet<WorkerId>,
    started: BTreeMap<WorkerId, u64>,
    agents: u64,
}

/// What a request has done, besides its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    Nothing,
    Made,
    /// This agent was started.
    Started(u64),
    Removed,
}

impl Host {
    /// One whose agents are numbered from there on.
    pub fn numbered_from(agents: u64) -> Self {
        let uids = UidRange::default();
        Self {
            model: Model::new(Configuration::default(), uids.first.get()..=uids.last.get()),
            half: BTreeSet::new(),
            untracked: BTreeSet::new(),
            started: BTreeMap::new(),
            agents,
        }
    }

    pub fn workers(&self) -> impl Iterator<Item = (WorkerId, &Allocation)> {
        self.model.workers()
    }

    pub fn get(&self, id: WorkerId) -> Option<&Allocation> {
        self.model.get(id)
    }

    pub fn is_empty(&self) -> bool {
        self.workers().next().is_none()
    }

    pub fn is_untracked(&self, id: WorkerId) -> bool {
        self.untracked.contains(&id)
    }

    pub fn untrack(&mut self, id: WorkerId) {
        self.untracked.insert(id);
    }

    /// Does the host have a worker that somebody can know of?
    pub fn is_known(&self, id: WorkerId) -> bool {
        self.get(id).is_some() && !self.is_untracked(id)
    }

    /// Carry out as much of a request as is said. `config`: the file as it is now; None for one that does
    /// not parse.
    pub fn carry_out(
        &mut self,
        config: Option<&Config>,
        request: &Request,
        extent: Extent,
    ) -> (Reply, Effect) {
        self.model.configuration = config.map(Configuration::from);
        let done = match extent {
            Extent::Nothing => Err((ErrorKind::Failed, "cut off")),
            _ => self.answer(request, extent == Extent::Half),
        };
        done.unwrap_or_else(|(kind, text)| (Reply::Error(Error::new(kind, text)), Effect::Nothing))
    }

    fn answer(
        &mut self,
        request: &Request,
        half: bool,
    ) -> Result<(Reply, Effect), (ErrorKind, &'static str)> {
        let refused = |kind| (kind, "as the contract says");
        Ok(match request {
            Request::CreateUser { worker, slot } => {
                let is_new = self.get(*worker).is_none();
                let uid = self.model.create_user(*worker, slot).map_err(refused)?;
                match half {
                    true if is_new => drop(self.half.insert(*worker)),
                    true => {}
                    false => drop(self.half.remove(worker)),
                }
                let name = UserName::from(*worker);
                (Reply::UserCreated { uid, name }, Effect::Made)
            }
            Request::InstallAgent { worker, .. } => {
                let begins = self.get(*worker).is_some_and(|w| w.state == State::Created);
                if begins && self.model.configuration.is_some() && self.half.contains(worker) {
                    return Err((ErrorKind::Failed, HALF_MADE));
                }
                if begins && half {
                    return Ok((Reply::AgentStarted, Effect::Nothing));
                }
                self.model.install_agent(*worker, Agent::Stays).map_err(refused)?;
                if !begins {
                    return Ok((Reply::AgentStarted, Effect::Nothing));
                }
                self.agents += 1;
                self.started.insert(*worker, self.agents);
                (Reply::AgentStarted, Effect::Started(self.agents))
            }
            Request::Attach { worker } => {
                let state = self.model.attach(*worker).map_err(refused)?;
                (Reply::Attached { state }, Effect::Nothing)
            }
            Request::Kill { worker } => {
                self.model.kill(*worker).map_err(refused)?;
                (Reply::Killed, Effect::Nothing)
            }
            Request::Delete { worker } if half => {
                self.half.extend(self.get(*worker).is_some().then_some(*worker));
                self.end(*worker, Exit::Unknown);
                (Reply::Deleted, Effect::Nothing)
            }
            Request::Delete { worker } => {
                let is_there = self.get(*worker).is_some();
                self.model.delete(*worker);
                self.half.remove(worker);
                self.untracked.remove(worker);
                let effect = if is_there {
                    Effect::Removed
                } else {
                    Effect::Nothing
                };
                (Reply::Deleted, effect)
            }
            Request::List { after } => {
                let (workers, more) = self.model.list(*after, PAGE);
                (Reply::Listed { workers, more }, Effect::Nothing)
            }
            Request::Hello { .. } | Request::Check => return Err((ErrorKind::Refused, "not asked for here")),
        })
    }

    /// Is this agent of this worker running?
    pub fn runs(&self, id: WorkerId, agent: u64) -> bool {
        let is_running = self.get(id).is_some_and(|w| w.state == State::Running);
        is_running && self.started.get(&id) == Some(&agent)
    }

    pub fn end(&mut self, id: WorkerId, exit: Exit) {
        self.model.end(id, exit);
    }

    /// Something that is not the helper damages its record.
    pub fn damage(&mut self, id: WorkerId) {
        self.model.damage(id);
    }

    pub fn reboot(&mut self) {
        for id in self.workers().map(|(id, _)| id).collect::<Vec<_>>() {
            self.end(id, Exit::Unknown);
        }
    }
}
