//! One job's sandbox: what pid 1 of the new namespaces does, step by step, from a copy of the monitor to the job's user in
//! the sandbox; and the agent's start. Nothing comes from outside but a worker's id and a token: all else is read from the
//! host's own files.

mod account_files;
pub mod devices;
pub mod environment;
pub mod landlock;
pub mod layout;
pub mod limits;
mod network;
pub mod paths;
pub mod usb;
pub mod writable_dirs;

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, umask};
use nix::unistd::Gid;
use protocol::config::{Config, HostPath, Slot};
use protocol::{BootstrapToken, Received, Seqpacket, Uid, UserName, WorkerId, wire};

use crate::host::directory::{open_dir, open_file};
use crate::host::record::read_record_of;
use crate::host::{self, Host, quota, record, users};
use crate::monitor_ipc::{Failure, HandshakeMessage};
use crate::privileges::{self, seccomp};
use crate::sys;
use crate::unprivileged::proxy::ProxyListener;
use crate::unprivileged::{Unprivileged, become_user, init};
use layout::PRIVATE;
use paths::{JobPath, SourcePath};
use writable_dirs::WritableDir;

/// Where the job sees the agent's program, until `install` has copied itself.
pub const AGENT: &str = "/run/buildomat-agent";

/// All that the sandbox is made of, looked up before anything is changed.
struct Plan {
    worker: WorkerId,
    user: UserName,
    uid: Uid,
    groups: Vec<Gid>,
    writable_dirs: Vec<WritableDir>,
    /// What lies over the host's files, by their names in `/etc`.
    etc: Vec<(&'static str, String)>,
    slot: Slot,
}

/// A process that is all prepared to be a job's pid 1.
pub struct PreparedJob {
    proof: Unprivileged,
    agent: Command,
    files: init::Files,
    init: init::InitConfig,
}

/// For the first process of a worker: everything, up to the agent's start.
pub fn enter(
    host: &Host,
    worker: WorkerId,
    bootstrap: &BootstrapToken,
    session: &Seqpacket,
) -> Result<PreparedJob, Failure> {
    let (config, _) = host.configuration()?;
    let plan = plan(host, &config, worker)?;
    let files = files(host, worker)?;
    let (proxy, proof) = apply_sandbox(host, &config, &plan, Some(session))?;
    let mut agent = environment::command(Path::new(AGENT), &plan.user);
    agent
        .args(arguments(&config, plan.uid, &plan.slot, bootstrap))
        .envs(environment::agent_variables(&config, &plan.slot));
    Ok(PreparedJob {
        proof,
        agent,
        files,
        init: init::InitConfig {
            console: plan.slot.limits.console,
            time: plan.slot.limits.run_time_seconds.map(Duration::from_secs),
            proxy,
        },
    })
}

/// What a command of the manual program begins with: the proof, a task's environment, and the way out where the slot has not
/// the host's network.
pub type ManualStart = (Unprivileged, Vec<(String, String)>, Option<ProxyListener>);

/// For what an operator does in a worker with the manual program: the same sandbox, with the standard streams that the
/// process has.
pub fn enter_manual(host: &Host, worker: WorkerId) -> Result<ManualStart, Failure> {
    let (config, _) = host.configuration()?;
    let plan = plan(host, &config, worker)?;
    let (proxy, proof) = apply_sandbox(host, &config, &plan, None)?;
    let server = &config.general.baseurl;
    let variables = environment::task_environment(server, &plan.user, plan.uid, &plan.slot);
    Ok((proof, variables, proxy))
}

/// For a worker of which nothing runs and nothing is on the disk any more: reset its USB devices, and clear its quota.
pub fn clean_up(host: &Host, worker: WorkerId, uid: Uid) -> Result<()> {
    usb::reset(host, worker, uid)?;
    if host.abilities.has_user_quotas {
        quota::set(host, uid, None, None)?;
    }
    Ok(())
}

/// From a copy of the monitor to the job's user in the job's root file system. The order of the steps matters.
/// `session` waits for an agent; a command of the manual program has none.
fn apply_sandbox(
    host: &Host,
    config: &Config,
    plan: &Plan,
    session: Option<&Seqpacket>,
) -> Result<(Option<ProxyListener>, Unprivileged), Failure> {
    // A new terminal session (`setsid(2)`), so that no terminal of the helper's is reachable.
    nix::unistd::setsid().context("cannot start a new terminal session (setsid)")?;
    umask(Mode::empty());
    // Named devices may be block devices, and what goes to a disk of the slot's outlives the job.
    let ignore_sync = plan.slot.ignore_sync && !devices::has_block_device(host, &plan.slot)?;
    // An operator finds the /dev of an agent that was started: it may be using it.
    if session.is_some() || open_dir(&host.devices, plan.worker.to_string()).is_err() {
        devices::make(host, plan.worker, plan.uid, &plan.slot)?;
    }
    let enter = |egress| network::enter(&config.general.baseurl, egress, &host.proxy_dir);
    let proxy = plan.slot.egress.as_ref().map(enter).transpose()?;
    // The root is the one of all jobs already, copied with the namespace. Add what is this job's own.
    let rules = landlock::LandlockRules::new(plan.slot.allow_user_namespaces)?;
    mounts(plan, &rules)?;
    show_free_space()?;
    if proxy.is_some() {
        // With the /proc of this network namespace, which jobs cannot write.
        host.network_sysctls.write()?;
    }
    if session.is_some() {
        redirect_stdio()?;
    }
    quota::set(host, plan.uid, plan.slot.limits.disk, plan.slot.limits.inodes)?;
    // The way to other workers' directories and to sources of other slots goes now.
    umount2(PRIVATE, MntFlags::MNT_DETACH).context("cannot leave the private part")?;
    nix::unistd::chdir("/")?;
    umask(Mode::from_bits_truncate(0o022));
    // Whom the audit log names: while nobody is written down there, a job could write down whom it likes. A
    // kernel without auditing has no such file, and one that was set by a login stays.
    let _ = std::fs::write("/proc/self/loginuid", plan.uid.to_string());
    limits::limit_process(&plan.slot)?;
    privileges::ProcessKind::Job.limit_bounding_set()?;
    let proof = become_user(plan.uid, &plan.groups)?;
    rules.restrict_self()?;
    if let Some(session) = session {
        // It says what hangs, if this does.
        HandshakeMessage::Filter
            .send_to(session, None)
            .context("the session has exited")?;
    }
    // Last: it refuses most of the above.
    let socket_families: Vec<_> = plan.slot.socket_families.iter().copied().collect();
    let allowed = seccomp::job(seccomp::JobFilter {
        socket_families: &socket_families,
        allow_user_namespaces: plan.slot.allow_user_namespaces,
        has_devices: plan.slot.has_devices(),
        ignore_sync,
    });
    sys::filter_system_calls(&allowed).context("cannot filter system calls")?;
    Ok((proxy, proof))
}

impl PreparedJob {
    /// Start the agent once the session has marked the worker as started, and be pid 1 until the agent has ended. Returns
    /// the status for pid 1 itself.
    pub fn start(self, session: &Seqpacket) -> i32 {
        let (console, exit) = (self.files.console.as_raw_fd(), self.files.exit.as_raw_fd());
        let proxy = self.init.proxy.iter().flat_map(ProxyListener::descriptors);
        let keep: Vec<i32> = [session.as_raw_fd(), console, exit]
            .into_iter()
            .chain(proxy)
            .collect();
        // If the session dies before it has done that, this process ends, too.
        if sys::close_all_but(&keep).is_err()
            || HandshakeMessage::Ready.send_to(session, None).is_err()
            || !receive_go(session)
        {
            return 1;
        }
        match init::spawn_agent(&self.proof, self.agent) {
            Ok(agent) => {
                let _ = HandshakeMessage::Done.send_to(session, None);
                if sys::close_all_but(&[&keep[1..], &agent.descriptors()].concat()).is_err() {
                    return 1;
                }
                init::run(&self.proof, agent, &self.files, &self.init)
            }
            Err(error) => {
                let error = anyhow!("cannot start the agent: {error}");
                init::record_not_started(&self.proof, &self.files, &error.to_string());
                let _ = HandshakeMessage::failed(error).send_to(session, None);
                1
            }
        }
    }
}

fn receive_go(session: &Seqpacket) -> bool {
    match session.recv(HandshakeMessage::MAX) {
        Ok(Received::Packet { bytes, .. }) => Ok(bytes) == wire::encode(&HandshakeMessage::Go),
        _ => false,
    }
}

fn plan(host: &Host, config: &Config, worker: WorkerId) -> Result<Plan> {
    let record = read_record_of(host, worker)?;
    let slot = config
        .slots
        .get(&record.slot)
        .ok_or_else(|| host::no_such_slot(&record.slot))?;
    let user = UserName::from(worker);
    let groups = users::groups(host, &slot.add_to_groups)?;
    let etc = account_files::files(&*host.accounts()?, &user, record.uid, &groups, config, slot);
    Ok(Plan {
        worker,
        user: user.clone(),
        uid: record.uid,
        groups: groups.into_iter().map(|(_, gid)| gid).collect(),
        writable_dirs: writable_dirs::of(&user, record.uid, slot),
        etc,
        slot: slot.clone(),
    })
}

fn files(host: &Host, worker: WorkerId) -> Result<init::Files> {
    let dir = open_dir(&host.workers, worker.to_string())?;
    let output = |name: &str| {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_APPEND;
        open_file(&dir, name, flags).with_context(|| format!("cannot open the worker's {name}"))
    };
    Ok(init::Files {
        console: output(record::CONSOLE)?,
        exit: output(record::EXIT)?,
    })
}

/// `agent install`'s arguments. None comes from the socket but the token, which has letters and digits alone.
fn arguments(config: &Config, uid: Uid, slot: &Slot, bootstrap: &BootstrapToken) -> Vec<String> {
    let mut arguments = vec!["install".to_owned()];
    for (name, value) in environment::slot_variables(&config.general.baseurl, uid, slot) {
        arguments.extend(["-e".to_owned(), format!("{name}={value}")]);
    }
    arguments.extend(["--no-service", "--no-setuid", "--use-var-run"].map(str::to_owned));
    arguments.extend([
        config.general.baseurl.as_str().to_owned(),
        bootstrap.as_str().to_owned(),
    ]);
    arguments
}

fn mounts(plan: &Plan, rules: &landlock::LandlockRules) -> Result<()> {
    let fs = private(plan, "workers").join("fs");
    for (below_fs, place) in writable_dirs::mounted(&plan.writable_dirs) {
        let is_slots = |other: &HostPath| other.as_path() == place.entered();
        if plan.slot.writable.iter().any(is_slots) {
            take_off(&place)?;
        }
        let mount = bind(&fs.join(below_fs), &place, sys::WRITABLE)?;
        // Of /run, what is the job's.
        if below_fs != "run" {
            rules.allow_writing(mount.as_fd())?;
        }
    }
    let run = JobPath::new("/run");
    for dir in plan.writable_dirs.iter().filter(|dir| dir.place.is_within(&run)) {
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let dir = nix::fcntl::open(dir.place.entered(), flags, Mode::empty())?;
        rules.allow_writing(dir.as_fd())?;
    }
    for (place, source) in read_only(plan)? {
        take_off(&place)?;
        bind(&layout::source_path(&source), &place, sys::READ_ONLY)?;
    }
    own_files(plan)?;
    let dev = bind(&private(plan, "devices"), &JobPath::new("/dev"), sys::DEVICES)?;
    // With what is mounted in it below.
    rules.allow_writing(dev.as_fd())?;
    for name in devices::MOUNT_POINTS {
        mount_in_dev(name, plan).with_context(|| format!("cannot mount /dev/{name}"))?;
    }
    let hardened = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), hardened, None::<&str>).context("cannot mount /proc")?;
    // Message queues are opened by a mount of the kernel's own, which is nowhere below /dev.
    for place in ["/proc", "/dev/mqueue"] {
        let place = nix::fcntl::open(place, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
        rules.allow_writing(place.as_fd())?;
    }
    Ok(())
}

