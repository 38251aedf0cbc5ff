//! The program `user-factory-manual`: what an operator does as root, without the socket and without a server. A command
//! in a worker of its own (`run`), a shell in a worker that is there (`shell`), and whether the helper would start with
//! a configuration (`check`). The sandbox is that of a job. The helper's own program has nothing of this.
//!
//! The monitor knows nothing of it. A worker that was made for `run` is locked until its end, so whoever wants to
//! delete it (a supervisor that finds it owned by nobody) waits, and has nothing to do in the end; if this
//! process is killed, that deletion goes on.
//!
//! A worker that `shell` enters is locked from the check that it exists until the shell's first process is in its
//! cgroup. A deletion comes before that, and then there is no worker to enter; or after it, and then it kills that
//! cgroup (`cgroup::kill_and_remove`) before it removes anything. Everything that a shell makes outside its own
//! namespaces (a `/dev`, a quota) is made by a process in that cgroup, so the deletion removes it after the process is
//! dead.

mod streams;
mod terminal;

use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollTimeout, poll};
use nix::sys::signal::SigSet;
use nix::sys::wait::WaitPidFlag;
use nix::unistd::Pid;
use protocol::config;
use protocol::{Error, Received, Seqpacket, SlotName, Uid, WorkerId, wire};

use crate::host::record::Worker;
use crate::host::startup_check::check_host;
use crate::host::{Host, abilities, cgroup, users};
use crate::monitor::{check_no_container, rootfs};
use crate::monitor_ipc::HandshakeMessage;
use crate::sandbox::{ManualStart, limits, writable_dirs};
use crate::session::allocation::{self, CreateUserError};
use crate::session::policy::SlotError;
use crate::unprivileged::Unprivileged;
use crate::unprivileged::proxy::ProxyListener;
use crate::{log, sandbox, sys};

use streams::Streams;
use terminal::{Terminal, TerminalStreams};

const USAGE: &str = "usage: user-factory-manual run [--root DIR] [--slot SLOT] -- COMMAND [ARGUMENT…]
       user-factory-manual shell [--root DIR] WORKER
       user-factory-manual check [--root DIR] FILE

What `user-factory run`, `user-factory shell` and `user-factory check` start; see their pages.
  --root DIR   where etc/buildomat-user-factory/config.toml, run/ and var/lib/ are found [/]
  --slot SLOT  the slot to use [the first that is free]
";

