//! The host's places, opened once, before the monitor leaves the host's mount namespace. All that the
//! helper touches later it reaches from these descriptors, with fixed names and names made of a
//! `WorkerId`; it never follows a link.

pub mod abilities;
pub mod accounts;
pub mod cgroup;
pub mod directory;
pub mod filesystem;
pub mod quota;
pub mod record;
pub mod startup_check;
pub mod sysctl;
pub mod usb;
pub mod users;

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result, ensure};
use nix::fcntl::OFlag;
use protocol::config::{self, Config};
use protocol::{Error, ErrorKind, SlotName};

use crate::sys::{DEVICES, READ_ONLY, WRITABLE};
use abilities::Abilities;
use accounts::Accounts;
use directory::{check_only_root_writes, make_directories, open_detached, open_detached_without, open_file};
use sysctl::NetworkSysctls;

#[derive(Debug)]
pub struct Host {
    /// `--root`: `/`, or where tests have put a host of their own.
    pub root: PathBuf,
    /// The directory of the configuration.
    pub config: OwnedFd,
    /// The state directory's `workers/`.
    pub workers: OwnedFd,
    /// `/run/userdb`.
    pub userdb: OwnedFd,
    /// The host's `/etc`, for `passwd` and `group`.
    pub etc: OwnedFd,
    /// The host's `/dev`.
    pub dev: OwnedFd,
    /// The host's `/sys`.
    pub sys: OwnedFd,
    /// Below it, each worker with its agent started has the `/dev` of its job.
    pub devices: OwnedFd,
    /// The same with nodes that can be opened, and `sys` where the power of ports can be written: for the monitor and the
    /// manual program alone. Linux before 6.15 copies no mount that is attached nowhere.
    pub device_nodes: OwnedFd,
    pub writable_sys: OwnedFd,
    /// Where the supervisor listens for jobs without the host's network (the egress proxy).
    pub proxy_dir: OwnedFd,
    /// The cgroup directory below which each worker has its own.
    pub cgroups: OwnedFd,
    /// Which limits this host can enforce.
    pub abilities: Abilities,
    /// The sysctls of the host's network namespace.
    pub network_sysctls: NetworkSysctls,
    /// Read last, and true for as long as the files are the same. The monitor's children begin with the monitor's.
    config_read: Latest<Config>,
    accounts_read: Latest<Accounts>,
    /// How often this process, or one that it was forked from, has read either.
    reads: Cell<u64>,
}

/// What was made of files, with what tells whether they are the same still.
type Latest<T> = RefCell<Option<(Vec<FileIdentity>, Rc<T>)>>;

/// What is known of these files, or what `read` makes of them now.
fn latest<T>(
    known: &Latest<T>,
    files: &[&File],
    read: impl FnOnce() -> Result<T>,
) -> Result<(Vec<FileIdentity>, Rc<T>)> {
    let identities: std::io::Result<Vec<_>> = files.iter().map(|file| FileIdentity::of_file(file)).collect();
    let identities = identities?;
    match &*known.borrow() {
        Some((same, made)) if *same == identities => return Ok((identities, made.clone())),
        _ => {}
    }
    let made = Rc::new(read()?);
    *known.borrow_mut() = Some((identities.clone(), made.clone()));
    Ok((identities, made))
}

