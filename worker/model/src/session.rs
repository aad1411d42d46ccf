//! One sequence at a time on a decoder: the convenient way for those who embed the crate.

use forge_kernels::SequenceSlice;

use crate::error::{ModelError, Result};
use crate::step::{StepModel, StepPlan};

/// A sequence and its KV state. It uses the pool from block 0 on: one session per decoder at a time.
pub struct Session<'a> {
    model: &'a mut dyn StepModel,
    length: usize,
}

impl<'a> Session<'a> {
    /// Starts an empty sequence.
    pub fn new(model: &'a mut dyn StepModel) -> Self {
        Session { model, length: 0 }
    }

    /// Appends tokens and returns the logits after the last of them, `vocab_size` values.
    ///
    /// # Errors
    /// No tokens, ids outside the vocabulary, a sequence longer than the model was built for, a failed backend.
    pub fn forward(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        self.run(tokens, false)
    }

    /// Appends tokens and returns the logits after each of them, [tokens, vocab_size].
    ///
    /// # Errors
    /// As [`Session::forward`].
    pub fn forward_all(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        self.run(tokens, true)
    }

    fn run(&mut self, tokens: &[u32], all: bool) -> Result<Vec<f32>> {
        let wrong = |reason: String| Err(ModelError::Plan { field: "tokens", reason });
        if tokens.is_empty() {
            return wrong("there are none; give at least one".to_owned());
        }
        let info = self.model.info();
        let (longest, chunk_rows) = (self.max_len(), info.max_step_rows);
        if tokens.len() > longest - self.length {
            return wrong(format!("{} after {} are more than the {longest} this decoder was built for", tokens.len(), self.length));
        }
        let mut logits = Vec::new();
        let mut part = Vec::new();
        let chunks = tokens.chunks(chunk_rows);
        let last = chunks.len() - 1;
        for (index, chunk) in chunks.enumerate() {
            let rows = chunk.len() as u32;
            let logits_rows = match (all, index == last) {
                (true, _) => (0..rows).collect(),
                (false, true) => vec![rows - 1],
                (false, false) => Vec::new(),
            };
            let plan = self.plan(chunk, logits_rows);
            self.model.step(&plan, &mut part)?;
            self.length += chunk.len();
            logits.extend_from_slice(&part);
        }
        Ok(logits)
    }

    /// A step of this one sequence, whose block table is 0, 1, 2, …
    fn plan(&self, tokens: &[u32], logits_rows: Vec<u32>) -> StepPlan {
        let block_size = self.model.info().block_size;
        let positions: Vec<u32> = (self.length..self.length + tokens.len()).map(|position| position as u32).collect();
        let blocks = (self.length + tokens.len()).div_ceil(block_size) as u32;
        StepPlan {
            tokens: tokens.to_vec(),
            slots: positions.clone(),
            sequences: vec![SequenceSlice {
                row_start: 0,
                row_count: tokens.len() as u32,
                first_position: self.length as u32,
                table_start: 0,
                table_len: blocks,
            }],
            block_tables: (0..blocks).collect(),
            positions,
            logits_rows,
            ..StepPlan::default()
        }
    }

    /// Tokens so far.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing was appended yet.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Longest sequence: the decoder's, or what its pool holds.
    pub fn max_len(&self) -> usize {
        let info = self.model.info();
        info.max_model_len.min(info.kv_blocks * info.block_size)
    }
}