/// The program `user-factory-manual`.
pub fn main() -> ExitCode {
    sys::reset_signals();
    log::start();
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let [command, rest @ ..] = &arguments[..] else {
        eprint!("{USAGE}");
        return ExitCode::FAILURE;
    };
    let done = match command.to_str() {
        Some("run") => run(rest),
        Some("shell") => shell(rest),
        Some("check") => check(rest),
        Some("--help" | "-h") => {
            print!("{USAGE}");
            Ok(0)
        }
        _ => Err(anyhow!("{command:?} is none of run, shell and check")),
    };
    match done {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            log::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

struct Arguments {
    root: PathBuf,
    slot: Option<SlotName>,
    rest: Vec<OsString>,
}

fn parse(arguments: &[OsString]) -> Result<Arguments> {
    let mut found = Arguments {
        root: "/".into(),
        slot: None,
        rest: Vec::new(),
    };
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let mut value = || {
            arguments
                .next()
                .with_context(|| format!("{argument:?} wants a value"))
        };
        match argument.to_str() {
            Some("--root") => found.root = value()?.into(),
            Some("--slot") => found.slot = Some(value()?.to_str().unwrap_or_default().parse()?),
            Some("--") => {
                found.rest = arguments.cloned().collect();
                break;
            }
            _ => found.rest.push(argument.clone()),
        }
    }
    ensure!(found.root.is_absolute(), "--root must be an absolute path");
    ensure!(
        nix::unistd::geteuid().is_root(),
        "this needs root: it makes a user and enters a sandbox"
    );
    Ok(found)
}

/// Where the helper has the workers' cgroups.
fn cgroups(root: &Path) -> Result<PathBuf> {
    let path = root.join(config::CGROUP_FILE);
    let cgroups = std::fs::read(&path).with_context(|| {
        format!(
            "cannot read {}: start the helper, which knows where the workers' cgroups are",
            path.display()
        )
    })?;
    Ok(PathBuf::from(OsString::from_vec(cgroups)))
}

fn open_host(root: &Path) -> Result<Host> {
    let cgroups = cgroups(root)?;
    // What is made must not be closed to its job by the operator's umask.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    Host::open(root, &cgroups)
}

/// Run a command in a worker of its own; all of it is deleted after that. Returns the command's status.
pub fn run(arguments: &[OsString]) -> Result<u8> {
    let arguments = parse(arguments)?;
    ensure!(
        !arguments.rest.is_empty(),
        "there is no command: write it behind --"
    );
    let host = open_host(&arguments.root)?;
    // An operator who leaves must not leave a worker.
    let signals = terminal::block_signals()?;
    let clean_up = |worker, uid| Ok(sandbox::clean_up(&host, worker, uid)?);
    let id = new_id();
    take_slot(&host, &clean_up, id, arguments.slot)?;
    let ran = || -> Result<u8> {
        let (worker, record) = Worker::existing(&host, id).map_err(Error::from)?;
        worker.keep()?;
        let (config, _) = host.configuration()?;
        let slot = &config.slots[&record.slot];
        for warning in abilities::check(&record.slot, &slot.limits, host.abilities)? {
            log::warn!("{warning}");
        }
        writable_dirs::make(
            worker.dir(),
            record.uid,
            &writable_dirs::of(&worker.user(), record.uid, slot),
        )?;
        let cgroup = cgroup::create(&host.cgroups, &id.to_string()).context("cannot make the cgroup")?;
        limits::limit_cgroup(&cgroup, slot, host.abilities)?;
        rootfs::enter_new(&host, &config)?;
        start(&host, id, record.uid, &cgroup, &arguments.rest)?.wait_for_command(&signals)
    };
    let status = ran();
    let deleted = allocation::delete(&host, &clean_up, id);
    deleted.map_err(Error::from).with_context(|| {
        format!("worker {id} is not deleted: the supervisor will do it, or do it with the same command")
    })?;
    status
}

/// A shell in a worker that is there. Returns the shell's status.
pub fn shell(arguments: &[OsString]) -> Result<u8> {
    let arguments = parse(arguments)?;
    let [worker] = &arguments.rest[..] else {
        bail!("name one worker: `user-factory workers` lists them");
    };
    let id: WorkerId = worker.to_str().unwrap_or_default().parse()?;
    let host = open_host(&arguments.root)?;
    // Before the lock: it takes as long as the host has mounts.
    rootfs::enter_new(&host, &host.configuration()?.0)?;
    let (worker, record) = Worker::existing(&host, id).map_err(Error::from)?;
    ensure!(
        worker.is_started()?,
        "worker {id} has not been started yet: there is nothing to look at"
    );
    let signals = terminal::block_signals()?;
    let name = cgroup::manual_name(id);
    let cgroup = match cgroup::create(&host.cgroups, &name) {
        Err(Errno::EBUSY) => bail!("another shell is in worker {id}: end that one first"),
        cgroup => cgroup.with_context(|| format!("cannot make the cgroup {name}"))?,
    };
    let started = start(&host, id, record.uid, &cgroup, &["/bin/bash".into()]);
    // From here on a deletion finds the shell by its cgroup: it must not wait for an operator.
    drop(worker);
    let status = started.and_then(|shell| shell.wait_for_command(&signals));
    // By its descriptor: another worker, or another shell, may have a cgroup of that name by now. The empty directory
    // is for the next shell, or the deletion, to remove: only they know under the lock that nobody enters it.
    cgroup::kill_processes(&cgroup, &name)?;
    status
}

/// Would the helper start with this configuration? It is asked what it asks itself then, but the limits where no helper
/// has said where its cgroup is. Prints the answer, and returns the status.
pub fn check(arguments: &[OsString]) -> Result<u8> {
    let arguments = parse(arguments)?;
    let [path] = &arguments.rest[..] else {
        bail!("name one configuration file");
    };
    let checked = || -> Result<bool> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let config = config::Config::parse(&text)
            .map_err(|mistakes| anyhow::anyhow!("line {}: {}", mistakes[0].line, mistakes[0].message))?;
        let cgroups = cgroups(&arguments.root).ok().filter(|place| place.is_dir());
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
        let host = Host::open(&arguments.root, cgroups.as_deref().unwrap_or(Path::new("/")))?;
        check_host(&host, &config)?;
        users::check_no_process(&host, config.factory.uid_range)?;
        check_no_container(&arguments.root, config.factory.uid_range)?;
        if cgroups.is_some() {
            abilities::check_all(&config, host.abilities)?;
        }
        rootfs::enter_new(&host, &config)?;
        Ok(cgroups.is_some())
    };
    match checked() {
        Ok(true) => println!("it would start with this configuration"),
        Ok(false) => println!(
            "it would start with this configuration, if this host enforces its limits: they are checked where a helper has run"
        ),
        Err(error) => {
            println!("{error:#}");
            return Ok(1);
        }
    }
    Ok(0)
}

