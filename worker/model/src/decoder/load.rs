//! Cuts a rank's weights from the checkpoint by its layout.
//!
//! One walk over the layers, for loading ([`BackendStore`]) and for counting bytes beforehand
//! ([`super::store::ByteCount`]).

use std::ops::Range;

use forge_kernels::{Backend, RopeParams, Segments};

use super::layout::{Inner, Layout};
use super::loaded::*;
use super::options::DecoderOptions;
use super::store::{BackendStore, Part, Slots, Store};
use crate::arch::{Architecture, PositionSpec, QkNormOver};
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::memory::ModelMemory;
use crate::scan;
use crate::weights::*;

/// What a rank loads from, and onto which backend.
pub(crate) struct Origin<'a, B: Backend> {
    pub backend: &'a B,
    pub checkpoint: &'a Checkpoint,
    pub architecture: &'a Architecture,
    pub refs: &'a DecoderRefs,
    pub layout: &'a Layout,
}

impl<B: Backend> Origin<'_, B> {
    /// Loads all weights of the rank, whose `memory` is known; with `scan_values` it looks through them for NaN and
    /// infinities.
    ///
    /// # Errors
    /// Weights that hold such values; what the backend refuses.
    pub fn load(&self, memory: &ModelMemory, options: &DecoderOptions) -> Result<Weights<B>> {
        let progress = &options.progress;
        let scanned_bytes = if options.scan_values { memory.weights_bytes + memory.copied_bytes } else { 0 };
        progress.begin(memory.copied_bytes + scanned_bytes);
        let scanned = options.scan_values.then(Vec::new);
        let mut store = BackendStore { backend: self.backend, checkpoint: self.checkpoint, scanned, progress };
        let weights = Loader { store: &mut store, architecture: self.architecture, layout: self.layout }.load(self.refs)?;
        if let Some(matrices) = &store.scanned {
            scan::scan(self.checkpoint.path(), matrices, progress)?;
        }
        progress.end();
        Ok(weights)
    }

    /// Tabulates rotary positions: a table for each of the architecture's.
    ///
    /// # Errors
    /// Stored divisors that are not finite; a backend without the memory.
    pub fn rope_tables(&self, max_positions: usize) -> Result<Vec<B::RopeTable>> {
        let PositionSpec::Rope(rope) = &self.architecture.position else { return Ok(Vec::new()) };
        let mut tables = Vec::with_capacity(rope.tables.len());
        for (table, stored) in rope.tables.iter().zip(&self.refs.rope_divisors) {
            let chosen = table.scaling.stored_choice(max_positions).and_then(|choice| stored.get(choice));
            let divisors = chosen.map(|divisors| divisors.read_all(self.checkpoint)).transpose()?;
            tables.push(self.backend.rope_table(&RopeParams {
                style: table.style,
                rotary_dim: table.rotary_dim,
                inverse_frequencies: table.inverse_frequencies(max_positions, divisors.as_deref()),
                attention_factor: table.attention_factor(max_positions),
                max_positions,
            })?);
        }
        Ok(tables)
    }
}

/// The walk.
pub(crate) struct Loader<'a, S: Store> {
    pub store: &'a mut S,
    pub architecture: &'a Architecture,
    pub layout: &'a Layout,
}

type Weight<S> = <<S as Store>::Slots as Slots>::Weight;

