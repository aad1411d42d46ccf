//! Why a measurement cannot be made.

use forge_model::ModelError;

/// A measurement that cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// A protocol's numbers contradict each other or the model.
    #[error("{option} is {value}: {reason}")]
    Option {
        /// Name of the option.
        option: &'static str,
        /// What it is.
        value: usize,
        /// What it may be.
        reason: String,
    },
    /// The text gives the protocol nothing to score.
    #[error("the text has {tokens} tokens, and {needed} are needed: {reason}")]
    TooShort {
        /// Tokens of the text.
        tokens: usize,
        /// Tokens the protocol needs.
        needed: usize,
        /// What to do.
        reason: String,
    },
    /// Two models whose distributions are over different outcomes.
    #[error("the models cannot be compared: {reason}")]
    Incomparable {
        /// What differs.
        reason: String,
    },
    /// A model that answers with no number.
    #[error("the model gives a logit that is no finite number, for the token at position {position} of the text")]
    NonFinite {
        /// Index of the token in the text.
        position: usize,
    },
    /// The model failed.
    #[error(transparent)]
    Model(#[from] ModelError),
}
