//! What Landlock keeps a job from, as far as the kernel has it (`landlock(7)`): abstract sockets and processes of others,
//! and writing to what is not the job's own.
//!
//! A read-only mount keeps nobody from writing to a FIFO or a device node (`open(2)`), and there is no list of FIFOs to
//! mask. So no file opens for writing but beneath the places that are the job's.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result};
use libc::c_long;

use crate::sys;
use crate::sys::LandlockRuleset;

/// `linux/landlock.h`.
const ACCESS_FS_WRITE_FILE: u64 = 1 << 1;
const ACCESS_FS_REFER: u64 = 1 << 13;
const SCOPE_ABSTRACT_UNIX_SOCKET: u64 = 1;
const SCOPE_SIGNAL: u64 = 2;

/// The versions of the interface that have what is used here: Linux 5.19 and 6.12.
const WITH_REFER: c_long = 2;
const WITH_SCOPES: c_long = 6;

/// Without the right to refer, no file moves from one directory to another; so it is handled only to be allowed where
/// writing is.
const WRITING: u64 = ACCESS_FS_WRITE_FILE | ACCESS_FS_REFER;

/// What is kept from a job with a kernel of this version.
fn handled(version: c_long, allow_user_namespaces: bool) -> LandlockRuleset {
    // Whoever is kept from any file may not mount, in a user namespace of its own either.
    let has_files = version >= WITH_REFER && !allow_user_namespaces;
    LandlockRuleset {
        handled_access_fs: if has_files { WRITING } else { 0 },
        handled_access_net: 0,
        scoped: if version >= WITH_SCOPES {
            SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL
        } else {
            0
        },
    }
}

/// What a job on this host is not kept from, in a sentence each.
pub fn warnings() -> Vec<&'static str> {
    warnings_for(sys::landlock_version())
}

fn warnings_for(version: c_long) -> Vec<&'static str> {
    let mut warnings = Vec::new();
    if version < WITH_SCOPES {
        warnings.push(
            "abstract sockets and signals are not kept within jobs: that needs Linux 6.12 with Landlock",
        );
    }
    if version < WITH_REFER {
        warnings.push(
            "jobs can write to FIFOs of the host that everybody may write to: that needs Linux 5.19 with Landlock",
        );
    }
    warnings
}

/// The rules of one job, while its sandbox is made.
#[derive(Debug)]
pub struct LandlockRules {
    ruleset: Option<OwnedFd>,
    has_files: bool,
}

impl LandlockRules {
    pub fn new(allow_user_namespaces: bool) -> Result<LandlockRules> {
        let handled = handled(sys::landlock_version(), allow_user_namespaces);
        let has_files = handled.handled_access_fs != 0;
        // The kernel takes none that handles nothing; what is missing, the helper has said at its start.
        let is_empty = !has_files && handled.scoped == 0;
        let ruleset = (!is_empty)
            .then(|| sys::landlock_create_ruleset(&handled))
            .transpose();
        Ok(LandlockRules {
            ruleset: ruleset.context("cannot make a Landlock ruleset")?,
            has_files,
        })
    }

    /// The job may write beneath this directory.
    pub fn allow_writing(&self, place: BorrowedFd<'_>) -> Result<()> {
        match &self.ruleset {
            Some(ruleset) if self.has_files => sys::landlock_allow_beneath(ruleset.as_fd(), place, WRITING)
                .context("cannot allow writing with Landlock"),
            _ => Ok(()),
        }
    }

    /// From now on this process, and all that it will start, keep to the rules. It takes `no_new_privs`.
    pub fn restrict_self(self) -> Result<()> {
        match self.ruleset {
            Some(ruleset) => {
                sys::landlock_restrict_self(ruleset.as_fd()).context("cannot restrict the job with Landlock")
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_has_is_used_and_what_it_lacks_is_said() {
        for (version, files, scopes, missing) in [
            (-1, false, false, 2),
            (0, false, false, 2),
            (1, false, false, 2),
            (2, true, false, 1),
            (5, true, false, 1),
            (6, true, true, 0),
            (9, true, true, 0),
        ] {
            let rules = handled(version, false);
            assert_eq!(
                rules.handled_access_fs,
                if files { 0x2002 } else { 0 },
                "{version}"
            );
            assert_eq!(rules.scoped, if scopes { 3 } else { 0 }, "{version}");
            assert_eq!(warnings_for(version).len(), missing, "{version}");
            let with_namespaces = handled(version, true);
            assert_eq!(with_namespaces.handled_access_fs, 0, "{version}");
            assert_eq!(with_namespaces.scoped, rules.scoped, "{version}");
        }
    }
}
