//! Building the root file system that every job gets a copy of: a small tmpfs with the host's top directories in it,
//! read-only; so a job's namespace has few mounts, however many the host has. What differs between jobs, `sandbox` adds.
//!
//! All of this happens in a builder, which has a limited time, and in the host's mounts until the last step.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{File, FileType};
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::inotify::{AddWatchFlags, Inotify};
use nix::sys::stat::{Mode, SFlag, fstat, mknod, stat};
use protocol::config::{self, Config, HostPath, PRIVATE_DIRS, Slot};

use super::namespace::{become_root, make_mounts_slave};
use super::sockets;
use crate::host::{Host, directory};
use crate::log::warn;
use crate::sandbox::layout::{ETC_LAYERS, LINKS, PRIVATE, RUN_DIRS, UDEV_DATA, source_path};
use crate::sandbox::paths::{JobPath, NewRootPath, SourcePath};
use crate::sys::{self, DEVICES, READ_ONLY, WRITABLE};

/// Directories of which a job gets its own, or none, besides `PRIVATE_DIRS`; and their modes.
const OWN: [(&str, u32); 5] = [
    ("/proc", 0o755),
    ("/dev", 0o755),
    ("/run", 0o755),
    ("/home", 0o755),
    ("/root", 0o700),
];

/// Files of a job's own in `/etc`.
const OWN_FILES: [&str; 3] = ["passwd", "group", "hosts"];

/// The most bytes of the mount table that are read: more than `fs.mount-max` lets it have with paths of a usual length.
/// A mount beyond that is shown, or not, by its mode.
const MAX_MOUNT_TABLE: u64 = 64 << 20;
/// The most entries, of all directories of a kind together, that are mounted one by one.
const MAX_ENTRIES: usize = 8192;

/// Is there nothing any more, or a link in the path?
fn is_gone(error: &anyhow::Error) -> bool {
    let cause = error.root_cause();
    let of_io = |cause: &std::io::Error| Errno::from_raw(cause.raw_os_error().unwrap_or_default());
    let errno = cause.downcast_ref().copied().or(cause.downcast_ref().map(of_io));
    // The last is what open_tree(2) says of what was unmounted meanwhile.
    matches!(
        errno,
        Some(Errno::ENOENT | Errno::ELOOP | Errno::ENOTDIR | Errno::EINVAL)
    )
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
    new_root: NewRootPath,
    /// The paths at which `sandbox` mounts something.
    places: BTreeSet<JobPath>,
    /// Paths without links that are not shown anywhere.
    hidden: BTreeSet<SourcePath>,
    /// Those of them that are hidden only because a job has its own, or none.
    own: BTreeSet<SourcePath>,
    /// How many entries may still be mounted one by one: of directories in which something is hidden, of those among
    /// them that only root can write, and of those that have mount points: the first may be any user's, whose entries take
    /// nothing from the others.
    entries_left: [usize; 3],
    /// Watches the directories of the host that the result depends on.
    directories: &'a Inotify,
    /// Was it logged that something cannot be shown? A user could fill the log with it.
    has_left_out: bool,
}

/// Where a mount is made or something is left out, all directories above are the tmpfs's, and not the host's: nothing
/// that the host renames or removes takes a mount off, or shows what was hidden.
impl<'a> Builder<'a> {
    /// The dangerous steps in their order.
    fn build(host: &Host, config: &Config, directories: &'a Inotify) -> Result<()> {
        make_mounts_slave()?;
        let new_root = NewRootPath::new(host.root.join(config::RUN_DIR));
        let devices = sys::clone_mount(AT_FDCWD, new_root.join("devices").as_ref(), false)?;
        let hidden = hidden_by_operator(config)?;
        let own = own_of_the_factory(host, config)?;
        let sockets = reachable_sockets(config)?;
        let mut this = Builder {
            devices,
            new_root,
            places: BTreeSet::new(),
            hidden: hidden.into_iter().chain(own.clone()).chain(sockets).collect(),
            entries_left: [MAX_ENTRIES; 3],
            own: BTreeSet::new(),
            directories,
            has_left_out: false,
        };
        // Room for as many links as there may be entries, each as long as a path can be.
        mount_tmpfs(&this.new_root, "mode=755,size=80m").context("cannot mount the new root")?;
        this.check_configuration_directory(host)?;
        this.private(host)?;
        let etc_is_layered = this.layer_etc()?;
        this.main(config, etc_is_layered)?;
        this.prune()?;
        this.sources(config, &own)?;
        this.enter()
    }

