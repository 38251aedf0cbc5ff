//! What benchmarks share: ways of doing the same thing, measured in turn in one run, and compared.
//!
//! Machines are noisy, so a bare time says little: what counts is the ratio of two medians of one run. The ways
//! take turns, so that what disturbs one disturbs the next.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// The command line of a benchmark: `cargo bench -p testbed --bench NAME -- [--small] [--save] [ONLY…]`.
#[derive(Debug)]
pub struct Options {
    /// A size that shows that all works, in seconds; its ratios mean little.
    pub small: bool,
    /// Keep what was measured in `docs/performance/NAME.json`, from which the chart is made.
    pub save: bool,
    only: Vec<String>,
}

impl Options {
    /// From this process's arguments; cargo's own `--bench` is skipped, and what is no option is a part to measure.
    pub fn from_args() -> Options {
        let mut options = Options {
            small: false,
            save: false,
            only: Vec::new(),
        };
        for argument in std::env::args().skip(1) {
            match argument.as_str() {
                // Cargo says so to every benchmark.
                "--bench" => {}
                "--small" => options.small = true,
                "--save" => options.save = true,
                other => options.only.push(other.to_owned()),
            }
        }
        options
    }

    /// Was this part asked for? Without any, all are.
    pub fn wants(&self, part: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| part.contains(only.as_str()))
    }

    /// `large`, or where `--small` was said, `small`.
    pub fn size<T>(&self, large: T, small: T) -> T {
        if self.small { small } else { large }
    }
}

/// All that one benchmark has measured.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    /// Also that of the file in `docs/performance`, without its ending.
    pub name: String,
    /// In the order in which they were measured.
    pub groups: Vec<Group>,
}

/// Ways that were measured in turn. Ratios are against the first.
#[derive(Debug, Serialize, Deserialize)]
pub struct Group {
    /// Printed above the table.
    pub title: String,
    /// Never empty.
    pub ways: Vec<Way>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
/// What was measured of one way.
pub struct Way {
    /// As it is printed, and as [`Group::ratio`] takes it.
    pub name: String,
    /// Microseconds, sorted.
    pub samples: Vec<f64>,
}

/// A way, and how to go it once: it says itself how long the part that counts took.
pub type Measurement<'a> = (&'a str, Box<dyn FnMut() -> Duration + 'a>);

/// Build `tests/benches/NAME.c` into a directory. Rust links with a C compiler, so there is one.
pub fn c_program(into: &Path, name: &str, flags: &[&str]) -> PathBuf {
    let program = into.join(name);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches").join(name);
    let mut cc = Command::new("cc");
    cc.args(flags)
        .arg("-o")
        .arg(&program)
        .arg(source.with_extension("c"));
    assert!(cc.status().is_ok_and(|status| status.success()), "{cc:?} failed");
    program
}

/// How long this takes.
pub fn time<T>(work: impl FnOnce() -> T) -> Duration {
    let begin = Instant::now();
    std::hint::black_box(work());
    begin.elapsed()
}

impl Way {
    /// Microseconds below which this part (0 to 1) of the samples lies.
    pub fn quantile(&self, part: f64) -> f64 {
        let at = (part * (self.samples.len() - 1) as f64).round() as usize;
        self.samples[at]
    }

    /// In microseconds.
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }
}

impl Group {
    /// Go each way once for the caches, then `rounds` times, in turn.
    pub fn measure(title: &str, rounds: usize, mut ways: Vec<Measurement<'_>>) -> Group {
        let mut samples = vec![Vec::new(); ways.len()];
        for (_, go) in &mut ways {
            go();
        }
        for _ in 0..rounds {
            for ((_, go), samples) in ways.iter_mut().zip(&mut samples) {
                // To a tenth of a microsecond.
                samples.push((go().as_secs_f64() * 1e7).round() / 10.0);
            }
        }
        let ways = ways.iter().zip(samples).map(|((name, _), mut samples)| {
            samples.sort_by(f64::total_cmp);
            Way {
                name: (*name).to_owned(),
                samples,
            }
        });
        Group {
            title: title.to_owned(),
            ways: ways.collect(),
        }
    }

    pub(crate) fn way(&self, name: &str) -> &Way {
        let found = self.ways.iter().find(|way| way.name == name);
        found.unwrap_or_else(|| panic!("{} has no {name}", self.title))
    }

    /// The median of `a` in that of `b`.
    pub fn ratio(&self, a: &str, b: &str) -> f64 {
        self.way(a).median() / self.way(b).median()
    }
}

impl Report {
    /// With no group yet.
    pub fn new(name: &str) -> Report {
        Report {
            name: name.to_owned(),
            groups: Vec::new(),
        }
    }

    /// Print the group, and keep it.
    pub fn add(&mut self, group: Group) -> &Group {
        println!("\n{}", group.title);
        println!("  {:<44} {:>11} {:>11} {:>7}", "", "median", "p95", "ratio");
        let first = group.ways[0].median();
        for way in &group.ways {
            println!(
                "  {:<44} {:>8.3} ms {:>8.3} ms {:>7.2}",
                way.name,
                way.median() / 1e3,
                way.quantile(0.95) / 1e3,
                way.median() / first
            );
        }
        self.groups.push(group);
        self.groups.last().expect("just added")
    }

    /// Say how a ratio stands to what was aimed at.
    pub fn aim(&self, what: &str, ratio: f64, at_most: f64) {
        let word = if ratio <= at_most { "met" } else { "MISSED" };
        println!("  {word}: {what}: {ratio:.2} (at most {at_most})");
    }

    /// Keep it, if that was asked for.
    pub fn end(self, options: &Options) {
        if options.save {
            let place = place().join(format!("{}.json", self.name));
            let text = serde_json::to_string(&self).expect("numbers are JSON");
            std::fs::write(&place, text + "\n").unwrap_or_else(|e| panic!("{}: {e}", place.display()));
        }
    }
}

/// Where measurements are kept.
pub fn place() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().expect("the workspace").join("docs/performance")
}
