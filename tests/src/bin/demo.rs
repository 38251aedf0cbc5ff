//! The main job, end to end: a real job in an ephemeral user of this host, on an embedded fake
//! server. Needs root, Rust and gcc. `demo [SCRIPT]`; its exit status is the job's, and 2 where the demo itself fails. A
//! script may make user namespaces, and use /dev/fuse and /dev/net/tun.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use protocol::config::UidRange;
use testbed::fake_server::{JobSpec, Server, ServerOptions};
use testbed::harness::{self, SUPERVISOR_UID, TestHost};
use testbed::host_snapshot::HostSnapshot;

const MANIFEST: &str = "[package]\nname = \"greeting\"\nversion = \"1.0.0\"\nedition = \"2024\"\n";
const PROGRAM: &str = r#"fn greeting(name: &str) -> String {
    format!("Hello, {name}!")
}

fn main() {
    println!("{}", greeting(&std::env::var("USER").unwrap_or_default()));
}

#[test]
fn it_greets_by_name() {
    assert_eq!(greeting("buildomat"), "Hello, buildomat!");
}
"#;

/// The default job: unpack the input, build it with the host's toolchain, test it, hand in the binary.
const JOB: &str = "set -eu
tar xf /input/greeting.tar
cd greeting
cargo --version
cargo test --offline
cargo build --offline --release
./target/release/greeting
cp target/release/greeting /work/greeting.bin
";

/// Longer than any sane default job; a script of the user's own may take its time.
const JOB_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

#[tokio::main]
async fn main() -> ExitCode {
    let work = async {
        tokio::select! {
            result = demo() => result,
            _ = tokio::signal::ctrl_c() => bail!("interrupted: cleaning up"),
        }
    };
    match work.await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::from(2)
        }
    }
}

async fn demo() -> Result<bool> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "this needs root: it makes a user, namespaces and a cgroup (try sudo)"
    );
    let script = std::env::args_os().nth(1).map(PathBuf::from);
    println!("building the factory …");
    let binaries = tokio::task::spawn_blocking(harness::binaries).await?;

    let server = Server::start(ServerOptions {
        agent: Some(binaries.join("fake-agent")),
        ..ServerOptions::default()
    })
    .await?;
    let target = server.add_target("demo");
    let (_, token) = server.add_factory("demo");
    let mut host = TestHost::new();
    // Of the default range, which archives of every format can hold.
    let first = UidRange::default().first.get();
    host.uids = first..=first + 63;
    let mut slot = format!("[slots.demo]\ntarget = \"{target}\"\n");
    match toolchain() {
        Ok(toolchain) => {
            slot += &format!(
                "read_only = {{ \"/opt/demo-rust\" = \"{}\" }}\n\
             env.PATH = \"/opt/demo-rust/bin:/usr/local/bin:/usr/bin:/bin\"\n",
                toolchain.display()
            )
        }
        // The default job is made of Rust; a script of the user's own may need none.
        Err(error) if script.is_none() => return Err(error),
        Err(error) => println!("the job has no Rust toolchain: {error:#}"),
    }
    if script.is_some() {
        // What containers need.
        slot += "allow_user_namespaces = true\ndevices = [\"/dev/fuse\", \"/dev/net/tun\"]\n";
    }
    host.configure(&server.url(), SUPERVISOR_UID, &slot);
    host.write_token(&token);
    let before = HostSnapshot::take(&host);
    let helper = host.start_helper();
    let supervisor = host.start_supervisor();
    println!(
        "helper: root, pid {}; supervisor: uid {SUPERVISOR_UID}, pid {}; server: {}",
        helper.pid(),
        supervisor.pid(),
        server.url()
    );

    let job = server
        .submit_job(job(&script)?)
        .map_err(|error| anyhow::anyhow!("{error}"))?;
    let passed = watch(&server, job, script.is_none())
        .await
        .inspect_err(|_| eprintln!("{}", supervisor.log.text()))?;
    prove(&before, &host);
    println!("\nthe job {}", if passed { "passed" } else { "failed" });
    Ok(passed)
}

/// The host's Rust toolchain, to be shown to the job.
fn toolchain() -> Result<PathBuf> {
    let output = Command::new("rustc")
        .args(["--print", "sysroot"])
        .output()
        .context("cannot ask rustc for its sysroot")?;
    Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim()).canonicalize()?)
}

