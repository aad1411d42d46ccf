//! What a shard needs of memory, computed from metadata alone: for admission, `plan` and `show`.

use std::collections::BTreeMap;

use forge_kernels::DType;

/// Bytes a rank needs. All are exact but for allocator rounding.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ModelMemory {
    /// Bytes of weights this rank reads where they lie in the file (mapped, or once in memory when eager).
    pub weights_bytes: usize,
    /// Bytes of weights copied or converted at load: vectors as f32, transposed and replicated matrices.
    pub copied_bytes: usize,
    /// Bytes of one KV block on this rank, all its layers.
    pub kv_block_bytes: usize,
    /// Bytes of one KV block on the rank that has the most.
    pub largest_kv_block_bytes: usize,
    /// Bytes of the buffers a step works in, logits included.
    pub workspace_bytes: usize,
    /// Bytes of the tables of rotary positions.
    pub rope_bytes: usize,
}

impl ModelMemory {
    /// Everything but the KV pool.
    pub fn fixed_bytes(&self) -> usize {
        self.weights_bytes + self.copied_bytes + self.workspace_bytes + self.rope_bytes
    }
}

/// How much of the model is stored in which type.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Quantization {
    /// Per type: number of tensors and parameters in them, in the order of type names.
    pub types: BTreeMap<String, TypeCount>,
}

/// Tensors and parameters of one storage type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TypeCount {
    /// Tensors.
    pub tensors: usize,
    /// Parameters.
    pub parameters: usize,
}

impl Quantization {
    /// Counts one tensor.
    pub(crate) fn count(&mut self, dtype: DType, parameters: usize) {
        let entry = self.types.entry(dtype.to_string()).or_default();
        entry.tensors += 1;
        entry.parameters += parameters;
    }

    /// The type most parameters have, as one would name the file: `Q4_1`.
    pub fn main_type(&self) -> &str {
        self.types.iter().max_by_key(|(_, count)| count.parameters).map_or("none", |(name, _)| name)
    }
}
