//! Row 82: the helper is upgraded while jobs run, and for a while supervisor and helper speak different versions.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use protocol::{Received, Request, Seqpacket, wire};

use super::*;

/// Stands between supervisor and helper, where the helper's socket was, and makes the helper believe that the supervisor
/// speaks another version than it does.
struct VersionProxy {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
    place: PathBuf,
    behind: PathBuf,
}

impl VersionProxy {
    fn new(host: &TestHost, version: fn(u16) -> u16) -> VersionProxy {
        let place = host.socket();
        let behind = place.with_extension("behind");
        fs::rename(&place, &behind).unwrap();
        let fd = socket(
            AddressFamily::Unix,
            SockType::SeqPacket,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .unwrap();
        bind(fd.as_raw_fd(), &UnixAddr::new(&place).unwrap()).unwrap();
        std::os::unix::fs::chown(&place, Some(SUPERVISOR_UID), None).unwrap();
        listen(&fd, Backlog::new(8).unwrap()).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, helper) = (stop.clone(), behind.clone());
        let thread = std::thread::spawn(move || {
            // The standard library's listener does not mind that packets have borders.
            for client in UnixListener::from(fd).incoming().map_while(Result::ok) {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let helper = helper.clone();
                std::thread::spawn(move || relay(OwnedFd::from(client).into(), &helper, version));
            }
        });
        VersionProxy {
            stop,
            thread: Some(thread),
            place,
            behind,
        }
    }
}

impl Drop for VersionProxy {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = Seqpacket::connect(&self.place, false);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        fs::rename(&self.behind, &self.place).unwrap();
    }
}

fn relay(client: Seqpacket, helper: &Path, other: fn(u16) -> u16) {
    let helper = Seqpacket::connect(helper, false).expect("the helper listens");
    while let Ok(Received::Packet { bytes, descriptors }) = client.recv(wire::MAX_REQUEST) {
        let bytes = match wire::decode::<Request>(&bytes) {
            Ok(Request::Hello { version }) => {
                let version = other(version);
                wire::encode(&Request::Hello { version }).unwrap()
            }
            _ => bytes,
        };
        let descriptor = descriptors.first().map(OwnedFd::as_fd);
        if helper.send(&bytes, descriptor).is_err() {
            return;
        }
        let Ok(Received::Packet { bytes, descriptors }) = helper.recv(wire::MAX_REPLY) else {
            return;
        };
        if client
            .send(&bytes, descriptors.first().map(OwnedFd::as_fd))
            .is_err()
        {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn row_82_a_helper_of_another_version_is_named_on_both_sides_and_jobs_go_on() {
    let mut factory = TestFactory::new(TWO).await;
    let job = factory.start_blocking_job().await;
    // As an upgrade does it: a new helper, under a supervisor that is the old one still. What stands between them
    // is root's, so the helper serves that uid.
    factory.end_helper(Signal::SIGTERM);
    let slots = TWO.replace("TARGET", &factory.target.to_string());
    factory.host.configure(&factory.url(), 0, &slots);
    factory.helper = factory.host.start_helper();
    let proxy = VersionProxy::new(&factory.host, |version| version + 1);
    factory.end_supervisor(Signal::SIGTERM);
    factory.supervisor = factory.host.start_supervisor();
    let seen = 0;
    let version = protocol::VERSION;
    let ours = format!("another version of the protocol than this supervisor's {version} (");
    let parts = [
        "ERROR helper unreachable",
        &ours,
        "install both from the same release and restart them",
    ];
    factory.wait_for_log_from(seen, &parts);
    factory.wait_polls(3).await;
    once(&factory.supervisor.log, seen, &parts);
    let printed = format!(
        "has version {version} of the protocol, the supervisor version {}",
        version + 1
    );
    let logged = ["WARN", "Hello", &printed, "install both from one release"];
    tokio::task::block_in_place(|| factory.helper.log.wait(&logged));
    // The job does not need them to end, and is not touched before they understand each other.
    factory.release();
    factory.wait_completed(job).await;
    factory.wait_polls(2).await;
    assert!(!factory.server.worker(worker_of(&factory, job)).deleted);
    drop(proxy);
    factory.end_helper(Signal::SIGTERM);
    factory.configure(TWO);
    factory.helper = factory.host.start_helper();
    factory.wait_for_log_from(seen, &["helper back"]);
    let next = factory.submit("echo next");
    factory.wait_completed(next).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_82_a_helper_that_is_replaced_under_load_loses_no_request_and_no_job() {
    let mut factory = TestFactory::new(TWO).await;
    let jobs: Vec<Ulid> = (0..6)
        .map(|_| factory.submit("echo one; sleep 0.2; echo two"))
        .collect();
    // As a package's upgrade does: told to stop, and started again.
    while jobs.iter().any(|job| !factory.server.job(*job).is_complete()) {
        factory.wait_polls(1).await;
        factory.end_helper(Signal::SIGTERM);
        factory.helper = factory.host.start_helper();
    }
    for job in jobs {
        factory.wait_completed(job).await;
    }
    factory.finish().await;
}
