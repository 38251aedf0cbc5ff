//! The commands that need root: they are the helper's own, which this one becomes.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use super::{FAILED, say_error};

/// Where the package puts the helper.
const INSTALLED: &str = "/usr/libexec/buildomat-user-factory/user-factory-helper";

/// Become the helper, with these words.
pub fn become_helper(words: impl IntoIterator<Item = OsString>) -> u8 {
    if !nix::unistd::geteuid().is_root() {
        say_error("user-factory: this needs root: it enters a job's sandbox");
        return FAILED;
    }
    let beside = std::env::current_exe()
        .ok()
        .map(|own| own.with_file_name("user-factory-helper"));
    let helper = beside
        .filter(|path| path.is_file())
        .unwrap_or_else(|| PathBuf::from(INSTALLED));
    let error = Command::new(&helper).args(words).exec();
    say_error(&format!(
        "user-factory: cannot run {}: {error}; install the helper of this release",
        helper.display()
    ));
    FAILED
}
