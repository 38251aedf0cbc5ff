//! One job from its inputs to its end.

use std::fs::{self, File};

use anyhow::{Context, Result};

use super::events::Events;
use super::exec::{self, LineSource};
use super::install::Passwd;
use super::server_client::Client;
use super::{Config, ROOT, at, home, output};
use crate::fake_server::json::{PingJob, PingTask};

/// Runs the job and reports its end; an error in between fails the job.
pub fn run(client: &Client, config: &Config, user: &Passwd, job: &PingJob) {
    let (events, thread) = Events::start(client.clone(), Some(job.id.clone()));
    let failed = work(client, config, user, job, &events).unwrap_or_else(|e| {
        events.log(None, "agent", format!("ERROR: {e:#}"));
        true
    });
    events.flush();
    if let Err(e) = client.job_complete(&job.id, failed) {
        eprintln!("ERROR: {e:#}");
    }
    // A process left behind by the task may hold a reader, and that a handle: nobody waits for it.
    drop((events, thread));
}

/// True = the job failed. After a failed task no other runs, but outputs are uploaded all the same.
fn work(client: &Client, config: &Config, user: &Passwd, job: &PingJob, events: &Events) -> Result<bool> {
    for input in &job.inputs {
        let path = at("/input").join(&input.name);
        events.log(None, "worker", format!("downloading input: {}", path.display()));
        let file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
        client.input(&job.id, &input.id, file)?;
        events.log(None, "worker", format!("downloaded input: {}", path.display()));
    }
    let mut failed = false;
    for task in &job.tasks {
        failed = run_task(config, user, job, task, events).unwrap_or_else(|e| {
            events.log(Some(task.id), "agent", format!("ERROR: exec: {e:#}"));
            true
        });
        events.flush();
        client.task_complete(&job.id, task.id, failed)?;
        if failed {
            break;
        }
    }
    Ok(!output::upload(client, job, events)? || failed)
}

fn run_task(config: &Config, user: &Passwd, job: &PingJob, task: &PingTask, events: &Events) -> Result<bool> {
    events.log(
        Some(task.id),
        "task",
        format!("starting task {}: {:?}", task.id, task.name),
    );
    let (mut command, _script) = exec::bash(&task.script)?;
    if !task.env_clear {
        command.envs(exec::base_env(&user.name, &user.home, &home().join("bin")));
        command
            .env("BUILDOMAT_JOB_ID", &job.id)
            .env("BUILDOMAT_TASK_ID", task.id.to_string());
        command.envs(&config.env);
    }
    command.envs(&task.env);
    // A moved root is moved for `bmat` too.
    command.envs(std::env::var_os(ROOT).map(|root| (ROOT, root)));
    let workdir = at(if task.workdir.is_empty() {
        "/work"
    } else {
        &task.workdir
    });
    fs::metadata(&workdir).with_context(|| format!("working directory {}", workdir.display()))?;
    command.current_dir(workdir);
    exec::run(
        command,
        events,
        LineSource {
            task: Some(task.id),
            own: "task",
        },
    )
}
