//! A service under a manager that lets it die and start again: see the program `service-manager`.

use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::{Log, binaries};

#[derive(Debug)]
/// A program under a manager that reaps it; dropped, both are killed.
pub struct Service {
    manager: Child,
    commands: ChildStdin,
    replies: Lines<BufReader<ChildStdout>>,
    pid: Option<u32>,
    /// The program's standard error, of all its runs, and the manager's.
    pub log: Log,
}

impl Service {
    /// A manager for this program; the program is not started yet.
    pub fn new(program: &mut Command) -> Service {
        Service::with(&[], program)
    }

    /// The program has this uid and gid.
    pub fn of_user(uid: u32, program: &mut Command) -> Service {
        Service::with(&["--as", &uid.to_string()], program)
    }

    fn with(args: &[&str], program: &mut Command) -> Service {
        let mut command = Command::new(binaries().join("service-manager"));
        command.args(args);
        command.arg(program.get_program()).args(program.get_args());
        let mut manager = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the manager can be started");
        let log = Log::default();
        log.follow(manager.stderr.take().expect("it was piped"));
        Service {
            commands: manager.stdin.take().expect("it was piped"),
            replies: BufReader::new(manager.stdout.take().expect("it was piped")).lines(),
            manager,
            pid: None,
            log,
        }
    }

    /// Start it, and return at once.
    pub fn start(&mut self) -> u32 {
        self.send_command("start")
    }

    /// Start it, but so that it waits to be continued before its first instruction.
    pub fn start_stopped(&mut self) -> u32 {
        self.send_command("stopped")
    }

    fn send_command(&mut self, command: &str) -> u32 {
        assert_eq!(self.pid, None, "it runs already");
        writeln!(self.commands, "{command}").expect("the manager listens");
        let pid = self.next("started ");
        self.pid = Some(pid);
        pid
    }

    fn next(&mut self, prefix: &str) -> u32 {
        let line = self
            .replies
            .next()
            .expect("the manager is running")
            .expect("it prints lines");
        let pid = line.strip_prefix(prefix).and_then(|pid| pid.parse().ok());
        pid.unwrap_or_else(|| panic!("the manager printed {line:?}, not {prefix}…\n{}", self.log.text()))
    }

    /// Panics where it does not run.
    pub fn pid(&self) -> u32 {
        self.pid.expect("it runs")
    }

    /// Wait until it has ended.
    pub fn wait_for_end(&mut self) {
        let pid = self.next("ended ");
        assert_eq!(self.pid.take(), Some(pid));
    }

    /// Panics where it does not run.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid() as i32), signal).expect("it is not reaped before it is waited for");
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Some(pid) = self.pid {
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
        }
        let _ = self.manager.kill();
        let _ = self.manager.wait();
        if std::thread::panicking() {
            eprintln!("--- log of a service\n{}", self.log.text());
        }
    }
}
