//! `agent run`: bootstraps, pings for ever, and runs one job in its life.

use std::sync::mpsc::channel;
use std::thread::{scope, sleep};
use std::time::Duration;

use anyhow::Result;
use serde_json::Value;

use super::events::Events;
use super::exec::{self, LineSource};
use super::install::{Passwd, is_job_marked, mark_job};
use super::server_client::Client;
use super::{Config, job};
use crate::fake_server::json::{Ping, PingJob};

const IDLE: Duration = Duration::from_secs(1);
const WORKING: Duration = Duration::from_secs(5);

pub fn run() -> Result<()> {
    let config = Config::load()?;
    let user = Passwd::own()?;
    let client = Client::new(&config.baseurl, &config.token);
    let worker = client.bootstrap(&config.bootstrap, &config.token);
    eprintln!("bootstrapped as worker {worker}");
    if is_job_marked() {
        eprintln!("ERROR: found previously assigned job; reporting failure");
        client.fail(None)?;
        idle(&client);
    }
    let mut diagnosed = false;
    let mut post = None;
    loop {
        let ping = ping(&client);
        if let Some(script) = script(&ping, "post_job_diagnostic_script").filter(|_| post.is_none()) {
            client.diagnostics_enable()?;
            post = Some(script);
        }
        if let Some(script) = script(&ping, "pre_job_diagnostic_script").filter(|_| !diagnosed) {
            diagnosed = true;
            if diagnose(&client, "diag.pre", &script) {
                client.fail(Some("pre-job diagnostics reported a fault"))?;
                idle(&client);
            }
            continue;
        }
        if let Some(job) = &ping.job {
            mark_job(&ping)?;
            work(&client, &config, &user, job);
            if let Some(script) = post {
                client.diagnostics_complete(diagnose(&client, "diag.post", &script))?;
            }
            idle(&client);
        }
        sleep(IDLE);
    }
}

/// Pings while the job runs beside.
fn work(client: &Client, config: &Config, user: &Passwd, job: &PingJob) {
    scope(|threads| {
        let (done, ended) = channel::<()>();
        threads.spawn(move || {
            job::run(client, config, user, job);
            drop(done);
        });
        while ended.recv_timeout(WORKING) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            client.ping().map_err(|e| eprintln!("ERROR: ping: {e:#}")).ok();
        }
    });
}

/// A ping that says nothing of powering off; the rest of a worker told to go is waiting.
fn ping(client: &Client) -> Ping {
    loop {
        match client.ping() {
            Ok(ping) if !ping.poweroff => return ping,
            Ok(_) => (),
            Err(e) => eprintln!("ERROR: ping: {e:#}"),
        }
        sleep(IDLE);
    }
}

/// Nothing is left to do but to wait until it is killed.
fn idle(client: &Client) -> ! {
    loop {
        ping(client);
        sleep(IDLE);
    }
}

fn script(ping: &Ping, key: &str) -> Option<String> {
    ping.factory_metadata
        .as_ref()?
        .get(key)
        .and_then(Value::as_str)
        .map(str::to_string)
}

/// Runs a script of the factory's; true = it found a fault.
fn diagnose(client: &Client, own: &'static str, script: &str) -> bool {
    let (events, _thread) = Events::start(client.clone(), None);
    let ran = exec::bash(script).and_then(|(mut command, _script)| {
        command
            .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin")
            .current_dir("/");
        exec::run(command, &events, LineSource { task: None, own })
    });
    let fault = ran.unwrap_or_else(|e| {
        events.log(None, own, format!("ERROR: {e:#}"));
        true
    });
    events.flush();
    fault
}
