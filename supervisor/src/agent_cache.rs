//! The agent's program: downloaded, unpacked within bounds, kept on the disk for when the server is unreachable,
//! and handed to the helper as a sealed memfd. It is never run, and never looked into, here.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use flate2::read::MultiGzDecoder;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use protocol::MAX_AGENT_BYTES;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout, timeout_at};

use crate::buildomat::{BuildomatClient, causes};

/// The server is asked for a newer agent no more often than this.
const FRESH: Duration = Duration::from_secs(600);
/// A download that stalls for this long has failed.
const IDLE: Duration = Duration::from_secs(30);
/// One that takes this long in all, too.
const WHOLE: Duration = Duration::from_secs(600);
/// A start waits for so long, counted from the request, to learn whether there is a newer agent than the one that is
/// there.
const GRACE: Duration = Duration::from_secs(2);

/// What was downloaded, and what it was unpacked to, before that takes the place of the last agent.
const PARTS: [&str; 2] = ["agent.download", "agent.new"];

/// An agent's program, sealed against every change.
#[derive(Clone, Debug)]
pub struct Agent(Arc<OwnedFd>);

impl Agent {
    /// In bytes.
    pub fn size(&self) -> Result<u64, String> {
        let file = self.0.try_clone().map(File::from);
        let length = file.and_then(|file| file.metadata()).map(|meta| meta.len());
        length.map_err(|e| format!("cannot examine the agent: {e}"))
    }

    /// The program that `factory.agent` names.
    ///
    /// # Errors
    /// A sentence, where it cannot be read.
    pub async fn of_the_host(path: PathBuf) -> Result<Agent, String> {
        let read = tokio::task::spawn_blocking(move || sealed(&path)).await;
        let read = read.map_err(|e| e.to_string())?;
        read.map_err(|why| format!("{why}: let the supervisor's user read it, or change factory.agent"))
    }

    /// The memfd, sealed as [`Request::InstallAgent`](protocol::Request::InstallAgent) asks for.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The agent of this factory's server.
#[derive(Debug)]
pub struct AgentCache(Arc<Cache>);

#[derive(Debug)]
struct Cache {
    dir: PathBuf,
    query: Vec<(&'static str, String)>,
    /// How long a download may take.
    whole: Duration,
    state: Mutex<State>,
    /// Held while the file is read for the first time: it is read once, and who waits goes on in the order of asking.
    reading: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct State {
    agent: Option<Agent>,
    /// When the server was last asked to an end, with whatever answer.
    asked: Option<Instant>,
    /// The download that runs now.
    download: Option<Download>,
}

/// A download, and its end.
#[derive(Clone, Debug)]
struct Download {
    started_at: Instant,
    end: Arc<End>,
}

/// The end of a download. Those who wait go on in the order in which they came: of a `watch` they would not.
#[derive(Debug, Default)]
struct End {
    result: OnceLock<Result<(), String>>,
    notify: Notify,
}

/// Which version the file on the disk is, if the server says so.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Tag {
    path: String,
    etag: Option<String>,
    modified: Option<String>,
}

enum Fetched {
    New,
    Unchanged,
}

impl AgentCache {
    /// A cache in `dir`, for a machine that these hints describe.
    pub fn new(dir: PathBuf, query: Vec<(&'static str, String)>) -> Self {
        Self(Arc::new(Cache {
            dir,
            query,
            whole: WHOLE,
            state: Mutex::default(),
            reading: tokio::sync::Mutex::default(),
        }))
    }

    /// The agent: the newest if the server answers at once, else the last one that it had. A slow answer is waited for in
    /// the background, and is there for the next start.
    ///
    /// # Errors
    /// A sentence, where there has never been one or the disk fails.
    pub async fn get(&self, buildomat: &BuildomatClient) -> Result<Agent, String> {
        let known = self.0.known().await;
        let asked = self.0.state().asked;
        if let (Some(agent), Some(asked)) = (&known, asked)
            && asked.elapsed() < FRESH
        {
            return Ok(agent.clone());
        }
        let download = self.download(buildomat);
        let end = match known {
            Some(_) => download.started_at + GRACE,
            // It has a limit of its own.
            None => download.started_at + 2 * self.0.whole,
        };
        // Before the result is read, so that its end is not missed.
        let notified = download.end.notify.notified();
        if download.end.result.get().is_none() {
            let _ = timeout_at(end, notified).await;
        }
        let why = download.end.result.get().cloned().and_then(Result::err);
        let agent = self.0.state().agent.clone();
        agent.ok_or_else(|| why.unwrap_or_else(|| "the download of the agent came to no end".into()))
    }

    /// The one that runs, or a new one.
    fn download(&self, buildomat: &BuildomatClient) -> Download {
        let mut state = self.0.state();
        if let Some(running) = &state.download {
            return running.clone();
        }
        let download = Download {
            started_at: Instant::now(),
            end: Arc::default(),
        };
        let end = download.end.clone();
        state.download = Some(download.clone());
        let (cache, buildomat) = (self.0.clone(), buildomat.clone());
        tokio::spawn(async move {
            let result = cache.refresh(&buildomat).await;
            let mut state = cache.state();
            state.download = None;
            state.asked = Some(Instant::now());
            // Waiters are notified once.
            let _ = end.result.set(result);
            end.notify.notify_waiters();
        });
        download
    }
}

impl Cache {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn program(&self) -> PathBuf {
        self.dir.join("agent")
    }

