//! Group B: the tree is changed while it is deleted, with the rights of the job's user.
//!
//! No process of the job runs then, so the test makes the changes. It traces the deletion, stops it before each of its
//! system calls, and exchanges directories for links to directories that everybody may write. What else would keep the
//! deletion from these is out of the way: they lie beside the worker's directory, on the mount that the deletion works
//! on, which is writable, and no mode above them is closed.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::fcntl::{OFlag, RenameFlags, open, renameat2};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Pid, Uid, setfsgid, setfsuid};
use protocol::config::STATE_DIR;
use protocol::{ErrorKind, Reply, Request};
use testbed::harness::TestHost;
use testbed::sample::Sample;
use testbed::small_disk::SmallDisk;
use testbed::test_helper::{SLOTS, TestHelper, create_worker, run};
use testbed::tracer::helper::{WatchPeriod, watch_with};
use testbed::tracer::{Event, TracedCall};

use crate::attacks::canaries::Canaries;

/// When the links are where the directories were, by the number of the call and whether it is about to be made.
#[derive(Clone, Copy, Debug)]
enum When {
    Never,
    /// During this call alone.
    During(usize),
    /// From this call on.
    From(usize),
    /// During every call whose number leaves this rest when divided by that number.
    Every {
        divisor: usize,
        rest: usize,
    },
}

impl When {
    fn is_swapped(self, call: usize, begins: bool) -> bool {
        match self {
            When::Never => false,
            When::During(at) => begins && call == at,
            When::From(at) => call >= at,
            When::Every { divisor, rest } => begins && call % divisor == rest,
        }
    }
}

/// A directory and the link that takes its place, both in the directory that is open here.
#[derive(Debug)]
struct Pair(OwnedFd, &'static str, &'static str);

#[derive(Debug)]
struct LinkSwapper {
    pairs: Vec<Pair>,
    uid: u32,
    swapped: bool,
}

impl LinkSwapper {
    /// As the user: these ids are those of the calling thread alone, and take root's privileges over files with them.
    fn set(&mut self, swapped: bool) {
        if self.swapped == swapped {
            return;
        }
        self.swapped = swapped;
        setfsgid(Gid::from_raw(self.uid));
        setfsuid(Uid::from_raw(self.uid));
        for Pair(dir, one, other) in &self.pairs {
            // One of them may be deleted already.
            let _ = renameat2(dir, *one, dir, *other, RenameFlags::RENAME_EXCHANGE);
        }
        setfsuid(Uid::from_raw(0));
        setfsgid(Gid::from_raw(0));
    }
}

/// Which of the traced processes are the job's user by now.
#[derive(Debug, Default)]
struct Users(Vec<Pid>);

impl Users {
    fn has(&mut self, pid: Pid, event: &Event) -> bool {
        match event {
            Event::Forked { parent, .. } if self.0.contains(parent) => self.0.push(pid),
            Event::Leave(
                TracedCall {
                    number: libc::SYS_setresuid,
                    ..
                },
                0,
            ) => self.0.push(pid),
            _ => {}
        }
        self.0.contains(&pid)
    }
}

/// A tree with the names of the canaries, and beside each directory a link to one of them.
fn grow(work: &Path, files: usize, depth: usize) -> Vec<Pair> {
    let mut pairs = Vec::new();
    // From a directory so many levels below `work`.
    let mut pair = |dir: &Path, level: usize, name: &'static str, link: &'static str, target: &str| {
        let up = "../".repeat(level + 3);
        symlink(format!("{up}{CANARIES}/{target}"), dir.join(link)).unwrap();
        let canary = fs::metadata(dir.join(link)).expect("the link leads somewhere");
        assert!(canary.is_dir() && canary.mode() & 0o777 == 0o777);
        let dir = open(dir, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).unwrap();
        pairs.push(Pair(dir, name, link));
    };
    let fill = |dir: &Path| {
        fs::create_dir_all(dir.join("below")).unwrap();
        for file in ["file", "0", "inner", "below/file"] {
            fs::write(dir.join(file), "x").unwrap();
        }
    };
    for (name, link) in [("tree", "link"), ("closed", "closed-link")] {
        fill(&work.join(name));
        pair(&work.join(name), 1, "below", "link", "open/below");
        pair(work, 0, name, link, "open");
    }
    for number in 0..files {
        fs::write(work.join(format!("tree/{number}")), "x").unwrap();
    }
    let mut dir = work.join("deep");
    fs::create_dir(&dir).unwrap();
    for level in 1..=depth {
        fill(&dir.join("d"));
        pair(&dir, level, "d", "link", "open");
        dir.push("d");
    }
    pairs
}

fn give(path: &Path, uid: u32) {
    if path.symlink_metadata().unwrap().is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            give(&entry.unwrap().path(), uid);
        }
    }
    lchown(path, Some(uid), Some(uid)).unwrap();
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Beside the workers' directories.
const CANARIES: &str = "canaries";

struct SwapperTest {
    test: TestHelper,
    canaries: Canaries,
}

impl SwapperTest {
    fn new() -> SwapperTest {
        SwapperTest::on(|_| None)
    }