impl Host {
    pub fn open(root: &Path, cgroups: &Path) -> Result<Host> {
        let run_dir = root.join(config::RUN_DIR);
        // Each by itself: those above a directory are made with the same mode.
        make_directories(&run_dir, 0o755)?;
        let devices = run_dir.join("devices");
        make_directories(&devices, 0o700)?;
        let proxy_dir = root.join(config::PROXY_DIR);
        let closed = proxy_dir.parent().expect("PROXY_DIR has a directory");
        // The supervisor's, in directories of root's: nobody has put a link there.
        for (place, mode) in [
            (closed, 0o700),
            (&proxy_dir, 0o711),
            (&root.join(config::CONTROL_DIR), 0o755),
        ] {
            if !place.is_dir() {
                make_directories(place, mode)?;
            }
        }
        let config_dir = root.join(config::CONFIG_PATH);
        let config_dir = config_dir.parent().expect("CONFIG_PATH has a directory");
        let workers = root.join(config::STATE_DIR).join("workers");
        make_directories(&workers, 0o755)?;
        std::fs::set_permissions(&workers, std::os::unix::fs::PermissionsExt::from_mode(0o700))
            .with_context(|| format!("cannot close {} to others", workers.display()))?;
        let userdb = root.join("run/userdb");
        make_directories(&userdb, 0o755)?;
        check_only_root_writes(config_dir)?;
        let workers = open_detached(&workers, WRITABLE)?;
        let cgroups = open_detached(cgroups, WRITABLE)?;
        Ok(Host {
            root: root.to_owned(),
            config: open_detached(config_dir, READ_ONLY)?,
            abilities: Abilities::of(&workers, &cgroups)?,
            network_sysctls: NetworkSysctls::read()?,
            workers,
            userdb: open_detached(&userdb, WRITABLE)?,
            etc: open_detached(Path::new("/etc"), READ_ONLY)?,
            dev: open_detached(Path::new("/dev"), READ_ONLY)?,
            sys: open_detached(Path::new("/sys"), READ_ONLY)?,
            devices: open_detached(&devices, WRITABLE)?,
            device_nodes: open_detached_without(&devices, DEVICES, libc::MOUNT_ATTR_NODEV)?,
            writable_sys: open_detached_without(Path::new("/sys"), WRITABLE, libc::MOUNT_ATTR_RDONLY)?,
            proxy_dir: open_detached(&proxy_dir, READ_ONLY)?,
            cgroups,
            config_read: RefCell::default(),
            accounts_read: RefCell::default(),
            reads: Cell::default(),
        })
    }

    /// What all of the monitor's children keep open.
    pub fn descriptors(&self) -> [i32; 9] {
        [
            &self.config,
            &self.workers,
            &self.userdb,
            &self.etc,
            &self.dev,
            &self.sys,
            &self.devices,
            &self.proxy_dir,
            &self.cgroups,
        ]
        .map(AsRawFd::as_raw_fd)
    }

    /// What those keep open besides that clean up after a worker.
    pub fn descriptors_of_devices(&self) -> [i32; 2] {
        [&self.device_nodes, &self.writable_sys].map(AsRawFd::as_raw_fd)
    }

    /// The configuration as it is now, and what tells whether the file is still the same later.
    pub fn configuration(&self) -> Result<(Rc<Config>, FileIdentity)> {
        let path = self.root.join(config::CONFIG_PATH);
        let name = path.file_name().expect("CONFIG_PATH has a file name");
        let file = open_file(&self.config, Path::new(name), OFlag::O_RDONLY | OFlag::O_NONBLOCK)
            .with_context(|| format!("cannot open {}", path.display()))?;
        let meta = file.metadata()?;
        ensure!(
            meta.is_file() && meta.uid() == 0 && meta.mode() & 0o022 == 0,
            "{} must be a file of root's that nobody else can write: chown root: and chmod go-w it",
            path.display()
        );
        ensure!(
            meta.len() <= 1 << 20,
            "{} is over 1 MiB: that is no configuration",
            path.display()
        );
        let read = || {
            self.reads.set(self.reads.get() + 1);
            let mut text = String::new();
            (&file)
                .take(1 << 20)
                .read_to_string(&mut text)
                .with_context(|| format!("cannot read {}", path.display()))?;
            Config::parse(&text).map_err(|mistakes| {
                let first = &mistakes[0];
                anyhow::anyhow!("{}:{}: {}", path.display(), first.line, first.message)
            })
        };
        let (identities, config) = latest(&self.config_read, &[&file], read)?;
        Ok((config, identities[0]))
    }

    /// How often the configuration and the accounts were read because nothing was known of them as they are.
    pub fn reads(&self) -> u64 {
        self.reads.get()
    }

    /// Who the host knows now by its `/etc/passwd` and `/etc/group`.
    pub fn accounts(&self) -> Result<Rc<Accounts>> {
        let open = |name: &str| {
            open_file(&self.etc, name, OFlag::O_RDONLY).with_context(|| format!("cannot open /etc/{name}"))
        };
        let (passwd, group) = (open("passwd")?, open("group")?);
        let read = || {
            self.reads.set(self.reads.get() + 1);
            Accounts::read(&passwd, &group)
        };
        Ok(latest(&self.accounts_read, &[&passwd, &group], read)?.1)
    }
}

/// A mistake in the configuration is no reason to fail a job: the job waits until an operator has corrected it.
pub fn misconfigured(error: anyhow::Error) -> Error {
    Error::new(ErrorKind::Busy, format!("{error:#}"))
}

