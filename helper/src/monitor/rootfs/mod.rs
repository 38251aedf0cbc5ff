//! The root file system that every job gets a copy of, and who makes it when.
//!
//! It is a mount namespace. A process of its own, the *builder*, makes it: it enters the host's mount namespace, makes
//! another (`build`), hands its descriptor to the monitor and ends. So the monitor looks at no mount, no directory and
//! no socket of the host, whatever they are and however many; a mount that hangs holds up a builder, and only launches
//! wait for that. The monitor itself is in a mount namespace with nothing in it, and keeps no file system of the host
//! in use but those of the root file system: it lets go of that as soon as the host's mounts have changed, and has it
//! made again for the next launch.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::inotify::{InitFlags, Inotify};
use nix::sys::signal::SigSet;
use nix::unistd::alarm;
use protocol::config::{self, Config};
use protocol::{Received, Seqpacket, wire};

use crate::host::{FileIdentity, Host};
use crate::log::warn;
use crate::monitor_ipc::HandshakeMessage;
use crate::sys;
use namespace::{become_root, make_mounts_slave, own_namespace};

mod build;
mod namespace;
pub mod sockets;
mod unix_diag;

/// The time after which the kernel ends a builder.
const LIMIT: Duration = Duration::from_secs(20);
/// The time after [`LIMIT`] by which a builder has ended, if the kernel can end it at all.
const GRACE: Duration = Duration::from_secs(1);

/// The jobs' root file system, and what shows that it is out of date.
#[derive(Debug)]
pub struct RootFs {
    host_namespace: File,
    /// The host's mount table; `poll(2)` tells when it has changed (`proc_pid_mounts(5)`).
    host_mounts: File,
    /// The monitor's own mount namespace.
    empty_namespace: File,
    current: Option<Current>,
}

/// The one that there is, or that is being built.
#[derive(Debug)]
struct Current {
    started_at: Instant,
    configuration: FileIdentity,
    /// Reports changes in directories of the host whose entries were mounted one by one, or have something hidden.
    directories: Inotify,
    /// Has the host changed since the build began?
    is_stale: bool,
    /// The socket to the builder, whose other end is closed once the builder has ended.
    builder: Seqpacket,
    /// When the builder has had its time. None after that: it cannot be ended, and hangs in the kernel.
    due: Option<Instant>,
    /// None while it is being built.
    namespace: Option<OwnedFd>,
}

/// What has become of the root file system.
#[derive(Debug)]
pub enum Event {
    /// It is built.
    Built,
    /// It cannot be built from this host and this configuration, for this reason.
    Failed(String),
    /// Its builder was late, or was killed, for this reason.
    Lost(String),
}

impl RootFs {
    /// Leave the host's mounts for a mount namespace with nothing in it. From here on nothing has a path: only
    /// descriptors lead to the host.
    pub fn new(host: &Host) -> Result<RootFs> {
        let host_namespace = own_namespace().context("cannot open the mount namespace")?;
        let host_mounts = File::open("/proc/self/mountinfo").context("cannot open /proc/self/mountinfo")?;
        unshare(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace")?;
        let empty = || -> Result<File> {
            make_mounts_slave()?;
            let namespace = own_namespace()?;
            let root = host.root.join(config::RUN_DIR);
            let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            mount(
                Some("tmpfs"),
                &root,
                Some("tmpfs"),
                flags,
                Some("mode=755,size=4k"),
            )?;
            become_root(&root)?;
            Ok(namespace)
        };
        Ok(RootFs {
            host_namespace,
            host_mounts,
            empty_namespace: empty().context("cannot leave the host's mounts")?,
            current: None,
        })
    }

    /// The descriptors to wait for: [`RootFs::on_events`] must be told which of these are ready.
    ///
    /// Whoever waits for requests beside these puts these last: then no request is seen before a mount that came before
    /// it.
    pub fn events(&self) -> Vec<PollFd<'_>> {
        let Some(current) = &self.current else {
            return Vec::new();
        };
        let mut events = Vec::new();
        if current.namespace.is_none() {
            events.push(PollFd::new(current.builder.as_fd(), PollFlags::POLLIN));
        }
        // What is out of date does not get more so; and the mount table tells of an error at each change.
        if !current.is_stale {
            events.push(PollFd::new(self.host_mounts.as_fd(), PollFlags::POLLPRI));
            events.push(PollFd::new(current.directories.as_fd(), PollFlags::POLLIN));
        }
        events
    }

