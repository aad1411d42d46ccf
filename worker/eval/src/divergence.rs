//! How far one model's next-token distributions are from another's.

use forge_model::StepModel;
use serde::Serialize;

use crate::distribution::{log_normalizer, top_token};
use crate::protocol::{Protocol, Window};
use crate::statistics::{Estimate, Moments, quantile};
use crate::steps::{check_fits, map_indices, steps};
use crate::{EvalError, Result};

/// Divergence of model B from model A over the scored tokens of a text.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Divergence {
    /// Tokens scored.
    pub tokens: usize,
    /// Windows computed.
    pub windows: usize,
    /// Mean Kullback-Leibler divergence of B from A, in nats.
    pub mean_kld: Estimate,
    /// Median of the divergences.
    pub median_kld: f64,
    /// The divergence that 99 % of tokens do not exceed.
    pub p99_kld: f64,
    /// Largest divergence.
    pub max_kld: f64,
    /// Mean change of the probability of the text's own token, B − A.
    pub mean_delta_p: Estimate,
    /// Root mean square of that change.
    pub rms_delta_p: Estimate,
    /// Share of tokens where both find the same token likeliest.
    pub same_top: Estimate,
    /// Perplexity under A.
    pub base_perplexity: Estimate,
    /// Perplexity under B.
    pub perplexity: Estimate,
    /// Perplexity of B less that of A; its error takes into account that both score the same tokens.
    pub delta_perplexity: Estimate,
}

/// What one scored token tells.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenDivergence {
    /// Kullback-Leibler divergence, in nats.
    pub kld: f64,
    /// Negative log-likelihood of the text's token under A.
    pub base_loss: f64,
    /// And under B.
    pub loss: f64,
    /// Whether both find the same token likeliest.
    pub same_top: bool,
}

/// Compares two rows of logits over the same vocabulary.
pub fn token_divergence(base: &[f32], other: &[f32], token: u32) -> TokenDivergence {
    let (base_normalizer, normalizer) = (log_normalizer(base), log_normalizer(other));
    let mut kld = 0.0;
    for (&left, &right) in base.iter().zip(other) {
        let log_p = f64::from(left) - base_normalizer;
        let p = log_p.exp();
        // A token that A excludes contributes nothing, whatever B thinks of it.
        if p > 0.0 {
            kld += p * (log_p - (f64::from(right) - normalizer));
        }
    }
    TokenDivergence {
        // Rounding may leave equal distributions a hair below zero.
        kld: kld.max(0.0),
        base_loss: base_normalizer - f64::from(base[token as usize]),
        loss: normalizer - f64::from(other[token as usize]),
        same_top: top_token(base) == top_token(other),
    }
}

/// Sums over tokens; only the divergences themselves are kept, for the quantiles.
#[derive(Debug, Clone, Default)]
pub struct DivergenceSums {
    divergences: Vec<f64>,
    kld: Moments,
    delta_p: Moments,
    square_delta_p: Moments,
    same_top: usize,
    base_loss: Moments,
    loss: Moments,
    /// Of both losses together, for the error of a difference.
    loss_products: f64,
}

impl DivergenceSums {
    /// Adds a token.
    pub fn add(&mut self, token: TokenDivergence) {
        let delta_p = (-token.loss).exp() - (-token.base_loss).exp();
        self.divergences.push(token.kld);
        self.kld.add(token.kld);
        self.delta_p.add(delta_p);
        self.square_delta_p.add(delta_p * delta_p);
        self.same_top += usize::from(token.same_top);
        let base_before = token.base_loss - self.base_loss.mean();
        self.base_loss.add(token.base_loss);
        self.loss.add(token.loss);
        self.loss_products += base_before * (token.loss - self.loss.mean());
    }

    /// Mean divergence so far.
    pub fn mean_kld(&self) -> f64 {
        self.kld.mean()
    }

    /// The summary over `windows` windows.
    pub fn finish(mut self, windows: usize) -> Divergence {
        let tokens = self.kld.count();
        self.divergences.sort_by(f64::total_cmp);
        let at = |share| quantile(&self.divergences, share).unwrap_or(0.0);
        let rms = self.square_delta_p.mean().sqrt();
        let rms_error = if rms > 0.0 { 0.5 / rms * self.square_delta_p.standard_error() } else { 0.0 };
        let same = self.same_top as f64 / tokens.max(1) as f64;
        let same_error = if tokens > 1 { (same * (1.0 - same) / (tokens - 1) as f64).sqrt() } else { 0.0 };
        let perplexity =
            |losses: &Moments| Estimate { value: losses.mean().exp(), standard_error: losses.mean().exp() * losses.standard_error() };
        let (base, other) = (perplexity(&self.base_loss), perplexity(&self.loss));
        let covariance = if tokens > 1 { self.loss_products / tokens as f64 / (tokens - 1) as f64 } else { 0.0 };
        let variance = base.standard_error.powi(2) + other.standard_error.powi(2) - 2.0 * base.value * other.value * covariance;
        Divergence {
            tokens,
            windows,
            mean_kld: self.kld.estimate(),
            median_kld: at(0.5),
            p99_kld: at(0.99),
            max_kld: at(1.0),
            mean_delta_p: self.delta_p.estimate(),
            rms_delta_p: Estimate { value: rms, standard_error: rms_error },
            same_top: Estimate { value: same, standard_error: same_error },
            base_perplexity: base,
            perplexity: other,
            delta_perplexity: Estimate { value: other.value - base.value, standard_error: variance.max(0.0).sqrt() },
        }
    }
}

