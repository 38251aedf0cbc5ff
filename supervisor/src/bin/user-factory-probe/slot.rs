//! What the slot guarantees to its job.

use std::fs;
use std::io::{self, Write};
use std::net::ToSocketAddrs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::errno::Errno;
use nix::libc::off_t;
use nix::sys::resource::{Resource, getrlimit};
use supervisor::selftest::Outcome;
use supervisor::selftest::expected::Expected;

use crate::Table;

/// From here on reaching a limit takes long: that it is set is all that is asked.
const MANY: u64 = 4096;
const MANY_FILES: u64 = 200_000;

pub fn all(table: &Table, expected: &Expected) {
    identity(table, expected);
    places(table, expected);
    network(table, expected);
    processes(table, expected);
    disk(table, expected);
    inodes(table, expected);
}

fn identity(table: &Table, expected: &Expected) {
    let groups = nix::unistd::getgroups().unwrap_or_default();
    for (name, gid) in &expected.groups {
        let is_member = groups.iter().any(|group| group.as_raw() == *gid);
        let seen = if is_member { "a member" } else { "not a member" };
        table.must_be(
            "the job's user is in the slot's groups",
            &format!("getgroups(2): {name}, {gid}"),
            seen,
            is_member,
        );
    }
    let user = std::env::var("USER").unwrap_or_default();
    let asked = Command::new("id").args(["--user", "--name"]).output();
    let name = asked
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        .unwrap_or_default();
    table.must_be(
        "the job's user has a name",
        "id --user --name",
        &name,
        !name.is_empty() && name == user,
    );
    for (name, value) in &expected.env {
        let seen = std::env::var(name).unwrap_or_else(|_| "not set".into());
        // A value may be a secret: it is not printed.
        let is_so = seen == *value;
        let seen = if is_so {
            "as configured"
        } else {
            "another value, or none"
        };
        table.must_be("variables of the slot's env are set", name, seen, is_so);
    }
    let seen = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(_, hard)| hard as u64);
    // The helper's own limit may be lower, and is not raised.
    let is_within = seen <= expected.open_files;
    table.must_be(
        "limits.open_files",
        "the hard limit of open files",
        seen.to_string(),
        is_within,
    );
}

fn places(table: &Table, expected: &Expected) {
    let usual = ["/work", "/input", "/tmp", "/var/tmp", "/dev/shm"].map(Path::new);
    let home = std::env::var_os("HOME").unwrap_or_default();
    let own = expected.writable.iter().map(|place| &**place);
    for place in usual.into_iter().chain([Path::new(&home)]).chain(own) {
        table.must_work(
            "a job writes and runs programs in its own places",
            &place.display().to_string(),
            runs_in(place),
        );
    }
    for place in &expected.read_only {
        let tried = place.display().to_string();
        let guarantee = "what the slot's read_only names is shown, and cannot be written";
        let read = fs::read_dir(place)
            .map(drop)
            .or_else(|_| fs::File::open(place).map(drop));
        table.must_work(guarantee, &format!("read {tried}"), read);
        let written = fs::File::create_new(place.join(".user-factory-selftest"));
        table.must_fail(guarantee, &format!("write in {tried}"), written);
    }
}

/// Write a script there, run it, and remove it.
fn runs_in(place: &Path) -> io::Result<()> {
    let script = place.join(".user-factory-selftest");
    fs::write(&script, "#!/bin/sh\nexit 7\n")?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o700))?;
    let status = Command::new(&script).status();
    fs::remove_file(&script)?;
    match status?.code() {
        Some(7) => Ok(()),
        other => Err(io::Error::other(format!("a script there ended with {other:?}"))),
    }
}

fn network(table: &Table, expected: &Expected) {
    let name = nix::unistd::gethostname().unwrap_or_default();
    let name = name.to_string_lossy().into_owned();
    table.must_work(
        "names resolve",
        &format!("the host's own name, {name}"),
        resolve(&name, 1).map(|_| "an address"),
    );
    let proxy = expected.proxy.as_deref().filter(|_| !expected.has_own_network);
    let url = reqwest::Url::parse(&expected.baseurl).ok();
    if let Some(host) = url
        .as_ref()
        .and_then(|url| url.host_str())
        .filter(|_| proxy.is_none())
    {
        let found = resolve(host, 1);
        table.must_work("names resolve", &format!("the server's name, {host}"), found);
    }
    let tried = format!("ask {}", expected.baseurl);
    match ask(&expected.baseurl, proxy) {
        Ok(status) => table.must_be("a job reaches the server", &tried, status, true),
        Err(error) => table.must_be("a job reaches the server", &tried, error, false),
    }
}

/// Any answer shows that the server is reached: who it is, the agent finds out with the certificates that it trusts.
fn ask(url: &str, proxy: Option<&str>) -> Result<String, String> {
    let text = |error: reqwest::Error| {
        let error = anyhow::Error::from(error);
        format!("{error:#}")
    };
    let mut client = reqwest::Client::builder()
        .no_proxy()
        .timeout(Duration::from_secs(20))
        .tls_danger_accept_invalid_certs(true);
    if let Some(proxy) = proxy {
        client = client.proxy(reqwest::Proxy::all(proxy).map_err(text)?);
    }
    let client = client.build().map_err(text)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("cannot start a runtime: {error}"))?;
    let answer = runtime
        .block_on(async { client.get(url).send().await })
        .map_err(text)?;
    Ok(format!("it answered with {}", answer.status()))
}

