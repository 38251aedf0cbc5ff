//! Which file systems the state directory may be on: those on which what a job has left can be deleted by its user.

use std::os::fd::AsFd;

use anyhow::{Context, Result, bail};
use nix::sys::statfs::fstatfs;

/// The numbers are `statfs(2)`'s. On these the tests delete what jobs leave: ext2 to ext4, XFS, btrfs, tmpfs, overlayfs.
const TESTED: [u32; 5] = [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994, 0x794c_7630];

const READ_ONLY_SNAPSHOTS: &str =
    "a read-only snapshot cannot be made writable again, so no deletion ends there";
const ANSWERED_ELSEWHERE: &str =
    "another process or machine answers for it, so nothing bounds how long a deletion takes";

const REFUSED: [(u32, &str, &str); 7] = [
    (0xca45_1a4e, "bcachefs", READ_ONLY_SNAPSHOTS),
    (0x6969, "NFS", ANSWERED_ELSEWHERE),
    (0xff53_4d42, "SMB", ANSWERED_ELSEWHERE),
    (0xfe53_4d42, "SMB", ANSWERED_ELSEWHERE),
    (0x00c3_6400, "Ceph", ANSWERED_ELSEWHERE),
    (0x0102_1997, "9P", ANSWERED_ELSEWHERE),
    (0x6573_5546, "FUSE", ANSWERED_ELSEWHERE),
];

/// Refuse a file system that is known to be unfit. Returns a warning for one that is not known.
pub fn check(state: impl AsFd) -> Result<Option<String>> {
    let kind = fstatfs(state).context("cannot ask which file system the state directory is on")?;
    check_type(kind.filesystem_type().0 as u32)
}

fn check_type(kind: u32) -> Result<Option<String>> {
    if let Some((_, name, reason)) = REFUSED.iter().find(|(other, ..)| *other == kind) {
        bail!("the state directory is on {name}: {reason}: mount ext4, XFS or btrfs there");
    }
    Ok((!TESTED.contains(&kind)).then(|| {
        format!(
            "the state directory is on a file system that was not tested (statfs(2) says type {kind:#x}): \
             a job may leave there what its deletion cannot remove"
        )
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_is_tested_or_refused_or_warned_of() {
        for kind in TESTED {
            assert_eq!(check_type(kind).unwrap(), None, "{kind:#x}");
        }
        for (kind, name, reason) in REFUSED {
            let error = check_type(kind).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains(reason), "{error}");
        }
        // ZFS, NILFS, F2FS, ramfs.
        for kind in [0x2fc1_2fc1, 0x3434, 0xf2f5_2010, 0x8584_58f6] {
            let warning = check_type(kind).unwrap().unwrap();
            assert!(warning.contains(&format!("{kind:#x}")), "{warning}");
        }
    }
}
