//! Calls over HTTP. It must never send the token anywhere but to the configured server, follow a redirect,
//! or read an answer without bound.

use std::fmt;
use std::time::Duration;

use jiff::Timestamp;
use protocol::config::General;
use reqwest::header::RETRY_AFTER;
use reqwest::{Client, Proxy, Response};

use super::{Error, HttpRequest, HttpResponse, Pending, Result, Transport};
use crate::rate_limited_log::RateLimitedLog;
use crate::token::{Token, TokenStore};

/// The longest answer that is read, in bytes.
const MAX_BODY: usize = 8 << 20;
/// How long an answer may take, its body included.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(30);

pub(super) struct Http {
    client: Client,
    base: String,
    tokens: TokenStore,
    timeout: Duration,
    log: RateLimitedLog,
}

impl Http {
    pub(super) fn new(general: &General, tokens: TokenStore) -> Result<Self> {
        let client = Client::builder()
            .user_agent(concat!("buildomat-user-factory/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            // Not that of http_proxy and its like in the environment, which would get the token where baseurl is http://.
            .no_proxy()
            .connect_timeout(Duration::from_secs(10));
        let client = match &general.proxy {
            Some(proxy) => Proxy::all(proxy.as_str()).map(|proxy| client.proxy(proxy)),
            None => Ok(client),
        };
        let client = client
            .and_then(|client| client.build())
            .map_err(|e| Error::Unreachable(causes(&e)))?;
        Ok(Self {
            client,
            base: general.baseurl.as_str().to_owned(),
            tokens,
            timeout: CALL_TIMEOUT,
            log: RateLimitedLog::default(),
        })
    }

    async fn send(&self, call: &HttpRequest, token: &Token) -> Result<HttpResponse> {
        let mut request = self
            .client
            .request(call.method.clone(), format!("{}{}", self.base, call.path))
            .bearer_auth(token.text())
            .timeout(self.timeout);
        if let Some(body) = &call.body {
            request = request.json(body);
        }
        let response = request.send().await.map_err(|e| Error::Unreachable(causes(&e)))?;
        let status = response.status();
        let retry_after = response.headers().get(RETRY_AFTER);
        let retry_after = retry_after
            .and_then(|value| value.to_str().ok())
            .and_then(|value| wait_of(value, Timestamp::now()));
        let body = bounded(response).await;
        // What came of an error's text is enough.
        let body = if status.is_success() {
            body?
        } else {
            body.unwrap_or_default()
        };
        Ok(HttpResponse {
            code: status.as_u16(),
            body,
            retry_after,
        })
    }

    /// The token was refused. Is there another one by now?
    async fn has_new_token(&self) -> bool {
        let tokens = self.tokens.clone();
        let read = tokio::task::spawn_blocking(move || tokens.read_again()).await;
        match read {
            Ok(Ok(is_new)) => is_new,
            Ok(Err(error)) => {
                self.log.warn(format_args!(
                    "the server refuses the factory's token, and no other can be read: {error:#}"
                ));
                false
            }
            Err(_) => false,
        }
    }
}

impl Transport for Http {
    fn call(&self, call: HttpRequest) -> Pending<'_, HttpResponse> {
        Box::pin(async move {
            let answer = self.send(&call, &self.tokens.token()).await?;
            if answer.code == 401 && self.has_new_token().await {
                return self.send(&call, &self.tokens.token()).await;
            }
            Ok(answer)
        })
    }

    fn file<'a>(
        &'a self,
        path: &'a str,
        query: &'a [(&'a str, String)],
        headers: &'a [(&'static str, String)],
    ) -> Pending<'a, Response> {
        let mut request = self.client.get(format!("{}{path}", self.base)).query(query);
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        Box::pin(async move { request.send().await.map_err(|e| Error::Unreachable(causes(&e))) })
    }
}

impl fmt::Debug for Http {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Http({})", self.base)
    }
}

