//! `Directory`: what the coordinators last said of services, nodes and keys, as a core without I/O.
//!
//! Items of a watch go in; replicas to dial and keys to accept come out. Invariant: during a reset the old picture stands
//! until the new one is whole, so that a coordinator's death or a compacted history never empties a gateway; and the
//! picture never goes back in time: a whole one of an older revision, from a coordinator that lags, is not taken.

use std::collections::{BTreeMap, HashMap};

use forge_cluster::api::WatchItem;
use forge_cluster::engine::EngineTarget;
use forge_shared::cluster::Revision;
use forge_shared::cluster::command::ApiKeyRecord;
use forge_shared::cluster::event::{Change, Kind, Object};
use forge_shared::cluster::node::NodeRecord;
use forge_shared::cluster::service::{ReplicaPhase, ReplicaRecord, ServiceRecord};
use forge_shared::ids::NodeId;

/// Objects of one moment.
#[derive(Debug, Clone, Default)]
struct Picture {
    nodes: HashMap<NodeId, NodeRecord>,
    services: BTreeMap<String, ServiceRecord>,
    keys: BTreeMap<String, ApiKeyRecord>,
}

impl Picture {
    fn apply(&mut self, change: Change) {
        match change {
            Change::Put { object: Object::Node(node) } => drop(self.nodes.insert(node.spec.id.clone(), *node)),
            Change::Put { object: Object::Service(service) } => {
                drop(self.services.insert(service.service.metadata.name.clone(), *service));
            }
            Change::Put { object: Object::Key(key) } => drop(self.keys.insert(key.name.clone(), *key)),
            Change::Put {
                object: Object::Member(_) | Object::Token(_) | Object::Notice(_) | Object::Certificate(_) | Object::Trust(_),
            } => {}
            Change::Deleted { kind: Kind::Node, name } => drop(self.nodes.remove(&NodeId(name))),
            Change::Deleted { kind: Kind::Service, name } => drop(self.services.remove(&name)),
            Change::Deleted { kind: Kind::Key, name } => drop(self.keys.remove(&name)),
            Change::Deleted { kind: Kind::Member | Kind::Token | Kind::Notice | Kind::Certificate | Kind::Trust, .. } => {}
        }
    }
}

/// See the module documentation.
#[derive(Debug, Default)]
pub struct Directory {
    current: Picture,
    /// Being filled since a reset.
    next: Option<Picture>,
    revision: Option<Revision>,
}

/// A replica that should be dialed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// `service/index@epoch`: while a replica is replaced, two of one index may serve.
    pub key: String,
    /// Where.
    pub target: EngineTarget,
}

impl Directory {
    /// Takes an item; `true` where the picture is whole and may have changed.
    pub fn apply(&mut self, item: WatchItem) -> bool {
        match item {
            WatchItem::Reset => {
                self.next = Some(Picture::default());
                false
            }
            WatchItem::Event(event) => {
                match &mut self.next {
                    Some(next) => next.apply(event.change),
                    None => self.current.apply(event.change),
                }
                self.next.is_none()
            }
            WatchItem::Current(revision) => {
                let is_newer = self.revision.is_none_or(|known| revision >= known);
                if let (Some(next), true) = (self.next.take(), is_newer) {
                    self.current = next;
                }
                self.revision = self.revision.max(Some(revision));
                is_newer
            }
        }
    }

    /// Whether a whole picture was ever seen.
    pub fn is_known(&self) -> bool {
        self.revision.is_some()
    }

    /// Replicas to dial, by service and index: those in place, and those that serve on until their successor is ready.
    pub fn wanted(&self) -> Vec<Wanted> {
        let of = |service: &ServiceRecord| -> Vec<Wanted> {
            let leaving = service.leaving.iter().filter(|leaving| !leaving.is_draining).map(|leaving| &leaving.replica);
            service.replicas.iter().chain(leaving).filter_map(|replica| self.target(replica)).collect()
        };
        self.current.services.values().flat_map(of).collect()
    }

    fn target(&self, replica: &ReplicaRecord) -> Option<Wanted> {
        let plan = &replica.plan;
        if matches!(replica.status.phase, ReplicaPhase::Draining | ReplicaPhase::Failed | ReplicaPhase::Stopped) {
            return None;
        }
        let leading = plan.ranks.first()?;
        let node = self.current.nodes.get(&leading.node)?;
        let target = EngineTarget {
            node: leading.node.clone(),
            address: node.spec.address.clone(),
            replica: plan.replica.clone(),
            epoch: plan.epoch,
        };
        Some(Wanted { key: format!("{}@{}", plan.replica, plan.epoch), target })
    }

    /// Names of the services that are wanted, the oldest first.
    pub fn services(&self) -> Vec<String> {
        let mut wanted: Vec<&ServiceRecord> = self.current.services.values().filter(|service| !service.is_deleted).collect();
        // The picture is sorted by name, so services of one moment are too, alike in every gateway.
        wanted.sort_by_key(|service| service.created);
        wanted.into_iter().map(|service| service.service.metadata.name.clone()).collect()
    }

    /// Replicas that are wished of each service that is wanted.
    pub fn wishes(&self) -> BTreeMap<String, u32> {
        let wanted = self.current.services.values().filter(|service| !service.is_deleted);
        wanted.map(|service| (service.service.metadata.name.clone(), service.service.spec.replicas)).collect()
    }

