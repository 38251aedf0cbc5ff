//! Rows 84 and 85: file systems and devices of the host that come and go while jobs run.

use std::process::Command;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::*;

/// A job that says what `COMMAND` prints, each time that this changes, until it is let go.
const WATCHING: &str = "last=; while ! [ -e RELEASE ]; do now=$(COMMAND); \
    [ \"$now\" = \"$last\" ] || echo \"sees: $now\"; last=$now; sleep 0.1; done; true";

fn watching(factory: &TestFactory, command: &str) -> Ulid {
    let release = factory.shared().join("release");
    factory.submit(
        &WATCHING
            .replace("RELEASE", &release.display().to_string())
            .replace("COMMAND", command),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn row_85_a_device_unplugged_and_plugged_in_again_comes_back_to_the_running_job() {
    let name = format!("user-factory-test-{}-usb", std::process::id());
    let node = PathBuf::from("/dev").join(&name);
    let plug = |minor| {
        let mode = Mode::from_bits_truncate(0o640);
        mknod(&node, SFlag::S_IFCHR, mode, makedev(1, minor)).unwrap();
    };
    plug(3);
    let slots = format!("[slots.a]\ntarget = \"TARGET\"\ndevices = [\"/dev/{name}\"]\n");
    let mut factory = TestFactory::new(&slots).await;
    let job = watching(
        &factory,
        &format!("stat -c %T /dev/{name} 2>/dev/null || echo none"),
    );
    factory.wait_for_line(job, "sees: 3").await;
    fs::remove_file(&node).unwrap();
    factory.wait_for_line(job, "sees: none").await;
    // Most come back as another node; here, under a helper that has been replaced meanwhile.
    factory.end_helper(Signal::SIGKILL);
    plug(5);
    factory.helper = factory.host.start_helper();
    factory.wait_for_line(job, "sees: 5").await;
    factory.release();
    factory.wait_completed(job).await;
    // Gone for the next job: that one cannot begin, and says why.
    fs::remove_file(&node).unwrap();
    let next = factory.submit("echo never");
    assert_eq!(factory.wait_for_end(next).await.state(), "failed");
    let held = factory.wait_held(next).await;
    let reason = held.hold.unwrap().reason;
    assert!(
        reason.contains(&format!("device /dev/{name} is not there: plug it in")),
        "{reason}"
    );
    once(
        &factory.supervisor.log,
        0,
        &["WARN the worker is broken", "plug it in"],
    );
    plug(3);
    factory.server.release(held.id).unwrap();
    let last = factory.submit(&format!("stat -c %T /dev/{name}"));
    factory.wait_completed(last).await;
    fs::remove_file(&node).unwrap();
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_84_a_file_system_mounted_while_a_job_runs_is_the_next_jobs_and_unmounting_harms_neither() {
    let factory = TestFactory::new(TWO).await;
    let place = factory.shared().join("disk");
    fs::create_dir(&place).unwrap();
    let run = |words: &[&str]| {
        let output = Command::new(words[0])
            .args(&words[1..])
            .arg(&place)
            .output()
            .unwrap();
        assert!(output.status.success(), "{words:?}: {output:?}");
    };
    let command = format!("cat {}/file 2>/dev/null || echo none", place.display());
    let first = watching(&factory, &command);
    factory.wait_for_line(first, "sees: none").await;
    run(&["mount", "-t", "tmpfs", "user-factory-test"]);
    fs::write(place.join("file"), "mounted\n").unwrap();
    let second = watching(&factory, &command);
    factory.wait_for_line(second, "sees: mounted").await;
    // The host lets go of it, though a job has it open.
    run(&["umount"]);
    factory.release();
    for job in [first, second] {
        let seen = factory.wait_for_end(job).await;
        assert_eq!(seen.state(), "completed", "{:#?}", seen.events);
        assert_eq!(
            lines(&seen, "stdout").len(),
            1,
            "what a job sees has changed under it"
        );
    }
    factory.block_again();
    let third = watching(&factory, &command);
    factory.wait_for_line(third, "sees: none").await;
    factory.release();
    factory.wait_completed(third).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_84_a_file_system_that_no_job_uses_any_more_is_free_after_it_is_unmounted() {
    let factory = TestFactory::new(ONE).await;
    let place = factory.shared().join("disk");
    fs::create_dir(&place).unwrap();
    let image = factory.shared().join("image");
    fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let run = |words: &[&std::ffi::OsStr]| {
        let output = Command::new(words[0]).args(&words[1..]).output().unwrap();
        assert!(output.status.success(), "{words:?}: {output:?}");
    };
    run(&["mkfs.ext4".as_ref(), "-q".as_ref(), image.as_ref()]);
    run(&[
        "mount".as_ref(),
        "-o".as_ref(),
        "loop".as_ref(),
        image.as_ref(),
        place.as_ref(),
    ]);
    let job = factory.submit("echo sees it");
    factory.wait_completed(job).await;
    run(&["umount".as_ref(), place.as_ref()]);
    // The kernel lets go of the loop device with the last mount of it, in whichever namespace that is.
    let used = || {
        let output = Command::new("losetup").arg("-j").arg(&image).output().unwrap();
        !output.stdout.is_empty()
    };
    until_is("that the file system is mounted nowhere", || !used());
    factory.finish().await;
}
