//! Group H: what a job does to the process that makes the root file system of the next one, and what of the host's in it can be
//! written to although it is mounted read-only.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use protocol::Reply;
use testbed::harness::{assert_warned, create_shared_dir, has_file_rules, sealed_memfd};
use testbed::small_disk::SmallDisk;
use testbed::test_helper::{
    SLOTS, TestHelper, attack, create_worker, install, run, start_attack, wait_for_line,
};
use testbed::tracer::helper::{TracedKind, WatchPeriod, watch};

/// Slots, and this file hidden, so that everything else in its directory is shown by itself.
fn hiding(file: &Path) -> String {
    format!("hide = [{file:?}]\n{SLOTS}")
}

#[test]
fn row_125_a_link_that_a_user_puts_in_the_place_of_a_directory_leads_no_job_elsewhere() {
    const DIRECTORIES: usize = 1_000;
    const TRIES: usize = 50;
    let place = create_shared_dir();
    let [shown, closed, link] = ["shown", "closed", "link"].map(|name| place.path().join(name));
    for number in 0..DIRECTORIES {
        fs::create_dir_all(shown.join(number.to_string())).unwrap();
        let secret = closed.join(number.to_string());
        fs::create_dir_all(&secret).unwrap();
        fs::write(secret.join("file"), "secret\n").unwrap();
    }
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
    symlink(&closed, &link).unwrap();
    fs::write(shown.join("hidden"), "").unwrap();
    let test = TestHelper::with(&hiding(&shown.join("hidden")));
    let client = test.client();
    let exchange = || renameat2(AT_FDCWD, &shown, AT_FDCWD, &link, RenameFlags::RENAME_EXCHANGE).unwrap();
    for number in 0..TRIES {
        let worker = create_worker(&client, "c");
        // The root file system is made again for this job; and when its entries are read, another directory is there.
        fs::write(shown.join("new"), number.to_string()).unwrap();
        fs::remove_file(shown.join("new")).unwrap();
        let listed = Inotify::init(InitFlags::empty()).unwrap();
        listed.add_watch(&shown, AddWatchFlags::IN_ACCESS).unwrap();
        let script = format!(
            "exec 2>&-; ls -f {0} | wc -l; cat {0}/*/file; exit 1",
            shown.display()
        );
        let (_, console) = thread::scope(|scope| {
            scope.spawn(|| {
                listed.read_events().unwrap();
                exchange();
            });
            run(&client, worker, &script)
        });
        exchange();
        assert!(!console.contains("secret"), "{console}");
        test.delete(&[worker]);
        let seen: usize = console.trim().parse().unwrap_or_else(|_| panic!("{console}"));
        // A directory, and not all of it: it was exchanged in the middle.
        if (2..DIRECTORIES).contains(&seen) {
            return test.finish(&[]);
        }
    }
    panic!("it was never exchanged in time");
}

#[test]
fn row_126_a_users_directory_with_many_entries_keeps_no_job_from_starting() {
    // Together they have more than are shown one by one, 8,192; what other tests hide in theirs does not matter.
    let (users, own) = (create_shared_dir(), create_shared_dir());
    for (directory, entries) in [(&users, 7_900), (&own, 600)] {
        for number in 0..entries {
            File::create(directory.path().join(number.to_string())).unwrap();
        }
    }
    File::create(users.path().join("hidden")).unwrap();
    let made = own.path().join("of-the-job").display().to_string();
    let slots = hiding(&users.path().join("hidden")).replace("/srv/of-the-job", &made);
    let test = TestHelper::with(&slots);
    let client = test.client();
    let worker = create_worker(&client, "a");
    let script = format!(
        "ls {} | wc -l; ls {} | wc -l; [ -w {made} ] && echo writable; exit 1",
        users.path().display(),
        own.path().display()
    );
    let (_, console) = run(&client, worker, &script);
    assert_eq!(console, "7900\n601\nwritable\n");
    test.finish(&[worker]);
}

#[test]
fn row_127_a_users_socket_at_the_longest_path_keeps_no_job_from_starting() {
    let place = create_shared_dir();
    let beside = place.path().join("beside");
    fs::write(&beside, "").unwrap();
    // Below the new root, before it is the root, no path is long enough for it.
    let mut names = vec!["d".repeat(50); 78];
    let length = place.path().as_os_str().len() + names.len() * 51;
    names.push("d".repeat(4_072 - length - 1));
    fs::create_dir_all(place.path().join(names.join("/"))).unwrap();
    // The target of a link has at most 1,024 bytes on XFS.
    let mut link = place.path().to_owned();
    for (number, part) in names.chunks(15).enumerate() {
        let next = place.path().join(number.to_string());
        symlink(link.join(part.join("/")), &next).unwrap();
        link = next;
    }
    let _socket = UnixListener::bind(link.join("socket")).unwrap();
    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "a");
    let script = format!(
        "[ -e {0} ] && cd {1} && ls; exit 1",
        beside.display(),
        link.display()
    );
    let (_, console) = run(&client, worker, &script);
    assert!(!console.contains("socket"), "{console}");
    test.finish(&[worker]);
}

