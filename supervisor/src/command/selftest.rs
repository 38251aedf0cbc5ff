//! `user-factory selftest`: does what is promised hold in each free slot of this host?

use std::path::Path;

use protocol::SlotName;
use supervisor::selftest::run::{Listeners, Programs};
use supervisor::selftest::{self, SlotReport, run};

use super::{DONE, FAILED, OutputFormat, manual, print, print_error, residue, say};

/// Try all that can be tried in this slot, or in every slot that is free.
pub fn selftest(root: &Path, slot: Option<SlotName>, output: OutputFormat) -> u8 {
    if !nix::unistd::geteuid().is_root() {
        print_error("user-factory: this needs root: it makes workers");
        return FAILED;
    }
    let Some(config) = residue::configuration(root) else {
        return FAILED;
    };
    let slots: Vec<SlotName> = match slot {
        Some(slot) if config.slots.contains_key(&slot) => vec![slot],
        Some(slot) => {
            print_error(&format!("user-factory: the configuration has no slot {slot}"));
            return FAILED;
        }
        None => config.slots.keys().cloned().collect(),
    };
    let programs = Programs::beside(manual::program());
    let tested = Listeners::open().and_then(|listeners| {
        let test = |slot: &SlotName| run::slot(&config, slot, root, &programs, &listeners.outside);
        slots.iter().map(test).collect::<Result<Vec<SlotReport>, _>>()
    });
    match tested {
        Ok(reports) => {
            let holds = selftest::holds(&reports);
            say(&match output.json {
                true => format!("{}\n", serde_json::json!({ "ok": holds, "slots": reports })),
                false => print::selftest(&reports, holds),
            });
            if holds { DONE } else { FAILED }
        }
        Err(error) => {
            print_error(&format!(
                "user-factory: cannot run {} and {}: {error}; install the programs of one release",
                programs.manual.display(),
                programs.probe.display()
            ));
            FAILED
        }
    }
}
