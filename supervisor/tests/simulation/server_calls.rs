//! A call at the server: what it is checked for, and what the server makes of it.

use protocol::{TargetId, WorkerId};
use serde_json::{Value, json};
use supervisor::buildomat::Call;
use supervisor::buildomat::JobId;

use crate::net::Ask;
use crate::script::{Fate, Kind};
use crate::server::{Server, Worker};
use crate::world::World;

impl World {
    /// `live`: the supervisor still waits for the answer.
    pub fn serve(&mut self, ask: &Ask, live: bool, second: bool) -> (u16, Value) {
        let call = match ask {
            Ask::Server(call) => call,
            // The agent is the one that the supervisor has.
            Ask::File => return (304, Value::Null),
            Ask::Helper(_) => panic!("a packet for the server"),
        };
        let Call { path, body, .. } = call;
        let field = |name: &str| body.as_ref().map(|body| body[name].clone()).unwrap_or_default();
        let last = path.split('/').nth(4).unwrap_or_default();
        let worker = || -> WorkerId { last.parse().expect("a worker's id in a path") };
        if let Some(id) = ask.about().filter(|_| live) {
            self.judge_owner(ask.kind(), id, second);
        }
        let job = |text: &str| JobId::try_from(text.to_owned()).expect("a job's id");
        match ask.kind() {
            Kind::Workers => {
                let list = self.server.list();
                if !second {
                    self.spring_ambushes();
                }
                list
            }
            Kind::Lease => {
                let targets = field("supported_targets");
                let targets = targets.as_array().expect("a list of targets");
                self.server.lease(self.now, targets, self.settings)
            }
            Kind::Renew => self.server.renew(self.now, &job(last)),
            Kind::Make => {
                let id = self.new_worker_id();
                let text = field("job");
                let answer = self.server.make(
                    self.now,
                    id,
                    &job(text.as_str().expect("a job")),
                    self.settings.hold_new,
                );
                if answer.0 == 201 {
                    self.checks.made(self.now, id);
                    if second {
                        self.second.own.insert(id);
                    }
                    self.trace.note(self.now, || format!("  made {id}"));
                }
                answer
            }
            Kind::Associate => {
                let slot = field("private");
                let slot = slot.as_str().expect("a slot");
                if !second {
                    self.checks
                        .associates(worker(), slot, live, &self.server, &self.host);
                }
                let answer = self.server.associate(worker(), slot);
                if answer.0 == 204 && second {
                    self.second.own.insert(worker());
                } else if answer.0 == 204 {
                    self.second.own.remove(&worker());
                }
                answer
            }
            Kind::Delete => {
                if !second {
                    self.checks.deletes(worker(), live, &self.server, &self.host);
                }
                self.server.delete(worker())
            }
            Kind::Append => self.server.append(worker()),
            Kind::Fail => {
                let reason = field("reason");
                let reason = reason.as_str().expect("a reason");
                if !second {
                    self.checks.fails(worker(), reason, &self.server);
                }
                let answer = self.server.fail(worker(), reason, self.settings);
                if !second && answer.0 == 204 {
                    self.checks.told(worker());
                }
                answer
            }
            other => panic!("{other:?} is not the server's"),
        }
    }

    /// An answer that is whole, and about another worker.
    pub fn other(&mut self, kind: Kind, value: Value) -> Value {
        // A server that is another for long is the same one for long.
        let always = self.always(kind) == Fate::OtherIds;
        let n = if always {
            self.script.seed % 8
        } else {
            self.chance(8)
        };
        let id = WorkerId::from_bits(3 << 100 | u128::from(n));
        self.checks.foreign(id);
        let worker = Worker {
            target: TargetId::from_bits(1 + u128::from(n % 3)).to_string(),
            job: None,
            private: (n % 2 == 0).then(|| "s1".to_owned()),
            agent: (n == 3).then_some(1),
            hold: n == 5,
            recycle_asked: n == 7,
            deleted: false,
            made: 0,
            heard: 0,
        };
        match kind {
            Kind::Workers => json!([Server::view(id, &worker)]),
            Kind::Make => Server::view(id, &worker),
            Kind::Lease => json!({ "lease": { "job": id, "target": worker.target } }),
            _ => value,
        }
    }
}