    /// With the state directory on this disk.
    fn on(disk: fn(&TestHost) -> Option<SmallDisk>) -> SwapperTest {
        let host = TestHost::new();
        host.configure("http://127.0.0.1:9", 0, SLOTS);
        fs::create_dir_all(host.root.join(STATE_DIR)).unwrap();
        let disk = disk(&host);
        let workers = host.root.join(STATE_DIR).join("workers");
        fs::create_dir_all(&workers).unwrap();
        let canaries = Canaries::at(&workers.join(CANARIES));
        let test = TestHelper::on(host, disk);
        set_mode(&workers, 0o711);
        SwapperTest { test, canaries }
    }
}

/// Delete a worker with such a tree while it is swapped. Returns how many calls its user's processes made, and why it had to be
/// repeated, if it had.
fn delete(
    SwapperTest { test, canaries }: &SwapperTest,
    (files, depth): (usize, usize),
    when: When,
) -> (usize, Option<String>) {
    let client = test.client();
    let worker = create_worker(&client, "a");
    run(&client, worker, "true");
    let work = test.host.worker_dir(worker).join("fs/work");
    let uid = fs::metadata(&work).unwrap().uid();
    set_mode(&test.host.worker_dir(worker), 0o711);
    let pairs = grow(&work, files, depth);
    give(&work, uid);
    set_mode(&work.join("closed"), 0o000);
    let before = canaries.state();
    let calls = Arc::new(AtomicUsize::new(0));
    let seen = calls.clone();
    let mut users = Users::default();
    let mut swapper = LinkSwapper {
        pairs,
        uid,
        swapped: false,
    };
    let watcher = watch_with(
        test.helper.pid(),
        WatchPeriod::OneConnection,
        None,
        move |pid, event| {
            if !users.has(pid, event) {
                return;
            }
            match event {
                Event::Enter(_) => swapper.set(when.is_swapped(seen.fetch_add(1, Ordering::Relaxed), true)),
                Event::Leave(..) => {
                    // The call by which it became the user was not counted.
                    let last = seen.load(Ordering::Relaxed).checked_sub(1);
                    swapper.set(last.is_some_and(|call| when.is_swapped(call, false)));
                }
                _ => {}
            }
        },
    );
    let traced = test.client();
    let reply = traced.ask(&Request::Delete { worker }).0;
    drop(traced);
    watcher.join().expect("the tracer saw the end");
    assert_eq!(canaries.state(), before, "{when:?}: {reply:?}");
    let failure = match reply {
        Reply::Deleted => None,
        // A directory has become a link: it says so, and is repeated.
        Reply::Error(error) if error.kind == ErrorKind::Failed => {
            test.delete(&[worker]);
            Some(error.to_string())
        }
        other => panic!("{when:?}: {other:?}"),
    };
    assert_eq!(canaries.state(), before, "{when:?}, repeated");
    (calls.load(Ordering::Relaxed), failure)
}

#[test]
fn row_17_no_exchange_of_a_directory_for_a_link_before_any_call_redirects_the_deletion() {
    let setup = SwapperTest::new();
    let tree = (0, 1);
    let (calls, _) = delete(&setup, tree, When::Never);
    assert!(calls > 50, "the deletion was not traced: {calls} calls");
    let sample = Sample::of(10);
    for call in (0..calls).filter(|call| sample.has(*call)) {
        delete(&setup, tree, When::During(call));
        delete(&setup, tree, When::From(call));
    }
    setup.test.finish(&[]);
}

/// Exchange at every call whose number is divided by one of these.
fn swap_often(tree: (usize, usize), divisors: &[usize]) {
    let setup = SwapperTest::new();
    for divisor in divisors {
        let (divisor, sample) = (*divisor, Sample::of(*divisor));
        for rest in (0..divisor).filter(|rest| sample.has(*rest)) {
            delete(&setup, tree, When::Every { divisor, rest });
        }
    }
    setup.test.finish(&[]);
}

#[test]
fn row_17_no_exchange_at_every_other_call_redirects_two_processes() {
    swap_often((1200, 1), &[1, 2, 3, 5]);
}

#[test]
fn row_17_no_exchange_at_every_other_call_redirects_a_deep_deletion() {
    // Deeper than the deletion holds directories open. Each of them is exchanged each time, which btrfs takes long for.
    swap_often((0, 70), &[11, 13]);
}

/// Does the file system of this directory show no name that is newer than the opening of its directory? btrfs does since
/// Linux 6.6.
fn hides_new_names(place: &Path) -> bool {
    let dir = place.join("renamed");
    fs::create_dir_all(dir.join("old")).unwrap();
    let listing = fs::read_dir(&dir).unwrap();
    fs::rename(dir.join("old"), dir.join("new")).unwrap();
    let hides = listing.count() == 0;
    fs::remove_dir_all(dir).unwrap();
    hides
}

/// The deletion opens a directory and lists it within seven calls: what is exchanged at every seventh, such a file system
/// never shows.
#[test]
fn row_17_a_name_that_no_listing_shows_does_not_keep_the_deletion_for_ever() {
    let setup = SwapperTest::on(|host| Some(SmallDisk::btrfs(host)));
    let delete = |rest| delete(&setup, (0, 1), When::Every { divisor: 7, rest }).1;
    let failures: Vec<Option<String>> = (0..7).map(delete).collect();
    let was_hidden = |failure: &String| failure.contains("and it is not empty");
    assert_eq!(
        failures.iter().flatten().any(was_hidden),
        hides_new_names(&setup.test.host.root.join(STATE_DIR)),
        "{failures:?}"
    );
    setup.test.finish(&[]);
}
