//! `user-factory selftest`: does what is guaranteed hold in each free slot of this host?

use std::path::Path;
use std::time::Duration;

use protocol::SlotName;
use supervisor::control::api::{self, SlotState, Status};
use supervisor::control::client::Error;
use supervisor::selftest::run::Programs;
use supervisor::selftest::{self, SlotReport, run};
use supervisor::usb;

use super::{DONE, FAILED, OutputFormat, ask, manual, print, print_error, print_line, residue};

/// How often the supervisor is asked whether it waits, and whether a slot is free.
const INTERVAL: Duration = Duration::from_secs(2);

/// Try all that can be tried in this slot, or in every slot that is free. What every slot has shown, a supervisor that runs
/// is told.
pub fn selftest(root: &Path, slot: Option<SlotName>, output: OutputFormat) -> u8 {
    let is_whole = slot.is_none();
    let Some(reports) = test(root, slot) else {
        return FAILED;
    };
    if is_whole && reports.iter().any(|report| report.busy.is_none()) {
        match report_to_supervisor(root, &reports) {
            // At its start it waits for a new one.
            Ok(()) | Err(Error::Unreachable(_)) => {}
            Err(error) => print_error(&format!(
                "user-factory: the supervisor did not accept the result: {error}"
            )),
        }
    }
    show(&reports, output)
}

/// The same once the supervisor runs and a slot is free, if it waits for that.
pub fn run_at_start(root: &Path, output: OutputFormat) -> u8 {
    loop {
        match ask::ask(root, async |supervisor| supervisor.status().await) {
            Ok(status) if !status.waits_for_selftest => return DONE,
            // It has the directory of the workers' cgroups then.
            Ok(status) if status.helper.reachable == Some(true) && has_free_slot(&status) => {
                let Some(reports) = test(root, None) else {
                    return FAILED;
                };
                if reports.iter().any(|report| report.busy.is_none()) {
                    let shown = show(&reports, output);
                    return match report_to_supervisor(root, &reports) {
                        Ok(()) => shown,
                        Err(error) => {
                            print_error(&format!("user-factory: {error}"));
                            FAILED
                        }
                    };
                }
            }
            Ok(_) | Err(_) => {}
        }
        std::thread::sleep(INTERVAL);
    }
}

/// Is there a slot that can be tried, as far as the supervisor knows?
fn has_free_slot(status: &Status) -> bool {
    let is_free = |slot: &api::Slot| {
        slot.worker.is_none()
            && slot.job.is_none()
            && ![SlotState::Blocked, SlotState::Absent].contains(&slot.state)
    };
    status.slots.iter().any(is_free)
}

/// None where it could not be done; the reason is printed.
fn test(root: &Path, slot: Option<SlotName>) -> Option<Vec<SlotReport>> {
    if !nix::unistd::geteuid().is_root() {
        print_error("user-factory: this needs root: it makes workers");
        return None;
    }
    let config = residue::configuration(root)?;
    let slots: Vec<SlotName> = match slot {
        Some(slot) if config.slots.contains_key(&slot) => vec![slot],
        Some(slot) => {
            print_error(&format!("user-factory: the configuration has no slot {slot}"));
            return None;
        }
        None => config.slots.keys().cloned().collect(),
    };
    let programs = Programs::beside(manual::program());
    let absences = usb::absences_now(&config.slots);
    let test = |slot: &SlotName| match absences.get(slot) {
        Some(absence) => Ok(SlotReport {
            slot: slot.to_string(),
            busy: Some(absence.sentence()),
            attempts: Vec::new(),
        }),
        None => run::test_slot(&config, slot, root, &programs),
    };
    let tested: Result<Vec<SlotReport>, _> = slots.iter().map(test).collect();
    tested
        .map_err(|error| {
            print_error(&format!(
                "user-factory: cannot run {} and {}: {error}; install the programs of one release",
                programs.manual.display(),
                programs.probe.display()
            ));
        })
        .ok()
}

fn report_to_supervisor(root: &Path, reports: &[SlotReport]) -> Result<(), Error> {
    let found = api::SelfTest {
        failure: selftest::failure(reports),
        ..api::SelfTest::default()
    };
    ask::ask(root, async |supervisor| supervisor.selftest(&found).await)
}

fn show(reports: &[SlotReport], output: OutputFormat) -> u8 {
    let holds = selftest::holds(reports);
    print_line(&match output.json {
        true => format!("{}\n", serde_json::json!({ "ok": holds, "slots": reports })),
        false => print::selftest(reports, holds),
    });
    if holds { DONE } else { FAILED }
}
