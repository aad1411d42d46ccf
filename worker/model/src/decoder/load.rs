//! A rank's weights on the backend, cut from the checkpoint by its layout.

use std::ops::Range;

use forge_kernels::{Backend, DType, MatrixSource, RopeParams, Segments};

use super::layout::Layout;
use crate::arch::{Architecture, PositionSpec, RopeLayers};
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::scan;
use crate::weights::{DecoderRefs, LayerRefs, LinearRef, MatrixRef, NormRef, VectorRef};

pub(crate) struct Norm<B: Backend> {
    pub weight: B::Vector,
    pub bias: Option<B::Vector>,
}

pub(crate) struct Linear<B: Backend> {
    pub weight: B::Weight,
    pub bias: Option<B::Vector>,
}

pub(crate) struct AttentionWeights<B: Backend> {
    pub q: Linear<B>,
    pub k: Linear<B>,
    pub v: Linear<B>,
    pub out: B::Weight,
}

pub(crate) struct MlpWeights<B: Backend> {
    pub gate: Option<Linear<B>>,
    pub up: Linear<B>,
    pub down: B::Weight,
}

/// A layer's weights. Biases of row-split products are tables of one row: they are added once, after the sum over
/// ranks, and in the same way when there is only one.
pub(crate) struct Layer<B: Backend> {
    pub attention_norm: Norm<B>,
    pub attention: Option<AttentionWeights<B>>,
    pub out_bias: Option<B::Weight>,
    pub mlp_norm: Norm<B>,
    pub mlp: Option<MlpWeights<B>>,
    pub down_bias: Option<B::Weight>,
}

/// A rank's weights.
pub(crate) struct Weights<B: Backend> {
    /// Rows of the embedding (also the head where tied), where this stage needs them.
    pub embedding: Option<B::Weight>,
    pub positions: Option<B::Weight>,
    pub rope: Option<B::RopeTable>,
    pub layers: Vec<Layer<B>>,
    pub final_norm: Option<Norm<B>>,
    /// `None` where the head is the embedding, or on another stage.
    pub head: Option<B::Weight>,
}

/// What is needed to load.
pub(crate) struct Loader<'a, B: Backend> {
    pub backend: &'a B,
    pub checkpoint: &'a Checkpoint,
    pub architecture: &'a Architecture,
    pub layout: &'a Layout,
    /// Collects the matrices to look through for NaN; `None` where that is turned off.
    pub scanned: Option<Vec<MatrixSource>>,
}

