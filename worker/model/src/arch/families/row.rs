//! The vocabulary of rows: where config.json says a fact, and what holds where it does not.
//!
//! Defaults are those of the family's configuration class in the transformers library. A key may be a path,
//! `attn_config.clip_qkv`. What a key of two names means is the same: the first that is there counts.

use forge_kernels::{ActivationKind, NormKind, RopeStyle};

use crate::arch::{BlockSpec, QkNormOver};

/// Names of one key.
pub(crate) type Keys = &'static [&'static str];

/// A size that may be left out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    pub keys: Keys,
    /// The value where the key is not there at all.
    pub absent: Option<usize>,
    /// The value where it is null, or not there and has no such default.
    pub derived: Derived,
}

/// A size that follows from others.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Derived {
    /// None: the key is needed.
    Nothing,
    /// This many times the hidden size.
    TimesHidden(usize),
    /// The number of query heads.
    Heads,
    /// Hidden size / heads.
    HeadShare,
}

/// A number that may be left out; null means none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Number {
    pub keys: Keys,
    pub absent: Option<f64>,
}

/// Whether something is so.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Flag {
    Always,
    Never,
    /// A boolean of config.json, and what holds without it. In a GGUF file, which has no such keys, the tensors of
    /// layer 0 tell.
    Key(&'static str, bool),
}

/// A key that changes the computation in a way not implemented, with the values that are. Absent and null pass.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fixed(pub &'static str, pub Only);

/// The values of a [`Fixed`] key that are implemented.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Only {
    Bool(bool),
    Number(f64),
    Texts(&'static [&'static str]),
    /// None but null.
    Null,
}

/// Keys of sizes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SizeKeys {
    pub hidden_size: Size,
    pub layers: Size,
    pub heads: Size,
    pub kv_heads: KvHeads,
    pub head_dim: Size,
    pub context_length: Size,
    pub intermediate_size: Size,
    pub vocab_size: Size,
}

/// How many KV heads there are.
#[derive(Debug, Clone, Copy)]
pub(crate) enum KvHeads {
    Key(Size),
    /// Falcon: by the key where `new_decoder_architecture`, else one where `multi_query`, else as many as query heads.
    MultiQuery(Size),
}

/// How tokens enter.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EmbeddingRow {
    pub scale: EmbeddingScale,
    /// Key of the width, where it may differ from the hidden size.
    pub width: Option<&'static str>,
    pub norm: bool,
}

/// Factor on embeddings.
#[derive(Debug, Clone, Copy)]
pub(crate) enum EmbeddingScale {
    One,
    /// √hidden size.
    RootOfHidden,
    Key(Number),
}

/// How positions enter.
#[derive(Debug, Clone, Copy)]
pub(crate) enum PositionRow {
    Rope(RopeRow),
    Learned {
        offset: usize,
    },
    Alibi(AlibiRow),
    /// By a boolean of config.json, false where absent.
    AlibiIf(&'static str, AlibiRow, RopeRow),
}

/// Rotary positions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RopeRow {
    pub style: RopeStyle,
    /// Keys of the base beside `rope_theta` of the rope parameters, and its default.
    pub theta: Number,
    pub rotary: Rotary,
    /// Windowed layers rotate by a table of their own, which no scaling touches.
    pub local: Option<LocalRope>,
    /// Rope parameters where config.json has none, as JSON.
    pub absent: Option<&'static str>,
    /// Other names of rope types.
    pub aliases: &'static [(&'static str, &'static str)],
    /// `original_max_position_embeddings` of config.json, which overrules that of the rope parameters, where absent.
    pub original_context: Option<f64>,
    /// longrope's factors on cos and sin are `short_mscale` and `long_mscale` of the rope parameters.
    pub stored_magnitudes: bool,
}

impl RopeRow {
    /// What most families have: whole heads, pairs half a head apart.
    pub const NEOX: RopeRow = RopeRow {
        style: RopeStyle::Neox,
        theta: Number::key(&["rope_theta"], 10_000.0),
        rotary: Rotary::Share(Number::key(&["partial_rotary_factor"], 1.0)),
        local: None,
        absent: None,
        aliases: &[],
        original_context: None,
        stored_magnitudes: false,
    };
}

/// The base of windowed layers.
#[derive(Debug, Clone, Copy)]
pub(crate) enum LocalRope {
    /// Its keys and default.
    Theta(Number),
    /// That of the other layers.
    SameTheta,
}

/// How much of a head rotates.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Rotary {
    /// A share, by keys beside `partial_rotary_factor`, and its default.
    Share(Number),
    /// A width; null: the whole head.
    Width(&'static str, usize),
}

/// Linear biases.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AlibiRow {
    pub max_bias: Number,
    /// Whether the bias is divided by √head_dim like the scores.
    pub scaled: bool,
    pub rounded: bool,
}

/// Norms of the residual stream.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NormRow {
    pub kind: NormKind,
    pub eps: Keys,
    pub default_eps: f64,
    /// GGUF converters bake it into the weights.
    pub weight_offset: f32,
    pub weight: bool,
    pub bias: bool,
}

/// A way to put a layer together, and when it is meant. In a GGUF file the norms of layer 0 tell.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlockCase {
    pub when: &'static [When],
    pub block: BlockSpec,
}

