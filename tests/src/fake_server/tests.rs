//! The fake server's own rules, with a clock set by the test.

use std::time::Duration;

use super::json::{Append, Associate};
use super::state::LEASE;
use super::*;

struct ServerTest {
    s: State,
    target: Ulid,
    factory: Ulid,
}

fn server_test() -> ServerTest {
    let mut s = State::new(jiff::Timestamp::now());
    let target = s.add_target("lab");
    let factory = s.add_factory("f").0;
    ServerTest { s, target, factory }
}

impl ServerTest {
    fn job(&mut self) -> Ulid {
        self.s.submit_spec(JobSpec::script("lab", "true")).unwrap()
    }

    fn worker(&mut self, job: Option<Ulid>) -> Ulid {
        self.s
            .create_worker(self.factory, self.target, job, false)
            .unwrap()
    }

    fn associate(&mut self, worker: Ulid, private: &str) -> Result<(), ServerError> {
        let body = Associate {
            private: private.to_string(),
            ip: None,
            metadata: None,
        };
        self.s.associate(self.factory, worker, body)
    }

    fn bootstrap(&mut self, worker: Ulid, token: &str) -> Result<Ulid, ServerError> {
        let bootstrap = self.s.workers[&worker].bootstrap.clone();
        self.s.bootstrap(&bootstrap, &format!("{token:-<32}"))
    }

    fn online(&mut self, job: Option<Ulid>) -> Ulid {
        let worker = self.worker(job);
        self.associate(worker, "slot").unwrap();
        self.bootstrap(worker, "t").unwrap();
        worker
    }

