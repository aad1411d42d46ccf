//! From the names of an architecture to tensors of a checkpoint: the strict check both ways, and parts of tensors.
//!
//! What it is: it resolves every tensor the architecture names ([`resolver`]), checks its shape, and refuses a
//! checkpoint with tensors left over. [`MatrixRef`] then gives any part as a `MatrixSource` over the file's own bytes
//! where that is possible. What it is not: it knows no rank and no backend.
//!
//! Invariant: what the decoder sees does not depend on how a family stores it: q, k and v are three matrices
//! [outputs, inputs], an expert is an MLP of its own.

mod experts;
mod layers;
mod matrix;
mod mxfp4;
mod resolver;
mod runs;
mod transposed;
mod vector;

use crate::arch::families::Family;
use crate::arch::{Architecture, PositionSpec};
use crate::checkpoint::Checkpoint;
use crate::error::Result;

pub(crate) use matrix::{MatrixRef, Place};
pub(crate) use vector::VectorRef;

use resolver::Resolver;

/// A product's tensors.
#[derive(Debug, Clone)]
pub(crate) struct LinearRef {
    pub weight: MatrixRef,
    pub bias: Option<VectorRef>,
}

/// A norm's tensors: none, a weight, or both.
#[derive(Debug, Clone, Default)]
pub(crate) struct NormRef {
    pub weight: Option<VectorRef>,
    pub bias: Option<VectorRef>,
}

/// A layer's tensors.
#[derive(Debug, Clone)]
pub(crate) struct LayerRefs {
    pub attention_norm: Option<NormRef>,
    pub attention: AttentionRefs,
    pub attention_post_norm: Option<NormRef>,
    pub mlp_norm: Option<NormRef>,
    pub mlp: FeedForwardRefs,
    pub mlp_post_norm: Option<NormRef>,
}

/// Attention's tensors.
#[derive(Debug, Clone)]
pub(crate) struct AttentionRefs {
    pub qkv: QkvRefs,
    pub out: LinearRef,
    pub sinks: Option<VectorRef>,
}

/// Where queries, keys and values come from.
#[derive(Debug, Clone)]
pub(crate) enum QkvRefs {
    Direct(Box<DirectRefs>),
    Latent(Box<LatentRefs>),
}

/// Tensors of queries, keys and values made from x.
#[derive(Debug, Clone)]
pub(crate) struct DirectRefs {
    pub q: LinearRef,
    pub k: LinearRef,
    pub v: LinearRef,
    pub q_norm: Option<NormRef>,
    pub k_norm: Option<NormRef>,
}

/// Tensors of latent attention; see [`crate::arch::LatentSpec`].
#[derive(Debug, Clone)]
pub(crate) struct LatentRefs {
    /// From x to the query latent, and its norm.
    pub query_latent: Option<(LinearRef, NormRef)>,
    /// From the query latent, or from x, to queries.
    pub q: LinearRef,
    /// From x to the key-value latent.
    pub latent: LinearRef,
    pub latent_norm: NormRef,
    /// From x to the rotary part of keys.
    pub rotary_key: LinearRef,
    pub expand: ExpandRefs,
}

/// From the key-value latent to plain keys and values of every head.
#[derive(Debug, Clone)]
pub(crate) enum ExpandRefs {
    /// One product: [heads, (key, value), …].
    Joined(LinearRef),
    /// One for each.
    Apart { keys: LinearRef, values: LinearRef },
}

/// A layer's feed-forward part.
#[derive(Debug, Clone)]
pub(crate) enum FeedForwardRefs {
    Dense(Box<MlpRefs>),
    Experts(Box<ExpertsRefs>),
}

/// An MLP's tensors.
#[derive(Debug, Clone)]
pub(crate) struct MlpRefs {
    pub gate: Option<LinearRef>,
    pub up: LinearRef,
    pub down: LinearRef,
}

/// The tensors of a mixture of experts.
#[derive(Debug, Clone)]
pub(crate) struct ExpertsRefs {
    pub router: LinearRef,
    pub correction: Option<VectorRef>,
    pub experts: Vec<MlpRefs>,
    pub shared: Option<MlpRefs>,
    pub shared_gate: Option<MatrixRef>,
}

/// All tensors of a decoder.
#[derive(Debug, Clone)]
pub(crate) struct DecoderRefs {
    pub embedding: MatrixRef,
    pub embedding_norm: Option<NormRef>,
    pub project_in: Option<LinearRef>,
    pub positions: Option<MatrixRef>,
    pub layers: Vec<LayerRefs>,
    pub final_norm: Option<NormRef>,
    pub project_out: Option<LinearRef>,
    /// `None` where the head is the embedding.
    pub head: Option<MatrixRef>,
    pub head_bias: Option<VectorRef>,
    /// Per rotary table: tensors of divisors; see [`crate::arch::RopeScaling::stored_divisors`].
    pub rope_divisors: Vec<Vec<VectorRef>>,
}

impl DecoderRefs {
    /// Resolves all names and checks both ways.
    ///
    /// # Errors
    /// [`crate::ModelError::MissingTensors`], [`crate::ModelError::TensorShape`],
    /// [`crate::ModelError::UnexpectedTensors`].
    pub fn resolve(architecture: &Architecture, family: &'static Family, checkpoint: &Checkpoint) -> Result<Self> {
        let mut resolver = Resolver::new(family, checkpoint);
        let names = resolver.names;
        let Architecture { hidden_size, vocab_size, embedding, norm, .. } = *architecture;
        let name = |resolver: &Resolver, names| resolver.pick(resolver.prefix, names);
        let table = resolver.table(&name(&resolver, names.embedding), vocab_size, embedding.width)?;
        let embedding_norm = match embedding.norm {
            true => Some(resolver.norm(&name(&resolver, names.embedding_norm), embedding.width, norm)?),
            false => None,
        };
        let projected = embedding.width != hidden_size;
        let mut projection = |names, rows, columns| match projected {
            true => resolver.linear(&resolver.pick(resolver.prefix, names), rows, columns, false).map(Some),
            false => Ok(None),
        };
        let project_in = projection(names.project_in, hidden_size, embedding.width)?;
        let project_out = projection(names.project_out, embedding.width, hidden_size)?;
        let positions = match architecture.position {
            PositionSpec::Learned { offset } => {
                Some(resolver.table(&name(&resolver, names.positions), architecture.context_length + offset, hidden_size)?)
            }
            PositionSpec::Rope(_) | PositionSpec::Alibi(_) => None,
        };
        let layers = (0..architecture.layers).map(|layer| resolver.layer(architecture, layer)).collect::<Result<_>>()?;
        let final_norm = match architecture.block.final_norm {
            true => Some(resolver.norm(&name(&resolver, names.final_norm), hidden_size, norm)?),
            false => None,
        };
        let (head, head_bias) = resolver.head(architecture)?;
        let rope_divisors = resolver.rope_divisors(architecture)?;
        resolver.finish()?;
        Ok(DecoderRefs {
            embedding: table,
            embedding_norm,
            project_in,
            positions,
            layers,
            final_norm,
            project_out,
            head,
            head_bias,
            rope_divisors,
        })
    }
}
