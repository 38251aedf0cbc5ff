//! Starting an agent: what root prepares outside, and what pid 1 of the new namespaces does, in its
//! order, until it is an unprivileged `init` with the agent below it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, mknod, umask};
use nix::unistd::Gid;
use protocol::config::{Config, Slot};
use protocol::{BootstrapToken, Error, ErrorKind, MAX_AGENT_BYTES, Uid, UserName};

use crate::host::{Host, kind, look, open_dir, open_file, write_atomically};
use crate::trees::{self, Tree};
use crate::view::{self, PRIVATE};
use crate::worker::{Record, Worker};
use crate::{cgroup, init, policy, sys, user};

/// Where the job sees the agent's program, until `install` has copied itself.
const AGENT: &str = "/run/buildomat-agent";

/// All that the child needs, decided and looked up while still outside.
struct Plan {
    worker: String,
    user: UserName,
    uid: Uid,
    groups: Vec<Gid>,
    trees: Vec<Tree>,
    read_only: Vec<(PathBuf, PathBuf)>,
    devices: Vec<(PathBuf, SFlag, u64)>,
    agent_arguments: Vec<String>,
}

/// Start the agent, unless it was started before. Returns when the kernel has accepted the program.
pub fn install(
    host: &Host,
    worker: &Worker,
    record: &Record,
    agent: OwnedFd,
    bootstrap: &BootstrapToken,
) -> Result<()> {
    if worker.is_started()? {
        return Ok(());
    }
    let agent = check_agent(agent)?;
    let (config, _) = host.configuration()?;
    let slot = config
        .slots
        .get(&record.slot)
        .ok_or_else(|| policy::no_such_slot(&record.slot))?;
    let plan = Plan {
        worker: worker.id.to_string(),
        user: worker.user(),
        uid: record.uid,
        groups: user::groups(host, &slot.add_to_groups)?,
        trees: trees::of(&worker.user(), slot),
        read_only: slot
            .read_only
            .iter()
            .map(|(to, from)| (to.as_path().into(), view::source_path(from)))
            .collect(),
        devices: devices(host, slot)?,
        agent_arguments: arguments(&config, slot, bootstrap),
    };
    // The slot may have got more places since the user was made.
    trees::make(worker.dir(), record.uid, &plan.trees)?;
    let run = open_dir(worker.dir(), "fs/run")?;
    copy_agent(&agent, &run)?;
    let (passwd, group) = user::files_for_the_job(host, &plan.user, record.uid)?;
    write_atomically(worker.dir(), "passwd", &passwd, 0o644).context("cannot write the job's passwd")?;
    write_atomically(worker.dir(), "group", &group, 0o644).context("cannot write the job's group")?;
    let output = |name: &str| {
        open_file(
            worker.dir(),
            name,
            OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_APPEND,
        )
        .with_context(|| format!("cannot open the worker's {name}"))
    };
    let files = init::Files {
        console: output("console.log")?,
        exit: output("exit")?,
    };
    // A first attempt that was cut off may have left its pid 1, waiting for a word that will not come.
    cgroup::kill(&host.cgroups, worker.id)?;
    let cgroup = cgroup::create(&host.cgroups, worker.id).context("cannot make the worker's cgroup")?;

    let (from_child, to_parent) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    let (go, to_child) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    sys::clone_sandboxed(cgroup.as_fd(), || {
        let keep = [
            to_parent.as_raw_fd(),
            go.as_raw_fd(),
            files.console.as_raw_fd(),
            files.exit.as_raw_fd(),
        ];
        let parent = File::from(to_parent.try_clone().expect("a pipe can be duplicated"));
        match sys::close_all_but(&[&keep[..], &[parent.as_raw_fd()]].concat())
            .map_err(Into::into)
            .and_then(|()| enter(&plan))
        {
            Ok(()) => {}
            Err(error) => return say(&parent, 'E', &format!("{error:#}")),
        }
        say(&parent, 'R', "");
        // The parent writes down that the agent was started; if it dies before, so do we.
        if !matches!((&File::from(go)).read(&mut [0]), Ok(1)) {
            return 1;
        }
        match init::spawn_agent(AGENT, &plan.agent_arguments, &plan.user) {
            Ok(agent) => {
                say(&parent, 'S', "");
                drop((parent, to_parent));
                init::run(agent, &files)
            }
            Err(error) => {
                let sentence = format!("cannot start the agent: {error}");
                init::not_started(&files, &sentence);
                say(&parent, 'E', &sentence)
            }
        }
    })
    .context("cannot make the worker's namespaces")?;
    // The closure's ends of the pipes were dropped with it: those left are the child's.

    let mut from_child = File::from(from_child);
    expect(&mut from_child, b'R')?;
    worker.mark_started()?;
    File::from(to_child)
        .write_all(b"g")
        .context("the worker's pid 1 is gone")?;
    expect(&mut from_child, b'S')
}