/// A condition on a key: its value where absent or null, and the one that is meant.
#[derive(Debug, Clone, Copy)]
pub(crate) enum When {
    Bool(&'static str, bool, bool),
    Size(&'static str, usize, usize),
}

/// Self-attention.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttentionRow {
    pub scale: ScoreScale,
    pub qkv_bias: Flag,
    pub out_bias: Flag,
    pub qk_norm: Option<QkNormRow>,
    pub clip: Option<Number>,
    pub softcap: Option<Number>,
    pub sinks: bool,
    pub windows: Option<WindowRow>,
    pub latent: Option<LatentRow>,
}

/// Factor on scores.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ScoreScale {
    /// 1/√head_dim.
    RootOfHead,
    /// A number; 1/√head_dim where there is none.
    Key(Number),
    /// 1/√number (Gemma's `query_pre_attn_scalar`).
    RootOf(Number),
    /// 1/√head_dim, times the square of YaRN's magnitude by `mscale_all_dim` (DeepSeek).
    RootOfHeadAndYarn,
}

/// Norm of queries and keys; its epsilon is that of other norms.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QkNormRow {
    pub when: Flag,
    pub over: QkNormOver,
    pub kind: NormKind,
    pub bias: bool,
    pub weight_offset: f32,
}

/// Sliding windows. `layer_types` overrules `layers`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WindowRow {
    pub size: Number,
    /// A boolean without which there are none.
    pub switch: Option<&'static str>,
    pub layers: WindowLayers,
}

/// Which layers have a window.
#[derive(Debug, Clone, Copy)]
pub(crate) enum WindowLayers {
    All,
    /// From this key's layer on.
    From(&'static str, usize),
    /// Every second one, beginning with layer 0, below this key's layer.
    AlternateBelow(&'static str, usize),
    /// All but every n-th; n by keys, and its default.
    AllButEvery(Keys, usize),
    /// By a list of [names, how often]; absent: full and windowed by turns.
    Repeated {
        key: &'static str,
        full: &'static str,
        windowed: &'static str,
    },
}

/// Multi-head latent attention.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LatentRow {
    pub query_rank: Number,
    pub norm_eps: f32,
}

/// The feed-forward part.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MlpRow {
    pub gated: bool,
    pub activation: ActivationRow,
    pub bias: Flag,
}

/// The activation function.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ActivationRow {
    pub keys: Keys,
    pub absent: &'static str,
    /// The first Gemma files say `gelu` and mean its tanh approximation.
    pub gelu_is_tanh: bool,
}

/// A mixture of experts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ExpertsRow {
    pub count: Size,
    pub per_token: Size,
    pub intermediate_size: Size,
    pub layers: ExpertLayers,
    /// Limit and alpha of a clamped gate; else experts activate as other MLPs.
    pub clamped: Option<(Number, Number)>,
    pub bias: bool,
    pub score: ScoreRow,
    pub normalize: Flag,
    pub scale: Number,
    pub groups: GroupsRow,
    pub router_bias: bool,
    pub correction_bias: bool,
    pub shared: SharedRow,
}

/// Which layers have experts.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ExpertLayers {
    All,
    /// Every n-th by `decoder_sparse_step`, but those in `mlp_only_layers`.
    Sparse,
    /// From this key's layer on.
    From(&'static str, usize),
}

/// What a router's scores are.
#[derive(Debug, Clone, Copy)]
pub(crate) enum ScoreRow {
    Softmax,
    Sigmoid,
    SoftmaxOfChosen,
    SparseMixer { jitter: Number },
}

/// Group-limited choice.
#[derive(Debug, Clone, Copy)]
pub(crate) enum GroupsRow {
    No,
    /// Where a key has a value; by the best of a group.
    If(&'static str, &'static str),
    /// By the two best of a group.
    BestTwo,
}

/// Shared experts.
#[derive(Debug, Clone, Copy)]
pub(crate) enum SharedRow {
    No,
    /// One of a width of its own, with a gate.
    Gated(Size),
    /// This many experts as one; null: none.
    Count(&'static str, usize),
}

/// From hidden states to logits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeadRow {
    pub tied_default: bool,
    pub bias: Flag,
    pub scale: HeadScale,
    pub softcap: Option<Number>,
}

/// Factor on logits.
#[derive(Debug, Clone, Copy)]
pub(crate) enum HeadScale {
    One,
    Times(Number),
    DividedBy(Number),
}

/// What is particular to a family's GGUF files; the rest is the format's own or follows from the other fields.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GgufRow {
    /// The converter permutes q and k rows of some families, which turns the pair layout into the other one.
    pub rope_style: RopeStyle,
    pub activation: ActivationKind,
    pub names: super::TensorNames,
    /// Layers of the one size whose scores are scaled by hidden size / heads, which no key says (Gemma 27B).
    pub layers_scaled_by_share: Option<usize>,
    /// Whether YaRN's ramp has whole ends, which no key says.
    pub yarn_truncates: bool,
    /// Whether the chosen experts' weights are divided by their sum where no key says it.
    pub normalize: bool,
}

impl Number {
    pub const fn key(key: Keys, absent: f64) -> Self {
        Number { keys: key, absent: Some(absent) }
    }

    /// None where the key is absent.
    pub const fn optional(key: Keys) -> Self {
        Number { keys: key, absent: None }
    }

    /// A constant of the family, which no key says.
    pub const fn constant(value: f64) -> Self {
        Number { keys: &[], absent: Some(value) }
    }
}

impl Size {
    pub const fn needed(keys: Keys) -> Self {
        Size { keys, absent: None, derived: Derived::Nothing }
    }

    pub const fn or(keys: Keys, absent: usize) -> Self {
        Size { keys, absent: Some(absent), derived: Derived::Nothing }
    }

    pub const fn derived(keys: Keys, derived: Derived) -> Self {
        Size { keys, absent: None, derived }
    }
}
