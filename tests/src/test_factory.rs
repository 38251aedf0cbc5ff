//! A whole factory for a test: the fake server, a host with the helper as root and the supervisor as an unprivileged
//! user, and what tests of it ask again and again.

use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;

use crate::fake_server::{Job, JobSpec, Server, ServerOptions, State, Ulid, Worker};
use crate::faulty_proxy::Proxy;
use crate::harness::{Running, SUPERVISOR_UID, TEST_TIMEOUT, TestHost, binaries, place_in};
use crate::host_snapshot::HostSnapshot;
use crate::small_disk::SmallDisk;

/// A slot `a` with a variable.
pub const ONE: &str = "[slots.a]\ntarget = \"TARGET\"\nenv.COLOUR = \"red\"\n";
/// Slots `a` and `b`, of one target.
pub const TWO: &str = "[slots.a]\ntarget = \"TARGET\"\n[slots.b]\ntarget = \"TARGET\"\n";

/// The calls of a poll, as the supervisor's log names them.
pub const CALLS: [&str; 3] = ["workers", "lease", "list"];

/// How a job waits for [`TestFactory::release`]. It may not write where the test can, so it waits for a file of the host's
/// that it can read.
const UNTIL_RELEASE: &str = "while ! [ -e RELEASE ]; do sleep 0.2; done";

/// The fields go in this order: the processes, what is mounted in the host's directory, the directory.
#[derive(Debug)]
pub struct TestFactory {
    /// A test may replace it: the last one is then killed.
    pub supervisor: Running,
    /// A test may replace it: the last one is then killed.
    pub helper: Running,
    /// What the host's state directory is on, where `prepare` of [`TestFactory::on`] made one.
    pub disk: Option<SmallDisk>,
    /// With the factory's files in a directory of its own.
    pub host: TestHost,
    /// Between the factory and the server, where the factory has one.
    pub proxy: Option<Proxy>,
    /// It has the target `linux` and the factory `here`.
    pub server: Server,
    /// Taken before the helper started.
    pub before: HostSnapshot,
    /// Of `linux`, which stands for `TARGET` in slots.
    pub target: Ulid,
    shared: tempfile::TempDir,
}

impl TestFactory {
    /// A factory with these slots; `TARGET` in them stands for the target's id.
    pub async fn new(slots: &str) -> TestFactory {
        TestFactory::with_agent(slots, binaries().join("fake-agent")).await
    }

    /// One whose workers get this program as their agent.
    pub async fn with_agent(slots: &str, agent: PathBuf) -> TestFactory {
        TestFactory::build(slots, agent, false, |_| None).await
    }

    /// One in which factory and agents reach the server through a proxy.
    pub async fn behind_a_proxy(slots: &str) -> TestFactory {
        TestFactory::build(slots, binaries().join("fake-agent"), true, |_| None).await
    }

    /// One whose host was prepared before anything of the factory started.
    pub async fn on(slots: &str, prepare: impl FnOnce(&TestHost) -> Option<SmallDisk>) -> TestFactory {
        TestFactory::build(slots, binaries().join("fake-agent"), false, prepare).await
    }

    async fn build(
        slots: &str,
        agent: PathBuf,
        behind_a_proxy: bool,
        prepare: impl FnOnce(&TestHost) -> Option<SmallDisk>,
    ) -> TestFactory {
        let options = ServerOptions {
            agent: Some(agent),
            ..ServerOptions::default()
        };
        let server = Server::start(options).await.unwrap();
        let proxy = match behind_a_proxy {
            true => Some(Proxy::start(server.address()).await.unwrap()),
            false => None,
        };
        let target = server.add_target("linux");
        let (_, token) = server.add_factory("here");
        let host = TestHost::new();
        let disk = prepare(&host);
        let url = proxy.as_ref().map_or_else(|| server.url(), Proxy::url);
        let slots = slots.replace("TARGET", &target.to_string());
        host.configure(&url, SUPERVISOR_UID, &slots);
        host.write_token(&token);
        let before = HostSnapshot::of_unused(&host);
        let helper = host.start_helper();
        let supervisor = host.start_supervisor();
        // A change in /srv, where slots have places, makes the helpers of all tests build their root file systems anew.
        let local = Path::new("/var/local");
        let shared = place_in(if local.is_dir() { local } else { Path::new("/srv") });
        TestFactory {
            supervisor,
            helper,
            disk,
            host,
            proxy,
            server,
            before,
            target,
            shared,
        }
    }

