//! The commands that ask a running factory.

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use jiff::civil::DateTime;
use jiff::{Span, Timestamp, Zoned};
use protocol::{SlotName, WorkerId};
use supervisor::control::api::{Drain, Status};
use supervisor::control::client::{Client, Error};
use supervisor::control::processes;
use supervisor::settings::Places;

use super::print::{self, EscapingDecoder};
use super::{ATTENTION, DONE, FAILED, Location, NO_ANSWER, OutputFormat, print_error, print_line};

/// How often `status --watch` draws, and `drain --wait` asks.
const INTERVAL: Duration = Duration::from_secs(2);

/// While a followed console has no output, the factory is asked this often whether it still answers.
const IDLE_TIMEOUT: Duration = Duration::from_secs(20);

/// The exit status of a command that asks.
pub type CommandResult = Result<u8, Error>;

/// Ask the factory below `root`.
pub fn ask<T>(root: &Path, asking: impl AsyncFnOnce(Client) -> Result<T, Error>) -> Result<T, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Error::Refused(format!("cannot start the runtime: {error}")))?;
    let client = Client::new(&Places::below(root).control_socket())?;
    runtime.block_on(asking(client))
}

/// Carry out what asks; its error goes to standard error.
pub fn with_client(at: &Location, asking: impl AsyncFnOnce(Client) -> CommandResult) -> u8 {
    match ask(&at.root, asking) {
        Ok(status) => status,
        Err(error) => {
            print_error(&format!("user-factory: {error}"));
            if matches!(error, Error::Unreachable(_)) {
                NO_ANSWER
            } else {
                FAILED
            }
        }
    }
}

/// A value as `--json` prints it.
pub fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string_pretty(value)
        .map(|text| text + "\n")
        .unwrap_or_default()
}

pub async fn status(client: Client, output: OutputFormat, watch: bool) -> CommandResult {
    loop {
        let status = match client.status().await {
            Ok(status) => status,
            // What is watched may be restarted.
            Err(error @ Error::Unreachable(_)) if watch => {
                print_line(&format!("\x1b[H\x1b[2J{error}\n"));
                tokio::time::sleep(INTERVAL).await;
                continue;
            }
            Err(error) => return Err(error),
        };
        if output.json {
            print_line(&json(&status));
        } else if watch {
            print_line(&format!("\x1b[H\x1b[2J{}", print::status(&status)));
            tokio::time::sleep(INTERVAL).await;
            continue;
        } else {
            print_line(&print::status(&status));
        }
        return Ok(if needs_operator(&status) { ATTENTION } else { DONE });
    }
}

/// Is all not well? Nor is it before the server and the helper have both answered: a script may wait for 0 after a start.
fn needs_operator(status: &Status) -> bool {
    let both = [&status.server, &status.helper];
    status.workers.iter().any(|worker| worker.hold.is_some())
        || status
            .slots
            .iter()
            .any(|slot| slot.state.needs_operator() || slot.is_unresolved())
        || both
            .iter()
            .any(|peer| peer.reachable != Some(true) || peer.unanswered_since.is_some())
        || (status.not_taken.is_some() && !status.draining)
        || status.configuration.refused.is_some()
        || !status.foreign.is_empty()
        || status.storage.is_some()
        || status
            .selftest
            .as_ref()
            .is_some_and(|last| last.failure.is_some())
}

pub async fn workers(client: Client, output: OutputFormat) -> CommandResult {
    let status = client.status().await?;
    print_line(&if output.json {
        json(&status.workers)
    } else {
        print::workers(&status)
    });
    Ok(DONE)
}

pub async fn show(client: Client, worker: WorkerId, output: OutputFormat) -> CommandResult {
    let mut details = client.details(worker).await?;
    processes::fill_details(&mut details);
    let now = client.status().await?.now;
    print_line(&if output.json {
        json(&details)
    } else {
        print::details(&details, now)
    });
    Ok(DONE)
}

pub async fn egress(client: Client, slot: SlotName, output: OutputFormat) -> CommandResult {
    let report = client.egress(&slot).await?;
    print_line(&if output.json {
        json(&report)
    } else {
        print::egress(&slot, &report)
    });
    Ok(DONE)
}

