//! The host and its helper: what there is of each worker, and what each request makes of it. Who may have a
//! slot is decided by the helper's own policy.

use std::collections::BTreeMap;

use protocol::config::Config;
use protocol::{
    Error, ErrorKind, Exit, Reply, Request, SlotName, State, Uid, UserName, WorkerId, WorkerInfo,
};

use crate::script::Extent;

/// Why no agent can be started in what is there of a worker.
pub const HALF_MADE: &str = "the worker's user is not known";

#[derive(Clone, Debug)]
pub struct Worker {
    pub slot: SlotName,
    pub state: State,
    /// The user was made, or removed, only in part.
    pub half: bool,
    pub agent: Option<u64>,
    /// Made by a request whose sender was gone by then: nobody can know of it before a list shows it.
    pub ghost: bool,
}

#[derive(Debug, Default)]
pub struct Host {
    pub workers: BTreeMap<WorkerId, Worker>,
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

fn error(kind: ErrorKind, message: &str) -> Reply {
    Reply::Error(Error::new(kind, message))
}

fn uid() -> Uid {
    Uid::try_from(0x7000_0001).expect("a uid of the default range")
}

impl Host {
    /// One whose agents have numbers of their own.
    pub fn numbered_from(agents: u64) -> Self {
        Self {
            agents,
            ..Self::default()
        }
    }

    pub fn list(&self) -> Reply {
        let info = |(id, w): (&WorkerId, &Worker)| WorkerInfo {
            worker: *id,
            slot: w.slot.clone(),
            uid: uid(),
            state: w.state,
            disk: None,
        };
        Reply::Listed {
            workers: self.workers.iter().map(info).collect(),
            more: false,
        }
    }

    /// Carry out as much of a request as is said. `config`: the file as it is now; None for one that does
    /// not parse.
    pub fn carry_out(
        &mut self,
        config: Option<&Config>,
        request: &Request,
        extent: Extent,
    ) -> (Reply, Effect) {
        if extent == Extent::Nothing {
            return (error(ErrorKind::Failed, "cut off"), Effect::Nothing);
        }
        let half = extent == Extent::Half;
        match request {
            Request::CreateUser { worker, slot } => self.create(config, *worker, slot, half),
            Request::InstallAgent { worker, .. } => self.install(config, *worker, half),
            Request::Attach { worker } => match self.workers.get(worker) {
                Some(w) => (Reply::Attached { state: w.state }, Effect::Nothing),
                None => (error(ErrorKind::NoSuchWorker, "no such worker"), Effect::Nothing),
            },
            Request::Delete { worker } => (Reply::Deleted, self.delete(*worker, half)),
            Request::List { .. } => (self.list(), Effect::Nothing),
            Request::Kill { worker } => {
                let known = self.workers.contains_key(worker);
                self.end(*worker, Exit::Unknown);
                match known {
                    true => (Reply::Killed, Effect::Nothing),
                    false => (error(ErrorKind::NoSuchWorker, "no such worker"), Effect::Nothing),
                }
            }
            Request::Hello { .. } | Request::Check => {
                (error(ErrorKind::Refused, "not asked for here"), Effect::Nothing)
            }
        }
    }

    fn create(
        &mut self,
        config: Option<&Config>,
        id: WorkerId,
        slot: &SlotName,
        half: bool,
    ) -> (Reply, Effect) {
        let Some(config) = config else {
            let text = "the configuration has a mistake in line 7";
            return (error(ErrorKind::Busy, text), Effect::Nothing);
        };
        if let Some(w) = self.workers.get_mut(&id) {
            if !config.slots.contains_key(slot) {
                return (Reply::Error(helper::no_such_slot(slot)), Effect::Nothing);
            }
            if w.slot != *slot {
                return (
                    error(ErrorKind::Refused, "the worker has another slot"),
                    Effect::Nothing,
                );
            }
            w.half &= half;
        } else {
            let allocation = |(id, w): (&WorkerId, &Worker)| helper::Allocation {
                worker: *id,
                slot: w.slot.clone(),
                uid: uid(),
            };
            let allocations: Vec<helper::Allocation> = self.workers.iter().map(allocation).collect();
            if let Err(refusal) = helper::may_take(config, &allocations, id, slot) {
                return (Reply::Error(refusal.into()), Effect::Nothing);
            }
            let worker = Worker {
                slot: slot.clone(),
                state: State::Created,
                half,
                agent: None,
                ghost: false,
            };
            self.workers.insert(id, worker);
        }
        let name = UserName::from(id);
        (Reply::UserCreated { uid: uid(), name }, Effect::Made)
    }

    fn install(&mut self, config: Option<&Config>, id: WorkerId, half: bool) -> (Reply, Effect) {
        let Some(w) = self.workers.get_mut(&id) else {
            return (error(ErrorKind::NoSuchWorker, "no such worker"), Effect::Nothing);
        };
        if w.state != State::Created {
            return (Reply::AgentStarted, Effect::Nothing);
        }
        match config {
            None => {
                let text = "the configuration has a mistake in line 7";
                return (error(ErrorKind::Busy, text), Effect::Nothing);
            }
            Some(config) if !config.slots.contains_key(&w.slot) => {
                return (Reply::Error(helper::no_such_slot(&w.slot)), Effect::Nothing);
            }
            Some(_) if w.half => {
                return (error(ErrorKind::Failed, HALF_MADE), Effect::Nothing);
            }
            Some(_) => {}
        }
        if half {
            return (Reply::AgentStarted, Effect::Nothing);
        }
        self.agents += 1;
        (w.state, w.agent) = (State::Running, Some(self.agents));
        (Reply::AgentStarted, Effect::Started(self.agents))
    }

    fn delete(&mut self, id: WorkerId, half: bool) -> Effect {
        let Some(w) = self.workers.get_mut(&id) else {
            return Effect::Nothing;
        };
        if half {
            w.half = true;
            if w.state == State::Running {
                w.state = State::Exited(Exit::Unknown);
            }
            return Effect::Nothing;
        }
        self.workers.remove(&id);
        Effect::Removed
    }

    /// Is this agent of this worker alive?
    pub fn runs(&self, id: WorkerId, agent: u64) -> bool {
        self.workers
            .get(&id)
            .is_some_and(|w| w.state == State::Running && w.agent == Some(agent))
    }

    pub fn end(&mut self, id: WorkerId, exit: Exit) {
        if let Some(w) = self.workers.get_mut(&id) {
            w.state = State::Exited(exit);
        }
    }

    pub fn reboot(&mut self) {
        for w in self.workers.values_mut().filter(|w| w.state == State::Running) {
            w.state = State::Exited(Exit::Unknown);
        }
    }
}
