//! The cluster's objects as rows of tables.

use forge_shared::cluster::command::ApiKeyRecord;
use forge_shared::cluster::event::Notice;
use forge_shared::cluster::node::{DeviceInfo, NodePhase, NodeRecord};
use forge_shared::cluster::service::{Facts, ReplicaPhase, ReplicaRecord, ServiceRecord};
use forge_shared::plan::{Plan, RankPlan};
use forge_shared::version::Build;

use crate::output::{Column, column, wide};
use crate::time::{Utc, ago};

pub const NODES: [Column; 8] = [
    column("NAME"),
    column("ROLE"),
    column("STATE"),
    column("DEVICES"),
    column("MEMORY"),
    column("SINCE"),
    wide("ADDRESS"),
    wide("VERSION"),
];

pub fn node(node: &NodeRecord) -> Vec<String> {
    let memory: u64 = node.spec.devices.iter().map(|device| device.memory_bytes).sum();
    vec![
        node.spec.id.0.clone(),
        node.spec.role.to_string(),
        node_state(node),
        devices(&node.spec.devices),
        if node.spec.devices.is_empty() { "-".into() } else { bytes(memory) },
        ago(Utc(node.since_ms / 1000)),
        node.spec.address.clone(),
        build(&node.spec.build()),
    ]
}

/// A version and its level.
pub fn build(build: &Build) -> String {
    if build.version.is_empty() { "-".into() } else { build.to_string() }
}

pub fn node_state(node: &NodeRecord) -> String {
    let phase = match node.phase {
        NodePhase::Ready => "ready",
        NodePhase::Lost => "lost",
    };
    match (node.draining, node.cordoned) {
        (true, _) => format!("{phase},draining"),
        (false, true) => format!("{phase},cordoned"),
        (false, false) => phase.into(),
    }
}

/// `8 cuda`, or `1 cpu (16 cores)`.
fn devices(devices: &[DeviceInfo]) -> String {
    match devices {
        [] => "-".into(),
        [one] => format!("1 {} ({} cores)", kind(one), one.cores),
        [first, ..] => format!("{} {}", devices.len(), kind(first)),
    }
}

pub fn kind(device: &DeviceInfo) -> String {
    format!("{:?}", device.kind).to_ascii_lowercase()
}

pub const MODELS: [Column; 7] =
    [column("NAME"), column("MODEL"), column("REPLICAS"), column("STATE"), wide("GENERATION"), wide("WEIGHTS"), column("REASON")];

pub fn model(service: &ServiceRecord) -> Vec<String> {
    let weights = match &service.facts {
        Facts::Known { facts } => bytes(facts.weights_bytes),
        Facts::Unknown { .. } | Facts::Failed { .. } => "-".into(),
    };
    let (state, reason) = model_state(service);
    vec![
        service.service.metadata.name.clone(),
        service.service.spec.model.clone(),
        format!("{}/{}", ready(service), service.service.spec.replicas),
        state.into(),
        service.generation.to_string(),
        weights,
        reason,
    ]
}

/// Replicas of the newest generation that answer.
pub fn ready(service: &ServiceRecord) -> usize {
    let current = service.replicas.iter().filter(|replica| replica.generation == service.generation);
    current.filter(|replica| replica.status.phase == ReplicaPhase::Ready).count()
}

/// Where a service stands in one word, and why.
pub fn model_state(service: &ServiceRecord) -> (&'static str, String) {
    if service.is_deleted {
        return ("deleting", "running requests finish".into());
    }
    if let Facts::Failed { reason } = &service.facts {
        return ("failed", reason.clone());
    }
    let wished = service.service.spec.replicas;
    let is_ready = ready(service) >= wished as usize;
    match &service.refusal {
        // One on a drained node serves on until there is room.
        Some(refusal) if is_ready => return ("running", format!("a replica that is to move has no other place: {refusal}")),
        Some(refusal) => return ("not placeable", refusal.to_string()),
        None if is_ready => return ("running", String::new()),
        None => {}
    }
    match service.replicas.iter().find(|replica| replica.status.phase == ReplicaPhase::Failed) {
        Some(failed) => ("failing", failed.status.reason.clone()),
        None => ("starting", waits_for(service)),
    }
}

/// What a service waits for that is starting.
fn waits_for(service: &ServiceRecord) -> String {
    if let Facts::Unknown { waits_for } = &service.facts {
        return if waits_for.is_empty() { "a worker is to look at the model".into() } else { waits_for.clone() };
    }
    let is_waited_for = |replica: &&ReplicaRecord| replica.generation != service.generation || replica.status.phase != ReplicaPhase::Ready;
    let Some(replica) = service.replicas.iter().find(is_waited_for) else {
        return "a replica is to be placed".into();
    };
    let id = &replica.plan.replica;
    let node = replica.plan.ranks.first().map(|rank| rank.node.0.as_str()).unwrap_or_default();
    let said = if replica.status.reason.is_empty() { String::new() } else { format!(": {}", replica.status.reason) };
    match replica.status.phase {
        _ if replica.generation != service.generation => format!("{id} on {node} is to be replaced by one of the new generation"),
        ReplicaPhase::Placed => format!("worker {node} has not begun with {id}{said}"),
        _ => format!("{id} on {node} is {}{said}", replica_state(replica, false)),
    }
}

