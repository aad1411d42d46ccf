//! One streaming request to an OpenAI endpoint, timed as its bytes come.

use std::time::{Duration, Instant};

use reqwest::{Client, StatusCode};
use serde_json::{Value, json};

use super::record::{ErrorKind, Record, RequestError};
use super::sse::Events;
use crate::failure::{Exit, Failure, Result};

/// Longest body of an error that is read.
const MAX_ERROR_BYTES: usize = 64 << 10;
/// Longest list of models.
const MAX_LIST_BYTES: usize = 4 << 20;
/// For a connection, and for the list of models.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Which of the two interfaces is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Interface {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

impl Interface {
    /// Its path below the API's address.
    pub fn path(self) -> &'static str {
        match self {
            Interface::Completions => "completions",
            Interface::Chat => "chat/completions",
        }
    }
}

/// Fields beyond the plainest request that an endpoint may not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Extras {
    /// `ignore_eos`: answers have the length asked for.
    pub ignore_eos: bool,
    /// `stream_options.include_usage`: the server counts tokens.
    pub usage: bool,
}

/// Where requests go.
#[derive(Debug, Clone)]
pub struct Endpoint {
    client: Client,
    base: String,
    key: Option<String>,
    interface: Interface,
    /// The model's name in requests.
    pub model: String,
    /// What it understands.
    pub extras: Extras,
}

/// A prompt and how long its answer is to be.
#[derive(Debug, Clone)]
pub struct Request {
    /// Text.
    pub prompt: String,
    /// Prompt tokens asked for.
    pub input: usize,
    /// Answer tokens asked for.
    pub output: usize,
}

