//! The supervisor's calls in this simulation: what becomes of each, and what it does.

use protocol::{Received, Reply};
use serde_json::{Value, json};
use supervisor::buildomat::Error;
use supervisor::helper_client;
use tokio::sync::oneshot;

use crate::net::{Ask, SimulatedResponse};
use crate::script::{CallFault, CallKind, Item, Mode, Point};
use crate::second::SECOND;
use crate::simulation::{Event, Simulation};

/// How long the supervisor's HTTP client waits.
pub const CALL_TIMEOUT_MS: u64 = supervisor::buildomat::CALL_TIMEOUT.as_millis() as u64;

#[derive(Debug)]
pub struct InFlight {
    pub ask: Ask,
    pub kind: CallKind,
    pub fault: CallFault,
    pub back: u64,
    /// The caller; none once it has its answer, or has died.
    pub caller: Option<oneshot::Sender<SimulatedResponse>>,
    pub answer: Option<SimulatedResponse>,
    /// Lost on the way.
    pub lost: bool,
    /// An operation of the helper that has begun.
    pub is_started: bool,
    /// Of the second supervisor.
    pub second: bool,
}

impl InFlight {
    pub fn waits(&self) -> bool {
        self.caller.as_ref().is_some_and(|caller| !caller.is_closed())
    }
}

impl Simulation {
    /// The supervisor asks something.
    pub fn send(&mut self, run: u64, ask: Ask, caller: oneshot::Sender<SimulatedResponse>) {
        if run & SECOND != 0 {
            return self.send_second(run, ask, caller);
        }
        if run != self.run || !self.is_running {
            return;
        }
        let (kind, about) = (ask.kind(), ask.about());
        self.report.calls += 1;
        *self
            .report
            .calls_per_half_hour
            .entry(self.now / crate::steady::HALF_HOUR)
            .or_default() += 1;
        self.checks.called(self.now, kind, about);
        self.check_request(&ask);
        let armed = self.armed.iter().position(|(armed, _)| *armed == kind);
        let fault = match armed.map(|at| self.armed.remove(at).1) {
            Some(fault) => {
                self.report.count(&Item::Call(kind, fault));
                fault
            }
            None => self.always(kind),
        };
        let id = self.new_call();
        if !kind.is_poll() || fault != CallFault::Fine {
            self.note(|| {
                let about = about.map(|about| format!(" {about}")).unwrap_or_default();
                let fault = if fault == CallFault::Fine {
                    String::new()
                } else {
                    format!(" ({fault:?})")
                };
                format!("> {kind:?}{about} #{id}{fault}")
            });
        }
        let long = if self.chance(100) == 0 { 2_000 } else { 0 };
        let mut there = if kind.is_of_server() {
            1 + self.chance(40) + long
        } else {
            0
        };
        let mut back = if kind.is_of_server() {
            1 + self.chance(20)
        } else {
            0
        };
        match (fault, self.server_mode) {
            (CallFault::Slow(ms), _) | (_, Mode::Slow(ms)) if kind.is_of_server() => {
                // Both ways: an answer may be old when it comes.
                (there, back) = (there + ms / 2, back + ms / 2);
            }
            (CallFault::Late(ms), _) => there += ms,
            _ => {}
        }
        let call = InFlight {
            ask,
            kind,
            fault,
            back,
            caller: Some(caller),
            answer: None,
            lost: false,
            is_started: false,
            second: false,
        };
        self.calls.insert(id, call);
        self.after(there, Event::Arrive(id));
        if kind.is_of_server() && (there + back > CALL_TIMEOUT_MS || self.server_mode == Mode::Hung) {
            self.after(CALL_TIMEOUT_MS, Event::GiveUp(id));
        }
        self.dies_at(kind, Point::Sent);
    }

    /// What becomes of every call of this kind, these days.
    pub fn always(&self, kind: CallKind) -> CallFault {
        let now = self.now;
        let found = self.every.iter().find(|(k, _, until)| *k == kind && *until > now);
        found.map_or(CallFault::Fine, |(_, fault, _)| *fault)
    }

