//! One pass over the layers of a rank: the only place that knows the order of operations of a decoder. Attention and
//! the feed-forward parts have files of their own ([`super::attention`], [`super::feed_forward`]).
//!
//! Row-split products (attention output, MLP down) give partial sums; all ranks add them in the tree's order, then
//! every rank adds the bias, so that the unsharded order of operations is the same.

use forge_kernels::{Backend, NormParams, Product};

use super::groups::Groups;
use super::layout::Layout;
use super::loaded::{Layer, Linear, Norm, Weights};
use super::workspace::{LogitsBuffers, Workspace};
use crate::arch::{Architecture, BlockOrder, NormSpec};
use crate::error::Result;
use crate::step::StepPlan;

/// Everything a pass reads.
pub(crate) struct Pass<'a, B: Backend> {
    pub backend: &'a B,
    pub groups: &'a Groups<B>,
    pub architecture: &'a Architecture,
    pub layout: &'a Layout,
    pub weights: &'a Weights<B>,
    pub rope_tables: &'a [B::RopeTable],
    pub block_size: usize,
    pub plan: &'a StepPlan,
    /// Zeros for `embed_add` of one-row tables: as many as a step may have rows.
    pub zero_ids: &'a [u32],
}

/// A layer of this stage.
pub(super) struct Current<'a, B: Backend> {
    /// Counted from the stage's first.
    pub index: usize,
    pub weights: &'a Layer<B>,
}

pub(super) fn params(norm: NormSpec) -> NormParams {
    NormParams { kind: norm.kind, eps: norm.eps, weight_offset: norm.weight_offset }
}

pub(super) fn product<'a, B: Backend>(linear: &'a Linear<B>, out: &'a mut B::Buffer) -> Product<'a, B> {
    Product { weight: &linear.weight, bias: linear.bias.as_ref(), out }
}

