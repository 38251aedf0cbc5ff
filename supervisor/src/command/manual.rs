//! The commands that need root: the program `user-factory-manual`, which this one executes.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use protocol::config::CONFIG_PATH;

use super::{FAILED, print_error};

/// Where the package puts the program.
const INSTALLED: &str = "/usr/libexec/buildomat-user-factory/user-factory-manual";

/// The program of this release: beside this one, or where the package puts it.
pub fn program() -> PathBuf {
    let beside = std::env::current_exe()
        .ok()
        .map(|own| own.with_file_name("user-factory-manual"));
    beside
        .filter(|path| path.is_file())
        .unwrap_or_else(|| PathBuf::from(INSTALLED))
}

/// Replace this process by the program, with these arguments.
pub fn exec(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    if !nix::unistd::geteuid().is_root() {
        print_error("user-factory: this needs root: it enters a job's sandbox");
        return FAILED;
    }
    let manual = program();
    let error = Command::new(&manual).args(arguments).exec();
    print_error(&format!(
        "user-factory: cannot run {}: {error}; install the programs of one release",
        manual.display()
    ));
    FAILED
}

/// Would the helper start with this configuration file, on this host? The program is run where this is root and the
/// factory is installed below `root`. Returns its answer, and whether that is no.
pub fn check(config: &Path, root: &Path) -> (String, bool) {
    let directory = root.join(CONFIG_PATH);
    let directory = directory.parent().expect("CONFIG_PATH has a directory");
    if !nix::unistd::geteuid().is_root() {
        return ("not asked whether it would start: only root can".into(), false);
    }
    if !directory.is_dir() {
        let why = format!(
            "not asked whether it would start: there is no {}",
            directory.display()
        );
        return (why, false);
    }
    let manual = program();
    let asked = Command::new(&manual)
        .args([
            "check".as_ref(),
            "--root".as_ref(),
            root.as_os_str(),
            config.as_os_str(),
        ])
        .output();
    match asked {
        Ok(output) if output.status.success() => {
            (String::from_utf8_lossy(&output.stdout).trim().to_owned(), false)
        }
        Ok(output) => {
            let both = [output.stdout, output.stderr].concat();
            (format!("FAILED: {}", String::from_utf8_lossy(&both).trim()), true)
        }
        Err(error) => (
            format!(
                "not asked whether it would start: cannot run {}: {error}",
                manual.display()
            ),
            false,
        ),
    }
}
