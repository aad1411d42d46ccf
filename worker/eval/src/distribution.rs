//! One row of logits as a distribution over the vocabulary, in double precision.

/// Natural logarithms of the softmax of one row.
pub fn log_softmax(row: &[f32]) -> Vec<f64> {
    let normalizer = log_normalizer(row);
    row.iter().map(|&value| f64::from(value) - normalizer).collect()
}

/// Logarithm of the sum of the exponentials of a row: what is taken from a logit to get its log-probability.
pub fn log_normalizer(row: &[f32]) -> f64 {
    let largest = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = row.iter().map(|&value| (f64::from(value) - largest).exp()).sum();
    largest + sum.ln()
}

/// The likeliest token; the lower id of equal ones.
pub fn top_token(row: &[f32]) -> usize {
    let better = |best: usize, index: usize| if row[index] > row[best] { index } else { best };
    (1..row.len()).fold(0, better)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_softmax_sums_to_one() {
        let logprobs = log_softmax(&[1.0, 2.0, 1000.0, 999.0]);
        let sum: f64 = logprobs.iter().map(|value| value.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-12, "{sum}");
        assert!((logprobs[2] - logprobs[3] - 1.0).abs() < 1e-12);
    }

    #[test]
    fn what_is_no_number_stays_so() {
        assert!(!log_normalizer(&[1.0, f32::INFINITY]).is_finite());
        assert!(!log_normalizer(&[f32::NEG_INFINITY, f32::NEG_INFINITY]).is_finite());
        assert!(log_normalizer(&[f32::NEG_INFINITY, 0.0]).abs() < 1e-15, "a masked token is no defect");
    }

    #[test]
    fn equal_logits_go_to_the_lower_id() {
        assert_eq!(top_token(&[0.5, 2.0, 2.0, 1.0]), 1);
        assert_eq!(top_token(&[3.0]), 0);
    }
}
