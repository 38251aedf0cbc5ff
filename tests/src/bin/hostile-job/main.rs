//! A job that attacks: started by the helper in place of the agent, it makes one attempt from inside the
//! sandbox, says how each part of it went, and exits with 0 only if all of it failed.
//!
//! Which attempt, and with which arguments, stands behind the program's own last byte: see
//! `testbed::test_helper::attack_program`. All `unsafe` is in `sys`.

mod calls;
mod cleanup;
mod escalation;
mod exhaustion;
mod filter;
mod host_files;
mod isolation;
mod kernel_objects;
mod leftovers;
mod memory;
mod mixed_leftovers;
mod programs;
mod sys;

use std::fmt::Display;
use std::io::{Read, Seek, SeekFrom};
use std::process::ExitCode;

/// An attempt: its name and what it does.
type Attempt = (&'static str, fn(&mut Report, &[String]));

/// What became of an attempt's parts.
#[derive(Debug, Default)]
pub struct Report {
    broken: bool,
}

impl Report {
    /// This must not work.
    pub fn must_fail<T, E: Display>(&mut self, what: impl Display, result: Result<T, E>) {
        match result {
            Ok(_) => self.broken(format!("{what}: it worked")),
            Err(error) => println!("blocked: {what}: {error}"),
        }
    }

    /// The attempt has worked.
    pub fn broken(&mut self, what: impl Display) {
        self.broken = true;
        println!("BROKEN: {what}");
    }

    /// A line for the test, which waits for it.
    pub fn print(&mut self, what: impl Display) {
        println!("{what}");
    }
}

fn main() -> ExitCode {
    let mut tail = Vec::new();
    std::fs::File::open("/proc/self/exe")
        .and_then(|mut own| {
            own.seek(SeekFrom::End(-4096))?;
            own.read_to_end(&mut tail)
        })
        .expect("a job can read its own program");
    let tail = String::from_utf8_lossy(&tail).into_owned();
    let mut args = tail
        .rsplit("\nATTACK ")
        .next()
        .unwrap_or_default()
        .split('\t')
        .map(str::to_owned);
    let name = args.next().unwrap_or_default();
    let args: Vec<String> = args.collect();
    let all = [
        kernel_objects::ATTEMPTS,
        leftovers::ATTEMPTS,
        host_files::ATTEMPTS,
        mixed_leftovers::ATTEMPTS,
        cleanup::ATTEMPTS,
        calls::ATTEMPTS,
        filter::ATTEMPTS,
        isolation::ATTEMPTS,
        programs::ATTEMPTS,
        escalation::ATTEMPTS,
        exhaustion::ATTEMPTS,
        memory::ATTEMPTS,
    ]
    .concat();
    // For the benchmark, which must know all of them.
    if std::env::args().nth(1).as_deref() == Some("--list") {
        all.iter().for_each(|(name, _)| println!("{name}"));
        return ExitCode::SUCCESS;
    }
    let Some((_, attempt)) = all.iter().find(|(other, _)| *other == name) else {
        println!("BROKEN: there is no attempt {name:?}");
        return ExitCode::from(2);
    };
    let mut report = Report::default();
    attempt(&mut report, &args);
    println!("attempt over");
    ExitCode::from(u8::from(report.broken))
}
