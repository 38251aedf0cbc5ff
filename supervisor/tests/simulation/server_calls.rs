//! A call at the server: what it is checked for, and what the server makes of it.

use protocol::{TargetId, WorkerId};
use serde_json::{Value, json};
use supervisor::buildomat::HttpRequest;

use crate::invariants::slot_of;
use crate::net::Ask;
use crate::script::{CallFault, CallKind};
use crate::simulation::Simulation;

impl Simulation {
    /// `live`: the supervisor still waits for the answer.
    pub fn serve(&mut self, ask: &Ask, live: bool, second: bool) -> (u16, Value) {
        let call = match ask {
            Ask::Server(call) => call,
            // The agent is the one that the supervisor has.
            Ask::File => return (304, Value::Null),
            Ask::Helper(_) => panic!("a packet for the server"),
        };
        let HttpRequest { path, body, .. } = call;
        let field = |name: &str| body.as_ref().map(|body| body[name].clone()).unwrap_or_default();
        let last = path.split('/').nth(4).unwrap_or_default();
        let worker = || -> WorkerId { last.parse().expect("a worker's id in a path") };
        if let Some(id) = ask.about().filter(|_| live) {
            self.check_owner(ask.kind(), id, second);
        }
        let kind = ask.kind();
        match kind {
            CallKind::Associate if !second => {
                let slot = field("private");
                let slot = slot.as_str().expect("a slot");
                self.checks
                    .associates(worker(), slot, live, &self.server, &self.host);
            }
            CallKind::Delete if !second => self.checks.deletes(worker(), live, &self.server, &self.host),
            CallKind::Fail if !second => {
                let reason = field("reason");
                let reason = reason.as_str().expect("a reason");
                self.checks.fails(self.now, worker(), reason, &self.server);
            }
            _ => {}
        }
        let (code, value) = self.server.call(self.now, call);
        match kind {
            CallKind::Workers if !second => self.kill_delayed_agents(),
            CallKind::Make if code == 201 => {
                let id = value["id"].as_str().and_then(|id| id.parse().ok());
                let id: WorkerId = id.expect("a worker's id");
                self.checks.note_made(self.now, id);
                if second {
                    self.second.own.insert(id);
                }
                self.note(|| format!("  made {id}"));
            }
            CallKind::Associate if code == 204 && second => drop(self.second.own.insert(worker())),
            CallKind::Associate if code == 204 => drop(self.second.own.remove(&worker())),
            CallKind::Fail if code == 204 && !second => {
                let tagged = self.server.workers[&worker()].private.as_deref();
                let on_host = self.host.get(worker()).map(|w| w.slot.clone());
                let slot = on_host.or_else(|| tagged.and_then(slot_of));
                self.checks.failure_reported(self.now, worker(), slot.as_ref());
            }
            _ => {}
        }
        (code, value)
    }

    /// An answer that is whole, and about another worker.
    pub fn other(&mut self, kind: CallKind, value: Value) -> Value {
        // A server that is another for long is the same one for long.
        let always = self.always(kind) == CallFault::OtherIds;
        let n = if always {
            self.script.seed % 8
        } else {
            self.chance(8)
        };
        let id = WorkerId::from_bits(3 << 100 | u128::from(n));
        self.checks.foreign(id);
        let target = TargetId::from_bits(1 + u128::from(n % 3));
        let worker = json!({
            "id": id, "target": target, "private": (n % 2 == 0).then_some("s1"), "bootstrap": "x".repeat(64),
            "online": n == 3, "hold": n == 5, "recycle": n == 7,
        });
        match kind {
            CallKind::Workers => json!([worker]),
            CallKind::Make => worker,
            CallKind::Lease => json!({ "lease": { "job": id, "target": target } }),
            _ => value,
        }
    }
}
