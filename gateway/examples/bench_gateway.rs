//! What the gateway itself costs: time to first token it adds, and a thousand streams at once, against an engine that
//! does nothing but send tokens. Everything runs in this process over loopback, so the client's share is included.
//!
//! ```sh
//! cargo run --release -p forge-gateway --example bench_gateway -- [REQUESTS] [STREAMS] [TOKENS] [PACE_MS]
//! ```
//!
//! It prints one line per measurement and exits with 1 if a stream broke or the added time is over a millisecond.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forge_gateway::{Gateway, GatewayConfig, KeyRing, Listeners, ServedModel};
use forge_shared::generate::{AdmitError, EngineEvent, FinishReason, GenerateRequest, TokenEvent, Usage};
use forge_shared::link::{DefaultSampling, EngineLink, EngineStatus, EventStream, ModelCard};
use forge_shared::telemetry::Metrics;
use forge_text::{ChatTemplate, HuggingFaceFiles, Tokenizer};
use futures::FutureExt;
use futures::future::{BoxFuture, join_all};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

/// Sends `max_tokens` tokens, one each `pace`, the first at once.
struct NullEngine {
    card: Arc<ModelCard>,
    pace: Duration,
}

impl EngineLink for NullEngine {
    fn submit(&self, request: GenerateRequest) -> BoxFuture<'_, Result<EventStream, AdmitError>> {
        let pace = self.pace;
        async move {
            let (sender, receiver) = mpsc::channel(64);
            tokio::spawn(async move {
                let completion_tokens = request.params.max_tokens;
                for position in 0..completion_tokens {
                    if position > 0 {
                        tokio::time::sleep(pace).await;
                    }
                    let event = TokenEvent { choice: 0, position, token: 65, text: " token".into(), logprobs: None };
                    if sender.send(EngineEvent::Token(event)).await.is_err() {
                        return;
                    }
                }
                let end = EngineEvent::Finished { choice: 0, reason: FinishReason::Length, text: String::new() };
                let usage = Usage { completion_tokens, ..Usage::default() };
                for event in [end, EngineEvent::Done(usage)] {
                    if sender.send(event).await.is_err() {
                        return;
                    }
                }
            });
            Ok(receiver)
        }
        .boxed()
    }

    fn card(&self) -> Arc<ModelCard> {
        self.card.clone()
    }

    fn status(&self) -> EngineStatus {
        EngineStatus { ready: true, ..EngineStatus::default() }
    }
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

async fn start(pace: Duration) -> Result<SocketAddr, Failure> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/text");
    let tokenizer = Tokenizer::from_hugging_face(&HuggingFaceFiles::read(&fixtures.join("byte_level"))?)?;
    let template = ChatTemplate::new(&std::fs::read_to_string(fixtures.join("templates/chatml.jinja"))?, BTreeMap::new())?;
    let card = ModelCard {
        name: "null".into(),
        names: vec!["null".into()],
        unlisted_names: Vec::new(),
        max_model_len: 1 << 20,
        vocab_size: 502,
        numerics_id: "null".into(),
        created_s: 0,
        default_sampling: DefaultSampling::default(),
    };
    let engine = NullEngine { card: Arc::new(card), pace };
    let config = GatewayConfig { port: 0, metrics_port: 0, ..GatewayConfig::default() };
    let listeners = Listeners::bind(&config).await?;
    let address = listeners.api();
    let model = ServedModel { link: Arc::new(engine), tokenizer, chat_template: Some(template) };
    let gateway = Gateway::new(config, vec![model], Metrics::new(), KeyRing::none())?;
    tokio::spawn(async move { gateway.serve(listeners, std::future::pending()).await });
    Ok(address)
}