    /// All of the root file system but its private part.
    fn main(&mut self, config: &Config, etc_is_layered: bool) -> Result<()> {
        let etc = JobPath::new("/etc");
        let mut files = OWN_FILES.map(|name| etc.join(name)).to_vec();
        let mut own: BTreeSet<&str> = PRIVATE_DIRS.into_iter().collect();
        own.extend(OWN.iter().map(|(place, _)| *place));
        if etc_is_layered {
            own.insert("/etc");
            files.clear();
        }
        let mut places: BTreeSet<JobPath> = own.iter().map(JobPath::new).collect();
        for slot in config.slots.values() {
            let more = slot.writable.iter().chain(slot.read_only.keys());
            places.extend(more.map(|place| JobPath::new(place.as_path())));
        }
        self.places = places.iter().chain(&files).cloned().collect();
        // What the host has there is not for jobs, and what a link there leads to is the same by another name.
        let hidden = self.hidden.clone();
        for place in own.into_iter().map(SourcePath::new) {
            self.own.extend(place.canonicalize());
            self.own.insert(place);
        }
        self.own.retain(|place| !hidden.contains(place));
        self.hidden.extend(self.own.iter().cloned());
        self.hidden.extend([PRIVATE, "/lost+found"].map(SourcePath::new));
        self.show_directory(&SourcePath::new("/"), &JobPath::new("/"))?;
        self.hidden = hidden;
        for place in &places {
            self.make_mount_point(place)
                .with_context(|| format!("cannot make a mount point for {}", place.display()))?;
        }
        for file in files.iter().map(|file| file.in_new_root(&self.new_root)) {
            if !file.as_ref().exists() {
                File::create(file)?;
            }
        }
        for (place, mode) in OWN {
            let real = JobPath::new(place).in_new_root(&self.new_root);
            std::fs::set_permissions(&real, std::fs::Permissions::from_mode(mode))?;
        }
        Ok(())
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

    /// Refuse a configuration directory that has come in the place of the one that the helper has had open since its start.
    /// The supervisor and the commands open it by its path, so they would not mean the same configuration.
    fn check_configuration_directory(&self, host: &Host) -> Result<()> {
        let path = host.root.join(config::CONFIG_PATH);
        let path = path.parent().expect("CONFIG_PATH has a directory");
        self.watch(path)?;
        let (there, here) = (stat(path)?, fstat(&host.config)?);
        ensure!(
            (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino),
            "{} was replaced since the helper was started: restart the helper",
            path.display()
        );
        Ok(())
    }

    /// Attach a copy of the host's `source`; if `recursive`, it is a directory, with what is mounted below it.
    fn bind(&self, source: &SourcePath, place: &JobPath, attributes: u64, recursive: bool) -> Result<()> {
        let describe = || format!("cannot show {} to jobs", source.display());
        let kind = if recursive {
            OFlag::O_DIRECTORY
        } else {
            OFlag::empty()
        };
        let open = directory::name_without_links(source.as_ref(), kind).with_context(describe)?;
        let copy = sys::clone_mount(open.as_fd(), Path::new(""), recursive).with_context(describe)?;
        sys::set_mount_attributes(copy.as_fd(), attributes, 0).with_context(describe)?;
        let real = place.in_new_root(&self.new_root);
        sys::attach_mount(copy.as_fd(), real.as_ref()).with_context(describe)
    }

    /// Show the host's directory `source`, a path without links, at `place`, an empty directory of the tmpfs: in one
    /// mount, unless a mount point or something hidden is below it; then each entry by itself. A directory without mount
    /// points may be any user's: what of it cannot be shown is left out, and stops nothing.
    fn show_directory(&mut self, source: &SourcePath, place: &JobPath) -> Result<()> {
        let has_mount_points = place.has_below(&self.places);
        if !has_mount_points && !source.has_below(&self.hidden) {
            return self.bind(source, place, READ_ONLY, true);
        }
        // The directory may be somebody's who puts a link in its place at any moment.
        let open = directory::name_without_links(source.as_ref(), OFlag::O_DIRECTORY)?;
        let opened = PathBuf::from(format!("/proc/self/fd/{}", open.as_raw_fd()));
        self.watch(&opened)
            .with_context(|| format!("cannot show {}", source.display()))?;
        let real = place.in_new_root(&self.new_root);
        copy_owner_and_mode(&opened, &real)?;
        let is_roots = directory::check_only_root_writes(source.as_ref()).is_ok();
        let left = &mut self.entries_left[if has_mount_points {
            2
        } else {
            usize::from(is_roots)
        }];
        let entries: Vec<_> = std::fs::read_dir(&opened)?.take(*left + 1).collect();
        if entries.len() > *left {
            ensure!(
                !has_mount_points,
                "{} has too many entries: together with the other directories that contain paths of writable or read_only, more than {MAX_ENTRIES} would be mounted one by one; choose another path",
                source.display()
            );
            // All of it is hidden.
            if !std::mem::replace(&mut self.has_left_out, true) {
                warn!("jobs do not see {}: it has too many entries", source.display());
            }
            return Ok(());
        }
        *left -= entries.len();
        // However deep it goes: one descriptor.
        drop(open);
        for entry in entries {
            let entry = entry?;
            let (source, place) = (source.join(entry.file_name()), place.join(entry.file_name()));
            let kind = entry.file_type().map_err(anyhow::Error::from);
            match kind.and_then(|kind| self.show_entry(&source, &place, kind)) {
                // Gone since the directory was read. Even if it is back by now: that was a change, and is seen.
                Err(error) if !has_mount_points || is_gone(&error) => {
                    if !is_gone(&error) && !std::mem::replace(&mut self.has_left_out, true) {
                        warn!("jobs do not see {}, and maybe more: {error:#}", source.display());
                    }
                    let real = place.in_new_root(&self.new_root);
                    let _ = std::fs::remove_dir(&real).or_else(|_| std::fs::remove_file(&real));
                }
                shown => shown?,
            }
        }
        Ok(())
    }

    fn show_entry(&mut self, source: &SourcePath, place: &JobPath, kind: FileType) -> Result<()> {
        if self.hidden.contains(source) {
            return Ok(());
        }
        let real = place.in_new_root(&self.new_root);
        if kind.is_symlink() {
            if !self.places.contains(place) && !place.has_below(&self.places) {
                return Ok(symlink(std::fs::read_link(source)?, &real)?);
            }
            // A mount must not lie where the host's link leads today: the link's name is a directory, with the same in it.
            let target = source.canonicalize()?;
            if target.as_ref().is_dir() {
                std::fs::create_dir(&real)?;
                let above = target.as_ref().parent().unwrap_or(Path::new("/"));
                let is_roots = std::fs::symlink_metadata(source)?.uid() == 0
                    && directory::check_only_root_writes(above).is_ok();
                if !self.is_hidden(&target, is_roots) {
                    self.show_directory(&target, place)?;
                }
            } else if target.as_ref().is_file() {
                self.show_file(&target, place)?;
            }
        } else if kind.is_dir() {
            std::fs::create_dir(&real)?;
            self.show_directory(source, place)?;
        } else if !kind.is_socket() {
            self.show_file(source, place)?;
        }
        Ok(())
    }

    fn show_file(&self, source: &SourcePath, place: &JobPath) -> Result<()> {
        File::create(place.in_new_root(&self.new_root))?;
        self.bind(source, place, READ_ONLY, false)
    }

    /// Is what a link leads to hidden? Where root's link leads into a directory of which a job has its own, as
    /// `/opt` does to a larger disk at `/home`, it is not.
    fn is_hidden(&self, target: &SourcePath, link_is_roots: bool) -> bool {
        let is_open = |hidden| link_is_roots && target != hidden && self.own.contains(hidden);
        self.hidden
            .iter()
            .any(|hidden| target.is_within(hidden) && *hidden != SourcePath::new("/") && !is_open(hidden))
    }

    /// See to it that something can be mounted at `place`.
    fn make_mount_point(&self, place: &JobPath) -> Result<()> {
        let mut real = self.new_root.clone();
        for part in place.entered().iter().skip(1) {
            real = real.join(part);
            match std::fs::symlink_metadata(&real) {
                Err(error) if error.kind() == ErrorKind::NotFound => std::fs::create_dir(&real)?,
                meta => ensure!(
                    meta?.is_dir(),
                    "{} is not a directory on this host: choose another path",
                    place.display()
                ),
            }
        }
        Ok(())
    }

    /// Take away the mounts that no job could reach. Those of container engines are many, and each that is left is
    /// copied for each job.
    fn prune(&self) -> Result<()> {
        for real in mount_points()? {
            let Ok(path) = real.strip_prefix(self.new_root.as_ref()) else {
                continue;
            };
            // The host has the directories above at the same path.
            let path = Path::new("/").join(path);
            if path.ancestors().skip(1).any(is_closed_to_jobs) {
                // What stays is out of a job's reach by its mode. By a descriptor: where a user may rename a directory on the
                // way, the path could lead to another mount.
                if let Ok(open) = directory::name_without_links(&real, OFlag::empty()) {
                    let opened = format!("/proc/self/fd/{}", open.as_raw_fd());
                    let _ = umount2(opened.as_str(), MntFlags::MNT_DETACH);
                }
            }
        }
        Ok(())
    }

    /// What `sandbox` needs, and no job: one mount that it can lift off in a piece.
    fn private(&self, host: &Host) -> Result<()> {
        let private = JobPath::new(PRIVATE);
        let real = private.in_new_root(&self.new_root);
        std::fs::create_dir(&real)?;
        // Also what a job finds there when the mount is off.
        std::fs::set_permissions(&real, std::fs::Permissions::from_mode(0o700))?;
        mount_tmpfs(&real, "mode=700,size=64m")?;
        for name in ["workers", "devices", "sources", "run-dirs", "links"] {
            std::fs::create_dir(real.join(name))?;
        }
        let workers = SourcePath::new(host.root.join(config::STATE_DIR).join("workers"));
        self.bind(
            &workers.canonicalize()?,
            &private.join("workers"),
            WRITABLE,
            false,
        )?;
        // Where /run is mounted nodev, it is not so for these.
        sys::set_mount_attributes(self.devices.as_fd(), DEVICES, libc::MOUNT_ATTR_NODEV)?;
        Ok(sys::attach_mount(
            self.devices.as_fd(),
            real.join("devices").as_ref(),
        )?)
    }

    /// Let overlayfs put jobs' `/etc` together. The host may rename and add files in its own as it likes: what is hidden stays
    /// so, and what is mounted on a name of the overlay. False where that cannot be: without overlayfs, on a host whose
    /// `/etc` is of too many overlays already, and where something is mounted in `/etc`, which would be missing.
    fn layer_etc(&self) -> Result<bool> {
        let etc = SourcePath::new("/etc");
        let is_in_etc = |place: &SourcePath| place.is_within(&etc) && *place != etc;
        let mut mounts = mount_points()?.into_iter().map(SourcePath::new);
        if std::fs::symlink_metadata(&etc)?.is_symlink() || mounts.any(|place| is_in_etc(&place)) {
            return Ok(false);
        }
        let layers = ETC_LAYERS.map(|layer| JobPath::new(layer).in_new_root(&self.new_root));
        for layer in &layers {
            std::fs::create_dir_all(layer)?;
        }
        self.bind(&etc, &JobPath::new(ETC_LAYERS[1]), READ_ONLY, false)?;
        copy_owner_and_mode(&etc, &layers[0])?;
        for hidden in self.hidden.iter().filter(|path| is_in_etc(path)) {
            self.hide_in_layer(hidden, &etc, &layers[0])
                .with_context(|| format!("cannot hide {}", hidden.display()))?;
        }
        for name in OWN_FILES {
            // A job with the host's network has the host's.
            if name != "hosts" || !layers[1].join(name).as_ref().exists() {
                File::create(layers[0].join(name))?;
            }
        }
        let place = etc.same_for_job().in_new_root(&self.new_root);
        std::fs::create_dir(&place)?;
        match mount_overlay(&layers, &place) {
            Ok(()) => Ok(true),
            Err(Errno::ENODEV | Errno::EINVAL) => {
                umount2(layers[1].as_ref(), MntFlags::MNT_DETACH)?;
                std::fs::remove_dir(&layers[1])?;
                std::fs::remove_dir(&place)?;
                Ok(false)
            }
            Err(errno) => Err(errno).context("cannot mount an overlay of /etc"),
        }
    }

    /// Put a whiteout for `hidden`, which is below `top`, into the layer. The directories above it become the job's.
    fn hide_in_layer(&self, hidden: &SourcePath, top: &SourcePath, layer: &NewRootPath) -> Result<()> {
        let (mut real, mut path) = (layer.clone(), top.clone());
        for part in hidden.as_ref().strip_prefix(top)?.iter() {
            (real, path) = (real.join(part), path.join(part));
            if path == *hidden {
                mknod(real.as_ref(), SFlag::S_IFCHR, Mode::empty(), 0)?;
            } else if !real.as_ref().exists() {
                std::fs::create_dir(&real)?;
                self.watch(path.as_ref())?;
                copy_owner_and_mode(&path, &real)?;
            } else if !real.as_ref().is_dir() {
                // Hidden with what it is in.
                break;
            }
        }
        Ok(())
    }

    /// What slots show at other places, and the directories of the host's `/run` that jobs see.
    fn sources(&mut self, config: &Config, own: &[SourcePath]) -> Result<()> {
        let mut sources = BTreeSet::new();
        for source in config.slots.values().flat_map(|slot| slot.read_only.values()) {
            let describe = || format!("{source}, named in read_only, cannot be shown");
            let meta = std::fs::metadata(source.as_path()).with_context(describe)?;
            ensure!(
                meta.is_dir(),
                "{source}, named in read_only, is not a directory: name one"
            );
            if let (true, Some(directory)) = (source.as_path().is_symlink(), source.as_path().parent()) {
                self.watch(directory)?;
            }
            sources.insert(SourcePath::new(source.as_path()));
        }
        let run_dirs = JobPath::new(RUN_DIRS).in_new_root(&self.new_root);
        self.links_of_run()?;
        for (number, run_dir) in self.run_dirs(config)?.into_iter().enumerate() {
            symlink(&run_dir, run_dirs.join(number.to_string()))?;
            sources.insert(SourcePath::new(run_dir));
        }
        for source in sources {
            let place = source_path(&source);
            std::fs::create_dir(place.in_new_root(&self.new_root))?;
            let describe = || format!("cannot show {}", source.display());
            let real = source.canonicalize().with_context(describe)?;
            // What the operator hides is shown to the slot that names it, or a place in it; what is the factory's is not.
            if !own.iter().any(|own| real.is_within(own)) {
                self.show_directory(&real, &place).with_context(describe)?;
            }
        }
        Ok(())
    }

    /// Links that jobs have in `/run`, where the host has something of that name: to shared memory, and to Debian's directory
    /// for the sockets of screen(1), which Arch and openSUSE build with another.
    fn links_of_run(&self) -> Result<()> {
        let links = JobPath::new(LINKS).in_new_root(&self.new_root);
        for (name, target) in [("shm", "/dev/shm"), ("screens", "screen"), ("uscreens", "screen")] {
            if Path::new("/run").join(name).exists() {
                symlink(target, links.join(name))?;
            }
        }
        Ok(())
    }

    /// Directories of the host's `/run` that ordinary programs read: where the names of servers are found, and what
    /// udev knows of devices.
    fn run_dirs(&self, config: &Config) -> Result<BTreeSet<PathBuf>> {
        let mut run_dirs = BTreeSet::new();
        let slots = || config.slots.values();
        if slots().any(|slot| slot.egress.is_none()) {
            for file in ["/etc/resolv.conf", "/etc/hosts"] {
                self.run_dirs_on_path_to(Path::new(file), &mut run_dirs)?;
            }
        }
        if slots().any(Slot::has_devices) && Path::new(UDEV_DATA).is_dir() {
            run_dirs.insert(UDEV_DATA.into());
        }
        Ok(run_dirs)
    }

    /// Follow the path as the kernel would (`path_resolution(7)`). The directories in `/run` that it leads through are
    /// shown, and its links that are in `/run` itself are made for jobs. A change of any of these is seen.
    fn run_dirs_on_path_to(&self, file: &Path, run_dirs: &mut BTreeSet<PathBuf>) -> Result<()> {
        let names = |path: &Path| -> Vec<OsString> { path.iter().rev().map(OsStr::to_owned).collect() };
        let (run, links) = (Path::new("/run"), JobPath::new(LINKS).in_new_root(&self.new_root));
        let (mut at, mut rest) = (PathBuf::new(), names(file));
        // As many links as the kernel follows in a path.
        let mut links_left = 40;
        while let Some(name) = rest.pop() {
            let path = at.join(&name);
            if name == ".." {
                at.pop();
                continue;
            }
            if !rest.is_empty() && std::fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_dir()) {
                at = path;
                continue;
            }
            // None where the path ends: it may be made later.
            let target = std::fs::read_link(&path).ok();
            if self.watch(&at).is_err() || links_left == 0 {
                break;
            }
            links_left -= 1;
            // What is above a directory that is missing is more than programs read.
            if (target.is_some() || rest.is_empty()) && at.starts_with(run) && at != run {
                run_dirs.insert(at.clone());
            }
            let Some(target) = target else { break };
            if at == run {
                match symlink(&target, links.join(&name)) {
                    // Another path leads through it, too.
                    Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                    made => made?,
                }
            }
            rest.extend(names(&target));
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
        let new_root = self.new_root.as_ref();
        mount(None::<&str>, new_root, None::<&str>, flags, None::<&str>)?;
        become_root(new_root)
    }
}

/// Where something is mounted in this namespace.
fn mount_points() -> Result<Vec<PathBuf>> {
    let mut table = Vec::new();
    File::open("/proc/self/mountinfo")
        .and_then(|file| file.take(MAX_MOUNT_TABLE).read_to_end(&mut table))
        .context("cannot read /proc/self/mountinfo")?;
    let places = table
        .split(|b| *b == b'\n')
        .filter_map(|line| line.split(|b| *b == b' ').nth(4));
    Ok(places
        .map(|place| PathBuf::from(OsStr::from_bytes(&unescape(place))))
        .collect())
}

fn mount_tmpfs(place: &NewRootPath, options: &str) -> nix::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), place.as_ref(), Some("tmpfs"), flags, Some(options))
}

