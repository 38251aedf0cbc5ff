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
        let disk = SmallDisk(host.root.join(STATE_DIR));
        let options = "mode=755,size=64m,nr_inodes=1000";
        run(&["mount", "-t", "tmpfs", "-o", options, "none"], &disk.0);
        disk
    }

    /// Set the limits of one in memory.
    pub fn limit(&self, options: &str) {
        run(&["mount", "-o", &format!("remount,{options}")], &self.0);
    }

    /// ext4 of 64 MiB in a file, with this many inodes: its directories take blocks, as on most hosts.
    pub fn ext4(host: &TestHost, inodes: u32) -> SmallDisk {
        let image = host.root.join("disk.img");
        let file = std::fs::File::create(&image).expect("the test's directory is writable");
        file.set_len(64 << 20).expect("a sparse file takes no room");
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
