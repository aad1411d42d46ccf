//! The buffers a step works in: allocated once, for the most rows a step may have.
//!
//! Invariant: what is allocated is what is reported. Both come from [`Workspace::build`], which asks for every buffer
//! by its rows and width; to count, it is given a function that adds them up.

use forge_kernels::Backend;

use super::layout::{Inner, Layout};
use super::options::DecoderOptions;
use crate::arch::{Architecture, ExpertsSpec, LatentSpec, MlpSpec, QkNormOver};
use crate::error::Result;

/// The buffers (of type `T`). Those of parts that this rank has none of are `None`.
pub(crate) struct Workspace<T> {
    /// The residual stream.
    pub x: T,
    /// Its norm.
    pub normed: T,
    /// What a part of a layer adds to it.
    pub delta: T,
    /// Embeddings of another width than the stream's.
    pub embedded: Option<T>,
    pub parts: Parts<T>,
    pub logits: Option<LogitsBuffers<T>>,
}

/// What attention and MLPs work in.
pub(crate) struct Parts<T> {
    pub attention: Option<AttentionBuffers<T>>,
    /// Sums of squares of norms that ranks share.
    pub norm_sums: Option<T>,
    pub mlp: Option<MlpBuffers<T>>,
    pub experts: Option<ExpertsBuffers<T>>,
}

pub(crate) struct AttentionBuffers<T> {
    pub q: T,
    pub k: T,
    pub v: T,
    pub out: T,
    /// The key heads that count in a sum over all of them, where the rank holds others too.
    pub counted_keys: Option<T>,
    pub latent: Option<LatentBuffers<T>>,
}

pub(crate) struct LatentBuffers<T> {
    pub query: Option<T>,
    pub latent: T,
    pub rotary_key: T,
    /// Plain keys of every head, and its values where one product gives both.
    pub expanded: T,
}

pub(crate) struct MlpBuffers<T> {
    pub gate: Option<T>,
    pub up: T,
}

pub(crate) struct ExpertsBuffers<T> {
    /// Logits of the router.
    pub router: T,
    /// A row for each expert of each token, sorted by expert: first what the expert reads, then what it gives.
    pub pairs: T,
    pub inner: Option<MlpBuffers<T>>,
    pub shared: Option<SharedBuffers<T>>,
    /// The sum over this rank's experts, where others hold the rest.
    pub subtree: Option<T>,
}

pub(crate) struct SharedBuffers<T> {
    pub inner: Option<MlpBuffers<T>>,
    pub out: T,
    pub gate: Option<T>,
}

pub(crate) struct LogitsBuffers<T> {
    pub hidden: T,
    /// Hidden states of the embedding's width, where it is another.
    pub projected: Option<T>,
    pub local: Option<T>,
    pub gathered: Option<T>,
}

impl<T> Workspace<T> {
    /// Allocates all buffers of a rank on its backend.
    ///
    /// # Errors
    /// A backend without the memory.
    pub fn new<B: Backend<Buffer = T>>(
        backend: &B,
        architecture: &Architecture,
        layout: &Layout,
        options: &DecoderOptions,
    ) -> Result<Self> {
        Self::build(&Sizes { architecture, layout, options }, &mut |rows, width| Ok(backend.buffer(rows, width)?))
    }

    fn build(sizes: &Sizes<'_>, buffer: Allocate<'_, T>) -> Result<Self> {
        let Architecture { hidden_size, embedding, .. } = *sizes.architecture;
        let rows = sizes.options.max_step_rows;
        let projected = sizes.layout.first_stage && embedding.width != hidden_size;
        Ok(Workspace {
            x: buffer(rows, hidden_size)?,
            normed: buffer(rows, hidden_size)?,
            delta: buffer(rows, hidden_size)?,
            embedded: if projected { Some(buffer(rows, embedding.width)?) } else { None },
            parts: Parts::build(sizes, buffer)?,
            logits: if sizes.layout.last_stage { Some(LogitsBuffers::build(sizes, buffer)?) } else { None },
        })
    }
}

/// Bytes of all buffers of a rank.
///
/// # Errors
/// None: counting does not fail.
pub(crate) fn bytes(architecture: &Architecture, layout: &Layout, options: &DecoderOptions) -> Result<usize> {
    let mut bytes = 0_usize;
    Workspace::build(&Sizes { architecture, layout, options }, &mut |rows, width| {
        bytes = bytes.saturating_add(rows.saturating_mul(width).saturating_mul(size_of::<f32>()));
        Ok(())
    })?;
    Ok(bytes)
}

/// Makes a buffer of so many rows and columns.
type Allocate<'a, T> = &'a mut dyn FnMut(usize, usize) -> Result<T>;

/// What widths and rows follow from.
struct Sizes<'a> {
    architecture: &'a Architecture,
    layout: &'a Layout,
    options: &'a DecoderOptions,
}

