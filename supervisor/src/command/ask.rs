//! The commands that ask a running factory.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use protocol::{SlotName, WorkerId};
use supervisor::control::api::Status;
use supervisor::control::client::{Client, Error};
use supervisor::control::procs;
use supervisor::settings::Places;

use super::print::{self, Visible};
use super::{ATTENTION, AWAY, DONE, FAILED, How, There, say, say_error};

/// How often `status --watch` draws, and `drain --wait` looks.
const LOOK: Duration = Duration::from_secs(2);

/// Who follows a console that says nothing asks this often whether the factory is there.
const SILENCE: Duration = Duration::from_secs(20);

/// The exit status of a command that asks.
pub type Ended = Result<u8, Error>;

/// Carry out what asks; its error goes to standard error.
pub fn ask(there: &There, asking: impl AsyncFnOnce(Client) -> Ended) -> u8 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let ended = match runtime {
        Ok(runtime) => Client::new(&Places::below(&there.root).control_socket())
            .and_then(|client| runtime.block_on(asking(client))),
        Err(error) => Err(Error::Refused(format!("cannot start the runtime: {error}"))),
    };
    match ended {
        Ok(status) => status,
        Err(error) => {
            say_error(&format!("user-factory: {error}"));
            if matches!(error, Error::Away(_)) {
                AWAY
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

pub async fn status(client: Client, how: How, watch: bool) -> Ended {
    loop {
        let status = match client.status().await {
            Ok(status) => status,
            // What is watched may be restarted.
            Err(error @ Error::Away(_)) if watch => {
                say(&format!("\x1b[H\x1b[2J{error}\n"));
                tokio::time::sleep(LOOK).await;
                continue;
            }
            Err(error) => return Err(error),
        };
        if how.json {
            say(&json(&status));
        } else if watch {
            say(&format!("\x1b[H\x1b[2J{}", print::status(&status)));
            tokio::time::sleep(LOOK).await;
            continue;
        } else {
            say(&print::status(&status));
        }
        return Ok(if wants_a_person(&status) { ATTENTION } else { DONE });
    }
}

fn wants_a_person(status: &Status) -> bool {
    let both = [&status.server, &status.helper];
    let both_answer = both.iter().all(|partner| partner.reachable == Some(true));
    status.workers.iter().any(|worker| worker.hold.is_some())
        || status.slots.iter().any(|slot| slot.state.wants_a_person())
        || both
            .iter()
            .any(|partner| partner.reachable == Some(false) || partner.unanswered_since.is_some())
        // Before the first answers nothing is wrong yet.
        || (status.not_taken.is_some() && !status.draining && both_answer)
        || status.configuration.refused.is_some()
        || !status.foreign.is_empty()
        || status.storage.is_some()
}

pub async fn workers(client: Client, how: How) -> Ended {
    let status = client.status().await?;
    say(&if how.json {
        json(&status.workers)
    } else {
        print::workers(&status)
    });
    Ok(DONE)
}

pub async fn show(client: Client, worker: WorkerId, how: How) -> Ended {
    let mut details = client.details(worker).await?;
    procs::complete(&mut details);
    let now = client.status().await?.now;
    say(&if how.json {
        json(&details)
    } else {
        print::details(&details, now)
    });
    Ok(DONE)
}

/// A console is a job's own text: on a terminal its escapes are shown, not obeyed.
pub async fn logs(client: Client, worker: WorkerId, follow: bool) -> Ended {
    let mut answer = client.console(worker, follow).await?;
    let mut out = io::stdout().lock();
    let mut visible = out.is_terminal().then(Visible::default);
    loop {
        let chunk = tokio::select! {
            chunk = answer.chunk() => chunk,
            // A job may say nothing for hours; the factory may not.
            () = tokio::time::sleep(SILENCE) => {
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

pub async fn drain(client: Client, slot: Option<SlotName>, wait: bool) -> Ended {
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
            say_error(&format!("waiting for {names}"));
            said = names;
        }
        tokio::time::sleep(LOOK).await;
    }
}

pub async fn resume(client: Client, slot: Option<SlotName>) -> Ended {
    client.drain(slot.as_ref(), false).await?;
    if let Some(slot) = slot
        && client.status().await?.draining
    {
        say_error(&format!(
            "all slots are drained: slot {slot} takes no jobs before `user-factory resume`"
        ));
    }
    Ok(DONE)
}

pub async fn kill(client: Client, worker: WorkerId) -> Ended {
    client.kill(worker).await.map(|()| DONE)
}

pub async fn destroy(client: Client, worker: WorkerId, yes: bool) -> Ended {
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

pub async fn reload(client: Client) -> Ended {
    client.reload().await.map(|()| DONE)
}
