//! An architecture as data: what the generic decoder needs to know of a model family.
//!
//! What it is: a plain value, produced by pure functions from `config.json` ([`hf`]) or GGUF metadata
//! ([`gguf`]) with the help of the table of families ([`families`]). What it is not: it holds no weights and
//! runs nothing. A field is here when a row uses it and a test covers it; a new family adds a row, and a field
//! only where no existing one says it.
//!
//! Invariant: two checkpoints with equal `Architecture` and equal weights have equal logits.

pub mod detect;
pub mod families;
pub mod gguf;
pub mod hf;
pub mod overrides;
pub mod rope;
mod validate;

use forge_kernels::{ActivationKind, NormKind, RopeStyle};

pub use detect::{Guess, detect};
pub use families::Family;
pub use overrides::{Overrides, RopeScalingOverride};
pub use rope::{LongRopeSide, RopeScaling};

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
    /// How tokens enter.
    pub embedding: EmbeddingSpec,
    /// How positions enter.
    pub position: PositionSpec,
    /// Norms of the residual stream: all have this form.
    pub norm: NormSpec,
    /// How a layer is put together.
    pub block: BlockSpec,
    /// Self-attention.
    pub attention: AttentionSpec,
    /// The feed-forward part of layers without experts.
    pub mlp: MlpSpec,
    /// The feed-forward part of layers with experts.
    pub experts: Option<ExpertsSpec>,
    /// From hidden states to logits.
    pub head: HeadSpec,
}

/// How tokens enter the residual stream: x = project(norm(embedding · scale)).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EmbeddingSpec {
    /// Columns of the embedding table. Where it differs from the hidden size, a projection leads in, and another one
    /// leads out to a tied head (OPT-350m).
    pub width: usize,
    /// Factor on rows of the table (Gemma: √hidden; Granite: a multiplier).
    pub scale: f32,
    /// Whether a norm follows (BLOOM).
    pub norm: bool,
}

/// A norm: kind, epsilon and which parameters it has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormSpec {
    /// RMS or layer norm.
    pub kind: NormKind,
    /// Added under the root.
    pub eps: f32,
    /// Added to the weight (Gemma: 1).
    pub weight_offset: f32,
    /// Whether there is a weight (OLMo 1: none).
    pub weight: bool,
    /// Whether there is a bias.
    pub bias: bool,
}

/// How a layer is put together. The four norms are there or not; with `Sequential` a layer is
/// `x += s · post(attention(pre(x)))`, then `x += s · post(mlp(pre(x)))`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BlockSpec {
    /// How the two parts follow each other.
    pub order: BlockOrder,
    /// A norm before attention.
    pub attention_pre_norm: bool,
    /// A norm after attention.
    pub attention_post_norm: bool,
    /// A norm before the MLP. Without it, a parallel block's MLP reads what attention reads.
    pub mlp_pre_norm: bool,
    /// A norm after the MLP.
    pub mlp_post_norm: bool,
    /// Factor on what a part adds to the stream (Granite).
    pub residual_scale: f32,
    /// Whether the last layer is followed by a norm (all but OPT-350m).
    pub final_norm: bool,
}

/// How attention and MLP follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockOrder {
    /// The MLP reads the stream after attention.
    Sequential,
    /// Both read the same stream; x = (x + attention) + mlp.
    Parallel,
    /// Norms of the sum: x = post(x + attention(x)), then x = post(x + mlp(x)).
    NormOfSum,
}

/// Self-attention: head counts, scaling, biases, windows and what is done to queries and keys.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a query and key head.
    pub head_dim: usize,
    /// Width of a value head.
    pub value_dim: usize,
    /// Factor on scores.
    pub scale: f32,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub out_bias: bool,
    /// Norm of queries and keys before rotation.
    pub qk_norm: Option<QkNormSpec>,
    /// q, k and v are limited to ±this, after the norm where there is one (MPT, OLMo).
    pub clip: Option<f32>,
    /// Scores become tanh(score / cap) · cap (Gemma 2).
    pub softcap: Option<f32>,
    /// Whether every head has a learned logit that takes part in the softmax and has no value (GPT-OSS).
    pub sinks: bool,
    /// Per layer: sliding window in positions, or none. Position p sees keys in (p − window, p].
    pub windows: Vec<Option<u32>>,
    /// Queries, keys and values made from low-rank latents (DeepSeek's MLA).
    pub latent: Option<LatentSpec>,
}

