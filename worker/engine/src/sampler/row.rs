//! Passes over a whole row of logits: largest value, sum of exponentials, weights.
//!
//! Invariant (DESIGN P2): every sum has one order, whatever the instruction set: the vocabulary is split into
//! the tree's segments, each segment is summed in [`LANES`] interleaved lanes, lanes by halving, segments by the tree.
//! The exponential is plain f32 arithmetic without fused multiply-add, so its bits are equal on every path too.
//! The attribute `multiversion` compiles a loop once per instruction set and picks at run time.

use forge_kernels::tree::{even_leaves, merges_after};
use multiversion::multiversion;

/// Interleaved partial sums of a segment; part of the definition of a sum.
const LANES: usize = 16;
/// Logits per entry of the table of largest values.
pub(crate) const CHUNK: usize = 64;

/// ln 2 in two parts: n · the first is exact for every n that occurs.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// 1.5 · 2²³: adding it leaves the nearest integer in the low mantissa bits.
const ROUNDER: f32 = 12_582_912.0;
/// Below this the exponential would be subnormal; it is zero.
const SMALLEST: f32 = -87.33;

/// exp(x) for x ≤ 0 (−∞ gives 0): 2ⁿ · exp(r), r in ±ln2/2, exp(r) by its Taylor polynomial of degree 7
/// (remainder under 2⁻²⁷).
#[inline(always)]
pub(crate) fn exp_non_positive(x: f32) -> f32 {
    let bounded = if x < SMALLEST { SMALLEST } else { x };
    let biased = bounded * std::f32::consts::LOG2_E + ROUNDER;
    let n = biased - ROUNDER;
    let r = bounded - n * LN_2_HIGH - n * LN_2_LOW;
    let mut sum = 1.0 / 5040.0;
    sum = sum * r + 1.0 / 720.0;
    sum = sum * r + 1.0 / 120.0;
    sum = sum * r + 1.0 / 24.0;
    sum = sum * r + 1.0 / 6.0;
    sum = sum * r + 0.5;
    sum = sum * r + 1.0;
    sum = sum * r + 1.0;
    // n is in the low bits of `biased`; 127 more makes it an exponent.
    let power = f32::from_bits(biased.to_bits().wrapping_add(127) << 23);
    if x < SMALLEST { 0.0 } else { sum * power }
}

/// The row holds a value that no distribution can come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NotFinite;

/// Fills `maxima` with the largest value of every [`CHUNK`] logits and returns the largest of all. −∞ is an
/// impossible token and allowed, unless all are.
pub(crate) fn chunk_maxima(logits: &[f32], maxima: &mut Vec<f32>) -> Result<f32, NotFinite> {
    maxima.clear();
    maxima.resize(logits.len().div_ceil(CHUNK), f32::NEG_INFINITY);
    if fill_maxima(logits, maxima) {
        return Err(NotFinite);
    }
    let max = maxima.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if max.is_finite() { Ok(max) } else { Err(NotFinite) }
}

/// Returns whether a NaN was seen.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2"))]
fn fill_maxima(logits: &[f32], maxima: &mut [f32]) -> bool {
    let mut magnitudes = [0u32; LANES];
    let (chunks, rest) = logits.as_chunks::<CHUNK>();
    for (chunk, target) in chunks.iter().zip(maxima.iter_mut()) {
        *target = chunk_max(chunk, &mut magnitudes);
    }
    if let (false, Some(target)) = (rest.is_empty(), maxima.last_mut()) {
        let mut chunk = [f32::NEG_INFINITY; CHUNK];
        chunk[..rest.len()].copy_from_slice(rest);
        *target = chunk_max(&chunk, &mut magnitudes);
    }
    magnitudes.iter().any(|&bits| bits > f32::INFINITY.to_bits())
}

/// The largest value of a chunk, NaN aside; `magnitudes` keeps the largest bits without their sign, which are over
/// infinity's once there was a NaN.
#[inline(always)]
fn chunk_max(chunk: &[f32; CHUNK], magnitudes: &mut [u32; LANES]) -> f32 {
    let larger = |value: f32, max: f32| if value > max { value } else { max };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for piece in chunk.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            lanes[lane] = larger(piece[lane], lanes[lane]);
            magnitudes[lane] = magnitudes[lane].max(piece[lane].to_bits() & i32::MAX as u32);
        }
    }
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] = larger(lanes[lane + half], lanes[lane]);
        }
        half /= 2;
    }
    lanes[0]
}