    /// The agent that is there, in memory or on the disk.
    async fn known(&self) -> Option<Agent> {
        let _reading = self.reading.lock().await;
        if let Some(agent) = &self.state().agent {
            return Some(agent.clone());
        }
        let agent = self.read().await.ok()?;
        Some(self.state().agent.get_or_insert(agent).clone())
    }

    async fn read(&self) -> Result<Agent, String> {
        let program = self.program();
        let read = tokio::task::spawn_blocking(move || sealed(&program)).await;
        read.map_err(|e| e.to_string())?
    }

    /// Ask the server, and take what it has.
    async fn refresh(&self, buildomat: &BuildomatClient) -> Result<(), String> {
        let late = |_| format!("the download of the agent takes longer than {:?}", self.whole);
        let fetched = timeout(self.whole, self.fetch(buildomat)).await;
        let fetched = match fetched.map_err(late).and_then(|fetched| fetched) {
            Ok(Fetched::Unchanged) if self.state().agent.is_some() => return Ok(()),
            Ok(_) => self.read().await,
            Err(why) => Err(why),
        };
        match fetched {
            Ok(agent) => {
                self.state().agent = Some(agent);
                Ok(())
            }
            Err(why) => {
                // The next attempt begins anew; what is left of this one may be all that the disk had room for.
                for part in PARTS {
                    let _ = fs::remove_file(self.dir.join(part));
                }
                if self.state().agent.is_some() {
                    tracing::warn!("the agent cannot be renewed, the last one is used: {why}");
                }
                Err(why)
            }
        }
    }

    async fn fetch(&self, buildomat: &BuildomatClient) -> Result<Fetched, String> {
        match self.fetch_form(buildomat, "/file/agent.gz", true).await? {
            Some(fetched) => Ok(fetched),
            None => self.fetch_form(buildomat, "/file/agent", false).await?.ok_or_else(|| {
                "the buildomat server has no agent for this machine (404 for /file/agent.gz and /file/agent): install one there".into()
            }),
        }
    }

