//! A gateway in a cluster: replicas, keys, limits and idempotency keys come from the coordinators.

use std::sync::Arc;
use std::time::Duration;

use forge_cluster::config::GatewayFile;
use forge_gateway::clock::Clock;
use forge_gateway::cluster::{ClusterMember, MemberParts, Shares};
use forge_gateway::keys::KeyRecord;
use forge_gateway::prefix_index::PromptBlocks;
use forge_gateway::{Gateway, GatewayConfig, KeyLimits, KeyRing, Listeners};
use forge_shared::cluster::event::Object;
use forge_shared::cluster::session::KeyShare;
use forge_shared::ids::Epoch;
use forge_shared::telemetry::Metrics;
use http_body_util::Full;
use hyper::Request;
use serde_json::{Value, json};

use super::engine::{Fate, ScriptedEngine};
use super::scripted_cluster::{ScriptedCluster, ScriptedWorkers, gateway_spec, node, service, service_since};
use super::{Answer, CHAT, COMPLETIONS, NOW_S, Server, eventually, loopback};

/// Each gateway's clock differs, as real ones do.
struct ClockAt(u64);

impl Clock for ClockAt {
    fn unix_s(&self) -> u64 {
        self.0
    }
}

struct Clustered {
    server: Server,
    shares: Arc<Shares>,
    _member: ClusterMember,
}

async fn join(cluster: &Arc<ScriptedCluster>, workers: &Arc<ScriptedWorkers>, name: &str, clock_s: u64) -> Clustered {
    let config = loopback();
    let listeners = Listeners::bind(&config).await.expect("loopback has free ports");
    let (api, probes) = (listeners.api(), listeners.metrics());
    let shares = Arc::new(Shares::default());
    let keys = KeyRing::told(shares.clone());
    let metrics = Metrics::new();
    let gateway = Gateway::empty(config, metrics.clone(), keys.clone(), Arc::new(ClockAt(clock_s))).expect("a valid configuration");
    let spec = gateway_spec(name);
    let parts = MemberParts { api: cluster.clone(), dialer: workers.clone(), spec, keys, shares: shares.clone(), built_texts: None };
    let member = gateway.join(parts);
    tokio::time::timeout(Duration::from_secs(5), member.known()).await.expect("the cluster is told");
    let served = gateway.clone();
    let (stop, stopped) = tokio::sync::oneshot::channel();
    let serving = tokio::spawn(async move {
        let shutdown = async {
            // A sender that is gone means the same as one that sent.
            let _ = stopped.await;
        };
        served.serve(listeners, shutdown).await.expect("the listeners work");
    });
    let server = Server { engines: Vec::new(), gateway, metrics, api, probes, stop: Some(stop), serving };
    Clustered { server, shares, _member: member }
}

fn workers(names: &[&str]) -> Arc<ScriptedWorkers> {
    let workers = ScriptedWorkers::default();
    for name in names {
        workers.engines.lock().insert((*name).to_owned(), ScriptedEngine::new("model", "numerics-1"));
    }
    Arc::new(workers)
}

fn engine(workers: &ScriptedWorkers, name: &str) -> Arc<ScriptedEngine> {
    workers.engines.lock()[name].clone()
}

async fn ready(server: &Server) {
    for _ in 0..500 {
        if server.get("/health/ready?model=model").await.status == 200 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("no model became ready: {}", server.get("/health/ready").await.text);
}

fn body(stream: bool) -> Value {
    json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "seed": 5, "stream": stream})
}

fn texts(answer: &Answer) -> String {
    assert!(answer.is_done(), "{}", answer.text);
    answer.streamed_text(0)
}

