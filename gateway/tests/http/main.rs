//! The gateway over real loopback sockets, in front of a scripted engine.

mod access;
mod cluster;
mod engine;
mod failover;
mod lifecycle;
mod refusals;
mod scripted_cluster;
mod shapes;
mod streams;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use engine::ScriptedEngine;
use forge_gateway::clock::Clock;
use forge_gateway::{Gateway, GatewayConfig, KeyRing, Listeners, ServedModel};
use forge_shared::telemetry::Metrics;
use forge_text::{ChatTemplate, HuggingFaceFiles, Tokenizer};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub(crate) const NOW_S: u64 = 1_750_000_000;
pub(crate) const CHAT: &str = "/v1/chat/completions";
pub(crate) const COMPLETIONS: &str = "/v1/completions";

struct FixedClock;

impl Clock for FixedClock {
    fn unix_s(&self) -> u64 {
        NOW_S
    }
}

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/text").join(name)
}

/// The fixtures' small byte-level tokenizer: 502 tokens, 1 begins a message and 2 ends it.
pub(crate) fn tokenizer() -> Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    let build = || {
        let files = HuggingFaceFiles::read(&fixture("byte_level")).expect("the fixture is readable");
        Tokenizer::from_hugging_face(&files).expect("the fixture is a tokenizer")
    };
    TOKENIZER.get_or_init(build).clone()
}

pub(crate) fn chat_template() -> ChatTemplate {
    let source = std::fs::read_to_string(fixture("templates/chatml.jinja")).expect("the fixture is readable");
    ChatTemplate::new(&source, BTreeMap::new()).expect("the fixture is a template")
}

/// A gateway that listens on loopback.
pub(crate) struct Server {
    pub(crate) engines: Vec<Arc<ScriptedEngine>>,
    pub(crate) gateway: Gateway,
    pub(crate) metrics: Metrics,
    pub(crate) api: SocketAddr,
    pub(crate) probes: SocketAddr,
    pub(crate) stop: Option<oneshot::Sender<()>>,
    pub(crate) serving: JoinHandle<()>,
}

pub(crate) fn loopback() -> GatewayConfig {
    GatewayConfig { port: 0, metrics_port: 0, ..GatewayConfig::default() }
}

impl Server {
    pub(crate) async fn start() -> Server {
        Self::with(loopback(), KeyRing::none(), vec![ScriptedEngine::new("model", "numerics-1")]).await
    }

    pub(crate) async fn with(config: GatewayConfig, keys: KeyRing, engines: Vec<Arc<ScriptedEngine>>) -> Server {
        let listeners = Listeners::bind(&config).await.expect("loopback has free ports");
        let (api, probes) = (listeners.api(), listeners.metrics());
        let served =
            engines.iter().map(|engine| ServedModel { link: engine.clone(), tokenizer: tokenizer(), chat_template: Some(chat_template()) });
        let metrics = Metrics::new();
        let gateway =
            Gateway::with_clock(config, served.collect(), metrics.clone(), keys, Arc::new(FixedClock)).expect("a valid configuration");
        let (stop, stopped) = oneshot::channel();
        let served = gateway.clone();
        let serving = tokio::spawn(async move {
            let shutdown = async {
                // A sender that is gone means the same as one that sent.
                let _ = stopped.await;
            };
            served.serve(listeners, shutdown).await.expect("the listeners work");
        });
        Server { engines, gateway, metrics, api, probes, stop: Some(stop), serving }
    }

    pub(crate) fn engine(&self) -> &Arc<ScriptedEngine> {
        &self.engines[0]
    }

    pub(crate) async fn send(&self, request: Request<Full<Bytes>>) -> Response<Incoming> {
        send(self.api, request).await
    }

    /// Posts a body and reads the whole answer.
    pub(crate) async fn post(&self, path: &str, body: impl Into<Bytes>) -> Answer {
        Answer::read(self.send(post(path, body)).await).await
    }

    pub(crate) async fn post_json(&self, path: &str, body: &Value) -> Answer {
        self.post(path, body.to_string()).await
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        Answer::read(self.send(get(path)).await).await
    }

    pub(crate) async fn probe(&self, path: &str) -> Answer {
        Answer::read(send(self.probes, get(path)).await).await
    }

    /// A metric's value on the page.
    pub(crate) fn metric(&self, line: &str) -> Option<f64> {
        let page = self.metrics.encode();
        page.lines().find_map(|found| found.strip_prefix(line)?.trim().parse().ok())
    }
}

pub(crate) fn post(path: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    let request = Request::post(path).header("content-type", "application/json").header("host", "localhost");
    request.body(Full::new(body.into())).expect("a valid request")
}

pub(crate) fn get(path: &str) -> Request<Full<Bytes>> {
    Request::builder().method(Method::GET).uri(path).header("host", "localhost").body(Full::default()).expect("a valid request")
}

/// Sends a request on a connection of its own, which closes when the response is dropped.
pub(crate) async fn send(address: SocketAddr, request: Request<Full<Bytes>>) -> Response<Incoming> {
    let stream = tokio::net::TcpStream::connect(address).await.expect("the gateway listens");
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("a connection");
    tokio::spawn(connection);
    tokio::time::timeout(Duration::from_secs(30), sender.send_request(request)).await.expect("an answer in time").expect("an answer")
}

/// A whole answer.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: hyper::HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) async fn read(response: Response<Incoming>) -> Answer {
        let (parts, body) = response.into_parts();
        let body = tokio::time::timeout(Duration::from_secs(30), body.collect()).await.expect("an end in time").expect("a whole body");
        let text = String::from_utf8(body.to_bytes().to_vec()).expect("answers are UTF-8");
        Answer { status: parts.status, headers: parts.headers, text }
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error} in {}", self.text))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// Checks the status and OpenAI's error shape; returns the error.
    pub(crate) fn error(&self, status: u16) -> Value {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        let error = self.json()["error"].clone();
        let keys: Vec<&String> = error.as_object().expect("an error object").keys().collect();
        assert_eq!(keys, ["message", "type", "param", "code"]);
        assert!(error["message"].as_str().is_some_and(|message| message.len() > 5), "{error}");
        error
    }

    /// The events of a stream, without the comments; the last is `[DONE]` or an error.
    pub(crate) fn events(&self) -> Vec<Value> {
        let data: Vec<&str> = self.text.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
        data.iter().filter(|text| **text != "[DONE]").map(|text| serde_json::from_str(text).expect("events are JSON")).collect()
    }

    pub(crate) fn is_done(&self) -> bool {
        self.text.ends_with("data: [DONE]\n\n")
    }

    /// Text of one answer of a stream.
    pub(crate) fn streamed_text(&self, index: u64) -> String {
        let choices = self.events().into_iter().flat_map(|event| event["choices"].as_array().cloned().unwrap_or_default());
        let of_index = choices.filter(|choice| choice["index"] == index);
        of_index.map(|choice| choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default().to_owned()).collect()
    }
}

/// Waits until something is true, within a bound.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..500 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what} did not come true within 5 s");
}
