//! The `Backend` trait: what a decoder asks of a device, over a ragged batch of rows.
//!
//! A row is one token of one sequence; a [`Backend::Buffer`] is a row-major f32 matrix on the device with a
//! fixed capacity. Operations take the number of live rows and touch only those. They are enqueued in
//! order; [`Backend::read_rows`] waits for the result.
//!
//! What it is not: it does not own the model's structure (forge-model does) nor any transport between
//! ranks (forge-net does).
//!
//! Invariant: the result of a row depends on that row's inputs, the weights and the stored keys and values
//! only (P2); sums follow [`crate::tree`].

use std::ops::Range;
use std::sync::Arc;

use crate::batch::AttentionBatch;
use crate::dtype::{DType, KvDType};
use crate::error::Result;
use crate::scales::BlockScales;
use crate::tree::Segments;

/// A matrix [rows, columns] (output features × input features) as it lies in a file or in memory.
///
/// A shard is expressed by `offset`, `rows`, `columns` and `row_stride_bytes`: whole rows, or a run of whole
/// blocks of every row.
#[derive(Clone)]
pub struct MatrixSource {
    /// Tensor name, for errors.
    pub name: String,
    /// The bytes that hold the matrix: a mapped file or an owned copy. Kept alive by the weight.
    pub bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
    /// Byte offset of row 0, first block. No alignment is promised.
    pub offset: usize,
    /// Bytes from one row to the next.
    pub row_stride_bytes: usize,
    /// Output features in this shard.
    pub rows: usize,
    /// Input features in this shard.
    pub columns: usize,
    /// Storage type.
    pub dtype: DType,
    /// Scales beside the bytes, for 8-bit floats that have some.
    pub scales: Option<BlockScales>,
    /// How a row's sum is split into leaves (columns relative to this shard).
    pub segments: Segments,
}

impl std::fmt::Debug for MatrixSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MatrixSource")
            .field("name", &self.name)
            .field("rows", &self.rows)
            .field("columns", &self.columns)
            .field("dtype", &self.dtype)
            .finish_non_exhaustive()
    }
}

/// Which normalization.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// x / sqrt(mean(x²) + eps) · (weight + offset).
    Rms,
    /// (x − mean) / sqrt(var + eps) · weight + bias.
    Layer,
}

/// Parameters of [`Backend::norm`].
#[derive(Debug, Clone, Copy)]
pub struct NormParams {
    /// Kind.
    pub kind: NormKind,
    /// Added under the root.
    pub eps: f32,
    /// Added to the weight (Gemma: 1).
    pub weight_offset: f32,
}

/// How rotary pairs are laid out in a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeStyle {
    /// Pairs (i, i + R/2).
    Neox,
    /// Pairs (2i, 2i + 1).
    Gptj,
}

/// Rotary position parameters, computed once at load: row p of the tables is position p.
#[derive(Debug, Clone)]
pub struct RopeParams {
    /// Pair layout.
    pub style: RopeStyle,
    /// Rotated width R per head (even, ≤ head_dim); the rest passes.
    pub rotary_dim: usize,
    /// R/2 inverse frequencies (spec E.2).
    pub inverse_frequencies: Vec<f32>,
    /// Factor on cos and sin (yarn, longrope); 1 otherwise.
    pub attention_factor: f32,
    /// Positions to tabulate.
    pub max_positions: usize,
}

/// Activation function of an MLP.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ActivationKind {
    /// x · sigmoid(x).
    Silu,
    /// Exact GELU, by erf.
    GeluErf,
    /// GELU, tanh approximation (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
    /// max(x, 0).
    Relu,
    /// GPT-OSS: g = min(gate, limit), u = up limited to ±limit, (u + 1) · g · sigmoid(alpha · g). Needs `up`.
    ClampedSwiglu {
        /// Greatest gate, greatest magnitude of up.
        limit: f32,
        /// Factor inside the sigmoid.
        alpha: f32,
    },
}

