//! `user-factory drain --at-shutdown`: what the package's unit does while the host is being shut down. systemd stops the
//! supervisor, the helper and the jobs only after this has ended.

use std::time::Duration;

use supervisor::control::api::{Slot, Status};
use supervisor::control::client::Client;
use supervisor::settings::{self, Places};
use tokio::time::{Instant, sleep};

use super::ask::{self, CommandResult};
use super::{DONE, FAILED, Location, print, print_error};

/// How often the supervisor is asked whether a job still runs.
const INTERVAL: Duration = Duration::from_secs(1);

/// Have the supervisor take no more jobs, and wait for those that run, as long as the configuration says.
pub fn wait(at: &Location) -> u8 {
    let path = Places::below(&at.root).config;
    let seconds = match settings::load(&path) {
        Ok(config) => config.factory.shutdown_wait_seconds,
        Err(mistakes) => {
            print_error(settings::print(&path, &mistakes).trim_end());
            return FAILED;
        }
    };
    match seconds {
        0 => DONE,
        seconds => ask::with_client(at, async |factory| wait_for_jobs(factory, seconds).await),
    }
}

async fn wait_for_jobs(client: Client, seconds: u64) -> CommandResult {
    let end = Instant::now() + Duration::from_secs(seconds);
    client.host_stops().await?;
    let mut printed = String::new();
    loop {
        let jobs = running(&client.status().await?);
        if jobs.is_empty() {
            return Ok(DONE);
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            print_error(&format!(
                "{seconds} s are over: the shutdown of the host ends {jobs}"
            ));
            return Ok(DONE);
        }
        if printed != jobs {
            print_error(&format!(
                "the shutdown of the host waits up to {seconds} s for {jobs}"
            ));
            printed = jobs;
        }
        sleep(INTERVAL.min(left)).await;
    }
}

/// The slots with jobs that come to an end by themselves: what is held or broken waits for an operator.
fn running(status: &Status) -> String {
    let runs = |slot: &&Slot| (slot.worker.is_some() || slot.job.is_some()) && !slot.state.needs_operator();
    let slots = status.slots.iter().filter(runs);
    let names: Vec<String> = slots.map(|slot| print::waiting_for(slot, status)).collect();
    names.join("; ")
}