impl<B: Backend> Pass<'_, B> {
    pub(super) fn rows(&self) -> usize {
        self.plan.tokens.len()
    }

    fn norm(&self, x: &B::Buffer, rows: usize, norm: &Norm<B>, out: &mut B::Buffer) -> Result<()> {
        Ok(self.backend.norm(x, rows, norm.weight.as_ref(), norm.bias.as_ref(), params(self.architecture.norm), out)?)
    }

    /// What a part of a layer reads: the norm of x, where it has one, else x itself.
    fn normed<'b>(&self, norm: Option<&Norm<B>>, x: &'b B::Buffer, out: &'b mut B::Buffer) -> Result<&'b B::Buffer> {
        let Some(norm) = norm else { return Ok(x) };
        self.norm(x, self.rows(), norm, out)?;
        Ok(out)
    }

    /// A rank without a share of a sum brings the neutral element.
    pub(super) fn fill_neutral(&self, buffer: &mut B::Buffer, rows: usize) -> Result<()> {
        let width = self.backend.width(buffer);
        match self.backend.host_rows_mut(buffer, rows) {
            Some(values) => values.fill(-0.0),
            None => self.backend.write_rows(buffer, 0..rows, &vec![-0.0; rows * width])?,
        }
        Ok(())
    }

    /// Σ over ranks of delta, plus bias.
    pub(super) fn complete(&self, delta: &mut B::Buffer, bias: Option<&B::Weight>) -> Result<()> {
        self.groups.tensor.all_reduce(self.backend, delta, self.rows())?;
        if let Some(bias) = bias {
            self.backend.embed_add(bias, &self.zero_ids[..self.rows()], delta)?;
        }
        Ok(())
    }

    /// x = project(norm(embedding of the tokens · scale)), plus learned positions.
    pub fn embed(&self, workspace: &mut Workspace<B::Buffer>) -> Result<()> {
        let Workspace { x, embedded, .. } = workspace;
        match embedded {
            Some(embedded) => {
                self.embed_tokens(embedded)?;
                if let Some(weight) = &self.weights.project_in {
                    self.backend.linear(embedded, self.rows(), &mut [Product { weight, bias: None, out: x }])?;
                }
            }
            None => self.embed_tokens(x)?,
        }
        if let Some(positions) = &self.weights.positions {
            let offset = self.architecture.position.table_offset() as u32;
            if offset == 0 {
                self.backend.embed_add(positions, &self.plan.positions, x)?;
            } else {
                let rows: Vec<u32> = self.plan.positions.iter().map(|position| position + offset).collect();
                self.backend.embed_add(positions, &rows, x)?;
            }
        }
        Ok(())
    }

    fn embed_tokens(&self, out: &mut B::Buffer) -> Result<()> {
        let vocabulary = &self.layout.vocabulary;
        match &self.weights.embedding {
            Some(table) if !vocabulary.is_empty() => {
                let ids = vocabulary.start as u32..vocabulary.end as u32;
                self.backend.embed(table, ids, &self.plan.tokens, self.architecture.embedding.scale, out)?;
            }
            _ => self.fill_neutral(out, self.rows())?,
        }
        self.groups.tensor.all_reduce(self.backend, out, self.rows())?;
        match &self.weights.embedding_norm {
            // In place: a row is one head.
            Some(norm) => self.norm_in_place(out, 1, norm, self.architecture.norm),
            None => Ok(()),
        }
    }

    /// Each of `heads` heads of every row normalized by itself.
    pub(super) fn norm_in_place(&self, x: &mut B::Buffer, heads: usize, norm: &Norm<B>, spec: NormSpec) -> Result<()> {
        Ok(self.backend.norm_heads(x, self.rows(), heads, norm.weight.as_ref(), norm.bias.as_ref(), params(spec))?)
    }

    /// All layers of this stage over `workspace.x`.
    pub fn layers(&self, workspace: &mut Workspace<B::Buffer>, pool: &mut Option<B::KvPool>) -> Result<()> {
        for (index, weights) in self.weights.layers.iter().enumerate() {
            let (layer, pool) = (Current { index, weights }, pool.as_mut());
            match self.architecture.block.order {
                BlockOrder::Sequential => self.sequential(&layer, workspace, pool)?,
                BlockOrder::Parallel => self.parallel(&layer, workspace, pool)?,
                BlockOrder::NormOfSum => self.norm_of_sum(&layer, workspace, pool)?,
            }
        }
        Ok(())
    }

    /// x += s · post(attention(pre(x))), then x += s · post(mlp(pre(x))).
    fn sequential(&self, layer: &Current<'_, B>, workspace: &mut Workspace<B::Buffer>, pool: Option<&mut B::KvPool>) -> Result<()> {
        let Workspace { x, normed, delta, parts, .. } = workspace;
        let input = self.normed(layer.weights.attention_norm.as_ref(), x, normed)?;
        self.attention(layer, input, parts, pool, delta)?;
        self.add_to_stream(x, delta, layer.weights.attention_post_norm.as_ref(), normed)?;
        let input = self.normed(layer.weights.mlp_norm.as_ref(), x, normed)?;
        self.feed_forward(&layer.weights.feed_forward, input, parts, delta)?;
        self.add_to_stream(x, delta, layer.weights.mlp_post_norm.as_ref(), normed)
    }

    /// x = (x + attention(norm(x))) + mlp(norm(x)); the MLP has the same norm of x or its own.
    fn parallel(&self, layer: &Current<'_, B>, workspace: &mut Workspace<B::Buffer>, pool: Option<&mut B::KvPool>) -> Result<()> {
        let Workspace { x, normed, delta, parts, .. } = workspace;
        if let Some(norm) = &layer.weights.attention_norm {
            self.norm(x, self.rows(), norm, normed)?;
        }
        self.attention(layer, normed, parts, pool, delta)?;
        // What the MLP reads is ready before x changes.
        if let Some(norm) = &layer.weights.mlp_norm {
            self.norm(x, self.rows(), norm, normed)?;
        }
        self.backend.add(x, delta, self.rows(), self.architecture.block.residual_scale)?;
        self.feed_forward(&layer.weights.feed_forward, normed, parts, delta)?;
        Ok(self.backend.add(x, delta, self.rows(), self.architecture.block.residual_scale)?)
    }

    /// x = post(x + attention(x)), then x = post(x + mlp(x)).
    fn norm_of_sum(&self, layer: &Current<'_, B>, workspace: &mut Workspace<B::Buffer>, pool: Option<&mut B::KvPool>) -> Result<()> {
        let Workspace { x, normed, delta, parts, .. } = workspace;
        let close = |x: &mut B::Buffer, delta: &B::Buffer, norm: Option<&Norm<B>>, normed: &mut B::Buffer| {
            self.backend.add(x, delta, self.rows(), self.architecture.block.residual_scale)?;
            if let Some(norm) = norm {
                self.norm(x, self.rows(), norm, normed)?;
                std::mem::swap(x, normed);
            }
            Ok::<_, crate::ModelError>(())
        };
        self.attention(layer, x, parts, pool, delta)?;
        close(x, delta, layer.weights.attention_post_norm.as_ref(), normed)?;
        self.feed_forward(&layer.weights.feed_forward, x, parts, delta)?;
        close(x, delta, layer.weights.mlp_post_norm.as_ref(), normed)
    }

    fn add_to_stream(&self, x: &mut B::Buffer, delta: &B::Buffer, norm: Option<&Norm<B>>, normed: &mut B::Buffer) -> Result<()> {
        let delta = self.normed(norm, delta, normed)?;
        Ok(self.backend.add(x, delta, self.rows(), self.architecture.block.residual_scale)?)
    }

    /// Final norm and head over the wanted rows, a few at a time; `logits` holds [logits_rows, vocab_size].
    pub fn logits(&self, workspace: &mut Workspace<B::Buffer>, chunk_rows: usize, logits: &mut [f32]) -> Result<()> {
        let Workspace { x, normed, logits: Some(buffers), .. } = workspace else { return Ok(()) };
        let vocab_size = self.architecture.vocab_size;
        for (rows, values) in self.plan.logits_rows.chunks(chunk_rows).zip(logits.chunks_mut(chunk_rows * vocab_size)) {
            let count = rows.len();
            self.backend.gather_rows(x, rows, &mut buffers.hidden)?;
            self.head(buffers, normed, count)?;
            let complete = match &mut buffers.gathered {
                Some(gathered) => {
                    self.groups.tensor.all_gather(self.backend, buffers.local.as_ref(), gathered, count)?;
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

    /// This rank's share of the logits of `buffers.hidden`: product, bias, scale, cap.
    fn head(&self, buffers: &mut LogitsBuffers<B::Buffer>, normed: &mut B::Buffer, count: usize) -> Result<()> {
        let LogitsBuffers { hidden, projected, local, .. } = buffers;
        let mut last = match &self.weights.final_norm {
            Some(norm) => {
                self.norm(hidden, count, norm, normed)?;
                &*normed
            }
            None => hidden,
        };
        if let (Some(weight), Some(projected)) = (&self.weights.project_out, projected) {
            self.backend.linear(last, count, &mut [Product { weight, bias: None, out: projected }])?;
            last = projected;
        }
        let weight = self.weights.head.as_ref().or(self.weights.embedding.as_ref());
        let (Some(weight), Some(local)) = (weight, local) else { return Ok(()) };
        self.backend.linear(last, count, &mut [Product { weight, bias: self.weights.head_bias.as_ref(), out: local }])?;
        let head = self.architecture.head;
        if head.scale != 1.0 || head.softcap.is_some() {
            self.backend.scale_and_cap(local, count, head.scale, head.softcap)?;
        }
        Ok(())
    }
}