fn request(max_tokens: u32) -> String {
    let body = format!(
        r#"{{"model":"null","messages":[{{"role":"system","content":"You are a helpful assistant."}},{{"role":"user","content":"What is the capital of France?"}}],"max_tokens":{max_tokens},"stream":true}}"#
    );
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// When each token of one stream came, since the request was sent.
async fn stream(connection: &mut TcpStream, request: &str) -> Result<Vec<Duration>, Failure> {
    let sent = Instant::now();
    connection.write_all(request.as_bytes()).await?;
    let mut arrivals = Vec::new();
    let mut buffer = Vec::new();
    let mut chunk = [0u8; 16 << 10];
    loop {
        let count = tokio::time::timeout(Duration::from_secs(60), connection.read(&mut chunk)).await??;
        if count == 0 {
            return Err(format!("the connection closed after {} tokens", arrivals.len()).into());
        }
        let at = sent.elapsed();
        buffer.extend_from_slice(&chunk[..count]);
        while let Some(end) = buffer.windows(2).position(|pair| pair == b"\n\n") {
            let event: Vec<u8> = buffer.drain(..end + 2).collect();
            if event.windows(6).any(|part| part == b" token") {
                arrivals.push(at);
            }
        }
        // The end of a chunked body.
        if buffer.ends_with(b"0\r\n\r\n") {
            return Ok(arrivals);
        }
    }
}

fn percentile(sorted: &[Duration], share: f64) -> Duration {
    sorted[((sorted.len() - 1) as f64 * share) as usize]
}

fn report(what: &str, mut times: Vec<Duration>) -> Duration {
    times.sort();
    let [p50, p99, worst] = [0.5, 0.99, 1.0].map(|share| percentile(&times, share));
    println!("{what}: p50 {p50:.1?}, p99 {p99:.1?}, worst {worst:.1?} over {}", times.len());
    p50
}

async fn first_token(address: SocketAddr, requests: usize) -> Result<Duration, Failure> {
    let mut connection = TcpStream::connect(address).await?;
    connection.set_nodelay(true)?;
    let request = request(1);
    for _ in 0..requests.min(100) {
        stream(&mut connection, &request).await?;
    }
    let mut times = Vec::with_capacity(requests);
    for _ in 0..requests {
        times.extend(stream(&mut connection, &request).await?.first().copied());
    }
    Ok(report("added time to first token", times))
}

async fn many_streams(address: SocketAddr, streams: usize, tokens: u32, pace: Duration) -> Result<(), Failure> {
    let request = request(tokens);
    let began = Instant::now();
    let runs = (0..streams).map(|_| {
        let request = request.clone();
        tokio::spawn(async move {
            let mut connection = TcpStream::connect(address).await?;
            connection.set_nodelay(true)?;
            stream(&mut connection, &request).await
        })
    });
    let mut first = Vec::new();
    let mut gaps = Vec::new();
    for run in join_all(runs).await {
        let arrivals = run??;
        if arrivals.len() != tokens as usize {
            return Err(format!("a stream ended after {} of {tokens} tokens", arrivals.len()).into());
        }
        first.push(arrivals[0]);
        gaps.extend(arrivals.windows(2).map(|pair| pair[1] - pair[0]));
    }
    let took = began.elapsed();
    let total = streams * tokens as usize;
    println!("{streams} streams of {tokens} tokens, one each {pace:?}: {took:.1?}, {:.0} tokens/s", total as f64 / took.as_secs_f64());
    report("  first token, all at once", first);
    report("  between tokens", gaps);
    Ok(())
}

async fn run(requests: usize, streams: usize, tokens: u32, pace: Duration) -> Result<bool, Failure> {
    let address = start(pace).await?;
    let added = first_token(address, requests).await?;
    many_streams(address, streams, tokens, pace).await?;
    Ok(added < Duration::from_millis(1))
}

fn main() -> ExitCode {
    let arguments: Vec<u64> = std::env::args().skip(1).map_while(|text| text.parse().ok()).collect();
    let argument = |at: usize, default: u64| arguments.get(at).copied().unwrap_or(default).clamp(1, 100_000);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let pace = Duration::from_millis(argument(3, 100));
    match runtime.block_on(run(argument(0, 2000) as usize, argument(1, 1000) as usize, argument(2, 50) as u32, pace)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("the added time to first token is over 1 ms");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{error}; with thousands of streams, raise the limit on open files (ulimit -n)");
            ExitCode::FAILURE
        }
    }
}
