//! What a script says happens, and how long it lasts.

use protocol::{Exit, State, WorkerId};
use supervisor::factory::Input;
use supervisor::factory::drain::Drain;

use crate::plan::ConfigPlan;
use crate::script::{Change, Extent, Item, Mode};
use crate::server::Server;
use crate::simulation::{Disk, Event, Period, Simulation};

impl Simulation {
    pub fn happen(&mut self, item: Item) {
        let injected = self.inject(item);
        if injected {
            self.report.count(&item);
        }
    }

    /// False if there was nothing to do it to. Faults of single calls and agents are counted when they strike.
    pub fn inject(&mut self, item: Item) -> bool {
        match item {
            Item::Submit { target, takes } => self.submit(target, takes),
            Item::Call(kind, fault) => {
                self.armed.push((kind, fault));
                return false;
            }
            Item::Every(kind, fault, ms) => {
                self.every.retain(|(_, _, until)| *until > self.now);
                self.every.push((kind, fault, self.now + ms));
            }
            Item::Agent(fault) => {
                self.agent_faults.push_back(fault);
                return false;
            }
            Item::CrashAt(kind, point, down) => {
                self.crash_at.push((kind, point, down));
                return false;
            }
            Item::Server(mode, ms) => {
                self.server_mode = mode;
                self.lasts(Period::Server, ms);
            }
            Item::Helper(mode, ms) => {
                self.helper_mode = mode;
                self.lasts(Period::Helper, ms);
            }
            Item::NoLeases(ms) => {
                self.server.held = true;
                self.lasts(Period::NoLeases, ms);
            }
            Item::HoldNew(ms) => {
                self.server.hold_new_workers = true;
                self.lasts(Period::HoldNew, ms);
            }
            Item::OldServer(ms) => {
                self.server.no_fail = true;
                self.lasts(Period::Old, ms);
            }
            Item::ExpireLeases => self.server.leases.clear(),
            Item::Rollback(minutes) => return self.roll_back(minutes),
            Item::Kill(n) => return self.kill(n),
            Item::Reboot(ms) => {
                self.host.reboot();
                self.checks.rebooted(&self.host);
                self.cut_off_helper(Extent::Half);
                self.host_up = false;
                self.lasts(Period::Host, ms);
                self.requests.crash = Some(ms + 1_000);
            }
            Item::HelperRestart(extent) => return self.cut_off_helper(extent),
            Item::Crash(down) => {
                self.requests.crash = Some(down);
                return self.is_running;
            }
            Item::CrashAfterSaves(n, down) => {
                self.trace.crash_after_saves(Some((n, down)));
                return false;
            }
            Item::Stop(down) => {
                self.stop_for = down;
                self.requests.inputs.push(Input::Stop);
                return self.is_running;
            }
            Item::LoseDatabase(down) => {
                self.requests.crash = Some(down);
                self.requests.lose_database = true;
                self.checks.database_lost();
            }
            Item::SecondStarts => {
                if self.second.has_started {
                    return false;
                }
                self.start_second();
            }
            Item::SecondCrashes(down) => {
                self.second.requests.crash = self.second.is_running.then_some(down);
                return self.second.is_running;
            }
            Item::SecondCut(ms) => {
                self.second.cut = true;
                self.lasts(Period::SecondCut, ms);
                return self.second.is_running;
            }
            Item::SecondIsLost => return self.second_is_lost(),
            Item::DiskFull(ms) => self.disk_is(Disk::Full, ms),
            Item::DiskLow(ms) => self.disk_is(Disk::Low, ms),
            Item::DiskFullAfter(writes, ms) => {
                self.full_after = Some((writes, ms));
                return false;
            }
            Item::Clock(seconds) => {
                // It stays within what a clock can show.
                let error = self.clock_error + seconds * 1_000;
                self.clock_error = error.clamp(-1_800_000_000_000, 4_000_000_000_000);
            }
            Item::Suspend(ms) => self.server.hosts_sleep(self.now, ms),
            Item::Damage(n) => {
                let Some(id) = self.nth_on_host(n) else {
                    return false;
                };
                self.checks.foreign(id);
                self.host.damage(id);
            }
            Item::Undeletable(n, ms) => {
                self.undeletable = self.nth_on_host(n);
                let Some(id) = self.undeletable else {
                    return false;
                };
                self.checks.foreign(id);
                self.lasts(Period::Undeletable, ms);
            }
            Item::Hold(n) => {
                return self.with_worker(n, |server, id| {
                    let is_new = server.workers[&id].hold.is_none();
                    server.hold(id, "an operator looks").expect("it is there");
                    is_new
                });
            }
            Item::Release(n) => {
                return self.with_worker(n, |server, id| {
                    let was_held = server.workers[&id].hold.is_some();
                    server.release(id).expect("it is there");
                    was_held
                });
            }
            Item::Recycle(n) => {
                return self.with_worker(n, |server, id| {
                    let is_new = !server.workers[&id].recycle_asked;
                    server.recycle(id).expect("it is there");
                    is_new
                });
            }
            Item::Cancel(n) => {
                let open: Vec<_> = self.server.open_jobs().map(|job| job.id).collect();
                let Some(job) = open.get(n as usize % open.len().max(1)) else {
                    return false;
                };
                self.server.cancel(*job).expect("it is open");
            }
            Item::Drain(ms) => {
                self.send_input(Input::Drain(None, Some(Drain::default())));
                self.checks.drained(self.now, self.is_running);
                self.lasts(Period::Drain, ms);
            }
            Item::DrainSlot(n, ms) => {
                let slot = self.plan.name(n);
                if let Some(before) = self.drained.take() {
                    self.send_input(Input::Drain(Some(before), None));
                }
                self.send_input(Input::Drain(Some(slot.clone()), Some(Drain::default())));
                self.checks.slot_drained(self.now, slot.clone(), self.is_running);
                self.drained = Some(slot);
                self.lasts(Period::DrainSlot, ms);
            }
            Item::Config(change, delay) => return self.change_config(change, delay),
            Item::InvalidConfig(ms) => {
                self.file = None;
                self.checks.config_changed(self.now);
                self.lasts(Period::Invalid, ms);
            }
        }
        true
    }

