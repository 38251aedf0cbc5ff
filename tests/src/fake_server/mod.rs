//! A fake buildomat server: the same paths, bodies and status codes over real HTTP, with its state
//! in memory and its clock set by the test.
//!
//! The rules are pure (`state`, `jobs`, `tick`), the HTTP is thin (`http*`), and [`Server`] is what a
//! test holds. It must never be easier on a factory than the real server is.

mod http;
mod http_factory;
mod http_file;
mod http_user;
mod http_worker;
mod jobs;
pub(crate) mod json;
mod net;
mod shared;
mod state;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_http;
mod tick;
mod types;
mod ulid;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use axum::body::Bytes;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub use jobs::MAX_CHUNK;
pub use json::{AddFileResult, Associate, Id, JobEvent, JobOutput, JobSubmit, TaskSubmit};
pub use shared::{Behaviour, Outage};
pub use state::{LEASE, State};
pub use types::{
    Factory, Hold, Input, Job, JobSpec, Lease, MAX_RUNTIME, Progress, ServerError, StoreEntry, Task, Worker,
};
pub use ulid::{IdGenerator, Ulid, fresh_id, secret};

#[derive(Clone, Debug)]
/// What a server is started with.
pub struct ServerOptions {
    /// Port 0 takes any free one.
    pub listen: SocketAddr,
    /// The agent's binary for `/file/`; without one it is not found.
    pub agent: Option<PathBuf>,
    /// How often, in real time, the server looks after its jobs and workers.
    pub tick: Duration,
}

impl Default for ServerOptions {
    fn default() -> ServerOptions {
        ServerOptions {
            listen: ([127, 0, 0, 1], 0).into(),
            agent: None,
            tick: Duration::from_millis(100),
        }
    }
}

#[derive(Debug)]
struct Running {
    stop: oneshot::Sender<()>,
    serve: JoinHandle<io::Result<()>>,
    ticker: JoinHandle<()>,
}

/// A test's handle on the server. Dropping it ends the server.
#[derive(Debug)]
pub struct Server {
    app: shared::App,
    address: SocketAddr,
    tick: Duration,
    running: Mutex<Option<Running>>,
}

impl Server {
    /// Must be called within a tokio runtime. An error where the address cannot be listened at.
    pub async fn start(options: ServerOptions) -> Result<Server> {
        let listener = TcpListener::bind(options.listen).await;
        let listener = listener.with_context(|| format!("cannot listen on {}", options.listen))?;
        let server = Server {
            app: Arc::new(shared::Shared::new(options.agent)),
            address: listener
                .local_addr()
                .context("the listening address is unknown")?,
            tick: options.tick,
            running: Mutex::default(),
        };
        server.launch(listener);
        Ok(server)
    }

    fn launch(&self, listener: TcpListener) {
        let (stop, stopped) = oneshot::channel::<()>();
        let listener = net::SwitchableListener {
            listener,
            dead: self.app.dead.clone(),
        };
        let serving =
            axum::serve(listener, http::router(self.app.clone())).with_graceful_shutdown(async move {
                stopped.await.ok();
            });
        let (app, mut interval) = (self.app.clone(), tokio::time::interval(self.tick));
        let ticker = tokio::spawn(async move {
            loop {
                interval.tick().await;
                app.with(State::tick);
            }
        });
        let running = Running {
            stop,
            serve: tokio::spawn(serving.into_future()),
            ticker,
        };
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = Some(running);
    }

    /// Ends the server: requests under way get a moment to finish, then the port is closed.
    pub async fn stop(&self) {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(running) = running else { return };
        running.ticker.abort();
        running.stop.send(()).ok();
        let mut serve = running.serve;
        if tokio::time::timeout(Duration::from_secs(2), &mut serve)
            .await
            .is_err()
        {
            serve.abort();
        }
    }

    /// Starts again on the same port with what was there; leases are forgotten, as the real server
    /// keeps them in memory only.
    pub async fn restart(&self) -> Result<()> {
        self.stop().await;
        let listener = TcpListener::bind(self.address).await;
        let listener = listener.with_context(|| format!("cannot listen on {} again", self.address))?;
        self.app.with(|s| s.leases.clear());
        self.launch(listener);
        Ok(())
    }

    /// As `general.baseurl` takes it.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The port is the one that was chosen, where the options said 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The one user's token, which is the administrator's too.
    pub fn user_token(&self) -> String {
        self.app.read(|s| s.user_token.clone())
    }