#[tokio::test]
async fn models_come_with_their_replicas_and_a_stream_goes_on_at_a_new_one() {
    let (cluster, workers) = (Arc::new(ScriptedCluster::default()), workers(&["a", "b"]));
    cluster.tell(vec![node("a"), node("b")]).await;
    let gateway = join(&cluster, &workers, "gw", NOW_S).await;
    assert_eq!(gateway.server.get("/v1/models").await.json()["data"], json!([]));
    gateway.server.post_json(CHAT, &body(false)).await.error(503);

    cluster.tell(vec![service("s", &[("a", 1)])]).await;
    ready(&gateway.server).await;
    let undisturbed = texts(&gateway.server.post_json(CHAT, &body(true)).await);

    // The worker dies in the middle of an answer, and the replica is planned anew elsewhere, a moment later.
    engine(&workers, "a").fates([Fate::DiesAndRestarts(4, Duration::from_secs(60))]);
    let replaced = async {
        eventually("the engine is away", || !engine(&workers, "a").script.lock().ready).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        cluster.tell(vec![service("s", &[("b", 2)])]).await;
    };
    let request = body(true);
    let (answer, ()) = tokio::join!(gateway.server.post_json(CHAT, &request), replaced);
    assert_eq!(texts(&answer), undisturbed);
    assert_eq!(engine(&workers, "b").seen.lock().len(), 1);
    assert_eq!(engine(&workers, "b").last().choices[0].emitted_tokens.len(), 4);

    // The coordinators learn what requests go to.
    eventually("it is told", || *cluster.served.lock() == [("s".into(), vec![Epoch(2)])].into()).await;

    let epochs: Vec<u64> = workers.dialed.lock().iter().map(|target| target.epoch.0).collect();
    assert_eq!(epochs, [1, 2]);
    cluster.tell(vec![service("s", &[])]).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    gateway.server.post_json(CHAT, &body(false)).await.error(503);
    assert_eq!(gateway.server.get("/v1/models/model").await.status, 200, "the service is wanted, so its model stays listed");
}

#[tokio::test]
async fn a_stream_goes_on_at_a_new_replica_that_has_less_context() {
    let (cluster, workers) = (Arc::new(ScriptedCluster::default()), workers(&["a"]));
    workers.engines.lock().insert("b".into(), ScriptedEngine::with_context("model", "numerics-1", 256));
    let unbounded = json!({"messages": [{"role": "user", "content": "Hi"}], "seed": 5, "stream": true});
    cluster.tell(vec![node("a"), node("b")]).await;
    let gateway = join(&cluster, &workers, "gw", NOW_S).await;
    for (round, request) in [body(true), unbounded].into_iter().enumerate() {
        let epoch = 2 * round as u64 + 1;
        engine(&workers, "a").script.lock().ready = true;
        cluster.tell(vec![service("s", &[("a", epoch)])]).await;
        eventually("it is dialed", || workers.dialed.lock().len() as u64 == epoch).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        ready(&gateway.server).await;
        let undisturbed = texts(&gateway.server.post_json(CHAT, &request).await);
        engine(&workers, "a").fates([Fate::DiesAndRestarts(4, Duration::from_secs(60))]);
        let replaced = async {
            eventually("the engine is away", || !engine(&workers, "a").script.lock().ready).await;
            cluster.tell(vec![service("s", &[("b", epoch + 1)])]).await;
        };
        let (answer, ()) = tokio::join!(gateway.server.post_json(CHAT, &request), replaced);
        let answer = texts(&answer);
        let replay = engine(&workers, "b").last();
        assert_eq!(replay.choices[0].emitted_tokens.len(), 4);
        match round {
            0 => assert_eq!(answer, undisturbed),
            // What the client did not bound ends where the context does.
            _ => {
                assert_eq!(replay.params.max_tokens as usize, 256 - replay.prompt_tokens.len());
                let said = answer.strip_suffix('!').expect("it ended");
                assert!(undisturbed.starts_with(said) && said.len() < undisturbed.len() - 1, "{answer}");
            }
        }
    }
}