/// Divergence of `other` from `base` over `windows` of a text. Both are driven step by step together, so that never
/// more than one step's logits of each are held. `progress` hears after each window how many are done, and the mean
/// so far.
///
/// # Errors
/// Models of different vocabularies or built for different steps, a window they cannot hold, a logit that is no
/// number, a failed step.
pub fn measure_divergence(
    base: &mut dyn StepModel,
    other: &mut dyn StepModel,
    text: (&[u32], &Protocol, &[Window]),
    mut progress: impl FnMut(usize, f64),
) -> Result<Divergence> {
    let (tokens, protocol, windows) = text;
    let info = base.info().clone();
    check_comparable(&info, other.info())?;
    check_fits(&info, protocol.context())?;
    check_fits(other.info(), protocol.context())?;
    let mut sums = DivergenceSums::default();
    let (mut base_logits, mut logits) = (Vec::new(), Vec::new());
    for (done, window) in windows.iter().enumerate() {
        for step in steps(&info, tokens, window) {
            base.step(&step.plan, &mut base_logits)?;
            other.step(&step.plan, &mut logits)?;
            let row = |index: usize| index * info.vocab_size..(index + 1) * info.vocab_size;
            let compared = map_indices(step.scored.len(), |index| {
                token_divergence(&base_logits[row(index)], &logits[row(index)], tokens[step.scored.start + index])
            });
            for (index, token) in step.scored.clone().zip(compared) {
                if !(token.base_loss.is_finite() && token.loss.is_finite() && token.kld.is_finite()) {
                    return Err(EvalError::NonFinite { position: index });
                }
                sums.add(token);
            }
        }
        progress(done + 1, sums.mean_kld());
    }
    Ok(sums.finish(windows.len()))
}

fn check_comparable(base: &forge_model::StepModelInfo, other: &forge_model::StepModelInfo) -> Result<()> {
    let differ =
        |what: &str, left: usize, right: usize| Err(EvalError::Incomparable { reason: format!("A has {left} {what} and B has {right}") });
    if base.vocab_size != other.vocab_size {
        return differ("logits per token", base.vocab_size, other.vocab_size);
    }
    // The same plan is given to both.
    if base.block_size != other.block_size {
        return differ("slots per block", base.block_size, other.block_size);
    }
    if base.max_step_rows != other.max_step_rows {
        return differ("rows per step", base.max_step_rows, other.max_step_rows);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_divergence_of_equal_rows_is_zero() {
        let row = [1.0, 3.0, 2.0, 0.5];
        let token = token_divergence(&row, &row, 2);
        assert_eq!((token.kld, token.same_top), (0.0, true));
        assert_eq!(token.base_loss, token.loss);
        // Shifting all logits changes nothing but their last bits.
        assert!(token_divergence(&row, &row.map(|value| value + 4.0), 2).kld < 1e-12);
    }

    #[test]
    fn the_divergence_is_that_of_the_definition() {
        let (p, q) = ([0.5_f64, 0.25, 0.25], [0.25_f64, 0.25, 0.5]);
        let expected: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
        let token = token_divergence(&p.map(|value| value.ln() as f32), &q.map(|value| value.ln() as f32), 0);
        assert!((token.kld - expected).abs() < 1e-6, "{}", token.kld);
        assert!((token.base_loss - 2.0_f64.ln()).abs() < 1e-6 && (token.loss - 4.0_f64.ln()).abs() < 1e-6);
        assert!(!token.same_top);
    }

    #[test]
    fn the_summary_is_that_of_the_definitions() {
        let losses: [(f64, f64, f64); 4] = [(1.0, 1.2, 0.1), (2.0, 1.9, 0.3), (0.5, 0.9, 0.2), (3.0, 3.3, 0.0)];
        let mut sums = DivergenceSums::default();
        for (index, (base_loss, loss, kld)) in losses.into_iter().enumerate() {
            sums.add(TokenDivergence { kld, base_loss, loss, same_top: index > 0 });
        }
        let found = sums.finish(2);
        let mean = |values: [f64; 4]| values.iter().sum::<f64>() / 4.0;
        let (left, right) = (losses.map(|loss| loss.0), losses.map(|loss| loss.1));
        let covariance = |a: [f64; 4], b: [f64; 4]| a.iter().zip(&b).map(|(x, y)| (x - mean(a)) * (y - mean(b))).sum::<f64>() / 4.0 / 3.0;
        let (base, other) = (mean(left).exp(), mean(right).exp());
        let variance =
            base * base * covariance(left, left) + other * other * covariance(right, right) - 2.0 * base * other * covariance(left, right);
        assert!((found.delta_perplexity.value - (other - base)).abs() < 1e-12);
        assert!((found.delta_perplexity.standard_error - variance.sqrt()).abs() < 1e-12);
        assert!((found.mean_kld.value - 0.15).abs() < 1e-12 && (found.median_kld - 0.15).abs() < 1e-12);
        assert!((found.max_kld, found.same_top.value, found.tokens, found.windows) == (0.3, 0.75, 4, 2));
        let deltas = losses.map(|(base, other, _)| (-other).exp() - (-base).exp());
        assert!((found.rms_delta_p.value - mean(deltas.map(|delta| delta * delta)).sqrt()).abs() < 1e-12);
        assert!((found.mean_delta_p.value - mean(deltas)).abs() < 1e-12);
    }
}
