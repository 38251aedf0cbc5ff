//! The root helper, driven over its socket as the supervisor, or an attacker with its uid, would. Needs root.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::time::Instant;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use protocol::{ErrorKind, Exit, Reply, Request, State, WorkerId, wire};
use testbed::harness::{
    Client, PAUSE, Running, TEST_TIMEOUT, TestHost, create_shared_dir, memfd, sealed_memfd, until, until_is,
    worker_id,
};
use testbed::host_snapshot::{HostSnapshot, processes_of};
use testbed::test_helper::{
    SLOTS, TestHelper, create, create_worker, install, kind, list, read, run, state, token, wait_for_console,
    wait_for_line, wait_until,
};

mod devices;
mod host;
mod hung;
mod layouts;
mod life;
mod listener;
mod nice;
mod packets;
mod privileges;
mod quotas;
mod rootfs;
mod sync;
mod usb;

/// A helper that sees what this script makes of its mounts.
fn helper_after(host: &TestHost, script: &str) -> Running {
    let helper = host.helper_command();
    let mut command = std::process::Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "bash", "-ec"]);
    command.arg(format!("{script}\nexec \"$@\"")).arg("bash");
    command.arg(helper.get_program()).args(helper.get_args());
    let helper = Running::start(&mut command);
    helper.log.wait(&["serving"]);
    helper
}