/// Norm of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QkNormSpec {
    /// What is normalized at once.
    pub over: QkNormOver,
    /// Its form.
    pub norm: NormSpec,
}

/// What a query or key norm is taken over, and the length of its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNormOver {
    /// Each head; one weight of `head_dim` values for all (Qwen 3, Gemma 3, Phi).
    Head,
    /// Each head; a weight of its own for each, `[heads, head_dim]` (Cohere, StableLM).
    EachHead,
    /// All heads together; a weight of heads · `head_dim` values (OLMo 2). By the reduction tree where ranks share the heads.
    Full,
}

/// DeepSeek's multi-head latent attention. `head_dim` = `plain_dim` + `rope_dim`; every query head has a KV head.
/// q = q_b(norm(q_a(x))) or q(x); [latent, shared rotary key] = kv_a(x); [plain key, value] per head = kv_b(norm(latent)).
/// The rotary part is the last of a head and the same for all key heads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentSpec {
    /// Width of the query latent; `None` where queries come from x directly.
    pub query_rank: Option<usize>,
    /// Width of the key-value latent.
    pub kv_rank: usize,
    /// Width of a head's part that is not rotated.
    pub plain_dim: usize,
    /// Width of a head's rotated part.
    pub rope_dim: usize,
    /// Epsilon of the latents' RMS norms (transformers: 1e-6, whatever the model's own is).
    pub norm_eps: f32,
}

/// How positions enter.
#[derive(Debug, Clone, PartialEq)]
pub enum PositionSpec {
    /// Rotary positions on queries and keys.
    Rope(RopeLayers),
    /// A learned table [`context_length` + `offset`, hidden_size] added to the embedding; position p reads row
    /// p + offset (OPT: 2).
    Learned {
        /// Rows before that of position 0.
        offset: usize,
    },
    /// A bias on scores that is linear in the distance.
    Alibi(AlibiSpec),
}

/// Rotary tables and which layer uses which.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeLayers {
    /// The different tables: one, but for Gemma 3 (full and windowed layers).
    pub tables: Vec<RopeSpec>,
    /// Per layer: an index into `tables`, or none where the layer does not rotate.
    pub of_layer: Vec<Option<usize>>,
}

impl RopeLayers {
    /// The same table for all layers.
    pub fn uniform(table: RopeSpec, layers: usize) -> Self {
        RopeLayers { tables: vec![table], of_layer: vec![Some(0); layers] }
    }

    /// One table for layers that see everything and one for layers with a window; equal ones are one.
    pub fn by_window(full: RopeSpec, windowed: RopeSpec, windows: &[Option<u32>]) -> Self {
        let all_alike = windows.iter().all(Option::is_some) || windows.iter().all(Option::is_none);
        if full == windowed || all_alike {
            let table = if windows.first().copied().flatten().is_some() { windowed } else { full };
            return Self::uniform(table, windows.len());
        }
        let of_layer = windows.iter().map(|window| Some(usize::from(window.is_some()))).collect();
        RopeLayers { tables: vec![full, windowed], of_layer }
    }
}

impl PositionSpec {
    /// The context of a model whose configuration gives this one: dynamic scaling is made to go beyond it.
    pub(crate) fn context_length(&self, given: usize) -> usize {
        let PositionSpec::Rope(rope) = self else { return given };
        let stretched = rope.tables.iter().filter_map(|table| match table.scaling {
            RopeScaling::Dynamic { factor, trained_context } => Some((factor * trained_context) as usize),
            _ => None,
        });
        stretched.max().unwrap_or(given).max(given)
    }
}

/// Linear biases (ALiBi): score += slope(head) · distance.
#[derive(Debug, Clone, PartialEq)]
pub struct AlibiSpec {
    /// Slope per query head, positive; the score of a key d positions back loses slope · d · `factor`.
    pub slopes: Vec<f32>,
    /// Factor on the bias (Falcon-RW: 1/√head_dim).
    pub factor: f32,
    /// The bias is slope · key position, the product rounded to bfloat16, as Falcon-RW was trained.
    pub rounded: bool,
}

impl AlibiSpec {
    /// The usual slopes: a geometric sequence that ends at 2^−`max_bias`; for a number of heads that is no power of two
    /// that of the power below, then every second one of the power above.
    pub fn new(heads: usize, max_bias: f64, factor: f32, rounded: bool) -> Self {
        let below = (heads + 1).next_power_of_two() / 2;
        let slope = |step: usize, of: usize| (-max_bias * step as f64 / of as f64).exp2() as f32;
        let extra = heads.saturating_sub(below);
        let slopes = (1..=below).map(|step| slope(step, below)).chain((0..extra).map(|index| slope(2 * index + 1, 2 * below)));
        AlibiSpec { slopes: slopes.take(heads).collect(), factor, rounded }
    }
}

