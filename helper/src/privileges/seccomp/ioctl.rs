//! Which requests of `ioctl(2)` a job may make. Pure.
//!
//! A request names its driver in one byte (`_IOC_TYPE`), its *class*. A slot without devices gets the requests that
//! ordinary programs make on files, sockets and terminals, and no others. A slot with devices gets every class, for the
//! drivers of its devices; but of file systems, sockets, terminals and consoles, which are the host's, only what is
//! listed here. The numbers are those of `linux/fs.h`, `asm-generic/ioctls.h` and the headers that are named.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use super::program::{ALLOW, JobFilter, REFUSED, Steps, answer, argument, decide, errno};

/// `ioctl(2)`: the operation does not apply to this kind of object. It is what the kernel says of a file, socket or
/// terminal that has no such request, and what programs fall back on.
const NOT_THERE: u32 = errno(libc::ENOTTY);
/// What file systems without such flags say, and `ioctl_iflags(2)`'s callers tolerate.
const NOT_SUPPORTED: u32 = errno(libc::EOPNOTSUPP);

/// Reviewed requests.
type Requests = &'static [RangeInclusive<u32>];

const fn one(request: u32) -> RangeInclusive<u32> {
    request..=request
}

/// The class of a request, where the request has it.
const CLASS: u32 = 0xff00;

const fn class(byte: u8) -> u32 {
    (byte as u32) << 8
}

/// What a request has of the size of a `long`.
pub const LONG: u32 = (size_of::<libc::c_long>() as u32) << 16;

/// Of a file on any file system: to ask, and to share blocks of files that the job can write. Not here: flags and
/// attributes that outlive a job or slow its deletion, encryption keys and policies (`f` 19 to 26, they belong to the
/// whole file system), fs-verity, subvolumes and snapshots, `FIFREEZE`, `FITRIM`, `BTRFS_IOC_SYNC`, defragmentation,
/// shutdown, labels and versions.
///
/// Third: those that set flags and attributes. `file_setattr(2)` is the same as a call.
const OF_FILES: [(u8, Requests, &[u32]); 5] = [
    (
        b'f',
        &[
            one(0x8000_6601 | LONG), // FS_IOC_GETFLAGS
            one(0xc020_660b),        // FS_IOC_FIEMAP
            // Queries about the caller's own memory, in /proc: PAGEMAP_SCAN, PROCMAP_QUERY.
            one(0xc060_6610),
            one(0xc068_6611),
        ],
        &[0x4000_6602 | LONG], // FS_IOC_SETFLAGS
    ),
    (b'v', &[one(0x8000_7601 | LONG)], &[]), // FS_IOC_GETVERSION
    (
        b'X',
        &[
            one(0x800c_581e), // XFS_IOC_DIOINFO: how direct input and output must be aligned
            one(0x801c_581f), // FS_IOC_FSGETXATTR
        ],
        &[0x401c_5820], // FS_IOC_FSSETXATTR
    ),
    (
        0x94,
        &[
            one(0x4004_9409), // FICLONE
            one(0x4020_940d), // FICLONERANGE
            one(0xc018_9436), // FIDEDUPERANGE
            one(0x8100_9431), // FS_IOC_GETFSLABEL
        ],
        &[],
    ),
    (
        0x15,
        &[
            one(0x8011_1500), // FS_IOC_GETFSUUID
            one(0x8081_1501), // FS_IOC_GETFSSYSFSPATH
        ],
        &[],
    ),
];

/// Classes of single file systems, of which a job needs nothing: FAT, ZFS (its device's and its files'), autofs, Ceph,
/// bcachefs, reiserfs, SMB, F2FS.
const OF_SINGLE_FILE_SYSTEMS: [u8; 9] = [b'r', b'Z', 0x83, 0x93, 0x97, 0xbc, 0xcd, 0xcf, 0xf5];

/// Sockets (`linux/sockios.h`): asking about the network, and setting up one that is the job's own.
const OF_SOCKETS: Requests = &[
    0x8901..=0x8907, // owner, mark, time stamp
    one(0x8010_8906),
    one(0x8010_8907), // the same time stamps, with 64 bits
    0x890b..=0x890d,  // routes
    0x8910..=0x893f,  // interfaces and their addresses
    // Not 0x8940 and 0x8941, 0x8980 to 0x8983, 0x8990 to 0x89a3: they load the modules of bridges, VLANs and bonds.
    0x8942..=0x894c, // queue lengths, ethtool, MII, what is not sent yet, the network namespace
    0x8953..=0x8955, // ARP
    0x89b0..=0x89b1, // time stamps of the hardware
];

/// A terminal of the job's own (`asm-generic/ioctls.h`), and what that header has for every file.
const OF_TERMINALS: Requests = &[
    0x5401..=0x5411, // TCGETS to TIOCOUTQ
    0x5413..=0x541b, // the window's size, modem lines, FIONREAD
    0x541e..=0x5422, // serial ports, packets, FIONBIO, TIOCNOTTY
    0x5424..=0x5425, // the line discipline, breaks
    0x5427..=0x5429, // breaks, the session
    // Terminals with settings of any speed.
    one(0x802c_542a),
    0x402c_542b..=0x402c_542d,
    // Pseudo terminals: number, lock, device, signal, packet mode, exclusive use, the other side.
    one(0x8004_5430),
    one(0x4004_5431),
    one(0x8004_5432),
    one(0x4004_5436),
    one(0x8004_5438),
    one(0x8004_5439),
    one(0x8004_5440),
    one(0x5441),
    0x5450..=0x5452, // closing on exec, FIOASYNC
    one(0x5460),     // FIOQSIZE
];

