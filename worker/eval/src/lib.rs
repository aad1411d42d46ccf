//! What a model is worth, in numbers: perplexity of a text, divergence from another model, speed.
//!
//! What it is: the protocols of measuring (which token is scored after which context), the statistics over
//! log-probabilities, and the loop that drives any [`forge_model::StepModel`] through them. What it is not: it opens
//! no file, knows no tokenizer and prints nothing; token ids come in and numbers go out.
//!
//! Invariant: memory is bounded by one step's logits and a few numbers per scored token, whatever the text's length.

pub mod distribution;
pub mod divergence;
mod error;
pub mod perplexity;
pub mod protocol;
pub mod speed;
pub mod statistics;
mod steps;

pub use divergence::{Divergence, measure_divergence};
pub use error::EvalError;
pub use perplexity::{Perplexity, TextSizes, measure_perplexity};
pub use protocol::{Protocol, Window, windows};
pub use statistics::Estimate;
pub use steps::teacher_forced_logits;

/// Result of a measurement.
pub type Result<T, E = EvalError> = std::result::Result<T, E>;

/// A text of several kinds (prose, notes, code, tables, letters), where none is given. It stays as it is, so that
/// figures can be compared over time.
pub const BUILT_IN_TEXT: &str = include_str!("../text.txt");