    /// One form of the file; None where the server does not have it.
    async fn fetch_form(
        &self,
        buildomat: &BuildomatClient,
        path: &str,
        is_compressed: bool,
    ) -> Result<Option<Fetched>, String> {
        let old: Option<Tag> = fs::read(self.dir.join("agent.tag"))
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .filter(|tag: &Tag| tag.path == path && self.program().exists());
        let mut conditions = Vec::new();
        if let Some(tag) = &old {
            conditions.extend(tag.etag.clone().map(|value| ("if-none-match", value)));
            conditions.extend(tag.modified.clone().map(|value| ("if-modified-since", value)));
        }
        let request = buildomat.download_file(path, &self.query, &conditions);
        let late = |_| format!("the server sent nothing of {path} for {} s", IDLE.as_secs());
        let mut response = timeout(IDLE, request)
            .await
            .map_err(late)?
            .map_err(|e| e.to_string())?;
        match response.status().as_u16() {
            200 => {}
            304 if old.is_some() => return Ok(Some(Fetched::Unchanged)),
            404 => return Ok(None),
            code => return Err(format!("the server answered {code} to {path}")),
        }
        let header = |name: &str| Some(response.headers().get(name)?.to_str().ok()?.to_owned());
        let tag = Tag {
            path: path.into(),
            etag: header("etag"),
            modified: header("last-modified"),
        };
        let mut download = disk("create", &self.dir, tempfile_in(&self.dir, PARTS[0]))?;
        let mut length = 0;
        let broken = |e| format!("the download of {path} broke off: {}", causes(&e));
        while let Some(chunk) = timeout(IDLE, response.chunk())
            .await
            .map_err(late)?
            .map_err(broken)?
        {
            length += chunk.len() as u64;
            if length > MAX_AGENT_BYTES {
                return Err(format!(
                    "{path} is larger than {MAX_AGENT_BYTES} bytes: it can be no agent"
                ));
            }
            disk("write", &self.dir, download.write_all(&chunk))?;
        }
        let dir = self.dir.clone();
        let unpacked = tokio::task::spawn_blocking(move || keep(&dir, is_compressed, &tag));
        unpacked.await.map_err(|e| e.to_string())??;
        Ok(Some(Fetched::New))
    }
}

fn disk<T>(what: &str, dir: &Path, result: io::Result<T>) -> Result<T, String> {
    result.map_err(|e| format!("cannot {what} the agent's file in {}: {e}", dir.display()))
}

fn tempfile_in(dir: &Path, name: &str) -> io::Result<File> {
    fs::create_dir_all(dir)?;
    File::create(dir.join(name))
}

/// Unpack what was downloaded, and put it in the place of the last agent. The tag goes first and comes
/// last, so that it never describes another file.
fn keep(dir: &Path, is_compressed: bool, tag: &Tag) -> Result<(), String> {
    let (from, new, place) = (dir.join(PARTS[0]), dir.join(PARTS[1]), dir.join("agent"));
    let input = disk("open", dir, File::open(&from))?;
    let mut output = disk("create", dir, File::create(&new))?;
    let mut input: Box<dyn Read> = if is_compressed {
        Box::new(MultiGzDecoder::new(input))
    } else {
        Box::new(input)
    };
    let length = io::copy(&mut input.by_ref().take(MAX_AGENT_BYTES + 1), &mut output)
        .map_err(|e| format!("cannot unpack the agent: {e}"))?;
    if length == 0 || length > MAX_AGENT_BYTES {
        return Err(format!(
            "the agent has {length} bytes unpacked, but must have 1 to {MAX_AGENT_BYTES}"
        ));
    }
    disk("write", dir, output.sync_all())?;
    let _ = fs::remove_file(dir.join("agent.tag"));
    disk("rename", dir, fs::rename(&new, &place))?;
    let _ = fs::remove_file(&from);
    let text = serde_json::to_vec(tag).map_err(|e| e.to_string())?;
    disk("write", dir, fs::write(dir.join("agent.tag"), text))
}

/// The program at `path` in a sealed memfd.
fn sealed(path: &Path) -> Result<Agent, String> {
    let why = |e: &dyn std::fmt::Display| format!("cannot take the agent from {}: {e}", path.display());
    let mut file = File::open(path).map_err(|e| why(&e))?;
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let mut memory = File::from(memfd_create("buildomat-agent", flags).map_err(|e| why(&e))?);
    let length = io::copy(
        &mut Read::by_ref(&mut file).take(MAX_AGENT_BYTES + 1),
        &mut memory,
    )
    .map_err(|e| why(&e))?;
    if length == 0 || length > MAX_AGENT_BYTES {
        return Err(why(&format!("it has {length} bytes")));
    }
    seal(&memory).map_err(|e| why(&e))?;
    Ok(Agent(Arc::new(memory.into())))
}

/// Seal a memfd against every change, as [`Request::InstallAgent`](protocol::Request::InstallAgent) asks for.
///
/// # Errors
/// Those of fcntl(2). EBUSY only where it lasts for a second.
pub fn seal(memory: impl AsFd) -> nix::Result<()> {
    let seals =
        SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SEAL;
    while_busy(|| fcntl(memory.as_fd(), FcntlArg::F_ADD_SEALS(seals)).map(drop))
}

/// The kernel refuses F_SEAL_WRITE while anything holds a page of the file, its own reclaim or migration of pages too
/// (mm/memfd.c, `memfd_wait_for_pins`), which ends by itself.
fn while_busy(mut seal: impl FnMut() -> nix::Result<()>) -> nix::Result<()> {
    for _ in 0..50 {
        match seal() {
            Err(Errno::EBUSY) => std::thread::sleep(Duration::from_millis(20)),
            done => return done,
        }
    }
    seal()
}

/// What the server may want to know of this machine to choose the agent.
pub fn hints() -> Vec<(&'static str, String)> {
    let machine = nix::sys::utsname::uname().map_or_else(
        |_| std::env::consts::ARCH.to_owned(),
        |u| u.machine().to_string_lossy().into_owned(),
    );
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let of = |key: &str| os_release(&release, key);
    vec![
        ("kernel", "Linux".to_owned()),
        // `uname -p` and `-i` say what `-m` says, or "unknown".
        ("proc", machine.clone()),
        ("mach", machine.clone()),
        ("plat", machine),
        ("id", of("ID")),
        ("id_like", of("ID_LIKE")),
        ("version_id", of("VERSION_ID")),
    ]
}

/// A value of os-release(5), without its quotes.
fn os_release(text: &str, key: &str) -> String {
    let value = text
        .lines()
        .find_map(|line| line.trim().strip_prefix(key)?.strip_prefix('='));
    value.unwrap_or_default().trim_matches(['"', '\'']).to_owned()
}

#[cfg(test)]
#[path = "agent_cache_tests.rs"]
mod tests;