    /// The API keys.
    pub fn keys(&self) -> impl Iterator<Item = &ApiKeyRecord> {
        self.current.keys.values()
    }
}

#[cfg(test)]
mod tests {
    use forge_shared::cluster::event::Event;
    use forge_shared::cluster::node::{NodePhase, NodeSpec, Role};
    use forge_shared::cluster::service::{Facts, LeavingReplica, ReplicaStatus};
    use forge_shared::ids::{Epoch, Incarnation, ReplicaId, ServiceName};
    use forge_shared::plan::{Plan, RankMemory, RankPlan};
    use forge_shared::spec::{KvCacheDtype, ModelService, ModelServiceSpec};

    use super::*;

    fn node(name: &str) -> Object {
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
        let record = NodeRecord {
            spec,
            phase: NodePhase::Ready,
            cordoned: false,
            draining: false,
            is_forced: false,
            reason: String::new(),
            since_ms: 0,
        };
        Object::Node(Box::new(record))
    }

    fn replica(epoch: u64, on: &str, phase: ReplicaPhase) -> ReplicaRecord {
        let rank = RankPlan {
            node: NodeId::from(on),
            device: 0,
            tensor_rank: 0,
            tensor_size: 1,
            expert_rank: 0,
            expert_size: 1,
            layers: 0..1,
            experts: 0..0,
            threads: 1,
            memory: RankMemory::default(),
        };
        let plan = Plan {
            replica: ReplicaId { service: ServiceName::from("s"), index: 0 },
            epoch: Epoch(epoch),
            max_model_len: 64,
            block_size: 16,
            kv_blocks: 4,
            kv_cache_dtype: KvCacheDtype::F32,
            max_step_tokens: 16,
            max_batch_size: 4,
            ranks: vec![rank],
        };
        ReplicaRecord { plan, generation: 1, status: ReplicaStatus { phase, ..ReplicaStatus::placed() } }
    }

    fn service(replicas: Vec<ReplicaRecord>, leaving: Vec<LeavingReplica>) -> Object {
        let record = ServiceRecord {
            service: ModelService::new("s", ModelServiceSpec::default()),
            generation: 1,
            revision: Revision(1),
            created: Revision(1),
            facts: Facts::NEW,
            replicas,
            leaving,
            older: Vec::new(),
            history: Vec::new(),
            changed_ms: None,
            stuck: None,
            is_deleted: false,
            refusal: None,
            last_epoch: Epoch(9),
            longest_len: None,
        };
        Object::Service(Box::new(record))
    }

    fn one(epoch: u64, on: &str, phase: ReplicaPhase) -> Object {
        service(vec![replica(epoch, on, phase)], Vec::new())
    }

    fn put(object: Object) -> WatchItem {
        WatchItem::Event(Event { revision: Revision(2), change: Change::Put { object } })
    }

    fn addresses(directory: &Directory) -> Vec<(String, u64)> {
        directory.wanted().into_iter().map(|wanted| (wanted.target.address, wanted.target.epoch.0)).collect()
    }

    #[test]
    fn a_reset_shows_when_it_is_whole() {
        let mut directory = Directory::default();
        assert!(!directory.apply(WatchItem::Reset));
        assert!(!directory.apply(put(node("a"))) && !directory.apply(put(one(1, "a", ReplicaPhase::Ready))));
        assert!(!directory.is_known() && addresses(&directory).is_empty());
        assert!(directory.apply(WatchItem::Current(Revision(2))));
        assert_eq!(addresses(&directory), [("a:7100".to_owned(), 1)]);
        directory.apply(WatchItem::Reset);
        assert_eq!(addresses(&directory), [("a:7100".to_owned(), 1)], "the old picture stands");
        directory.apply(put(node("b")));
        directory.apply(put(one(2, "b", ReplicaPhase::Loading)));
        directory.apply(WatchItem::Current(Revision(9)));
        assert_eq!(addresses(&directory), [("b:7100".to_owned(), 2)]);
    }

    #[test]
    fn a_picture_from_the_past_is_not_taken() {
        let mut directory = Directory::default();
        for item in [put(node("a")), put(one(5, "a", ReplicaPhase::Ready)), WatchItem::Current(Revision(5))] {
            directory.apply(item);
        }
        for item in [WatchItem::Reset, put(node("a")), put(one(4, "a", ReplicaPhase::Ready))] {
            directory.apply(item);
        }
        assert!(!directory.apply(WatchItem::Current(Revision(4))), "a coordinator lags behind");
        assert_eq!(addresses(&directory), [("a:7100".to_owned(), 5)]);
    }

    #[test]
    fn a_replica_serves_on_until_it_drains() {
        let mut directory = Directory::default();
        let leaving = |is_draining| LeavingReplica { replica: replica(5, "a", ReplicaPhase::Ready), is_draining };
        for item in [put(node("a")), put(node("b")), WatchItem::Current(Revision(5))] {
            directory.apply(item);
        }
        directory.apply(put(service(vec![replica(6, "b", ReplicaPhase::Loading)], vec![leaving(false)])));
        assert_eq!(addresses(&directory), [("b:7100".to_owned(), 6), ("a:7100".to_owned(), 5)]);
        directory.apply(put(service(vec![replica(6, "b", ReplicaPhase::Ready)], vec![leaving(true)])));
        assert_eq!(addresses(&directory), [("b:7100".to_owned(), 6)]);
        directory.apply(put(one(6, "b", ReplicaPhase::Failed)));
        assert!(addresses(&directory).is_empty());
    }
}
