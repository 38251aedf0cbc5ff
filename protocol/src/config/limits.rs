//! What one job may use at most.

use serde::{Deserialize, Deserializer, de};

/// The most that a slot may let the helper keep of what its agents print, in bytes: 8 MiB. What comes after a
/// slot's own `limits.console` is dropped.
pub const MAX_CONSOLE_BYTES: u64 = 8 << 20;

/// The limits of a slot's jobs; what is not written has no limit, or the default that is said here.
///
/// A limit that the host cannot enforce stops the helper at its start, unless `best_effort` is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Bytes of memory, page cache included: `memory.max` of the kernel's cgroup-v2 documentation. At least 16 MiB.
    #[serde(deserialize_with = "at_least::<_, 0x100_0000>")]
    pub memory: Option<u64>,
    /// Bytes of swap (`memory.swap.max`). Where `memory` is set, 0 unless written.
    #[serde(deserialize_with = "at_least::<_, 0>")]
    pub swap: Option<u64>,
    /// Time of this many processors (`cpu.max`): 0.01 to 4096.
    pub cpus: Option<Cpus>,
    /// Processes and threads, 16 to 4194304 (`RLIMIT_NPROC`, and `pids.max` where there is one).
    #[serde(deserialize_with = "between::<_, 16, 4_194_304>")]
    pub processes: u64,
    /// Open files of one process, 64 to 1048576 (`RLIMIT_NOFILE`, the hard one; the soft one is at most 1024).
    #[serde(deserialize_with = "between::<_, 64, 1_048_576>")]
    pub open_files: u64,
    /// Bytes that the job may have on disk: a user quota (`quotactl(2)`) on the file system of the state
    /// directory. At least 1 MiB.
    #[serde(deserialize_with = "at_least::<_, 0x10_0000>")]
    pub disk: Option<u64>,
    /// Files that the job may have on disk, in the same quota. At least 100.
    #[serde(deserialize_with = "at_least::<_, 100>")]
    pub inodes: Option<u64>,
    /// Bytes that are kept of what the agent prints, 1 KiB to 8 MiB; the rest is dropped.
    #[serde(deserialize_with = "size_between::<_, 0x400, MAX_CONSOLE_BYTES>")]
    pub console: u64,
    /// Seconds from the start of the agent to its end, 10 to 31536000; then all of the worker's processes are ended.
    #[serde(deserialize_with = "maybe_between::<_, 10, 31_536_000>")]
    pub run_time_seconds: Option<u64>,
    /// Start although the host cannot enforce some of these, and warn.
    pub best_effort: bool,
}

/// What must be free on the host for a job to be taken. What is not written is not looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MinFree {
    /// Bytes on the file system of the jobs' directories (`statvfs(3)`, what is free for users without privileges). At
    /// least 1.
    #[serde(deserialize_with = "at_least::<_, 1>")]
    pub disk: Option<u64>,
    /// Files that the same file system has room for. At least 1.
    #[serde(deserialize_with = "at_least::<_, 1>")]
    pub inodes: Option<u64>,
    /// Bytes of memory that new processes can have without swapping: `MemAvailable` of `/proc/meminfo`
    /// (`proc_meminfo(5)`). At least 1.
    #[serde(deserialize_with = "at_least::<_, 1>")]
    pub memory: Option<u64>,
}

/// Does this value of `/proc/sys/kernel/core_pattern` send each core to a socket (`core(5)`)? From Linux 6.16 on
/// `@path` does, and from 6.17 on `@@path`. Such a core is whole whatever `RLIMIT_CORE` says: nothing that a job
/// inherits keeps it back. A limit of 1 byte keeps the kernel from the other two kinds, a file and a pipe.
pub fn core_goes_to_a_socket(core_pattern: &str) -> bool {
    core_pattern.starts_with('@')
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            memory: None,
            swap: None,
            cpus: None,
            processes: 16_384,
            open_files: 524_288,
            disk: None,
            inodes: None,
            console: 1 << 20,
            run_time_seconds: None,
            best_effort: false,
        }
    }
}

/// An amount of processor time, in thousandths of a processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpus(u32);

impl Cpus {
    /// 10 to 4096000: `limits.cpus` is 0.01 to 4096.
    pub fn thousandths(self) -> u32 {
        self.0
    }
}

impl<'de> Deserialize<'de> for Cpus {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected a number of processors, such as 2 or 0.5")]
        enum Raw {
            Whole(u32),
            Part(f64),
        }
        let number = match Raw::deserialize(from)? {
            Raw::Whole(n) => f64::from(n),
            Raw::Part(n) => n,
        };
        if (0.01..=4096.0).contains(&number) {
            // In this range the conversion is exact to the thousandth.
            Ok(Cpus((number * 1000.0).round() as u32))
        } else {
            Err(de::Error::custom(format!(
                "{number} is out of range: use 0.01 to 4096 processors"
            )))
        }
    }
}

