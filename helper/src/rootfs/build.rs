//! Building the root file system that every job gets a copy of: a small tmpfs with the host's top directories in it,
//! read-only; so a job's namespace has few mounts, however many the host has. What differs between jobs, `sandbox` adds.
//!
//! All of this happens in a builder, which has a limited time, and in the host's mounts until the last step.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{File, FileType};
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::inotify::{AddWatchFlags, Inotify};
use protocol::config::{self, Config, HostPath, PRIVATE_TREES};

use super::sockets;
use crate::host::Host;
use crate::{policy, sys};

/// Where the root file system keeps what only `sandbox` may see, and unmounts before the job begins.
pub const PRIVATE: &str = "/.buildomat-factory";

/// Top directories of which the job gets its own, or none: they are not the host's.
const NOT_THE_HOSTS: [&str; 10] = [
    "proc",
    "dev",
    "run",
    "tmp",
    "root",
    "home",
    "input",
    "work",
    "lost+found",
    ".buildomat-factory",
];

pub const READ_ONLY: u64 = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
pub const WRITABLE: u64 = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
pub const DEVICES: u64 = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;

/// The most bytes of the mount table that are read: more than `fs.mount-max` lets it have with paths of a usual length.
/// A mount beyond that is shown, or not, by its mode.
const MAX_MOUNT_TABLE: u64 = 64 << 20;
/// The most entries of a directory that are mounted one by one.
const MAX_ENTRIES: usize = 4096;

/// The bind of `source`, for a job: the place where `sandbox` finds it.
pub fn source_path(source: &HostPath) -> PathBuf {
    let name = source.to_string().replace('%', "%25").replace('/', "%2f");
    Path::new(PRIVATE).join("sources").join(name)
}

fn is_not_found(error: &anyhow::Error) -> bool {
    let cause = error.root_cause().downcast_ref::<std::io::Error>();
    cause.is_some_and(|cause| cause.kind() == ErrorKind::NotFound)
}

/// A path as the kernel writes it into `mountinfo` (`proc_pid_mountinfo(5)`): white space and backslashes in octal.
fn unescape(path: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = path;
    while let [first, more @ ..] = rest {
        let octal = more.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                bytes.push(byte);
                rest = &more[3..];
            }
            _ => {
                bytes.push(*first);
                rest = more;
            }
        }
    }
    bytes
}

/// Can no job enter this directory of the host? It is nobody's owner there, and never in root's group.
fn is_closed_to_jobs(directory: &Path) -> bool {
    std::fs::symlink_metadata(directory).is_ok_and(|meta| {
        let for_a_group = meta.gid() != 0 && meta.mode() & 0o010 != 0;
        meta.is_dir() && meta.mode() & 0o001 == 0 && !for_a_group
    })
}

/// Make the root file system, and be in it. `directories` will tell of changes in directories of the host that it depends
/// on. This namespace is nobody else's: a failure halfway leaves mounts that no job ever sees.
pub fn build(host: &Host, config: &Config, directories: &Inotify) -> Result<()> {
    Builder::build(host, config, directories)
}

struct Builder<'a> {
    /// A copy of the mount of jobs' `/dev` directories, made before the tmpfs lay over it.
    devices: OwnedFd,
    /// The tmpfs that becomes the root.
    new_root: PathBuf,
    /// Paths, as the job sees them, that are directories of the tmpfs.
    open: BTreeSet<PathBuf>,
    /// What slots show at other places, without links, and where the root file system has it.
    sources: Vec<(PathBuf, PathBuf)>,
    /// Watches the directories of the host that the result depends on.
    directories: &'a Inotify,
}

fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

