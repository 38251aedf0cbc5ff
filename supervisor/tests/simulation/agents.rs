//! What agents do, once they are started.

use protocol::{Exit, WorkerId};

use crate::script::{AgentFault, Item, Mode};
use crate::simulation::{Event, Simulation};

impl Simulation {
    /// An agent was started: what will it do?
    pub fn started(&mut self, id: WorkerId, agent: u64) {
        let fault = self.agent_faults.pop_front();
        if let Some(fault) = fault {
            self.note(|| format!("  its agent will misbehave: {fault:?}"));
            self.report.count(&Item::Agent(fault));
        }
        let usual = 500 + self.chance(2_500);
        let takes = self.server.takes(id);
        match fault {
            Some(AgentFault::NeverOnline) => self.checks.misbehaves(id),
            Some(AgentFault::LateOnline(ms)) => {
                self.checks.misbehaves(id);
                self.after(usual + ms, Event::Online(id, agent));
            }
            Some(AgentFault::DiesEarly) => self.after(usual / 2, Event::Ends(id, agent, Exit::Status(1))),
            Some(AgentFault::KilledEarly) => self.after(usual / 2, Event::Ends(id, agent, Exit::Unknown)),
            Some(AgentFault::DiesLate) => {
                self.after(usual, Event::Online(id, agent));
                self.after(usual + takes / 2, Event::Ends(id, agent, Exit::Signal(11)));
            }
            Some(AgentFault::KilledAtOnce) => {
                self.to_kill_online.push((id, agent));
            }
            Some(AgentFault::KilledLate) => {
                self.after(usual, Event::Online(id, agent));
                self.after(usual + takes / 2, Event::Ends(id, agent, Exit::Unknown));
            }
            Some(AgentFault::TimesOut) => {
                self.after(usual, Event::Online(id, agent));
                self.after(usual + takes / 2, Event::Ends(id, agent, Exit::TimedOut));
            }
            Some(AgentFault::JobHangs) => {
                self.checks.note_hang(id);
                self.after(usual, Event::Online(id, agent));
            }
            None => self.after(usual, Event::Online(id, agent)),
        }
    }

    /// Is this agent running, on one of the hosts?
    pub fn runs(&self, id: WorkerId, agent: u64) -> bool {
        self.host.runs(id, agent) || self.second.host.runs(id, agent)
    }

    pub fn agents_reach_server(&self) -> bool {
        matches!(self.server_mode, Mode::Up | Mode::Slow(_))
    }

    /// The server has just said that these agents are not online: they are, and are killed.
    pub fn kill_delayed_agents(&mut self) {
        for (id, agent) in std::mem::take(&mut self.to_kill_online) {
            self.online(id, agent);
            self.end_agent(id, agent, Exit::Unknown);
        }
    }

    pub fn online(&mut self, id: WorkerId, agent: u64) {
        if !self.runs(id, agent) {
            return;
        }
        if !self.agents_reach_server() || !self.server.bootstrap(id, agent) {
            return self.after(3_000, Event::Online(id, agent));
        }
        self.note(|| format!("agent {agent} of {id} is online"));
        self.checks.note_online(self.now, id);
        if self.checks.track(id).hangs {
            return;
        }
        let takes = self.server.takes(id);
        self.after(takes, Event::Complete(id, agent));
    }

    pub fn complete(&mut self, id: WorkerId, agent: u64) {
        if !self.runs(id, agent) {
            return;
        }
        if !self.agents_reach_server() {
            return self.after(3_000, Event::Complete(id, agent));
        }
        let known = self.server.complete(id, agent);
        self.note(|| format!("agent {agent} of {id} has done its job; the server knows it: {known}"));
    }

    pub fn end_agent(&mut self, id: WorkerId, agent: u64, exit: Exit) {
        if self.second.host.runs(id, agent) {
            self.second.host.end(id, exit);
        } else if self.host.runs(id, agent) {
            self.note(|| format!("agent {agent} of {id} ends: {exit:?}"));
            self.host.end(id, exit);
            self.checks.ended(id, exit);
        }
    }
}
