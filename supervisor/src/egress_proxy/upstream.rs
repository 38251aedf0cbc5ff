//! Connects to a server for jobs that cannot, and to one through an HTTP proxy.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, lookup_host};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

use super::untrusted::keep_alive;

/// How long it may take to find the server's addresses.
pub(super) const LOOKUP: Duration = Duration::from_secs(10);
/// How long one of them may take to answer; then the next is tried.
const CONNECT: Duration = Duration::from_secs(10);
/// How long all of them together may take.
const ALL: Duration = Duration::from_secs(30);
/// For so long the answer of a name look-up is used again; one that failed for a part of it.
const FRESH: Duration = Duration::from_secs(5);

/// The longest answer of a proxy, in bytes.
const MAX_HEAD: usize = 8 << 10;

type Found = Result<Vec<SocketAddr>, String>;

#[derive(Debug)]
pub(super) struct Upstream {
    host: String,
    port: u16,
    /// The host and port of an HTTP proxy that is asked to connect.
    proxy: Option<(String, u16)>,
    /// Held while a look-up runs, so that there is one at a time, however many connections wait for it.
    found: Mutex<Option<(Instant, Found)>>,
}

impl Upstream {
    pub(super) fn new(host: String, port: u16) -> Upstream {
        Upstream {
            host,
            port,
            proxy: None,
            found: Mutex::default(),
        }
    }

    /// The same server, through an HTTP proxy.
    pub(super) fn through(self, host: String, port: u16) -> Upstream {
        Upstream {
            proxy: Some((host, port)),
            ..self
        }
    }

    pub(super) async fn connect(&self) -> io::Result<TcpStream> {
        match self.proxy {
            Some(_) => self.connect_through_proxy(&self.host, self.port).await,
            None => timeout(ALL, self.connect_to_next()).await?,
        }
    }

    /// To another host, by the proxy before this one.
    pub(super) async fn connect_through_proxy(&self, host: &str, port: u16) -> io::Result<TcpStream> {
        let connect = async {
            let mut next = self.connect_to_next().await?;
            ask_proxy(&mut next, host, port).await?;
            Ok(next)
        };
        timeout(ALL, connect).await?
    }

    /// To the server, or to the proxy before it.
    async fn connect_to_next(&self) -> io::Result<TcpStream> {
        connect_to_first(self.addresses().await?).await
    }

    /// Looked up anew after a while, as the server may move; the name is the configuration's, never the job's.
    async fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        let look_up = async {
            let mut found = self.found.lock().await;
            if let Some((at, found)) = &*found {
                let fresh = if found.is_ok() { FRESH } else { FRESH / 5 };
                if at.elapsed() < fresh {
                    return found.clone();
                }
            }
            // It cannot be cut off, so it may go on for a while after its caller has given up.
            let (host, port) = match &self.proxy {
                Some((host, port)) => (host.as_str(), *port),
                None => (self.host.as_str(), self.port),
            };
            let answer = timeout(LOOKUP, lookup_host((host, port))).await;
            let answer = match answer {
                Ok(Ok(addresses)) => Ok(addresses.collect()),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err("its name is not found in time".into()),
            };
            *found = Some((Instant::now(), answer.clone()));
            answer
        };
        look_up.await.map_err(io::Error::other)
    }
}

/// To the first of these addresses that answers, in the time that all may take.
pub(super) async fn connect_within(addresses: Vec<SocketAddr>) -> io::Result<TcpStream> {
    timeout(ALL, connect_to_first(addresses)).await?
}

/// To the first of these addresses that answers.
async fn connect_to_first(addresses: Vec<SocketAddr>) -> io::Result<TcpStream> {
    let mut last = io::Error::other("the name has no address");
    for address in addresses {
        match timeout(CONNECT, TcpStream::connect(address)).await {
            Ok(Ok(server)) => {
                keep_alive(&server)?;
                return Ok(server);
            }
            Ok(Err(error)) => last = error,
            Err(_) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(last)
}

/// Have an HTTP proxy connect this stream to the server (RFC 9110, 9.3.6).
async fn ask_proxy(proxy: &mut TcpStream, host: &str, port: u16) -> io::Result<()> {
    let server = match host.contains(':') {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
    };
    let request = format!("CONNECT {server} HTTP/1.1\r\nHost: {server}\r\n\r\n");
    proxy.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    // A byte at a time: what follows the empty line is the server's.
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() == MAX_HEAD {
            return Err(io::Error::other("the proxy's answer is too long"));
        }
        head.push(proxy.read_u8().await?);
    }
    let first = head.split(|b| *b == b'\r').next().unwrap_or_default();
    match first
        .strip_prefix(b"HTTP/1.1 ")
        .or_else(|| first.strip_prefix(b"HTTP/1.0 "))
    {
        Some([b'2', _, _, ..]) => Ok(()),
        _ => {
            let first = String::from_utf8_lossy(first);
            Err(io::Error::other(format!("the proxy refused: {first:.100?}")))
        }
    }
}

impl std::fmt::Display for Upstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.host, self.port)?;
        match &self.proxy {
            Some((host, port)) => write!(f, " through {host}:{port}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// Connect to `host` through a proxy that gives this answer and stays. The request that it got, and the result.
    async fn through_proxy(host: &str, answer: Vec<u8>) -> (String, io::Result<TcpStream>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let proxy = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                request.push(stream.read_u8().await.unwrap());
            }
            // The other side may have enough before the end.
            let _ = stream.write_all(&answer).await;
            (String::from_utf8(request).unwrap(), stream)
        });
        let upstream = Upstream::new(host.into(), 443).through("127.0.0.1".into(), port);
        let connected = upstream.connect().await;
        let (request, _stream) = proxy.await.unwrap();
        (request, connected)
    }

    #[tokio::test]
    async fn a_proxy_is_asked_to_connect_and_what_follows_its_answer_is_the_servers() {
        for (host, named) in [
            ("ci.example.com", "ci.example.com:443"),
            ("2001:db8::1", "[2001:db8::1]:443"),
        ] {
            let answer = b"HTTP/1.1 200 Connected\r\nVia: p\r\n\r\nhello".to_vec();
            let (request, connected) = through_proxy(host, answer).await;
            assert_eq!(
                request,
                format!("CONNECT {named} HTTP/1.1\r\nHost: {named}\r\n\r\n")
            );
            let mut first = [0; 5];
            connected.unwrap().read_exact(&mut first).await.unwrap();
            assert_eq!(&first, b"hello");
        }
    }

    #[tokio::test]
    async fn an_answer_of_a_proxy_that_is_no_yes_or_too_long_is_refused() {
        let endless = [b"HTTP/1.1 200 OK\r\nx: ".to_vec(), vec![b'x'; MAX_HEAD]].concat();
        for (answer, part) in [
            (b"HTTP/1.1 403 Forbidden\r\n\r\n".to_vec(), "403 Forbidden"),
            (b"SSH-2.0-OpenSSH\r\n\r\n".to_vec(), "SSH-2.0"),
            (endless, "too long"),
        ] {
            let error = through_proxy("ci.example.com", answer).await.1.unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}