    /// Does the supervisor die here? Then all that is under way is without a caller.
    pub fn dies_at(&mut self, kind: CallKind, point: Point) -> bool {
        let here = |(k, p, _): &(CallKind, Point, u64)| (*k, *p) == (kind, point);
        let Some(at) = self.crash_at.iter().position(here) else {
            return false;
        };
        let (_, _, down) = self.crash_at.remove(at);
        self.report.count(&Item::CrashAt(kind, point, down));
        self.requests.crash = Some(down);
        if point == Point::HalfDone {
            self.requests.lose_database = true;
            self.checks.database_lost();
        }
        true
    }

    /// The supervisor has died. What it had sent may still arrive.
    pub fn abandon_calls(&mut self) {
        let ids = self.calls.iter().filter(|(_, call)| !call.second);
        let ids: Vec<u64> = ids.map(|(id, _)| *id).collect();
        for id in ids {
            let lost = self.chance(2) == 0;
            if let Some(call) = self.calls.get_mut(&id) {
                call.caller = None;
                call.lost |= lost && call.kind.is_of_server();
            }
        }
    }

    pub fn settle(&mut self, id: u64, answer: SimulatedResponse) {
        if let Some(call) = self.calls.get_mut(&id) {
            let back = call.back;
            call.answer = Some(answer);
            self.after(back, Event::SimulatedResponse(id));
        }
    }

    pub fn give_up(&mut self, id: u64) {
        let late = Error::Unreachable("operation timed out".into());
        let waiting = self.calls.get_mut(&id).filter(|call| call.answer.is_none());
        if let Some(caller) = waiting.and_then(|call| call.caller.take()) {
            self.trace.note(self.now, || format!("< #{id} gave up"));
            let _ = caller.send(SimulatedResponse::Page(Err(late)));
        }
    }

    pub fn answer(&mut self, id: u64) {
        let Some(mut call) = self.calls.remove(&id) else {
            return;
        };
        let (Some(caller), Some(answer)) = (call.caller.take(), call.answer.take()) else {
            return;
        };
        if call.second {
            let _ = caller.send(answer);
            return;
        }
        self.show(id, call.kind, &answer);
        if let (Ask::Server(_), SimulatedResponse::Page(Ok((200, body)))) = (&call.ask, &answer) {
            self.checks
                .answered(self.now, call.kind, body, call.fault == CallFault::OtherIds);
        }
        if let (CallKind::Fail, Some(worker), SimulatedResponse::Page(Ok((400..=499, body)))) =
            (call.kind, call.ask.about(), &answer)
            && body.starts_with(b"{")
        {
            self.checks.cannot_tell(worker);
        }
        if let (CallKind::Delete, Some(worker), SimulatedResponse::Page(Ok((200, body)))) =
            (call.kind, call.ask.about(), &answer)
            && body == b"true"
        {
            self.checks.deleted(worker);
        }
        let _ = caller.send(answer);
        self.dies_at(call.kind, Point::Answered);
    }

    /// Polls are shown where their answer is another than the last time.
    pub fn show(&mut self, id: u64, kind: CallKind, answer: &SimulatedResponse) {
        if !self.trace.is_kept() {
            return;
        }
        let text = show(answer);
        if kind.is_poll() {
            if self.polled.insert(kind, text.clone()).as_ref() != Some(&text) {
                self.note(|| format!("< {kind:?} {text}"));
            }
        } else {
            self.note(|| format!("< #{id} {text}"));
        }
    }

    pub fn arrive(&mut self, id: u64) {
        let Some(call) = self.calls.get(&id) else {
            return;
        };
        if call.lost {
            self.calls.remove(&id);
        } else if call.second {
            self.arrive_of_second(id);
        } else if call.kind.is_of_server() {
            self.arrive_at_server(id);
        } else {
            self.arrive_at_helper(id);
        }
    }