impl<'a> Builder<'a> {
    /// The dangerous steps in their order.
    fn build(host: &Host, config: &Config, directories: &'a Inotify) -> Result<()> {
        super::make_private()?;
        let new_root = host.root.join(config::RUN_DIR);
        let devices = sys::clone_mount(&new_root.join("devices"), false)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(
            Some("tmpfs"),
            &new_root,
            Some("tmpfs"),
            flags,
            Some("mode=755,size=16m"),
        )
        .context("cannot mount the new root")?;
        let mut this = Builder {
            devices,
            new_root,
            open: BTreeSet::from([PathBuf::from("/")]),
            sources: Vec::new(),
            directories,
        };
        this.unfold_content(Path::new("/"))?;
        for name in NOT_THE_HOSTS.iter().filter(|name| **name != "lost+found") {
            let is_roots = ["root", ".buildomat-factory"].contains(name);
            this.make_directory(&Path::new("/").join(name), if is_roots { 0o700 } else { 0o755 })?;
        }
        let mut places: Vec<PathBuf> = PRIVATE_TREES.iter().map(PathBuf::from).collect();
        for slot in config.slots.values() {
            let more = slot.writable.iter().chain(slot.read_only.keys());
            places.extend(more.map(|place| place.as_path().to_owned()));
        }
        for place in places {
            this.make_place(&place)
                .with_context(|| format!("cannot make a place for {}", place.display()))?;
        }
        this.prune()?;
        this.private(host, config)?;
        this.hide(host, config)?;
        this.hide_sockets(config)?;
        this.enter()
    }

    /// A change of this directory of the host makes the result out of date.
    fn watch(&self, directory: &Path) -> Result<()> {
        let changes = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        self.directories
            .add_watch(directory, changes)
            .with_context(|| format!("cannot watch {}", directory.display()))?;
        Ok(())
    }

    /// Attach a copy of the host's `source`, with what is mounted below it.
    fn bind(&self, source: &Path, place: &Path, attributes: u64, recursive: bool) -> Result<()> {
        let describe = || format!("cannot show {} to jobs", source.display());
        let copy = sys::clone_mount(source, recursive).with_context(describe)?;
        sys::set_mount_attributes(copy.as_fd(), attributes, 0).with_context(describe)?;
        sys::attach_mount(copy.as_fd(), &below(&self.new_root, place)).with_context(describe)
    }