    /// Where the factory reaches the server: the proxy, if there is one.
    pub fn url(&self) -> String {
        self.proxy.as_ref().map_or_else(|| self.server.url(), Proxy::url)
    }

    /// Configure it anew: slots as in [`TestFactory::new`].
    pub fn configure(&self, slots: &str) {
        let slots = slots.replace("TARGET", &self.target.to_string());
        self.host.configure(&self.url(), SUPERVISOR_UID, &slots);
    }

    /// A job of one task, which this script of bash is.
    pub fn submit(&self, script: &str) -> Ulid {
        self.server.submit_job(JobSpec::script("linux", script)).unwrap()
    }

    /// A job that prints `running`, and ends, with `done`, after [`TestFactory::release`].
    pub fn submit_blocking(&self) -> Ulid {
        self.submit(&format!("echo running; {}; echo done", self.until_release()))
    }

    /// A command of bash with which a job waits for [`TestFactory::release`].
    pub fn until_release(&self) -> String {
        UNTIL_RELEASE.replace("RELEASE", &self.release_file().display().to_string())
    }

    fn release_file(&self) -> PathBuf {
        self.shared.path().join("release")
    }

    /// A directory that jobs can read, and the test can write.
    pub fn shared(&self) -> &Path {
        self.shared.path()
    }

    /// Let all blocking jobs end.
    pub fn release(&self) {
        std::fs::write(self.release_file(), "").unwrap();
    }

    /// Let blocking jobs that are submitted from now on wait again.
    pub fn block_again(&self) {
        std::fs::remove_file(self.release_file()).unwrap();
    }

    /// Submit a blocking job, and wait until it runs.
    pub async fn start_blocking_job(&self) -> Ulid {
        let job = self.submit_blocking();
        self.wait_for_line(job, "running").await;
        job
    }

    /// Wait for a job's end; panics with the supervisor's log where it does not come.
    pub async fn wait_for_end(&self, job: Ulid) -> Job {
        let ended = self.server.wait_job(job, TEST_TIMEOUT).await;
        ended.unwrap_or_else(|e| panic!("{e:#}\n{}", self.supervisor.log.text()))
    }

    /// Wait for a job's end, and fail unless it is `completed`.
    pub async fn wait_completed(&self, job: Ulid) {
        let job = self.wait_for_end(job).await;
        assert_eq!(
            job.state(),
            "completed",
            "{:#?}\n{}",
            job.events,
            self.supervisor.log.text()
        );
    }

    /// Wait until the server's state shows what is wanted.
    pub async fn wait_for_state<T>(&self, wanted: impl FnMut(&State) -> Option<T>) -> T {
        let found = self.server.wait_for(TEST_TIMEOUT, wanted).await;
        found.unwrap_or_else(|e| panic!("{e:#}\n{}", self.supervisor.log.text()))
    }

    /// Wait for a line of the job's output.
    pub async fn wait_for_line(&self, job: Ulid, line: &str) {
        let see = |state: &State| {
            let mut events = state.jobs[&job].events.iter();
            events.any(|event| event.payload == line).then_some(())
        };
        self.wait_for_state(see).await;
    }

    /// Wait until the job's worker is held, and say how it stands then.
    pub async fn wait_held(&self, job: Ulid) -> Worker {
        let held = |state: &State| {
            let worker = state.jobs[&job].worker?;
            let worker = &state.workers[&worker];
            worker.hold.is_some().then(|| worker.clone())
        };
        self.wait_for_state(held).await
    }