/// The child's word to its parent, in one write.
fn say(mut parent: &File, what: char, message: &str) -> i32 {
    let _ = parent.write_all(format!("{what}{message}").as_bytes());
    i32::from(what == 'E')
}

fn expect(from_child: &mut File, what: u8) -> Result<()> {
    let mut word = [0];
    match from_child.read(&mut word)? {
        1 if word[0] == what => Ok(()),
        1 => {
            let mut message = String::new();
            from_child.take(1000).read_to_string(&mut message).ok();
            bail!("{message}")
        }
        _ => bail!(
            "the worker's pid 1 was killed before it could start the agent: look for the reason in the kernel's log"
        ),
    }
}

fn refused(message: &str) -> anyhow::Error {
    Error::new(ErrorKind::Refused, message).into()
}

/// The descriptor must be a memfd that nobody can change any more: reading it then neither blocks nor
/// races. Only memfds and files of tmpfs have seals at all (`fcntl(2)`).
fn check_agent(fd: OwnedFd) -> Result<File> {
    let needed = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK;
    match fcntl(&fd, FcntlArg::F_GET_SEALS) {
        Ok(seals) if SealFlag::from_bits_truncate(seals).contains(needed) => {}
        _ => {
            return Err(refused(
                "the agent's descriptor is not a memfd sealed against writing, growing and shrinking: seal it",
            ));
        }
    }
    let file = File::from(fd);
    let len = file.metadata()?.len();
    if len == 0 || len > MAX_AGENT_BYTES {
        return Err(refused(&format!(
            "the agent has {len} bytes: send 1 to {MAX_AGENT_BYTES}"
        )));
    }
    Ok(file)
}

/// Copy the agent into the worker's directory: a file of root's that the job may run and read.
fn copy_agent(agent: &File, run: &OwnedFd) -> Result<()> {
    let name = AGENT.rsplit('/').next().expect("a path has a last part");
    let describe = || "cannot copy the agent";
    let mut copy =
        open_file(run, name, OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC).with_context(describe)?;
    let mut buffer = vec![0; 128 << 10];
    let mut at = 0;
    // At offsets of our own: the sender shares the descriptor's.
    loop {
        let n = agent.read_at(&mut buffer, at).with_context(describe)?;
        if n == 0 {
            break;
        }
        copy.write_all(&buffer[..n]).with_context(describe)?;
        at += n as u64;
    }
    copy.set_permissions(std::fs::Permissions::from_mode(0o755))
        .with_context(describe)
}

/// `agent install`'s arguments. None comes from the socket but the token, which is a plain word.
fn arguments(config: &Config, slot: &Slot, bootstrap: &BootstrapToken) -> Vec<String> {
    let mut arguments = vec!["install".to_owned()];
    for (name, value) in &slot.env {
        arguments.extend(["-e".to_owned(), format!("{}={}", name.as_str(), value.as_str())]);
    }
    arguments.extend(["--no-service", "--no-setuid", "--use-var-run"].map(str::to_owned));
    arguments.extend([
        config.general.baseurl.as_str().to_owned(),
        bootstrap.as_str().to_owned(),
    ]);
    arguments
}

/// The slot's device nodes as they are on the host at this moment.
fn devices(host: &Host, slot: &Slot) -> Result<Vec<(PathBuf, SFlag, u64)>> {
    let device = |path: &protocol::config::DevicePattern| {
        let below_dev = path.below_dev();
        let stat = look(&host.dev, below_dev)
            .with_context(|| format!("device {path} is not there: plug it in, or remove it from devices"))?;
        match kind(&stat) {
            node @ (SFlag::S_IFCHR | SFlag::S_IFBLK) => Ok((below_dev.to_owned(), node, stat.st_rdev)),
            _ => bail!("{path} is no device node: name one in devices"),
        }
    };
    slot.devices.iter().map(device).collect()
}

