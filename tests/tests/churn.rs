//! Many workers through the real helper, a third of them hostile: what the helper and the kernel keep is the same
//! after the last as after the 60th. Needs root.

#[path = "churn/counts.rs"]
mod counts;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use protocol::{ErrorKind, Reply, Request};
use testbed::harness::{sealed_memfd, worker_id};
use testbed::test_helper::{TestHelper, attack_program, create, install, read, wait_for_line};

use counts::Counts;

/// How many workers. `USER_FACTORY_TEST_CHURN=2000` is the whole of it.
const WORKERS: usize = 120;
/// After so many, everything that is made once is made: each slot was used, and everything was left behind once.
const WARM: usize = 60;
/// That are made at the same time, in the second half.
const AT_ONCE: usize = 8;

/// The slot whose jobs may make namespaces, and leave mounts in them.
const NAMESPACES: &str = "s7";

/// One slot for each that exists at the same time. Two have more namespaces than the others.
fn slots() -> String {
    let slot = |number: usize| {
        let more = match number {
            6 => "network = \"none\"\n",
            7 => "allow_user_namespaces = true\n",
            _ => "",
        };
        format!("[slots.s{number}]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n{more}")
    };
    (0..AT_ONCE).map(slot).collect()
}

/// What hostile workers leave behind, in turn: an attempt, its arguments, and the last line before it only waits.
const LEFTOVERS: [(&str, &[&str], &str); 11] = [
    ("daemons", &[], "attempt over"),
    ("fork-bomb", &["grow", "60"], "ready"),
    ("deep", &["100"], "ready"),
    ("system-v", &[], "ready"),
    ("posix-ipc", &["churn"], "ready"),
    ("nodes", &[], "ready"),
    ("modes", &[], "ready"),
    ("keys", &[], "attempt over"),
    ("hard-to-kill", &[], "ready"),
    ("many", &["500"], "ready"),
    ("listen", &[], "ready"),
];

/// One worker's life. As the supervisor does it, each step has a connection of its own.
fn live(test: &TestHelper, slot: usize, number: usize) {
    let worker = worker_id();
    let slot = format!("s{slot}");
    let reply = create(&test.client(), worker, &slot);
    assert!(matches!(reply, Reply::UserCreated { .. }), "{reply:?}");
    let hostile = number.is_multiple_of(3).then(|| match slot.as_str() {
        NAMESPACES => ("user-namespace", &["allowed"][..], "ready"),
        _ => LEFTOVERS[number / 3 % LEFTOVERS.len()],
    });
    let (program, line) = match hostile {
        Some((name, args, line)) => (attack_program(name, args), line),
        None => (
            sealed_memfd(
                b"#!/bin/sh\necho x > /work/x; echo y > \"$HOME/y\"; (exec sleep 1000) & echo ready\n",
            ),
            "ready",
        ),
    };
    let (reply, console) = loop {
        match install(&test.client(), worker, program.try_clone().expect("a descriptor")) {
            // A machine that bombs keep busy may take its time.
            (Reply::Error(error), _) if error.kind == ErrorKind::Busy => {}
            other => break other,
        }
    };
    assert_eq!(reply, Reply::AgentStarted);
    let console = console.expect("a console comes with the reply");
    wait_for_line(&console, line);
    let console = read(&console);
    assert!(!console.contains("BROKEN"), "{hostile:?}:\n{console}");
    let reply = test.client().ask(&Request::Delete { worker }).0;
    assert_eq!(reply, Reply::Deleted, "{hostile:?}");
}

/// These workers, so many at the same time.
fn churn(test: &TestHelper, numbers: std::ops::Range<usize>, at_once: usize) {
    let next = AtomicUsize::new(numbers.start);
    std::thread::scope(|scope| {
        for slot in 0..at_once {
            let (next, end) = (&next, numbers.end);
            scope.spawn(move || {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= end {
                        return;
                    }
                    // One after the other, they are in every slot.
                    let slot = if at_once == 1 { number % AT_ONCE } else { slot };
                    live(test, slot, number);
                }
            });
        }
    });
}

#[test]
fn what_the_helper_and_the_kernel_keep_does_not_grow_with_the_workers() {
    let workers = std::env::var("USER_FACTORY_TEST_CHURN").ok();
    let workers = workers.map_or(WORKERS, |number| number.parse().expect("a number"));
    assert!(workers >= WARM + 2 * AT_ONCE, "so few show nothing");
    let test = TestHelper::with(&slots());
    let begin = Instant::now();
    churn(&test, 0..WARM / 2, 1);
    churn(&test, WARM / 2..WARM, AT_ONCE);
    let first = Counts::take(&test);
    println!("after {WARM}: {first}");
    let half = WARM + (workers - WARM) / 2;
    for (numbers, at_once) in [(WARM..half, 1), (half..workers, AT_ONCE)] {
        let more = numbers.end - WARM;
        churn(&test, numbers, at_once);
        let now = first.wait_until_flat(&test, more);
        println!(
            "after {} ({at_once} at once, {:.0?}): {now}",
            WARM + more,
            begin.elapsed()
        );
    }
    test.finish(&[]);
}