    /// Wait until the job's worker is held, or the job has ended.
    pub async fn wait_held_or_ended(&self, job: Ulid) {
        let over = |state: &State| {
            let held = |worker: &Ulid| state.workers[worker].hold.is_some();
            let job = &state.jobs[&job];
            (job.is_complete() || job.worker.as_ref().is_some_and(held)).then_some(())
        };
        self.wait_for_state(over).await;
    }

    /// Wait until the factory has looked at the server so many times more: it has had its chance.
    pub async fn wait_polls(&self, more: u64) {
        let polls = || self.server.requests("GET /0/factory/workers");
        let end = polls() + more;
        self.wait_for_state(|_| (polls() >= end).then_some(())).await;
    }

    /// Start the supervisor anew, as one that logs its calls.
    pub fn restart_with_call_log(&mut self) {
        self.end_supervisor(Signal::SIGTERM);
        let mut command = self.host.supervisor_command();
        self.supervisor = Running::start(command.args(["--log-level", "debug"]));
    }

    /// Wait until so many workers are online, and the factory knows.
    pub async fn wait_online(&self, workers: usize) {
        let online = |state: &State| {
            let online = state.workers.values().filter(|w| w.is_online() && !w.deleted);
            (online.count() == workers).then_some(())
        };
        self.wait_for_state(online).await;
        self.wait_polls(2).await;
    }

    /// How often the supervisor (see [`TestFactory::restart_with_call_log`]) makes each of its calls, to the server and
    /// to the helper, in one of the next `polls` polls.
    pub async fn calls_per_poll(&self, polls: u64) -> std::collections::BTreeMap<String, f64> {
        self.wait_polls(1).await;
        let seen = self.supervisor.log.len();
        self.wait_polls(polls).await;
        let mut calls = std::collections::BTreeMap::new();
        for line in self.supervisor.log.text_from(seen).lines() {
            if let Some((_, rest)) = line.split_once(" call=") {
                let call = rest
                    .split(' ')
                    .next()
                    .expect("there is a first")
                    .trim_matches('"');
                *calls.entry(call.to_owned()).or_default() += 1.0 / polls as f64;
            }
        }
        calls
    }

    /// Wait for a line of the supervisor's log, from `from` on.
    pub fn wait_for_log_from(&self, from: usize, parts: &[&str]) -> String {
        tokio::task::block_in_place(|| self.supervisor.log.wait_from(from, parts))
    }

    /// Wait for a line of the supervisor's log that has all of these parts.
    pub fn wait_for_log(&self, parts: &[&str]) -> String {
        self.wait_for_log_from(0, parts)
    }

    /// End the supervisor with this signal, as a crash or an operator does.
    pub fn end_supervisor(&mut self, signal: Signal) -> std::process::ExitStatus {
        self.supervisor.signal(signal);
        self.supervisor.wait()
    }

    /// Another supervisor in place of this one, for which the host's `/etc/hosts` has these lines more.
    pub fn restart_with_hosts(&mut self, lines: &str) {
        // It does not start while there is another.
        self.end_supervisor(Signal::SIGTERM);
        self.supervisor = self.host.start_supervisor_with_hosts(lines);
    }

    /// With this signal; returns when it has ended.
    pub fn end_helper(&mut self, signal: Signal) {
        self.helper.signal(signal);
        self.helper.wait();
    }

    /// The supervisor's own directory.
    pub fn state_dir(&self) -> PathBuf {
        let state = self.host.root.join(protocol::config::STATE_DIR);
        state.join("supervisor")
    }

    /// Wait until the server has no worker any more; then the host is as it was.
    pub async fn finish(self) {
        let gone = |state: &State| {
            let mut workers = state.workers.values();
            workers.all(|worker| worker.deleted).then_some(())
        };
        self.wait_for_state(gone).await;
        self.before.assert_unchanged(&self.host);
    }
}

/// The lines of one stream of a job's log.
pub fn lines(job: &Job, stream: &str) -> Vec<String> {
    let events = job.events.iter().filter(|event| event.stream == stream);
    events.map(|event| event.payload.clone()).collect()
}