    fn pass(&mut self, by: Duration) {
        self.s.now += by;
        self.s.tick();
    }
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_leased_job_is_leased_to_no_other_until_the_lease_runs_out() {
    let mut b = server_test();
    let job = b.job();
    let other = b.s.add_factory("g").0;
    assert_eq!(b.s.lease(b.factory, &[b.target]), Some((job, b.target)));
    assert_eq!(b.s.lease(other, &[b.target]), None);
    b.pass(LEASE - SECOND);
    assert!(b.s.renew(b.factory, job) && !b.s.renew(other, job));
    b.pass(LEASE - SECOND);
    assert_eq!(b.s.lease(other, &[b.target]), None);
    b.pass(SECOND);
    assert!(!b.s.renew(b.factory, job));
    assert_eq!(b.s.lease(other, &[b.target]), Some((job, b.target)));
}

#[test]
fn a_tied_job_is_neither_leased_nor_renewed_nor_tied_again() {
    let mut b = server_test();
    let job = b.job();
    b.s.lease(b.factory, &[b.target]).unwrap();
    b.worker(Some(job));
    assert!(!b.s.renew(b.factory, job));
    assert_eq!(b.s.lease(b.factory, &[b.target]), None);
    let again = b.s.create_worker(b.factory, b.target, Some(job), false);
    assert!(matches!(again, Err(ServerError::Conflict(_))), "{again:?}");
}

#[test]
fn nothing_is_leased_when_disabled_held_or_of_another_target() {
    let mut b = server_test();
    b.job();
    assert_eq!(b.s.lease(b.factory, &[]), None);
    b.s.held = true;
    assert_eq!(b.s.lease(b.factory, &[b.target]), None);
    b.s.held = false;
    b.s.factories.get_mut(&b.factory).unwrap().enable = false;
    assert_eq!(b.s.lease(b.factory, &[b.target]), None);
    assert!(b.s.factories[&b.factory].last_ping.is_some());
}

#[test]
fn a_worker_is_associated_once() {
    let mut b = server_test();
    let w = b.worker(None);
    assert_eq!(b.associate(w, "one"), Ok(()));
    assert_eq!(b.associate(w, "one"), Ok(()));
    assert_eq!(b.associate(w, "two"), Err(ServerError::Unauthorised));
}

#[test]
fn bootstrap_waits_for_association_and_knows_one_token() {
    let mut b = server_test();
    let w = b.worker(None);
    assert_eq!(b.bootstrap(w, "a"), Err(ServerError::Unauthorised));
    b.associate(w, "slot").unwrap();
    assert_eq!(b.bootstrap(w, "a"), Ok(w));
    assert_eq!(b.bootstrap(w, "a"), Ok(w));
    assert_eq!(b.bootstrap(w, "b"), Err(ServerError::Unauthorised));
}

#[test]
fn an_untied_job_goes_to_a_free_online_worker_and_survives_one_that_is_lost() {
    let mut b = server_test();
    let job = b.job();
    let lost = b.worker(None);
    b.s.destroy(b.factory, lost).unwrap();
    let held = b.online(None);
    b.s.hold(held, "look").unwrap();
    b.s.tick();
    assert_eq!(b.s.jobs[&job].state(), "queued");
    let w = b.online(None);
    b.s.tick();
    assert_eq!(b.s.jobs[&job].worker, Some(w));
    assert_eq!(b.s.worker_ping(w).job.unwrap().id, job.to_string());
}

#[test]
fn a_tied_job_fails_with_its_worker_before_it_starts() {
    let mut b = server_test();
    let job = b.job();
    let w = b.worker(Some(job));
    assert_eq!(b.s.destroy(b.factory, w), Ok(true));
    assert_eq!(b.s.destroy(b.factory, w), Ok(true));
    assert_eq!(b.s.jobs[&job].progress, Progress::Failed);
}

#[test]
fn a_job_is_held_back_until_the_flush() {
    let mut b = server_test();
    let job = b.job();
    let w = b.s.create_worker(b.factory, b.target, Some(job), true).unwrap();
    b.associate(w, "slot").unwrap();
    b.bootstrap(w, "t").unwrap();
    assert!(b.s.worker_ping(w).job.is_none());
    b.s.flush(b.factory, w).unwrap();
    assert!(b.s.worker_ping(w).job.is_some());
}

#[test]
fn a_failed_worker_is_held_then_recycled_upon_release() {
    let mut b = server_test();
    let job = b.job();
    let w = b.online(Some(job));
    b.s.factory_fail(b.factory, w, "no disk").unwrap();
    let shown = b.s.workers[&w].to_factory();
    assert!(shown.hold && !shown.recycle && !b.s.worker_ping(w).poweroff);
    assert_eq!(b.s.jobs[&job].progress, Progress::Failed);
    let reason = b.s.workers[&w].hold.clone().unwrap().reason;
    b.s.factory_fail(b.factory, w, "again").unwrap();
    assert_eq!(b.s.workers[&w].hold.as_ref().unwrap().reason, reason);
    b.s.release(w).unwrap();
    let shown = b.s.workers[&w].to_factory();
    assert!(!shown.hold && shown.recycle && b.s.worker_ping(w).poweroff);
    b.s.factory_fail(b.factory, w, "after all").unwrap();
    assert!(b.s.workers[&w].hold.is_none());
}

#[test]
fn a_completed_job_recycles_its_worker_but_not_while_held() {
    let mut b = server_test();
    let job = b.job();
    let w = b.online(Some(job));
    b.s.hold(w, "look").unwrap();
    b.s.finish(job, false);
    b.s.tick();
    assert!(!b.s.workers[&w].must_recycle());
    b.s.release(w).unwrap();
    assert!(b.s.workers[&w].must_recycle());
    assert_eq!(b.s.jobs[&job].progress, Progress::Completed);
}

#[test]
fn idle_silent_and_overlong_workers_are_dealt_with() {
    let mut b = server_test();
    let (never, idle) = (b.worker(None), b.online(None));
    for _ in 0..31 {
        b.s.worker_ping(idle);
        b.pass(60 * SECOND);
    }
    assert!(b.s.workers[&idle].must_recycle() && !b.s.workers[&never].must_recycle());

    let silent = b.online(None);
    b.pass(601 * SECOND);
    assert!(b.s.workers[&silent].hold.is_some() && b.s.workers[&never].hold.is_none());

    let job =
        b.s.submit_spec(JobSpec {
            max_runtime: 5 * SECOND,
            ..JobSpec::script("lab", "sleep")
        })
        .unwrap();
    let slow = b.online(Some(job));
    b.pass(6 * SECOND);
    assert_eq!(b.s.jobs[&job].progress, Progress::Failed);
    assert!(b.s.workers[&slow].must_recycle());
}

#[test]
fn a_cancelled_job_fails_and_its_worker_is_recycled() {
    let mut b = server_test();
    let (queued, running) = (b.job(), b.job());
    let w = b.online(Some(running));
    b.s.cancel(queued).unwrap();
    b.s.cancel(running).unwrap();
    b.s.tick();
    assert_eq!(
        (b.s.jobs[&queued].state(), b.s.jobs[&running].state()),
        ("failed", "failed")
    );
    assert!(b.s.workers[&w].must_recycle());
}

#[test]
fn a_factorys_line_is_kept_for_later_until_there_is_a_job() {
    let mut b = server_test();
    let line = || Append {
        stream: "console".to_string(),
        time: jiff::Timestamp::UNIX_EPOCH,
        payload: "boot".to_string(),
        task: None,
    };
    let w = b.online(None);
    assert_eq!(b.s.factory_append(b.factory, w, line()), Ok(true));
    let job = b.job();
    b.s.tick();
    assert_eq!(b.s.factory_append(b.factory, w, line()), Ok(false));
    assert_eq!(b.s.jobs[&job].events.last().unwrap().payload, "boot");
    let never = b.worker(None);
    b.s.recycle(never).unwrap();
    assert_eq!(b.s.factory_append(b.factory, never, line()), Ok(false));
}
