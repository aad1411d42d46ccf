//! top_k, top_p and min_p without sorting the vocabulary, and the draw from what they leave.
//!
//! The definition is the plain one: order tokens by logit, larger first, equal ones by id; keep the first k;
//! of those the shortest run whose probability reaches top_p; of those the ones at least min_p times as likely as
//! the first. All three keep a prefix of that order, so only a prefix is ever sorted: the tokens above a
//! bound that is known to be low enough. The largest value per chunk of logits gives such bounds cheaply.

use super::row::{CHUNK, exp_non_positive, fill_weights};

/// A token that is still possible, with its unnormalized probability.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Candidate {
    pub(crate) token: u32,
    /// exp((logit − max) / temperature).
    pub(crate) weight: f32,
}

/// The filters of a request and its temperature.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Filters {
    /// 1 / temperature.
    pub(crate) scale: f32,
    pub(crate) top_k: u32,
    pub(crate) top_p: f32,
    pub(crate) min_p: f32,
}

/// A row with the largest value per chunk and of all.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowView<'a> {
    pub(crate) logits: &'a [f32],
    pub(crate) maxima: &'a [f32],
    pub(crate) max: f32,
}

/// Sort key: larger logits first, then lower ids. Adding 0 makes −0 and 0 equal.
fn key(token: usize, logit: f32) -> u64 {
    let bits = (logit + 0.0).to_bits();
    let ascending = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(!ascending) << 32 | token as u64
}

fn token_of(key: u64) -> u32 {
    key as u32
}

impl RowView<'_> {
    /// Keys of all possible tokens with a logit of at least `bound`, in no order.
    fn gather(&self, bound: f32, keys: &mut Vec<u64>) {
        keys.clear();
        for (index, &chunk_max) in self.maxima.iter().enumerate() {
            if chunk_max < bound || chunk_max == f32::NEG_INFINITY {
                continue;
            }
            let start = index * CHUNK;
            let end = (start + CHUNK).min(self.logits.len());
            for (offset, &logit) in self.logits[start..end].iter().enumerate() {
                if logit >= bound && logit != f32::NEG_INFINITY {
                    keys.push(key(start + offset, logit));
                }
            }
        }
    }

    /// The `count` tokens with the largest logits, in order; fewer if fewer are possible.
    pub(crate) fn largest(&self, count: usize, keys: &mut Vec<u64>) {
        let bound = if count == 0 || count > self.maxima.len() {
            f32::NEG_INFINITY
        } else {
            // `count` chunks have a value of at least this, so `count` tokens do.
            let mut maxima: Vec<f32> = self.maxima.to_vec();
            *maxima.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a)).1
        };
        self.gather(bound, keys);
        if keys.len() > count {
            if count > 0 {
                keys.select_nth_unstable(count - 1);
            }
            keys.truncate(count);
        }
        keys.sort_unstable();
    }

    fn weight(&self, token: u32, scale: f32) -> f32 {
        exp_non_positive((self.logits[token as usize] - self.max) * scale)
    }
}

/// What the filters keep, in order, most likely first. `total` is the weight of all tokens; it is only asked
/// for when top_p filters without top_k. The most likely token is always kept.
pub(crate) fn keep(row: RowView<'_>, filters: Filters, total: impl FnOnce() -> f64, keys: &mut Vec<u64>, kept: &mut Vec<Candidate>) {
    let vocabulary = row.logits.len();
    let top_k = filters.top_k as usize;
    if top_k > 0 && top_k < vocabulary {
        row.largest(top_k, keys);
        weigh(row, filters.scale, keys, kept);
        if filters.top_p < 1.0 {
            let total: f64 = kept.iter().map(|candidate| f64::from(candidate.weight)).sum();
            kept.truncate(nucleus(kept, f64::from(filters.top_p) * total).unwrap_or(kept.len()));
        }
    } else if filters.top_p < 1.0 {
        let target = f64::from(filters.top_p) * total();
        // Weights under e^-reach are left out at first: most of the time the rest reaches top_p without them.
        for reach in [6.0, 12.0, 24.0, f32::INFINITY] {
            row.gather(row.max - reach / filters.scale, keys);
            keys.sort_unstable();
            weigh(row, filters.scale, keys, kept);
            if let Some(count) = nucleus(kept, target) {
                kept.truncate(count);
                break;
            }
        }
    } else {
        // The bound is at min_p / e; the exact comparison of weights follows.
        let reach = if filters.min_p > 0.0 { 1.0 - libm::logf(filters.min_p) } else { f32::INFINITY };
        row.gather(row.max - reach / filters.scale, keys);
        keys.sort_unstable();
        weigh(row, filters.scale, keys, kept);
    }
    let possible = kept.iter().take_while(|candidate| candidate.weight >= filters.min_p).count();
    kept.truncate(possible.max(1));
}

fn weigh(row: RowView<'_>, scale: f32, keys: &[u64], kept: &mut Vec<Candidate>) {
    kept.clear();
    kept.extend(keys.iter().map(|&key| {
        let token = token_of(key);
        Candidate { token, weight: row.weight(token, scale) }
    }));
}

/// Length of the shortest run from the start that weighs at least `target`.
fn nucleus(kept: &[Candidate], target: f64) -> Option<usize> {
    let mut sum = 0.0;
    kept.iter()
        .position(|candidate| {
            sum += f64::from(candidate.weight);
            sum >= target
        })
        .map(|last| last + 1)
}

/// The token in whose part of the total weight `uniform` (in [0, 1)) falls.
pub(crate) fn draw(kept: &[Candidate], uniform: f64) -> u32 {
    let total: f64 = kept.iter().map(|candidate| f64::from(candidate.weight)).sum();
    let target = uniform * total;
    let mut sum = 0.0;
    for candidate in kept {
        sum += f64::from(candidate.weight);
        if sum > target {
            return candidate.token;
        }
    }
    // Rounding only: the last token that can be drawn.
    kept.iter().rev().find(|candidate| candidate.weight > 0.0).map_or(0, |candidate| candidate.token)
}

/// As [`draw`], from the whole vocabulary in segments whose sums are known. First the segment is found, then the token
/// in it; only the weights up to that token are computed.
pub(crate) fn draw_from_all(row: RowView<'_>, scale: f32, bounds: &[usize], sums: &[f32], uniform: f64) -> u32 {
    let total: f64 = sums.iter().map(|&sum| f64::from(sum)).sum();
    let mut target = uniform * total;
    let mut last_possible = 0;
    for (segment, &sum) in sums.iter().enumerate() {
        if sum <= 0.0 {
            continue;
        }
        last_possible = segment;
        if target < f64::from(sum) {
            break;
        }
        target -= f64::from(sum);
    }
    let start = bounds[last_possible];
    let mut sum = 0.0;
    let mut last = start;
    let mut weights = [0.0; 4 * CHUNK];
    for (index, logits) in row.logits[start..bounds[last_possible + 1]].chunks(weights.len()).enumerate() {
        fill_weights(logits, row.max, scale, &mut weights);
        for (offset, &weight) in weights[..logits.len()].iter().enumerate() {
            sum += f64::from(weight);
            if weight > 0.0 {
                last = start + index * weights.len() + offset;
                if sum > target {
                    return last as u32;
                }
            }
        }
    }
    // Rounding only: the last token that can be drawn.
    last as u32
}