/// What the job sees of the host at another place, by that place; and directories of the host's `/run` at their own.
fn read_only(plan: &Plan) -> Result<Vec<(JobPath, SourcePath)>> {
    let shown = plan.slot.read_only.iter();
    let mut shown: Vec<_> = shown
        .map(|(place, source)| (JobPath::new(place.as_path()), SourcePath::new(source.as_path())))
        .collect();
    for run_dir in layout::run_dirs()? {
        let is_for_it = match run_dir == SourcePath::new(layout::UDEV_DATA) {
            true => plan.slot.has_devices(),
            false => plan.slot.egress.is_none(),
        };
        let place = run_dir.same_for_job();
        // What the operator shows there goes before.
        let mut taken =
            (shown.iter().map(|(place, _)| place)).chain(plan.writable_dirs.iter().map(|dir| &dir.place));
        if is_for_it && !taken.any(|other| place.is_within(other) || other.is_within(&place)) {
            shown.push((place, run_dir));
        }
    }
    let run = JobPath::new("/run");
    for (place, _) in &shown {
        if place.is_within(&run) {
            // In the worker's own directory, and there only root makes any but those that are the job's.
            std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(place.entered())
                .with_context(|| format!("cannot make {}", place.display()))?;
        }
    }
    for link in std::fs::read_dir(layout::LINKS).context("cannot list the links into the host's /run")? {
        let link = link?;
        let target = std::fs::read_link(link.path())?;
        match symlink(target, run.join(link.file_name()).entered()) {
            // The operator shows something there.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.context("cannot make a link in /run")?,
        }
    }
    let udev_data = JobPath::new(layout::UDEV_DATA);
    if shown.iter().any(|(place, _)| *place == udev_data) {
        // It is root's: what a job could write to it would be in nobody's quota.
        let made = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o444)
            .open(layout::UDEV_CONTROL);
        made.with_context(|| format!("cannot make {}", layout::UDEV_CONTROL))?;
    }
    Ok(shown)
}