    pub fn arrive_at_server(&mut self, id: u64) {
        let Some(call) = self.calls.get(&id) else {
            return;
        };
        let (fault, kind, ask, waits) = (call.fault, call.kind, call.ask.clone(), call.waits());
        let unreachable = |why: &str| SimulatedResponse::Page(Err(Error::Unreachable(why.into())));
        match self.server_mode {
            Mode::Down => return self.settle(id, unreachable("connection refused")),
            Mode::Hung => {
                // Its caller gives up by itself.
                if let Some(call) = self.calls.get_mut(&id) {
                    call.lost = true;
                    if !waits {
                        self.calls.remove(&id);
                    }
                }
                return self.after(CALL_TIMEOUT_MS, Event::GiveUp(id));
            }
            Mode::Errors => return self.settle(id, page(502, false)),
            Mode::Broken => return self.settle(id, page(500, true)),
            Mode::Up | Mode::Slow(_) => {}
        }
        match fault {
            CallFault::LostRequest => return self.settle(id, unreachable("connection reset")),
            CallFault::Status {
                code,
                json,
                done: false,
            } => return self.settle(id, page(code, json)),
            _ => {}
        }
        let (code, value) = self.serve(&ask, waits, false);
        self.dies_at(kind, Point::CarriedOut);
        let bytes = body_of(&value);
        let answer = match fault {
            CallFault::LostAnswer => unreachable("connection reset"),
            CallFault::Status { code, json, .. } => page(code, json),
            CallFault::Html => page(200, false),
            CallFault::Truncated => SimulatedResponse::Page(Ok((code, bytes[..bytes.len() / 2].to_vec()))),
            CallFault::OtherIds => {
                let other = self.other(kind, value);
                SimulatedResponse::Page(Ok((code, body_of(&other))))
            }
            CallFault::Twice { gap, second } => {
                self.after(gap, Event::Again(id));
                if second && gap < CALL_TIMEOUT_MS {
                    return;
                }
                // The repetition is nobody's.
                let call = self.calls.remove(&id).expect("looked at above");
                let copy = InFlight {
                    ask: call.ask.clone(),
                    caller: None,
                    answer: None,
                    ..call
                };
                self.calls.insert(id, copy);
                let first = self.new_call();
                let call = InFlight {
                    fault: CallFault::Fine,
                    ..call
                };
                self.calls.insert(first, call);
                return self.settle(first, SimulatedResponse::Page(Ok((code, bytes))));
            }
            _ => SimulatedResponse::Page(Ok((code, bytes))),
        };
        self.settle(id, answer);
    }

    /// The same request reaches the server once more.
    pub fn again(&mut self, id: u64) {
        let Some(call) = self.calls.get(&id) else {
            return;
        };
        let (ask, waits) = (call.ask.clone(), call.waits());
        let (code, value) = self.serve(&ask, waits, false);
        let bytes = body_of(&value);
        self.settle(id, SimulatedResponse::Page(Ok((code, bytes))));
    }

    pub fn check_request(&mut self, ask: &Ask) {
        match ask {
            Ask::Server(call) if ask.kind() == CallKind::Lease => {
                let body = call.body.as_ref().expect("a lease has a body");
                let some = body["supported_targets"]
                    .as_array()
                    .is_some_and(|list| !list.is_empty());
                self.checks.asks_for_jobs(self.now, some);
            }
            _ => {}
        }
    }
}

/// Without a value it is empty.
pub fn body_of(value: &Value) -> Vec<u8> {
    if value.is_null() {
        return Vec::new();
    }
    serde_json::to_vec(value).expect("a value is JSON")
}

pub fn page(code: u16, json: bool) -> SimulatedResponse {
    let body = if json {
        json!({ "request_id": "r", "message": "not now" }).to_string()
    } else {
        "<html><body>Something is wrong</body></html>".to_owned()
    };
    SimulatedResponse::Page(Ok((code, body.into_bytes())))
}

fn show(answer: &SimulatedResponse) -> String {
    match answer {
        SimulatedResponse::Page(Ok((code, body))) => format!("{code} {}", String::from_utf8_lossy(body)),
        SimulatedResponse::Page(Err(error)) => error.to_string(),
        SimulatedResponse::Packet(Ok(Received::Packet { bytes, .. })) => {
            match protocol::wire::decode::<Reply>(bytes) {
                Ok(reply) => format!("{reply:?}"),
                Err(_) => "garbage".to_owned(),
            }
        }
        SimulatedResponse::Packet(Ok(other)) => format!("{other:?}"),
        SimulatedResponse::Packet(Err(helper_client::Error::Unreachable(why))) => why.clone(),
        SimulatedResponse::Packet(Err(other)) => other.to_string(),
    }
}