    pub fn lasts(&mut self, period: Period, ms: u64) {
        let until = self.now + ms;
        self.until.insert(period, until);
        self.at(until, Event::Back(period));
    }

    pub fn end_period(&mut self, period: Period) {
        if self.until.get(&period).is_none_or(|until| *until > self.now) && !self.faults_are_over() {
            return;
        }
        self.until.remove(&period);
        match period {
            Period::Server => self.server_mode = Mode::Up,
            Period::Helper => self.helper_mode = Mode::Up,
            Period::Host => self.host_up = true,
            Period::NoLeases => self.server.held = false,
            Period::HoldNew => self.server.hold_new_workers = false,
            Period::Old => self.server.no_fail = false,
            Period::Drain => {
                self.send_input(Input::Drain(None, None));
                self.checks.undrained();
            }
            Period::DrainSlot => {
                if let Some(slot) = self.drained.take() {
                    self.send_input(Input::Drain(Some(slot), None));
                    self.checks.slot_undrained();
                }
            }
            Period::SecondCut => self.second.cut = false,
            Period::Undeletable => self.undeletable = None,
            Period::Disk => {
                self.disk = Disk::Fine;
                self.checks.disk_is_fine();
            }
            Period::Invalid => {
                self.file = Some(self.plan.config());
                self.checks.config_changed(self.now);
                // Who fixes it says so: what was changed meanwhile, the supervisor could not read.
                self.reload();
            }
        }
    }

    /// All that is bad comes to its end, and stays away.
    pub fn end_faults(&mut self) {
        self.note(|| "* from here on nothing bad happens".into());
        self.armed.clear();
        self.every.clear();
        self.agent_faults.clear();
        self.crash_at.clear();
        self.trace.crash_after_saves(None);
        let periods = [
            Period::Server,
            Period::Helper,
            Period::Host,
            Period::NoLeases,
            Period::HoldNew,
            Period::Old,
            Period::Drain,
            Period::DrainSlot,
            Period::Invalid,
            Period::Disk,
            Period::SecondCut,
            Period::Undeletable,
        ];
        if self.second.is_running {
            self.second
                .requests
                .inputs
                .push(Input::Drain(None, Some(Drain::default())));
        }
        self.full_after = None;
        for period in periods {
            self.end_period(period);
        }
        self.plan = ConfigPlan::new(self.script.slots, self.script.poll_seconds, self.script.seed);
        self.file = Some(self.plan.config());
        self.checks.config_changed(self.now);
        self.reload();
        // What has piled up would only take time.
        self.server.cancel_all_but(10);
    }

    pub fn send_input(&mut self, input: Input) {
        if self.is_running {
            self.requests.inputs.push(input);
        }
    }

    pub fn submit(&mut self, target: u64, takes: u64) {
        self.report.jobs += 1;
        self.server.submit(target, takes);
    }

    pub fn with_worker(&mut self, n: u64, change: impl FnOnce(&mut Server, WorkerId) -> bool) -> bool {
        let live: Vec<WorkerId> = self.server.live().map(|w| w.id).collect();
        let Some(id) = live.get(n as usize % live.len().max(1)) else {
            return false;
        };
        let done = change(&mut self.server, *id);
        self.note(|| format!("  which is {id}"));
        done
    }

    fn nth_on_host(&self, n: u64) -> Option<WorkerId> {
        let many = self.host.workers().count().max(1);
        let id = self.host.workers().nth(n as usize % many).map(|(id, _)| id);
        self.note(|| format!("  which is {id:?}"));
        id
    }

    pub fn kill(&mut self, n: u64) -> bool {
        let workers = self.host.workers().filter(|(_, w)| w.state == State::Running);
        let running: Vec<WorkerId> = workers.map(|(id, _)| id).collect();
        let Some(id) = running.get(n as usize % running.len().max(1)) else {
            return false;
        };
        let exit = if n.is_multiple_of(3) {
            Exit::Signal(9)
        } else {
            Exit::Unknown
        };
        self.host.end(*id, exit);
        self.checks.ended(*id, exit);
        true
    }

    pub fn roll_back(&mut self, minutes: u64) -> bool {
        let at = self.snapshots.len().checked_sub(minutes as usize + 1);
        let Some(old) = at.and_then(|at| self.snapshots.get(at)).cloned() else {
            return false;
        };
        self.server.roll_back(old);
        self.checks.rolled_back();
        self.checks.call_rates.rolled_back(self.now);
        true
    }

    pub fn change_config(&mut self, change: Change, delay: u64) -> bool {
        self.plan.change(change);
        self.checks.config_changed(self.now);
        if self.file.is_some() {
            self.file = Some(self.plan.config());
        }
        self.after(delay, Event::Reload);
        true
    }
}
