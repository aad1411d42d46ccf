//! Nodes: processes that joined the cluster, what they offer and where they stand.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, Incarnation, NodeId, ServiceName};
use crate::version::{Build, first_level, is_first_level};

/// What a process is in the cluster. It is written in its certificate, and nothing else decides it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Member of the raft group.
    Coordinator,
    /// Owns devices, runs replicas.
    Worker,
    /// Speaks HTTP to clients.
    Gateway,
    /// A person or program that operates the cluster (`forgectl`).
    Admin,
}

impl Role {
    /// All of them.
    pub const ALL: [Role; 4] = [Role::Coordinator, Role::Worker, Role::Gateway, Role::Admin];

    /// As written in certificates, configuration and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Coordinator => "coordinator",
            Role::Worker => "worker",
            Role::Gateway => "gateway",
            Role::Admin => "admin",
        }
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Role::ALL
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or_else(|| format!("{text:?} is no role: coordinator, worker, gateway or admin"))
    }
}

/// What a node says of itself when it begins a session.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NodeSpec {
    /// Its name; must be the one in its certificate.
    pub id: NodeId,
    /// Worker or gateway.
    pub role: Role,
    /// Grows at each start of its process.
    pub incarnation: Incarnation,
    /// Forge's version it runs.
    pub version: String,
    /// That version's level.
    #[serde(default = "first_level", skip_serializing_if = "is_first_level")]
    pub level: u32,
    /// `host:port` where others reach it: a worker's engine service, a gateway's API.
    pub address: String,
    /// `host:port` of its metrics and probes, for operators.
    pub metrics_address: String,
    /// Where its data plane listens (worker); absent where it has none, and ranks of a replica are then not divided between
    /// it and others. Level 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_plane: Option<DataPlane>,
    /// What it can give; empty for gateways.
    pub devices: Vec<DeviceInfo>,
}

impl NodeSpec {
    /// What it runs.
    pub fn build(&self) -> Build {
        Build { version: self.version.clone(), level: self.level }
    }
}

/// Where workers reach a worker to exchange activations.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DataPlane {
    /// `host:port`.
    pub address: String,
    /// How it is spoken to. Only workers of one kind reach each other.
    pub transport: DataTransport,
}

/// How workers carry what ranks say to each other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DataTransport {
    /// QUIC over UDP.
    #[default]
    Quic,
    /// TLS over TCP, where UDP is blocked.
    Tcp,
}

impl std::fmt::Display for DataTransport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DataTransport::Quic => "quic",
            DataTransport::Tcp => "tcp",
        })
    }
}

/// Kind of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// Cores and main memory.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// An Apple GPU.
    Metal,
}

/// One device of a node: real, or a share of the machine that the worker's configuration declares.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DeviceInfo {
    /// Number within the node.
    pub index: u32,
    /// What it is.
    pub kind: DeviceKind,
    /// The maker's name of it.
    pub name: String,
    /// Cores (CPU) or multiprocessors (GPU).
    pub cores: u32,
    /// NUMA node it belongs to, if known.
    pub numa_node: Option<u32>,
    /// Instruction sets that the kernels use (`avx2`, `avx512`, `amx-bf16`), or the compute capability.
    pub instruction_sets: Vec<String>,
    /// Bytes Forge may use.
    pub memory_bytes: u64,
    /// Measured read bandwidth, bytes per second; 0 where not measured.
    pub read_bandwidth_bytes_per_s: u64,
    /// Measured peak of matrix products, operations per second; 0 where not measured.
    pub matrix_flops: u64,
    /// Declared in the configuration rather than found.
    pub is_virtual: bool,
    /// Why the worker that tells of it runs nothing on it, such as missing kernels; `None` where it does.
    #[serde(default)]
    pub cannot_run: Option<String>,
}

/// Where a node stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodePhase {
    /// Its lease is kept.
    Ready,
    /// Its lease ran out; its replicas are placed elsewhere.
    Lost,
}

/// A node as the cluster knows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NodeRecord {
    /// Its own words, memory corrected by what was found at loading.
    pub spec: NodeSpec,
    /// Where it stands.
    pub phase: NodePhase,
    /// Takes no new replicas (`forgectl cordon`).
    pub cordoned: bool,
    /// Its replicas are moved away (`forgectl drain`); implies `cordoned`.
    pub draining: bool,
    /// It is drained by force: replicas that have room nowhere else end.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_forced: bool,
    /// Why it is lost, or empty.
    pub reason: String,
    /// When it took this phase, milliseconds since 1970 by the leader's clock.
    pub since_ms: u64,
}

/// What a node is doing now: from heartbeats, never in the log.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NodeLoad {
    /// Bytes of memory in use by the process.
    pub resident_bytes: u64,
    /// Per replica on it (worker).
    pub replicas: Vec<ReplicaLoad>,
    /// Requests being answered (gateway).
    pub requests_in_progress: u64,
    /// Replicas that it sends requests to, by their epochs (gateway); `None` of workers, and of a version that does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serves: Option<BTreeMap<ServiceName, Vec<Epoch>>>,
}

/// What a replica is doing now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ReplicaLoad {
    /// Which, as `service/index`.
    pub replica: String,
    /// Sequences in the running batch.
    pub running: u64,
    /// Sequences waiting.
    pub waiting: u64,
    /// KV blocks in use.
    pub kv_blocks_used: u64,
    /// KV blocks there are.
    pub kv_blocks_total: u64,
    /// Tokens generated since the engine began.
    pub generated_tokens: u64,
}
