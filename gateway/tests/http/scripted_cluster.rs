//! Coordinators and workers that say what a test tells them to, behind the interfaces that the real ones implement.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use forge_cluster::api::{ClusterApi, ClusterError, ClusterLoads, GroupStatus, Listing, PlannedService, Session, WatchItem};
use forge_cluster::engine::{EngineDialer, EngineTarget, ReplicaClient};
use forge_shared::cluster::Revision;
use forge_shared::cluster::command::{Applied, Command, IdempotencyRecord};
use forge_shared::cluster::event::{Change, Event, Kind, Object};
use forge_shared::cluster::node::{NodePhase, NodeRecord, NodeSpec, Role};
use forge_shared::cluster::service::{Facts, ReplicaPhase, ReplicaRecord, ReplicaStatus, ServiceRecord};
use forge_shared::cluster::session::{KeyShare, KeyUsage, NodeDown, NodeUp};
use forge_shared::generate::{AdmitError, GenerateRequest};
use forge_shared::ids::{Epoch, Incarnation, NodeId, ReplicaId, ServiceName};
use forge_shared::link::{EngineLink, EngineStatus, EventStream, ModelCard, PrefixUpdate};
use forge_shared::plan::{Plan, RankMemory, RankPlan};
use forge_shared::spec::{KvCacheDtype, ModelService, ModelServiceSpec};
use forge_text::{HuggingFaceFiles, ModelText};
use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::engine::ScriptedEngine;

/// The group of coordinators.
#[derive(Default)]
pub(crate) struct ScriptedCluster {
    items: Mutex<Vec<WatchItem>>,
    watchers: Mutex<Vec<mpsc::Sender<WatchItem>>>,
    pub(crate) shares: Mutex<Vec<KeyShare>>,
    pub(crate) usage: Mutex<Vec<KeyUsage>>,
    /// What gateways said last that they serve.
    pub(crate) served: Arc<Mutex<BTreeMap<ServiceName, Vec<Epoch>>>>,
    pub(crate) away: Mutex<bool>,
    records: Mutex<HashMap<(String, String), IdempotencyRecord>>,
}

impl ScriptedCluster {
    /// Tells every watcher, and those to come.
    pub(crate) async fn tell(&self, objects: Vec<Object>) {
        let mut items: Vec<WatchItem> = Vec::new();
        let revision = Revision(self.items.lock().len() as u64 + 1);
        items.extend(objects.into_iter().map(|object| WatchItem::Event(Event { revision, change: Change::Put { object } })));
        items.push(WatchItem::Current(revision));
        self.items.lock().extend(items.clone());
        let watchers = self.watchers.lock().clone();
        for watcher in watchers {
            for item in &items {
                watcher.send(item.clone()).await.expect("the watcher lives");
            }
        }
    }

    fn unavailable() -> ClusterError {
        ClusterError::Unavailable { waited_ms: 0, reason: "scripted".into() }
    }
}

impl ClusterApi for ScriptedCluster {
    fn execute(&self, _: String, command: Command, _: Duration) -> BoxFuture<'_, Result<Applied, ClusterError>> {
        let answer = match command {
            _ if *self.away.lock() => Err(Self::unavailable()),
            Command::RecordIdempotency { record } => {
                let mut records = self.records.lock();
                let existing = records.get(&(record.tenant.clone(), record.key.clone())).cloned();
                if existing.is_none() {
                    records.insert((record.tenant.clone(), record.key.clone()), record);
                }
                Ok(Applied { revision: Revision(1), changed: existing.is_none(), existing })
            }
            other => panic!("a gateway has no business with {other:?}"),
        };
        async move { answer }.boxed()
    }

    fn read(&self, _: Kind, _: Option<String>, _: Duration) -> BoxFuture<'_, Result<Listing, ClusterError>> {
        async { Err(Self::unavailable()) }.boxed()
    }

    fn watch(&self, _: Vec<Kind>, _: Option<Revision>) -> mpsc::Receiver<WatchItem> {
        let (sender, receiver) = mpsc::channel(256);
        for item in self.items.lock().iter() {
            sender.try_send(item.clone()).expect("tests tell little");
        }
        self.watchers.lock().push(sender);
        receiver
    }

    fn plan(&self, _: ModelService, _: Duration) -> BoxFuture<'_, Result<PlannedService, ClusterError>> {
        async { Err(Self::unavailable()) }.boxed()
    }

    fn session(&self, _: NodeSpec, _: Duration) -> BoxFuture<'_, Result<Session, ClusterError>> {
        if *self.away.lock() {
            return async { Err(Self::unavailable()) }.boxed();
        }
        let (up, mut from_node) = mpsc::channel(16);
        let (to_node, down) = mpsc::channel(16);
        let (shares, told) = (self.shares.lock().clone(), Arc::new(Mutex::new(Vec::new())));
        let (seen, served) = (told.clone(), self.served.clone());
        tokio::spawn(async move {
            let welcome = NodeDown::Welcome { lease_ms: 3000, heartbeat_ms: 50 };
            let mut sent = to_node.send(welcome).await;
            while let (Ok(()), Some(NodeUp::Heartbeat { number, load, usage })) = (&sent, from_node.recv().await) {
                *served.lock() = load.serves.unwrap_or_default();
                seen.lock().extend(usage);
                sent = to_node.send(NodeDown::Ack { number, lease_ms: 3000, shares: shares.clone() }).await;
            }
        });
        self.usage.lock().append(&mut told.lock());
        async { Ok(Session { up, down }) }.boxed()
    }

    fn status(&self, _: Duration) -> BoxFuture<'_, Result<GroupStatus, ClusterError>> {
        async { Err(Self::unavailable()) }.boxed()
    }

    fn loads(&self, _: Duration) -> mpsc::Receiver<ClusterLoads> {
        mpsc::channel(1).1
    }
}