impl<B: Backend> Loader<'_, B> {
    /// Loads everything of this rank.
    ///
    /// # Errors
    /// Weights that hold NaN or infinities; what the backend refuses.
    pub fn load(mut self, refs: &DecoderRefs, max_positions: usize) -> Result<Weights<B>> {
        let layout = self.layout;
        let tied = refs.head.is_none();
        let needs_embedding = layout.first_stage || (layout.last_stage && tied);
        let embedding = if needs_embedding { self.vocabulary(&refs.embedding)? } else { None };
        let head = match &refs.head {
            Some(head) if layout.last_stage => self.vocabulary(head)?,
            _ => None,
        };
        let positions = match &refs.positions {
            Some(positions) if layout.first_stage => Some(self.matrix(positions, 0..positions.rows.len())?),
            _ => None,
        };
        let rope = self.rope(refs, max_positions)?;
        let layers = refs.layers[layout.layers.clone()].iter().map(|layer| self.layer(layer)).collect::<Result<_>>()?;
        let final_norm = if layout.last_stage { Some(self.norm(&refs.final_norm)?) } else { None };
        if let Some(matrices) = &self.scanned {
            scan::scan(matrices)?;
        }
        Ok(Weights { embedding, positions, rope, layers, final_norm, head })
    }

    fn weight(&mut self, source: MatrixSource) -> Result<B::Weight> {
        if let Some(scanned) = &mut self.scanned {
            scanned.push(source.clone());
        }
        Ok(self.backend.weight(source)?)
    }

    fn matrix(&mut self, matrix: &MatrixRef, rows: Range<usize>) -> Result<B::Weight> {
        let columns = matrix.columns;
        self.weight(matrix.slice(self.checkpoint, rows, 0..columns, Segments::whole(columns))?)
    }

    fn vocabulary(&mut self, matrix: &MatrixRef) -> Result<Option<B::Weight>> {
        let rows = self.layout.vocabulary.clone();
        if rows.is_empty() { Ok(None) } else { self.matrix(matrix, rows).map(Some) }
    }

    fn norm(&self, norm: &NormRef) -> Result<Norm<B>> {
        let vector = |vector: &VectorRef| -> Result<B::Vector> { Ok(self.backend.vector(&vector.read_all(self.checkpoint)?)?) };
        Ok(Norm { weight: vector(&norm.weight)?, bias: norm.bias.as_ref().map(vector).transpose()? })
    }

    /// Runs of rows of a product, with the bias of those rows.
    fn linear(&mut self, linear: &LinearRef, runs: &[Range<usize>]) -> Result<Linear<B>> {
        let source = linear.weight.gather(self.checkpoint, runs)?;
        let bias = match &linear.bias {
            Some(bias) => Some(self.backend.vector(&bias.read(self.checkpoint, runs)?)?),
            None => None,
        };
        Ok(Linear { weight: self.weight(source)?, bias })
    }

    /// Columns of a product that ranks sum together.
    fn row_split(&mut self, linear: &LinearRef, columns: Range<usize>, segments: &Segments) -> Result<B::Weight> {
        let rows = 0..linear.weight.rows.len();
        self.weight(linear.weight.slice(self.checkpoint, rows, columns, segments.clone())?)
    }

    /// The bias of a row-split product, as a table of one row.
    fn bias_table(&self, linear: &LinearRef) -> Result<Option<B::Weight>> {
        let Some(bias) = &linear.bias else { return Ok(None) };
        let values = bias.read_all(self.checkpoint)?;
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Ok(Some(self.backend.weight(MatrixSource {
            name: bias.name.clone(),
            row_stride_bytes: bytes.len(),
            bytes: std::sync::Arc::new(bytes),
            offset: 0,
            rows: 1,
            columns: values.len(),
            dtype: DType::F32,
            scales: None,
            segments: Segments::whole(values.len()),
        })?))
    }

    fn layer(&mut self, layer: &LayerRefs) -> Result<Layer<B>> {
        let layout = self.layout;
        let head_dim = self.architecture.attention.head_dim;
        let q_rows = layout.heads.start * head_dim..layout.heads.end * head_dim;
        let attention = match &layout.attention_segments {
            Some(segments) => {
                let kv_rows = layout.kv_rows(head_dim);
                Some(AttentionWeights {
                    q: self.linear(&layer.q, std::slice::from_ref(&q_rows))?,
                    k: self.linear(&layer.k, &kv_rows)?,
                    v: self.linear(&layer.v, &kv_rows)?,
                    out: self.row_split(&layer.out, q_rows, segments)?,
                })
            }
            None => None,
        };
        let mlp_rows = std::slice::from_ref(&layout.mlp);
        let mlp = match &layout.mlp_segments {
            Some(segments) => Some(MlpWeights {
                gate: layer.gate.as_ref().map(|gate| self.linear(gate, mlp_rows)).transpose()?,
                up: self.linear(&layer.up, mlp_rows)?,
                down: self.row_split(&layer.down, layout.mlp.clone(), segments)?,
            }),
            None => None,
        };
        Ok(Layer {
            attention_norm: self.norm(&layer.attention_norm)?,
            attention,
            out_bias: self.bias_table(&layer.out)?,
            mlp_norm: self.norm(&layer.mlp_norm)?,
            mlp,
            down_bias: self.bias_table(&layer.down)?,
        })
    }

    fn rope(&self, refs: &DecoderRefs, max_positions: usize) -> Result<Option<B::RopeTable>> {
        let PositionSpec::Rope(RopeLayers { tables, .. }) = &self.architecture.position else { return Ok(None) };
        let rope = &tables[0];
        let divisors = refs.rope_divisors.as_ref().map(|divisors| divisors.read_all(self.checkpoint)).transpose()?;
        let params = RopeParams {
            style: rope.style,
            rotary_dim: rope.rotary_dim,
            inverse_frequencies: rope.inverse_frequencies(max_positions, divisors.as_deref()),
            attention_factor: rope.attention_factor(max_positions),
            max_positions,
        };
        Ok(Some(self.backend.rope_table(&params)?))
    }
}
