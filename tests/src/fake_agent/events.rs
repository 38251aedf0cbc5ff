//! Lines on their way to a log: gathered into batches by one thread, in the order in which they came.

use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::thread::{JoinHandle, spawn};

use jiff::Timestamp;

use super::server_client::Client;
use crate::fake_server::json::Append;

const BATCH: usize = 100;

#[derive(Clone, Debug)]
pub struct Events {
    queue: SyncSender<Item>,
}

#[derive(Debug)]
enum Item {
    Line(Append),
    Flush(std::sync::mpsc::Sender<()>),
}

impl Events {
    /// Lines for a job's log, or without one for the worker's. The thread ends with the last handle.
    pub fn start(client: Client, job: Option<String>) -> (Events, JoinHandle<()>) {
        let (queue, lines) = sync_channel(4 * BATCH);
        (
            Events { queue },
            spawn(move || send_events(&client, job.as_deref(), &lines)),
        )
    }

    pub fn log(&self, task: Option<u32>, stream: &str, payload: impl Into<String>) {
        let (stream, payload) = (stream.to_string(), payload.into());
        self.queue
            .send(Item::Line(Append {
                stream,
                time: Timestamp::now(),
                payload,
                task,
            }))
            .ok();
    }

    /// Returns when everything logged so far is with the server.
    pub fn flush(&self) {
        let (done, flushed) = channel();
        if self.queue.send(Item::Flush(done)).is_ok() {
            flushed.recv().ok();
        }
    }
}

fn send_events(client: &Client, job: Option<&str>, lines: &Receiver<Item>) {
    while let Ok(first) = lines.recv() {
        let (mut batch, mut waiting) = (Vec::new(), Vec::new());
        let mut next = Some(first);
        while let Some(item) = next {
            match item {
                Item::Line(line) => batch.push(line),
                Item::Flush(done) => waiting.push(done),
            }
            next = if batch.len() < BATCH {
                lines.try_recv().ok()
            } else {
                None
            };
        }
        if !batch.is_empty()
            && let Err(e) = client.append(job, &batch)
        {
            eprintln!("ERROR: {} lines lost: {e:#}", batch.len());
        }
        drop(waiting);
    }
}