    fn make_directory(&mut self, path: &Path, mode: u32) -> Result<()> {
        let real = below(&self.new_root, path);
        match std::fs::create_dir(&real) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error.into()),
            _ => std::fs::set_permissions(&real, std::fs::Permissions::from_mode(mode))?,
        }
        self.open.insert(path.to_owned());
        Ok(())
    }

    /// Fill the tmpfs directory `path` with the host's entries, each mounted by itself.
    fn unfold_content(&mut self, path: &Path) -> Result<()> {
        self.watch(path)?;
        for (count, entry) in std::fs::read_dir(path)?.enumerate() {
            let entry = entry?;
            ensure!(
                count < MAX_ENTRIES,
                "{} has more than {MAX_ENTRIES} entries: no place can be made in it",
                path.display()
            );
            let place = path.join(entry.file_name());
            if path == Path::new("/") && NOT_THE_HOSTS.iter().any(|name| *name == entry.file_name()) {
                continue;
            }
            let kind = entry.file_type().map_err(anyhow::Error::from);
            match kind.and_then(|kind| self.show_entry(&place, kind)) {
                // Gone since the directory was read. Even if it is back by now: that was a change, and is seen.
                Err(error) if is_not_found(&error) => {
                    let real = below(&self.new_root, &place);
                    let _ = std::fs::remove_dir(&real).or_else(|_| std::fs::remove_file(&real));
                }
                shown => shown?,
            }
        }
        Ok(())
    }

    fn show_entry(&self, place: &Path, kind: FileType) -> Result<()> {
        let real = below(&self.new_root, place);
        if kind.is_symlink() {
            symlink(std::fs::read_link(place)?, &real)?;
        } else if kind.is_dir() {
            std::fs::create_dir(&real)?;
            self.bind(place, place, READ_ONLY, true)?;
        } else if kind.is_file() {
            File::create(&real)?;
            self.bind(place, place, READ_ONLY, false)?;
        }
        Ok(())
    }

    /// See to it that something can be mounted at `path`: where the host has no directory there, the
    /// directory above is taken apart, its entries mounted one by one beside a new one.
    fn make_place(&mut self, path: &Path) -> Result<()> {
        if self.open.contains(path) {
            return Ok(());
        }
        let host = std::fs::symlink_metadata(path);
        let parent = path.parent().context("a place has a directory above it")?;
        if let Ok(meta) = &host {
            self.make_place_of_existing(path)?;
            if !meta.is_dir() {
                bail!(
                    "{} is not a directory on this host: choose another place",
                    path.display()
                );
            }
            return Ok(());
        }
        self.make_place(parent)?;
        if !self.open.contains(parent) {
            // The host's directory, still in one piece: lift it off and take it apart.
            let real = below(&self.new_root, parent);
            umount2(&real, MntFlags::MNT_DETACH)?;
            let meta = std::fs::metadata(parent)?;
            std::os::unix::fs::chown(&real, Some(meta.uid()), Some(meta.gid()))?;
            std::fs::set_permissions(&real, std::fs::Permissions::from_mode(meta.mode() & 0o7777))?;
            self.open.insert(parent.to_owned());
            self.unfold_content(parent)?;
        }
        self.make_directory(path, 0o755)
    }

    /// No component of a place may be a link, or the mount would land elsewhere.
    fn make_place_of_existing(&self, place: &Path) -> Result<()> {
        for path in place.ancestors() {
            if std::fs::symlink_metadata(path)?.is_symlink() {
                bail!(
                    "{} is a symbolic link on this host: name the place that it leads to",
                    path.display()
                );
            }
        }
        Ok(())
    }

    /// Take away the mounts that no job could reach. Those of container engines are many, and each that is left is
    /// copied for each job.
    fn prune(&self) -> Result<()> {
        let mut table = Vec::new();
        File::open("/proc/self/mountinfo")
            .and_then(|file| file.take(MAX_MOUNT_TABLE).read_to_end(&mut table))
            .context("cannot read /proc/self/mountinfo")?;
        for line in table.split(|b| *b == b'\n') {
            let Some(place) = line.split(|b| *b == b' ').nth(4) else {
                continue;
            };
            let real = PathBuf::from(OsStr::from_bytes(&unescape(place)));
            let Ok(path) = real.strip_prefix(&self.new_root) else {
                continue;
            };
            let path = Path::new("/").join(path);
            if path.ancestors().skip(1).any(is_closed_to_jobs) {
                match umount2(&real, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                    // It went with the one that it was mounted on, or is behind another.
                    Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
                    Err(errno) => {
                        return Err(errno).with_context(|| format!("cannot leave {}", real.display()));
                    }
                }
            }
        }
        Ok(())
    }

    /// What `sandbox` needs, and no job: one mount that it can lift off in a piece.
    fn private(&mut self, host: &Host, config: &Config) -> Result<()> {
        let private = Path::new(PRIVATE);
        let real = below(&self.new_root, private);
        mount(
            Some("tmpfs"),
            &real,
            Some("tmpfs"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            Some("mode=700,size=64m"),
        )?;
        std::fs::create_dir(real.join("workers"))?;
        let workers = host.root.join(config::STATE_DIR).join("workers");
        self.bind(&workers, &private.join("workers"), WRITABLE, false)?;
        std::fs::create_dir(real.join("devices"))?;
        // Where /run is mounted nodev, it is not so for these.
        sys::set_mount_attributes(self.devices.as_fd(), DEVICES, libc::MOUNT_ATTR_NODEV)?;
        sys::attach_mount(self.devices.as_fd(), &real.join("devices"))?;
        std::fs::create_dir(real.join("sources"))?;
        // An empty directory and an empty file, to lay over what is hidden.
        std::fs::create_dir(real.join("nothing"))?;
        std::fs::set_permissions(real.join("nothing"), std::fs::Permissions::from_mode(0o000))?;
        File::create(real.join("no-file"))?.set_permissions(std::fs::Permissions::from_mode(0o000))?;
        for source in config.slots.values().flat_map(|slot| slot.read_only.values()) {
            let place = source_path(source);
            if !below(&self.new_root, &place).exists() {
                let describe = || format!("{source}, named in read_only, cannot be shown");
                let meta = std::fs::symlink_metadata(source.as_path()).with_context(describe)?;
                if !meta.is_dir() {
                    bail!("{source}, named in read_only, is not a directory: name one");
                }
                std::fs::create_dir(below(&self.new_root, &place))?;
                self.bind(source.as_path(), &place, READ_ONLY, true)?;
                let real = source.as_path().canonicalize().with_context(describe)?;
                self.sources.push((real, place));
            }
        }
        Ok(())
    }

    /// Lay nothing over what no job may see. A path that leads through links hides what it leads to: laid
    /// over the link's own name, the cover would land on the host's tree, and hide nothing from a job.
    fn hide(&mut self, host: &Host, config: &Config) -> Result<()> {
        let mut hidden = Vec::new();
        for path in &config.factory.hide {
            // One that is made later would be seen.
            let describe = || format!("{path}, named in hide, cannot be hidden: make it, or remove it");
            hidden.push((path.as_path().canonicalize().with_context(describe)?, false));
        }
        let mut own = vec![config.factory.token_file.as_path().to_owned()];
        for root in [host.root.as_path(), Path::new("/")] {
            let config_dir = Path::new(config::CONFIG_PATH)
                .parent()
                .expect("it has a directory");
            let dirs = [
                config_dir,
                Path::new(config::STATE_DIR),
                Path::new(config::RUN_DIR),
            ];
            own.extend(dirs.map(|dir| root.join(dir)));
        }
        for path in own {
            let real = path.canonicalize();
            if !real
                .as_ref()
                .is_err_and(|error| error.kind() == ErrorKind::NotFound)
            {
                let real = real.with_context(|| format!("cannot hide {}", path.display()))?;
                hidden.push((real, true));
            }
        }
        // The outer before the inner: then the inner is hidden already.
        hidden.sort();
        hidden.dedup();
        for (path, is_own) in hidden {
            let mut places = vec![path.clone()];
            for (source, place) in &self.sources {
                places.extend(policy::hidden_at(&path, is_own, source).map(|rest| place.join(rest)));
            }
            for place in places {
                self.cover(&path, &place)
                    .with_context(|| format!("cannot hide {}", path.display()))?;
            }
        }
        Ok(())
    }

    /// Lay nothing over this place, where jobs would see what the host has at `path`.
    fn cover(&mut self, path: &Path, place: &Path) -> Result<()> {
        let meta = match std::fs::symlink_metadata(below(&self.new_root, place)) {
            // Below what jobs have of their own, or below what is hidden by now.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            meta => meta?,
        };
        let cover = if meta.is_dir() { "nothing" } else { "no-file" };
        let cover = below(&self.new_root, &Path::new(PRIVATE).join(cover));
        self.bind(&cover, place, READ_ONLY, false)?;
        // A file that is put in its place has no cover: the change of its directory tells.
        self.watch(path.parent().context("the root cannot be hidden")?)
    }

    /// Lay nothing over the sockets of the host's services, wherever they are: a read-only mount keeps nobody
    /// from connecting. One that is made later is seen until this is built again: its mode must do, or `hide`.
    fn hide_sockets(&self, config: &Config) -> Result<()> {
        let cover = below(&self.new_root, &Path::new(PRIVATE).join("no-file"));
        for path in sockets::paths(config.factory.uid_range)? {
            // Whoever bound it chose the name, perhaps in another mount namespace: look what it is here.
            let is_socket =
                |path: &Path| std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
            let Ok(real) = path.canonicalize() else { continue };
            if is_socket(&below(&self.new_root, &real))
                && let Err(error) = self.bind(&cover, &real, READ_ONLY, false)
                && is_socket(&real)
            {
                return Err(error).with_context(|| format!("cannot hide {}", path.display()));
            }
        }
        Ok(())
    }

    /// Make the new root the root, and let the host's go (`pivot_root(2)`).
    fn enter(&self) -> Result<()> {
        let flags = MsFlags::MS_REMOUNT
            | MsFlags::MS_BIND
            | MsFlags::MS_RDONLY
            | MsFlags::MS_NOSUID
            | MsFlags::MS_NODEV;
        mount(None::<&str>, &self.new_root, None::<&str>, flags, None::<&str>)?;
        super::become_root(&self.new_root)
    }
}
