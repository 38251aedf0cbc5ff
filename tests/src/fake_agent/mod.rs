//! A fake agent: the command line, the files and the behaviour of the real Linux agent, so that a
//! whole job can be run against the fake server.
//!
//! Plain HTTP, threads, and no privilege: it must never ask for more than the real one needs.

mod events;
mod exec;
mod install;
mod job;
mod output;
mod run;
mod server_client;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use serde::{Deserialize, Serialize};

/// Moves every path of the agent below another root, to try it without a sandbox.
const ROOT: &str = "FAKE_AGENT_ROOT";

fn at(path: &str) -> PathBuf {
    let root = std::env::var_os(ROOT).unwrap_or_else(|| "/".into());
    Path::new(&root).join(path.trim_start_matches('/'))
}

fn home() -> PathBuf {
    at("/var/run/buildomat/agent")
}

/// `agent.json`: what `install` leaves for `run`.
#[derive(Debug, Serialize, Deserialize)]
struct Config {
    baseurl: String,
    bootstrap: String,
    token: String,
    env: BTreeMap<String, String>,
}

impl Config {
    fn load() -> Result<Config> {
        let path = home().join("agent.json");
        let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is not understood", path.display()))
    }
}

#[derive(Debug, Parser)]
#[command(name = "agent", about = "A fake buildomat agent")]
enum Agent {
    /// Put the agent in its place and start it
    Install(install::Args),
    /// Be the agent
    Run,
}

#[derive(Debug, Parser)]
#[command(name = "bmat", about = "A job's control command")]
enum Bmat {
    /// The job's store of values
    #[command(subcommand)]
    Store(Store),
}

#[derive(Debug, Subcommand)]
enum Store {
    /// Print a value; fails if there is none
    Get { name: String },
    /// Keep a value
    Put {
        /// Do not show it to users
        #[arg(short, long)]
        secret: bool,
        name: String,
        value: String,
    },
}

/// The agent, or the control command when called by that name.
pub fn main() -> Result<()> {
    let name = std::env::args_os().next().unwrap_or_default();
    if name.to_string_lossy().ends_with("bmat") {
        return store(Bmat::parse());
    }
    match Agent::parse() {
        Agent::Install(args) => install::install(&args),
        Agent::Run => run::run(),
    }
}

fn store(Bmat::Store(command): Bmat) -> Result<()> {
    let config = Config::load()?;
    let client = server_client::Client::new(&config.baseurl, &config.token);
    let job = std::env::var("BUILDOMAT_JOB_ID").context("BUILDOMAT_JOB_ID is not set: is this a job?")?;
    match command {
        Store::Get { name } => {
            let value = client.store_get(&job, &name)?;
            println!(
                "{}",
                value.with_context(|| format!("the store has no value {name:?}"))?
            );
        }
        Store::Put { secret, name, value } => client.store_put(&job, &name, value, secret)?,
    }
    Ok(())
}
