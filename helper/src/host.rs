//! The host's places, opened once, before the daemon leaves the host's mount namespace. All that the
//! helper touches later it reaches from these descriptors, with fixed names and names made of a
//! `WorkerId`; it never follows a link.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2, renameat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use protocol::config::{self, Config};
use protocol::{Error, ErrorKind};

use crate::limits::Abilities;
use crate::network::Settings;
use crate::rootfs::{READ_ONLY, WRITABLE};
use crate::sys;
use crate::user::Accounts;

#[derive(Debug)]
pub struct Host {
    /// `--root`: `/`, or where tests have put a host of their own.
    pub root: PathBuf,
    /// The directory of the configuration.
    config: OwnedFd,
    /// The state directory's `workers/`.
    pub workers: OwnedFd,
    /// `/run/userdb`.
    pub userdb: OwnedFd,
    /// The host's `/etc`, for `passwd` and `group`.
    pub etc: OwnedFd,
    /// The host's `/dev`.
    pub dev: OwnedFd,
    /// Below it, each worker with its agent started has the `/dev` of its job.
    pub devices: OwnedFd,
    /// Where the supervisor listens for jobs that can reach nobody else.
    pub gate: OwnedFd,
    /// The cgroup directory below which each worker has its own.
    pub cgroups: OwnedFd,
    /// Which limits this host can enforce.
    pub abilities: Abilities,
    /// What the host's network namespace has set.
    pub network: Settings,
    /// Read last, and true for as long as the files are the same. The daemon's children begin with the daemon's.
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
        let gate = root.join(config::GATE_DIR);
        let closed = gate.parent().expect("GATE_DIR has a directory");
        // The supervisor's, in directories of root's: nobody has put a link there.
        for (place, mode) in [
            (closed, 0o700),
            (&gate, 0o711),
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
        only_root_writes(config_dir)?;
        let workers = open_alone(&workers, WRITABLE)?;
        let cgroups = open_alone(cgroups, WRITABLE)?;
        Ok(Host {
            root: root.to_owned(),
            config: open_alone(config_dir, READ_ONLY)?,
            abilities: Abilities::of(&workers, &cgroups)?,
            network: Settings::read()?,
            workers,
            userdb: open_alone(&userdb, WRITABLE)?,
            etc: open_alone(Path::new("/etc"), READ_ONLY)?,
            dev: open_alone(Path::new("/dev"), READ_ONLY)?,
            devices: open_alone(&devices, WRITABLE)?,
            gate: open_alone(&gate, READ_ONLY)?,
            cgroups,
            config_read: RefCell::default(),
            accounts_read: RefCell::default(),
            reads: Cell::default(),
        })
    }

    /// What the daemon's children keep open.
    pub fn descriptors(&self) -> [i32; 8] {
        [
            &self.config,
            &self.workers,
            &self.userdb,
            &self.etc,
            &self.dev,
            &self.devices,
            &self.gate,
            &self.cgroups,
        ]
        .map(AsRawFd::as_raw_fd)
    }

    /// The configuration for a request.
    pub fn configuration_now(&self) -> Result<Rc<Config>, Error> {
        self.configuration()
            .map(|(config, _)| config)
            .map_err(misconfigured)
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

/// Refuse a directory that somebody but root could write or replace: itself and all above it. A sticky
/// directory (`/tmp`) above is fine, what root has in it is root's. What is not there is nobody's.
pub fn only_root_writes(path: &Path) -> Result<()> {
    for directory in path.ancestors() {
        let meta = match std::fs::symlink_metadata(directory) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            meta => meta.with_context(|| format!("cannot look at {}", directory.display()))?,
        };
        let open_to_others = meta.mode() & 0o022 != 0 && (meta.mode() & 0o1000 == 0 || directory == path);
        if !meta.is_dir() || meta.uid() != 0 || open_to_others {
            bail!(
                "{} must be a directory of root's that nobody else can write: chown root: and chmod go-w it",
                directory.display()
            );
        }
    }
    Ok(())
}

/// Make a directory that only root can write, and those above it that are not there.
pub fn make_directories(path: &Path, mode: u32) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    // Before, so that nothing is made or opened where somebody has put a link; and after, because in a
    // sticky directory somebody may have been quicker.
    only_root_writes(path)?;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .with_context(|| format!("cannot make the directory {}", path.display()))?;
    only_root_writes(path)
}

