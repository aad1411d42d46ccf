//! Attention of a layer: queries, keys and values, what is done to them, and the output product.
//!
//! Invariant: a rank without heads takes part in the same collectives as the others, in the same order.

use forge_kernels::{Alibi, AttentionBatch, AttentionParams, Backend, Columns, HeadRuns, Product};

use super::forward::{Current, Pass, params, product};
use super::layout::HeadSums;
use super::loaded::{AttentionWeights, DirectWeights, Expand, LatentWeights, Norm, QkvWeights};
use super::workspace::{AttentionBuffers, LatentBuffers, Parts};
use crate::arch::{LatentSpec, PositionSpec, QkNormOver, QkNormSpec};
use crate::error::Result;

impl<B: Backend> Pass<'_, B> {
    /// delta = out(attention(q, k, v)), summed over ranks, with its bias.
    pub(super) fn attention(
        &self,
        layer: &Current<'_, B>,
        input: &B::Buffer,
        parts: &mut Parts<B::Buffer>,
        pool: Option<&mut B::KvPool>,
        delta: &mut B::Buffer,
    ) -> Result<()> {
        let Parts { attention, norm_sums, .. } = parts;
        let index = layer.index;
        match (&layer.weights.attention, attention, pool) {
            (Some(weights), Some(buffers), Some(pool)) => {
                match &weights.qkv {
                    QkvWeights::Direct(direct) => self.direct(index, direct, input, buffers, norm_sums.as_mut())?,
                    QkvWeights::Latent(latent) => self.latent(index, latent, input, buffers)?,
                }
                self.attend(index, weights, buffers, pool)?;
                self.backend.linear(&buffers.out, self.rows(), &mut [Product { weight: &weights.out, bias: None, out: delta }])?;
            }
            _ => {
                self.bring_no_heads(norm_sums.as_mut())?;
                self.fill_neutral(delta, self.rows())?;
            }
        }
        self.complete(delta, layer.weights.out_bias.as_ref())
    }

    /// Stores keys and values, and attends.
    fn attend(
        &self,
        index: usize,
        weights: &AttentionWeights<B>,
        buffers: &mut AttentionBuffers<B::Buffer>,
        pool: &mut B::KvPool,
    ) -> Result<()> {
        let (plan, spec) = (self.plan, &self.architecture.attention);
        let AttentionBuffers { q, k, v, out, .. } = buffers;
        self.backend.kv_write(pool, index, k, v, &plan.slots)?;
        let alibi = match (&self.architecture.position, &self.weights.alibi_slopes) {
            (PositionSpec::Alibi(alibi), Some(slopes)) => Some(Alibi { slopes, factor: alibi.factor, rounded: alibi.rounded }),
            _ => None,
        };
        let params = AttentionParams {
            heads: self.layout.heads.len(),
            kv_heads: self.layout.kv_heads.len(),
            head_dim: spec.head_dim,
            value_dim: spec.value_dim,
            scale: spec.scale,
            window: spec.windows[self.layout.layers.start + index],
            softcap: spec.softcap,
            alibi,
            sinks: weights.sinks.as_ref(),
        };
        let batch = AttentionBatch { sequences: &plan.sequences, block_tables: &plan.block_tables, block_size: self.block_size };
        Ok(self.backend.attention(q, pool, index, batch, params, out)?)
    }

    /// Queries, keys and values as products of the input: normalized, limited, rotated.
    fn direct(
        &self,
        index: usize,
        weights: &DirectWeights<B>,
        input: &B::Buffer,
        buffers: &mut AttentionBuffers<B::Buffer>,
        norm_sums: Option<&mut B::Buffer>,
    ) -> Result<()> {
        let (backend, rows, spec) = (self.backend, self.rows(), &self.architecture.attention);
        let AttentionBuffers { q, k, v, counted_keys, .. } = buffers;
        backend.linear(input, rows, &mut [product(&weights.q, q), product(&weights.k, k), product(&weights.v, v)])?;
        if let (Some(qk_norm), Some(q_norm), Some(k_norm)) = (spec.qk_norm, &weights.q_norm, &weights.k_norm) {
            match (qk_norm.over, norm_sums) {
                (QkNormOver::Full, Some(sums)) => {
                    let layout = self.layout;
                    self.square_sums(q, None, &layout.query_sums, sums)?;
                    self.scale_by_sums(q, spec.heads, q_norm, qk_norm, sums)?;
                    self.square_sums(k, counted_keys.as_mut(), &layout.key_sums, sums)?;
                    self.scale_by_sums(k, spec.kv_heads, k_norm, qk_norm, sums)?;
                }
                _ => {
                    self.norm_in_place(q, self.layout.heads.len(), q_norm, qk_norm.norm)?;
                    self.norm_in_place(k, self.layout.kv_heads.len(), k_norm, qk_norm.norm)?;
                }
            }
        }
        if let Some(limit) = spec.clip {
            for buffer in [&mut *q, k, v] {
                backend.clamp(buffer, rows, limit)?;
            }
        }
        if let Some(table) = self.rope_table(index) {
            backend.rope(q, self.layout.heads.len(), spec.head_dim, 0, &self.plan.positions, table)?;
            backend.rope(k, self.layout.kv_heads.len(), spec.head_dim, 0, &self.plan.positions, table)?;
        }
        Ok(())
    }

    /// The table by which a layer of this stage rotates.
    fn rope_table(&self, index: usize) -> Option<&B::RopeTable> {
        let PositionSpec::Rope(rope) = &self.architecture.position else { return None };
        rope.of_layer[self.layout.layers.start + index].and_then(|table| self.rope_tables.get(table))
    }

    /// sums = Σ x² over the heads of all ranks. `counted` is room for those heads of x that count, where not all do.
    fn square_sums(&self, x: &B::Buffer, counted: Option<&mut B::Buffer>, heads: &HeadSums, sums: &mut B::Buffer) -> Result<()> {
        let (backend, rows, width) = (self.backend, self.rows(), self.architecture.attention.head_dim);
        match (&heads.segments, counted) {
            (Some(segments), Some(counted)) => {
                for (to, from) in heads.heads.iter().enumerate() {
                    let column = |head: usize| Columns { start: head * width, stride: 0 };
                    backend.copy_columns(x, rows, column(*from), counted, column(to), HeadRuns { heads: 1, width })?;
                }
                backend.square_sums(counted, rows, segments, sums)?;
            }
            (Some(segments), None) => backend.square_sums(x, rows, segments, sums)?,
            (None, _) => self.fill_neutral(sums, rows)?,
        }
        Ok(self.groups.tensor.all_reduce(backend, sums, rows)?)
    }

    fn scale_by_sums(&self, x: &mut B::Buffer, heads: usize, norm: &Norm<B>, spec: QkNormSpec, sums: &B::Buffer) -> Result<()> {
        let width = heads * self.architecture.attention.head_dim;
        match &norm.weight {
            Some(weight) => Ok(self.backend.scale_by_square_sums(x, self.rows(), sums, width, weight, params(spec.norm))?),
            None => unreachable!("the architecture's check asks for a weight of norms over full width"),
        }
    }

    /// What a rank without heads brings to the sums of query and key norms.
    fn bring_no_heads(&self, norm_sums: Option<&mut B::Buffer>) -> Result<()> {
        let Some(sums) = norm_sums else { return Ok(()) };
        for _queries_then_keys in 0..2 {
            self.fill_neutral(sums, self.rows())?;
            self.groups.tensor.all_reduce(self.backend, sums, self.rows())?;
        }
        Ok(())
    }

    /// Queries, keys and values from latents (MLA), expanded to full heads.
    fn latent(&self, index: usize, weights: &LatentWeights<B>, input: &B::Buffer, buffers: &mut AttentionBuffers<B::Buffer>) -> Result<()> {
        let AttentionBuffers { q, k, v, latent: Some(room), .. } = buffers else { return Ok(()) };
        let Some(spec) = self.architecture.attention.latent else { return Ok(()) };
        let (backend, rows, norm) = (self.backend, self.rows(), spec.norm());
        let LatentBuffers { query, latent, rotary_key, expanded } = room;
        let mut products = vec![product(&weights.latent, latent), product(&weights.rotary_key, rotary_key)];
        match (&weights.query_latent, query) {
            (Some((down, query_norm)), Some(query)) => {
                products.push(product(down, query));
                backend.linear(input, rows, &mut products)?;
                self.norm_in_place(query, 1, query_norm, norm)?;
                backend.linear(query, rows, &mut [product(&weights.q, q)])?;
            }
            _ => {
                products.push(product(&weights.q, q));
                backend.linear(input, rows, &mut products)?;
            }
        }
        self.norm_in_place(latent, 1, &weights.latent_norm, norm)?;
        match &weights.expand {
            Expand::Joined(both) => backend.linear(latent, rows, &mut [product(both, expanded)])?,
            Expand::Apart { keys, values } => backend.linear(latent, rows, &mut [product(keys, expanded), product(values, v)])?,
        }
        let (heads, head_dim, positions) = (self.layout.heads.len(), self.architecture.attention.head_dim, &self.plan.positions);
        if let Some(table) = self.rope_table(index) {
            backend.rope(q, heads, head_dim, spec.plain_dim, positions, table)?;
            backend.rope(rotary_key, 1, spec.rope_dim, 0, positions, table)?;
        }
        self.expand(&spec, expanded, rotary_key, k, v)
    }

    /// Puts keys together, per head a plain and the shared rotary part, and values, where they are not there yet.
    fn expand(&self, spec: &LatentSpec, expanded: &B::Buffer, rotary: &B::Buffer, k: &mut B::Buffer, v: &mut B::Buffer) -> Result<()> {
        let (backend, rows, heads) = (self.backend, self.rows(), self.layout.heads.len());
        let (head_dim, value_dim) = (self.architecture.attention.head_dim, self.architecture.attention.value_dim);
        let runs = |width| HeadRuns { heads, width };
        let columns = |start, stride| Columns { start, stride };
        let apart = self.layout.expands_apart;
        let stride = spec.plain_dim + if apart { 0 } else { value_dim };
        backend.copy_columns(expanded, rows, columns(0, stride), k, columns(0, head_dim), runs(spec.plain_dim))?;
        backend.copy_columns(rotary, rows, columns(0, 0), k, columns(spec.plain_dim, head_dim), runs(spec.rope_dim))?;
        if !apart {
            backend.copy_columns(expanded, rows, columns(spec.plain_dim, stride), v, columns(0, value_dim), runs(value_dim))?;
        }
        Ok(())
    }
}
