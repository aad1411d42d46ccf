//! A rank's weights, as the pass reads them.
//!
//! Biases of row-split products are tables of one row (of one for each expert): they are added once, after the sum over
//! ranks, and in the same way when there is only one.

use super::store::Slots;

pub(crate) struct Norm<S: Slots> {
    pub weight: Option<S::Vector>,
    pub bias: Option<S::Vector>,
}

pub(crate) struct Linear<S: Slots> {
    pub weight: S::Weight,
    pub bias: Option<S::Vector>,
}

/// A layer's weights.
pub(crate) struct Layer<S: Slots> {
    pub attention_norm: Option<Norm<S>>,
    /// `None` where the rank has no heads.
    pub attention: Option<AttentionWeights<S>>,
    pub out_bias: Option<S::Weight>,
    pub attention_post_norm: Option<Norm<S>>,
    pub mlp_norm: Option<Norm<S>>,
    pub feed_forward: FeedForward<S>,
    pub mlp_post_norm: Option<Norm<S>>,
}

pub(crate) struct AttentionWeights<S: Slots> {
    pub qkv: QkvWeights<S>,
    pub out: S::Weight,
    pub sinks: Option<S::Vector>,
}

pub(crate) enum QkvWeights<S: Slots> {
    Direct(DirectWeights<S>),
    Latent(LatentWeights<S>),
}

pub(crate) struct DirectWeights<S: Slots> {
    pub q: Linear<S>,
    pub k: Linear<S>,
    pub v: Linear<S>,
    pub q_norm: Option<Norm<S>>,
    pub k_norm: Option<Norm<S>>,
}

pub(crate) struct LatentWeights<S: Slots> {
    pub query_latent: Option<(Linear<S>, Norm<S>)>,
    pub q: Linear<S>,
    pub latent: Linear<S>,
    pub latent_norm: Norm<S>,
    pub rotary_key: Linear<S>,
    pub expand: Expand<S>,
}

/// From latents to plain keys and values: one product or two; see [`super::layout::Layout::expands_apart`].
pub(crate) enum Expand<S: Slots> {
    Joined(Linear<S>),
    Apart { keys: Linear<S>, values: Linear<S> },
}

pub(crate) enum FeedForward<S: Slots> {
    Dense(SplitMlp<S>),
    Experts(Box<ExpertsWeights<S>>),
}

/// An MLP that ranks share.
pub(crate) struct SplitMlp<S: Slots> {
    /// `None` where the rank has no inner units.
    pub mlp: Option<MlpWeights<S>>,
    pub bias: Option<S::Weight>,
}

pub(crate) struct MlpWeights<S: Slots> {
    pub gate: Option<Linear<S>>,
    pub up: Linear<S>,
    pub down: S::Weight,
}

pub(crate) struct ExpertsWeights<S: Slots> {
    pub router: Linear<S>,
    /// Added to scores for the choice; on the host, where the choice is made.
    pub correction: Option<Vec<f32>>,
    /// `None` where the rank has no inner units.
    pub experts: Option<Vec<MlpWeights<S>>>,
    /// [experts, hidden_size].
    pub biases: Option<S::Weight>,
    pub shared: Option<SplitMlp<S>>,
    pub shared_gate: Option<S::Weight>,
}

/// A rank's weights.
pub(crate) struct Weights<S: Slots> {
    /// Rows of the embedding (also the head where tied), where this stage needs them.
    pub embedding: Option<S::Weight>,
    pub embedding_norm: Option<Norm<S>>,
    pub project_in: Option<S::Weight>,
    pub positions: Option<S::Weight>,
    /// Slopes of the rank's heads.
    pub alibi_slopes: Option<S::Vector>,
    pub layers: Vec<Layer<S>>,
    pub final_norm: Option<Norm<S>>,
    pub project_out: Option<S::Weight>,
    /// `None` where the head is the embedding, or on another stage.
    pub head: Option<S::Weight>,
    pub head_bias: Option<S::Vector>,
}
