//! What a job's own work costs inside a worker, against the same as an ordinary user on the host.
//!
//! `cargo bench -p testbed --bench job`; needs root, and the host's tar, Rust toolchain, gcc and Python. Both sides work
//! on the same file system with warm caches, in turn, and each round begins with empty trees.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use protocol::Reply;
use testbed::bench::{Group, Measurement, Options, Report};
use testbed::harness::{TestHost, sealed_memfd, tool};
use testbed::test_helper::{TestHelper, create_worker, install, read};

/// Nobody's, outside every range in use.
const USER: u32 = 0x6fff_fff1;

/// A part: its name, what stands in the script, and the most that it may cost, in ratio to the host.
struct Part {
    name: &'static str,
    title: &'static str,
    script: String,
    rounds: usize,
    /// What is not asked for but explains the others has none.
    at_most: Option<f64>,
}

/// `$IN` has what was prepared, `$RUST` the toolchain, and the script begins in an empty directory of its own.
fn parts(options: &Options) -> Vec<Part> {
    let sqlite = format!(
        r#"python3 -Sc '
import sqlite3
db = sqlite3.connect("work.db")
db.execute("create table t (n integer primary key, text)")
db.execute("pragma synchronous = full")
for n in range({}):
    db.execute("insert into t values (?, ?)", (n, "x" * 200))
    db.commit()
'"#,
        options.size(500, 20)
    );
    let build = r#"export HOME="$PWD" CARGO_HOME="$PWD/.cargo" PATH="$RUST/bin:$PATH"
cp -r "$IN/package" . && cd package && cargo build --quiet --offline"#;
    let calls = options.size(2_000_000, 20_000);
    vec![
        Part {
            name: "unpack",
            title: "Unpack an archive of many small files",
            script: r#"tar -xf "$IN/files.tar""#.into(),
            rounds: options.size(10, 2),
            at_most: Some(1.03),
        },
        Part {
            name: "build",
            title: "Build a crate with cargo, without the network",
            script: build.into(),
            rounds: options.size(10, 1),
            at_most: Some(1.03),
        },
        Part {
            name: "sqlite",
            title: "Commit to SQLite, one row at a time",
            script: sqlite,
            rounds: options.size(10, 2),
            at_most: Some(0.99),
        },
        Part {
            name: "calls",
            title: "System calls and nothing else: read and write of one byte",
            script: format!("dd if=/dev/zero of=/dev/null bs=1 count={calls} status=none"),
            rounds: options.size(10, 2),
            at_most: None,
        },
        Part {
            name: "processes",
            title: "Processes: fork, exec, exit",
            script: format!("for n in $(seq {}); do /bin/true; done", options.size(2000, 20)),
            rounds: options.size(10, 2),
            at_most: None,
        },
    ]
}

/// Everything is timed by the script itself: only the work is measured.
fn timed(script: &str) -> String {
    format!("begin=$(date +%s%N)\n( {script}\n) && echo \"took $(($(date +%s%N) - begin))\"\n")
}

fn took(output: &str) -> Duration {
    let nanos = output.lines().find_map(|line| line.strip_prefix("took "));
    let nanos = nanos.unwrap_or_else(|| panic!("the work failed:\n{output}"));
    Duration::from_nanos(nanos.parse().expect("a number"))
}

fn sysroot() -> PathBuf {
    let output = Command::new("rustc")
        .args(["--print", "sysroot"])
        .output()
        .expect("rustc is there");
    String::from_utf8(output.stdout).expect("a path").trim().into()
}

/// What both sides work on, in a directory that everybody may read.
fn prepare(place: &Path, options: &Options) {
    let files = options.size(50_000, 500);
    let tree = place.join("tree");
    for n in 0..files {
        let dir = tree.join(format!("{:03}", n / 100));
        if n % 100 == 0 {
            fs::create_dir_all(&dir).expect("a directory");
        }
        fs::write(dir.join(n.to_string()), format!("file {n}\n").repeat(20)).expect("a file");
    }
    let packed = Command::new("tar")
        .arg("-cf")
        .arg(place.join("files.tar"))
        .arg("-C")
        .arg(&tree)
        .arg(".")
        .status();
    assert!(packed.expect("tar is there").success());
    fs::remove_dir_all(&tree).expect("it was made");
    // Enough code for some seconds, of nothing but the standard library.
    let package = place.join("package/src");
    fs::create_dir_all(&package).expect("a directory");
    fs::write(
        place.join("package/Cargo.toml"),
        "[package]\nname = \"work\"\nedition = \"2021\"\n",
    )
    .expect("a file");
    let mut main = String::from("fn main() {\n");
    for n in 0..options.size(60, 2) {
        main += &format!("    m{n}::go();\n");
        let functions: String = (0..20)
            .map(|f| {
                format!(
                    "pub fn f{f}(v: &[u64]) -> std::collections::BTreeMap<u64, Vec<String>> {{\n    let mut m = std::collections::BTreeMap::new();\n    for x in v {{ m.entry(x % {}).or_insert_with(Vec::new).push(format!(\"{{x:?}} {f}\")); }}\n    m\n}}\n",
                    f + 2
                )
            })
            .collect();
        let calls: String = (0..20)
            .map(|f| format!("    println!(\"{{:?}}\", f{f}(&[{n}, 2, 3]));\n"))
            .collect();
        fs::write(
            package.join(format!("m{n}.rs")),
            format!("{functions}pub fn go() {{\n{calls}}}\n"),
        )
        .expect("a file");
        main = format!("mod m{n};\n{main}");
    }
    fs::write(package.join("main.rs"), main + "}\n").expect("a file");
}

