//! Rows 84 and 85: file systems and devices of the host that come and go while jobs run.

use std::process::Command;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::*;

/// A job that says what `LOOK` prints, each time that this changes, until it is let go.
const WATCHING: &str = "last=; while ! [ -e DOOR ]; do now=$(LOOK); \
    [ \"$now\" = \"$last\" ] || echo \"sees: $now\"; last=$now; read -t 0.1 < <(sleep 1); done; true";

fn watching(house: &House, look: &str) -> Ulid {
    let door = house.shared().join("open");
    house.submit(
        &WATCHING
            .replace("DOOR", &door.display().to_string())
            .replace("LOOK", look),
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
    let mut house = House::new(&slots).await;
    let job = watching(
        &house,
        &format!("stat -c %T /dev/{name} 2>/dev/null || echo none"),
    );
    house.printed(job, "sees: 3").await;
    fs::remove_file(&node).unwrap();
    house.printed(job, "sees: none").await;
    // Most come back as another node; here, under a helper that has been replaced meanwhile.
    house.end_helper(Signal::SIGKILL);
    plug(5);
    house.helper = house.host.helper();
    house.printed(job, "sees: 5").await;
    house.let_end();
    house.completed(job).await;
    // Gone for the next job: that one cannot begin, and says why.
    fs::remove_file(&node).unwrap();
    let next = house.submit("echo never");
    assert_eq!(house.ended(next).await.state(), "failed");
    let held = house.held(next).await;
    let reason = held.hold.unwrap().reason;
    assert!(
        reason.contains(&format!("device /dev/{name} is not there: plug it in")),
        "{reason}"
    );
    once(
        &house.supervisor.log,
        0,
        &["WARN the worker is broken", "plug it in"],
    );
    plug(3);
    house.server.release(held.id).unwrap();
    let last = house.submit(&format!("stat -c %T /dev/{name}"));
    house.completed(last).await;
    fs::remove_file(&node).unwrap();
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_84_a_file_system_mounted_while_a_job_runs_is_the_next_jobs_and_unmounting_harms_neither() {
    let house = House::new(TWO).await;
    let place = house.shared().join("disk");
    fs::create_dir(&place).unwrap();
    let run = |words: &[&str]| {
        let output = Command::new(words[0])
            .args(&words[1..])
            .arg(&place)
            .output()
            .unwrap();
        assert!(output.status.success(), "{words:?}: {output:?}");
    };
    let look = format!("cat {}/file 2>/dev/null || echo none", place.display());
    let first = watching(&house, &look);
    house.printed(first, "sees: none").await;
    run(&["mount", "-t", "tmpfs", "user-factory-test"]);
    fs::write(place.join("file"), "mounted\n").unwrap();
    let second = watching(&house, &look);
    house.printed(second, "sees: mounted").await;
    // The host lets go of it, though a job has it open.
    run(&["umount"]);
    house.let_end();
    for job in [first, second] {
        let seen = house.ended(job).await;
        assert_eq!(seen.state(), "completed", "{:#?}", seen.events);
        assert_eq!(
            lines(&seen, "stdout").len(),
            1,
            "what a job sees has changed under it"
        );
    }
    house.shut();
    let third = watching(&house, &look);
    house.printed(third, "sees: none").await;
    house.let_end();
    house.completed(third).await;
    house.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_84_a_file_system_that_no_job_uses_any_more_is_free_after_it_is_unmounted() {
    let house = House::new(ONE).await;
    let place = house.shared().join("disk");
    fs::create_dir(&place).unwrap();
    let image = house.shared().join("image");
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
    let job = house.submit("echo sees it");
    house.completed(job).await;
    run(&["umount".as_ref(), place.as_ref()]);
    // The kernel lets go of the loop device with the last mount of it, in whichever namespace that is.
    let end = std::time::Instant::now() + testbed::harness::PATIENCE;
    let used = || {
        let output = Command::new("losetup").arg("-j").arg(&image).output().unwrap();
        !output.stdout.is_empty()
    };
    while used() {
        assert!(
            std::time::Instant::now() < end,
            "the file system is still mounted somewhere"
        );
        std::thread::yield_now();
    }
    house.finish().await;
}
