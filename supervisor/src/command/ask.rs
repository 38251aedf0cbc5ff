//! The commands that ask a running factory.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use protocol::{SlotName, WorkerId};
use supervisor::control::api::Status;
use supervisor::control::client::{Client, Error};
use supervisor::control::procs;
use supervisor::settings::Places;

use super::print::{self, Visible};
use super::{ATTENTION, DONE, FAILED, Location, NO_ANSWER, OutputFormat, print_error, say};

/// How often `status --watch` draws, and `drain --wait` asks.
const INTERVAL: Duration = Duration::from_secs(2);

/// While a followed console has no output, the factory is asked this often whether it still answers.
const IDLE_TIMEOUT: Duration = Duration::from_secs(20);

/// The exit status of a command that asks.
pub type CommandResult = Result<u8, Error>;

/// Carry out what asks; its error goes to standard error.
pub fn with_client(at: &Location, asking: impl AsyncFnOnce(Client) -> CommandResult) -> u8 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let ended = match runtime {
        Ok(runtime) => Client::new(&Places::below(&at.root).control_socket())
            .and_then(|client| runtime.block_on(asking(client))),
        Err(error) => Err(Error::Refused(format!("cannot start the runtime: {error}"))),
    };
    match ended {
        Ok(status) => status,
        Err(error) => {
            print_error(&format!("user-factory: {error}"));
            if matches!(error, Error::Away(_)) {
                NO_ANSWER
            } else {
                FAILED
            }
        }
    }
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string_pretty(value)
        .map(|text| text + "\n")
        .unwrap_or_default()
}

pub async fn status(client: Client, output: OutputFormat, watch: bool) -> CommandResult {
    loop {
        let status = match client.status().await {
            Ok(status) => status,
            // What is watched may be restarted.
            Err(error @ Error::Away(_)) if watch => {
                say(&format!("\x1b[H\x1b[2J{error}\n"));
                tokio::time::sleep(INTERVAL).await;
                continue;
            }
            Err(error) => return Err(error),
        };
        if output.json {
            say(&json(&status));
        } else if watch {
            say(&format!("\x1b[H\x1b[2J{}", print::status(&status)));
            tokio::time::sleep(INTERVAL).await;
            continue;
        } else {
            say(&print::status(&status));
        }
        return Ok(if needs_operator(&status) { ATTENTION } else { DONE });
    }
}

fn needs_operator(status: &Status) -> bool {
    let both = [&status.server, &status.helper];
    let both_answer = both.iter().all(|peer| peer.reachable == Some(true));
    status.workers.iter().any(|worker| worker.hold.is_some())
        || status.slots.iter().any(|slot| slot.state.needs_operator())
        || both
            .iter()
            .any(|peer| peer.reachable == Some(false) || peer.unanswered_since.is_some())
        // Before the first answers nothing is wrong yet.
        || (status.not_taken.is_some() && !status.draining && both_answer)
        || status.configuration.refused.is_some()
        || !status.foreign.is_empty()
        || status.storage.is_some()
}

pub async fn workers(client: Client, output: OutputFormat) -> CommandResult {
    let status = client.status().await?;
    say(&if output.json {
        json(&status.workers)
    } else {
        print::workers(&status)
    });
    Ok(DONE)
}

pub async fn show(client: Client, worker: WorkerId, output: OutputFormat) -> CommandResult {
    let mut details = client.details(worker).await?;
    procs::complete(&mut details);
    let now = client.status().await?.now;
    say(&if output.json {
        json(&details)
    } else {
        print::details(&details, now)
    });
    Ok(DONE)
}

/// A console is a job's own text: on a terminal its escapes are shown, not obeyed.
pub async fn logs(client: Client, worker: WorkerId, follow: bool) -> CommandResult {
    let mut answer = client.console(worker, follow).await?;
    let mut out = io::stdout().lock();
    let mut visible = out.is_terminal().then(Visible::default);
    loop {
        let chunk = tokio::select! {
            chunk = answer.chunk() => chunk,
            // A job may print nothing for hours; the factory must answer.
            () = tokio::time::sleep(IDLE_TIMEOUT) => {
                client.status().await?;
                continue;
            }
        };
        let Some(bytes) = chunk.map_err(|e| Error::Away(format!("the console was cut off: {e}")))? else {
            return Ok(DONE);
        };
        let written = match &mut visible {
            Some(visible) => out.write_all(visible.next(&bytes).as_bytes()),
            None => out.write_all(&bytes),
        };
        if written.and_then(|()| out.flush()).is_err() {
            return Ok(DONE);
        }
    }
}

pub async fn drain(client: Client, slot: Option<SlotName>, wait: bool) -> CommandResult {
    client.drain(slot.as_ref(), true).await?;
    if !wait {
        return Ok(DONE);
    }
    let mut said = String::new();
    loop {
        let status = client.status().await?;
        let left: Vec<_> = status
            .slots
            .iter()
            .filter(|s| slot.as_ref().is_none_or(|slot| *slot == s.name))
            .filter(|s| s.worker.is_some() || s.job.is_some())
            .collect();
        if left.is_empty() {
            return Ok(DONE);
        }
        let names = left
            .iter()
            .map(|slot| print::waiting_for(slot, &status))
            .collect::<Vec<_>>()
            .join("; ");
        if said != names {
            print_error(&format!("waiting for {names}"));
            said = names;
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

pub async fn resume(client: Client, slot: Option<SlotName>) -> CommandResult {
    client.drain(slot.as_ref(), false).await?;
    if let Some(slot) = slot
        && client.status().await?.draining
    {
        print_error(&format!(
            "all slots are drained: slot {slot} takes no jobs before `user-factory resume`"
        ));
    }
    Ok(DONE)
}

pub async fn kill(client: Client, worker: WorkerId) -> CommandResult {
    client.kill(worker).await.map(|()| DONE)
}

pub async fn destroy(client: Client, worker: WorkerId, yes: bool) -> CommandResult {
    if !yes {
        let foreign = client.status().await?.foreign;
        if let Some(foreign) = foreign.iter().find(|foreign| foreign.id == worker) {
            return Err(Error::Refused(format!(
                "{}. Its job fails, wherever it runs: add --yes to do it",
                foreign.text.split(". ").next().unwrap_or_default()
            )));
        }
        let details = client.details(worker).await?;
        let job = details
            .worker
            .job
            .map(|job| format!(", job {job}"))
            .unwrap_or_default();
        return Err(Error::Refused(format!(
            "worker {worker} (slot {}, {}{job}) would be deleted with all that it has written: add --yes to do it",
            details.worker.slot, details.worker.phase
        )));
    }
    client.destroy(worker).await.map(|()| DONE)
}

pub async fn reload(client: Client) -> CommandResult {
    client.reload().await.map(|()| DONE)
}