impl Endpoint {
    /// An endpoint at `base`, such as `http://127.0.0.1:8000/v1`. `model` is asked for where it is not given.
    ///
    /// # Errors
    /// Nobody answers ([`Exit::LostContact`]), or the list of models is none.
    pub async fn connect(base: &str, key: Option<String>, model: Option<String>, interface: Interface) -> Result<Self> {
        // Another part of the program may have chosen the same one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_max_idle_per_host(usize::MAX)
            .user_agent(concat!("forgectl/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| Failure::of(&error))?;
        let extras = Extras { ignore_eos: true, usage: true };
        let base = base.trim_end_matches('/').to_owned();
        let mut endpoint = Endpoint { client, base, key, interface, model: model.unwrap_or_default(), extras };
        if endpoint.model.is_empty() {
            endpoint.model = endpoint.first_model().await?;
        }
        Ok(endpoint)
    }

    async fn first_model(&self) -> Result<String> {
        let url = format!("{}/models", self.base);
        let unreachable = |error: &reqwest::Error| {
            let failure = Failure::of(error).while_doing(&format!("cannot reach {url}"));
            failure.help(remedy(&self.base, ErrorKind::Connect)).exit(Exit::LostContact)
        };
        let mut request = self.client.get(&url).timeout(CONNECT_TIMEOUT);
        if let Some(key) = &self.key {
            request = request.bearer_auth(key);
        }
        let mut response = request.send().await.map_err(|error| unreachable(&error))?;
        let status = response.status();
        let mut body = Vec::new();
        read(&mut response, &mut body, MAX_LIST_BYTES).await.map_err(|error| unreachable(&error))?;
        let list: Option<Value> = serde_json::from_slice(&body).ok();
        let model = list.as_ref().and_then(|list| list["data"][0]["id"].as_str());
        model.map(str::to_owned).ok_or_else(|| {
            let kind = if status.is_server_error() { ErrorKind::Server } else { ErrorKind::Refused };
            Failure::new(format!("{url} answered {status} and no list of models")).help(remedy(&self.base, kind))
        })
    }

    fn body(&self, request: &Request) -> Value {
        let mut body = json!({"model": self.model, "max_tokens": request.output, "temperature": 0, "stream": true});
        match self.interface {
            Interface::Completions => body["prompt"] = json!(request.prompt),
            Interface::Chat => body["messages"] = json!([{"role": "user", "content": request.prompt}]),
        }
        if self.extras.ignore_eos {
            body["ignore_eos"] = json!(true);
        }
        if self.extras.usage {
            body["stream_options"] = json!({"include_usage": true});
        }
        body
    }

    /// Sends a request and reads its stream, at most for `timeout`. Failures are in the record.
    pub async fn run(&self, request: &Request, timeout: Duration) -> Record {
        let mut stream = Stream { started: Instant::now(), last_text: None, record: Record::default(), chunks: 0, done: false };
        let outcome = tokio::time::timeout(timeout, self.read(request, &mut stream)).await;
        let late = || Err(RequestError::new(ErrorKind::Deadline, format!("not done after {} s", timeout.as_secs_f64())));
        let error = outcome.unwrap_or_else(|_| late()).err();
        let mut record = stream.record;
        if record.output_tokens == 0 {
            record.output_tokens = stream.chunks;
        }
        let empty = || (stream.chunks == 0).then(|| RequestError::new(ErrorKind::Empty, "the answer has no text"));
        Record {
            wanted_input_tokens: request.input,
            wanted_output_tokens: request.output,
            e2e_s: stream.started.elapsed().as_secs_f64(),
            error: error.or_else(empty),
            ..record
        }
    }

    async fn read(&self, request: &Request, stream: &mut Stream) -> Result<(), RequestError> {
        let mut builder = self.client.post(format!("{}/{}", self.base, self.interface.path())).header("content-type", "application/json");
        if let Some(key) = &self.key {
            builder = builder.bearer_auth(key);
        }
        let sent = builder.body(self.body(request).to_string()).send().await;
        let mut response = sent.map_err(|error| {
            let kind = if error.is_connect() { ErrorKind::Connect } else { ErrorKind::Broken };
            RequestError::new(kind, chain(&error))
        })?;
        if response.status() != StatusCode::OK {
            return Err(status_error(response).await);
        }
        let mut events = Events::default();
        let broken = |reason: String| RequestError::new(ErrorKind::Broken, reason);
        while let Some(bytes) = response.chunk().await.map_err(|error| broken(chain(&error)))? {
            for data in events.push(&bytes).map_err(|reason| RequestError::new(ErrorKind::Malformed, reason))? {
                stream.event(&data)?;
            }
        }
        if stream.done { Ok(()) } else { Err(broken("the stream ended without [DONE]".into())) }
    }
}

/// What was read of a stream so far.
struct Stream {
    started: Instant,
    last_text: Option<Instant>,
    record: Record,
    /// Events with text.
    chunks: usize,
    done: bool,
}

impl Stream {
    fn event(&mut self, data: &str) -> Result<(), RequestError> {
        if data == "[DONE]" {
            self.done = true;
            return Ok(());
        }
        let event: Value =
            serde_json::from_str(data).map_err(|error| RequestError::new(ErrorKind::Malformed, format!("{error} in {data:?}")))?;
        if !event["error"].is_null() {
            return Err(RequestError::new(ErrorKind::InStream, event["error"]["message"].as_str().unwrap_or(data)));
        }
        let count = |name: &str| event["usage"][name].as_u64().map(|tokens| tokens as usize);
        if let Some(tokens) = count("prompt_tokens") {
            self.record.input_tokens = Some(tokens);
        }
        if let Some(tokens) = count("completion_tokens") {
            self.record.output_tokens = tokens;
        }
        if has_text(&event["choices"][0]) {
            self.text();
        }
        Ok(())
    }

    fn text(&mut self) {
        let now = Instant::now();
        match self.last_text.replace(now) {
            None => self.record.ttft_s = Some((now - self.started).as_secs_f64()),
            Some(before) => self.record.gaps_s.push((now - before).as_secs_f64()),
        }
        self.chunks += 1;
    }
}

/// Whether a choice of a chunk carries text, be it thought or said.
fn has_text(choice: &Value) -> bool {
    let delta = &choice["delta"];
    [&choice["text"], &delta["content"], &delta["reasoning_content"], &delta["reasoning"]]
        .into_iter()
        .any(|text| text.as_str().is_some_and(|text| !text.is_empty()))
}

async fn status_error(mut response: reqwest::Response) -> RequestError {
    let status = response.status();
    let kind = if status.is_server_error() { ErrorKind::Server } else { ErrorKind::Refused };
    let mut body = Vec::new();
    // What it said before it broke off is better than nothing.
    let _ = read(&mut response, &mut body, MAX_ERROR_BYTES).await;
    let parsed: Option<Value> = serde_json::from_slice(&body).ok();
    let said = parsed.as_ref().and_then(|value| value["error"]["message"].as_str().or(value["message"].as_str()));
    let said = said.map_or_else(|| String::from_utf8_lossy(&body).into_owned(), str::to_owned);
    RequestError::new(kind, format!("{}: {said}", status.as_u16()))
}

/// Reads the body of an answer, no more of it than a little beyond `most` bytes.
async fn read(response: &mut reqwest::Response, body: &mut Vec<u8>, most: usize) -> Result<(), reqwest::Error> {
    while body.len() <= most
        && let Some(bytes) = response.chunk().await?
    {
        body.extend_from_slice(&bytes);
    }
    Ok(())
}

/// What to do about requests to `base` that all fail like this.
pub fn remedy(base: &str, kind: ErrorKind) -> String {
    let base = base.trim_end_matches('/');
    let versioned = base.rsplit('/').next().is_some_and(|last| last.len() > 1 && last.starts_with('v'));
    let path = if versioned { String::new() } else { format!("--url is the address up to /v1: try --url {base}/v1. ") };
    let rest = match kind {
        ErrorKind::Connect => "Is a server listening there? `forgectl serve` starts one on http://127.0.0.1:8000/v1",
        ErrorKind::Deadline => "Give requests more time with --timeout, or the server less to do",
        ErrorKind::Broken => "Look at the server's own log: it ended the connection",
        ErrorKind::Server | ErrorKind::InStream => "Look at the server's own log",
        ErrorKind::Refused | ErrorKind::Malformed | ErrorKind::Empty => {
            "Give --model, --api-key where the server wants one, and --endpoint chat or completions, whichever it has"
        }
    };
    path + rest
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_without_v1_is_the_first_suspect() {
        assert!(remedy("http://a:8000/", ErrorKind::Refused).starts_with("--url is the address up to /v1: try --url http://a:8000/v1."));
        for base in ["http://a:8000/v1", "http://a:8000/v1/", "http://a/openai/v2"] {
            assert!(!remedy(base, ErrorKind::Refused).contains("--url"), "{base}");
        }
        assert!(remedy("http://a:8000/v1", ErrorKind::Connect).contains("forgectl serve"));
    }

    fn stream() -> Stream {
        Stream { started: Instant::now(), last_text: None, record: Record::default(), chunks: 0, done: false }
    }

    #[test]
    fn chunks_with_text_are_timed_and_usage_counts() {
        let mut stream = stream();
        for data in [
            r#"{"choices": [{"delta": {"role": "assistant", "content": ""}}]}"#,
            r#"{"choices": [{"delta": {"content": "Hi"}}], "usage": null}"#,
            r#"{"choices": [{"text": " there"}]}"#,
            r#"{"choices": [{"delta": {"reasoning_content": "hm"}}]}"#,
            r#"{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}}"#,
            "[DONE]",
        ] {
            stream.event(data).expect("well-formed");
        }
        assert_eq!((stream.chunks, stream.record.gaps_s.len(), stream.done), (3, 2, true));
        assert_eq!((stream.record.input_tokens, stream.record.output_tokens), (Some(9), 4));
        assert!(stream.record.ttft_s.is_some());
    }

    #[test]
    fn errors_in_a_stream_are_told_apart() {
        assert_eq!(stream().event(r#"{"error": {"message": "no"}}"#), Err(RequestError::new(ErrorKind::InStream, "no")));
        assert_eq!(stream().event("{").map_err(|error| error.kind), Err(ErrorKind::Malformed));
    }
}
