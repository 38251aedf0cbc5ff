//! Programs for the kernel (`seccomp(2)`, classic BPF), put together from what each system call is answered.

use std::collections::BTreeMap;

use libc::{c_long, sock_filter};
use protocol::config::SocketFamily;

/// `linux/audit.h`: what the kernel says of a call that was made by this architecture's own entry point.
#[cfg(target_arch = "x86_64")]
pub const NATIVE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
pub const NATIVE: u32 = 0xc000_00b7;
#[cfg(target_arch = "riscv64")]
pub const NATIVE: u32 = 0xc000_00f3;
#[cfg(target_arch = "arm")]
pub const NATIVE: u32 = 0x4000_0028;

/// What the slot decides about a job's filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobFilter<'a> {
    pub allow_user_namespaces: bool,
    /// Beyond those of every job.
    pub socket_families: &'a [SocketFamily],
    /// It has devices of the host, whose drivers it may ask anything.
    pub has_devices: bool,
    pub ignore_sync: bool,
}

pub const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;

pub const fn errno(number: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | number as u32
}

/// Said to the caller instead of doing the call.
pub const DONE: u32 = errno(0);
pub const REFUSED: u32 = errno(libc::EPERM);
pub const ABSENT: u32 = errno(libc::ENOSYS);

// Offsets in `struct seccomp_data`; the machines that this is built for are little-endian.
pub const NUMBER: u32 = 0;
pub const ARCHITECTURE: u32 = 4;
/// The kernel takes no more than the lower half of the arguments that are looked at here, so neither do we:
/// a filter that compares all 64 bits is got round by setting one of the upper ones.
pub const fn argument(n: u32) -> u32 {
    16 + 8 * n
}

pub const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
pub const MASK: u32 = libc::BPF_ALU | libc::BPF_AND;
pub const HAS_BIT: u32 = libc::BPF_JMP | libc::BPF_JSET;
pub const IS_AT_LEAST: u32 = libc::BPF_JMP | libc::BPF_JGE;
pub const SKIP: u32 = libc::BPF_JMP | libc::BPF_JA;
pub const ANSWER: u32 = libc::BPF_RET;

pub type Steps = Vec<sock_filter>;

fn step(code: u32, value: u32) -> sock_filter {
    sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k: value,
    }
}

pub fn answer(what: u32) -> Steps {
    vec![step(ANSWER, what)]
}

/// The steps that tell on the word at `offset`, of which `mask` counts: those of the case, or else `otherwise`. Each
/// ends with an answer.
pub fn decide(offset: u32, mask: u32, cases: BTreeMap<u32, Steps>, otherwise: Steps) -> Steps {
    let mut steps = vec![step(LOAD, offset)];
    if mask != u32::MAX {
        steps.push(step(MASK, mask));
    }
    steps.extend(search(&ranges(cases, &otherwise)));
    steps
}

/// The same for argument `n`: `then` if it is any of the values.
pub fn if_any(n: u32, values: &[u32], then: Steps, otherwise: Steps) -> Steps {
    let cases = values.iter().map(|value| (*value, then.clone()));
    decide(argument(n), u32::MAX, cases.collect(), otherwise)
}

/// The same for the pointer that is argument `n`, in either half of it.
pub fn if_null(n: u32, null: Steps, otherwise: Steps) -> Steps {
    let upper = BTreeMap::from([(0, null)]);
    let lower = BTreeMap::from([(0, decide(argument(n) + 4, u32::MAX, upper, otherwise.clone()))]);
    decide(argument(n), u32::MAX, lower, otherwise)
}

/// One answer if argument `n` has any of the bits, another if not.
pub fn if_bits(n: u32, bits: u32, what: u32, otherwise: u32) -> Steps {
    let mut steps = vec![step(LOAD, argument(n))];
    steps.push(sock_filter {
        jf: 1,
        ..step(HAS_BIT, bits)
    });
    steps.extend(answer(what));
    steps.extend(answer(otherwise));
    steps
}

/// Each beginning of a range of values, and what is done about it.
fn ranges(cases: BTreeMap<u32, Steps>, otherwise: &Steps) -> Vec<(u32, Steps)> {
    let mut ranges: Vec<(u32, Steps)> = Vec::new();
    let mut begin = |at: u32, steps: Steps| match ranges.last() {
        Some((_, same)) if *same == steps => {}
        _ => ranges.push((at, steps)),
    };
    let mut next = Some(0);
    for (value, steps) in cases {
        if let Some(next) = next.filter(|next| *next != value) {
            begin(next, otherwise.clone());
        }
        begin(value, steps);
        next = value.checked_add(1);
    }
    if let Some(next) = next {
        begin(next, otherwise.clone());
    }
    ranges
}

/// What is done about calls, by their number: steps that end with an answer. What was said first counts.
#[derive(Default)]
pub struct SyscallRules(BTreeMap<u32, Steps>);

impl SyscallRules {
    pub fn rule(&mut self, call: c_long, steps: Steps) {
        self.0.entry(call as u32).or_insert(steps);
    }

    pub fn each(&mut self, calls: &[c_long], what: u32) {
        for call in calls {
            self.rule(*call, answer(what));
        }
    }

    /// The program: `otherwise` for calls without a rule. After `last` there are those with a rule alone.
    ///
    /// It searches by halves. The kernel runs each new program once for every number there is, to remember what needs
    /// no second look: with a comparison for each rule that took longer than a worker's namespaces.
    pub fn program(mut self, last: u32, otherwise: u32) -> Steps {
        let after = ranges(self.0.split_off(&(last + 1)), &answer(ABSENT));
        let mut all = ranges(self.0, &answer(otherwise));
        all.retain(|(at, _)| *at <= last);
        all.extend(after.into_iter().map(|(at, steps)| (at.max(last + 1), steps)));
        let mut steps = vec![step(LOAD, NUMBER)];
        steps.extend(search(&all));
        // int 0x80 and the like are another architecture's.
        let architectures = BTreeMap::from([(NATIVE, steps)]);
        decide(ARCHITECTURE, u32::MAX, architectures, answer(ABSENT))
    }
}

/// Find the range that the loaded number is in.
fn search(ranges: &[(u32, Steps)]) -> Steps {
    if let [(_, steps)] = ranges {
        return steps.clone();
    }
    let (lower, upper) = ranges.split_at(ranges.len() / 2);
    let below = search(lower);
    let is_above = step(IS_AT_LEAST, upper[0].0);
    let mut steps = match u8::try_from(below.len()) {
        Ok(near) => vec![sock_filter { jt: near, ..is_above }],
        // Only SKIP reaches so far.
        Err(_) => vec![sock_filter { jf: 1, ..is_above }, step(SKIP, below.len() as u32)],
    };
    steps.extend(below);
    steps.extend(search(upper));
    steps
}

/// x32's numbers, on x86-64, begin after this one, far above all others.
pub const LAST: u32 = 0x3fff_ffff;
