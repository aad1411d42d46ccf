//! What can go wrong in the engine.

use forge_model::ModelError;
use forge_shared::generate::AdmitError;
use forge_text::TextError;

/// The one error type of this crate. A request's own failure is an event of its stream and not one of these,
/// except for the blocking calls of [`crate::Engine`].
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// An option outside its range.
    #[error("{field} must be {expected}, got {actual}")]
    Option {
        /// Which.
        field: &'static str,
        /// What is allowed.
        expected: String,
        /// What came.
        actual: usize,
    },
    /// The request was not admitted.
    #[error(transparent)]
    Admit(#[from] AdmitError),
    /// The model failed, in a step or while its metadata was read; the engine cannot go on.
    #[error("the model failed: {0}")]
    Model(#[from] ModelError),
    /// The model gave another number of logits than the step asked for; the engine cannot go on.
    #[error("the model gave {actual} logits for {expected}")]
    LogitsCount {
        /// Rows asked for times vocabulary.
        expected: usize,
        /// What came.
        actual: usize,
    },
    /// Tokens could not be turned into text.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The engine gave the request up.
    #[error("the request failed: {reason}")]
    Failed {
        /// Why.
        reason: String,
        /// Whether another try may succeed.
        retryable: bool,
    },
    /// The engine ended before the request did.
    #[error("the engine ended before the answer was complete: {reason}")]
    Died {
        /// Why, as far as it is known.
        reason: String,
    },
    /// The system gave no thread.
    #[error("the engine's thread could not be started: {0}")]
    Thread(#[from] std::io::Error),
}
