//! Jobs that can reach nobody but the server, and jobs that may not run for ever.

use std::net::TcpListener;

use super::*;

const ALONE: &str = "[slots.a]\ntarget = \"TARGET\"\nnetwork = \"none\"\n";

/// Says whether the port of the host's loopback can be reached, and which interfaces there are.
fn look_around(port: u16) -> String {
    format!(
        "(exec 3<>/dev/tcp/127.0.0.1/{port}) 2>/dev/null && echo reached || echo refused\n\
         tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' ' | sort"
    )
}

/// That a job with the host's network reaches what this one does not is seen in `attacks::network_list`, row 116.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_without_a_network_reaches_the_server_and_nobody_else() {
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = other.local_addr().unwrap().port();
    let factory = TestFactory::new(ALONE).await;
    let server: u16 = factory.server.url().rsplit(':').next().unwrap().parse().unwrap();
    let mut spec = JobSpec::script(
        "linux",
        format!(
            "{}\n(exec 3<>/dev/tcp/127.0.0.1/{server}) && echo server\n\
             cp /input/in.txt /work/out.txt; head -c 3000000 /dev/zero | tr '\\0' x >> /work/out.txt",
            look_around(port)
        )
        .as_str(),
    );
    spec.inputs = vec![("in.txt".into(), "words\n".into())];
    spec.output_rules = vec!["/work/*.txt".into()];
    let job = factory.server.submit_job(spec).unwrap();
    let done = factory.wait_for_end(job).await;
    assert_eq!(done.state(), "completed", "{:#?}", done.events);
    assert_eq!(lines(&done, "stdout"), ["refused", "lo", "server"]);
    let output = factory.server.output(job, "/work/out.txt").unwrap();
    assert_eq!(output.len(), 3_000_006);
    other.set_nonblocking(true).unwrap();
    assert!(other.accept().is_err(), "the job reached the host's loopback");
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_without_a_network_outlives_the_supervisors_restarts() {
    let mut factory = TestFactory::new(ALONE).await;
    let job = factory.submit("for n in 1 2 3 4 5 6; do echo line $n; sleep 1; done; true");
    for (line, signal) in [("line 1", Signal::SIGTERM), ("line 3", Signal::SIGKILL)] {
        factory.wait_for_line(job, line).await;
        factory.end_supervisor(signal);
        if signal == Signal::SIGTERM {
            // Whom a shutdown of the host would end.
            factory.wait_for_log(&["this worker goes on", &job.to_string()]);
        }
        factory.supervisor = factory.host.start_supervisor();
    }
    let done = factory.wait_for_end(job).await;
    assert_eq!(done.state(), "completed", "{:#?}", done.events);
    let expected: Vec<String> = (1..=6).map(|n| format!("line {n}")).collect();
    // The agent repeats what was cut off before it was answered, as it does when the server goes away.
    let mut came = lines(&done, "stdout");
    came.dedup();
    assert_eq!(came, expected);
    assert_eq!(factory.server.workers().len(), 1);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_ended_at_its_slots_time_limit_and_its_log_says_why() {
    let factory = TestFactory::new(&format!("{ONE}limits.run_time_seconds = 10\n")).await;
    let job = factory.submit("echo running; (setsid sleep 1000 &); sleep 1000");
    factory.wait_for_line(job, "running").await;
    let done = factory.wait_for_end(job).await;
    assert_eq!(done.state(), "failed", "{:#?}", done.events);
    let console = lines(&done, "console").join("\n");
    assert!(console.contains("as long as the slot lets it"), "{console}");
    let held = factory.server.worker(done.worker.unwrap());
    assert_eq!(
        held.hold.map(|hold| hold.reason).as_deref(),
        Some("worker failed: the agent was ended at the slot's limits.run_time_seconds")
    );
    assert!(
        processes_of(&factory.host.uids).is_empty(),
        "something has outlived its time"
    );
    factory.server.release(held.id).unwrap();
    factory.finish().await;
}
