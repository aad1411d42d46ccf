//! Keys, rate limits, CORS and idempotency.

use std::time::Duration;

use forge_gateway::{GatewayConfig, KeyLimits, KeyRing, KeyStore};
use hyper::Method;
use serde_json::{Value, json};

use super::engine::ScriptedEngine;
use super::{Answer, CHAT, COMPLETIONS, Server, get, loopback, post};

fn body() -> Value {
    json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "temperature": 1.5})
}

struct Keyed {
    _folder: tempfile::TempDir,
    store: KeyStore,
    server: Server,
}

impl Keyed {
    async fn start(limits: KeyLimits) -> (Keyed, String) {
        let folder = tempfile::tempdir().unwrap();
        let store = KeyStore::new(folder.path().join("keys.json"));
        let key = store.create("first", limits, 0).unwrap().plaintext;
        let ring = KeyRing::open(store.path()).unwrap();
        let server = Server::with(loopback(), ring, vec![ScriptedEngine::new("model", "n")]).await;
        (Keyed { _folder: folder, store, server }, key)
    }

    async fn post_with(&self, key: &str, body: &Value) -> Answer {
        let mut request = post(CHAT, body.to_string());
        request.headers_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
        Answer::read(self.server.send(request).await).await
    }
}

#[tokio::test]
async fn no_route_answers_without_a_key_once_keys_are_configured() {
    let (keyed, key) = Keyed::start(KeyLimits::default()).await;
    let routes = [
        (Method::POST, CHAT),
        (Method::POST, COMPLETIONS),
        (Method::GET, "/v1/models"),
        (Method::GET, "/v1/models/model"),
        (Method::POST, "/tokenize"),
        (Method::POST, "/detokenize"),
        (Method::GET, "/health/full"),
        (Method::GET, "/metrics"),
        (Method::GET, "/v1/anything"),
        (Method::DELETE, "/v1/models"),
        (Method::GET, "/"),
        (Method::GET, "/healthy"),
        (Method::GET, "/health/"),
        (Method::GET, "//health"),
    ];
    for (method, path) in routes {
        for authorization in [None, Some("Bearer sk-wrong"), Some("Bearer"), Some("Basic Zm9yZ2U6Zm9yZ2U=")] {
            let mut request = post(path, "{}");
            *request.method_mut() = method.clone();
            if let Some(value) = authorization {
                request.headers_mut().insert("authorization", value.parse().unwrap());
            }
            let answer = Answer::read(keyed.server.send(request).await).await;
            let error = answer.error(401);
            assert_eq!((&error["code"], answer.header("www-authenticate")), (&json!("invalid_api_key"), Some("Bearer")), "{method} {path}");
        }
    }
    for open in ["/health", "/health/ready"] {
        assert_eq!(keyed.server.get(open).await.status, 200, "{open}");
    }
    assert_eq!(keyed.post_with(&key, &body()).await.status, 200);
    let salt = keyed.server.engine().last().tenant.0;
    let id = &keyed.store.list().unwrap()[0].id;
    assert_eq!(&*salt, format!("key:{id}").as_bytes(), "prefixes are cached per key");
}

#[tokio::test]
async fn without_keys_any_key_is_accepted() {
    let server = Server::start().await;
    let mut request = post(CHAT, body().to_string());
    request.headers_mut().insert("authorization", "Bearer whatever".parse().unwrap());
    assert_eq!(server.send(request).await.status(), 200);
    let mut salted = body();
    salted["cache_salt"] = json!("room");
    server.post_json(CHAT, &salted).await;
    let room = server.engine().last().tenant.0;
    assert!(room.starts_with(b"anonymous/"));
    // The longest is as long as any, so that every worker takes it; and every salt is its own.
    salted["cache_salt"] = json!("r".repeat(256));
    server.post_json(CHAT, &salted).await;
    let long = server.engine().last().tenant.0;
    assert!(long != room && long.len() == room.len() && long.len() < 128, "{}", long.len());
}

#[tokio::test]
async fn a_key_may_not_go_before_the_others() {
    let (keyed, key) = Keyed::start(KeyLimits::default()).await;
    let mut urgent = body();
    for (priority, status) in [(-1, 400), (1, 400), (0, 200)] {
        urgent["priority"] = json!(priority);
        let answer = keyed.post_with(&key, &urgent).await;
        assert_eq!(answer.status, status, "{priority}");
        if status == 400 {
            let error = answer.error(400);
            assert_eq!((&error["param"], &error["code"]), (&json!("priority"), &json!("unsupported_value")));
        }
    }
    let alone = Server::start().await;
    urgent["priority"] = json!(-7);
    assert_eq!(alone.post_json(CHAT, &urgent).await.status, 200);
    assert_eq!(alone.engine().last().priority, 7);
}

#[tokio::test]
async fn a_keyless_server_answers_only_as_this_machine() {
    let as_host = |host: &str| {
        let mut request = post(CHAT, body().to_string());
        request.headers_mut().insert("host", host.parse().unwrap());
        request
    };
    let server = Server::start().await;
    for path in [CHAT, "/health", "/metrics", "/nothing"] {
        let mut request = as_host("rebound.example:8000");
        *request.uri_mut() = path.parse().unwrap();
        let error = Answer::read(server.send(request).await).await.error(403);
        let message = error["message"].as_str().unwrap();
        assert_eq!(error["code"], "host_not_allowed");
        assert!(message.contains("rebound.example:8000") && message.contains("forgectl keys create"), "{message}");
    }
    assert_eq!(server.send(as_host("127.0.0.1:8000")).await.status(), 200);
    assert!(server.engine().seen.lock().len() == 1, "nothing reached the engine before");

    let open = Server::with(GatewayConfig { insecure: true, ..loopback() }, KeyRing::none(), vec![ScriptedEngine::new("model", "n")]).await;
    assert_eq!(open.send(as_host("inference.internal")).await.status(), 200);

    let (keyed, key) = Keyed::start(KeyLimits::default()).await;
    let mut request = as_host("inference.internal");
    request.headers_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
    assert_eq!(keyed.server.send(request).await.status(), 200, "a key says who it is");
}

