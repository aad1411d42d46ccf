//! What a shard needs of memory, computed from metadata alone: for admission, `plan` and `show`.

use std::collections::BTreeMap;

use forge_kernels::DType;

use crate::arch::{Architecture, PositionSpec};
use crate::decoder::layout::Layout;
use crate::decoder::options::DecoderOptions;
use crate::weights::{DecoderRefs, LinearRef, MatrixRef, NormRef};

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

/// Adds up what a rank with this layout loads and allocates; `largest_kv_block_bytes` is left at the rank's own.
pub(crate) fn of(architecture: &Architecture, refs: &DecoderRefs, layout: &Layout, options: &DecoderOptions) -> ModelMemory {
    let mut sum = Sum::default();
    let vocabulary = layout.vocabulary.len();
    let tied_head = refs.head.is_none() && layout.last_stage;
    if layout.first_stage || tied_head {
        sum.matrix(&refs.embedding, vocabulary, refs.embedding.columns);
    }
    if let (Some(head), true) = (&refs.head, layout.last_stage) {
        sum.matrix(head, vocabulary, head.columns);
    }
    if let (Some(positions), true) = (&refs.positions, layout.first_stage) {
        sum.matrix(positions, positions.rows.len(), positions.columns);
    }
    if layout.last_stage {
        sum.norm(&refs.final_norm);
    }
    let head_dim = architecture.attention.head_dim;
    let (q, kv_runs, mlp) = (layout.heads.len() * head_dim, layout.kv_rows(head_dim), layout.mlp.len());
    for layer in &refs.layers[layout.layers.clone()] {
        sum.norm(&layer.attention_norm);
        sum.norm(&layer.mlp_norm);
        sum.rows(&layer.q, q);
        for linear in [&layer.k, &layer.v] {
            let rows = kv_runs.iter().map(|run| run.len()).sum();
            // Several runs of rows are joined in owned memory.
            if kv_runs.len() > 1 {
                sum.copied(linear.weight.slice_bytes(rows, linear.weight.columns) + bias_bytes(linear, rows));
            } else {
                sum.rows(linear, rows);
            }
        }
        sum.columns(&layer.out, q);
        layer.gate.iter().for_each(|gate| sum.rows(gate, mlp));
        sum.rows(&layer.up, mlp);
        sum.columns(&layer.down, mlp);
    }
    let rope_bytes = match &architecture.position {
        // One cosine and one sine per rotated pair and position.
        PositionSpec::Rope(rope) => rope.tables.iter().map(|table| options.max_model_len * table.rotary_dim * size_of::<f32>()).sum(),
        PositionSpec::Learned { .. } | PositionSpec::Alibi(_) => 0,
    };
    let kv_block_bytes = layout.kv_shape(architecture, options).block_bytes();
    ModelMemory {
        weights_bytes: sum.weights_bytes,
        copied_bytes: sum.copied_bytes,
        kv_block_bytes,
        largest_kv_block_bytes: kv_block_bytes,
        workspace_bytes: options.workspace(architecture, layout).bytes(),
        rope_bytes,
    }
}

fn bias_bytes(linear: &LinearRef, rows: usize) -> usize {
    if linear.bias.is_some() { rows * size_of::<f32>() } else { 0 }
}

#[derive(Default)]
struct Sum {
    weights_bytes: usize,
    copied_bytes: usize,
}

impl Sum {
    fn copied(&mut self, bytes: usize) {
        self.copied_bytes += bytes;
    }

    fn matrix(&mut self, matrix: &MatrixRef, rows: usize, columns: usize) {
        let bytes = matrix.slice_bytes(rows, columns);
        if matrix.transposed { self.copied_bytes += bytes } else { self.weights_bytes += bytes }
    }

    /// A product of which a rank has some outputs, with their biases.
    fn rows(&mut self, linear: &LinearRef, rows: usize) {
        self.matrix(&linear.weight, rows, linear.weight.columns);
        self.copied(bias_bytes(linear, rows));
    }

    /// A product of which a rank has some inputs; the bias is added by every rank.
    fn columns(&mut self, linear: &LinearRef, columns: usize) {
        self.matrix(&linear.weight, linear.weight.rows.len(), columns);
        self.copied(bias_bytes(linear, linear.weight.rows.len()));
    }

    fn norm(&mut self, norm: &NormRef) {
        let vectors = 1 + usize::from(norm.bias.is_some());
        self.copied(vectors * norm.weight.values.len() * size_of::<f32>());
    }
}
