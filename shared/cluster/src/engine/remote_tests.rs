//! The client of a remote replica against a scripted worker over real mTLS.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use forge_proto::engine as wire;
use forge_proto::engine::engine_server::{Engine, EngineServer};
use forge_shared::cluster::node::Role;
use forge_shared::generate::{
    AdmitError, Choice, EngineEvent, FinishReason, GenerateRequest, SamplingParams, TenantSalt, TokenEvent, Usage,
};
use forge_shared::ids::{Epoch, NodeId, ReplicaId, RequestId};
use forge_shared::link::{EngineStatus, ModelCard};
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tonic::{Request, Response, Status};

use super::reply::{EngineReply, ReplicaCard, card_to_wire, reply_to_wire, status_to_wire};
use super::request::{from_wire, replica_from_wire};
use super::{EngineDialer, EngineTarget, PrefixUpdate, RemoteDialer, ReplicaClient};
use crate::tls::{ClusterCa, Credentials, Identity, NODE_LIFETIME, NodeKey, Peer, SharedCredentials, TlsIncoming, clock_s};

const TEXT: &[u8] = b"{\"text\":1}";
const TIMEOUT: Duration = Duration::from_secs(10);

/// A worker whose answer is decided by the seed of the request.
#[derive(Clone, Default)]
struct Script {
    running: Arc<AtomicUsize>,
    frozen: Arc<AtomicBool>,
}

/// Counts a request for as long as its stream lives.
struct Running(Arc<AtomicUsize>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn token(position: u32) -> EngineReply {
    EngineReply::Event(EngineEvent::Token(TokenEvent { choice: 0, position, token: position, text: "x".into(), logprobs: None }))
}

fn message(replies: &[EngineReply]) -> Result<wire::EngineReply, Status> {
    Ok(wire::EngineReply { events: replies.iter().map(reply_to_wire).collect() })
}

type Out<T> = BoxStream<'static, Result<T, Status>>;

#[tonic::async_trait]
impl Engine for Script {
    type SubmitStream = Out<wire::EngineReply>;
    type WatchReplicaStream = Out<wire::ReplicaUpdate>;
    type ModelTextStream = Out<wire::TextChunk>;
    type LogsStream = Out<wire::EngineLogLine>;

    async fn submit(&self, request: Request<wire::SubmitRequest>) -> Result<Response<Self::SubmitStream>, Status> {
        Peer::require(&request, &[Role::Gateway])?;
        let submission = from_wire(request.into_inner())?;
        if submission.epoch != Epoch(3) {
            return Err(Status::failed_precondition("another epoch runs here"));
        }
        let admitted = EngineReply::Admitted { numerics_id: "n1".into() };
        let finished = EngineReply::Event(EngineEvent::Finished { choice: 0, reason: FinishReason::Length, text: String::new() });
        let done = EngineReply::Event(EngineEvent::Done(Usage { completion_tokens: 2, ..Usage::default() }));
        self.running.fetch_add(1, Ordering::SeqCst);
        let running = Running(self.running.clone());
        let answer: Out<wire::EngineReply> = match submission.request.seed {
            // All at once, and in two messages.
            0 => stream::iter([message(&[admitted, token(0)]), message(&[token(1), finished, done])]).boxed(),
            1 => stream::iter([message(&[EngineReply::Refused(AdmitError::Overloaded { waiting: 9, retry_after_s: 2 })])]).boxed(),
            // One token, then nothing for ever.
            2 => stream::iter([message(&[admitted, token(0)])]).chain(stream::pending()).boxed(),
            3 => stream::iter([message(&[admitted, token(0)]), Err(Status::internal("died"))]).boxed(),
            4 => stream::iter([
                message(&[admitted]),
                message(&[]),
                message(&[EngineReply::Refused(AdmitError::Unavailable { reason: "late".into() })]),
            ])
            .boxed(),
            _ => stream::iter([message(&[token(0)])]).boxed(),
        };
        let held = answer.inspect(move |_| {
            let _running = &running;
        });
        Ok(Response::new(held.boxed()))
    }

    async fn watch_replica(&self, request: Request<wire::WatchReplicaRequest>) -> Result<Response<Self::WatchReplicaStream>, Status> {
        let (_, epoch) = replica_from_wire(request.into_inner().replica.as_ref())?;
        if epoch != Epoch(3) {
            return Err(Status::failed_precondition("another epoch runs here"));
        }
        let card = ModelCard {
            name: "m".into(),
            names: vec!["m".into()],
            unlisted_names: Vec::new(),
            max_model_len: 64,
            vocab_size: 32,
            numerics_id: "n1".into(),
            created_s: 1,
            default_sampling: Default::default(),
        };
        let card = card_to_wire(&ReplicaCard { card: card.into(), text_digest: hex::encode(Sha256::digest(TEXT)), block_size: 16 });
        let status = status_to_wire(&EngineStatus { ready: true, ..EngineStatus::default() });
        let first = wire::ReplicaUpdate {
            card: Some(card),
            status: Some(status),
            blocks_stored: vec![1, 2],
            blocks_reset: true,
            ..Default::default()
        };
        let second = wire::ReplicaUpdate { blocks_stored: vec![3], blocks_removed: vec![1], ..Default::default() };
        Ok(Response::new(stream::iter([Ok(first), Ok(second)]).chain(stream::pending()).boxed()))
    }

    async fn model_text(&self, _: Request<wire::ModelTextRequest>) -> Result<Response<Self::ModelTextStream>, Status> {
        let total_bytes = TEXT.len() as u64;
        let chunks = TEXT.chunks(4).map(|data| Ok(wire::TextChunk { total_bytes, data: data.into() })).collect::<Vec<_>>();
        Ok(Response::new(stream::iter(chunks).boxed()))
    }

    async fn logs(&self, _: Request<wire::EngineLogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
}

struct Worker {
    script: Script,
    address: String,
    dialer: RemoteDialer,
    runtime: Option<Runtime>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.script.frozen.store(false, Ordering::SeqCst);
        self.kill();
    }
}

fn credentials(ca: &ClusterCa, role: Role, name: &str) -> SharedCredentials {
    let key = NodeKey::generate().unwrap();
    let identity = Identity::new(ca.cluster_id(), role, name).unwrap();
    let certificate = ca.sign(&key.signing_request_der().unwrap(), &identity, NODE_LIFETIME, clock_s()).unwrap();
    SharedCredentials::new(Credentials::from_pem(&certificate, &key.pem(), ca.certificate_pem()).unwrap())
}

impl Worker {
    async fn start() -> Self {
        let ca = ClusterCa::create("c1", clock_s()).unwrap();
        let (script, server) = (Script::default(), credentials(&ca, Role::Worker, "w1"));
        // One thread, so that a task that blocks it freezes the worker as SIGSTOP would.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let service = script.clone();
        let listening = runtime.spawn(async move {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap().to_string();
            let incoming = TlsIncoming::new(listener, &server).unwrap();
            tokio::spawn(tonic::transport::Server::builder().add_service(EngineServer::new(service)).serve_with_incoming(incoming));
            address
        });
        let dialer = RemoteDialer::new(credentials(&ca, Role::Gateway, "g1"), Duration::from_secs(60));
        Worker { script, address: listening.await.unwrap(), dialer, runtime: Some(runtime) }
    }

    fn dial(&self, epoch: u64) -> Arc<dyn ReplicaClient> {
        let replica = ReplicaId { service: "m".into(), index: 0 };
        self.dialer.dial(EngineTarget { node: NodeId::from("w1"), address: self.address.clone(), replica, epoch: Epoch(epoch) })
    }

    fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    fn freeze(&self) {
        let frozen = self.script.frozen.clone();
        frozen.store(true, Ordering::SeqCst);
        self.runtime.as_ref().unwrap().spawn(async move {
            while frozen.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(20));
            }
        });
    }

    async fn until_idle(&self) {
        until(|| self.script.running.load(Ordering::SeqCst) == 0).await;
    }
}

