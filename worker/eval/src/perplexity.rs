//! Perplexity of a text under a model.

use forge_model::StepModel;
use serde::Serialize;

use crate::distribution::log_normalizer;
use crate::protocol::{Protocol, Window};
use crate::statistics::{Estimate, Moments};
use crate::steps::{check_fits, map_rows, steps};
use crate::{EvalError, Result};

/// How well a model predicts a text.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Perplexity {
    /// exp of the mean negative log-likelihood; its standard error by error propagation.
    pub perplexity: Estimate,
    /// Mean negative log-likelihood of a token, in nats.
    pub nll_per_token: f64,
    /// Tokens scored.
    pub tokens: usize,
    /// Windows computed.
    pub windows: usize,
    /// Bytes of text that the scored tokens stand for.
    pub bytes: usize,
    /// Bits per byte of that text.
    pub bits_per_byte: f64,
    /// exp of the negative log-likelihood per byte, where the whole text is scored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub byte_perplexity: Option<f64>,
    /// exp of the negative log-likelihood per word, where the whole text is scored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub word_perplexity: Option<f64>,
    /// Words of the text, where the whole text is scored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub words: Option<usize>,
}

/// Sizes of the text, by which likelihoods are compared across tokenizers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextSizes {
    /// Bytes of UTF-8.
    pub bytes: usize,
    /// Words: one more than there are runs of whitespace, as lm-eval counts.
    pub words: usize,
}

impl TextSizes {
    /// Counts a text.
    pub fn of(text: &str) -> Self {
        // Python's `\s` has four separators of ASCII that Unicode's white space has not.
        let is_space = |character: char| character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character);
        let mut runs = 0;
        let mut in_run = false;
        for character in text.chars() {
            let space = is_space(character);
            runs += usize::from(space && !in_run);
            in_run = space;
        }
        TextSizes { bytes: text.len(), words: runs + 1 }
    }
}

/// What was scored: the text's tokens, how many bytes each stands for, and the whole text's sizes where the protocol
/// scores all of it.
#[derive(Debug, Clone, Copy)]
pub struct ScoredText<'a> {
    /// Token ids.
    pub tokens: &'a [u32],
    /// Bytes each token stands for.
    pub token_bytes: &'a [usize],
    /// Of the whole text; `None` where `tokens` are a part of it.
    pub sizes: Option<TextSizes>,
}

/// Scores `windows` of a text. `progress` hears after each window how many are done, and the perplexity so far.
///
/// # Errors
/// A window the model cannot hold, a logit that is no number, a failed step.
pub fn measure_perplexity(
    model: &mut dyn StepModel,
    text: ScoredText<'_>,
    protocol: &Protocol,
    windows: &[Window],
    mut progress: impl FnMut(usize, f64),
) -> Result<Perplexity> {
    let info = model.info().clone();
    check_fits(&info, protocol.context())?;
    let mut losses = Moments::default();
    let mut bytes = 0;
    let mut logits = Vec::new();
    for (done, window) in windows.iter().enumerate() {
        for step in steps(&info, text.tokens, window) {
            model.step(&step.plan, &mut logits)?;
            let scored = map_rows(&step, info.vocab_size, &logits, |index, row| loss(row, text.tokens[index]));
            for (index, loss) in step.scored.clone().zip(scored) {
                if !loss.is_finite() {
                    return Err(EvalError::NonFinite { position: index });
                }
                losses.add(loss);
                bytes += text.token_bytes[index];
            }
        }
        progress(done + 1, losses.mean().exp());
    }
    Ok(summary(&losses, windows, bytes, text, protocol))
}

/// Negative log-likelihood of a token, in nats.
fn loss(row: &[f32], token: u32) -> f64 {
    log_normalizer(row) - f64::from(row[token as usize])
}

fn summary(losses: &Moments, windows: &[Window], bytes: usize, text: ScoredText<'_>, protocol: &Protocol) -> Perplexity {
    let nll = losses.mean();
    let total = nll * losses.count() as f64;
    // Only the rolling protocol scores every token, and only then is the text's own size what was scored.
    let whole = matches!(protocol, Protocol::Rolling { .. }) && losses.count() == text.tokens.len();
    let sizes = text.sizes.filter(|_| whole);
    let bytes = sizes.map_or(bytes, |sizes| sizes.bytes);
    Perplexity {
        perplexity: Estimate { value: nll.exp(), standard_error: nll.exp() * losses.standard_error() },
        nll_per_token: nll,
        tokens: losses.count(),
        windows: windows.len(),
        bytes,
        bits_per_byte: total / std::f64::consts::LN_2 / bytes.max(1) as f64,
        byte_perplexity: sizes.map(|sizes| (total / sizes.bytes.max(1) as f64).exp()),
        word_perplexity: sizes.map(|sizes| (total / sizes.words as f64).exp()),
        words: sizes.map(|sizes| sizes.words),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_counted_as_lm_eval_does() {
        // len(re.split(r"\s+", text)) of Python.
        for (text, words) in [("", 1), ("one", 1), ("one two", 2), (" one\n\ttwo ", 4), ("a\u{1c}b", 2), ("a\u{a0}b", 2), ("a\u{200b}b", 1)]
        {
            assert_eq!(TextSizes::of(text).words, words, "{text:?}");
        }
    }

    #[test]
    fn a_loss_is_the_negative_log_probability() {
        let row = [0.0, (3.0_f32).ln()];
        assert!((loss(&row, 1) - (4.0_f64 / 3.0).ln()).abs() < 1e-7);
    }
}
