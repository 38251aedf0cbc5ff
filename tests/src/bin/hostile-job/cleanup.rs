//! Group B: making the clean-up fail, or turning it against the host.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::Command;

use crate::calls::refused;
use crate::leftovers::{daemon, ignore_every_signal, mount, own_namespaces, own_places, uid};
use crate::sys::{c, call, call_with_paths, fork, wait_for_ever};
use crate::{Attempt, Report};

pub const ATTEMPTS: &[Attempt] = &[
    ("swap", swap),
    ("links", links),
    ("modes", modes),
    ("deep", deep),
    ("chain", chain),
    ("many", many),
    ("names", names),
    ("flags", flags),
    ("grow", grow),
    ("mount-inside", mount_inside),
    ("set-id", set_id),
    ("fill", fill),
    ("recreate", recreate),
    ("replace", replace),
];

fn rename(from: &Path, to: &Path, flags: u32) -> io::Result<()> {
    call_with_paths(libc::SYS_renameat2, from, to, flags)
}

fn ready(report: &mut Report) -> ! {
    report.print("ready");
    wait_for_ever()
}

/// Directories that are links every other moment, on all levels of a tree, to each of `targets`.
fn swap(report: &mut Report, targets: &[String]) {
    for (number, target) in targets.iter().enumerate() {
        let mut dir = Path::new("/work").join(format!("tree-{number}"));
        let mut pairs = Vec::new();
        for _ in 0..10 {
            fs::create_dir_all(dir.join("inner")).expect("/work is writable");
            for file in 0..20 {
                fs::write(dir.join(format!("inner/{file}")), "x").expect("/work is writable");
            }
            symlink(target, dir.join("link")).expect("/work is writable");
            pairs.push((dir.join("inner"), dir.join("link")));
            dir.push("deeper");
        }
        daemon(|| {
            ignore_every_signal();
            for round in 0u64.. {
                for (one, other) in &pairs {
                    if let Err(error) = rename(one, other, libc::RENAME_EXCHANGE) {
                        println!("swapping ended: {error}");
                    }
                }
                if round == 100 {
                    println!("swaps {number}");
                }
            }
        });
    }
    ready(report);
}

fn links(report: &mut Report, args: &[String]) {
    let (canary, host_file) = (&args[0], &args[1]);
    for place in own_places() {
        let mut dir = place.clone();
        for _ in 0..30 {
            dir.push("level");
            fs::create_dir(&dir).expect("its own places are writable");
            for (name, target) in [
                ("x", "/etc"),
                ("canary", canary),
                ("root", "/"),
                ("self", "self"),
                ("up", ".."),
                ("nowhere", "/no/where"),
                ("proc", "/proc/1/root"),
            ] {
                symlink(target, dir.join(name)).expect("its own places are writable");
            }
        }
        for target in [
            "/etc/shadow",
            "/etc/hostname",
            "/usr/bin/env",
            "/etc/passwd",
            "/proc/self/exe",
            host_file,
        ] {
            for follow in [0, libc::AT_SYMLINK_FOLLOW] {
                let what = format!("hard link of {target} in {}", place.display());
                let linked = call_with_paths(libc::SYS_linkat, target, place.join("hard"), follow as u32);
                report.must_fail(what, linked);
            }
        }
    }
    // Links of its own files are its own matter.
    fs::write("/work/file", "x").expect("/work is writable");
    for number in 0..100 {
        fs::hard_link("/work/file", format!("/work/level/hard-{number}")).expect("of its own file");
    }
    ready(report);
}

