//! Calls over HTTP. It must never send the token anywhere but to the configured server, follow a redirect,
//! or read an answer without bound.

use std::fmt;
use std::time::Duration;

use protocol::config::BaseUrl;
use reqwest::{Client, Response};

use super::{Call, Carrier, Error, Pending, Result, Token};

/// The longest answer that is read, in bytes.
const MAX_BODY: usize = 8 << 20;

pub(super) struct Http {
    client: Client,
    base: String,
    token: Token,
}

impl Http {
    pub(super) fn new(base: &BaseUrl, token: Token) -> Result<Self> {
        let client = Client::builder()
            .user_agent(concat!("buildomat-user-factory/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(Duration::from_secs(10))
            .build()
            .map_err(|e| Error::Unreachable(causes(&e)))?;
        Ok(Self {
            client,
            base: base.as_str().to_owned(),
            token,
        })
    }
}

impl Carrier for Http {
    fn call(&self, call: Call) -> Pending<'_, (u16, Vec<u8>)> {
        Box::pin(async move {
            let mut request = self
                .client
                .request(call.method, format!("{}{}", self.base, call.path))
                .bearer_auth(&self.token.0)
                .timeout(Duration::from_secs(30));
            if let Some(body) = &call.body {
                request = request.json(body);
            }
            let response = request.send().await.map_err(|e| Error::Unreachable(causes(&e)))?;
            let status = response.status();
            let body = bounded(response).await;
            // What came of an error's text is enough.
            let body = if status.is_success() {
                body?
            } else {
                body.unwrap_or_default()
            };
            Ok((status.as_u16(), body))
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
