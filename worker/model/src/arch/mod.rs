//! An architecture as data: what the generic decoder needs to know of a model family.
//!
//! What it is: a plain value, produced by pure functions from `config.json` ([`hf`]) or GGUF metadata
//! ([`gguf`]) with the help of the table of families ([`families`]). What it is not: it holds no weights and
//! runs nothing. A field is here when a row uses it and a test covers it; a new family adds a row, and a field
//! only where no existing one says it.
//!
//! Invariant: two checkpoints with equal `Architecture` and equal weights have equal logits.

pub mod families;
pub mod gguf;
pub mod hf;
pub mod rope;

use forge_kernels::{ActivationKind, NormKind, RopeStyle};

pub use families::Family;
pub use rope::RopeScaling;

/// Everything about a decoder that is not a weight.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    /// Name of the family's row ([`families`]).
    pub family: &'static str,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of layers.
    pub layers: usize,
    /// Rows of the embedding, and logits per position.
    pub vocab_size: usize,
    /// Positions the model was trained for.
    pub context_length: usize,
    /// All norms of the model.
    pub norm: NormSpec,
    /// Self-attention.
    pub attention: AttentionSpec,
    /// How positions enter.
    pub position: PositionSpec,
    /// The feed-forward part.
    pub mlp: MlpSpec,
    /// Whether the output head is the embedding matrix.
    pub tied_head: bool,
}

/// Norm kind and epsilon. Layer norms have a bias, RMS norms have none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormSpec {
    /// RMS or layer norm.
    pub kind: NormKind,
    /// Added under the root.
    pub eps: f32,
}

/// Self-attention: head counts, scaling, biases and windows.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor on scores.
    pub scale: f32,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub out_bias: bool,
    /// Per layer: sliding window in positions, or none.
    pub windows: Vec<Option<u32>>,
}

/// How positions enter.
#[derive(Debug, Clone, PartialEq)]
pub enum PositionSpec {
    /// Rotary positions on queries and keys.
    Rope(RopeSpec),
    /// A learned table [`context_length`, hidden_size] added to the embedding.
    Learned,
}

/// Rotary positions.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Pair layout. GGUF files of the llama family store permuted q and k rows, which is the other layout.
    pub style: RopeStyle,
    /// Rotated width per head; the rest passes.
    pub rotary_dim: usize,
    /// Base of the frequencies.
    pub theta: f64,
    /// Context extension.
    pub scaling: RopeScaling,
}

/// The feed-forward part.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MlpSpec {
    /// Inner width.
    pub intermediate_size: usize,
    /// down(activation(gate(x)) · up(x)) when gated, else down(activation(up(x))).
    pub gated: bool,
    /// Activation function.
    pub activation: ActivationKind,
    /// Whether its products have biases.
    pub bias: bool,
}

impl Architecture {
    /// Query heads per KV head.
    pub fn group_size(&self) -> usize {
        self.attention.heads / self.attention.kv_heads
    }

    /// Refuses sizes that cannot be computed with: zero, not divisible, or beyond any real model (so that no
    /// later product of two of them overflows).
    pub(crate) fn validate(self, file: &str) -> crate::Result<Self> {
        const MOST: usize = 1 << 24;
        let sizes = [
            ("hidden_size", self.hidden_size),
            ("layers", self.layers),
            ("vocab_size", self.vocab_size),
            ("context_length", self.context_length),
            ("heads", self.attention.heads),
            ("kv_heads", self.attention.kv_heads),
            ("head_dim", self.attention.head_dim),
            ("intermediate_size", self.mlp.intermediate_size),
        ];
        let wrong = |key: &str, reason: String| crate::ModelError::Config { file: file.to_owned(), key: key.to_owned(), reason };
        for (key, size) in sizes {
            if size == 0 || size > MOST {
                return Err(wrong(key, format!("is {size}, must be between 1 and {MOST}")));
            }
        }
        let AttentionSpec { heads, kv_heads, head_dim, .. } = self.attention;
        if !heads.is_multiple_of(kv_heads) {
            return Err(wrong("kv_heads", format!("{heads} query heads are not a multiple of {kv_heads} KV heads")));
        }
        if heads.saturating_mul(head_dim) > MOST {
            return Err(wrong("head_dim", format!("{heads} heads of {head_dim} are wider than {MOST}")));
        }
        if !(self.norm.eps.is_finite() && self.norm.eps > 0.0) {
            return Err(wrong("norm eps", format!("is {}, must be positive", self.norm.eps)));
        }
        if let PositionSpec::Rope(rope) = &self.position {
            rope.validate(head_dim).map_err(|(key, reason)| wrong(key, reason))?;
        }
        Ok(self)
    }
}