fn job(script: &Option<PathBuf>) -> Result<JobSpec> {
    if let Some(path) = script {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        return Ok(JobSpec {
            name: path.display().to_string(),
            ..JobSpec::script("demo", &text)
        });
    }
    let mut spec = JobSpec {
        name: "build, test, upload".into(),
        ..JobSpec::script("demo", JOB)
    };
    spec.inputs = vec![("greeting.tar".into(), archive()?.into())];
    spec.output_rules = vec!["=/work/greeting.bin".into()];
    Ok(spec)
}

/// The source archive, made by the host's tar.
fn archive() -> Result<Vec<u8>> {
    let directory = tempfile::tempdir()?;
    let package = directory.path().join("greeting");
    std::fs::create_dir_all(package.join("src"))?;
    std::fs::write(package.join("Cargo.toml"), MANIFEST)?;
    std::fs::write(package.join("src/main.rs"), PROGRAM)?;
    let tar = Command::new("tar")
        .arg("-C")
        .arg(directory.path())
        .args(["-cf", "-", "greeting"])
        .output()?;
    ensure!(
        tar.status.success(),
        "tar failed: {}",
        String::from_utf8_lossy(&tar.stderr)
    );
    Ok(tar.stdout)
}

/// Print what happens, as it happens, until the worker is gone.
async fn watch(server: &Server, job: testbed::fake_server::Ulid, has_output: bool) -> Result<bool> {
    let begin = Instant::now();
    let (mut phases, mut printed) = (0, 0);
    loop {
        let (names, events) = server
            .wait_for(JOB_TIMEOUT, |state| {
                let job = &state.jobs[&job];
                let worker = state
                    .workers
                    .values()
                    .find(|worker| job.worker == Some(worker.id));
                let reached = [
                    ("leased; a worker is made for it", worker.is_some()),
                    (
                        "the slot is known to the server",
                        worker.is_some_and(|w| w.private.is_some()),
                    ),
                    ("the agent is online", worker.is_some_and(|w| w.is_online())),
                    ("the job has ended", job.is_complete()),
                    (
                        "the worker is to be recycled",
                        worker.is_some_and(|w| w.is_finished()),
                    ),
                    (
                        "the host is clean, the worker is destroyed",
                        worker.is_some_and(|w| w.deleted),
                    ),
                ];
                let names: Vec<&str> = reached
                    .iter()
                    .take_while(|(_, yes)| *yes)
                    .map(|(name, _)| *name)
                    .collect();
                (names.len() > phases || job.events.len() > printed)
                    .then(|| (names, job.events[printed..].to_vec()))
            })
            .await?;
        printed += events.len();
        for event in events {
            println!("  {:>9} | {}", event.stream, event.payload);
        }
        for name in &names[phases..] {
            println!("[{:7.3} s] {name}", begin.elapsed().as_secs_f64());
        }
        phases = names.len();
        if phases == 6 {
            break;
        }
    }
    for output in server.outputs(job) {
        println!("upload: {} ({} bytes)", output.path, output.size);
    }
    ensure!(
        !has_output || server.job(job).state() != "completed" || !server.outputs(job).is_empty(),
        "nothing was uploaded"
    );
    Ok(server.job(job).state() == "completed")
}

/// Compare the host with what it was, and say so.
fn prove(before: &HostSnapshot, host: &TestHost) {
    before.assert_unchanged(host);
    let count = |dir: &Path| {
        std::fs::read_dir(dir).map_or(0, |entries| {
            entries.flatten().filter(|e| e.path().is_dir()).count()
        })
    };
    println!("\nleft on the host:");
    println!(
        "  processes of uids {}-{}: {}",
        host.uids.start(),
        host.uids.end(),
        testbed::host_snapshot::processes_of(&host.uids).len()
    );
    println!(
        "  user records in {}: {}",
        host.userdb().display(),
        count(&host.userdb())
    );
    println!(
        "  worker directories: {}",
        count(&host.root.join(protocol::config::STATE_DIR).join("workers"))
    );
    println!("  worker cgroups: {}", count(&host.cgroup_dir().join("workers")));
    println!("  mounts, IPC objects, files, passwd and group: as before");
}
