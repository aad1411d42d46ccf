//! The engine service over real mTLS: the same tokens as in process, cancellation, stale epochs, wrong roles.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Models, Node, generate, request, until};
use forge_cluster::engine::{EngineDialer, EngineTarget, RemoteDialer, ReplicaClient};
use forge_cluster::tls::{ClusterCa, Credentials, Identity, NodeKey, SharedCredentials};
use forge_proto::engine as wire;
use forge_proto::engine::engine_client::EngineClient;
use forge_shared::cluster::node::Role;
use forge_shared::cluster::service::ReplicaPhase;
use forge_shared::generate::{AdmitError, EngineEvent};
use forge_shared::ids::{Epoch, NodeId, ReplicaId, ServiceName};
use forge_shared::link::EngineLink;
use forge_text::{ModelText, PrefixHasher};
use forge_worker::logs::{LogLine, LogRing};
use forge_worker::service::{EngineService, LocalDialer, serve};
use tokio::net::TcpListener;
use tonic::Code;

const TIMEOUT: Duration = Duration::from_secs(30);

struct Cluster {
    ca: ClusterCa,
    models: Models,
    node: Node,
    address: String,
    logs: Arc<LogRing>,
}

impl Cluster {
    async fn start() -> Self {
        let now_s = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs();
        let ca = ClusterCa::create("c1", now_s).expect("a CA");
        let models = Models::new();
        let mut node = Node::start("w1", &models, 1 << 30).await;
        node.assign(vec![models.assignment(models.service("s", "llama"), 0, 3, "w1")]);
        node.wait("s/0", 3, ReplicaPhase::Ready).await;
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound").to_string();
        let logs = Arc::new(LogRing::default());
        let service = EngineService::new(node.worker.board.clone(), logs.clone());
        let cluster = Cluster { ca, models, node, address, logs };
        let credentials = cluster.credentials(Role::Worker, "w1");
        tokio::spawn(async move { serve(listener, &credentials, service, std::future::pending()).await });
        cluster
    }

    fn credentials(&self, role: Role, name: &str) -> SharedCredentials {
        let now_s = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs();
        let key = NodeKey::generate().expect("a key");
        let identity = Identity::new("c1", role, name).expect("a name");
        let request = key.signing_request_der().expect("a request");
        let certificate = self.ca.sign(&request, &identity, Duration::from_secs(3600), now_s).expect("signed");
        SharedCredentials::new(Credentials::from_pem(&certificate, &key.pem(), self.ca.certificate_pem()).expect("whole"))
    }

    fn target(&self, epoch: u64) -> EngineTarget {
        EngineTarget {
            node: NodeId::from("w1"),
            address: self.address.clone(),
            replica: ReplicaId { service: ServiceName::from("s"), index: 0 },
            epoch: Epoch(epoch),
        }
    }

    /// A gateway's client.
    async fn dial(&self, epoch: u64) -> Arc<dyn ReplicaClient> {
        let dialer = RemoteDialer::new(self.credentials(Role::Gateway, "g1"), TIMEOUT);
        dialer.dial(self.target(epoch))
    }

    async fn raw(&self, role: Role) -> EngineClient<tonic::transport::Channel> {
        let peer = forge_cluster::tls::PeerName::One(Role::Worker, "w1".into());
        let channel = forge_cluster::tls::channel(&self.address, &peer, &self.credentials(role, "x"), Default::default());
        EngineClient::new(channel.expect("an address"))
    }
}

