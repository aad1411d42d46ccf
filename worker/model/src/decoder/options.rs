//! How a decoder is built: pool and workspace sizes, and which part of the model this rank holds.

use std::ops::Range;

use forge_kernels::KvDType;
use forge_shared::ids::Epoch;

use crate::arch::Architecture;
use crate::error::{ModelError, Result};
use crate::progress::LoadProgress;

/// What a rank holds: a tensor-parallel share of some layers, and some of their experts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    /// Rank within the tensor-parallel group.
    pub tp_rank: usize,
    /// Ranks of the tensor-parallel group: a power of two.
    pub tp_size: usize,
    /// Rank among those that divide the experts.
    pub ep_rank: usize,
    /// How many divide them: a power of two, at most the number of experts.
    pub ep_size: usize,
    /// Layers of this pipeline stage; all where `None`.
    pub layers: Option<Range<usize>>,
}

impl Default for Shard {
    /// The whole model.
    fn default() -> Self {
        Shard { tp_rank: 0, tp_size: 1, ep_rank: 0, ep_size: 1, layers: None }
    }
}

/// Sizes a decoder is built for. All ranks of a replica get the same but for `shard`.
#[derive(Debug, Clone)]
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
    /// Where loading tells how far it is.
    pub progress: LoadProgress,
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
            progress: LoadProgress::default(),
        }
    }
}

impl DecoderOptions {
    /// Refuses sizes of zero or beyond what positions and row numbers can count, and a length beyond the context.
    pub(crate) fn check(&self, architecture: &Architecture) -> Result<()> {
        let sizes = [
            ("max_model_len", self.max_model_len),
            ("block_size", self.block_size),
            ("kv_blocks", self.kv_blocks),
            ("max_step_rows", self.max_step_rows),
            ("max_logits_rows", self.max_logits_rows),
        ];
        let wrong = |option, value: usize, reason: String| Err(ModelError::Option { option, value: value.to_string(), reason });
        for (option, value) in sizes {
            if value == 0 || u32::try_from(value).is_err() {
                return wrong(option, value, "must be at least 1 and below 2^32".to_owned());
            }
        }
        if self.kv_blocks.checked_mul(self.block_size).is_none_or(|slots| u32::try_from(slots).is_err()) {
            return wrong("kv_blocks", self.kv_blocks, format!("times block_size = {} is beyond 2^32 slots", self.block_size));
        }
        if self.max_model_len > architecture.context_length {
            return wrong("max_model_len", self.max_model_len, format!("the model's context is {}", architecture.context_length));
        }
        Ok(())
    }
}
