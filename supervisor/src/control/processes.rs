//! The processes of one uid, as `/proc` shows them to everybody (`proc_pid_stat(5)`). A host that hides other
//! users' processes (`hidepid`) shows none here either; the packaged supervisor sees none, so the operator's command
//! reads `/proc` itself.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use protocol::WorkerId;

use super::api::{Details, Process};

/// More are not listed; a fork bomb must not make a page of megabytes.
const MOST: usize = 1000;

/// At most 1,000 of them, in the order of their pids.
pub fn read_processes(uid: u32) -> Vec<Process> {
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten();
    let page = page.and_then(|size| u64::try_from(size).ok()).unwrap_or(4096);
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = all.filter_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        (entry.metadata().ok()?.uid() == uid).then_some(pid)
    });
    let mut found: Vec<Process> = pids
        .filter_map(|pid| parse(pid, &fs::read(format!("/proc/{pid}/stat")).ok()?, page))
        .take(MOST)
        .collect();
    found.sort_by_key(|process| process.pid);
    found
}

/// The processes, where the supervisor could not see them and this process can.
pub fn fill_details(details: &mut Details) {
    if let (true, Some(uid)) = (details.processes.is_empty(), details.worker.uid) {
        details.processes = read_processes(uid);
        details.memory = details.memory.max(resident_bytes(&details.processes));
    }
}

/// The sum of their resident memory, in bytes. Pages that they share are counted once for each.
pub fn resident_bytes(processes: &[Process]) -> u64 {
    processes.iter().map(|process| process.memory).sum()
}

/// What a worker's cgroup is charged with, page cache included. `noted` is the file in which the helper says where the
/// workers' cgroups are; without the controller there is no such number.
pub fn charged_bytes(noted: &Path, worker: WorkerId) -> Option<u64> {
    let cgroups = fs::read_to_string(noted).ok()?;
    let file = Path::new(&cgroups)
        .join(worker.to_string())
        .join("memory.current");
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// `PID (NAME) STATE …`, where NAME is the process's own choice and may hold anything; RSS, in pages, is the
/// 22nd field after it.
fn parse(pid: i32, stat: &[u8], page: u64) -> Option<Process> {
    let text = String::from_utf8_lossy(stat);
    let (begin, end) = (text.find('(')?, text.rfind(')')?);
    let name = text
        .get(begin + 1..end)?
        .chars()
        .filter(|c| !c.is_control())
        .collect();
    let mut fields = text.get(end + 1..)?.split_whitespace();
    let state = fields.next()?.chars().next()?;
    let pages: u64 = fields.nth(20)?.parse().ok()?;
    Some(Process {
        pid,
        name,
        state,
        memory: pages.saturating_mul(page),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_may_call_itself_what_it_likes() {
        let stat = b"7 (a) R (\x1bb) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 99 21";
        let found = parse(7, stat, 4096).unwrap();
        assert_eq!((found.name.as_str(), found.state), ("a) R (b", 'S'));
        assert_eq!(found.memory, 21 * 4096, "{found:?}");
        assert_eq!(parse(7, b"7 (a", 4096), None);
    }

    #[test]
    fn this_process_is_found_among_its_users() {
        let own = std::process::id() as i32;
        let found = read_processes(nix::unistd::geteuid().as_raw());
        let own = found.iter().find(|process| process.pid == own);
        assert!(found.len() == MOST || own.is_some_and(|process| process.memory > 0));
    }
}
