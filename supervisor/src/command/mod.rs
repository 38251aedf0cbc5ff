//! The command line: what can be typed, and which exit status says what.

pub mod ask;
pub mod check;
pub mod devices;
pub mod generate;
pub mod manual;
pub mod print;
pub mod residue;
pub mod selftest;
pub mod serve;
pub mod shutdown;

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use protocol::{SlotName, WorkerId};
use supervisor::residue::files::Pace;

/// Done.
pub const DONE: u8 = 0;
/// It could not be done; standard error has the reason.
pub const FAILED: u8 = 1;
/// The factory does not answer at its control socket.
pub const NO_ANSWER: u8 = 3;
/// `status` alone: all answers, and something waits for an operator.
pub const ATTENTION: u8 = 4;
/// `serve` alone: the configuration or the token cannot be used, and the next start would end in the same way. The unit does
/// not restart it then (EX_CONFIG of sysexits.h).
pub const NOT_CONFIGURED: u8 = 78;

const STATUSES: &str = "\
Exit status:
  0  done
  1  it could not be done: standard error has the reason
  2  the command line makes no sense
  3  the factory does not answer at its control socket
  4  `status`: something waits for an operator (a worker is held or broken, a slot's USB device is absent, the server or the helper is unreachable or does
     not answer, or has not answered since the start, a changed configuration was not taken, the supervisor's disk is full or cannot be written, another
     host may use the same token, the last self-test has failed, or no jobs are taken for another reason than `drain`)
  78 `serve`: the configuration or the token cannot be used; starting it again does not help
  `run` and `shell` end with the status of what they ran.";

/// Buildomat workers as ephemeral Unix users of this host.
#[derive(Debug, Parser)]
#[command(name = "user-factory", version, about, after_help = STATUSES)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
}

/// Where the factory's files are.
#[derive(Clone, Debug, Args)]
pub struct Location {
    /// The directory below which all files of the factory are.
    #[arg(long, value_name = "DIR", default_value = "/", global = true)]
    pub root: PathBuf,
}

/// How the command prints its answer.
#[derive(Clone, Copy, Debug, Args)]
pub struct OutputFormat {
    /// Print JSON, as the control socket says it, instead of a table.
    #[arg(long)]
    pub json: bool,
}

/// How `residue` looks for files.
#[derive(Clone, Copy, Debug, Args)]
pub struct FileSearch {
    /// Look at so many files in a second, at most: the walk over all local file systems is the long part of `residue`, and
    /// others use the disk.
    #[arg(long, value_name = "N", default_value = "20000", value_parser = clap::value_parser!(u32).range(1..))]
    files_per_second: u32,
    /// Do not look for files that are left.
    #[arg(long)]
    no_files: bool,
}

