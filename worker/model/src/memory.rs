//! What a shard needs of memory, computed from metadata alone: for admission, `plan` and `show`.

use std::collections::BTreeMap;

use forge_kernels::DType;

use crate::arch::{Architecture, PositionSpec};
use crate::decoder::layout::Layout;
use crate::decoder::load::Loader;
use crate::decoder::options::DecoderOptions;
use crate::decoder::store::ByteCount;
use crate::decoder::workspace;
use crate::error::Result;
use crate::weights::DecoderRefs;

/// Bytes a rank needs. All are exact but for allocator rounding.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ModelMemory {
    /// Bytes of weights this rank reads where they lie in the file (mapped, or once in memory when eager).
    pub weights_bytes: usize,
    /// Bytes of weights copied or converted at load: vectors as f32, matrices that are transposed or whose rows lie in
    /// several places of the file. Each is made on its own, so loading needs no more than this at any time.
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

/// Bytes of a whole model's parts, as one rank without shards loads them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ModelParts {
    /// The embedding table.
    pub embedding_bytes: usize,
    /// The output head; 0 where it is the embedding table.
    pub head_bytes: usize,
    /// Each layer.
    pub layer_bytes: Vec<usize>,
    /// Of these, what routed experts have.
    pub expert_bytes: Vec<usize>,
    /// Where 2, 4 and 8 tensor ranks share a layer: the most that one has of any beyond its part
    /// ([`forge_shared::tree::layer_share`]).
    pub tensor_extra_bytes: Vec<usize>,
}

impl ModelParts {
    /// The most that a rank with `part` has of a layer beyond its share of this whole.
    pub(crate) fn extra_bytes(&self, part: &ModelParts, (numerator, denominator): (usize, usize)) -> usize {
        let beyond = |part: usize, whole: usize| part.saturating_sub(whole * numerator / denominator.max(1));
        let layers = self.layer_bytes.iter().zip(&self.expert_bytes).zip(part.layer_bytes.iter().zip(&part.expert_bytes));
        layers
            .map(|((all, routed), (part, part_routed))| beyond(part - part_routed, all - routed) + beyond(*part_routed, *routed))
            .max()
            .unwrap_or(0)
    }
}

/// Counts the parts of a model by the same walk that loads it. `layout` is that of the whole model.
///
/// # Errors
/// None but the loader's own, which counting has none of.
pub(crate) fn parts(architecture: &Architecture, refs: &DecoderRefs, layout: &Layout) -> Result<ModelParts> {
    let count_as = |layout: &Layout, load: &dyn Fn(&mut Loader<'_, ByteCount>) -> Result<()>| {
        let mut count = ByteCount::default();
        load(&mut Loader { store: &mut count, architecture, layout })?;
        Ok(count.mapped + count.gathered + count.converted)
    };
    let count = |load: &dyn Fn(&mut Loader<'_, ByteCount>) -> Result<()>| count_as(layout, load);
    let layers = |layout: &Layout| -> Result<Vec<usize>> {
        refs.layers.iter().map(|layer| count_as(layout, &|loader| loader.layer(layer).map(drop))).collect()
    };
    let layer_bytes = layers(layout)?;
    // What is left out where a rank has no expert.
    let without_bytes = layers(&Layout { experts: 0..0, ..layout.clone() })?;
    let expert_bytes = layer_bytes.iter().zip(&without_bytes).map(|(all, without)| all - without).collect();
    Ok(ModelParts {
        embedding_bytes: count(&|loader| loader.vocabulary(&refs.embedding).map(drop))?,
        head_bytes: match &refs.head {
            Some(head) => count(&|loader| loader.vocabulary(head).map(drop))?,
            None => 0,
        },
        layer_bytes,
        expert_bytes,
        tensor_extra_bytes: Vec::new(),
    })
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

/// Adds up what a rank with this layout loads and allocates; `largest_kv_block_bytes` is left at the rank's own.
///
/// # Errors
/// None but the loader's own, which counting has none of.
pub(crate) fn of(architecture: &Architecture, refs: &DecoderRefs, layout: &Layout, options: &DecoderOptions) -> Result<ModelMemory> {
    let mut count = ByteCount::default();
    Loader { store: &mut count, architecture, layout }.load(refs)?;
    let rope_bytes = match &architecture.position {
        // One cosine and one sine per rotated pair and position.
        PositionSpec::Rope(rope) => rope.tables.iter().map(|table| options.max_model_len * table.rotary_dim * size_of::<f32>()).sum(),
        PositionSpec::Learned { .. } | PositionSpec::Alibi(_) => 0,
    };
    let kv_block_bytes = layout.kv_shape(architecture, options).block_bytes();
    Ok(ModelMemory {
        weights_bytes: count.mapped,
        copied_bytes: count.gathered + count.converted,
        kv_block_bytes,
        largest_kv_block_bytes: kv_block_bytes,
        workspace_bytes: workspace::bytes(architecture, layout, options)?,
        rope_bytes,
    })
}
