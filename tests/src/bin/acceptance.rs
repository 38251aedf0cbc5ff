//! Do jobs of all kinds end as they should on this buildomat server, with a factory behind the target? It speaks the
//! user's side of the API alone, so it can be asked of any server: after an upgrade of the server, of the agent or of the
//! factory.
//!
//! A line is printed for each kind of job. Exit status: 0 where each was as expected, 1 where one was not, 2 where the server cannot
//! be asked.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use testbed::fake_server::fresh_id;
use testbed::fake_server::{AddFileResult, Id, JobEvent, JobOutput, JobSubmit, TaskSubmit};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

#[derive(Debug, Parser)]
#[command(name = "acceptance", about = "Runs jobs of all kinds on a buildomat server")]
struct Arguments {
    /// The address of the server, without a path of the API
    #[arg(long, value_name = "URL")]
    server: String,
    /// The token of a user who may submit jobs
    #[arg(long, value_name = "TOKEN")]
    user_token: String,
    /// The target, by name, behind which the factory is
    #[arg(long, value_name = "TARGET")]
    target: String,
    /// Seconds that one job may take, its time in the queue included
    #[arg(long, value_name = "N", default_value = "900")]
    timeout_seconds: u64,
    /// Only jobs with this text in their names
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Kinds of jobs that are tried at the same time; no more than the factory has slots
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u16).range(1..))]
    at_once: u16,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let server = match Server::new(&arguments) {
        Ok(server) => server,
        Err(error) => {
            eprintln!("acceptance: {error:#}");
            return ExitCode::from(2);
        }
    };
    let mut cases = cases();
    cases.retain(|case| case.name.contains(&arguments.only));
    let (cases, server) = (Arc::new(cases), Arc::new(server));
    let next = Arc::new(AtomicUsize::new(0));
    let (ended, mut results) = mpsc::unbounded_channel();
    let mut runners = JoinSet::new();
    for _ in 0..arguments.at_once {
        let (cases, server, next, ended) = (cases.clone(), server.clone(), next.clone(), ended.clone());
        runners.spawn(async move {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let Some(case) = cases.get(number) else {
                    return;
                };
                let started_at = Instant::now();
                let result = case.run(&server).await;
                // Nobody receives it where another runner has panicked.
                let _ = ended.send((number, started_at.elapsed().as_secs_f64(), result));
            }
        });
    }
    drop(ended);
    let mut failed = 0;
    let mut tried = 0;
    // They are printed in the order of the cases.
    let mut early = BTreeMap::new();
    while let Some((number, seconds, result)) = results.recv().await {
        early.insert(number, (seconds, result));
        while let Some((seconds, result)) = early.remove(&tried) {
            let name = cases[tried].name;
            tried += 1;
            match result {
                Ok(()) => println!("ok      {seconds:6.1} s  {name}"),
                Err(error) => {
                    failed += 1;
                    println!("FAILED  {seconds:6.1} s  {name}: {error:#}");
                }
            }
        }
    }
    runners.join_all().await;
    println!("{tried} kinds of jobs, {failed} not as expected");
    match (tried, failed) {
        (0, _) => ExitCode::from(2),
        (_, 0) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

/// Something that must be so of one job, or of several.
struct Case {
    name: &'static str,
    check: Check,
}

enum Check {
    /// One job, and what must be seen of it.
    Job(Box<Expected>),
    /// It runs until it is cancelled.
    Cancel,
    /// A user and the job read each other's values, and nobody a secret.
    Store,
    /// A second job finds nothing of a first.
    PrivateDirs,
    /// A daemon that a first job has left does not reach a second.
    Daemon,
    /// So many at once.
    Many(usize),
}

/// A job, and what must be seen of it.
#[derive(Default)]
struct Expected {
    tasks: Vec<TaskSubmit>,
    inputs: Vec<(&'static str, Vec<u8>)>,
    output_rules: Vec<&'static str>,
    fails: bool,
    /// All that was printed to standard output.
    stdout: Option<Vec<String>>,
    /// Texts in some event, of whatever stream.
    event_texts: Vec<&'static str>,
    /// All outputs, by path.
    outputs: Option<BTreeMap<&'static str, Vec<u8>>>,
}

fn task(script: &str) -> TaskSubmit {
    TaskSubmit {
        name: "task".into(),
        script: script.into(),
        env_clear: false,
        env: BTreeMap::new(),
        uid: None,
        gid: None,
        // What the server's own command says; the server itself begins in /.
        workdir: Some("/work".into()),
    }
}

fn script(script: &str) -> Expected {
    Expected {
        tasks: vec![task(script)],
        ..Expected::default()
    }
}

fn prints(text: &str, lines: &[&str]) -> Expected {
    Expected {
        stdout: Some(lines.iter().map(ToString::to_string).collect()),
        ..script(text)
    }
}

fn fails(text: &str, line: &'static str) -> Expected {
    Expected {
        fails: true,
        event_texts: vec![line],
        ..script(text)
    }
}

/// Bytes of all values, in an order that no program would print by itself.
fn bytes(length: u32) -> Vec<u8> {
    (0..length)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

fn cases() -> Vec<Case> {
    let job = |name, expected| Case {
        name,
        check: Check::Job(Box::new(expected)),
    };
    let other = |name, check| Case { name, check };
    let mut with_variable = task("echo $COLOUR");
    with_variable.env.insert("COLOUR".into(), "deep red".into());
    let mut cleared = task("echo ${HOME:-none} ${COLOUR:-none}");
    (cleared.env_clear, cleared.env) = (true, with_variable.env.clone());
    let mut elsewhere = task("pwd");
    elsewhere.workdir = Some("/tmp".into());
    let (input, other_input) = (bytes(3 << 20), bytes(1000));
    vec![
        job("a job that passes", script("true")),
        job("a job that fails", fails("exit 3", "exit code 3")),
        job("a job that a signal ends", fails("kill -KILL $$", "signal 9")),
        job(
            "several tasks, in order",
            Expected {
                tasks: ["echo one", "echo two", "echo three"].map(task).into(),
                ..prints("", &["one", "two", "three"])
            },
        ),
        job(
            "a task that fails is the last",
            Expected {
                tasks: ["echo one", "false", "echo never"].map(task).into(),
                fails: true,
                ..prints("", &["one"])
            },
        ),
        job(
            "standard output in order",
            prints(
                "seq 1 50",
                &(1..=50)
                    .map(|n| n.to_string())
                    .collect::<Vec<_>>()
                    .iter()
                    .map(String::as_str)
                    .collect::<Vec<_>>(),
            ),
        ),
        job(
            "standard error",
            Expected {
                event_texts: vec!["to standard error"],
                ..script("echo to standard error >&2")
            },
        ),
        job("a last line without an end", prints("printf last", &["last"])),
        job("letters beyond ASCII", prints("echo grüße", &["grüße"])),
        job(
            "a task's variables",
            Expected {
                tasks: vec![with_variable],
                ..prints("", &["deep red"])
            },
        ),
        job(
            "a task without the usual variables",
            Expected {
                tasks: vec![cleared],
                ..prints("", &["none deep red"])
            },
        ),
        job(
            "a task's directory",
            Expected {
                tasks: vec![elsewhere],
                ..prints("", &["/tmp"])
            },
        ),
        job(
            "a user without privileges",
            script("test $(id -u) != 0 && test $(whoami) = $USER && test -w $HOME"),
        ),
        job(
            "programs run in /work",
            script("printf '#!/bin/sh\\nexit 0\\n' > p && chmod +x p && ./p"),
        ),
        job(
            "an input and an output, byte for byte",
            Expected {
                inputs: vec![("in", input.clone()), ("other", other_input.clone())],
                output_rules: vec!["/work/*"],
                outputs: Some(BTreeMap::from([
                    ("/work/out", input),
                    ("/work/other", other_input),
                ])),
                ..script("cp /input/in /work/out && cp /input/other /work/other")
            },
        ),
        job(
            "an output of no bytes",
            Expected {
                output_rules: vec!["/work/empty"],
                outputs: Some(BTreeMap::from([("/work/empty", Vec::new())])),
                ..script("touch /work/empty")
            },
        ),
        job(
            "outputs that a rule leaves out",
            Expected {
                output_rules: vec!["/work/*.txt", "!/work/b.txt"],
                outputs: Some(BTreeMap::from([("/work/a.txt", b"a\n".to_vec())])),
                ..script("echo a > a.txt; echo b > b.txt; echo c > c")
            },
        ),
        job(
            "outputs of a job that fails",
            Expected {
                output_rules: vec!["/work/log"],
                outputs: Some(BTreeMap::from([("/work/log", b"why\n".to_vec())])),
                ..fails("echo why > log; exit 1", "exit code 1")
            },
        ),
        job(
            "a required output that is missing",
            Expected {
                output_rules: vec!["=/work/missing"],
                fails: true,
                ..script("true")
            },
        ),
        job("a flood of lines", script("seq 1 20000")),
        job(
            "a line of 100,000 characters",
            script("head -c 100000 /dev/zero | tr '\\0' x; echo"),
        ),
        job(
            "output that is no text",
            script("head -c 10000 /dev/urandom; echo"),
        ),
        job(
            "a deep directory is left",
            script("mkdir -p $(seq -s / 1 300) && touch $(seq -s / 1 300)/file"),
        ),
        job(
            "files without permissions are left",
            script("mkdir -p d/e && touch d/e/f && chmod 0 d/e/f d/e d"),
        ),
        other("a job that is cancelled", Check::Cancel),
        other("values of the store", Check::Store),
        other("a job finds nothing of another", Check::PrivateDirs),
        other("a daemon does not reach the next job", Check::Daemon),
        other("twenty small ones", Check::Many(20)),
    ]
}

impl Case {
    async fn run(&self, server: &Server) -> Result<()> {
        match &self.check {
            Check::Job(expected) => server.check(self.name, expected).await,
            Check::Cancel => {
                let job = server
                    .submit(self.name, &script("echo begun; sleep 3600"))
                    .await?;
                server.wait_for_line(&job, "begun").await?;
                let _: Option<Value> = server.post(&format!("/0/jobs/{job}/cancel"), &json!({})).await?;
                let ended = server.wait_for_end(&job).await?;
                ensure!(ended["cancelled"] == true, "job {job} is not shown as cancelled");
                Ok(())
            }
            Check::Store => store(server, self.name).await,
            Check::PrivateDirs => {
                let places = "/work /tmp /var/tmp /dev/shm $HOME";
                let first =
                    format!("set -e; for place in {places}; do echo left > $place/left-by-a-job; done");
                server.check(self.name, &script(&first)).await?;
                let second =
                    format!("for place in {places}; do ! test -e $place/left-by-a-job || exit 1; done");
                server.check(self.name, &script(&second)).await
            }
            Check::Daemon => {
                let daemon = "nohup setsid sleep 3600 </dev/null >/dev/null 2>&1 & echo $!";
                server.check(self.name, &script(daemon)).await?;
                server.check(self.name, &script("! pgrep -x sleep")).await
            }
            Check::Many(count) => {
                let mut jobs = Vec::new();
                for n in 0..*count {
                    jobs.push((n, server.submit(self.name, &script(&format!("echo {n}"))).await?));
                }
                for (n, job) in jobs {
                    let ended = server.wait_for_end(&job).await?;
                    ensure!(ended["state"] == "completed", "job {job} is {}", ended["state"]);
                    let stdout = stdout(&server.events(&job).await?);
                    ensure!(stdout == [n.to_string()], "job {job} printed {stdout:?}");
                }
                Ok(())
            }
        }
    }
}

async fn store(server: &Server, name: &str) -> Result<()> {
    let text = "until bmat store get word 2>/dev/null; do sleep 1; done
bmat store put answer \"$(bmat store get word) back\"
bmat store put --secret hidden secret-value";
    let job = server.submit(name, &script(text)).await?;
    let word = json!({ "value": "a word", "secret": false });
    server.put(&format!("/0/jobs/{job}/store/word"), &word).await?;
    let ended = server.wait_for_end(&job).await?;
    ensure!(ended["state"] == "completed", "job {job} is {}", ended["state"]);
    let store: Value = server.get(&format!("/0/jobs/{job}/store")).await?;
    ensure!(store["answer"]["value"] == "a word back", "the store has {store}");
    ensure!(store["hidden"]["value"].is_null(), "the store shows a secret");
    Ok(())
}

fn stdout(events: &[JobEvent]) -> Vec<String> {
    let lines = events.iter().filter(|event| event.stream == "stdout");
    lines.map(|event| event.payload.clone()).collect()
}

/// The user's side of a buildomat server.
struct Server {
    client: reqwest::Client,
    url: String,
    token: String,
    target: String,
    timeout: Duration,
}

/// Between two requests.
const PAUSE: Duration = Duration::from_millis(500);
/// The server takes no larger part of a file.
const CHUNK: usize = 4 << 20;

impl Server {
    fn new(arguments: &Arguments) -> Result<Server> {
        let url = reqwest::Url::parse(&arguments.server).context("--server is no URL")?;
        Ok(Server {
            client: reqwest::Client::builder()
                .timeout(Duration::from_secs(60))
                .build()?,
            url: url.as_str().trim_end_matches('/').to_owned(),
            token: arguments.user_token.clone(),
            target: arguments.target.clone(),
            timeout: Duration::from_secs(arguments.timeout_seconds),
        })
    }

    /// The answer's bytes.
    async fn send(&self, request: reqwest::RequestBuilder) -> Result<Vec<u8>> {
        let answer = request.bearer_auth(&self.token).send().await?;
        let (status, url) = (answer.status(), answer.url().path().to_owned());
        let body = answer.bytes().await?;
        ensure!(
            status.is_success(),
            "{url}: {status}: {}",
            String::from_utf8_lossy(&body).trim()
        );
        Ok(body.to_vec())
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let body = self.send(self.client.get(format!("{}{path}", self.url))).await?;
        serde_json::from_slice(&body).with_context(|| format!("the answer to {path} is not understood"))
    }

    /// None where the answer has no body.
    async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl serde::Serialize) -> Result<Option<T>> {
        let request = self.client.post(format!("{}{path}", self.url)).json(body);
        let body = self.send(request).await?;
        if body.is_empty() {
            return Ok(None);
        }
        let answer = serde_json::from_slice(&body);
        answer.with_context(|| format!("the answer to {path} is not understood"))
    }

    async fn put(&self, path: &str, body: &Value) -> Result<()> {
        self.send(self.client.put(format!("{}{path}", self.url)).json(body))
            .await?;
        Ok(())
    }

    /// The new job's id. Its inputs are uploaded.
    async fn submit(&self, name: &str, expected: &Expected) -> Result<String> {
        let body = JobSubmit {
            name: format!("acceptance: {name}"),
            target: self.target.clone(),
            output_rules: expected.output_rules.iter().map(ToString::to_string).collect(),
            tasks: expected.tasks.clone(),
            inputs: expected
                .inputs
                .iter()
                .map(|(name, _)| (*name).to_owned())
                .collect(),
            tags: BTreeMap::new(),
            depends: BTreeMap::new(),
        };
        let Id { id } = self.post("/0/jobs", &body).await?.context("a job got no id")?;
        for (name, bytes) in &expected.inputs {
            self.upload(&id, name, bytes).await?;
        }
        Ok(id)
    }

    async fn upload(&self, job: &str, name: &str, bytes: &[u8]) -> Result<()> {
        let mut chunks = Vec::new();
        for part in bytes.chunks(CHUNK) {
            let path = format!("{}/0/jobs/{job}/chunk", self.url);
            let answer = self.send(self.client.post(path).body(part.to_vec())).await?;
            let Id { id } = serde_json::from_slice(&answer).context("a chunk got no id")?;
            chunks.push(id);
        }
        let add = json!({
            "name": name, "size": bytes.len(), "chunks": chunks, "commit_id": fresh_id().to_string(),
        });
        let end = Instant::now() + self.timeout;
        loop {
            let path = format!("/1/jobs/{job}/input");
            let added: AddFileResult = self.post(&path, &add).await?.context("an input has no answer")?;
            match added {
                AddFileResult {
                    complete: true,
                    error: None,
                } => return Ok(()),
                AddFileResult {
                    error: Some(error), ..
                } => bail!("input {name}: {error}"),
                _ => ensure!(Instant::now() < end, "input {name} is not taken in time"),
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// The job, once it has ended.
    async fn wait_for_end(&self, job: &str) -> Result<Value> {
        let end = Instant::now() + self.timeout;
        loop {
            let shown: Value = self.get(&format!("/0/job/{job}")).await?;
            if shown["state"] == "completed" || shown["state"] == "failed" {
                return Ok(shown);
            }
            ensure!(Instant::now() < end, "job {job} is still {}", shown["state"]);
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Wait until the job has printed this line.
    async fn wait_for_line(&self, job: &str, line: &str) -> Result<()> {
        let end = Instant::now() + self.timeout;
        while !stdout(&self.events(job).await?).iter().any(|other| other == line) {
            ensure!(Instant::now() < end, "job {job} has not printed {line:?}");
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }

    /// All events of the job, which the server answers in parts.
    async fn events(&self, job: &str) -> Result<Vec<JobEvent>> {
        let mut all: Vec<JobEvent> = Vec::new();
        loop {
            let next = all.last().map_or(0, |event| event.seq + 1);
            let path = format!("/0/jobs/{job}/events?minseq={next}");
            let some: Vec<JobEvent> = self.get(&path).await?;
            if some.is_empty() {
                return Ok(all);
            }
            all.extend(some);
        }
    }

    /// Run a job, and compare.
    async fn check(&self, name: &str, expected: &Expected) -> Result<()> {
        let job = self.submit(name, expected).await?;
        let ended = self.wait_for_end(&job).await?;
        let state = if expected.fails { "failed" } else { "completed" };
        let events = self.events(&job).await?;
        let last = events.last().map_or("", |event| &event.payload);
        ensure!(
            ended["state"] == state,
            "job {job} is {}, and not {state}; its last event is {last:?}",
            ended["state"]
        );
        if let Some(lines) = &expected.stdout {
            let printed = stdout(&events);
            ensure!(
                printed == *lines,
                "job {job} printed {printed:?}, and not {lines:?}"
            );
        }
        for text in &expected.event_texts {
            let is_printed = events.iter().any(|event| event.payload.contains(text));
            ensure!(is_printed, "no event of job {job} has {text:?}");
        }
        if let Some(files) = &expected.outputs {
            let outputs: Vec<JobOutput> = self.get(&format!("/0/jobs/{job}/outputs")).await?;
            let mut paths: Vec<&str> = outputs.iter().map(|output| &*output.path).collect();
            paths.sort_unstable();
            let wanted: Vec<&str> = files.keys().copied().collect();
            ensure!(
                paths == wanted,
                "job {job} has the outputs {paths:?}, and not {wanted:?}"
            );
            for output in &outputs {
                let path = format!("{}/0/jobs/{job}/outputs/{}", self.url, output.id);
                let bytes = self.send(self.client.get(path)).await?;
                ensure!(
                    bytes == files[&*output.path],
                    "{} of job {job} has other bytes",
                    output.path
                );
            }
        }
        Ok(())
    }
}
