//! How a token chooses its experts from the router's logits: a pure function, the same on every rank.
//!
//! What it is: the rules of the families (shared specification D.4, after the transformers library) as one function
//! over [`RouterSpec`]. What it is not: it multiplies nothing; logits come from the router's product.
//!
//! Invariant: scores and weights are f32, computed in f64 and rounded once, so that they do not depend on a vector
//! unit; of equal scores the lower index is chosen. Whatever the logits are, as many different experts are chosen as the
//! specification says: a NaN counts as the greatest score, so that it reaches the outputs of its token, and no other's.

use crate::arch::{RouterGroups, RouterScore, RouterSpec};

/// Added to the sum that sigmoid weights are divided by (DeepSeek-V3).
const SIGMOID_SUM_EPS: f32 = 1e-20;

/// Chooses `spec.per_token` experts of one token and appends them with their weights, in ascending order of experts.
/// `correction` is added to scores for the choice alone.
///
/// ```
/// use forge_model::arch::{RouterScore, RouterSpec};
///
/// let spec = RouterSpec {
///     per_token: 2,
///     score: RouterScore::Softmax,
///     normalize: true,
///     scale: 1.0,
///     groups: None,
///     bias: false,
///     correction_bias: false,
/// };
/// let mut chosen = Vec::new();
/// forge_model::routing::route(&spec, &[0.0, 3.0, -1.0, 3.0], None, &mut chosen);
/// assert_eq!(chosen, [(1, 0.5), (3, 0.5)]);
/// ```
pub fn route(spec: &RouterSpec, logits: &[f32], correction: Option<&[f32]>, out: &mut Vec<(u32, f32)>) {
    let start = out.len();
    match spec.score {
        RouterScore::SparseMixer { jitter } => sparse_mixer(logits, spec.per_token, jitter, out),
        RouterScore::SoftmaxOfChosen => {
            let chosen = best(logits, spec.per_token);
            let weights = softmax(&chosen.iter().map(|&expert| logits[expert]).collect::<Vec<_>>());
            out.extend(chosen.iter().map(|&expert| expert as u32).zip(weights));
        }
        RouterScore::Softmax => by_score(spec, &softmax(logits), correction, out),
        RouterScore::Sigmoid => by_score(spec, &logits.iter().map(|&logit| sigmoid(logit)).collect::<Vec<_>>(), correction, out),
    }
    let chosen = &mut out[start..];
    if spec.normalize {
        let sum: f32 = chosen.iter().map(|(_, weight)| weight).sum();
        let sum = if spec.score == RouterScore::Sigmoid { sum + SIGMOID_SUM_EPS } else { sum };
        chosen.iter_mut().for_each(|(_, weight)| *weight /= sum);
    }
    chosen.iter_mut().for_each(|(_, weight)| *weight *= spec.scale);
    chosen.sort_unstable_by_key(|&(expert, _)| expert);
}

/// 1 / (1 + e^−x): the factor on a shared expert's output.
pub fn sigmoid(x: f32) -> f32 {
    (1.0 / (1.0 + (-f64::from(x)).exp())) as f32
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let greatest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers: Vec<f64> = logits.iter().map(|&logit| (f64::from(logit) - f64::from(greatest)).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.iter().map(|power| (power / sum) as f32).collect()
}

/// The `count` greatest, best first; the lower index of equal ones.
fn best(values: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| rank(values[b]).total_cmp(&rank(values[a])));
    order.truncate(count);
    order
}

/// A value as it is compared: both zeros are the same, and so are all NaNs, whose sign depends on the machine.
fn rank(value: f32) -> f32 {
    if value.is_nan() { f32::NAN } else { value + 0.0 }
}

fn by_score(spec: &RouterSpec, scores: &[f32], correction: Option<&[f32]>, out: &mut Vec<(u32, f32)>) {
    let mut choice = match correction {
        Some(correction) => scores.iter().zip(correction).map(|(score, correction)| score + correction).collect(),
        None => scores.to_vec(),
    };
    if let Some(groups) = spec.groups {
        leave_best_groups(groups, &mut choice);
    }
    out.extend(best(&choice, spec.per_token).iter().map(|&expert| (expert as u32, scores[expert])));
}

