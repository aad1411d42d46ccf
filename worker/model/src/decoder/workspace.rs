//! The buffers a step works in: allocated once, for the most rows a step may have.

use forge_kernels::Backend;

use super::layout::Layout;
use crate::arch::Architecture;
use crate::error::Result;

/// Rows and columns of every buffer; what is allocated is what is reported, because both come from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WorkspaceSizes {
    rows: usize,
    logits_rows: usize,
    hidden: usize,
    q: usize,
    kv: usize,
    mlp: usize,
    gated: bool,
    last_stage: bool,
    local_vocabulary: usize,
    /// The whole vocabulary, where logits are gathered from several ranks.
    gathered_vocabulary: usize,
}

impl WorkspaceSizes {
    pub fn new(architecture: &Architecture, layout: &Layout, tp_size: usize, rows: usize, logits_rows: usize) -> Self {
        let head_dim = architecture.attention.head_dim;
        WorkspaceSizes {
            rows,
            logits_rows: logits_rows.min(rows),
            hidden: architecture.hidden_size,
            q: layout.heads.len() * head_dim,
            kv: layout.kv_heads.len() * head_dim,
            mlp: layout.mlp.len(),
            gated: architecture.mlp.gated,
            last_stage: layout.last_stage,
            local_vocabulary: layout.vocabulary.len(),
            gathered_vocabulary: if tp_size > 1 { architecture.vocab_size } else { 0 },
        }
    }

    /// Bytes of all buffers.
    pub fn bytes(&self) -> usize {
        let mlp = if self.gated { 2 * self.mlp } else { self.mlp };
        let step = self.rows * (3 * self.hidden + 2 * self.q + 2 * self.kv + mlp);
        let logits = self.logits_rows * (self.hidden + self.local_vocabulary + self.gathered_vocabulary);
        (step + if self.last_stage { logits } else { 0 }) * size_of::<f32>()
    }
}

/// The buffers. Those of parts this rank has none of are `None`.
pub(crate) struct Workspace<B: Backend> {
    /// The residual stream.
    pub x: B::Buffer,
    /// Its norm.
    pub normed: B::Buffer,
    /// What a block adds to it.
    pub delta: B::Buffer,
    pub attention: Option<AttentionBuffers<B>>,
    pub mlp: Option<MlpBuffers<B>>,
    pub logits: Option<LogitsBuffers<B>>,
}

pub(crate) struct AttentionBuffers<B: Backend> {
    pub q: B::Buffer,
    pub k: B::Buffer,
    pub v: B::Buffer,
    pub out: B::Buffer,
}

pub(crate) struct MlpBuffers<B: Backend> {
    pub gate: Option<B::Buffer>,
    pub up: B::Buffer,
}

pub(crate) struct LogitsBuffers<B: Backend> {
    pub hidden: B::Buffer,
    pub local: Option<B::Buffer>,
    pub gathered: Option<B::Buffer>,
}

impl<B: Backend> Workspace<B> {
    pub fn new(backend: &B, sizes: &WorkspaceSizes) -> Result<Self> {
        let buffer = |width: usize| backend.buffer(sizes.rows, width);
        let attention = match sizes.q {
            0 => None,
            q => Some(AttentionBuffers { q: buffer(q)?, k: buffer(sizes.kv)?, v: buffer(sizes.kv)?, out: buffer(q)? }),
        };
        let mlp = match sizes.mlp {
            0 => None,
            mlp => Some(MlpBuffers { gate: if sizes.gated { Some(buffer(mlp)?) } else { None }, up: buffer(mlp)? }),
        };
        let optional = |width: usize| (width > 0).then(|| backend.buffer(sizes.logits_rows, width)).transpose();
        let logits = if sizes.last_stage {
            Some(LogitsBuffers {
                hidden: backend.buffer(sizes.logits_rows, sizes.hidden)?,
                local: optional(sizes.local_vocabulary)?,
                gathered: optional(sizes.gathered_vocabulary)?,
            })
        } else {
            None
        };
        Ok(Workspace { x: buffer(sizes.hidden)?, normed: buffer(sizes.hidden)?, delta: buffer(sizes.hidden)?, attention, mlp, logits })
    }
}
