//! `user-factory-probe`: what `user-factory selftest` runs as a job. It tries what a job must not be able to do, in ways
//! that harm nothing where they work, and what its slot guarantees; a line of JSON for each attempt.

mod sandbox;
mod slot;
mod sys;

use std::process::ExitCode;

use supervisor::selftest::expected::Expected;
use supervisor::selftest::{Attempt, Outcome};

/// Prints what became of each attempt.
#[derive(Debug)]
pub struct Table;

impl Table {
    pub fn report(&self, guarantee: &str, tried: &str, seen: impl Into<String>, outcome: Outcome) {
        let attempt = Attempt::new(guarantee, tried, seen, outcome);
        println!("{}", serde_json::to_string(&attempt).expect("it has text alone"));
    }

    /// This must be so.
    pub fn must_be(&self, guarantee: &str, tried: &str, seen: impl Into<String>, is_so: bool) {
        let outcome = if is_so { Outcome::Ok } else { Outcome::Failed };
        self.report(guarantee, tried, seen, outcome);
    }

    /// This must not work.
    pub fn must_fail<T, E: std::fmt::Display>(&self, guarantee: &str, tried: &str, result: Result<T, E>) {
        match result {
            Ok(_) => self.report(guarantee, tried, "it worked", Outcome::Failed),
            Err(error) => self.report(guarantee, tried, error.to_string(), Outcome::Ok),
        }
    }

    /// This must work.
    pub fn must_work<T, E: std::fmt::Display>(&self, guarantee: &str, tried: &str, result: Result<T, E>) {
        match result {
            Ok(_) => self.report(guarantee, tried, "it worked", Outcome::Ok),
            Err(error) => self.report(guarantee, tried, error.to_string(), Outcome::Failed),
        }
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["sandbox"] => match serde_json::from_reader::<_, Expected>(std::io::stdin()) {
            Ok(expected) => {
                sandbox::all(&Table, &expected);
                slot::all(&Table, &expected);
                sandbox::namespaces(&Table, &expected);
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("what is expected cannot be read: {error}");
                ExitCode::FAILURE
            }
        },
        ["memory", bytes] => {
            slot::take_memory(bytes.parse().unwrap_or(0));
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!(
                "usage: user-factory-probe sandbox <EXPECTED | memory BYTES; user-factory selftest runs it"
            );
            ExitCode::from(2)
        }
    }
}