pub const DIRECTORY: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_CLOEXEC);

/// Open a directory as the root of a mount that is attached nowhere (`open_tree(2)`): by this descriptor nothing above
/// it can be reached, `..` ends there; and nothing is written where the mount is read-only. Connections have these
/// descriptors, and may ignore modes.
fn open_alone(path: &Path, attributes: u64) -> Result<OwnedFd> {
    let describe = || format!("cannot open {} by itself", path.display());
    let mount = sys::clone_mount(path, false).with_context(describe)?;
    sys::set_mount_attributes(mount.as_fd(), attributes, 0).with_context(describe)?;
    // The first only names it: what is synced must be open.
    open_dir(mount, ".").with_context(describe)
}

/// Open `name` below `parent`: never above it, and never through a link of any kind (`openat2(2)`).
fn open_below(parent: impl AsFd, name: &Path, flags: OFlag, mode: Mode) -> nix::Result<OwnedFd> {
    let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).mode(mode);
    let stay = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
    openat2(parent, name, how.resolve(stay))
}

/// Open the directory `name` in `parent`, not through a link.
pub fn open_dir(parent: impl AsFd, name: impl AsRef<Path>) -> nix::Result<OwnedFd> {
    open_below(parent, name.as_ref(), DIRECTORY, Mode::empty())
}

/// Open or make the file `name` in `parent`, not through a link; what is made is 0600.
pub fn open_file(parent: impl AsFd, name: impl AsRef<Path>, flags: OFlag) -> nix::Result<File> {
    let mode = if flags.contains(OFlag::O_CREAT) {
        Mode::S_IRUSR | Mode::S_IWUSR
    } else {
        Mode::empty()
    };
    Ok(File::from(open_below(parent, name.as_ref(), flags, mode)?))
}

/// The whole of a small file; none if it is not there.
pub fn read_small(parent: impl AsFd, name: impl AsRef<Path>) -> std::io::Result<Option<String>> {
    let file = match open_file(parent, name, OFlag::O_RDONLY) {
        Err(Errno::ENOENT) => return Ok(None),
        other => other?,
    };
    // Room for nearly all, so that it takes one call.
    let mut bytes = Vec::with_capacity(4096);
    file.take(64 << 10).read_to_end(&mut bytes)?;
    let text = String::from_utf8(bytes);
    Ok(Some(text.map_err(|error| {
        std::io::Error::new(std::io::ErrorKind::InvalidData, error)
    })?))
}

/// Make the directory `name` in `parent` unless it is there.
pub fn make_dir(parent: impl AsFd, name: impl AsRef<Path>, mode: u32) -> nix::Result<()> {
    match mkdirat(parent, name.as_ref(), Mode::from_bits_truncate(mode)) {
        Err(Errno::EEXIST) => Ok(()),
        other => other,
    }
}

/// Write a file so that whoever reads it sees all of it, also after a crash of ours. It is for what a power loss takes
/// with it anyway.
pub fn write_atomically(parent: BorrowedFd<'_>, name: &str, text: &str, mode: u32) -> std::io::Result<()> {
    let part = format!("{name}.part");
    remove_file(parent, &part)?;
    let mut file = open_file(parent, &part, OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL)?;
    file.write_all(text.as_bytes())?;
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode))?;
    Ok(renameat(parent, part.as_str(), parent, name)?)
}