/// A number of bytes or of things: an integer, or a text such as `"512M"` (K, M, G and T are powers of 1024).
fn size<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a size, such as 1048576 or \"512M\"")]
    enum Raw {
        Number(u64),
        Text(String),
    }
    match Raw::deserialize(from)? {
        Raw::Number(number) => Ok(number),
        Raw::Text(text) => parse_size(&text).ok_or_else(|| {
            de::Error::custom(format!(
                "{text:?} is not a size: write a whole number, with K, M, G or T after it if you like"
            ))
        }),
    }
}

fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return None,
    };
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    // What cgroups and quotas can count: below 2^63.
    digits
        .parse::<u64>()
        .ok()?
        .checked_mul(1 << shift)
        .filter(|size| *size < 1 << 63)
}

fn check<E: de::Error>(value: u64, min: u64, max: u64) -> Result<u64, E> {
    if (min..=max).contains(&value) {
        Ok(value)
    } else if max == u64::MAX {
        Err(E::custom(format!("{value} is too small: use at least {min}")))
    } else {
        Err(E::custom(format!("{value} is out of range: use {min} to {max}")))
    }
}

fn at_least<'de, D: Deserializer<'de>, const MIN: u64>(from: D) -> Result<Option<u64>, D::Error> {
    check(size(from)?, MIN, u64::MAX).map(Some)
}

fn size_between<'de, D: Deserializer<'de>, const MIN: u64, const MAX: u64>(from: D) -> Result<u64, D::Error> {
    check(size(from)?, MIN, MAX)
}

pub(super) fn between<'de, D: Deserializer<'de>, const MIN: u64, const MAX: u64>(
    from: D,
) -> Result<u64, D::Error> {
    check(u64::deserialize(from)?, MIN, MAX)
}

pub(super) fn maybe_between<'de, D: Deserializer<'de>, const MIN: u64, const MAX: u64>(
    from: D,
) -> Result<Option<u64>, D::Error> {
    between::<D, MIN, MAX>(from).map(Some)
}

/// Priority over the host's own processes is not the configuration's to give, so there are no negative ones.
pub(super) fn nice<'de, D: Deserializer<'de>>(from: D) -> Result<u8, D::Error> {
    between::<D, 0, 19>(from).map(|value| value as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Limits, String> {
        toml::from_str(text).map_err(|error: toml::de::Error| error.message().to_owned())
    }

    #[test]
    fn a_core_goes_to_a_socket_where_the_pattern_begins_with_an_at_sign() {
        for (pattern, is_socket) in [
            ("@/run/systemd/coredump\n", true),
            ("@/run/x.sock", true),
            // The receiver is asked first what it wants.
            ("@@/run/x.sock\n", true),
            ("@", true),
            // Files, by a name relative to the process's directory or an absolute one.
            ("core\n", false),
            ("", false),
            ("\n", false),
            ("core.%p@%h\n", false),
            (" @/run/x.sock\n", false),
            ("/var/crash/core.%e.%p\n", false),
            ("/run/@x\n", false),
            // Pipes.
            ("|/usr/lib/systemd/systemd-coredump %P %u %g %s %t %c %h\n", false),
            ("|@/run/x.sock\n", false),
        ] {
            assert_eq!(core_goes_to_a_socket(pattern), is_socket, "{pattern:?}");
        }
    }

    #[test]
    fn limits_are_read_with_their_units() {
        let limits = parse(
            "memory = \"8G\"\nswap = 0\ncpus = 2.5\nprocesses = 100\nopen_files = 4096\ndisk = \"20G\"\n\
             inodes = 1000\nconsole = \"64K\"\nrun_time_seconds = 60\nbest_effort = true",
        )
        .unwrap();
        assert_eq!(limits.memory, Some(8 << 30));
        assert_eq!(limits.swap, Some(0));
        assert_eq!(limits.cpus.unwrap().thousandths(), 2500);
        assert_eq!((limits.processes, limits.open_files), (100, 4096));
        assert_eq!((limits.disk, limits.inodes), (Some(20 << 30), Some(1000)));
        assert_eq!((limits.console, limits.run_time_seconds), (64 << 10, Some(60)));
        assert!(limits.best_effort);
        assert_eq!(parse("").unwrap(), Limits::default());
        assert_eq!(parse("cpus = 3").unwrap().cpus, Some(Cpus(3000)));
    }

    #[test]
    fn what_is_no_limit_is_refused_with_a_sentence() {
        for (text, part) in [
            ("memory = \"8 GB\"", "is not a size"),
            ("memory = \"G\"", "is not a size"),
            ("memory = \"-1\"", "is not a size"),
            ("memory = \"9999999999T\"", "is not a size"),
            ("memory = 5", "at least 16777216"),
            ("memory = true", "expected a size"),
            ("cpus = 0", "0.01 to 4096"),
            ("cpus = nan", "0.01 to 4096"),
            ("cpus = \"2\"", "number of processors"),
            ("processes = 1", "16 to 4194304"),
            ("open_files = 10", "64 to 1048576"),
            ("console = \"1G\"", "1024 to 8388608"),
            ("run_time_seconds = 1", "10 to 31536000"),
            ("ram = 1", "unknown field"),
        ] {
            let message = parse(text).expect_err(text);
            assert!(message.contains(part), "{text}: {message}");
        }
    }
}
