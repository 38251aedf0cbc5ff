//! File systems of a test's own, so small that they can be filled.

use std::ffi::OsStr;
use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::process::Command;

use protocol::config::STATE_DIR;

use crate::harness::{TestHost, until_is};

/// The state directory on a small file system of its own. It is gone with this.
#[derive(Debug)]
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// In memory: its limits can be changed.
    pub fn in_memory(host: &TestHost) -> SmallDisk {
        SmallDisk::in_memory_at(host.root.join(STATE_DIR))
    }

    /// The same elsewhere.
    pub fn in_memory_at(place: PathBuf) -> SmallDisk {
        let options = format!("mode=755,size={},nr_inodes=1000", small());
        run(&["mount", "-t", "tmpfs", "-o", &options, "none"], &place);
        SmallDisk(place)
    }

    /// Let it have no block and no inode more than are in use.
    pub fn fill(&self) {
        // The kernel sets no limit below what is in use, and that may grow meanwhile.
        until_is("a file system that is full", || {
            let now = nix::sys::statvfs::statvfs(&self.0).expect("it is mounted");
            // To tmpfs, 0 is no limit.
            let blocks = (now.blocks() - now.blocks_free()).max(1);
            let inodes = now.files() - now.files_free();
            let size = blocks * now.fragment_size();
            is_done(&limit(&format!("size={size},nr_inodes={inodes}")), &self.0)
        });
    }

    /// Set the limits of one in memory.
    pub fn limit(&self, options: &str) {
        run(&limit(options), &self.0);
    }

    /// [Small](small) ext4 in a file, with this many inodes: its directories take blocks, as on most hosts.
    pub fn ext4(host: &TestHost, inodes: u32) -> SmallDisk {
        // Nothing is kept back for root: the last block is the job's.
        let inodes = inodes.to_string();
        SmallDisk::ext4_with(host, &["-m", "0", "-b", "4096", "-N", &inodes])
    }

    /// Small ext4 that keeps some blocks back for root, and has more inodes than blocks.
    pub fn ext4_with_reserve(host: &TestHost) -> SmallDisk {
        SmallDisk::ext4_with(host, &["-m", "5", "-b", "4096", "-i", "4096"])
    }

    /// The same, whose files can be encrypted (`CONFIG_FS_ENCRYPTION`).
    pub fn ext4_with_encryption(host: &TestHost) -> SmallDisk {
        SmallDisk::ext4_with(host, &["-b", "4096", "-O", "encrypt"])
    }

    fn ext4_with(host: &TestHost, options: &[&str]) -> SmallDisk {
        let image = sparse(host, small());
        run(&[&["mkfs.ext4", "-q", "-F"], options].concat(), &image);
        let disk = SmallDisk(host.root.join(STATE_DIR));
        let image = image.to_str().expect("a test's path is ASCII");
        run(&["mount", "-o", "loop", image], &disk.0);
        disk
    }

    /// ext4 of 256 MiB that counts what each user and each project has, and limits it if `enforced`. None, if this
    /// kernel has no format of quotas (`CONFIG_QFMT_V2`).
    pub fn with_quotas(host: &TestHost, enforced: bool) -> Option<SmallDisk> {
        let image = sparse(host, 256 << 20);
        let quota = ["-O", "quota,project", "-E", "quotatype=usrquota:prjquota"];
        run(
            &[&["mkfs.ext4", "-q", "-F", "-m", "0"][..], &quota].concat(),
            &image,
        );
        let disk = host.root.join(STATE_DIR);
        let options = if enforced {
            "loop,usrquota,prjquota"
        } else {
            "loop"
        };
        let output = Command::new("mount")
            .args(["-o", options])
            .args([&image, &disk])
            .output()
            .expect("the command is there");
        if output.status.success() {
            return Some(SmallDisk(disk));
        }
        // Any other reason is a failure.
        let plain = Command::new("mount")
            .args(["-o", "loop,ro"])
            .args([&image, &disk])
            .status()
            .expect("the command is there");
        assert!(plain.success(), "{output:?}");
        run(&["umount"], &disk);
        None
    }

    /// ext4 of 1 GiB, with the quotas of users enforced or without any.
    pub fn roomy(host: &TestHost, quotas: bool) -> SmallDisk {
        let image = sparse(host, 1 << 30);
        let (made, mounted) = if quotas {
            (&["-O", "quota", "-E", "quotatype=usrquota"][..], "loop,usrquota")
        } else {
            (&[][..], "loop")
        };
        run(&[&["mkfs.ext4", "-q", "-F", "-m", "0"], made].concat(), &image);
        let disk = SmallDisk(host.root.join(STATE_DIR));
        let image = image.to_str().expect("a test's path is ASCII");
        run(&["mount", "-o", mounted, image], &disk.0);
        disk
    }

    /// Write down all that is to be written, so that it is not another's work later.
    pub fn sync(&self) {
        run(&["sync", "-f"], &self.0);
    }

    /// XFS, with quotas of users enforced, and of projects.
    pub fn xfs(host: &TestHost) -> SmallDisk {
        SmallDisk::xfs_with(host, "loop,uquota,pquota")
    }

    /// XFS without quotas, for kernels that have none.
    pub fn plain_xfs(host: &TestHost) -> SmallDisk {
        SmallDisk::xfs_with(host, "loop")
    }

    fn xfs_with(host: &TestHost, options: &str) -> SmallDisk {
        // As small as mkfs.xfs makes one.
        let image = sparse(host, 320 << 20);
        let mkfs = crate::harness::tool("mkfs.xfs");
        run(&[mkfs.to_str().expect("its path is ASCII"), "-q"], &image);
        let disk = SmallDisk(host.root.join(STATE_DIR));
        let image = image.to_str().expect("a test's path is ASCII");
        run(&["mount", "-o", options, image], &disk.0);
        disk
    }

    /// btrfs, which lets everybody make subvolumes.
    pub fn btrfs(host: &TestHost) -> SmallDisk {
        let image = sparse(host, 256 << 20);
        let mkfs = crate::harness::tool("mkfs.btrfs");
        run(&[mkfs.to_str().expect("its path is ASCII"), "-q"], &image);
        let disk = SmallDisk(host.root.join(STATE_DIR));
        let image = image.to_str().expect("a test's path is ASCII");
        run(&["mount", "-o", "loop", image], &disk.0);
        disk
    }

    /// overlayfs, as in a container.
    pub fn overlay(host: &TestHost) -> SmallDisk {
        let at = |name: &str| {
            let dir = host.root.join(name);
            std::fs::create_dir(&dir).expect("the test's directory is writable");
            dir.display().to_string()
        };
        let (lower, upper, work) = (at("lower"), at("upper"), at("overlay-work"));
        let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
        let disk = SmallDisk(host.root.join(STATE_DIR));
        run(&["mount", "-t", "overlay", "-o", &options, "none"], &disk.0);
        disk
    }

    /// A file system without a backing store, which the helper does not know.
    pub fn ramfs(host: &TestHost) -> SmallDisk {
        let disk = SmallDisk(host.root.join(STATE_DIR));
        run(&["mount", "-t", "ramfs", "-o", "mode=755", "none"], &disk.0);
        disk
    }

    /// What is written down of this user: what it has, and its limits.
    pub fn quota(&self, uid: u32) -> String {
        self.sync();
        let (kind, device) = (self.ask("FSTYPE"), self.ask("SOURCE"));
        let mut command = if kind == "xfs" {
            let mut command = Command::new("xfs_quota");
            command.args(["-x", "-c", &format!("quota -u -n -N -v -b -i {uid}")]);
            command.arg(&self.0);
            command
        } else {
            let mut command = Command::new("debugfs");
            command.args(["-R", &format!("get_quota user {uid}"), &device]);
            command
        };
        let output = command.output().expect("the command is there");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn ask(&self, column: &str) -> String {
        let output = Command::new("findmnt")
            .args(["-n", "-o", column, "--mountpoint"])
            .arg(&self.0)
            .output()
            .expect("the command is there");
        let text = String::from_utf8(output.stdout).expect("what findmnt prints here is ASCII");
        text.trim().to_owned()
    }
}