    /// When the time of the present builder is over; none where there is no builder.
    pub fn due(&self) -> Option<Instant> {
        self.current.as_ref()?.due
    }

    /// Handle ready descriptors, or the end of the builder's time.
    pub fn on_events(&mut self, ready: &[bool]) -> Option<Event> {
        let current = self.current.as_mut()?;
        if current.namespace.is_some() {
            // A file system that the host has unmounted must not stay in use until the next launch.
            self.forget_if(|_| ready.contains(&true));
            return None;
        }
        let (answered, changed) = ready.split_first()?;
        current.is_stale |= changed.contains(&true);
        if *answered {
            return self.receive();
        }
        current.due.take_if(|due| *due <= Instant::now())?;
        Some(Event::Lost(too_late()))
    }

    /// Receive the builder's message, or notice its end.
    fn receive(&mut self) -> Option<Event> {
        let current = self.current.take()?;
        Some(match current.builder.recv(HandshakeMessage::MAX) {
            Ok(Received::Packet {
                bytes,
                mut descriptors,
            }) => match (wire::decode(&bytes), descriptors.pop()) {
                (Ok(HandshakeMessage::Done), Some(namespace)) => {
                    self.current = Some(Current {
                        namespace: Some(namespace),
                        due: None,
                        ..current
                    });
                    Event::Built
                }
                (Ok(HandshakeMessage::Failed(error)), _) => Event::Failed(error.to_string()),
                (other, _) => Event::Lost(build_failed(&format!("its builder sent {other:?}"))),
            },
            _ if current.started_at.elapsed() >= LIMIT => Event::Lost(too_late()),
            _ => Event::Lost(build_failed(
                "its builder was killed: look for the reason in the kernel's log",
            )),
        })
    }

    /// For a launch that was asked for at this time: is there a root file system of this configuration, and of the
    /// host as it was then or later? If there is none, it is being made from now on.
    ///
    /// # Errors
    /// The configuration has a mistake, or the last builder has not ended yet and may never.
    pub fn prepare(&mut self, host: &Host, asked: Instant) -> Result<bool> {
        let (config, configuration) = host.configuration()?;
        // First processes begin with what is known here.
        host.accounts()?;
        self.forget_if(|current| {
            current.configuration != configuration || (current.is_stale && current.started_at < asked)
        });
        match &self.current {
            Some(current) if current.namespace.is_some() => Ok(true),
            Some(current) if current.due.is_none() => bail!(too_late()),
            Some(_) => Ok(false),
            None => {
                self.start_building(host, &config, configuration)?;
                Ok(false)
            }
        }
    }

    /// No launch waits any more: what was out of date when it was ready is not kept.
    pub fn forget_stale(&mut self) {
        self.forget_if(|current| current.is_stale);
    }

    /// Let go of the one that there is, if this is so. One that is being built stays.
    fn forget_if(&mut self, is_so: impl Fn(&Current) -> bool) {
        let is_forgotten = |current: &mut Current| current.namespace.is_some() && is_so(current);
        let forgotten = self.current.take_if(is_forgotten);
        if let Some(namespace) = forgotten.and_then(|current| current.namespace) {
            release(namespace);
        }
    }

