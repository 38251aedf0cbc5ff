//! A TCP proxy in front of the fake server, which does to answers what networks, proxies and broken servers
//! do. It knows just enough of HTTP to take one request a connection, and to tell which one it is.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::harness::TEST_TIMEOUT;

/// What happens to a request.
#[derive(Clone, Debug, Default)]
pub enum Fault {
    #[default]
    /// It is forwarded, and so is its answer.
    None,
    /// Nobody listens.
    Refuse,
    /// The connection is taken, and closed without a byte.
    Close,
    /// The connection is taken, and nothing is ever said.
    Hang,
    /// The server never sees it: these bytes are the answer.
    Respond(Vec<u8>),
    /// The server has done it, but half of the answer is lost on the way.
    Half,
    /// The server has done it; then the connection is closed without a byte.
    Lose,
    /// The answer comes a byte at a time.
    Drip,
    /// The server gets it twice, and its second answer is forwarded.
    Twice,
    /// In the answer, the first string becomes the second: of the same length, or the answer does not fit its
    /// own `content-length`.
    Replace(String, String),
}

impl Fault {
    /// An answer of the server's that means this, whatever was asked.
    pub fn answer(status: &str, kind: &str, body: &str) -> Fault {
        let length = body.len();
        let text = format!(
            "HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
        );
        Fault::Respond(text.into_bytes())
    }
}

#[derive(Debug)]
struct Shared {
    upstream: SocketAddr,
    /// Which requests have it: those that have this in their first line. Then how many did.
    rule: Mutex<(String, Fault)>,
    faulty_requests: watch::Sender<u64>,
}

impl Shared {
    fn rule(&self) -> (String, Fault) {
        self.rule.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn refuses(&self) -> bool {
        matches!(self.rule().1, Fault::Refuse)
    }
}

/// Dropped, it ends.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    changed: watch::Sender<()>,
    task: JoinHandle<()>,
}

impl Proxy {
    pub(crate) async fn start(upstream: SocketAddr) -> Result<Proxy> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("cannot listen")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            upstream,
            rule: Mutex::default(),
            faulty_requests: watch::Sender::new(0),
        });
        let changed = watch::Sender::new(());
        let task = tokio::spawn(listen(shared.clone(), address, listener, changed.subscribe()));
        Ok(Proxy {
            address,
            shared,
            changed,
            task,
        })
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From now on this happens to every request of which the first line has `part`; nothing to others.
    /// Connections that are open stay as they are.
    pub fn set(&self, part: &str, fault: Fault) {
        *self.shared.rule.lock().unwrap_or_else(PoisonError::into_inner) = (part.to_owned(), fault);
        self.shared.faulty_requests.send_replace(0);
        self.changed.send_replace(());
    }

    /// All is well again.
    pub fn clear_fault(&self) {
        self.set("", Fault::None);
    }

    /// Wait until so many requests have had the present fault.
    pub async fn wait_for_faults(&self, requests: u64) {
        let mut counts = self.shared.faulty_requests.subscribe();
        let count = tokio::time::timeout(TEST_TIMEOUT, counts.wait_for(|count| *count >= requests)).await;
        let count = count.unwrap_or_else(|_| panic!("no {requests} requests had the fault"));
        count.expect("the sender is ours");
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn listen(
    shared: Arc<Shared>,
    address: SocketAddr,
    listener: TcpListener,
    mut changed: watch::Receiver<()>,
) {
    let mut listener = Some(listener);
    loop {
        if shared.refuses() {
            listener = None;
        } else if listener.is_none() {
            listener = Some(TcpListener::bind(address).await.expect("the port is still ours"));
        }
        let Some(open) = &listener else {
            if changed.changed().await.is_err() {
                return;
            }
            continue;
        };
        tokio::select! {
            accepted = open.accept() => {
                if let Ok((client, _)) = accepted {
                    tokio::spawn(serve(shared.clone(), client));
                }
            }
            changed = changed.changed() => if changed.is_err() {
                return;
            }
        }
    }
}

/// One connection, one request. A client that breaks it off gets nothing.
async fn serve(shared: Arc<Shared>, mut client: TcpStream) -> Result<()> {
    let request = read_request(&mut client).await?;
    let (part, fault) = shared.rule();
    let first = request.split(|b| *b == b'\r').next().unwrap_or_default();
    let fault = match String::from_utf8_lossy(first).contains(&part) {
        true => fault,
        false => Fault::None,
    };
    if !matches!(fault, Fault::None) {
        shared.faulty_requests.send_modify(|count| *count += 1);
    }
    match fault {
        Fault::None => client.write_all(&forward(&shared, &request).await?).await?,
        Fault::Refuse | Fault::Close => {}
        Fault::Hang => {
            // Until the client gives up.
            let _ = client.read(&mut [0; 1]).await;
        }
        Fault::Respond(bytes) => client.write_all(&bytes).await?,
        Fault::Half => {
            let answer = forward(&shared, &request).await?;
            let body = head_length(&answer).unwrap_or(0);
            // At least the last byte.
            let end = (body + (answer.len() - body) / 2).min(answer.len() - 1);
            client.write_all(&answer[..end]).await?;
        }
        Fault::Lose => drop(forward(&shared, &request).await?),
        Fault::Drip => {
            client.set_nodelay(true)?;
            for byte in forward(&shared, &request).await? {
                client.write_all(&[byte]).await?;
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
        Fault::Twice => {
            forward(&shared, &request).await?;
            client.write_all(&forward(&shared, &request).await?).await?;
        }
        Fault::Replace(old, new) => {
            let answer = forward(&shared, &request).await?;
            let answer = String::from_utf8_lossy(&answer).replace(&old, &new);
            client.write_all(answer.as_bytes()).await?;
        }
    }
    Ok(client.shutdown().await?)
}

/// The whole answer of the server.
async fn forward(shared: &Shared, request: &[u8]) -> Result<Vec<u8>> {
    let mut server = TcpStream::connect(shared.upstream).await?;
    let line = request
        .iter()
        .position(|b| *b == b'\n')
        .context("no first line")?
        + 1;
    server.write_all(&request[..line]).await?;
    // So its answer says so too, and the next request comes on a connection of its own.
    server.write_all(b"connection: close\r\n").await?;
    server.write_all(&request[line..]).await?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer).await?;
    Ok(answer)
}

/// Where the head ends, with its empty line.
fn head_length(bytes: &[u8]) -> Option<usize> {
    bytes
        .windows(4)
        .position(|four| four == b"\r\n\r\n")
        .map(|at| at + 4)
}

async fn read_request(client: &mut TcpStream) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    loop {
        if let Some(head) = head_length(&bytes) {
            let text = String::from_utf8_lossy(&bytes[..head]).to_lowercase();
            let mut fields = text.lines().filter_map(|line| line.split_once(": "));
            let chunked = text.contains("transfer-encoding: chunked");
            let length = fields.find(|(name, _)| *name == "content-length");
            let length = length.map_or(Ok(0), |(_, value)| value.trim().parse::<usize>())?;
            let whole = match chunked {
                true => bytes[head..].ends_with(b"0\r\n\r\n"),
                false => bytes.len() >= head + length,
            };
            if whole {
                return Ok(bytes);
            }
        }
        if client.read_buf(&mut bytes).await? == 0 {
            bail!("the client has gone");
        }
    }
}