/// What reaches past the caller's own terminal: typing into it, the console's selection, the console's output, line
/// disciplines (each loads a module of its own); and BPF programs for packets, which no job may install.
const NEVER_OF_TERMINALS: [u32; 5] = [
    libc::TIOCSTI as u32,
    libc::TIOCLINUX as u32,
    libc::TIOCSETD as u32,
    libc::TIOCCONS as u32,
    0x4010_54d5, // TUNATTACHFILTER of linux/if_tun.h, in the class of terminals
];

/// The same of virtual terminals (`linux/vt.h`): which of them is shown, their number, their size.
const NEVER_OF_CONSOLES: [u32; 6] = [
    0x5606, // VT_ACTIVATE
    0x5608, // VT_DISALLOCATE
    0x5609, // VT_RESIZE
    0x560a, // VT_RESIZEX
    0x560b, // VT_LOCKSWITCH
    0x560f, // VT_SETACTIVATE
];

/// Of keyboard and screen (`linux/kd.h`): asking, and the modes of a console that the slot has. Fonts, colours and key
/// maps are those of all consoles.
const OF_KEYBOARDS: Requests = &[
    one(0x4b31),     // KDGETLED
    0x4b32..=0x4b33, // KDSETLED, KDGKBTYPE
    0x4b3a..=0x4b3b, // KDSETMODE, KDGETMODE
    0x4b44..=0x4b46, // KDGKBMODE, KDSKBMODE, KDGKBENT
    0x4b62..=0x4b65, // KDGKBMETA, KDSKBMETA, KDGKBLED, KDSKBLED
];

/// Of point-to-point links (`linux/ppp-ioctl.h`), the requests that install BPF programs: PPPIOCSACTIVE, PPPIOCSPASS.
const NEVER_OF_LINKS: [u32; 2] = [0x4010_7446, 0x4010_7447];

/// RNDGETENTCNT: how much the kernel's random numbers are worth.
const OF_RANDOM_NUMBERS: Requests = &[one(0x8004_5200)];
/// FIGETBSZ: the size of a file's blocks.
const WITHOUT_CLASS: Requests = &[one(2)];

/// The steps for one request whose class is known: to those of `refused`, `error` is said.
fn requests(allowed: Requests, refused: &[u32], error: u32, otherwise: u32) -> Steps {
    let allowed = allowed.iter().cloned().flatten();
    let allowed = allowed.map(|request| (request, answer(ALLOW)));
    let refused = refused.iter().map(|request| (*request, answer(error)));
    let cases = allowed.chain(refused).collect();
    decide(argument(1), u32::MAX, cases, answer(otherwise))
}

fn only(allowed: Requests) -> Steps {
    requests(allowed, &[], NOT_THERE, NOT_THERE)
}

fn all_but(refused: &[u32]) -> Steps {
    requests(&[], refused, REFUSED, ALLOW)
}

/// The rule for `ioctl(2)`.
pub(super) fn rule(slot: JobFilter<'_>) -> Steps {
    let mut classes: BTreeMap<u32, Steps> = BTreeMap::new();
    for (byte, allowed, setting) in OF_FILES {
        classes.insert(class(byte), requests(allowed, setting, NOT_SUPPORTED, NOT_THERE));
    }
    classes.insert(class(0x89), only(OF_SOCKETS));
    let otherwise = if slot.has_devices {
        for byte in OF_SINGLE_FILE_SYSTEMS {
            classes.insert(class(byte), answer(NOT_THERE));
        }
        classes.insert(class(b'T'), all_but(&NEVER_OF_TERMINALS));
        classes.insert(class(b'V'), all_but(&NEVER_OF_CONSOLES));
        classes.insert(class(b't'), all_but(&NEVER_OF_LINKS));
        classes.insert(class(b'K'), requests(OF_KEYBOARDS, &[], REFUSED, REFUSED));
        ALLOW
    } else {
        let of_terminals = requests(OF_TERMINALS, &NEVER_OF_TERMINALS, REFUSED, NOT_THERE);
        classes.insert(class(b'T'), of_terminals);
        classes.insert(class(b'R'), only(OF_RANDOM_NUMBERS));
        classes.insert(class(0), only(WITHOUT_CLASS));
        // Namespaces and processes by descriptor: `ioctl_nsfs(2)`, linux/pidfd.h.
        classes.insert(class(0xb7), answer(ALLOW));
        classes.insert(class(0xff), answer(ALLOW));
        if slot.allow_user_namespaces {
            // What container runtimes answer for the processes inside (`seccomp_unotify(2)`).
            classes.insert(class(b'!'), answer(ALLOW));
        }
        NOT_THERE
    };
    decide(argument(1), CLASS, classes, answer(otherwise))
}