/// Shape of a rank's KV pool: for each layer, keys and values of `blocks` × `block_size` slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Layers of this rank's stage.
    pub layers: usize,
    /// KV heads of this rank.
    pub kv_heads: usize,
    /// Width of a key head.
    pub head_dim: usize,
    /// Width of a value head.
    pub value_dim: usize,
    /// Slots per block.
    pub block_size: usize,
    /// Blocks.
    pub blocks: usize,
    /// Storage type.
    pub dtype: KvDType,
}

impl KvShape {
    /// Bytes of one block over all layers: keys, values and, where the type has them, their scales.
    pub fn block_bytes(&self) -> usize {
        let token = (self.head_dim + self.value_dim) * self.dtype.bytes() + 2 * self.dtype.scale_bytes();
        self.layers * self.kv_heads * self.block_size * token
    }
}

/// Parameters of [`Backend::attention`], per layer. Keys are `head_dim` wide, values and outputs `value_dim`.
pub struct AttentionParams<'a, B: Backend> {
    /// Query heads of this rank.
    pub heads: usize,
    /// KV heads of this rank; query head h reads KV head h / (heads / kv_heads).
    pub kv_heads: usize,
    /// Width of a query and key head.
    pub head_dim: usize,
    /// Width of a value head and of an output head.
    pub value_dim: usize,
    /// Factor on scores.
    pub scale: f32,
    /// Sliding window: position p sees keys in (p − window, p].
    pub window: Option<u32>,
    /// Scores become tanh(score / cap) · cap, before any bias.
    pub softcap: Option<f32>,
    /// A bias on scores that is linear in positions.
    pub alibi: Option<Alibi<'a, B>>,
    /// One logit per query head of this rank: it takes part in the softmax's denominator and has no value.
    pub sinks: Option<&'a B::Vector>,
}

// Derived instances would ask the same of B.
impl<B: Backend> Clone for AttentionParams<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend> Copy for AttentionParams<'_, B> {}

/// Linear biases on scores.
pub struct Alibi<'a, B: Backend> {
    /// Positive slope per query head of this rank.
    pub slopes: &'a B::Vector,
    /// Factor on the bias.
    pub factor: f32,
    /// false: score −= (slope · factor) · (query position − key position), rounded once.
    /// true, as Falcon-RW was trained: score += bf16(bf16(slope) · bf16(key position)) · factor.
    pub rounded: bool,
}

impl<B: Backend> Clone for Alibi<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<B: Backend> Copy for Alibi<'_, B> {}

/// Where runs of columns lie in a row: run h begins at `start` + h · `stride`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Columns {
    /// First column of the first run.
    pub start: usize,
    /// Columns from one run to the next; 0 reads the same run again.
    pub stride: usize,
}

/// How many runs of columns, and how wide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadRuns {
    /// Runs.
    pub heads: usize,
    /// Columns of a run.
    pub width: usize,
}

/// A run of rows that go through one matrix: the tokens of an expert.
pub struct RowGroup<'a, B: Backend> {
    /// Rows of the input and of the output.
    pub rows: Range<usize>,
    /// The matrix; all groups of a product have one shape.
    pub weight: &'a B::Weight,
    /// Added after the tree's sum.
    pub bias: Option<&'a B::Vector>,
}

/// One product of a [`Backend::linear_groups`] call.
pub struct GroupProduct<'a, B: Backend> {
    /// Disjoint runs of rows.
    pub groups: Vec<RowGroup<'a, B>>,
    /// Receives the rows of all groups; others stay as they are.
    pub out: &'a mut B::Buffer,
}

/// Which experts a step's tokens chose, and with which weights.
#[derive(Debug, Clone, Copy)]
pub struct ExpertChoices<'a> {
    /// Experts of the layer: the leaves of the tree.
    pub leaves: usize,
    /// Token t's entries are `starts[t]..starts[t + 1]`; one more than tokens.
    pub starts: &'a [u32],
    /// Per token, experts ascending.
    pub entries: &'a [ExpertEntry],
    /// Per token, the factor on the shared expert's output; 1 where not given.
    pub shared_weights: Option<&'a [f32]>,
}

