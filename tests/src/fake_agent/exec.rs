//! Runs one script under bash, and carries its lines away while it runs.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::spawn;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::events::Events;

const GRACE: Duration = Duration::from_secs(5);
const DRAIN_TIMEOUT: Duration = Duration::from_secs(60);

/// A script in a file that goes when it has run.
pub fn bash(script: &str) -> Result<(Command, tempfile::NamedTempFile)> {
    let mut file = tempfile::Builder::new()
        .prefix("task-")
        .suffix(".sh")
        .tempfile()?;
    file.write_all(script.as_bytes())
        .context("cannot write the script")?;
    let mut command = Command::new("/bin/bash");
    command.arg(file.path()).env_clear();
    Ok((command, file))
}

/// What the lines belong to: the task, and the stream for what the agent itself says of it.
#[derive(Clone, Copy, Debug)]
pub struct LineSource {
    pub task: Option<u32>,
    pub own: &'static str,
}

/// Runs to the end; true = it failed.
pub fn run(mut command: Command, events: &Events, source: LineSource) -> Result<bool> {
    let start = Instant::now();
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.with_context(|| format!("cannot start a script {}", place(&command)))?;
    let (ended, ends) = channel();
    let mut open = 2;
    read(
        child.stdout.take(),
        "stdout",
        source,
        events.clone(),
        ended.clone(),
    );
    read(child.stderr.take(), "stderr", source, events.clone(), ended);

    let status = child.wait().context("cannot wait for the task")?;
    // Only so that the last lines come before the exit status.
    let warn = |text: &str| events.log(source.task, "worker", format!("exec warning: {text}"));
    drain(&ends, &mut open, GRACE);
    if let Some(signal) = status.signal() {
        warn(&format!("child terminated by signal {signal}"));
    }
    let (ms, code) = (start.elapsed().as_millis(), status.code().unwrap_or(i32::MAX));
    events.log(
        source.task,
        source.own,
        format!("process exited: duration {ms} ms, exit code {code}"),
    );
    if open > 0 {
        warn("stdio descriptors remain open after task exit; waiting 60 seconds for them to close");
        drain(&ends, &mut open, DRAIN_TIMEOUT);
    }
    if open > 0 {
        warn("a descriptor may be held open by a background process; giving up!");
    }
    Ok(!status.success())
}

fn place(command: &Command) -> String {
    command
        .get_current_dir()
        .map_or(String::new(), |dir: &Path| format!("in {}", dir.display()))
}

fn read(
    stream: Option<impl Read + Send + 'static>,
    name: &'static str,
    source: LineSource,
    events: Events,
    ended: Sender<()>,
) {
    let Some(stream) = stream else { return };
    spawn(move || {
        // What a job prints need not be UTF-8.
        for line in BufReader::new(stream).split(b'\n') {
            match line {
                Ok(line) => events.log(source.task, name, String::from_utf8_lossy(&line).trim_end()),
                Err(e) => return events.log(source.task, "error", format!("failed to read {name}: {e}")),
            }
        }
        ended.send(()).ok();
    });
}

fn drain(ends: &Receiver<()>, open: &mut usize, limit: Duration) {
    let until = Instant::now() + limit;
    while *open > 0
        && ends
            .recv_timeout(until.saturating_duration_since(Instant::now()))
            .is_ok()
    {
        *open -= 1;
    }
}

/// What every task's environment starts from, unless it asked for a clean slate.
pub fn base_env(name: &str, home: &str, bin: &Path) -> [(&'static str, String); 6] {
    let path = format!(
        "{}:/usr/bin:/bin:/usr/sbin:/sbin:/opt/ooce/bin:/opt/ooce/sbin",
        bin.display()
    );
    [
        ("HOME", home.to_string()),
        ("USER", name.to_string()),
        ("LOGNAME", name.to_string()),
        ("TZ", "UTC".to_string()),
        ("PATH", path),
        ("LANG", "en_US.UTF-8".to_string()),
    ]
}