#[tokio::test]
async fn requests_per_minute_are_counted_per_key_with_headers() {
    let (keyed, key) = Keyed::start(KeyLimits { rpm: Some(2), tpm: None }).await;
    let first = keyed.post_with(&key, &body()).await;
    assert_eq!(first.status, 200);
    assert_eq!((first.header("x-ratelimit-limit-requests"), first.header("x-ratelimit-remaining-requests")), (Some("2"), Some("1")));
    assert!(first.header("x-ratelimit-reset-requests").unwrap().ends_with('s'));
    assert!(first.header("x-ratelimit-limit-tokens").is_none());
    keyed.post_with(&key, &body()).await;
    let third = keyed.post_with(&key, &body()).await;
    let error = third.error(429);
    assert_eq!((&error["code"], &error["type"]), (&json!("rate_limit_exceeded"), &json!("requests")));
    let seconds: u32 = third.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=30).contains(&seconds));
    assert_eq!(third.header("x-ratelimit-remaining-requests"), Some("0"));

    let other = keyed.store.create("second", KeyLimits::default(), 0).unwrap().plaintext;
    tokio::time::sleep(Duration::from_millis(600)).await;
    assert_eq!(keyed.post_with(&other, &body()).await.status, 200, "a key made while serving works, and has its own limits");
}

#[tokio::test]
async fn tokens_are_reserved_and_what_is_not_used_comes_back() {
    let (keyed, key) = Keyed::start(KeyLimits { rpm: None, tpm: Some(400) }).await;
    let mut large = body();
    large["max_tokens"] = json!(300);
    let answer = keyed.post_with(&key, &large).await;
    assert_eq!(answer.status, 200);
    let used = answer.json()["usage"]["total_tokens"].as_u64().unwrap();
    let remaining: u64 = keyed.post_with(&key, &json!({})).await.header("x-ratelimit-remaining-tokens").unwrap().parse().unwrap();
    assert!(remaining.abs_diff(400 - used) < 80, "{remaining} left after {used}");
    let refused = keyed.post_with(&key, &large).await;
    let error = refused.error(429);
    assert_eq!(error["type"], "tokens");
    let mut small = body();
    small["max_tokens"] = json!(1);
    assert_eq!(keyed.post_with(&key, &small).await.status, 200, "a refusal takes nothing");
}

#[tokio::test]
async fn origins_are_those_that_were_allowed() {
    let mut config = loopback();
    config.allowed_origins = vec!["https://app.example".into()];
    let server = Server::with(config, KeyRing::none(), vec![ScriptedEngine::new("model", "n")]).await;
    let preflight = |origin: &str| {
        let mut request = get(CHAT);
        *request.method_mut() = Method::OPTIONS;
        let headers = request.headers_mut();
        headers.insert("origin", origin.parse().unwrap());
        headers.insert("access-control-request-method", "POST".parse().unwrap());
        headers.insert("access-control-request-headers", "authorization,content-type,x-stainless-os".parse().unwrap());
        request
    };
    let allowed = Answer::read(server.send(preflight("https://app.example")).await).await;
    assert_eq!(allowed.status, 200);
    assert_eq!(allowed.header("access-control-allow-origin"), Some("https://app.example"));
    assert!(allowed.header("access-control-allow-headers").unwrap().contains("x-stainless-os"));
    let mut asked = get("/health");
    asked.headers_mut().insert("origin", "https://app.example".parse().unwrap());
    let answered = Answer::read(server.send(asked).await).await;
    assert!(answered.header("access-control-expose-headers").unwrap().contains("x-ratelimit-remaining-tokens"));
    let other = Answer::read(server.send(preflight("https://evil.example")).await).await;
    assert!(other.header("access-control-allow-origin").is_none());

    let closed = Server::start().await;
    let answer = Answer::read(closed.send(preflight("https://app.example")).await).await;
    assert!(answer.header("access-control-allow-origin").is_none());
    // What a page can send without asking first is refused.
    let mut simple = post(CHAT, body().to_string());
    simple.headers_mut().insert("content-type", "text/plain".parse().unwrap());
    Answer::read(closed.send(simple).await).await.error(415);
}

#[tokio::test]
async fn an_idempotency_key_gives_the_same_answer_and_refuses_another_body() {
    let server = Server::start().await;
    let send = async |key: &str, body: &Value| {
        let mut request = post(CHAT, body.to_string());
        request.headers_mut().insert("idempotency-key", key.parse().unwrap());
        Answer::read(server.send(request).await).await
    };
    let first = send("k-1", &body()).await.json();
    let seed = server.engine().last().seed;
    let second = send("k-1", &body()).await.json();
    assert_eq!((server.engine().last().seed, &second["choices"]), (seed, &first["choices"]));
    let mut other = body();
    other["max_tokens"] = json!(4);
    assert_eq!(send("k-1", &other).await.error(422)["code"], "idempotency_key_reused");
    send("k-2", &body()).await;
    assert_ne!(server.engine().last().seed, seed);
    server.post_json(CHAT, &body()).await;
    assert_ne!(server.engine().last().seed, seed);
    send("", &body()).await.error(400);
    // A request that is wrong does not use its key up.
    send("k-3", &json!({"messages": []})).await.error(400);
    assert_eq!(send("k-3", &body()).await.status, 200);
}
