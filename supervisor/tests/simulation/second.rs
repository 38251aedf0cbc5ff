//! A second host with the same token: another real supervisor, with a helper and a network of its own. Nothing goes wrong
//! with its calls but that it is cut off or dies; what it does to the first host, and the first to it, is checked.

use std::collections::{BTreeMap, BTreeSet};

use protocol::WorkerId;
use protocol::config::Config;
use supervisor::buildomat::Error;
use supervisor::factory::Input;
use tokio::sync::oneshot;

use crate::calls::{CALL_TIMEOUT_MS, InFlight, body_of};
use crate::host::{Effect, Host};
use crate::net::{Ask, SimulatedResponse, reply_of};
use crate::script::{CallFault, CallKind, Extent};
use crate::simulation::{Event, Requests, Simulation};

/// Set in the numbers of its supervisor's lives.
pub const SECOND: u64 = 1 << 63;
/// The end of its workers' owner tags.
pub const MARK: &str = "/11111111";

#[derive(Debug)]
pub struct Second {
    pub host: Host,
    pub config: Config,
    pub is_running: bool,
    pub run: u64,
    pub requests: Requests,
    /// It was started once.
    pub has_started: bool,
    /// It is never started again.
    pub over: bool,
    /// The server is out of its reach.
    pub cut: bool,
    /// Workers that it made or claimed.
    pub own: BTreeSet<WorkerId>,
    locks: BTreeMap<WorkerId, u64>,
}

impl Second {
    pub fn new(config: Config) -> Self {
        Self {
            host: Host::numbered_from(1 << 32),
            config,
            is_running: false,
            run: 0,
            requests: Requests::default(),
            has_started: false,
            over: false,
            cut: false,
            own: BTreeSet::new(),
            locks: BTreeMap::new(),
        }
    }

    /// Could it still do something about its workers?
    pub fn is_there(&self) -> bool {
        self.has_started && !self.over
    }
}

impl Simulation {
    pub fn start_second(&mut self) {
        let finished = self.finished;
        let second = &mut self.second;
        if second.is_running || second.over || finished {
            return;
        }
        second.run += 1;
        (second.is_running, second.has_started, second.requests.start) = (true, true, true);
        self.note(|| "* the second supervisor starts".into());
        if self.faults_are_over() {
            self.second
                .requests
                .inputs
                .push(Input::Drain(None, Some(Default::default())));
        }
    }