#[tokio::test]
async fn a_stream_that_all_replicas_left_have_too_little_context_for_ends_with_the_reason() {
    let (cluster, workers) = (Arc::new(ScriptedCluster::default()), workers(&["a"]));
    workers.engines.lock().insert("b".into(), ScriptedEngine::with_context("model", "numerics-1", 256));
    let request = json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 300, "seed": 5, "stream": true});
    cluster.tell(vec![node("a"), node("b"), service("s", &[("a", 1)])]).await;
    let gateway = join(&cluster, &workers, "gw", NOW_S).await;
    ready(&gateway.server).await;
    engine(&workers, "a").fates([Fate::DiesAndRestarts(4, Duration::from_secs(60))]);
    let replaced = async {
        eventually("the engine is away", || !engine(&workers, "a").script.lock().ready).await;
        cluster.tell(vec![service("s", &[("b", 2)])]).await;
    };
    let began = std::time::Instant::now();
    let (answer, ()) = tokio::join!(gateway.server.post_json(CHAT, &request), replaced);
    let error = answer.events().pop().expect("an event")["error"].clone();
    assert_eq!((&error["code"], &error["param"]), (&json!("context_length_exceeded"), &json!("max_tokens")), "{}", answer.text);
    assert!(error["message"].as_str().is_some_and(|message| message.contains("context of 256 tokens")), "{error}");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    assert!(engine(&workers, "b").seen.lock().is_empty());
}

