//! `slots.NAME.nice`: a job's processes have the slot's nice value, and cannot have a lower one.

use super::*;

const TARGET: &str = "target = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"";

/// Its own value, a higher one, and the answer to a lower one.
const ASK: &str = "nice; nice -n 2 nice; python3 -c 'import os
try:
    os.nice(-1); print(\"lowered\")
except OSError as e: print(e.strerror)'; exit 1";

#[test]
fn a_jobs_processes_have_the_slots_nice_value_and_cannot_lower_it() {
    let test = TestHelper::with(&format!("[slots.a]\n{TARGET}\n[slots.b]\n{TARGET}\nnice = 7\n"));
    let client = test.client();
    let workers: Vec<WorkerId> = ["a", "b"].map(|slot| create_worker(&client, slot)).into();
    let answers: Vec<String> = workers
        .iter()
        .map(|worker| run(&client, *worker, ASK).1)
        .collect();
    // The helper's own value is this program's, and jobs have no lower one.
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let own: u32 = stat.split(' ').nth(18).unwrap().parse().unwrap();
    let expected = [0, 7].map(|nice| {
        let nice = nice.max(own);
        format!("{nice}\n{}\nOperation not permitted\n", (nice + 2).min(19))
    });
    assert_eq!(answers, expected);
    test.finish(&workers);
}
