//! `user-factory residue`: is anything left of workers that are gone?

use std::path::Path;

use protocol::config::Config;
use supervisor::config_check;
use supervisor::residue::files::Pace;
use supervisor::residue::{self, Report};
use supervisor::settings::{self, Places};

use super::{DONE, FAILED, OutputFormat, print, print_error, print_line};

/// Look for it, with `pace` on all file systems too, and print what was found.
pub fn residue(root: &Path, pace: Option<Pace>, output: OutputFormat) -> u8 {
    if !nix::unistd::geteuid().is_root() {
        print_error("user-factory: this needs root: it looks at the processes and files of all users");
        return FAILED;
    }
    let Some(config) = configuration(root) else {
        return FAILED;
    };
    let range = config.factory.uid_range;
    let range = range.first.get()..=range.last.get();
    let found = residue::find(root, range, pace, |progress| {
        print_error(&format!(
            "{} files seen; now {}",
            progress.seen,
            protocol::one_line(&progress.place.display().to_string())
        ));
    });
    match found {
        Ok(report) => {
            print_line(&if output.json {
                json(&report)
            } else {
                print::residue(&report, pace.is_some())
            });
            if report.is_clean() { DONE } else { FAILED }
        }
        Err(error) => {
            print_error(&format!("user-factory: cannot look for what is left: {error}"));
            FAILED
        }
    }
}

/// The configuration in use, or none, and its mistakes are told.
pub fn configuration(root: &Path) -> Option<Config> {
    let path = Places::below(root).config;
    let config = settings::read(&path).and_then(|text| config_check::parse(&text));
    config
        .map_err(|mistakes| print_error(settings::print(&path, &mistakes).trim_end()))
        .ok()
}

fn json(report: &Report) -> String {
    let mut text = serde_json::to_value(report).expect("it has no map with other keys than text");
    text["clean"] = report.is_clean().into();
    format!("{text}\n")
}
