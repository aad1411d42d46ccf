//! One pass over the layers of a rank: the only place that knows the order of operations of a decoder.
//!
//! Row-split products (attention output, MLP down) give partial sums; all ranks add them in the tree's order, then
//! every rank adds the bias, so that the unsharded order of operations is the same.

use forge_kernels::{AttentionBatch, AttentionParams, Backend, NormParams, Product};
use forge_net::Collective;

use super::layout::Layout;
use super::load::{AttentionWeights, Layer, Linear, MlpWeights, Norm, Weights};
use super::workspace::{AttentionBuffers, MlpBuffers, Workspace};
use crate::arch::Architecture;
use crate::error::Result;
use crate::step::StepPlan;

/// Everything a pass reads.
pub(crate) struct Pass<'a, B: Backend> {
    pub backend: &'a B,
    pub collective: &'a dyn Collective<B>,
    pub architecture: &'a Architecture,
    pub layout: &'a Layout,
    pub weights: &'a Weights<B>,
    pub block_size: usize,
    pub plan: &'a StepPlan,
    /// Zeros for `embed_add` of one-row tables: as many as a step may have rows.
    pub zero_ids: &'a [u32],
}

impl<B: Backend> Pass<'_, B> {
    fn rows(&self) -> usize {
        self.plan.tokens.len()
    }

    fn norm_params(&self) -> NormParams {
        let norm = self.architecture.norm;
        NormParams { kind: norm.kind, eps: norm.eps, weight_offset: 0.0 }
    }

    fn norm(&self, x: &B::Buffer, rows: usize, norm: &Norm<B>, out: &mut B::Buffer) -> Result<()> {
        Ok(self.backend.norm(x, rows, Some(&norm.weight), norm.bias.as_ref(), self.norm_params(), out)?)
    }

    /// A rank without a share of a sum brings the neutral element.
    fn fill_neutral(&self, buffer: &mut B::Buffer) -> Result<()> {
        let width = self.backend.width(buffer);
        match self.backend.host_rows_mut(buffer, self.rows()) {
            Some(values) => values.fill(-0.0),
            None => self.backend.write_rows(buffer, 0..self.rows(), &vec![-0.0; self.rows() * width])?,
        }
        Ok(())
    }

    /// x = embedding of the tokens, plus learned positions.
    pub fn embed(&self, x: &mut B::Buffer) -> Result<()> {
        let vocabulary = &self.layout.vocabulary;
        match &self.weights.embedding {
            Some(table) if !vocabulary.is_empty() => {
                let ids = vocabulary.start as u32..vocabulary.end as u32;
                self.backend.embed(table, ids, &self.plan.tokens, 1.0, x)?;
            }
            _ => self.fill_neutral(x)?,
        }
        self.collective.all_reduce(self.backend, x, self.rows())?;
        if let Some(positions) = &self.weights.positions {
            self.backend.embed_add(positions, &self.plan.positions, x)?;
        }
        Ok(())
    }

    /// All layers of this stage over `workspace.x`.
    pub fn layers(&self, workspace: &mut Workspace<B>, pool: &mut Option<B::KvPool>) -> Result<()> {
        for (index, layer) in self.weights.layers.iter().enumerate() {
            self.attention_block(index, layer, workspace, pool.as_mut())?;
            self.mlp_block(layer, workspace)?;
        }
        Ok(())
    }

    fn attention_block(&self, index: usize, layer: &Layer<B>, workspace: &mut Workspace<B>, pool: Option<&mut B::KvPool>) -> Result<()> {
        let Workspace { x, normed, delta, attention, .. } = workspace;
        self.norm(x, self.rows(), &layer.attention_norm, normed)?;
        match (&layer.attention, attention, pool) {
            (Some(weights), Some(buffers), Some(pool)) => self.attention(index, weights, normed, buffers, pool, delta)?,
            _ => self.fill_neutral(delta)?,
        }
        self.close_block(x, delta, layer.out_bias.as_ref())
    }

    /// delta = out(attention(rope(q), rope(k), v)), this rank's part of the sum.
    fn attention(
        &self,
        index: usize,
        weights: &AttentionWeights<B>,
        normed: &B::Buffer,
        buffers: &mut AttentionBuffers<B>,
        pool: &mut B::KvPool,
        delta: &mut B::Buffer,
    ) -> Result<()> {
        let (backend, plan, spec) = (self.backend, self.plan, &self.architecture.attention);
        let AttentionBuffers { q, k, v, out } = buffers;
        let mut products = [product(&weights.q, q), product(&weights.k, k), product(&weights.v, v)];
        backend.linear(normed, self.rows(), &mut products)?;
        let (heads, kv_heads, head_dim) = (self.layout.heads.len(), self.layout.kv_heads.len(), spec.head_dim);
        if let Some(table) = &self.weights.rope {
            backend.rope(q, heads, head_dim, 0, &plan.positions, table)?;
            backend.rope(k, kv_heads, head_dim, 0, &plan.positions, table)?;
        }
        backend.kv_write(pool, index, k, v, &plan.slots)?;
        let window = spec.windows[self.layout.layers.start + index];
        let params = AttentionParams {
            heads,
            kv_heads,
            head_dim,
            value_dim: spec.value_dim,
            scale: spec.scale,
            window,
            softcap: spec.softcap,
            alibi: None,
            sinks: None,
        };
        let batch = AttentionBatch { sequences: &plan.sequences, block_tables: &plan.block_tables, block_size: self.block_size };
        backend.attention(q, pool, index, batch, params, out)?;
        Ok(backend.linear(out, self.rows(), &mut [Product { weight: &weights.out, bias: None, out: delta }])?)
    }

    fn mlp_block(&self, layer: &Layer<B>, workspace: &mut Workspace<B>) -> Result<()> {
        let Workspace { x, normed, delta, mlp, .. } = workspace;
        self.norm(x, self.rows(), &layer.mlp_norm, normed)?;
        match (&layer.mlp, mlp) {
            (Some(weights), Some(buffers)) => self.mlp(weights, normed, buffers, delta)?,
            _ => self.fill_neutral(delta)?,
        }
        self.close_block(x, delta, layer.down_bias.as_ref())
    }

    /// delta = down(activation(gate(x)) · up(x)), or down(activation(up(x))): this rank's part of the sum.
    fn mlp(&self, weights: &MlpWeights<B>, normed: &B::Buffer, buffers: &mut MlpBuffers<B>, delta: &mut B::Buffer) -> Result<()> {
        let (backend, rows, kind) = (self.backend, self.rows(), self.architecture.mlp.activation);
        let MlpBuffers { gate, up } = buffers;
        let inner = match (&weights.gate, gate) {
            (Some(gate_weights), Some(gate)) => {
                backend.linear(normed, rows, &mut [product(gate_weights, gate), product(&weights.up, up)])?;
                backend.activate(gate, rows, Some(up), kind)?;
                gate
            }
            _ => {
                backend.linear(normed, rows, &mut [product(&weights.up, up)])?;
                backend.activate(up, rows, None, kind)?;
                up
            }
        };
        Ok(backend.linear(inner, rows, &mut [Product { weight: &weights.down, bias: None, out: delta }])?)
    }

    /// x += Σ over ranks of delta, plus bias.
    fn close_block(&self, x: &mut B::Buffer, delta: &mut B::Buffer, bias: Option<&B::Weight>) -> Result<()> {
        self.collective.all_reduce(self.backend, delta, self.rows())?;
        if let Some(bias) = bias {
            self.backend.embed_add(bias, &self.zero_ids[..self.rows()], delta)?;
        }
        Ok(self.backend.add(x, delta, self.rows(), 1.0)?)
    }

    /// Final norm and head over the wanted rows, a few at a time; `logits` holds [logits_rows, vocab_size].
    pub fn logits(&self, workspace: &mut Workspace<B>, chunk_rows: usize, logits: &mut [f32]) -> Result<()> {
        let Workspace { x, normed, logits: Some(buffers), .. } = workspace else { return Ok(()) };
        let Some(norm) = &self.weights.final_norm else { return Ok(()) };
        let vocab_size = self.architecture.vocab_size;
        let head = self.weights.head.as_ref().or(self.weights.embedding.as_ref());
        for (rows, values) in self.plan.logits_rows.chunks(chunk_rows).zip(logits.chunks_mut(chunk_rows * vocab_size)) {
            let count = rows.len();
            self.backend.gather_rows(x, rows, &mut buffers.hidden)?;
            self.norm(&buffers.hidden, count, norm, normed)?;
            if let (Some(head), Some(local)) = (head, &mut buffers.local) {
                self.backend.linear(normed, count, &mut [Product { weight: head, bias: None, out: local }])?;
            }
            let complete = match &mut buffers.gathered {
                Some(gathered) => {
                    self.collective.all_gather(self.backend, buffers.local.as_ref(), gathered, count)?;
                    Some(&*gathered)
                }
                None => buffers.local.as_ref(),
            };
            if let Some(complete) = complete {
                self.backend.read_rows(complete, 0..count, values)?;
            }
        }
        Ok(())
    }
}

fn product<'a, B: Backend>(linear: &'a Linear<B>, out: &'a mut B::Buffer) -> Product<'a, B> {
    Product { weight: &linear.weight, bias: linear.bias.as_ref(), out }
}
