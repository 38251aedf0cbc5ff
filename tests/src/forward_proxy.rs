//! An HTTP forward proxy, as a company has one between its hosts and the network. Wherever it is asked to go, it goes to one
//! address: the tests' server, which has no name that the host could look up.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// The longest head of a request, in bytes.
const MAX_HEAD: usize = 64 << 10;

/// Dropped, it ends.
#[derive(Debug)]
pub struct ForwardProxy {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<()>,
}

impl ForwardProxy {
    /// On a free port of 127.0.0.1; every request ends at `server`.
    pub async fn start(server: SocketAddr) -> Result<ForwardProxy> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("cannot listen")?;
        let address = listener.local_addr()?;
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = asked.clone();
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(serve(client, server, log.clone()));
            }
        });
        Ok(ForwardProxy { address, asked, task })
    }

    /// As `https_proxy` takes it.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The first lines of the requests so far: `CONNECT HOST:PORT HTTP/1.1`, or a method with a whole URL.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for ForwardProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One request a connection, or one tunnel. Who breaks it off is told nothing.
async fn serve(mut client: TcpStream, server: SocketAddr, log: Arc<Mutex<Vec<String>>>) -> Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") && head.len() < MAX_HEAD {
        head.push(client.read_u8().await?);
    }
    let head = String::from_utf8(head)?;
    let (first, fields) = head.split_once("\r\n").context("no first line")?;
    log.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(first.to_owned());
    let mut upstream = TcpStream::connect(server).await?;
    if first.starts_with("CONNECT ") {
        client.write_all(b"HTTP/1.1 200 Connected\r\n\r\n").await?;
    } else {
        // From `GET http://HOST/PATH` to `GET /PATH` (RFC 9112, 3.2.2).
        let (method, rest) = first.split_once(" http://").context("no URL")?;
        let (_, path) = rest.split_once('/').context("no path")?;
        let request = format!("{method} /{path}\r\nConnection: close\r\n{fields}");
        upstream.write_all(request.as_bytes()).await?;
    }
    copy_bidirectional(&mut client, &mut upstream).await?;
    Ok(())
}