impl<S: Store> Loader<'_, S> {
    /// Takes in everything of this rank.
    ///
    /// # Errors
    /// Those of the store.
    pub fn load(mut self, refs: &DecoderRefs) -> Result<Weights<S::Slots>> {
        let Layout { first_stage, last_stage, heads, layers, .. } = self.layout;
        let tied = refs.head.is_none();
        let embedding = if *first_stage || (*last_stage && tied) { self.vocabulary(&refs.embedding)? } else { None };
        let head = match &refs.head {
            Some(head) if *last_stage => self.vocabulary(head)?,
            _ => None,
        };
        let head_bias = match &refs.head_bias {
            Some(bias) if *last_stage && !self.layout.vocabulary.is_empty() => {
                Some(self.store.vector(bias, std::slice::from_ref(&self.layout.vocabulary))?)
            }
            _ => None,
        };
        let alibi_slopes = match &self.architecture.position {
            PositionSpec::Alibi(alibi) if !heads.is_empty() => Some(self.store.values(&alibi.slopes[heads.clone()])?),
            _ => None,
        };
        Ok(Weights {
            embedding,
            embedding_norm: self.norm_where(*first_stage, refs.embedding_norm.as_ref())?,
            project_in: self.whole_where(*first_stage, refs.project_in.as_ref().map(|linear| &linear.weight))?,
            positions: self.whole_where(*first_stage, refs.positions.as_ref())?,
            alibi_slopes,
            layers: refs.layers[layers.clone()].iter().map(|layer| self.layer(layer)).collect::<Result<_>>()?,
            final_norm: self.norm_where(*last_stage, refs.final_norm.as_ref())?,
            project_out: self.whole_where(*last_stage, refs.project_out.as_ref().map(|linear| &linear.weight))?,
            head,
            head_bias,
        })
    }

    fn rows(&mut self, matrix: &MatrixRef, rows: &[Range<usize>]) -> Result<Weight<S>> {
        let columns = matrix.columns;
        self.store.weight(Part { matrix, rows, columns: 0..columns, segments: Segments::whole(columns) })
    }

    fn whole(&mut self, matrix: &MatrixRef) -> Result<Weight<S>> {
        self.rows(matrix, std::slice::from_ref(&matrix.all_rows()))
    }

    fn whole_where(&mut self, there: bool, matrix: Option<&MatrixRef>) -> Result<Option<Weight<S>>> {
        matrix.filter(|_| there).map(|matrix| self.whole(matrix)).transpose()
    }

    pub(crate) fn vocabulary(&mut self, matrix: &MatrixRef) -> Result<Option<Weight<S>>> {
        let rows = &self.layout.vocabulary;
        if rows.is_empty() { Ok(None) } else { self.rows(matrix, std::slice::from_ref(rows)).map(Some) }
    }

    /// Runs of a norm's parameters.
    fn norm_part(&mut self, norm: &NormRef, wanted: &[Range<usize>]) -> Result<Norm<S::Slots>> {
        let mut vector = |vector: &Option<VectorRef>| vector.as_ref().map(|vector| self.store.vector(vector, wanted)).transpose();
        Ok(Norm { weight: vector(&norm.weight)?, bias: vector(&norm.bias)? })
    }

    fn norm(&mut self, norm: &NormRef) -> Result<Norm<S::Slots>> {
        let length = norm.weight.as_ref().or(norm.bias.as_ref()).map_or(0, VectorRef::len);
        self.norm_part(norm, std::slice::from_ref(&(0..length)))
    }

    fn norm_where(&mut self, there: bool, norm: Option<&NormRef>) -> Result<Option<Norm<S::Slots>>> {
        norm.filter(|_| there).map(|norm| self.norm(norm)).transpose()
    }

    /// Runs of rows of a product, with the bias of those rows.
    fn linear(&mut self, linear: &LinearRef, runs: &[Range<usize>]) -> Result<Linear<S::Slots>> {
        let weight = self.rows(&linear.weight, runs)?;
        let bias = linear.bias.as_ref().map(|bias| self.store.vector(bias, runs)).transpose()?;
        Ok(Linear { weight, bias })
    }

    fn whole_linear(&mut self, linear: &LinearRef) -> Result<Linear<S::Slots>> {
        self.linear(linear, std::slice::from_ref(&linear.weight.all_rows()))
    }

    /// Columns of a product that ranks sum together.
    fn row_split(&mut self, matrix: &MatrixRef, columns: Range<usize>, segments: &Segments) -> Result<Weight<S>> {
        let rows = matrix.all_rows();
        self.store.weight(Part { matrix, rows: std::slice::from_ref(&rows), columns, segments: segments.clone() })
    }

    /// The bias of a row-split product, as a table of one row.
    fn bias_table(&mut self, linear: &LinearRef) -> Result<Option<Weight<S>>> {
        linear.bias.as_ref().map(|bias| self.store.table(&[bias])).transpose()
    }

    pub(crate) fn layer(&mut self, layer: &LayerRefs) -> Result<Layer<S::Slots>> {
        Ok(Layer {
            attention_norm: self.norm_where(true, layer.attention_norm.as_ref())?,
            attention: self.attention(&layer.attention)?,
            out_bias: self.bias_table(&layer.attention.out)?,
            attention_post_norm: self.norm_where(true, layer.attention_post_norm.as_ref())?,
            mlp_norm: self.norm_where(true, layer.mlp_norm.as_ref())?,
            feed_forward: match &layer.mlp {
                FeedForwardRefs::Dense(mlp) => FeedForward::Dense(self.split_mlp(mlp, &self.layout.mlp)?),
                FeedForwardRefs::Experts(experts) => FeedForward::Experts(Box::new(self.experts(experts)?)),
            },
            mlp_post_norm: self.norm_where(true, layer.mlp_post_norm.as_ref())?,
        })
    }

    fn attention(&mut self, refs: &AttentionRefs) -> Result<Option<AttentionWeights<S::Slots>>> {
        let layout = self.layout;
        let Some(segments) = &layout.attention_segments else { return Ok(None) };
        let spec = &self.architecture.attention;
        let q_rows = layout.head_rows(spec.head_dim);
        let q_rows = std::slice::from_ref(&q_rows);
        let qkv = match &refs.qkv {
            QkvRefs::Direct(direct) => {
                let (k_rows, v_rows) = (layout.kv_rows(spec.head_dim), layout.kv_rows(spec.value_dim));
                QkvWeights::Direct(DirectWeights {
                    q: self.linear(&direct.q, q_rows)?,
                    k: self.linear(&direct.k, &k_rows)?,
                    v: self.linear(&direct.v, &v_rows)?,
                    q_norm: self.qk_norm(direct.q_norm.as_ref(), q_rows)?,
                    k_norm: self.qk_norm(direct.k_norm.as_ref(), &k_rows)?,
                })
            }
            QkvRefs::Latent(latent) => {
                let plain_dim = spec.latent.map_or(0, |latent| latent.plain_dim);
                let rows = |width| layout.head_rows(width);
                let expand = match &latent.expand {
                    ExpandRefs::Joined(both) => Expand::Joined(self.linear(both, std::slice::from_ref(&rows(plain_dim + spec.value_dim)))?),
                    ExpandRefs::Apart { keys, values } => Expand::Apart {
                        keys: self.linear(keys, std::slice::from_ref(&rows(plain_dim)))?,
                        values: self.linear(values, std::slice::from_ref(&rows(spec.value_dim)))?,
                    },
                };
                let query_latent = match &latent.query_latent {
                    Some((down, norm)) => Some((self.whole_linear(down)?, self.norm(norm)?)),
                    None => None,
                };
                QkvWeights::Latent(LatentWeights {
                    query_latent,
                    q: self.linear(&latent.q, q_rows)?,
                    latent: self.whole_linear(&latent.latent)?,
                    latent_norm: self.norm(&latent.latent_norm)?,
                    rotary_key: self.whole_linear(&latent.rotary_key)?,
                    expand,
                })
            }
        };
        let out = self.row_split(&refs.out.weight, layout.head_rows(spec.value_dim), segments)?;
        let sinks = refs.sinks.as_ref().map(|sinks| self.store.vector(sinks, std::slice::from_ref(&layout.heads))).transpose()?;
        Ok(Some(AttentionWeights { qkv, out, sinks }))
    }

    /// A norm of queries or keys: one weight for all heads, or that of the rank's own heads.
    fn qk_norm(&mut self, norm: Option<&NormRef>, own: &[Range<usize>]) -> Result<Option<Norm<S::Slots>>> {
        let (Some(norm), Some(spec)) = (norm, self.architecture.attention.qk_norm) else { return Ok(None) };
        match spec.over {
            QkNormOver::Head => self.norm(norm),
            QkNormOver::EachHead | QkNormOver::Full => self.norm_part(norm, own),
        }
        .map(Some)
    }

    /// This rank's inner units of an MLP; `None` where it has none.
    fn mlp(&mut self, mlp: &MlpRefs, inner: &Inner) -> Result<Option<MlpWeights<S::Slots>>> {
        let Some(segments) = &inner.segments else { return Ok(None) };
        let rows = std::slice::from_ref(&inner.units);
        Ok(Some(MlpWeights {
            gate: mlp.gate.as_ref().map(|gate| self.linear(gate, rows)).transpose()?,
            up: self.linear(&mlp.up, rows)?,
            down: self.row_split(&mlp.down.weight, inner.units.clone(), segments)?,
        }))
    }

    fn split_mlp(&mut self, mlp: &MlpRefs, inner: &Inner) -> Result<SplitMlp<S::Slots>> {
        Ok(SplitMlp { mlp: self.mlp(mlp, inner)?, bias: self.bias_table(&mlp.down)? })
    }

    fn experts(&mut self, refs: &ExpertsRefs) -> Result<ExpertsWeights<S::Slots>> {
        let layout = self.layout;
        let held = &refs.experts[layout.experts.clone()];
        let biases: Option<Vec<&VectorRef>> = held.iter().map(|expert| expert.down.bias.as_ref()).collect();
        Ok(ExpertsWeights {
            router: self.whole_linear(&refs.router)?,
            correction: refs.correction.as_ref().map(|correction| self.store.host(correction)).transpose()?,
            experts: held.iter().map(|expert| self.mlp(expert, &layout.expert)).collect::<Result<_>>()?,
            biases: biases.map(|biases| self.store.table(&biases)).transpose()?,
            shared: refs.shared.as_ref().map(|shared| self.split_mlp(shared, &layout.shared)).transpose()?,
            shared_gate: self.whole_where(true, refs.shared_gate.as_ref())?,
        })
    }
}
