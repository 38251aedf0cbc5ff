//! Row 27, in the whole factory: the disk is full under the workers, at each of their steps.

use testbed::small_disk::{SmallDisk, size_of_agents};

use super::*;

/// The workers' directory on a small file system of its own.
fn small(host: &TestHost) -> Option<SmallDisk> {
    let place = host.root.join(protocol::config::STATE_DIR).join("workers");
    fs::create_dir(&place).unwrap();
    Some(SmallDisk::in_memory_at(place))
}

fn room() -> String {
    format!("size={},nr_inodes=10000", size_of_agents(3))
}

/// The job cannot be started, and says why; once its worker is released, nothing of it is left, full or not.
async fn fails_for_lack_of_room(factory: &TestFactory, job: Ulid) {
    let seen = factory.supervisor.log.len();
    assert_eq!(factory.wait_for_end(job).await.state(), "failed");
    let held = factory.wait_held(job).await;
    let reason = held.hold.unwrap().reason;
    assert!(reason.contains("No space left on device"), "{reason}");
    factory.wait_polls(2).await;
    once(
        &factory.supervisor.log,
        seen.saturating_sub(20),
        &["the worker is broken", &held.id.to_string()],
    );
    factory.server.release(held.id).unwrap();
    factory
        .wait_for_state(|state| state.workers[&held.id].deleted.then_some(()))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_27_a_full_disk_fails_what_starts_and_neither_what_runs_nor_the_slot() {
    let factory = TestFactory::on(TWO, small).await;
    let disk = factory.disk.as_ref().unwrap();
    disk.limit(&room());
    let job = factory.start_blocking_job().await;
    // At the making of the user: not even its directory finds room.
    disk.fill();
    fails_for_lack_of_room(&factory, factory.submit("echo never")).await;
    // At the copying of the agent: there is room for directories and records, and for no program.
    disk.limit("nr_inodes=10000");
    fails_for_lack_of_room(&factory, factory.submit("echo never")).await;
    // The other slot's job does not notice, and room brings back all of it.
    disk.limit(&room());
    let next = factory.submit("echo next");
    factory.wait_completed(next).await;
    factory.release();
    factory.wait_completed(job).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_27_a_job_that_fills_the_disk_fails_by_itself_and_is_deleted_from_the_full_disk() {
    let factory = TestFactory::on(TWO, small).await;
    factory.disk.as_ref().unwrap().limit(&room());
    let job = factory.start_blocking_job().await;
    let hog = factory
        .submit("cat /dev/zero > /work/all 2>/dev/null; : > /work/none; echo x > /work/none && echo wrote");
    let done = factory.wait_for_end(hog).await;
    assert_eq!(done.state(), "failed", "{:#?}", done.events);
    factory
        .wait_for_state(|state| state.workers[&done.worker.unwrap()].deleted.then_some(()))
        .await;
    let next = factory.submit("echo next");
    factory.wait_completed(next).await;
    factory.release();
    factory.wait_completed(job).await;
    factory.finish().await;
}
