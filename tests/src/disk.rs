//! File systems of a test's own, so small that they can be filled.

use std::path::{Path, PathBuf};
use std::process::Command;

use protocol::config::STATE_DIR;

use crate::harness::TestHost;

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
        let options = "mode=755,size=64m,nr_inodes=1000";
        run(&["mount", "-t", "tmpfs", "-o", options, "none"], &place);
        SmallDisk(place)
    }

    /// Let it have no block and no inode more than are in use.
    pub fn fill(&self) {
        let now = nix::sys::statvfs::statvfs(&self.0).expect("it is mounted");
        // To tmpfs, 0 is no limit.
        let blocks = (now.blocks() - now.blocks_free()).max(1);
        let inodes = now.files() - now.files_free();
        let size = blocks * now.fragment_size();
        self.limit(&format!("size={size},nr_inodes={inodes}"));
    }

    /// Set the limits of one in memory.
    pub fn limit(&self, options: &str) {
        run(&["mount", "-o", &format!("remount,{options}")], &self.0);
    }

    /// ext4 of 64 MiB in a file, with this many inodes: its directories take blocks, as on most hosts.
    pub fn ext4(host: &TestHost, inodes: u32) -> SmallDisk {
        let image = sparse(host, 64 << 20);
        // Nothing is kept back for root: the last block is the job's.
        let inodes = inodes.to_string();
        run(
            &["mkfs.ext4", "-q", "-F", "-m", "0", "-b", "4096", "-N", &inodes],
            &image,
        );
        let disk = SmallDisk(host.root.join(STATE_DIR));
        let image = image.to_str().expect("a test's path is ASCII");
        run(&["mount", "-o", "loop", image], &disk.0);
        disk
    }

    /// ext4 of 256 MiB that counts what each user has, and limits it if `enforced`. None, if this kernel has no
    /// format of quotas (`CONFIG_QFMT_V2`).
    pub fn with_quotas(host: &TestHost, enforced: bool) -> Option<SmallDisk> {
        let image = sparse(host, 256 << 20);
        let quota = ["-O", "quota", "-E", "quotatype=usrquota"];
        run(
            &[&["mkfs.ext4", "-q", "-F", "-m", "0"][..], &quota].concat(),
            &image,
        );
        let disk = host.root.join(STATE_DIR);
        let options = if enforced { "loop,usrquota" } else { "loop" };
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

    /// What is written down of this user: what it has, and its limits.
    pub fn quota(&self, uid: u32) -> String {
        run(&["sync", "-f"], &self.0);
        let device = Command::new("findmnt")
            .args(["-n", "-o", "SOURCE", "--mountpoint"])
            .arg(&self.0)
            .output()
            .expect("the command is there");
        let device = String::from_utf8(device.stdout).expect("a device's path is ASCII");
        let output = Command::new("debugfs")
            .args(["-R", &format!("get_quota user {uid}"), device.trim()])
            .output()
            .expect("the command is there");
        assert!(output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

/// A file that holds nothing yet, for a file system.
fn sparse(host: &TestHost, bytes: u64) -> PathBuf {
    let image = host.root.join("disk.img");
    let file = std::fs::File::create(&image).expect("the test's directory is writable");
    file.set_len(bytes).expect("a sparse file takes no room");
    image
}

fn run(words: &[&str], place: &Path) {
    let status = Command::new(words[0]).args(&words[1..]).arg(place).status();
    assert!(
        status.expect("the command is there").success(),
        "{words:?} failed"
    );
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        run(&["umount", "--lazy"], &self.0);
    }
}
