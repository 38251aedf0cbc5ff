//! A call at the helper: when it is carried out, how far, and what comes of it.

use protocol::{ErrorKind, Received, Reply, Request, WorkerId};

use crate::host::Effect;
use crate::net::{Ask, SimulatedResponse, error, reply_of};
use crate::script::{CallFault, CallKind, Extent, Mode, Point};
use crate::simulation::{Event, Simulation};

impl Simulation {
    pub fn arrive_at_helper(&mut self, id: u64) {
        let Some(call) = self.calls.get_mut(&id) else {
            return;
        };
        call.is_started = true;
        let (fault, about) = (call.fault, call.ask.about());
        let usual = 1 + self.chance(30);
        let takes = match (fault, self.helper_mode()) {
            (CallFault::Slow(ms), _) | (_, Mode::Slow(ms)) => usual + ms,
            (_, Mode::Hung) => return,
            _ => usual,
        };
        // Requests about one worker take turns.
        let mut at = self.now;
        if let Some(worker) = about {
            let lock = self.locks.entry(worker).or_default();
            at = at.max(*lock);
            *lock = at + takes;
        }
        self.at(at + takes, Event::Effect(id));
    }

    pub fn effect(&mut self, id: u64) {
        let Some(call) = self.calls.get_mut(&id) else {
            return;
        };
        call.is_started = false;
        if call.second {
            return self.effect_of_second(id);
        }
        let (fault, kind) = (call.fault, call.kind);
        match (fault, self.helper_mode()) {
            (CallFault::Busy, _) | (_, Mode::Errors) => {
                return self.reply(id, &error(ErrorKind::Busy, "as many connections as can be"));
            }
            (CallFault::CouldNot, _) => {
                self.could_not(id);
                return self.reply(id, &error(ErrorKind::Failed, "no space left on device"));
            }
            (_, Mode::Broken) => {
                self.could_not(id);
                return self.reply(id, &error(ErrorKind::Failed, "input/output error"));
            }
            _ => {}
        }
        let about = self.calls[&id].ask.about();
        if kind == CallKind::HostDelete && about.is_some() && about == self.undeletable {
            return self.reply(id, &error(ErrorKind::Failed, "device or resource busy"));
        }
        let half = self.dies_at(kind, Point::HalfDone);
        let extent = match fault {
            _ if half => Extent::Half,
            CallFault::Closed(extent) => extent,
            _ => Extent::All,
        };
        let (reply, lines) = self.operate(id, extent);
        self.dies_at(kind, Point::CarriedOut);
        match fault {
            CallFault::Closed(_) | CallFault::LostAnswer => self.close_connection(id),
            CallFault::Garbage => {
                let bytes = vec![0xff, 0xff, 3];
                let garbage = Received::Packet {
                    bytes,
                    descriptors: Vec::new(),
                };
                self.settle(id, SimulatedResponse::Packet(Ok(garbage)));
            }
            _ => self.settle(id, SimulatedResponse::Packet(Ok(reply_of(&reply, lines)))),
        }
    }

    pub fn could_not(&mut self, id: u64) {
        if let Some(worker) = self.calls.get(&id).and_then(|call| call.ask.about()) {
            self.checks.start_failed(worker);
        }
    }

    pub fn reply(&mut self, id: u64, reply: &Reply) {
        self.settle(id, SimulatedResponse::Packet(Ok(reply_of(reply, 0))));
    }

    pub fn close_connection(&mut self, id: u64) {
        self.settle(id, SimulatedResponse::Packet(Ok(Received::Closed)));
    }

    /// Carry an operation of the helper out, so far. The reply, and how many lines its console has.
    pub fn operate(&mut self, id: u64, extent: Extent) -> (Reply, usize) {
        let call = &self.calls[&id];
        let Ask::Helper(request) = call.ask.clone() else {
            panic!("a page for the helper");
        };
        let live = call.waits();
        let (reply, effect) = self.host.carry_out(self.file.as_ref(), &request, extent);
        if let Reply::Error(error) = &reply
            && live
        {
            let about = request_worker(&request);
            self.checks.refused(&request, about, error, &self.host);
        }
        let Some(worker) = request_worker(&request) else {
            return (reply, 0);
        };
        match effect {
            Effect::Nothing => {}
            Effect::Made => {
                if !live {
                    self.host.untrack(worker);
                }
            }
            Effect::Started(agent) => {
                self.checks.agent_started(worker, &self.server);
                self.started(worker, agent);
            }
            Effect::Removed => self.checks.removed(worker, live),
        }
        let lines = worker_lines(worker);
        (reply, lines)
    }

    /// The helper dies with all that it was doing.
    pub fn cut_off_helper(&mut self, extent: Extent) -> bool {
        let started: Vec<u64> = self
            .calls
            .iter()
            .filter(|(_, call)| call.is_started)
            .map(|(id, _)| *id)
            .collect();
        for id in &started {
            self.operate(*id, extent);
            if let Some(call) = self.calls.get_mut(id) {
                call.is_started = false;
            }
            self.close_connection(*id);
        }
        self.locks.clear();
        !started.is_empty()
    }
}

fn request_worker(request: &Request) -> Option<WorkerId> {
    Ask::Helper(request.clone()).about()
}

/// So many lines has an agent printed.
fn worker_lines(id: WorkerId) -> usize {
    id.to_string().bytes().map(usize::from).sum::<usize>() % 5
}