/// The segments of a vocabulary and their tree: how a sum over it is ordered.
#[derive(Debug, Clone)]
pub(crate) struct VocabularyTree {
    bounds: Vec<usize>,
    merges: Vec<u8>,
}

impl VocabularyTree {
    pub(crate) fn new(vocab_size: usize) -> Self {
        let bounds = even_leaves(vocab_size);
        let merges = merges_after(bounds.len() - 1);
        VocabularyTree { bounds, merges }
    }

    /// Segment boundaries in token ids.
    pub(crate) fn bounds(&self) -> &[usize] {
        &self.bounds
    }

    /// The tree over one value per segment.
    fn combine(&self, segment: impl Fn(usize) -> f32) -> f32 {
        let mut stack = [0.0f32; 8];
        let mut height = 0;
        for (index, &merges) in self.merges.iter().enumerate() {
            stack[height] = segment(index);
            height += 1;
            for _ in 0..merges {
                stack[height - 2] += stack[height - 1];
                height -= 1;
            }
        }
        stack[0]
    }

    /// Sum over the row of exp((logit − max) · scale); `sums` receives the sum of every segment.
    pub(crate) fn sum_exp(&self, logits: &[f32], max: f32, scale: f32, sums: &mut Vec<f32>) -> f32 {
        sums.clear();
        sums.extend(self.bounds.windows(2).map(|pair| sum_exp_segment(&logits[pair[0]..pair[1]], max, scale)));
        self.combine(|index| sums[index])
    }
}

/// Adds lanes by halving: i and i + 8, then i and i + 4, ….
#[inline(always)]
fn fold(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2"))]
fn sum_exp_segment(logits: &[f32], max: f32, scale: f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let pieces = logits.chunks_exact(LANES);
    let rest = pieces.remainder();
    for piece in pieces {
        for lane in 0..LANES {
            lanes[lane] += exp_non_positive((piece[lane] - max) * scale);
        }
    }
    for (lane, &logit) in rest.iter().enumerate() {
        lanes[lane] += exp_non_positive((logit - max) * scale);
    }
    fold(lanes)
}

/// Writes exp((logit − max) · scale) of every logit: the terms of [`VocabularyTree::sum_exp`].
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq", "x86_64+avx2"))]
pub(crate) fn fill_weights(logits: &[f32], max: f32, scale: f32, weights: &mut [f32]) {
    for (&logit, weight) in logits.iter().zip(weights) {
        *weight = exp_non_positive((logit - max) * scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_within_two_ulps() {
        assert_eq!(exp_non_positive(0.0), 1.0);
        assert_eq!(exp_non_positive(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp_non_positive(f32::MIN), 0.0);
        for step in 0..200_000 {
            let x = -(step as f32) * 87.3 / 200_000.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp_non_positive(x)) - exact).abs() / exact;
            assert!(error < 2.0 * f64::from(f32::EPSILON), "exp({x}): relative error {error}");
        }
    }

    #[test]
    fn sums_agree_with_float64() {
        for size in [1, 3, 17, 200, 1000, 49_152] {
            let logits: Vec<f32> = (0..size).map(|i| ((i * 37) % 101) as f32 * 0.17 - 9.0).collect();
            let tree = VocabularyTree::new(size);
            let mut maxima = Vec::new();
            let max = chunk_maxima(&logits, &mut maxima).unwrap();
            assert_eq!(max, logits.iter().copied().fold(f32::MIN, f32::max));
            let exact: f64 = logits.iter().map(|&l| f64::from(l - max).exp()).sum();
            let sum = tree.sum_exp(&logits, max, 1.0, &mut Vec::new());
            assert!((f64::from(sum) / exact - 1.0).abs() < 1e-6, "{size}");
            let mut weights = vec![0.0; size];
            fill_weights(&logits, max, 1.0, &mut weights);
            assert!(weights.iter().zip(&logits).all(|(&weight, &logit)| weight == exp_non_positive(logit - max)), "{size}");
        }
    }

    #[test]
    fn rows_without_a_distribution_are_refused_and_impossible_tokens_are_not() {
        let mut maxima = Vec::new();
        for bad in [f32::NAN, f32::INFINITY] {
            for at in [0, 63, 64, 99] {
                let mut logits = vec![1.0; 100];
                logits[at] = bad;
                assert_eq!(chunk_maxima(&logits, &mut maxima), Err(NotFinite));
            }
        }
        assert_eq!(chunk_maxima(&[f32::NEG_INFINITY; 70], &mut maxima), Err(NotFinite));
        assert_eq!(chunk_maxima(&[f32::NEG_INFINITY, 2.0], &mut maxima), Ok(2.0));
    }
}