/// Put the job's own files into `/etc`.
fn own_files(plan: &Plan) -> Result<()> {
    layout::refresh_etc().context("cannot refresh /etc")?;
    for (name, text) in &plan.etc {
        // In memory, and gone with the mount, which is the only one to know it by then.
        let own = JobPath::new(PRIVATE).join(format!("{}-{name}", plan.worker));
        let source = own.entered();
        std::fs::write(source, text).with_context(|| format!("cannot write the job's {name}"))?;
        std::fs::set_permissions(source, std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        let place = JobPath::new("/etc").join(name);
        take_off(&place)?;
        bind(&own, &place, sys::READ_ONLY)?;
        std::fs::remove_file(source)?;
    }
    Ok(())
}

/// Programs ask how much room `/` has before they begin. It is a tmpfs that nobody writes to; let it say what there is
/// where the job writes, as it is now. All jobs have this tmpfs, so the last one's start counts.
fn show_free_space() -> Result<()> {
    let space = nix::sys::statvfs::statvfs("/work").context("cannot ask how much space /work has")?;
    let size = space.blocks_available().saturating_mul(space.fragment_size());
    // No less than it holds, or the kernel refuses it.
    let size = format!("size={}", size.max(16 << 20));
    let set = |flags: MsFlags, options: Option<&str>| {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | flags;
        mount(None::<&str>, "/", None::<&str>, flags, options)
    };
    // The first changes what all mounts of it have in common, and makes this one writable.
    set(MsFlags::empty(), Some(&size)).context("cannot set the size of /")?;
    set(MsFlags::MS_BIND | MsFlags::MS_RDONLY, None).context("cannot make / read-only")
}

/// Where the private part has this worker's own.
fn private(plan: &Plan, kind: &str) -> JobPath {
    JobPath::new(PRIVATE).join(kind).join(plan.worker.to_string())
}

/// The helper's own standard streams stay outside.
fn redirect_stdio() -> Result<()> {
    let null = nix::fcntl::open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    Ok(nix::unistd::dup2_stderr(&null)?)
}

/// Take off what the root file system shows of the host at `place`: a mount on that the host could take off.
fn take_off(place: &JobPath) -> Result<()> {
    match umount2(place.entered(), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        // Nothing is mounted there.
        Ok(()) | Err(Errno::EINVAL) => Ok(()),
        Err(errno) => Err(errno).with_context(|| format!("cannot take off {}", place.display())),
    }
}

/// Returns the mount.
fn bind(source: &JobPath, place: &JobPath, attributes: u64) -> Result<OwnedFd> {
    let describe = || format!("cannot mount {} at {}", source.display(), place.display());
    let copy = sys::clone_mount(AT_FDCWD, source.entered(), true).with_context(describe)?;
    sys::set_mount_attributes(copy.as_fd(), attributes, 0).with_context(describe)?;
    sys::attach_mount(copy.as_fd(), place.entered()).with_context(describe)?;
    Ok(copy)
}

/// Terminals, shared memory and message queues of the job's own.
fn mount_in_dev(name: &str, plan: &Plan) -> Result<()> {
    let (nodev, noexec) = (MsFlags::MS_NODEV, MsFlags::MS_NOEXEC);
    let memory = plan
        .slot
        .limits
        .memory
        .map_or("50%".to_owned(), |bytes| bytes.to_string());
    let (kind, flags, options) = match name {
        // All jobs together have what kernel.pty.max and kernel.pty.reserve leave them: 3,072, unless the host sets it.
        // Group 5 is `tty`, as on the host: sshd and others refuse a terminal of another group.
        "pts" => (
            "devpts",
            noexec,
            "newinstance,gid=5,ptmxmode=0666,mode=0620,max=128".to_owned(),
        ),
        // As a host has it: just-in-time compilers map what they have made from there.
        "shm" => ("tmpfs", nodev, format!("mode=1777,size={memory}")),
        _ => ("mqueue", noexec | nodev, String::new()),
    };
    match mount(
        Some(kind),
        &Path::new("/dev").join(name),
        Some(kind),
        flags | MsFlags::MS_NOSUID,
        Some(&*options),
    ) {
        // A kernel without POSIX message queues: then a job has none.
        Err(Errno::ENODEV) if kind == "mqueue" => Ok(()),
        result => Ok(result?),
    }
}