/// The most memory that a process has had, in KiB.
fn peak(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let number = line.expect("the kernel counts it").trim().trim_end_matches(" kB");
    number.parse().expect("a number")
}

#[test]
fn row_92_sockets_of_a_job_are_never_resolved_and_the_monitor_stats_no_mount() {
    // Not more: to the helpers of other tests these are sockets of the host's, of which they look at 32,768.
    const SOCKETS: usize = 6_000;
    let place = create_shared_dir();
    let test = TestHelper::new();
    let client = test.client();
    let hostile = create_worker(&client, "c");
    let console = start_attack(&client, hostile, "bind-sockets", &[&SOCKETS.to_string()]);
    wait_for_line(&console, "bound");
    let neighbour = create_worker(&client, "b");
    drop(client);
    let before = peak(test.helper.pid());

    fs::create_dir(place.path().join("disk")).unwrap();
    let disk = SmallDisk::in_memory_at(place.path().join("disk"));
    fs::write(place.path().join("disk/file"), "mounted\n").unwrap();
    let watcher = watch(test.helper.pid(), WatchPeriod::OneConnection, None);
    let script = format!("#!/bin/bash\ncat {}/disk/file\n", place.path().display());
    let client = test.client();
    let (reply, console) = install(&client, neighbour, sealed_memfd(script.as_bytes()));
    assert_eq!(reply, Reply::AgentStarted);
    drop(client);
    let seen = watcher.join().expect("the tracer saw the end");
    // It was built again for this launch.
    wait_for_line(&console.expect("a console comes with the reply"), "mounted");

    let calls = |kind| seen.calls.get(&kind).map_or(&[][..], Vec::as_slice);
    let (monitor, builder) = (calls(TracedKind::Monitor), calls(TracedKind::Builder));
    println!(
        "the monitor: {} calls, its builder: {}",
        monitor.len(),
        builder.len()
    );
    let by_path = [
        libc::SYS_openat,
        libc::SYS_readlinkat,
        libc::SYS_open_tree,
        libc::SYS_move_mount,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_getdents64,
        libc::SYS_inotify_add_watch,
    ];
    let path_calls: Vec<_> = monitor.iter().filter(|call| by_path.contains(call)).collect();
    assert!(path_calls.is_empty(), "the monitor called {path_calls:?}");
    assert!(monitor.len() < 150, "the monitor made {} calls", monitor.len());
    assert!(builder.contains(&libc::SYS_open_tree), "nothing was built");
    // A handful for each packet of the kernel's list, and for each entry that is shown by itself; resolving a name takes as
    // many as it has parts.
    assert!(
        builder.len() < SOCKETS,
        "the builder made {} calls",
        builder.len()
    );
    let grown = peak(test.helper.pid()) - before;
    assert!(grown < 1024, "the monitor grew by {grown} KiB");
    drop(disk);
    test.finish(&[hostile, neighbour]);
}

/// A FIFO with this mode, and its reader.
fn fifo(path: &Path, mode: u32) -> File {
    mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    options.open(path).unwrap()
}

#[test]
fn row_94_fifos_of_the_host_are_not_written_to_wherever_they_are() {
    let place = create_shared_dir();
    let at = |name: &str| place.path().join(name);
    for name in ["plain", "disk", "shown"] {
        fs::create_dir(at(name)).unwrap();
    }
    let disk = SmallDisk::in_memory_at(at("disk"));
    let shown = at("shown").display().to_string();
    let test = TestHelper::with(&format!(
        "[slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\nread_only = {{ \"/opt/shown\" = \"{shown}\" }}\n"
    ));
    let client = test.client();
    let worker = create_worker(&client, "a");
    // Without Landlock's rules for files, nothing but a FIFO's mode keeps a job from writing to it.
    let mode = if has_file_rules() {
        0o666
    } else {
        assert_warned(&test.helper, "jobs can write to FIFOs of the host");
        0o644
    };
    // One of them is made when the root file system is there already.
    let readers = ["plain/fifo", "disk/fifo", "shown/fifo"].map(|name| fifo(&at(name), mode));
    let args = [
        at("plain/fifo").display().to_string(),
        at("disk/fifo").display().to_string(),
        at("shown/fifo").display().to_string(),
        "/opt/shown/fifo".to_owned(),
    ];
    attack(&client, worker, "fifos", &args.each_ref().map(String::as_str));
    for mut reader in readers {
        let mut bytes = Vec::new();
        let error = reader.read_to_end(&mut bytes).expect_err("nobody has closed it");
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
        assert_eq!(String::from_utf8_lossy(&bytes), "");
    }
    drop(client);
    test.finish(&[worker]);
    drop(disk);
}
