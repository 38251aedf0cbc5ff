//! The operator's plan of slots, and the configuration that it makes, through the real parser.

use protocol::config::Config;
use protocol::{SlotName, TargetId};
use supervisor::backoff::Rng;

use crate::script::Change;
use crate::seed::below;
use crate::simulation::ONLINE_TIMEOUT_MS;

/// What some slots limit a job to.
pub const JOB_TIMEOUT_MS: u64 = 60_000;

#[derive(Clone, Debug)]
struct Planned {
    name: String,
    target: u64,
    conflicts: Vec<String>,
}

#[derive(Clone, Debug)]
pub struct ConfigPlan {
    slots: Vec<Planned>,
    poll_seconds: u64,
    names: u64,
}

impl ConfigPlan {
    pub fn new(slots: u64, poll_seconds: u64, seed: u64) -> Self {
        let rng = &mut Rng::new(seed ^ 0x91a7);
        let mut plan = Self {
            slots: Vec::new(),
            poll_seconds,
            names: slots,
        };
        for n in 0..slots {
            plan.slots.push(Planned {
                name: format!("s{n}"),
                target: n % 3,
                conflicts: Vec::new(),
            });
        }
        for _ in 0..below(rng, slots) {
            plan.change(Change::Conflicts(rng.draw() % 64));
        }
        plan
    }

    pub fn name(&self, n: u64) -> SlotName {
        let slot = &self.slots[n as usize % self.slots.len()];
        slot.name.parse().expect("a slot's name")
    }

    pub fn change(&mut self, change: Change) {
        let many = self.slots.len() as u64;
        match change {
            Change::Add => {
                self.names += 1;
                self.slots.push(Planned {
                    name: format!("s{}", self.names),
                    target: self.names % 3,
                    conflicts: Vec::new(),
                });
            }
            Change::Remove(n) if many > 1 => {
                let gone = self.slots.remove((n % many) as usize).name;
                for slot in &mut self.slots {
                    slot.conflicts.retain(|name| *name != gone);
                }
            }
            Change::Remove(_) => {}
            Change::Rename(n) => {
                self.names += 1;
                let new = format!("s{}", self.names);
                let old = std::mem::replace(&mut self.slots[(n % many) as usize].name, new.clone());
                for name in self.slots.iter_mut().flat_map(|slot| &mut slot.conflicts) {
                    if *name == old {
                        *name = new.clone();
                    }
                }
            }
            Change::Conflicts(n) => {
                let (a, b) = ((n % many) as usize, (n / 8 % many) as usize);
                let other = self.slots[b].name.clone();
                if a == b {
                    self.slots[a].conflicts.clear();
                } else {
                    self.slots[a].conflicts.push(other);
                }
            }
            Change::Target(n) => {
                let slot = &mut self.slots[(n % many) as usize];
                slot.target = (slot.target + 1) % 3;
            }
        }
    }

    pub fn config(&self) -> Config {
        let mut text = format!(
            "[general]\nbaseurl = \"http://h\"\n[factory]\ntoken_file = \"/t\"\npoll_seconds = {}\n\
             online_timeout_seconds = {}\n",
            self.poll_seconds,
            ONLINE_TIMEOUT_MS / 1000
        );
        for slot in &self.slots {
            let target = TargetId::from_bits(1 + u128::from(slot.target));
            text += &format!(
                "[slots.{}]\ntarget = \"{target}\"\nconflicts_with_slots = {:?}\nkeep_processes = {}\n\
                 hold_on_failure = {}\n",
                slot.name,
                slot.conflicts,
                slot.name.ends_with('2'),
                !slot.name.ends_with('0')
            );
            if slot.name.ends_with('1') {
                text += &format!("job_timeout_seconds = {}\n", JOB_TIMEOUT_MS / 1000);
            }
        }
        Config::parse(&text).expect("a plan makes a configuration")
    }
}