async fn until(condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(TIMEOUT, wait).await.expect("in time");
}

fn request(seed: u64) -> GenerateRequest {
    GenerateRequest {
        id: RequestId("r".into()),
        tenant: TenantSalt::anonymous(),
        prompt_tokens: vec![1].into(),
        choices: vec![Choice { index: 0, emitted_tokens: Vec::new() }],
        seed,
        params: SamplingParams::default(),
        priority: 0,
    }
}

#[tokio::test]
async fn status_card_text_and_prefixes_come() {
    let worker = Worker::start().await;
    let client = worker.dial(3);
    assert!(!client.status().ready);
    let mut prefixes = client.prefixes();
    until(|| client.status().ready).await;
    assert_eq!((client.card().max_model_len, client.block_size()), (64, 16));
    assert_eq!(client.model_text(TIMEOUT).await.unwrap(), TEXT);
    assert_eq!(prefixes.recv().await.unwrap(), PrefixUpdate { reset: true, ..Default::default() });
    assert_eq!(prefixes.recv().await.unwrap(), PrefixUpdate { reset: true, stored: vec![1, 2], removed: Vec::new() });
    assert_eq!(prefixes.recv().await.unwrap(), PrefixUpdate { reset: false, stored: vec![3], removed: vec![1] });
    let mut late = client.prefixes().recv().await.unwrap();
    late.stored.sort_unstable();
    assert_eq!(late, PrefixUpdate { reset: true, stored: vec![2, 3], removed: Vec::new() });
}

