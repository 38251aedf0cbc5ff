//! The probe in a slot: a worker for each of its parts, made and deleted by `user-factory-manual run`.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use protocol::SlotName;
use protocol::config::{Config, Limits};

use super::expected::{Expected, ProbeListeners};
use super::{Attempt, Outcome, SlotReport};
use crate::residue;

/// The status of what was ended by SIGKILL.
const KILLED: i32 = 128 + 9;

/// The status of a job that SIGALRM ended.
const TIMED_OUT: i32 = 128 + 14;

/// The program that tries, beside this one or where the package puts it.
const PROBE: &str = "user-factory-probe";
/// From here on a job would find the probe where the host has it. Elsewhere it may be hidden: it is copied then.
const SHOWN: &str = "/usr";

/// The programs that this takes.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The path of `user-factory-manual`.
    pub manual: PathBuf,
    /// The path of `user-factory-probe`.
    pub probe: PathBuf,
}

impl Programs {
    /// With the probe beside `user-factory-manual`.
    pub fn beside(manual: PathBuf) -> Programs {
        Programs {
            probe: manual.with_file_name(PROBE),
            manual,
        }
    }
}

/// Listeners of this process that no job of a slot without a network may reach.
#[derive(Debug)]
struct Listeners {
    _tcp: TcpListener,
    _abstract: UnixListener,
    outside: ProbeListeners,
}