/// An access control list (`acl(5)`) as the kernel reads it: tags, permissions, ids.
fn access_control_list(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

fn set_attribute(path: &Path, name: &str, value: &[u8]) -> io::Result<()> {
    let (path, name) = (c(path), c(name));
    let (path, name) = (path.as_ptr() as usize, name.as_ptr() as usize);
    call(
        libc::SYS_setxattr,
        [path, name, value.as_ptr() as usize, value.len(), 0, 0],
    )
    .map(drop)
}

fn modes(report: &mut Report, _: &[String]) {
    // Nothing for the owner, everything for root and for others.
    let nothing = u32::MAX;
    let list = access_control_list(&[
        (0x01, 0, nothing),
        (0x02, 7, 0),
        (0x04, 0, nothing),
        (0x10, 7, nothing),
        (0x20, 7, nothing),
    ]);
    for place in own_places() {
        let dir = place.join("lists");
        fs::create_dir_all(dir.join("inner/inner")).expect("its own places are writable");
        fs::write(dir.join("inner/file"), "x").expect("its own places are writable");
        for path in ["inner/inner", "inner/file", "inner"] {
            for kind in ["access", "default"] {
                let result = set_attribute(&dir.join(path), &format!("system.posix_acl_{kind}"), &list);
                match result {
                    Ok(()) => report.print(format!("done: {kind} list")),
                    Err(error) => {
                        report.print(format!("no {kind} list: {path} in {}: {error}", dir.display()))
                    }
                }
            }
        }
        for mode in [0o000, 0o100, 0o200, 0o400, 0o077, 0o1000, 0o3000, 0o7000, 0o7777] {
            let dir = place.join(format!("mode-{mode:o}"));
            fs::create_dir_all(dir.join("inner/dark")).expect("its own places are writable");
            for name in ["file", "inner/file", "inner/dark/file", "inner/dark", "inner", ""] {
                let path = dir.join(name);
                if name.ends_with("file") {
                    fs::write(&path, "x").expect("its own places are writable");
                }
                fs::set_permissions(&path, Permissions::from_mode(mode)).expect("they are its own");
            }
        }
    }
    for place in own_places() {
        fs::set_permissions(&place, Permissions::from_mode(0o0)).ok();
    }
    ready(report);
}

fn deep(report: &mut Report, args: &[String]) {
    let levels: usize = args[0].parse().expect("a number");
    let names = ["d".repeat(255), "moved-1".into(), "e".into()];
    for place in ["/work", "/tmp"] {
        std::env::set_current_dir(place).expect("it is there");
        for level in 0..levels {
            let name = &names[level % names.len()];
            fs::create_dir(name).expect("its own places are writable");
            fs::write("beside", "x").expect("its own places are writable");
            std::env::set_current_dir(name).expect("it was made");
        }
        // Nobody may pass through the lowest ones, the owner neither.
        for level in (levels - 10..levels).rev() {
            std::env::set_current_dir("..").expect("it is open still");
            fs::set_permissions(&names[level % names.len()], Permissions::from_mode(0o0))
                .expect("it is its own");
        }
    }
    ready(report);
}

/// Directories in one another, each closed, as many as there is room for: the chain grows at its upper end, by short
/// paths.
fn chain(_: &mut Report, _: &[String]) {
    std::env::set_current_dir("/work").expect("it is there");
    fs::create_dir("top").expect("/work is writable");
    while fs::create_dir("new").is_ok() {
        fs::rename("top", "new/top").expect("both are its own");
        fs::set_permissions("new/top", Permissions::from_mode(0o0)).expect("it is its own");
        fs::rename("new", "top").expect("both are its own");
    }
    wait_for_ever()
}

fn many(report: &mut Report, args: &[String]) {
    let entries: usize = args[0].parse().expect("a number");
    for number in 0..entries {
        let path = format!("/work/{number}");
        match number % 100 {
            0 => fs::create_dir_all(format!("{path}/inner")),
            1 => symlink("/etc", path),
            _ => File::create(path).map(drop),
        }
        .expect("/work is writable");
    }
    ready(report);
}

fn names(report: &mut Report, _: &[String]) {
    let mut all: Vec<OsString> = [
        "-rf",
        "--",
        "-",
        "*",
        "?",
        "~",
        "$HOME",
        "$(reboot)",
        "`reboot`",
        ";reboot",
        " ",
        "  ",
        ". ",
        ".. ",
        "...",
        "....",
        ".\u{200b}.",
        "..\u{2215}etc",
        "\u{2024}\u{2024}",
        "%2e%2e",
        "%s%n",
        "\\..\\..",
        "C:",
        "nul",
        ".lock",
        "record",
        "moved-1",
        "lost+found",
        "\u{202e}txt.exe",
        "\u{0}".trim_matches('\0'),
        "new\nline",
        "\n",
        "\r",
        "\t",
        "\u{7f}",
        "\u{1b}[2J",
        "\"",
        "'",
        "e\u{301}",
        "\u{e9}",
        ".nfs0001",
        ".fuse_hidden1",
    ]
    .iter()
    .filter(|name| !name.is_empty())
    .map(OsString::from)
    .collect();
    // Every byte that a name may have.
    all.extend(
        (1..=255u8)
            .filter(|byte| ![b'/', b'.'].contains(byte))
            .map(|byte| OsString::from_vec(vec![byte, b'x'])),
    );
    for byte in [b'a', 0xff, b'.', b'-', b'\n'] {
        all.push(OsString::from_vec(vec![byte; 255]));
    }
    for place in own_places() {
        for kind in ["files", "directories"] {
            let dir = place.join(kind);
            fs::create_dir(&dir).expect("its own places are writable");
            for name in &all {
                let path = dir.join(name);
                let made = if kind == "files" {
                    File::create(&path).map(drop)
                } else {
                    fs::create_dir_all(path.join(OsStr::from_bytes(b"..\xff")))
                };
                if let Err(error) = made {
                    report.broken(format!("{path:?}: {error}"));
                }
            }
        }
    }
    ready(report);
}

/// `linux/fs.h`: the requests that set a file's flags, and those that only root may set.
const FS_IOC_SETFLAGS: usize = 0x4008_6602;
const FS_IOC_FSSETXATTR: usize = 0x401c_5820;
const IMMUTABLE: u64 = 0x10;
const APPEND_ONLY: u64 = 0x20;
/// The same in the extended structure.
const XFLAG_IMMUTABLE: u32 = 0x08;
const XFLAG_APPEND_ONLY: u32 = 0x10;
const XFLAG_SYNC: u32 = 0x20;
/// Not to be dumped, synchronous, without access times: the kernel lets every owner set them.
const HARMLESS: u64 = 0x40 | 0x08 | 0x80;

fn flags(report: &mut Report, _: &[String]) {
    for place in own_places() {
        let (file, dir) = (place.join("file"), place.join("dir"));
        fs::write(&file, "x").expect("its own places are writable");
        fs::create_dir(&dir).expect("its own places are writable");
        for path in [&file, &dir, &place] {
            let open = File::open(path).expect("it is its own");
            let fd = open.as_raw_fd() as usize;
            let set = |flags: u64| {
                let address = (&raw const flags) as usize;
                call(libc::SYS_ioctl, [fd, FS_IOC_SETFLAGS, address, 0, 0, 0])
            };
            let set_extended = |flags: u32| {
                let attributes = [flags, 0, 0, 0, 0, 0, 0];
                let address = attributes.as_ptr() as usize;
                call(libc::SYS_ioctl, [fd, FS_IOC_FSSETXATTR, address, 0, 0, 0])
            };
            let shown = path.display();
            for forbidden in [IMMUTABLE, APPEND_ONLY, IMMUTABLE | APPEND_ONLY | HARMLESS] {
                report.must_fail(format!("flags {forbidden:#x} of {shown}"), set(forbidden));
            }
            for forbidden in [XFLAG_IMMUTABLE, XFLAG_APPEND_ONLY] {
                let what = format!("extended flags {forbidden:#x} of {shown}");
                report.must_fail(what, set_extended(forbidden));
            }
            // file_setattr(2), since Linux 6.17: the same by path.
            let name = c(path);
            for forbidden in [XFLAG_IMMUTABLE, XFLAG_APPEND_ONLY] {
                let attributes = [u64::from(forbidden), 0, 0];
                let (here, address) = (libc::AT_FDCWD as usize, attributes.as_ptr() as usize);
                let arguments = [
                    here,
                    name.as_ptr() as usize,
                    address,
                    size_of_val(&attributes),
                    0,
                    0,
                ];
                report.must_fail(format!("attributes of {shown}"), call(469, arguments));
            }
            // These any owner may set, on most file systems; they make each unlinking wait for the disk.
            let result = set(HARMLESS);
            refused(report, format!("flags of {shown}"), result, libc::EOPNOTSUPP);
            let result = set_extended(XFLAG_SYNC);
            refused(
                report,
                format!("extended flags of {shown}"),
                result,
                libc::EOPNOTSUPP,
            );
        }
    }
    ready(report);
}

/// Files that grow for as long as they are there, and are made again when they are not.
fn grow(report: &mut Report, _: &[String]) {
    for number in 0..4 {
        daemon(|| {
            ignore_every_signal();
            let path = format!("/work/growing-{number}");
            let block = [b'x'; 64 << 10];
            let mut is_reported = false;
            loop {
                let Ok(mut file) = OpenOptions::new().append(true).create(true).open(&path) else {
                    continue;
                };
                // Enough to be in the middle of it, not enough to be a burden for the machine.
                for written in 0..256 {
                    if file.write_all(&block).is_err() {
                        break;
                    }
                    if !is_reported && written == 32 {
                        println!("grows {number}");
                        is_reported = true;
                    }
                }
                let _ = file.set_len(0);
            }
        });
    }
    ready(report);
}

fn mount_inside(report: &mut Report, args: &[String]) {
    for place in [
        "/work/mounted/inner",
        "/work/bound/inner",
        "/work/bound/canary",
        "/tmp/mounted",
    ] {
        fs::create_dir_all(place).expect("its own places are writable");
    }
    fs::write("/work/bound/file", "x").expect("/work is writable");
    let mounts = [
        ("none", "/work/mounted", "tmpfs", 0),
        ("none", "/tmp/mounted", "tmpfs", 0),
        ("/etc", "/work/mounted/inner", "none", libc::MS_BIND),
        ("/work/bound", "/work/bound", "none", libc::MS_BIND),
        ("/usr", "/work/bound/inner", "none", libc::MS_BIND | libc::MS_REC),
        (&*args[1], "/work/bound/canary", "none", libc::MS_BIND),
    ];
    if args[0] == "refused" {
        for (source, place, kind, flags) in mounts {
            report.must_fail(place, mount(source, place, kind, flags));
        }
        return;
    }
    report.must_work("namespaces", own_namespaces());
    for (source, place, kind, flags) in mounts {
        if place == "/work/mounted/inner" {
            fs::create_dir_all(place).expect("it is on the job's tmpfs");
        }
        let flags = if kind == "none" {
            flags | libc::MS_REC
        } else {
            flags
        };
        report.must_work(place, mount(source, place, kind, flags));
    }
    ready(report);
}

fn set_id(report: &mut Report, args: &[String]) {
    let gid = nix::unistd::getgid();
    let other: u32 = args[0].parse().expect("a gid");
    // Each program that prints who it is, of the job's own, and with the slot's group.
    for place in own_places() {
        let copy = place.join("id");
        if let Err(error) = fs::copy("/usr/bin/id", &copy) {
            report.broken(format!("{}: {error}", copy.display()));
            continue;
        }
        chown(&copy, None, Some(other)).expect("the job is in the group");
        fs::set_permissions(&copy, Permissions::from_mode(0o6755)).expect("it is its own");
        match Command::new(&copy).arg("-g").output() {
            // Where nothing can be started at all, nothing is gained either.
            Err(error) => report.print(format!("blocked: {}: {error}", copy.display())),
            Ok(output) if output.stdout == format!("{gid}\n").into_bytes() => {
                report.print(format!("blocked: {} is inert", copy.display()))
            }
            Ok(output) => report.broken(format!("{}: {output:?}", copy.display())),
        }
        report.must_fail("giving it to root", chown(&copy, Some(0), None));
        report.must_fail("giving it to root's group", chown(&copy, None, Some(0)));
        // VFS_CAP_REVISION_2 and effective; all of the capabilities.
        let all = [0x0200_0001u32, u32::MAX, 0, 0x1ff, 0]
            .map(u32::to_le_bytes)
            .concat();
        report.must_fail("capabilities", set_attribute(&copy, "security.capability", &all));
        // Those of a namespace's root, as root of it.
        let copy = copy.clone();
        let pid = fork(|| {
            if own_namespaces().is_ok() {
                let of_the_namespace = [0x0300_0001u32, u32::MAX, 0, 0x1ff, 0, uid()];
                let all = of_the_namespace.map(u32::to_le_bytes).concat();
                let result = set_attribute(&copy, "security.capability", &all);
                println!("capabilities of a namespace: {result:?}");
            }
        });
        nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None).expect("it is our child");
        let status = Command::new("/bin/grep")
            .args(["-q", "CapEff:.*[1-9a-f]", "/proc/self/status"])
            .status();
        if status.is_ok_and(|status| status.success()) {
            report.broken("a started program has capabilities");
        }
    }
    ready(report);
}