/// Remove a file or link, if it is there.
pub fn remove_file(parent: impl AsFd, name: impl AsRef<Path>) -> nix::Result<()> {
    ignore_missing(unlinkat(parent, name.as_ref(), UnlinkatFlags::NoRemoveDir))
}

/// Remove an empty directory, if it is there.
pub fn remove_dir(parent: impl AsFd, name: impl AsRef<Path>) -> nix::Result<()> {
    ignore_missing(unlinkat(parent, name.as_ref(), UnlinkatFlags::RemoveDir))
}

fn ignore_missing(result: nix::Result<()>) -> nix::Result<()> {
    match result {
        Err(Errno::ENOENT) => Ok(()),
        other => other,
    }
}

/// What is at `name` in `parent`, itself, not what a link there points to.
pub fn look(parent: impl AsFd, name: impl AsRef<Path>) -> nix::Result<FileStat> {
    fstatat(parent, name.as_ref(), AtFlags::AT_SYMLINK_NOFOLLOW)
}

pub fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

/// The names in a directory, `.` and `..` left out.
pub fn names(directory: BorrowedFd<'_>) -> nix::Result<Vec<std::ffi::OsString>> {
    use std::os::unix::ffi::OsStrExt;
    // A descriptor of its own: reading moves the offset, which the copies of a descriptor share.
    let mut listing = nix::dir::Dir::from_fd(open_dir(directory, ".")?)?;
    let mut names = Vec::new();
    for entry in listing.iter() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(std::ffi::OsStr::from_bytes(name).to_owned());
        }
    }
    Ok(names)
}