/// A rank of a replica.
pub struct Placed<'a> {
    pub plan: &'a Plan,
    pub rank: (usize, &'a RankPlan),
    pub record: Option<&'a ReplicaRecord>,
    pub is_leaving: bool,
}

pub fn placed(service: &ServiceRecord) -> Vec<Placed<'_>> {
    let standing = service.replicas.iter().map(|replica| (replica, false));
    let leaving = service.leaving.iter().map(|leaving| (&leaving.replica, true));
    standing
        .chain(leaving)
        .flat_map(|(record, is_leaving)| {
            record.plan.ranks.iter().enumerate().map(move |rank| Placed { plan: &record.plan, rank, record: Some(record), is_leaving })
        })
        .collect()
}

/// Ranks of plans that are only tried.
pub fn planned(plans: &[Plan]) -> Vec<Placed<'_>> {
    let mut all = Vec::new();
    for plan in plans {
        all.extend(plan.ranks.iter().enumerate().map(|rank| Placed { plan, rank, record: None, is_leaving: false }));
    }
    all
}

pub const PLACEMENTS: [Column; 12] = [
    column("REPLICA"),
    column("RANK"),
    column("NODE"),
    column("DEVICE"),
    column("LAYERS"),
    column("EXPERTS"),
    column("MEMORY"),
    column("STATE"),
    wide("EPOCH"),
    wide("WEIGHTS"),
    wide("KV"),
    wide("REASON"),
];

pub fn placement(placed: &Placed<'_>) -> Vec<String> {
    let (number, rank) = placed.rank;
    let (state, reason) = match placed.record {
        None => ("planned".to_owned(), String::new()),
        Some(record) => (replica_state(record, placed.is_leaving), record.status.reason.clone()),
    };
    vec![
        placed.plan.replica.to_string(),
        number.to_string(),
        rank.node.0.clone(),
        rank.device.to_string(),
        span(&rank.layers),
        span(&rank.experts),
        bytes(rank.memory.total_bytes()),
        state,
        placed.plan.epoch.to_string(),
        bytes(rank.memory.weights_bytes),
        bytes(rank.memory.kv_bytes),
        reason,
    ]
}

/// First and last, or `-` where there is none.
fn span(range: &std::ops::Range<usize>) -> String {
    if range.is_empty() { "-".into() } else { format!("{}-{}", range.start, range.end - 1) }
}

fn replica_state(record: &ReplicaRecord, is_leaving: bool) -> String {
    let phase = format!("{:?}", record.status.phase).to_ascii_lowercase();
    match record.status.phase {
        ReplicaPhase::Pulling | ReplicaPhase::Loading => format!("{phase} {}%", record.status.percent),
        _ if is_leaving => format!("{phase},leaving"),
        _ => phase,
    }
}

pub const EVENTS: [Column; 5] = [column("WHEN"), column("REASON"), column("ABOUT"), column("MESSAGE"), wide("REVISION")];

pub fn event(notice: &Notice) -> Vec<String> {
    let mark = if notice.is_warning { "! " } else { "" };
    vec![
        Utc(notice.at_ms / 1000).to_string(),
        format!("{mark}{}", notice.reason),
        notice.about.clone(),
        notice.message.clone(),
        notice.revision.to_string(),
    ]
}

pub const KEYS: [Column; 6] = [column("NAME"), column("ID"), column("RPM"), column("TPM"), column("CREATED"), column("STATE")];

pub fn key(key: &ApiKeyRecord) -> Vec<String> {
    let limit = |limit: Option<u32>| limit.map_or("-".to_owned(), |count| count.to_string());
    vec![
        key.name.clone(),
        key.id.clone(),
        limit(key.rpm),
        limit(key.tpm),
        ago(Utc(key.created_s)),
        key.revoked_s.map_or("active".into(), |moment| format!("revoked {}", ago(Utc(moment)))),
    ]
}

/// Bytes as people say them: `512 MiB`, `1.5 GiB`.
pub fn bytes(count: u64) -> String {
    const MIB: f64 = (1u64 << 20) as f64;
    match count as f64 / MIB {
        mib if mib < 1024.0 => format!("{mib:.0} MiB"),
        mib => format!("{:.1} GiB", mib / 1024.0),
    }
}