impl FileSearch {
    /// How fast files are searched; none where they are not.
    pub fn pace(self) -> Option<Pace> {
        (!self.no_files).then_some(Pace(self.files_per_second))
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the factory (the unprivileged part; the helper must run beside it).
    Serve {
        /// The configuration file.
        #[arg(long, value_name = "PATH")]
        config: Option<PathBuf>,
        #[command(flatten)]
        at: Location,
        /// Run even as root. For tests alone.
        #[arg(long, hide = true)]
        allow_root: bool,
        /// error, warn, info, debug or trace.
        #[arg(long, value_name = "LEVEL", default_value = "info")]
        log_level: tracing::Level,
    },
    /// Say all that is wrong with a configuration, and what this host lacks for it; start nothing.
    Check {
        /// The configuration file.
        config: PathBuf,
        /// Also ask the server: does it answer, does it take the token, has it an agent for this machine?
        #[arg(long)]
        online: bool,
        /// All of this host: the same, then `selftest` in each free slot, then `residue`. Needs root.
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        search: FileSearch,
        #[command(flatten)]
        at: Location,
    },
    /// The factory at a glance: server, helper, slots, and what waits for an operator.
    Status {
        #[command(flatten)]
        at: Location,
        #[command(flatten)]
        output: OutputFormat,
        /// Draw it again every two seconds.
        #[arg(long, conflicts_with = "json")]
        watch: bool,
    },
    /// All workers, a line each.
    Workers {
        #[command(flatten)]
        at: Location,
        #[command(flatten)]
        output: OutputFormat,
    },
    /// One worker: its phases, processes, memory and disk, the last lines of its console, why it failed, and what to do next.
    Show {
        worker: WorkerId,
        #[command(flatten)]
        at: Location,
        #[command(flatten)]
        output: OutputFormat,
    },
    /// What the jobs of a slot have connected to in the last 30 days, as lines for the configuration. For slots without the
    /// host's network; with network = { audit = true } a job reaches other hosts through its HTTP proxy, and they are recorded.
    Egress {
        slot: SlotName,
        #[command(flatten)]
        at: Location,
        #[command(flatten)]
        output: OutputFormat,
    },
    /// The USB devices that are plugged in: port, numbers, serial number, nodes, and the slots that they belong to by the
    /// configuration. For those that belong to none there are lines to paste into it.
    Devices {
        #[command(flatten)]
        at: Location,
        #[command(flatten)]
        output: OutputFormat,
        /// Print it anew at each change, until interrupted.
        #[arg(long, conflicts_with = "json")]
        watch: bool,
    },
    /// What the worker's agent has printed.
    Logs {
        worker: WorkerId,
        /// Go on until the agent has ended.
        #[arg(long, short)]
        follow: bool,
        #[command(flatten)]
        at: Location,
    },
    /// Take no new jobs, on all slots or on one; jobs that run go on.
    Drain {
        slot: Option<SlotName>,
        /// Wait until no worker is left there.
        #[arg(long)]
        wait: bool,
        /// Why, for who looks at the status.
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
        /// Take jobs again by itself then: after a duration such as 90m or 2h, or at a time such as 2026-12-01T08:00.
        #[arg(long, value_name = "TIME|DURATION", value_parser = ask::end_from_now)]
        until: Option<jiff::Timestamp>,
        /// The host is being shut down: take no jobs until the supervisor starts again, and wait for those that run for
        /// factory.shutdown_wait_seconds. What the package's unit does.
        #[arg(long, conflicts_with_all = ["slot", "wait", "reason", "until"])]
        at_shutdown: bool,
        #[command(flatten)]
        at: Location,
    },
    /// Take jobs again.
    Resume {
        slot: Option<SlotName>,
        #[command(flatten)]
        at: Location,
    },
    /// End a worker's processes and keep its files for inspection. A job on it fails.
    Kill {
        worker: WorkerId,
        #[command(flatten)]
        at: Location,
    },
    /// Delete a worker now, whatever it is doing, held or not. A job on it fails.
    Destroy {
        worker: WorkerId,
        /// Yes, really.
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        at: Location,
    },
    /// Read the configuration again: new workers get what it says. One with mistakes changes nothing.
    Reload {
        #[command(flatten)]
        at: Location,
    },
    /// A shell as the worker's user, with the worker's root file system; also when its job has ended. Needs root.
    Shell {
        worker: WorkerId,
        #[command(flatten)]
        at: Location,
    },
    /// Run a command here and now as a job would run, without a server, in a user that ends with it. Needs root.
    Run {
        /// The slot whose rights and limits it gets [the first that is free]
        #[arg(long, value_name = "SLOT")]
        slot: Option<SlotName>,
        #[command(flatten)]
        at: Location,
        #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND")]
        command: Vec<std::ffi::OsString>,
    },
    /// Does what is guaranteed hold on this host? In each free slot a worker is made, and a probe as its job tries what
    /// a job must not be able to do, and what the slot guarantees. Ends with 1 if something does not hold. Needs root.
    Selftest {
        /// The slot to try [each that is free; then a supervisor that runs is told the result]
        #[arg(long, value_name = "SLOT")]
        slot: Option<SlotName>,
        /// Only where the supervisor waits for it (factory.selftest_at_start), and once it runs and a slot is free: what the
        /// package's unit does.
        #[arg(long, conflicts_with = "slot")]
        at_start: bool,
        #[command(flatten)]
        at: Location,
        #[command(flatten)]
        output: OutputFormat,
    },
    /// Is anything left on this host of a uid that workers get and none has: processes, files, IPC objects, keys, cgroups,
    /// mounts, user records, crontabs, sockets, quotas? Ends with 1 if there is. Needs root.
    Residue {
        #[command(flatten)]
        at: Location,
        #[command(flatten)]
        output: OutputFormat,
        #[command(flatten)]
        search: FileSearch,
    },
    /// Write a file that comes with the package.
    #[command(hide = true)]
    Generate { what: generate::Generated },
}

/// Print this. A reader that has gone (`| head`) is no failure.
pub fn print_line(text: &str) {
    let mut out = anstream::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Print this line on standard error.
pub fn print_error(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// The status as the shell gets it.
pub fn exit(status: u8) -> ExitCode {
    ExitCode::from(status)
}