/// By the clock and the randomness of the standard library's hash keys.
fn new_id() -> WorkerId {
    use std::hash::{BuildHasher, Hasher};
    let age = std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_millis();
    let random = || u128::from(std::hash::RandomState::new().build_hasher().finish());
    let low = (random() << 64 | random()) & ((1 << 80) - 1);
    WorkerId::from_bits((age & ((1 << 48) - 1)) << 80 | low)
}

/// Take this slot, or the first that is free.
fn take_slot(
    host: &Host,
    clean_up: allocation::CleanUp<'_>,
    id: WorkerId,
    slot: Option<SlotName>,
) -> Result<()> {
    let (config, _) = host.configuration()?;
    let wanted: Vec<SlotName> = match slot {
        Some(slot) => vec![slot],
        None => config.slots.keys().cloned().collect(),
    };
    let mut last = None;
    for slot in wanted {
        match allocation::create_user(host, clean_up, id, &slot) {
            Ok(_) => return Ok(()),
            Err(CreateUserError::Slot(SlotError::SlotTaken(sentence))) => last = Some(sentence),
            Err(error) => return Err(Error::from(error).into()),
        }
    }
    bail!(last.expect("a configuration has a slot"))
}

/// A first process in a worker's sandbox that is about to start a command at this process's terminal.
struct Started {
    first: Pid,
    socket: Seqpacket,
    ours: TerminalStreams,
    streams: Streams,
}

/// Make the first process, in the cgroup from its first instruction. What it sees, this process has built.
fn start(host: &Host, worker: WorkerId, uid: Uid, cgroup: &OwnedFd, command: &[OsString]) -> Result<Started> {
    let (here, there) = Seqpacket::pair()?;
    let ours = terminal::ours();
    let mut streams = Streams::new(uid)?;
    let first = sys::clone_sandboxed(cgroup.as_fd(), || {
        let keep = [&host.descriptors()[..], &[there.as_raw_fd()]].concat();
        let ready = || -> Result<ManualStart> {
            streams.replace()?;
            sys::close_all_but(&keep)?;
            SigSet::empty().thread_set_mask()?;
            Ok(sandbox::enter_manual(host, worker).map_err(Error::from)?)
        };
        let ended = ready().and_then(|(proof, variables, proxy)| {
            // What was looked up on the host is not for here.
            let proxy_descriptors = proxy.iter().flat_map(ProxyListener::descriptors);
            let keep: Vec<i32> = proxy_descriptors.chain([there.as_raw_fd()]).collect();
            sys::close_all_but(&keep)?;
            proxy
                .map(|proxy| forward_connections(&proof, proxy))
                .transpose()?;
            first_process(&proof, &there, command, &variables, ours)
        });
        ended.unwrap_or_else(|error| {
            let _ = HandshakeMessage::failed(error).send_to(&there, None);
            1
        })
    })
    .context("cannot make the namespaces")?;
    streams.copy()?;
    Ok(Started {
        first,
        socket: here,
        ours,
        streams,
    })
}

