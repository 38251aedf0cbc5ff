//! Group J: the egress proxy, through which jobs without a network reach the server.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc::linger;
use nix::sys::socket::{setsockopt, sockopt};
use protocol::Seqpacket;
use protocol::config::{PROXY_DIR, PROXY_SOCKET};
use testbed::harness::{SUPERVISOR_UID, TestHost, raise_open_files};
use testbed::test_factory::TestFactory;

use super::{SOCKET, SOMEBODY};

const NO_NETWORK: &str = "[slots.a]\ntarget = \"TARGET\"\nnetwork = \"none\"\n";
/// More than any pool that callers could share.
const CALLS: usize = 1500;

/// This test, as another user of the host, who calls at the egress proxy again and again.
struct OtherUser(Child);

impl OtherUser {
    /// Has made all its calls, or has been refused: it says which.
    fn call(host: &TestHost, uid: u32) -> (OtherUser, String) {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([
            "--ignored",
            "--exact",
            "--nocapture",
            "attacks::egress_proxy::another_user",
        ]);
        command.env(SOCKET, host.root.join(PROXY_DIR).join(PROXY_SOCKET));
        command.uid(uid).gid(uid).current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut other = OtherUser(command.spawn().unwrap());
        let mut printed = String::new();
        let output = other.0.stdout.as_mut().expect("it was piped");
        while !printed.ends_with(".\n") {
            let mut byte = [0];
            if let Err(error) = output.read_exact(&mut byte) {
                panic!("{uid} said {printed:?}: {error}, {:?}", other.0.wait());
            }
            printed.push(byte[0].into());
        }
        (other, printed)
    }
}

impl Drop for OtherUser {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "a part of row 101, which starts it"]
fn another_user() {
    let socket = PathBuf::from(std::env::var_os(SOCKET).expect("row 101 starts it"));
    raise_open_files();
    let mut kept = Vec::new();
    for _ in 0..CALLS {
        let caller = match Seqpacket::connect(&socket, false) {
            Ok(caller) => caller,
            Err(errno) => {
                assert_eq!(errno, Errno::EACCES);
                println!("refused.");
                return wait_for_the_end();
            }
        };
        // Closing it takes a thousand seconds, for its other end takes nothing.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let other = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let slow = listener.accept().unwrap().0;
        let long = linger {
            l_onoff: 1,
            l_linger: 1000,
        };
        setsockopt(&slow, sockopt::Linger, &long).unwrap();
        slow.set_nonblocking(true).unwrap();
        // Small, so that a thousand of them leave the tests beside this one the host's memory for TCP.
        setsockopt(&slow, sockopt::SndBuf, &4096).unwrap();
        setsockopt(&other, sockopt::RcvBuf, &4096).unwrap();
        while (&slow).write(&[7; 1 << 16]).is_ok() {}
        let _ = caller.send(&[0], Some(slow.as_fd()));
        // The last that has it waits.
        std::thread::spawn(move || drop(slow));
        kept.push((caller, other));
    }
    println!("called.");
    wait_for_the_end();
}

fn wait_for_the_end() {
    let _ = std::io::stdin().read(&mut [0]);
}

/// A job starts, runs and ends, and all that takes no longer than it should.
async fn a_job_works(factory: &TestFactory, how: &str) {
    let started_at = Instant::now();
    factory
        .wait_completed(factory.submit("echo through the proxy"))
        .await;
    let took = started_at.elapsed();
    assert!(took < Duration::from_secs(60), "{how}: the job took {took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn row_101_a_user_whose_sockets_are_slow_to_close_keeps_no_job_from_the_server() {
    let factory = TestFactory::new(NO_NETWORK).await;
    a_job_works(&factory, "alone").await;
    let (other, printed) = tokio::task::block_in_place(|| OtherUser::call(&factory.host, SOMEBODY));
    assert!(printed.contains("refused."), "another user can call: {printed}");
    a_job_works(&factory, "refused").await;
    drop(other);

    // Where the directory is open to others, the uid of the caller is checked.
    let closed = factory.host.root.join(PROXY_DIR).parent().unwrap().to_owned();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o755)).unwrap();
    // One who is nobody here, one in the range of uids without being a worker, and the supervisor's own user.
    let others = [SOMEBODY, factory.host.uid_of_no_worker(), SUPERVISOR_UID].map(|uid| {
        let (other, printed) = tokio::task::block_in_place(|| OtherUser::call(&factory.host, uid));
        assert!(printed.contains("called."), "{printed}");
        other
    });
    a_job_works(&factory, "called").await;
    factory.wait_for_log(&["WARN", "closed a connection of uid", "no worker's"]);
    assert!(
        factory.supervisor.log.count(&["closed a connection of uid"]) < 5,
        "the log is filled"
    );
    drop(others);
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o710)).unwrap();
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_101_a_job_with_all_its_connections_leaves_the_next_job_its_own() {
    let slots = format!("{NO_NETWORK}{}", NO_NETWORK.replace("[slots.a]", "[slots.b]"));
    let factory = TestFactory::new(&slots).await;
    let port = factory.server.url().rsplit(':').next().unwrap().to_owned();
    // As many as it gets, each half-sent; then it says so, and keeps them for as long as it runs.
    let open = factory.shared().join("release");
    let greedy = factory.submit(&format!(
        "for n in $(seq 300); do exec {{fd}}<>/dev/tcp/127.0.0.1/{port} || break; printf 'GET /' >&$fd; done; \
         while ! [ -e {} ]; do sleep 0.2; done",
        open.display()
    ));
    factory.wait_for_log(&["WARN", "closed a connection of uid", "too many connections"]);
    a_job_works(&factory, "beside a greedy one").await;
    factory.release();
    factory.wait_for_end(greedy).await;
    factory.finish().await;
}
