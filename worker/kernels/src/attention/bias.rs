//! What becomes of scores before the softmax: the cap and the linear biases.
//!
//! Every score is changed by its own query's and key's positions alone, so lanes and tiles do not show.

use half::bf16;

use super::{AttentionTask, CHUNK};
use crate::elementwise::capped;
use crate::lanes::{LANES, Lanes};

/// Caps and biases the scores of all queries for the chunk's keys; lanes outside `keys` hold anything.
///
/// # Safety
/// As [`super::attend`]; `scores` holds [`CHUNK`] values per query.
#[inline(always)]
pub(super) unsafe fn bias_chunk<L: Lanes>(task: &AttentionTask<'_>, scores: *mut f32, keys: (usize, usize)) {
    for query in 0..task.queries() {
        for first in (keys.0 / LANES * LANES..keys.1).step_by(LANES) {
            // SAFETY: the vectors lie within the chunk.
            unsafe {
                let at = scores.add(query * CHUNK + first % CHUNK);
                let mut score = L::load(at);
                if let Some(cap) = task.softcap {
                    score = capped(score, cap);
                }
                if let Some(alibi) = &task.alibi {
                    let slope = *alibi.slopes.get_unchecked(query % task.group);
                    score = if alibi.rounded {
                        L::load(rounded_products(slope, first).as_ptr()).mul_add(L::splat(alibi.factor), score)
                    } else {
                        let distances = distances(task.first_position + query / task.group, first);
                        L::load(distances.as_ptr()).mul_add(L::splat(-(slope * alibi.factor)), score)
                    };
                }
                score.store(at);
            }
        }
    }
}

/// Query position − key position for sixteen keys, exact below 2²⁴; zero for later keys, which are not seen.
#[inline(always)]
fn distances(query: usize, first: usize) -> [f32; LANES] {
    std::array::from_fn(|lane| query.saturating_sub(first + lane) as f32)
}

/// bf16(bf16(slope) · bf16(position)) for sixteen keys. Falcon-RW multiplies tensors of bfloat16: the position is
/// rounded too.
#[inline(always)]
fn rounded_products(slope: f32, first: usize) -> [f32; LANES] {
    let slope = bf16::from_f32(slope).to_f32();
    std::array::from_fn(|lane| bf16::from_f32(slope * bf16::from_f32((first + lane) as f32).to_f32()).to_f32())
}
