//! Connects to the buildomat server, for jobs that cannot.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpStream, lookup_host};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

use super::untrusted::keep_alive;

/// How long it may take to find the server's addresses.
const LOOKUP: Duration = Duration::from_secs(10);
/// How long one of them may take to answer; then the next is tried.
const CONNECT: Duration = Duration::from_secs(10);
/// How long all of them together may take.
const ALL: Duration = Duration::from_secs(30);
/// For so long the answer of a look-up is used again; one that failed for a part of it.
const FRESH: Duration = Duration::from_secs(5);

type Found = Result<Vec<SocketAddr>, String>;

#[derive(Debug)]
pub(super) struct Upstream {
    host: String,
    port: u16,
    /// Held while a look-up runs, so that there is one at a time, however many connections wait for it.
    found: Mutex<Option<(Instant, Found)>>,
}

impl Upstream {
    pub(super) fn new(host: String, port: u16) -> Upstream {
        Upstream {
            host,
            port,
            found: Mutex::default(),
        }
    }

    pub(super) async fn connect(&self) -> io::Result<TcpStream> {
        let connect = async {
            let mut last = io::Error::other("the name has no address");
            for address in self.addresses().await? {
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
        };
        timeout(ALL, connect).await?
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
            // It cannot be cut off, so it may go on for a while after whoever waits has given up.
            let answer = timeout(LOOKUP, lookup_host((self.host.as_str(), self.port))).await;
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

impl std::fmt::Display for Upstream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}
