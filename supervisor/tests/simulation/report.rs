//! What has happened in all simulations together.

use std::collections::BTreeMap;

use crate::script::Item;

/// All that can go wrong here. A simulation in which it never did shows nothing about it.
const FAULTS: &str = "Cancel, Clock, Crash, CrashAfterSaves, Damage, DiskFull, DiskFullAfter, DiskLow, Drain, DrainSlot, ExpireLeases, HelperRestart, Hold, \
    HoldNew, InvalidConfig, Kill, LoseDatabase, NoLeases, OldServer, Reboot, Recycle, Release, Rollback, SecondCrashes, SecondCut, SecondIsLost, SecondStarts, Stop, Suspend, Undeletable, \
    agent: DiesEarly, agent: DiesLate, agent: KilledAtOnce, agent: KilledEarly, agent: KilledLate, agent: LateOnline, \
    agent: JobHangs, agent: NeverOnline, agent: TimesOut, configuration: Add, configuration: Conflicts, configuration: Remove, \
    configuration: Rename, configuration: Target, crash at a call: Answered, crash at a call: CarriedOut, \
    crash at a call: HalfDone, crash at a call: Sent, every call of a kind, helper call: Busy, helper call: CouldNot, helper call: Garbage, \
    helper call: Closed, helper call: Late, helper call: LostAnswer, helper call: Slow, helper: Broken, \
    helper: Down, helper: Errors, helper: Hung, helper: Slow, server call: Html, server call: Late, \
    server call: LostAnswer, server call: LostRequest, server call: OtherIds, server call: Slow, \
    server call: Status, server call: Truncated, server call: Twice, server: Broken, server: Down, \
    server: Errors, server: Hung, server: Slow";

#[derive(Clone, Debug, Default)]
pub struct Report {
    pub simulations: u64,
    /// Workers that came to their end on the server.
    pub lives: u64,
    pub jobs: u64,
    pub done: u64,
    pub calls: u64,
    pub calls_per_half_hour: BTreeMap<u64, u64>,
    pub starts: u64,
    pub simulated_ms: u64,
    pub longest_settling_ms: u64,
    pub faults: BTreeMap<String, u64>,
}

impl Report {
    pub fn count(&mut self, item: &Item) {
        if !matches!(item, Item::Submit { .. }) {
            *self.faults.entry(item.name()).or_default() += 1;
        }
    }

    pub fn settled(&mut self, ms: u64) {
        self.longest_settling_ms = self.longest_settling_ms.max(ms);
    }

    pub fn add(&mut self, other: &Report) {
        self.simulations += other.simulations;
        self.lives += other.lives;
        self.jobs += other.jobs;
        self.done += other.done;
        self.calls += other.calls;
        self.starts += other.starts;
        self.simulated_ms += other.simulated_ms;
        self.settled(other.longest_settling_ms);
        for (name, n) in &other.faults {
            *self.faults.entry(name.clone()).or_default() += n;
        }
    }

    /// What could have gone wrong, and never did.
    pub fn missing(&self) -> Vec<&'static str> {
        let all = FAULTS.split(", ").map(str::trim);
        all.filter(|name| !self.faults.contains_key(*name)).collect()
    }

    pub fn print(&self) {
        println!(
            "{} simulations, {} simulated hours, {} worker lives, {} jobs ({} done), {} calls, {} starts of the \
             supervisor; the longest settling took {} s",
            self.simulations,
            self.simulated_ms / 3_600_000,
            self.lives,
            self.jobs,
            self.done,
            self.calls,
            self.starts,
            self.longest_settling_ms / 1000
        );
        for (name, n) in &self.faults {
            println!("  {n:>8}  {name}");
        }
    }
}
