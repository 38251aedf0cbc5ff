//! A host that has too little free for another job (`factory.min_free`).

use testbed::harness::TestHost;
use testbed::small_disk::{SmallDisk, size_of_agents};
use testbed::test_factory::TWO;

use super::*;

fn slots(min_free: &str) -> String {
    format!("min_free = {min_free}\n{TWO}")
}

async fn short_of(factory: &TestFactory, what: &str) {
    see(factory, |status| {
        let why = status["shortage"].as_str()?;
        (why.contains(what) && status["not_taken"] == why).then_some(())
    })
    .await;
}

async fn enough(factory: &TestFactory) {
    see(factory, |status| {
        (status["shortage"].is_null() && status["not_taken"].is_null()).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_job_is_taken_while_the_disk_is_short_and_the_running_one_goes_on() {
    let min_free = "{ disk = \"100M\", inodes = 100 }";
    let room = |inodes| format!("size={},nr_inodes={inodes}", size_of_agents(2) + (150 << 20));
    // Nobody but root may look into this directory.
    let workers = format!("{}/workers", protocol::config::STATE_DIR);
    let small = |host: &TestHost| {
        let place = host.root.join(&workers);
        std::fs::create_dir_all(&place).unwrap();
        let disk = SmallDisk::in_memory_at(place);
        disk.limit(&room(10_000));
        Some(disk)
    };
    let factory = TestFactory::on(&slots(min_free), small).await;
    let job = factory.start_blocking_job().await;
    enough(&factory).await;
    let big = factory.host.root.join(&workers).join("image");
    std::fs::write(&big, vec![1; size_of_agents(1) as usize + (100 << 20)]).unwrap();
    short_of(&factory, "on the file system of").await;
    let result = run_command(&factory, &["status"]);
    assert!(
        result.status == 4
            && result.out.contains("not taken: too little is free: ")
            && result.out.contains("(factory.min_free.disk is 100M)"),
        "{}",
        result.out
    );
    assert_eq!(state_of(&json(&factory, &["status"]), "b"), "closed");
    for name in ["enough_free", "jobs_taken"] {
        assert_eq!(metric(&factory, name).as_deref(), Some("0"), "{name}");
    }
    let second = factory.submit("true");
    factory.wait_polls(3).await;
    assert_eq!(factory.server.job(second).state(), "queued");
    factory.release();
    factory.wait_completed(job).await;
    std::fs::remove_file(&big).unwrap();
    factory.wait_completed(second).await;
    factory.wait_for_log(&["no jobs are taken: too little is free"]);
    factory.wait_for_log(&["enough is free again for jobs"]);
    enough(&factory).await;
    // Inodes run out before bytes do.
    let disk = factory.disk.as_ref().expect("it has a disk of its own");
    disk.limit(&room(90));
    short_of(&factory, "inodes on the file system of").await;
    disk.limit(&room(1000));
    enough(&factory).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_that_is_short_is_said_and_a_reload_that_asks_for_less_takes_jobs_at_once() {
    let factory = TestFactory::new(&slots("{ memory = \"1000T\" }")).await;
    short_of(&factory, "of memory (factory.min_free.memory is 1000T)").await;
    let job = factory.submit("true");
    factory.wait_polls(2).await;
    assert_eq!(factory.server.job(job).state(), "queued");
    factory.configure(&slots("{ memory = \"1M\" }"));
    done(&factory, &["reload"]);
    factory.wait_completed(job).await;
    factory.finish().await;
}