/// Mount a read-only overlay of these directories, the uppermost first. Their paths have neither colons nor commas.
fn mount_overlay(layers: &[NewRootPath], place: &NewRootPath) -> nix::Result<()> {
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| layer.as_ref().display().to_string())
        .collect();
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let options = format!("lowerdir={}", layers.join(":"));
    mount(
        Some("overlay"),
        place.as_ref(),
        Some("overlay"),
        flags,
        Some(&*options),
    )
}

fn copy_owner_and_mode(from: impl AsRef<Path>, to: &NewRootPath) -> Result<()> {
    let meta = std::fs::metadata(from)?;
    std::os::unix::fs::chown(to, Some(meta.uid()), Some(meta.gid()))?;
    let mode = std::fs::Permissions::from_mode(meta.mode() & 0o7777);
    Ok(std::fs::set_permissions(to, mode)?)
}

/// What `hide` names. A path that leads through links hides what it leads to.
fn hidden_by_operator(config: &Config) -> Result<Vec<SourcePath>> {
    let real = |path: &HostPath| {
        // One that is made later would be seen.
        let describe = || format!("{path}, named in hide, cannot be hidden: make it, or remove it");
        SourcePath::new(path.as_path())
            .canonicalize()
            .with_context(describe)
    };
    config.factory.hide.iter().map(real).collect()
}

/// The factory's own files and directories.
fn own_of_the_factory(host: &Host, config: &Config) -> Result<Vec<SourcePath>> {
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
    let mut found = Vec::new();
    for path in own.into_iter().map(SourcePath::new) {
        match path.canonicalize() {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            real => found.push(real.with_context(|| format!("cannot hide {}", path.display()))?),
        }
    }
    Ok(found)
}

/// Sockets of the host's services, wherever a job could reach them: a read-only mount keeps nobody from connecting. One
/// that is made later at another path is seen until this is built again: its mode must do, or `hide`.
fn reachable_sockets(config: &Config) -> Result<Vec<SourcePath>> {
    // Whoever bound it chose the name, perhaps in another mount namespace: look what it is here.
    let is_socket =
        |path: &Path| std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    let paths = sockets::paths(config.factory.uid_range)?.into_iter();
    let real = paths.filter_map(|path| path.canonicalize().ok());
    let reachable = real.filter(|path| is_socket(path) && !path.ancestors().skip(1).any(is_closed_to_jobs));
    Ok(reachable.map(SourcePath::new).collect())
}
