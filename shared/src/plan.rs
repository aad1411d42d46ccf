//! The coordinator's decision: which rank of a replica runs on which device, with which layers and memory.
//!
//! Plain data. The coordinator makes it, a worker's agent carries it out, and both refuse an older epoch.
//!
//! Invariant: a plan is complete. Whoever holds it needs no other decision to start its rank.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, NodeId, ReplicaId};
use crate::spec::{ByteSize, KvCacheDtype};

/// One replica's ranks and what each may use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Which copy of which service.
    pub replica: ReplicaId,
    /// Grows with every plan of the service.
    pub epoch: Epoch,
    /// Longest sequence, prompt and answer.
    pub max_model_len: usize,
    /// Slots per KV block.
    pub block_size: usize,
    /// KV blocks, the same on every rank.
    pub kv_blocks: usize,
    /// Storage type of keys and values.
    pub kv_cache_dtype: KvCacheDtype,
    /// Most rows per step.
    pub max_step_tokens: usize,
    /// Most sequences at once.
    pub max_batch_size: usize,
    /// Ranks; index is the rank's number. Stage by stage, in a stage by expert rank, then by tensor rank.
    pub ranks: Vec<RankPlan>,
}

impl Plan {
    /// Nodes that have a rank, each once, the leading one first.
    pub fn nodes(&self) -> Vec<&NodeId> {
        let mut nodes: Vec<&NodeId> = Vec::new();
        for rank in &self.ranks {
            if !nodes.contains(&&rank.node) {
                nodes.push(&rank.node);
            }
        }
        nodes
    }

    /// Whether its ranks are on more than one node.
    pub fn is_divided(&self) -> bool {
        self.ranks.iter().any(|rank| Some(&rank.node) != self.ranks.first().map(|first| &first.node))
    }
}

/// One rank's place and share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankPlan {
    /// Where.
    pub node: NodeId,
    /// Device of that node.
    pub device: u32,
    /// Position among the tensor-parallel ranks of its stage.
    pub tensor_rank: usize,
    /// Tensor-parallel degree.
    pub tensor_size: usize,
    /// Position among the groups of ranks that the experts of its stage are divided over.
    #[serde(default)]
    pub expert_rank: usize,
    /// How many such groups there are.
    #[serde(default = "one")]
    pub expert_size: usize,
    /// Layers of its stage.
    pub layers: Range<usize>,
    /// Experts of those of its layers that have any; empty where the model has none.
    #[serde(default)]
    pub experts: Range<usize>,
    /// Kernel threads.
    pub threads: usize,
    /// Bytes planned: weights, KV and workspace.
    pub memory: RankMemory,
}

fn one() -> usize {
    1
}

/// Bytes a rank was given.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankMemory {
    /// Weights, mapped or resident.
    pub weights_bytes: u64,
    /// Keys and values.
    pub kv_bytes: u64,
    /// Activations and logits.
    pub workspace_bytes: u64,
}

impl RankMemory {
    /// All of it.
    pub fn total_bytes(&self) -> u64 {
        self.weights_bytes.saturating_add(self.kv_bytes).saturating_add(self.workspace_bytes)
    }
}

/// Why a service cannot be placed: every constraint that failed, and the nearest plan that fits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Service.
    pub replica: ReplicaId,
    /// Key of the setting that this model cannot have on any machine; `None` where the machines are too small or too few.
    pub wrong_setting: Option<String>,
    /// What did not hold, with numbers.
    pub constraints: Vec<FailedConstraint>,
    /// Settings that would fit, as keys and values of the specification.
    pub nearest: Vec<(String, String)>,
}

/// One constraint and the devices that fail it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedConstraint {
    /// In words, with numbers.
    pub constraint: String,
    /// Devices that fail it.
    pub failed_devices: usize,
    /// Devices looked at.
    pub devices: usize,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} cannot be placed:", self.replica)?;
        for failed in &self.constraints {
            write!(f, " {} (fails on {} of {} devices);", failed.constraint, failed.failed_devices, failed.devices)?;
        }
        if self.nearest.is_empty() {
            return write!(f, " no smaller setting of this model fits");
        }
        let nearest: Vec<String> = self.nearest.iter().map(|(key, value)| format!("{key}={value}")).collect();
        write!(f, " the nearest plan that fits: {}", nearest.join(" "))
    }
}

impl std::error::Error for Refusal {}

/// What placement needs to know of a model, from its metadata alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelFacts {
    /// Layers.
    pub layers: usize,
    /// The checkpoint's own context length.
    pub context_length: usize,
    /// Bytes of all weights.
    pub weights_bytes: u64,
    /// Bytes of one KV slot over all layers, with the wished KV type.
    pub kv_slot_bytes: u64,
    /// Bytes of activations and logits for the wished step and batch size.
    pub workspace_bytes: u64,
    /// Content digest of the weights, so that every worker serves what was planned for.
    #[serde(default)]
    pub weights_digest: String,
    /// What can be divided among ranks.
    #[serde(default)]
    pub shape: ModelShape,
}

/// What of a model can be divided among ranks, and how many bytes each part has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Experts of a layer that has them; 0 without.
    pub experts: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Rows of the vocabulary.
    pub vocab_size: usize,
    /// Bytes of the embedding table, on the first stage.
    pub embedding_bytes: u64,
    /// Bytes of the output head, on the last stage; 0 where it is the embedding table.
    pub head_bytes: u64,
    /// Bytes of each layer's weights.
    pub layer_bytes: Vec<u64>,
    /// Bytes of each layer's routed experts, which `layer_bytes` include; 0 for a layer without, nothing for a model
    /// without.
    #[serde(default)]
    pub expert_bytes: Vec<u64>,
    /// Bytes of a layer that a tensor rank has beyond its part ([`crate::tree::layer_share`]), at most, where 2, 4 and 8
    /// ranks share it: norms, routers, latents, heads that several ranks need. Nothing where that was not counted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tensor_extra_bytes: Vec<u64>,
}

/// A device that could take a rank.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceView {
    /// Node it belongs to.
    pub node: NodeId,
    /// Number within the node.
    pub device: u32,
    /// Memory that is free for Forge now.
    pub free_bytes: ByteSize,
    /// Cores.
    pub threads: usize,
}