/// Fill the file system, blocks first or inodes first, in the given order. What fills it is at the bottom of a
/// deep chain of directories, and beside the chain, where something could be moved to, no name has room either.
fn fill(report: &mut Report, args: &[String]) {
    let chain = |name: &str| -> io::Result<std::path::PathBuf> {
        let mut dir = Path::new("/work").join(name);
        for _ in 0..90 {
            fs::create_dir(&dir)?;
            dir.push("d");
        }
        dir.pop();
        Ok(dir)
    };
    let full = |error: &io::Error| {
        [libc::ENOSPC, libc::EDQUOT]
            .map(Some)
            .contains(&error.raw_os_error())
    };
    // As many names as one block of an ext4 directory holds: `.`, `..` and a checksum take 36 of 4096 bytes, and
    // each name 8 more than its length, in fours.
    let mut bottom = chain(&"c".repeat(92)).expect("there is room at first");
    for number in 0..15 {
        bottom = chain(&format!("{}{number:02}", "c".repeat(251))).expect("there is room at first");
    }
    // Before there is none left for it.
    let file = File::create(bottom.join("block")).expect("there is room for one");
    for step in args {
        match step.as_str() {
            "blocks" => {
                // Allocated at once: what is written waits in memory, and its size is a guess until later.
                let (mut at, mut length) = (0, 1 << 20);
                while length >= 4096 {
                    match call(
                        libc::SYS_fallocate,
                        [file.as_raw_fd() as usize, 0, at, length, 0, 0],
                    ) {
                        Ok(_) => at += length,
                        Err(error) if full(&error) => length /= 2,
                        Err(error) => return report.broken(format!("filling: {error}")),
                    }
                }
            }
            "inodes" => {
                for number in 0.. {
                    match File::create(format!("/tmp/{number}")) {
                        Ok(_) => {}
                        Err(error) if full(&error) => break,
                        Err(error) => return report.broken(format!("filling: {error}")),
                    }
                }
            }
            other => report.broken(format!("no such step: {other}")),
        }
    }
    // The console is on the same disk, and has no more lines. This sign takes no room.
    fs::set_permissions("/input", Permissions::from_mode(0o700)).expect("it is its own");
    wait_for_ever()
}