async fn bounded(mut response: Response) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|e| Error::Body(causes(&e)))? {
        if body.len() + chunk.len() > MAX_BODY {
            return Err(Error::Body(format!("it is longer than {MAX_BODY} bytes")));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// What a `Retry-After` means: seconds, or the time until a date (RFC 9110, 10.2.3).
fn wait_of(value: &str, now: Timestamp) -> Option<Duration> {
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = jiff::fmt::rfc2822::DateTimeParser::new()
        .parse_timestamp(value)
        .ok()?;
    Some(Duration::try_from(date.duration_since(now)).unwrap_or_default())
}

/// The whole chain of an error: reqwest's own text leaves out the cause.
pub(crate) fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    //! The client against a server of a few lines on the loopback, which answers as no good one does.

    use std::fs;
    use std::net::SocketAddr;
    use std::os::unix::fs::PermissionsExt;

    use protocol::config::Config;
    use reqwest::Method;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::sync::mpsc;
    use tokio::time::{sleep, timeout};

    use super::*;
    use crate::token::TokenPlaces;

    fn config(address: SocketAddr, token_file: &str) -> Config {
        Config::parse(&format!(
            "[general]\nbaseurl = \"http://{address}\"\n[factory]\ntoken_file = \"{token_file}\"\n\
             [slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n"
        ))
        .unwrap()
    }

    async fn head(stream: &mut TcpStream) -> String {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            request.push(stream.read_u8().await.unwrap());
        }
        String::from_utf8(request).unwrap()
    }

    /// A client of a server that begins each answer with these bytes, and then says `more` without end, with pauses.
    async fn endless(first: &'static str, more: &'static [u8], pause: Duration) -> Http {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let config = config(listener.local_addr().unwrap(), "/t");
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                head(&mut stream).await;
                stream.write_all(first.as_bytes()).await.unwrap();
                while stream.write_all(more).await.is_ok() {
                    sleep(pause).await;
                }
            }
        });
        Http::new(&config.general, TokenStore::fixed("secret")).unwrap()
    }

    fn call() -> HttpRequest {
        HttpRequest {
            method: Method::GET,
            path: "/0/factory/workers".into(),
            body: None,
        }
    }

    #[tokio::test]
    async fn an_answer_of_more_than_eight_mib_is_refused_whatever_it_says_of_its_length() {
        static SOME: [u8; 1 << 16] = [b'x'; 1 << 16];
        for first in [
            "HTTP/1.1 200 OK\r\ncontent-length: 9437184\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n7fffffff\r\n",
        ] {
            let http = endless(first, &SOME, Duration::ZERO).await;
            let error = http.call(call()).await.unwrap_err().to_string();
            assert!(error.contains("longer than 8388608 bytes"), "{first}: {error}");
        }
        // What an error says is of no use then, and its code is.
        let http = endless("HTTP/1.1 503 Busy\r\n\r\n", &SOME, Duration::ZERO).await;
        assert_eq!(http.call(call()).await, Ok(HttpResponse::new(503, "")));
    }

    #[test]
    fn retry_after_is_a_number_of_seconds_or_a_date() {
        let now = "2026-11-06T08:49:37Z".parse().unwrap();
        let seconds = |value| wait_of(value, now).map(|wait| wait.as_secs());
        assert_eq!(seconds("120"), Some(120));
        assert_eq!(seconds("Fri, 06 Nov 2026 08:51:37 GMT"), Some(120));
        assert_eq!(seconds("Fri, 06 Nov 2026 08:00:00 GMT"), Some(0));
        for nothing in ["", "-1", "soon", "1.5", "Fri, 99 Nov 2026 08:51:37 GMT"] {
            assert_eq!(seconds(nothing), None, "{nothing}");
        }
        assert_eq!(seconds("18446744073709551615"), Some(u64::MAX));
    }

    #[tokio::test]
    async fn what_the_server_asks_to_wait_comes_with_its_answer() {
        let http = endless(
            "HTTP/1.1 429 Slow\r\nretry-after: 300\r\ncontent-length: 0\r\n\r\n",
            b"",
            Duration::from_secs(1),
        );
        let answer = http.await.call(call()).await.unwrap();
        assert_eq!(
            (answer.code, answer.retry_after),
            (429, Some(Duration::from_secs(300)))
        );
    }

    #[tokio::test]
    async fn an_answer_that_takes_too_long_is_given_up_at_every_part_of_it() {
        for (first, more) in [
            ("HTTP/1.1 200 OK\r\n\r\n", &b"x"[..]),
            ("HTTP/1.1 200 OK\r\n", b"x: y\r\n"),
            (
                "HTTP/1.1 102 Processing\r\n\r\n",
                b"HTTP/1.1 102 Processing\r\n\r\n",
            ),
            ("", b""),
        ] {
            let mut http = endless(first, more, Duration::from_millis(20)).await;
            assert_eq!(http.timeout, Duration::from_secs(30));
            http.timeout = Duration::from_millis(500);
            let answer = timeout(Duration::from_secs(20), http.call(call())).await;
            let answer = answer.unwrap_or_else(|_| panic!("{first}: it is not given up"));
            assert!(answer.is_err(), "{first}: {answer:?}");
        }
    }

    #[tokio::test]
    async fn a_redirect_is_not_followed() {
        let elsewhere = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = elsewhere.local_addr().unwrap();
        for code in [301, 302, 303, 307, 308] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let config = config(listener.local_addr().unwrap(), "/t");
            tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                head(&mut stream).await;
                let answer =
                    format!("HTTP/1.1 {code} Go\r\nlocation: http://{to}/\r\ncontent-length: 0\r\n\r\n");
                stream.write_all(answer.as_bytes()).await.unwrap();
            });
            let mut http = Http::new(&config.general, TokenStore::fixed("secret")).unwrap();
            http.timeout = Duration::from_secs(2);
            assert_eq!(http.call(call()).await, Ok(HttpResponse::new(code, "")));
        }
        let came = timeout(Duration::ZERO, elsewhere.accept()).await;
        assert!(came.is_err(), "somebody went to {to}");
    }

    #[tokio::test]
    async fn a_token_that_is_refused_is_read_again_and_a_new_one_used_at_once() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        let write = |token: &str| {
            fs::write(&file, token).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        };
        write("first");
        let config = config(listener.local_addr().unwrap(), file.to_str().unwrap());
        let tokens = TokenStore::open(TokenPlaces::of_this_process(&config)).unwrap();
        let http = Http::new(&config.general, tokens).unwrap();
        let (tell, mut asked) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let head = head(&mut stream).await;
                let token = head
                    .lines()
                    .find_map(|line| line.strip_prefix("authorization: Bearer "));
                let token = token.unwrap_or_default().to_owned();
                let status = if token == "second" { "200 OK" } else { "401 No" };
                let _ = tell.send(token);
                let answer = format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        // The same is not tried twice.
        assert_eq!(http.call(call()).await.unwrap().code, 401);
        write("second");
        assert_eq!(http.call(call()).await.unwrap().code, 200);
        assert_eq!(http.call(call()).await.unwrap().code, 200);
        drop(http);
        let mut tokens = Vec::new();
        while let Ok(token) = asked.try_recv() {
            tokens.push(token);
        }
        assert_eq!(tokens, ["first", "first", "second", "second"]);
    }
}