/// Rotary positions.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Pair layout. GGUF files of the llama family store permuted q and k rows, which is the other layout.
    pub style: RopeStyle,
    /// Rotated width per head; the rest passes. The first of a head's values, but for MLA, where it is the last.
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

/// A mixture of experts: every token goes through some of them.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertsSpec {
    /// Per layer: whether it has experts (else a plain MLP).
    pub layers: Vec<bool>,
    /// Number of experts of a layer.
    pub count: usize,
    /// Each expert.
    pub expert: MlpSpec,
    /// How tokens choose.
    pub router: RouterSpec,
    /// An MLP that every token goes through as well.
    pub shared: Option<SharedExpertSpec>,
}

/// An MLP beside the experts; its inner width is the sum over shared experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SharedExpertSpec {
    /// The MLP.
    pub mlp: MlpSpec,
    /// Whether its output is multiplied by sigmoid(gate(x)) (Qwen2-MoE).
    pub gate: bool,
}

/// How a token chooses its experts from the router's logits (spec D.4). Ties go to the lower index.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RouterSpec {
    /// Experts per token.
    pub per_token: usize,
    /// What scores are.
    pub score: RouterScore,
    /// Weights are divided by their sum.
    pub normalize: bool,
    /// Factor on weights.
    pub scale: f32,
    /// Only the best groups of experts take part.
    pub groups: Option<RouterGroups>,
    /// Whether the router has a bias in its product.
    pub bias: bool,
    /// Whether a stored vector is added to scores for the choice, not for the weights (DeepSeek-V3).
    pub correction_bias: bool,
}

/// What a router's scores are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RouterScore {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each.
    Sigmoid,
    /// The logits choose; weights are the softmax over the chosen (GPT-OSS).
    SoftmaxOfChosen,
    /// Phi-3.5-MoE: one after another, each weight a softmax over the experts within 2 · jitter of the best.
    SparseMixer {
        /// Relative distance.
        jitter: f32,
    },
}

/// Group-limited choice: experts lie in equal groups, only the best groups are chosen from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouterGroups {
    /// Number of groups.
    pub count: usize,
    /// Groups that are kept.
    pub kept: usize,
    /// A group is as good as its two best scores together (DeepSeek-V3), else as its best (V2).
    pub best_two: bool,
}

/// From hidden states to logits: softcap((head(x) + bias) · scale).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadSpec {
    /// Whether the head's matrix is the embedding's.
    pub tied: bool,
    /// Whether there is a bias (GPT-J, Phi).
    pub bias: bool,
    /// Factor on logits (Cohere, Granite).
    pub scale: f32,
    /// Logits become tanh(logit / cap) · cap (Gemma 2).
    pub softcap: Option<f32>,
}

impl Architecture {
    /// Query heads per KV head.
    pub fn group_size(&self) -> usize {
        self.attention.heads / self.attention.kv_heads
    }

    /// A number that tells architectures apart (FNV-1a over the whole value).
    pub fn fingerprint(&self) -> u64 {
        let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        format!("{self:?}").into_bytes().into_iter().fold(0xcbf2_9ce4_8422_2325, step)
    }

    /// Whether a layer has experts.
    pub fn has_experts(&self, layer: usize) -> bool {
        self.experts.as_ref().is_some_and(|experts| experts.layers.get(layer).copied().unwrap_or(false))
    }
}

impl PositionSpec {
    /// Row of the learned table that position 0 reads.
    pub fn table_offset(&self) -> usize {
        match *self {
            PositionSpec::Learned { offset } => offset,
            PositionSpec::Rope(_) | PositionSpec::Alibi(_) => 0,
        }
    }
}

impl LatentSpec {
    /// The norm of the latents.
    pub fn norm(&self) -> NormSpec {
        NormSpec { kind: NormKind::Rms, eps: self.norm_eps, weight_offset: 0.0, weight: true, bias: false }
    }
}

impl BlockSpec {
    /// Norms before attention and before the MLP, one after the other: what most families have.
    pub const PRE_NORM: BlockSpec = BlockSpec {
        order: BlockOrder::Sequential,
        attention_pre_norm: true,
        attention_post_norm: false,
        mlp_pre_norm: true,
        mlp_post_norm: false,
        residual_scale: 1.0,
        final_norm: true,
    };
}