fn recreate(report: &mut Report, _: &[String]) {
    for (number, place) in own_places().into_iter().enumerate() {
        daemon(|| {
            ignore_every_signal();
            for round in 0u64.. {
                let dir = place.join(format!("again-{}", round % 50));
                let _ = fs::create_dir_all(dir.join("and/again"));
                let _ = fs::write(dir.join("and/file"), "x");
                let _ = symlink("/etc", dir.join("and/link"));
                if round == 100 {
                    println!("recreates {number}");
                }
                if round % 3 == 0 {
                    let _ = fs::remove_dir_all(dir);
                }
            }
        });
    }
    ready(report);
}

fn replace(report: &mut Report, args: &[String]) {
    let mut places = own_places();
    places.extend(["/home", "/run", "/dev", "/proc", "/etc/passwd"].map(Into::into));
    places.extend(args.iter().map(Into::into));
    for place in &places {
        let shown = place.display();
        let name = place.file_name().expect("none is the root");
        for elsewhere in [
            place.with_file_name("elsewhere"),
            Path::new("/work").join(name),
            "/tmp/x".into(),
        ] {
            report.must_fail(
                format!("{shown} to {}", elsewhere.display()),
                rename(place, &elsewhere, 0),
            );
        }
        fs::create_dir_all("/tmp/mine").expect("/tmp is writable");
        report.must_fail(
            format!("{shown} exchanged"),
            rename(Path::new("/tmp/mine"), place, libc::RENAME_EXCHANGE),
        );
        report.must_fail(
            format!("{shown} replaced"),
            rename(Path::new("/tmp/mine"), place, 0),
        );
        report.must_fail(format!("{shown} removed"), fs::remove_dir(place));
        report.must_fail(format!("{shown} unlinked"), fs::remove_file(place));
        report.must_fail(format!("{shown} linked"), symlink("/etc", place));
    }
    for place in &places {
        fs::write(place.join("inside"), "x").ok();
    }
    ready(report);
}
