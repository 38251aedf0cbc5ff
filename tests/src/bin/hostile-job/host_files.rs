//! Group A: changing files of the host that everybody may write there.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;

use crate::leftovers::{mount, own_namespaces};
use crate::sys::{c, call};
use crate::{Attempt, Report};

pub const ATTEMPTS: &[Attempt] = &[("host-files", host_files)];

const HERE: usize = libc::AT_FDCWD as usize;
/// Newer than the C library's list, and the same on all machines: setxattrat(2), file_setattr(2).
const SETXATTRAT: libc::c_long = 463;
const FILE_SETATTR: libc::c_long = 469;
const FCHMODAT2: libc::c_long = 452;

/// `open(2)` takes all bits of the access mode as a descriptor that neither reads nor writes, for requests of `ioctl(2)`:
/// also on a read-only mount, if the file's own mode lets both be done.
const FOR_REQUESTS: i32 = libc::O_ACCMODE;

/// In each directory there is a directory `below`, and in both there is a file `file`. Everybody may write all four.
fn host_files(report: &mut Report, args: &[String]) {
    let (how, directories) = args.split_first().expect("arguments");
    fs::write("/work/own", "of the job").expect("/work is writable");
    if how == "namespaces" {
        report.must_work("namespaces", own_namespaces());
        fs::create_dir_all("/work/bound").expect("/work is writable");
        for dir in directories {
            // A bind mount of one's own, and the mount as it is, made writable.
            report.must_work(dir, mount(dir, "/work/bound", "none", libc::MS_BIND));
            for place in ["/work/bound", dir] {
                let flags = libc::MS_REMOUNT | libc::MS_BIND;
                report.must_fail(format!("{place} writable"), mount("none", place, "none", flags));
            }
            directory(report, Path::new("/work/bound"));
        }
    }
    for dir in directories {
        for dir in [Path::new(dir).to_owned(), Path::new(dir).join("below")] {
            directory(report, &dir);
            let path = dir.join("file");
            // Else nothing below shows anything.
            report.must_work("reading", fs::read(&path));
            report.must_work("its mode", {
                let mode = fs::metadata(&path).map(|meta| meta.permissions().mode() & 0o777);
                mode.and_then(|mode| {
                    if mode == 0o666 {
                        Ok(())
                    } else {
                        Err(io::Error::other(format!("{mode:o}")))
                    }
                })
            });
            by_path(report, &path);
            by_descriptor(report, &path);
        }
    }
}

fn opened(path: &Path, flags: i32) -> io::Result<libc::c_long> {
    let name = c(path);
    call(
        libc::SYS_openat,
        [HERE, name.as_ptr() as usize, flags as usize, 0o666, 0, 0],
    )
}

fn directory(report: &mut Report, dir: &Path) {
    let at = |name: &str| dir.join(name);
    let shown = dir.display();
    report.must_fail(format!("a file in {shown}"), File::create(at("new")));
    report.must_fail(
        format!("a file without a name in {shown}"),
        opened(dir, libc::O_TMPFILE | libc::O_WRONLY),
    );
    report.must_fail(format!("a directory in {shown}"), fs::create_dir(at("new")));
    report.must_fail(format!("a symbolic link in {shown}"), symlink("x", at("new")));
    let (fifo, mode) = (c(at("new")), (libc::S_IFIFO | 0o666) as usize);
    report.must_fail(
        format!("a FIFO in {shown}"),
        call(libc::SYS_mknodat, [HERE, fifo.as_ptr() as usize, mode, 0, 0, 0]),
    );
    let file = at("file");
    report.must_fail(format!("a hard link in {shown}"), fs::hard_link(&file, at("new")));
    report.must_fail("a hard link in /work", fs::hard_link(&file, "/work/new"));
    report.must_fail(
        format!("a hard link of /work's in {shown}"),
        fs::hard_link("/work/own", at("new")),
    );
    for (from, to) in [
        (&*file, &*at("new")),
        (&*file, Path::new("/work/new")),
        (Path::new("/work/own"), &*file),
    ] {
        let names = (c(from), c(to));
        for flags in [
            0,
            libc::RENAME_NOREPLACE,
            libc::RENAME_EXCHANGE,
            libc::RENAME_WHITEOUT,
        ] {
            let arguments = [
                HERE,
                names.0.as_ptr() as usize,
                HERE,
                names.1.as_ptr() as usize,
                flags as usize,
                0,
            ];
            report.must_fail(
                format!("rename of {} to {}, {flags}", from.display(), to.display()),
                call(libc::SYS_renameat2, arguments),
            );
        }
    }
    report.must_fail(format!("{} unlinked", file.display()), fs::remove_file(&file));
    report.must_fail(format!("{shown} removed"), fs::remove_dir_all(dir));
    report.must_fail(
        format!("{shown} renamed"),
        fs::rename(dir, dir.with_extension("new")),
    );
    attributes(report, dir);
}

