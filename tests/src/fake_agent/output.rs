//! What a job leaves for its user: files that match its output rules, uploaded in chunks.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::at;
use super::events::Events;
use super::server_client::Client;
use crate::fake_server::json::{AddFile, OutputRule, PingJob};
use crate::fake_server::{MAX_CHUNK, fresh_id};

/// True = every rule was met and every file arrived.
pub fn upload(client: &Client, job: &PingJob, events: &Events) -> Result<bool> {
    if job.output_rules.is_empty() {
        return Ok(true);
    }
    let quota = client.quota(&job.id)?;
    let mut good = true;
    let mut ignored = BTreeSet::new();
    for rule in job.output_rules.iter().filter(|r| r.ignore) {
        ignored.extend(matches(rule)?);
    }
    let mut found = BTreeSet::new();
    for rule in job.output_rules.iter().filter(|r| !r.ignore) {
        let files: Vec<_> = matches(rule)?
            .into_iter()
            .filter(|p| !ignored.contains(p))
            .collect();
        if files.is_empty() && rule.require_match {
            events.log(
                None,
                "worker",
                format!("rule {:?} required a match but found none", rule.rule),
            );
            good = false;
        }
        for file in files
            .into_iter()
            .filter(|p| !found.contains(p))
            .collect::<Vec<_>>()
        {
            if let Err(e) = upload_one(client, job, rule, &file, quota, events) {
                events.log(None, "worker", format!("upload error: {}: {e:#}", file.display()));
                good = false;
            }
            found.insert(file);
        }
    }
    Ok(good)
}

fn matches(rule: &OutputRule) -> Result<Vec<PathBuf>> {
    let pattern = at(&rule.rule);
    let pattern = pattern.to_str().context("an output rule must be UTF-8")?;
    let paths = glob::glob(pattern).with_context(|| format!("output rule {:?}", rule.rule))?;
    Ok(paths.filter_map(Result::ok).filter(|p| p.is_file()).collect())
}

fn upload_one(
    client: &Client,
    job: &PingJob,
    rule: &OutputRule,
    path: &Path,
    quota: u64,
    events: &Events,
) -> Result<()> {
    let shown = Path::new("/")
        .join(path.strip_prefix(at("/")).unwrap_or(path))
        .display()
        .to_string();
    let mut file = File::open(path)?;
    let announced_size = file.metadata()?.len();
    if announced_size > quota {
        bail!("{announced_size} bytes are more than the {quota} that one output may have");
    }
    events.log(
        None,
        "worker",
        format!("uploading: {shown} ({announced_size} bytes)"),
    );
    let (mut chunks, mut size) = (Vec::new(), 0);
    loop {
        let mut chunk = Vec::new();
        (&mut file).take(MAX_CHUNK as u64).read_to_end(&mut chunk)?;
        if chunk.is_empty() {
            break;
        }
        size += chunk.len() as u64;
        if size > quota {
            bail!("it grew past the {quota} bytes that one output may have");
        }
        chunks.push(client.chunk(&job.id, &chunk)?);
    }
    if size != announced_size && !rule.size_change_ok {
        bail!("it changed size while it was read: {announced_size} became {size}");
    }
    let commit_id = fresh_id().to_string();
    client.add_output(
        &job.id,
        &AddFile {
            path: shown.clone(),
            size,
            chunks,
            commit_id,
        },
    )?;
    events.log(None, "worker", format!("uploaded: {shown}"));
    Ok(())
}
