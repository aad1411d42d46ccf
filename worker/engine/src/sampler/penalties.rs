//! What a request does to a row before temperature: logit bias, penalties, forbidden tokens.
//!
//! Order: bias, repetition, frequency, presence, then tokens that may not come yet are made impossible.
//! Only the tokens concerned are touched, and what was there is put back afterwards, because answers that
//! share a prompt sample their first token from one row.

use std::collections::HashMap;

use forge_shared::generate::SamplingParams;

/// Which tokens a sequence holds, for the penalties. It is rebuilt by replaying the answer.
#[derive(Debug, Clone, Default)]
pub struct TokenHistory {
    /// Distinct tokens of the prompt; kept only where a repetition penalty asks for them.
    prompt: Vec<u32>,
    /// How often each token is in the answer.
    answer: HashMap<u32, u32>,
    wanted: bool,
}

impl TokenHistory {
    /// The history of a sequence that has its prompt and no answer yet. Keeps nothing where no penalty
    /// needs it.
    pub fn new(params: &SamplingParams, prompt: &[u32]) -> Self {
        let mut distinct = Vec::new();
        if params.repetition_penalty != 1.0 {
            distinct.extend_from_slice(prompt);
            distinct.sort_unstable();
            distinct.dedup();
        }
        let wanted = params.repetition_penalty != 1.0 || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
        TokenHistory { prompt: distinct, answer: HashMap::new(), wanted }
    }

    /// Takes the next token of the answer.
    pub fn push(&mut self, token: u32) {
        if self.wanted {
            *self.answer.entry(token).or_default() += 1;
        }
    }
}

/// Changes made to a row, to be undone.
#[derive(Debug, Default)]
pub(crate) struct Adjustments {
    /// Token and the logit it had, in order of change.
    undo: Vec<(u32, f32)>,
}

impl Adjustments {
    fn change(&mut self, row: &mut [f32], token: u32, new: impl FnOnce(f32) -> f32) {
        if let Some(logit) = row.get_mut(token as usize) {
            self.undo.push((token, *logit));
            *logit = new(*logit);
        }
    }

    /// Applies a request's bias and penalties, then makes `forbidden` impossible.
    pub(crate) fn apply(&mut self, row: &mut [f32], params: &SamplingParams, history: &TokenHistory, forbidden: &[u32]) {
        debug_assert!(self.undo.is_empty());
        for &(token, bias) in &params.logit_bias {
            self.change(row, token, |logit| logit + bias);
        }
        if history.wanted {
            self.penalize(row, params, history);
        }
        for &token in forbidden {
            self.change(row, token, |_| f32::NEG_INFINITY);
        }
    }

    fn penalize(&mut self, row: &mut [f32], params: &SamplingParams, history: &TokenHistory) {
        let repetition = params.repetition_penalty;
        let repeated = |logit: f32| {
            if repetition == 1.0 {
                logit
            } else if logit > 0.0 {
                logit / repetition
            } else {
                logit * repetition
            }
        };
        for &token in history.prompt.iter().filter(|token| !history.answer.contains_key(token)) {
            self.change(row, token, repeated);
        }
        for (&token, &count) in &history.answer {
            self.change(row, token, |logit| repeated(logit) - params.frequency_penalty * count as f32 - params.presence_penalty);
        }
    }

    /// Whether the row is as the model gave it.
    pub(crate) fn is_empty(&self) -> bool {
        self.undo.is_empty()
    }

    /// Puts back what was there.
    pub(crate) fn undo(&mut self, row: &mut [f32]) {
        for (token, logit) in self.undo.drain(..).rev() {
            row[token as usize] = logit;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_the_formula_and_is_undone() {
        let params = SamplingParams {
            repetition_penalty: 2.0,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            logit_bias: vec![(0, 3.0), (5, -1.0), (5, -1.0)],
            ..SamplingParams::default()
        };
        let mut history = TokenHistory::new(&params, &[0, 1, 1]);
        for token in [1, 2, 2] {
            history.push(token);
        }
        let original = [-2.0, 4.0, -3.0, 1.0, 0.0, 7.0];
        let mut row = original;
        let mut adjustments = Adjustments::default();
        adjustments.apply(&mut row, &params, &history, &[3]);
        assert_eq!(row[0], (-2.0 + 3.0) / 2.0);
        assert_eq!(row[1], 4.0 / 2.0 - 0.25 - 0.5);
        assert_eq!(row[2], -3.0 * 2.0 - 0.25 * 2.0 - 0.5);
        assert_eq!(row[3], f32::NEG_INFINITY);
        assert_eq!(row[4..], [0.0, 5.0]);
        adjustments.undo(&mut row);
        assert_eq!(row, original);
    }

    #[test]
    fn without_penalties_nothing_is_kept_or_changed() {
        let params = SamplingParams::default();
        let mut history = TokenHistory::new(&params, &[1, 2]);
        history.push(1);
        let mut row = [1.0, 2.0];
        Adjustments::default().apply(&mut row, &params, &history, &[]);
        assert_eq!(row, [1.0, 2.0]);
        assert!(history.answer.is_empty() && history.prompt.is_empty());
    }
}