/// One expert of one token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ExpertEntry {
    /// Which expert.
    pub expert: u32,
    /// Row of the experts' outputs that holds its output for this token.
    pub row: u32,
    /// Factor on it.
    pub weight: f32,
}

/// One product of a [`Backend::linear`] call: `out[row] = weight · x[row] + bias`.
pub struct Product<'a, B: Backend> {
    /// The matrix.
    pub weight: &'a B::Weight,
    /// Added after the tree's sum, on the rank that owns it.
    pub bias: Option<&'a B::Vector>,
    /// Receives [rows, weight.rows].
    pub out: &'a mut B::Buffer,
}

/// A device and its kernels. See the module documentation for the invariant all implementations keep.
pub trait Backend: Send + Sync + Sized + 'static {
    /// Row-major f32 matrix of fixed capacity.
    type Buffer: Send + Sync;
    /// A resident or mapped weight matrix.
    type Weight: Send + Sync;
    /// A resident f32 vector (norm weight, bias).
    type Vector: Send + Sync;
    /// Tabulated cos and sin.
    type RopeTable: Send + Sync;
    /// Keys and values of all layers of a rank.
    type KvPool: Send + Sync;

    /// Backend, kernel revision and path, accumulation layout: the device's part of the numerics id.
    fn numerics_id(&self) -> String;

    /// A zeroed matrix of capacity `rows` × `width`.
    fn buffer(&self, rows: usize, width: usize) -> Result<Self::Buffer>;
    /// Width of a buffer.
    fn width(&self, buffer: &Self::Buffer) -> usize;
    /// Takes a matrix in, checking that its bytes are all there.
    fn weight(&self, source: MatrixSource) -> Result<Self::Weight>;
    /// Takes a vector in.
    fn vector(&self, values: &[f32]) -> Result<Self::Vector>;
    /// Tabulates rotary positions.
    fn rope_table(&self, params: &RopeParams) -> Result<Self::RopeTable>;
    /// Allocates a zeroed KV pool.
    fn kv_pool(&self, shape: KvShape) -> Result<Self::KvPool>;

    /// Copies host values [rows.len(), width] into the given rows.
    fn write_rows(&self, buffer: &mut Self::Buffer, rows: Range<usize>, values: &[f32]) -> Result<()>;
    /// Waits for the enqueued operations and copies rows [rows.len(), width] to the host.
    fn read_rows(&self, buffer: &Self::Buffer, rows: Range<usize>, values: &mut [f32]) -> Result<()>;

    /// `out[i] = table[ids[i]] · scale`; an id outside `vocabulary` gives a row of −0.0 (another rank holds it).
    /// `vocabulary` is the range of ids whose rows the table holds.
    fn embed(&self, table: &Self::Weight, vocabulary: Range<u32>, ids: &[u32], scale: f32, out: &mut Self::Buffer) -> Result<()>;
    /// `x[i] += table[ids[i]]` (learned positions; the caller has added the offset).
    fn embed_add(&self, table: &Self::Weight, ids: &[u32], x: &mut Self::Buffer) -> Result<()>;
    /// out = norm(x). Rows of x and out have equal width.
    fn norm(
        &self,
        x: &Self::Buffer,
        rows: usize,
        weight: Option<&Self::Vector>,
        bias: Option<&Self::Vector>,
        params: NormParams,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// Several products of the same input (q, k, v; gate, up): activations are quantized once.
    fn linear(&self, x: &Self::Buffer, rows: usize, products: &mut [Product<'_, Self>]) -> Result<()>;
    /// Products of groups of rows, each group with its own matrix: a mixture's experts. All products read the same
    /// groups of rows. A row's result has the bits that [`Backend::linear`] on that row alone would give.
    fn linear_groups(&self, x: &Self::Buffer, products: &mut [GroupProduct<'_, Self>]) -> Result<()>;
    /// `out[token]` = the tree over experts of weight · `y[row]`, absent experts skipped, then + `shared[token]` times its
    /// weight. Each product is rounded before it is added. A sum of nothing is −0.0.
    fn combine_experts(
        &self,
        y: &Self::Buffer,
        shared: Option<&Self::Buffer>,
        choices: ExpertChoices<'_>,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// x = norm of each of `heads` heads of each row by itself, in place. Weight and bias have one head's width (the same
    /// for all heads) or a row's (each its own).
    fn norm_heads(
        &self,
        x: &mut Self::Buffer,
        rows: usize,
        heads: usize,
        weight: Option<&Self::Vector>,
        bias: Option<&Self::Vector>,
        params: NormParams,
    ) -> Result<()>;
    /// `out[row]` = Σ x², the leaves of `segments` added in the tree's order; `out` has one column. Ranks that share the
    /// columns add theirs and have the bits of one.
    fn square_sums(&self, x: &Self::Buffer, rows: usize, segments: &Segments, out: &mut Self::Buffer) -> Result<()>;
    /// x = x / sqrt(sums / width + eps) · (weight + offset): an RMS norm over `width` columns, of which x may be a part.
    fn scale_by_square_sums(
        &self,
        x: &mut Self::Buffer,
        rows: usize,
        sums: &Self::Buffer,
        width: usize,
        weight: &Self::Vector,
        params: NormParams,
    ) -> Result<()>;
    /// x limited to ±limit; NaN stays.
    fn clamp(&self, x: &mut Self::Buffer, rows: usize, limit: f32) -> Result<()>;
    /// x = x · factor, then tanh(x / cap) · cap where there is a cap.
    fn scale_and_cap(&self, x: &mut Self::Buffer, rows: usize, factor: f32, cap: Option<f32>) -> Result<()>;
    /// Copies run h of `from` in each row of x to run h of `to` in the same row of `out`.
    fn copy_columns(&self, x: &Self::Buffer, rows: usize, from: Columns, out: &mut Self::Buffer, to: Columns, runs: HeadRuns)
    -> Result<()>;
    /// Rotates `heads` heads of every row in place, from column `offset` of each; `positions[row]` picks the table's row.
    fn rope(
        &self,
        x: &mut Self::Buffer,
        heads: usize,
        head_dim: usize,
        offset: usize,
        positions: &[u32],
        table: &Self::RopeTable,
    ) -> Result<()>;
    /// Rounds k rows (kv_heads · head_dim) and v rows (kv_heads · value_dim) to the pool's type and stores row i at slot
    /// `slots[i]` = block · block_size + offset.
    fn kv_write(&self, pool: &mut Self::KvPool, layer: usize, k: &Self::Buffer, v: &Self::Buffer, slots: &[u32]) -> Result<()>;
    /// Copies whole blocks (from, to) in all layers: copy on write.
    fn kv_copy(&self, pool: &mut Self::KvPool, pairs: &[(u32, u32)]) -> Result<()>;
    /// Causal attention of every row over the stored keys of its sequence.
    /// Reduction: (max, sum, accumulator) per 256 absolute positions, combined in order.
    fn attention(
        &self,
        q: &Self::Buffer,
        pool: &Self::KvPool,
        layer: usize,
        batch: AttentionBatch<'_>,
        params: AttentionParams<'_, Self>,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// gate = activation(gate) · up, or gate = activation(gate) without `up`.
    fn activate(&self, gate: &mut Self::Buffer, rows: usize, up: Option<&Self::Buffer>, kind: ActivationKind) -> Result<()>;
    /// x += y · scale.
    fn add(&self, x: &mut Self::Buffer, y: &Self::Buffer, rows: usize, scale: f32) -> Result<()>;
    /// `out[i] = x[rows[i]]`.
    fn gather_rows(&self, x: &Self::Buffer, rows: &[u32], out: &mut Self::Buffer) -> Result<()>;

    /// Host view of the first `rows` rows for a collective that moves host memory, where the device has one.
    fn host_rows_mut<'a>(&self, buffer: &'a mut Self::Buffer, rows: usize) -> Option<&'a mut [f32]>;
}
