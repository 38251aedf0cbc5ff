//! What the buildomat server answers, or whoever stands where it should be: each call of the factory, and the
//! download of the agent, over a transport that returns these bytes instead of a network.
//!
//! An input is a letter for the call, a status of three digits, and the body. For a download there are headers before
//! the body, as lines, and an empty line.

#![no_main]

use std::cell::RefCell;
use std::fs;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use protocol::WorkerId;
use reqwest::Response;
use supervisor::agent_cache::AgentCache;
use supervisor::buildomat::{BuildomatClient, Error, HttpRequest, HttpResponse, Pending, Transport};
use supervisor::buildomat::{JobId, Scripts};
use tokio::runtime::Runtime;

const ULID: &str = "01HZX3N8Q4J5W56M9W8969S0XP";

/// One answer, to whatever is asked.
#[derive(Debug)]
struct Always {
    code: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Transport for Always {
    fn call(&self, call: HttpRequest) -> Pending<'_, HttpResponse> {
        // No answer of the server may have made another path of it.
        assert!(
            call.path.starts_with("/0/factory/") && !call.path.contains(".."),
            "{}",
            call.path
        );
        Box::pin(async { Ok(HttpResponse::new(self.code, self.body.clone())) })
    }

    fn file<'a>(
        &'a self,
        _: &'a str,
        _: &'a [(&'a str, String)],
        conditions: &'a [(&'static str, String)],
    ) -> Pending<'a, Response> {
        for (name, value) in conditions {
            http::HeaderValue::from_str(value).unwrap_or_else(|_| panic!("{name} cannot be {value:?}"));
        }
        let mut answer = http::Response::builder().status(self.code);
        for (name, value) in &self.headers {
            answer = answer.header(name, value);
        }
        let answer = answer.body(self.body.clone());
        Box::pin(async {
            answer
                .map(Response::from)
                .map_err(|e| Error::Unreachable(e.to_string()))
        })
    }
}

/// What goes to the log, to the operator and into the database.
fn plain(sentence: &str) {
    assert!(!sentence.contains(char::is_control), "{sentence:?}");
    assert!(
        sentence.chars().count() < 1000,
        "{} characters",
        sentence.chars().count()
    );
}

fn check_answer<T>(answer: Result<T, Error>, server: &Always) -> Option<T> {
    let error = match answer {
        Ok(value) => {
            assert!((200..300).contains(&server.code));
            return Some(value);
        }
        Err(error) => error,
    };
    plain(&error.to_string());
    plain(&error.call_error().sentence);
    // To give a worker up for good takes the server's own words.
    if error.is_refusal() {
        assert!((400..500).contains(&server.code) && server.body.contains(&b'{'));
    }
    None
}

async fn call(which: u8, buildomat: &BuildomatClient, transport: &Always) {
    let worker: WorkerId = ULID.parse().unwrap();
    let job = JobId::try_from(ULID.to_owned()).unwrap();
    match which {
        b'p' => drop(check_answer(buildomat.ping().await, transport)),
        b'w' => {
            for worker in check_answer(buildomat.list_workers().await, transport).unwrap_or_default() {
                // What goes into the agent's command line.
                if let Some(token) = worker.bootstrap {
                    assert!(token.as_str().bytes().all(|b| b.is_ascii_alphanumeric()));
                }
            }
        }
        b'l' => {
            let lease = check_answer(
                buildomat
                    .lease(["01HZX3N8Q4J5K6M7P8R9S0T1V2".parse().unwrap()])
                    .await,
                transport,
            );
            if let Some(lease) = lease.flatten() {
                // It becomes part of a path: the transport checks it.
                let _ = buildomat.renew(&lease.job).await;
            }
        }
        b'r' => drop(check_answer(buildomat.renew(&job).await, transport)),
        b'm' => drop(check_answer(
            buildomat
                .make_worker("01HZX3N8Q4J5K6M7P8R9S0T1V2".parse().unwrap(), &job)
                .await,
            transport,
        )),
        b's' => drop(check_answer(
            buildomat
                .associate(worker, "a@host/00000000", &Scripts::default())
                .await,
            transport,
        )),
        b'd' => drop(check_answer(buildomat.delete(worker).await, transport)),
        b'a' => drop(check_answer(buildomat.append(worker, "a line").await, transport)),
        _ => drop(check_answer(buildomat.fail(worker, "a reason").await, transport)),
    }
}

async fn download(buildomat: &BuildomatClient, transport: &Always) {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let first = AgentCache::new(dir.path().into(), Vec::new())
        .get(buildomat)
        .await;
    match &first {
        Ok(agent) => {
            let size = agent.size().unwrap();
            assert!(transport.code == 200 && (1..=protocol::MAX_AGENT_BYTES).contains(&size));
            assert_eq!(fs::metadata(dir.path().join("agent")).unwrap().len(), size);
        }
        Err(why) => {
            plain(why);
            assert!(!dir.path().join("agent").exists(), "{why}");
        }
    }
    for left in ["agent.download", "agent.new"] {
        assert!(!dir.path().join(left).exists(), "{left} is left");
    }
    // After a restart the disk is all that is known; the server answers as before.
    let again = AgentCache::new(dir.path().into(), Vec::new())
        .get(buildomat)
        .await;
    assert_eq!(again.is_ok(), first.is_ok());
}

thread_local! {
    static RUNTIME: RefCell<Runtime> =
        RefCell::new(tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap());
}

fuzz_target!(|data: &[u8]| {
    let (Some(&which), Some(code)) = (data.first(), data.get(1..4)) else {
        return;
    };
    let Some(code) = std::str::from_utf8(code).ok().and_then(|text| text.parse().ok()) else {
        return;
    };
    let mut body = &data[4..];
    let mut headers = Vec::new();
    if which == b'g' {
        while let Some(end) = body.iter().position(|byte| *byte == b'\n') {
            let line = String::from_utf8_lossy(&body[..end]).into_owned();
            body = &body[end + 1..];
            let Some((name, value)) = line.split_once(": ") else {
                break;
            };
            headers.push((name.into(), value.into()));
        }
    }
    let body = body.to_vec();
    let transport = Arc::new(Always { code, headers, body });
    let buildomat = BuildomatClient::over(transport.clone());
    RUNTIME.with_borrow(|runtime| {
        runtime.block_on(async {
            match which {
                b'g' => download(&buildomat, &transport).await,
                which => call(which, &buildomat, &transport).await,
            }
        });
    });
});