fn resolve(name: &str, port: u16) -> io::Result<Vec<std::net::SocketAddr>> {
    let found: Vec<_> = (name, port).to_socket_addrs()?.collect();
    if found.is_empty() {
        return Err(io::Error::other("the name has no address"));
    }
    Ok(found)
}

fn processes(table: &Table, expected: &Expected) {
    let guarantee = "limits.processes";
    let seen = getrlimit(Resource::RLIMIT_NPROC).map_or(u64::MAX, |(_, hard)| hard as u64);
    let is_within = seen <= expected.processes;
    table.must_be(
        guarantee,
        "the limit of processes and threads",
        seen.to_string(),
        is_within,
    );
    if expected.processes > MANY {
        return table.report(
            guarantee,
            "nothing",
            format!("more than {MANY} are not started"),
            Outcome::NotTried,
        );
    }
    let (end, wait) = std::sync::mpsc::channel::<()>();
    let wait = std::sync::Arc::new(std::sync::Mutex::new(wait));
    let mut threads = Vec::new();
    let refused = loop {
        let wait = wait.clone();
        let thread = std::thread::Builder::new().stack_size(64 << 10).spawn(move || {
            // Until the sender is dropped.
            let _ = wait.lock().map(|wait| wait.recv());
        });
        match thread {
            Ok(thread) => threads.push(thread),
            Err(error) => break Some(error),
        }
        if threads.len() as u64 > expected.processes {
            break None;
        }
    };
    drop(end);
    let count = threads.len();
    threads.into_iter().for_each(|thread| drop(thread.join()));
    let seen = match &refused {
        Some(error) => format!("{count} were started: {error}"),
        None => format!("{count} were started"),
    };
    table.must_be(
        guarantee,
        "threads, until one is refused",
        seen,
        refused.is_some(),
    );
}

/// Fill the quota, but for the last part without writing: a quota counts what is allocated (`fallocate(2)`).
fn disk(table: &Table, expected: &Expected) {
    let Some(limit) = expected.disk else { return };
    let guarantee = "limits.disk";
    let free = nix::sys::statvfs::statvfs("/work")
        .map_or(0, |fs| fs.blocks_available() as u64 * fs.fragment_size() as u64);
    if free < limit + (64 << 20) {
        let seen = format!("the file system has {free} bytes free, the limit is {limit}");
        return table.report(guarantee, "nothing", seen, Outcome::NotTried);
    }
    let Ok(first) = off_t::try_from(limit.saturating_sub(4 << 20)) else {
        let seen = format!(
            "the limit is {limit}, and a file has at most {} bytes here",
            off_t::MAX
        );
        return table.report(guarantee, "nothing", seen, Outcome::NotTried);
    };
    let path = Path::new("/work/.user-factory-selftest");
    let filled = || -> io::Result<()> {
        let mut file = fs::File::create_new(path)?;
        if first > 0 {
            match nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, first) {
                Ok(()) => io::Seek::seek(&mut file, io::SeekFrom::Start(first as u64)).map(drop)?,
                // What the probe itself takes is counted, too.
                Err(errno) => return Err(errno.into()),
            }
        }
        for _ in 0..256 {
            file.write_all(&[1; 64 << 10])?;
        }
        Ok(())
    };
    reached(table, guarantee, "fill a file until it is refused", filled());
    let _ = fs::remove_file(path);
}

fn inodes(table: &Table, expected: &Expected) {
    let Some(limit) = expected.inodes else { return };
    let guarantee = "limits.inodes";
    if limit > MANY_FILES {
        let seen = format!("the limit is {limit}: more than {MANY_FILES} files are not made");
        return table.report(guarantee, "nothing", seen, Outcome::NotTried);
    }
    let directory = Path::new("/work/.user-factory-selftest");
    let made = fs::create_dir(directory).and_then(|()| {
        (0..=limit).try_for_each(|n| fs::File::create_new(directory.join(n.to_string())).map(drop))
    });
    reached(table, guarantee, "make files until one is refused", made);
    let _ = fs::remove_dir_all(directory);
}

fn reached(table: &Table, guarantee: &str, tried: &str, result: io::Result<()>) {
    let is_quota = result
        .as_ref()
        .is_err_and(|error| error.raw_os_error() == Some(Errno::EDQUOT as i32));
    let seen = result.map_or_else(|error| error.to_string(), |()| "it worked".into());
    table.must_be(guarantee, tried, seen, is_quota);
}

/// Take so many bytes of memory, and touch each page: for two minutes, and then SIGALRM ends this process. A job that
/// stalls at its limit would never end: the supervisor fails the jobs of the factory alone.
pub fn take_memory(bytes: u64) {
    nix::unistd::alarm::set(120);
    let mut taken: Vec<Vec<u8>> = Vec::new();
    for _ in 0..bytes >> 20 {
        taken.push(vec![1; 1 << 20]);
    }
    println!("{} MiB are taken", std::hint::black_box(&taken).len());
}
