//! The wait until a service runs: all replicas of its newest generation answer, and every gateway that lives sends requests to
//! them. It changes nothing; without gateways there are none to wait for.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;

use forge_cluster::api::{ClusterApi, ClusterLoads, WatchItem};
use forge_cluster::client::RemoteCluster;
use forge_shared::cluster::Revision;
use forge_shared::cluster::event::{Change, Kind, Object};
use forge_shared::cluster::node::{NodePhase, NodeSpec, Role};
use forge_shared::cluster::service::{ReplicaPhase, ReplicaRecord, ServiceRecord};

use super::rows;
use crate::failure::{Exit, Failure, Result};

/// How often gateways are asked what they serve.
const LOADS_INTERVAL: Duration = Duration::from_millis(200);

/// What is known while a service is waited for.
#[derive(Default)]
struct Seen {
    is_current: bool,
    service: Option<Box<ServiceRecord>>,
    /// Gateways whose lease is kept.
    gateways: BTreeMap<String, NodeSpec>,
}

/// Watches the service until it runs.
///
/// # Errors
/// A model that fails (1), a replica that fits nowhere (3), a time that is over (4).
pub(super) async fn wait_until_running(cluster: &RemoteCluster, name: &str, since: Revision, timeout: Duration) -> Result<()> {
    match tokio::time::timeout(timeout, watch(cluster, name, since)).await {
        Ok(done) => done,
        Err(_) => Err(Failure::new(format!("{name} does not run after {} s", timeout.as_secs()))
            .exit(Exit::LostContact)
            .help(format!("the cluster goes on: `forgectl describe model {name}` says what it is waiting for"))),
    }
}

async fn watch(cluster: &RemoteCluster, name: &str, since: Revision) -> Result<()> {
    let (mut said, mut seen) = (String::new(), Seen::default());
    let mut items = cluster.watch(vec![Kind::Service, Kind::Node], None);
    let mut pictures = cluster.loads(LOADS_INTERVAL);
    let mut loads = ClusterLoads { nodes: Vec::new() };
    loop {
        tokio::select! {
            item = items.recv() => match item {
                Some(item) => seen.take(item, name, since),
                None => return Err(Failure::new("the watch ended").exit(Exit::LostContact)),
            },
            picture = pictures.recv() => match picture {
                Some(picture) => loads = picture,
                None => return Err(Failure::new("the watch of the gateways ended").exit(Exit::LostContact)),
            },
        }
        if !seen.is_current {
            continue;
        }
        let Some(service) = &seen.service else {
            return Err(Failure::new(format!("{name} was deleted meanwhile")));
        };
        let (state, reason) = rows::model_state(service);
        match (state, not_served(service, seen.gateways.values(), &loads)) {
            ("running", Some(gateway)) => tell(&mut said, format!("{name}: gateway {gateway} does not send requests to it yet")),
            ("running", None) => {
                tell(&mut said, progress(service, state));
                return Ok(());
            }
            ("failed", _) => return Err(Failure::new(format!("{name}: {reason}")).help("correct the specification and apply it again")),
            ("not placeable", _) => {
                return Err(Failure::new(reason).exit(Exit::NotPlaceable).help("take the nearest settings, or add a worker"));
            }
            _ => tell(&mut said, progress(service, state)),
        }
    }
}

impl Seen {
    fn take(&mut self, item: WatchItem, name: &str, since: Revision) {
        match item {
            WatchItem::Reset => *self = Seen::default(),
            // What was there before the wish says nothing about it.
            WatchItem::Current(revision) => self.is_current = revision >= since,
            WatchItem::Event(event) => match event.change {
                Change::Put { object: Object::Service(service) } if service.service.metadata.name == name => self.service = Some(service),
                Change::Deleted { kind: Kind::Service, name: deleted } if deleted == name => self.service = None,
                Change::Put { object: Object::Node(node) } if node.spec.role == Role::Gateway => {
                    let id = node.spec.id.0.clone();
                    match node.phase {
                        NodePhase::Ready => drop(self.gateways.insert(id, node.spec)),
                        NodePhase::Lost => drop(self.gateways.remove(&id)),
                    }
                }
                Change::Deleted { kind: Kind::Node, name } => drop(self.gateways.remove(&name)),
                _ => {}
            },
        }
    }
}

/// A gateway that does not send requests yet to all replicas of a service's newest generation that are ready.
pub(super) fn not_served<'a>(
    service: &ServiceRecord,
    mut gateways: impl Iterator<Item = &'a NodeSpec>,
    loads: &ClusterLoads,
) -> Option<String> {
    let name = service.service.metadata.name.as_str();
    let is_newest = |replica: &&ReplicaRecord| replica.generation == service.generation && replica.status.phase == ReplicaPhase::Ready;
    let is_told = |gateway: &NodeSpec| {
        let load = loads.nodes.iter().find(|(spec, ..)| spec.id == gateway.id && spec.incarnation == gateway.incarnation);
        // One that has a session and does not say is of an older version: there is nothing to wait for.
        load.is_some_and(|(_, load, _)| match &load.serves {
            None => load.resident_bytes > 0,
            Some(serves) => {
                let served = serves.get(&name.into()).map(Vec::as_slice).unwrap_or_default();
                service.replicas.iter().filter(is_newest).all(|replica| served.contains(&replica.plan.epoch))
            }
        })
    };
    gateways.find(|gateway| !is_told(gateway)).map(|gateway| gateway.id.0.clone())
}

fn progress(service: &ServiceRecord, state: &str) -> String {
    let replica = |replica: &ReplicaRecord| {
        let node = replica.plan.ranks.first().map(|rank| rank.node.0.as_str()).unwrap_or_default();
        format!("{} on {node} {:?} {}%", replica.plan.replica, replica.status.phase, replica.status.percent).to_lowercase()
    };
    let replicas: Vec<String> = service.replicas.iter().map(replica).collect();
    format!("{}/{} {state}: {}", rows::ready(service), service.service.spec.replicas, replicas.join(", "))
}

/// One line per change; on a terminal over the last one.
fn tell(said: &mut String, line: String) {
    if *said == line {
        return;
    }
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K{line}");
        if line.contains("running:") {
            eprintln!();
        }
    } else {
        eprintln!("{line}");
    }
    *said = line;
}