impl Listeners {
    fn open() -> io::Result<Listeners> {
        let tcp = TcpListener::bind("127.0.0.1:0")?;
        let abstract_name = format!("user-factory-selftest-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&abstract_name)?;
        Ok(Listeners {
            outside: ProbeListeners {
                port: tcp.local_addr()?.port(),
                abstract_name,
            },
            _tcp: tcp,
            _abstract: UnixListener::bind_addr(&address)?,
        })
    }
}

/// Try all that can be tried in this slot.
///
/// # Errors
/// The programs cannot be run.
pub fn test_slot(
    config: &Config,
    slot: &SlotName,
    root: &Path,
    programs: &Programs,
) -> io::Result<SlotReport> {
    let listeners = Listeners::open()?;
    let expected = Expected::of(config, slot, root, &listeners.outside);
    let mut report = SlotReport {
        slot: slot.to_string(),
        busy: None,
        attempts: Vec::new(),
    };
    let output = run(slot, root, programs, Some(&expected), &["sandbox"])?;
    let attempts = parse(&output);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    // The helper's sentence where a slot is not free.
    if attempts.is_empty()
        && let Some(line) = errors.lines().rfind(|line| line.contains(" has worker "))
    {
        report.busy = Some(sentence(line));
        return Ok(report);
    }
    for line in errors.lines().filter(|line| line.contains("NOT ENFORCED")) {
        let seen = sentence(line);
        report.attempts.push(Attempt::new(
            "limits are enforced",
            "the helper asked the kernel",
            seen,
            Outcome::NotEnforced,
        ));
    }
    let is_whole = output.status.code() == Some(0) && !attempts.is_empty();
    report.attempts.extend(attempts.into_iter().map(|mut attempt| {
        if attempt.outcome == Outcome::Failed && is_unenforced(&errors, &attempt.guarantee, slot) {
            attempt.outcome = Outcome::NotEnforced;
        }
        attempt
    }));
    if !is_whole {
        let last = errors.lines().last().map(sentence).unwrap_or_default();
        report.attempts.push(Attempt::new(
            "a job starts and comes to its end",
            "a worker with the probe as its job",
            format!("it ended with {}: {last}", output.status),
            Outcome::Failed,
        ));
    }
    let is_enforced = !is_unenforced(&errors, "limits.memory", slot);
    if let Some(attempt) = memory(&config.slots[slot].limits, is_enforced, slot, root, programs)? {
        report.attempts.push(attempt);
    }
    if let Some(seconds) = config.slots[slot].limits.run_time_seconds {
        report.attempts.push(Attempt::new(
            "a job ends after limits.run_time_seconds",
            "nothing",
            format!("the limit is {seconds} s, counted from the start of an agent"),
            Outcome::NotTried,
        ));
    }
    // A connection that the job has made keeps its credentials (`SO_PEERCRED`, `unix(7)`), and these keep the directories
    // that Landlock's rules name, also when they are removed (`security/landlock/fs.c`): they stay in the user's quota.
    drop(listeners);
    report.attempts.push(nothing_is_left(config, root)?);
    Ok(report)
}

/// Has the helper warned that this host cannot enforce this limit of the slot, which says `limits.best_effort`?
fn is_unenforced(errors: &str, limit: &str, slot: &SlotName) -> bool {
    errors.contains(&format!("NOT ENFORCED on this host: {limit} of slot {slot},"))
}

/// What `run` printed to standard error, without the time and the level.
fn sentence(line: &str) -> String {
    let words = ["ERROR ", "WARN "]
        .iter()
        .find_map(|level| Some(line.split_once(level)?.1));
    words.unwrap_or(line).trim().to_owned()
}

fn parse(output: &Output) -> Vec<Attempt> {
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect()
}

/// Run the probe with these arguments, in a worker of its own. What it expects is its standard input: the slot's variables
/// may be secrets, and arguments are seen by all users of the host (`proc_pid_cmdline(5)`).
fn run(
    slot: &SlotName,
    root: &Path,
    programs: &Programs,
    expected: Option<&Expected>,
    arguments: &[&str],
) -> io::Result<Output> {
    let mut input = tempfile::tempfile()?;
    if let Some(expected) = expected {
        serde_json::to_writer(&input, expected)?;
    }
    input.write_all(b"\n")?;
    let mut command = Command::new(&programs.manual);
    command
        .args(["run", "--slot", slot.as_str(), "--root"])
        .arg(root)
        .arg("--");
    if programs.probe.starts_with(SHOWN) {
        command.arg(&programs.probe);
    } else {
        // The program comes behind the first line.
        let copy = "IFS= read -r told && cat >/work/probe && chmod 700 /work/probe && \
                    printf '%s\\n' \"$told\" | /work/probe \"$@\"";
        command.args(["/bin/sh", "-c", copy, "probe"]);
        io::copy(&mut File::open(&programs.probe)?, &mut input)?;
    }
    input.rewind()?;
    command.args(arguments).stdin(input).output()
}

/// A worker that takes more memory than its slot has.
fn memory(
    limits: &Limits,
    is_enforced: bool,
    slot: &SlotName,
    root: &Path,
    programs: &Programs,
) -> io::Result<Option<Attempt>> {
    let Some(limit) = limits.memory.filter(|_| is_enforced) else {
        return Ok(None);
    };
    let guarantee = "a job gets no more than limits.memory";
    let wanted = limit + limits.swap.unwrap_or(0) + (64 << 20);
    let free = available_memory()?;
    if wanted > free / 2 {
        let seen = format!("{wanted} bytes are more than half of the host's free memory, {free}");
        return Ok(Some(Attempt::new(guarantee, "nothing", seen, Outcome::NotTried)));
    }
    let output = run(slot, root, programs, None, &["memory", &wanted.to_string()])?;
    let tried = format!("a job that takes {wanted} bytes");
    let outcome = match output.status.code() {
        Some(KILLED) => Outcome::Ok,
        // It may have stalled at its limit, which the supervisor ends for its jobs; or the host is slow.
        Some(TIMED_OUT) => Outcome::NotTried,
        _ => Outcome::Failed,
    };
    let seen = match output.status.code() {
        Some(TIMED_OUT) => "it had not taken them after two minutes".to_owned(),
        _ => format!("it ended with {}", output.status),
    };
    Ok(Some(Attempt::new(guarantee, tried, seen, outcome)))
}

/// `MemAvailable` of `/proc/meminfo` (`proc_meminfo(5)`), in bytes.
fn available_memory() -> io::Result<u64> {
    let table = std::fs::read_to_string("/proc/meminfo")?;
    let line = table.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: u64 = line
        .and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok())
        .ok_or_else(|| io::Error::other("/proc/meminfo has no MemAvailable"))?;
    Ok(kib << 10)
}

/// All but files of other places than the factory's, for which `user-factory residue` takes minutes.
fn nothing_is_left(config: &Config, root: &Path) -> io::Result<Attempt> {
    let range = config.factory.uid_range;
    let report = residue::find(root, range.first.get()..=range.last.get(), None, |_| ())?;
    let (seen, outcome) = match report.found.first() {
        None => ("nothing".to_owned(), Outcome::Ok),
        Some(left) => {
            let more = report.found.len() - 1;
            (
                format!(
                    "{} {}, and {more} more: see user-factory residue",
                    left.kind.name(),
                    left.what
                ),
                Outcome::Failed,
            )
        }
    };
    Ok(Attempt::new(
        "nothing is left of a worker",
        "a look for what is of no existing worker, files apart",
        seen,
        outcome,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_a_log_is_read_as_its_sentence() {
        let line = "2026-11-28T16:45:15.032555Z ERROR slot a has worker X: delete that one first";
        assert_eq!(sentence(line), "slot a has worker X: delete that one first");
        assert_eq!(sentence("<3>plain"), "<3>plain");
    }
}
