//! `agent install`: copies itself into place, writes down the server, starts `agent run`, and leaves.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{Config, at, home};
use crate::fake_server::json;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Set a variable in the environment of tasks
    #[arg(short = 'e', value_name = "KEY=VALUE")]
    env: Vec<String>,
    /// Start the agent as a plain child
    #[arg(long)]
    no_service: bool,
    /// Run tasks as the agent's own user
    #[arg(long)]
    no_setuid: bool,
    /// Keep everything below /var/run/buildomat
    #[arg(long)]
    use_var_run: bool,
    baseurl: String,
    bootstrap: String,
}

pub fn install(args: &Args) -> Result<()> {
    if !(args.no_service && args.no_setuid && args.use_var_run) {
        bail!("installing a service wants root: use --no-service --no-setuid --use-var-run");
    }
    let pair = |e: &String| {
        let (key, value) = e
            .split_once('=')
            .with_context(|| format!("invalid flag: -e {e}"))?;
        Ok((key.to_string(), value.to_string()))
    };
    let config = Config {
        baseurl: args.baseurl.trim_end_matches('/').to_string(),
        bootstrap: args.bootstrap.clone(),
        token: crate::fake_server::secret(),
        env: args.env.iter().map(pair).collect::<Result<_>>()?,
    };
    Passwd::own()?;

    let (home, exe) = (home(), own_executable()?);
    let agent = home.join("agent");
    make_dir(&home.join("bin"))?;
    make_dir(&at("/input"))?;
    write_private(&home.join("agent.json"), &serde_json::to_vec_pretty(&config)?)?;
    copy_executable(&exe, &agent)?;
    copy_executable(&exe, &home.join("bin/bmat"))?;
    let started = Command::new(&agent).arg("run").current_dir(at("/")).spawn();
    started.with_context(|| format!("cannot start {}", agent.display()))?;
    Ok(())
}

/// By the name that the kernel gives: a program that runs from a memfd, or was deleted, has none.
fn own_executable() -> Result<PathBuf> {
    let exe = fs::read_link("/proc/self/exe").context("cannot read /proc/self/exe")?;
    fs::metadata(&exe).with_context(|| format!("own executable {} cannot be found", exe.display()))?;
    Ok(exe)
}

fn make_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))
}

fn write_private(path: &Path, bytes: &[u8]) -> Result<()> {
    remove(path)?;
    let file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    file.and_then(|mut f| std::io::Write::write_all(&mut f, bytes))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn copy_executable(from: &Path, to: &Path) -> Result<()> {
    remove(to)?;
    fs::copy(from, to)
        .and_then(|_| fs::set_permissions(to, fs::Permissions::from_mode(0o755)))
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// This user, as the password file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passwd {
    pub name: String,
    pub home: String,
}

impl Passwd {
    pub fn own() -> Result<Passwd> {
        let uid = nix::unistd::getuid().as_raw();
        let text = fs::read_to_string("/etc/passwd").context("cannot read /etc/passwd")?;
        Passwd::find(&text, uid).with_context(|| format!("no passwd entry for uid {uid} in /etc/passwd"))
    }

    fn find(text: &str, uid: u32) -> Option<Passwd> {
        text.lines()
            .find_map(|line| match line.split(':').collect::<Vec<_>>()[..] {
                [name, _, id, _, _, home, ..] if id.parse() == Ok(uid) => Some(Passwd {
                    name: name.to_string(),
                    home: home.to_string(),
                }),
                _ => None,
            })
    }
}

/// Marks that this worker has had its job; writing it twice fails.
pub fn mark_job(ping: &json::Ping) -> Result<()> {
    let path = home().join("job.json");
    let file = fs::OpenOptions::new().write(true).create_new(true).open(&path);
    let mut file = file.with_context(|| format!("cannot make {}", path.display()))?;
    serde_json::to_writer_pretty(&mut file, ping)?;
    file.sync_all()
        .with_context(|| format!("cannot write {}", path.display()))
}

pub fn is_job_marked() -> bool {
    fs::symlink_metadata(home().join("job.json")).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_found_by_its_uid_alone() {
        let text = "root:x:0:0:root:/root:/bin/sh\nbroken\nbmat-1:x:77:77::/home/bmat-1:/bin/bash\n";
        let found = Passwd {
            name: "bmat-1".to_string(),
            home: "/home/bmat-1".to_string(),
        };
        assert_eq!(Passwd::find(text, 77), Some(found));
        assert_eq!(Passwd::find(text, 7), None);
    }
}
