//! Connections end with their worker, whatever their servers do.

use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, PoisonError};

use protocol::WorkerId;
use tokio::sync::watch;

/// Workers that have connections, each with its uid. That the sender is dropped tells the connections that the worker is gone.
#[derive(Debug, Default)]
pub(super) struct Workers(Mutex<HashMap<WorkerId, (u32, watch::Sender<()>)>>);

/// Tells one connection that its worker is gone.
#[derive(Clone, Debug)]
pub(super) struct WorkerGone(watch::Receiver<()>);

impl Workers {
    pub(super) fn connection_of(&self, worker: WorkerId, uid: u32) -> WorkerGone {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, sender) = all.entry(worker).or_insert_with(|| (uid, watch::Sender::new(())));
        WorkerGone(sender.subscribe())
    }

    /// End the connections of workers that are gone: whose uid is nobody's, or another worker's. Where that cannot be known now,
    /// they go on.
    pub(super) fn remove_gone(&self, worker_with: impl Fn(u32) -> io::Result<Option<WorkerId>>) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|worker, (uid, sender)| {
            !sender.is_closed() && worker_with(*uid).map_or(true, |found| found == Some(*worker))
        });
    }
}

impl WorkerGone {
    /// Returns when the worker is gone.
    pub(super) async fn wait(&mut self) {
        while self.0.changed().await.is_ok() {}
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn a_connection_is_told_that_its_worker_is_gone_though_another_has_its_uid() {
        let (first, second) = (WorkerId::from_bits(1), WorkerId::from_bits(2));
        let workers = Workers::default();
        let mut connection = workers.connection_of(first, 7);
        workers.remove_gone(|uid| Ok((uid == 7).then_some(first)));
        workers.remove_gone(|_| Err(io::ErrorKind::OutOfMemory.into()));
        assert!(connection.wait().now_or_never().is_none());
        let mut other = workers.connection_of(second, 7);
        workers.remove_gone(|_| Ok(Some(second)));
        assert!(connection.wait().now_or_never().is_some());
        assert!(other.wait().now_or_never().is_none());
        workers.remove_gone(|_| Ok(None));
        assert!(other.wait().now_or_never().is_some());
        // Nothing is kept of a worker without connections.
        drop(workers.connection_of(first, 7));
        workers.remove_gone(|_| Ok(Some(first)));
        assert!(workers.0.lock().unwrap().is_empty());
    }
}
