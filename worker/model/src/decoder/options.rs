//! How a decoder is built: pool and workspace sizes, and which part of the model this rank holds.

use std::ops::Range;

use forge_kernels::KvDType;
use forge_shared::ids::Epoch;

/// What a rank holds: a tensor-parallel share of some layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    /// Rank within the tensor-parallel group.
    pub tp_rank: usize,
    /// Ranks of the tensor-parallel group: a power of two.
    pub tp_size: usize,
    /// Layers of this pipeline stage; all where `None`.
    pub layers: Option<Range<usize>>,
}

impl Default for Shard {
    /// The whole model.
    fn default() -> Self {
        Shard { tp_rank: 0, tp_size: 1, layers: None }
    }
}

/// Sizes a decoder is built for. All ranks of a replica get the same but for `shard`.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderOptions {
    /// Longest sequence, prompt and answer together; at most the model's context.
    pub max_model_len: usize,
    /// Token slots per KV block.
    pub block_size: usize,
    /// KV blocks to allocate.
    pub kv_blocks: usize,
    /// Storage type of keys and values.
    pub kv_dtype: KvDType,
    /// Most rows of a step: the workspace is allocated once for them.
    pub max_step_rows: usize,
    /// Rows of logits computed at a time. A step may ask for more: they are computed in several passes.
    pub max_logits_rows: usize,
    /// What this rank holds.
    pub shard: Shard,
    /// Epoch of the plan this rank was built for; older step plans are refused.
    pub epoch: Epoch,
    /// Digest of the weights, part of the numerics id.
    pub weights_digest: String,
    /// Look through all weights for NaN and infinities while loading.
    pub scan_values: bool,
}

impl DecoderOptions {
    /// One unsharded sequence after another, f32 keys and values: what tests and small embedders need.
    pub fn single_sequence(max_model_len: usize) -> Self {
        let block_size = 16;
        DecoderOptions {
            max_model_len,
            block_size,
            kv_blocks: max_model_len.div_ceil(block_size),
            kv_dtype: KvDType::F32,
            max_step_rows: max_model_len.min(512),
            max_logits_rows: 1,
            shard: Shard::default(),
            epoch: Epoch::default(),
            weights_digest: String::new(),
            scan_values: true,
        }
    }
}
