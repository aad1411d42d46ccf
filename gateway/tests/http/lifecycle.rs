//! Probes, drain, capacity, ports.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use forge_gateway::{Gateway, GatewayError, KeyRing, Listeners};
use forge_shared::telemetry::Metrics;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::engine::{Fate, ScriptedEngine};
use super::{Answer, CHAT, Server, eventually, loopback, post};

fn body(max_tokens: u32) -> Value {
    json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": max_tokens, "stream": true, "seed": 1})
}

#[tokio::test]
async fn probes_tell_alive_from_ready_from_answering() {
    let server = Server::start().await;
    for path in ["/livez", "/readyz", "/readyz?model=model-alias", "/healthz", "/healthz?deep=1"] {
        assert_eq!(server.probe(path).await.status, 200, "{path}");
    }
    for path in ["/health", "/health/ready", "/health/full"] {
        assert_eq!(server.get(path).await.status, 200, "{path}");
    }
    let deep = server.get("/health/full").await.json();
    assert_eq!((&deep["status"], &deep["probes"]["model"]["ok"]), (&json!("ready"), &json!(true)));
    server.probe("/readyz?model=other").await.error(404);
    server.probe("/nothing").await.error(404);
    assert!(server.post_json(CHAT, &body(1)).await.is_done());
    for page in [server.probe("/metrics").await, server.get("/metrics").await] {
        assert!(page.header("content-type").unwrap().starts_with("application/openmetrics-text"));
        assert!(page.text.contains("forge_requests_in_progress{model_name=\"model\"} 0\n"), "{}", page.text);
        assert!(page.text.ends_with("# EOF\n"));
    }

    server.engine().script.lock().ready = false;
    let ready = server.probe("/readyz").await;
    assert_eq!((ready.status.as_u16(), ready.json()["models"][0]["replicas"][0]["reason"].as_str()), (503, Some("restarting")));
    assert_eq!(server.get("/health/ready").await.status, 503);
    assert_eq!(
        (server.probe("/livez").await.status, server.get("/health").await.status),
        (200.try_into().unwrap(), 200.try_into().unwrap())
    );
}

#[tokio::test]
async fn a_deep_probe_sees_an_engine_that_is_ready_and_says_nothing() {
    let mut config = loopback();
    config.timeouts.probe_s = 1;
    let server = Server::with(config, KeyRing::none(), vec![ScriptedEngine::new("model", "n")]).await;
    server.engine().fates([Fate::Hangs(0)]);
    let began = Instant::now();
    let answer = server.probe("/healthz?deep=1").await;
    assert_eq!((answer.status.as_u16(), answer.json()["status"].as_str()), (503, Some("unavailable")));
    assert!(began.elapsed() < Duration::from_secs(9));
    let probes = server.engine().seen.lock().len();
    server.probe("/healthz?deep=1").await;
    assert_eq!(server.engine().seen.lock().len(), probes, "the last result stands for a second");
}

#[tokio::test]
async fn drain_finishes_what_runs_and_admits_nothing() {
    let mut server = Server::start().await;
    server.engine().script.lock().pace = Duration::from_millis(20);
    let response = server.send(post(CHAT, body(30).to_string())).await;
    server.stop.take().unwrap().send(()).unwrap();
    eventually("it drains", || server.gateway.in_flight() == 1).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let refused = server.post_json(CHAT, &body(1)).await;
    refused.error(503);
    assert!(refused.header("retry-after").is_some());
    assert_eq!(server.probe("/readyz").await.json()["status"], "draining");
    assert_eq!(server.probe("/livez").await.status, 200);
    let answer = Answer::read(response).await;
    assert!(answer.is_done(), "{}", answer.text);
    tokio::time::timeout(Duration::from_secs(5), server.serving).await.expect("serving ends").unwrap();
    assert!(tokio::net::TcpStream::connect(server.api).await.is_err(), "the port is free");
}

#[tokio::test]
async fn the_drain_deadline_breaks_off_with_an_error_event() {
    let mut config = loopback();
    config.timeouts.drain_s = 1;
    let mut server = Server::with(config, KeyRing::none(), vec![ScriptedEngine::new("model", "n")]).await;
    server.engine().fates([Fate::Hangs(3)]);
    let response = server.send(post(CHAT, body(30).to_string())).await;
    server.stop.take().unwrap().send(()).unwrap();
    let answer = Answer::read(response).await;
    assert!(!answer.is_done());
    assert_eq!(answer.events().pop().unwrap()["error"]["type"], "service_unavailable_error");
    tokio::time::timeout(Duration::from_secs(5), server.serving).await.expect("serving ends").unwrap();
}

#[tokio::test]
async fn more_than_the_capacity_is_429() {
    let mut config = loopback();
    config.limits.concurrent_requests = 1;
    let server = Server::with(config, KeyRing::none(), vec![ScriptedEngine::new("model", "n")]).await;
    server.engine().fates([Fate::Hangs(1)]);
    let mut first = server.send(post(CHAT, body(5).to_string())).await;
    first.body_mut().frame().await.unwrap().unwrap();
    let second = server.post_json(CHAT, &body(5)).await;
    assert_eq!((second.error(429)["code"].as_str(), second.header("retry-after")), (Some("overloaded"), Some("1")));
    drop(first);
    eventually("the seat is free", || server.gateway.in_flight() == 0).await;
    assert!(server.post_json(CHAT, &body(5)).await.is_done());
}

#[tokio::test]
async fn slow_heads_and_bodies_are_cut_off() {
    let mut config = loopback();
    config.timeouts.head_s = 1;
    config.timeouts.body_s = 1;
    let server = Server::with(config, KeyRing::none(), vec![ScriptedEngine::new("model", "n")]).await;
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{";
    for (sent, status) in [("POST /v1", ""), (head, "HTTP/1.1 408")] {
        let mut stream = tokio::net::TcpStream::connect(server.api).await.unwrap();
        stream.write_all(sent.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let read = tokio::time::timeout(Duration::from_secs(5), stream.read_to_string(&mut answer)).await;
        assert!(read.is_ok(), "the connection is closed");
        assert!(answer.starts_with(status), "{answer}");
    }
    assert_eq!(server.get("/health").await.status, 200);
}

#[tokio::test]
async fn a_port_in_use_is_named_with_the_remedy() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut config = loopback();
    config.port = taken.local_addr().unwrap().port();
    let error = Listeners::bind(&config).await.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, GatewayError::PortInUse { flag: "--port", .. }));
    assert!(text.contains(&config.port.to_string()) && text.contains("in use") && text.contains("--port"), "{text}");
    config.metrics_port = std::mem::replace(&mut config.port, 0);
    assert!(matches!(Listeners::bind(&config).await, Err(GatewayError::PortInUse { flag: "--metrics-port", .. })));
}

#[tokio::test]
async fn models_of_one_name_twice_and_none_at_all_are_refused() {
    let none = Gateway::new(loopback(), vec![], Metrics::new(), KeyRing::none());
    assert!(matches!(none, Err(GatewayError::Config { .. })));
    let served = |name: &str| forge_gateway::ServedModel {
        link: ScriptedEngine::new(name, "n"),
        tokenizer: super::tokenizer(),
        chat_template: None,
    };
    let clash = Gateway::new(loopback(), vec![served("a"), served("a-alias")], Metrics::new(), KeyRing::none());
    assert!(clash.is_err_and(|error| error.to_string().contains("a-alias")));
}