/// A file that holds nothing yet, for a file system.
fn sparse(host: &TestHost, bytes: u64) -> PathBuf {
    let image = host.root.join("disk.img");
    // A new one each time: the last one may be in the mounts of another test's factory still.
    let _ = std::fs::remove_file(&image);
    let file = std::fs::File::create(&image).expect("the test's directory is writable");
    file.set_len(bytes).expect("a sparse file takes no room");
    image
}

fn limit(options: &str) -> [String; 3] {
    ["mount", "-o", &format!("remount,{options}")].map(str::to_owned)
}

fn run(words: &[impl AsRef<OsStr> + Debug], place: &Path) {
    assert!(is_done(words, place), "{words:?} failed");
}

fn is_done(words: &[impl AsRef<OsStr>], place: &Path) -> bool {
    let status = Command::new(&words[0]).args(&words[1..]).arg(place).status();
    status.expect("the command is there").success()
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            run(&["umount", "--lazy"], &self.0);
        } else {
            let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
        }
    }
}

/// Bytes of a disk on which two workers have the test bed's largest agent, and 48 MiB are left.
pub fn small() -> u64 {
    let length = |program| {
        let program = std::fs::metadata(crate::harness::binaries().join(program));
        program.expect("the agents were built").len()
    };
    (48 << 20) + 2 * length("fake-agent").max(length("hostile-job"))
}

/// Bytes that so many workers take of the disk with the fake agent: each has its program, and the agent's own two copies.
pub fn size_of_agents(workers: u64) -> u64 {
    let agent = std::fs::metadata(crate::harness::binaries().join("fake-agent"));
    3 * workers * agent.expect("the agent was built").len()
}
