//! What `init` is to a service, for tests that kill it: it starts the program of its own command line when it is
//! told to, says when that has ended, and reaps at once whatever the dead leave behind.
//!
//! Words on standard input: `start`, or `stopped`: then the program is to be continued before it does anything.
//! On standard output: `started PID`, `ended PID`. At the end of its input it kills the program and ends.

use std::io::BufRead;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Mutex, mpsc};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

/// This program again, to stop itself and then to become the service.
const STOP_FIRST: &str = "--stop-first";
/// The service's uid and gid come next.
const AS: &str = "--as";

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let Some(mut program) = arguments.next() else {
        eprintln!("usage: service-manager PROGRAM ARGUMENTS");
        return ExitCode::FAILURE;
    };
    if program == STOP_FIRST {
        let this = Pid::from_raw(std::process::id() as i32);
        kill(this, Signal::SIGSTOP).expect("a process can stop itself");
        program = arguments.next().expect("a program comes after it");
        panic!("{}", Command::new(program).args(arguments).exec());
    }
    nix::sys::prctl::set_child_subreaper(true).expect("a process can be a reaper");
    let mut user = None;
    if program == AS {
        let mut word = || arguments.next().and_then(|word| word.into_string().ok());
        user = word().and_then(|uid| uid.parse::<u32>().ok());
        program = word().expect("a program comes after the uid").into();
    }
    let arguments: Vec<_> = arguments.collect();
    let own = std::env::current_exe().expect("this program has a path");
    let (wake, woken) = mpsc::channel::<()>();
    std::thread::spawn(move || reap(&woken));
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let mut command = match line.as_str() {
            "start" => Command::new(&program),
            _ => Command::new(&own),
        };
        if line != "start" {
            command.arg(STOP_FIRST).arg(&program);
        }
        command.args(&arguments).stdin(Stdio::null());
        if let Some(uid) = user {
            command.uid(uid).gid(uid);
        }
        let mut services = SERVICES.lock().expect("nobody panics with it");
        let pid = command.spawn().expect("the service can be started").id();
        println!("started {pid}");
        services.push(pid as i32);
        let _ = wake.send(());
    }
    for pid in SERVICES.lock().expect("nobody panics with it").iter() {
        let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
    }
    ExitCode::SUCCESS
}

/// The services that have not ended. Locked while one is started: so its end is not told before its beginning.
static SERVICES: Mutex<Vec<i32>> = Mutex::new(Vec::new());

/// Reap services, and all that comes to this process from below them.
fn reap(woken: &mpsc::Receiver<()>) {
    while let Ok(()) = woken.recv() {
        while let Ok(status) = waitpid(None, None) {
            let Some(pid) = status.pid() else { continue };
            let mut services = SERVICES.lock().expect("nobody panics with it");
            if services.contains(&pid.as_raw()) {
                services.retain(|other| *other != pid.as_raw());
                println!("ended {pid}");
            }
        }
    }
}
