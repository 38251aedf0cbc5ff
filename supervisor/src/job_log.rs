//! Lines for jobs' logs, which are sent to the server one after the other.

use protocol::WorkerId;
use tokio::sync::mpsc::{Receiver, Sender, channel};

use crate::buildomat::BuildomatClient;

/// The most lines that wait. Further ones are in the supervisor's log alone.
const MAX_PENDING: usize = 1024;

/// A queue of lines. Clones of it are the same queue.
#[derive(Clone, Debug)]
pub struct JobLog(Sender<(WorkerId, String)>);

impl JobLog {
    /// An empty queue, and its other end, for [`send_lines`].
    pub fn new() -> (JobLog, Receiver<(WorkerId, String)>) {
        let (lines, pending) = channel(MAX_PENDING);
        (JobLog(lines), pending)
    }

    /// Queue a line for the job's log. It waits for nothing.
    pub fn queue(&self, worker: WorkerId, line: String) {
        let _ = self.0.try_send((worker, line));
    }
}

/// Send each line to the server. One that it does not take is lost: it is in the supervisor's log, too.
pub async fn send_lines(buildomat: BuildomatClient, mut lines: Receiver<(WorkerId, String)>) {
    while let Some((worker, line)) = lines.recv().await {
        if let Err(error) = buildomat.append(worker, &line).await {
            tracing::debug!(%worker, "a line is not in the job's log: {error}");
        }
    }
}