#[tokio::test]
async fn two_services_of_one_name_cost_the_younger_its_name_and_nobody_else_anything() {
    let (cluster, workers) = (Arc::new(ScriptedCluster::default()), workers(&["a", "b"]));
    workers.engines.lock().insert("c".into(), ScriptedEngine::new("other", "numerics-1"));
    cluster.tell(vec![node("a"), node("b"), node("c"), service_since(7, "older", &[("a", 1)])]).await;
    let gateway = join(&cluster, &workers, "gw", NOW_S).await;
    ready(&gateway.server).await;
    // It sorts before the older one, and its engine has the same name.
    cluster.tell(vec![service_since(8, "a-younger", &[("b", 1)])]).await;
    eventually("it is dialed", || workers.dialed.lock().len() == 2).await;
    // What is applied after the clash is served all the same.
    cluster.tell(vec![service_since(9, "third", &[("c", 1)])]).await;
    for _ in 0..500 {
        if gateway.server.get("/health/ready?model=other").await.status == 200 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for _ in 0..8 {
        assert_eq!(gateway.server.post_json(CHAT, &body(false)).await.status, 200);
    }
    assert_eq!((engine(&workers, "a").seen.lock().len(), engine(&workers, "b").seen.lock().len()), (8, 0));
    let listed = gateway.server.get("/v1/models").await.json();
    let listed: Vec<&str> = listed["data"].as_array().expect("a list").iter().filter_map(|model| model["id"].as_str()).collect();
    assert_eq!(listed, ["model", "model-alias", "other", "other-alias"]);
    // Once the older one is gone, the name is the younger one's.
    let mut gone = service_since(7, "older", &[]);
    if let Object::Service(record) = &mut gone {
        record.is_deleted = true;
    }
    cluster.tell(vec![gone]).await;
    for _ in 0..500 {
        if gateway.server.post_json(CHAT, &body(false)).await.status == 200 && !engine(&workers, "b").seen.lock().is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the younger service never got the name");
}

#[tokio::test]
async fn a_service_may_have_two_versions_of_one_name_while_a_change_is_rolled_out() {
    let (cluster, workers) = (Arc::new(ScriptedCluster::default()), workers(&["a", "b"]));
    workers.engines.lock().insert("c".into(), ScriptedEngine::with_context("model", "numerics-1", 256));
    cluster.tell(vec![node("a"), node("b"), node("c"), service("s", &[("a", 1), ("b", 2)])]).await;
    let gateway = join(&cluster, &workers, "gw", NOW_S).await;
    ready(&gateway.server).await;
    // One of two replicas is of the new wish: of another context, under the same name.
    cluster.tell(vec![service("s", &[("a", 1), ("c", 3)])]).await;
    eventually("it is dialed", || workers.dialed.lock().len() == 3).await;
    engine(&workers, "a").script.lock().ready = false;
    ready(&gateway.server).await;
    assert_eq!(gateway.server.post_json(CHAT, &body(false)).await.status, 200);
    assert_eq!(engine(&workers, "c").seen.lock().len(), 1);
    assert_eq!(gateway.server.get("/v1/models").await.json()["data"].as_array().map(Vec::len), Some(2));
}

#[tokio::test]
async fn serving_goes_on_while_no_coordinator_answers() {
    let (cluster, workers) = (Arc::new(ScriptedCluster::default()), workers(&["a"]));
    cluster.tell(vec![node("a"), service("s", &[("a", 1)])]).await;
    let gateway = join(&cluster, &workers, "gw", NOW_S).await;
    ready(&gateway.server).await;
    *cluster.away.lock() = true;
    let keyed = |key: &str| {
        Request::post(CHAT)
            .header("content-type", "application/json")
            .header("host", "localhost")
            .header("idempotency-key", key)
            .body(Full::from(body(true).to_string()))
            .expect("a valid request")
    };
    let first = texts(&Answer::read(gateway.server.send(keyed("k")).await).await);
    assert_eq!(texts(&Answer::read(gateway.server.send(keyed("k")).await).await), first);
    // What this gateway remembers alone names the numerics too.
    workers.engines.lock().insert("b".into(), ScriptedEngine::new("model", "numerics-2"));
    cluster.tell(vec![node("b"), service("s", &[("b", 2)])]).await;
    eventually("the new replica is dialed", || workers.dialed.lock().len() == 2).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(gateway.server.post_json(CHAT, &body(true)).await.status, 200);
    let refused = Answer::read(gateway.server.send(keyed("k")).await).await.error(503);
    assert!(refused["message"].as_str().is_some_and(|message| message.contains("other numerics")), "{refused}");
}

#[tokio::test]
async fn a_request_goes_where_its_prompt_is_cached() {
    let (cluster, workers) = (Arc::new(ScriptedCluster::default()), workers(&["a", "b", "c"]));
    cluster.tell(vec![node("a"), node("b"), node("c"), service("s", &[("a", 1), ("b", 2), ("c", 3)])]).await;
    let long = "The quick brown fox jumps over the lazy dog. ".repeat(8);
    let request = json!({"prompt": long, "max_tokens": 2, "seed": 1});
    let first = join(&cluster, &workers, "gw", NOW_S).await;
    ready(&first.server).await;
    first.server.post_json(COMPLETIONS, &request).await;
    let seen = ["a", "b", "c"].map(|name| engine(&workers, name).seen.lock().first().cloned());
    let (at, generate) = seen.iter().enumerate().find_map(|(at, request)| Some((at, request.clone()?))).expect("one was asked");
    // Another node says that it has the prompt.
    let other = ["a", "b", "c"][(at + 1) % 3];
    let blocks = PromptBlocks::of(&generate, "numerics-1", 16);
    workers.cached.lock().insert(other.to_owned(), blocks.hashes().to_vec());
    let second = join(&cluster, &workers, "gw2", NOW_S).await;
    ready(&second.server).await;
    eventually("all are dialed", || workers.dialed.lock().len() == 6).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    second.server.post_json(COMPLETIONS, &request).await;
    assert_eq!(engine(&workers, other).seen.lock().len(), 1);
}

#[tokio::test]
async fn another_gateway_answers_a_retry_with_the_same_tokens() {
    let (cluster, workers) = (Arc::new(ScriptedCluster::default()), workers(&["a", "b"]));
    cluster.tell(vec![node("a"), node("b"), service("s", &[("a", 1), ("b", 2)])]).await;
    let first = join(&cluster, &workers, "gw1", NOW_S).await;
    // An hour later by its own clock: the template must still be rendered with the first one's.
    let second = join(&cluster, &workers, "gw2", NOW_S + 3600).await;
    ready(&first.server).await;
    ready(&second.server).await;
    let keyed = |content: &str| {
        let body = json!({"messages": [{"role": "user", "content": content}], "max_tokens": 12, "stream": true, "temperature": 1.0});
        Request::post(CHAT)
            .header("content-type", "application/json")
            .header("host", "localhost")
            .header("idempotency-key", "order-7")
            .body(Full::from(body.to_string()))
            .expect("a valid request")
    };
    // A try while nothing is ready binds the key to nothing.
    for name in ["a", "b"] {
        engine(&workers, name).script.lock().ready = false;
    }
    Answer::read(second.server.send(keyed("Too early")).await).await.error(503);
    for name in ["a", "b"] {
        engine(&workers, name).script.lock().ready = true;
    }
    let one = texts(&Answer::read(first.server.send(keyed("Hi")).await).await);
    let two = texts(&Answer::read(second.server.send(keyed("Hi")).await).await);
    assert_eq!(one, two);
    Answer::read(second.server.send(keyed("Other")).await).await.error(422);
    // Once no replica of the same numerics is left, other tokens must not be given out under this key.
    for name in ["a", "b"] {
        let other = ScriptedEngine::new("model", "numerics-2");
        workers.engines.lock().insert(name.to_owned(), other);
    }
    cluster.tell(vec![service("s", &[("a", 11), ("b", 12)])]).await;
    eventually("the new replicas are dialed", || workers.dialed.lock().len() == 8).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let refused = Answer::read(second.server.send(keyed("Hi")).await).await.error(503);
    assert!(refused["message"].as_str().is_some_and(|message| message.contains("other numerics")), "{refused}");
}

#[tokio::test]
async fn keys_and_shares_of_their_limits_come_from_the_cluster() {
    let (cluster, workers) = (Arc::new(ScriptedCluster::default()), workers(&["a"]));
    let created = KeyRecord::generate("team", KeyLimits { rpm: Some(60), tpm: None }, NOW_S).expect("a key");
    let free = KeyRecord::generate("free", KeyLimits::default(), NOW_S).expect("a key");
    let object = |record: &KeyRecord| Object::Key(Box::new(record.clone().into()));
    cluster.tell(vec![node("a"), service("s", &[("a", 1)]), object(&created.record), object(&free.record)]).await;
    cluster.shares.lock().push(KeyShare { key_id: created.record.id.clone(), rpm: Some(2), tpm: None });
    let gateway = join(&cluster, &workers, "gw", NOW_S).await;
    let with = |key: &str| {
        Request::post(CHAT)
            .header("content-type", "application/json")
            .header("authorization", format!("Bearer {key}"))
            .body(Full::from(body(false).to_string()))
            .expect("a valid request")
    };
    gateway.server.post_json(CHAT, &body(false)).await.error(401);
    let mut served = false;
    for _ in 0..200 {
        served |= Answer::read(gateway.server.send(with(&free.plaintext)).await).await.status == 200;
        if served {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(served);
    let mut statuses = Vec::new();
    for _ in 0..200 {
        let status = Answer::read(gateway.server.send(with(&created.plaintext)).await).await.status.as_u16();
        statuses.push(status);
        if status == 429 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    statuses.retain(|status| *status != 503);
    assert_eq!(statuses, [200, 200, 429], "two of this gateway's share, whatever the key's whole limit");
    assert_eq!(Answer::read(gateway.server.send(with(&free.plaintext)).await).await.status, 200);

    // A share of nothing is no share, whatever the key's whole limit.
    let none = KeyRecord::generate("none", KeyLimits { rpm: Some(60), tpm: None }, NOW_S).expect("a key");
    cluster.tell(vec![object(&none.record)]).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    gateway.shares.grant(vec![KeyShare { key_id: none.record.id.clone(), rpm: Some(0), tpm: None }]);
    let refused = Answer::read(gateway.server.send(with(&none.plaintext)).await).await;
    refused.error(429);
    assert_eq!(refused.header("x-ratelimit-limit-requests"), Some("0"));

    let mut revoked = free.record.clone();
    revoked.revoked_s = Some(NOW_S);
    cluster.tell(vec![object(&revoked)]).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    Answer::read(gateway.server.send(with(&free.plaintext)).await).await.error(401);
}

#[test]
fn every_example_of_a_gateway_s_file_is_loaded() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../cluster-configs");
    let mut loaded = 0;
    for cluster in std::fs::read_dir(folder).expect("the examples are there").map(|entry| entry.expect("readable").path()) {
        let files = std::fs::read_dir(&cluster).into_iter().flatten().map(|entry| entry.expect("readable").path());
        for path in files.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("gateway"))) {
            let file: GatewayFile<GatewayConfig> = forge_cluster::config::load(Some(&path), &[]).unwrap_or_else(|error| panic!("{error}"));
            file.gateway.check(true).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            loaded += 1;
        }
    }
    assert!(loaded >= 4, "{loaded}");
    let typo = forge_cluster::config::load::<GatewayFile<GatewayConfig>>(None, &["gateway.prot=1".into()]).expect_err("a typo");
    assert!(format!("{typo} {:?}", typo.help()).contains("port"), "{typo}");
}