#[tokio::test]
async fn requests_are_answered_refused_and_lost() {
    let worker = Worker::start().await;
    let client = worker.dial(3);
    let mut events = client.submit(request(0)).await.unwrap();
    let mut count = 0;
    while let Some(event) = events.recv().await {
        count += 1;
        assert_eq!(matches!(event, EngineEvent::Done(_)), count == 4, "{event:?}");
    }
    assert_eq!(count, 4);
    assert_eq!(client.submit(request(1)).await.unwrap_err(), AdmitError::Overloaded { waiting: 9, retry_after_s: 2 });
    // Broken off, and against the protocol: the stream ends without `Done`.
    for (seed, tokens) in [(3, 1), (4, 0)] {
        let mut events = client.submit(request(seed)).await.unwrap();
        for _ in 0..tokens {
            assert!(matches!(events.recv().await, Some(EngineEvent::Token(_))));
        }
        assert_eq!(tokio::time::timeout(TIMEOUT, events.recv()).await.unwrap(), None);
    }
    // More than the wire takes is the request's fault, and no failure of the worker.
    let error = client.submit(GenerateRequest { tenant: TenantSalt(vec![0; 300].into()), ..request(0) }).await.unwrap_err();
    assert!(matches!(&error, AdmitError::Invalid(invalid) if invalid.actual.contains("tenant")), "{error}");
    let error = client.submit(request(5)).await.unwrap_err();
    assert!(error.to_string().contains("events before admission"), "{error}");
    worker.until_idle().await;
}

#[tokio::test]
async fn dropping_the_stream_cancels_at_the_worker() {
    let worker = Worker::start().await;
    let client = worker.dial(3);
    let mut events = client.submit(request(2)).await.unwrap();
    assert!(events.recv().await.is_some());
    assert_eq!(worker.script.running.load(Ordering::SeqCst), 1);
    drop(events);
    worker.until_idle().await;
}

/// What says that the way to the worker broke, and nothing of its engine.
fn broken() -> EngineEvent {
    EngineEvent::Failed { reason: "the connection to w1 broke".into(), retryable: true }
}

#[tokio::test]
async fn a_killed_worker_ends_its_streams() {
    let mut worker = Worker::start().await;
    let client = worker.dial(3);
    until(|| client.status().ready).await;
    let mut events = client.submit(request(2)).await.unwrap();
    assert!(events.recv().await.is_some());
    worker.kill();
    assert_eq!(tokio::time::timeout(TIMEOUT, events.recv()).await.unwrap(), Some(broken()));
    assert_eq!(events.recv().await, None);
    until(|| !client.status().ready).await;
    let refusal = client.submit(request(0)).await.unwrap_err();
    assert!(matches!(refusal, AdmitError::Unavailable { .. }));
    for text in [refusal.to_string(), client.status().reason] {
        assert!(text.contains("worker w1 does not answer (") && text.contains("stopped, overloaded or cut off"), "{text}");
        assert!(!text.contains("command") && !text.contains("coordinator"), "{text}");
    }
    assert!(refusal.to_string().ends_with("send the request again"), "{refusal}");
}

#[tokio::test]
async fn a_frozen_worker_is_noticed() {
    let worker = Worker::start().await;
    let client = worker.dial(3);
    until(|| client.status().ready).await;
    let mut events = client.submit(request(2)).await.unwrap();
    assert!(events.recv().await.is_some());
    worker.freeze();
    let began = Instant::now();
    assert_eq!(tokio::time::timeout(TIMEOUT, events.recv()).await.unwrap(), Some(broken()));
    let noticed = began.elapsed();
    // 500 ms to the next ping, 1.5 s for its answer, and a loaded machine's share.
    assert!(noticed < Duration::from_millis(3500), "{noticed:?}");
}

#[tokio::test]
async fn another_epoch_and_another_worker_are_never_ready() {
    let worker = Worker::start().await;
    let client = worker.dial(4);
    until(|| client.status().reason.contains("another epoch")).await;
    assert!(matches!(client.submit(request(0)).await.unwrap_err(), AdmitError::Unavailable { .. }));
    let replica = ReplicaId { service: "m".into(), index: 0 };
    let other = worker.dialer.dial(EngineTarget {
        node: NodeId::from("w2"),
        address: worker.address.clone(),
        replica: replica.clone(),
        epoch: Epoch(3),
    });
    until(|| other.status().reason.contains("not w2.worker.forge")).await;
    let nowhere = worker.dialer.dial(EngineTarget { node: NodeId::from("w3"), address: "no address".into(), replica, epoch: Epoch(3) });
    until(|| nowhere.status().reason.contains("host:port")).await;
}