impl Started {
    /// Until the command has ended. Returns its status.
    fn wait_for_command(self, signals: &terminal::Signals) -> Result<u8> {
        let terminal = match self.socket.recv(HandshakeMessage::MAX)? {
            Received::Packet {
                bytes,
                mut descriptors,
            } => match wire::decode(&bytes) {
                Ok(HandshakeMessage::Ready) => descriptors.pop(),
                Ok(HandshakeMessage::Failed(error)) => {
                    let _ = sys::wait(Some(self.first), WaitPidFlag::empty());
                    self.streams.finish();
                    bail!(error);
                }
                other => bail!("the first process sent {other:?}"),
            },
            _ => bail!(
                "the first process was killed: its worker was deleted meanwhile, or the kernel's log has the reason"
            ),
        };
        let terminal = terminal.map(|job| Terminal::new(job, self.ours)).transpose()?;
        let status = terminal::relay_until_exit(self.first, terminal, signals)?;
        self.streams.finish();
        // Did it get as far as to start the command?
        if let Ok(Received::Packet { bytes, .. }) = self.socket.recv(HandshakeMessage::MAX)
            && let Ok(HandshakeMessage::Failed(error)) = wire::decode(&bytes)
        {
            bail!(error);
        }
        Ok(status)
    }
}

/// In a process of its own, which ends with the namespace: forward connections to the supervisor.
fn forward_connections(proof: &Unprivileged, proxy: ProxyListener) -> Result<()> {
    sys::fork(|| {
        if sys::close_all_but(&proxy.descriptors()).is_err() {
            return 1;
        }
        loop {
            let mut events = proxy.poll_fds();
            let _ = poll(&mut events, PollTimeout::NONE);
            proxy.forward(proof);
        }
    })
    .context("cannot start the process that forwards connections to the supervisor")?;
    Ok(())
}

/// Pid 1: start the command, and reap until it has ended. With its own end the kernel ends whatever is left.
fn first_process(
    _proof: &Unprivileged,
    parent: &Seqpacket,
    command: &[OsString],
    variables: &[(String, String)],
    ours: TerminalStreams,
) -> Result<i32> {
    let mut start = Command::new(&command[0]);
    start.args(&command[1..]).env_clear().current_dir("/work");
    if ours.has_any() {
        start.env("TERM", std::env::var_os("TERM").unwrap_or_else(|| "dumb".into()));
    }
    start.envs(variables.iter().map(|(name, value)| (name, value)));
    let master = match ours.has_any() {
        true => {
            let (master, terminal) = terminal::open_pty()?;
            terminal::use_terminal(ours, &terminal, &mut start)?;
            // Of its own, so that a shell can move other groups to the foreground.
            start.process_group(0);
            Some(master)
        }
        false => None,
    };
    HandshakeMessage::Ready
        .send_to(parent, master.as_ref().map(AsFd::as_fd))
        .context("the calling process has exited")?;
    drop(master);
    let child = start
        .spawn()
        .with_context(|| format!("cannot start {:?}", command[0]))?;
    drop(start);
    let child = Pid::from_raw(child.id() as i32);
    if ours.has_any() {
        terminal::set_foreground(child)?;
    }
    loop {
        match sys::wait(None, WaitPidFlag::empty()) {
            Ok(Some((pid, ended))) if pid == child => return Ok(terminal::status_of(ended)),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("cannot wait for the command"),
        }
    }
}
