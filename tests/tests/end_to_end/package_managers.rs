//! Package managers in jobs whose slot lists their mirror. They get what they ask for, through the job's HTTP proxy and
//! without it, and nothing from a server that is not in the list.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Once;

use testbed::certificates::{Certificates, VALID};
use testbed::fake_server::State;
use testbed::harness::{Running, install, is_booted_machine};

use super::*;

/// The package managers, and the Debian packages that have them. A job must find them, so it is of no use that root has them
/// elsewhere. No other test needs them.
const PROGRAMS: [(&str, &str); 3] = [
    ("/usr/bin/git", "git"),
    ("/usr/bin/npm", "npm"),
    ("/usr/bin/pip3", "python3-pip"),
];

/// A name that the list has, and with it the job's `/etc/hosts`.
const LISTED: &str = "mirror.test";
/// A name that the list has by its domain: only the HTTP proxy leads there.
const BELOW: &str = "any.mirror.test";
/// Another name of the same server, which the list has not.
const OTHER: &str = "other.test";

/// A web server: `DIRECTORY ADDRESS CERTIFICATE KEY`.
const SERVER: &str = r#"
import functools, http.server, ssl, sys
directory, address, certificate, key = sys.argv[1:]
class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
handler = functools.partial(Handler, directory=directory)
server = http.server.ThreadingHTTPServer((address, 443), handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(certificate, key)
server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
print("serving", file=sys.stderr, flush=True)
server.serve_forever()
"#;

/// In directories of their own: what works through the proxy, and what without it.
const JOB: &str = r#"
try() {
    if (mkdir "$1" && cd "$1" && fetch "$2") >"$1.log" 2>&1; then
        echo "$1: works"
    else
        echo "$1: fails"
        cat "$1.log" >&2
    fi
}
try proxied BELOW
try proxied-other OTHER
unset http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY
try direct LISTED
try direct-other OTHER
"#;

fn serve(directory: &Path, address: &str, certificates: &Certificates) -> Running {
    certificates.issue(&[LISTED, BELOW, OTHER], VALID);
    let mut command = Command::new("python3");
    command.args(["-c", SERVER]).arg(directory).arg(address);
    command.args([certificates.path("s.pem"), certificates.path("s.key")]);
    let server = Running::start(&mut command);
    server.log.wait(&["serving"]);
    server
}

/// Make the mirror's files with the script `make`, in which `$NAMES` are the names of the server. Then, in a job, `fetch NAME`
/// of the script `fetch` gets a package from the server of that name, whose authority is in `$CA`. The slot has these
/// `lines` more.
async fn works(make: &str, fetch: &str, lines_of_slot: &str) {
    static INSTALL: Once = Once::new();
    tokio::task::block_in_place(|| INSTALL.call_once(|| install(&PROGRAMS)));
    let mut factory = TestFactory::new(ONE).await;
    let mirror = tempfile::tempdir().unwrap();
    let mut made = Command::new("bash");
    made.args(["-euc", make]).current_dir(mirror.path());
    let made = made
        .env("NAMES", [LISTED, BELOW, OTHER].join(" "))
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let certificates = Certificates::new();
    let address = factory.host.loopback().to_string();
    let server = serve(mirror.path(), &address, &certificates);
    let authority = factory.shared().join("ca.pem");
    fs::copy(certificates.path("ca.pem"), &authority).unwrap();

    factory.configure(&format!(
        "[slots.a]\ntarget = \"TARGET\"\n{lines_of_slot}\
         network = {{ allow = [\"{LISTED}:443\", \"*.{LISTED}:443\", \"{address}:443\"] }}\n"
    ));
    let hosts = format!("{address} {LISTED} {BELOW} {OTHER}\n");
    factory.restart_with_hosts(&hosts);
    let script = JOB
        .replace("BELOW", BELOW)
        .replace("OTHER", OTHER)
        .replace("LISTED", LISTED);
    let job = factory.submit(&format!(
        "CA={}\n{fetch}\n{script}\n{}",
        authority.display(),
        factory.until_release()
    ));
    let all_tried = |state: &State| {
        let job = &state.jobs[&job];
        (lines(job, "stdout").len() == 4 || job.is_complete()).then(|| job.clone())
    };
    let tried = factory.wait_for_state(all_tried).await;
    assert_eq!(
        lines(&tried, "stdout"),
        [
            "proxied: works",
            "proxied-other: fails",
            "direct: works",
            "direct-other: fails"
        ],
        "{:#?}\n{}",
        tried.events,
        server.log.text()
    );
    let refusal = format!("egress refused: {OTHER}:443 is not in the slot's network.allow");
    let told = |state: &State| {
        let mut events = state.jobs[&job].events.iter();
        events.any(|event| event.payload == refusal).then_some(())
    };
    factory.wait_for_state(told).await;
    factory.release();
    factory.wait_completed(job).await;
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cargo_builds_with_a_crate_of_a_listed_registry() {
    if is_booted_machine() {
        // It has no Rust: these tests were built elsewhere.
        eprintln!("not run here: an emulated host has no cargo");
        return;
    }
    let sysroot = Command::new("rustc")
        .args(["--print", "sysroot"])
        .output()
        .unwrap();
    let sysroot = String::from_utf8(sysroot.stdout).unwrap();
    works(
        r#"
        mkdir -p one-1.0.0/src
        printf '[package]\nname = "one"\nversion = "1.0.0"\nedition = "2021"\n' >one-1.0.0/Cargo.toml
        echo 'pub const ONE: u32 = 1;' >one-1.0.0/src/lib.rs
        tar czf one.crate one-1.0.0
        sum=$(sha256sum <one.crate | cut -d' ' -f1)
        for name in $NAMES; do
            mkdir -p "$name/3/o" "$name/one/1.0.0"
            cp one.crate "$name/one/1.0.0/download"
            echo "{\"dl\":\"https://$name/$name\"}" >"$name/config.json"
            echo "{\"name\":\"one\",\"vers\":\"1.0.0\",\"deps\":[],\"cksum\":\"$sum\",\"features\":{},\"yanked\":false}" >"$name/3/o/one"
        done"#,
        r#"
        fetch() {
            export PATH=/opt/rust/bin:$PATH CARGO_HOME=$PWD/home CARGO_HTTP_CAINFO=$CA CARGO_NET_RETRY=0
            export CARGO_REGISTRIES_MIRROR_INDEX="sparse+https://$1/$1/"
            mkdir src && echo 'pub use one::ONE;' >src/lib.rs || return
            printf '[package]\nname = "two"\nversion = "1.0.0"\nedition = "2021"\n' >Cargo.toml
            printf '[dependencies]\none = { version = "1", registry = "mirror" }\n' >>Cargo.toml
            cargo build
        }"#,
        &format!("read_only = {{ \"/opt/rust\" = \"{}\" }}\n", sysroot.trim()),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pip_installs_a_wheel_of_a_listed_index() {
    works(
        r#"
        wheel=one-1.0.0-py3-none-any.whl info=one-1.0.0.dist-info
        mkdir -p simple/one "$info"
        echo 'number = 1' >one.py
        printf 'Metadata-Version: 2.1\nName: one\nVersion: 1.0.0\n' >"$info/METADATA"
        printf 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n' >"$info/WHEEL"
        printf '%s,,\n' one.py "$info/METADATA" "$info/WHEEL" "$info/RECORD" >"$info/RECORD"
        python3 -m zipfile -c "simple/one/$wheel" one.py "$info"
        echo "<a href=\"$wheel\">one</a>" >simple/one/index.html"#,
        r#"
        fetch() {
            export PIP_INDEX_URL="https://$1/simple" PIP_CERT=$CA PIP_RETRIES=0
            /usr/bin/python3 -m pip install --target lib one && PYTHONPATH=lib /usr/bin/python3 -c 'import one'
        }"#,
        "",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn npm_installs_a_package_of_a_listed_registry() {
    works(
        r#"
        mkdir package
        echo '{"name":"one","version":"1.0.0"}' >package/package.json
        echo 'module.exports = 1' >package/index.js
        tar czf one.tgz package
        sum=$(sha1sum <one.tgz | cut -d' ' -f1)
        for name in $NAMES; do
            mkdir "$name"
            dist="{\"tarball\":\"https://$name/one.tgz\",\"shasum\":\"$sum\"}"
            version="{\"name\":\"one\",\"version\":\"1.0.0\",\"dist\":$dist}"
            echo "{\"name\":\"one\",\"dist-tags\":{\"latest\":\"1.0.0\"},\"versions\":{\"1.0.0\":$version}}" >"$name/one"
        done"#,
        r#"
        fetch() {
            export npm_config_registry="https://$1/$1/" npm_config_cafile=$CA npm_config_fetch_retries=0
            # The packages are beside the registry: npm 12 refuses these unless it is told (its `allow-remote`).
            export npm_config_allow_remote=all
            npm install one && node -e 'require("one")'
        }"#,
        "",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn apt_get_downloads_a_package_of_a_listed_repository() {
    works(
        r#"
        mkdir -p deb/DEBIAN
        printf 'Package: one\nVersion: 1\nArchitecture: all\nMaintainer: n <n@example.com>\nDescription: one\n' >deb/DEBIAN/control
        echo text >deb/one
        dpkg-deb --root-owner-group --build deb one.deb
        {
            dpkg-deb --field one.deb
            echo "Filename: ./one.deb"
            echo "Size: $(stat -c %s one.deb)"
            echo "SHA256: $(sha256sum <one.deb | cut -d' ' -f1)"
        } >Packages"#,
        r#"
        fetch() {
            mkdir -p state/lists/partial cache/archives/partial parts && : >status || return
            echo "deb [trusted=yes] https://$1 ./" >sources.list
            echo "Dir::Etc \"$PWD\"; Dir::Etc::parts parts; Dir::Etc::sourceparts parts;
                Dir::State \"$PWD/state\"; Dir::State::status \"$PWD/status\"; Dir::Cache \"$PWD/cache\";
                Acquire::https::CaInfo \"$CA\"; Acquire::Retries 0;" >apt.conf
            export APT_CONFIG=$PWD/apt.conf
            apt-get update && apt-get download one && dpkg-deb --extract one_*.deb root && grep text root/one
        }"#,
        "",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn git_clones_from_a_listed_server() {
    works(
        r#"
        git init --quiet one
        cd one
        echo text >file
        git add file
        git -c user.name=n -c user.email=n@example.com commit --quiet --message one
        git update-server-info"#,
        r#"
        fetch() {
            GIT_SSL_CAINFO=$CA git clone "https://$1/one/.git" && grep text one/file
        }"#,
        "",
    )
    .await;
}