    /// Its supervisor is no more; it is started again later.
    pub fn second_ended(&mut self, down: u64) {
        self.note(|| format!("* the second supervisor is gone, for {down} ms"));
        self.second.is_running = false;
        self.second.requests.inputs.clear();
        let ids: Vec<u64> = self
            .calls
            .iter()
            .filter(|(_, c)| c.second)
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            let lost = self.chance(2) == 0;
            if let Some(call) = self.calls.get_mut(&id) {
                call.caller = None;
                call.lost |= lost && call.kind.is_of_server();
            }
        }
        self.after(down, Event::SecondStart);
    }

    /// The whole host is no more, with all that ran on it.
    pub fn second_is_lost(&mut self) -> bool {
        if !self.second.is_there() {
            return false;
        }
        (self.second.over, self.second.host) = (true, Host::numbered_from(1 << 33));
        self.second.requests.crash = self.second.is_running.then_some(0);
        true
    }

    /// Once nothing bad happens any more, the operator who set it up by mistake takes it away: drained first.
    pub fn retire_second(&mut self) {
        let second = &self.second;
        if !self.faults_are_over() || !second.is_there() || !second.is_running {
            return;
        }
        let live = |id: &WorkerId| self.server.workers.get(id).is_some_and(|w| !w.deleted);
        if second.host.is_empty() && !second.own.iter().any(live) {
            self.note(|| "* the second supervisor is stopped for good".into());
            self.second.over = true;
            self.second.requests.inputs.push(Input::Stop);
        }
    }

    pub fn send_second(&mut self, run: u64, ask: Ask, caller: oneshot::Sender<SimulatedResponse>) {
        if run != self.second.run | SECOND || !self.second.is_running {
            return;
        }
        let (kind, about) = (ask.kind(), ask.about());
        let id = self.new_call();
        if !kind.is_poll() {
            self.note(|| {
                let about = about.map(|about| format!(" {about}")).unwrap_or_default();
                format!("> second: {kind:?}{about} #{id}")
            });
        }
        let of_server = kind.is_of_server();
        let there = if of_server { 1 + self.chance(40) } else { 0 };
        let back = if of_server { 1 + self.chance(20) } else { 0 };
        let call = InFlight {
            ask,
            kind,
            fault: CallFault::Fine,
            back,
            caller: Some(caller),
            answer: None,
            lost: false,
            is_started: false,
            second: true,
        };
        self.calls.insert(id, call);
        self.after(there, Event::Arrive(id));
        if of_server && self.second.cut {
            self.after(CALL_TIMEOUT_MS, Event::GiveUp(id));
        }
    }

    pub fn arrive_of_second(&mut self, id: u64) {
        let Some(call) = self.calls.get(&id) else {
            return;
        };
        if !call.kind.is_of_server() {
            let takes = 1 + self.chance(30);
            let mut at = self.now;
            if let Some(worker) = self.calls[&id].ask.about() {
                let lock = self.second.locks.entry(worker).or_default();
                at = at.max(*lock);
                *lock = at + takes;
            }
            return self.at(at + takes, Event::Effect(id));
        }
        let (ask, waits) = (call.ask.clone(), call.waits());
        if self.second.cut {
            // Its caller gives up by itself, also where it had asked before the cut.
            if !waits {
                self.calls.remove(&id);
            }
            return self.after(CALL_TIMEOUT_MS, Event::GiveUp(id));
        }
        if !self.agents_reach_server() {
            let error = Error::Unreachable("connection refused".into());
            return self.settle(id, SimulatedResponse::Page(Err(error)));
        }
        let (code, value) = self.serve(&ask, waits, true);
        let bytes = body_of(&value);
        self.settle(id, SimulatedResponse::Page(Ok((code, bytes))));
    }

    pub fn effect_of_second(&mut self, id: u64) {
        let Some(Ask::Helper(request)) = self.calls.get(&id).map(|call| call.ask.clone()) else {
            return;
        };
        let second = &mut self.second;
        let (reply, effect) = second.host.carry_out(Some(&second.config), &request, Extent::All);
        let about = Ask::Helper(request).about();
        if let (Effect::Started(agent), Some(worker)) = (effect, about) {
            let usual = 500 + self.chance(2_500);
            self.checks.agent_started(worker, &self.server);
            self.after(usual, Event::Online(worker, agent));
        }
        self.settle(id, SimulatedResponse::Packet(Ok(reply_of(&reply, 0))));
    }

    /// One of the two hosts says something about a worker to the server: is it its own?
    pub fn check_owner(&mut self, kind: CallKind, id: WorkerId, second: bool) {
        if !matches!(kind, CallKind::Delete | CallKind::Fail) {
            return;
        }
        let Some(w) = self.server.workers.get(&id).filter(|w| !w.deleted) else {
            return;
        };
        let Some(of_second) = w.private.as_ref().map(|private| private.ends_with(MARK)) else {
            return;
        };
        let track = self.checks.track(id);
        if of_second != second && !track.to_delete && !track.got_wrong_answer {
            let who = if second {
                "the second host"
            } else {
                "the first host"
            };
            self.checks
                .fail(format!("{who} asks for {kind:?} of {id}, which is the other's"));
        }
    }

    /// No worker is on both hosts.
    pub fn check_hosts(&mut self) {
        let mut second = self.second.host.workers();
        let both = second.find(|(id, _)| {
            self.host.is_known(*id) && !self.checks.tracks.get(id).is_some_and(|t| t.got_wrong_answer)
        });
        if let Some((id, _)) = both {
            self.checks.fail(format!("{id} is on both hosts"));
        }
    }
}
