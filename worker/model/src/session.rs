//! One sequence at a time on a decoder: the convenient way for those who embed the crate.

use crate::error::Result;
use crate::step::StepModel;

/// A sequence and its KV state. It uses the whole pool: one session per decoder at a time.
pub struct Session<'a> {
    model: &'a mut dyn StepModel,
    tokens: usize,
}

impl<'a> Session<'a> {
    /// Starts an empty sequence.
    pub fn new(model: &'a mut dyn StepModel) -> Self {
        Session { model, tokens: 0 }
    }

    /// Appends tokens and returns the logits after the last of them.
    ///
    /// # Errors
    /// Ids outside the vocabulary, a sequence longer than the model was built for, a failed backend.
    pub fn forward(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        let _ = tokens;
        todo!()
    }

    /// Tokens so far.
    pub fn len(&self) -> usize {
        self.tokens
    }

    /// Whether nothing was appended yet.
    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    /// Longest sequence.
    pub fn max_len(&self) -> usize {
        self.model.info().max_model_len
    }
}