/// The work as an ordinary user of the host, in an empty directory on the workers' file system. The toolchain, where it
/// is in a user's home, is shown to it in a mount namespace.
fn on_host(host: &TestHost, place: &Path, script: &str) -> Duration {
    let (work, rust) = (host.root.join("ordinary"), host.root.join("rust"));
    fs::create_dir_all(&rust).expect("a directory");
    fs::create_dir(&work).expect("it was removed");
    chown(&work, Some(USER), Some(USER)).expect("root may");
    let mut command = Command::new(tool("unshare"));
    command.args(["--mount", "--propagation", "private", "bash", "-euc"]);
    command.arg(r#"mount --bind "$SYSROOT" "$RUST"; cd "$WORK"; exec setpriv --reuid "$0" --regid "$0" --clear-groups -- bash -c "$1""#);
    command.arg(USER.to_string()).arg(timed(script));
    command
        .env("SYSROOT", sysroot())
        .env("RUST", &rust)
        .env("IN", place)
        .env("WORK", &work);
    let output = command.output().expect("unshare is there");
    fs::remove_dir_all(&work).expect("it was made");
    took(&(String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr)))
}

/// The same in a worker of its own. Its end is waited for at its cgroup: asking the helper again and again takes
/// one of the processors that the job should have.
fn in_worker(test: &TestHelper, script: &str) -> Duration {
    let client = test.client();
    let worker = create_worker(&client, "a");
    let script = format!(
        "#!/bin/bash\nexport IN=/opt/in RUST=/opt/rust; cd /work; exec 2>&1\n{}",
        timed(script)
    );
    let (reply, console) = install(&client, worker, sealed_memfd(script.as_bytes()));
    assert_eq!(reply, Reply::AgentStarted);
    let events = test
        .host
        .cgroup_dir()
        .join(format!("workers/{worker}/cgroup.events"));
    let events = fs::File::open(&events).unwrap_or_else(|e| panic!("{}: {e}", events.display()));
    let mut text = [0; 256];
    loop {
        let length = events.read_at(&mut text, 0).expect("the cgroup is there");
        if String::from_utf8_lossy(&text[..length]).contains("populated 0") {
            break;
        }
        poll(
            &mut [PollFd::new(events.as_fd(), PollFlags::POLLPRI)],
            PollTimeout::NONE,
        )
        .expect("it can be waited for");
    }
    let output = read(&console.expect("a console comes with the reply"));
    test.delete(&[worker]);
    took(&output)
}

fn main() {
    let options = Options::from_args();
    let mut report = Report::new("job");
    let place = tempfile::Builder::new()
        .prefix("user-factory-bench-")
        .tempdir_in("/srv")
        .expect("a directory");
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).expect("it is ours");
    prepare(place.path(), &options);
    let slots = format!(
        "[slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\nread_only = {{ \"/opt/in\" = \"{}\", \"/opt/rust\" = \"{}\" }}\n",
        place.path().display(),
        sysroot().display()
    );
    let test = TestHelper::with(&slots);
    for part in parts(&options).iter().filter(|part| options.wants(part.name)) {
        let ways: Vec<Measurement<'_>> = vec![
            (
                "ordinary user of the host",
                Box::new(|| on_host(&test.host, place.path(), &part.script)),
            ),
            ("inside a worker", Box::new(|| in_worker(&test, &part.script))),
        ];
        let group = report.add(Group::measure(part.title, part.rounds, ways));
        let ratio = group.ratio("inside a worker", "ordinary user of the host");
        if let Some(at_most) = part.at_most {
            report.aim(part.name, ratio, at_most);
        }
    }
    report.end(&options);
    test.finish(&[]);
}
