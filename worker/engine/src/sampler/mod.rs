//! `Sampler`: from a row of logits to a token and its log-probabilities.
//!
//! Order: raw log-probabilities → bias and penalties → greedy, or temperature → top_k → top_p → min_p → draw.
//! Log-probabilities are those of the model's own distribution, before anything a request changes.
//!
//! Invariant (DESIGN P2): the outcome is a function of the row, the parameters, the sequence's tokens and
//! (seed, choice, position); neither the batch nor earlier calls have a part in it.

mod filters;
mod penalties;
mod philox;
mod row;

#[cfg(test)]
mod tests;

use forge_shared::generate::{Logprobs, SamplingParams, TokenLogprob};

pub use penalties::TokenHistory;
pub use philox::{DrawKey, philox4x32};

use filters::{Candidate, Filters, RowView};
use penalties::Adjustments;
use row::VocabularyTree;

/// The model gave no distribution: NaN or +∞ among the logits, or no token is possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// NaN or +∞, or −∞ everywhere.
    #[error("the model's logits are not finite: its weights or this prompt's activations hold NaN or infinity")]
    NotFinite,
    /// The request's own bias, penalties and end tokens leave no token.
    #[error("logit_bias, penalties and min_tokens together leave no token that can be sampled")]
    NothingLeft,
}

/// Everything a draw depends on beside the row.
#[derive(Debug, Clone, Copy)]
pub struct SampleInput<'a> {
    /// The request's parameters.
    pub params: &'a SamplingParams,
    /// Tokens of the sequence, for penalties.
    pub history: &'a TokenHistory,
    /// Tokens that may not come yet (end tokens before `min_tokens`).
    pub forbidden: &'a [u32],
    /// Place in the request's randomness.
    pub key: DrawKey,
}

/// A sampled token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// Token id.
    pub token: u32,
    /// If `params.logprobs` asks for them.
    pub logprobs: Option<Logprobs>,
}

/// See the module's documentation. Holds only scratch memory.
#[derive(Debug)]
pub struct Sampler {
    tree: VocabularyTree,
    maxima: Vec<f32>,
    segment_sums: Vec<f32>,
    keys: Vec<u64>,
    kept: Vec<Candidate>,
    adjustments: Adjustments,
}

impl Sampler {
    /// A sampler over rows of `vocab_size` logits.
    pub fn new(vocab_size: usize) -> Self {
        Sampler {
            tree: VocabularyTree::new(vocab_size),
            maxima: Vec::new(),
            segment_sums: Vec::new(),
            keys: Vec::new(),
            kept: Vec::new(),
            adjustments: Adjustments::default(),
        }
    }

    /// Samples a token from a row, which is changed on the way and restored before returning.
    ///
    /// # Errors
    /// [`SampleError`].
    pub fn sample(&mut self, row: &mut [f32], input: SampleInput<'_>) -> Result<Sampled, SampleError> {
        let params = input.params;
        let raw_max = row::chunk_maxima(row, &mut self.maxima).map_err(|_| SampleError::NotFinite)?;
        let raw = params.logprobs.map(|top| {
            let sum = self.tree.sum_exp(row, raw_max, 1.0, &mut self.segment_sums);
            (Distribution::new(raw_max, sum), self.most_likely(row, raw_max, top))
        });
        self.adjustments.apply(row, params, input.history, input.forbidden);
        let max = match self.adjustments.is_empty() {
            true => Ok(raw_max),
            false => row::chunk_maxima(row, &mut self.maxima).map_err(|_| SampleError::NothingLeft),
        };
        let token = max.map(|max| self.pick(row, max, params, input.key));
        self.adjustments.undo(row);
        let token = token?;
        let logprobs = raw.map(|(distribution, top)| distribution.logprobs(row, token, &top));
        Ok(Sampled { token, logprobs })
    }

    /// Log-probabilities of a token that is given (a prompt's), with `top` alternatives.
    ///
    /// # Errors
    /// [`SampleError::NotFinite`].
    pub fn score(&mut self, row: &[f32], token: u32, top: u32) -> Result<Logprobs, SampleError> {
        let max = row::chunk_maxima(row, &mut self.maxima).map_err(|_| SampleError::NotFinite)?;
        let sum = self.tree.sum_exp(row, max, 1.0, &mut self.segment_sums);
        let top = self.most_likely(row, max, top);
        Ok(Distribution::new(max, sum).logprobs(row, token, &top))
    }

    fn most_likely(&mut self, row: &[f32], max: f32, count: u32) -> Vec<u32> {
        if count == 0 {
            return Vec::new();
        }
        RowView { logits: row, maxima: &self.maxima, max }.largest(count as usize, &mut self.keys);
        self.keys.iter().map(|&key| key as u32).collect()
    }

    /// The token of an adjusted row whose largest values are known.
    fn pick(&mut self, row: &[f32], max: f32, params: &SamplingParams, key: DrawKey) -> u32 {
        if params.temperature == 0.0 {
            return argmax(row, &self.maxima, max);
        }
        let scale = (1.0 / params.temperature).min(f32::MAX);
        let filters = Filters { scale, top_k: params.top_k, top_p: params.top_p, min_p: params.min_p };
        let view = RowView { logits: row, maxima: &self.maxima, max };
        let (tree, sums) = (&self.tree, &mut self.segment_sums);
        let unfiltered_k = params.top_k == 0 || params.top_k as usize >= row.len();
        if unfiltered_k && params.top_p >= 1.0 && params.min_p <= 0.0 {
            tree.sum_exp(row, max, scale, sums);
            return filters::draw_from_all(view, scale, tree.bounds(), sums, key.uniform(0));
        }
        let total = || f64::from(tree.sum_exp(row, max, scale, sums));
        filters::keep(view, filters, total, &mut self.keys, &mut self.kept);
        filters::draw(&self.kept, key.uniform(0))
    }
}

/// The lowest id among the tokens with the largest logit.
fn argmax(row: &[f32], maxima: &[f32], max: f32) -> u32 {
    let chunk = maxima.iter().position(|&value| value == max).unwrap_or(0);
    let start = chunk * row::CHUNK;
    let offset = row[start..].iter().position(|&value| value == max).unwrap_or(0);
    (start + offset) as u32
}

/// The model's distribution over a row.
#[derive(Debug, Clone, Copy)]
struct Distribution {
    max: f32,
    log_sum: f32,
}

impl Distribution {
    fn new(max: f32, sum: f32) -> Self {
        // libm, not the system's: the same bits on every machine.
        Distribution { max, log_sum: libm::log(f64::from(sum)) as f32 }
    }

    fn of(&self, row: &[f32], token: u32) -> TokenLogprob {
        TokenLogprob { token, logprob: row[token as usize] - self.max - self.log_sum }
    }

    fn logprobs(&self, row: &[f32], token: u32, top: &[u32]) -> Logprobs {
        Logprobs { chosen: self.of(row, token), top: top.iter().map(|&token| self.of(row, token)).collect() }
    }
}