/// A console is a job's own text: on a terminal its escapes are shown, not obeyed.
pub async fn logs(client: Client, worker: WorkerId, follow: bool) -> CommandResult {
    let mut answer = client.console(worker, follow).await?;
    let mut out = io::stdout().lock();
    let mut visible = out.is_terminal().then(EscapingDecoder::default);
    loop {
        let chunk = tokio::select! {
            chunk = answer.chunk() => chunk,
            // A job may print nothing for hours; the factory must answer.
            () = tokio::time::sleep(IDLE_TIMEOUT) => {
                client.status().await?;
                continue;
            }
        };
        let Some(bytes) = chunk.map_err(|e| Error::Unreachable(format!("the console was cut off: {e}")))?
        else {
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

/// When a drain ends: a duration from now, or a time (RFC 3339, or one of the host's time zone).
fn drain_end(text: &str, now: &Zoned) -> Result<Timestamp, String> {
    let refused = || {
        format!(
            "{text:?} is no time and no duration: write one such as 90m, 2h30m, 3d, 2026-12-01T08:00 or 2026-12-01T08:00:00Z"
        )
    };
    if let Ok(span) = text.parse::<Span>() {
        let end = now.checked_add(span).map_err(|_| refused())?;
        return Ok(end.timestamp());
    }
    if let Ok(end) = text.parse::<Timestamp>() {
        return Ok(end);
    }
    let local: DateTime = text.parse().map_err(|_| refused())?;
    let end = local.to_zoned(now.time_zone().clone()).map_err(|_| refused())?;
    Ok(end.timestamp())
}

/// When a drain ends, from the text of `--until`.
pub fn end_from_now(text: &str) -> Result<Timestamp, String> {
    let now = Zoned::now();
    drain_end(text, &now.round(jiff::Unit::Second).unwrap_or(now))
}

pub async fn drain(client: Client, drain: Drain, wait: bool) -> CommandResult {
    client.drain(&drain).await?;
    let slot = drain.slot;
    if !wait {
        return Ok(DONE);
    }
    let mut printed = String::new();
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
        if printed != names {
            print_error(&format!("waiting for {names}"));
            printed = names;
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

pub async fn resume(client: Client, slot: Option<SlotName>) -> CommandResult {
    client.resume(slot.as_ref()).await?;
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status(server: Option<bool>, helper: Option<bool>, not_taken: Option<&str>, draining: bool) -> Status {
        let now = "2026-01-01T00:00:00Z";
        let peer = |reachable: Option<bool>| json!({ "address": "a", "reachable": reachable, "since": now, "trouble": null });
        let status = json!({
            "version": "1", "protocol": 1, "now": now, "started": now,
            "configuration": { "path": "c", "loaded": now, "refused": null },
            "server": peer(server), "helper": peer(helper), "draining": draining,
            "slots": [], "workers": [], "not_taken": not_taken, "troubles": [],
        });
        serde_json::from_value(status).unwrap()
    }

    #[test]
    fn a_drain_ends_after_a_duration_or_at_a_time() {
        let now: Zoned = "2026-11-28T12:00:00+01:00[Europe/Berlin]".parse().unwrap();
        for (text, end) in [
            ("90m", Some("2026-11-28T12:30:00Z")),
            ("2h30m", Some("2026-11-28T13:30:00Z")),
            ("1d", Some("2026-11-29T11:00:00Z")),
            ("2026-12-01T08:00", Some("2026-12-01T07:00:00Z")),
            ("2026-12-01 08:00", Some("2026-12-01T07:00:00Z")),
            ("2026-12-01T08:00:00Z", Some("2026-12-01T08:00:00Z")),
            ("tomorrow", None),
            ("", None),
            ("5", None),
            ("999999999d", None),
        ] {
            let end: Option<Timestamp> = end.map(|end| end.parse().unwrap());
            assert_eq!(drain_end(text, &now).ok(), end, "{text}");
        }
    }

    #[test]
    fn all_is_well_once_the_server_and_the_helper_have_answered_and_jobs_are_taken() {
        let (yes, no) = (Some(true), Some(false));
        for (server, helper, not_taken, draining, well) in [
            (yes, yes, None, false, true),
            (yes, yes, Some("drained"), true, true),
            (yes, yes, Some("the server answers 500"), false, false),
            (yes, yes, Some("neither list has been compared"), false, false),
            // Just started.
            (None, None, Some("neither has answered"), false, false),
            (None, None, Some("drained"), true, false),
            (yes, None, Some("the helper has not answered"), false, false),
            (None, yes, Some("the server has not answered"), false, false),
            (no, yes, Some("unreachable"), false, false),
            (yes, no, Some("unreachable"), true, false),
        ] {
            let status = status(server, helper, not_taken, draining);
            assert_eq!(!needs_operator(&status), well, "{status:?}");
        }
    }
}