/// What directories and files have alike.
fn attributes(report: &mut Report, path: &Path) {
    let shown = path.display();
    report.must_fail(
        format!("mode of {shown}"),
        fs::set_permissions(path, Permissions::from_mode(0o600)),
    );
    report.must_fail(
        format!("owner of {shown}"),
        chown(path, Some(crate::leftovers::uid()), None),
    );
    report.must_fail(
        format!("group of {shown}"),
        chown(path, None, Some(nix::unistd::getgid().as_raw())),
    );
    let (name, own) = (c(path), c("user.of-the-job"));
    let (name, own) = (name.as_ptr() as usize, own.as_ptr() as usize);
    report.must_fail(
        format!("mode of {shown}, fchmodat2"),
        call(FCHMODAT2, [HERE, name, 0o600, 0, 0, 0]),
    );
    // To now, which a user who may write a file may do; and to another time.
    let other = [1u64, 0, 1, 0];
    for times in [0, other.as_ptr() as usize] {
        report.must_fail(
            format!("times of {shown}"),
            call(libc::SYS_utimensat, [HERE, name, times, 0, 0, 0]),
        );
    }
    let value = *b"x";
    let value = value.as_ptr() as usize;
    report.must_fail(
        format!("attribute of {shown}"),
        call(libc::SYS_setxattr, [name, own, value, 1, 0, 0]),
    );
    report.must_fail(
        format!("attribute of {shown} itself"),
        call(libc::SYS_lsetxattr, [name, own, value, 1, 0, 0]),
    );
    report.must_fail(
        format!("no attribute of {shown}"),
        call(libc::SYS_removexattr, [name, own, 0, 0, 0, 0]),
    );
    // struct xattr_args
    let arguments = [value as u64, 1];
    report.must_fail(
        format!("attribute of {shown}, setxattrat"),
        call(
            SETXATTRAT,
            [
                HERE,
                name,
                0,
                own,
                arguments.as_ptr() as usize,
                size_of_val(&arguments),
            ],
        ),
    );
    // Not to be dumped, of a project of one's own.
    let attributes = [0x80u64, 7, 0];
    report.must_fail(
        format!("flags of {shown}, file_setattr"),
        call(
            FILE_SETATTR,
            [
                HERE,
                name,
                attributes.as_ptr() as usize,
                size_of_val(&attributes),
                0,
                0,
            ],
        ),
    );
    for flags in [libc::O_RDONLY, FOR_REQUESTS] {
        match opened(path, flags) {
            Ok(fd) => {
                attributes_by_descriptor(report, path, fd as usize);
                let _ = call(libc::SYS_close, [fd as usize, 0, 0, 0, 0, 0]);
            }
            // No directory is opened so.
            Err(_) if flags == FOR_REQUESTS && path.is_dir() => {}
            Err(error) => report.broken(format!("{shown} is not opened with {flags}: {error}")),
        }
    }
}