/// From a copy of root to the job's user in the job's view. Each step has its place.
fn enter(plan: &Plan) -> Result<()> {
    // A session of its own: no terminal of the helper's is reachable.
    nix::unistd::setsid().context("cannot make a session")?;
    umask(Mode::empty());
    // The root is the template's already, copied with the namespace. Add what is this job's own.
    for tree in &plan.trees {
        bind_tree(plan, tree)?;
    }
    for (place, source) in &plan.read_only {
        bind(source, place, view::READ_ONLY)?;
    }
    for name in ["passwd", "group"] {
        let source = Path::new(PRIVATE).join("workers").join(&plan.worker).join(name);
        bind(&source, &Path::new("/etc").join(name), view::READ_ONLY)?;
    }
    make_dev(plan).context("cannot make /dev")?;
    let hardened = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    // The helper's own standard streams stay outside.
    let null = nix::fcntl::open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    drop(null);
    mount(Some("proc"), "/proc", Some("proc"), hardened, None::<&str>).context("cannot mount /proc")?;
    // The way to other workers' directories and to sources of other slots goes now.
    umount2(PRIVATE, MntFlags::MNT_DETACH).context("cannot leave the private part")?;
    nix::unistd::chdir("/")?;
    umask(Mode::from_bits_truncate(0o022));
    // The bounding set while we still may change it; then nothing can ever add a capability again.
    for capability in caps::all() {
        // EINVAL: newer than this kernel.
        if let Err(error) = caps::drop(None, caps::CapSet::Bounding, capability)
            && caps::has_cap(None, caps::CapSet::Bounding, capability).unwrap_or(false)
        {
            bail!("cannot drop {capability}: {error}");
        }
    }
    user::become_user(plan.uid, &plan.groups)
}

fn bind(source: &Path, place: &Path, attributes: u64) -> Result<()> {
    let describe = || format!("cannot mount {} at {}", source.display(), place.display());
    let copy = sys::clone_mount(source, true).with_context(describe)?;
    sys::set_mount_attributes(copy.as_fd(), attributes).with_context(describe)?;
    sys::attach_mount(copy.as_fd(), place).with_context(describe)
}

/// `home/USER` is mounted as `/home` by way of its parent, and so is `run/…`.
fn bind_tree(plan: &Plan, tree: &Tree) -> Result<()> {
    let top = tree
        .below_fs
        .split('/')
        .next()
        .expect("split gives one part at least");
    let source = Path::new(PRIVATE)
        .join("workers")
        .join(&plan.worker)
        .join("fs")
        .join(top);
    bind(&source, &tree.place, view::WRITABLE)
}

/// A small `/dev`: what every program may count on, terminals and shared memory of the job's own, and
/// the slot's devices, owned by the job's user.
fn make_dev(plan: &Plan) -> Result<()> {
    let secure = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(
        Some("tmpfs"),
        "/dev",
        Some("tmpfs"),
        secure,
        Some("mode=755,size=64k"),
    )?;
    let everybody = Mode::from_bits_truncate(0o666);
    // Numbers: the kernel's admin-guide/devices.rst.
    for (name, major, minor) in [
        ("null", 1, 3),
        ("zero", 1, 5),
        ("full", 1, 7),
        ("random", 1, 8),
        ("urandom", 1, 9),
        ("tty", 5, 0),
    ] {
        mknod(
            &Path::new("/dev").join(name),
            SFlag::S_IFCHR,
            everybody,
            nix::sys::stat::makedev(major, minor),
        )?;
    }
    for (link, target) in [
        ("ptmx", "pts/ptmx"),
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        symlink(target, Path::new("/dev").join(link))?;
    }
    for (path, node, number) in &plan.devices {
        let place = Path::new("/dev").join(path);
        std::fs::create_dir_all(place.parent().expect("it is below /dev"))?;
        for directory in path
            .ancestors()
            .skip(1)
            .filter(|above| !above.as_os_str().is_empty())
        {
            std::fs::set_permissions(
                Path::new("/dev").join(directory),
                std::fs::Permissions::from_mode(0o755),
            )?;
        }
        match mknod(&place, *node, Mode::from_bits_truncate(0o600), *number) {
            // One that every job has.
            Err(Errno::EEXIST) => continue,
            result => result.with_context(|| format!("cannot make {}", place.display()))?,
        }
        chown(&place, Some(plan.uid.get()), Some(plan.uid.get()))?;
    }
    for (name, kind, options) in [
        ("pts", "devpts", Some("newinstance,ptmxmode=0666,mode=0620")),
        ("shm", "tmpfs", Some("mode=1777,size=50%")),
        ("mqueue", "mqueue", None),
    ] {
        let place = Path::new("/dev").join(name);
        std::fs::create_dir(&place)?;
        std::fs::set_permissions(&place, std::fs::Permissions::from_mode(0o755))?;
        let nodev = if kind == "devpts" {
            MsFlags::empty()
        } else {
            MsFlags::MS_NODEV
        };
        match mount(Some(kind), &place, Some(kind), secure | nodev, options) {
            // A kernel without POSIX message queues: then a job has none.
            Err(Errno::ENODEV) if kind == "mqueue" => {}
            result => result.with_context(|| format!("cannot mount {}", place.display()))?,
        }
    }
    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | secure;
    Ok(mount(
        None::<&str>,
        "/dev",
        None::<&str>,
        read_only,
        None::<&str>,
    )?)
}