#[cfg(test)]
pub mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};

    use super::*;

    pub fn open_path(path: &Path) -> nix::Result<OwnedFd> {
        nix::fcntl::open(path, DIRECTORY, Mode::empty())
    }

    /// A host of a test's own below this directory, with nothing in it.
    pub fn host(root: &Path) -> Host {
        let make = |name: &str| {
            fs::create_dir_all(root.join(name)).unwrap();
            open_path(&root.join(name)).unwrap()
        };
        let (workers, cgroups) = (make("workers"), make("cgroups"));
        Host {
            network: Settings::read().unwrap(),
            root: root.to_owned(),
            config: make("etc/buildomat-user-factory"),
            abilities: Abilities::of(&workers, &cgroups).unwrap(),
            workers,
            userdb: make("userdb"),
            etc: make("etc"),
            dev: make("dev"),
            devices: make("devices"),
            gate: make("gate"),
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
            assert_eq!(host.configuration_now().unwrap_err().kind, ErrorKind::Busy);
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
    fn a_directory_that_somebody_else_could_replace_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        fs::create_dir_all(at("a/b/c")).unwrap();
        let (a, b) = (at("a"), at("a/b"));
        let accepts = |name: &str| only_root_writes(&at(name)).is_ok();
        assert!(accepts("a/b") && accepts("a/b/c") && accepts("a/b/not/yet/there"));
        for mode in [0o775, 0o757, 0o777] {
            set_mode(&b, mode);
            assert!(
                !accepts("a/b") && !accepts("a/b/c") && !accepts("a/b/later"),
                "{mode:o}"
            );
            // Sticky, it is safe to have something in, but not to be.
            set_mode(&b, mode | 0o1000);
            assert!(!accepts("a/b") && accepts("a/b/c"), "sticky {mode:o}");
        }
        set_mode(&b, 0o755);
        chown(&a, Some(1), None).unwrap();
        assert!(!accepts("a") && !accepts("a/b") && !accepts("a/b/c"));
        chown(&a, Some(0), None).unwrap();
        fs::write(at("file"), "").unwrap();
        symlink(&a, at("link")).unwrap();
        assert!(!accepts("file") && !accepts("file/below") && !accepts("link") && !accepts("link/b"));
        // What cannot be looked at is not what is not there.
        assert!(!accepts(&"x".repeat(300)));

        make_directories(&at("a/new/er"), 0o711).unwrap();
        assert_eq!(fs::metadata(at("a/new/er")).unwrap().mode() & 0o777, 0o711);
        assert!(make_directories(&at("link/new"), 0o755).is_err());
        assert!(!at("a/new/new").exists() && !at("a/b/new").exists());
    }

    #[test]
    fn files_are_roots_alone_small_and_whole() {
        let root = tempfile::tempdir().unwrap();
        let here = open_path(root.path()).unwrap();
        let at = |name: &str| root.path().join(name);
        let mode = |name: &str| fs::symlink_metadata(at(name)).unwrap().mode() & 0o777;

        let made = open_file(&here, "made", OFlag::O_WRONLY | OFlag::O_CREAT).unwrap();
        assert_eq!(mode("made"), 0o600);
        make_dir(&here, "dir", 0o700).unwrap();
        make_dir(&here, "dir", 0o700).unwrap();
        assert!(make_dir(&here, "no/dir", 0o700).is_err());
        let dir = open_dir(&here, "dir").unwrap();
        // Nothing is left open for a program that is started.
        for fd in [made.as_fd(), dir.as_fd()] {
            let flags = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFD).unwrap();
            assert_eq!(flags, libc::FD_CLOEXEC);
        }

        assert_eq!(read_small(&here, "none").unwrap(), None);
        assert!(read_small(&here, "dir").is_err());
        fs::write(at("long"), "x".repeat(70_000)).unwrap();
        assert_eq!(read_small(&here, "long").unwrap().unwrap().len(), 64 << 10);

        // A crash has left a part, and somebody has put a link there: it is not written through.
        fs::write(at("kept"), "kept").unwrap();
        symlink("kept", at("new.part")).unwrap();
        for text in ["one", "two"] {
            write_atomically(here.as_fd(), "new", text, 0o640).unwrap();
            assert_eq!(read_small(&here, "new").unwrap().as_deref(), Some(text));
            assert_eq!(mode("new"), 0o640);
        }
        assert_eq!(fs::read_to_string(at("kept")).unwrap(), "kept");
        assert!(!at("new.part").exists());

        let mut found = names(here.as_fd()).unwrap();
        found.sort();
        assert_eq!(found, ["dir", "kept", "long", "made", "new"]);
        assert_eq!(kind(&look(&here, "dir").unwrap()), SFlag::S_IFDIR);
        assert_eq!(kind(&look(&here, "new").unwrap()), SFlag::S_IFREG);
        for _ in 0..2 {
            remove_file(&here, "new").unwrap();
            remove_dir(&here, "dir").unwrap();
        }
        assert!(!at("new").exists() && !at("dir").exists());
        assert!(remove_dir(&here, "kept").is_err() && remove_file(&here, "kept/x").is_err());
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

    #[test]
    fn nothing_is_opened_through_a_link_or_above_its_parent() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        fs::write(dir.path().join("secret"), "x").unwrap();
        symlink("a", dir.path().join("link")).unwrap();
        symlink("../../secret", dir.path().join("a/b/link")).unwrap();
        let here = open_path(dir.path()).unwrap();
        let below = open_dir(&here, "a").unwrap();
        assert!(open_dir(&below, "b").is_ok());
        assert_eq!(open_dir(&here, "link").unwrap_err(), Errno::ENOTDIR);
        assert_eq!(open_dir(&here, "link/b").unwrap_err(), Errno::ELOOP);
        assert_eq!(open_dir(&below, "..").unwrap_err(), Errno::EXDEV);
        let read = |parent: &OwnedFd, name: &str| open_file(parent, name, OFlag::O_RDONLY).unwrap_err();
        assert_eq!(read(&below, "b/link"), Errno::ELOOP);
        assert_eq!(read(&below, "../secret"), Errno::EXDEV);
        assert_eq!(read(&below, "/etc/passwd"), Errno::EXDEV);
    }
}