fn attributes_by_descriptor(report: &mut Report, path: &Path, fd: usize) {
    let shown = path.display();
    let own = c("user.of-the-job");
    let own = own.as_ptr() as usize;
    let value = *b"x";
    let value = value.as_ptr() as usize;
    let other = [1u64, 0, 1, 0];
    report.must_fail(
        format!("mode of {shown}, open"),
        call(libc::SYS_fchmod, [fd, 0o600, 0, 0, 0, 0]),
    );
    report.must_fail(
        format!("owner of {shown}, open"),
        call(
            libc::SYS_fchown,
            [fd, crate::leftovers::uid() as usize, usize::MAX, 0, 0, 0],
        ),
    );
    for times in [0, other.as_ptr() as usize] {
        report.must_fail(
            format!("times of {shown}, open"),
            call(libc::SYS_utimensat, [fd, 0, times, 0, 0, 0]),
        );
    }
    report.must_fail(
        format!("attribute of {shown}, open"),
        call(libc::SYS_fsetxattr, [fd, own, value, 1, 0, 0]),
    );
    report.must_fail(
        format!("no attribute of {shown}, open"),
        call(libc::SYS_fremovexattr, [fd, own, 0, 0, 0, 0]),
    );
    // FS_IOC_SETFLAGS (not to be dumped), FS_IOC_FSSETXATTR (the same), FS_IOC_SETVERSION, FS_IOC_ENABLE_VERITY.
    let (flags, extended, version) = (0x40u64, [0x80u32, 0, 0, 7, 0, 0, 0], 7u64);
    let verity = [1u64, 1 << 32 | 4096, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for (request, argument) in [
        (0x4008_6602, &raw const flags as usize),
        (0x401c_5820, extended.as_ptr() as usize),
        (0x4008_7602, &raw const version as usize),
        (0x4080_6685, verity.as_ptr() as usize),
    ] {
        report.must_fail(
            format!("request {request:#x} of {shown}"),
            call(libc::SYS_ioctl, [fd, request, argument, 0, 0, 0]),
        );
    }
}

fn by_path(report: &mut Report, path: &Path) {
    let shown = path.display();
    for flags in [
        libc::O_WRONLY,
        libc::O_RDWR,
        libc::O_WRONLY | libc::O_APPEND,
        libc::O_WRONLY | libc::O_TRUNC,
        libc::O_RDONLY | libc::O_TRUNC,
        libc::O_WRONLY | libc::O_CREAT,
        libc::O_RDWR | libc::O_SYNC,
    ] {
        report.must_fail(format!("{shown} opened with {flags:o}"), opened(path, flags));
    }
    let name = c(path);
    report.must_fail(
        format!("{shown} truncated"),
        call(libc::SYS_truncate, [name.as_ptr() as usize, 0, 0, 0, 0, 0]),
    );
    attributes(report, path);
}

/// For reading, for requests alone, and as no more than a name.
fn by_descriptor(report: &mut Report, path: &Path) {
    let shown = path.display();
    let file = OpenOptions::new().read(true).write(true).open("/work/own");
    let file = file.expect("it is its own");
    let own = file.as_raw_fd() as usize;
    let text = *b"of the job";
    let (text, length) = (text.as_ptr() as usize, text.len());
    let (read, write) = (libc::PROT_READ as usize, libc::PROT_WRITE as usize);
    let shared = libc::MAP_SHARED as usize;
    for flags in [libc::O_RDONLY, FOR_REQUESTS, libc::O_PATH] {
        let Some(fd) = report.must_work(&format!("opening with {flags}"), opened(path, flags)) else {
            continue;
        };
        let fd = fd as usize;
        for (what, number, arguments) in [
            ("written", libc::SYS_write, [fd, text, length, 0, 0, 0]),
            ("written at 0", libc::SYS_pwrite64, [fd, text, length, 0, 0, 0]),
            ("truncated", libc::SYS_ftruncate, [fd, 0, 0, 0, 0, 0]),
            ("allocated", libc::SYS_fallocate, [fd, 0, 0, 1 << 16, 0, 0]),
            // FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
            ("with a hole", libc::SYS_fallocate, [fd, 3, 0, 4096, 0, 0]),
            ("copied to", libc::SYS_copy_file_range, [own, 0, fd, 0, length, 0]),
            ("sent to", libc::SYS_sendfile, [fd, own, 0, length, 0, 0]),
            // FICLONE
            ("cloned to", libc::SYS_ioctl, [fd, 0x4004_9409, own, 0, 0, 0]),
            (
                "mapped for writing",
                libc::SYS_mmap,
                [0, 4096, read | write, shared, fd, 0],
            ),
        ] {
            report.must_fail(format!("{shown} {what}, {flags}"), call(number, arguments));
        }
        if let Ok(mapped) = call(libc::SYS_mmap, [0, 4096, read, shared, fd, 0]) {
            report.must_fail(
                format!("the mapping of {shown} made writable"),
                call(libc::SYS_mprotect, [mapped as usize, 4096, read | write, 0, 0, 0]),
            );
            let _ = call(libc::SYS_munmap, [mapped as usize, 4096, 0, 0, 0, 0]);
        }
        let again = OpenOptions::new().write(true).open(format!("/proc/self/fd/{fd}"));
        report.must_fail(format!("{shown} opened again, {flags}"), again);
        let _ = call(libc::SYS_close, [fd, 0, 0, 0, 0, 0]);
    }
}
