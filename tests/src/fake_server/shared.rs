//! What the handlers, the ticker and the tests' handle share: the state behind one lock, the clock that
//! can be moved, who is told of each change, and how the server is to misbehave.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Bytes;
use jiff::{SignedDuration, Timestamp};
use tokio::sync::{OnceCell, watch};

use super::state::State;

/// How the server cannot be reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Outage {
    /// It answers.
    #[default]
    None,
    /// Connections are closed without an answer, the open ones at their next byte.
    Closed,
    /// Every request is answered 503, with no body, as a proxy would.
    Unavailable,
}

/// How the server differs from an obliging new one. All of it can be changed while it runs.
#[derive(Clone, Debug, Default)]
pub struct Behaviour {
    pub(crate) outage: Outage,
    /// 404 to `/file/agent.gz`.
    pub no_gzip: bool,
    /// 404 to `/file/agent`.
    pub no_plain: bool,
    /// Offer an ETag and honour `If-None-Match` on `/file/`; the real server does not.
    pub etag: bool,
    /// Break off a download of the agent after so many bytes.
    pub truncate_agent: Option<usize>,
}

pub type App = Arc<Shared>;

#[derive(Debug)]
pub struct Shared {
    inner: Mutex<(State, SignedDuration)>,
    changed: watch::Sender<()>,
    behaviour: Mutex<Behaviour>,
    requests: Mutex<BTreeMap<String, u64>>,
    pub dead: Arc<AtomicBool>,
    pub agent: Option<PathBuf>,
    pub agent_plain: OnceCell<Bytes>,
    pub agent_gzip: OnceCell<Bytes>,
}

/// A test that panics within a closure should not hide its message behind a poisoned lock.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub fn new(agent: Option<PathBuf>) -> Shared {
        Shared {
            inner: Mutex::new((State::new(Timestamp::now()), SignedDuration::ZERO)),
            changed: watch::Sender::new(()),
            behaviour: Mutex::default(),
            requests: Mutex::default(),
            dead: Arc::default(),
            agent,
            agent_plain: OnceCell::new(),
            agent_gzip: OnceCell::new(),
        }
    }

    /// Changes the state, at the server's present time, and tells those who wait for a change.
    pub fn with<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        let answer = self.read(change);
        self.changed.send_replace(());
        answer
    }

    /// Reads the state, at the server's present time; nobody is told.
    pub fn read<R>(&self, see: impl FnOnce(&mut State) -> R) -> R {
        let (state, offset) = &mut *lock(&self.inner);
        state.now = Timestamp::now() + *offset;
        see(state)
    }

    pub fn advance(&self, by: Duration) {
        lock(&self.inner).1 += SignedDuration::try_from(by).expect("a test moves the clock by little");
        self.with(State::tick);
    }

    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    pub fn behaviour(&self) -> Behaviour {
        lock(&self.behaviour).clone()
    }

    pub fn behave(&self, change: impl FnOnce(&mut Behaviour)) {
        let mut behaviour = lock(&self.behaviour);
        change(&mut behaviour);
        self.dead
            .store(behaviour.outage == Outage::Closed, Ordering::Relaxed);
    }

    /// Counts a request, and tells those who wait: a test may wait for just that.
    pub fn count(&self, route: String) {
        *lock(&self.requests).entry(route).or_default() += 1;
        self.changed.send_replace(());
    }

    pub fn requests(&self) -> BTreeMap<String, u64> {
        lock(&self.requests).clone()
    }
}
