//! Carrying out orders, in processes that the daemon makes for them. The daemon itself looks at nothing but
//! the order.

use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::SigSet;
use protocol::{Received, Seqpacket, WorkerId};
use tracing::warn;

use crate::host::{Host, open_dir};
use crate::orders::{Order, Word};
use crate::view::View;
use crate::worker::{self, Record, Written};
use crate::{limits, sandbox, sys};

/// Take the next order and have it carried out. True if what jobs see was built again for it.
pub fn take_order(host: &Host, view: &mut View, orders: &Seqpacket) -> bool {
    let mut built = false;
    let (bytes, answer) = match orders.recv(Order::MAX) {
        Ok(Received::Packet {
            bytes,
            mut descriptors,
        }) => match descriptors.pop() {
            Some(answer) => (bytes, Seqpacket::from(answer)),
            None => return false,
        },
        _ => return false,
    };
    let begun = match Order::decode(&bytes) {
        Some(Order::Launch { worker, bootstrap }) => {
            // A job sees the host as it is when it starts.
            view.refresh(host).and_then(|anew| {
                built = anew;
                launch(host, worker, &bootstrap, &answer)
            })
        }
        Some(Order::Unlimit { worker }) => unlimit(host, worker, &answer),
        None => Err(anyhow!("an order of {} bytes is none", bytes.len())),
    };
    if let Err(error) = begun {
        warn!("an order was not carried out: {error:#}");
        // Who asked may be gone.
        let _ = Word::Failed(format!("{error:#}")).say(&answer);
    }
    built
}

/// Does who asked still wait? It holds the worker's lock for as long as it lives. Once it is dead, the worker may be
/// another's.
fn is_waited_for(asker: &Seqpacket) -> Result<()> {
    let mut events = [PollFd::new(asker.as_fd(), PollFlags::empty())];
    poll(&mut events, PollTimeout::ZERO)?;
    ensure!(events[0].any() == Some(false), "who asked for it is gone");
    Ok(())
}

/// Make the worker's first process, in its cgroup and its namespaces from the first instruction.
fn launch(
    host: &Host,
    worker: WorkerId,
    bootstrap: &protocol::BootstrapToken,
    connection: &Seqpacket,
) -> Result<()> {
    let cgroup = open_dir(&host.cgroups, worker.to_string()).context("the worker has no cgroup")?;
    // With the cgroup open: it is that of who asked, and not one in which another has its first process.
    is_waited_for(connection)?;
    sys::clone_sandboxed(cgroup.as_fd(), || {
        let prepared = forget_all_but(host, connection)
            .and_then(|()| sandbox::enter(host, worker, bootstrap, connection));
        match prepared {
            Ok(job) => job.start(connection),
            Err(error) => failed(connection, &error),
        }
    })
    .context("cannot make the worker's namespaces")?;
    Ok(())
}

/// Forget the quota of a worker that has nothing on disk any more.
fn unlimit(host: &Host, worker: WorkerId, connection: &Seqpacket) -> Result<()> {
    is_waited_for(connection)?;
    sys::fork(|| {
        let work = || -> Result<()> {
            forget_all_but(host, connection)?;
            let record = record_of(host, worker)?;
            limits::of_disk(host, record.uid, None, None)
        };
        match work() {
            Ok(()) => i32::from(Word::Done.say(connection).is_err()),
            Err(error) => failed(connection, &error),
        }
    })
    .context("cannot fork")?;
    Ok(())
}

/// The listening socket, the lock, and the way back to the host's mounts are the daemon's alone.
fn forget_all_but(host: &Host, connection: &Seqpacket) -> Result<()> {
    sys::close_all_but(&[&host.descriptors()[..], &[connection.as_raw_fd()]].concat())?;
    Ok(SigSet::empty().thread_set_mask()?)
}

fn failed(connection: &Seqpacket, error: &anyhow::Error) -> i32 {
    let _ = Word::Failed(format!("{error:#}")).say(connection);
    1
}

/// The record, from the disk.
pub fn record_of(host: &Host, worker: WorkerId) -> Result<Record> {
    let dir = open_dir(&host.workers, worker.to_string())?;
    match worker::read_record(&dir, worker)? {
        Written::Record(record) => Ok(record),
        _ => bail!("worker {worker} has no record"),
    }
}