/// The answer to a request about a slot that the configuration does not have.
pub fn no_such_slot(slot: &SlotName) -> Error {
    Error::new(
        ErrorKind::NoSuchSlot,
        format!("slot {slot} is not in the configuration: add it or use another"),
    )
}

/// Two of these are equal when nobody has changed or replaced the file in between.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub struct FileIdentity(u64, u64, i64, i64, u64);

impl FileIdentity {
    fn of(meta: &std::fs::Metadata) -> Self {
        Self(
            meta.dev(),
            meta.ino(),
            meta.ctime(),
            meta.ctime_nsec(),
            meta.len(),
        )
    }

    fn of_file(file: &File) -> std::io::Result<Self> {
        Ok(Self::of(&file.metadata()?))
    }
}

#[cfg(test)]
pub mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use nix::sys::stat::Mode;

    use super::*;
    use crate::host::directory::tests::open_path;

    /// A host of a test's own below this directory, with nothing in it.
    pub fn host(root: &Path) -> Host {
        let make = |name: &str| {
            fs::create_dir_all(root.join(name)).unwrap();
            open_path(&root.join(name)).unwrap()
        };
        let (workers, cgroups) = (make("workers"), make("cgroups"));
        Host {
            network_sysctls: NetworkSysctls::read().unwrap(),
            root: root.to_owned(),
            config: make("etc/buildomat-user-factory"),
            abilities: Abilities::of(&workers, &cgroups).unwrap(),
            workers,
            userdb: make("userdb"),
            etc: make("etc"),
            dev: make("dev"),
            sys: make("sys"),
            devices: make("devices"),
            device_nodes: make("devices"),
            writable_sys: make("sys"),
            proxy_dir: make("egress"),
            cgroups,
            config_read: RefCell::default(),
            accounts_read: RefCell::default(),
            reads: Cell::default(),
        }
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_configuration_is_a_file_that_root_alone_can_write_and_not_a_long_one() {
        let root = tempfile::tempdir().unwrap();
        let host = host(root.path());
        let path = root.path().join(config::CONFIG_PATH);
        let refuses = |why: &str| {
            let error = format!("{:#}", host.configuration().unwrap_err());
            assert!(error.contains(why), "{error}");
        };
        refuses("No such file");
        let text = "[general]\nbaseurl = \"http://b\"\n[factory]\ntoken_file = \"/t\"\n[slots.a]\n\
                    target = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n#";
        fs::write(&path, text).unwrap();
        for mode in [0o600, 0o644, 0o755] {
            set_mode(&path, mode);
            assert_eq!(host.configuration().unwrap().0.slots.len(), 1, "{mode:o}");
        }
        for mode in [0o664, 0o646, 0o620, 0o602, 0o666] {
            set_mode(&path, mode);
            refuses("a file of root's");
        }
        set_mode(&path, 0o644);
        chown(&path, Some(1), None).unwrap();
        refuses("a file of root's");
        chown(&path, Some(0), None).unwrap();
        let longest = text.to_owned() + &"#".repeat((1 << 20) - text.len());
        fs::write(&path, &longest).unwrap();
        let (_, before) = host.configuration().unwrap();
        assert_eq!(host.configuration().unwrap().1, before);
        fs::write(&path, longest + "#").unwrap();
        refuses("over 1 MiB");
        fs::write(&path, "[general]\nbaseurl = 1\n").unwrap();
        refuses("config.toml:2: ");
        // Neither a link to a good one, nor what never ends or never begins.
        fs::rename(&path, root.path().join("good")).unwrap();
        symlink(root.path().join("good"), &path).unwrap();
        refuses("symbolic links");
        fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o600)).unwrap();
        refuses("a file of root's");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        refuses("a file of root's");
    }

    #[test]
    fn a_replaced_configuration_is_another() {
        let root = tempfile::tempdir().unwrap();
        let identity = |name: &str| {
            fs::write(root.path().join(name), "x").unwrap();
            FileIdentity::of(&fs::metadata(root.path().join(name)).unwrap())
        };
        assert_ne!(identity("a"), identity("b"));
    }

    #[test]
    fn children_keep_the_hosts_places_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let host = host(root.path());
        let mut kept = host.descriptors();
        kept.sort_unstable();
        assert!(kept.windows(2).all(|two| two[0] != two[1]));
        assert!(kept.contains(&host.workers.as_raw_fd()) && kept.contains(&host.config.as_raw_fd()));
        assert!(kept.contains(&host.cgroups.as_raw_fd()) && kept.contains(&host.etc.as_raw_fd()));
    }
}
