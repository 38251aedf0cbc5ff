//! What of the host a job must not reach although its mode would let it.

use std::os::unix::net::UnixListener;
use std::path::Path;

use testbed::disk::SmallDisk;

use super::*;

#[test]
fn sockets_of_the_hosts_services_are_covered_wherever_they_are() {
    let place = place();
    let path = place.path().join("a service");
    let _listener = UnixListener::bind(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    // A name that is no socket any more hides nothing.
    let gone = place.path().join("gone");
    let _other = UnixListener::bind(&gone).unwrap();
    fs::remove_file(&gone).unwrap();
    fs::write(&gone, "seen\n").unwrap();

    let stage = Stage::new();
    let client = stage.client();
    let worker = created(&client, "c");
    let script = format!(
        "cat {}/gone; ls {0}; python3 -c 'import socket
try: socket.socket(socket.AF_UNIX).connect(\"{}\"); print(\"CONNECTED\")
except OSError as e: print(\"refused\")'; exit 1",
        place.path().display(),
        path.display()
    );
    let (_, console) = run(&client, worker, &script);
    assert_eq!(console, "seen\na service\ngone\nrefused\n");
    stage.finish(&[worker]);
}

#[test]
fn a_mount_that_no_job_can_reach_is_not_made_for_it() {
    let place = place();
    let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    // A space: the kernel writes it in another way.
    let (closed, open) = (place.path().join("of root"), place.path().join("of all"));
    let mounts = [&closed, &open].map(|directory| {
        let inner = directory.join("inner disk");
        fs::create_dir_all(&inner).unwrap();
        SmallDisk::in_memory_at(inner)
    });
    mode(&closed, 0o710);
    mode(&open, 0o755);

    let stage = Stage::new();
    let client = stage.client();
    let worker = created(&client, "c");
    let (_, console) = run(&client, worker, "cat /proc/self/mountinfo");
    assert!(console.contains("of\\040all/inner\\040disk "), "{console}");
    assert!(!console.contains("of\\040root/"), "{console}");
    stage.finish(&[worker]);
    drop(mounts);
}

#[test]
fn the_audit_log_names_the_worker_and_the_job_cannot_change_that() {
    let stage = Stage::new();
    let client = stage.client();
    let worker = worker_id();
    let Reply::UserCreated { uid, .. } = create(&client, worker, "c") else {
        panic!()
    };
    let script =
        "cat /proc/self/loginuid; echo; echo 0 > /proc/self/loginuid; cat /proc/self/loginuid; exit 1";
    let (_, console) = run(&client, worker, script);
    let before = fs::read_to_string("/proc/self/loginuid").unwrap_or_default();
    // Somebody who logged in to run these tests stays the one who is named.
    let named = if before == u32::MAX.to_string() {
        uid.to_string()
    } else {
        before
    };
    assert_eq!(console.matches(&named).count(), 2, "{console}");
    stage.finish(&[worker]);
}
