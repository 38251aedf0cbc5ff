//! The cache against a server of a few lines on the loopback.

use super::*;
use crate::token::TokenStore;
use flate2::Compression;
use flate2::write::GzEncoder;
use nix::fcntl::FcntlArg;
use protocol::config::Config;
use std::collections::VecDeque;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

/// A server that gives these answers, one a connection, and forwards the requests.
async fn serve(answers: Vec<Vec<u8>>) -> (BuildomatClient, mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (tell, requests) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut answers = VecDeque::from(answers);
        while let Some(answer) = answers.pop_front() {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                request.push(stream.read_u8().await.unwrap());
            }
            let _ = tell.send(String::from_utf8(request).unwrap().to_ascii_lowercase());
            let _ = stream.write_all(&answer).await;
            let _ = stream.shutdown().await;
        }
    });
    let config = Config::parse(&format!(
        "[general]\nbaseurl = \"http://{address}\"\n[factory]\ntoken_file = \"/t\"\n\
         [slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n"
    ));
    (
        BuildomatClient::new(&config.unwrap().general, TokenStore::fixed("secret")).unwrap(),
        requests,
    )
}

fn http(status: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let answer = format!(
        "HTTP/1.1 {status}\r\n{headers}connection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    [answer.as_bytes(), body].concat()
}

fn packed(bytes: &[u8]) -> Vec<u8> {
    let mut packer = GzEncoder::new(Vec::new(), Compression::fast());
    packer.write_all(bytes).unwrap();
    packer.finish().unwrap()
}

fn content(agent: &Agent) -> Vec<u8> {
    let mut file = File::from(agent.as_fd().try_clone_to_owned().unwrap());
    io::Seek::rewind(&mut file).unwrap();
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

fn cache(dir: &Path) -> AgentCache {
    AgentCache::new(dir.join("agent"), vec![("kernel", "Linux".into())])
}

#[tokio::test]
async fn an_agent_is_unpacked_sealed_and_kept_for_when_the_server_is_away() {
    let dir = tempfile::tempdir().unwrap();
    let (buildomat, mut requests) = serve(vec![
        http("200 OK", "etag: \"v1\"\r\n", &packed(b"program")),
        http("304 Not Modified", "", b""),
        http("503 Service Unavailable", "", b"<html>"),
    ])
    .await;
    let first = cache(dir.path());
    let agent = first.get(&buildomat).await.unwrap();
    assert_eq!(content(&agent), b"program");
    let seals = fcntl(agent.as_fd(), FcntlArg::F_GET_SEALS).unwrap();
    assert_eq!(SealFlag::from_bits_truncate(seals).bits().count_ones(), 4);
    let request = requests.recv().await.unwrap();
    assert!(
        request.starts_with("get /file/agent.gz?kernel=linux ") && !request.contains("secret"),
        "{request}"
    );
    // Fresh: nobody is asked.
    assert_eq!(content(&first.get(&buildomat).await.unwrap()), b"program");
    // A new run asks whether it has changed, and does without an answer.
    for _ in 0..2 {
        assert_eq!(
            content(&cache(dir.path()).get(&buildomat).await.unwrap()),
            b"program"
        );
        assert!(requests.recv().await.unwrap().contains("if-none-match: \"v1\""));
    }
    assert_eq!(
        content(&cache(dir.path()).get(&buildomat).await.unwrap()),
        b"program"
    );
}

#[tokio::test]
async fn a_server_with_the_plain_form_alone_is_served_from_that() {
    let dir = tempfile::tempdir().unwrap();
    let (buildomat, mut requests) =
        serve(vec![http("404 Not Found", "", b""), http("200 OK", "", b"plain")]).await;
    assert_eq!(
        content(&cache(dir.path()).get(&buildomat).await.unwrap()),
        b"plain"
    );
    assert!(requests.recv().await.unwrap().starts_with("get /file/agent.gz"));
    assert!(requests.recv().await.unwrap().starts_with("get /file/agent?"));
}

#[tokio::test]
async fn what_is_no_agent_is_refused_and_leaves_none() {
    let cut = {
        let mut all = packed(&[7; 4000]);
        all.truncate(20);
        all
    };
    for (answers, part) in [
        (vec![http("200 OK", "", &cut)], "unpack"),
        (vec![http("200 OK", "", &packed(b""))], "0 bytes"),
        (
            vec![http("404 Not Found", "", b""), http("404 Not Found", "", b"")],
            "no agent for this machine",
        ),
        (
            vec![b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nshort".to_vec()],
            "broke off",
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (buildomat, _requests) = serve(answers).await;
        let error = cache(dir.path()).get(&buildomat).await.unwrap_err();
        assert!(error.contains(part), "{error}");
        // Nothing at all: on a full disk its parts would be what keeps others from their room.
        let left = fs::read_dir(dir.path().join("agent"))
            .into_iter()
            .flatten()
            .count();
        assert_eq!(left, 0, "{part}");
    }
}

/// A server whose answer to one request comes piece by piece, as the test sends it.
async fn serve_slowly() -> (BuildomatClient, mpsc::UnboundedSender<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (pieces, mut sent) = mpsc::unbounded_channel::<Vec<u8>>();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        while let Some(piece) = sent.recv().await {
            let _ = stream.write_all(&piece).await;
        }
    });
    let config = Config::parse(&format!(
        "[general]\nbaseurl = \"http://{address}\"\n[factory]\ntoken_file = \"/t\"\n\
         [slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n"
    ));
    let buildomat = BuildomatClient::new(&config.unwrap().general, TokenStore::fixed("secret"));
    (buildomat.unwrap(), pieces)
}

#[tokio::test]
async fn a_slow_answer_holds_up_no_start_and_is_there_for_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let (buildomat, _requests) = serve(vec![http("200 OK", "etag: \"v1\"\r\n", &packed(b"old"))]).await;
    cache(dir.path()).get(&buildomat).await.unwrap();
    let (buildomat, pieces) = serve_slowly().await;
    let cache = cache(dir.path());
    let started_at = Instant::now();
    for _ in 0..20 {
        assert_eq!(content(&cache.get(&buildomat).await.unwrap()), b"old");
    }
    // All twenty wait for one answer, and together.
    assert!(started_at.elapsed() < 2 * GRACE, "{:?}", started_at.elapsed());
    pieces.send(http("200 OK", "", &packed(b"new"))).unwrap();
    let end = Instant::now() + IDLE;
    while content(&cache.get(&buildomat).await.unwrap()) != b"new" {
        assert!(Instant::now() < end, "the new one does not come");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_download_that_never_stalls_and_never_ends_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let (buildomat, pieces) = serve_slowly().await;
    pieces
        .send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n".to_vec())
        .unwrap();
    let dripping = tokio::spawn(async move {
        while pieces.send(b"x".to_vec()).is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    let AgentCache(cache) = cache(dir.path());
    assert_eq!(cache.whole, Duration::from_secs(600));
    let mut cache = Arc::into_inner(cache).unwrap();
    cache.whole = Duration::from_millis(500);
    let started_at = Instant::now();
    let error = AgentCache(Arc::new(cache)).get(&buildomat).await.unwrap_err();
    assert!(error.contains("longer than 500ms"), "{error}");
    assert!(started_at.elapsed() < IDLE, "{:?}", started_at.elapsed());
    assert!(!dir.path().join("agent").join(PARTS[0]).exists());
    dripping.abort();
}

#[test]
fn os_release_values_lose_their_quotes() {
    let text = "NAME=\"Debian\"\nVERSION_ID=\"13\"\nID=debian\nID_LIKE='a b'\n";
    assert_eq!(
        [
            os_release(text, "ID"),
            os_release(text, "VERSION_ID"),
            os_release(text, "ID_LIKE")
        ],
        ["debian", "13", "a b"]
    );
    assert_eq!(os_release(text, "NOTHING"), "");
}

#[test]
fn a_memfd_of_which_the_kernel_holds_pages_is_sealed_when_it_lets_go() {
    let sealed_at = |last: usize, end: nix::Result<()>| {
        let mut asked = 0;
        let result = while_busy(|| {
            asked += 1;
            if asked < last { Err(Errno::EBUSY) } else { end }
        });
        (asked, result)
    };
    assert_eq!(sealed_at(3, Ok(())), (3, Ok(())));
    assert_eq!(sealed_at(1, Err(Errno::EPERM)), (1, Err(Errno::EPERM)));
    assert_eq!(sealed_at(usize::MAX, Ok(())), (51, Err(Errno::EBUSY)));
}
