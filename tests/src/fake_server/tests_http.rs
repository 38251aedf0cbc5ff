//! The fake server's rules over HTTP: a whole job, the form of refusals, and how it goes down.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::*;

struct Caller {
    http: reqwest::Client,
    base: String,
    token: String,
}

impl Caller {
    fn new(server: &Server, token: &str) -> Caller {
        Caller {
            http: reqwest::Client::new(),
            base: server.url(),
            token: token.to_string(),
        }
    }

    async fn send(&self, method: Method, path: &str, body: Value) -> (StatusCode, Value) {
        let request = self
            .http
            .request(method, format!("{}{path}", self.base))
            .bearer_auth(&self.token);
        let reply = request.json(&body).send().await.unwrap();
        let status = reply.status();
        let text = reply.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    async fn post(&self, path: &str, body: Value) -> (StatusCode, Value) {
        self.send(Method::POST, path, body).await
    }

    async fn get(&self, path: &str) -> (StatusCode, Value) {
        self.send(Method::GET, path, Value::Null).await
    }
}

async fn server() -> (Server, Caller, Ulid) {
    let server = Server::start(ServerOptions::default()).await.unwrap();
    let (target, (_, token)) = (server.add_target("lab"), server.add_factory("f"));
    let factory = Caller::new(&server, &token);
    (server, factory, target)
}

#[tokio::test]
async fn a_job_runs_from_lease_to_output_over_http() {
    let (server, factory, target) = server().await;
    let spec = JobSpec {
        inputs: vec![("in".to_string(), "abc".into())],
        ..JobSpec::script("lab", "true")
    };
    let job = server.submit_job(spec).unwrap();

    let (_, lease) = factory
        .post("/0/factory/lease", json!({ "supported_targets": [target] }))
        .await;
    assert_eq!(lease, json!({ "lease": { "job": job, "target": target } }));
    let (status, made) = factory
        .post("/0/factory/worker", json!({ "target": target }))
        .await;
    assert_eq!(status, StatusCode::CREATED);
    let path = format!("/0/factory/worker/{}", made["id"].as_str().unwrap());
    let (status, _) = factory
        .send(Method::PATCH, &path, json!({ "private": "slot" }))
        .await;
    assert_eq!(status, StatusCode::NO_CONTENT);

    let agent = Caller::new(&server, &secret());
    let strap = json!({ "bootstrap": made["bootstrap"], "token": agent.token });
    assert_eq!(
        agent.post("/0/worker/bootstrap", strap).await.0,
        StatusCode::CREATED
    );
    let assigned = |s: &State| s.jobs[&job].worker;
    server.wait_for(Duration::from_secs(30), assigned).await.unwrap();
    let (_, ping) = agent.get("/0/worker/ping").await;
    let input = ping["job"]["inputs"][0]["id"].as_str().unwrap();
    let of_job = format!("/0/worker/job/{job}");
    assert_eq!(
        agent.get(&format!("{of_job}/inputs/{input}")).await.1,
        json!("abc")
    );

    let line = json!([{ "stream": "stdout", "time": "2024-01-01T00:00:00Z", "payload": "hi", "task": 0 }]);
    assert_eq!(
        agent.post(&format!("/1/worker/job/{job}/append"), line).await.0,
        StatusCode::NO_CONTENT
    );
    let value = json!({ "value": "v", "secret": false });
    let stored = agent
        .send(Method::PUT, &format!("{of_job}/store/k"), value.clone())
        .await;
    assert_eq!(stored.0, StatusCode::NO_CONTENT);
    assert_eq!(agent.get(&format!("{of_job}/store/k")).await.1["value"], value);

    let (_, chunk) = agent.post(&format!("{of_job}/chunk"), json!(7)).await;
    let commit = fresh_id();
    let add = json!({ "path": "/work/out", "size": 1, "chunks": [chunk["id"]], "commit_id": commit });
    let output = format!("/1/worker/job/{job}/output");
    assert_eq!(agent.post(&output, add.clone()).await.1["complete"], false);
    assert_eq!(
        agent.post(&output, add).await.1,
        json!({ "complete": true, "error": null })
    );

    let done = json!({ "failed": false });
    let task = agent
        .post(&format!("{of_job}/task/0/complete"), done.clone())
        .await;
    assert_eq!(task.0, StatusCode::NO_CONTENT);
    assert_eq!(
        agent.post(&format!("{of_job}/complete"), done).await.0,
        StatusCode::NO_CONTENT
    );
    assert_eq!(
        server
            .wait_job(job, Duration::from_secs(30))
            .await
            .unwrap()
            .progress,
        Progress::Completed
    );
    assert_eq!(server.output(job, "/work/out").unwrap(), "7");
    assert!(
        server
            .events(job)
            .iter()
            .any(|e| e.payload == "hi" && e.task == Some(0))
    );

    let recycled = |s: &State| s.workers.values().find(|w| w.must_recycle()).map(|w| w.id);
    server.wait_for(Duration::from_secs(30), recycled).await.unwrap();
    assert_eq!(agent.get("/0/worker/ping").await.1["poweroff"], true);
    assert_eq!(factory.send(Method::DELETE, &path, Value::Null).await.1, true);
    assert_eq!(factory.get(&path).await.1, json!({ "worker": null }));
    assert_eq!(server.requests("POST /0/factory/lease"), 1);

    let user = Caller::new(&server, &server.user_token());
    assert_eq!(user.get(&format!("/0/job/{job}")).await.1["state"], "completed");
}

#[tokio::test]
async fn refusals_have_the_servers_own_form() {
    let (server, factory, target) = server().await;
    let (_, made) = factory
        .post("/0/factory/worker", json!({ "target": target }))
        .await;
    let path = format!("/0/factory/worker/{}", made["id"].as_str().unwrap());
    let unknown = fresh_id();
    let refused = Caller::new(&server, "nobody");
    let other = Caller::new(&server, &server.add_factory("g").1);
    let listed = factory.get("/0/factory/targets").await;
    assert_eq!(listed, (StatusCode::OK, json!([{ "id": target, "name": "lab" }])));
    server.with(|s| (s.no_fail, s.no_targets) = (true, true));

    for (status, (got, body)) in [
        (StatusCode::UNAUTHORIZED, refused.get("/0/factory/ping").await),
        (StatusCode::FORBIDDEN, other.get(&path).await),
        (
            StatusCode::INTERNAL_SERVER_ERROR,
            factory.get("/0/factory/worker/nonsense").await,
        ),
        (
            StatusCode::NOT_FOUND,
            factory
                .post(&format!("{path}/fail"), json!({ "reason": "x" }))
                .await,
        ),
        (
            StatusCode::BAD_REQUEST,
            factory.post("/0/factory/worker", json!({})).await,
        ),
        (StatusCode::NOT_FOUND, factory.get("/0/factory/targets").await),
        (StatusCode::NOT_FOUND, factory.get("/0/nowhere").await),
    ] {
        assert_eq!(got, status, "{body}");
        assert!(
            body["request_id"].is_string() && body["message"].is_string(),
            "{body}"
        );
    }
    let nobody = factory.get(&format!("/0/factory/worker/{unknown}")).await;
    assert_eq!(nobody, (StatusCode::OK, json!({ "worker": null })));
}

#[tokio::test]
async fn a_server_can_be_down_in_two_ways_and_restart_with_what_it_knew() {
    let (server, factory, target) = server().await;
    server.set_outage(Outage::Unavailable);
    assert_eq!(
        factory.get("/0/factory/ping").await.0,
        StatusCode::SERVICE_UNAVAILABLE
    );
    server.set_outage(Outage::Closed);
    let ping = || {
        factory
            .http
            .get(format!("{}/0/factory/ping", factory.base))
            .bearer_auth(&factory.token)
    };
    assert!(ping().send().await.is_err());
    server.set_outage(Outage::None);
    factory
        .post("/0/factory/worker", json!({ "target": target }))
        .await;
    server.stop().await;
    assert!(ping().send().await.is_err());
    server.restart().await.unwrap();
    let (status, workers) = factory.get("/0/factory/workers").await;
    assert_eq!((status, workers.as_array().unwrap().len()), (StatusCode::OK, 1));
}

#[tokio::test]
async fn the_agent_is_given_to_linux_without_a_length() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![7; 200_000]).unwrap();
    let options = ServerOptions {
        agent: Some(file.path().into()),
        ..ServerOptions::default()
    };
    let server = Server::start(options).await.unwrap();
    let get = |path: &str| reqwest::get(format!("{}/file/{path}", server.url()));
    assert_eq!(
        get("agent?kernel=SunOS").await.unwrap().status(),
        StatusCode::NOT_FOUND
    );
    let reply = get("agent?kernel=Linux").await.unwrap();
    assert!(reply.content_length().is_none() && reply.headers().get("etag").is_none());
    assert_eq!(reply.bytes().await.unwrap(), vec![7; 200_000]);
    let packed = get("agent.gz?kernel=Linux").await.unwrap().bytes().await.unwrap();
    let mut plain = Vec::new();
    io::Read::read_to_end(&mut flate2::read::GzDecoder::new(&packed[..]), &mut plain).unwrap();
    assert_eq!(plain.len(), 200_000);
    server.behave(|b| b.truncate_agent = Some(1000));
    assert!(get("agent?kernel=Linux").await.unwrap().bytes().await.is_err());
}

#[tokio::test]
async fn a_server_that_checks_streams_refuses_those_that_it_does_not_know() {
    let (server, factory, target) = server().await;
    let (_, made) = factory
        .post("/0/factory/worker", json!({ "target": target }))
        .await;
    let path = format!("/0/factory/worker/{}/append", made["id"].as_str().unwrap());
    let append = async |stream: &str| {
        let line = json!({ "stream": stream, "time": "2026-01-01T00:00:00Z", "payload": "x" });
        factory.post(&path, line).await.0
    };
    let streams = [
        "console",
        "bg.web.stdout",
        "diag.pre",
        "boot",
        "console.a",
        "bg.a.b",
    ];
    for (checks, known) in [(false, 6), (true, 3)] {
        server.with(|s| s.checks_streams = checks);
        for (n, stream) in streams.iter().enumerate() {
            let expected = match n < known {
                true => StatusCode::OK,
                false => StatusCode::BAD_REQUEST,
            };
            assert_eq!(append(stream).await, expected, "{checks} {stream}");
        }
    }
}