    fn start_building(&mut self, host: &Host, config: &Config, configuration: FileIdentity) -> Result<()> {
        let started_at = Instant::now();
        // Changes until now are what the builder will find.
        let mut mounts = [PollFd::new(self.host_mounts.as_fd(), PollFlags::POLLPRI)];
        poll(&mut mounts, PollTimeout::ZERO)?;
        let directories = new_inotify().context("cannot watch directories of the host")?;
        let (builder, monitor) = Seqpacket::pair()?;
        let own = [
            self.host_namespace.as_raw_fd(),
            directories.as_fd().as_raw_fd(),
            monitor.as_raw_fd(),
        ];
        sys::fork(|| {
            let built = sys::close_all_but(&[&host.descriptors()[..], &own].concat())
                .map_err(anyhow::Error::from)
                .and_then(|()| self.build(host, config, &directories));
            let sent = match built {
                Ok(namespace) => HandshakeMessage::Done.send_to(&monitor, Some(namespace.as_fd())),
                Err(error) => HandshakeMessage::failed(error).send_to(&monitor, None),
            };
            i32::from(sent.is_err())
        })
        .context("cannot fork")?;
        self.current = Some(Current {
            started_at,
            configuration,
            directories,
            is_stale: false,
            builder,
            due: Some(started_at + LIMIT + GRACE),
            namespace: None,
        });
        Ok(())
    }

    /// Build the root file system. Runs in the builder.
    fn build(&self, host: &Host, config: &Config, directories: &Inotify) -> Result<File> {
        SigSet::all().thread_unblock()?;
        // Nobody catches the signal: like SIGKILL it ends what waits for a file system that does not answer.
        alarm::set(LIMIT.as_secs() as u32);
        setns(&self.host_namespace, CloneFlags::CLONE_NEWNS).context("cannot return to the host's mounts")?;
        make(host, config, directories)
    }

    /// Do this with the root file system as this process's own, as what is cloned there begins with a copy of it.
    pub fn run_inside<T>(&self, work: impl FnOnce() -> T) -> Result<T> {
        let current = self.current.as_ref();
        let namespace = current.and_then(|current| current.namespace.as_ref());
        let namespace = namespace.context("there is no root file system")?;
        setns(namespace, CloneFlags::CLONE_NEWNS).context("cannot enter the root file system")?;
        let done = work();
        // In a wrong namespace the monitor would serve on and keep the host's file systems in use. It is started again.
        setns(&self.empty_namespace, CloneFlags::CLONE_NEWNS).expect("the monitor returns to its own mounts");
        Ok(done)
    }
}

/// For a process that is nobody else's: make a root file system of this configuration, and be in it.
pub fn enter_new(host: &Host, config: &Config) -> Result<()> {
    make(host, config, &new_inotify()?).map(drop)
}

fn make(host: &Host, config: &Config, directories: &Inotify) -> Result<File> {
    unshare(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace")?;
    // While there is a /proc.
    let namespace = own_namespace().context("cannot open the mount namespace")?;
    build::build(host, config, directories).context("cannot build the jobs' root file system")?;
    Ok(namespace)
}

/// An instance of `inotify(7)` that watches nothing yet.
pub fn new_inotify() -> nix::Result<Inotify> {
    Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
}

fn too_late() -> String {
    format!(
        "the host's mounts have not answered for {} s: look for one that hangs (df hangs on it), fix or unmount it, and repeat",
        LIMIT.as_secs()
    )
}

fn build_failed(reason: &str) -> String {
    format!("the jobs' root file system was not built: {reason}")
}

/// Close the descriptor of a mount namespace. With the last of them go its mounts, and what the host has unmounted
/// meanwhile is unmounted for good, which may take as long as it likes: so that is left to a process of its own.
fn release(namespace: OwnedFd) {
    let released = Seqpacket::pair()
        .map_err(anyhow::Error::from)
        .and_then(|(child, monitor)| {
            sys::fork(|| {
                let keep = [namespace.as_raw_fd(), child.as_raw_fd()];
                if sys::close_all_but(&keep).is_ok() {
                    // Nothing is sent: the monitor has closed its descriptors.
                    let _ = child.recv(1);
                }
                0
            })?;
            Ok(monitor)
        });
    if let Err(error) = &released {
        warn!("the monitor itself unmounts what was the jobs' root file system: {error:#}");
    }
    drop(namespace);
    drop(released);
}
