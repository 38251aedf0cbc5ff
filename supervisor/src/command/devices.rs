//! `user-factory devices`: the USB devices that are plugged in, and the slots that they belong to.

use std::collections::BTreeMap;
use std::path::Path;
use std::thread;
use std::time::Duration;

use protocol::SlotName;
use protocol::config::Slot;
use supervisor::config_check;
use supervisor::settings::{self, Places};
use supervisor::usb::list::{list, nodes};
use supervisor::usb::{self, UsbMonitor};

use super::{DONE, Location, OutputFormat, ask, print, print_error, print_line};

/// How often `--watch` looks.
const INTERVAL: Duration = Duration::from_millis(500);

/// Print what is plugged in; with `watch` at each change, until interrupted.
pub fn devices(at: &Location, output: OutputFormat, watch: bool) -> u8 {
    let directory = usb::devices_directory();
    let mut monitor = UsbMonitor::new(directory.clone());
    let (mut printed, mut told) = (None, None);
    loop {
        let devices = monitor.wait();
        let (slots, problem) = slots(&at.root);
        let listed = list(&devices, &slots, |device| nodes(&directory, device));
        let text = match output.json {
            true => ask::json(&listed),
            false => print::devices(&listed),
        };
        if printed.as_ref() != Some(&text) {
            let clear = if watch { "\x1b[H\x1b[2J" } else { "" };
            print_line(&format!("{clear}{text}"));
            // It is no longer on the screen.
            (printed, told) = (Some(text), None);
        }
        if let Some(problem) = problem.filter(|problem| told.as_ref() != Some(problem)) {
            print_error(&problem);
            told = Some(problem);
        }
        if !watch {
            return DONE;
        }
        thread::sleep(INTERVAL);
    }
}

/// The slots of the configuration, or none, and why it cannot be used.
fn slots(root: &Path) -> (BTreeMap<SlotName, Slot>, Option<String>) {
    let path = Places::below(root).config;
    match settings::read(&path).and_then(|text| config_check::parse(&text)) {
        Ok(config) => (config.slots, None),
        Err(mistakes) => {
            let mistakes = settings::print(&path, &mistakes);
            let problem = format!(
                "user-factory: no slots are shown, since the configuration cannot be used:\n{}",
                mistakes.trim_end()
            );
            (BTreeMap::new(), Some(problem))
        }
    }
}