/// Makes the experts of all groups but the best unchoosable.
fn leave_best_groups(groups: RouterGroups, choice: &mut [f32]) {
    let size = choice.len() / groups.count;
    let of_group = |group: &[f32]| {
        let best: Vec<f32> = best(group, if groups.best_two { 2 } else { 1 }).iter().map(|&index| group[index]).collect();
        best.iter().sum::<f32>()
    };
    let scores: Vec<f32> = choice.chunks(size).map(of_group).collect();
    let kept = best(&scores, groups.kept);
    for (group, choice) in choice.chunks_mut(size).enumerate() {
        if !kept.contains(&group) {
            choice.fill(f32::NEG_INFINITY);
        }
    }
}

/// Phi-3.5-MoE: the best expert, with a weight among those not much worse; then the best of the rest, and so on.
fn sparse_mixer(logits: &[f32], count: usize, jitter: f32, out: &mut Vec<(u32, f32)>) {
    let order = best(logits, count);
    let mut left = logits.to_vec();
    for chosen in order {
        let greatest = left[chosen];
        let near: Vec<f32> = left
            .iter()
            .zip(logits)
            .map(|(&left, &logit)| if (greatest - logit) / logit.abs().max(greatest) > 2.0 * jitter { f32::NEG_INFINITY } else { left })
            .collect();
        out.push((chosen as u32, softmax(&near)[chosen]));
        left[chosen] = f32::NEG_INFINITY;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(score: RouterScore, per_token: usize) -> RouterSpec {
        RouterSpec { per_token, score, normalize: false, scale: 1.0, groups: None, bias: false, correction_bias: false }
    }

    fn routed(spec: &RouterSpec, logits: &[f32], correction: Option<&[f32]>) -> Vec<(u32, f32)> {
        let mut out = vec![(9, 9.0)];
        route(spec, logits, correction, &mut out);
        assert_eq!(out.remove(0), (9, 9.0), "what is there already stays");
        out
    }

    fn assert_near(actual: &[(u32, f32)], expected: &[(u32, f32)]) {
        assert_eq!(actual.len(), expected.len(), "{actual:?}");
        for (actual, expected) in actual.iter().zip(expected) {
            assert!(actual.0 == expected.0 && (actual.1 - expected.1).abs() < 1e-6, "{actual:?} instead of {expected:?}");
        }
    }

    #[test]
    fn softmax_of_all_or_of_the_chosen() {
        let logits = [1.0, 3.0, 2.0, 0.0];
        let sum: f32 = logits.iter().map(|x: &f32| x.exp()).sum();
        let weight = |x: f32| x.exp() / sum;
        assert_near(&routed(&spec(RouterScore::Softmax, 2), &logits, None), &[(1, weight(3.0)), (2, weight(2.0))]);
        let pair = 1.0 / (1.0 + (-1.0f32).exp());
        assert_near(&routed(&spec(RouterScore::SoftmaxOfChosen, 2), &logits, None), &[(1, pair), (2, 1.0 - pair)]);
        let normalized = RouterSpec { normalize: true, scale: 3.0, ..spec(RouterScore::Softmax, 2) };
        assert_near(&routed(&normalized, &logits, None), &[(1, 3.0 * pair), (2, 3.0 * (1.0 - pair))]);
    }

    #[test]
    fn of_equal_scores_the_lower_index_is_chosen() {
        for score in [RouterScore::Softmax, RouterScore::Sigmoid, RouterScore::SoftmaxOfChosen, RouterScore::SparseMixer { jitter: 0.1 }] {
            let chosen: Vec<u32> = routed(&spec(score, 2), &[0.5; 6], None).iter().map(|&(expert, _)| expert).collect();
            assert_eq!(chosen, [0, 1], "{score:?}");
            let zeros: Vec<u32> = routed(&spec(score, 1), &[-0.0, 0.0], None).iter().map(|&(expert, _)| expert).collect();
            assert_eq!(zeros, [0], "{score:?}: zeros are equal, whatever their sign");
        }
        // Sigmoids that round to 1 are equal, whatever their logits are.
        let saturated = routed(&spec(RouterScore::Sigmoid, 1), &[0.0, 30.0, 50.0], None);
        assert_eq!(saturated, [(1, 1.0)]);
    }

    #[test]
    fn a_correction_counts_for_the_choice_alone() {
        let logits = [0.0, 1.0, 2.0, 3.0];
        let correction = [1.0, 0.0, 0.0, -1.0];
        let expected = [(0, sigmoid(0.0)), (2, sigmoid(2.0))];
        assert_near(&routed(&spec(RouterScore::Sigmoid, 2), &logits, Some(&correction)), &expected);
    }

    #[test]
    fn only_the_best_groups_are_chosen_from() {
        // Groups of two: the best expert is in group 2, the best pair in group 0.
        let logits = [1.0, 0.9, -2.0, 0.5, 2.0, -3.0];
        let grouped =
            |best_two, kept| RouterSpec { groups: Some(RouterGroups { count: 3, kept, best_two }), ..spec(RouterScore::Sigmoid, 2) };
        let experts = |spec: &RouterSpec| routed(spec, &logits, None).iter().map(|&(expert, _)| expert).collect::<Vec<_>>();
        assert_eq!(experts(&grouped(false, 1)), [4, 5]);
        assert_eq!(experts(&grouped(true, 1)), [0, 1]);
        assert_eq!(experts(&grouped(true, 2)), [0, 4]);
        assert_eq!(experts(&grouped(false, 3)), [0, 4]);
    }

    #[test]
    fn the_sparse_mixer_weighs_each_pick_among_those_near_it() {
        // 2 · jitter = 0.5: beside 4 only 3 counts (1 / 4 ≤ 0.5, 3 / 4 is not); of the rest, beside 3, only itself.
        let logits = [1.0, 4.0, 3.0, -1.0];
        let first = 1.0 / (1.0 + (-1.0f32).exp());
        assert_near(&routed(&spec(RouterScore::SparseMixer { jitter: 0.25 }, 2), &logits, None), &[(1, first), (2, 1.0)]);
    }

    #[test]
    fn every_rule_chooses_different_experts_of_any_logits() {
        const MINUS_NAN: f32 = -f32::NAN;
        let (nan, infinity) = (f32::NAN, f32::INFINITY);
        let rows = [
            [nan; 6],
            [MINUS_NAN; 6],
            [infinity; 6],
            [-infinity; 6],
            [nan, -infinity, -infinity, -infinity, -infinity, -infinity],
            [-infinity, -infinity, 1.0, -infinity, MINUS_NAN, -infinity],
            [infinity, -infinity, nan, 0.0, infinity, MINUS_NAN],
            [0.0, 1.0, 2.0, 3.0, 4.0, infinity],
        ];
        let grouped = |best_two| Some(RouterGroups { count: 3, kept: 2, best_two });
        for score in [RouterScore::Softmax, RouterScore::Sigmoid, RouterScore::SoftmaxOfChosen, RouterScore::SparseMixer { jitter: 0.1 }] {
            for (normalize, groups) in [(false, None), (true, None), (false, grouped(false)), (true, grouped(true))] {
                for correction in [None, Some([0.5, -0.5, 0.0, 0.0, 0.25, 0.0]), Some([nan; 6])] {
                    let spec = RouterSpec { normalize, groups, ..spec(score, 3) };
                    for logits in rows {
                        let chosen = routed(&spec, &logits, correction.as_ref().map(|values| values.as_slice()));
                        let ascending = chosen.windows(2).all(|pair| pair[0].0 < pair[1].0);
                        assert!(chosen.len() == 3 && ascending && chosen[2].0 < 6, "{spec:?}, {logits:?}: {chosen:?}");
                        let poisoned = logits.iter().all(|logit| logit.is_nan());
                        assert!(!poisoned || chosen.iter().all(|(_, weight)| weight.is_nan()), "{spec:?}: {chosen:?}");
                    }
                }
            }
        }
    }
}
