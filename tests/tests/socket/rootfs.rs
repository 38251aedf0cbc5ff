//! What of the host a job must not reach although its mode would let it.

use std::os::unix::net::UnixListener;
use std::path::Path;

use testbed::small_disk::SmallDisk;

use super::*;

#[test]
fn sockets_of_the_hosts_services_are_hidden_wherever_they_are() {
    let place = create_shared_dir();
    let path = place.path().join("a service");
    let _listener = UnixListener::bind(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    // A name that is no socket any more hides nothing.
    let gone = place.path().join("gone");
    let _other = UnixListener::bind(&gone).unwrap();
    fs::remove_file(&gone).unwrap();
    fs::write(&gone, "seen\n").unwrap();

    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "c");
    let script = format!(
        "cat {}/gone; ls {0}; python3 -c 'import socket
try: socket.socket(socket.AF_UNIX).connect(\"{}\"); print(\"CONNECTED\")
except OSError as e: print(\"refused\")'; exit 1",
        place.path().display(),
        path.display()
    );
    let (_, console) = run(&client, worker, &script);
    assert_eq!(console, "seen\ngone\nrefused\n");
    test.finish(&[worker]);
}

#[test]
fn a_mount_that_no_job_can_reach_is_not_made_for_it() {
    let place = create_shared_dir();
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

    let test = TestHelper::new();
    let client = test.client();
    let worker = create_worker(&client, "c");
    let (_, console) = run(&client, worker, "cat /proc/self/mountinfo");
    assert!(console.contains("of\\040all/inner\\040disk "), "{console}");
    assert!(!console.contains("of\\040root/"), "{console}");
    test.finish(&[worker]);
    drop(mounts);
}

#[test]
fn the_audit_log_names_the_worker_and_the_job_cannot_change_that() {
    let test = TestHelper::new();
    let client = test.client();
    let worker = worker_id();
    let Reply::UserCreated { uid, .. } = create(&client, worker, "c") else {
        panic!()
    };
    let script =
        "cat /proc/self/loginuid; echo; echo 0 > /proc/self/loginuid; cat /proc/self/loginuid; exit 1";
    let (_, console) = run(&client, worker, script);
    let before = fs::read_to_string("/proc/self/loginuid").unwrap_or_default();
    // The user who logged in to run these tests stays the one who is named.
    let named = if before == u32::MAX.to_string() {
        uid.to_string()
    } else {
        before
    };
    assert_eq!(console.matches(&named).count(), 2, "{console}");
    test.finish(&[worker]);
}

/// What programs do with files of their own. Each line fails the script where it does not work.
const ORDINARY: &str = r#"
set -eu
for place in ~ /input /work /tmp /var/tmp /opt/buildomat /run/buildomat /var/lock /run/screen /run/user/$(id -u) /dev/shm; do
    cd $place
    mkdir one two one/inner
    echo text > one/file
    ln one/file two/linked
    mv one/file two/moved
    mv one/inner two/
    : > two/moved
    truncate -s 5 two/moved
    mkfifo two/fifo
    echo through > two/fifo & read -r line < two/fifo
    [ "$line" = through ]
    python3 -c 'import os
fd = os.open(".", os.O_TMPFILE | os.O_RDWR)
os.write(fd, b"x")
here = os.open(".", os.O_RDONLY)
os.link(f"/proc/self/fd/{fd}", "two/from-nothing", src_dir_fd=here, follow_symlinks=True)
os.unlink("two/from-nothing")
open(f"/proc/self/fd/{fd}", "r+b").write(b"y")'
    rm -r one two
done
[ "$(stat -c '%a %U' /run/user/$(id -u))" = "700 $(id -un)" ]
cd /work
for device in null zero; do echo x > /dev/$device; done
echo to-stdout > /dev/stdout
echo to-stderr > /dev/stderr
echo 500 > /proc/self/oom_score_adj
echo name > /proc/self/comm
python3 -c 'import ctypes, os, pty
memory = os.memfd_create("m")
open(f"/proc/self/fd/{memory}", "r+b").write(b"x")
read, write = os.pipe()
open(f"/proc/self/fd/{write}", "wb").write(b"x")
master, slave = pty.openpty()
open(os.ttyname(slave), "wb").write(b"x")
libc = ctypes.CDLL(None, use_errno=True)
libc.mq_open.restype = ctypes.c_int
queue = libc.mq_open(b"/queue", os.O_CREAT | os.O_RDWR, 0o600, None)
assert queue >= 0, os.strerror(ctypes.get_errno())
open("/dev/mqueue/queue", "r").read()
import multiprocessing.shared_memory as s
s.SharedMemory("shared", create=True, size=4096).unlink()'
echo all of it works
"#;

#[test]
fn what_keeps_a_job_from_writing_elsewhere_leaves_its_own_places_as_they_were() {
    let test = TestHelper::with(
        "[slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n\
         [slots.b]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\nallow_user_namespaces = true\n",
    );
    let client = test.client();
    let mut workers = Vec::new();
    for slot in ["a", "b"] {
        let worker = create_worker(&client, slot);
        let (_, console) = run(&client, worker, ORDINARY);
        assert!(console.contains("all of it works"), "{slot}:\n{console}");
        workers.push(worker);
    }
    test.finish(&workers);
}
