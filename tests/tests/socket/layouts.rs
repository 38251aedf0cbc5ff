//! Hosts that are laid out in other ways than the one that the tests run on, and that change while jobs run. Each is made
//! of this one, in a mount namespace of the helper's own.

use std::fs::OpenOptions;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use nix::unistd::mkfifo;

use super::*;

/// A copy of this host's `/etc`, to be changed.
fn copy_etc(place: &Path) -> String {
    let copy = place.join("etc").display().to_string();
    let status = Command::new("cp").args(["-a", "/etc", &copy]).status().unwrap();
    assert!(status.success());
    copy
}

/// Put a new file in the place of another, as editors and `useradd(8)` do.
fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    fs::write(&new, text).unwrap();
    fs::set_permissions(&new, fs::Permissions::from_mode(0o644)).unwrap();
    fs::rename(new, path).unwrap();
}

fn write(path: impl AsRef<Path>, text: &str) {
    fs::create_dir_all(path.as_ref().parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

const SLOT: &str = "target = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n";

/// The host replaces all that is hidden from a job, or is its own. `more` is done to its mounts.
fn replaced_during_a_job(more: &str) -> String {
    let place = create_shared_dir();
    let at = |name: &str| place.path().join(name);
    let etc = copy_etc(place.path());
    let in_etc = |name: &str| Path::new(&etc).join(name);
    write(at("a-file"), "SECRET");
    write(at("a-directory/file"), "SECRET");
    write(at("deep/in/it/file"), "SECRET");
    write(at("live/file"), "old");
    fs::create_dir(at("exists")).unwrap();
    // Beside what is hidden, what is no file or directory is seen as well.
    mkfifo(&at("a-fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    write(in_etc("app/key"), "SECRET");
    write(in_etc("app/seen"), "old");
    write(in_etc("closed/file"), "SECRET");
    let listen = |path: &Path| {
        let listener = UnixListener::bind(path).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o666)).unwrap();
        listener
    };
    let service = listen(&at("service"));
    let hide = ["a-file", "a-directory", "deep/in/it"].map(|name| at(name).display().to_string());
    let hide = [&hide[..], &["/etc/app/key".into(), "/etc/closed".into()]].concat();
    let host = TestHost::new();
    let slots = format!(
        "hide = {hide:?}\n[slots.a]\nnetwork = \"none\"\nwritable = [\"{0}/gets/this\", \"{0}/exists\", \"/var/is/here\"]\n{SLOT}",
        place.path().display()
    );
    host.configure("http://buildomat.example.com:80", 0, &slots);
    let helper = helper_after(&host, &format!("mount --bind {etc} /etc; {more}"));
    let client = Client::new(&host);
    let worker = create_worker(&client, "a");
    let script = format!(
        r#"cd {place}
        look() {{
            id -un; id -gn; getent hosts buildomat.example.com
            cat a-file a-directory/* deep/in/it/* /etc/app/key /etc/closed/*
            python3 -c 'import socket; socket.socket(socket.AF_UNIX).connect("service"); print("SEC" + "RET")'
            touch gets/this/file exists/file /var/is/here/file /var/tmp/file /opt/buildomat/file && echo written
            cat live/file /etc/app/seen /etc/looked-for
        }} 2>&1
        test -p a-fifo && echo shown
        look; echo; echo ready
        while ! [ -e live/go ]; do sleep 0.1; done
        echo again; look; cat /etc/appears; exit 1"#,
        place = place.path().display(),
    );
    let (reply, console) = install(
        &client,
        worker,
        sealed_memfd(format!("#!/bin/bash\n{script}\n").as_bytes()),
    );
    assert_eq!(reply, Reply::AgentStarted);
    let console = console.unwrap();
    wait_for_line(&console, "ready");

    for name in ["passwd", "group", "hosts"] {
        replace(&in_etc(name), &fs::read_to_string(in_etc(name)).unwrap());
    }
    for path in [at("a-file"), in_etc("app/key"), at("live/file")] {
        replace(&path, "SECRET");
    }
    replace(&in_etc("app/seen"), "new");
    replace(&in_etc("looked-for"), "new");
    replace(&in_etc("appears"), "appeared");
    fs::write(at("live/file"), "followed").unwrap();
    for directory in [at("a-directory"), at("deep/in"), in_etc("closed"), at("gets")] {
        if directory.exists() {
            fs::rename(&directory, directory.with_extension("old")).unwrap();
        }
        write(directory.join("file"), "SECRET");
        write(directory.join("it/file"), "SECRET");
    }
    // With it goes what is mounted on it.
    fs::remove_dir(at("exists")).unwrap();
    fs::remove_file(at("service")).unwrap();
    drop(service);
    let _service = listen(&at("service"));
    fs::write(at("live/go"), "").unwrap();

    wait_until(&client, worker, |state| state != State::Running);
    let console = read(&console);
    assert!(!console.contains("SECRET"), "{console}");
    let user = protocol::UserName::from(worker).to_string();
    assert_eq!(console.matches(&user).count(), 4, "{console}");
    assert_eq!(console.matches("127.0.0.1").count(), 2, "{console}");
    assert_eq!(console.matches("written").count(), 2, "{console}");
    assert!(
        console.contains("followed") && console.contains("shown"),
        "{console}"
    );
    assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    // What another job has looked for is no reason not to see it.
    for (text, seen) in [("old", "oldnew"), ("new", "newnew")] {
        replace(&in_etc("later"), text);
        let worker = create_worker(&client, "a");
        let (_, next) = run(&client, worker, "cat /etc/later /etc/looked-for; exit 1");
        assert_eq!(next, seen);
        assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    }
    drop(helper);
    console
}

#[test]
fn what_is_hidden_and_what_is_the_jobs_own_stays_so_when_the_host_replaces_it() {
    let console = replaced_during_a_job("");
    assert!(console.contains("appeared"), "{console}");
}

#[test]
fn the_same_holds_where_etc_cannot_be_an_overlay() {
    // What is mounted in /etc would be missing in one.
    replaced_during_a_job("mount --bind /etc/hostname /etc/hostname");
}

/// Mounts a file system at `auto` when somebody enters it, until a byte comes from `end` (the kernel's
/// Documentation/filesystems/autofs.rst).
const AUTOMOUNTER: &str = r#"import fcntl, os, select, struct, subprocess
os.setpgid(0, 0)
requests, to_us = os.pipe()
options = f"fd={to_us},pgrp={os.getpgrp()},minproto=5,maxproto=5,direct"
subprocess.run(["mount", "-t", "autofs", "-o", options, "none", "auto"], pass_fds=[to_us], check=True)
top, end = os.open("auto", os.O_RDONLY), os.open("end", os.O_RDWR)
open("started", "w")
while end not in select.select([requests, end], [], [])[0]:
    token = struct.unpack_from("I", os.read(requests, 4096), 8)[0]
    subprocess.run(["mount", "-t", "tmpfs", "none", "auto"], check=True)
    open("auto/file", "w").write("mounted\n")
    fcntl.ioctl(top, 0x9360, token)"#;

/// A job sees what is mounted at `auto` when somebody enters it; `config` has a place for the directory that it is in.
fn see_automount(config: &str) {
    let place = create_shared_dir();
    let at = |name: &str| place.path().join(name);
    fs::create_dir(at("auto")).unwrap();
    write(at("hidden"), "SECRET");
    mkfifo(&at("end"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let host = TestHost::new();
    let config = config.replace("PLACE", &place.path().display().to_string());
    host.configure("http://127.0.0.1:9", 0, &config);
    // As systemd has all mounts: what the automounter mounts reaches those who wait for it.
    let script = format!(
        "mount --make-rshared /; cd {0}; timeout {1} python3 -c '{AUTOMOUNTER}' & while ! [ -e {0}/started ]; do sleep 0.05; done",
        place.path().display(),
        TEST_TIMEOUT.as_secs(),
    );
    let _helper = helper_after(&host, &script);
    let client = Client::new(&host);
    let worker = create_worker(&client, "a");
    // And what the host mounts later does not reach the job, where it could be writable.
    let script = format!(
        "cat {}/auto/file; grep -cE ' (shared|master):' /proc/self/mountinfo; exit 1",
        place.path().display()
    );
    let (_, console) = run(&client, worker, &script);
    assert_eq!(console, "mounted\n0\n");
    assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    fs::write(at("end"), "over").unwrap();
}

#[test]
fn what_is_mounted_when_somebody_enters_it_is_shown_beside_what_is_hidden() {
    see_automount(&format!("hide = [\"PLACE/hidden\"]\n[slots.a]\n{SLOT}"));
}

#[test]
fn what_is_mounted_when_somebody_enters_it_is_shown_where_a_slot_names_it() {
    let shown = "read_only = { \"PLACE/auto\" = \"PLACE/auto\" }\n";
    see_automount(&format!("[slots.a]\n{SLOT}{shown}"));
}

#[test]
fn mounts_that_no_job_can_reach_keep_none_from_starting_whatever_is_below_them() {
    let place = create_shared_dir();
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", 0, &format!("[slots.a]\n{SLOT}"));
    // As a user can by fusermount3(1). Without the first mount, the path of the second leads over a file; and with the new
    // root before it, the last path is too long.
    let script = format!(
        r#"cd {}; mkdir -m 700 closed; cd closed; mkdir f; touch f/d
        mount -t tmpfs none f; mkdir -p f/d/m; mount -t tmpfs none f/d/m
        name=$(printf 'n%.0s' $(seq 200)); depth=$(((4090 - $(pwd | wc -c)) / 201))
        for _ in $(seq $depth); do mkdir $name; cd $name; done
        mount -t tmpfs none .; cd /"#,
        place.path().display()
    );
    let _helper = helper_after(&host, &script);
    let client = Client::new(&host);
    let worker = create_worker(&client, "a");
    let script = format!(
        "grep -c {}/closed /proc/self/mountinfo; exit 1",
        place.path().display()
    );
    let (_, console) = run(&client, worker, &script);
    assert_eq!(console, "1\n", "all but the longest are taken away");
    assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
}

/// `/opt` leads to this directory of the larger disk.
fn see_through_links(opt: &str) {
    let place = create_shared_dir();
    let at = |name: &str| place.path().join(name).display().to_string();
    for directory in [
        "root",
        "big/home/somebody",
        "big/root",
        "big/tmp",
        &format!("{opt}/tools"),
        "work",
    ] {
        fs::create_dir_all(at(directory)).unwrap();
    }
    for file in ["big/home/somebody/file", "big/root/file", "big/tmp/file"] {
        write(at(file), "SECRET");
    }
    write(at(&format!("{opt}/tools/file")), "a tool\n");
    let open = ["big/tmp", "big/root", "big/home"].into_iter();
    // Only root may make what its link leads to.
    for directory in open.filter(|directory| !opt.starts_with(directory)) {
        fs::set_permissions(at(directory), fs::Permissions::from_mode(0o777)).unwrap();
    }
    // All but these are this host's: in an overlay, so that its root can have other links.
    let script = format!(
        r#"cd {0}
        mkdir mine; ln -s {0}/big/home/somebody mine/link; chown -h 1 mine/link
        mount -t tmpfs none work; mkdir -p work/upper/var work/work; chmod 755 work/upper work/upper/var
        ln -s {0}/big/home {0}/big/root {0}/{opt} work/upper; ln -s {0}/big/tmp work/upper/var/tmp
        mount -t overlay -o lowerdir=/,upperdir=work/upper,workdir=work/work overlay root
        for directory in proc sys dev tmp run srv mnt; do mount --rbind /$directory root/$directory; done
        cd root; mkdir old; pivot_root . old; umount -l /old; cd /"#,
        place.path().display()
    );
    // Not in /var/tmp, which booted hosts have for it.
    let host = TestHost::below(Path::new("/srv"));
    // Somebody has put a link of his own there.
    let slot = format!("[slots.a]\n{SLOT}writable = [{:?}]\n", at("mine/link/own"));
    host.configure("http://127.0.0.1:9", 0, &slot);
    let _helper = helper_after(&host, &script);
    let client = Client::new(&host);
    let worker = create_worker(&client, "a");
    let script = format!(
        "touch ~/file /opt/buildomat/file /var/tmp/file && echo written
        cat /opt/tools/file; cd {0}/big; ls; cat {0}/big/*/* {0}/big/*/*/* {0}/mine/*/* /root/* /home/*/*; exit 1",
        place.path().display()
    );
    let (_, console) = run(&client, worker, &script);
    assert!(!console.contains("SECRET"), "{console}");
    let lines: Vec<_> = console.lines().take(2).collect();
    assert_eq!(lines, ["written", "a tool"], "{console}");
    assert_eq!(
        console.lines().nth(2) == Some("opt"),
        opt == "big/opt",
        "{console}"
    );
    assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
}

#[test]
fn links_to_elsewhere_are_places_and_what_they_lead_to_is_hidden() {
    see_through_links("big/opt");
}

#[test]
fn a_place_may_be_on_the_disk_of_homes() {
    see_through_links("big/home/opt");
}

#[test]
fn files_of_the_hosts_run_are_shown_where_they_are_needed() {
    let place = create_shared_dir();
    let at = |name: &str| place.path().join(name);
    let etc = copy_etc(place.path());
    let _ = fs::remove_file(at("etc/resolv.conf"));
    // By a link of /run itself.
    symlink("../run/resolver/resolv.conf", at("etc/resolv.conf")).unwrap();
    fs::create_dir_all(at("run")).unwrap();
    symlink("systemd/../resolvconf", at("run/resolver")).unwrap();
    let resolve = at("run/systemd/resolve");
    write(resolve.join("stub-resolv.conf"), "first\n");
    write(at("run/udev/data/c4:64"), "E:ID_BUS=usb\n");
    write(at("run/tools/tool"), "a tool\n");
    write(at("run/other/file"), "SECRET");
    symlink("tools", at("run/link-to-tools")).unwrap();
    symlink("/dev/shm", at("run/shm")).unwrap();
    fs::create_dir(at("run/uscreens")).unwrap();
    // A directory on the way is missing: the one above it is more than programs read.
    fs::remove_file(at("etc/hosts")).unwrap();
    symlink("../run/other/missing/hosts", at("etc/hosts")).unwrap();
    fs::create_dir(at("run/resolvconf")).unwrap();
    symlink(
        "/run/systemd/resolve/stub-resolv.conf",
        at("run/resolvconf/resolv.conf"),
    )
    .unwrap();
    mkfifo(&at("end"), nix::sys::stat::Mode::S_IRWXU).unwrap();

    let host = TestHost::new();
    let slots = format!(
        "[slots.a]\n{SLOT}[slots.b]\n{SLOT}network = \"none\"\n[slots.c]\n{SLOT}devices = [\"/dev/null\"]\n\
         read_only = {{ \"/run/shown/tools\" = \"/run/link-to-tools\" }}\n"
    );
    host.configure("http://buildomat.example.com:80", 0, &slots);
    // A service that listens there, until the test ends.
    let service = r#"import os, socket
listener = socket.socket(socket.AF_UNIX); listener.bind("/run/resolvconf/service"); listener.listen()
os.chmod("/run/resolvconf/service", 0o666)
open("/run/started", "w")
open("../end").read()"#;
    let script = format!(
        "mount --bind {etc} /etc; mount --rbind {run} /run; cd {run}
        timeout {} python3 -c '{service}' &
        while ! [ -e /run/started ]; do sleep 0.05; done",
        TEST_TIMEOUT.as_secs(),
        run = at("run").display()
    );
    let _helper = helper_after(&host, &script);
    let client = Client::new(&host);
    let script = "find /run -type s; find /run -type f ! -name buildomat-agent -user root | sort
        find /run /dev /etc /home /tmp /var/tmp /opt/buildomat -xdev -type f -writable ! -user $UID 2>&-
        cat /etc/resolv.conf; readlink /run/shm; cd /run/uscreens && touch socket && ls /run/screen; echo ready
        while ! grep -q second /etc/resolv.conf && [ -e /etc/resolv.conf ]; do sleep 0.1; done
        touch /run/systemd/resolve/new /run/new /run/shown/new; exit 1";
    let mut workers = Vec::new();
    let mut seen = Vec::new();
    for slot in ["a", "b", "c"] {
        let worker = create_worker(&client, slot);
        let (_, console) = install(
            &client,
            worker,
            sealed_memfd(format!("#!/bin/bash\n{script}\n").as_bytes()),
        );
        let console = console.unwrap();
        wait_for_line(&console, "ready");
        workers.push(worker);
        seen.push(console);
    }
    // It is followed.
    replace(&resolve.join("stub-resolv.conf"), "second\n");
    for worker in &workers {
        wait_until(&client, *worker, |state| state != State::Running);
    }
    let seen: Vec<_> = seen.iter().map(read).collect();
    let stub = "/run/systemd/resolve/stub-resolv.conf\n";
    assert!(
        seen[0].starts_with(&format!("{stub}first\n/dev/shm\nsocket\nready\n")),
        "{}",
        seen[0]
    );
    assert!(
        seen[1].starts_with("cat: /etc/resolv.conf: No such file"),
        "{}",
        seen[1]
    );
    assert!(
        seen[2].starts_with(&format!(
            "/run/shown/tools/tool\n{stub}/run/udev/control\n/run/udev/data/c4:64\nfirst\n/dev/shm\nsocket\nready\n"
        )),
        "{}",
        seen[2]
    );
    // Neither is there a file of another's that the job can write: its owner has no quota.
    assert_eq!(seen[2].matches("touch: cannot").count(), 3, "{}", seen[2]);
    for worker in workers {
        assert_eq!(client.ask(&Request::Delete { worker }).0, Reply::Deleted);
    }
    // Whom its time limit has ended does not wait for it.
    let end = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(at("end"));
    end.expect("the service still listens");
}