fn reference(epoch: u64) -> Option<wire::ReplicaRef> {
    Some(wire::ReplicaRef { replica: "s/0".into(), epoch })
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_and_texts_over_the_wire_are_those_of_the_process() {
    let cluster = Cluster::start().await;
    let remote = cluster.dial(3).await;
    until("the client is ready", || remote.status().ready).await;
    let local = LocalDialer::new(cluster.node.worker.board.clone()).dial(cluster.target(3));
    for max_tokens in [1, 20, 40] {
        let expected = generate(&*local, &[9, 8, 7, 6], max_tokens).await;
        assert_eq!(generate(&*remote, &[9, 8, 7, 6], max_tokens).await, expected);
    }
    assert_eq!(remote.card(), local.card());
    assert_eq!((remote.block_size(), local.block_size()), (16, 16));
    let bytes = remote.model_text(TIMEOUT).await.expect("it has a tokenizer");
    assert_eq!(bytes, local.model_text(TIMEOUT).await.expect("it has a tokenizer"));
    let text = ModelText::from_portable(&bytes).expect("portable");
    assert_eq!(text.tokenizer().encode("abc", false).map(|ids| ids.len()), Ok(3));

    // What the engine remembers of a prompt is told to both.
    let prompt: Vec<u32> = (3..40).collect();
    let numerics_id = remote.card().numerics_id.clone();
    let root = PrefixHasher::root(b"anonymous", &numerics_id);
    let hashes: Vec<u64> = PrefixHasher::chain(&root, &prompt, 16).iter().map(|hash| hash.short()).collect();
    for client in [&remote, &local] {
        let mut updates = client.prefixes();
        generate(&**client, &prompt, 2).await;
        let mut known = std::collections::BTreeSet::new();
        let told = async {
            while !hashes.iter().all(|hash| known.contains(hash)) {
                let update = updates.recv().await.expect("the replica lives");
                if update.reset {
                    known.clear();
                }
                known.extend(update.stored);
            }
        };
        tokio::time::timeout(TIMEOUT, told).await.expect("both blocks are told");
    }
    drop(cluster.models);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_frees_its_blocks() {
    let cluster = Cluster::start().await;
    let remote = cluster.dial(3).await;
    until("the client is ready", || remote.status().ready).await;
    let link = cluster.node.link("s/0", 3);
    let mut streams = Vec::new();
    for _ in 0..3 {
        let mut stream = remote.submit(request(&[1, 5, 9], 55)).await.expect("admitted");
        assert!(matches!(stream.recv().await, Some(EngineEvent::Token(_))));
        streams.push(stream);
    }
    drop(streams);
    until("all blocks are free", || link.status().kv_blocks_used == 0 && link.status().running == 0).await;
    // And it can still be used.
    assert_eq!(generate(&*remote, &[1, 5, 9], 3).await.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_epoch_is_refused_and_computes_nothing() {
    let mut cluster = Cluster::start().await;
    let mut client = cluster.raw(Role::Gateway).await;
    let submission = forge_cluster::engine::request::Submission {
        replica: ReplicaId { service: ServiceName::from("s"), index: 0 },
        epoch: Epoch(2),
        request: request(&[1, 2, 3], 4),
        timeout: TIMEOUT,
    };
    let message = forge_cluster::engine::request::to_wire(&submission);
    let mut replies = client.submit(message).await.expect("it answers").into_inner();
    let reply = replies.message().await.expect("one message").expect("one message");
    let reply = forge_cluster::engine::reply::reply_from_wire(reply.events[0].clone()).expect("known");
    let refused = forge_cluster::engine::reply::EngineReply::Refused(AdmitError::Unavailable {
        reason: "this worker runs epoch 3 of s/0, not 2: ask the coordinators for its place".into(),
    });
    assert_eq!(reply, refused);
    assert_eq!(replies.message().await.expect("the end"), None);
    assert_eq!(
        client.watch_replica(wire::WatchReplicaRequest { replica: reference(2) }).await.map(drop).map_err(|status| status.code()),
        Err(Code::NotFound)
    );

    // When the plan is taken away, whoever watches hears of it, and submissions are refused.
    let remote = cluster.dial(3).await;
    until("the client is ready", || remote.status().ready).await;
    cluster.node.assign(vec![]);
    cluster.node.wait("s/0", 3, ReplicaPhase::Stopped).await;
    until("the client knows", || !remote.status().ready).await;
    assert!(matches!(remote.submit(request(&[1], 1)).await.map(drop), Err(AdmitError::Unavailable { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_gateways_and_coordinators_may_call() {
    let cluster = Cluster::start().await;
    for role in [Role::Worker, Role::Admin] {
        let mut client = cluster.raw(role).await;
        let refused = client.model_text(wire::ModelTextRequest { replica: reference(3) }).await.map(drop);
        assert_eq!(refused.map_err(|status| status.code()), Err(Code::PermissionDenied), "{role}");
    }
    cluster.logs.push(LogLine { at_ms: 5, level: "INFO", replica: "s/0".into(), text: "hello".into() });
    let mut client = cluster.raw(Role::Coordinator).await;
    let request = wire::EngineLogsRequest { replica: "s/0".into(), follow: false, tail: 9 };
    let mut lines = client.logs(request).await.expect("allowed").into_inner();
    assert_eq!(lines.message().await.expect("a line").map(|line| line.text), Some("hello".to_owned()));
    assert_eq!(lines.message().await.expect("the end"), None);
}
