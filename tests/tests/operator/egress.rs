//! Jobs that reach what `network.allow` of their slot names, and nobody else.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;

use testbed::fake_server::State;
use testbed::test_factory::lines;

use super::*;

/// A web server on 127.0.0.1 that answers every request with `hello from HOST`, as the request names it.
fn web_server() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            thread::spawn(move || {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    match stream.read(&mut byte) {
                        Ok(1) => head.push(byte[0]),
                        _ => return,
                    }
                }
                let head = String::from_utf8_lossy(&head).to_ascii_lowercase();
                let host = head
                    .lines()
                    .find_map(|line| line.strip_prefix("host: "))
                    .unwrap_or("nobody");
                let body = format!("hello from {host}\n");
                let _ = write!(
                    stream,
                    "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n{body}",
                    body.len()
                );
            });
        }
    });
    port
}

/// Functions of bash for jobs: `get HOST PORT` asks a server itself, `tunnel HOST PORT` and `url URL` the HTTP proxy. Each
/// prints the last line of the answer.
const FUNCTIONS: &str = r#"
ask() { exec {fd}<>"/dev/tcp/$1/$2" || return; printf "$3" >&$fd; tr -d '\r' <&$fd | tail -n 1; exec {fd}>&-; }
get() { (ask "$1" "$2" "GET / HTTP/1.0\r\nHost: $1\r\n\r\n") 2>/dev/null || echo "no way to $1"; }
proxy=${http_proxy#http://}
url() { ask "${proxy%:*}" "${proxy#*:}" "GET $1 HTTP/1.0\r\n\r\n"; }
tunnel() {
    exec {fd}<>"/dev/tcp/${proxy%:*}/${proxy#*:}"
    printf 'CONNECT %s:%s HTTP/1.1\r\n\r\n' "$1" "$2" >&$fd
    read -r _ status _ <&$fd
    while read -r line <&$fd && [ -n "${line%$'\r'}" ]; do :; done
    if [ "$status" != 200 ]; then read -r line <&$fd; echo "$line"; exec {fd}>&-; return; fi
    printf 'GET / HTTP/1.0\r\nHost: %s\r\n\r\n' "$1" >&$fd
    tr -d '\r' <&$fd | tail -n 1
    exec {fd}>&-
}
"#;

/// A factory whose slot has this network, and for which `*.test` is this host.
async fn factory(network: &str) -> TestFactory {
    let mut factory =
        TestFactory::new(&format!("[slots.a]\ntarget = \"TARGET\"\nnetwork = {network}\n")).await;
    let hosts = "127.0.0.1 web.test other.test evil.test\n";
    factory.restart_with_hosts(hosts);
    factory
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_reaches_by_name_what_its_slot_allows_and_nobody_else() {
    let port = web_server();
    let factory = factory(&format!(
        "{{ allow = [\"web.test:{port}\", \"127.0.0.1:{port}\"] }}"
    ))
    .await;
    let job = factory.submit(&format!(
        "{FUNCTIONS}get web.test {port}; get 127.0.0.1 {port}; get other.test {port}; get web.test 1\n\
         url http://web.test:{port}/; tunnel web.test {port}; tunnel other.test {port}\n\
         url http://evil.test:{port}/; url http://evil.test:{port}/\n\
         env | grep -i _proxy= | LC_ALL=C sort; tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '\n\
         {}",
        factory.until_release()
    ));
    let refused =
        |host: &str| format!("egress refused: {host}.test:{port} is not in the slot's network.allow");
    // The supervisor tells it, besides what the job prints.
    let told = |state: &State| {
        let events = state.jobs[&job]
            .events
            .iter()
            .filter(|event| event.stream == "console");
        let told: Vec<String> = events
            .map(|event| event.payload.clone())
            .filter(|line| line.starts_with("egress"))
            .collect();
        (told.len() >= 2).then_some(told)
    };
    assert_eq!(
        factory.wait_for_state(told).await,
        [refused("other"), refused("evil")]
    );
    let worker = factory.server.job(job).worker.unwrap().to_string();
    let (used, not_used) = (format!("web.test:{port}"), format!("evil.test:{port}"));
    let shown = done(&factory, &["show", &worker]);
    for part in [&used, "used", &not_used, "refused"] {
        assert!(shown.contains(part), "{shown}");
    }
    factory.release();
    factory.wait_completed(job).await;
    let ended = factory.server.job(job);
    let host = nix::unistd::gethostname().unwrap();
    let host = host.to_str().unwrap().to_ascii_lowercase();
    let own = format!("localhost,127.0.0.1,127.0.0.0/8,::1,{host},127.0.0.1");
    let proxy = "http://127.64.0.1:3128";
    let expected = [
        "hello from web.test",
        "hello from 127.0.0.1",
        "no way to other.test",
        "no way to web.test",
        &format!("hello from web.test:{port}"),
        "hello from web.test",
        &refused("other"),
        &refused("evil"),
        &refused("evil"),
        &format!("HTTPS_PROXY={proxy}"),
        &format!("HTTP_PROXY={proxy}"),
        &format!("NO_PROXY={own}"),
        &format!("http_proxy={proxy}"),
        &format!("https_proxy={proxy}"),
        &format!("no_proxy={own}"),
        "lo",
    ];
    assert_eq!(lines(&ended, "stdout"), expected, "{:#?}", ended.events);
    // What it needed can be pasted, also after it has gone.
    let list = done(&factory, &["egress", "a"]);
    let pasted: Vec<&str> = list.lines().filter(|line| !line.starts_with('#')).collect();
    assert_eq!(pasted[..2], ["[slots.a]", "network.allow = ["], "{list}");
    assert!(
        pasted[2].contains(&format!("\"127.0.0.1:{port}\", # 4 connections,")),
        "{list}"
    );
    assert!(pasted[3].contains(&format!("\"{used}\",")), "{list}");
    assert_eq!(pasted[4], "]", "{list}");
    assert!(
        list.contains(&format!("#    \"{not_used}\", # refused: 2 connections")),
        "{list}"
    );
    // What an operator runs in the slot reaches the same.
    see(&factory, |status| {
        (status["slots"][0]["state"] == "free").then_some(())
    })
    .await;
    let script = format!("{FUNCTIONS}get web.test {port}; tunnel web.test {port}; tunnel other.test {port}");
    let printed = done(&factory, &["run", "--slot", "a", "--", "bash", "-c", &script]);
    let printed: Vec<&str> = printed.lines().collect();
    assert_eq!(
        printed,
        ["hello from web.test", "hello from web.test", &refused("other")]
    );
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn audit_lets_a_job_go_through_its_proxy_and_says_what_it_needs() {
    let port = web_server();
    let factory = factory(&format!("{{ audit = true, allow = [\"127.0.0.1:{port}\"] }}")).await;
    let job = factory.submit(&format!(
        "{FUNCTIONS}url http://web.test:{port}/; tunnel other.test {port}; get web.test {port}"
    ));
    factory.wait_completed(job).await;
    let ended = factory.server.job(job);
    let web = format!("hello from web.test:{port}");
    assert_eq!(
        lines(&ended, "stdout"),
        [&*web, "hello from other.test", "no way to web.test"]
    );
    let list = done(&factory, &["egress", "a"]);
    for (name, connections) in [
        ("web.test", "1 connection,"),
        ("other.test", "1 connection,"),
        ("127.0.0.1", "2 connections,"),
    ] {
        let line = list
            .lines()
            .find(|line| line.contains(&format!("\"{name}:{port}\",")));
        assert!(line.is_some_and(|line| line.contains(connections)), "{list}");
    }
    // With that list, the same job needs no audit.
    let (_, allow) = list.split_once('\n').unwrap();
    factory.configure(&format!("[slots.a]\ntarget = \"TARGET\"\n{allow}"));
    done(&factory, &["reload"]);
    let job = factory.submit(&format!("{FUNCTIONS}get web.test {port}; get other.test {port}"));
    factory.wait_completed(job).await;
    let ended = factory.server.job(job);
    assert_eq!(
        lines(&ended, "stdout"),
        ["hello from web.test", "hello from other.test"]
    );
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_is_loaded_again_counts_for_jobs_that_run() {
    let port = web_server();
    let slot = |allow: &str| {
        format!("[slots.a]\ntarget = \"TARGET\"\nnetwork.allow = [\"127.0.0.1:{port}\"{allow}]\n")
    };
    let web = format!(", \"web.test:{port}\", \"z.test:1\"");
    let mut factory = TestFactory::new(&slot(&web)).await;
    factory.restart_with_hosts("127.0.0.1 web.test z.test\n");
    let job = factory.submit(&format!(
        "{FUNCTIONS}get web.test {port}; {}; get web.test {port}",
        factory.until_release()
    ));
    factory.wait_for_line(job, "hello from web.test").await;
    // A destination more, which comes before the others: connections still lead to what they name.
    factory.configure(&slot(&format!(", \"a.test:1\"{web}")));
    done(&factory, &["reload"]);
    factory.release();
    factory.wait_completed(job).await;
    let ended = factory.server.job(job);
    assert_eq!(lines(&ended, "stdout"), ["hello from web.test"; 2]);
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listed_address_is_the_jobs_own_at_each_of_its_ports() {
    let slot = |network: &str| format!("[slots.a]\ntarget = \"TARGET\"\nnetwork = {network}\n");
    let places = [
        "10.77.0.5/80",
        "10.77.0.5/81",
        "10.77.0.6/80",
        "2001:db8::7/80",
        "2001:db8::7/81",
    ];
    let list = r#"{ allow = ["10.77.0.5:80", "10.77.0.5:81", "10.77.0.6:80", "[2001:db8::7]:80", "[2001:db8::7]:81"] }"#;
    let factory = TestFactory::new(&slot(list)).await;
    let tries = places.map(|place| format!("(exec 3<>/dev/tcp/{place}) && echo {place};"));
    let job = factory.submit(&format!(
        "echo running; {}; {} (exec 3<>/dev/tcp/10.77.0.7/80) 2>/dev/null || echo no more",
        factory.until_release(),
        tries.join(" ")
    ));
    factory.wait_for_line(job, "running").await;
    // So that no packet for them leaves this host: the job's pid 1 listens still.
    factory.configure(&slot("\"none\""));
    done(&factory, &["reload"]);
    factory.release();
    factory.wait_completed(job).await;
    let printed = lines(&factory.server.job(job), "stdout");
    assert_eq!(printed, [&["running"], &places[..], &["no more"]].concat());
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn row_119_no_name_leads_to_an_address_of_the_host_itself() {
    // The second address of an interface, from which the kernel never connects, a network that is routed to the host itself, and
    // IPv6; then one that is elsewhere.
    let names = ["first", "second", "third", "fourth", "elsewhere"];
    let hosts = "11.0.0.1 first.test\n11.0.0.2 second.test\n11.0.0.77 third.test\n2a00::1 fourth.test\n12.0.0.1 elsewhere.test\n";
    let list = names.map(|name| format!("\"{name}.test:9\"")).join(", ");
    let factory = TestFactory::new(&format!(
        "[slots.a]\ntarget = \"TARGET\"\nnetwork.allow = [{list}]\n"
    ))
    .await;
    let file = factory.host.root.join("etc/hosts.test");
    std::fs::write(&file, hosts).unwrap();
    let plain = command(&factory, &["check", &checks::config_of(&factory), "--online"]);
    let mut inside = Command::new("unshare");
    inside.args(["--net", "--mount", "--propagation", "private", "sh", "-ec"]);
    inside.arg(
        "mount --bind \"$0\" /etc/hosts
         ip address add 11.0.0.1/24 dev lo
         ip address add 11.0.0.2/24 dev lo
         ip address add 2a00::1/128 dev lo
         ip link set lo up
         exec \"$@\"",
    );
    inside.arg(&file).arg(plain.get_program()).args(plain.get_args());
    let result: CommandOutput = tokio::task::block_in_place(|| inside.output().unwrap()).into();
    for name in &names[..4] {
        let refused = format!("{name}.test:9 is at an address that is not public");
        assert!(
            result.out.contains(&refused),
            "{name}: {}{}",
            result.out,
            result.err
        );
    }
    let failed = "cannot connect to elsewhere.test:9: Network is unreachable";
    assert!(result.out.contains(failed), "{}{}", result.out, result.err);
    factory.finish().await;
}