impl<T> Parts<T> {
    fn build(sizes: &Sizes<'_>, buffer: Allocate<'_, T>) -> Result<Self> {
        let Sizes { architecture, layout, options } = sizes;
        let rows = options.max_step_rows;
        let full_norm = architecture.attention.qk_norm.is_some_and(|norm| norm.over == QkNormOver::Full);
        let has_dense = layout.layers.clone().any(|layer| !architecture.has_experts(layer));
        let experts = architecture.experts.as_ref().filter(|_| layout.layers.clone().any(|layer| architecture.has_experts(layer)));
        Ok(Parts {
            attention: if layout.heads.is_empty() { None } else { Some(AttentionBuffers::build(sizes, full_norm, buffer)?) },
            norm_sums: if full_norm { Some(buffer(rows, 1)?) } else { None },
            mlp: if has_dense { MlpBuffers::build(&architecture.mlp, &layout.mlp, rows, buffer)? } else { None },
            experts: match experts {
                Some(experts) => Some(ExpertsBuffers::build(sizes, experts, buffer)?),
                None => None,
            },
        })
    }
}

impl<T> AttentionBuffers<T> {
    fn build(sizes: &Sizes<'_>, full_norm: bool, buffer: Allocate<'_, T>) -> Result<Self> {
        let (layout, rows) = (sizes.layout, sizes.options.max_step_rows);
        let spec = &sizes.architecture.attention;
        let (heads, kv_heads, counted) = (layout.heads.len(), layout.kv_heads.len(), layout.key_sums.heads.len());
        Ok(AttentionBuffers {
            q: buffer(rows, heads * spec.head_dim)?,
            k: buffer(rows, kv_heads * spec.head_dim)?,
            v: buffer(rows, kv_heads * spec.value_dim)?,
            out: buffer(rows, heads * spec.value_dim)?,
            counted_keys: match counted {
                1.. if full_norm && counted < kv_heads => Some(buffer(rows, counted * spec.head_dim)?),
                _ => None,
            },
            latent: match spec.latent {
                Some(LatentSpec { query_rank, kv_rank, plain_dim, rope_dim, .. }) => Some(LatentBuffers {
                    query: query_rank.map(|rank| buffer(rows, rank)).transpose()?,
                    latent: buffer(rows, kv_rank)?,
                    rotary_key: buffer(rows, rope_dim)?,
                    expanded: buffer(rows, heads * (plain_dim + if layout.expands_apart { 0 } else { spec.value_dim }))?,
                }),
                None => None,
            },
        })
    }
}

impl<T> MlpBuffers<T> {
    fn build(spec: &MlpSpec, inner: &Inner, rows: usize, buffer: Allocate<'_, T>) -> Result<Option<Self>> {
        match inner.units.len() {
            0 => Ok(None),
            width => Ok(Some(MlpBuffers { gate: if spec.gated { Some(buffer(rows, width)?) } else { None }, up: buffer(rows, width)? })),
        }
    }
}

impl<T> ExpertsBuffers<T> {
    fn build(sizes: &Sizes<'_>, spec: &ExpertsSpec, buffer: Allocate<'_, T>) -> Result<Self> {
        let (layout, hidden, rows) = (sizes.layout, sizes.architecture.hidden_size, sizes.options.max_step_rows);
        // A token chooses an expert once: no more rows than this can be, and none is dropped.
        let pairs = rows.saturating_mul(spec.router.per_token.min(layout.experts.len()));
        Ok(ExpertsBuffers {
            router: buffer(rows, spec.count)?,
            pairs: buffer(pairs, hidden)?,
            inner: MlpBuffers::build(&spec.expert, &layout.expert, pairs, buffer)?,
            shared: match &spec.shared {
                Some(shared) => Some(SharedBuffers {
                    inner: MlpBuffers::build(&shared.mlp, &layout.shared, rows, buffer)?,
                    out: buffer(rows, hidden)?,
                    gate: if shared.gate { Some(buffer(rows, 1)?) } else { None },
                }),
                None => None,
            },
            subtree: if layout.experts.len() < spec.count { Some(buffer(rows, hidden)?) } else { None },
        })
    }
}

impl<T> LogitsBuffers<T> {
    fn build(sizes: &Sizes<'_>, buffer: Allocate<'_, T>) -> Result<Self> {
        let Architecture { hidden_size, vocab_size, embedding, .. } = *sizes.architecture;
        let rows = sizes.options.max_logits_rows.min(sizes.options.max_step_rows);
        let mut optional = |width: usize| if width > 0 { buffer(rows, width).map(Some) } else { Ok(None) };
        let projected = optional(if embedding.width == hidden_size { 0 } else { embedding.width })?;
        let local = optional(sizes.layout.vocabulary.len())?;
        let gathered = optional(if sizes.options.shard.tp_size > 1 { vocab_size } else { 0 })?;
        Ok(LogitsBuffers { hidden: buffer(rows, hidden_size)?, projected, local, gathered })
    }
}
