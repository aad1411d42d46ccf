//! The wait until a service is as it is wished, whatever that is judged by, and every gateway that lives sends requests to all
//! ready replicas of its newest generation. It changes nothing; without gateways there are none to wait for.

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

/// What a look at a service says.
pub(super) enum Step {
    /// Not there yet.
    GoesOn(String),
    /// There.
    Done(String),
    /// It will not come to that by itself.
    Failed(Failure),
}

/// Watches the service until it runs.
///
/// # Errors
/// A model that fails (1), a replica that fits nowhere (3), a time that is over (4).
pub(super) async fn wait_until_running(cluster: &RemoteCluster, name: &str, since: Revision, timeout: Duration) -> Result<()> {
    let judge = |service: &ServiceRecord| {
        let (state, reason) = rows::model_state(service);
        match state {
            "running" => Step::Done(progress(service, state)),
            "failed" => Step::Failed(Failure::new(format!("{name}: {reason}")).help("correct the specification and apply it again")),
            "not placeable" => {
                Step::Failed(Failure::new(reason).exit(Exit::NotPlaceable).help("take the nearest settings, or add a worker"))
            }
            _ => Step::GoesOn(progress(service, state)),
        }
    };
    let line = follow_service(cluster, (name, since), (timeout, "does not run"), judge).await?;
    eprintln!("{line}");
    Ok(())
}

/// Watches a service from a revision on until `judge` says that it is done (its last line), and every gateway that lives
/// serves it; or failed. Shows the lines between. What is not so when the time is over is said with `what_is_not`.
///
/// # Errors
/// What `judge` says, and a time that is over (4).
pub(super) async fn follow_service(
    cluster: &RemoteCluster,
    (name, since): (&str, Revision),
    (timeout, what_is_not): (Duration, &str),
    judge: impl Fn(&ServiceRecord) -> Step,
) -> Result<String> {
    let mut shown = Progress::default();
    let done = tokio::time::timeout(timeout, watch(cluster, (name, since), judge, &mut shown)).await;
    shown.end();
    match done {
        Ok(done) => done,
        Err(_) => Err(Failure::new(format!("{name} {what_is_not} after {} s", timeout.as_secs()))
            .exit(Exit::LostContact)
            .help(format!("the cluster goes on: `forgectl describe model {name}` says what it is waiting for"))),
    }
}

async fn watch(
    cluster: &RemoteCluster,
    (name, since): (&str, Revision),
    judge: impl Fn(&ServiceRecord) -> Step,
    shown: &mut Progress,
) -> Result<String> {
    let mut seen = Seen::default();
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
        match (judge(service), not_served(service, seen.gateways.values(), &loads)) {
            (Step::Done(_), Some(gateway)) => shown.tell(format!("{name}: gateway {gateway} does not send requests to it yet")),
            (Step::Done(line), None) => return Ok(line),
            (Step::Failed(failure), _) => return Err(failure),
            (Step::GoesOn(line), _) => shown.tell(line),
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
#[derive(Default)]
struct Progress(String);

impl Progress {
    fn tell(&mut self, line: String) {
        if self.0 == line {
            return;
        }
        if std::io::stderr().is_terminal() {
            eprint!("\r\x1b[K{line}");
        } else {
            eprintln!("{line}");
        }
        self.0 = line;
    }

    fn end(&self) {
        if !self.0.is_empty() && std::io::stderr().is_terminal() {
            eprintln!();
        }
    }
}
