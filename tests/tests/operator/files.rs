//! The page for operators names every file and directory that supervisor and helper write.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use testbed::pages::Page;

use super::*;

/// What is below `dir`, but not within what a job may write.
fn below(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let path = entry.path();
        let is_of_a_job = dir.ends_with("devices") || entry.file_name() == "fs";
        if entry.file_type().unwrap().is_dir() && !is_of_a_job {
            below(&path, found);
        }
        found.push(path);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_file_that_is_written_is_on_the_page() {
    let factory = TestFactory::new("[slots.a]\ntarget = \"TARGET\"\nnetwork = \"none\"\n").await;
    let job = factory.start_blocking_job().await;
    let worker = factory.server.job(job).worker.unwrap().to_string();
    let record = factory.host.userdb();
    let uid = std::fs::read_dir(&record).unwrap().find_map(|entry| {
        let name = entry.unwrap().file_name().into_string().unwrap();
        name.strip_suffix(".user")?.parse::<u32>().ok()
    });
    let mut found = Vec::new();
    for dir in [
        protocol::config::STATE_DIR,
        protocol::config::RUN_DIR,
        "run/userdb",
        "run/systemd",
    ] {
        // The last is there where the range of uids is one of systemd's.
        let dir = factory.host.root.join(dir);
        if dir.exists() {
            below(&dir, &mut found);
        }
    }
    let group = factory.host.cgroup_dir();
    let mut in_group = Vec::new();
    below(&group, &mut in_group);
    let cgroups = in_group.iter().filter(|path| path.is_dir());
    let cgroups = cgroups.map(|path| Path::new("CGROUP").join(path.strip_prefix(&group).unwrap()));
    let found: BTreeSet<String> = found
        .iter()
        .map(|path| Path::new("/").join(path.strip_prefix(&factory.host.root).unwrap()))
        .chain(cgroups)
        .map(|path| {
            if path.parent().is_some_and(|dir| dir.ends_with("nspawn-uid")) {
                return "/run/systemd/nspawn-uid/BLOCK".to_owned();
            }
            let path = path.display().to_string();
            let path = path
                .replace(&worker.to_lowercase(), "WORKER")
                .replace(&worker, "WORKER");
            path.replace(&uid.expect("it has a record").to_string(), "UID")
        })
        .collect();
    let page = Page::read("docs/operating.md").section("Files");
    let named: BTreeSet<&str> = page.words().collect();
    assert!(found.len() > 15, "{found:#?}");
    let missing: Vec<_> = found
        .iter()
        .filter(|path| !named.contains(path.as_str()))
        .collect();
    assert!(missing.is_empty(), "not on the page: {missing:#?}");
    factory.release();
    factory.wait_completed(job).await;
    factory.finish().await;
}