    /// Changes anything.
    pub fn with<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        self.app.with(change)
    }

    /// Its id; names need not differ.
    pub fn add_target(&self, name: &str) -> Ulid {
        self.with(|s| s.add_target(name))
    }

    /// Its id and its token.
    pub fn add_factory(&self, name: &str) -> (Ulid, String) {
        self.with(|s| s.add_factory(name))
    }

    /// As a user of the server would, with the inputs uploaded.
    pub fn submit_job(&self, spec: JobSpec) -> Result<Ulid, ServerError> {
        self.with(|s| s.submit_spec(spec))
    }

    /// A snapshot; panics on an id that this server never gave.
    pub fn job(&self, job: Ulid) -> Job {
        self.app.read(|s| s.jobs[&job].clone())
    }

    /// The job's log so far; panics on an id that this server never gave.
    pub fn events(&self, job: Ulid) -> Vec<JobEvent> {
        self.app.read(|s| s.jobs[&job].events.clone())
    }

    /// What the job has uploaded so far; panics on an id that this server never gave.
    pub fn outputs(&self, job: Ulid) -> Vec<JobOutput> {
        self.app.read(|s| s.jobs[&job].outputs.clone())
    }

    /// An output's bytes, by its path.
    pub fn output(&self, job: Ulid, path: &str) -> Option<Bytes> {
        self.app.read(|s| {
            let j = &s.jobs[&job];
            let id = j.outputs.iter().find(|o| o.path == path)?.id;
            j.files.get(&id).cloned()
        })
    }

    /// A snapshot; panics on an id that this server never gave.
    pub fn worker(&self, worker: Ulid) -> Worker {
        self.app.read(|s| s.workers[&worker].clone())
    }

    /// All there ever were, deleted ones too, oldest first.
    pub fn workers(&self) -> Vec<Worker> {
        self.app.read(|s| s.workers.values().cloned().collect())
    }

    /// As its user would: see [`State::cancel`].
    pub fn cancel(&self, job: Ulid) -> Result<(), ServerError> {
        self.with(|s| s.cancel(job))
    }

    /// As an operator would: see [`State::hold`].
    pub fn hold(&self, worker: Ulid) -> Result<(), ServerError> {
        self.with(|s| s.hold(worker, "held by an operator"))
    }

    /// As an operator would: see [`State::release`].
    pub fn release(&self, worker: Ulid) -> Result<(), ServerError> {
        self.with(|s| s.release(worker))
    }

    /// As an operator would: see [`State::recycle`].
    pub fn recycle(&self, worker: Ulid) -> Result<(), ServerError> {
        self.with(|s| s.recycle(worker))
    }

    /// Moves the server's clock on, and lets everything that is then due happen at once.
    pub fn advance(&self, by: Duration) {
        self.app.advance(by);
    }

    /// From now on, also for connections that are open.
    pub fn set_outage(&self, outage: Outage) {
        self.behave(|b| b.outage = outage);
    }

    pub(crate) fn behave(&self, change: impl FnOnce(&mut Behaviour)) {
        self.app.behave(change);
    }

    /// How many requests have arrived at a route, as in `"POST /0/factory/lease"`.
    pub fn requests(&self, route: &str) -> u64 {
        self.app.requests().get(route).copied().unwrap_or(0)
    }

    /// The same for every route that was ever asked.
    pub fn all_requests(&self) -> BTreeMap<String, u64> {
        self.app.requests()
    }

    /// Waits until the state shows what is wanted, looking again at each change and each request.
    pub async fn wait_for<T>(
        &self,
        timeout: Duration,
        mut see: impl FnMut(&State) -> Option<T>,
    ) -> Result<T> {
        let mut changes = self.app.changes();
        let seen = async {
            loop {
                if let Some(found) = self.app.read(|s| see(s)) {
                    return found;
                }
                if changes.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        tokio::time::timeout(timeout, seen)
            .await
            .context("the server never came to the awaited state")
    }

    /// The common wait: until the job has ended.
    pub async fn wait_job(&self, job: Ulid, timeout: Duration) -> Result<Job> {
        self.wait_for(timeout, |s| s.jobs.get(&job).filter(|j| j.is_complete()).cloned())
            .await
            .with_context(|| format!("job {job} did not end; its events: {:#?}", self.events(job)))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(running) = self
            .running
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
        {
            running.ticker.abort();
            running.serve.abort();
        }
    }
}