/// Workers by node name, each with one engine.
#[derive(Default)]
pub(crate) struct ScriptedWorkers {
    pub(crate) engines: Mutex<HashMap<String, Arc<ScriptedEngine>>>,
    pub(crate) dialed: Mutex<Vec<EngineTarget>>,
    /// Prompt blocks that a node has cached.
    pub(crate) cached: Mutex<HashMap<String, Vec<u64>>>,
}

struct ScriptedReplica {
    engine: Arc<ScriptedEngine>,
    cached: Vec<u64>,
}

impl EngineDialer for ScriptedWorkers {
    fn dial(&self, target: EngineTarget) -> Arc<dyn ReplicaClient> {
        let engine = self.engines.lock().get(&target.node.0).cloned().expect("a scripted node");
        let cached = self.cached.lock().get(&target.node.0).cloned().unwrap_or_default();
        self.dialed.lock().push(target);
        Arc::new(ScriptedReplica { engine, cached })
    }
}

impl EngineLink for ScriptedReplica {
    fn submit(&self, request: GenerateRequest) -> BoxFuture<'_, Result<EventStream, AdmitError>> {
        self.engine.submit(request)
    }

    fn card(&self) -> Arc<ModelCard> {
        self.engine.card()
    }

    fn status(&self) -> EngineStatus {
        self.engine.status()
    }
}

impl ReplicaClient for ScriptedReplica {
    fn model_text(&self, _: Duration) -> BoxFuture<'_, Result<Bytes, ClusterError>> {
        let files = HuggingFaceFiles::read(&super::fixture("byte_level")).expect("the fixture is readable");
        let template = std::fs::read_to_string(super::fixture("templates/chatml.jinja")).expect("the fixture is readable");
        let text = ModelText::from_hugging_face(&files).and_then(|text| text.with_chat_template(&template)).expect("a model's text");
        async move { Ok(Bytes::from(text.to_portable().expect("it is small"))) }.boxed()
    }

    fn prefixes(&self) -> mpsc::Receiver<PrefixUpdate> {
        let (sender, receiver) = mpsc::channel(1);
        let update = PrefixUpdate { reset: true, stored: self.cached.clone(), removed: Vec::new() };
        sender.try_send(update).expect("it has room");
        // Kept open: an engine tells as long as it lives.
        tokio::spawn(async move { sender.closed().await });
        receiver
    }

    fn block_size(&self) -> usize {
        16
    }
}

pub(crate) fn node(name: &str) -> Object {
    let spec = NodeSpec {
        id: NodeId::from(name),
        role: Role::Worker,
        incarnation: Incarnation(1),
        version: "0".into(),
        level: forge_shared::version::LEVEL,
        address: format!("{name}:7100"),
        metrics_address: String::new(),
        data_plane: None,
        devices: Vec::new(),
    };
    Object::Node(Box::new(NodeRecord {
        spec,
        phase: NodePhase::Ready,
        cordoned: false,
        draining: false,
        is_forced: false,
        reason: String::new(),
        since_ms: 0,
    }))
}

/// A service whose replicas run on these nodes, with these epochs.
pub(crate) fn service(name: &str, replicas: &[(&str, u64)]) -> Object {
    service_since(1, name, replicas)
}

/// As [`service`], created at another time.
pub(crate) fn service_since(created: u64, name: &str, replicas: &[(&str, u64)]) -> Object {
    let record = |(index, (on, epoch)): (usize, &(&str, u64))| ReplicaRecord {
        plan: Plan {
            replica: ReplicaId { service: ServiceName::from(name), index: index as u32 },
            epoch: Epoch(*epoch),
            max_model_len: 512,
            block_size: 16,
            kv_blocks: 64,
            kv_cache_dtype: KvCacheDtype::F32,
            max_step_tokens: 16,
            max_batch_size: 4,
            ranks: vec![RankPlan {
                node: NodeId::from(*on),
                device: 0,
                tensor_rank: 0,
                tensor_size: 1,
                expert_rank: 0,
                expert_size: 1,
                layers: 0..1,
                experts: 0..0,
                threads: 1,
                memory: RankMemory::default(),
            }],
        },
        generation: 1,
        status: ReplicaStatus { phase: ReplicaPhase::Ready, ..ReplicaStatus::placed() },
    };
    Object::Service(Box::new(ServiceRecord {
        service: ModelService::new(name, ModelServiceSpec::default()),
        generation: 1,
        revision: Revision(1),
        created: Revision(created),
        facts: Facts::NEW,
        replicas: replicas.iter().enumerate().map(record).collect(),
        leaving: Vec::new(),
        older: Vec::new(),
        history: Vec::new(),
        changed_ms: None,
        stuck: None,
        is_deleted: false,
        refusal: None,
        last_epoch: Epoch(100),
        longest_len: None,
    }))
}

pub(crate) fn gateway_spec(name: &str) -> NodeSpec {
    NodeSpec {
        id: NodeId::from(name),
        role: Role::Gateway,
        incarnation: Incarnation(1),
        version: "0".into(),
        level: forge_shared::version::LEVEL,
        address: String::new(),
        metrics_address: String::new(),
        data_plane: None,
        devices: Vec::new(),
    }
}
